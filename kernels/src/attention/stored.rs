//! The product of decoding with a cache in fewer bits than f32, widened in registers.
//!
//! ```text
//! for k ascending:  for c:  acc[c] = a[k]·row[k][c] + acc[c]
//! ```
//! A row stands in groups of 16 words of 32 bits, which hold `16·PER_WORD` columns: element `at` of word `w` is column
//! `16·at + w` of its group. So a vector of up to 16 words widens lane by lane to vectors of neighbouring columns on every
//! instruction set: no shuffle, and the accumulators lie in order.
//!
//! - Each element is the same chain of multiply-adds as in [`super::tile::product`]: a bf16 cache has the bits of an f32
//!   cache with the rounded numbers.
//! - Integers stay integers here; the scale of a key multiplies its finished score, that of a value its probability.
//! - A single query is what decoding is about, and is bound by reading: its sums are as many vectors as hide the multiply-add ([`Product`]).
//! - Rows that share a cache (heads that share their keys, several queries) share what is widened, up to six at a time ([`Rows`]): on AVX-512 widening
//!   takes as long as multiplying one row.

use std::marker::PhantomData;
use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::cache::CacheFormat;
use super::problem::{KEY_BLOCK, even_parts};
use super::tile::GROUP;
use crate::gemm::microkernel::{Bf16, Int8, Stored};
use crate::lanes;
use crate::view::MatRef;

/// Words of one group of columns.
pub(super) const GROUP_WORDS: usize = 16;

/// `acc += a·rows` over all columns of some words of the rows.
pub(super) struct Product<'a, T> {
    /// The left factor, one element for each row.
    pub(super) a: &'a [f32],
    /// The rows, from the first word that is meant on.
    pub(super) words: &'a [u32],
    /// Words from one row to the next.
    pub(super) stride: usize,
    /// The sums: `PER_WORD` for each word, a multiple of a group.
    pub(super) acc: &'a mut [f32],
    pub(super) stored: PhantomData<T>,
}

impl<T: Stored> WithSimd for Product<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let words = self.acc.len() / T::PER_WORD;
        assert!(words.is_multiple_of(GROUP_WORDS), "whole groups");
        let Some(before) = self.a.len().checked_sub(1) else { return };
        assert!(before * self.stride + words <= self.words.len(), "the rows hold the words");
        let mut first = 0;
        while first < words {
            // Eight accumulators hide the latency of the multiply-add.
            match ((words - first) / S::F32_LANES).min(8 / T::PER_WORD) {
                4.. => first += self.strip::<S, 4>(simd, first),
                2.. => first += self.strip::<S, 2>(simd, first),
                _ => first += self.strip::<S, 1>(simd, first),
            }
        }
    }
}

/// The column of element `at` of a word.
#[inline(always)]
fn column<T: Stored>(word: usize, at: usize) -> usize {
    word / GROUP_WORDS * GROUP_WORDS * T::PER_WORD + at * GROUP_WORDS + word % GROUP_WORDS
}

/// More elements than a word of a cache holds.
const MOST: usize = 4;

impl<T: Stored> Product<'_, T> {
    /// The columns of `WV` vectors of words from word `first` on; how many words that were.
    #[inline(always)]
    fn strip<S: Simd, const WV: usize>(&mut self, simd: S, first: usize) -> usize {
        let column = |v: usize, at: usize| column::<T>(first + v * S::F32_LANES, at);
        let mut acc = [[simd.splat_f32s(0.0); MOST]; WV];
        for (v, acc) in acc.iter_mut().enumerate() {
            for (at, acc) in acc.iter_mut().enumerate().take(T::PER_WORD) {
                *acc = S::as_simd_f32s(&self.acc[column(v, at)..][..S::F32_LANES]).0[0];
            }
        }
        for (k, &a) in self.a.iter().enumerate() {
            let a = simd.splat_f32s(a);
            let row = &self.words[k * self.stride + first..][..WV * S::F32_LANES];
            for (acc, &words) in acc.iter_mut().zip(S::as_simd_u32s(row).0) {
                for (at, acc) in acc.iter_mut().enumerate().take(T::PER_WORD) {
                    *acc = simd.mul_add_e_f32s(a, T::widen(simd, words, at), *acc);
                }
            }
        }
        for (v, acc) in acc.iter().enumerate() {
            for (at, acc) in acc.iter().enumerate().take(T::PER_WORD) {
                S::as_mut_simd_f32s(&mut self.acc[column(v, at)..][..S::F32_LANES]).0[0] = *acc;
            }
        }
        WV * S::F32_LANES
    }
}

