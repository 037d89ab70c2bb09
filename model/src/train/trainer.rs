//! [`Trainer`]: one optimiser step after the other, reproducible bit for bit.
//!
//! ```text
//! batch → S shards (pair i into shard i mod S)      S is part of the configuration
//! shard s: forward and backward on one thread       shards run side by side
//! g = g₀ + g₁ + … in the order of the shards        loss likewise
//! clip g / tokens, then AdamW at the schedule's rate
//! ```
//! Because S is no function of the number of threads, neither is any bit of the result. Pairs are
//! dealt out in turn, so that the shards of a length-sorted batch take equally long.

use std::sync::{Mutex, PoisonError};

use kavanam_kernels::Context;
use kavanam_kernels::memory::AlignedVec;
use kavanam_kernels::optim::adamw::{self, AdamW, Buffers};
use serde::{Deserialize, Serialize};

use super::clip::{clip_factor, global_norm};
use super::{Batches, Example, Position, Schedule, TrainError, Trainable};
use crate::error::ModelError;
use crate::models::{LossOptions, Seq2Seq};
use crate::param::{Grads, ParamStore};
use crate::pool::Pool;
use crate::tape::{DropoutKey, Tape};

/// Everything that a run's result depends on, besides the model's configuration and the examples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TrainerConfig {
    /// Of data order and dropout.
    pub seed: u64,
    /// The most padded tokens (source and target) in a batch.
    pub batch_tokens: usize,
    /// Parts of a batch whose gradients are computed side by side.
    pub grad_shards: usize,
    /// The share of each target's probability that is spread evenly.
    pub label_smoothing: f32,
    /// The largest norm of the mean gradient; 0 for no limit.
    pub clip_norm: f32,
    /// AdamW's decay of the first moment.
    pub beta1: f32,
    /// AdamW's decay of the second moment.
    pub beta2: f32,
    /// AdamW's ε.
    pub epsilon: f32,
    /// AdamW's decoupled decay, of matrices only (biases, norms and vectors are left alone).
    pub weight_decay: f32,
    /// The learning rate of each step.
    pub schedule: Schedule,
}

impl TrainerConfig {
    fn validate(&self) -> Result<(), TrainError> {
        let wrong = |field, value: String, expected: &str| {
            Err(TrainError::Config { field, value, expected: expected.to_owned() })
        };
        if self.batch_tokens == 0 {
            return wrong("batch_tokens", "0".to_owned(), "at least 1");
        }
        if !(1..=64).contains(&self.grad_shards) {
            return wrong("grad_shards", self.grad_shards.to_string(), "1 to 64");
        }
        if !(self.schedule.peak_lr > 0.0 && self.schedule.peak_lr.is_finite()) {
            return wrong("schedule.peak_lr", self.schedule.peak_lr.to_string(), "positive");
        }
        if !(0.0..=1.0).contains(&self.schedule.cooldown) {
            return wrong("schedule.cooldown", self.schedule.cooldown.to_string(), "0 to 1");
        }
        Ok(())
    }
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// The step, counted from 1.
    pub step: u64,
    /// The mean loss per target token before the step.
    pub loss: f64,
    /// The norm of the mean gradient before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub rate: f32,
    /// Target tokens in the batch, end tokens included.
    pub tokens: usize,
}

/// How far a run is: what a checkpoint holds besides tensors.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Steps taken.
    pub step: u64,
    /// Target tokens shown.
    pub tokens: u64,
    /// Where the next batch stands.
    pub position: Position,
    /// Seconds spent in steps, over all parts of the run.
    pub seconds: f64,
    /// The best score on the validation split so far (lower is better).
    pub best: Option<f64>,
}

/// AdamW's moments, in the order of the parameters.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// The running mean of gradients.
    pub first: AlignedVec<f32>,
    /// The running mean of squared gradients.
    pub second: AlignedVec<f32>,
}

/// One shard's memory, kept from step to step.
#[derive(Debug)]
struct Shard {
    grads: Grads,
    pool: Pool,
    loss: Result<f64, ModelError>,
}

