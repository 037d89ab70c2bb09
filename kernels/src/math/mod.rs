//! Elementary functions over vectors: polynomial, branch-free, one body for every instruction set.
//!
//! Each is `#[inline(always)]` and generic over [`pulp::Simd`], so it is compiled inside the
//! `#[target_feature]` shell of the kernel that calls it. All of them keep NaN (with some payload)
//! and have the limits of the function at ±∞. The bounds hold for all of f32, denormals included, and
//! are asserted on every instruction set by `math::accuracy`.
//!
//! | function | error bound |
//! |---|---|
//! | [`exp()`] | 1.5 ULP |
//! | [`exp_flushed`] | 1.5 + \|x\|/20 ULP for x ≤ 0, 0 instead of denormals |
//! | [`log()`] | 1.5 ULP |
//! | [`tanh`] | 3 ULP |
//! | [`sigmoid()`] | 2.5 ULP |
//! | [`silu`] | 3.5 ULP |
//! | [`erf()`] | 2 ULP |
//! | [`normal_cdf`] | 7 ULP |
//! | [`gelu()`] | 7.5 ULP |
//! | [`gelu_tanh`] | 4 + 3·\|z\| ULP, where z is the argument of its sigmoid |
//!
//! Derivatives that cross zero have no bound in ULP of the result; theirs is stated in ULP of the
//! larger summand.
//!
//! 1 ULP is the distance between the two f32 around the exact result.

mod erf;
mod exp;
mod gelu;
mod log;
mod sigmoid;

#[cfg(test)]
mod accuracy;

pub use erf::{erf, normal_cdf};
pub use exp::{exp, exp_flushed};
pub use gelu::{gelu, gelu_derivative, gelu_tanh, gelu_tanh_derivative};
pub use log::log;
pub use sigmoid::{sigmoid, sigmoid_derivative, silu, silu_derivative, tanh, tanh_derivative};

use pulp::Simd;

/// `min(x, bound)`, where a NaN in `x` stays NaN.
#[inline(always)]
fn min_keep_nan<S: Simd>(simd: S, x: S::f32s, bound: f32) -> S::f32s {
    let bound = simd.splat_f32s(bound);
    if S::IS_SCALAR {
        // `f32::min` drops a NaN; the vector instructions give their second operand or NaN.
        simd.select_f32s(simd.greater_than_f32s(x, bound), bound, x)
    } else {
        simd.min_f32s(bound, x)
    }
}

/// `max(x, bound)`, where a NaN in `x` stays NaN.
#[inline(always)]
fn max_keep_nan<S: Simd>(simd: S, x: S::f32s, bound: f32) -> S::f32s {
    let bound = simd.splat_f32s(bound);
    if S::IS_SCALAR {
        simd.select_f32s(simd.less_than_f32s(x, bound), bound, x)
    } else {
        simd.max_f32s(bound, x)
    }
}

/// `c[0] + c[1]·x + c[2]·x² + …` by Horner's rule.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(simd: S, x: S::f32s, c: [f32; N]) -> S::f32s {
    let mut sum = simd.splat_f32s(c[N - 1]);
    for &c in c[..N - 1].iter().rev() {
        sum = simd.mul_add_e_f32s(sum, x, simd.splat_f32s(c));
    }
    sum
}

#[inline(always)]
pub(crate) fn shift_left<S: Simd>(simd: S, x: S::u32s, bits: u32) -> S::u32s {
    simd.wrapping_dyn_shl_u32s(x, simd.splat_u32s(bits))
}

#[inline(always)]
pub(crate) fn shift_right<S: Simd>(simd: S, x: S::u32s, bits: u32) -> S::u32s {
    simd.wrapping_dyn_shr_u32s(x, simd.splat_u32s(bits))
}
