//! Which operands are read where they are, and which are packed first. No bit of the result depends on it.
//!
//! Packing costs one pass over the operand and makes the kernel's loads contiguous. Where few tiles
//! use what was packed, or where the unpacked panel stays in L1 anyway, the pass is not worth it.
//! The limits were measured on a Zen 3 core (32 KiB L1, 512 KiB L2, AVX2), m and n from 4 to 1024;
//! GFLOP/s with and without packing stand in docs/decisions/002-gemm.md.

use pulp::Simd;

use super::microkernel::{Microkernel, Stored};
use crate::view::MatRef;

/// f32 of one cache line.
const LINE: usize = 16;
/// Sets of the smallest L1 data cache at hand.
const L1_SETS: usize = 64;
/// Lines that one set can give to a panel of B: 8 ways, less those of A and C.
const L1_WAYS: usize = 6;
/// A transposed A is read in place up to this many panels of B …
const TRANSPOSED_MAX_PANELS: usize = 8;
/// … where it lies in no near cache, up to this many: each panel reads whole cache lines for six of their elements …
const FAR_TRANSPOSED_MAX_PANELS: usize = 4;
/// … and up to this many elements from one row of its memory to the next.
const TRANSPOSED_MAX_STRIDE: usize = 512;

/// Bytes of a whole B that vectors of 512 bits read in place, from the second-level cache: 256³ 1.02 and 1.04, 128³ 1.01 and 1.03 times as fast as packed
/// (AMD Zen 5, medians of two runs), where 64³ and 512 × 512 × 4096 lose.
const NEAR_B: std::ops::RangeInclusive<usize> = 64 * 1024..=256 * 1024;
/// Rows of C up to which they do. More of them pay for packing: 1024×384×128 1.19 and 1.23, 1024×512×128 1.06 and 1.06, 1024×128×128 1.17 and 1.03, 1024×128×512 1.14 and 1.20 times as fast
/// packed, but 256³ 1.07 and 0.97, 128³ 0.97 and 0.96, 64×512×128 0.87 and 0.88 (Intel Emerald Rapids, medians and shortest of alternating calls).
const NEAR_B_ROWS: usize = 256;

/// Bytes of a page of memory.
const PAGE: usize = 4096;
/// Pages that the rows of a panel in place may lie in for many rows of C: the first-level table of translations has 64 entries, for A and C too.
/// Packed instead, minima of alternating calls: 255×257×251 1.10 times as fast, 96×1000×250 1.09, 192×264×256 1.06, 511×513×509, 96×264×256 and 64×264×256
/// 0.99 to 1.01 (Zen 3). Vectors of 512 bits were not timed.
const PAGES_AT_HAND: usize = 48;
/// Rows of C that are many.
const MANY_ROWS: usize = 64;

/// Bytes of panels that a core keeps near from one pass over them to the next: the second-level cache of the core at hand.
const NEAR: usize = 512 * 1024;

/// Whether panels of so many bytes in all have to be asked for early.
pub(super) fn lies_far(bytes: usize) -> bool {
    bytes > NEAR
}

/// How a part reads A.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// Where it is.
    InPlace,
    /// Packed tiles.
    Tiles,
    /// A copy, row-major.
    Rows,
}

/// How to read `a` for a product with `cols` columns.
pub(super) fn left<K: Microkernel>(a: &MatRef<'_>, cols: usize) -> Left {
    let row_major = a.col_stride() == 1 || a.cols() <= 1;
    let far = lies_far(size_of::<f32>() * a.cols() * a.col_stride());
    let panels = if far { FAR_TRANSPOSED_MAX_PANELS } else { TRANSPOSED_MAX_PANELS };
    let short_transpose =
        a.row_stride() == 1 && a.col_stride() <= TRANSPOSED_MAX_STRIDE && cols <= panels * K::NR;
    match K::Rhs::PER_WORD {
        _ if row_major => Left::InPlace,
        1 if short_transpose => Left::InPlace,
        1 => Left::Tiles,
        _ => Left::Rows,
    }
}

/// Whether to read `b` where it is, `depth` rows of it at a time, for a product with `rows` rows.
pub(super) fn right_in_place<K: Microkernel>(b: &MatRef<'_>, depth: usize, rows: usize) -> bool {
    if b.col_stride() != 1 {
        return false;
    }
    if const { <K::Simd as Simd>::F32_LANES == 16 }
        && rows <= NEAR_B_ROWS
        && NEAR_B.contains(&(size_of::<f32>() * b.rows() * b.cols()))
    {
        return true;
    }
    let pages = size_of::<f32>() * depth * b.row_stride() / PAGE;
    if const { <K::Simd as Simd>::F32_LANES == 8 } && rows >= MANY_ROWS && pages > PAGES_AT_HAND {
        return false;
    }
    let sets = sets_reached(b.row_stride());
    let lines = depth * K::NR.div_ceil(LINE);
    lines <= sets * L1_WAYS || rows <= 2 * K::MR * sets.min(4)
}

/// How many sets of L1 a column of the matrix is spread over: few when a large power of two divides
/// the stride.
fn sets_reached(row_stride: usize) -> usize {
    if row_stride.is_multiple_of(LINE) {
        L1_SETS >> (row_stride / LINE).trailing_zeros().min(L1_SETS.ilog2())
    } else {
        L1_SETS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_meet_in_few_sets() {
        let strides = [16, 80, 250, 512, 1024, 4096, 0];
        assert_eq!(strides.map(sets_reached), [64, 64, 64, 2, 1, 1, 1]);
    }
}
