//! Operands in one part of bf16, in whole tiles, by the CPU's own conversion.
//!
//! What `gemm::split` writes for one part, word for word, but that numbers below 2⁻¹²⁶ become zero, as which products take them anyway: 32 numbers are two loads, one
//! instruction and a store, where integer arithmetic takes some forty instructions. Nothing is copied to a place of its own first.

use std::ops::Range;

use pulp::Simd;

use super::on_tiles::is_odd;
use super::online::{self, Carried};
use super::problem::KEY_BLOCK;
use crate::gemm::microkernel::amx::{BLOCK, SIDE, STEP, TILE_WORDS};
use crate::gemm::microkernel::{Bf16Kernel, Bf16Products, Bf16Visitor, with_bf16_kernel};
use crate::gemm::pair_packing::{filled, from};
use crate::gemm::split::{Magnitudes, Together};
use crate::isa::Bf16Dots;
use crate::lanes;
use crate::math::exp_flushed;
use crate::view::MatRef;

/// As [`crate::gemm::split::pack_left`].
pub(super) fn pack_left(proof: Bf16Dots, a: MatRef<'_>, tiles: &mut [u32], magnitudes: &mut [Magnitudes]) {
    with_bf16_kernel(proof, Left { a, tiles, magnitudes });
}

struct Left<'a> {
    a: MatRef<'a>,
    tiles: &'a mut [u32],
    magnitudes: &'a mut [Magnitudes],
}

impl Bf16Visitor for Left<'_> {
    #[inline(always)]
    fn visit<D: Bf16Products, const VECS: usize>(self, kernel: Bf16Kernel<D, VECS>) {
        let (rows, depth) = (self.a.rows(), self.a.cols());
        let of_side = depth.div_ceil(STEP) * TILE_WORDS;
        let sides = self.tiles.chunks_exact_mut(of_side.max(1));
        for (first, tiles) in (0..rows).step_by(SIDE).zip(sides) {
            let mut together = Together::NONE;
            let height = SIDE.min(rows - first);
            for i in 0..height {
                let (whole, rest) = self.a.row(first + i).as_chunks::<STEP>();
                let mut tiles = tiles.chunks_exact_mut(TILE_WORDS);
                for (row, tile) in whole.iter().zip(&mut tiles) {
                    together.add::<1>(row);
                    tile[i * SIDE..][..SIDE].copy_from_slice(&kernel.products().along::<false>(row));
                }
                if let Some(tile) = tiles.next() {
                    let row = filled(rest);
                    together.add::<1>(&row);
                    tile[i * SIDE..][..SIDE].copy_from_slice(&kernel.products().along::<false>(&row));
                }
            }
            for tile in tiles.chunks_exact_mut(TILE_WORDS) {
                tile[height * SIDE..].fill(0);
            }
            let magnitudes = &mut self.magnitudes[first..first + height];
            magnitudes.fill(Magnitudes::NONE);
            if !together.fit() {
                for (i, magnitudes) in magnitudes.iter_mut().enumerate() {
                    self.a.row(first + i).iter().for_each(|x| magnitudes.add(*x));
                }
            }
        }
    }
}

/// [`crate::gemm::split::pack_right`], panel after panel of 32 columns. Marks odd columns among the first of `odd`; whether any is.
pub(super) fn pack_right(proof: Bf16Dots, b: MatRef<'_>, tiles: &mut [u32], odd: &mut [bool]) -> bool {
    let mut any = false;
    with_bf16_kernel(proof, Right::<true> { b, tiles, any: &mut any });
    odd.fill(false);
    if any {
        for (j, odd) in odd.iter_mut().enumerate().take(b.cols()) {
            let mut magnitudes = Magnitudes::NONE;
            (0..b.rows()).for_each(|p| magnitudes.add(b.at(p, j)));
            *odd = is_odd(magnitudes);
        }
    }
    any
}

/// The same of numbers that are taken as they are.
pub(super) fn pack_scores(proof: Bf16Dots, b: MatRef<'_>, tiles: &mut [u32]) {
    with_bf16_kernel(proof, Right::<false> { b, tiles, any: &mut false });
}

