//! What the softmax makes for tiles of one part of bf16, packed on its way: P from its exponentials, and P and dS of the backward pass.
//!
//! What [`crate::gemm::tile_packing`] writes for one part, word for word, without a P in f32 that is stored and read again.

use std::ops::Range;

use pulp::Simd;

use super::mask::{Coverage, Sight};
use super::online::{self, Carried, Row};
use super::problem::KEY_BLOCK;
use crate::gemm::microkernel::amx::{BLOCK, SIDE, STEP, TILE_WORDS};
use crate::gemm::microkernel::{Bf16Kernel, Bf16Products, Bf16Visitor, with_bf16_kernel};
use crate::isa::Bf16Dots;
use crate::lanes;
use crate::math::exp_flushed;

/// What consecutive rows see of a block of keys.
#[derive(Clone, Copy)]
pub(super) struct Seen<'a> {
    pub(super) sight: Sight,
    pub(super) first_row: usize,
    pub(super) keys: &'a Range<usize>,
}

impl Seen<'_> {
    /// Whether so many rows, at least one, see all of some steps.
    #[inline(always)]
    fn all(&self, rows: usize, steps: &Range<usize>) -> bool {
        let rows = self.first_row..self.first_row + rows;
        let keys = self.keys.start + steps.start * STEP..self.keys.start + steps.end * STEP;
        keys.end <= self.keys.end && self.sight.classify(&rows, &keys) == Coverage::Full
    }

    /// The columns of the block that row `i` of them sees.
    #[inline(always)]
    fn row(&self, i: usize) -> Range<usize> {
        let seen = self.sight.row(self.first_row + i, self.keys);
        seen.start - self.keys.start..seen.end - self.keys.start
    }
}

/// How much of one step of keys a row sees.
enum Step {
    All,
    /// These columns, counted from the step's first.
    Some(Range<usize>),
    Nothing,
}

impl Step {
    /// Of the step that begins with column `first`.
    #[inline(always)]
    fn of(visible: &Range<usize>, first: usize) -> Step {
        let [start, end] = [visible.start, visible.end].map(|at| at.saturating_sub(first).min(STEP));
        match (start, end) {
            (0, STEP) => Step::All,
            (start, end) if start < end => Step::Some(start..end),
            _ => Step::Nothing,
        }
    }
}

/// Turns the scores of `carried`'s rows, [`KEY_BLOCK`] apart, over some steps of keys into P, straight into left tiles; new m, l and α. What
/// [`online::absorb`] and [`super::on_tiles::pack_score_rows`] give, bit for bit, where nothing is added; the scores stay what they were.
pub(super) fn weigh(
    proof: Bf16Dots,
    scores: &[f32],
    (steps, seen): (&Range<usize>, Seen<'_>),
    carried: Carried<'_>,
    tiles: &mut [u32],
) {
    with_bf16_kernel(proof, Weigh { scores, steps, seen, carried, tiles });
}

struct Weigh<'a> {
    scores: &'a [f32],
    steps: &'a Range<usize>,
    seen: Seen<'a>,
    carried: Carried<'a>,
    tiles: &'a mut [u32],
}

impl Weigh<'_> {
    /// Row `i` of the scores, step by step, and how much of it is seen: all of it unless `CUT`.
    #[inline(always)]
    fn steps<const CUT: bool>(&self, i: usize) -> impl Iterator<Item = (&[f32; STEP], Step)> {
        let visible = if CUT { self.seen.row(i) } else { 0..KEY_BLOCK };
        let columns = self.steps.start * STEP..self.steps.end * STEP;
        let scores = self.scores[i * KEY_BLOCK..][columns].as_chunks::<STEP>().0;
        scores.iter().zip(self.steps.clone()).map(
            #[inline(always)]
            move |(scores, step)| (scores, if CUT { Step::of(&visible, step * STEP) } else { Step::All }),
        )
    }

    /// The largest score of row `i` that it sees.
    #[inline(always)]
    fn top<S: Simd, const CUT: bool>(&self, simd: S, i: usize) -> f32 {
        let mut max = simd.splat_f32s(f32::NEG_INFINITY);
        for (scores, step) in self.steps::<CUT>(i) {
            let scores = S::as_simd_f32s(scores).0;
            match step {
                Step::All => scores.iter().for_each(|x| max = simd.max_f32s(max, *x)),
                Step::Some(visible) => {
                    let row = Row { bias: None, alibi: None, visible };
                    for (v, x) in scores.iter().enumerate() {
                        max = simd.max_f32s(max, online::score(simd, *x, v, &row));
                    }
                }
                Step::Nothing => {}
            }
        }
        simd.reduce_max_f32s(max)
    }

    /// P of row `i`, to its place in `tiles`; its sum.
    #[inline(always)]
    fn row<D: Bf16Products, const CUT: bool>(
        &self,
        dots: D,
        i: usize,
        shift: f32,
        tiles: &mut [u32],
    ) -> <D::Simd as Simd>::f32s {
        let simd = dots.simd();
        let tiles = &mut tiles[i / SIDE * self.steps.len() * TILE_WORDS + i % SIDE * SIDE..];
        let shift = simd.splat_f32s(shift);
        let mut sum = simd.splat_f32s(0.0);
        for (at, (scores, step)) in self.steps::<CUT>(i).enumerate() {
            let mut p = [0.0f32; STEP];
            let vectors = D::Simd::as_mut_simd_f32s(&mut p).0.iter_mut();
            let vectors = vectors.zip(D::Simd::as_simd_f32s(scores).0);
            match step {
                Step::All => {
                    for (p, x) in vectors {
                        *p = exp_flushed(simd, simd.sub_f32s(*x, shift));
                        sum = simd.add_f32s(sum, *p);
                    }
                }
                Step::Some(visible) => {
                    for (v, (p, x)) in vectors.enumerate() {
                        let weight = exp_flushed(simd, simd.sub_f32s(*x, shift));
                        *p = online::seen(simd, weight, v, &visible);
                        sum = simd.add_f32s(sum, *p);
                    }
                }
                Step::Nothing => {}
            }
            tiles[at * TILE_WORDS..][..SIDE].copy_from_slice(&dots.along::<false>(&p));
        }
        sum
    }

    /// All rows, which see all of the steps unless `CUT`.
    #[inline(always)]
    fn rows<D: Bf16Products, const CUT: bool>(mut self, dots: D) {
        let (simd, lanes) = (dots.simd(), <D::Simd as Simd>::F32_LANES);
        let (mut top, mut shifts) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
        let rows = self.carried.m.len();
        top[..rows].iter_mut().enumerate().for_each(|(i, top)| *top = self.top::<_, CUT>(simd, i));
        lanes::visit(
            simd,
            [&top[..rows]],
            [&mut *self.carried.m, &mut *self.carried.alpha, &mut shifts[..rows]],
            #[inline(always)]
            |[top], [before, ..]| online::raise(simd, top, before),
        );
        let tiles = std::mem::take(&mut self.tiles);
        for (i, shift) in shifts[..rows].iter().enumerate() {
            let sum = self.row::<D, CUT>(dots, i, *shift, tiles);
            let l = &mut D::Simd::as_mut_simd_f32s(&mut self.carried.l[i * lanes..][..lanes]).0[0];
            *l = simd.mul_add_e_f32s(*l, simd.splat_f32s(self.carried.alpha[i]), sum);
        }
    }
}

