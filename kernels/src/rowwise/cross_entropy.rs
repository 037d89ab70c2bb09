//! Cross entropy of a softmax over rows, with label smoothing and ignored rows.
//!
//! ```text
//! forward:   p = softmax(x);  q[j] = (1 − ε)·[j = t] + ε/n
//!            loss = −Σ q[j]·log p[j] = log Σ exp(x[k] − m) − (1 − ε)·(x[t] − m) − ε·Σ (x[k] − m)/n
//! backward:  d_x[j] = d_loss·(p[j] − q[j])
//! ```
//! - p is never stored: forward makes one number a row, backward recomputes the exponentials into d_x itself,
//!   which is read and written once more in L1. The smoothing mass is uniform over **all** classes, as in
//!   PyTorch.
//! - Everything is relative to the row's maximum m, so that no two large numbers are subtracted at the end.
//!
//! A row whose target is `ignore_index` has loss 0 and gradient 0, whatever stands in it. Of the others, a row
//! of −∞ alone has loss ∞ and gradient 0; a NaN, or +∞, makes its row's loss and gradient NaN; −∞ at the
//! target, or anywhere under label smoothing, gives the loss ∞.

use pulp::{Simd, WithSimd};

use super::softmax::row_max;
use super::{expect_rows, rows_per_block};
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::view::{self, MatMut, MatRef};
use crate::{lanes, math};

/// Which loss.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct CrossEntropy {
    /// ε in 0..=1: the mass that is taken from the target and spread over all classes.
    pub label_smoothing: f32,
    /// Rows with this target count nothing.
    pub ignore_index: Option<u32>,
}

impl CrossEntropy {
    fn check(&self, logits: MatRef, targets: &[u32]) -> Result<(), ShapeError> {
        logits.expect_contiguous_rows("logits")?;
        self.check_targets(logits.rows(), logits.cols(), targets)
    }

    /// ε is one, and `targets` are those of `rows` rows.
    pub(super) fn check_targets(
        &self,
        rows: usize,
        classes: usize,
        targets: &[u32],
    ) -> Result<(), ShapeError> {
        expect_dim("targets", "length", rows, targets.len())?;
        if !(0.0..=1.0).contains(&self.label_smoothing) {
            return Err(ShapeError::Value {
                argument: "label_smoothing",
                value: self.label_smoothing.to_string(),
                expected: "a number in 0..=1",
            });
        }
        let wrong = targets.iter().position(|&t| Some(t) != self.ignore_index && t as usize >= classes);
        match wrong {
            Some(position) => Err(ShapeError::Index {
                argument: "targets",
                position,
                index: targets[position] as usize,
                len: classes,
            }),
            None => Ok(()),
        }
    }
}

struct Forward<'a> {
    logits: MatRef<'a>,
    targets: &'a [u32],
    spec: CrossEntropy,
    losses: &'a mut [f32],
}

/// At most this many rows go through each step of the forward pass together.
const BATCH: usize = 64;

/// Elements of such rows: they stay in the first-level cache between two steps.
const BATCH_ELEMENTS: usize = 4096;

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let batch = (BATCH_ELEMENTS / self.logits.cols().max(1)).clamp(1, BATCH);
        for first in (0..self.losses.len()).step_by(batch) {
            let rows = first..(first + batch).min(self.losses.len());
            let logits = self.logits.sub(rows.clone(), 0..self.logits.cols());
            let (targets, losses) = (&self.targets[rows.clone()], &mut self.losses[rows]);
            Forward { logits, targets, spec: self.spec, losses }.batch(simd);
        }
    }
}

impl Forward<'_> {
    /// All maxima, then all sums, then all logarithms: a row at a time, each step would wait for the one before,
    /// which for rows of some dozens of classes takes longer than the arithmetic.
    #[inline(always)]
    fn batch<S: Simd>(self, simd: S) {
        let Forward { logits, targets, spec, losses } = self;
        let epsilon = spec.label_smoothing;
        let mut tops = [None; BATCH];
        let mut sums = [0.0; BATCH];
        for (i, (top, &target)) in tops.iter_mut().zip(targets).enumerate() {
            *top = if Some(target) == spec.ignore_index { None } else { row_max(simd, logits.row(i)) };
        }
        for (i, (((loss, sum), top), &target)) in
            losses.iter_mut().zip(&mut sums).zip(&tops).zip(targets).enumerate()
        {
            // log 1 − 0 of a row that is ignored, log ∞ − 0 of a row of −∞ alone.
            (*sum, *loss) = match *top {
                None if Some(target) == spec.ignore_index => (1.0, 0.0),
                None => (f32::INFINITY, 0.0),
                Some(max) => {
                    let (sum, uniform) = sums_of_row(simd, logits.row(i), max, epsilon);
                    let away = logits.at(i, target as usize) - max;
                    (sum, if epsilon == 1.0 { 0.0 } else { (1.0 - epsilon) * away } + uniform)
                }
            };
        }
        lanes::update(
            simd,
            &sums[..losses.len()],
            losses,
            #[inline(always)]
            |sum, rest| simd.sub_f32s(math::log(simd, sum), rest),
        );
    }
}

