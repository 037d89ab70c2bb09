//! Products of int8 with int8 or int4 by multiply-adds of pairs: every instruction set has them. The kernel around them is in `bytes`.
//!
//! # Naive form
//! ```text
//! for p in 0..depth { sum[i][j] += lhs[i][p] * word[p][j] }
//! ```
//! # Deviations
//! - A word is cut into its even and its odd bytes, pairs of 16 bits each, in 3 instructions that all rows of the tile
//!   share. One multiply-add of pairs (`vpmaddwd`) and one addition then make 16 multiply-adds of 8 columns: up to
//!   twice the rate of f32, because more ports take them. The products of two bytes are exact in it.
//! - The even bytes of a whole block come first, then the odd ones, from words that lie in L1 by then. Both in one turn of
//!   the loop left no register for two of the sums, which waited for their way through memory, 16 cycles a turn. One or two
//!   rows have registers to spare, and take all of a word while it lies in one.
//! - The left operand lies as pairs of 16 bits in the same order, so that one broadcast of 32 bits feeds a vector.
//! - A word of eight integers of 4 bits is cut into two times four bytes. The multiply-add of pairs of bytes (`vpmaddubsw`) saturates at 16 bits,
//!   but products with integers up to 15 do not come near: sixteen of them are at most `16·15·128 = 30,720`. So sums of 16 bits take four words, two instructions for
//!   32 multiply-adds, before they are added to those of 32 bits, which wait in L1. Pairs of 16 bits took four.
//!
//! Rejected: that instruction for int8, faster still than pairs of 16 bits. There it does saturate: sums are wrong without a warning.

use pulp::Simd;

use super::bytes::{ByteProducts, Order, WordBlock, for_each_part, lane, lane_mut, part_of};
use super::prefetch::{self, Ahead, Share};

/// Words of integers of 4 bits whose products a sum of 16 bits holds: four a word and half, each at most `15·128`.
const WORDS_OF_16_BITS: usize = 4;

/// Instruction sets with vectors of 32-bit lanes, each two 16-bit integers.
pub(crate) trait PairProducts: Simd {
    /// `sum + a.low·b.low + a.high·b.high` in each lane, signed, modulo 2³².
    ///
    /// This form is plain arithmetic, lane by lane, for the compiler to make vectors of.
    #[inline(always)]
    fn add_pair_products(self, sum: Self::u32s, a: Self::u32s, b: Self::u32s) -> Self::u32s {
        let mut sums = sum;
        let half = |x: u32, shift: u32| i32::from((x >> shift) as u16 as i16);
        for j in 0..Self::F32_LANES {
            let (a, b) = (lane::<Self>(&a, j), lane::<Self>(&b, j));
            let product = half(a, 0) * half(b, 0) + half(a, 16) * half(b, 16);
            let sum = lane_mut::<Self>(&mut sums, j);
            *sum = sum.wrapping_add(product as u32);
        }
        sums
    }

    /// `sum.low + nibbles.byte(0)·left.byte(0) + nibbles.byte(1)·left.byte(1)`, and so the high half with bytes 2 and 3, in each lane: sums of 16
    /// bits, which must not overflow, of bytes from 0 to 15 and signed ones.
    #[inline(always)]
    fn add_nibble_products(self, sum: Self::u32s, nibbles: Self::u32s, left: Self::u32s) -> Self::u32s {
        let mut sums = sum;
        let product = |nibbles: u32, left: u32, at: u32| {
            i32::from((nibbles >> at) as u8) * i32::from((left >> at) as u8 as i8)
        };
        for j in 0..Self::F32_LANES {
            let (nibbles, left) = (lane::<Self>(&nibbles, j), lane::<Self>(&left, j));
            let sum = lane_mut::<Self>(&mut sums, j);
            let low = (*sum as i32) + product(nibbles, left, 0) + product(nibbles, left, 8);
            let high = (*sum as i32 >> 16) + product(nibbles, left, 16) + product(nibbles, left, 24);
            *sum = (low as u32 & 0xffff) | (high as u32) << 16;
        }
        sums
    }
}

impl PairProducts for pulp::Scalar {}

#[cfg(target_arch = "aarch64")]
impl PairProducts for pulp::aarch64::Neon {}

#[cfg(target_arch = "x86_64")]
impl PairProducts for pulp::x86::V3 {
    #[inline(always)]
    fn add_pair_products(self, sum: Self::u32s, a: Self::u32s, b: Self::u32s) -> Self::u32s {
        use pulp::bytemuck::cast;
        let products = self.avx2._mm256_madd_epi16(cast(a), cast(b));
        cast(self.avx2._mm256_add_epi32(cast(sum), products))
    }

