//! The time of a training step against the length of the sequences, at equal parameters and tokens.
//!
//! Every batch holds the same number of tokens, so a long sequence means few of them: a recurrent net
//! then has few rows a step and many steps, a transformer pays for the square of the length.
//! Samples of the models take turns, so that a disturbance of the machine meets all of them.

use std::time::Instant;

use kavanam_kernels::Context;
use kavanam_model::ModelConfig;
use kavanam_model::train::{Example, TrainError, Trainer};

use super::recipe::{Family, Recipe};
use crate::error::HarnessError;
use crate::measure::statistics::median;
use crate::report::results::{Crossing, SweepPoint};

/// What is swept over.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sweep {
    /// Source and target tokens of each sequence.
    pub(crate) lengths: Vec<usize>,
    /// Source tokens in a batch, and target tokens.
    pub(crate) tokens: usize,
    /// Timed steps at each length.
    pub(crate) samples: usize,
}

/// Times training steps of every recipe at every length.
///
/// # Errors
/// When a model refuses a batch.
pub(crate) fn measure(
    ctx: &Context,
    recipes: &[(Family, Recipe)],
    sweep: &Sweep,
) -> Result<Vec<SweepPoint>, HarnessError> {
    let mut points = Vec::new();
    for &length in &sweep.lengths {
        let sequences = (sweep.tokens / length).max(1);
        let mut trainers = Vec::new();
        for (family, recipe) in recipes {
            let model = recipe.model.build(1).map_err(TrainError::from)?;
            let mut config = recipe.trainer;
            config.batch_tokens = sequences * 2 * length;
            let examples = examples(&recipe.model, length, sequences);
            let mut trainer = Trainer::new(model, examples, config)?;
            trainer.step(ctx)?; // fills the free lists and the caches
            points.push(SweepPoint {
                model: family.name().to_owned(),
                length,
                sequences,
                params: recipe.model.parameter_count(),
                step_ms: 0.0,
                samples_ms: Vec::with_capacity(sweep.samples),
            });
            trainers.push(trainer);
        }
        let first = points.len() - trainers.len();
        for _ in 0..sweep.samples {
            for (trainer, point) in trainers.iter_mut().zip(&mut points[first..]) {
                let start = Instant::now();
                trainer.step(ctx)?;
                point.samples_ms.push(1e3 * start.elapsed().as_secs_f64());
            }
        }
        points[first..].iter_mut().for_each(|point| point.step_ms = median(&point.samples_ms));
    }
    Ok(points)
}

/// Sequences of exactly that length, the target's end token included; which tokens does not matter to the time.
fn examples(model: &ModelConfig, length: usize, sequences: usize) -> Vec<Example> {
    let first = kavanam_model::vocab::SPECIAL.len();
    let token = |i: usize, vocab: usize| (first + i % (vocab - first)) as u32;
    let side = |row: usize, length: usize, vocab: usize| {
        (0..length).map(|t| token(7 * row + 3 * t, vocab)).collect::<Vec<u32>>()
    };
    (0..sequences)
        .map(|row| Example {
            source: side(row, length, model.source_vocab()),
            target: side(row, length - 1, model.target_vocab()),
        })
        .collect()
}

/// Where a recurrent model and the transformer change places.
pub(crate) fn crossings(points: &[SweepPoint]) -> Vec<Crossing> {
    let times = |name: &str| -> Vec<(f64, f64)> {
        let of = points.iter().filter(|p| p.model == name);
        of.map(|p| ((p.length as f64).ln(), p.step_ms.max(1e-9).ln())).collect()
    };
    let transformer = times(Family::Transformer.name());
    let mut found = Vec::new();
    for family in [Family::RnnFixed, Family::RnnAttention] {
        let other = times(family.name());
        let gaps: Vec<(f64, f64)> = other.iter().zip(&transformer).map(|(a, b)| (a.0, a.1 - b.1)).collect();
        for pair in gaps.windows(2) {
            let ((x0, g0), (x1, g1)) = (pair[0], pair[1]);
            if (g0 < 0.0) == (g1 < 0.0) {
                continue;
            }
            let length = (x0 + (x1 - x0) * g0 / (g0 - g1)).exp();
            let (below, above) =
                if g0 < 0.0 { (family, Family::Transformer) } else { (Family::Transformer, family) };
            let (faster_below, faster_above) = (below.name().to_owned(), above.name().to_owned());
            found.push(Crossing { faster_below, faster_above, length });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(family: Family, length: usize, step_ms: f64) -> SweepPoint {
        let model = family.name().to_owned();
        SweepPoint { model, length, sequences: 1, params: 1, step_ms, samples_ms: vec![step_ms] }
    }

    #[test]
    fn a_crossing_is_found_between_its_neighbours() {
        let points = [
            point(Family::RnnAttention, 8, 10.0),
            point(Family::Transformer, 8, 20.0),
            point(Family::RnnAttention, 32, 40.0),
            point(Family::Transformer, 32, 20.0),
        ];
        let found = crossings(&points);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].faster_below, "rnn-attention");
        assert_eq!(found[0].faster_above, "transformer");
        assert!((found[0].length - 16.0).abs() < 1e-9, "{found:?}");
    }

    #[test]
    fn no_crossing_where_one_is_always_faster() {
        let points = [
            point(Family::RnnFixed, 8, 10.0),
            point(Family::Transformer, 8, 20.0),
            point(Family::RnnFixed, 16, 10.0),
            point(Family::Transformer, 16, 11.0),
        ];
        assert!(crossings(&points).is_empty());
    }
}
