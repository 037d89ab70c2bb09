//! From a model to sequences: what a decoder remembers, greedy search, beam search, alignment, sampling.
//!
//! All sequences of a call are decoded together, one row each (or one for each beam); those that are finished leave
//! the batch. A row's result does not depend on its neighbours.

pub mod beam;
pub(crate) mod cells;
pub mod greedy;
pub mod kv_cache;
pub mod rnn_state;
pub mod sample;

pub use beam::{BeamOptions, beam};
pub use greedy::greedy;
pub use sample::{SampleOptions, Sampler, sample};

use kavanam_kernels::Context;

use crate::error::ModelError;
use crate::models::{BOS, EOS, PAD, Seq2Seq};

/// A decoded sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Hypothesis {
    /// Without [`BOS`] and [`EOS`].
    pub tokens: Vec<u32>,
    /// The sum of the log-probabilities of the tokens and of [`EOS`]; beam search divides it by a power of the length.
    pub score: f64,
    /// Whether the model said [`EOS`] before the limit.
    pub finished: bool,
    /// The weights over the source positions, one row for each token and for [`EOS`]; [`align`] fills them.
    pub attention: Option<Vec<Vec<f32>>>,
}

/// Fills in what the model looks at while it says each hypothesis, by feeding it those tokens again; `None`
/// stays where the model does not attend.
///
/// # Shapes
/// `source` and `lengths` as given to the search, one hypothesis for each.
///
/// # Errors
/// As [`Seq2Seq::step`].
pub fn align(
    model: &dyn Seq2Seq,
    ctx: &Context,
    source: &[u32],
    lengths: &[usize],
    hypotheses: &mut [Hypothesis],
) -> Result<(), ModelError> {
    kavanam_kernels::error::expect_dim("hypotheses", "length", lengths.len(), hypotheses.len())?;
    let encoded = model.encode(ctx, source, lengths)?;
    let mut state = model.start(ctx, &encoded, 1)?;
    state.want_attention(true);
    let rows_of = |h: &Hypothesis| h.tokens.len() + usize::from(h.finished);
    let steps = hypotheses.iter().map(rows_of).max().unwrap_or(0);
    for t in 0..steps {
        let token = |h: &Hypothesis| if t == 0 { BOS } else { h.tokens.get(t - 1).copied().unwrap_or(PAD) };
        let tokens: Vec<u32> = hypotheses.iter().map(token).collect();
        let Some(weights) = model.step(ctx, state.as_mut(), &tokens)?.attention else { return Ok(()) };
        for (i, hypothesis) in hypotheses.iter_mut().enumerate() {
            if t == 0 {
                hypothesis.attention = Some(Vec::new());
            }
            if t < rows_of(hypothesis) {
                hypothesis.attention.get_or_insert_default().push(weights.row(i).to_vec());
            }
        }
    }
    Ok(())
}

/// The log-probabilities of a row of logits, in f64; [`PAD`] and [`BOS`], which no target holds, get −∞.
fn log_probabilities(logits: &[f32]) -> Result<Vec<f64>, ModelError> {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - highest).exp()).sum();
    if !sum.is_finite() {
        return Err(ModelError::NotFinite { what: "logits" });
    }
    let shift = f64::from(highest) + sum.ln();
    let mut log_p: Vec<f64> = logits.iter().map(|&x| f64::from(x) - shift).collect();
    for special in [PAD, BOS] {
        if let Some(p) = log_p.get_mut(special as usize) {
            *p = f64::NEG_INFINITY;
        }
    }
    Ok(log_p)
}

/// Whether so many of the rows are finished that a smaller batch is worth copying the others.
fn worth_leaving(finished: usize, all: usize) -> bool {
    finished > 0 && 4 * finished >= all
}

/// A hypothesis that ends here.
fn ended(tokens: &[u32], score: f64, finished: bool) -> Hypothesis {
    debug_assert!(!tokens.contains(&EOS));
    Hypothesis { tokens: tokens.to_vec(), score, finished, attention: None }
}
