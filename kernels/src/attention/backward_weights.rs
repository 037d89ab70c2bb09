//! P and dS of some rows of a head against a block of keys, made in place of `scale·Q·Kᵀ` and `dO·Vᵀ`.
//!
//! ```text
//! P_ij = exp(s_ij + bias_ij − lse_i)     dS_ij = P_ij·(z_ij·dP_ij − D_i)     then P_ij·z_ij, for dV
//! ```
//! What both means of multiplying share: masks, biases, dropout and the gradient of the bias.

use std::ops::Range;

use pulp::Simd;

use super::chunk::{times, vectors};
use super::dropout::{HeadDropout, SPACE, Space};
use super::flash_backward::Backward;
use super::mask::Sight;
use super::online::{Row, score, seen, shift};
use super::problem::Shape;
use crate::math::exp_flushed;

/// What the rows of one query head bring along.
#[derive(Clone, Copy)]
pub(super) struct HeadWeights<'a> {
    pub(super) index: usize,
    pub(super) lse: &'a [f32],
    /// D of the region's rows, of which the first is `first_row`.
    pub(super) delta: &'a [f32],
    pub(super) first_row: usize,
    pub(super) dropout: Option<HeadDropout>,
}

/// P and dS of a tile [rows, stride].
pub(super) struct Scores<'a> {
    pub(super) p: &'a mut [f32],
    pub(super) d_s: &'a mut [f32],
}

/// Some rows of a head and a block of keys.
pub(super) struct Weights<'t, 'a> {
    pub(super) problem: &'t Backward<'a>,
    pub(super) head: HeadWeights<'t>,
    pub(super) keys: &'t Range<usize>,
    /// Columns of the scores.
    pub(super) stride: usize,
    pub(super) sight: Sight,
    /// The row of the first scores.
    pub(super) first: usize,
    /// What all rows of the tile see of the block; not empty.
    pub(super) seen: &'t Range<usize>,
}

/// The columns of a block in the vectors that hold `seen`.
#[inline(always)]
pub(super) fn columns<S: Simd>(seen: &Range<usize>, keys: &Range<usize>) -> Range<usize> {
    let vectors = vectors::<S>(seen, keys);
    vectors.start * S::F32_LANES..vectors.end * S::F32_LANES
}

impl Weights<'_, '_> {
    /// P and dS of at most six rows that see `seen`; adds dS to the gradient of the bias if `bias`.
    #[inline(always)]
    pub(super) fn make<S: Simd>(
        &self,
        simd: S,
        scores: &mut Scores<'_>,
        (rows, seen): (Range<usize>, &Range<usize>),
        bias: bool,
    ) {
        for i in rows {
            let mut space = SPACE;
            let factors = self.factors(simd, i, seen, &mut space);
            let place = (i - self.first) * self.stride + columns::<S>(seen, self.keys).start;
            times(simd, factors, &mut scores.d_s[place..][..factors.len()]);
            self.row(simd, scores, i, bias, seen);
            times(simd, factors, &mut scores.p[place..][..factors.len()]);
        }
    }

    /// What dropout multiplies the probabilities of row `i` by, from the group's first column on; empty without.
    #[inline(always)]
    fn factors<'s, S: Simd>(
        &self,
        simd: S,
        i: usize,
        seen_by_group: &Range<usize>,
        space: &'s mut Space,
    ) -> &'s [f32] {
        let Some(dropout) = &self.head.dropout else { return &[] };
        let (keys, columns) = (self.keys, columns::<S>(seen_by_group, self.keys));
        let end = keys.end.min(keys.start + columns.end);
        dropout.factors(simd, i, keys.start + columns.start..end, space)
    }

    /// P and dS of row `i`, whose group sees `seen_by_group`: computed in its vectors, zero in the tile's others.
    #[inline(always)]
    fn row<S: Simd>(
        &self,
        simd: S,
        scores: &mut Scores<'_>,
        i: usize,
        bias: bool,
        seen_by_group: &Range<usize>,
    ) {
        let Shape { seq_q, seq_k, .. } = self.problem.shape;
        let (stride, keys) = (self.stride, self.keys);
        let local = i - self.first;
        let whole = columns::<S>(self.seen, keys);
        let columns = columns::<S>(seen_by_group, keys);
        let delta = simd.splat_f32s(self.head.delta[i - self.head.first_row]);
        let p = &mut scores.p[local * stride..][..stride];
        let d_s = &mut scores.d_s[local * stride..][..stride];
        if columns != whole {
            for outside in
                [whole.start..columns.start.max(whole.start), columns.end.min(whole.end)..whole.end]
            {
                p[outside.clone()].fill(0.0);
                d_s[outside].fill(0.0);
            }
        }
        let from = keys.start + columns.start;
        let visible = self.sight.row(i, keys);
        let visible = visible.start.max(from) - from..visible.end.max(from) - from;
        let mask = &self.problem.spec.mask;
        let bias_row = mask.bias.map(|b| &b.row(self.head.index, i, seq_q, seq_k)[from..keys.end]);
        let alibi = mask.alibi.map(|alibi| alibi.line(self.head.index, i, from));
        let lse = simd.splat_f32s(shift(self.head.lse[i]));
        let p = S::as_mut_simd_f32s(&mut p[columns.clone()]).0;
        let d_s = S::as_mut_simd_f32s(&mut d_s[columns]).0;
        if !bias && bias_row.is_none() && alibi.is_none() && visible == (0..p.len() * S::F32_LANES) {
            for (p, d_s) in p.iter_mut().zip(d_s) {
                *p = exp_flushed(simd, simd.sub_f32s(*p, lse));
                *d_s = simd.mul_f32s(*p, simd.sub_f32s(*d_s, delta));
            }
            return;
        }
        let row = Row { bias: bias_row, alibi, visible };
        for (v, (p, d_s)) in p.iter_mut().zip(d_s.iter_mut()).enumerate() {
            // Exact zeros where a key is hidden, though lse, D or dP be NaN: the key does not see this row either.
            let weight = exp_flushed(simd, simd.sub_f32s(score(simd, *p, v, &row), lse));
            *p = seen(simd, weight, v, &row.visible);
            *d_s = seen(simd, simd.mul_f32s(weight, simd.sub_f32s(*d_s, delta)), v, &row.visible);
        }
        if bias {
            let d_s: &[f32] = pulp::bytemuck::cast_slice(d_s);
            self.problem.add_to_bias(self.head.index, i, from + row.visible.start, &d_s[row.visible]);
        }
    }
}

impl Backward<'_> {
    /// `d_bias[head][row][first..] += d_s`.
    #[inline(always)]
    fn add_to_bias(&self, head: usize, row: usize, first: usize, d_s: &[f32]) {
        let Some(d_bias) = self.d_bias else { return };
        let head = if self.bias_heads() == 1 { 0 } else { head };
        let first = (head * self.shape.seq_q + row) * self.shape.seq_k + first;
        // SAFETY: d_bias has the shape of the bias, [bias heads, seq_q, seq_k]; the unit that adds to it owns
        // this row of this bias head alone.
        let d_bias = unsafe { d_bias.part(first, d_s.len()) };
        for (sum, x) in d_bias.iter_mut().zip(d_s) {
            *sum += x;
        }
    }
}