impl Bf16Visitor for Weigh<'_> {
    #[inline(always)]
    fn visit<D: Bf16Products, const VECS: usize>(self, kernel: Bf16Kernel<D, VECS>) {
        if self.seen.all(self.carried.m.len(), self.steps) {
            self.rows::<D, false>(kernel.products());
        } else {
            self.rows::<D, true>(kernel.products());
        }
    }
}

/// `scale·Q·Kᵀ` and `dO·Vᵀ` of at most 32 rows, [`KEY_BLOCK`] apart, which become P and dS in tiles, with zeros for the rows that there are not. What [`super::backward_weights`],
/// [`super::on_tiles::pack_scores`] and [`super::on_tiles::pack_score_rows`] give, bit for bit, where nothing is added or dropped.
pub(super) struct Gradients<'a> {
    pub(super) scores: &'a [f32],
    pub(super) d_p: &'a [f32],
    pub(super) lse: &'a [f32],
    pub(super) delta: &'a [f32],
    pub(super) seen: Seen<'a>,
    /// The steps of keys that the rows see, among those of the tile.
    pub(super) steps: &'a Range<usize>,
    pub(super) of_tile: &'a Range<usize>,
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

    /// The same, and zeros where the row sees nothing; `visible` are columns of the block.
    #[inline(always)]
    fn cut_row<S: Simd>(&self, simd: S, i: usize, column: usize, visible: &Range<usize>) -> [[f32; STEP]; 2] {
        match Step::of(visible, column) {
            Step::All => self.row(simd, i, column),
            Step::Nothing => [[0.0; STEP]; 2],
            Step::Some(visible) => self.row(simd, i, column).map(|mut row| {
                for (v, x) in S::as_mut_simd_f32s(&mut row).0.iter_mut().enumerate() {
                    *x = online::seen(simd, *x, v, &visible);
                }
                row
            }),
        }
    }

    /// What row `i` sees of the block; nothing if there is no such row.
    #[inline(always)]
    fn visible(&self, i: usize) -> Range<usize> {
        if i < self.lse.len() { self.seen.row(i) } else { 0..0 }
    }

    /// Rows `i` and `i + 1`, which see all of the steps unless `CUT`.
    #[inline(always)]
    fn pair<D: Bf16Products, const CUT: bool>(&mut self, dots: D, i: usize) {
        let simd = dots.simd();
        let (deep, panel) = (self.of_tile.len(), self.depth.div_ceil(STEP) * 2 * TILE_WORDS);
        let row = self.place + i;
        let left = row / SIDE * deep * TILE_WORDS + row % SIDE * SIDE;
        let right = row / STEP * 2 * TILE_WORDS + row % STEP / 2 * SIDE;
        let visible = if CUT { [self.visible(i), self.visible(i + 1)] } else { [0..0, 0..0] };
        for step in self.steps.clone() {
            let column = step * STEP;
            let [[low_p, low], [high_p, high]] = if CUT {
                [0, 1].map(|r| self.cut_row(simd, i + r, column, &visible[r]))
            } else {
                [self.row(simd, i, column), self.row(simd, i + 1, column)]
            };
            let step = step - self.of_tile.start;
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

impl Bf16Visitor for Gradients<'_> {
    #[inline(always)]
    fn visit<D: Bf16Products, const VECS: usize>(mut self, kernel: Bf16Kernel<D, VECS>) {
        let dots = kernel.products();
        let rows = self.lse.len();
        if rows.is_multiple_of(STEP) && self.seen.all(rows, self.steps) {
            (0..rows).step_by(2).for_each(|i| self.pair::<D, false>(dots, i));
        } else {
            (0..rows.next_multiple_of(STEP)).step_by(2).for_each(|i| self.pair::<D, true>(dots, i));
        }
    }
}
