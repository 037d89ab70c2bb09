//! `y[r] = x[order[r]]`: rows in another order, between batch-major and time-major.

use std::sync::Arc;

use kavanam_kernels::ShapeError;
use kavanam_kernels::error::expect_dim;

use crate::tape::{Backward, BackwardPass, Slot, Tape, Var};

/// `y[r] = x[order[r]]`, where `order` names every row once.
///
/// # Errors
/// [`ShapeError`] when `order` has another length than x has rows, or names a row that is not there.
pub fn permute_rows(tape: &mut Tape<'_>, x: Var, order: &Arc<[usize]>) -> Result<Var, ShapeError> {
    let (rows, cols) = tape.shape(x);
    expect_dim("order", "length", rows, order.len())?;
    if let Some(position) = order.iter().position(|&r| r >= rows) {
        return Err(ShapeError::Index { argument: "order", position, index: order[position], len: rows });
    }
    let mut y = tape.buffer(rows * cols);
    let value = tape.value(x);
    for (y, &r) in y.chunks_exact_mut(cols.max(1)).zip(order.iter()) {
        y.copy_from_slice(&value[r * cols..(r + 1) * cols]);
    }
    let order = order.clone();
    Ok(tape.push(y, rows, cols, || Saved { x, order, cols }))
}

struct Saved {
    x: Var,
    order: Arc<[usize]>,
    cols: usize,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let d_y = pass.output_grad(out);
        let (mut d_x, slot) = pass.grad_slot(self.x);
        let cols = self.cols;
        for (d_y, &r) in d_y.chunks_exact(cols.max(1)).zip(self.order.iter()) {
            let d_x = &mut d_x[r * cols..(r + 1) * cols];
            match slot {
                Slot::Fresh => d_x.copy_from_slice(d_y),
                Slot::Partial => d_x.iter_mut().zip(d_y).for_each(|(a, b)| *a += b),
            }
        }
        pass.put_grad(self.x, d_x);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gradient_check::{Case, check};

    #[test]
    fn gradients_and_errors() {
        let mut case = Case::new(2);
        case.input(4, 3);
        check(&case, |tape, v| permute_rows(tape, v[0], &[2, 0, 3, 1].into()));
        let (store, pool) = (crate::ParamStore::new(0), crate::Pool::new());
        let ctx = kavanam_kernels::Context::with_isa(kavanam_kernels::Isa::best());
        let mut tape = Tape::inference(&ctx, &store, &pool);
        let x = tape.constant(&[0.0; 4], 2, 2).unwrap();
        assert!(matches!(
            permute_rows(&mut tape, x, &[0, 2].into()),
            Err(ShapeError::Index { index: 2, .. })
        ));
        assert!(permute_rows(&mut tape, x, &[0].into()).is_err());
    }
}
