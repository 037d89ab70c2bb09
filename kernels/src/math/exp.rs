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
    flushed(simd, x, identity)
}

#[inline(always)]
fn identity<T>(x: T) -> T {
    x
}

/// exp of x in −88.3 … 88, whose reduced argument `correct` may move a little.
#[inline(always)]
pub(super) fn flushed<S: Simd>(simd: S, x: S::f32s, correct: impl Fn(S::f32s) -> S::f32s) -> S::f32s {
    let round = simd.splat_f32s(ROUND);
    let shifted = simd.mul_add_e_f32s(x, simd.splat_f32s(std::f32::consts::LOG2_E), round);
    let n = simd.sub_f32s(shifted, round);
    let r = if S::IS_SCALAR {
        let r = simd.negate_mul_add_e_f32s(n, simd.splat_f32s(LN_2_HI), x);
        simd.negate_mul_add_e_f32s(n, simd.splat_f32s(LN_2_LO), r)
    } else {
        simd.negate_mul_add_e_f32s(n, simd.splat_f32s(std::f32::consts::LN_2), x)
    };
    let r = correct(r);
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
