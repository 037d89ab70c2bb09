//! Help from the threads of the pool for one call, without waiting for a thread that has not come yet.
//!
//! A scope of [`rayon`] ends when every job that was spawned in it has run. Threads of a pool that have had nothing to do for some 30 µs sleep, and
//! need 30 to 50 µs to be there again: a call of 40 µs, all of whose tasks the caller had meanwhile done alone, waited as long again for a thread
//! that found nothing left. Here a job is an invitation that ends with the call: who comes later finds the door shut and touches nothing of it.
//!
//! To wake a sleeper costs the caller some 9 µs of its own, so a call of few µs should invite only who is awake. A thread cannot ask for that, but it
//! remembers how its last invitation went ([`company_is_likely`]).

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::waiting::Waiting;

/// How long the host looks for guests that are still at work before it sleeps.
const PATIENCE: Duration = Duration::from_micros(500);

/// The bit of [`Door::state`] that says that nobody may come in any more.
const SHUT: u64 = 1 << 63;
/// One who is in; below it stand 32 bits that count who has come.
const IN: u64 = 1 << 32;

/// For so long the threads of a pool look for work before they sleep. Calls that follow one another within this time keep them awake.
const AWAKE: Duration = Duration::from_micros(30);
/// For so long calls that follow one another do their work alone before some invite to find out, twice as long each time that nobody comes, up to [`MOST_ALONE`].
const FIRST_ALONE: Duration = Duration::from_micros(50);
const MOST_ALONE: Duration = Duration::from_micros(1600);
/// For so long calls then invite: a thread that one of them wakes comes to a later one.
const TRIAL: Duration = Duration::from_micros(100);

thread_local! {
    static COMPANY: Cell<Company> = const { Cell::new(Company::NONE) };
}

/// Whether a call that takes about `alone` without help, too little to wake a thread for it, should invite others: they came to this thread's last call, a
/// moment ago, or calls have followed one another for so long that it is time to try. What a call computes must not depend on it.
pub(crate) fn company_is_likely(alone: Duration) -> bool {
    let mut company = COMPANY.get();
    let likely = company.is_likely(Instant::now(), alone);
    COMPANY.set(company);
    likely
}

/// What a thread remembers of its calls.
#[derive(Clone, Copy)]
struct Company {
    /// When the last call is sure to have ended.
    ended: Option<Instant>,
    /// Whether somebody came to it.
    came: bool,
    /// Since when calls that follow one another have been alone, and how long they are before some try.
    alone_since: Option<Instant>,
    patience: Duration,
    /// When they began to try, if they do.
    trial: Option<Instant>,
}

impl Company {
    const NONE: Company =
        Company { ended: None, came: false, alone_since: None, patience: FIRST_ALONE, trial: None };

    fn is_likely(&mut self, now: Instant, alone: Duration) -> bool {
        let follows = self.ended.is_some_and(|ended| now.saturating_duration_since(ended) < AWAKE);
        // Twice, for processors that are slower than thought.
        self.ended = Some(now + 2 * alone);
        if std::mem::take(&mut self.came) && follows {
            return true;
        }
        if let Some(began) = self.trial {
            if now.duration_since(began) < TRIAL {
                return true;
            }
            (self.trial, self.alone_since) = (None, None);
            self.patience = (2 * self.patience).min(MOST_ALONE);
        }
        let since = self.alone_since.filter(|_| follows).unwrap_or(now);
        self.alone_since = Some(since);
        self.trial = (now.duration_since(since) >= self.patience).then_some(now);
        self.trial.is_some()
    }

    fn invited(&mut self, now: Instant, came: bool) {
        (self.ended, self.came) = (Some(now), came);
        if came {
            *self = Company { alone_since: None, patience: FIRST_ALONE, trial: None, ..*self };
        }
    }
}

/// Runs `host` on this thread, and `guest(1)`, `guest(2)`, … on those of `guests` threads of the current pool that come before it has ended or has
/// shut the door, counted as they come. Returns when all who came have left.
///
/// # Panics
/// When `host` or a guest does.
pub(crate) fn invite<G: Fn(usize) + Sync>(guests: usize, guest: &G, host: impl FnOnce(&Guests<'_>)) {
    let door = Arc::new(Door {
        state: AtomicU64::new(0),
        guest: std::ptr::from_ref(guest).cast(),
        // SAFETY: called by `Door::enter` alone, with the pointer that was made of a `G` a line above, while that `G` is borrowed.
        run: |guest, place| unsafe { (*guest.cast::<G>())(place) },
        host: thread::current(),
        panic: Mutex::new(None),
    });
    // Before the first invitation: should a later one fail, those who are in are still waited for.
    let closing = Closing(&door);
    for _ in 0..guests {
        let door = Arc::clone(&door);
        rayon::spawn(move || door.enter());
    }
    host(&Guests(&door));
    drop(closing);
    let panicked = door.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(payload) = panicked {
        panic::resume_unwind(payload);
    }
}

/// Those who come to a call, as its host sees them.
pub(crate) struct Guests<'a>(&'a Door);

