//! Softmax over rows.
//!
//! ```text
//! forward:   m = max x;  y[j] = exp(x[j] − m) / Σ exp(x[k] − m)
//! backward:  d_x[j] = y[j] · (d_y[j] − Σ y[k]·d_y[k])
//! ```
//! - Forward goes over the row three times (maximum; exponential and its sum in one; scale), with the row
//!   in L1 cache: memory is read once and written once.
//! - The division is one reciprocal a row and a product an element.
//! - The one-pass form that rescales a running sum (Milakov and Gimelshein 2018, arXiv:1805.02867) pays a
//!   second exponential an element to save a pass over L1: slower for rows that fit there.
//!
//! A row of −∞ alone (fully masked) gives zeros, and zero gradients. A NaN, or +∞, makes its whole row NaN.

use pulp::{Simd, WithSimd};

use super::{expect_rows, rows_per_block};
use crate::context::Context;
use crate::error::ShapeError;
use crate::view::{MatMut, MatRef};
use crate::{lanes, math};

/// The maximum of a row, or `None` when the row is empty or fully masked: −∞ alone, no NaN.
#[inline(always)]
pub(super) fn row_max<S: Simd>(simd: S, x: &[f32]) -> Option<f32> {
    let max = lanes::max(simd, x);
    // `lanes::max` may pass over a NaN.
    (max != f32::NEG_INFINITY || x.iter().any(|x| x.is_nan())).then_some(max)
}

struct Forward<'a> {
    x: MatRef<'a>,
    y: MatMut<'a>,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        for i in 0..self.x.rows() {
            let (x, y) = (self.x.row(i), self.y.row_mut(i));
            let Some(max) = row_max(simd, x) else {
                y.fill(0.0);
                continue;
            };
            let max = simd.splat_f32s(max);
            let sum = lanes::map_sum(
                simd,
                x,
                y,
                #[inline(always)]
                |x| math::exp_flushed(simd, simd.sub_f32s(x, max)),
            );
            let scale = simd.splat_f32s(1.0 / sum);
            lanes::map_in_place(
                simd,
                y,
                #[inline(always)]
                |y| simd.mul_f32s(y, scale),
            );
        }
    }
}

struct Backward<'a> {
    y: MatRef<'a>,
    d_y: MatRef<'a>,
    d_x: MatMut<'a>,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        for i in 0..self.y.rows() {
            let (y, d_y, d_x) = (self.y.row(i), self.d_y.row(i), self.d_x.row_mut(i));
            let mean = simd.splat_f32s(lanes::dot(simd, y, d_y));
            lanes::zip(
                simd,
                y,
                d_y,
                d_x,
                #[inline(always)]
                |y, d_y| simd.mul_f32s(y, simd.sub_f32s(d_y, mean)),
            );
        }
    }
}

/// `y[i][j] = exp(x[i][j]) / Σₖ exp(x[i][k])`.
///
/// # Shapes
/// x, y: `[rows, cols]`, rows contiguous.
///
/// # Errors
/// [`ShapeError`] when the shapes differ or a row is not contiguous.
///
/// Accuracy: relative error at most `(2·D + cols + 10)·2⁻²⁴`, D the distance of the row's maximum to its
/// farthest finite element (`rowwise::tests::softmax`).
pub fn forward(ctx: &Context, x: MatRef, y: MatMut) -> Result<(), ShapeError> {
    x.expect_contiguous_rows("x")?;
    expect_rows("y", y.as_ref(), x.rows(), x.cols())?;
    y.for_each_row_block(ctx, rows_per_block(x.cols()), |first, y| {
        let x = x.sub(first..first + y.rows(), 0..x.cols());
        ctx.isa().dispatch(Forward { x, y });
    });
    Ok(())
}

/// `d_x[i][j] = y[i][j]·(d_y[i][j] − Σₖ y[i][k]·d_y[i][k])`, y being the output of [`forward`].
///
/// # Shapes
/// y, d_y, d_x: `[rows, cols]`, rows contiguous.
///
/// # Errors
/// [`ShapeError`] when the shapes differ or a row is not contiguous.
///
/// Accuracy: error at most `(cols + 3)·2⁻²⁴·y[j]·(|d_y[j]| + Σ y[k]·|d_y[k]|)` (`rowwise::tests::softmax`).
pub fn backward(ctx: &Context, y: MatRef, d_y: MatRef, d_x: MatMut) -> Result<(), ShapeError> {
    y.expect_contiguous_rows("y")?;
    expect_rows("d_y", d_y, y.rows(), y.cols())?;
    expect_rows("d_x", d_x.as_ref(), y.rows(), y.cols())?;
    d_x.for_each_row_block(ctx, rows_per_block(y.cols()), |first, d_x| {
        let rows = first..first + d_x.rows();
        let (y, d_y) = (y.sub(rows.clone(), 0..y.cols()), d_y.sub(rows, 0..y.cols()));
        ctx.isa().dispatch(Backward { y, d_y, d_x });
    });
    Ok(())
}
