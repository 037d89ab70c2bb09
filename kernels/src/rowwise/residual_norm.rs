//! A block's output joins the residual stream, and the stream is normalised: one kernel forward, one backward.
//!
//! ```text
//! forward:   sum = residual + dropout(x);   y = norm(sum)
//! backward:  d_residual = norm′(d_y) + d_sum;   d_x = dropout(d_residual)
//! ```
//! The naive form is three kernels: seven passes over memory forward where two reads and two writes suffice. Here a row
//! is joined, and normalised while it lies in the first-level cache; backward adds and masks a row as soon as it is
//! made.
//!
//! - Every element goes through the roundings of the kernels apart, in their order: the results have their bits.
//! - The factors of dropout are made for some rows at a time, because a row of odd length begins within a block of
//!   the generator, whose parts of two rows would be made twice.
//! - `sum` is an output, not a scratch row: a stream goes on, and backward reads it.
//!
//! A NaN goes where the kernels apart let it go.

use pulp::{Simd, WithSimd};

use super::dropout::{self, Dropout};
use super::layernorm::{self, LayerNorm, RowStats};
use super::rmsnorm::{self, RmsNorm};
use super::{CHUNK, ROWS_PER_SUM, expect_rows, reduce, rows_per_block};
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::lanes;
use crate::scratch::ScratchBuf;
use crate::view::{self, MatMut, MatRef};

/// A normalisation of rows: [`LayerNorm`] or [`RmsNorm`].
pub trait Norm: Copy + Send + Sync {
    /// What forward saves of a row.
    type Stats: Copy + Send + Sync;

    /// Whether there is a shift, and so a d_beta.
    const SHIFTS: bool;

    /// The scale, one for each column.
    fn gamma(&self) -> &[f32];

    /// The shift, empty where there is none.
    fn beta(&self) -> &[f32];

    /// `y = norm(x)` of one row.
    fn row<S: Simd>(&self, simd: S, x: &[f32], y: &mut [f32]) -> Self::Stats;

    /// d_x of one row from `(x, d_y)`; adds to `sums` the row's part of d_gamma, and then of d_beta where there is one.
    fn row_backward<S: Simd>(
        &self,
        simd: S,
        stats: Self::Stats,
        inputs: (&[f32], &[f32]),
        d_x: &mut [f32],
        sums: &mut [f32],
    );
}

impl Norm for LayerNorm<'_> {
    type Stats = RowStats;

    const SHIFTS: bool = true;

    fn gamma(&self) -> &[f32] {
        self.gamma
    }

    fn beta(&self) -> &[f32] {
        self.beta
    }

    #[inline(always)]
    fn row<S: Simd>(&self, simd: S, x: &[f32], y: &mut [f32]) -> RowStats {
        LayerNorm::row(self, simd, x, y)
    }

    #[inline(always)]
    fn row_backward<S: Simd>(
        &self,
        simd: S,
        stats: RowStats,
        inputs: (&[f32], &[f32]),
        d_x: &mut [f32],
        sums: &mut [f32],
    ) {
        layernorm::row_backward(simd, self.gamma, stats, inputs, d_x, sums);
    }
}

impl Norm for RmsNorm<'_> {
    type Stats = f32;

    const SHIFTS: bool = false;

    fn gamma(&self) -> &[f32] {
        self.gamma
    }

    fn beta(&self) -> &[f32] {
        &[]
    }

    #[inline(always)]
    fn row<S: Simd>(&self, simd: S, x: &[f32], y: &mut [f32]) -> f32 {
        RmsNorm::row(self, simd, x, y)
    }

    #[inline(always)]
    fn row_backward<S: Simd>(
        &self,
        simd: S,
        stats: f32,
        inputs: (&[f32], &[f32]),
        d_x: &mut [f32],
        sums: &mut [f32],
    ) {
        rmsnorm::row_backward(simd, self.gamma, stats, inputs, d_x, sums);
    }
}

/// What joins: a block's output and the stream.
#[derive(Debug, Clone, Copy)]
pub struct Join<'a> {
    /// The block's output, `[rows, cols]`.
    pub x: MatRef<'a>,
    /// The stream before it, `[rows, cols]`.
    pub residual: MatRef<'a>,
    /// What falls of x: element `[i, j]` is element `i·cols + j` of the mask.
    pub dropout: Option<Dropout>,
}

/// Where forward writes.
#[derive(Debug)]
pub struct Outputs<'a, T> {
    /// The stream after the block, `[rows, cols]`.
    pub sum: MatMut<'a>,
    /// The normalised stream, `[rows, cols]`.
    pub y: MatMut<'a>,
    /// What backward needs of each row, `[rows]`.
    pub stats: &'a mut [T],
}

/// What backward reads.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a, T> {
    /// The stream that forward wrote, `[rows, cols]`.
    pub sum: MatRef<'a>,
    /// What forward saved, `[rows]`.
    pub stats: &'a [T],
    /// The mask of forward.
    pub dropout: Option<Dropout>,
    /// The gradient of y, `[rows, cols]`.
    pub d_y: MatRef<'a>,
    /// The gradient that reaches the stream by other ways, `[rows, cols]`.
    pub d_sum: Option<MatRef<'a>>,
}

