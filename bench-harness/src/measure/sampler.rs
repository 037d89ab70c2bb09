//! Sampling: the peers of one case take turns, so that what slows the machine slows all of them.
//!
//! ```text
//! for each peer: run until warm, from its time choose how many calls one sample needs
//! for each round: for each peer, beginning with another one each time:
//!     some calls that are not timed, then `calls` calls by the clock; the sample is time / calls
//! ```
//!
//! The untimed calls, a fifth of a sample, bring back into the caches what the other peers drove out, and wake
//! the cores whose threads slept meanwhile: on two threads the first millisecond after 30 ms of sleep ran at half
//! the rate. A peer whose single call lasts a whole sample has no use for them and goes without.
//!
//! The clock here decides when a peer is warm and when a case has had its time. The samples themselves come
//! from [`Workload::time`], because a peer in another process measures beside its computation.

use crate::error::HarnessError;
use crate::measure::clock::Clock;
use crate::measure::workload::Workload;

/// How long and how often.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Plan {
    /// A peer runs at least this long before its first sample.
    pub(crate) warm_up_ns: f64,
    /// One sample lasts about this long, or one call when that is longer.
    pub(crate) sample_ns: f64,
    /// Samples of each peer.
    pub(crate) samples: usize,
    /// No new round begins after this time, once there are [`MIN_SAMPLES`].
    pub(crate) budget_ns: f64,
}

/// However slow a case is, each peer gives this many samples (or [`Plan::samples`], when that is fewer).
pub(crate) const MIN_SAMPLES: usize = 3;

/// Before a sample one call is made untimed for this many timed ones, and one at least.
const UNTIMED: usize = 5;

impl Plan {
    /// For figures that are to be kept.
    pub(crate) const FULL: Plan = Plan { warm_up_ns: 50e6, sample_ns: 10e6, samples: 25, budget_ns: 10e9 };
    /// For a first look.
    pub(crate) const QUICK: Plan = Plan { warm_up_ns: 5e6, sample_ns: 2e6, samples: 9, budget_ns: 0.5e9 };
}

