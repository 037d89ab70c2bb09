//! f32 as a sum of bf16 parts, in whole tiles: what the tile unit multiplies.
//!
//! # Naive form
//! ```text
//! high = bf16(x);  middle = bf16(x - high);  low = bf16(x - high - middle)          ties to even
//! ```
//! # Accuracy
//! A bf16 has 8 significant bits, so the rest after one part is at most `2⁻⁸·|x|`, and after two at most `2⁻¹⁷·|x|` (the first rest is
//! below half of a last place of `high`; only a power of two reaches it, and that is a bf16). Three parts are all of x: what is left after
//! two has at most 7 significant bits. For a product x·y with |x·y| = 1 this gives
//!
//! | precision | products kept | left out, at most |
//! |---|---|---|
//! | `Medium` | high·high | `2·2⁻⁸ + 2⁻¹⁶` |
//! | `High` | and high·low, low·high | `2⁻¹⁶` (low·low) `+ 2·2⁻¹⁷` (what two parts miss, on each side) `= 2⁻¹⁵` (and `2⁻²⁴` of higher order) |
//! | `Highest` | and middle·middle, high·low, low·high of three parts | `2·2⁻⁸·2⁻¹⁷ + 2⁻³⁴ < 1.001·2⁻²⁴` |
//!
//! What the sums add for `Highest`: u = 2⁻²⁴. A step of 32 along k adds six partial sums to each element, and inside of the largest there
//! are 15 roundings of its two chains (the first product of a chain is exact) and one where they meet; those of the smaller products count 2⁻⁸ as much. With
//! s steps this is `(16 + 6·s)·u·(1 + 2⁻⁵)`, the products that were left out add `1.001·u`, and for k ≥ 32 both together stay below `k·u ≤ γ_k`:
//! the bound of f32 multiply-adds. Below 32 it would not, so `Highest` takes tiles from there on only.
//!
//! Tiles also take what they make for zero below 2⁻¹²⁶, in each of up to six products a step: `6·s·2⁻¹²⁶` more, where f32 multiply-adds lose `k·2⁻¹⁴⁹`.
//!
//! # Where parts do not do
//! Infinity and NaN have no rest, a number that rounds up to infinity has none either, and a number below 2⁻¹⁰³ may have
//! bits below 2⁻¹²⁶, the least normal number, which tiles take for zero. Rows of A and columns of B with such an element are found while they are converted, and what they make is
//! computed by fused multiply-adds, element by element (`gemm::tiles`).
//!
//! # Source
//! Henry, Tang and Heinecke, *Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations*, 2019.

use super::microkernel::Storage;
use super::microkernel::amx::{SIDE, STEP, TILE_WORDS};
use super::quantise::bf16_bits;

/// The smallest magnitude that rounds to infinity as bf16, as bits.
pub(super) const ROUNDS_TO_INFINITY: u32 = 0x7f7f_8000;
/// 2⁻¹⁰³ as bits: a smaller number may have bits below 2⁻¹²⁶, which tiles take for zero.
pub(super) const TINY: u32 = (127 - 103) << 23;

/// Words of one column, `depth` deep, in `parts` parts.
pub(crate) fn column_words(depth: usize, parts: usize) -> usize {
    depth.div_ceil(STEP) * (STEP / 2) * parts
}

/// The magnitudes of a row of A or a column of B, as bits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Magnitudes {
    largest: u32,
    /// Less 1, modulo 2³²: zero is no small number.
    smallest_less_one: u32,
}

impl Magnitudes {
    /// Those of no elements.
    pub(crate) const NONE: Magnitudes = Magnitudes { largest: 0, smallest_less_one: u32::MAX };

    /// Those of all `elements`.
    pub(crate) fn of(elements: &[f32]) -> Magnitudes {
        let mut magnitudes = Magnitudes::NONE;
        elements.iter().for_each(|x| magnitudes.add(*x));
        magnitudes
    }

    #[inline(always)]
    pub(crate) fn add(&mut self, x: f32) {
        let magnitude = x.to_bits() & 0x7fff_ffff;
        self.largest = self.largest.max(magnitude);
        self.smallest_less_one = self.smallest_less_one.min(magnitude.wrapping_sub(1));
    }

