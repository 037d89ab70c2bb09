//! The summed cross-entropy of targets under a softmax, with label smoothing, in one op.

use std::sync::Arc;

use kavanam_kernels::rowwise::cross_entropy::{self as kernel, CrossEntropy};
use kavanam_kernels::{MatMut, ShapeError};

use crate::models::PAD;
use crate::tape::{Backward, BackwardPass, Tape, Var};

/// `Σ −log softmax(logits)[target]` over the rows whose target is not [`PAD`], with a share
/// `label_smoothing` of each target spread evenly over the vocabulary.
///
/// # Shapes
/// logits `[rows, vocab]`, one target a row; the result is a scalar. It is summed in f64.
///
/// # Errors
/// [`ShapeError`] when a target is outside of the vocabulary.
pub fn cross_entropy(
    tape: &mut Tape<'_>,
    logits: Var,
    targets: &Arc<[u32]>,
    label_smoothing: f32,
) -> Result<Var, ShapeError> {
    summed(tape, logits, targets, CrossEntropy { label_smoothing, ignore_index: Some(PAD) })
}

/// As [`cross_entropy`] over all rows: every class counts, that with the number of [`PAD`] too.
///
/// # Shapes
/// logits `[rows, classes]`, one class a row; the result is a scalar. It is summed in f64.
///
/// # Errors
/// [`ShapeError`] when a class is outside of the logits' columns.
pub fn classification_loss(
    tape: &mut Tape<'_>,
    logits: Var,
    classes: &Arc<[u32]>,
    label_smoothing: f32,
) -> Result<Var, ShapeError> {
    summed(tape, logits, classes, CrossEntropy { label_smoothing, ignore_index: None })
}

fn summed(
    tape: &mut Tape<'_>,
    logits: Var,
    targets: &Arc<[u32]>,
    spec: CrossEntropy,
) -> Result<Var, ShapeError> {
    let mut losses = tape.buffer(targets.len());
    kernel::forward(tape.context(), tape.matrix(logits), targets, &spec, &mut losses)?;
    let mut total = tape.buffer(1);
    total[0] = losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() as f32;
    let targets = targets.clone();
    Ok(tape.push(total, 1, 1, || Saved { logits, targets, spec }))
}

struct Saved {
    logits: Var,
    targets: Arc<[u32]>,
    spec: CrossEntropy,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let Saved { logits, targets, spec } = *self;
        let d_total = pass.output_grad(out)[0];
        let mut d_loss = pass.pool.take(targets.len());
        d_loss.fill(d_total);
        let mut d_logits = pass.target(logits);
        let value = pass.nodes.matrix(logits);
        let d_mat = MatMut::new(d_logits.buffer(), value.rows(), value.cols())?;
        kernel::backward(&pass.ctx, value, &targets, &spec, &d_loss, d_mat)?;
        pass.put(logits, d_logits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{Case, check};

    #[test]
    fn gradients_with_smoothing_and_padding() {
        for smoothing in [0.0, 0.1] {
            let mut case = Case::new(31);
            case.input(5, 7);
            check(&case, |tape, v| cross_entropy(tape, v[0], &[3, PAD, 6, 1, 1].into(), smoothing));
        }
        let mut case = Case::new(32);
        case.input(3, 4);
        for smoothing in [0.0, 0.1] {
            check(&case, |tape, v| classification_loss(tape, v[0], &[0, 3, 0].into(), smoothing));
        }
    }

    #[test]
    fn uniform_logits_cost_the_logarithm_of_the_vocabulary() {
        let (store, pool) = (crate::ParamStore::new(0), crate::Pool::new());
        let ctx = kavanam_kernels::Context::with_isa(kavanam_kernels::Isa::best());
        let mut tape = Tape::inference(&ctx, &store, &pool);
        let logits = tape.constant(&[2.0; 12], 3, 4).unwrap();
        let loss = cross_entropy(&mut tape, logits, &[1, 3, PAD].into(), 0.2).unwrap();
        assert!((tape.value(loss)[0] - 2.0 * 4f32.ln()).abs() < 1e-5);
        assert!(cross_entropy(&mut tape, logits, &[1, 4, PAD].into(), 0.0).is_err());
    }
}
