//! From blocks of 32 × 32 sums in memory to C.
//!
//! The epilogue acts on a few rows of a block in registers, by the operations that vectors have ([`super::microkernel::Tile`]). Where there is none, rows go a few at a time through all blocks of a
//! strip: whole rows of C are written at twice the rate of pieces of 128 bytes that lie rows apart.

use half::bf16;
use pulp::Simd;

use super::microkernel::amx::BLOCK;
use super::microkernel::{F32, Finish, Out, Tile};
use super::quantise::bf16_bits;
use super::tiles::blocks;

/// Rows that are stored at a time where there is nothing to finish.
const AT_ONCE: usize = 4;

/// The bf16 next to `x`.
#[inline(always)]
pub(super) fn rounded(x: f32) -> bf16 {
    bf16::from_bits(bf16_bits(x) as u16)
}

/// Writes rows of a strip from its blocks, a few rows at a time through all blocks.
///
/// # Safety
/// These rows and columns of `c` are writable, and the elements of a row follow each other.
#[inline(always)]
pub(super) unsafe fn put_rows<T: Copy>(
    c: Out<T>,
    (rows, cols): (usize, usize),
    blocks_of_sums: &[[f32; BLOCK * BLOCK]],
    element: impl Fn(f32) -> T,
) {
    for group in blocks(0..rows, AT_ONCE) {
        for (panel, sums) in blocks_of_sums.iter().enumerate() {
            let width = BLOCK.min(cols - panel * BLOCK);
            for i in group.clone() {
                let from = sums[i * BLOCK..].first_chunk::<BLOCK>().expect("a block has 32 rows");
                let to = c.from(i, panel * BLOCK).ptr;
                if width == BLOCK {
                    // SAFETY: the contract; a length that is known becomes vectors.
                    let to = unsafe { &mut *to.cast::<[T; BLOCK]>() };
                    to.iter_mut().zip(from).for_each(|(to, x)| *to = element(*x));
                } else {
                    // SAFETY: the contract.
                    let to = unsafe { std::slice::from_raw_parts_mut(to, width) };
                    to.iter_mut().zip(from).for_each(|(to, x)| *to = element(*x));
                }
            }
        }
    }
}

/// The sums of a block: 32 rows of 32, where the tile unit stores them.
#[repr(align(64))]
pub(super) struct Sums(pub(super) [f32; BLOCK * BLOCK]);

/// Applies the epilogue and stores the first rows and columns of a block of sums.
///
/// # Safety
/// `out` has so many rows and columns, and so have bias and residual.
#[inline(always)]
pub(super) unsafe fn store<S: Simd>(
    simd: S,
    sums: &[f32],
    (rows, cols): (usize, usize),
    finish: &Finish<'_>,
    out: Out<f32>,
) {
    // SAFETY: the contract.
    unsafe {
        match S::F32_LANES {
            8 => store_rows::<S, 2, 4>(simd, sums, (rows, cols), finish, out),
            _ => store_rows::<S, 4, 2>(simd, sums, (rows, cols), finish, out),
        }
    }
}

/// As [`store`], H rows of W vectors at a time.
///
/// # Safety
/// As [`store`]; W vectors are a row.
#[inline(always)]
unsafe fn store_rows<S: Simd, const H: usize, const W: usize>(
    simd: S,
    sums: &[f32],
    (rows, cols): (usize, usize),
    finish: &Finish<'_>,
    out: Out<f32>,
) {
    debug_assert_eq!(W * S::F32_LANES, BLOCK);
    debug_assert!(rows * BLOCK <= sums.len());
    let row = |i: usize| sums[i * BLOCK..(i + 1) * BLOCK].as_ptr().cast::<S::f32s>();
    let whole = rows / H * H;
    for first in (0..whole).step_by(H) {
        let mut acc = [[simd.splat_f32s(0.0); W]; H];
        for (i, acc) in acc.iter_mut().enumerate() {
            for (w, x) in acc.iter_mut().enumerate() {
                // SAFETY: a row is W vectors.
                *x = unsafe { row(first + i).add(w).read_unaligned() };
            }
        }
        // SAFETY: the contract, for these rows.
        unsafe { Tile { simd, acc }.finish::<F32>(first, cols, finish, out) };
    }
    for first in whole..rows {
        let mut acc = [[simd.splat_f32s(0.0); W]; 1];
        for (w, x) in acc[0].iter_mut().enumerate() {
            // SAFETY: a row is W vectors.
            *x = unsafe { row(first).add(w).read_unaligned() };
        }
        // SAFETY: the contract, for this row.
        unsafe { Tile { simd, acc }.finish::<F32>(first, cols, finish, out) };
    }
}