    #[inline(always)]
    fn add_nibble_products(self, sum: Self::u32s, nibbles: Self::u32s, left: Self::u32s) -> Self::u32s {
        use pulp::bytemuck::cast;
        let products = self.avx2._mm256_maddubs_epi16(cast(nibbles), cast(left));
        cast(self.avx2._mm256_add_epi16(cast(sum), products))
    }
}

#[cfg(target_arch = "x86_64")]
impl PairProducts for pulp::x86::V4 {
    #[inline(always)]
    fn add_pair_products(self, sum: Self::u32s, a: Self::u32s, b: Self::u32s) -> Self::u32s {
        use pulp::bytemuck::cast;
        let products = self.avx512bw._mm512_madd_epi16(cast(a), cast(b));
        cast(self.avx512f._mm512_add_epi32(cast(sum), products))
    }

    #[inline(always)]
    fn add_nibble_products(self, sum: Self::u32s, nibbles: Self::u32s, left: Self::u32s) -> Self::u32s {
        use pulp::bytemuck::cast;
        let products = self.avx512bw._mm512_maddubs_epi16(cast(nibbles), cast(left));
        cast(self.avx512bw._mm512_add_epi16(cast(sum), products))
    }
}

impl<S: PairProducts> ByteProducts for S {
    type Simd = S;
    const LEFT: Order = Order::Pairs;

    #[inline(always)]
    fn simd(self) -> S {
        self
    }

    #[inline(always)]
    unsafe fn add_block<const P: usize, const H: usize, const W: usize, const VECS: usize>(
        self,
        sums: &mut [[[S::u32s; W]; H]; P],
        (lhs, row_words): (*const u32, usize),
        block: WordBlock,
        ahead: Option<(Share, Ahead)>,
    ) {
        let lowest = self.splat_u32s(0x00ff_00ff);
        let lines = const { P * (VECS * S::F32_LANES).div_ceil(prefetch::LINE) };
        let (lines, mut ahead) = match ahead {
            Some((share, ahead)) => (share.lines(lines), ahead),
            None => (0, Ahead::from(block.ptr)),
        };
        let mut local = *sums;
        for_each_part::<H>(
            block.words,
            2,
            #[inline(always)]
            |q, odd| {
                if lines > 0 && odd == 0 {
                    ahead.fetch(lines);
                }
                for (panel, sums) in local.iter_mut().enumerate() {
                    let words = block.ptr.wrapping_add(panel * block.panel_stride);
                    // SAFETY: the contract on the block.
                    let row = unsafe { part_of::<S, W, VECS>(self, words, q, (8 * odd, lowest)) };
                    for (i, sums) in sums.iter_mut().enumerate() {
                        // SAFETY: the contract on lhs.
                        let pair = self.splat_u32s(unsafe { *lhs.wrapping_add(i * row_words + 2 * q + odd) });
                        for (sum, row) in sums.iter_mut().zip(row) {
                            *sum = self.add_pair_products(*sum, pair, row);
                        }
                    }
                }
            },
        );
        *sums = local;
    }

    #[inline(always)]
    unsafe fn add_nibbles<const H: usize, const VECS: usize>(
        self,
        sums: &mut [[S::u32s; VECS]; H],
        (lhs, row_words): (*const u32, usize),
        block: WordBlock,
    ) {
        let (lowest, ones) = (self.splat_u32s(0x0f0f_0f0f), self.splat_u32s(0x0001_0001));
        let mut first = 0;
        while first < block.words {
            let end = block.words.min(first + WORDS_OF_16_BITS);
            let mut halves = [[self.splat_u32s(0); VECS]; H];
            for_each_part::<H>(
                end - first,
                2,
                #[inline(always)]
                |q, odd| {
                    let q = first + q;
                    // SAFETY: the contract on the block.
                    let nibbles = unsafe { part_of::<S, VECS, VECS>(self, block.ptr, q, (4 * odd, lowest)) };
                    for (i, halves) in halves.iter_mut().enumerate() {
                        // SAFETY: the contract on lhs.
                        let left = self.splat_u32s(unsafe { *lhs.wrapping_add(i * row_words + 2 * q + odd) });
                        for (halves, nibbles) in halves.iter_mut().zip(nibbles) {
                            *halves = self.add_nibble_products(*halves, nibbles, left);
                        }
                    }
                },
            );
            for (sum, halves) in sums.as_flattened_mut().iter_mut().zip(halves.as_flattened()) {
                *sum = self.add_pair_products(*sum, *halves, ones);
            }
            first = end;
        }
    }
}
