//! Keys and values copied into the order in which tiles read them.

use std::ops::Range;

use pulp::Simd;

use crate::gemm::microkernel::prefetch;
use crate::lanes;
use crate::transpose::transpose_4x4;
use crate::view::{HeadsLayout, HeadsMut, MatMut, MatRef};

/// Keys that are transposed at a time: half a cache line of each row of the result.
const KEYS: usize = 8;

/// Keys and elements that are turned together.
const SQUARE: usize = 4;

/// Rows that are asked for before they are read. Interleaved heads lie kilobytes apart, so the hardware sees no stream: each
/// row would be waited for.
pub(super) const AHEAD: usize = 16;

/// Writes the transpose of `src` [keys, dim] to `dst` [dim, stride]: `dst[d·stride + j] = src[j][d]`.
///
/// Four elements of four keys at a time, turned in registers.
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
        for d in (0..dim / SQUARE * SQUARE).step_by(SQUARE) {
            for i in (0..KEYS).step_by(SQUARE) {
                // SAFETY: elements `d` to `d + 3` are below `dim`, the length of each row; rows `d` to `d + 3` of `dst` and
                // their columns `first + i` to `first + i + 3`, below `stride`, are elements of `dst`.
                unsafe {
                    let square: [[f32; SQUARE]; SQUARE] =
                        std::array::from_fn(|r| rows[i + r].as_ptr().add(d).cast::<[f32; SQUARE]>().read());
                    let [row_0, row_1, row_2, row_3] = transpose_4x4(square);
                    let to = dst.as_mut_ptr().add(d * stride + first + i);
                    *to.cast() = row_0;
                    *to.add(stride).cast() = row_1;
                    *to.add(2 * stride).cast() = row_2;
                    *to.add(3 * stride).cast() = row_3;
                }
            }
        }
        for d in dim / SQUARE * SQUARE..dim {
            dst[d * stride + first..][..KEYS].copy_from_slice(&rows.map(|row| row[d]));
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
    if spreads(src) { scaled(simd, 1.0, src, 0..src.rows(), dst) } else { src }
}

/// Whether the rows of a view lie so far apart that they evict each other.
#[inline(always)]
pub(super) fn spreads(view: MatRef<'_>) -> bool {
    let (rows, cols) = (view.rows(), view.cols());
    view.row_stride() != cols && rows * view.row_stride() > SPREAD && cols > 0
}

/// Rows that will be staged or written next, asked for share by share while products run. Left to the moment when they are staged, rows
/// that lie kilobytes apart are waited for: each is a page of its own, and the core asks for so many lines at once and no more.
pub(super) struct Coming<const PLACES: usize> {
    places: [Place; PLACES],
    /// The next row: that of `places[place]`.
    place: usize,
    row: usize,
    /// Rows of one share.
    share: usize,
}

/// Where rows lie that are asked for, and neither read nor written.
#[derive(Clone, Copy)]
pub(super) struct Place {
    ptr: *const f32,
    stride: usize,
    rows: usize,
    cols: usize,
}

impl Place {
    /// No rows.
    pub(super) const NOWHERE: Place = Place { ptr: std::ptr::null(), stride: 0, rows: 0, cols: 0 };

    /// Rows of a head that is written.
    #[inline(always)]
    pub(super) fn in_head(of: &HeadsMut<'_>, (batch, head): (usize, usize), rows: &Range<usize>) -> Place {
        let HeadsLayout { seq_stride, dim, .. } = *of.layout();
        let ptr = of.address(batch, head, rows.start);
        Place { ptr, stride: seq_stride, rows: rows.len(), cols: dim }
    }

    /// The rows of a view, which may end before they are asked for.
    #[inline(always)]
    pub(super) fn of(view: MatRef<'_>) -> Place {
        Place { ptr: view.as_ptr(), stride: view.row_stride(), rows: view.rows(), cols: view.cols() }
    }
}

impl<const PLACES: usize> Coming<PLACES> {
    /// All rows of `places`, in this order, in at most `shares` shares.
    #[inline(always)]
    pub(super) fn new(places: [Place; PLACES], shares: usize) -> Self {
        let rows: usize = places.iter().map(|place| place.rows).sum();
        Coming { places, place: 0, row: 0, share: rows.div_ceil(shares.max(1)) }
    }

    /// Asks for the next share.
    #[inline(always)]
    pub(super) fn ask(&mut self) {
        for _ in 0..self.share {
            while self.row == self.places[self.place].rows {
                if self.place + 1 == PLACES {
                    return;
                }
                (self.place, self.row) = (self.place + 1, 0);
            }
            let Place { ptr, stride, cols, .. } = self.places[self.place];
            prefetch::lines_for_later(ptr.wrapping_add(self.row * stride), cols);
            self.row += 1;
        }
    }
}

/// Copies `src` to `dst`, which has the same shape.
#[inline(always)]
pub(super) fn copy(src: MatRef<'_>, mut dst: MatMut<'_>) {
    for i in 0..src.rows() {
        if i + AHEAD < src.rows() {
            prefetch::row(src.row(i + AHEAD));
            prefetch::row(dst.as_ref().row(i + AHEAD));
        }
        dst.row_mut(i).copy_from_slice(src.row(i));
    }
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
