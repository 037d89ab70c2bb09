//! `y = f(x)` element by element, for functions whose derivative needs x (GELU, SiLU).

use kavanam_kernels::ShapeError;
use kavanam_kernels::gemm::Activation;
use kavanam_kernels::rowwise::activation as kernel;

use crate::tape::{Backward, BackwardPass, Tape, Var};

/// `y = f(x)`, element by element.
///
/// # Errors
/// Never for a value of this tape.
pub fn activation(tape: &mut Tape<'_>, x: Var, f: Activation) -> Result<Var, ShapeError> {
    let (rows, cols) = tape.shape(x);
    let mut y = tape.buffer(rows * cols);
    kernel::forward(tape.context(), f, tape.value(x), &mut y)?;
    Ok(tape.push(y, rows, cols, || Saved { x, f }))
}

struct Saved {
    x: Var,
    f: Activation,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let d_y = pass.output_grad(out);
        let mut d_x = pass.target(self.x);
        kernel::backward(&pass.ctx, self.f, pass.nodes.value(self.x), &d_y, d_x.buffer())?;
        pass.put(self.x, d_x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{Case, check};

    #[test]
    fn gradients() {
        for f in [Activation::GeluErf, Activation::Tanh] {
            let mut case = Case::new(5);
            case.input(7, 13);
            check(&case, |tape, inputs| activation(tape, inputs[0], f));
        }
    }
}
