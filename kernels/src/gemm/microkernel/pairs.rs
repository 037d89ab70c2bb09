//! Products of int8 by multiply-adds of pairs of 16 bits: every instruction set has them. The kernel around them is in `bytes`.
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
//! - A word of eight integers of 4 bits is cut into four times two, 4 bits apart, in the same way.
//! - The left operand lies as pairs of 16 bits in the same order, so that one broadcast of 32 bits feeds a vector.
//!
//! Rejected: the instruction for bytes (`vpmaddubsw`) is faster still and saturates: sums are wrong without a warning.

use pulp::Simd;

use super::bytes::{ByteProducts, Order, WordBlock, for_each_part, lane, lane_mut, row_of};

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
}

#[cfg(target_arch = "x86_64")]
impl PairProducts for pulp::x86::V4 {
    #[inline(always)]
    fn add_pair_products(self, sum: Self::u32s, a: Self::u32s, b: Self::u32s) -> Self::u32s {
        use pulp::bytemuck::cast;
        let products = self.avx512bw._mm512_madd_epi16(cast(a), cast(b));
        cast(self.avx512f._mm512_add_epi32(cast(sum), products))
    }
}

impl<S: PairProducts> ByteProducts for S {
    type Simd = S;
    const LEFT: Order = Order::Pairs;
    const LEFT_OF_NIBBLES: Order = Order::NibblePairs;

    #[inline(always)]
    fn simd(self) -> S {
        self
    }

    #[inline(always)]
    unsafe fn add_block<const H: usize, const VECS: usize>(
        self,
        sums: &mut [[S::u32s; VECS]; H],
        (lhs, row_words): (*const u32, usize),
        block: WordBlock,
    ) {
        // SAFETY: the contract.
        unsafe { add_pairs::<S, H, VECS, 8>(self, sums, (lhs, row_words), block) }
    }

    #[inline(always)]
    unsafe fn add_nibbles<const H: usize, const VECS: usize>(
        self,
        sums: &mut [[S::u32s; VECS]; H],
        (lhs, row_words): (*const u32, usize),
        block: WordBlock,
    ) {
        // SAFETY: the contract.
        unsafe { add_pairs::<S, H, VECS, 4>(self, sums, (lhs, row_words), block) }
    }
}

/// Adds the products of one block of words of integers of BITS bits, two of each word at a time: those in the lowest bits of both halves, then the
/// next.
///
/// # Safety
/// As [`ByteProducts::add_block`]; the left operand has `16 / BITS` pairs beside each word.
#[inline(always)]
unsafe fn add_pairs<S: PairProducts, const H: usize, const VECS: usize, const BITS: usize>(
    simd: S,
    sums: &mut [[S::u32s; VECS]; H],
    (lhs, row_words): (*const u32, usize),
    block: WordBlock,
) {
    let pairs = const { 16 / BITS };
    let lowest = simd.splat_u32s(const { ((1 << BITS) - 1) * 0x0001_0001 });
    let mut local = *sums;
    for_each_part::<H>(
        block.words,
        pairs,
        #[inline(always)]
        |q, at| {
            let shift = simd.splat_u32s((BITS * at) as u32);
            // SAFETY: the contract on the block.
            let words = unsafe { row_of::<S, VECS>(block.ptr, q) };
            let row = words.map(
                #[inline(always)]
                |words| simd.and_u32s(simd.wrapping_dyn_shr_u32s(words, shift), lowest),
            );
            for (i, sums) in local.iter_mut().enumerate() {
                // SAFETY: the contract on lhs.
                let pair = simd.splat_u32s(unsafe { *lhs.wrapping_add(i * row_words + pairs * q + at) });
                for (sum, row) in sums.iter_mut().zip(row) {
                    *sum = simd.add_pair_products(*sum, pair, row);
                }
            }
        },
    );
    *sums = local;
}
