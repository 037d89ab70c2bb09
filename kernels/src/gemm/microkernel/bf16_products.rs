//! Vectors with dot products of pairs of bf16 and conversions to bf16: AVX512-BF16, and plain arithmetic in its place for tests and beside an emulated tile unit.
//!
//! ```text
//! sum[j] += left[j].low · right[j].low + left[j].high · right[j].high        words: bf16(a) | bf16(b) << 16
//! ```
//! What the kernel does with them is in [`super::bf16_dots`].
//!
//! # Source
//! Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, `VDPBF16PS`, `VCVTNE2PS2BF16`.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "its proof exists on x86-64 only"))]

use pulp::Simd;
#[cfg(target_arch = "x86_64")]
use pulp::x86::V4;

/// Vectors with dot products of pairs of bf16.
pub(crate) trait Bf16Products: Copy {
    /// The vectors.
    type Simd: Simd;

    /// The proof of them.
    fn simd(self) -> Self::Simd;

    /// `sum + left.low·right.low + left.high·right.high` in each lane, as the text of [`super::bf16_dots`] says.
    fn add_dots(
        self,
        sum: <Self::Simd as Simd>::f32s,
        left: <Self::Simd as Simd>::u32s,
        right: <Self::Simd as Simd>::u32s,
    ) -> <Self::Simd as Simd>::f32s;

    /// Words of neighbours: word j holds elements 2j and 2j + 1, each as the nearest bf16, ties to even. What is beyond the range becomes the largest finite number when
    /// `FINITE`, else infinity, as the first part of `gemm::split`, for those who look for such elements themselves. Infinity and NaN stay what they are.
    #[inline(always)]
    fn along<const FINITE: bool>(self, elements: &[f32; 2 * WORDS]) -> [u32; WORDS] {
        let [first, second]: [[f32; WORDS]; 2] = pulp::bytemuck::cast(*elements);
        pulp::bytemuck::cast(self.rounded::<FINITE>(&first, &second))
    }

    /// Words across two rows: word j holds element j of both, rounded likewise.
    #[inline(always)]
    fn across<const FINITE: bool>(self, low: &[f32; WORDS], high: &[f32; WORDS]) -> [u32; WORDS] {
        self.interleaved(self.rounded::<FINITE>(low, high))
    }

    /// The halves of words, all of `first` and then all of `second`, as [`Bf16Products::along`] rounds them.
    fn rounded<const FINITE: bool>(self, first: &[f32; WORDS], second: &[f32; WORDS]) -> Halves;

    /// What is left of both after halves that [`Bf16Products::rounded`] made of them; exact.
    fn rest(self, halves: Halves, of: [[f32; WORDS]; 2]) -> [[f32; WORDS]; 2];

    /// Words across the first 16 halves and the last 16.
    fn interleaved(self, halves: Halves) -> [u32; WORDS];

    /// A square of words with rows and columns exchanged.
    fn transpose(self, square: &[[u32; WORDS]; WORDS], to: &mut [u32; WORDS * WORDS]);
}

/// 32 bf16.
pub(crate) type Halves = [u16; 2 * WORDS];

/// Words that are made at once.
pub(crate) const WORDS: usize = 16;

/// The largest f32 that rounds to the largest finite bf16.
const LARGEST: f32 = f32::from_bits(0x7f7f_7fff);

/// AVX-512 with dot products of bf16: a value stands in its shell only.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
pub(super) struct Wide(pub(super) V4);

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

    #[inline(always)]
    fn rounded<const FINITE: bool>(self, first: &[f32; WORDS], second: &[f32; WORDS]) -> Halves {
        use pulp::bytemuck::cast;
        use std::arch::x86_64::_mm512_cvtne2ps_pbh;
        let (mut first, mut second) = (cast(*first), cast(*second));
        if FINITE && (self.any_beyond(first) || self.any_beyond(second)) {
            (first, second) = (held(first), held(second));
        }
        // SAFETY: a value of this type is made after its set was found only; vectors of 512 bits all.
        unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(cast(second), cast(first))) }
    }

    #[inline(always)]
    fn rest(self, halves: Halves, [first, second]: [[f32; WORDS]; 2]) -> [[f32; WORDS]; 2] {
        use pulp::bytemuck::cast;
        use std::arch::x86_64::{__m256i, _mm512_cvtepu16_epi32, _mm512_slli_epi32, _mm512_sub_ps};
        let [low, high]: [__m256i; 2] = cast::<Halves, [pulp::u16x16; 2]>(halves).map(cast);
        // SAFETY: as above.
        unsafe {
            let wide = |halves| cast(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)));
            [cast(_mm512_sub_ps(cast(first), wide(low))), cast(_mm512_sub_ps(cast(second), wide(high)))]
        }
    }

    #[inline(always)]
    fn interleaved(self, halves: Halves) -> [u32; WORDS] {
        use std::arch::x86_64::_mm512_permutexvar_epi16;
        /// The halves of each word among 16 low and 16 high elements.
        const HALVES: Halves = {
            let (mut halves, mut j) = ([0; 2 * WORDS], 0);
            while j < WORDS {
                (halves[2 * j], halves[2 * j + 1]) = (j as u16, (WORDS + j) as u16);
                j += 1;
            }
            halves
        };
        // SAFETY: as above.
        pulp::bytemuck::cast(unsafe {
            _mm512_permutexvar_epi16(pulp::bytemuck::cast(HALVES), pulp::bytemuck::cast(halves))
        })
    }

    #[inline(always)]
    fn transpose(self, square: &[[u32; WORDS]; WORDS], to: &mut [u32; WORDS * WORDS]) {
        *to = pulp::bytemuck::cast(self.transposed(pulp::bytemuck::cast(*square)));
    }
}

