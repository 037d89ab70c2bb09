//! Operands in one part of bf16, in whole tiles, by the CPU's own conversion.
//!
//! What `gemm::split` writes for one part, word for word, but that numbers below 2⁻¹²⁶ become zero, as which products take them anyway: 32 numbers are two loads, one
//! instruction and a store, where integer arithmetic takes some forty instructions. Nothing is copied to a place of its own first.

use super::on_tiles::is_odd;
use super::problem::KEY_BLOCK;
use crate::gemm::microkernel::amx::{BLOCK, SIDE, STEP, TILE_WORDS};
use crate::gemm::microkernel::{Bf16Kernel, Bf16Products, Bf16Visitor, with_bf16_kernel};
use crate::gemm::split::{Magnitudes, Together};
use crate::isa::Bf16Dots;
use crate::view::MatRef;

/// `row` from element `first` on, with zeros where it ends.
#[inline(always)]
pub(super) fn padded<const N: usize>(row: &[f32], first: usize) -> [f32; N] {
    let rest = row.get(first..).unwrap_or(&[]);
    rest.first_chunk().copied().unwrap_or_else(
        #[inline(always)]
        || {
            let mut padded = [0.0; N];
            padded[..rest.len()].copy_from_slice(rest);
            padded
        },
    )
}

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
                    tile[i * SIDE..][..SIDE].copy_from_slice(&kernel.products().split_along(row));
                }
                if let Some(tile) = tiles.next() {
                    let row = padded(rest, 0);
                    together.add::<1>(&row);
                    tile[i * SIDE..][..SIDE].copy_from_slice(&kernel.products().split_along(&row));
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
                let (low, high) = (padded(low.1, at), padded(high.1, at));
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
        self.tiles[place..][..SIDE].copy_from_slice(&dots.split_across(low, high));
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
                tiles[step * TILE_WORDS..][..SIDE].copy_from_slice(&kernel.products().split_along(row));
            }
        }
    }
}
