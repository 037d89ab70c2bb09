//! The kernel of bf16 × bf16 products with sums in f32, by dot products of pairs (AVX512-BF16).
//!
//! # Naive form
//! ```text
//! for i in 0..MR { for j in 0..NR { for q in 0..words {
//!     acc[i][j] += lhs[i][2·q] * rhs[2·q][j] + lhs[i][2·q + 1] * rhs[2·q + 1][j]
//! } } }
//! ```
//! # Deviations
//! - `vdpbf16ps` does the inner line for 16 columns. Both operands are bf16, so a product is exact in f32; the two
//!   products of a pair join the sum with at most two roundings, to nearest. Operands and results below 2⁻¹²⁶ count as zero,
//!   whatever the thread's rounding mode says. So an element is one chain over the words of a block of K, with at most
//!   as many roundings as the chain of f32 has, but not its bits.
//! - The words of rhs are those that lie for the kernel with an A in f32: pairs along k. The left operand lies as such words too,
//!   rounded before (`gemm::bf16_pairs`): one load and one broadcast feed 32 multiply-adds a vector.
//! - The tile is that of f32: 24 sums, 3 vectors of words and a broadcast of 32 registers.
//! - As with other words of several elements there are few instances: panels are NR wide, and the epilogue is that of ragged tiles.
//!
//! Not done: one or two rows have 3 or 6 chains, which is less than hides the instruction's latency (6 cycles in Intel's
//! tables). Weights in memory are read more slowly than that. Nothing here has been timed: the machine at hand has no such instruction.
//!
//! # Source
//! Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, `VDPBF16PS`.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "its proof exists on x86-64 only"))]

use pulp::Simd;
#[cfg(target_arch = "x86_64")]
use pulp::x86::V4;

use super::finish::Tile;
use super::{Bf16, Finish, Out};
use crate::isa::Bf16Dots;

/// Vectors with dot products of pairs of bf16.
pub(crate) trait Bf16Products: Copy {
    /// The vectors.
    type Simd: Simd;

    /// The proof of them.
    fn simd(self) -> Self::Simd;

    /// `sum + left.low·right.low + left.high·right.high` in each lane, as the module's text says.
    fn add_dots(
        self,
        sum: <Self::Simd as Simd>::f32s,
        left: <Self::Simd as Simd>::u32s,
        right: <Self::Simd as Simd>::u32s,
    ) -> <Self::Simd as Simd>::f32s;
}

/// AVX-512 with dot products of bf16: a value stands in its shell only.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
struct Wide(V4);

#[cfg(target_arch = "x86_64")]
impl Bf16Products for Wide {
    type Simd = V4;

    #[inline(always)]
    fn simd(self) -> V4 {
        self.0
    }

    #[inline(always)]
    fn add_dots(self, sum: pulp::f32x16, left: pulp::u32x16, right: pulp::u32x16) -> pulp::f32x16 {
        use std::arch::x86_64::{__m512bh, _mm512_dpbf16_ps};
        // SAFETY: vectors of 512 bits all; a value of this type is made after its set was found only.
        unsafe {
            let [left, right] = [left, right].map(
                #[inline(always)]
                |words| std::mem::transmute::<pulp::u32x16, __m512bh>(words),
            );
            pulp::bytemuck::cast(_mm512_dpbf16_ps(pulp::bytemuck::cast(sum), left, right))
        }
    }
}

/// One panel of C over one block of K.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bf16Strip<'a> {
    /// Row-major, `words` words a row.
    pub(crate) lhs: &'a [u32],
    pub(crate) words: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Rows of NR words.
    pub(crate) rhs: *const u32,
    pub(crate) out: Out<f32>,
    pub(crate) finish: Finish<'a>,
}

/// The kernel with tiles of 8 rows and VECS vectors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bf16Kernel<D, const VECS: usize>(D);

/// Something to be done with the kernel, inside its shell.
pub(crate) trait Bf16Visitor {
    /// Does it. Must be `#[inline(always)]`, or it is compiled outside of the shell.
    fn visit<D: Bf16Products, const VECS: usize>(self, kernel: Bf16Kernel<D, VECS>);
}

/// Runs `visitor` with the kernel.
pub(crate) fn with_bf16_kernel<V: Bf16Visitor>(proof: Bf16Dots, visitor: V) {
    match proof {
        // SAFETY: the value is the proof that the CPU has the instruction, beside the vectors.
        #[cfg(target_arch = "x86_64")]
        Bf16Dots::Wide(simd, _) => unsafe { wide(Wide(simd), visitor) },
        #[cfg(all(test, target_arch = "x86_64"))]
        Bf16Dots::Emulated(simd) => plain::with_plain_dots(simd, visitor),
        #[cfg(not(target_arch = "x86_64"))]
        Bf16Dots::Never(never) => {
            _ = visitor;
            match never {}
        }
    }
}

/// The shell of AVX-512 with bf16: pulp has none.
#[cfg(target_arch = "x86_64")]
#[target_feature(
    enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,fma,bmi1,bmi2,lzcnt,popcnt"
)]
fn wide<V: Bf16Visitor>(dots: Wide, visitor: V) {
    visitor.visit(Bf16Kernel::<_, 3>(dots));
}

