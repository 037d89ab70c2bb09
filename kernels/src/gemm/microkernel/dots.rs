//! Products of int8 by dot products of four bytes (VNNI), on vectors of 256 and of 512 bits. The kernel around them is in `bytes`.
//!
//! # Naive form
//! ```text
//! for q in 0..words { for t in 0..4 { sum[i][j] += lhs[i][4·q + t] * word[q][j].byte(t) } }
//! ```
//! # Deviations
//! - `vpdpbusd` multiplies four unsigned bytes by four signed ones and adds all four products to a sum of 32 bits, modulo
//!   2³²: it saturates nowhere. A word of packed weights is its unsigned operand as it lies, and a word of the left operand the
//!   signed one: one load, one broadcast and one instruction for the multiply-adds that pairs need two ANDs or shifts,
//!   two broadcasts and four instructions for.
//! - Of a word of eight integers of 4 bits the even ones are four bytes after one AND, the odd ones after a shift too: all even ones of a
//!   block first, for the reason that `pairs` gives.
//! - The tiles are those of pairs, so that packed weights serve both. On 512 bits they take 24 sums, 3 vectors of words and a
//!   broadcast of 32 registers, on 256 bits 12, 2 and one of 16. A sum waits for the one before it 5 cycles on the cores at
//!   hand in Intel's tables, in which two ports take ten others: full tiles have enough.
//!
//! - One or two rows have too few chains to hide the latency, so they take four or two panels at a time. Tiles over far panels ask for the
//!   next one and for their rows of C, as in the kernel of f32.

use std::arch::x86_64::{_mm256_dpbusd_avx_epi32, _mm512_dpbusd_epi32};

use pulp::Simd;
use pulp::bytemuck::cast;
use pulp::x86::{V3, V4};

use super::bytes::{
    ByteKernel, ByteProducts, ByteVisitor, Order, PROOF, Vector, WordBlock, for_each_part, part_of, row_of,
};
use super::prefetch::{self, ALL, Ahead, HALF, NOTHING, Share};
use crate::isa::{Isa, IsaName};

/// Vectors with dot products of bytes.
pub(super) trait ByteDots: Copy {
    /// The vectors.
    type Simd: Simd;

    /// The proof of them.
    fn simd(self) -> Self::Simd;

    /// `sum + Σ_t words.byte(t)·bytes.byte(t)` in each lane, the first unsigned and the second signed, modulo 2³².
    fn add_dots(
        self,
        sum: <Self::Simd as Simd>::u32s,
        words: <Self::Simd as Simd>::u32s,
        bytes: <Self::Simd as Simd>::u32s,
    ) -> <Self::Simd as Simd>::u32s;
}

/// AVX-512 with VNNI: a value stands in its shell only.
#[derive(Debug, Clone, Copy)]
struct Wide(V4);

impl ByteDots for Wide {
    type Simd = V4;

    #[inline(always)]
    fn simd(self) -> V4 {
        self.0
    }

    #[inline(always)]
    fn add_dots(self, sum: pulp::u32x16, words: pulp::u32x16, bytes: pulp::u32x16) -> pulp::u32x16 {
        // SAFETY: a value of this type is made after its set was found only.
        cast(unsafe { _mm512_dpbusd_epi32(cast(sum), cast(words), cast(bytes)) })
    }
}

/// AVX2 with VNNI: a value stands in its shell only.
#[derive(Debug, Clone, Copy)]
struct Narrow(V3);

impl ByteDots for Narrow {
    type Simd = V3;

    #[inline(always)]
    fn simd(self) -> V3 {
        self.0
    }

    #[inline(always)]
    fn add_dots(self, sum: pulp::u32x8, words: pulp::u32x8, bytes: pulp::u32x8) -> pulp::u32x8 {
        // SAFETY: a value of this type is made after its set was found only.
        cast(unsafe { _mm256_dpbusd_avx_epi32(cast(sum), cast(words), cast(bytes)) })
    }
}

/// The products of a block as dot products.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dots<D>(pub(super) D);

impl<D: ByteDots> ByteProducts for Dots<D> {
    type Simd = D::Simd;
    const LEFT: Order = Order::Bytes;

    #[inline(always)]
    fn simd(self) -> D::Simd {
        self.0.simd()
    }

    #[inline(always)]
    unsafe fn add_block<const P: usize, const H: usize, const W: usize, const VECS: usize>(
        self,
        sums: &mut [[[Vector<Self>; W]; H]; P],
        left: (*const u32, usize),
        block: WordBlock,
        ahead: Option<(Share, Ahead)>,
    ) {
        // SAFETY: the contract.
        unsafe {
            match ahead {
                Some((Share::All, ahead)) => self.add_words::<P, H, W, VECS, ALL>(sums, left, block, ahead),
                Some((Share::Half, ahead)) => self.add_words::<P, H, W, VECS, HALF>(sums, left, block, ahead),
                None => self.add_words::<P, H, W, VECS, NOTHING>(sums, left, block, Ahead::from(block.ptr)),
            }
        }
    }

