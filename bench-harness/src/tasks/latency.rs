//! Time to encode one word and to decode one token, one word at a time, as a program that answers requests would.

use std::time::Instant;

use kavanam_kernels::Context;
use kavanam_model::vocab::{BOS, EOS};
use kavanam_model::{ModelError, Seq2Seq};

/// Calls before the first sample.
const WARM_UP: usize = 5;
/// A word that has not ended by then is cut.
const MAX_TOKENS: usize = 64;

/// Raw samples, one a word.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Latency {
    /// Milliseconds to encode.
    pub(crate) encode_ms: Vec<f64>,
    /// Milliseconds for one decoded token.
    pub(crate) decode_ms_per_token: Vec<f64>,
}

/// Encodes and greedily decodes the words one after the other on one thread.
///
/// # Errors
/// [`ModelError`] when a word is empty or longer than the model's positions.
pub(crate) fn measure(ctx: &Context, model: &dyn Seq2Seq, words: &[&[u32]]) -> Result<Latency, ModelError> {
    let ctx = ctx.single_threaded();
    let mut latency = Latency::default();
    for (i, word) in words.iter().take(WARM_UP).chain(words).enumerate() {
        let start = Instant::now();
        let encoded = model.encode(&ctx, word, &[word.len()])?;
        let encode_ms = 1e3 * start.elapsed().as_secs_f64();
        let start = Instant::now();
        let mut state = model.start(&ctx, &encoded, 1)?;
        let (mut token, mut tokens) = (BOS, 0);
        while token != EOS && tokens < MAX_TOKENS {
            let output = model.step(&ctx, &mut *state, &[token])?;
            token = argmax(output.logits.data());
            tokens += 1;
        }
        let decode_ms = 1e3 * start.elapsed().as_secs_f64();
        if i >= WARM_UP.min(words.len()) {
            latency.encode_ms.push(encode_ms);
            latency.decode_ms_per_token.push(decode_ms / tokens as f64);
        }
    }
    Ok(latency)
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(EOS, |(token, _)| token as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_likely_token_wins() {
        assert_eq!(argmax(&[0.0, -1.0, 3.0, 2.0]), 2);
    }
}
