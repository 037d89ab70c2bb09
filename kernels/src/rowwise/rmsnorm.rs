//! Root-mean-square normalisation over rows.
//!
//! ```text
//! forward:   rstd = 1/√(Σ x²/n + eps);  y[j] = x[j]·rstd·gamma[j]
//! backward:  g[j] = d_y[j]·gamma[j];  x̂[j] = x[j]·rstd
//!            d_x[j] = rstd·(g[j] − x̂[j]·Σ g·x̂ / n);  d_gamma[j] += Σ rows d_y[j]·x̂[j]
//! ```
//! As [`super::layernorm`] without the mean: forward reads a row twice from L1.
//!
//! A NaN makes its whole row NaN.
//!
//! Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.

use pulp::{Simd, WithSimd};

use super::{ROWS_PER_SUM, expect_rows, reduce, rows_per_block};
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::lanes;
use crate::scratch::ScratchBuf;
use crate::view::{self, MatMut, MatRef};

/// The learned scale of a normalised row, and the number that keeps 1/√(…) finite.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm<'a> {
    /// Scale, one for each column.
    pub gamma: &'a [f32],
    /// Added to the mean of the squares.
    pub eps: f32,
}

struct Forward<'a> {
    x: MatRef<'a>,
    norm: RmsNorm<'a>,
    y: MatMut<'a>,
    rstd: &'a mut [f32],
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        for (i, rstd) in self.rstd.iter_mut().enumerate() {
            *rstd = self.norm.row(simd, self.x.row(i), self.y.row_mut(i));
        }
    }
}

impl RmsNorm<'_> {
    /// One row of [`forward`]; its 1/√(…).
    #[inline(always)]
    pub(super) fn row<S: Simd>(&self, simd: S, x: &[f32], y: &mut [f32]) -> f32 {
        let rstd = 1.0 / (lanes::dot(simd, x, x) / x.len() as f32 + self.eps).sqrt();
        let scale = simd.splat_f32s(rstd);
        lanes::zip(
            simd,
            x,
            self.gamma,
            y,
            #[inline(always)]
            |x, gamma| simd.mul_f32s(simd.mul_f32s(x, scale), gamma),
        );
        rstd
    }
}

struct Backward<'a> {
    x: MatRef<'a>,
    gamma: &'a [f32],
    rstd: &'a [f32],
    d_y: MatRef<'a>,
    d_x: MatMut<'a>,
    d_gamma: &'a mut [f32],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        self.d_gamma.fill(0.0);
        for (i, &rstd) in self.rstd.iter().enumerate() {
            let d_x = self.d_x.row_mut(i);
            row_backward(simd, self.gamma, rstd, (self.x.row(i), self.d_y.row(i)), d_x, self.d_gamma);
        }
    }
}

/// One row of [`backward`]: from x and d_y; adds the row's part to d_gamma.
#[inline(always)]
pub(super) fn row_backward<S: Simd>(
    simd: S,
    gamma: &[f32],
    rstd: f32,
    (x, d_y): (&[f32], &[f32]),
    d_x: &mut [f32],
    d_gamma: &mut [f32],
) {
    let n = 1.0 / x.len() as f32;
    let rstd = simd.splat_f32s(rstd);
    let mut sum = simd.splat_f32s(0.0);
    lanes::visit(
        simd,
        [x, d_y, gamma],
        [d_gamma],
        #[inline(always)]
        |[x, d_y, gamma], [d_gamma]| {
            let normal = simd.mul_f32s(x, rstd);
            sum = simd.mul_add_e_f32s(simd.mul_f32s(d_y, gamma), normal, sum);
            [simd.mul_add_e_f32s(d_y, normal, d_gamma)]
        },
    );
    let mean = simd.splat_f32s(simd.reduce_sum_f32s(sum) * n);
    lanes::visit(
        simd,
        [x, d_y, gamma],
        [d_x],
        #[inline(always)]
        |[x, d_y, gamma], _| {
            let normal = simd.mul_f32s(x, rstd);
            let inner = simd.negate_mul_add_e_f32s(normal, mean, simd.mul_f32s(d_y, gamma));
            [simd.mul_f32s(rstd, inner)]
        },
    );
}

