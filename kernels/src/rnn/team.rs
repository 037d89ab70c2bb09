//! Threads that go through all steps of a sequence together, with a barrier that costs microseconds.
//!
//! A scope of the pool per step costs tens of microseconds, as much as the step of a small batch. A team is
//! assembled once: helpers are offered to the pool, those that come within [`PATIENCE`] join, the work is cut
//! into as many parts as there are members, and each member keeps its part (and its part of the weights in its
//! own cache) to the end.
//!
//! # Why it cannot deadlock
//! - The caller waits for helpers for a bounded time and then shuts the door ([`crate::invitation`]): a helper either came before and is
//!   counted, or finds it shut and returns, so nobody is ever waited for who has not joined. Where the pool has no free thread, the caller is the team.
//! - A member has joined from a running thread. Until its part is done it runs only the given function, which
//!   starts no task, takes no job of the pool and holds no lock at a barrier. So every member goes on to the next
//!   barrier, and as all parts have equally many, every barrier fills.
//! - A member that panics breaks the team: the others panic at their barrier instead of waiting.
//! - Waiting spins for a while and then yields the processor at every turn, so that with more members than
//!   processors the one that is waited for gets to run.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use crate::invitation::{Guests, invite};
use crate::waiting::Waiting;

/// How long the caller waits for helpers: a sleeping thread of the pool is awake in about 50 µs.
const PATIENCE: Duration = Duration::from_micros(200);

/// Where the members of a team wait for each other.
pub(super) struct Barrier<'a> {
    members: usize,
    /// Arrivals since the start. A member arrives anew only when all have arrived as often as it has, so
    /// `members · n` arrivals mean that each has arrived n times.
    arrived: AtomicUsize,
    broken: &'a AtomicBool,
}

impl Barrier<'_> {
    /// Says that this member has come to its `visit`-th barrier (from 0). What it wrote before can be read by
    /// the others after their [`Barrier::wait`].
    pub(super) fn arrive(&self) {
        self.arrived.fetch_add(1, Ordering::AcqRel);
    }

    /// Waits until all members have arrived at barrier `visit`.
    pub(super) fn wait(&self, visit: usize) {
        wait_until(self.broken, || self.arrived.load(Ordering::Acquire) >= self.members * (visit + 1));
    }
}

/// # Panics
/// When a member of the team has panicked.
fn wait_until(broken: &AtomicBool, done: impl Fn() -> bool) {
    let mut waiting = Waiting::default();
    while !done() {
        assert!(!broken.load(Ordering::Relaxed), "another member of the team panicked");
        waiting.pause();
    }
}

/// Breaks the team when its holder unwinds.
struct BreakOnPanic<'a>(&'a AtomicBool);

impl Drop for BreakOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// What the members share once the door is shut.
struct Work<'a, P> {
    barrier: Barrier<'a>,
    parts: Vec<Mutex<Option<P>>>,
}

impl<P> Work<'_, P> {
    fn take(&self, place: usize) -> P {
        let part = self.parts[place].lock().unwrap_or_else(PoisonError::into_inner).take();
        part.expect("each place is given once")
    }
}

/// Assembles a team of at most `asked` threads of the current pool, the calling one among them; `deal` cuts the
/// work into as many parts as there are members, and each member runs one of them, all of them at the same time.
///
/// `run` must come to the same number of barriers for every part.
pub(super) fn run_together<P: Send>(
    asked: usize,
    deal: impl FnOnce(usize) -> Vec<P>,
    run: impl Fn(P, &Barrier<'_>) + Sync,
) {
    // Before the flag's guard, so that it outlives every borrower.
    let broken = AtomicBool::new(false);
    let work: OnceLock<Work<'_, P>> = OnceLock::new();
    let lead = |members: usize| {
        let _guard = BreakOnPanic(&broken);
        let parts: Vec<_> = deal(members).into_iter().map(|part| Mutex::new(Some(part))).collect();
        assert_eq!(parts.len(), members, "a part for each member");
        let barrier = Barrier { members, arrived: AtomicUsize::new(0), broken: &broken };
        let work = work.get_or_init(|| Work { barrier, parts });
        run(work.take(0), &work.barrier);
    };
    if asked <= 1 {
        return lead(1);
    }
    let help = |place: usize| {
        let _guard = BreakOnPanic(&broken);
        wait_until(&broken, || work.get().is_some());
        let work = work.get().expect("waited for");
        run(work.take(place), &work.barrier);
    };
    invite(asked - 1, &help, |guests: &Guests<'_>| {
        Waiting::until(|| guests.came() + 1 >= asked, PATIENCE);
        lead(1 + guests.shut());
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every member adds its place at each of many steps and sees the sum of all after the barrier.
    fn steps_together(asked: usize) -> usize {
        const STEPS: usize = 200;
        let sums: Vec<AtomicUsize> = (0..STEPS).map(|_| AtomicUsize::new(0)).collect();
        let size = AtomicUsize::new(0);
        let deal = |members: usize| {
            size.store(members, Ordering::Relaxed);
            (1..=members).collect()
        };
        run_together(asked, deal, |part: usize, barrier| {
            let members = size.load(Ordering::Relaxed);
            for (visit, sum) in sums.iter().enumerate() {
                sum.fetch_add(part, Ordering::Relaxed);
                barrier.arrive();
                barrier.wait(visit);
                assert_eq!(sum.load(Ordering::Relaxed), members * (members + 1) / 2);
            }
        });
        size.into_inner()
    }

    #[test]
    fn all_members_meet_at_every_barrier() {
        for asked in 1..=5 {
            let members = steps_together(asked);
            assert!((1..=asked).contains(&members));
        }
    }

    #[test]
    fn a_pool_with_too_few_threads_makes_a_smaller_team() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(pool.install(|| steps_together(4)), 1);
    }

    #[test]
    fn teams_within_tasks_of_a_crowded_pool_finish() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        pool.install(|| {
            rayon::scope(|scope| {
                for _ in 0..12 {
                    scope.spawn(|_| {
                        rayon::join(|| steps_together(3), || steps_together(4));
                    });
                }
            });
        });
    }

    #[test]
    fn a_panic_of_one_member_ends_the_team() {
        let outcome = std::panic::catch_unwind(|| {
            run_together(
                2,
                |members| (0..members).collect(),
                |part: usize, barrier| {
                    assert!(part != 0, "the first part fails");
                    barrier.arrive();
                    barrier.wait(0);
                },
            );
        });
        assert!(outcome.is_err());
    }
}
