//! How the elements of a right operand are stored, and how a kernel reads them as f32.
//!
//! ```text
//! word[q][j] holds b[PER_WORD·q][j], b[PER_WORD·q + 1][j], …      32 bits, the first element lowest
//! ```
//! A word belongs to one column, so a vector of words widens to a vector of columns by what every SIMD set can
//! do lane by lane: no shuffle, and one body for all sets. It is also the order that dot-product
//! instructions (pairs of bf16, fours of int8) read.
//!
//! A scaled format stores integers, in groups along k: each group of a panel begins with a row of f32
//! words, the columns' scales, and its words follow. The kernel multiplies the group's sum once, so an element
//! of C is the chain of the group sums: fewer roundings than a chain over k has.
//!
//! # Deviation
//! No SIMD set of [`pulp`] converts integers, and a conversion would want a sign extension before it. Integers
//! are stored with an offset instead, so that their bits can be put into the mantissa of a power of two `2^e` whose
//! last place at them is 1; subtracting `2^e` plus the offset is exact. AND, OR and a subtraction run on more ports
//! than two shifts and a conversion do. AVX-512 looks integers of four bits up instead, in a register that holds all sixteen.

use pulp::Simd;

use crate::gemm::WeightFormat;

/// A way to store elements. The implementors are names without values.
pub(crate) trait Stored: Copy {
    /// Its row in the table of kernels.
    const STORAGE: Storage;
    /// Consecutive elements of a column in one word.
    const PER_WORD: usize;
    /// Whether groups of words begin with scales.
    const SCALED: bool;

    /// Element `at` of each word.
    fn widen<S: Simd>(simd: S, words: S::u32s, at: usize) -> S::f32s;

    /// Calls `each` with every element of each word, in their order.
    #[inline(always)]
    fn for_each<S: Simd, const W: usize>(
        simd: S,
        words: [S::u32s; W],
        mut each: impl FnMut(usize, [S::f32s; W]),
    ) {
        for at in 0..Self::PER_WORD {
            let mut row = [simd.splat_f32s(0.0); W];
            for (row, words) in row.iter_mut().zip(words) {
                *row = Self::widen(simd, words, at);
            }
            each(at, row);
        }
    }

    /// The same with the fewest constants, for a pass that does nothing else.
    #[inline(always)]
    fn widen_alone<S: Simd>(simd: S, words: S::u32s, at: usize) -> S::f32s {
        Self::widen(simd, words, at)
    }
}

/// What a word holds: the part of a [`WeightFormat`] that decides which kernel runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Storage {
    /// One f32.
    F32,
    /// Two bf16.
    Bf16,
    /// Four integers of 8 bits.
    Int8,
    /// Eight integers of 4 bits.
    Int4,
    /// Two bf16, and as many words again for what they leave: an f32 to 2⁻¹⁷.
    Split2,
    /// Three times two bf16: all of an f32.
    Split3,
    /// Four integers of 7 bits, a byte each: rows of a left operand alone.
    Int7,
}

impl Storage {
    /// Consecutive elements of a column in one word.
    pub(crate) const fn per_word(self) -> usize {
        match self {
            Storage::F32 => 1,
            Storage::Bf16 | Storage::Split2 | Storage::Split3 => 2,
            Storage::Int8 | Storage::Int7 => 4,
            Storage::Int4 => 8,
        }
    }

    /// How many words hold an element together.
    pub(crate) const fn parts(self) -> usize {
        match self {
            Storage::Split2 => 2,
            Storage::Split3 => 3,
            _ => 1,
        }
    }

    /// The largest integer that is stored; 0 where none is. The smallest is its negative.
    pub(crate) const fn largest(self) -> u32 {
        match self {
            Storage::F32 | Storage::Bf16 | Storage::Split2 | Storage::Split3 => 0,
            Storage::Int8 => 127,
            Storage::Int7 => 63,
            Storage::Int4 => 7,
        }
    }
}

impl WeightFormat {
    /// What a word of it holds.
    pub fn storage(self) -> Storage {
        match self {
            WeightFormat::F32 => Storage::F32,
            WeightFormat::Bf16 => Storage::Bf16,
            WeightFormat::Int8 => Storage::Int8,
            WeightFormat::Int4 { .. } => Storage::Int4,
        }
    }
}

/// Words that are f32.
#[derive(Debug, Clone, Copy)]
pub(crate) struct F32;

impl Stored for F32 {
    const STORAGE: Storage = Storage::F32;
    const PER_WORD: usize = 1;
    const SCALED: bool = false;

    #[inline(always)]
    fn widen<S: Simd>(simd: S, words: S::u32s, _: usize) -> S::f32s {
        simd.transmute_f32s_u32s(words)
    }
}

/// Words that were widened to f32 in scratch, in groups with their scales.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Widened;

impl Stored for Widened {
    const STORAGE: Storage = Storage::F32;
    const PER_WORD: usize = 1;
    const SCALED: bool = true;

    #[inline(always)]
    fn widen<S: Simd>(simd: S, words: S::u32s, _: usize) -> S::f32s {
        simd.transmute_f32s_u32s(words)
    }
}

/// Pairs of bf16, the upper halves of f32.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bf16;

impl Stored for Bf16 {
    const STORAGE: Storage = Storage::Bf16;
    const PER_WORD: usize = 2;
    const SCALED: bool = false;

    #[inline(always)]
    fn widen<S: Simd>(simd: S, words: S::u32s, at: usize) -> S::f32s {
        let upper = if at == 0 {
            simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(16))
        } else {
            simd.and_u32s(words, simd.splat_u32s(0xffff_0000))
        };
        simd.transmute_f32s_u32s(upper)
    }
}