/// `y[i][j] = x[i][j]·rstd[i]·gamma[j]`, `rstd[i] = 1/√(Σⱼ x[i][j]²/cols + eps)`, which is saved.
///
/// # Shapes
/// x, y: `[rows, cols]`, rows contiguous; gamma: `[cols]`; rstd: `[rows]`.
///
/// # Errors
/// [`ShapeError`] when the shapes differ or a row is not contiguous.
///
/// Accuracy: relative error at most `(cols/2 + 5)·2⁻²⁴` (`rowwise::tests::rmsnorm`).
pub fn forward(
    ctx: &Context,
    x: MatRef,
    norm: &RmsNorm,
    y: MatMut,
    rstd: &mut [f32],
) -> Result<(), ShapeError> {
    let (rows, cols) = (x.rows(), x.cols());
    x.expect_contiguous_rows("x")?;
    expect_dim("gamma", "length", cols, norm.gamma.len())?;
    expect_rows("y", y.as_ref(), rows, cols)?;
    expect_dim("rstd", "length", rows, rstd.len())?;
    let block = rows_per_block(cols);
    let rstd = MatMut::new(rstd, rows, 1)?;
    let none = (MatMut::<f32>::empty(), 1);
    view::zip_row_blocks(ctx, (y, block), (rstd, block), none, |index, (y, mut rstd, _)| {
        let first = index * block;
        let x = x.sub(first..first + rstd.rows(), 0..cols);
        let rstd = rstd.as_mut_slice().expect("a block of a slice is a slice");
        ctx.isa().dispatch(Forward { x, norm: *norm, y, rstd });
    });
    Ok(())
}

/// What backward reads: the input of forward, gamma, and what forward saved.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// The input of forward, `[rows, cols]`.
    pub x: MatRef<'a>,
    /// The scale, `[cols]`.
    pub gamma: &'a [f32],
    /// What forward saved, `[rows]`.
    pub rstd: &'a [f32],
}

/// The gradients of x and gamma; that of gamma is **added** to what is there.
///
/// # Shapes
/// saved.x, d_y, d_x: `[rows, cols]`, rows contiguous; d_gamma: `[cols]`.
///
/// # Errors
/// [`ShapeError`] when the shapes differ or a row is not contiguous.
///
/// Accuracy: the bounds of `rowwise::tests::rmsnorm`. d_gamma is summed over [`ROWS_PER_SUM`] rows at a
/// time in a fixed order, so its bits depend on no number of threads.
pub fn backward(
    ctx: &Context,
    saved: &Saved,
    d_y: MatRef,
    d_x: MatMut,
    d_gamma: &mut [f32],
) -> Result<(), ShapeError> {
    let Saved { x, gamma, rstd } = *saved;
    let (rows, cols) = (x.rows(), x.cols());
    x.expect_contiguous_rows("x")?;
    expect_dim("gamma", "length", cols, gamma.len())?;
    expect_dim("rstd", "length", rows, rstd.len())?;
    expect_rows("d_y", d_y, rows, cols)?;
    expect_rows("d_x", d_x.as_ref(), rows, cols)?;
    expect_dim("d_gamma", "length", cols, d_gamma.len())?;
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let chunks = rows.div_ceil(ROWS_PER_SUM);
    let mut partial = ScratchBuf::take(chunks * cols);
    let sums = MatMut::new(&mut partial, chunks, cols)?;
    let none = (MatMut::<f32>::empty(), 1);
    view::zip_row_blocks(ctx, (d_x, ROWS_PER_SUM), (sums, 1), none, |index, (d_x, mut sums, _)| {
        let rows = index * ROWS_PER_SUM..index * ROWS_PER_SUM + d_x.rows();
        let (x, d_y) = (x.sub(rows.clone(), 0..cols), d_y.sub(rows.clone(), 0..cols));
        let rstd = &rstd[rows];
        ctx.isa().dispatch(Backward { x, gamma, rstd, d_y, d_x, d_gamma: sums.row_mut(0) });
    });
    reduce::add_rows(ctx, MatRef::new(&partial, chunks, cols)?, d_gamma);
    Ok(())
}