    #[inline(always)]
    unsafe fn add_nibbles<const H: usize, const VECS: usize>(
        self,
        sums: &mut [[Vector<Self>; VECS]; H],
        (left, row_words): (*const u32, usize),
        block: WordBlock,
    ) {
        let simd = self.simd();
        let lowest = simd.splat_u32s(0x0f0f_0f0f);
        let mut local = *sums;
        for_each_part::<H>(
            block.words,
            2,
            #[inline(always)]
            |q, odd| {
                // SAFETY: the contract on the block.
                let row = unsafe { part_of::<D::Simd, VECS, VECS>(simd, block.ptr, q, (4 * odd, lowest)) };
                for (i, sums) in local.iter_mut().enumerate() {
                    // SAFETY: the contract on the left operand.
                    let bytes = simd.splat_u32s(unsafe { *left.wrapping_add(i * row_words + 2 * q + odd) });
                    for (sum, row) in sums.iter_mut().zip(row) {
                        *sum = self.0.add_dots(*sum, row, bytes);
                    }
                }
            },
        );
        *sums = local;
    }
}

impl<D: ByteDots> Dots<D> {
    /// As [`ByteProducts::add_block`].
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn add_words<
        const P: usize,
        const H: usize,
        const W: usize,
        const VECS: usize,
        const AHEAD: usize,
    >(
        self,
        sums: &mut [[[Vector<Self>; W]; H]; P],
        (mut left, row_words): (*const u32, usize),
        block: WordBlock,
        mut ahead: Ahead,
    ) {
        let simd = self.0.simd();
        let mut local = *sums;
        for q in 0..block.words {
            ahead.fetch_share::<AHEAD>(const { P * (VECS * D::Simd::F32_LANES).div_ceil(prefetch::LINE) });
            for (panel, sums) in local.iter_mut().enumerate() {
                let words = block.ptr.wrapping_add(panel * block.panel_stride);
                // SAFETY: the contract on the block.
                let row = unsafe { row_of::<D::Simd, W, VECS>(words, q) };
                for (i, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: the contract on the left operand.
                    let bytes = simd.splat_u32s(unsafe { *left.wrapping_add(i * row_words) });
                    for (sum, row) in sums.iter_mut().zip(row) {
                        *sum = self.0.add_dots(*sum, row, bytes);
                    }
                }
            }
            left = left.wrapping_add(1);
        }
        *sums = local;
    }
}

/// Runs `visitor` with the kernel of a set that has dot products of bytes.
///
/// # Panics
/// When `isa` has none.
pub(super) fn enter<V: ByteVisitor>(isa: Isa, visitor: V) {
    match isa.bytes() {
        // SAFETY: an Isa whose bytes are of that name is the proof that the CPU has VNNI, beside the vectors.
        IsaName::Avx512Vnni => unsafe { wide(Wide(V4::try_new().expect(PROOF)), visitor) },
        // SAFETY: as above.
        IsaName::Avx2Vnni => unsafe { narrow(Narrow(V3::try_new().expect(PROOF)), visitor) },
        other => unreachable!("{other} has no dot products of bytes"),
    }
}

/// The shell of AVX-512 with VNNI: pulp has none.
#[target_feature(
    enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,fma,bmi1,bmi2,lzcnt,popcnt"
)]
fn wide<V: ByteVisitor>(dots: Wide, visitor: V) {
    visitor.visit(ByteKernel::<_, 8, 3>(Dots(dots)));
}

/// The shell of AVX2 with VNNI.
#[target_feature(enable = "avx2,avxvnni,fma,bmi1,bmi2,lzcnt,popcnt")]
fn narrow<V: ByteVisitor>(dots: Narrow, visitor: V) {
    visitor.visit(ByteKernel::<_, 6, 2>(Dots(dots)));
}

/// Dot products in plain arithmetic, on any vectors: what the kernel does with bytes is tested where no CPU multiplies them.
#[cfg(test)]
pub(crate) mod plain {
    use pulp::WithSimd;

    use super::super::bytes::{lane, lane_mut};
    use super::*;

    #[derive(Debug, Clone, Copy)]
    struct Plain<S>(S);

    impl<S: Simd> ByteDots for Plain<S> {
        type Simd = S;

        #[inline(always)]
        fn simd(self) -> S {
            self.0
        }

        #[inline(always)]
        fn add_dots(self, mut sum: S::u32s, words: S::u32s, bytes: S::u32s) -> S::u32s {
            for j in 0..S::F32_LANES {
                let unsigned = lane::<S>(&words, j).to_le_bytes().map(i32::from);
                let signed = lane::<S>(&bytes, j).to_le_bytes().map(|byte| i32::from(byte as i8));
                let dot: i32 = unsigned.iter().zip(signed).map(|(u, s)| u * s).sum();
                let sum = lane_mut::<S>(&mut sum, j);
                *sum = sum.wrapping_add(dot as u32);
            }
            sum
        }
    }

    struct Shell<V>(V);

    impl<V: ByteVisitor> WithSimd for Shell<V> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            match S::F32_LANES {
                1 => self.0.visit(ByteKernel::<_, 4, 4>(Dots(Plain(simd)))),
                8 => self.0.visit(ByteKernel::<_, 6, 2>(Dots(Plain(simd)))),
                _ => self.0.visit(ByteKernel::<_, 8, 3>(Dots(Plain(simd)))),
            }
        }
    }

    /// Runs `visitor` with such a kernel, in the tiles of `isa`.
    pub(crate) fn with_plain_dots<V: ByteVisitor>(isa: Isa, visitor: V) {
        isa.dispatch(Shell(visitor));
    }
}
