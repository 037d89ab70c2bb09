//! `y = [x₁ x₂ …]`: columns side by side, for the two directions of a recurrent layer.

use kavanam_kernels::ShapeError;
use kavanam_kernels::error::expect_dim;

use crate::tape::{Backward, BackwardPass, Slot, Tape, Var};

/// `y[r] = [x₁[r], x₂[r], …]`.
///
/// # Errors
/// [`ShapeError`] when the parts have different numbers of rows.
pub fn concat_cols(tape: &mut Tape<'_>, parts: &[Var]) -> Result<Var, ShapeError> {
    let rows = parts.first().map_or(0, |x| tape.shape(*x).0);
    for part in parts {
        expect_dim("parts", "rows", rows, tape.shape(*part).0)?;
    }
    let cols: usize = parts.iter().map(|x| tape.shape(*x).1).sum();
    let mut y = tape.buffer(rows * cols);
    let mut first = 0;
    for part in parts {
        let width = tape.shape(*part).1;
        if width > 0 {
            for (y, x) in y.chunks_exact_mut(cols).zip(tape.value(*part).chunks_exact(width)) {
                y[first..first + width].copy_from_slice(x);
            }
        }
        first += width;
    }
    let parts: Vec<(Var, usize)> = parts.iter().map(|x| (*x, tape.shape(*x).1)).collect();
    Ok(tape.push(y, rows, cols, || Saved { parts, cols }))
}

struct Saved {
    parts: Vec<(Var, usize)>,
    cols: usize,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let d_y = pass.output_grad(out);
        let mut first = 0;
        for (part, width) in self.parts {
            let (mut d_x, slot) = pass.grad_slot(part);
            if width > 0 {
                for (d_x, d_y) in d_x.chunks_exact_mut(width).zip(d_y.chunks_exact(self.cols)) {
                    let d_y = &d_y[first..first + width];
                    match slot {
                        Slot::Fresh => d_x.copy_from_slice(d_y),
                        Slot::Partial => d_x.iter_mut().zip(d_y).for_each(|(a, b)| *a += b),
                    }
                }
            }
            pass.put_grad(part, d_x);
            first += width;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{Case, check};

    #[test]
    fn gradients() {
        let mut case = Case::new(2);
        case.input(4, 3);
        case.input(4, 5);
        check(&case, |tape, v| concat_cols(tape, &[v[0], v[1], v[0]]));
    }
}
