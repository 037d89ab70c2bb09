//! Waiting for another thread for a moment: without sleep, since waking up costs more than what is waited for.

use std::time::{Duration, Instant};

/// Turns of waiting before the processor is yielded: about 30 µs.
const SPINS: u32 = 1000;
/// Turns from one look at the clock to the next.
const CLOCK_TURNS: u32 = 64;

/// How often a thread has looked for what it waits for.
#[derive(Default)]
pub(crate) struct Waiting {
    turns: u32,
}

impl Waiting {
    /// Lets a moment pass. From some 30 µs on it yields the processor at every turn, so that with more threads than processors the one that
    /// is waited for gets to run.
    pub(crate) fn pause(&mut self) {
        self.turns = self.turns.saturating_add(1);
        if self.turns <= SPINS {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }

    /// Waits until `done`, or for about `patience`; which of the two it was is nobody's concern.
    pub(crate) fn until(done: impl Fn() -> bool, patience: Duration) {
        let mut waiting = Waiting::default();
        let mut began = None;
        while !done() {
            waiting.pause();
            if waiting.turns.is_multiple_of(CLOCK_TURNS)
                && began.get_or_insert_with(Instant::now).elapsed() > patience
            {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn waiting_ends_when_it_is_done() {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(5));
                done.store(true, Ordering::Release);
            });
            Waiting::until(|| done.load(Ordering::Acquire), Duration::from_secs(60));
        });
        assert!(done.into_inner());
    }

    #[test]
    fn waiting_ends_when_patience_does() {
        let began = Instant::now();
        Waiting::until(|| false, Duration::from_millis(2));
        assert!(began.elapsed() >= Duration::from_millis(2));
        Waiting::until(|| true, Duration::from_secs(60));
        assert!(began.elapsed() < Duration::from_secs(60));
    }
}