/// `LOOK` says whether odd numbers are looked for.
struct Right<'a, const LOOK: bool> {
    b: MatRef<'a>,
    tiles: &'a mut [u32],
    any: &'a mut bool,
}

impl<const LOOK: bool> Bf16Visitor for Right<'_, LOOK> {
    #[inline(always)]
    fn visit<D: Bf16Products, const VECS: usize>(mut self, kernel: Bf16Kernel<D, VECS>) {
        let (depth, cols) = (self.b.rows(), self.b.cols());
        let panel = depth.div_ceil(STEP) * 2 * TILE_WORDS;
        let mut together = Together::NONE;
        for q in 0..panel / BLOCK {
            let place = q / SIDE * 2 * TILE_WORDS + q % SIDE * SIDE;
            if 2 * q >= depth {
                for tiles in self.tiles.chunks_exact_mut(panel).take(cols.div_ceil(BLOCK)) {
                    tiles[place..][..SIDE].fill(0);
                    tiles[TILE_WORDS + place..][..SIDE].fill(0);
                }
                continue;
            }
            let low = self.b.row(2 * q);
            let high = if 2 * q + 1 < depth { self.b.row(2 * q + 1) } else { &[] };
            let whole = low.len().min(high.len()) / SIDE;
            let (low, high) = (low.split_at(low.len().min(whole * SIDE)), high.split_at(whole * SIDE));
            let pairs = low.0.as_chunks::<SIDE>().0.iter().zip(high.0.as_chunks::<SIDE>().0);
            for (side, (low, high)) in pairs.enumerate() {
                self.put(
                    kernel.products(),
                    side / 2 * panel + side % 2 * TILE_WORDS + place,
                    (low, high),
                    &mut together,
                );
            }
            // Ragged columns, or a row without its second.
            for side in whole..cols.div_ceil(BLOCK) * 2 {
                let at = (side - whole) * SIDE;
                let (low, high) = (filled(from(low.1, at)), filled(from(high.1, at)));
                self.put(
                    kernel.products(),
                    side / 2 * panel + side % 2 * TILE_WORDS + place,
                    (&low, &high),
                    &mut together,
                );
            }
        }
        *self.any = LOOK && !together.fit();
    }
}

impl<const LOOK: bool> Right<'_, LOOK> {
    /// 16 words of two rows.
    #[inline(always)]
    fn put<D: Bf16Products>(
        &mut self,
        dots: D,
        place: usize,
        (low, high): (&[f32; SIDE], &[f32; SIDE]),
        together: &mut Together,
    ) {
        if const { LOOK } {
            together.add::<1>(&pulp::bytemuck::cast([*low, *high]));
        }
        self.tiles[place..][..SIDE].copy_from_slice(&dots.across::<false>(low, high));
    }
}

/// `rows` rows of scores, [`KEY_BLOCK`] apart, over `steps` steps of keys, as the left operand, whatever they are; what fills the last 16 rows stays what it was.
pub(super) fn pack_score_rows(
    proof: Bf16Dots,
    scores: &[f32],
    (rows, steps): (usize, usize),
    tiles: &mut [u32],
) {
    with_bf16_kernel(proof, ScoreRows { scores, rows, steps, tiles });
}

struct ScoreRows<'a> {
    scores: &'a [f32],
    rows: usize,
    steps: usize,
    tiles: &'a mut [u32],
}

impl Bf16Visitor for ScoreRows<'_> {
    #[inline(always)]
    fn visit<D: Bf16Products, const VECS: usize>(self, kernel: Bf16Kernel<D, VECS>) {
        for (i, row) in self.scores.chunks(KEY_BLOCK).enumerate().take(self.rows) {
            let tiles = &mut self.tiles[i / SIDE * self.steps * TILE_WORDS + i % SIDE * SIDE..];
            for (step, row) in row.as_chunks::<STEP>().0.iter().enumerate().take(self.steps) {
                tiles[step * TILE_WORDS..][..SIDE].copy_from_slice(&kernel.products().along::<false>(row));
            }
        }
    }
}

