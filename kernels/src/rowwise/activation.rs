//! Activation functions, alone and as the last step of other kernels.
//!
//! ```text
//! forward:   y[i]   = f(x[i])
//! backward:  d_x[i] = d_y[i] · f′(x[i])
//! ```
//! One pass over memory. Backward takes the input x rather than the output, so that all functions share
//! one signature; f′ costs one exponential as f does.

use pulp::{Simd, WithSimd};

use super::CHUNK;
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::{lanes, math, view};

/// A function that is applied to each element.
///
/// | | f(x) | f(NaN) |
/// |---|---|---|
/// | `Identity` | x | NaN |
/// | `Relu` | max(x, 0) | NaN |
/// | `GeluErf` | x·Φ(x) | NaN |
/// | `GeluTanh` | x·sigmoid(2·√(2/π)·(x + 0.044715·x³)) | NaN |
/// | `Silu` | x·sigmoid(x) | NaN |
/// | `Tanh` | tanh(x) | NaN |
/// | `Sigmoid` | 1/(1 + e⁻ˣ) | NaN |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Activation {
    /// x itself.
    #[default]
    Identity,
    /// max(x, 0), with the derivative 0 at 0.
    Relu,
    /// GELU in its exact form, through the error function.
    GeluErf,
    /// GELU in its tanh form.
    GeluTanh,
    /// x · sigmoid(x), also called swish.
    Silu,
    /// The hyperbolic tangent.
    Tanh,
    /// The logistic function.
    Sigmoid,
}

impl Activation {
    /// Every function, in the order of the variants.
    pub const ALL: [Activation; 7] = [
        Activation::Identity,
        Activation::Relu,
        Activation::GeluErf,
        Activation::GeluTanh,
        Activation::Silu,
        Activation::Tanh,
        Activation::Sigmoid,
    ];

    /// The word that configurations and case names use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Activation::Identity => "identity",
            Activation::Relu => "relu",
            Activation::GeluErf => "gelu",
            Activation::GeluTanh => "gelu_tanh",
            Activation::Silu => "silu",
            Activation::Tanh => "tanh",
            Activation::Sigmoid => "sigmoid",
        }
    }

    /// f of each lane. The bounds stand in [`crate::math`].
    #[inline(always)]
    pub fn apply<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        match self {
            Activation::Identity => x,
            Activation::Relu => relu(simd, x),
            Activation::GeluErf => math::gelu(simd, x),
            Activation::GeluTanh => math::gelu_tanh(simd, x),
            Activation::Silu => math::silu(simd, x),
            Activation::Tanh => math::tanh(simd, x),
            Activation::Sigmoid => math::sigmoid(simd, x),
        }
    }

    /// f′ of each lane, from the input x.
    #[inline(always)]
    pub fn derivative<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        match self {
            Activation::Identity => simd.splat_f32s(1.0),
            Activation::Relu => relu_derivative(simd, x),
            Activation::GeluErf => math::gelu_derivative(simd, x),
            Activation::GeluTanh => math::gelu_tanh_derivative(simd, x),
            Activation::Silu => math::silu_derivative(simd, x),
            Activation::Tanh => math::tanh_derivative(simd, math::tanh(simd, x)),
            Activation::Sigmoid => math::sigmoid_derivative(simd, math::sigmoid(simd, x)),
        }
    }
}

#[inline(always)]
fn relu<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let zero = simd.splat_f32s(0.0);
    // This way round a NaN stays.
    simd.select_f32s(simd.less_than_f32s(x, zero), zero, x)
}

#[inline(always)]
fn relu_derivative<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let zero = simd.splat_f32s(0.0);
    let one = simd.splat_f32s(1.0);
    simd.select_f32s(simd.less_than_or_equal_f32s(x, zero), zero, one)
}

/// A loop that applies one activation function. `F` is the function's place in [`Activation::ALL`], so that the loop
/// holds that function alone, inlined.
pub(super) trait ActivationLoop {
    fn run<S: Simd, const F: usize>(self, simd: S);
}

impl Activation {
    /// Runs the loop of this function: the choice stands outside of the loop.
    #[inline(always)]
    pub(super) fn choose<S: Simd>(self, simd: S, work: impl ActivationLoop) {
        match self {
            Activation::Identity => work.run::<S, { Activation::Identity as usize }>(simd),
            Activation::Relu => work.run::<S, { Activation::Relu as usize }>(simd),
            Activation::GeluErf => work.run::<S, { Activation::GeluErf as usize }>(simd),
            Activation::GeluTanh => work.run::<S, { Activation::GeluTanh as usize }>(simd),
            Activation::Silu => work.run::<S, { Activation::Silu as usize }>(simd),
            Activation::Tanh => work.run::<S, { Activation::Tanh as usize }>(simd),
            Activation::Sigmoid => work.run::<S, { Activation::Sigmoid as usize }>(simd),
        }
    }
}

struct Forward<'a> {
    activation: Activation,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.activation.choose(simd, self);
    }
}

impl ActivationLoop for Forward<'_> {
    #[inline(always)]
    fn run<S: Simd, const F: usize>(self, simd: S) {
        lanes::map(
            simd,
            self.x,
            self.y,
            #[inline(always)]
            |x| Activation::ALL[F].apply(simd, x),
        );
    }
}

struct Backward<'a> {
    activation: Activation,
    x: &'a [f32],
    d_y: &'a [f32],
    d_x: &'a mut [f32],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.activation.choose(simd, self);
    }
}

impl ActivationLoop for Backward<'_> {
    #[inline(always)]
    fn run<S: Simd, const F: usize>(self, simd: S) {
        lanes::zip(
            simd,
            self.x,
            self.d_y,
            self.d_x,
            #[inline(always)]
            |x, d_y| simd.mul_f32s(d_y, Activation::ALL[F].derivative(simd, x)),
        );
    }
}

/// `y[i] = f(x[i])`.
///
/// # Errors
/// [`ShapeError`] when `y` is not as long as `x`.
///
/// Accuracy: that of the function in [`crate::math`].
pub fn forward(ctx: &Context, activation: Activation, x: &[f32], y: &mut [f32]) -> Result<(), ShapeError> {
    expect_dim("y", "length", x.len(), y.len())?;
    view::for_each_chunk(ctx, y, CHUNK, |index, y| {
        let x = &x[index * CHUNK..][..y.len()];
        ctx.isa().dispatch(Forward { activation, x, y });
    });
    Ok(())
}

/// `d_x[i] = d_y[i] · f′(x[i])`.
///
/// A NaN in `x` or `d_y` gives a NaN, except that `Relu` passes `d_y` where `x` is NaN.
///
/// # Errors
/// [`ShapeError`] when the lengths differ.
///
/// Accuracy: that of the derivative in [`crate::math`], and one rounding.
pub fn backward(
    ctx: &Context,
    activation: Activation,
    x: &[f32],
    d_y: &[f32],
    d_x: &mut [f32],
) -> Result<(), ShapeError> {
    expect_dim("d_y", "length", x.len(), d_y.len())?;
    expect_dim("d_x", "length", x.len(), d_x.len())?;
    view::for_each_chunk(ctx, d_x, CHUNK, |index, d_x| {
        let range = index * CHUNK..index * CHUNK + d_x.len();
        let (x, d_y) = (&x[range.clone()], &d_y[range]);
        ctx.isa().dispatch(Backward { activation, x, d_y, d_x });
    });
    Ok(())
}
