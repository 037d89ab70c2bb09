//! The error function and the normal distribution.
//!
//! ```text
//! Q(a) = P(N(0,1) > a) = exp(−a²/2)·s·R(s),   s = 1 / (1 + a/4),  a ≥ 1
//! Φ(x) = ½ + x·P(x²) for |x| < 1, else Q(−x) or 1 − Q(x)
//! ```
//! - R is a polynomial on all of [1, 14.5] at once, beyond where exp(−a²/2) becomes 0. It would reach to a = 0 with
//!   two more terms, but there each of its six roundings is a whole ULP of a result just below ½.
//! - a² is rounded; its error, times a²/2, would cost 100 ULP at the end of the tail. One FMA gives the
//!   rounding error l of h = a², and exp(−l/2) ≈ 1 − l/2 puts it right.

use pulp::Simd;

use super::exp::flushed;
use super::{min_keep_nan, polynomial};

/// From here on exp(−a²/2) is below 2⁻¹²⁶·⁵ and becomes 0, and so does Q, which is smaller.
const TAIL_END: f32 = 13.27;

/// Q(a)·exp(a²/2)/s as a polynomial in s for a ≥ 1, minimax relative to itself: error < 2.3e-8.
const R: [f32; 8] = [
    9.973_748e-2,
    9.965_556e-2,
    9.459_128e-2,
    7.367_362e-2,
    9.187_476e-2,
    -2.166_305_9e-2,
    1.086_265e-1,
    -4.652_749e-2,
];

/// (Φ(x) − ½)/x as a polynomial in x², |x| ≤ 1, minimax: |error·x| < 1.8e-8.
const CENTRE: [f32; 5] = [3.989_422e-1, -6.648_886e-2, 9.964_581e-3, -1.165_856_3e-3, 9.267_968e-5];

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

/// The upper tail Q(|x|) of the normal distribution, |x| ≥ 1, and exp(−x²/2) for every x; both 0 from
/// [`TAIL_END`] on.
#[inline(always)]
pub(super) fn normal_tail<S: Simd>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let one = simd.splat_f32s(1.0);
    let a = min_keep_nan(simd, simd.abs_f32s(x), TAIL_END);
    let square = simd.mul_f32s(a, a);
    let rest = simd.mul_add_f32s(a, a, simd.neg_f32s(square));
    let half = simd.splat_f32s(-0.5);
    let gauss = flushed(
        simd,
        simd.mul_f32s(square, half),
        #[inline(always)]
        |r| simd.mul_add_e_f32s(rest, half, r),
    );
    let s = simd.div_f32s(one, simd.mul_add_e_f32s(a, simd.splat_f32s(0.25), one));
    let s2 = simd.mul_f32s(s, s);
    // In halves: the chain of a Horner form is what a loop over vectors would wait for.
    let low = simd.mul_add_e_f32s(s2, pair(simd, s, 2), pair(simd, s, 0));
    let high = simd.mul_add_e_f32s(s2, pair(simd, s, 6), pair(simd, s, 4));
    let ratio = simd.mul_add_e_f32s(simd.mul_f32s(s2, s2), high, low);
    (simd.mul_f32s(simd.mul_f32s(s, gauss), ratio), gauss)
}

/// Two terms of R.
#[inline(always)]
fn pair<S: Simd>(simd: S, s: S::f32s, i: usize) -> S::f32s {
    simd.mul_add_e_f32s(s, simd.splat_f32s(R[i + 1]), simd.splat_f32s(R[i]))
}

/// The distribution function of N(0, 1): Φ(x) = (1 + erf(x/√2))/2; 0 for −∞, 1 for ∞, NaN for NaN.
///
/// Error at most 7 ULP, the lower tail included, or 2⁻¹²⁶ where Φ is below that (`math::accuracy::normal_cdf`).
#[inline(always)]
pub fn normal_cdf<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    normal_cdf_and_gauss(simd, x).0
}

/// Φ(x) and exp(−x²/2).
#[inline(always)]
pub(super) fn normal_cdf_and_gauss<S: Simd>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let (tail, gauss) = normal_tail(simd, x);
    let one = simd.splat_f32s(1.0);
    let centre = polynomial(simd, simd.mul_f32s(x, x), CENTRE);
    let centre = simd.mul_add_e_f32s(x, centre, simd.splat_f32s(0.5));
    let negative = simd.less_than_f32s(x, simd.splat_f32s(0.0));
    let outer = simd.select_f32s(negative, tail, simd.sub_f32s(one, tail));
    let inside = simd.less_than_f32s(simd.abs_f32s(x), one);
    (simd.select_f32s(inside, centre, outer), gauss)
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