/// A model in training.
pub struct Trainer<M: Trainable + ?Sized = dyn Seq2Seq> {
    model: Box<M>,
    config: TrainerConfig,
    examples: Vec<Example>,
    batches: Batches,
    pub(super) moments: Moments,
    progress: Progress,
    shards: Vec<Mutex<Shard>>,
}

impl<M: Trainable + ?Sized> Trainer<M> {
    /// A run at its beginning.
    ///
    /// # Errors
    /// [`TrainError::NoExamples`], [`TrainError::Config`].
    pub fn new(
        model: Box<M>,
        examples: Vec<Example>,
        config: TrainerConfig,
    ) -> Result<Trainer<M>, TrainError> {
        config.validate()?;
        if examples.is_empty() {
            return Err(TrainError::NoExamples);
        }
        let batches = Batches::new(&examples, config.batch_tokens, config.seed);
        let len = model.weights().parameter_count();
        let shard = || {
            let grads = Grads::zeros(model.weights());
            Mutex::new(Shard { grads, pool: Pool::new(), loss: Ok(0.0) })
        };
        let shards = (0..config.grad_shards).map(|_| shard()).collect();
        let moments = Moments { first: AlignedVec::zeroed(len), second: AlignedVec::zeroed(len) };
        Ok(Trainer { model, config, examples, batches, moments, progress: Progress::default(), shards })
    }

    /// The model with its current weights.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The model, to load weights into.
    pub(super) fn model_mut(&mut self) -> &mut M {
        &mut self.model
    }

    /// The model alone, at the end of the run.
    pub fn into_model(self) -> Box<M> {
        self.model
    }

    /// The configuration.
    pub fn config(&self) -> &TrainerConfig {
        &self.config
    }

    /// What it is trained on.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// How far the run is.
    pub fn progress(&self) -> Progress {
        Progress { position: self.batches.position(), ..self.progress }
    }

    /// Goes on from there.
    pub(super) fn restore(&mut self, progress: Progress) {
        self.progress = progress;
        self.batches.seek(progress.position);
    }

    /// Passes over the examples, the current one by its share.
    pub fn epochs(&self) -> f64 {
        let position = self.batches.position();
        position.epoch as f64 + position.batch as f64 / self.batches.per_epoch() as f64
    }

    /// Batches in a pass.
    pub fn steps_per_epoch(&self) -> usize {
        self.batches.per_epoch()
    }

    /// Adds to the seconds that the run has spent in steps.
    pub fn add_seconds(&mut self, seconds: f64) {
        self.progress.seconds += seconds;
    }

    /// Notes a score on the validation split; `true` when none was better.
    pub fn note_score(&mut self, score: f64) -> bool {
        let best = self.progress.best.is_none_or(|best| score < best);
        if best {
            self.progress.best = Some(score);
        }
        best
    }

    /// Settles the length of a run that began without one. Steps that were taken have had the rates of a run of
    /// `total` steps from its beginning, so such a run has the same bits.
    ///
    /// # Errors
    /// [`TrainError::Config`] when the length is settled already, or when `total` is so small that a step which was
    /// taken belongs to the cooldown.
    pub fn settle_length(&mut self, total: u64) -> Result<(), TrainError> {
        let (schedule, taken) = (&mut self.config.schedule, self.progress.step);
        let wrong = |expected: String| TrainError::Config {
            field: "schedule.total_steps",
            value: total.to_string(),
            expected,
        };
        if let Some(settled) = schedule.total_steps {
            return Err(wrong(format!("the {settled} steps that the run began with")));
        }
        if schedule.last_step_before_cooldown(total) < taken {
            return Err(wrong(format!("more: step {taken} has been taken at the rate of a longer run")));
        }
        schedule.total_steps = Some(total);
        Ok(())
    }

