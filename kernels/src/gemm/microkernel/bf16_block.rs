//! Blocks of 32 × 32 sums of bf16 products by dot products of pairs, from the operands of the tile unit.
//!
//! # Naive form
//! ```text
//! for i in 0..rows { for j in 0..32 { for q in 0..16 · steps {
//!     sums[i][j] += left[i][2·q] * right[2·q][j] + left[i][2·q + 1] * right[2·q + 1][j]
//! } } }
//! ```
//! # Deviations
//! - A row of a right tile is the words of 16 columns, which is a vector; a row of a left tile is the words of one row of A, each of which is broadcast. So
//!   what is packed for the tile unit is what vectors read, and the passes over tiles of words need not know which of the two multiplies.
//! - Eight rows of 32 columns at a time: 16 sums, two vectors of words and a broadcast. 16 chains hide the latency of the instruction.
//! - Rows are computed as far as there are any, in strips of 8, 4, 2 or 1, where the tile unit always takes 16.
//!
//! # Accuracy
//! That of [`super::bf16_dots`]: an element is one chain over the words of its row and column, whatever the strip.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "its proof exists on x86-64 only"))]

use pulp::Simd;

use super::amx::{BLOCK, SIDE, TILE_WORDS, TileBlock};
use super::bf16_dots::{Bf16Kernel, Bf16Visitor, with_bf16_kernel};
use super::bf16_products::Bf16Products;
use crate::isa::Bf16Dots;

/// One block; made by [`sums_to`] only, under its safety contract.
struct Sums<'a> {
    block: &'a TileBlock,
    rows: usize,
    to: *mut f32,
    stride: usize,
}

/// Writes the sums of `rows` rows of one block, at most 32, to rows `stride` elements apart.
///
/// # Safety
/// As [`super::amx::TileUnit::sums_to`], but for the rows that are written: up to the next 1, 2, 4 or multiple of 8 of `rows`.
pub(crate) unsafe fn sums_to(proof: Bf16Dots, block: &TileBlock, rows: usize, to: *mut f32, stride: usize) {
    debug_assert!(rows <= SIDE || block.two_rows);
    with_bf16_kernel(proof, Sums { block, rows, to, stride });
}

impl Bf16Visitor for Sums<'_> {
    #[inline(always)]
    fn visit<D: Bf16Products, const VECS: usize>(self, kernel: Bf16Kernel<D, VECS>) {
        let dots = kernel.products();
        // SAFETY: the contract of `sums_to`; as many vectors as 32 columns have.
        unsafe {
            match D::Simd::F32_LANES {
                16 => self.strips::<D, 2>(dots),
                8 => self.strips::<D, 4>(dots),
                lanes => unreachable!("dot products of bf16 on {lanes} lanes"),
            }
        }
    }
}

impl Sums<'_> {
    /// # Safety
    /// As [`sums_to`]; W vectors are 32 columns.
    #[inline(always)]
    unsafe fn strips<D: Bf16Products, const W: usize>(&self, dots: D) {
        let mut first = 0;
        while first < self.rows {
            // SAFETY: the contract; a strip begins and ends in one tile of 16 rows.
            first += unsafe {
                match self.rows - first {
                    1 => self.strip::<D, 1, W>(dots, first),
                    2 => self.strip::<D, 2, W>(dots, first),
                    3 | 4 => self.strip::<D, 4, W>(dots, first),
                    _ => self.strip::<D, 8, W>(dots, first),
                }
            };
        }
    }

    /// H rows from row `first` on; gives H.
    ///
    /// # Safety
    /// As [`Sums::strips`]; the rows are rows of one left tile.
    #[inline(always)]
    unsafe fn strip<D: Bf16Products, const H: usize, const W: usize>(&self, dots: D, first: usize) -> usize {
        let (simd, lanes) = (dots.simd(), D::Simd::F32_LANES);
        let TileBlock { left, left_stride, right, steps, .. } = *self.block;
        let mut left = left.wrapping_add(first / SIDE * left_stride + first % SIDE * SIDE);
        let mut right = right;
        let mut acc = [[simd.splat_f32s(0.0); W]; H];
        for _ in 0..steps {
            for q in 0..SIDE {
                let mut row = [simd.splat_u32s(0); W];
                for (w, row) in row.iter_mut().enumerate() {
                    let column = w * lanes;
                    let at = column / SIDE * TILE_WORDS + q * SIDE + column % SIDE;
                    // SAFETY: the contract: two whole tiles a step.
                    *row =
                        unsafe { right.wrapping_add(at).cast::<<D::Simd as Simd>::u32s>().read_unaligned() };
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: the contract: whole tiles of rows.
                    let pair = simd.splat_u32s(unsafe { *left.wrapping_add(i * SIDE + q) });
                    for (acc, row) in acc.iter_mut().zip(row) {
                        *acc = dots.add_dots(*acc, pair, row);
                    }
                }
            }
            (left, right) = (left.wrapping_add(TILE_WORDS), right.wrapping_add(2 * TILE_WORDS));
        }
        debug_assert!(W * lanes == BLOCK);
        for (i, acc) in acc.into_iter().enumerate() {
            for (w, acc) in acc.into_iter().enumerate() {
                let to = self.to.wrapping_add((first + i) * self.stride + w * lanes);
                // SAFETY: the contract on the sums.
                unsafe { to.cast::<<D::Simd as Simd>::f32s>().write_unaligned(acc) };
            }
        }
        H
    }
}
