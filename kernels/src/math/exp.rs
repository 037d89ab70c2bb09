//! The exponential, and the pieces of it that tanh uses.
//!
//! ```text
//! n = round(x / ln 2)          exp(x) = 2ⁿ · exp(r),  r = x − n·ln 2 in ±ln 2 / 2
//! exp(r) = 1 + r + r²·q(r)     q of degree 4
//! ```
//! - Rounding adds and subtracts 1.5·2²³: no conversion instruction, and n stays in the low bits.
//! - ln 2 is subtracted in two parts of which the first has 9 bits, so n·hi is exact without FMA too.
//! - 2ⁿ is multiplied in as two factors, so that denormal results are rounded once and n = 128 works.

use pulp::Simd;

use super::{max_keep_nan, min_keep_nan, polynomial, shift_left, shift_right};

/// 1.5·2²³: the spacing of f32 here is 1, and the mantissa's low bits count from [`ROUND_BITS`].
const ROUND: f32 = 12_582_912.0;
const ROUND_BITS: u32 = 0x4B40_0000;
const LN_2_HI: f32 = 355.0 / 512.0;
const LN_2_LO: f32 = -2.121_944_4e-4;

/// (exp(r) − 1 − r) / r² on ±0.348, minimax: |error| < 6.8e-8 before the factor r² < 0.13.
const Q: [f32; 5] = [0.5, 1.666_657_5e-1, 4.166_637e-2, 8.363_475e-3, 1.394_163_8e-3];

/// From here down [`exp_flushed`] is 0: n is −127, whose biased exponent is that of 0.
const FLUSHED: f32 = -88.0;

/// exp(x) as `2ⁿ · (1 + tail)`.
pub(super) struct Reduced<S: Simd> {
    /// The bits of n + 1.5·2²³.
    rounded: S::u32s,
    /// exp(r) − 1, accurate relative to itself.
    tail: S::f32s,
}

impl<S: Simd> Reduced<S> {
    /// For x in about ±10⁴.
    #[inline(always)]
    pub(super) fn new(simd: S, x: S::f32s) -> Self {
        let shifted =
            simd.mul_add_e_f32s(x, simd.splat_f32s(std::f32::consts::LOG2_E), simd.splat_f32s(ROUND));
        let n = simd.sub_f32s(shifted, simd.splat_f32s(ROUND));
        let r = simd.negate_mul_add_e_f32s(n, simd.splat_f32s(LN_2_HI), x);
        let r = simd.negate_mul_add_e_f32s(n, simd.splat_f32s(LN_2_LO), r);
        let q = polynomial(simd, r, Q);
        let tail = simd.mul_add_e_f32s(simd.mul_f32s(r, r), q, r);
        Reduced { rounded: simd.transmute_u32s_f32s(shifted), tail }
    }

    /// exp(x) − 1 for n in −126..=127.
    #[inline(always)]
    pub(super) fn minus_one(self, simd: S) -> S::f32s {
        let biased = simd.sub_u32s(self.rounded, simd.splat_u32s(ROUND_BITS.wrapping_sub(127)));
        let scale = simd.transmute_f32s_u32s(shift_left(simd, biased, 23));
        let whole = simd.sub_f32s(scale, simd.splat_f32s(1.0));
        simd.mul_add_e_f32s(scale, self.tail, whole)
    }
}

/// eˣ: 0 for −∞, ∞ from 88.73 on, NaN for NaN.
///
/// Error at most 1.5 ULP over all of f32, denormal results included (`math::accuracy::exp`).
#[inline(always)]
pub fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Outside, the result is 0 or ∞ already.
    let x = max_keep_nan(simd, min_keep_nan(simd, x, 89.0), -104.0);
    let Reduced { rounded, tail } = Reduced::new(simd, x);
    // n + 254 = first + second, each a biased exponent.
    let biased = simd.sub_u32s(rounded, simd.splat_u32s(ROUND_BITS.wrapping_sub(254)));
    let first = shift_right(simd, biased, 1);
    let second = simd.sub_u32s(biased, first);
    let mantissa = simd.add_f32s(tail, simd.splat_f32s(1.0));
    let y = simd.mul_f32s(mantissa, simd.transmute_f32s_u32s(shift_left(simd, first, 23)));
    simd.mul_f32s(y, simd.transmute_f32s_u32s(shift_left(simd, second, 23)))
}

