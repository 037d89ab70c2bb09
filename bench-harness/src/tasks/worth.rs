//! What optimisation is worth: one model by the fast layers and by the naive ones, step for step on the same batches.

use std::time::Instant;

use kavanam_kernels::Context;
use kavanam_model::Seq2Seq;
use kavanam_model::train::Example;

use super::fit::{self, Length};
use super::recipe::{Family, Preset, Recipe};
use crate::error::HarnessError;
use crate::measure::statistics::median;
use crate::report::results::Worth;

/// Steps are taken until the budget is spent, but at least so many of each.
const FEWEST: usize = 3;
/// How far the losses of the same weights on the same batch may be apart, relative to them. Both sum in f32 in another
/// order, which moves a loss by some 1e-6.
const LOSS_TOLERANCE: f64 = 1e-4;

/// Times training steps of `rnn-fixed` and `rnn-naive` in turn for about `seconds`.
///
/// # Errors
/// When a model refuses a batch, or the two disagree about the loss of the first.
pub(crate) fn measure(
    ctx: &Context,
    (preset, seed): (Preset, u64),
    vocabs: (usize, usize),
    examples: &[Example],
    seconds: f64,
) -> Result<Worth, HarnessError> {
    let mut trainers = Vec::new();
    for family in [Family::RnnFixed, Family::RnnNaive] {
        let Recipe { model, trainer, .. } = Recipe::new(preset, family, vocabs, seed);
        trainers.push(fit::prepare::<dyn Seq2Seq>(&model, trainer, examples, Length::Seconds(seconds))?);
    }
    // The first step of each fills the free lists and the caches.
    let losses = [trainers[0].step(ctx)?.loss, trainers[1].step(ctx)?.loss];
    if (losses[0] - losses[1]).abs() > LOSS_TOLERANCE * losses[0].abs() {
        return Err(HarnessError::Failed(format!(
            "the loss of the first batch is {} by the fast layers and {} by the naive ones",
            losses[0], losses[1]
        )));
    }
    let mut samples = [Vec::new(), Vec::new()];
    let begin = Instant::now();
    while samples[0].len() < FEWEST || begin.elapsed().as_secs_f64() < seconds {
        for (trainer, samples) in trainers.iter_mut().zip(&mut samples) {
            let start = Instant::now();
            let tokens = trainer.step(ctx)?.tokens as f64;
            samples.push(tokens / start.elapsed().as_secs_f64());
        }
    }
    let ratios: Vec<f64> = samples[0].iter().zip(&samples[1]).map(|(fast, naive)| fast / naive).collect();
    let [fast_tokens_per_s, naive_tokens_per_s] = [0, 1].map(|i| median(&samples[i]));
    let [fast_samples, naive_samples] = samples;
    Ok(Worth {
        model: Family::RnnFixed.name().to_owned(),
        naive: Family::RnnNaive.name().to_owned(),
        ratio: median(&ratios),
        fast_tokens_per_s,
        naive_tokens_per_s,
        fast_samples,
        naive_samples,
    })
}
