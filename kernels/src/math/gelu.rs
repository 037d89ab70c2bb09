//! GELU in both forms, with derivatives.

use pulp::Simd;

use super::erf::{Tail, reflect};
use super::sigmoid::{SIGMOID_ZERO, sigmoid, sigmoids};
use super::{max_keep_nan, min_keep_nan};

/// From here down x·sigmoid(z) is 0 in f32; the clamp keeps −∞·0 out of the product.
const GELU_ZERO: f32 = -15.0;
/// 2·√(2/π).
const LINEAR: f32 = 1.595_769;
/// 2·√(2/π)·0.044715.
const CUBIC: f32 = 0.071_354_82;

/// GELU: x·Φ(x) = x·(1 + erf(x/√2))/2 = max(x, 0) − |x|·Q(|x|); −0 for −∞, NaN for NaN.
///
/// The last form has no case: the sign of x decides nothing but the maximum, and the product and the difference are one FMA.
/// With −0 for 0 the results that are 0 have the sign of x.
///
/// Error at most 7.5 ULP, or 2⁻¹²² where |x·Φ(x)| is below that: Φ is accurate relative to itself in the lower tail, where the
/// form with `1 + erf` has no correct digit (`math::accuracy::gelu`).
///
/// # Source
/// Hendrycks and Gimpel 2016, arXiv:1606.08415.
#[inline(always)]
pub fn gelu<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let tail = Tail::new(simd, x);
    let magnitude = tail.magnitude;
    simd.negate_mul_add_e_f32s(magnitude, tail.probability(simd), max_keep_nan(simd, x, -0.0))
}

/// d gelu / dx = Φ(x) + x·φ(x): Q(−x) + x·φ(x) for x < 0, else 1 less that of −x.
///
/// Error at most 7 ULP of max(Φ(x), |x|·φ(x)) (`math::accuracy::gelu_derivative`).
#[inline(always)]
pub fn gelu_derivative<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    reflect(simd, x, Tail::new(simd, x).less_moment(simd))
}

/// GELU's tanh form: x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))) = x·sigmoid(z); −0 for −∞, NaN for NaN.
///
/// Error at most 4 + 3·|z| ULP, z = 2·√(2/π)·(x + 0.044715·x³): the rounding of z is multiplied by |z| in
/// the lower tail, and is within 4 ULP elsewhere (`math::accuracy::gelu_tanh`).
///
/// # Source
/// Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2.
#[inline(always)]
pub fn gelu_tanh<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let x = max_keep_nan(simd, x, GELU_ZERO);
    let square = simd.mul_f32s(x, x);
    let slope = simd.mul_add_e_f32s(square, simd.splat_f32s(CUBIC), simd.splat_f32s(LINEAR));
    simd.mul_f32s(x, sigmoid(simd, simd.mul_f32s(x, slope)))
}

/// d gelu_tanh / dx = s + x·z′·s·(1 − s), s = sigmoid(z).
///
/// Error at most 8 + 4·|z| ULP of max(s, |x·z′·s·(1 − s)|) (`math::accuracy::gelu_tanh_derivative`).
#[inline(always)]
pub fn gelu_tanh_derivative<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // At ±15, z is beyond ±200, so s and 1 − s are 0 and 1.
    let x = min_keep_nan(simd, max_keep_nan(simd, x, GELU_ZERO), -GELU_ZERO);
    let square = simd.mul_f32s(x, x);
    let slope = simd.mul_add_e_f32s(square, simd.splat_f32s(CUBIC), simd.splat_f32s(LINEAR));
    let z = max_keep_nan(simd, simd.mul_f32s(x, slope), SIGMOID_ZERO);
    let (s, rest) = sigmoids(simd, z);
    let d_z = simd.mul_add_e_f32s(square, simd.splat_f32s(3.0 * CUBIC), simd.splat_f32s(LINEAR));
    let spread = simd.mul_f32s(s, rest);
    simd.mul_add_e_f32s(simd.mul_f32s(x, d_z), spread, s)
}
