//! `y = γ·(x − mean)/√(variance + ε) + β`, row by row.

use kavanam_kernels::rowwise::layernorm::{self as kernel, LayerNorm, RowStats};
use kavanam_kernels::{MatMut, ShapeError};

use crate::param::ParamId;
use crate::tape::{Backward, BackwardPass, Tape, Var};

/// The weights of a norm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormWeights {
    /// γ, `[width]`.
    pub weight: ParamId,
    /// β, `[width]`.
    pub bias: ParamId,
    /// ε.
    pub epsilon: f32,
}

/// Normalises every row.
///
/// # Shapes
/// x and the result `[rows, width]`.
///
/// # Errors
/// [`ShapeError`] when x has another width than the weights.
///
/// # Source
/// Ba, Kiros and Hinton 2016, equation 4.
pub fn layer_norm(tape: &mut Tape<'_>, x: Var, weights: &NormWeights) -> Result<Var, ShapeError> {
    let (rows, cols) = tape.shape(x);
    let params = tape.params();
    let mut y = tape.buffer(rows * cols);
    let mut stats = vec![RowStats::default(); rows];
    let norm =
        LayerNorm { gamma: params.get(weights.weight), beta: params.get(weights.bias), eps: weights.epsilon };
    kernel::forward(tape.context(), tape.matrix(x), &norm, MatMut::new(&mut y, rows, cols)?, &mut stats)?;
    let weights = *weights;
    Ok(tape.push(y, rows, cols, || Saved { x, weights, stats }))
}

struct Saved {
    x: Var,
    weights: NormWeights,
    stats: Vec<RowStats>,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let Saved { x, weights, stats } = *self;
        let d_y = pass.output_grad(out);
        let mut d_x = pass.target(x);
        let x_value = pass.nodes.matrix(x);
        let (rows, cols) = (x_value.rows(), x_value.cols());
        let saved = kernel::Saved { x: x_value, gamma: pass.params.get(weights.weight), stats: &stats };
        let [d_gamma, d_beta] = pass.grads.get_disjoint_mut([weights.weight, weights.bias]);
        let d_x_mat = MatMut::new(d_x.buffer(), rows, cols)?;
        kernel::backward(&pass.ctx, &saved, d_y.matrix(rows, cols)?, d_x_mat, d_gamma, d_beta)?;
        pass.put(x, d_x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{Case, check};
    use crate::param::Init;

    #[test]
    fn gradients() {
        let mut case = Case::new(21);
        let weights = NormWeights {
            weight: case.store.add("weight", &[9], Init::Uniform(1.0)),
            bias: case.store.add("bias", &[9], Init::Uniform(1.0)),
            epsilon: 0.1,
        };
        case.input(5, 9);
        check(&case, |tape, v| {
            let y = layer_norm(tape, v[0], &weights)?;
            crate::ops::residual(tape, v[0], y, 0.0)
        });
    }
}
