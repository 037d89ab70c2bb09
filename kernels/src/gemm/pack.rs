//! Packing: a block of an operand in the order in which the microkernel reads it.
//!
//! ```text
//! for p in 0..depth { for j in 0..width { packed[p][j] = source[p][j], or 0 where there is none } }
//! ```
//! Any strides are absorbed here, transposes included. Deviations: rows of a length that tiles have are
//! copied as arrays, which become a few vector moves (a call to `memcpy` costs more than the copy); a
//! source that is contiguous along the depth is transposed in registers by blocks of 4 × 4, so that neither side is
//! touched a word at a time.

use half::bf16;

use super::microkernel::prefetch;
use crate::transpose::transpose_4x4;
use crate::view::MatRef;

/// What an operand may hold; packing makes f32 of it.
pub(crate) trait Element: Copy + Send + Sync {
    /// The same number as f32.
    fn widen(self) -> f32;

    /// Neighbours at once.
    #[inline(always)]
    fn widen_all<const C: usize>(all: [Self; C]) -> [f32; C] {
        all.map(Self::widen)
    }
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn widen_all<const C: usize>(all: [f32; C]) -> [f32; C] {
        all
    }
}

impl Element for i8 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// Where a panel comes from: element (p, j) lies at `p · depth_stride + j · lane_stride`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<T = f32> {
    pub(super) ptr: *const T,
    pub(super) depth_stride: usize,
    pub(super) lane_stride: usize,
}

impl<T> Source<T> {
    /// The matrix, its rows as the depth.
    #[inline(always)]
    pub(super) fn of(matrix: &MatRef<'_, T>) -> Source<T> {
        let (depth_stride, lane_stride) = (matrix.row_stride(), matrix.col_stride());
        Source { ptr: matrix.as_ptr(), depth_stride, lane_stride }
    }
}

/// Packs `count` lanes, `depth` deep, into panel rows of `width ≥ count`.
///
/// # Safety
/// All `depth × count` elements of `source` are readable.
///
/// # Panics
/// When `packed` does not hold `depth · width` elements.
#[inline(always)]
pub(super) unsafe fn pack_panel<T: Element>(
    source: Source<T>,
    depth: usize,
    count: usize,
    packed: &mut [f32],
    width: usize,
) {
    assert!(packed.len() == depth * width && count <= width);
    if count < width {
        // All of it: one call, where the rest of each row alone would be `depth` calls.
        packed.fill(0.0);
    }
    let to = packed.as_mut_ptr();
    // SAFETY: the contract on the source; `packed` holds `depth` rows of `width ≥ count`.
    unsafe {
        match source {
            Source { lane_stride: 1, .. } => match count {
                1 => copy_rows::<T, 1>(source, depth, to, width),
                2 => copy_rows::<T, 2>(source, depth, to, width),
                3 => copy_rows::<T, 3>(source, depth, to, width),
                4 => copy_rows::<T, 4>(source, depth, to, width),
                5 => copy_rows::<T, 5>(source, depth, to, width),
                6 => copy_rows::<T, 6>(source, depth, to, width),
                7 => copy_rows::<T, 7>(source, depth, to, width),
                8 => copy_rows::<T, 8>(source, depth, to, width),
                12 => copy_rows::<T, 12>(source, depth, to, width),
                16 => copy_rows::<T, 16>(source, depth, to, width),
                32 => copy_rows::<T, 32>(source, depth, to, width),
                48 => copy_rows::<T, 48>(source, depth, to, width),
                _ => copy_elements(source, 0..depth, 0..count, to, width),
            },
            Source { depth_stride: 1, .. } => transpose(source, depth, count, to, width),
            _ => copy_elements(source, 0..depth, 0..count, to, width),
        }
    }
}

/// Rows that are asked for before they are copied.
const AHEAD: usize = 16;

/// Panels that are packed together: their rows are read as one.
const GROUP: usize = 4;

/// Rows of C from which on a block of B is packed as a whole before the first product.
///
/// Few rows want each panel from a near cache, where packing just left it. More of them use a panel several times, and reading the block
/// from a cache farther away, early enough, costs less than two kinds of work that evict each other's lines: 1.00 to 1.07 times as
/// fast at ten shapes of 96 to 1024 rows (docs/decisions/002-gemm.md).
const MANY_ROWS: usize = 32;

