//! Softmax and log-softmax of scaled scores, of which each row sees its first columns.
//!
//! ```text
//! n_i      = min(cols, lengths[i], i mod queries + offset + 1)
//! forward:   s[j] = scale·x[j] for j < n_i;   y = softmax(s) or log softmax(s);   hidden: y[j] = 0 or −∞
//! backward:  d_x[j] = scale·y[j]·(d_y[j] − Σ y[k]·d_y[k])        or scale·(d_y[j] − exp(y[j])·Σ d_y[k])
//!            over the columns that are seen;   hidden: d_x[j] = 0
//! ```
//! - The scale and the mask cost no pass of their own: a row is scaled into y, which stays in L1, and goes on there as in
//!   [`softmax`](super::softmax) and [`log_softmax`](super::log_softmax), whose bits it has on scores that were scaled and hidden by −∞.
//! - Hidden columns cost their fill alone, so a causal matrix costs half; they are never read, and may hold anything.
//!
//! This is for who needs the matrix of probabilities: attention itself takes [`crate::attention`], which stores none. A row that sees nothing, or
//! −∞ alone, gives what a hidden column gives and zero gradients. A NaN, or +∞, among what a row sees makes its visible columns NaN.

use pulp::{Simd, WithSimd};

use super::softmax::row_max;
use super::{expect_rows, rows_per_block};
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::view::{MatMut, MatRef};
use crate::{lanes, math};

/// Probabilities or their logarithms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The probabilities.
    Softmax,
    /// Their logarithms.
    LogSoftmax,
}

/// Rows are the queries of one sequence and head after another, and none sees what comes after its own position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CausalRows {
    /// Queries of a sequence: row `i` is query `i mod queries`.
    pub queries: usize,
    /// The position of query 0 among the columns.
    pub offset: usize,
}

/// What is computed of each row.
#[derive(Debug, Clone, Copy)]
pub struct MaskedSoftmax<'a> {
    /// Probabilities or their logarithms.
    pub form: Form,
    /// Multiplies the scores; finite and above 0.
    pub scale: f32,
    /// Hide what comes after a row's position.
    pub causal: Option<CausalRows>,
    /// Hide the columns from this one on, one length for each row.
    pub lengths: Option<&'a [usize]>,
}

impl MaskedSoftmax<'_> {
    /// How many columns row `i` sees.
    #[inline(always)]
    fn seen(&self, i: usize, cols: usize) -> usize {
        let by_length = self.lengths.map_or(cols, |lengths| lengths[i]);
        let by_order = self
            .causal
            .map_or(cols, |causal| (i % causal.queries).saturating_add(causal.offset).saturating_add(1));
        cols.min(by_length).min(by_order)
    }

    /// What hidden columns get.
    #[inline(always)]
    fn hidden(&self) -> f32 {
        match self.form {
            Form::Softmax => 0.0,
            Form::LogSoftmax => f32::NEG_INFINITY,
        }
    }

    fn check(&self, rows: usize) -> Result<(), ShapeError> {
        if !(self.scale.is_finite() && self.scale > 0.0) {
            let expected = "a finite number above 0";
            return Err(ShapeError::Value { argument: "scale", value: self.scale.to_string(), expected });
        }
        if self.causal.is_some_and(|causal| causal.queries == 0) {
            let expected = "at least 1";
            return Err(ShapeError::Value { argument: "causal.queries", value: "0".into(), expected });
        }
        self.lengths.map_or(Ok(()), |lengths| expect_dim("lengths", "length", rows, lengths.len()))
    }
}

struct Forward<'a> {
    spec: MaskedSoftmax<'a>,
    /// The index of the first row.
    first: usize,
    x: MatRef<'a>,
    y: MatMut<'a>,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let scale = simd.splat_f32s(self.spec.scale);
        for i in 0..self.x.rows() {
            let seen = self.spec.seen(self.first + i, self.x.cols());
            let (y, hidden) = self.y.row_mut(i).split_at_mut(seen);
            hidden.fill(self.spec.hidden());
            lanes::map(
                simd,
                &self.x.row(i)[..seen],
                y,
                #[inline(always)]
                |x| simd.mul_f32s(x, scale),
            );
            let Some(max) = row_max(simd, y) else {
                y.fill(self.spec.hidden());
                continue;
            };
            match self.spec.form {
                Form::Softmax => softmax_in_place(simd, y, max),
                Form::LogSoftmax => log_softmax_in_place(simd, y, max),
            }
        }
    }
}

/// The softmax of a row with this maximum.
#[inline(always)]
fn softmax_in_place<S: Simd>(simd: S, y: &mut [f32], max: f32) {
    let max = simd.splat_f32s(max);
    lanes::map_in_place(
        simd,
        y,
        #[inline(always)]
        |s| math::exp_flushed(simd, simd.sub_f32s(s, max)),
    );
    let scale = simd.splat_f32s(1.0 / lanes::sum(simd, y));
    lanes::map_in_place(
        simd,
        y,
        #[inline(always)]
        |e| simd.mul_f32s(e, scale),
    );
}