#[cfg(target_arch = "x86_64")]
impl Wide {
    /// 64 instructions that interleave: words of neighbouring rows, then pairs of them, then quarters of vectors twice.
    #[inline(always)]
    fn transposed(self, rows: [std::arch::x86_64::__m512i; WORDS]) -> [std::arch::x86_64::__m512i; WORDS] {
        use std::arch::x86_64::{
            _mm512_shuffle_i32x4, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
            _mm512_unpacklo_epi64,
        };
        // SAFETY: a value of this type is made after its set was found only.
        unsafe {
            let mut pairs = rows;
            for i in (0..WORDS).step_by(2) {
                pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
                pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
            }
            // Quarter q of vector 4i + j: column 4q + j of rows 4i to 4i + 3.
            let mut fours = pairs;
            for i in (0..WORDS).step_by(4) {
                fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
                fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
                fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
                fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
            }
            let mut columns = fours;
            for j in 0..4 {
                let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
                let (even_ab, odd_ab) =
                    (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
                let (even_cd, odd_cd) =
                    (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
                columns[j] = _mm512_shuffle_i32x4::<0x88>(even_ab, even_cd);
                columns[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even_ab, even_cd);
                columns[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd_ab, odd_cd);
                columns[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd_ab, odd_cd);
            }
            columns
        }
    }

    /// Whether a lane rounds to infinity.
    #[inline(always)]
    fn any_beyond(self, x: pulp::f32x16) -> bool {
        use std::arch::x86_64::{_CMP_GT_OQ, _mm512_abs_ps, _mm512_cmp_ps_mask, _mm512_set1_ps};
        // SAFETY: as above.
        unsafe {
            let magnitudes = _mm512_abs_ps(pulp::bytemuck::cast(x));
            _mm512_cmp_ps_mask::<_CMP_GT_OQ>(magnitudes, _mm512_set1_ps(LARGEST)) != 0
        }
    }
}

/// With finite elements brought back into the range of finite bf16.
#[cfg(target_arch = "x86_64")]
#[cold]
#[inline(never)]
fn held(x: pulp::f32x16) -> pulp::f32x16 {
    let mut x: [f32; WORDS] = pulp::bytemuck::cast(x);
    for x in &mut x {
        if x.is_finite() {
            *x = x.clamp(-LARGEST, LARGEST);
        }
    }
    pulp::bytemuck::cast(x)
}

/// The same in plain arithmetic on other vectors, so that all around the instruction is tested where no CPU has it.
#[cfg(all(target_arch = "x86_64", any(test, feature = "testing")))]
pub(super) mod plain {
    use pulp::WithSimd;
    use pulp::x86::V3;

    use super::super::bf16_dots::{Bf16Kernel, Bf16Visitor};
    use super::super::bytes::lane;
    use super::*;
    use crate::gemm::quantise::bf16_bits;

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

        #[inline(always)]
        fn rounded<const FINITE: bool>(self, first: &[f32; WORDS], second: &[f32; WORDS]) -> Halves {
            std::array::from_fn(|j| nearest::<FINITE>(if j < WORDS { first[j] } else { second[j - WORDS] }))
        }

        #[inline(always)]
        fn rest(self, halves: Halves, of: [[f32; WORDS]; 2]) -> [[f32; WORDS]; 2] {
            std::array::from_fn(|row| {
                std::array::from_fn(|j| of[row][j] - f32::from_bits(u32::from(halves[row * WORDS + j]) << 16))
            })
        }

        #[inline(always)]
        fn interleaved(self, halves: Halves) -> [u32; WORDS] {
            std::array::from_fn(|j| u32::from(halves[j]) | u32::from(halves[WORDS + j]) << 16)
        }

        fn transpose(self, square: &[[u32; WORDS]; WORDS], to: &mut [u32; WORDS * WORDS]) {
            for (at, word) in to.iter_mut().enumerate() {
                *word = square[at % WORDS][at / WORDS];
            }
        }
    }

    /// The bf16 next to `x`, ties to even, a finite one when `FINITE`; infinity and NaN stay what they are, and what is below the least normal
    /// number is zero, as the instruction has it.
    fn nearest<const FINITE: bool>(x: f32) -> u16 {
        bf16_bits(flush(if FINITE && x.is_finite() { x.clamp(-LARGEST, LARGEST) } else { x })) as u16
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
    pub(in super::super) fn with_plain_dots<V: Bf16Visitor>(simd: V3, visitor: V) {
        Simd::vectorize(simd, Shell(Plain(simd), visitor));
    }
}
