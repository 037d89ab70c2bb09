//! Sampling: the next token drawn from the model's distribution, as a seed says.

use kavanam_kernels::Context;

use crate::error::ModelError;
use crate::models::{BOS, CharLm, wrong};
use crate::random::SplitMix64;
use crate::vocab::SPECIAL;

/// How the next token is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleOptions {
    /// Divides the logits: below 1 the likely tokens become likelier; 0 always takes the likeliest.
    pub temperature: f32,
    /// How many of the likeliest tokens may be drawn; 0 for all.
    pub top_k: usize,
    /// The same seed draws the same tokens.
    pub seed: u64,
}

/// Draws tokens from logits.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SampleOptions,
    random: SplitMix64,
}

impl Sampler {
    /// A sampler at the beginning of its random numbers.
    ///
    /// # Errors
    /// [`ModelError::Config`] when the temperature is negative or no number.
    pub fn new(options: SampleOptions) -> Result<Sampler, ModelError> {
        if !(options.temperature >= 0.0 && options.temperature.is_finite()) {
            return Err(wrong("temperature", options.temperature, "at least 0".to_owned()));
        }
        Ok(Sampler { options, random: SplitMix64::new(options.seed) })
    }

    /// A token from a row of logits, none of the special ones: `p ∝ exp(logit / temperature)` over the `top_k`
    /// likeliest, of equally likely ones the first. Every call takes one random number.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`] when the logits are not, or there is no token but the special ones.
    pub fn draw(&mut self, logits: &[f32]) -> Result<u32, ModelError> {
        let unit = self.random.unit();
        let mut order: Vec<usize> = (SPECIAL.len()..logits.len()).collect();
        if order.is_empty() || logits.iter().any(|x| !x.is_finite()) {
            return Err(ModelError::NotFinite { what: "logits" });
        }
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a])); // stable: of equals the first
        let SampleOptions { temperature, top_k, .. } = self.options;
        match (temperature, top_k) {
            (0.0, _) => order.truncate(1),
            (_, 0) => {}
            (_, k) => order.truncate(k),
        }
        let highest = f64::from(logits[order[0]]);
        let weight = |&i: &usize| ((f64::from(logits[i]) - highest) / f64::from(temperature)).exp();
        if order.len() == 1 {
            return Ok(order[0] as u32);
        }
        let weights: Vec<f64> = order.iter().map(weight).collect();
        let mut left = unit * weights.iter().sum::<f64>();
        let drawn = weights.iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        Ok(order[drawn.unwrap_or(order.len() - 1)] as u32)
    }
}

/// `length` tokens that go on from `prompt`, with [`BOS`] before it.
///
/// # Errors
/// As [`CharLm::read`] and [`Sampler::draw`].
pub fn sample(
    model: &CharLm,
    ctx: &Context,
    prompt: &[u32],
    length: usize,
    options: SampleOptions,
) -> Result<Vec<u32>, ModelError> {
    let mut sampler = Sampler::new(options)?;
    let mut state = model.start(1);
    let mut next: Vec<u32> = [&[BOS], prompt].concat();
    let mut text = Vec::with_capacity(length);
    while text.len() < length {
        let logits = model.read(ctx, &mut state, &next)?;
        let token = sampler.draw(logits.row(logits.rows() - 1))?;
        text.push(token);
        next = vec![token];
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 9] = [9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 0.5, 2.0, -1.0];

    fn counts(temperature: f32, top_k: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(SampleOptions { temperature, top_k, seed: 3 }).unwrap();
        let mut counts = vec![0; LOGITS.len()];
        (0..20_000).for_each(|_| counts[sampler.draw(&LOGITS).unwrap() as usize] += 1);
        counts
    }

    fn entropy(counts: &[usize]) -> f64 {
        let total = counts.iter().sum::<usize>() as f64;
        let shares = counts.iter().filter(|&&n| n > 0).map(|&n| n as f64 / total);
        -shares.map(|p| p * p.ln()).sum::<f64>()
    }

    #[test]
    fn shares_are_those_of_the_softmax() {
        let counts = counts(1.5, 0);
        let weight = |&x: &f32| (f64::from(x) / 1.5).exp();
        let sum: f64 = LOGITS[4..].iter().map(weight).sum();
        assert_eq!(counts[..4], [0; 4], "special tokens are never drawn");
        for (i, logit) in LOGITS.iter().enumerate().skip(4) {
            let p = weight(logit) / sum;
            // Five standard deviations of a binomial share.
            let tolerance = 5.0 * (p * (1.0 - p) / 20_000.0).sqrt();
            let share = counts[i] as f64 / 20_000.0;
            assert!((share - p).abs() <= tolerance, "{i}: {share}, {p}");
        }
    }

    #[test]
    fn a_low_temperature_is_the_argmax_and_entropy_grows_with_it() {
        for cold in [counts(0.0, 0), counts(1e-3, 1), counts(5.0, 1)] {
            assert_eq!((cold[5], entropy(&cold)), (20_000, 0.0), "the first of the two likeliest");
        }
        let entropies = [1e-3, 0.3, 0.7, 1.0, 2.0, 10.0].map(|t| entropy(&counts(t, 0)));
        assert!(entropies.is_sorted(), "{entropies:?}");
    }

    #[test]
    fn top_k_leaves_the_likeliest() {
        let counts = counts(2.0, 3);
        assert!(counts[4] > 0 && counts[5] > 0 && counts[7] > 0, "{counts:?}");
        assert_eq!(counts[4] + counts[5] + counts[7], 20_000);
    }

    #[test]
    fn what_cannot_be_drawn_from_is_refused() {
        let options = SampleOptions { temperature: 1.0, top_k: 0, seed: 1 };
        for temperature in [-1.0, f32::NAN, f32::INFINITY] {
            assert!(Sampler::new(SampleOptions { temperature, ..options }).is_err());
        }
        let mut sampler = Sampler::new(options).unwrap();
        assert!(sampler.draw(&[0.0; 4]).is_err(), "special tokens alone");
        assert!(sampler.draw(&[0.0, 0.0, 0.0, 0.0, f32::NAN]).is_err());
    }
}
