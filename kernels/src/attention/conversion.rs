//! What the softmax makes for tiles of one part of bf16, packed on its way: P from its exponentials, and P and dS of the backward pass.
//!
//! What [`crate::gemm::tile_packing`] writes for one part, word for word, without a P in f32 that is stored and read again.

use std::ops::Range;

use pulp::Simd;

use super::online::{self, Carried};
use super::problem::KEY_BLOCK;
use crate::gemm::microkernel::amx::{BLOCK, SIDE, STEP, TILE_WORDS};
use crate::gemm::microkernel::{Bf16Kernel, Bf16Products, Bf16Visitor, with_bf16_kernel};
use crate::isa::Bf16Dots;
use crate::lanes;
use crate::math::exp_flushed;

/// Turns the scores of `carried`'s rows, [`KEY_BLOCK`] apart, over some steps of keys into P, straight into left tiles; new m, l and α. What
/// [`online::absorb`] and [`super::on_tiles::pack_score_rows`] give, bit for bit, where nothing is hidden or added; the scores stay what they were.
pub(super) fn weigh(
    proof: Bf16Dots,
    scores: &[f32],
    steps: &Range<usize>,
    carried: Carried<'_>,
    tiles: &mut [u32],
) {
    with_bf16_kernel(proof, Weigh { scores, steps, carried, tiles });
}

struct Weigh<'a> {
    scores: &'a [f32],
    steps: &'a Range<usize>,
    carried: Carried<'a>,
    tiles: &'a mut [u32],
}

impl Bf16Visitor for Weigh<'_> {
    #[inline(always)]
    fn visit<D: Bf16Products, const VECS: usize>(self, kernel: Bf16Kernel<D, VECS>) {
        let (dots, simd) = (kernel.products(), kernel.products().simd());
        let lanes = <D::Simd as Simd>::F32_LANES;
        let Carried { m, l, alpha } = self.carried;
        let (mut top, mut shifts) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
        let rows = m.len();
        let columns = self.steps.start * STEP..self.steps.end * STEP;
        for (top, scores) in top[..rows].iter_mut().zip(self.scores.chunks_exact(KEY_BLOCK)) {
            let mut max = simd.splat_f32s(f32::NEG_INFINITY);
            for x in D::Simd::as_simd_f32s(&scores[columns.clone()]).0 {
                max = simd.max_f32s(max, *x);
            }
            *top = simd.reduce_max_f32s(max);
        }
        lanes::visit(
            simd,
            [&top[..rows]],
            [&mut m[..], &mut *alpha, &mut shifts[..rows]],
            #[inline(always)]
            |[top], [before, ..]| online::raise(simd, top, before),
        );
        for (i, l) in l.chunks_exact_mut(lanes).enumerate().take(rows) {
            let row = &self.scores[i * KEY_BLOCK..][columns.clone()];
            let tiles = &mut self.tiles[i / SIDE * self.steps.len() * TILE_WORDS + i % SIDE * SIDE..];
            let shift = simd.splat_f32s(shifts[i]);
            let mut sum = simd.splat_f32s(0.0);
            for (step, scores) in row.as_chunks::<STEP>().0.iter().enumerate() {
                let mut p = [0.0f32; STEP];
                let vectors = D::Simd::as_mut_simd_f32s(&mut p).0.iter_mut();
                for (p, x) in vectors.zip(D::Simd::as_simd_f32s(scores).0) {
                    *p = exp_flushed(simd, simd.sub_f32s(*x, shift));
                    sum = simd.add_f32s(sum, *p);
                }
                tiles[step * TILE_WORDS..][..SIDE].copy_from_slice(&dots.along::<false>(&p));
            }
            let l = &mut D::Simd::as_mut_simd_f32s(l).0[0];
            *l = simd.mul_add_e_f32s(*l, simd.splat_f32s(alpha[i]), sum);
        }
    }
}

