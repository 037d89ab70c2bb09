//! Help from the threads of the pool for one call, without waiting for a thread that has not come yet.
//!
//! A scope of [`rayon`] ends when every job that was spawned in it has run. Threads of a pool that have had nothing to do for some 30 µs sleep, and
//! need 30 to 50 µs to be there again: a call of 40 µs, all of whose tasks the caller had meanwhile done alone, waited as long again for a thread
//! that found nothing left. Here a job is an invitation that ends with the call: who comes later finds the door shut and touches nothing of it.

use std::any::Any;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::Duration;

use crate::waiting::Waiting;

/// How long the host looks for guests that are still at work before it sleeps.
const PATIENCE: Duration = Duration::from_micros(500);

/// The bit of [`Door::state`] that says that nobody may come in any more; the others count who is in.
const SHUT: usize = 1 << (usize::BITS - 1);

/// Runs `host` on this thread, and `guest(1)`, …, `guest(guests)` on those threads of the current pool that come before it has ended: each of them once, or
/// not at all. Returns when all who came have left.
///
/// # Panics
/// When `host` or a guest does.
pub(crate) fn invite<G: Fn(usize) + Sync>(guests: usize, guest: &G, host: impl FnOnce()) {
    let door = Arc::new(Door {
        state: AtomicUsize::new(0),
        guest: std::ptr::from_ref(guest).cast(),
        // SAFETY: called by `Door::enter` alone, with the pointer that was made of a `G` a line above, while that `G` is borrowed.
        run: |guest, place| unsafe { (*guest.cast::<G>())(place) },
        host: thread::current(),
        panic: Mutex::new(None),
    });
    // Before the first invitation: should a later one fail, those who are in are still waited for.
    let closing = Closing(&door);
    for place in 1..=guests {
        let door = Arc::clone(&door);
        rayon::spawn(move || door.enter(place));
    }
    host();
    drop(closing);
    let panicked = door.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(payload) = panicked {
        panic::resume_unwind(payload);
    }
}

/// What the threads of a call share; it outlives the call in the hands of those who come too late.
struct Door {
    state: AtomicUsize,
    /// The guest's closure, which is borrowed until the door is shut and everybody has left.
    guest: *const (),
    run: fn(*const (), usize),
    host: Thread,
    /// What the first guest that panicked had to say.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: the pointer is to a closure that is `Sync`, and is followed only while its owner waits.
unsafe impl Send for Door {}
// SAFETY: as above; everything else is `Sync`.
unsafe impl Sync for Door {}

impl Door {
    /// Does a guest's part, unless the door is shut.
    fn enter(&self, place: usize) {
        // Acquire: what the host wrote before it invited. The count keeps the host from returning.
        let counted = self.state.fetch_update(Ordering::Acquire, Ordering::Relaxed, |state| {
            (state & SHUT == 0).then_some(state + 1)
        });
        if counted.is_err() {
            return;
        }
        if let Err(payload) = panic::catch_unwind(AssertUnwindSafe(|| (self.run)(self.guest, place))) {
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
        // Release: what this guest has written, for the host, which may return from here on.
        if self.state.fetch_sub(1, Ordering::Release) == SHUT | 1 {
            self.host.unpark();
        }
    }
}

/// Shuts the door and waits until everybody has left, however the host ends.
struct Closing<'a>(&'a Door);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let Closing(door) = self;
        let empty = || door.state.load(Ordering::Acquire) == SHUT;
        door.state.fetch_or(SHUT, Ordering::Relaxed);
        Waiting::until(empty, PATIENCE);
        while !empty() {
            thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32};
    use std::time::Instant;

    use super::*;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn who_comes_is_waited_for() {
        let pool = pool(3);
        for round in 0..200 {
            let came = AtomicBool::new(false);
            let done = AtomicU32::new(0);
            let guest = |place: usize| {
                assert!((1..=2).contains(&place));
                came.store(true, Ordering::Release);
                if round % 20 == 0 {
                    thread::sleep(2 * PATIENCE);
                }
                done.fetch_add(1, Ordering::Relaxed);
            };
            let inside = AtomicU32::new(0);
            pool.install(|| {
                invite(2, &guest, || {
                    Waiting::until(|| came.load(Ordering::Acquire), Duration::from_secs(60));
                    inside.store(1, Ordering::Relaxed);
                });
                // Nobody works any more.
                let now = done.load(Ordering::Relaxed);
                assert!((1..=2).contains(&now));
                thread::sleep(Duration::from_micros(50));
                assert_eq!(done.load(Ordering::Relaxed), now);
            });
            assert_eq!(inside.into_inner(), 1);
        }
    }

    #[test]
    fn who_does_not_come_is_not_waited_for() {
        let pool = pool(2);
        let (busy, free) = (AtomicBool::new(false), AtomicBool::new(false));
        pool.in_place_scope(|scope| {
            scope.spawn(|_| {
                busy.store(true, Ordering::Release);
                Waiting::until(|| free.load(Ordering::Acquire), Duration::from_secs(60));
            });
            Waiting::until(|| busy.load(Ordering::Acquire), Duration::from_secs(60));
            let began = Instant::now();
            pool.install(|| invite(1, &|_| panic!("nobody is free to come"), || ()));
            assert!(began.elapsed() < Duration::from_secs(30), "the other thread was waited for");
            free.store(true, Ordering::Release);
        });
    }

    #[test]
    fn panics_reach_the_host() {
        let pool = pool(2);
        let came = AtomicBool::new(false);
        let guest = |_| {
            came.store(true, Ordering::Release);
            panic!("from a guest");
        };
        let call = || {
            invite(1, &guest, || {
                Waiting::until(|| came.load(Ordering::Acquire), Duration::from_secs(60));
            });
        };
        let payload = pool.install(|| panic::catch_unwind(AssertUnwindSafe(call))).unwrap_err();
        assert_eq!(payload.downcast_ref(), Some(&"from a guest"));
        let left = AtomicBool::new(false);
        came.store(false, Ordering::Relaxed);
        let guest = |_| {
            came.store(true, Ordering::Release);
            thread::sleep(Duration::from_millis(2));
            left.store(true, Ordering::Release);
        };
        let call = || {
            invite(1, &guest, || {
                Waiting::until(|| came.load(Ordering::Acquire), Duration::from_secs(60));
                panic!("from the host");
            });
        };
        let payload = pool.install(|| panic::catch_unwind(AssertUnwindSafe(call))).unwrap_err();
        assert_eq!(payload.downcast_ref(), Some(&"from the host"));
        assert!(left.load(Ordering::Acquire), "the host left before its guest");
    }
}
