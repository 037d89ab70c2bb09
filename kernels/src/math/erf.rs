//! The error function and the normal distribution.
//!
//! ```text
//! Q(a) = P(N(0,1) > a) = exp(−a²/2)·N(a)/D(a),  a ≥ 0
//! Φ(x) = Q(−x) for x < 0, else 1 − Q(x)
//! ```
//! - N and D are polynomials of degree 4 and 5 with positive coefficients, so nothing cancels, and one quotient does for
//!   all a. The form before had a polynomial of degree 7 in 1/(1 + a/4) for a ≥ 1 and another around 0: the division
//!   stood first in the chain instead of beside the exponential, and both forms were made for every vector.
//! - N/D is fitted to Q(a)·exp(a²/2)·exp(n·(ln 2 − ℓ)) with n = a²/(2·ln 2), so it takes back what the f32 ℓ in
//!   `exp_half_square` is off.
//! - Degrees 3 and 4 have an error of 3.5e-7, degrees 4 and 4 one of 1.3e-7: 6 and 2 ULP.

use pulp::Simd;

use super::exp::{Quotient, exp_half_square};
use super::{min_keep_nan, polynomial};

/// From here on exp(−a²/2) is below 2⁻¹²⁶·⁵ and becomes 0, and so does Q, which is smaller.
const TAIL_END: f32 = 13.27;

/// φ(0) = 1/√(2π) less 1.2e-7 of itself: exp(−a²/2) comes out too large by up to 2.4e-7, growing with a².
const GAUSS_PEAK: f32 = 0.398_942_23;

/// N and D (whose last coefficient is 1): minimax relative to Q on [0, 13.3], error < 1.1e-8 as rounded.
const NUMERATOR: [f32; 5] = [49.147_49, 42.938_29, 17.902_044, 3.956_726_6, 0.398_946_8];
const DENOMINATOR: [f32; 5] = [98.294_98, 164.304_66, 117.752_34, 45.858_482, 9.918_696];

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

/// What Q(|x|) is made of: `gauss · numerator / denominator`.
pub(super) struct Tail<S: Simd> {
    /// min(|x|, [`TAIL_END`]), NaN for NaN.
    pub(super) magnitude: S::f32s,
    gauss: Quotient<S>,
    numerator: S::f32s,
    denominator: S::f32s,
}

impl<S: Simd> Tail<S> {
    #[inline(always)]
    pub(super) fn new(simd: S, x: S::f32s) -> Self {
        let a = min_keep_nan(simd, simd.abs_f32s(x), TAIL_END);
        let numerator = polynomial(simd, a, NUMERATOR);
        let mut denominator = simd.add_f32s(a, simd.splat_f32s(DENOMINATOR[4]));
        for &c in DENOMINATOR[..4].iter().rev() {
            denominator = simd.mul_add_e_f32s(denominator, a, simd.splat_f32s(c));
        }
        Tail { magnitude: a, gauss: exp_half_square(simd, a), numerator, denominator }
    }

    /// Q(|x|), 0 from [`TAIL_END`] on.
    #[inline(always)]
    pub(super) fn probability(self, simd: S) -> S::f32s {
        self.divided(simd, self.numerator)
    }

    /// Q(|x|) − |x|·φ(x), 0 from [`TAIL_END`] on.
    #[inline(always)]
    pub(super) fn less_moment(self, simd: S) -> S::f32s {
        let moment = simd.mul_f32s(self.magnitude, simd.splat_f32s(GAUSS_PEAK));
        self.divided(simd, simd.negate_mul_add_e_f32s(moment, self.denominator, self.numerator))
    }

    /// exp(−x²/2)·`numerator`/denominator, by one division.
    #[inline(always)]
    fn divided(&self, simd: S, numerator: S::f32s) -> S::f32s {
        let Quotient { scale, above, below } = self.gauss;
        let numerator = simd.mul_f32s(simd.mul_f32s(scale, numerator), above);
        simd.div_f32s(numerator, simd.mul_f32s(self.denominator, below))
    }
}

/// `lower` where x < 0, else 1 − `lower`.
#[inline(always)]
pub(super) fn reflect<S: Simd>(simd: S, x: S::f32s, lower: S::f32s) -> S::f32s {
    let negative = simd.less_than_f32s(x, simd.splat_f32s(0.0));
    simd.select_f32s(negative, lower, simd.sub_f32s(simd.splat_f32s(1.0), lower))
}

/// The distribution function of N(0, 1): Φ(x) = (1 + erf(x/√2))/2; 0 for −∞, 1 for ∞, NaN for NaN.
///
/// Error at most 7 ULP, the lower tail included, or 2⁻¹²⁶ where Φ is below that (`math::accuracy::normal_cdf`).
#[inline(always)]
pub fn normal_cdf<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    reflect(simd, x, Tail::new(simd, x).probability(simd))
}

/// erf x = 2/√π · ∫₀ˣ exp(−t²) dt: ±1 for ±∞, NaN for NaN; −0 stays −0.
///
/// Error at most 2 ULP over all of f32 (`math::accuracy::erf`).
#[inline(always)]
pub fn erf<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    let magnitude = simd.abs_f32s(x);
    let scaled = simd.mul_f32s(x, simd.splat_f32s(std::f32::consts::SQRT_2));
    let tail = Tail::new(simd, scaled).probability(simd);
    let large = simd.negate_mul_add_e_f32s(simd.splat_f32s(2.0), tail, one);
    let small = simd.mul_add_e_f32s(magnitude, polynomial(simd, simd.mul_f32s(x, x), ERF), magnitude);
    let y = simd.select_f32s(simd.less_than_f32s(magnitude, one), small, large);
    simd.or_f32s(y, simd.and_f32s(x, simd.splat_f32s(-0.0)))
}