/// How many columns of a block of `cols` to pack before they are used by `rows` rows; panels have `nr`.
#[inline(always)]
pub(super) fn packed_at_once(rows: usize, cols: usize, nr: usize) -> usize {
    if rows < MANY_ROWS { GROUP * nr } else { cols.next_multiple_of(nr) }
}

/// Packs `count` lanes as panels of `nr`, one after the other; the last one is as wide as the lanes
/// that are left, rounded up to whole vectors of `vector`.
///
/// Rows of several panels are read together: one panel's row is one cache line, and where rows lie far
/// apart nothing would fetch the next line ahead.
///
/// # Safety
/// All `depth × count` elements of `source` are readable.
///
/// # Panics
/// When `packed` does not hold `depth` times `count` rounded up to whole vectors.
#[inline(always)]
pub(super) unsafe fn pack_panels<T: Element>(
    source: Source<T>,
    depth: usize,
    count: usize,
    packed: &mut [f32],
    (nr, vector): (usize, usize),
) {
    assert!(packed.len() == depth * count.next_multiple_of(vector) && nr.is_multiple_of(vector));
    let mut first = 0;
    while first < count {
        let panels = ((count - first) / nr).min(GROUP);
        let lanes = if panels == 0 { count - first } else { panels * nr };
        let width = lanes.next_multiple_of(vector);
        let from = Source { ptr: source.ptr.wrapping_add(first * source.lane_stride), ..source };
        let to = &mut packed[first * depth..(first + width) * depth];
        // SAFETY: these lanes are part of the source; `to` holds them, `depth` deep.
        unsafe {
            match (nr, source.lane_stride) {
                _ if panels == 0 => pack_panel(from, depth, lanes, to, width),
                (4, 1) => copy_panels::<T, 4>(from, depth, panels, to.as_mut_ptr()),
                (6, 1) => copy_panels::<T, 6>(from, depth, panels, to.as_mut_ptr()),
                (8, 1) => copy_panels::<T, 8>(from, depth, panels, to.as_mut_ptr()),
                (12, 1) => copy_panels::<T, 12>(from, depth, panels, to.as_mut_ptr()),
                (16, 1) => copy_panels::<T, 16>(from, depth, panels, to.as_mut_ptr()),
                (48, 1) => copy_panels::<T, 48>(from, depth, panels, to.as_mut_ptr()),
                _ => {
                    // At depth 0 there is nothing to pack, but a chunk must have a size.
                    for (panel, to) in to.chunks_exact_mut((nr * depth).max(1)).enumerate() {
                        let ptr = from.ptr.wrapping_add(panel * nr * source.lane_stride);
                        pack_panel(Source { ptr, ..source }, depth, nr, to, nr);
                    }
                }
            }
        }
        first += lanes;
    }
}

/// `panels` panels of C contiguous elements, `depth` deep, a row of all of them at a time.
///
/// # Safety
/// They are readable from `source`, and `to` has room for `panels · depth · C` elements.
#[inline(always)]
unsafe fn copy_panels<T: Element, const C: usize>(
    source: Source<T>,
    depth: usize,
    panels: usize,
    to: *mut f32,
) {
    let (mut from, mut to) = (source.ptr, to);
    for p in 0..depth {
        if const { C <= 8 } {
            // Tiles of a transposed matrix: a line or two of each row, and rows may lie pages apart.
            let ahead = from.wrapping_add(AHEAD.min(depth - 1 - p) * source.depth_stride);
            prefetch::line(ahead);
            prefetch::line(ahead.wrapping_add(panels * C - 1));
        }
        for panel in 0..panels {
            // SAFETY: the contract; arrays have the alignment of their elements.
            unsafe {
                let row = *from.add(panel * C).cast::<[T; C]>();
                *to.add(panel * depth * C).cast::<[f32; C]>() = T::widen_all(row)
            };
        }
        from = from.wrapping_add(source.depth_stride);
        to = to.wrapping_add(C);
    }
}