/// eˣ for x ≤ 0, and a little above: 0 where eˣ is below 2⁻¹²⁶·⁵, NaN for NaN. From 88 on it is unspecified.
///
/// What the weights of a softmax need, at half the instructions of [`exp`] and two thirds of its latency:
/// - no upper clamp, and one factor 2ⁿ, whose multiplication shares an FMA with the addition of 1;
/// - with FMA, n·ln 2 is subtracted at once: ln 2 has a relative error of 2.7e-9, a tenth of what rounding the
///   difference x cost already;
/// - q in halves (Estrin), because a row of scores has too few vectors to fill a chain of seven FMAs.
///
/// Error at most 1.5 + |x|/20 ULP, or 2⁻¹²⁶ where eˣ is below that (`math::accuracy::exp_flushed`).
#[inline(always)]
pub fn exp_flushed<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let x = max_keep_nan(simd, x, FLUSHED);
    let round = simd.splat_f32s(ROUND);
    let shifted = simd.mul_add_e_f32s(x, simd.splat_f32s(std::f32::consts::LOG2_E), round);
    let n = simd.sub_f32s(shifted, round);
    let r = if S::IS_SCALAR {
        let r = simd.negate_mul_add_e_f32s(n, simd.splat_f32s(LN_2_HI), x);
        simd.negate_mul_add_e_f32s(n, simd.splat_f32s(LN_2_LO), r)
    } else {
        simd.negate_mul_add_e_f32s(n, simd.splat_f32s(std::f32::consts::LN_2), x)
    };
    let square = simd.mul_f32s(r, r);
    let low = simd.mul_add_e_f32s(r, simd.splat_f32s(Q[1]), simd.splat_f32s(Q[0]));
    let high = simd.mul_add_e_f32s(r, simd.splat_f32s(Q[3]), simd.splat_f32s(Q[2]));
    let high = simd.mul_add_e_f32s(square, simd.splat_f32s(Q[4]), high);
    let q = simd.mul_add_e_f32s(square, high, low);
    let tail = simd.mul_add_e_f32s(square, q, r);
    // The shift drops all of 1.5·2²³ but n, and the bias is added where n stands.
    let exponent = shift_left(simd, simd.transmute_u32s_f32s(shifted), 23);
    let scale = simd.transmute_f32s_u32s(simd.add_u32s(exponent, simd.splat_u32s(127 << 23)));
    simd.mul_add_e_f32s(scale, tail, scale)
}

/// exp(−a²/2) as `scale · above / below`, for a caller that divides anyway.
pub(super) struct Quotient<S: Simd> {
    /// A power of two, or 0.
    pub(super) scale: S::f32s,
    pub(super) above: S::f32s,
    pub(super) below: S::f32s,
}

/// exp(−a²/2) for 0 ≤ a ≤ 13.29: the scale is 0 from 13.27 on.
///
/// ```text
/// n = round(a²/(2·ln 2))       exp(−a²/2) = 2⁻ⁿ · exp(−r/2),  r = a² − n·2·ln 2 in ±ln 2
/// exp(−r/2) = (E − O)/(E + O)  E = 40 + r²,  O = r·(10 + r²/24)
/// ```
/// - a² is rounded; its error, halved and as an exponent, would cost 44 ULP at the end. One FMA gives the rounding
///   error of a², and r takes it in.
/// - Padé's quotient (error 6e-9) has half the multiplications of the polynomial in [`exp_flushed`] and two thirds of its chain.
/// - For ln 2 stands its nearest f32 ℓ, so the result is exp(−a²/2)·exp(n·(ℓ − ln 2)) up to its roundings. Where the
///   product is made without FMA, ℓ is split, so that all instruction sets have this same factor.
#[inline(always)]
pub(super) fn exp_half_square<S: Simd>(simd: S, a: S::f32s) -> Quotient<S> {
    const TWICE: f32 = 2.0 * std::f32::consts::LN_2;
    const TWICE_HI: f32 = 2.0 * LN_2_HI;
    let round = simd.splat_f32s(ROUND);
    let square = simd.mul_f32s(a, a);
    let rest = simd.mul_add_f32s(a, a, simd.neg_f32s(square));
    let shifted = simd.mul_add_e_f32s(square, simd.splat_f32s(1.0 / TWICE), round);
    let n = simd.sub_f32s(shifted, round);
    let r = if S::IS_SCALAR {
        let r = simd.negate_mul_add_e_f32s(n, simd.splat_f32s(TWICE_HI), square);
        simd.negate_mul_add_e_f32s(n, simd.splat_f32s(TWICE - TWICE_HI), r)
    } else {
        simd.negate_mul_add_e_f32s(n, simd.splat_f32s(TWICE), square)
    };
    let r = simd.add_f32s(r, rest);
    let r2 = simd.mul_f32s(r, r);
    let even = simd.add_f32s(r2, simd.splat_f32s(40.0));
    let odd = simd.mul_f32s(r, simd.mul_add_e_f32s(r2, simd.splat_f32s(1.0 / 24.0), simd.splat_f32s(10.0)));
    let exponent = shift_left(simd, simd.transmute_u32s_f32s(shifted), 23);
    Quotient {
        scale: simd.transmute_f32s_u32s(simd.sub_u32s(simd.splat_u32s(127 << 23), exponent)),
        above: simd.sub_f32s(even, odd),
        below: simd.add_f32s(even, odd),
    }
}
