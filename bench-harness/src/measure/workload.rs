//! What is measured: a prepared computation.

use std::borrow::Cow;

use crate::error::HarnessError;
use crate::measure::clock::Clock;

/// A prepared computation.
pub(crate) trait Workload {
    /// Computes once.
    ///
    /// # Errors
    /// When the computation is refused, or runs in another process and that process fails.
    fn run(&mut self) -> Result<(), HarnessError>;

    /// Computes `untimed` times, then `timed` times more, and returns the nanoseconds that the latter took.
    ///
    /// By the clock, unless the workload has one that is nearer to the computation.
    ///
    /// # Errors
    /// As [`Workload::run`].
    fn time(&mut self, clock: &dyn Clock, untimed: usize, timed: usize) -> Result<f64, HarnessError> {
        for _ in 0..untimed {
            self.run()?;
        }
        let start = clock.now_ns();
        for _ in 0..timed {
            self.run()?;
        }
        Ok(clock.now_ns() - start)
    }

    /// What the last call wrote, in the order that the problem's check expects.
    ///
    /// # Errors
    /// When it must be fetched from another process and that process fails.
    fn outputs(&mut self) -> Result<Vec<Cow<'_, [f32]>>, HarnessError>;

    /// The kernel that runs, as far as the peer tells.
    fn kernel(&self) -> String;
}
