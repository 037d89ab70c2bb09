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

use super::mask::Line;
use super::tile::GROUP;
use crate::lanes;
use crate::math::exp_flushed;

/// What hides or shifts the scores of one row of a block.
#[derive(Clone)]
pub(super) struct Row<'a> {
    /// Added to the scores, one for each real key of the block's columns; may be shorter than the scores.
    pub(super) bias: Option<&'a [f32]>,
    pub(super) alibi: Option<Line>,
    /// The keys that the row sees, counted from the first column.
    pub(super) visible: Range<usize>,
}

/// The visible part of vector `v`: `None` when all of it is visible.
#[inline(always)]
fn hidden<S: Simd>(simd: S, visible: &Range<usize>, v: usize) -> Option<S::m32s> {
    let at = v * S::F32_LANES;
    if visible.start <= at && at + S::F32_LANES <= visible.end {
        return None;
    }
    let start = visible.start.saturating_sub(at);
    let end = visible.end.saturating_sub(at).min(S::F32_LANES);
    // A vector of which nothing is visible asks for 0..0: pulp 0.22 looks 16..16 up beyond its AVX-512 table.
    let (start, end) = if start < end { (start, end) } else { (0, 0) };
    Some(simd.mask_between_m32s(start as u32, end as u32).mask())
}

/// The lanes' places.
const PLACES: [f32; 16] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// `x` plus both biases, and −∞ where nothing is visible.
#[inline(always)]
pub(super) fn score<S: Simd>(simd: S, mut x: S::f32s, v: usize, row: &Row<'_>) -> S::f32s {
    if let Some(bias) = row.bias {
        let start = (v * S::F32_LANES).min(bias.len());
        let end = (start + S::F32_LANES).min(bias.len());
        x = simd.add_f32s(x, lanes::load_tail(simd, &bias[start..end]));
    }
    if let Some(Line { slope, ahead }) = row.alibi {
        // Exact below 2²⁴, as the distance is.
        let first = simd.splat_f32s(ahead - (v * S::F32_LANES) as f32);
        let distance = simd.abs_f32s(simd.sub_f32s(first, S::as_simd_f32s(&PLACES).0[0]));
        x = simd.negate_mul_add_e_f32s(simd.splat_f32s(slope), distance, x);
    }
    match hidden(simd, &row.visible, v) {
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

/// What rows carry from block to block, and the factors that their o are due.
pub(super) struct Carried<'a> {
    pub(super) m: &'a mut [f32],
    /// One vector for each row.
    pub(super) l: &'a mut [f32],
    pub(super) alpha: &'a mut [f32],
}

/// Turns the scores of at most [`GROUP`] rows into `p`, and updates m, l and α. A row has `stride` vectors of scores, of
/// which those of `vectors` are meant; `row(r)` is `None` when nothing of it is hidden and nothing
/// is added.
///
/// - The maxima of all rows come first, then one vector of α for all rows, then all exponentials: a row at a
///   time, its exponentials would wait for the reduction of its maximum.
/// - There is no branch on the maximum: α is 1 where it stands.
#[inline(always)]
pub(super) fn absorb<'a, S: Simd>(
    simd: S,
    scores: &mut [f32],
    (stride, vectors): (usize, &Range<usize>),
    row: impl Fn(usize) -> Option<Row<'a>>,
    carried: Carried<'_>,
) {
    let Carried { m, l, alpha } = carried;
    let rows = m.len();
    let (mut top, mut shifts) = ([0.0; GROUP], [0.0; GROUP]);
    maxima(simd, scores, (stride, vectors), row, &mut top[..rows]);
    lanes::visit(
        simd,
        [&top[..rows]],
        [&mut m[..], &mut *alpha, &mut shifts[..rows]],
        #[inline(always)]
        |[top], [before, ..]| raise(simd, top, before),
    );
    exponentials(simd, scores, (stride, vectors), [&shifts[..rows], alpha], l);
}

/// Adds to the scores what is added to them, hides what is hidden, and gives the maximum of each row: the first part of [`absorb`].
#[inline(always)]
pub(super) fn maxima<'a, S: Simd>(
    simd: S,
    scores: &mut [f32],
    (stride, vectors): (usize, &Range<usize>),
    row: impl Fn(usize) -> Option<Row<'a>>,
    top: &mut [f32],
) {
    let scores = S::as_mut_simd_f32s(scores).0;
    for ((r, scores), top) in scores.chunks_exact_mut(stride).enumerate().zip(top) {
        let scores = &mut scores[vectors.clone()];
        let mut max = simd.splat_f32s(f32::NEG_INFINITY);
        match row(r) {
            None => {
                for x in scores.iter() {
                    max = simd.max_f32s(max, *x);
                }
            }
            Some(row) => {
                for (v, x) in scores.iter_mut().enumerate() {
                    *x = score(simd, *x, v, &row);
                    max = simd.max_f32s(max, *x);
                }
            }
        }
        *top = simd.reduce_max_f32s(max);
    }
}

/// m of some rows after a block whose maxima are `top`, the block's α, and what is subtracted from its scores: the second part of [`absorb`].
#[inline(always)]
pub(super) fn raise<S: Simd>(simd: S, top: S::f32s, before: S::f32s) -> [S::f32s; 3] {
    let now = simd.max_f32s(top, before);
    let none = simd.equal_f32s(now, simd.splat_f32s(f32::NEG_INFINITY));
    let shift = simd.select_f32s(none, simd.splat_f32s(0.0), now);
    // 0 for a row that had seen nothing: its l and o are 0 or not yet written.
    [now, exp_flushed(simd, simd.sub_f32s(before, shift)), shift]
}

/// p of each row, and its l: the last part of [`absorb`].
#[inline(always)]
pub(super) fn exponentials<S: Simd>(
    simd: S,
    scores: &mut [f32],
    (stride, vectors): (usize, &Range<usize>),
    [shifts, alpha]: [&[f32]; 2],
    l: &mut [f32],
) {
    let scores = S::as_mut_simd_f32s(scores).0;
    let rows =
        scores.chunks_exact_mut(stride).zip(l.chunks_exact_mut(S::F32_LANES)).zip(alpha.iter().zip(shifts));
    for ((scores, l), (alpha, shift)) in rows {
        let shift = simd.splat_f32s(*shift);
        let mut sum = simd.splat_f32s(0.0);
        for x in &mut scores[vectors.clone()] {
            *x = exp_flushed(simd, simd.sub_f32s(*x, shift));
            sum = simd.add_f32s(sum, *x);
        }
        let l = &mut S::as_mut_simd_f32s(l).0[0];
        *l = simd.mul_add_e_f32s(*l, simd.splat_f32s(*alpha), sum);
    }
}

/// `o = α·o + sum`: what a row's output takes from a block whose P·V was made apart.
#[inline(always)]
pub(super) fn carry<S: Simd>(simd: S, alpha: f32, sum: &[f32], o: &mut [f32]) {
    let alpha = simd.splat_f32s(alpha);
    lanes::update(
        simd,
        sum,
        o,
        #[inline(always)]
        |sum, o| simd.mul_add_e_f32s(alpha, o, sum),
    );
}

/// The end of a row: `(1 / l, lse)`; `(0, −∞)` when no key was visible.
#[inline(always)]
pub(super) fn finish<S: Simd>(simd: S, m: f32, l: S::f32s) -> (f32, f32) {
    let l = simd.reduce_sum_f32s(l);
    if l == 0.0 { (0.0, f32::NEG_INFINITY) } else { (1.0 / l, m + l.ln()) }
}
