//! Sigmoid, SiLU and tanh with their derivatives: one exponential and one division each.
//!
//! - sigmoid is `e/(1 + e)` or `1/(1 + e)` with e = exp(−|x|), by the sign of x: accurate relative to
//!   itself in the lower tail too, where `1/(1 + exp(−x))` loses denormals and `½ + ½·tanh(x/2)` all.
//! - tanh is `E/(E + 2)` with E = exp(2|x|) − 1, which the reduction of `exp` gives without cancellation,
//!   so no second polynomial is needed near 0.

use pulp::Simd;

use super::exp::{Reduced, exp};
use super::{max_keep_nan, min_keep_nan};

/// Below, x·sigmoid(x) is 0; the clamp keeps −∞·0 out of the products.
pub(super) const SIGMOID_ZERO: f32 = -120.0;

/// 1 / (1 + e⁻ˣ): 0 for −∞, 1 for ∞, NaN for NaN.
///
/// Error at most 2.5 ULP over all of f32 (`math::accuracy::sigmoid`).
#[inline(always)]
pub fn sigmoid<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    sigmoids(simd, x).0
}

/// sigmoid(x) and sigmoid(−x) = 1 − sigmoid(x), each accurate relative to itself, from one exponential.
#[inline(always)]
pub(super) fn sigmoids<S: Simd>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let one = simd.splat_f32s(1.0);
    let e = exp(simd, simd.or_f32s(x, simd.splat_f32s(-0.0)));
    let negative = simd.less_than_f32s(x, simd.splat_f32s(0.0));
    let sum = simd.add_f32s(one, e);
    let upper = simd.div_f32s(simd.select_f32s(negative, e, one), sum);
    (upper, simd.div_f32s(simd.select_f32s(negative, one, e), sum))
}

/// d sigmoid / dx from the result: y·(1 − y).
#[inline(always)]
pub fn sigmoid_derivative<S: Simd>(simd: S, y: S::f32s) -> S::f32s {
    simd.negate_mul_add_e_f32s(y, y, y)
}

/// x · sigmoid(x), also called swish: −0 for −∞, NaN for NaN.
///
/// Error at most 3.5 ULP over all of f32 (`math::accuracy::silu`).
#[inline(always)]
pub fn silu<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let x = max_keep_nan(simd, x, SIGMOID_ZERO);
    simd.mul_f32s(x, sigmoid(simd, x))
}

/// d silu / dx = s·(1 + x·(1 − s)) with s = sigmoid(x).
///
/// Error at most 5 ULP of s·max(1, |x|·(1 − s)) (`math::accuracy::silu_derivative`).
#[inline(always)]
pub fn silu_derivative<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    let x = max_keep_nan(simd, x, SIGMOID_ZERO);
    // 1 − s would cancel for large x, and ∞·0 would be NaN.
    let (upper, lower) = sigmoids(simd, x);
    let x = min_keep_nan(simd, x, -SIGMOID_ZERO);
    simd.mul_f32s(upper, simd.mul_add_e_f32s(x, lower, one))
}

/// tanh x: ±1 for ±∞, NaN for NaN; −0 stays −0.
///
/// Error at most 3 ULP over all of f32 (`math::accuracy::tanh`).
#[inline(always)]
pub fn tanh<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // From 9.02 on the result rounds to 1.
    let magnitude = min_keep_nan(simd, simd.abs_f32s(x), 9.25);
    let e = Reduced::new(simd, simd.add_f32s(magnitude, magnitude)).minus_one(simd);
    let y = simd.div_f32s(e, simd.add_f32s(e, simd.splat_f32s(2.0)));
    simd.or_f32s(y, simd.and_f32s(x, simd.splat_f32s(-0.0)))
}

/// d tanh / dx from the result: 1 − y².
#[inline(always)]
pub fn tanh_derivative<S: Simd>(simd: S, y: S::f32s) -> S::f32s {
    simd.negate_mul_add_e_f32s(y, y, simd.splat_f32s(1.0))
}
