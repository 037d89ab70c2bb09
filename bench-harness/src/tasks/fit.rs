//! One training run: by steps or by seconds, with a curve, a checkpoint, and a way to stop.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kavanam_kernels::Context;
use kavanam_model::train::{Example, TrainError, Trainable, Trainer, TrainerConfig};

use super::progress::Progress;
use crate::error::HarnessError;

/// A run of a time budget ends at the latest when it has taken this many times the budget and a second, whatever was
/// planned. The second is for runs so short that one interruption outweighs them.
const GUARD: f64 = 1.2;
const GUARD_SECONDS: f64 = 1.0;
/// The longest cooldown of a run of seconds: the steps before it are timed to settle the run's length.
const LONGEST_TIMED_COOLDOWN: f32 = 0.9;
/// A run is written to disk at most this often.
const SAVE_EVERY: Duration = Duration::from_secs(60);

/// How long a run is.
///
/// A run of seconds begins without a length. Only the cooldown depends on the length, so it is settled at the last
/// step before the cooldown, from the time that the steps until then have taken: the run is the same, bit for bit,
/// as one that was given this number of steps from the beginning.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Length {
    /// That many steps.
    Steps(u64),
    /// As many steps as fit into that many seconds.
    Seconds(f64),
}

/// Where on the curve a point stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct At {
    /// Seconds of training.
    pub(crate) seconds: f64,
    /// Steps taken.
    pub(crate) step: u64,
    /// The mean training loss since the last point.
    pub(crate) loss: f64,
}

/// What a judge says about a model.
pub(crate) struct Judged<P> {
    /// Lower is better.
    pub(crate) score: f64,
    /// The score in words.
    pub(crate) said: String,
    /// The point of the curve.
    pub(crate) point: P,
}

/// Measures a model on data that it is not trained on.
pub(crate) trait Judge<M: ?Sized> {
    /// What a curve is made of.
    type Point;

    /// How good the model is now.
    fn judge(&self, ctx: &Context, model: &M, at: At) -> Result<Judged<Self::Point>, HarnessError>;
}

/// What a run needs besides the model.
pub(crate) struct Fit<'a, M: Trainable + ?Sized, J> {
    /// How kernels run.
    pub(crate) ctx: &'a Context,
    /// The name in progress lines.
    pub(crate) label: &'a str,
    /// Makes the curve.
    pub(crate) judge: &'a J,
    /// Points of the curve.
    pub(crate) points: u64,
    /// Where checkpoints go.
    pub(crate) folder: &'a Path,
    /// Written beside the weights.
    pub(crate) vocabs: &'a M::Vocabs,
    /// Set by Ctrl-C.
    pub(crate) stop: &'a AtomicBool,
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Outcome<P> {
    /// Steps that the schedule was made for: what `--steps` must be given to make the run again.
    pub(crate) planned_steps: u64,
    /// Whether the time guard ended it before.
    pub(crate) stopped_by_guard: bool,
    /// Error against seconds.
    pub(crate) curve: Vec<P>,
}

/// A new run.
///
/// # Errors
/// When the model or the configuration is refused.
pub(crate) fn prepare<M: Trainable + ?Sized>(
    model: &M::Config,
    mut config: TrainerConfig,
    examples: &[Example],
    length: Length,
) -> Result<Trainer<M>, HarnessError> {
    match length {
        Length::Steps(steps) => config.schedule.total_steps = Some(steps),
        Length::Seconds(_) if config.schedule.cooldown > LONGEST_TIMED_COOLDOWN => {
            return Err(HarnessError::Usage(format!(
                "a run of seconds times its steps before the cooldown, which must therefore be at most \
                 {LONGEST_TIMED_COOLDOWN} of it, not {}: give a smaller --cooldown, or --steps",
                config.schedule.cooldown
            )));
        }
        Length::Seconds(_) => config.schedule.total_steps = None,
    }
    let model = M::build(model, config.seed).map_err(TrainError::from)?;
    Ok(Trainer::new(model, examples.to_vec(), config)?)
}

/// How many steps fit into `budget` seconds, as soon as the next step may be the first of the cooldown; `None` before.
fn steps_in<M: Trainable + ?Sized>(budget: f64, trainer: &Trainer<M>) -> Option<u64> {
    let (done, schedule) = (trainer.progress(), trainer.config().schedule);
    let mut total = estimated_steps(budget, trainer).max(done.step);
    if done.seconds < budget && schedule.last_step_before_cooldown(total) > done.step + 1 {
        return None;
    }
    // A slow step may have come last: no step that was taken may turn out to belong to the cooldown.
    while schedule.last_step_before_cooldown(total) < done.step {
        total += 1;
    }
    Some(total)
}

/// Steps in `budget` seconds at the speed until now.
fn estimated_steps<M: Trainable + ?Sized>(budget: f64, trainer: &Trainer<M>) -> u64 {
    let done = trainer.progress();
    (done.step as f64 * budget / done.seconds.max(1e-9)) as u64
}