/// `acc[r] += a[r]·rows` for `MR` rows of the left factor, over all columns of some words of the rows.
struct Rows<'a, T, const MR: usize> {
    /// [MR, depth].
    a: MatRef<'a>,
    words: &'a [u32],
    stride: usize,
    /// The sums, `width` from one row to the next.
    acc: &'a mut [f32],
    width: usize,
    /// Columns: whole groups.
    columns: usize,
    stored: PhantomData<T>,
}

impl<T: Stored, const MR: usize> WithSimd for Rows<'_, T, MR> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let words = self.columns / T::PER_WORD;
        let depth = self.a.cols();
        assert!(self.columns.is_multiple_of(GROUP_WORDS * T::PER_WORD), "whole groups");
        assert!(
            self.a.rows() == MR && (MR - 1) * self.width + self.columns <= self.acc.len(),
            "rows of sums"
        );
        assert!(
            depth == 0 || (depth - 1) * self.stride + words <= self.words.len(),
            "the rows hold the words"
        );
        let mut first = 0;
        while first < words {
            // Four vectors of columns fill 32 registers with six rows of sums, two vectors 16 registers.
            first += match (S::F32_LANES == 16, T::PER_WORD) {
                (true, 4) => self.strip::<S, 1, 0, 4>(simd, first),
                (true, 2) if words - first >= 2 * S::F32_LANES => self.strip::<S, 2, 0, 2>(simd, first),
                (_, 2) => self.strip::<S, 1, 0, 2>(simd, first),
                _ => {
                    self.strip::<S, 1, 0, 2>(simd, first);
                    self.strip::<S, 1, 2, 2>(simd, first)
                }
            };
        }
    }
}

impl<T: Stored, const MR: usize> Rows<'_, T, MR> {
    /// Elements `FIRST ..` of each of `WV` vectors of words from word `first` on, as many as `ATS`; how many words that were.
    #[inline(always)]
    fn strip<S: Simd, const WV: usize, const FIRST: usize, const ATS: usize>(
        &mut self,
        simd: S,
        first: usize,
    ) -> usize {
        let column = |v: usize, at: usize| column::<T>(first + v * S::F32_LANES, FIRST + at);
        let mut acc = [[[simd.splat_f32s(0.0); ATS]; WV]; MR];
        for (r, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                for (at, acc) in acc.iter_mut().enumerate() {
                    *acc = S::as_simd_f32s(&self.acc[r * self.width + column(v, at)..][..S::F32_LANES]).0[0];
                }
            }
        }
        let (a, a_stride) = (self.a.as_ptr(), self.a.row_stride());
        let words = self.words.as_ptr().wrapping_add(first);
        for k in 0..self.a.cols() {
            let mut b = [[simd.splat_f32s(0.0); ATS]; WV];
            for (v, b) in b.iter_mut().enumerate() {
                // SAFETY: `with_simd` has asserted that each of `cols` rows, `stride` apart, holds all words of the columns, of which these are some.
                let words = unsafe {
                    words.add(k * self.stride + v * S::F32_LANES).cast::<S::u32s>().read_unaligned()
                };
                for (at, b) in b.iter_mut().enumerate() {
                    *b = T::widen(simd, words, FIRST + at);
                }
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                // SAFETY: the left factor has MR rows of `cols` elements.
                let a = simd.splat_f32s(unsafe { *a.add(r * a_stride + k) });
                for (acc, b) in acc.as_flattened_mut().iter_mut().zip(b.as_flattened()) {
                    *acc = simd.mul_add_e_f32s(a, *b, *acc);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (v, acc) in acc.iter().enumerate() {
                for (at, acc) in acc.iter().enumerate() {
                    let to = &mut self.acc[r * self.width + column(v, at)..][..S::F32_LANES];
                    S::as_mut_simd_f32s(to).0[0] = *acc;
                }
            }
        }
        WV * S::F32_LANES
    }
}

