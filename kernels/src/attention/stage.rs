//! Keys and values copied into the order in which tiles read them.

use std::ops::Range;

use pulp::Simd;

use crate::gemm::microkernel::prefetch;
use crate::lanes;
use crate::view::MatRef;

/// Keys that are transposed at a time: half a cache line of each row of the result.
const KEYS: usize = 8;

/// Rows that are asked for before they are read. Interleaved heads lie kilobytes apart, so the hardware sees no stream: each
/// row would be waited for.
pub(super) const AHEAD: usize = 16;

/// Writes the transpose of `src` [keys, dim] to `dst` [dim, stride]: `dst[d·stride + j] = src[j][d]`.
///
/// Two elements of two keys at a time, as halves of 64-bit words: half the loads and stores of moving single
/// elements, without a shuffle instruction, which the vectors of this crate do not have.
///
/// Columns from the number of keys on hold anything afterwards.
///
/// # Panics
/// When `stride` is smaller than the number of keys or `dst` than `dim·stride`.
#[inline(always)]
pub(super) fn transpose(src: MatRef<'_>, dst: &mut [f32], stride: usize) {
    let (keys, dim) = (src.rows(), src.cols());
    (0..AHEAD.min(keys)).for_each(|j| prefetch::row(src.row(j)));
    assert!(keys <= stride && dim * stride <= dst.len(), "{keys} keys of {dim} in {stride}");
    let mut first = 0;
    while first + KEYS <= stride && first < keys {
        // Where keys run out the last one stands in: its columns lie below `stride` and nobody reads them.
        let rows: [&[f32]; KEYS] = std::array::from_fn(|i| src.row((first + i).min(keys - 1)));
        (first + AHEAD..(first + AHEAD + KEYS).min(keys)).for_each(|j| prefetch::row(src.row(j)));
        for d in (0..dim / 2 * 2).step_by(2) {
            for i in (0..KEYS).step_by(2) {
                // SAFETY: `d + 1` is below `dim`, the length of each row; rows `d` and `d + 1` of `dst` and their
                // columns `first + i` and the next, below `stride`, are elements of `dst`.
                unsafe {
                    let [a, b] = [rows[i], rows[i + 1]]
                        .map(|row| u64::from_le(row.as_ptr().add(d).cast::<u64>().read_unaligned()));
                    let to = dst.as_mut_ptr().add(d * stride + first + i);
                    let low = (a & 0xFFFF_FFFF) | (b << 32);
                    let high = (a >> 32) | (b & !0xFFFF_FFFF);
                    to.cast::<u64>().write_unaligned(low.to_le());
                    to.add(stride).cast::<u64>().write_unaligned(high.to_le());
                }
            }
        }
        if !dim.is_multiple_of(2) {
            dst[(dim - 1) * stride + first..][..KEYS].copy_from_slice(&rows.map(|row| row[dim - 1]));
        }
        first += KEYS;
    }
    for j in first..keys {
        for (d, &x) in src.row(j).iter().enumerate() {
            dst[d * stride + j] = x;
        }
    }
}

/// Elements from the first to the last row beyond which strided rows evict each other: where heads
/// interleave, rows lie a power of two apart and meet in few sets of the first-level cache.
const SPREAD: usize = 2048;

/// `src` itself when its rows lie close together, else a gapless copy of it in `dst`.
#[inline(always)]
pub(super) fn gather<'a, S: Simd>(simd: S, src: MatRef<'a>, dst: &'a mut [f32]) -> MatRef<'a> {
    let (rows, cols) = (src.rows(), src.cols());
    if src.row_stride() == cols || rows * src.row_stride() <= SPREAD || cols == 0 {
        return src;
    }
    scaled(simd, 1.0, src, 0..rows, dst)
}

/// `scale·src` of some rows, gapless in `dst`.
#[inline(always)]
pub(super) fn scaled<'a, S: Simd>(
    simd: S,
    scale: f32,
    src: MatRef<'_>,
    rows: Range<usize>,
    dst: &'a mut [f32],
) -> MatRef<'a> {
    let cols = src.cols();
    let dst = &mut dst[..rows.len() * cols];
    let scale = simd.splat_f32s(scale);
    rows.clone().take(AHEAD).for_each(|i| prefetch::row(src.row(i)));
    for (i, to) in rows.clone().zip(dst.chunks_exact_mut(cols.max(1))) {
        if i + AHEAD < rows.end {
            prefetch::row(src.row(i + AHEAD));
        }
        lanes::map(
            simd,
            src.row(i),
            to,
            #[inline(always)]
            |x| simd.mul_f32s(x, scale),
        );
    }
    MatRef::new(dst, rows.len(), cols).expect("cut to rows × cols")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::uniform;

    #[test]
    fn every_element_is_in_its_place() {
        for (keys, dim) in [(1, 1), (3, 5), (4, 4), (5, 8), (8, 7), (9, 16), (13, 9)] {
            let data = uniform(keys * (dim + 2), 1);
            let src = MatRef::with_strides(&data, keys, dim, dim + 2, 1).unwrap();
            for stride in [keys, keys.next_multiple_of(8)] {
                let mut dst = vec![f32::NAN; dim * stride];
                transpose(src, &mut dst, stride);
                for (j, d) in (0..keys).flat_map(|j| (0..dim).map(move |d| (j, d))) {
                    assert_eq!(dst[d * stride + j], src.at(j, d), "{keys} {dim} {stride}");
                }
            }
        }
    }
}