/// `Σ exp(x − max)` and `ε·Σ (x − max)/n`.
#[inline(always)]
fn sums_of_row<S: Simd>(simd: S, x: &[f32], max: f32, epsilon: f32) -> (f32, f32) {
    let m = simd.splat_f32s(max);
    if epsilon == 0.0 {
        let [sum] = lanes::sums(
            simd,
            x,
            #[inline(always)]
            |x| [math::exp_flushed(simd, simd.sub_f32s(x, m))],
        );
        return (sum, 0.0);
    }
    let [sum, shifted] = lanes::sums(
        simd,
        x,
        #[inline(always)]
        |x| {
            let shifted = simd.sub_f32s(x, m);
            [math::exp_flushed(simd, shifted), shifted]
        },
    );
    (sum, epsilon * (shifted / x.len() as f32))
}

struct Backward<'a> {
    logits: MatRef<'a>,
    targets: &'a [u32],
    spec: CrossEntropy,
    d_loss: &'a [f32],
    d_logits: MatMut<'a>,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let epsilon = self.spec.label_smoothing;
        let n = self.logits.cols() as f32;
        for (i, (&d_loss, &target)) in self.d_loss.iter().zip(self.targets).enumerate() {
            let (x, d_x) = (self.logits.row(i), self.d_logits.row_mut(i));
            let max = if Some(target) == self.spec.ignore_index { None } else { row_max(simd, x) };
            let Some(max) = max else {
                d_x.fill(0.0);
                continue;
            };
            let m = simd.splat_f32s(max);
            let sum = lanes::map_sum(
                simd,
                x,
                d_x,
                #[inline(always)]
                |x| math::exp_flushed(simd, simd.sub_f32s(x, m)),
            );
            let scale = simd.splat_f32s(1.0 / sum);
            let uniform = simd.splat_f32s(epsilon / n);
            let outer = simd.splat_f32s(d_loss);
            let p = d_x[target as usize] * (1.0 / sum);
            lanes::map_in_place(
                simd,
                d_x,
                #[inline(always)]
                |e| simd.mul_f32s(simd.sub_f32s(simd.mul_f32s(e, scale), uniform), outer),
            );
            d_x[target as usize] = (p - (1.0 - epsilon) - epsilon / n) * d_loss;
        }
    }
}

/// `losses[i] = −Σⱼ q[i][j]·log softmax(logits[i])[j]`, q being the smoothed target; 0 for ignored rows.
///
/// # Shapes
/// logits: `[rows, classes]`, rows contiguous; targets, losses: `[rows]`.
///
/// # Errors
/// [`ShapeError`] when the shapes differ, a row is not contiguous, ε is outside of 0..=1, or a target that is
/// not ignored is no class. Nothing has been written then.
///
/// Accuracy: error at most `(classes + D + 12)·2⁻²³·max(1, D)`, D the distance of the row's maximum to its
/// least finite element (`rowwise::tests::cross_entropy`).
pub fn forward(
    ctx: &Context,
    logits: MatRef,
    targets: &[u32],
    spec: &CrossEntropy,
    losses: &mut [f32],
) -> Result<(), ShapeError> {
    spec.check(logits, targets)?;
    expect_dim("losses", "length", logits.rows(), losses.len())?;
    let block = rows_per_block(logits.cols());
    view::for_each_chunk(ctx, losses, block, |index, losses| {
        let rows = index * block..index * block + losses.len();
        let (logits, targets) = (logits.sub(rows.clone(), 0..logits.cols()), &targets[rows]);
        ctx.isa().dispatch(Forward { logits, targets, spec: *spec, losses });
    });
    Ok(())
}

/// `d_logits[i][j] = d_loss[i]·(softmax(logits[i])[j] − q[i][j])`; 0 in ignored rows.
///
/// # Shapes
/// logits, d_logits: `[rows, classes]`, rows contiguous; targets, d_loss: `[rows]`.
///
/// # Errors
/// As [`forward`]. Nothing has been written then.
///
/// Accuracy: error at most `|d_loss|·2⁻²⁴·(p[j]·(2·D + classes + 10) + 6·max(p[j], q[j]))`
/// (`rowwise::tests::cross_entropy`).
pub fn backward(
    ctx: &Context,
    logits: MatRef,
    targets: &[u32],
    spec: &CrossEntropy,
    d_loss: &[f32],
    d_logits: MatMut,
) -> Result<(), ShapeError> {
    spec.check(logits, targets)?;
    expect_dim("d_loss", "length", logits.rows(), d_loss.len())?;
    expect_rows("d_logits", d_logits.as_ref(), logits.rows(), logits.cols())?;
    d_logits.for_each_row_block(ctx, rows_per_block(logits.cols()), |first, d_logits| {
        let rows = first..first + d_logits.rows();
        let (targets, d_loss) = (&targets[rows.clone()], &d_loss[rows.clone()]);
        let logits = logits.sub(rows, 0..logits.cols());
        ctx.isa().dispatch(Backward { logits, targets, spec: *spec, d_loss, d_logits });
    });
    Ok(())
}
