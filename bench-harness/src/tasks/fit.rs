//! One training run: by steps or by seconds, with a curve, a checkpoint, and a way to stop.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kavanam_kernels::Context;
use kavanam_model::io::config::Vocabs;
use kavanam_model::train::{Example, TrainError, Trainer};

use super::evaluate::{self, Decoding};
use super::g2p::Entry;
use super::progress::Progress;
use super::recipe::Recipe;
use super::score::rates;
use crate::error::HarnessError;
use crate::report::results::CurvePoint;

/// Steps that are not timed when a step's time is estimated: they warm caches and fill free lists.
const WARM_UP_STEPS: usize = 4;
/// Steps are timed for this part of the budget, and at least [`MIN_TIMED_STEPS`].
const TIMED_SHARE: f64 = 0.03;
/// More seconds of timing would not tell more.
const TIMED_AT_MOST: f64 = 6.0;
const MIN_TIMED_STEPS: usize = 12;
/// The part of a budget that is planned for: a machine's speed varies a little from minute to minute.
const PLANNED_SHARE: f64 = 0.97;
/// A run of a time budget ends here at the latest, whatever was planned.
const GUARD: f64 = 1.08;
/// A run is written to disk at most this often.
const SAVE_EVERY: Duration = Duration::from_secs(60);

/// How long a run is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Length {
    /// That many steps.
    Steps(u64),
    /// As many steps as fit into that many seconds, found by timing a few.
    Seconds(f64),
}

/// What a run needs besides the model.
pub(crate) struct Fit<'a> {
    /// How kernels run.
    pub(crate) ctx: &'a Context,
    /// The name in progress lines.
    pub(crate) label: &'a str,
    /// Words for the curve.
    pub(crate) valid: &'a [Entry],
    /// Points of the curve.
    pub(crate) points: u64,
    /// Where checkpoints go.
    pub(crate) folder: &'a Path,
    /// Written beside the weights.
    pub(crate) vocabs: &'a Vocabs,
    /// Set by Ctrl-C.
    pub(crate) stop: &'a AtomicBool,
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Outcome {
    /// Steps that the schedule was made for.
    pub(crate) planned_steps: u64,
    /// Whether the time guard ended it before.
    pub(crate) stopped_by_guard: bool,
    /// Error against seconds.
    pub(crate) curve: Vec<CurvePoint>,
}

/// A new run of `recipe`.
///
/// For a time budget, the steps of a second trainer are timed, which is then dropped: the run itself depends on the
/// number of steps and the seed alone, so `--steps` reproduces it.
///
/// # Errors
/// When the model or the configuration is refused.
pub(crate) fn prepare(
    ctx: &Context,
    recipe: &Recipe,
    examples: &[Example],
    length: Length,
) -> Result<Trainer, HarnessError> {
    let build = || -> Result<Trainer, HarnessError> {
        let model = recipe.model.build(recipe.trainer.seed).map_err(TrainError::from)?;
        Ok(Trainer::new(model, examples.to_vec(), recipe.trainer)?)
    };
    let steps = match length {
        Length::Steps(steps) => steps,
        Length::Seconds(seconds) => steps_in(ctx, build()?, seconds)?,
    };
    let mut trainer = build()?;
    trainer.set_schedule(recipe.schedule(steps));
    Ok(trainer)
}

/// How many steps fit into the seconds.
fn steps_in(ctx: &Context, mut probe: Trainer, seconds: f64) -> Result<u64, HarnessError> {
    for _ in 0..WARM_UP_STEPS {
        probe.step(ctx)?;
    }
    let start = Instant::now();
    let timed = (TIMED_SHARE * seconds).min(TIMED_AT_MOST);
    let (mut steps, mut tokens) = (0usize, 0usize);
    while steps < MIN_TIMED_STEPS || start.elapsed().as_secs_f64() < timed {
        tokens += probe.step(ctx)?.tokens;
        steps += 1;
    }
    let seconds_per_token = start.elapsed().as_secs_f64() / tokens as f64;
    // The timed batches may be longer or shorter than the average one: count by tokens.
    let all: usize = probe.examples().iter().map(|e| e.target.len() + 1).sum();
    let tokens_per_step = all as f64 / probe.steps_per_epoch() as f64;
    Ok(((PLANNED_SHARE * seconds / (seconds_per_token * tokens_per_step)) as u64).max(1))
}

impl Fit<'_> {
    /// Trains to the end of the schedule, or until Ctrl-C or the guard of `budget` seconds ends it, and saves.
    ///
    /// # Errors
    /// [`HarnessError::Interrupted`] after Ctrl-C, when the checkpoint has been written;
    /// [`HarnessError::Train`] when a loss or gradient is not finite, or the checkpoint cannot be written.
    pub(crate) fn run(&self, trainer: &mut Trainer, budget: Option<f64>) -> Result<Outcome, HarnessError> {
        let planned_steps = trainer.config().schedule.total_steps.unwrap_or(u64::MAX);
        let mut progress = Progress::start(self.label, trainer.progress().step, planned_steps);
        let mut outcome = Outcome { planned_steps, stopped_by_guard: false, curve: Vec::new() };
        let mut since_point = Mean::default();
        let mut saved = Instant::now();
        while trainer.progress().step < planned_steps && !outcome.stopped_by_guard {
            let start = Instant::now();
            let report = trainer.step(self.ctx).map_err(|error| self.explain(error))?;
            trainer.add_seconds(start.elapsed().as_secs_f64());
            since_point.add(report.loss * report.tokens as f64, report.tokens as f64);
            progress.step(report.step, report.loss, report.tokens);
            let done = trainer.progress();
            outcome.stopped_by_guard =
                budget.is_some_and(|s| done.seconds > GUARD * s) && done.step < planned_steps;
            if self.stop.load(Ordering::Relaxed) {
                progress.finish();
                trainer.save(self.folder, self.vocabs)?;
                return Err(HarnessError::Interrupted {
                    step: done.step,
                    checkpoint: self.folder.to_owned(),
                });
            }
            if self.is_point(done.step, planned_steps) || outcome.stopped_by_guard {
                outcome.curve.push(self.point(trainer, since_point.take(), &progress)?);
            }
            if saved.elapsed() >= SAVE_EVERY {
                trainer.save(self.folder, self.vocabs)?;
                saved = Instant::now();
            }
        }
        trainer.save(self.folder, self.vocabs)?;
        progress.finish();
        Ok(outcome)
    }

    /// Whether a point of the curve is due: `points` of them, evenly spread, the last at the end.
    fn is_point(&self, step: u64, planned: u64) -> bool {
        let before = (step - 1) as u128 * u128::from(self.points) / u128::from(planned);
        step as u128 * u128::from(self.points) / u128::from(planned) > before
    }

    fn point(
        &self,
        trainer: &mut Trainer,
        loss: f64,
        progress: &Progress,
    ) -> Result<CurvePoint, HarnessError> {
        let scores = evaluate::score(self.ctx, trainer.model(), self.valid, Decoding::GREEDY)?;
        let valid = rates(&scores);
        trainer.note_score(valid.per);
        let done = trainer.progress();
        progress.note(&format!(
            "step {}, {:.1} s: loss {loss:.3}, validation PER {:.2} %, WER {:.2} %",
            done.step,
            done.seconds,
            100.0 * valid.per,
            100.0 * valid.wer
        ));
        Ok(CurvePoint {
            seconds: done.seconds,
            step: done.step,
            loss,
            valid_per: valid.per,
            valid_wer: valid.wer,
        })
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
