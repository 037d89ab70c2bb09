//! How a matrix of f32 or bf16 becomes words of two bf16 that follow each other along k, for [`Bf16Kernel`](super::microkernel::Bf16Kernel).
//!
//! ```text
//! word[q][j] = bf16(b[2q][j]) | bf16(b[2q + 1][j]) << 16        at an odd end the upper half is 0
//! ```
//! A square of 32 × 16 elements at a time, by what the matrix is contiguous in: along its columns two rows are rounded and interleaved;
//! along the depth 32 elements become 16 words of one column, and 16 columns are transposed in registers. Elements that lie apart in both
//! are gathered first.

use super::microkernel::{Bf16Products, Halves, PairRows, WORDS, prefetch};
use super::pack::Element;
use crate::view::MatRef;
use half::bf16;

/// Rows that are asked for before they are wanted, of which each gives one line.
const AHEAD: usize = 16;

/// Elements that become words.
pub(crate) trait Paired: Element + Default {
    /// The matrix as a left operand, if it is words as it lies.
    #[inline(always)]
    fn as_it_lies(_: MatRef<'_, Self>) -> Option<PairRows> {
        None
    }

    /// Word j holds elements 2j and 2j + 1.
    fn along<D: Bf16Products>(dots: D, elements: &[Self; 2 * WORDS]) -> [u32; WORDS];

    /// Word j holds element j of both.
    fn across<D: Bf16Products>(dots: D, low: &[Self; WORDS], high: &[Self; WORDS]) -> [u32; WORDS];

    /// All of `first` and then all of `second` as halves of words; what rounds to infinity becomes infinity.
    fn halves<D: Bf16Products>(dots: D, first: &[Self; WORDS], second: &[Self; WORDS]) -> Halves;
}

impl Paired for f32 {
    #[inline(always)]
    fn along<D: Bf16Products>(dots: D, elements: &[f32; 2 * WORDS]) -> [u32; WORDS] {
        dots.along::<true>(elements)
    }

    #[inline(always)]
    fn across<D: Bf16Products>(dots: D, low: &[f32; WORDS], high: &[f32; WORDS]) -> [u32; WORDS] {
        dots.across::<true>(low, high)
    }

    #[inline(always)]
    fn halves<D: Bf16Products>(dots: D, first: &[f32; WORDS], second: &[f32; WORDS]) -> Halves {
        dots.rounded::<false>(first, second)
    }
}

impl Paired for bf16 {
    #[inline(always)]
    fn as_it_lies(a: MatRef<'_, bf16>) -> Option<PairRows> {
        let whole = a.col_stride() == 1 && a.cols().is_multiple_of(2);
        whole.then(|| PairRows::row_major(a.as_ptr().cast(), a.row_stride()))
    }

    #[inline(always)]
    fn along<D: Bf16Products>(_: D, elements: &[bf16; 2 * WORDS]) -> [u32; WORDS] {
        let mut words = [0; WORDS];
        for (word, [low, high]) in words.iter_mut().zip(elements.as_chunks::<2>().0) {
            *word = u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
        }
        words
    }

    #[inline(always)]
    fn across<D: Bf16Products>(_: D, low: &[bf16; WORDS], high: &[bf16; WORDS]) -> [u32; WORDS] {
        let mut words = [0; WORDS];
        for ((word, low), high) in words.iter_mut().zip(low).zip(high) {
            *word = u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
        }
        words
    }

    #[inline(always)]
    fn halves<D: Bf16Products>(_: D, first: &[bf16; WORDS], second: &[bf16; WORDS]) -> Halves {
        let [first, second] = [first, second].map(
            #[inline(always)]
            |elements| elements.map(bf16::to_bits),
        );
        pulp::bytemuck::cast([first, second])
    }
}

/// Rows whose elements follow each other, each as its words.
///
/// # Panics
/// When they do not follow each other, or when `words` is not as long as the words of all rows.
#[inline(always)]
pub(super) fn pack_rows<D: Bf16Products, T: Paired>(dots: D, a: MatRef<'_, T>, words: &mut [u32]) {
    let row_words = a.cols().div_ceil(2);
    assert!(words.len() == a.rows() * row_words);
    if row_words == 0 {
        return;
    }
    for (i, words) in words.chunks_exact_mut(row_words).enumerate() {
        let (squares, rest) = a.row(i).as_chunks::<{ 2 * WORDS }>();
        let (to, last) = words.as_chunks_mut::<WORDS>();
        for (elements, to) in squares.iter().zip(to) {
            *to = T::along(dots, elements);
        }
        if !rest.is_empty() {
            let last = if last.is_empty() { &mut words[row_words - WORDS..] } else { last };
            last.copy_from_slice(&T::along(dots, &filled(rest))[..last.len()]);
        }
    }
}