/// `acc[r] += a[r]·rows` of words `stride` apart, over the first `columns` columns, whole groups; sums `width` apart.
#[inline(always)]
pub(super) fn multiply<S: Simd>(
    simd: S,
    format: CacheFormat,
    a: MatRef<'_>,
    words: (&[u32], usize),
    (acc, width, columns): (&mut [f32], usize, usize),
) {
    match format {
        CacheFormat::Bf16 => multiply_as::<S, Bf16>(simd, a, words, (acc, width, columns)),
        CacheFormat::Int8 => multiply_as::<S, Int8>(simd, a, words, (acc, width, columns)),
    }
}

#[inline(always)]
fn multiply_as<S: Simd, T: Stored>(
    simd: S,
    a: MatRef<'_>,
    (words, stride): (&[u32], usize),
    (acc, width, columns): (&mut [f32], usize, usize),
) {
    let stored = PhantomData::<T>;
    // With 16 registers a strip is half as wide, so that memory is read in pieces of 32 bytes: two instructions a vector of bf16 are cheaper than that.
    let alone = const { S::F32_LANES < 16 && T::PER_WORD == 2 };
    let height = if alone { 1 } else { even_parts(a.rows(), GROUP, 1) };
    for first in (0..a.rows()).step_by(height) {
        let rows = first..(first + height).min(a.rows());
        let acc = &mut acc[first * width..];
        let a = a.sub(rows.clone(), 0..a.cols());
        macro_rules! of_height {
            ($height:literal) => {
                simd.vectorize(Rows::<T, $height> { a, words, stride, acc, width, columns, stored })
            };
        }
        // Where rows are alone the others are not compiled.
        match if alone { 1 } else { rows.len() } {
            1 => simd.vectorize(Product { a: a.row(0), words, stride, acc: &mut acc[..columns], stored }),
            2 => of_height!(2),
            3 => of_height!(3),
            4 => of_height!(4),
            5 => of_height!(5),
            _ => of_height!(6),
        }
    }
}

/// `acc[r] += p[r]·V` over `keys` of a head's values in fewer bits, and over the columns `cols` of `v_dim`; a row of
/// `acc` is a multiple of every group. `scaled` has room for [`KEY_BLOCK`] elements a row.
#[inline(always)]
pub(super) fn add_values<S: Simd>(
    simd: S,
    p: MatRef<'_>,
    (format, words, scales): (CacheFormat, &[u32], &[f32]),
    (keys, v_dim, cols): (Range<usize>, usize, Range<usize>),
    (acc, scaled): (&mut [f32], &mut [f32]),
) {
    let (stride, width) = (format.words(v_dim), acc.len() / p.rows().max(1));
    let words = &words[keys.start * stride + cols.start / format.per_word()..keys.end * stride];
    let columns = format.words(cols.len()) * format.per_word();
    if format == CacheFormat::Bf16 {
        return multiply(simd, format, p, (words, stride), (acc, width, columns));
    }
    for (r, to) in scaled.chunks_exact_mut(KEY_BLOCK).enumerate() {
        lanes::zip(
            simd,
            p.row(r),
            &scales[keys.clone()],
            &mut to[..keys.len()],
            #[inline(always)]
            |p, scale| simd.mul_f32s(p, scale),
        );
    }
    let p = MatRef::with_strides(scaled, p.rows(), keys.len(), KEY_BLOCK, 1).expect("cut for these rows");
    multiply(simd, format, p, (words, stride), (acc, width, columns));
}

/// Whole groups of bf16 as f32, in the order of columns: 32 for 16 words.
pub(super) fn widen(words: &[u32], to: &mut [f32]) {
    for (words, to) in
        words.as_chunks::<GROUP_WORDS>().0.iter().zip(to.as_chunks_mut::<{ 2 * GROUP_WORDS }>().0)
    {
        let (low, high) = to.split_at_mut(GROUP_WORDS);
        for ((word, low), high) in words.iter().zip(low).zip(high) {
            *low = f32::from_bits(word << 16);
            *high = f32::from_bits(word & 0xffff_0000);
        }
    }
}