/// `scale·Q·Kᵀ` and `dO·Vᵀ` of some rows, [`KEY_BLOCK`] apart, whole pairs of them, which become P and dS in tiles. What [`super::backward_weights`],
/// [`super::on_tiles::pack_scores`] and [`super::on_tiles::pack_score_rows`] give, bit for bit, where nothing is hidden, added or dropped.
pub(super) struct Gradients<'a> {
    pub(super) scores: &'a [f32],
    pub(super) d_p: &'a [f32],
    pub(super) lse: &'a [f32],
    pub(super) delta: &'a [f32],
    /// The steps of keys.
    pub(super) steps: &'a Range<usize>,
    /// Where the rows stand among the `depth` rows of the tile.
    pub(super) place: usize,
    pub(super) depth: usize,
    /// P and dS as the right operand, dS as the left one.
    pub(super) p: &'a mut [u32],
    pub(super) d_s: &'a mut [u32],
    pub(super) d_s_left: &'a mut [u32],
}

impl Gradients<'_> {
    /// Makes them.
    pub(super) fn make(self, proof: Bf16Dots) {
        with_bf16_kernel(proof, self);
    }

    /// P and dS of one row and one step.
    #[inline(always)]
    fn row<S: Simd>(&self, simd: S, i: usize, column: usize) -> [[f32; STEP]; 2] {
        let [mut p, mut d_s] = [[0.0f32; STEP]; 2];
        let at = i * KEY_BLOCK + column;
        let lse = simd.splat_f32s(online::shift(self.lse[i]));
        let delta = simd.splat_f32s(self.delta[i]);
        let from = S::as_simd_f32s(&self.scores[at..][..STEP]).0.iter();
        let from = from.zip(S::as_simd_f32s(&self.d_p[at..][..STEP]).0);
        let to = S::as_mut_simd_f32s(&mut p).0.iter_mut().zip(S::as_mut_simd_f32s(&mut d_s).0);
        for ((p, d_s), (score, d_p)) in to.zip(from) {
            *p = exp_flushed(simd, simd.sub_f32s(*score, lse));
            *d_s = simd.mul_f32s(*p, simd.sub_f32s(*d_p, delta));
        }
        [p, d_s]
    }
}

impl Bf16Visitor for Gradients<'_> {
    #[inline(always)]
    fn visit<D: Bf16Products, const VECS: usize>(self, kernel: Bf16Kernel<D, VECS>) {
        let (dots, simd) = (kernel.products(), kernel.products().simd());
        let (deep, panel) = (self.steps.len(), self.depth.div_ceil(STEP) * 2 * TILE_WORDS);
        for i in (0..self.lse.len()).step_by(2) {
            let row = self.place + i;
            let left = row / SIDE * deep * TILE_WORDS + row % SIDE * SIDE;
            let right = row / STEP * 2 * TILE_WORDS + row % STEP / 2 * SIDE;
            for step in 0..deep {
                let column = (self.steps.start + step) * STEP;
                let [low_p, low] = self.row(simd, i, column);
                let [high_p, high] = self.row(simd, i + 1, column);
                let left = &mut self.d_s_left[left + step * TILE_WORDS..][..2 * SIDE];
                left[..SIDE].copy_from_slice(&dots.along::<false>(&low));
                left[SIDE..].copy_from_slice(&dots.along::<false>(&high));
                for (low, high, to) in [(low_p, high_p, &mut *self.p), (low, high, &mut *self.d_s)] {
                    let to = &mut to[right + step * panel..][..TILE_WORDS + SIDE];
                    let sides = low.as_chunks::<SIDE>().0.iter().zip(high.as_chunks::<SIDE>().0);
                    for (side, (low, high)) in sides.enumerate() {
                        to[side * TILE_WORDS..][..SIDE].copy_from_slice(&dots.across::<false>(low, high));
                    }
                }
            }
        }
    }
}
