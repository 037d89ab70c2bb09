//! The summed cross-entropy of a linear layer's outputs, which are never stored whole: for large vocabularies.

use std::sync::Arc;

use kavanam_kernels::rowwise::cross_entropy::CrossEntropy;
use kavanam_kernels::rowwise::projected_cross_entropy::{self as kernel, Grads, Projection};
use kavanam_kernels::{MatMut, MatRef, ShapeError};

use crate::models::PAD;
use crate::ops::LinearWeights;
use crate::param::ParamStore;
use crate::tape::{Backward, BackwardPass, Tape, Var};

/// [`cross_entropy`](fn@super::cross_entropy) of `x·Wᵀ + b`, with the logits made chunk by chunk, and again in the
/// backward pass.
///
/// # Shapes
/// x `[rows, width]`, W `[vocab, width]`, b `[vocab]`, one target a row; the result is a scalar. It is summed in f64.
///
/// # Errors
/// [`ShapeError`] when x has another width than W, or a target is outside of the vocabulary.
pub fn projected_cross_entropy(
    tape: &mut Tape<'_>,
    x: Var,
    weights: &LinearWeights,
    targets: &Arc<[u32]>,
    label_smoothing: f32,
) -> Result<Var, ShapeError> {
    let spec = CrossEntropy { label_smoothing, ignore_index: Some(PAD) };
    let mut losses = tape.buffer(targets.len());
    let projection = projection(tape.params(), tape.matrix(x), weights);
    kernel::forward(tape.context(), &projection, targets, &spec, &mut losses)?;
    let mut total = tape.buffer(1);
    total[0] = losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() as f32;
    let (targets, weights) = (targets.clone(), *weights);
    Ok(tape.push(total, 1, 1, || Saved { x, weights, targets, spec }))
}

fn projection<'a>(params: &'a ParamStore, x: MatRef<'a>, weights: &LinearWeights) -> Projection<'a> {
    let bias = weights.bias.map(|bias| params.get(bias));
    Projection { x, weight: params.matrix(weights.weight), bias }
}

struct Saved {
    x: Var,
    weights: LinearWeights,
    targets: Arc<[u32]>,
    spec: CrossEntropy,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let Saved { x, weights, targets, spec } = *self;
        let d_total = pass.output_grad(out)[0];
        let mut d_loss = pass.pool.take(targets.len());
        d_loss.fill(d_total);
        let mut d_x = pass.target(x);
        let projection = projection(pass.params, pass.nodes.matrix(x), &weights);
        let (rows, width, vocab) = (projection.x.rows(), projection.x.cols(), projection.weight.rows());
        let (d_weight, d_bias) = match weights.bias {
            None => (pass.grads.get_mut(weights.weight), None),
            Some(bias) => {
                let [d_weight, d_bias] = pass.grads.get_disjoint_mut([weights.weight, bias]);
                (d_weight, Some(d_bias))
            }
        };
        let grads = Grads {
            d_x: MatMut::new(d_x.buffer(), rows, width)?,
            d_weight: MatMut::new(d_weight, vocab, width)?,
            d_bias,
        };
        kernel::backward(&pass.ctx, &projection, &targets, &spec, &d_loss, grads)?;
        pass.put(x, d_x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{Case, check};
    use crate::param::Init;

    #[test]
    fn gradients_with_smoothing_padding_and_without_bias() {
        for (smoothing, with_bias) in [(0.0, true), (0.1, true), (0.1, false)] {
            let mut case = Case::new(41);
            let weight = case.store.add("weight", &[7, 4], Init::Uniform(0.5));
            let bias = with_bias.then(|| case.store.add("bias", &[7], Init::Uniform(0.5)));
            let weights = LinearWeights { weight, bias };
            case.input(5, 4);
            check(&case, |tape, v| {
                projected_cross_entropy(tape, v[0], &weights, &[3, PAD, 6, 1, 1].into(), smoothing)
            });
        }
    }
}
