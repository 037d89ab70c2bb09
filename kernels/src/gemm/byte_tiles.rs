//! One thread's part of an int8 product on the tile unit.
//!
//! ```text
//! for rows, 32 at a time:                     quantised into tiles of 16 rows of 64 bytes
//!   for panels of B, two tiles of 16 columns at a time:
//!     for blocks of K:                        sums of 32 bits in the tiles, exact
//!     scales, then the epilogue
//! ```
//! The unit reads the weights where they lie for vectors: a panel's row of words is a row of a tile, and the next one a stride away. So one
//! packed form serves every kernel. The last step of a block reads up to 15 rows beyond it, where packed weights have room; the left operand is
//! zero there.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::int8::Part;
use super::int8_rows::quantise_row;
use super::microkernel::amx::{BLOCK, ByteBlock, SIDE, TILE_WORDS, TileUnit};
use super::microkernel::{Order, RowScale, Sink};
use super::tile_store::{Sums, store};
use crate::isa::{Tiles, may_have_tiles};
use crate::scratch::ScratchBuf;

/// A part of C, and the proof that tiles run.
pub(super) struct TilePart<'a> {
    pub(super) part: Part<'a>,
    pub(super) tiles: Tiles,
}

/// Steps of 16 words, of 64 elements, in a block of K.
fn steps(depth: &Range<usize>) -> usize {
    depth.len().div_ceil(4).div_ceil(SIDE)
}

impl WithSimd for TilePart<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if const { !may_have_tiles::<S>() } {
            unreachable!("no tile unit stands beside these vectors");
        }
        let TilePart { part: Part { product, rows, cols }, tiles } = self;
        let unit = TileUnit::configure(tiles);
        let (b, depths) = (product.b, product.b.depths());
        let row_words =
            Order::Bytes.words() * depths.iter().map(|depth| depth.len().div_ceil(4)).sum::<usize>();
        let tile_rows = TILE_WORDS * depths.iter().map(steps).sum::<usize>();
        let mut left = ScratchBuf::take(2 * tile_rows);
        let mut row = ScratchBuf::take(row_words);
        let mut staging = ScratchBuf::take(b.rows());
        let mut scales = [RowScale::default(); BLOCK];
        for first in rows.clone().step_by(BLOCK) {
            let block = first..(first + BLOCK).min(rows.end);
            let left = left.words_mut();
            left.fill(0);
            for (i, scale) in block.clone().zip(&mut scales) {
                *scale = quantise_row(product.a, i, b.depth(), Order::Bytes, (&mut staging, row.words_mut()));
                if !depths.is_empty() {
                    let at = (i - first) / SIDE * tile_rows + (i - first) % SIDE * SIDE;
                    scatter(row.words_mut(), &depths, &mut left[at..]);
                }
            }
            for j in cols.clone().step_by(b.panel_cols()) {
                let panel = j..(j + b.panel_cols()).min(cols.end);
                for col in panel.clone().step_by(BLOCK) {
                    let cols = col..(col + BLOCK).min(panel.end);
                    let mut sums = IntegerSums([0; BLOCK * BLOCK]);
                    let mut at = 0;
                    for depth in &depths {
                        let words = b.panel_words(depth.clone(), &panel, (col - j, cols.len()));
                        let operands = ByteBlock {
                            left: left[at..].as_ptr(),
                            left_stride: tile_rows,
                            right: words.as_ptr(),
                            right_stride: b.panel_cols(),
                            steps: steps(depth),
                            two_rows: block.len() > SIDE,
                            two_cols: cols.len() > SIDE,
                        };
                        // SAFETY: `left` holds whole tiles of both tiles of rows for each step; `panel_words` vouches for the
                        // words of the columns, and 16 rows for each step.
                        unsafe { unit.add_bytes(&operands, &mut sums.0) };
                        at += steps(depth) * TILE_WORDS;
                    }
                    less_offsets(&mut sums, &scales[..block.len()], b.column_sums(&cols));
                    match product.sink(block.clone(), cols.clone()) {
                        Sink::Scaled { out, finish } => {
                            let scales = (&scales[..block.len()], b.column_scales(&panel, &cols));
                            let sums = scaled(&sums, scales);
                            // SAFETY: this task alone writes these rows and columns of C, and the shapes of the epilogue were
                            // checked.
                            unsafe { store(simd, &sums.0, (block.len(), cols.len()), &finish, out) };
                        }
                        Sink::Integers { out, add } => {
                            for (i, sums) in
                                sums.0.as_chunks::<BLOCK>().0.iter().enumerate().take(block.len())
                            {
                                for (j, sum) in sums.iter().enumerate().take(cols.len()) {
                                    // SAFETY: as above.
                                    unsafe { out.from(i, j).put(*sum as i32, add) };
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The words of one row to its places in tiles: 16 words of a step, then the next tile. What fills the last step of a block stays zero.
#[inline(always)]
fn scatter(row: &[u32], depths: &[Range<usize>], tiles: &mut [u32]) {
    let (mut from, mut to) = (row, 0);
    for depth in depths {
        let (here, rest) = from.split_at(depth.len().div_ceil(4));
        for words in here.chunks(SIDE) {
            tiles[to..to + words.len()].copy_from_slice(words);
            to += TILE_WORDS;
        }
        from = rest;
    }
}

/// Sums of bytes, as the tile unit stores them.
#[repr(align(64))]
struct IntegerSums([u32; BLOCK * BLOCK]);

/// Takes from the sums what the offset of the weights added, and adds what bytes could not hold of unsigned rows.
#[inline(always)]
fn less_offsets(sums: &mut IntegerSums, rows: &[RowScale], column_sums: &[i32]) {
    let mut of_cols = [0; BLOCK];
    of_cols.iter_mut().zip(column_sums).for_each(|(to, sum)| *to = *sum as u32);
    for (sums, row) in sums.0.as_chunks_mut::<BLOCK>().0.iter_mut().zip(rows) {
        for (sum, of_col) in sums.iter_mut().zip(&of_cols) {
            *sum = sum.wrapping_sub(row.excess).wrapping_add(of_col.wrapping_mul(row.shift));
        }
    }
}

/// The sums times both scales: as `microkernel::pairs` does.
#[inline(always)]
fn scaled(sums: &IntegerSums, (rows, cols): (&[RowScale], &[f32])) -> Sums {
    let mut of_cols = [0.0; BLOCK];
    of_cols[..cols.len()].copy_from_slice(cols);
    let mut out = Sums([0.0; BLOCK * BLOCK]);
    let rows_out = out.0.as_chunks_mut::<BLOCK>().0.iter_mut();
    for ((out, sums), row) in rows_out.zip(sums.0.as_chunks::<BLOCK>().0).zip(rows) {
        for ((out, sum), col) in out.iter_mut().zip(sums).zip(&of_cols) {
            *out = *sum as i32 as f32 * (col * row.scale);
        }
    }
    out
}
