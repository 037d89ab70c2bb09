//! `y = x + dropout(s)`: a block's output joins the residual stream.

use kavanam_kernels::ShapeError;
use kavanam_kernels::error::expect_dim;
use kavanam_kernels::rowwise::dropout::{self as kernel, Dropout};
use kavanam_kernels::rowwise::elementwise;

use crate::ops::dropout::next;
use crate::tape::{Backward, BackwardPass, Tape, Var};

/// `y = x + dropout(s)`; without training, or with p = 0, `x + s`.
///
/// # Shapes
/// x, s and y alike.
///
/// # Errors
/// [`ShapeError`] when x and s differ in shape.
pub fn residual(tape: &mut Tape<'_>, x: Var, s: Var, p: f32) -> Result<Var, ShapeError> {
    let (rows, cols) = tape.shape(x);
    expect_dim("s", "rows", rows, tape.shape(s).0)?;
    expect_dim("s", "columns", cols, tape.shape(s).1)?;
    let spec = next(tape, p);
    let mut y = tape.buffer(rows * cols);
    match &spec {
        Some(spec) => {
            kernel::apply(tape.context(), spec, tape.value(s), &mut y)?;
            elementwise::add_assign(tape.context(), tape.value(x), &mut y)?;
        }
        None => elementwise::add(tape.context(), tape.value(x), tape.value(s), &mut y)?,
    }
    Ok(tape.push(y, rows, cols, || Saved { x, s, spec }))
}

struct Saved {
    x: Var,
    s: Var,
    spec: Option<Dropout>,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let d_y = pass.output_grad(out);
        let mut d_s = pass.target(self.s);
        match &self.spec {
            Some(spec) => kernel::apply(&pass.ctx, spec, &d_y, d_s.buffer())?,
            None => d_s.buffer().copy_from_slice(&d_y),
        }
        pass.put(self.s, d_s)?;
        pass.hand_on(self.x, d_y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{Case, check};

    #[test]
    fn gradients() {
        let mut case = Case::new(9);
        case.input(3, 5);
        case.input(3, 5);
        check(&case, |tape, v| {
            let y = residual(tape, v[0], v[1], 0.0)?;
            let z = residual(tape, v[0], y, 0.0)?;
            residual(tape, z, z, 0.0)
        });
    }

    #[test]
    fn shapes_must_agree() {
        let (store, pool) = (crate::ParamStore::new(0), crate::Pool::new());
        let ctx = kavanam_kernels::Context::with_isa(kavanam_kernels::Isa::best());
        let mut tape = Tape::inference(&ctx, &store, &pool);
        let a = tape.constant(&[0.0; 6], 2, 3).unwrap();
        let b = tape.constant(&[0.0; 6], 3, 2).unwrap();
        assert!(residual(&mut tape, a, b, 0.0).unwrap_err().to_string().starts_with("s: rows"));
    }
}