/// Where backward writes.
#[derive(Debug)]
pub struct Grads<'a> {
    /// Of the stream before the block, `[rows, cols]`; overwritten.
    pub d_residual: MatMut<'a>,
    /// Of the block's output, `[rows, cols]`; overwritten. Without dropout it equals `d_residual` and may be left out.
    pub d_x: Option<MatMut<'a>>,
    /// Of the scale, `[cols]`; added to.
    pub d_gamma: &'a mut [f32],
    /// Of the shift, `[cols]`; added to. Empty where there is no shift.
    pub d_beta: &'a mut [f32],
}

/// Rows whose factors of dropout are made together.
fn rows_per_mask(cols: usize) -> usize {
    (CHUNK / 16 / cols.max(1)).max(1)
}

/// Calls `row(i, factors)` for `rows` rows, of which the first is `first` in the whole matrix; `factors` are
/// those of dropout, or empty.
#[inline(always)]
fn with_factors<S: Simd>(
    simd: S,
    dropout: Option<Dropout>,
    (first, rows, cols): (usize, usize, usize),
    mut row: impl FnMut(usize, &[f32]),
) {
    let Some(source) = dropout.map(|dropout| dropout.source()) else {
        (0..rows).for_each(
            #[inline(always)]
            |i| row(i, &[]),
        );
        return;
    };
    let together = rows_per_mask(cols).min(rows);
    let mut space = ScratchBuf::take(dropout::factors_space(together * cols));
    for start in (0..rows).step_by(together.max(1)) {
        let end = (start + together).min(rows);
        let range = ((first + start) * cols) as u64..((first + end) * cols) as u64;
        let factors = dropout::factors(simd, &source, range, &mut space);
        for i in start..end {
            row(i, &factors[(i - start) * cols..][..cols]);
        }
    }
}

struct Forward<'a, N: Norm> {
    norm: N,
    join: Join<'a>,
    /// The place of the first row in the whole matrix.
    first: usize,
    sum: MatMut<'a>,
    y: MatMut<'a>,
    stats: MatMut<'a, N::Stats>,
}

impl<N: Norm> WithSimd for Forward<'_, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let Join { x, residual, dropout } = self.join;
        with_factors(
            simd,
            dropout,
            (self.first, x.rows(), x.cols()),
            #[inline(always)]
            |i, factors| {
                let sum = self.sum.row_mut(i);
                if factors.is_empty() {
                    lanes::zip(
                        simd,
                        residual.row(i),
                        x.row(i),
                        sum,
                        #[inline(always)]
                        |residual, x| simd.add_f32s(residual, x),
                    );
                } else {
                    lanes::visit(
                        simd,
                        [residual.row(i), x.row(i), factors],
                        [&mut *sum],
                        #[inline(always)]
                        |[residual, x, factor], _| [simd.add_f32s(residual, dropout::keep(simd, x, factor))],
                    );
                }
                self.stats.row_mut(i)[0] = self.norm.row(simd, sum, self.y.row_mut(i));
            },
        );
    }
}

struct Backward<'a, N: Norm> {
    norm: N,
    saved: Saved<'a, N::Stats>,
    first: usize,
    d_residual: MatMut<'a>,
    d_x: MatMut<'a>,
    sums: &'a mut [f32],
}

impl<N: Norm> WithSimd for Backward<'_, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        self.sums.fill(0.0);
        let Saved { sum, stats, dropout, d_y, d_sum } = self.saved;
        let write_x = self.d_x.rows() > 0;
        with_factors(
            simd,
            dropout.filter(|_| write_x),
            (self.first, sum.rows(), sum.cols()),
            #[inline(always)]
            |i, factors| {
                let d_residual = self.d_residual.row_mut(i);
                let inputs = (sum.row(i), d_y.row(i));
                self.norm.row_backward(simd, stats[i], inputs, d_residual, self.sums);
                if let Some(d_sum) = d_sum {
                    lanes::update(
                        simd,
                        d_sum.row(i),
                        d_residual,
                        #[inline(always)]
                        |d_sum, d| simd.add_f32s(d, d_sum),
                    );
                }
                if !factors.is_empty() {
                    lanes::zip(
                        simd,
                        d_residual,
                        factors,
                        self.d_x.row_mut(i),
                        #[inline(always)]
                        |d, factor| dropout::keep(simd, d, factor),
                    );
                } else if write_x {
                    self.d_x.row_mut(i).copy_from_slice(d_residual);
                }
            },
        );
    }
}

