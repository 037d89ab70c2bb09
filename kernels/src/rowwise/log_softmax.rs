//! Log-softmax over rows.
//!
//! ```text
//! forward:   m = max x;  y[j] = (x[j] − m) − log Σ exp(x[k] − m)
//! backward:  d_x[j] = d_y[j] − exp(y[j])·Σ d_y[k]
//! ```
//! The exponentials are summed without being stored: two reads of the row from L1 and one write.
//!
//! A row of −∞ alone gives −∞, the logarithm of the zeros that softmax gives, and zero gradients. A NaN, or
//! +∞, makes its whole row NaN.

use pulp::{Simd, WithSimd};

use super::softmax::row_max;
use super::{expect_rows, rows_per_block};
use crate::context::Context;
use crate::error::ShapeError;
use crate::view::{MatMut, MatRef};
use crate::{lanes, math};

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
                y.fill(f32::NEG_INFINITY);
                continue;
            };
            let max = simd.splat_f32s(max);
            let [sum] = lanes::sums(
                simd,
                x,
                #[inline(always)]
                |x| [math::exp_flushed(simd, simd.sub_f32s(x, max))],
            );
            let log_sum = math::log(simd, simd.splat_f32s(sum));
            lanes::map(
                simd,
                x,
                y,
                #[inline(always)]
                |x| simd.sub_f32s(simd.sub_f32s(x, max), log_sum),
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
            if row_max(simd, y).is_none() {
                d_x.fill(0.0);
                continue;
            }
            let sum = simd.splat_f32s(lanes::sum(simd, d_y));
            lanes::zip(
                simd,
                y,
                d_y,
                d_x,
                #[inline(always)]
                |y, d_y| simd.negate_mul_add_e_f32s(math::exp_flushed(simd, y), sum, d_y),
            );
        }
    }
}

/// `y[i][j] = x[i][j] − log Σₖ exp(x[i][k])`.
///
/// # Shapes
/// x, y: `[rows, cols]`, rows contiguous.
///
/// # Errors
/// [`ShapeError`] when the shapes differ or a row is not contiguous.
///
/// Accuracy: error at most `(2·|y[j]| + D + cols + 10)·2⁻²⁴`, D the distance of the row's maximum to its
/// farthest finite element (`rowwise::tests::log_softmax`).
pub fn forward(ctx: &Context, x: MatRef, y: MatMut) -> Result<(), ShapeError> {
    x.expect_contiguous_rows("x")?;
    expect_rows("y", y.as_ref(), x.rows(), x.cols())?;
    y.for_each_row_block(ctx, rows_per_block(x.cols()), |first, y| {
        let x = x.sub(first..first + y.rows(), 0..x.cols());
        ctx.isa().dispatch(Forward { x, y });
    });
    Ok(())
}

/// `d_x[i][j] = d_y[i][j] − exp(y[i][j])·Σₖ d_y[i][k]`, y being the output of [`forward`].
///
/// # Shapes
/// y, d_y, d_x: `[rows, cols]`, rows contiguous.
///
/// # Errors
/// [`ShapeError`] when the shapes differ or a row is not contiguous.
///
/// Accuracy: error at most `2⁻²⁴·(2·|d_y[j]| + exp(y[j])·(cols + 5)·Σ |d_y[k]|)`
/// (`rowwise::tests::log_softmax`).
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
