//! One row for each sequence: the mean of its rows, or its last.

use std::sync::Arc;

use kavanam_kernels::ShapeError;
use kavanam_kernels::error::expect_dim;

use crate::models::Pooling;
use crate::tape::{Backward, BackwardPass, Slot, Tape, Var};

/// `y[b] = Σ_{t < lengths[b]} x[t, b] / lengths[b]`, or `y[b] = x[lengths[b] − 1, b]`; zeros for a sequence without
/// positions.
///
/// # Shapes
/// x `[batch · seq, width]`, one sequence after the other, or time-major; y `[batch, width]`.
///
/// # Errors
/// [`ShapeError`] when the rows are no whole number of sequences, or a length exceeds them.
///
/// The positions of a row are added in their order: the same bits for any batch and any padding.
pub fn pool_sequences(
    tape: &mut Tape<'_>,
    x: Var,
    (lengths, time_major): (&Arc<[usize]>, bool),
    pooling: Pooling,
) -> Result<Var, ShapeError> {
    let ((rows, cols), batch) = (tape.shape(x), lengths.len());
    expect_dim("x", "rows modulo the batch", 0, rows % batch.max(1))?;
    let seq = rows / batch.max(1);
    if let Some(position) = lengths.iter().position(|&length| length > seq) {
        return Err(ShapeError::Index { argument: "lengths", position, index: lengths[position], len: seq });
    }
    let saved = Saved { x, lengths: lengths.clone(), seq, cols, time_major, pooling };
    let mut y = tape.buffer(batch * cols);
    y.fill(0.0);
    let value = tape.value(x);
    for (b, y) in y.chunks_exact_mut(cols.max(1)).enumerate() {
        let (positions, share) = saved.positions(b);
        for row in positions {
            y.iter_mut().zip(&value[row * cols..(row + 1) * cols]).for_each(|(y, x)| *y += x);
        }
        y.iter_mut().for_each(|y| *y *= share);
    }
    Ok(tape.push(y, batch, cols, || saved))
}

struct Saved {
    x: Var,
    lengths: Arc<[usize]>,
    seq: usize,
    cols: usize,
    time_major: bool,
    pooling: Pooling,
}

impl Saved {
    /// The rows that sequence `b` is pooled from, and the share of each.
    fn positions(&self, b: usize) -> (impl Iterator<Item = usize>, f32) {
        let (length, batch, seq, time_major) =
            (self.lengths[b], self.lengths.len(), self.seq, self.time_major);
        let first = match self.pooling {
            Pooling::Mean => 0,
            Pooling::Last => length.saturating_sub(1),
        };
        let share = 1.0 / (length - first).max(1) as f32;
        ((first..length).map(move |t| if time_major { t * batch + b } else { b * seq + t }), share)
    }
}

impl Backward for Saved {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let d_y = pass.output_grad(out);
        let (mut d_x, slot) = pass.grad_slot(self.x);
        if slot == Slot::Fresh {
            d_x.fill(0.0);
        }
        let cols = self.cols;
        for (b, d_y) in d_y.chunks_exact(cols.max(1)).enumerate() {
            let (positions, share) = self.positions(b);
            for row in positions {
                d_x[row * cols..(row + 1) * cols].iter_mut().zip(d_y).for_each(|(d_x, d)| *d_x += share * d);
            }
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
    fn gradients_of_both_poolings_and_layouts() {
        for pooling in [Pooling::Mean, Pooling::Last] {
            for time_major in [false, true] {
                let mut case = Case::new(4);
                case.input(3 * 4, 5);
                let lengths: Arc<[usize]> = [3, 0, 4].into();
                check(&case, |tape, v| {
                    // x is used twice.
                    let one = pool_sequences(tape, v[0], (&lengths, time_major), pooling)?;
                    let other = pool_sequences(tape, v[0], (&lengths, time_major), Pooling::Mean)?;
                    concat_cols(tape, &[one, other])
                });
            }
        }
    }

    #[test]
    fn values_and_errors() {
        let (store, pool) = (crate::ParamStore::new(0), crate::Pool::new());
        let ctx = kavanam_kernels::Context::with_isa(kavanam_kernels::Isa::best());
        let mut tape = Tape::inference(&ctx, &store, &pool);
        let x = tape.constant(&[1.0, 2.0, 6.0, 9.0], 4, 1).unwrap();
        let of = |tape: &mut Tape<'_>, lengths: &[usize], time_major, pooling| {
            pool_sequences(tape, x, (&lengths.into(), time_major), pooling).map(|y| tape.value(y).to_vec())
        };
        assert_eq!(of(&mut tape, &[2, 1], false, Pooling::Mean).unwrap(), [1.5, 6.0]);
        assert_eq!(of(&mut tape, &[2, 1], true, Pooling::Mean).unwrap(), [3.5, 2.0]);
        assert_eq!(of(&mut tape, &[2, 0], false, Pooling::Last).unwrap(), [2.0, 0.0]);
        assert!(of(&mut tape, &[3, 1], false, Pooling::Mean).is_err());
        assert!(of(&mut tape, &[1, 1, 1], false, Pooling::Mean).is_err());
    }
}
