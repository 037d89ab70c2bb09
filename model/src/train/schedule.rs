//! [`Schedule`]: the learning rate as a function of the step alone.
//!
//! With warm-up w, total steps N and cooldown fraction c, step t = 1, 2, … uses
//! `peak · min(t/w, decay(t)) · min(1, (N + 1 − t) / (c·N))`, where decay is 1 before w and then √(w/t) or 1.
//! A run of known length ends at a rate near zero: most of what a short run gains, it gains there.
//! Nothing depends on the clock, so the number of steps and the seed reproduce a run.

use serde::{Deserialize, Serialize};

/// How the rate falls after the warm-up, before the cooldown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// √(w/t).
    InverseSqrt,
    /// It does not.
    Constant,
}

/// The learning rate of every step.
///
/// # Source
/// Vaswani et al. 2017, section 5.3 (warm-up, inverse square root); the linear cooldown is that of
/// Zhai et al. 2022, *Scaling Vision Transformers*, section 3.5.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// The highest rate, reached at the end of the warm-up.
    pub peak_lr: f32,
    /// Steps over which the rate rises from 0.
    pub warmup_steps: u64,
    /// What follows the warm-up.
    pub decay: Decay,
    /// The length of the run; `None` for a run without end, which has no cooldown.
    pub total_steps: Option<u64>,
    /// The part of the run, at its end, over which the rate falls linearly to zero.
    pub cooldown: f32,
}

impl Schedule {
    /// The rate of step `t`, counted from 1. Steps after `total_steps` have rate 0.
    pub fn rate(&self, t: u64) -> f32 {
        let t = t.max(1) as f64;
        let warmup = self.warmup_steps.max(1) as f64;
        let rise = (t / warmup).min(1.0);
        let decay = match self.decay {
            Decay::InverseSqrt => (warmup / t).sqrt().min(1.0),
            Decay::Constant => 1.0,
        };
        let fall = self.total_steps.map_or(1.0, |total| self.fall(total, t));
        (f64::from(self.peak_lr) * rise * decay * fall) as f32
    }

    /// The share of the rate that the cooldown of a run of `total` steps leaves at step `t`.
    fn fall(&self, total: u64, t: f64) -> f64 {
        if self.cooldown > 0.0 {
            let left = total as f64 + 1.0 - t;
            (left / (total as f64 * f64::from(self.cooldown)).max(1.0)).clamp(0.0, 1.0)
        } else {
            1.0
        }
    }

    /// The last step whose rate is the same in a run of `total` steps as in one without end.
    pub fn last_step_before_cooldown(&self, total: u64) -> u64 {
        let about = total as f64 * (1.0 - f64::from(self.cooldown)) + 2.0;
        let mut step = (about as u64).min(total);
        while step > 0 && self.fall(total, step as f64) < 1.0 {
            step -= 1;
        }
        step
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(decay: Decay, total_steps: Option<u64>) -> Schedule {
        Schedule { peak_lr: 1e-3, warmup_steps: 100, decay, total_steps, cooldown: 0.25 }
    }

    #[test]
    fn rises_linearly_to_the_peak() {
        let s = schedule(Decay::InverseSqrt, None);
        assert!((s.rate(1) / 1e-5 - 1.0).abs() < 1e-6);
        assert!((s.rate(50) / 5e-4 - 1.0).abs() < 1e-6);
        assert_eq!(s.rate(100), 1e-3);
        assert!((1..100).all(|t| s.rate(t) < s.rate(t + 1)));
    }

    #[test]
    fn falls_with_the_inverse_square_root() {
        let s = schedule(Decay::InverseSqrt, None);
        assert!((s.rate(400) / 5e-4 - 1.0).abs() < 1e-6);
        assert!((s.rate(10_000) / 1e-4 - 1.0).abs() < 1e-6);
        assert_eq!(schedule(Decay::Constant, None).rate(10_000), 1e-3);
    }

    #[test]
    fn a_known_end_is_reached_at_rate_zero() {
        let s = schedule(Decay::Constant, Some(1000));
        assert_eq!(s.rate(750), 1e-3);
        assert!((s.rate(876) / 5e-4 - 1.0).abs() < 1e-5);
        assert!((s.rate(1000) / (1e-3 / 250.0) - 1.0).abs() < 1e-5);
        assert_eq!(s.rate(1001), 0.0);
        assert_eq!(s.rate(5000), 0.0);
    }

    #[test]
    fn the_length_is_of_no_account_before_the_cooldown() {
        for cooldown in [0.0, 0.25, 0.6, 0.97] {
            let open = Schedule { cooldown, ..schedule(Decay::InverseSqrt, None) };
            for total in [1, 7, 100, 999] {
                let ends = Schedule { total_steps: Some(total), ..open };
                let last = open.last_step_before_cooldown(total);
                assert!((1..=last).all(|t| ends.rate(t) == open.rate(t)), "{cooldown} {total}");
                // Not `last + 1`: a fall by one rounding of an f64 leaves the f32 as it is.
                assert!(last + 2 > total || ends.rate(last + 2) < open.rate(last + 2), "{cooldown} {total}");
            }
        }
    }

    #[test]
    fn degenerate_lengths_stay_finite() {
        for total in [Some(0), Some(1), None] {
            for warmup_steps in [0, 1] {
                let s = Schedule { warmup_steps, total_steps: total, ..schedule(Decay::InverseSqrt, None) };
                assert!((0..5).all(|t| s.rate(t).is_finite() && s.rate(t) >= 0.0));
            }
        }
    }
}