/// `depth` rows of C contiguous elements.
///
/// # Safety
/// They are readable from `source`, and writable at `to`, `width` apart.
#[inline(always)]
unsafe fn copy_rows<T: Element, const C: usize>(source: Source<T>, depth: usize, to: *mut f32, width: usize) {
    let (mut from, mut to) = (source.ptr, to);
    for _ in 0..depth {
        // SAFETY: the contract; arrays have the alignment of their elements.
        unsafe { *to.cast::<[f32; C]>() = T::widen_all(*from.cast::<[T; C]>()) };
        from = from.wrapping_add(source.depth_stride);
        to = to.wrapping_add(width);
    }
}

/// Any strides, element by element.
///
/// # Safety
/// The elements are readable from `source`, and writable at `to`, rows `width` apart.
#[inline(always)]
unsafe fn copy_elements<T: Element>(
    source: Source<T>,
    depth: std::ops::Range<usize>,
    lanes: std::ops::Range<usize>,
    to: *mut f32,
    width: usize,
) {
    for p in depth {
        for j in lanes.clone() {
            // SAFETY: the contract.
            unsafe {
                *to.add(p * width + j) =
                    (*source.ptr.add(p * source.depth_stride + j * source.lane_stride)).widen()
            };
        }
    }
}

/// A source that is contiguous along the depth.
///
/// Out of line: inside of a kernel's shell there are no registers left for the addresses, and nothing here needs a wider vector.
///
/// # Safety
/// As [`copy_elements`].
#[inline(never)]
unsafe fn transpose<T: Element>(source: Source<T>, depth: usize, count: usize, to: *mut f32, width: usize) {
    const B: usize = 4;
    // A cache line of each lane at a time, so that whole lines of the panel's rows are written while they lie in L1 …
    const LINE: usize = 16;
    // … and so many lanes over all of the depth: they are streams that the hardware follows. All 48 of a panel, a line of each, it does not foresee: weights
    // that lie in no near cache took up to twice as long (Zen 4, ms for 2016×512, minima and medians of alternating runs: 0.83, 1.11 and 0.46, 0.66; 1008×256:
    // 0.19, 0.31 and 0.05, 0.09; 4080×1024: 3.6, 5.3 and 2.5, 3.4).
    const STREAMS: usize = 16;
    let (whole_depth, whole_count) = (depth / B * B, count / B * B);
    for first in (0..whole_count).step_by(STREAMS) {
        for line in (0..whole_depth).step_by(LINE) {
            for j in (first..(first + STREAMS).min(whole_count)).step_by(B) {
                let lanes = source.ptr.wrapping_add(j * source.lane_stride);
                for p in (line..(line + LINE).min(whole_depth)).step_by(B) {
                    let from = Source { ptr: lanes.wrapping_add(p), ..source };
                    // SAFETY: these elements lie inside of `depth × count`.
                    unsafe { transpose_square(from, to.wrapping_add(p * width + j), width) };
                }
            }
        }
    }
    // SAFETY: the two rims lie inside of `depth × count`.
    unsafe {
        copy_elements(source, whole_depth..depth, 0..whole_count, to, width);
        copy_elements(source, 0..depth, whole_count..count, to, width);
    }
}

/// Four lanes, four deep, of a source that is contiguous along the depth.
///
/// # Safety
/// They are readable from `source`, and four rows of four are writable at `to`, `width` apart.
#[inline(always)]
unsafe fn transpose_square<T: Element>(source: Source<T>, to: *mut f32, width: usize) {
    // SAFETY: the contract; arrays have the alignment of their elements.
    let lane = |i: usize| unsafe { *source.ptr.wrapping_add(i * source.lane_stride).cast::<[T; 4]>() };
    let [a, b, c, d] = [lane(0), lane(1), lane(2), lane(3)].map(T::widen_all);
    let [row_0, row_1, row_2, row_3] = transpose_4x4([a, b, c, d]);
    // SAFETY: the contract. (A loop over the rows would take them through memory.)
    unsafe {
        *to.cast() = row_0;
        *to.wrapping_add(width).cast() = row_1;
        *to.wrapping_add(2 * width).cast() = row_2;
        *to.wrapping_add(3 * width).cast() = row_3;
    }
}