/// Fours of integers plus 128.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Int8;

impl Stored for Int8 {
    const STORAGE: Storage = Storage::Int8;
    const PER_WORD: usize = 4;
    const SCALED: bool = true;

    #[inline(always)]
    fn widen<S: Simd>(simd: S, words: S::u32s, at: usize) -> S::f32s {
        widen_integer::<S, 8, 1>(simd, words, at)
    }

    #[inline(always)]
    fn for_each<S: Simd, const W: usize>(
        simd: S,
        words: [S::u32s; W],
        mut each: impl FnMut(usize, [S::f32s; W]),
    ) {
        each(0, bytes(simd, words, 0));
        each(1, bytes(simd, words, 1));
        each(2, bytes(simd, words, 2));
        each(3, bytes(simd, words, 3));
    }
}

/// Eights of integers plus 8.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Int4;

impl Stored for Int4 {
    const STORAGE: Storage = Storage::Int4;
    const PER_WORD: usize = 8;
    const SCALED: bool = true;

    #[inline(always)]
    fn widen<S: Simd>(simd: S, words: S::u32s, at: usize) -> S::f32s {
        widen_integer::<S, 4, 4>(simd, words, at)
    }

    #[inline(always)]
    fn for_each<S: Simd, const W: usize>(
        simd: S,
        words: [S::u32s; W],
        mut each: impl FnMut(usize, [S::f32s; W]),
    ) {
        each(0, nibbles(simd, words, 0));
        each(1, nibbles(simd, words, 1));
        each(2, nibbles(simd, words, 2));
        each(3, nibbles(simd, words, 3));
        each(4, nibbles(simd, words, 4));
        each(5, nibbles(simd, words, 5));
        each(6, nibbles(simd, words, 6));
        each(7, nibbles(simd, words, 7));
    }

    #[inline(always)]
    fn widen_alone<S: Simd>(simd: S, words: S::u32s, at: usize) -> S::f32s {
        widen_integer::<S, 4, 1>(simd, words, at)
    }
}

/// Element `at` of each word of integers of 8 bits, where there are registers for the constants of two places.
#[inline(always)]
fn bytes<S: Simd, const W: usize>(simd: S, words: [S::u32s; W], at: usize) -> [S::f32s; W] {
    let mut row = [simd.splat_f32s(0.0); W];
    for (row, words) in row.iter_mut().zip(words) {
        *row = widen_integer::<S, 8, 2>(simd, words, at);
    }
    row
}

/// Element `at` of each word of integers of 4 bits, looked up.
#[inline(always)]
fn nibbles<S: Simd, const W: usize>(simd: S, words: [S::u32s; W], at: usize) -> [S::f32s; W] {
    let mut row = [simd.splat_f32s(0.0); W];
    for (row, words) in row.iter_mut().zip(words) {
        *row = look_up(simd, words, at);
    }
    row
}

/// Integer `at` of four bits of each word, less 8. Sixteen lanes are a table of all of them: a permutation looks at the lowest four bits of its indices alone, so a
/// shift and the permutation stand for a shift, an AND, an OR and a subtraction.
#[inline(always)]
fn look_up<S: Simd>(simd: S, words: S::u32s, at: usize) -> S::f32s {
    #[cfg(target_arch = "x86_64")]
    if const { S::F32_LANES == 16 } {
        use std::arch::x86_64::_mm512_permutexvar_ps;

        use pulp::bytemuck::cast;

        const INTEGERS: [f32; 16] =
            [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
        let indices =
            if at == 0 { words } else { simd.wrapping_dyn_shr_u32s(words, simd.splat_u32s(4 * at as u32)) };
        // SAFETY: no set but AVX-512 has vectors of sixteen lanes on this architecture, and `simd` is the proof that the CPU has it.
        return cast(unsafe { _mm512_permutexvar_ps(cast(indices), cast(INTEGERS)) });
    }
    Int4::widen(simd, words, at)
}

/// Bits `BITS·at ..` of each word, less `2^(BITS − 1)`. PLACES neighbours are taken out of the word after one shift.
///
/// Each place has constants of its own (a mask, a power, an offset), so more places are fewer shifts and more
/// registers. With one for bytes a tile keeps its words in registers: 1.1 times as fast for one row, 1.3 for four, 1.7 for
/// 128 as with two. For nibbles four are best, by 1.05 before one and 1.6 before two (docs/decisions/002-gemm.md).
#[inline(always)]
fn widen_integer<S: Simd, const BITS: usize, const PLACES: usize>(
    simd: S,
    words: S::u32s,
    at: usize,
) -> S::f32s {
    let (shift, place) = ((BITS * (at - at % PLACES)) as u32, (BITS * (at % PLACES)) as u32);
    let words = if shift == 0 { words } else { simd.wrapping_dyn_shr_u32s(words, simd.splat_u32s(shift)) };
    let alone = shift as usize + BITS == 32;
    let mask = simd.splat_u32s(((1u32 << BITS) - 1) << place);
    let integer = if alone { words } else { simd.and_u32s(words, mask) };
    let power = f32::from_bits((127 + 23 - place) << 23);
    let bits = simd.or_u32s(integer, simd.splat_u32s(power.to_bits()));
    let offset = power + (1u32 << (BITS - 1)) as f32;
    simd.sub_f32s(simd.transmute_f32s_u32s(bits), simd.splat_f32s(offset))
}
