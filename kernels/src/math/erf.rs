//! The error function and the normal distribution.
//!
//! ```text
//! Q(a) = P(N(0,1) > a) = exp(−a²/2)·s·R(s),   s = 1 / (1 + a/4),  a ≥ 0
//! ```
//! - R is a polynomial on all of [0, 14.5] at once, where exp(−a²/2) becomes 0: no interval to select.
//! - a² is rounded; its error, times a²/2, would cost 100 ULP at the end of the tail. One FMA gives the
//!   rounding error l of h = a², and exp(−l/2) ≈ 1 − l/2 puts it right.

use pulp::Simd;

use super::exp::exp;
use super::{min_keep_nan, polynomial};

/// From here on Q is 0 in f32.
const TAIL_END: f32 = 14.5;

/// Q(a)·exp(a²/2)/s as a polynomial in s, minimax relative to itself: error < 2.5e-8.
const R: [f32; 10] = [
    9.974_633e-2,
    9.952_146e-2,
    9.528_787e-2,
    7.301_275e-2,
    8.385_143_4e-2,
    1.773_423_5e-2,
    2.261_158_3e-2,
    5.587_889e-2,
    -6.453_689e-2,
    1.689_235e-2,
];

/// erf(x)/x − 1 as a polynomial in x², |x| ≤ 1, minimax: |error| < 1.6e-8.
const ERF: [f32; 7] = [
    1.283_791_7e-1,
    -3.761_262_6e-1,
    1.128_36e-1,
    -2.685_444_4e-2,
    5.189_535_7e-3,
    -8.020_845e-4,
    7.889_132_4e-5,
];

/// The upper tail Q(|x|) of the normal distribution, and exp(−x²/2).
#[inline(always)]
pub(super) fn normal_tail<S: Simd>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let one = simd.splat_f32s(1.0);
    let a = min_keep_nan(simd, simd.abs_f32s(x), TAIL_END);
    let square = simd.mul_f32s(a, a);
    let rest = simd.mul_add_f32s(a, a, simd.neg_f32s(square));
    let half = simd.splat_f32s(-0.5);
    let gauss = exp(simd, simd.mul_f32s(square, half));
    let gauss = simd.mul_add_e_f32s(gauss, simd.mul_f32s(rest, half), gauss);
    let s = simd.div_f32s(one, simd.mul_add_e_f32s(a, simd.splat_f32s(0.25), one));
    let tail = simd.mul_f32s(simd.mul_f32s(s, polynomial(simd, s, R)), gauss);
    (tail, gauss)
}

/// The distribution function of N(0, 1): Φ(x) = (1 + erf(x/√2))/2; 0 for −∞, 1 for ∞, NaN for NaN.
///
/// Error at most 7.5 ULP over all of f32, the lower tail included (`math::accuracy::normal_cdf`).
#[inline(always)]
pub fn normal_cdf<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    normal_cdf_and_gauss(simd, x).0
}

/// Φ(x) and exp(−x²/2).
#[inline(always)]
pub(super) fn normal_cdf_and_gauss<S: Simd>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let (tail, gauss) = normal_tail(simd, x);
    let negative = simd.less_than_f32s(x, simd.splat_f32s(0.0));
    let upper = simd.sub_f32s(simd.splat_f32s(1.0), tail);
    (simd.select_f32s(negative, tail, upper), gauss)
}

/// erf x = 2/√π · ∫₀ˣ exp(−t²) dt: ±1 for ±∞, NaN for NaN; −0 stays −0.
///
/// Error at most 2 ULP over all of f32 (`math::accuracy::erf`).
#[inline(always)]
pub fn erf<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    let magnitude = simd.abs_f32s(x);
    let (tail, _) = normal_tail(simd, simd.mul_f32s(x, simd.splat_f32s(std::f32::consts::SQRT_2)));
    let large = simd.negate_mul_add_e_f32s(simd.splat_f32s(2.0), tail, one);
    let small = simd.mul_add_e_f32s(magnitude, polynomial(simd, simd.mul_f32s(x, x), ERF), magnitude);
    let y = simd.select_f32s(simd.less_than_f32s(magnitude, one), small, large);
    simd.or_f32s(y, simd.and_f32s(x, simd.splat_f32s(-0.0)))
}