    /// Whether parts of that storage stand for all of the elements, as its precision asks.
    pub(crate) fn fit(self, storage: Storage) -> bool {
        match storage {
            Storage::Split3 => self.largest < ROUNDS_TO_INFINITY && self.smallest_less_one >= TINY - 1,
            Storage::Split2 => self.largest < ROUNDS_TO_INFINITY,
            _ => true,
        }
    }
}

/// The parts of `x` as f32; what is below the least normal number is zero, as the conversion has it.
fn parts_of<const P: usize>(x: f32) -> [f32; P] {
    let mut rest = x;
    std::array::from_fn(|_| {
        let flushed = if rest.abs() < f32::MIN_POSITIVE { 0.0 * rest } else { rest };
        let part = f32::from_bits(bf16_bits(flushed) << 16);
        rest -= part;
        part
    })
}

/// `x` as tiles see it: the sum of its first `parts` parts, without a rounding.
pub(super) fn sum_of_parts(x: f32, parts: usize) -> f32 {
    match parts {
        1 => parts_of::<1>(x).into_iter().sum(),
        2 => parts_of::<2>(x).into_iter().sum(),
        _ => parts_of::<3>(x).into_iter().sum(),
    }
}

/// Element (p, j) of a panel that [`super::tile_packing::pack_right`] made with `parts` parts: the sum of its parts, without a rounding.
#[inline(always)]
pub(super) fn right_element(tiles: &[u32], parts: usize, p: usize, j: usize) -> f32 {
    let tile = p / STEP * parts * 2 + j / SIDE;
    let at = p % STEP / 2 * SIDE + j % SIDE;
    (0..parts)
        .map(
            #[inline(always)]
            |part| {
                let word = tiles[(tile + 2 * part) * TILE_WORDS + at];
                f32::from_bits(if p.is_multiple_of(2) { word << 16 } else { word & 0xffff_0000 })
            },
        )
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::uniform;

    fn within(x: f32, parts: &[f32], bound: f64) {
        let sum: f64 = parts.iter().map(|part| f64::from(*part)).sum();
        assert!((f64::from(x) - sum).abs() <= bound * f64::from(x).abs(), "{x:e}: {parts:?}");
    }

    #[test]
    fn parts_stand_for_a_number_within_their_bounds() {
        let edges =
            [1.0, 1.0 - f32::EPSILON / 2.0, 1.0 + f32::EPSILON, 1.003_906_2, 3.389e38, 9.9e-32, 0.0, -0.0];
        for x in uniform(20_000, 3).into_iter().chain(edges) {
            within(x, &parts_of::<1>(x), f64::powi(2.0, -8));
            within(x, &parts_of::<2>(x), f64::powi(2.0, -17));
            within(x, &parts_of::<3>(x), 0.0);
            assert!(parts_of::<3>(x).iter().all(|part| part.to_bits() & 0xffff == 0));
        }
        assert_eq!(parts_of::<1>(f32::INFINITY), [f32::INFINITY]);
        assert!(parts_of::<1>(f32::NAN)[0].is_nan());
    }

    #[test]
    fn magnitudes_tell_where_parts_do_not_do() {
        let fit = |x: f32, storage| {
            let mut magnitudes = Magnitudes::NONE;
            [1.0, 0.0, x].into_iter().for_each(|x| magnitudes.add(x));
            magnitudes.fit(storage)
        };
        for (x, in_two, in_three) in [
            (-2.5, true, true),
            (0.0, true, true),
            (f32::INFINITY, false, false),
            (f32::NAN, false, false),
            (-f32::MAX, false, false),
            (f32::from_bits(ROUNDS_TO_INFINITY - 1), true, true),
            (f32::from_bits(TINY), true, true),
            (-f32::from_bits(TINY - 1), true, false),
            (f32::from_bits(1), true, false),
        ] {
            assert_eq!((fit(x, Storage::Split2), fit(x, Storage::Split3)), (in_two, in_three), "{x:e}");
            assert!(fit(x, Storage::Bf16));
        }
    }
}
