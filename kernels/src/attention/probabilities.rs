//! The attention probabilities of one head, for pictures and for tests of alignment.
//!
//! ```text
//! p_ij = exp(s_ij − max_j s_ij) / Σ_j exp(s_ij − max_j s_ij)      over the visible keys, 0 elsewhere
//! ```
//! Dropout of the mask is left out: these are the probabilities before any falls. A pass of its own: the ordinary forward pass stores no probability and pays nothing for this one.

use pulp::{Simd, WithSimd};

use super::blocks::BlockList;
use super::mask::Line;
use super::online;
use super::problem::{KEY_BLOCK, Shape, piece};
use super::tile::{Dest, Extent, GROUP, Onto, Right, left, product};
use super::{AttentionSpec, stage};
use crate::lanes;
use crate::scratch::ScratchBuf;
use crate::view::{MatMut, MatRef};

/// A checked problem: one query head of one sequence.
pub(super) struct Probabilities<'a> {
    pub(super) shape: Shape,
    pub(super) q: MatRef<'a>,
    pub(super) k: MatRef<'a>,
    pub(super) spec: AttentionSpec<'a>,
    pub(super) batch: usize,
    pub(super) head: usize,
    pub(super) out: MatMut<'a>,
}

impl WithSimd for Probabilities<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let Shape { seq_q, seq_k, dim, .. } = self.shape;
        let width = KEY_BLOCK.next_multiple_of(S::F32_LANES);
        let mut scratch = ScratchBuf::take((dim + GROUP) * width);
        let (keys, scores) = scratch.split_at_mut(dim * width);
        for block in 0..seq_k.div_ceil(KEY_BLOCK) {
            let block = piece(block, KEY_BLOCK, seq_k);
            let stride = block.len().next_multiple_of(S::F32_LANES);
            stage::transpose(self.k.sub(block.clone(), 0..dim), keys, stride);
            for first in (0..seq_q).step_by(GROUP) {
                let rows = GROUP.min(seq_q - first);
                let extent = Extent { rows, cols: stride, depth: dim };
                // SAFETY: q has these rows of `dim` elements; Kᵀ [dim, stride] and the scores [GROUP, stride]
                // fit their parts of the scratch.
                unsafe {
                    let q = left(self.q, first);
                    let s = Dest { ptr: scores.as_mut_ptr(), stride };
                    product(simd, extent, q, Right::rows(keys.as_ptr(), stride), s, Onto::Zero);
                }
                for r in 0..rows {
                    self.out.row_mut(first + r)[block.clone()]
                        .copy_from_slice(&scores[r * stride..][..block.len()]);
                }
            }
        }
        for i in 0..seq_q {
            self.row(simd, i);
        }
    }
}

impl Probabilities<'_> {
    /// Turns the raw products of row `i` into probabilities.
    #[inline(always)]
    fn row<S: Simd>(&mut self, simd: S, i: usize) {
        let Shape { seq_q, seq_k, .. } = self.shape;
        let visible = self.spec.mask.sight(self.batch, seq_k).row(i, &(0..seq_k));
        let bias = self.spec.mask.bias.map(|bias| &bias.row(self.head, i, seq_q, seq_k)[visible.clone()]);
        let row = self.out.row_mut(i);
        row[..visible.start].fill(0.0);
        row[visible.end..].fill(0.0);
        let first_key = visible.start;
        let line = self.spec.mask.alibi.map(|alibi| alibi.line(self.head, i, first_key));
        let row = &mut row[visible];
        let scale = simd.splat_f32s(self.spec.scale);
        match bias {
            None => lanes::map_in_place(
                simd,
                row,
                #[inline(always)]
                |x| simd.mul_f32s(x, scale),
            ),
            Some(bias) => lanes::update(
                simd,
                bias,
                row,
                #[inline(always)]
                |b, x| simd.add_f32s(simd.mul_f32s(x, scale), b),
            ),
        }
        if let Some(Line { slope, ahead }) = line {
            for (c, score) in row.iter_mut().enumerate() {
                *score -= slope * (ahead - c as f32).abs();
            }
        }
        if let Some(list) = self.spec.mask.list(self.head) {
            weigh(list, i, first_key, row);
        }
        let shift = simd.splat_f32s(online::shift(lanes::max(simd, row)));
        lanes::map_in_place(
            simd,
            row,
            #[inline(always)]
            |x| crate::math::exp(simd, simd.sub_f32s(x, shift)),
        );
        let sum = lanes::sum(simd, row);
        let inverse = simd.splat_f32s(if sum == 0.0 { 0.0 } else { 1.0 / sum });
        lanes::map_in_place(
            simd,
            row,
            #[inline(always)]
            |x| simd.mul_f32s(x, inverse),
        );
    }
}

/// Hides the keys of row `i` that the list does not name, and counts twice those that it names twice; `scores` begin
/// at `first_key`.
fn weigh(list: &BlockList, i: usize, first_key: usize, scores: &mut [f32]) {
    let keys = list.keys(i / list.block());
    for (score, key) in scores.iter_mut().zip(first_key..) {
        let block = key / list.block();
        let count = keys.partition_point(|&j| j <= block) - keys.partition_point(|&j| j < block);
        *score += (count as f32).ln();
    }
}