/// Runs all of `work` by turns and returns, for each, its samples in nanoseconds a call.
///
/// # Errors
/// The first that a workload gives; no sample of the case is kept then.
pub(crate) fn interleave(
    clock: &dyn Clock,
    plan: &Plan,
    work: &mut [&mut (dyn Workload + '_)],
) -> Result<Vec<Vec<f64>>, HarnessError> {
    let calls: Vec<usize> =
        work.iter_mut().map(|workload| calibrate(clock, plan, *workload)).collect::<Result<_, _>>()?;
    let mut samples = vec![Vec::with_capacity(plan.samples); work.len()];
    let began = clock.now_ns();
    for round in 0..plan.samples {
        if round >= MIN_SAMPLES && clock.now_ns() - began > plan.budget_ns {
            break;
        }
        for turn in 0..work.len() {
            let i = (round + turn) % work.len();
            let untimed = if calls[i] > 1 { calls[i].div_ceil(UNTIMED) } else { 0 };
            samples[i].push(work[i].time(clock, untimed, calls[i])? / calls[i] as f64);
        }
    }
    Ok(samples)
}

/// Warms up and returns how many calls fill one sample: by the fastest of ever larger batches.
fn calibrate(clock: &dyn Clock, plan: &Plan, workload: &mut dyn Workload) -> Result<usize, HarnessError> {
    let began = clock.now_ns();
    let (mut batch, mut fastest) = (1usize, f64::INFINITY);
    loop {
        fastest = fastest.min(workload.time(clock, 0, batch)? / batch as f64);
        if clock.now_ns() - began >= plan.warm_up_ns {
            // A clock that stands still (a batch below its resolution) must not divide by zero.
            return Ok((plan.sample_ns / fastest.max(0.1)).ceil().max(1.0) as usize);
        }
        batch = batch.saturating_mul(2).min((plan.sample_ns / fastest.max(0.1)).ceil().max(1.0) as usize);
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;
    use std::cell::{Cell, RefCell};

    use super::*;

    struct Mock<'a>(&'a Cell<f64>);

    impl Clock for Mock<'_> {
        fn now_ns(&self) -> f64 {
            self.0.get()
        }
    }

    /// A computation that is nothing but a call.
    struct Call<F>(F);

    impl<F: FnMut()> Workload for Call<F> {
        fn run(&mut self) -> Result<(), HarnessError> {
            (self.0)();
            Ok(())
        }

        fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
            Ok(Vec::new())
        }

        fn kernel(&self) -> String {
            String::new()
        }
    }

    fn sample<F: FnMut()>(now: &Cell<f64>, plan: &Plan, calls: impl IntoIterator<Item = F>) -> Vec<Vec<f64>> {
        let mut calls: Vec<Call<F>> = calls.into_iter().map(Call).collect();
        let mut work: Vec<&mut dyn Workload> = calls.iter_mut().map(|call| call as _).collect();
        interleave(&Mock(now), plan, &mut work).unwrap()
    }

    const PLAN: Plan = Plan { warm_up_ns: 1_000.0, sample_ns: 100.0, samples: 8, budget_ns: 1e9 };

    #[test]
    fn samples_are_the_time_of_one_call() {
        let now = Cell::new(0.0);
        let takes = [10.0, 25.0, 400.0];
        let work = takes.iter().map(|ns| (ns, &now)).map(|(ns, now)| move || now.set(now.get() + ns));
        let samples = sample(&now, &PLAN, work);
        for (samples, ns) in samples.iter().zip(takes) {
            assert_eq!(samples, &vec![ns; PLAN.samples]);
        }
    }

    #[test]
    fn peers_take_turns_and_batches_fill_a_sample() {
        let now = Cell::new(0.0);
        let log = RefCell::new(String::new());
        let work = [('a', 50.0), ('b', 100.0)].into_iter().map(|(name, ns)| {
            let (now, log) = (&now, &log);
            move || {
                now.set(now.get() + ns);
                log.borrow_mut().push(name);
            }
        });
        let plan = Plan { warm_up_ns: 0.0, samples: 3, ..PLAN };
        sample(&now, &plan, work);
        // One warm-up call each; then a: one untimed and two timed calls, b: one timed; b begins round two.
        assert_eq!(log.into_inner(), "ab".to_owned() + "aaab" + "baaa" + "aaab");
    }

    #[test]
    fn a_slow_case_stops_at_its_budget_with_enough_samples() {
        let now = Cell::new(0.0);
        let plan = Plan { budget_ns: 1.0, ..PLAN };
        assert_eq!(sample(&now, &plan, [|| now.set(now.get() + 1e9)])[0].len(), MIN_SAMPLES);
    }

    #[test]
    fn the_first_cold_calls_do_not_count() {
        let now = Cell::new(0.0);
        let calls = Cell::new(0);
        let work = || {
            calls.set(calls.get() + 1);
            now.set(now.get() + if calls.get() < 5 { 300.0 } else { 20.0 });
        };
        let samples = sample(&now, &PLAN, [work]);
        assert!(samples[0].iter().all(|&ns| ns == 20.0), "{samples:?}");
    }

    /// A computation elsewhere: it takes 40 ns by its own clock, and 1,000 ns until the answer is here.
    struct Elsewhere<'a> {
        now: &'a Cell<f64>,
        answers_left: usize,
    }

    impl Workload for Elsewhere<'_> {
        fn run(&mut self) -> Result<(), HarnessError> {
            let left = self.answers_left.checked_sub(1);
            self.answers_left = left.ok_or_else(|| HarnessError::Failed("it is gone".into()))?;
            self.now.set(self.now.get() + 1_000.0);
            Ok(())
        }

        fn time(&mut self, _: &dyn Clock, _: usize, timed: usize) -> Result<f64, HarnessError> {
            self.run()?;
            Ok(40.0 * timed as f64)
        }

        fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError> {
            Ok(Vec::new())
        }

        fn kernel(&self) -> String {
            String::new()
        }
    }

    #[test]
    fn a_computation_elsewhere_is_measured_by_its_own_clock() {
        let now = Cell::new(0.0);
        let mut elsewhere = Elsewhere { now: &now, answers_left: usize::MAX };
        let samples = interleave(&Mock(&now), &PLAN, &mut [&mut elsewhere]).unwrap();
        assert_eq!(samples, [vec![40.0; PLAN.samples]]);
    }

    #[test]
    fn a_failure_in_the_middle_ends_the_case() {
        let now = Cell::new(0.0);
        let mut elsewhere = Elsewhere { now: &now, answers_left: 5 };
        let error = interleave(&Mock(&now), &PLAN, &mut [&mut elsewhere]).unwrap_err();
        assert!(error.to_string().contains("it is gone"), "{error}");
    }
}
