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
//! - One row of the left factor at a time: a single query is what decoding is about, and heads that share a cache find the
//!   words of a panel in the first-level cache.

use std::marker::PhantomData;
use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::cache::CacheFormat;
use super::problem::KEY_BLOCK;
use crate::gemm::microkernel::{Bf16, Int8, Stored};
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

/// More elements than a word of a cache holds.
const MOST: usize = 4;

impl<T: Stored> Product<'_, T> {
    /// The columns of `WV` vectors of words from word `first` on; how many words that were.
    #[inline(always)]
    fn strip<S: Simd, const WV: usize>(&mut self, simd: S, first: usize) -> usize {
        let column = |v: usize, at: usize| {
            let word = first + v * S::F32_LANES;
            word / GROUP_WORDS * GROUP_WORDS * T::PER_WORD + at * GROUP_WORDS + word % GROUP_WORDS
        };
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

/// `acc += a·rows` of words `stride` apart.
#[inline(always)]
pub(super) fn multiply<S: Simd>(
    simd: S,
    format: CacheFormat,
    a: &[f32],
    (words, stride): (&[u32], usize),
    acc: &mut [f32],
) {
    match format {
        CacheFormat::Bf16 => simd.vectorize(Product { a, words, stride, acc, stored: PhantomData::<Bf16> }),
        CacheFormat::Int8 => simd.vectorize(Product { a, words, stride, acc, stored: PhantomData::<Int8> }),
    }
}

/// `acc[r] += p[r]·V` over `keys` of a head's values in fewer bits, and over the columns `cols` of `v_dim`; a row of
/// `acc` is a multiple of every group.
#[inline(always)]
pub(super) fn add_values<S: Simd>(
    simd: S,
    p: MatRef<'_>,
    (format, words, scales): (CacheFormat, &[u32], &[f32]),
    (keys, v_dim, cols): (Range<usize>, usize, Range<usize>),
    acc: &mut [f32],
) {
    let (stride, width) = (format.words(v_dim), acc.len() / p.rows().max(1));
    let words = &words[keys.start * stride + cols.start / format.per_word()..keys.end * stride];
    let columns = format.words(cols.len()) * format.per_word();
    for r in 0..p.rows() {
        let acc = &mut acc[r * width..][..columns];
        if format == CacheFormat::Bf16 {
            multiply(simd, format, p.row(r), (words, stride), acc);
            continue;
        }
        let mut scaled = [0.0; KEY_BLOCK];
        let scaled = &mut scaled[..keys.len()];
        for ((to, p), scale) in scaled.iter_mut().zip(p.row(r)).zip(&scales[keys.clone()]) {
            *to = p * scale;
        }
        multiply(simd, format, scaled, (words, stride), acc);
    }
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
            let a: Vec<f32> = (0..depth).map(|k| (k % 7) as f32 - 3.0).collect();
            let expected: Vec<f32> =
                (0..cols).map(|c| 1.0 + (0..depth).map(|k| a[k] * value(k, c)).sum::<f32>()).collect();
            for_each_isa(|ctx| {
                let mut acc = vec![1.0; cols];
                ctx.isa().dispatch(Product {
                    a: &a,
                    words: &words,
                    stride,
                    acc: &mut acc,
                    stored: PhantomData::<T>,
                });
                assert_same_bits(&acc, &expected);
            });
        }
    }

    #[test]
    fn words_are_widened_in_order() {
        check::<Bf16>();
        check::<Int8>();
    }
}
