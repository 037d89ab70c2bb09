//! Gated activations: SwiGLU, GEGLU, GLU and their kin.
//!
//! ```text
//! forward:   y = f(gate)·up
//! backward:  d_up = d_y·f(gate);   d_gate = d_y·up·f′(gate)
//! ```
//! One pass over memory each. Gate and up are rows of any stride, so both may be halves of one projection. Backward
//! takes the inputs, as [`activation`](super::activation) does, and makes f and f′ at once.
//!
//! # Source
//! Shazeer 2020, arXiv:2002.05202.

use pulp::{Simd, WithSimd};

use super::activation::ActivationLoop;
use super::{Activation, expect_rows, rows_per_block};
use crate::context::Context;
use crate::error::ShapeError;
use crate::lanes;
use crate::view::{self, MatMut, MatRef};

struct Forward<'a> {
    activation: Activation,
    gate: MatRef<'a>,
    up: MatRef<'a>,
    y: MatMut<'a>,
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
    fn run<S: Simd, const F: usize>(mut self, simd: S) {
        for i in 0..self.y.rows() {
            lanes::zip(
                simd,
                self.gate.row(i),
                self.up.row(i),
                self.y.row_mut(i),
                #[inline(always)]
                |gate, up| simd.mul_f32s(Activation::ALL[F].apply(simd, gate), up),
            );
        }
    }
}

struct Backward<'a> {
    activation: Activation,
    gate: MatRef<'a>,
    up: MatRef<'a>,
    d_y: MatRef<'a>,
    d_gate: MatMut<'a>,
    d_up: MatMut<'a>,
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
    fn run<S: Simd, const F: usize>(mut self, simd: S) {
        let f = Activation::ALL[F];
        for i in 0..self.d_y.rows() {
            lanes::visit(
                simd,
                [self.gate.row(i), self.up.row(i), self.d_y.row(i)],
                [self.d_gate.row_mut(i), self.d_up.row_mut(i)],
                #[inline(always)]
                |[gate, up, d_y], _| {
                    let (value, slope) = (f.apply(simd, gate), f.derivative(simd, gate));
                    [simd.mul_f32s(simd.mul_f32s(d_y, up), slope), simd.mul_f32s(d_y, value)]
                },
            );
        }
    }
}

/// `y[i][j] = f(gate[i][j])·up[i][j]`.
///
/// # Shapes
/// gate, up, y: `[rows, cols]`, rows contiguous.
///
/// # Errors
/// [`ShapeError`] when the shapes differ or a row is not contiguous.
///
/// Accuracy: that of f in [`crate::math`], and one rounding (`rowwise::tests::gated`).
pub fn forward(
    ctx: &Context,
    activation: Activation,
    (gate, up): (MatRef<'_>, MatRef<'_>),
    y: MatMut<'_>,
) -> Result<(), ShapeError> {
    let (rows, cols) = (gate.rows(), gate.cols());
    gate.expect_contiguous_rows("gate")?;
    expect_rows("up", up, rows, cols)?;
    expect_rows("y", y.as_ref(), rows, cols)?;
    y.for_each_row_block(ctx, rows_per_block(cols), |first, y| {
        let [gate, up] = [gate, up].map(|x| x.sub(first..first + y.rows(), 0..cols));
        ctx.isa().dispatch(Forward { activation, gate, up, y });
    });
    Ok(())
}

/// `d_gate = d_y·up·f′(gate)` and `d_up = d_y·f(gate)`, element by element.
///
/// # Shapes
/// gate, up, d_y, d_gate, d_up: `[rows, cols]`, rows contiguous.
///
/// # Errors
/// [`ShapeError`] when the shapes differ or a row is not contiguous.
///
/// Accuracy: that of f and f′ in [`crate::math`], and two roundings (`rowwise::tests::gated`).
pub fn backward(
    ctx: &Context,
    activation: Activation,
    (gate, up): (MatRef<'_>, MatRef<'_>),
    d_y: MatRef<'_>,
    (d_gate, d_up): (MatMut<'_>, MatMut<'_>),
) -> Result<(), ShapeError> {
    let (rows, cols) = (gate.rows(), gate.cols());
    gate.expect_contiguous_rows("gate")?;
    for (argument, matrix) in [("up", up), ("d_y", d_y), ("d_gate", d_gate.as_ref()), ("d_up", d_up.as_ref())]
    {
        expect_rows(argument, matrix, rows, cols)?;
    }
    let block = rows_per_block(cols);
    let none = (MatMut::<f32>::empty(), 1);
    view::zip_row_blocks(ctx, (d_gate, block), (d_up, block), none, |index, (d_gate, d_up, _)| {
        let rows = index * block..index * block + d_gate.rows();
        let [gate, up, d_y] = [gate, up, d_y].map(|x| x.sub(rows.clone(), 0..cols));
        ctx.isa().dispatch(Backward { activation, gate, up, d_y, d_gate, d_up });
    });
    Ok(())
}
