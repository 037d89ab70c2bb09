//! `y = x[:, first..last]`: some columns of a value, such as the context in a cell's inputs.

use std::ops::Range;

use kavanam_kernels::ShapeError;
use kavanam_kernels::error::expect_dim;

use crate::tape::{Backward, BackwardPass, Slot, Tape, Var};

/// `y[r] = x[r, columns]`.
///
/// # Errors
/// [`ShapeError`] when the range is empty or x has not that many columns.
pub fn columns(tape: &mut Tape<'_>, x: Var, columns: Range<usize>) -> Result<Var, ShapeError> {
    let (rows, cols) = tape.shape(x);
    let last = columns.end.clamp((columns.start + 1).min(cols), cols);
    expect_dim("columns", "end", last, columns.end)?;
    let mut y = tape.buffer(rows * columns.len());
    for (y, x) in y.chunks_exact_mut(columns.len()).zip(tape.value(x).chunks_exact(cols)) {
        y.copy_from_slice(&x[columns.clone()]);
    }
    Ok(tape.push(y, rows, columns.len(), || Saved { x, cols, columns }))
}

struct Saved {
    x: Var,
    cols: usize,
    columns: Range<usize>,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let d_y = pass.output_grad(out);
        let (mut d_x, slot) = pass.grad_slot(self.x);
        if let Slot::Fresh = slot {
            d_x.fill(0.0);
        }
        for (d_x, d_y) in d_x.chunks_exact_mut(self.cols).zip(d_y.chunks_exact(self.columns.len())) {
            d_x[self.columns.clone()].iter_mut().zip(d_y).for_each(|(a, b)| *a += b);
        }
        pass.put_grad(self.x, d_x);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::concat_cols;
    use crate::ops::gradient_check::{Case, check};

    #[test]
    fn gradients() {
        let mut case = Case::new(2);
        case.input(4, 5);
        check(&case, |tape, v| {
            let parts = [columns(tape, v[0], 1..3)?, columns(tape, v[0], 2..5)?, columns(tape, v[0], 0..1)?];
            concat_cols(tape, &parts)
        });
    }

    #[test]
    fn columns_that_are_not_there_are_refused() {
        let (store, pool) = (crate::ParamStore::new(0), crate::Pool::new());
        let ctx = kavanam_kernels::Context::with_isa(kavanam_kernels::Isa::best());
        let mut tape = Tape::inference(&ctx, &store, &pool);
        let x = tape.constant(&[0.0; 6], 2, 3).unwrap();
        assert_eq!(columns(&mut tape, x, 0..3).map(|y| tape.shape(y)), Ok((2, 3)));
        for range in [1..4, 2..2, 3..4, 7..8] {
            assert!(columns(&mut tape, x, range.clone()).is_err(), "{range:?}");
        }
    }
}
