//! `y = f(x·Wᵀ + b)`: a linear layer with its bias and activation in the product's epilogue.

use kavanam_kernels::gemm::{self, Accum, Activation, Epilogue};
use kavanam_kernels::rowwise::reduce;
use kavanam_kernels::{MatMut, MatRef, ShapeError};

use crate::param::ParamId;
use crate::tape::{Backward, BackwardPass, Slot, Tape, Var};

/// The weights of a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearWeights {
    /// `[out, in]`.
    pub weight: ParamId,
    /// `[out]`.
    pub bias: Option<ParamId>,
}

/// `y = f(x·Wᵀ + b)`.
///
/// A tape that records takes [`Activation::Identity`], [`Activation::Relu`] and [`Activation::Tanh`], whose
/// derivative their own value tells. For others see the op `activation`.
///
/// # Shapes
/// x `[rows, in]`, W `[out, in]`, b `[out]`, y `[rows, out]`.
///
/// # Errors
/// [`ShapeError`] when x has another width than W.
///
/// # Panics
/// For another activation on a tape that records.
pub fn linear(
    tape: &mut Tape<'_>,
    x: Var,
    weights: &LinearWeights,
    f: Activation,
) -> Result<Var, ShapeError> {
    let told_by_value = matches!(f, Activation::Identity | Activation::Relu | Activation::Tanh);
    assert!(told_by_value || !tape.is_recording(), "this op has no way back through {f:?}");
    let (rows, _) = tape.shape(x);
    let params = tape.params();
    let out = params.shape(weights.weight)[0];
    let mut y = tape.buffer(rows * out);
    let mut epilogue = Epilogue::default().activation(f);
    if let Some(bias) = weights.bias {
        epilogue = epilogue.bias(params.get(bias));
    }
    let y_mat = MatMut::new(&mut y, rows, out)?;
    match tape.packed(weights.weight)? {
        Some(packed) => {
            gemm::gemm_packed(tape.context(), tape.matrix(x), packed, y_mat, Accum::Overwrite, &epilogue)?
        }
        None => {
            let weight = params.matrix(weights.weight).t();
            gemm::gemm(tape.context(), tape.matrix(x), weight, y_mat, Accum::Overwrite, &epilogue)?;
        }
    }
    let weights = *weights;
    Ok(tape.push(y, rows, out, || Linear { x, weights, f }))
}

struct Linear {
    x: Var,
    weights: LinearWeights,
    f: Activation,
}

impl Backward for Linear {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let mut d_y = pass.output_grad(out);
        before_activation(self.f, pass.nodes.value(out), &mut d_y);
        let (rows, cols) = pass.nodes.shape(out);
        linear_backward(pass, self.x, &self.weights, d_y.matrix(rows, cols)?)
    }
}

/// d_y ⊙ f′ in place, f′ told by the value y = f.
fn before_activation(f: Activation, y: &[f32], d_y: &mut [f32]) {
    match f {
        Activation::Relu => {
            for (d, &y) in d_y.iter_mut().zip(y) {
                *d = if y > 0.0 { *d } else { 0.0 };
            }
        }
        Activation::Tanh => {
            for (d, &y) in d_y.iter_mut().zip(y) {
                *d *= 1.0 - y * y;
            }
        }
        _ => (),
    }
}

/// The gradients of a product `x·Wᵀ + b` given that of its result: d_W += d_yᵀ·x, d_b += Σ d_y, d_x += d_y·W.
pub(crate) fn linear_backward(
    pass: &mut BackwardPass<'_>,
    x: Var,
    weights: &LinearWeights,
    d_y: MatRef<'_>,
) -> Result<(), ShapeError> {
    let ctx = pass.ctx;
    let weight = pass.params.matrix(weights.weight);
    let epilogue = Epilogue::default();
    let d_weight = MatMut::new(pass.grads.get_mut(weights.weight), weight.rows(), weight.cols())?;
    let x_value = pass.nodes.matrix(x);
    gemm::gemm(&ctx, d_y.t(), x_value, d_weight, Accum::Add, &epilogue)?;
    if let Some(bias) = weights.bias {
        reduce::col_sum(&ctx, d_y, pass.grads.get_mut(bias))?;
    }
    let (mut d_x, slot) = pass.grad_slot(x);
    let accum = if slot == Slot::Fresh { Accum::Overwrite } else { Accum::Add };
    gemm::gemm(&ctx, d_y, weight, MatMut::new(&mut d_x, d_y.rows(), weight.cols())?, accum, &epilogue)?;
    pass.put_grad(x, d_x);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{Case, check};
    use crate::param::Init;

    #[test]
    fn gradients_of_every_activation() {
        for f in [Activation::Identity, Activation::Tanh, Activation::Relu] {
            for (rows, input, out) in [(1, 1, 1), (5, 7, 3), (17, 9, 20)] {
                let mut case = Case::new(rows as u64);
                let weights = LinearWeights {
                    weight: case.store.add("weight", &[out, input], Init::Uniform(0.3)),
                    // Away from the corner of ReLU.
                    bias: Some(case.store.add("bias", &[out], Init::Uniform(0.1))),
                };
                if f == Activation::Relu {
                    for (i, b) in case.store.get_mut(weights.bias.unwrap()).iter_mut().enumerate() {
                        *b = if i % 2 == 0 { 4.0 } else { -4.0 };
                    }
                }
                case.input(rows, input);
                check(&case, |tape, inputs| linear(tape, inputs[0], &weights, f));
            }
        }
    }

    #[test]
    fn an_input_used_twice_gets_both_gradients() {
        let mut case = Case::new(3);
        let first = LinearWeights { weight: case.store.add("a", &[4, 6], Init::Normal(0.4)), bias: None };
        let second = LinearWeights { weight: case.store.add("b", &[6, 4], Init::Normal(0.4)), bias: None };
        case.input(3, 6);
        check(&case, |tape, inputs| {
            let y = linear(tape, inputs[0], &first, Activation::Identity)?;
            let z = linear(tape, y, &second, Activation::Tanh)?;
            let again = linear(tape, z, &first, Activation::Identity)?;
            crate::ops::residual(tape, again, y, 0.0)
        });
    }
}
