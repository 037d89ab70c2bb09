//! The algebra of the online softmax: a row's state is (m, l), the maximum of its scores so far and the
//! sum of `exp(score − m)`.
//!
//! ```text
//! m' = max(m, max_j s_j)      α = exp(m − m')      p_j = exp(s_j − m')      l' = α·l + Σ_j p_j
//! ```
//!
//! Key blocks are absorbed in ascending order from key 0 and have a fixed size, so a row's bits depend on
//! its own visible keys alone: later keys, padding and neighbours are absent or add exact zeros. `l` stays
//! spread over the lanes of one vector, key `j` of a block in lane `j mod lanes`, until the row is finished:
//! one reduction a row instead of one a block.

use std::ops::Range;

use pulp::Simd;

use crate::math::exp;

/// What the scores of one row of a block become before the exponential.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    /// Multiplies the raw products.
    pub(super) scale: f32,
    /// Added after scaling, one for each real key of the block's columns; may be shorter than the scores.
    pub(super) bias: Option<&'a [f32]>,
}

/// All of `vectors` vectors is visible.
#[inline(always)]
pub(super) fn covers<S: Simd>(visible: &Range<usize>, vectors: usize) -> bool {
    visible.start == 0 && visible.end == vectors * S::F32_LANES
}

/// The visible part of vector `v`: `None` when all of it is visible.
#[inline(always)]
fn hidden<S: Simd>(simd: S, visible: &Range<usize>, v: usize) -> Option<S::m32s> {
    let at = v * S::F32_LANES;
    if visible.start <= at && at + S::F32_LANES <= visible.end {
        return None;
    }
    let start = visible.start.saturating_sub(at).min(S::F32_LANES);
    let end = visible.end.saturating_sub(at).min(S::F32_LANES);
    Some(simd.mask_between_m32s(start as u32, end.max(start) as u32).mask())
}

/// `scale·x + bias`, and −∞ where nothing is visible.
#[inline(always)]
pub(super) fn score<S: Simd>(
    simd: S,
    x: S::f32s,
    v: usize,
    row: &Row<'_>,
    visible: &Range<usize>,
) -> S::f32s {
    let mut x = simd.mul_f32s(x, simd.splat_f32s(row.scale));
    if let Some(bias) = row.bias {
        let start = (v * S::F32_LANES).min(bias.len());
        let end = (start + S::F32_LANES).min(bias.len());
        x = simd.add_f32s(x, simd.partial_load_f32s(&bias[start..end]));
    }
    match hidden(simd, visible, v) {
        None => x,
        Some(mask) => simd.select_f32s(mask, x, simd.splat_f32s(f32::NEG_INFINITY)),
    }
}

/// `x`, and 0 where nothing is visible.
#[inline(always)]
pub(super) fn seen<S: Simd>(simd: S, x: S::f32s, v: usize, visible: &Range<usize>) -> S::f32s {
    match hidden(simd, visible, v) {
        None => x,
        Some(mask) => simd.select_f32s(mask, x, simd.splat_f32s(0.0)),
    }
}

/// What is subtracted from the scores of a row whose maximum or log-sum-exp is `m`: `m` itself, but 0 for a
/// row that has seen nothing yet, whose exponentials are then exact zeros and not `exp(−∞ + ∞)`.
#[inline(always)]
pub(super) fn shift(m: f32) -> f32 {
    if m == f32::NEG_INFINITY { 0.0 } else { m }
}

/// Turns the raw products of one row into `p`, updates (m, l), and returns α, or `None` when o needs no scaling.
///
/// `scores` are whole vectors from a vector boundary of the key block on; `visible` counts from their first.
#[inline(always)]
pub(super) fn absorb<S: Simd>(
    simd: S,
    scores: &mut [S::f32s],
    row: &Row<'_>,
    visible: &Range<usize>,
    m: &mut f32,
    l: &mut S::f32s,
) -> Option<S::f32s> {
    let mut top = simd.splat_f32s(f32::NEG_INFINITY);
    if row.bias.is_none() && covers::<S>(visible, scores.len()) {
        let scale = simd.splat_f32s(row.scale);
        for x in scores.iter_mut() {
            *x = simd.mul_f32s(*x, scale);
            top = simd.max_f32s(top, *x);
        }
    } else {
        for (v, x) in scores.iter_mut().enumerate() {
            *x = score(simd, *x, v, row, visible);
            top = simd.max_f32s(top, *x);
        }
    }
    let top = simd.reduce_max_f32s(top);
    let before = *m;
    if top > before {
        *m = top;
    }
    let shift = simd.splat_f32s(shift(*m));
    let mut sum = simd.splat_f32s(0.0);
    for x in scores {
        *x = exp(simd, simd.sub_f32s(*x, shift));
        sum = simd.add_f32s(sum, *x);
    }
    if *m == before || before == f32::NEG_INFINITY {
        // Nothing to rescale: l and o are still 0, or the maximum stands.
        *l = simd.add_f32s(*l, sum);
        return None;
    }
    let alpha = exp(simd, simd.sub_f32s(simd.splat_f32s(before), shift));
    *l = simd.mul_add_e_f32s(*l, alpha, sum);
    Some(alpha)
}

/// The end of a row: `(1 / l, lse)`; `(0, −∞)` when no key was visible.
#[inline(always)]
pub(super) fn finish<S: Simd>(simd: S, m: f32, l: S::f32s) -> (f32, f32) {
    let l = simd.reduce_sum_f32s(l);
    if l == 0.0 { (0.0, f32::NEG_INFINITY) } else { (1.0 / l, m + l.ln()) }
}
