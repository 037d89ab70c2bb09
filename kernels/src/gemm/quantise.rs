//! Weights in fewer bits than f32: the formats, and how an element becomes what is stored.
//!
//! # Naive form
//! ```text
//! bf16:    stored[p][j] = b[p][j] rounded to 8 significant bits, ties to even
//! integer: scale[g][j]  = max over the group of |b[p][j]| / largest, rounded up to 16 significant bits
//!          stored[p][j] = scale[g][j] · round(b[p][j] / scale[g][j])
//! ```
//! The scales have 16 bits so that a stored element is an f32 without another rounding: 8 bits of an integer and 16 of
//! its scale.

use super::microkernel::Storage;
use super::pack::Element;
use crate::error::ShapeError;
use crate::view::MatRef;

/// How [`PackedWeights`](super::PackedWeights) store their elements.
///
/// | format | bits an element | largest difference from the given element `x` |
/// |---|---|---|
/// | `F32` | 32 | 0 |
/// | `Bf16` | 16 | `2⁻⁸·\|x\|` |
/// | `Int8` | 8, and 32 a column and block of K | `max\|column\|/254·(1 + 2⁻¹⁴)` |
/// | `Int4` | 4, and 32 a column and group | `max\|group\|/14·(1 + 2⁻¹⁴)` |
///
/// (`Bf16` for normal `x` that do not round to infinity; the integer formats have `2⁻¹²⁷` for tinier elements.)
/// Asserted by `gemm::tests::stored::what_is_stored_is_within_the_bound_of_its_format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum WeightFormat {
    /// As they are.
    #[default]
    F32,
    /// The upper half of an f32, rounded to nearest, ties to even.
    Bf16,
    /// Integers of 8 bits and one scale for each column (output channel).
    Int8,
    /// Integers of 4 bits and one scale for each column and each `group` elements along k.
    Int4 {
        /// Elements of a column that share a scale: a positive multiple of 8.
        group: usize,
    },
}

impl WeightFormat {
    /// `Ok` when its numbers make sense.
    pub(super) fn check_numbers(self) -> Result<(), ShapeError> {
        if let WeightFormat::Int4 { group } = self
            && (group == 0 || !group.is_multiple_of(Storage::Int4.per_word()))
        {
            let expected = "a positive multiple of 8";
            return Err(ShapeError::Value { argument: "format.group", value: group.to_string(), expected });
        }
        Ok(())
    }

    /// `Ok` when the elements of `b` can be stored so.
    pub(super) fn check_elements<T: Element>(self, b: MatRef<'_, T>) -> Result<(), ShapeError> {
        if self.storage().largest() == 0 {
            return Ok(());
        }
        for p in 0..b.rows() {
            for j in 0..b.cols() {
                let x = b.at(p, j).widen();
                if x.is_nan() || x.abs() > f32::MAX / 2.0 {
                    let value = format!("{x} at ({p}, {j})");
                    let expected = "finite and at most half of the largest f32 for an integer format";
                    return Err(ShapeError::Value { argument: "b", value, expected });
                }
            }
        }
        Ok(())
    }
}

/// The scale with which integers up to `largest` reach `max`: rounded up to 16 significant bits.
pub(crate) fn scale_of(max: f32, largest: u32) -> f32 {
    let least = (max / largest as f32).max(f32::MIN_POSITIVE);
    f32::from_bits((least.to_bits() + 0xff) & !0xff)
}

/// The bits of `x` in a word of that storage, lowest first. `scale` is used by the integers alone.
pub(crate) fn encode(storage: Storage, x: f32, scale: f32) -> u32 {
    match storage {
        Storage::F32 => x.to_bits(),
        Storage::Bf16 => bf16_bits(x),
        Storage::Int8 | Storage::Int4 => {
            let largest = storage.largest();
            let limit = largest as f32;
            // What was rounded here stays above the lower limit; given integers may reach it.
            let integer = (x / scale).round_ties_even().clamp(-limit - 1.0, limit) as i32;
            (integer + largest as i32 + 1) as u32
        }
        Storage::Split2 | Storage::Split3 => unreachable!("parts are made by gemm::split"),
        Storage::Int7 => unreachable!("no weights are stored so"),
    }
}

/// Element `at` of a word: the inverse of [`encode`] but for its rounding.
pub(super) fn decode(storage: Storage, word: u32, at: usize, scale: f32) -> f32 {
    let bits = 32 / storage.per_word() as u32;
    let field = word >> (bits * at as u32);
    match storage {
        Storage::F32 => f32::from_bits(word),
        Storage::Bf16 => f32::from_bits(field << 16),
        Storage::Int8 | Storage::Int4 => {
            let integer = (field & ((1 << bits) - 1)) as i32 - storage.largest() as i32 - 1;
            integer as f32 * scale
        }
        Storage::Split2 | Storage::Split3 => unreachable!("parts are read by gemm::split"),
        Storage::Int7 => unreachable!("no weights are stored so"),
    }
}

/// The bf16 next to `x`, ties to even; a NaN stays one.
#[inline(always)]
pub(super) fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    // Without a branch, so that a loop over it becomes vectors; a NaN may wrap around, and is not taken.
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { (bits >> 16) | 0x40 } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_to_nearest_ties_to_even() {
        let of = |bits: u32| bf16_bits(f32::from_bits(bits));
        assert_eq!(of(0x3f80_8000), 0x3f80);
        assert_eq!(of(0x3f81_8000), 0x3f82);
        assert_eq!(of(0x3f80_8001), 0x3f81);
        assert_eq!(of(0x7f7f_ffff), 0x7f80);
        assert_eq!(bf16_bits(f32::NEG_INFINITY), 0xff80);
        assert!(f32::from_bits(bf16_bits(f32::NAN) << 16).is_nan());
        assert!(f32::from_bits(of(0x7f80_0001) << 16).is_nan());
    }

    #[test]
    fn a_scale_reaches_its_maximum_and_has_sixteen_bits() {
        for max in [1.0f32, 0.3, 127.0, 1e-30, 3e37, 0.0] {
            for largest in [7, 127] {
                let scale = scale_of(max, largest);
                assert_eq!(scale.to_bits() & 0xff, 0);
                assert!(f64::from(scale) * f64::from(largest) >= f64::from(max) * (1.0 - 1e-7));
                assert!(scale <= (max / largest as f32).max(f32::MIN_POSITIVE) * (1.0 + 1.0 / 16384.0));
            }
        }
        assert_eq!(scale_of(127.0, 127), 1.0);
    }

    #[test]
    fn every_integer_is_decoded_from_where_it_stands() {
        for storage in [Storage::Int8, Storage::Int4] {
            let (largest, bits) = (storage.largest() as i32, 32 / storage.per_word());
            for integer in -largest..=largest {
                for at in 0..storage.per_word() {
                    let word = encode(storage, integer as f32 * 0.5, 0.5) << (bits * at);
                    assert_eq!(decode(storage, word, at, 0.5), integer as f32 * 0.5);
                }
            }
        }
    }
}