/// Puts the bits of column `column` into a row of words with `per_word` elements each.
pub(super) fn put(row: &mut [u32], per_word: usize, column: usize, bits: u32) {
    let width = 32 / per_word;
    let (group, rest) = (column / (GROUP_WORDS * per_word), column % (GROUP_WORDS * per_word));
    let shift = width * (rest / GROUP_WORDS);
    let mask = ((1u64 << width) - 1) as u32;
    let word = &mut row[group * GROUP_WORDS + rest % GROUP_WORDS];
    *word = *word & !(mask << shift) | bits << shift;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::quantise::encode;
    use crate::testing::{assert_same_bits, for_each_isa};

    /// A call of [`multiply_as`] with sums of a gap of 16 between rows.
    struct Multiplied<'a, T> {
        a: MatRef<'a>,
        words: (&'a [u32], usize),
        acc: &'a mut [f32],
        columns: usize,
        stored: PhantomData<T>,
    }

    impl<T: Stored> WithSimd for Multiplied<'_, T> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Multiplied { a, words, acc, columns, .. } = self;
            multiply_as::<S, T>(simd, a, words, (acc, columns + 16, columns));
        }
    }

    /// Small integers, which both formats hold exactly, so that every order of the sum is exact.
    fn check<T: Stored>() {
        for (depth, groups) in [(0, 1), (1, 1), (3, 2), (64, 4), (5, 3)] {
            let cols = groups * GROUP_WORDS * T::PER_WORD;
            let stride = groups * GROUP_WORDS + 16;
            let mut words = vec![0; depth * stride];
            let value = |k: usize, c: usize| ((k * 31 + c * 17) % 23) as f32 - 11.0;
            for (k, c) in (0..depth).flat_map(|k| (0..cols).map(move |c| (k, c))) {
                put(&mut words[k * stride..], T::PER_WORD, c, encode(T::STORAGE, value(k, c), 1.0));
            }
            for rows in 1..=13 {
                let left: Vec<f32> = (0..rows * depth).map(|x| (x % 7) as f32 - 3.0).collect();
                let a = MatRef::new(&left, rows, depth).unwrap();
                let mut expected = vec![1.0; rows * (cols + 16)];
                for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                    expected[r * (cols + 16) + c] +=
                        (0..depth).map(|k| a.at(r, k) * value(k, c)).sum::<f32>();
                }
                for_each_isa(|ctx| {
                    let mut acc = vec![1.0; rows * (cols + 16)];
                    let stored = PhantomData::<T>;
                    ctx.isa().dispatch(Multiplied {
                        a,
                        words: (&words, stride),
                        acc: &mut acc,
                        columns: cols,
                        stored,
                    });
                    assert_same_bits(&acc, &expected);
                });
            }
        }
    }

    #[test]
    fn words_are_widened_in_order() {
        check::<Bf16>();
        check::<Int8>();
    }

    /// Numbers whose sums are rounded: a row among others has the bits that it has alone.
    fn check_company<T: Stored>() {
        let (depth, columns) = (37, 128);
        let mut words = vec![0; depth * 64];
        let numbers = crate::testing::uniform(depth * columns, 1);
        for (k, row) in numbers.chunks_exact(columns).enumerate() {
            for (c, &x) in row.iter().enumerate() {
                put(&mut words[k * 64..], T::PER_WORD, c, encode(T::STORAGE, x, 1.0 / 127.0));
            }
        }
        for rows in 2..=13 {
            let left = crate::testing::uniform(rows * depth, rows as u64);
            let a = MatRef::new(&left, rows, depth).unwrap();
            for_each_isa(|ctx| {
                let product = |a: MatRef<'_>| {
                    let mut acc = vec![0.5; a.rows() * (columns + 16)];
                    let (words, stored) = ((&words[..], 64), PhantomData::<T>);
                    ctx.isa().dispatch(Multiplied { a, words, acc: &mut acc, columns, stored });
                    acc
                };
                let alone: Vec<f32> = (0..rows).flat_map(|r| product(a.sub(r..r + 1, 0..depth))).collect();
                assert_same_bits(&product(a), &alone);
            });
        }
    }

    #[test]
    fn a_row_has_its_bits_in_any_company() {
        check_company::<Bf16>();
        check_company::<Int8>();
    }
}