/// The log-softmax of a row with this maximum.
#[inline(always)]
fn log_softmax_in_place<S: Simd>(simd: S, y: &mut [f32], max: f32) {
    let max = simd.splat_f32s(max);
    let [sum] = lanes::sums(
        simd,
        y,
        #[inline(always)]
        |s| [math::exp_flushed(simd, simd.sub_f32s(s, max))],
    );
    let log_sum = math::log(simd, simd.splat_f32s(sum));
    lanes::map_in_place(
        simd,
        y,
        #[inline(always)]
        |s| simd.sub_f32s(simd.sub_f32s(s, max), log_sum),
    );
}

struct Backward<'a> {
    spec: MaskedSoftmax<'a>,
    /// The index of the first row.
    first: usize,
    y: MatRef<'a>,
    d_y: MatRef<'a>,
    d_x: MatMut<'a>,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let scale = simd.splat_f32s(self.spec.scale);
        for i in 0..self.y.rows() {
            let seen = self.spec.seen(self.first + i, self.y.cols());
            let (d_x, hidden) = self.d_x.row_mut(i).split_at_mut(seen);
            hidden.fill(0.0);
            let (y, d_y) = (&self.y.row(i)[..seen], &self.d_y.row(i)[..seen]);
            match self.spec.form {
                Form::Softmax => {
                    let mean = simd.splat_f32s(lanes::dot(simd, y, d_y));
                    lanes::zip(
                        simd,
                        y,
                        d_y,
                        d_x,
                        #[inline(always)]
                        |y, d_y| simd.mul_f32s(simd.mul_f32s(y, simd.sub_f32s(d_y, mean)), scale),
                    );
                }
                Form::LogSoftmax if row_max(simd, y).is_none() => d_x.fill(0.0),
                Form::LogSoftmax => {
                    let sum = simd.splat_f32s(lanes::sum(simd, d_y));
                    lanes::zip(
                        simd,
                        y,
                        d_y,
                        d_x,
                        #[inline(always)]
                        |y, d_y| {
                            let d_s = simd.negate_mul_add_e_f32s(math::exp_flushed(simd, y), sum, d_y);
                            simd.mul_f32s(d_s, scale)
                        },
                    );
                }
            }
        }
    }
}

/// `y[i] = softmax(scale·x[i][..n_i])`, or its logarithm; 0, or −∞, in the columns that row `i` does not see.
///
/// # Shapes
/// x, y: `[rows, cols]`, rows contiguous; lengths: `[rows]`.
///
/// # Errors
/// [`ShapeError`] when the shapes differ, a row is not contiguous, the scale is not a finite number above 0, or causal rows have no query.
/// Nothing has been written then.
///
/// Accuracy: the bits of [`softmax::forward`](super::softmax::forward), or
/// [`log_softmax::forward`](super::log_softmax::forward), of the scaled scores (`rowwise::tests::masked_softmax`).
pub fn forward(ctx: &Context, spec: &MaskedSoftmax<'_>, x: MatRef, y: MatMut) -> Result<(), ShapeError> {
    spec.check(x.rows())?;
    x.expect_contiguous_rows("x")?;
    expect_rows("y", y.as_ref(), x.rows(), x.cols())?;
    y.for_each_row_block(ctx, rows_per_block(x.cols()), |first, y| {
        let x = x.sub(first..first + y.rows(), 0..x.cols());
        ctx.isa().dispatch(Forward { spec: *spec, first, x, y });
    });
    Ok(())
}

/// The gradient of [`forward`], whose output is `y`; 0 in the columns that a row does not see.
///
/// # Shapes
/// y, d_y, d_x: `[rows, cols]`, rows contiguous; lengths: `[rows]`.
///
/// # Errors
/// As [`forward`].
///
/// Accuracy: one rounding more than [`softmax::backward`](super::softmax::backward), or
/// [`log_softmax::backward`](super::log_softmax::backward), of the columns that are seen (`rowwise::tests::masked_softmax`).
pub fn backward(
    ctx: &Context,
    spec: &MaskedSoftmax<'_>,
    y: MatRef,
    d_y: MatRef,
    d_x: MatMut,
) -> Result<(), ShapeError> {
    spec.check(y.rows())?;
    y.expect_contiguous_rows("y")?;
    expect_rows("d_y", d_y, y.rows(), y.cols())?;
    expect_rows("d_x", d_x.as_ref(), y.rows(), y.cols())?;
    d_x.for_each_row_block(ctx, rows_per_block(y.cols()), |first, d_x| {
        let rows = first..first + d_x.rows();
        let (y, d_y) = (y.sub(rows.clone(), 0..y.cols()), d_y.sub(rows, 0..y.cols()));
        ctx.isa().dispatch(Backward { spec: *spec, first, y, d_y, d_x });
    });
    Ok(())
}