/// Up to W columns of `b` as rows of W words, which are zero where there is no column.
///
/// # Panics
/// When `words` is not as long as half of the depth, rounded up, times W.
#[inline(always)]
pub(super) fn pack_columns<D: Bf16Products, T: Paired, const W: usize>(
    dots: D,
    b: MatRef<'_, T>,
    words: &mut [u32],
) {
    assert!(words.len() == b.rows().div_ceil(2) * W && b.cols() <= W);
    let rows = words.as_chunks_mut::<W>().0;
    for first in (0..W).step_by(WORDS) {
        let cols = first.min(b.cols())..(first + WORDS).min(b.cols());
        let columns = b.sub(0..b.rows(), cols);
        match (columns.cols(), b.row_stride(), b.col_stride()) {
            (0, ..) => rows.iter_mut().for_each(|row| row[first..first + WORDS].fill(0)),
            (_, 1, _) => transposed(dots, columns, rows, first),
            (_, _, 1) => interleaved(dots, columns, rows, first),
            _ => gathered(dots, columns, rows, first),
        }
    }
}

/// Up to 16 columns of rows whose elements follow each other.
#[inline(always)]
fn interleaved<D: Bf16Products, T: Paired, const W: usize>(
    dots: D,
    b: MatRef<'_, T>,
    rows: &mut [[u32; W]],
    first: usize,
) {
    let depth = b.rows();
    for (q, row) in rows.iter_mut().enumerate() {
        // A line of each row, and rows may lie pages apart: no hardware foresees them.
        for i in [2 * q + AHEAD, 2 * q + AHEAD + 1] {
            prefetch::line(b.as_ptr().wrapping_add(i.min(depth - 1) * b.row_stride()));
        }
        let low = b.row(2 * q);
        let high = if 2 * q + 1 < depth { b.row(2 * q + 1) } else { &[] };
        let words = match (low.first_chunk::<WORDS>(), high.first_chunk::<WORDS>()) {
            (Some(low), Some(high)) => T::across(dots, low, high),
            _ => T::across(dots, &filled(low), &filled(high)),
        };
        row[first..first + WORDS].copy_from_slice(&words);
    }
}

/// Up to 16 columns whose elements follow each other.
#[inline(always)]
fn transposed<D: Bf16Products, T: Paired, const W: usize>(
    dots: D,
    b: MatRef<'_, T>,
    rows: &mut [[u32; W]],
    first: usize,
) {
    let columns = b.t();
    for (rows, from) in rows.chunks_mut(WORDS).zip((0..).step_by(2 * WORDS)) {
        let mut square = [[0; WORDS]; WORDS];
        for (j, words) in square.iter_mut().enumerate().take(columns.rows()) {
            let column = &columns.row(j)[from..];
            *words = match column.first_chunk::<{ 2 * WORDS }>() {
                Some(elements) => T::along(dots, elements),
                None => T::along(dots, &filled(column)),
            };
        }
        let mut turned = [0; WORDS * WORDS];
        dots.transpose(&square, &mut turned);
        for (row, words) in rows.iter_mut().zip(turned.as_chunks::<WORDS>().0) {
            row[first..first + WORDS].copy_from_slice(words);
        }
    }
}

/// Up to 16 columns of any strides.
#[inline(always)]
fn gathered<D: Bf16Products, T: Paired, const W: usize>(
    dots: D,
    b: MatRef<'_, T>,
    rows: &mut [[u32; W]],
    first: usize,
) {
    for (q, row) in rows.iter_mut().enumerate() {
        let mut halves = [[T::default(); WORDS]; 2];
        for (half, p) in halves.iter_mut().zip(2 * q..b.rows()) {
            for (x, j) in half.iter_mut().zip(0..b.cols()) {
                *x = b.at(p, j);
            }
        }
        let [low, high] = halves;
        row[first..first + WORDS].copy_from_slice(&T::across(dots, &low, &high));
    }
}

/// What there is of `row` from element `first` on.
#[inline(always)]
pub(crate) fn from<T>(row: &[T], first: usize) -> &[T] {
    row.get(first..).unwrap_or(&[])
}

/// The elements and zeros behind them.
#[inline(always)]
pub(crate) fn filled<T: Copy + Default, const N: usize>(elements: &[T]) -> [T; N] {
    let mut all = [T::default(); N];
    let count = elements.len().min(N);
    all[..count].copy_from_slice(&elements[..count]);
    all
}