/// `sum = residual + dropout(x)` and `y = norm(sum)`; saves what backward needs of each row.
///
/// # Shapes
/// x, residual, sum, y: `[rows, cols]`, rows contiguous; the norm's parameters: `[cols]`; stats: `[rows]`.
///
/// # Errors
/// [`ShapeError`] when the shapes differ, a row is not contiguous, or dropout's p is not in 0..1. Nothing has been
/// written then.
///
/// Accuracy: the bits of [`dropout::apply`], [`elementwise::add`](super::elementwise::add) and the norm one after the
/// other (`rowwise::tests::residual_norm`).
pub fn forward<N: Norm>(
    ctx: &Context,
    norm: &N,
    join: &Join<'_>,
    outputs: Outputs<'_, N::Stats>,
) -> Result<(), ShapeError> {
    let Outputs { sum, y, stats } = outputs;
    let (rows, cols) = (join.x.rows(), join.x.cols());
    join.x.expect_contiguous_rows("x")?;
    expect_rows("residual", join.residual, rows, cols)?;
    expect_rows("sum", sum.as_ref(), rows, cols)?;
    expect_rows("y", y.as_ref(), rows, cols)?;
    check_params(norm, cols)?;
    expect_dim("stats", "length", rows, stats.len())?;
    join.dropout.map_or(Ok(()), |dropout| dropout.check())?;
    let block = rows_per_block(cols);
    let stats = MatMut::new(stats, rows, 1)?;
    view::zip_row_blocks(ctx, (sum, block), (y, block), (stats, block), |index, (sum, y, stats)| {
        let first = index * block;
        let rows = first..first + y.rows();
        let [x, residual] = [join.x, join.residual].map(|x| x.sub(rows.clone(), 0..cols));
        let join = Join { x, residual, dropout: join.dropout };
        ctx.isa().dispatch(Forward { norm: *norm, join, first, sum, y, stats });
    });
    Ok(())
}

fn check_params<N: Norm>(norm: &N, cols: usize) -> Result<(), ShapeError> {
    expect_dim("gamma", "length", cols, norm.gamma().len())?;
    expect_dim("beta", "length", if N::SHIFTS { cols } else { 0 }, norm.beta().len())
}

/// The gradients of [`forward`]; those of gamma and beta are **added** to what is there.
///
/// # Shapes
/// saved.sum, d_y, d_sum, d_residual, d_x: `[rows, cols]`, rows contiguous; stats: `[rows]`; d_gamma: `[cols]`; d_beta:
/// `[cols]`, or empty for a norm without shift.
///
/// # Errors
/// As [`forward`].
///
/// Accuracy: the bits of the norm's backward pass, a sum and [`dropout::apply`] one after the other
/// (`rowwise::tests::residual_norm`).
pub fn backward<N: Norm>(
    ctx: &Context,
    norm: &N,
    saved: &Saved<'_, N::Stats>,
    grads: Grads<'_>,
) -> Result<(), ShapeError> {
    let Grads { d_residual, d_x, d_gamma, d_beta } = grads;
    let (rows, cols) = (saved.sum.rows(), saved.sum.cols());
    saved.sum.expect_contiguous_rows("sum")?;
    expect_rows("d_y", saved.d_y, rows, cols)?;
    saved.d_sum.map_or(Ok(()), |d_sum| expect_rows("d_sum", d_sum, rows, cols))?;
    expect_rows("d_residual", d_residual.as_ref(), rows, cols)?;
    d_x.as_ref().map_or(Ok(()), |d_x| expect_rows("d_x", d_x.as_ref(), rows, cols))?;
    check_params(norm, cols)?;
    expect_dim("stats", "length", rows, saved.stats.len())?;
    expect_dim("d_gamma", "length", cols, d_gamma.len())?;
    let sets = if N::SHIFTS { 2 } else { 1 };
    expect_dim("d_beta", "length", (sets - 1) * cols, d_beta.len())?;
    saved.dropout.map_or(Ok(()), |dropout| dropout.check())?;
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let chunks = rows.div_ceil(ROWS_PER_SUM);
    let mut partial = ScratchBuf::take(chunks * sets * cols);
    let sums = MatMut::new(&mut partial, chunks, sets * cols)?;
    let d_x = d_x.map_or((MatMut::empty(), 1), |d_x| (d_x, ROWS_PER_SUM));
    view::zip_row_blocks(
        ctx,
        (d_residual, ROWS_PER_SUM),
        d_x,
        (sums, 1),
        |index, (d_residual, d_x, mut sums)| {
            let first = index * ROWS_PER_SUM;
            let rows = first..first + d_residual.rows();
            let saved = Saved {
                sum: saved.sum.sub(rows.clone(), 0..cols),
                stats: &saved.stats[rows.clone()],
                d_y: saved.d_y.sub(rows.clone(), 0..cols),
                d_sum: saved.d_sum.map(|d_sum| d_sum.sub(rows.clone(), 0..cols)),
                ..*saved
            };
            ctx.isa().dispatch(Backward {
                norm: *norm,
                saved,
                first,
                d_residual,
                d_x,
                sums: sums.row_mut(0),
            });
        },
    );
    let sums = MatRef::new(&partial, chunks, sets * cols)?;
    reduce::add_rows(ctx, sums.sub(0..chunks, 0..cols), d_gamma);
    if N::SHIFTS {
        reduce::add_rows(ctx, sums.sub(0..chunks, cols..2 * cols), d_beta);
    }
    Ok(())
}
