//! minGRU and minLSTM over whole sequences: the scan after the product that gives all gates' sums.

use std::sync::Arc;

use kavanam_kernels::ShapeError;
use kavanam_kernels::rnn::Direction;
use kavanam_kernels::rnn::min_rnn::{self as kernel, Candidate, MinCell, Scan, Upstream};

use crate::pool::Buffer;
use crate::tape::{Backward, BackwardPass, Tape, Var};

/// `h[t] = h[t−1] + z[t]·(ñ[t] − h[t−1])` within each row's length; gives the states of all steps (zeros in the
/// padding) and the state after each row's last step.
///
/// # Shapes
/// sums `[seq · batch, gates · hidden]`, time-major (columns z n, or f i n); `lengths` one for each of the batch;
/// initial `[batch, hidden]`, zeros for `None`; y `[seq · batch, hidden]`, last `[batch, hidden]`.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit.
pub fn min_rnn(
    tape: &mut Tape<'_>,
    sums: Var,
    kind: (MinCell, Candidate),
    (lengths, direction): (&Arc<[usize]>, Direction),
    initial: Option<Var>,
) -> Result<[Var; 2], ShapeError> {
    let (rows, columns) = tape.shape(sums);
    let batch = lengths.len();
    let hidden = columns / kind.0.gates();
    let mut gates = tape.buffer(rows * columns);
    gates.copy_from_slice(tape.value(sums));
    let (mut y, mut last) = (tape.buffer(rows * hidden), tape.buffer(batch * hidden));
    let op = MinRnn { sums, kind, hidden, rows, lengths: lengths.clone(), direction, initial };
    let start = initial.map(|h| tape.value(h));
    kernel::forward(tape.context(), &op.scan(), &mut gates, start, &mut y, Some(&mut last))?;
    Ok(tape.push_all([(y, rows, hidden), (last, batch, hidden)], || Saved { op, gates }))
}

struct MinRnn {
    sums: Var,
    kind: (MinCell, Candidate),
    hidden: usize,
    rows: usize,
    lengths: Arc<[usize]>,
    direction: Direction,
    initial: Option<Var>,
}

impl MinRnn {
    fn scan(&self) -> Scan<'_> {
        Scan {
            cell: self.kind.0,
            candidate: self.kind.1,
            hidden: self.hidden,
            seq: self.rows.checked_div(self.lengths.len()).unwrap_or(0),
            lengths: &self.lengths,
            direction: self.direction,
        }
    }
}

struct Saved {
    op: MinRnn,
    /// Activated; the gradient of the sums takes their place.
    gates: Buffer,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let Saved { op, mut gates } = *self;
        let states = op.lengths.len() * op.hidden;
        let d_y = pass.take_grad(out).unwrap_or_else(|| pass.pool.zeroed(op.rows * op.hidden));
        let d_last = pass.take_grad(out.after(1));
        let mut d_initial = op.initial.map(|_| pass.pool.take(states));
        let upstream = Upstream {
            initial: op.initial.map(|h| pass.nodes.value(h)),
            y: pass.nodes.value(out),
            d_y: &d_y,
            d_last: d_last.as_deref(),
        };
        kernel::backward(&pass.ctx, &op.scan(), &upstream, &mut gates, d_initial.as_deref_mut())?;
        pass.hand_on(op.sums, gates)?;
        match (op.initial, d_initial) {
            (Some(h), Some(d_h)) => pass.hand_on(h, d_h),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::concat_cols;
    use crate::ops::gradient_check::{Case, check};

    #[test]
    fn gradients_of_outputs_and_final_states() {
        for cell in [MinCell::Gru, MinCell::Lstm] {
            for direction in [Direction::Forward, Direction::Reverse] {
                let mut case = Case::new(8);
                let lengths: Arc<[usize]> = [2, 4, 0].into();
                case.input(4 * 3, cell.gates() * 5);
                case.input(3, 5);
                let kind = (cell, Candidate::Linear);
                check(&case, |tape, v| {
                    let [y, last] = min_rnn(tape, v[0], kind, (&lengths, direction), Some(v[1]))?;
                    // Both outputs matter, and the sums are used twice.
                    let [again, _] = min_rnn(tape, v[0], kind, (&lengths, direction), Some(last))?;
                    concat_cols(tape, &[y, again])
                });
                check(&case, |tape, v| {
                    let [_, last] = min_rnn(tape, v[0], kind, (&lengths, direction), None)?;
                    Ok(last)
                });
            }
        }
    }
}