impl Guests<'_> {
    /// How many have come so far.
    pub(crate) fn came(&self) -> usize {
        (self.0.state.load(Ordering::Relaxed) & (IN - 1)) as usize
    }

    /// Lets nobody in any more; how many have come.
    pub(crate) fn shut(&self) -> usize {
        self.0.state.fetch_or(SHUT, Ordering::Relaxed);
        self.came()
    }
}

/// What the threads of a call share; it outlives the call in the hands of those who come too late.
struct Door {
    /// Who has come and who is in, and whether the door is shut.
    state: AtomicU64,
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
    fn enter(&self) {
        // Acquire: what the host wrote before it invited. The count keeps the host from returning.
        let counted = self.state.fetch_update(Ordering::Acquire, Ordering::Relaxed, |state| {
            (state & SHUT == 0).then_some(state + IN + 1)
        });
        let Ok(before) = counted else { return };
        let place = (before & (IN - 1)) as usize + 1;
        if let Err(payload) = panic::catch_unwind(AssertUnwindSafe(|| (self.run)(self.guest, place))) {
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
        // Release: what this guest has written, for the host, which may return from here on.
        if self.state.fetch_sub(IN, Ordering::Release) & !(IN - 1) == SHUT | IN {
            self.host.unpark();
        }
    }
}

/// Shuts the door and waits until everybody has left, however the host ends.
struct Closing<'a>(&'a Door);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let Closing(door) = self;
        let empty = || door.state.load(Ordering::Acquire) & !(IN - 1) == SHUT;
        let came = Guests(door).shut() > 0;
        Waiting::until(empty, PATIENCE);
        while !empty() {
            thread::park();
        }
        let mut company = COMPANY.get();
        company.invited(Instant::now(), came);
        COMPANY.set(company);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32};

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
                invite(2, &guest, |_| {
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
            pool.install(|| invite(1, &|_| panic!("nobody is free to come"), |_| ()));
            assert!(began.elapsed() < Duration::from_secs(30), "the other thread was waited for");
            free.store(true, Ordering::Release);
        });
    }

    #[test]
    fn nobody_comes_through_a_shut_door() {
        let pool = pool(3);
        for _ in 0..100 {
            let places = Mutex::new(Vec::new());
            let guest = |place: usize| places.lock().unwrap().push(place);
            let count = AtomicU32::new(0);
            pool.install(|| {
                invite(2, &guest, |guests| {
                    Waiting::until(|| guests.came() > 0, Duration::from_millis(1));
                    let came = guests.shut();
                    thread::sleep(Duration::from_micros(100));
                    assert_eq!(guests.shut(), came);
                    count.store(came as u32, Ordering::Relaxed);
                });
            });
            let mut places = places.into_inner().unwrap();
            places.sort_unstable();
            assert_eq!(places, (1..=count.into_inner() as usize).collect::<Vec<_>>());
        }
    }

    #[test]
    fn company_is_expected_where_it_came_before() {
        const CALL: Duration = Duration::from_micros(10);
        let mut company = Company::NONE;
        let mut now = Instant::now();
        // Calls of 10 µs, so many µs from the end of one to the next: for how long until one invites.
        let mut alone = |company: &mut Company, gap| {
            let from = now;
            (0..1000).find_map(|_| {
                now += CALL + Duration::from_micros(gap);
                company.is_likely(now, CALL).then_some((now - from).as_micros())
            })
        };
        // Calls that follow one another try in the end; others never do.
        assert_eq!(alone(&mut company, 40), None);
        assert_eq!(alone(&mut company, 0), Some(50));
        // Those that follow try too, for a while. Nobody comes: the next trial is later, up to a bound.
        assert!((1..10).all(|_| alone(&mut company, 0) == Some(10)));
        assert_eq!(alone(&mut company, 0), Some(110));
        for _ in 0..100 {
            alone(&mut company, 0);
        }
        let longest = (0..20).filter_map(|_| alone(&mut company, 0)).max();
        assert_eq!(longest, Some(MOST_ALONE.as_micros() + 10));
        // Somebody comes: the next call counts on it, if it is soon.
        let mut call = |company: &mut Company, gap| {
            now += CALL;
            company.invited(now, true);
            now += Duration::from_micros(gap);
            company.is_likely(now, CALL)
        };
        assert!(call(&mut company, 20));
        assert!(!call(&mut company, 40));
    }

    #[test]
    fn a_thread_remembers_who_came() {
        let pool = pool(2);
        let came = AtomicBool::new(false);
        let waits = |_: &Guests<'_>| Waiting::until(|| came.load(Ordering::Acquire), Duration::from_secs(60));
        pool.install(|| {
            invite(1, &|_| came.store(true, Ordering::Release), waits);
            assert!(COMPANY.get().came);
            invite(0, &|_| (), |_| ());
            assert!(!COMPANY.get().came);
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
            invite(1, &guest, |_| {
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
            invite(1, &guest, |_| {
                Waiting::until(|| came.load(Ordering::Acquire), Duration::from_secs(60));
                panic!("from the host");
            });
        };
        let payload = pool.install(|| panic::catch_unwind(AssertUnwindSafe(call))).unwrap_err();
        assert_eq!(payload.downcast_ref(), Some(&"from the host"));
        assert!(left.load(Ordering::Acquire), "the host left before its guest");
    }
}
