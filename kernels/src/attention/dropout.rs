//! Dropout of probabilities, made again in the backward pass.
//!
//! ```text
//! forward:   z_ij = keep(sequence, head, i, j) ? 1/(1 − p) : 0;   O = (P ∘ z)·V
//! backward:  dV = (P ∘ z)ᵀ·dO;   dP = z ∘ (dO·Vᵀ);   dS = P ∘ (dP − D),   D = Σ dO·O as without dropout
//! ```
//! The naive form stores z, which is as large as the scores. Here the word of a score is a function of the seed, the
//! stream, and of the names of its sequence, head, query and key: nothing is stored, and neither threads nor blocks nor
//! padding change it.
//!
//! - l and the log-sum-exp are those of all probabilities: only what multiplies V falls.
//! - A counter holds key, query, head and sequence, 32 bits each; seed and stream are mixed into the key of the generator
//!   by one call of it. Keys go by 64 as elements do in [`crate::rowwise::dropout`], so vectors of words lie in order.
//! - The factors of a row and a block of keys are made just before they are used, into 1 KiB of the stack: ten rounds
//!   of Philox for four words cost about as much as the two products of 64 elements that a score takes.

use std::ops::Range;

use pulp::Simd;

use super::problem::KEY_BLOCK;
use crate::rowwise::dropout::{self, Dropout, Source};

/// Which probabilities fall.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoreDropout {
    /// The probability, the seed, and the stream, which is one for each use (step, layer) of a run.
    pub dropout: Dropout,
    /// The name of the batch's first sequence; the others count on. Parts of a batch keep its masks by it.
    pub first_sequence: usize,
}

impl ScoreDropout {
    /// The masks of one head of one sequence of the batch.
    pub(super) fn head(&self, batch: usize, head: usize) -> HeadDropout {
        let Dropout { seed, stream, .. } = self.dropout;
        let counter = [stream as u32, (stream >> 32) as u32, 0, 0];
        let [low, high, ..] = dropout::philox(pulp::Scalar, counter, seed);
        let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let sequence = (self.first_sequence + batch) as u32;
        HeadDropout(Source {
            key: join(low, high),
            high: join(head as u32, sequence),
            ..self.dropout.source()
        })
    }
}

/// The masks of one head of one sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeadDropout(Source);

/// Room for the factors of a row and a block of keys.
pub(super) type Space = [f32; dropout::factors_space(KEY_BLOCK)];

/// Such room.
pub(super) const SPACE: Space = [0.0; dropout::factors_space(KEY_BLOCK)];

impl HeadDropout {
    /// What the probabilities of query `i` and these keys, at most a block, are multiplied by.
    #[inline(always)]
    pub(super) fn factors<'a, S: Simd>(
        &self,
        simd: S,
        i: usize,
        keys: Range<usize>,
        space: &'a mut Space,
    ) -> &'a [f32] {
        let source = Source { base: (i as u64) << 32, ..self.0 };
        dropout::factors(simd, &source, keys.start as u64..keys.end as u64, space)
    }
}