    /// Takes one step.
    ///
    /// # Errors
    /// [`TrainError::Model`] when the model refuses the batch; [`TrainError::Loss`] and [`TrainError::Gradient`] when
    /// they are not finite. The weights and moments have not been changed then.
    pub fn step(&mut self, ctx: &Context) -> Result<StepReport, TrainError> {
        let step = self.progress.step + 1;
        let indices = self.batches.next_indices();
        let tokens = indices.iter().map(|&i| M::loss_tokens(&self.examples[i as usize])).sum::<usize>();
        let loss = self.accumulate(ctx, step, &indices)? / tokens as f64;
        if !loss.is_finite() {
            return Err(TrainError::Loss { step, loss });
        }
        let mut first = self.shards[0].lock().unwrap_or_else(PoisonError::into_inner);
        for other in &self.shards[1..] {
            first.grads.add(&other.lock().unwrap_or_else(PoisonError::into_inner).grads);
        }
        let params = self.model.weights();
        let norm = global_norm(params, &first.grads)
            .map_err(|id| TrainError::Gradient { step, tensor: params.name(id).to_owned() })?;
        let norm = norm / tokens as f64;
        let grad_scale = clip_factor(norm, self.config.clip_norm) / tokens as f32;
        let rate = self.config.schedule.rate(step);
        let update = Update { config: &self.config, step, rate, grad_scale };
        update.apply(ctx, self.model.weights_mut(), &first.grads, &mut self.moments)?;
        drop(first);
        self.progress.step = step;
        self.progress.tokens += tokens as u64;
        Ok(StepReport { step, loss, grad_norm: norm, rate, tokens })
    }

    /// Forward and backward of every shard; the summed loss. Gradients stay in the shards.
    fn accumulate(&self, ctx: &Context, step: u64, indices: &[u32]) -> Result<f64, ModelError> {
        let count = self.shards.len();
        ctx.for_each_task(count, |s| {
            let mut shard = self.shards[s].lock().unwrap_or_else(PoisonError::into_inner);
            let members: Vec<u32> = indices.iter().copied().skip(s).step_by(count).collect();
            let Shard { grads, pool, loss } = &mut *shard;
            grads.zero();
            let dropout = DropoutKey { seed: self.config.seed, step, shard: s as u64 };
            *loss = self.shard_loss(&ctx.single_threaded(), &members, dropout, pool, grads);
        });
        let mut total = 0.0;
        for shard in &self.shards {
            total += shard.lock().unwrap_or_else(PoisonError::into_inner).loss.clone()?;
        }
        Ok(total)
    }

    fn shard_loss(
        &self,
        ctx: &Context,
        members: &[u32],
        dropout: DropoutKey,
        pool: &Pool,
        grads: &mut Grads,
    ) -> Result<f64, ModelError> {
        if members.is_empty() {
            return Ok(0.0);
        }
        let examples: Vec<&Example> = members.iter().map(|&i| &self.examples[i as usize]).collect();
        let options = LossOptions { label_smoothing: self.config.label_smoothing };
        let mut tape = Tape::training(ctx, self.model.weights(), pool, dropout);
        let loss = self.model.examples_loss(&mut tape, &examples, &options)?;
        let value = f64::from(tape.value(loss)[0]);
        tape.backward(loss, grads)?;
        Ok(value)
    }
}

/// One optimiser step over all tensors.
struct Update<'a> {
    config: &'a TrainerConfig,
    step: u64,
    rate: f32,
    grad_scale: f32,
}

impl Update<'_> {
    fn apply(
        &self,
        ctx: &Context,
        params: &mut ParamStore,
        grads: &Grads,
        moments: &mut Moments,
    ) -> Result<(), ModelError> {
        let TrainerConfig { beta1, beta2, epsilon, weight_decay, .. } = *self.config;
        for id in params.ids() {
            let range = params.range(id);
            let decays = params.shape(id).len() >= 2;
            let rule = AdamW {
                lr: self.rate,
                beta1,
                beta2,
                eps: epsilon,
                weight_decay: if decays { weight_decay } else { 0.0 },
            };
            let buffers = Buffers {
                param: params.get_mut(id),
                grad: grads.get(id),
                m: &mut moments.first[range.clone()],
                v: &mut moments.second[range],
            };
            adamw::step(ctx, &rule, self.step, self.grad_scale, buffers)?;
        }
        Ok(())
    }
}
