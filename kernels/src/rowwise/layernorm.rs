//! Layer normalisation over rows.
//!
//! ```text
//! forward:   mean = Σ x / n;  var = Σ (x − mean)² / n;  rstd = 1/√(var + eps)
//!            y[j] = x̂[j]·gamma[j] + beta[j],   x̂[j] = (x[j] − mean)·rstd
//! backward:  g[j] = d_y[j]·gamma[j]
//!            d_x[j] = rstd·(g[j] − Σ g / n − x̂[j]·Σ g·x̂ / n)
//!            d_gamma[j] += Σ rows d_y[j]·x̂[j];  d_beta[j] += Σ rows d_y[j]
//! ```
//! - Forward reads the row three times from L1: the variance around the mean does not cancel as
//!   `E x² − mean²` does.
//! - x̂ is not stored: backward makes it again from x and the two numbers a row that forward saves.
//! - Backward goes over a row twice: the two sums together with the row's part of d_gamma and d_beta, then d_x.
//!
//! A NaN makes its whole row NaN. A row of equal elements has x̂ = 0.

use pulp::{Simd, WithSimd};

use super::{ROWS_PER_SUM, expect_rows, reduce, rows_per_block};
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::lanes;
use crate::scratch::ScratchBuf;
use crate::view::{self, MatMut, MatRef};

/// What forward saves of a row for backward.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RowStats {
    /// The mean of the row.
    pub mean: f32,
    /// 1/√(variance + eps).
    pub rstd: f32,
}

/// The learned scale and shift of a normalised row, and the number that keeps rstd finite.
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm<'a> {
    /// Scale, one for each column.
    pub gamma: &'a [f32],
    /// Shift, one for each column.
    pub beta: &'a [f32],
    /// Added to the variance.
    pub eps: f32,
}

struct Forward<'a> {
    x: MatRef<'a>,
    norm: LayerNorm<'a>,
    y: MatMut<'a>,
    stats: MatMut<'a, RowStats>,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        for i in 0..self.x.rows() {
            self.stats.row_mut(i)[0] = self.norm.row(simd, self.x.row(i), self.y.row_mut(i));
        }
    }
}

impl LayerNorm<'_> {
    /// One row of [`forward`].
    #[inline(always)]
    pub(super) fn row<S: Simd>(&self, simd: S, x: &[f32], y: &mut [f32]) -> RowStats {
        let n = x.len() as f32;
        let mean = lanes::sum(simd, x) / n;
        let center = simd.splat_f32s(mean);
        let [squares] = lanes::sums(
            simd,
            x,
            #[inline(always)]
            |x| {
                let d = simd.sub_f32s(x, center);
                [simd.mul_f32s(d, d)]
            },
        );
        let stats = RowStats { mean, rstd: 1.0 / (squares / n + self.eps).sqrt() };
        let rstd = simd.splat_f32s(stats.rstd);
        lanes::visit(
            simd,
            [x, self.gamma, self.beta],
            [y],
            #[inline(always)]
            |[x, gamma, beta], _| {
                let normal = simd.mul_f32s(simd.sub_f32s(x, center), rstd);
                [simd.mul_add_e_f32s(normal, gamma, beta)]
            },
        );
        stats
    }
}

struct Backward<'a> {
    x: MatRef<'a>,
    gamma: &'a [f32],
    stats: &'a [RowStats],
    d_y: MatRef<'a>,
    d_x: MatMut<'a>,
    /// d_gamma of these rows, then d_beta.
    sums: &'a mut [f32],
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        self.sums.fill(0.0);
        for (i, stats) in self.stats.iter().enumerate() {
            let d_x = self.d_x.row_mut(i);
            row_backward(simd, self.gamma, *stats, (self.x.row(i), self.d_y.row(i)), d_x, self.sums);
        }
    }
}

/// One row of [`backward`]: from x and d_y; adds to `sums`, the row's part of d_gamma and then of d_beta.
#[inline(always)]
pub(super) fn row_backward<S: Simd>(
    simd: S,
    gamma: &[f32],
    stats: RowStats,
    (x, d_y): (&[f32], &[f32]),
    d_x: &mut [f32],
    sums: &mut [f32],
) {
    let n = 1.0 / x.len() as f32;
    let (d_gamma, d_beta) = sums.split_at_mut(x.len());
    let (mean, rstd) = (simd.splat_f32s(stats.mean), simd.splat_f32s(stats.rstd));
    let mut sum_g = simd.splat_f32s(0.0);
    let mut sum_gx = simd.splat_f32s(0.0);
    lanes::visit(
        simd,
        [x, d_y, gamma],
        [d_gamma, d_beta],
        #[inline(always)]
        |[x, d_y, gamma], [d_gamma, d_beta]| {
            let normal = simd.mul_f32s(simd.sub_f32s(x, mean), rstd);
            let g = simd.mul_f32s(d_y, gamma);
            sum_g = simd.add_f32s(sum_g, g);
            sum_gx = simd.mul_add_e_f32s(g, normal, sum_gx);
            [simd.mul_add_e_f32s(d_y, normal, d_gamma), simd.add_f32s(d_beta, d_y)]
        },
    );
    let mean_g = simd.splat_f32s(simd.reduce_sum_f32s(sum_g) * n);
    let mean_gx = simd.splat_f32s(simd.reduce_sum_f32s(sum_gx) * n);
    lanes::visit(
        simd,
        [x, d_y, gamma],
        [d_x],
        #[inline(always)]
        |[x, d_y, gamma], _| {
            let normal = simd.mul_f32s(simd.sub_f32s(x, mean), rstd);
            let g = simd.mul_f32s(d_y, gamma);
            let inner = simd.negate_mul_add_e_f32s(normal, mean_gx, simd.sub_f32s(g, mean_g));
            [simd.mul_f32s(rstd, inner)]
        },
    );
}

