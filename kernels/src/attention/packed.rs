//! Sequences of different lengths in one buffer, one after the other, without padding.
//!
//! ```text
//! sequence s has the positions offsets[s] .. offsets[s + 1] of [total, heads, dim]
//! for each s:  attention of its queries over its keys
//! ```
//! A padded batch computes and stores the padding of everything around attention; here nobody does. Each sequence is a
//! problem of its own over parts of the same buffers, and the units of all of them are dealt to threads together, so that
//! many short sequences, or one long one beside them, fill every thread. A sequence has the bits that it has in a padded
//! batch.

use super::flash::{self, Forward};
use super::flash_backward::{self, Backward};
use super::problem::{Shape, Shared};
use super::{AttentionSpec, Grads, Inputs, Mask, Saved};
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::view::{HeadsMut, HeadsRef};

/// Where the sequences of packed buffers begin and end.
#[derive(Debug, Clone, Copy)]
pub struct Packed<'a> {
    /// Of the queries: 0, the end of each sequence in ascending order; the last is the total.
    pub q_offsets: &'a [usize],
    /// Of the keys, one for each of the queries'.
    pub k_offsets: &'a [usize],
}

impl Packed<'_> {
    fn check(&self, shape: &Shape, mask: &Mask<'_>) -> Result<(), ShapeError> {
        expect_dim("q", "batch", 1, shape.batch)?;
        expect_dim("k_offsets", "length", self.q_offsets.len(), self.k_offsets.len())?;
        for (argument, offsets, total) in
            [("q_offsets", self.q_offsets, shape.seq_q), ("k_offsets", self.k_offsets, shape.seq_k)]
        {
            let ascending = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
            if !ascending || offsets.first() != Some(&0) || offsets.last() != Some(&total) {
                return Err(ShapeError::Value {
                    argument,
                    value: format!("{offsets:?}"),
                    expected: "ascending from 0 to the number of positions",
                });
            }
        }
        let of_one_length = [
            ("mask.key_lengths", mask.key_lengths.is_some()),
            ("mask.blocks", mask.blocks.is_some()),
            ("mask.bias", mask.bias.is_some()),
        ];
        for (argument, given) in of_one_length {
            if given {
                let expected = "none: it has the shape of one sequence";
                return Err(ShapeError::Value { argument, value: "given".into(), expected });
            }
        }
        mask.check(1, shape.heads, shape.seq_q, shape.seq_k)
    }

    /// Queries and keys of sequence `s`.
    fn sequence(&self, s: usize) -> [std::ops::Range<usize>; 2] {
        [self.q_offsets, self.k_offsets].map(|offsets| offsets[s]..offsets[s + 1])
    }

    fn sequences(&self) -> std::ops::Range<usize> {
        0..self.q_offsets.len() - 1
    }

    /// The problem of sequence `s`, and its mask, whose dropout knows the sequence by its place.
    fn part<'m>(&self, s: usize, shape: &Shape, spec: &AttentionSpec<'m>) -> (Shape, AttentionSpec<'m>) {
        let [q, k] = self.sequence(s);
        let mut spec = *spec;
        if let Some(dropout) = &mut spec.mask.dropout {
            dropout.first_sequence += s;
        }
        (Shape { seq_q: q.len(), seq_k: k.len(), ..*shape }, spec)
    }
}

/// [`forward`](super::forward) of packed sequences.
///
/// # Shapes
/// q [1, total_q, heads, dim], k [1, total_k, kv_heads, dim], v [1, total_k, kv_heads, v_dim], out [1, total_q, heads,
/// v_dim]; lse [heads·total_q]: sequence s has its [heads, seq_q] from `heads·q_offsets[s]` on.
///
/// Positions in the mask count within each sequence.
///
/// # Errors
/// [`ShapeError`] when shapes or offsets do not fit, or when the mask has lengths, block lists or a bias, whose shapes are
/// those of one sequence; nothing has been written then.
///
/// Accuracy: the bits of the padded batch (`attention::tests::packed`).
pub fn forward_packed(
    ctx: &Context,
    inputs: &Inputs<'_>,
    sequences: &Packed<'_>,
    spec: &AttentionSpec<'_>,
    out: HeadsMut<'_>,
    lse: &mut [f32],
) -> Result<(), ShapeError> {
    let Inputs { q, k, v } = *inputs;
    let shape = Shape::of(&q, &k, &v)?;
    shape.expect_out("out", out.layout())?;
    sequences.check(&shape, &spec.mask)?;
    expect_dim("lse", "elements", shape.rows()?, lse.len())?;
    let outs = out.split_positions(sequences.q_offsets);
    let lse = Shared::new(lse);
    let problem = |s: usize| {
        let [of_q, of_k] = sequences.sequence(s);
        let (part, spec) = sequences.part(s, &shape, spec);
        let lse = lse.from(shape.heads * of_q.start);
        let (q, k, v) = (q.positions(of_q), k.positions(of_k.clone()), v.positions(of_k));
        Forward { shape: part, q, k, v, spec, out: &outs[s], lse }
    };
    flash::run(ctx, &sequences.sequences().map(problem).collect::<Vec<_>>());
    Ok(())
}

/// [`backward`](super::backward) of packed sequences.
///
/// # Shapes
/// As in [`forward_packed`]; each gradient as its input.
///
/// # Errors
/// As [`forward_packed`], and when a bias gradient is asked for.
///
/// Accuracy: the bits of the padded batch (`attention::tests::packed`).
pub fn backward_packed(
    ctx: &Context,
    saved: &Saved<'_>,
    sequences: &Packed<'_>,
    d_out: HeadsRef<'_>,
    spec: &AttentionSpec<'_>,
    grads: Grads<'_>,
) -> Result<(), ShapeError> {
    let shape = super::check_backward(saved, &d_out, spec, &grads)?;
    sequences.check(&shape, &spec.mask)?;
    let [d_qs, d_ks, d_vs] = [
        (grads.d_q, sequences.q_offsets),
        (grads.d_k, sequences.k_offsets),
        (grads.d_v, sequences.k_offsets),
    ]
    .map(|(grad, offsets)| grad.split_positions(offsets));
    let parts: Vec<Saved<'_>> = sequences
        .sequences()
        .map(|s| {
            let [q, k] = sequences.sequence(s);
            Saved {
                lse: &saved.lse[shape.heads * q.start..shape.heads * q.end],
                q: saved.q.positions(q.clone()),
                out: saved.out.positions(q),
                k: saved.k.positions(k.clone()),
                v: saved.v.positions(k),
            }
        })
        .collect();
    let problem = |s: usize| {
        let (part, spec) = sequences.part(s, &shape, spec);
        let d_out = d_out.positions(sequences.sequence(s)[0].clone());
        let (d_q, d_k, d_v) = (&d_qs[s], &d_ks[s], &d_vs[s]);
        Backward { shape: part, saved: &parts[s], d_out, spec, d_q, d_k, d_v, d_bias: None }
    };
    flash_backward::run(ctx, &sequences.sequences().map(problem).collect::<Vec<_>>());
    Ok(())
}