impl<M: Trainable + ?Sized, J: Judge<M>> Fit<'_, M, J> {
    /// Trains to the end of the schedule, or until Ctrl-C or the guard of a time budget ends it, and saves.
    ///
    /// # Errors
    /// [`HarnessError::Interrupted`] after Ctrl-C, when the checkpoint has been written;
    /// [`HarnessError::Train`] when a loss or gradient is not finite, or the checkpoint cannot be written;
    /// [`HarnessError::Usage`] when neither the schedule nor `budget` says how long the run is.
    pub(crate) fn run(
        &self,
        trainer: &mut Trainer<M>,
        budget: Option<f64>,
    ) -> Result<Outcome<J::Point>, HarnessError> {
        if trainer.config().schedule.total_steps.is_none() && budget.is_none() {
            return Err(HarnessError::Usage(
                "the run was ended before its length was settled: give --seconds or --steps too".to_owned(),
            ));
        }
        let mut progress = Progress::start(self.label, trainer.progress().step);
        let mut outcome = Outcome { planned_steps: 0, stopped_by_guard: false, curve: Vec::new() };
        let mut since_point = Mean::default();
        let mut saved = Instant::now();
        // Points that a resumed run has passed are not drawn again.
        let mut points = self.points_due(trainer, budget);
        while !outcome.stopped_by_guard && !is_complete(trainer) {
            let start = Instant::now();
            let report = trainer.step(self.ctx).map_err(|error| self.explain(error))?;
            trainer.add_seconds(start.elapsed().as_secs_f64());
            since_point.add(report.loss * report.tokens as f64, report.tokens as f64);
            let stop = self.stop.load(Ordering::Relaxed);
            self.settle(trainer, budget, stop, &progress)?;
            progress.step(&report, planned(trainer, budget));
            if stop {
                progress.finish();
                trainer.save(self.folder, self.vocabs)?;
                return Err(HarnessError::Interrupted {
                    step: report.step,
                    checkpoint: self.folder.to_owned(),
                });
            }
            let over =
                budget.is_some_and(|budget| trainer.progress().seconds > GUARD * budget + GUARD_SECONDS);
            outcome.stopped_by_guard = over && !is_complete(trainer);
            let due = self.points_due(trainer, budget);
            if due > points || outcome.stopped_by_guard {
                points = due;
                outcome.curve.push(self.point(trainer, since_point.take(), &progress)?);
            }
            if saved.elapsed() >= SAVE_EVERY {
                trainer.save(self.folder, self.vocabs)?;
                saved = Instant::now();
            }
        }
        trainer.save(self.folder, self.vocabs)?;
        progress.finish();
        outcome.planned_steps = planned(trainer, budget);
        Ok(outcome)
    }

    /// Settles the length of a run of seconds when its time has come, or at once before it is interrupted.
    fn settle(
        &self,
        trainer: &mut Trainer<M>,
        budget: Option<f64>,
        now: bool,
        progress: &Progress,
    ) -> Result<(), HarnessError> {
        let (None, Some(budget)) = (trainer.config().schedule.total_steps, budget) else { return Ok(()) };
        let soon = now.then(|| estimated_steps(budget, trainer));
        if let Some(steps) = steps_in(budget, trainer).or(soon) {
            trainer.settle_length(steps)?;
            progress.note(&how_to_repeat(trainer, steps));
        }
        Ok(())
    }

    /// How many points of the curve are due: `points` of them, evenly spread, the last at the end.
    fn points_due(&self, trainer: &Trainer<M>, budget: Option<f64>) -> u64 {
        let done = trainer.progress();
        match (trainer.config().schedule.total_steps, budget) {
            (Some(total), _) => {
                (u128::from(done.step) * u128::from(self.points) / u128::from(total.max(1))) as u64
            }
            (None, Some(budget)) => {
                ((done.seconds / budget * self.points as f64) as u64).min(self.points.saturating_sub(1))
            }
            (None, None) => 0,
        }
    }

    fn point(
        &self,
        trainer: &mut Trainer<M>,
        loss: f64,
        progress: &Progress,
    ) -> Result<J::Point, HarnessError> {
        let done = trainer.progress();
        let at = At { seconds: done.seconds, step: done.step, loss };
        let Judged { score, said, point } = self.judge.judge(self.ctx, trainer.model(), at)?;
        trainer.note_score(score);
        progress
            .note(&format!("step {}, {:.1} s: loss {loss:.3}, validation {said}", done.step, done.seconds));
        Ok(point)
    }

    /// Says which checkpoint stands after a step that could not be taken.
    fn explain(&self, error: TrainError) -> HarnessError {
        if kavanam_model::train::checkpoint::exists(self.folder) {
            HarnessError::Failed(format!("{error} (last good checkpoint: {})", self.folder.display()))
        } else {
            HarnessError::Train(error)
        }
    }
}

/// The steps of the whole run: settled, or estimated while they are not.
fn planned<M: Trainable + ?Sized>(trainer: &Trainer<M>, budget: Option<f64>) -> u64 {
    let settled = trainer.config().schedule.total_steps;
    settled.unwrap_or_else(|| budget.map_or(u64::MAX, |budget| estimated_steps(budget, trainer)))
}

fn is_complete<M: Trainable + ?Sized>(trainer: &Trainer<M>) -> bool {
    trainer.config().schedule.total_steps.is_some_and(|total| trainer.progress().step >= total)
}

/// What is said when the length of a run is known.
pub(crate) fn how_to_repeat<M: Trainable + ?Sized>(trainer: &Trainer<M>, steps: u64) -> String {
    let (per_pass, seed) = (trainer.steps_per_epoch(), trainer.config().seed);
    format!("{steps} steps of {per_pass} a pass; `--steps {steps} --seed {seed}` makes this run again")
}

/// A mean that grows.
#[derive(Debug, Default)]
struct Mean {
    sum: f64,
    weight: f64,
}

impl Mean {
    fn add(&mut self, sum: f64, weight: f64) {
        self.sum += sum;
        self.weight += weight;
    }

    /// The mean so far; the next begins.
    fn take(&mut self) -> f64 {
        let mean = self.sum / self.weight;
        *self = Mean::default();
        mean
    }
}