/// Turns the scores of `carried`'s rows, [`KEY_BLOCK`] apart, over some steps of keys into P, straight into left tiles; new m, l and α. What
/// [`online::absorb`] and [`pack_score_rows`] give, bit for bit, where nothing is hidden or added; the scores stay what they were.
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
/// [`pack_scores`] and [`pack_score_rows`] give, bit for bit, where nothing is hidden, added or dropped.
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

#[cfg(test)]
mod tests {
    use super::super::on_tiles::{left_words, right_words};
    use super::*;
    use crate::gemm::split;
    use crate::isa::Isa;
    use crate::testing::uniform;

    /// Of the CPU, or in plain arithmetic.
    fn proof() -> Option<Bf16Dots> {
        Isa::avx512_bf16_or_emulated().and_then(Isa::bf16_dots)
    }

    /// Ragged and whole, without and with an element that is odd.
    fn matrices() -> impl Iterator<Item = (usize, usize, Vec<f32>)> {
        [(1, 1), (2, 16), (15, 31), (16, 32), (17, 33), (33, 48), (64, 70)].into_iter().flat_map(
            |(rows, cols)| {
                [None, Some(f32::MAX), Some(f32::NEG_INFINITY), Some(f32::NAN)].map(|odd| {
                    let mut data = uniform(rows * cols, 3);
                    if let Some(odd) = odd {
                        data[rows * cols * 2 / 3] = odd;
                    }
                    (rows, cols, data)
                })
            },
        )
    }

    #[test]
    fn left_operands_are_those_of_integer_arithmetic() {
        let Some(proof) = proof() else { return };
        for (rows, cols, data) in matrices() {
            let a = MatRef::new(&data, rows, cols).unwrap();
            let [mut ours, mut theirs] = [(); 2].map(|()| vec![u32::MAX; left_words(rows, cols, 1)]);
            let [mut of_ours, mut of_theirs] = [(); 2].map(|()| vec![Magnitudes::NONE; rows]);
            pack_left(proof, a, &mut ours, &mut of_ours);
            split::pack_left::<1>(a, &mut theirs, &mut of_theirs);
            assert_eq!(ours, theirs, "{rows} x {cols}");
            let odd = |of: &[Magnitudes]| of.iter().map(|x| is_odd(*x)).collect::<Vec<_>>();
            assert_eq!(odd(&of_ours), odd(&of_theirs));
            if rows <= KEY_BLOCK && cols <= KEY_BLOCK {
                let mut scores = vec![0.0; rows * KEY_BLOCK];
                for (to, from) in scores.chunks_exact_mut(KEY_BLOCK).zip(data.chunks_exact(cols)) {
                    to[..cols].copy_from_slice(from);
                }
                let mut ours = vec![0; theirs.len()];
                pack_score_rows(proof, &scores, (rows, cols.div_ceil(STEP)), &mut ours);
                assert_eq!(ours, theirs, "scores of {rows} x {cols}");
            }
        }
    }

    #[test]
    fn right_operands_are_those_of_integer_arithmetic() {
        let Some(proof) = proof() else { return };
        for (depth, cols, data) in matrices() {
            let b = MatRef::new(&data, depth, cols).unwrap();
            let words = right_words(depth, cols, 1);
            let [mut ours, mut scores, mut theirs] = [(); 3].map(|()| vec![u32::MAX; words]);
            let [mut odd, mut odd_there] = [(); 2].map(|()| vec![false; cols]);
            let any = pack_right(proof, b, &mut ours, &mut odd);
            pack_scores(proof, b, &mut scores);
            for (panel, first) in
                theirs.chunks_exact_mut(right_words(depth, BLOCK, 1)).zip((0..cols).step_by(BLOCK))
            {
                let mut magnitudes = [Magnitudes::NONE; BLOCK];
                let width = BLOCK.min(cols - first);
                split::pack_right::<f32, 1>(b.sub(0..depth, first..first + width), panel, &mut magnitudes);
                odd_there[first..first + width]
                    .iter_mut()
                    .zip(magnitudes)
                    .for_each(|(odd, x)| *odd = is_odd(x));
            }
            assert_eq!(ours, theirs, "{depth} x {cols}");
            assert_eq!(scores, theirs, "{depth} x {cols}");
            assert_eq!((any, odd), (odd_there.contains(&true), odd_there));
        }
    }
}