impl<D: Bf16Products, const VECS: usize> Bf16Kernel<D, VECS> {
    pub(crate) const MR: usize = 8;
    pub(crate) const NR: usize = VECS * D::Simd::F32_LANES;

    /// Computes one strip.
    ///
    /// # Safety
    /// - `rhs` reaches `words` rows of NR readable words;
    /// - `out` reaches `rows × cols` elements that no one else uses meanwhile, readable if `finish.add` is set;
    /// - bias, gate and residual, if any, have `cols` elements and `rows × cols`.
    #[inline(always)]
    pub(crate) unsafe fn run(self, strip: &Bf16Strip<'_>) {
        debug_assert!((1..=Self::NR).contains(&strip.cols));
        assert!(strip.lhs.len() >= strip.rows * strip.words);
        let full = strip.rows / Self::MR * Self::MR;
        for first in (0..full).step_by(Self::MR) {
            // SAFETY: the contract, here and below; these are rows of the strip.
            unsafe { self.tile::<8>(first, strip) };
        }
        // SAFETY: see above.
        unsafe {
            match strip.rows - full {
                0 => {}
                1 => self.tile::<1>(full, strip),
                2 => self.tile::<2>(full, strip),
                3 => self.tile::<3>(full, strip),
                4 => self.tile::<4>(full, strip),
                5 => self.tile::<5>(full, strip),
                6 => self.tile::<6>(full, strip),
                _ => self.tile::<7>(full, strip),
            }
        }
    }

    /// The tile of H rows that starts at row `first`.
    ///
    /// # Safety
    /// As [`Bf16Kernel::run`]; the rows are rows of the strip.
    #[inline(always)]
    unsafe fn tile<const H: usize>(self, first: usize, strip: &Bf16Strip<'_>) {
        let (simd, words) = (self.0.simd(), strip.words);
        let left = strip.lhs[first * words..(first + H) * words].as_ptr();
        let mut acc = [[simd.splat_f32s(0.0); VECS]; H];
        for q in 0..words {
            let right = strip.rhs.wrapping_add(q * Self::NR).cast::<<D::Simd as Simd>::u32s>();
            let mut row = [simd.splat_u32s(0); VECS];
            for (w, row) in row.iter_mut().enumerate() {
                // SAFETY: the contract on `rhs`.
                *row = unsafe { right.add(w).read_unaligned() };
            }
            for (i, acc) in acc.iter_mut().enumerate() {
                // SAFETY: `left` has H rows of `words` words.
                let pair = simd.splat_u32s(unsafe { *left.add(i * words + q) });
                for (acc, row) in acc.iter_mut().zip(row) {
                    *acc = self.0.add_dots(*acc, pair, row);
                }
            }
        }
        // SAFETY: the contract on `out`, bias, gate and residual.
        unsafe { Tile { simd, acc }.finish::<Bf16>(first, strip.cols, &strip.finish, strip.out) };
    }
}

/// The same in plain arithmetic on other vectors, so that all around the instruction is tested where no CPU has it.
#[cfg(all(test, target_arch = "x86_64"))]
mod plain {
    use pulp::WithSimd;
    use pulp::x86::V3;

    use super::super::bytes::lane;
    use super::*;

    #[derive(Debug, Clone, Copy)]
    struct Plain(V3);

    /// What is below the least normal number counts as zero.
    #[inline(always)]
    fn flush(x: f32) -> f32 {
        if x.abs() < f32::MIN_POSITIVE { 0.0 * x } else { x }
    }

    impl Bf16Products for Plain {
        type Simd = V3;

        #[inline(always)]
        fn simd(self) -> V3 {
            self.0
        }

        #[inline(always)]
        fn add_dots(self, sum: pulp::f32x8, left: pulp::u32x8, right: pulp::u32x8) -> pulp::f32x8 {
            let mut sums: [f32; 8] = pulp::bytemuck::cast(sum);
            for (j, sum) in sums.iter_mut().enumerate() {
                let (left, right) = (lane::<V3>(&left, j), lane::<V3>(&right, j));
                let [low, high] = [(left << 16, right << 16), (left & 0xffff_0000, right & 0xffff_0000)];
                for (left, right) in [high, low] {
                    let (left, right) = (f32::from_bits(left), f32::from_bits(right));
                    *sum = flush(flush(left).mul_add(flush(right), flush(*sum)));
                }
            }
            pulp::bytemuck::cast(sums)
        }
    }

    struct Shell<V>(Plain, V);

    impl<V: Bf16Visitor> WithSimd for Shell<V> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            self.1.visit(Bf16Kernel::<_, 6>(self.0));
        }
    }

    /// Runs `visitor` with such a kernel, whose panels are as wide as those of the CPU's.
    pub(super) fn with_plain_dots<V: Bf16Visitor>(simd: V3, visitor: V) {
        Simd::vectorize(simd, Shell(Plain(simd), visitor));
    }
}