/// `y[i][j] = (x[i][j] − mean_i)/√(var_i + eps)·gamma[j] + beta[j]`; saves mean and 1/√(…) a row.
///
/// # Shapes
/// x, y: `[rows, cols]`, rows contiguous; gamma, beta: `[cols]`; stats: `[rows]`.
///
/// # Errors
/// [`ShapeError`] when the shapes differ or a row is not contiguous.
///
/// Accuracy: see `rowwise::tests::layernorm` for the bound, which is of the order of
/// `cols·2⁻²⁴·max|x̂|·|gamma|` plus what rounding of the mean costs when |mean| is larger than the deviation.
///
/// # Source
/// Ba, Kiros and Hinton 2016, arXiv:1607.06450, equation 4.
pub fn forward(
    ctx: &Context,
    x: MatRef,
    norm: &LayerNorm,
    y: MatMut,
    stats: &mut [RowStats],
) -> Result<(), ShapeError> {
    let (rows, cols) = (x.rows(), x.cols());
    x.expect_contiguous_rows("x")?;
    expect_dim("gamma", "length", cols, norm.gamma.len())?;
    expect_dim("beta", "length", cols, norm.beta.len())?;
    expect_rows("y", y.as_ref(), rows, cols)?;
    expect_dim("stats", "length", rows, stats.len())?;
    let block = rows_per_block(cols);
    let stats = MatMut::new(stats, rows, 1)?;
    view::zip_row_blocks(
        ctx,
        (y, block),
        (stats, block),
        (MatMut::<f32>::empty(), 1),
        |index, (y, stats, _)| {
            let first = index * block;
            let x = x.sub(first..first + y.rows(), 0..cols);
            ctx.isa().dispatch(Forward { x, norm: *norm, y, stats });
        },
    );
    Ok(())
}

/// What backward reads: the input of forward, gamma, what forward saved, and the gradient of its output.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// The input of forward, `[rows, cols]`.
    pub x: MatRef<'a>,
    /// The scale, `[cols]`.
    pub gamma: &'a [f32],
    /// What forward saved, `[rows]`.
    pub stats: &'a [RowStats],
}

/// The gradients of x, gamma and beta; those of gamma and beta are **added** to what is there.
///
/// # Shapes
/// saved.x, d_y, d_x: `[rows, cols]`, rows contiguous; d_gamma, d_beta: `[cols]`.
///
/// # Errors
/// [`ShapeError`] when the shapes differ or a row is not contiguous.
///
/// Accuracy: the bounds of `rowwise::tests::layernorm`. d_gamma and d_beta are summed over
/// [`ROWS_PER_SUM`] rows at a time in a fixed order, so their bits depend on no number of threads.
pub fn backward(
    ctx: &Context,
    saved: &Saved,
    d_y: MatRef,
    d_x: MatMut,
    d_gamma: &mut [f32],
    d_beta: &mut [f32],
) -> Result<(), ShapeError> {
    let Saved { x, gamma, stats } = *saved;
    let (rows, cols) = (x.rows(), x.cols());
    x.expect_contiguous_rows("x")?;
    expect_dim("gamma", "length", cols, gamma.len())?;
    expect_dim("stats", "length", rows, stats.len())?;
    expect_rows("d_y", d_y, rows, cols)?;
    expect_rows("d_x", d_x.as_ref(), rows, cols)?;
    expect_dim("d_gamma", "length", cols, d_gamma.len())?;
    expect_dim("d_beta", "length", cols, d_beta.len())?;
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let chunks = rows.div_ceil(ROWS_PER_SUM);
    let mut partial = ScratchBuf::take(chunks * 2 * cols);
    let sums = MatMut::new(&mut partial, chunks, 2 * cols)?;
    view::zip_row_blocks(
        ctx,
        (d_x, ROWS_PER_SUM),
        (sums, 1),
        (MatMut::<f32>::empty(), 1),
        |index, (d_x, mut sums, _)| {
            let rows = index * ROWS_PER_SUM..index * ROWS_PER_SUM + d_x.rows();
            let (x, d_y) = (x.sub(rows.clone(), 0..cols), d_y.sub(rows.clone(), 0..cols));
            let stats = &stats[rows];
            ctx.isa().dispatch(Backward { x, gamma, stats, d_y, d_x, sums: sums.row_mut(0) });
        },
    );
    let sums = MatRef::new(&partial, chunks, 2 * cols)?;
    reduce::add_rows(ctx, sums.sub(0..chunks, 0..cols), d_gamma);
    reduce::add_rows(ctx, sums.sub(0..chunks, cols..2 * cols), d_beta);
    Ok(())
}
