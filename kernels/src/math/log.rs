//! The natural logarithm.
//!
//! ```text
//! x = 2ᵏ·(1 + f), 1 + f in [√½, √2)      log x = k·ln 2 + f − f²/2 + f³·R(f)
//! ```
//! Denormals are scaled by 2²³ first; k comes out of the exponent bits by integer arithmetic alone.

use pulp::Simd;

use super::{polynomial, shift_left, shift_right};

const SQRT_HALF_BITS: u32 = 0x3F35_04F3;
const ONE_BITS: u32 = 0x3F80_0000;
const LN_2_HI: f32 = 355.0 / 512.0;
const LN_2_LO: f32 = -2.121_944_4e-4;

/// (log(1 + f) − f + f²/2) / f³ on √½ − 1 … √2 − 1, minimax: |error| < 2.5e-8.
const R: [f32; 9] = [
    3.333_333e-1,
    -2.499_998e-1,
    2.000_070_2e-1,
    -1.666_922_7e-1,
    1.425_071_4e-1,
    -1.239_463_3e-1,
    1.163_742_7e-1,
    -1.167_614_46e-1,
    7.344_366_6e-2,
];

/// ln x: −∞ for ±0, ∞ for ∞, NaN for negative numbers and NaN.
///
/// Error at most 1.5 ULP over all of f32, denormals included (`math::accuracy::log`).
#[inline(always)]
pub fn log<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let denormal = simd.less_than_f32s(x, simd.splat_f32s(f32::MIN_POSITIVE));
    let scaled = simd.select_f32s(denormal, simd.mul_f32s(x, simd.splat_f32s(8_388_608.0)), x);
    // The exponent's bias, as the float 2²³ + bias that the bits of k are placed in.
    let bias = simd.select_f32s(
        denormal,
        simd.splat_f32s(8_388_608.0 + 127.0 + 23.0),
        simd.splat_f32s(8_388_608.0 + 127.0),
    );
    let moved = simd
        .add_u32s(simd.transmute_u32s_f32s(scaled), simd.splat_u32s(ONE_BITS.wrapping_sub(SQRT_HALF_BITS)));
    let exponent = shift_right(simd, moved, 23);
    let k =
        simd.sub_f32s(simd.transmute_f32s_u32s(simd.or_u32s(exponent, simd.splat_u32s(0x4B00_0000))), bias);
    let mantissa =
        simd.add_u32s(simd.sub_u32s(moved, shift_left(simd, exponent, 23)), simd.splat_u32s(SQRT_HALF_BITS));
    let f = simd.sub_f32s(simd.transmute_f32s_u32s(mantissa), simd.splat_f32s(1.0));
    let f2 = simd.mul_f32s(f, f);
    let cubic = simd.mul_f32s(simd.mul_f32s(f2, f), polynomial(simd, f, R));
    let low = simd.mul_add_e_f32s(k, simd.splat_f32s(LN_2_LO), cubic);
    let low = simd.negate_mul_add_e_f32s(f2, simd.splat_f32s(0.5), low);
    let y = simd.mul_add_e_f32s(k, simd.splat_f32s(LN_2_HI), simd.add_f32s(low, f));
    let finite = simd.less_than_f32s(x, simd.splat_f32s(f32::INFINITY));
    // ∞ and NaN give themselves.
    let y = simd.select_f32s(finite, y, x);
    let zero = simd.splat_f32s(0.0);
    let y = simd.select_f32s(simd.equal_f32s(x, zero), simd.splat_f32s(f32::NEG_INFINITY), y);
    simd.select_f32s(simd.less_than_f32s(x, zero), simd.splat_f32s(f32::NAN), y)
}
