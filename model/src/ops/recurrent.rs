//! A recurrent layer over whole sequences in one direction: LSTM, GRU or a plain cell.

use std::sync::Arc;

use kavanam_kernels::rnn::{
    self, Cell, Direction, InputGrads, Output, OutputGrads, Saved, Sequence, State, StateMut, WeightGrads,
    Weights,
};
use kavanam_kernels::{MatMut, MatRef, ShapeError};

use crate::param::{Grads, ParamId, ParamStore};
use crate::pool::Buffer;
use crate::tape::{Backward, BackwardPass, Tape, Var};

/// The weights of one layer and direction, named as PyTorch names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecurrentWeights {
    /// The kind of cell.
    pub cell: Cell,
    /// `[gates · hidden, input]`.
    pub w_ih: ParamId,
    /// `[gates · hidden, hidden]`.
    pub w_hh: ParamId,
    /// `[gates · hidden]`.
    pub b_ih: ParamId,
    /// `[gates · hidden]`.
    pub b_hh: ParamId,
}

impl RecurrentWeights {
    /// The width of the state.
    pub fn hidden(&self, params: &ParamStore) -> usize {
        params.shape(self.w_hh)[1]
    }

    /// The width of the input.
    pub fn input(&self, params: &ParamStore) -> usize {
        params.shape(self.w_ih)[1]
    }

    pub(crate) fn views<'p>(&self, params: &'p ParamStore) -> Weights<'p> {
        Weights {
            cell: self.cell,
            w_ih: params.matrix(self.w_ih),
            w_hh: params.matrix(self.w_hh),
            b_ih: params.get(self.b_ih),
            b_hh: params.get(self.b_hh),
        }
    }

    pub(crate) fn grads<'g>(
        &self,
        params: &ParamStore,
        grads: &'g mut Grads,
    ) -> Result<WeightGrads<'g>, ShapeError> {
        let (rows, hidden) = (params.shape(self.w_ih)[0], self.hidden(params));
        let [d_w_ih, d_w_hh, d_b_ih, d_b_hh] =
            grads.get_disjoint_mut([self.w_ih, self.w_hh, self.b_ih, self.b_hh]);
        Ok(WeightGrads {
            d_w_ih: MatMut::new(d_w_ih, rows, self.input(params))?,
            d_w_hh: MatMut::new(d_w_hh, rows, hidden)?,
            d_b_ih,
            d_b_hh,
        })
    }
}

/// A recurrent state on the tape, `[batch, hidden]` each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateVars {
    /// The output part.
    pub h: Var,
    /// The LSTM's cell.
    pub c: Option<Var>,
}

impl StateVars {
    pub(crate) fn views<'t>(&self, matrix: impl Fn(Var) -> MatRef<'t>) -> State<'t> {
        State { h: matrix(self.h), c: self.c.map(matrix) }
    }

    /// h, then c.
    pub fn vars(&self) -> impl Iterator<Item = Var> {
        [Some(self.h), self.c].into_iter().flatten()
    }
}

/// What a layer gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecurrentOutput {
    /// The state after every step, `[seq · batch, hidden]`, zeros in the padding.
    pub y: Var,
    /// The state after each row's last step.
    pub last: StateVars,
}

/// `h[t], c[t] = cell(W_ih·x[t] + b_ih + W_hh·h[t−1] + b_hh)` within each row's length.
///
/// # Shapes
/// x `[seq · batch, input]`, time-major; `lengths` one for each of the batch; initial state `[batch, hidden]`,
/// zeros for `None`.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit.
pub fn recurrent(
    tape: &mut Tape<'_>,
    x: Var,
    weights: &RecurrentWeights,
    (lengths, direction): (&Arc<[usize]>, Direction),
    initial: Option<StateVars>,
) -> Result<RecurrentOutput, ShapeError> {
    let (rows, batch) = (tape.shape(x).0, lengths.len());
    let hidden = weights.hidden(tape.params());
    let with_c = weights.cell.has_cell_state();
    let mut y = tape.buffer(rows * hidden);
    let mut h = tape.buffer(batch * hidden);
    let mut c = tape.buffer(if with_c { batch * hidden } else { 0 });
    let last = StateMut {
        h: MatMut::new(&mut h, batch, hidden)?,
        c: if with_c { Some(MatMut::new(&mut c, batch, hidden)?) } else { None },
    };
    let output = Output { y: MatMut::new(&mut y, rows, hidden)?, last: Some(last) };
    let sequence = Sequence { x: tape.matrix(x), lengths, direction };
    let state = initial.map(|state| state.views(|var| tape.matrix(var)));
    let views = weights.views(tape.params());
    let saved = rnn::forward(tape.context(), &views, &sequence, state, output)?;
    let op = RecurrentOp { x, weights: *weights, lengths: lengths.clone(), direction, initial, saved };
    let c_cols = if with_c { hidden } else { 0 };
    let [y, h, c] = tape.push_all([(y, rows, hidden), (h, batch, hidden), (c, batch, c_cols)], || op);
    Ok(RecurrentOutput { y, last: StateVars { h, c: with_c.then_some(c) } })
}

struct RecurrentOp {
    x: Var,
    weights: RecurrentWeights,
    lengths: Arc<[usize]>,
    direction: Direction,
    initial: Option<StateVars>,
    saved: Saved,
}

impl Backward for RecurrentOp {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let RecurrentOp { x, weights, lengths, direction, initial, saved } = *self;
        let (batch, hidden) = (lengths.len(), weights.hidden(pass.params));
        let d_y = pass.take_grad(out);
        let d_last = last_grads(pass, out, weights.cell, batch * hidden);
        let [mut d_h0, mut d_c0] = [(); 2].map(|()| pass.pool.take(batch * hidden));
        let mut d_x = pass.target(x);
        let x_value = pass.nodes.matrix(x);
        let (rows, input) = (x_value.rows(), x_value.cols());
        let upstream = OutputGrads {
            d_y: d_y.as_ref().map(|d| MatRef::new(d, rows, hidden)).transpose()?,
            d_last: state_view(&d_last, batch, hidden)?,
        };
        let d_initial = match initial {
            None => None,
            Some(StateVars { c, .. }) => Some(StateMut {
                h: MatMut::new(&mut d_h0, batch, hidden)?,
                c: c.map(|_| MatMut::new(&mut d_c0, batch, hidden)).transpose()?,
            }),
        };
        let grads = InputGrads {
            weights: weights.grads(pass.params, pass.grads)?,
            d_x: Some(MatMut::new(d_x.buffer(), rows, input)?),
            d_initial,
        };
        let sequence = Sequence { x: x_value, lengths: &lengths, direction };
        rnn::backward(&pass.ctx, &weights.views(pass.params), &sequence, saved, upstream, grads)?;
        pass.put(x, d_x)?;
        if let Some(StateVars { h, c }) = initial {
            pass.hand_on(h, d_h0)?;
            if let Some(c) = c {
                pass.hand_on(c, d_c0)?;
            }
        }
        Ok(())
    }
}

fn state_view(
    [h, c]: &[Option<Buffer>; 2],
    batch: usize,
    hidden: usize,
) -> Result<Option<State<'_>>, ShapeError> {
    let Some(h) = h else { return Ok(None) };
    let c = c.as_ref().map(|c| c.matrix(batch, hidden)).transpose()?;
    Ok(Some(State { h: h.matrix(batch, hidden)?, c }))
}

/// The gradients of the final state's vectors: both or none, with zeros for one that was not used.
fn last_grads(pass: &mut BackwardPass<'_>, out: Var, cell: Cell, len: usize) -> [Option<Buffer>; 2] {
    let grads = [out.after(1), out.after(2)].map(|var| pass.take_grad(var));
    if grads.iter().all(Option::is_none) {
        return [None, None];
    }
    let [h, c] = grads.map(|grad| grad.unwrap_or_else(|| pass.pool.zeroed(len)));
    [Some(h), cell.has_cell_state().then_some(c)]
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::ops::concat_cols;
    use crate::ops::gradient_check::{Case, check};
    use crate::param::Init;

    pub(crate) fn recurrent_weights(
        store: &mut ParamStore,
        cell: Cell,
        input: usize,
        hidden: usize,
    ) -> RecurrentWeights {
        let rows = cell.gates() * hidden;
        RecurrentWeights {
            cell,
            w_ih: store.add("w_ih", &[rows, input], Init::Uniform(0.5)),
            w_hh: store.add("w_hh", &[rows, hidden], Init::Uniform(0.5)),
            b_ih: store.add("b_ih", &[rows], Init::Uniform(0.5)),
            b_hh: store.add("b_hh", &[rows], Init::Uniform(0.5)),
        }
    }

    #[test]
    fn gradients_of_outputs_and_final_states() {
        for cell in [Cell::Lstm, Cell::Gru, Cell::GruResetBefore, Cell::Tanh] {
            for direction in [Direction::Forward, Direction::Reverse] {
                let mut case = Case::new(6);
                let weights = recurrent_weights(&mut case.store, cell, 3, 5);
                let lengths: Arc<[usize]> = [2, 4, 0].into();
                case.input(4 * 3, 3);
                case.input(3, 5);
                case.input(3, 5);
                check(&case, |tape, v| {
                    let c = cell.has_cell_state().then_some(v[2]);
                    let start = Some(StateVars { h: v[1], c });
                    let out = recurrent(tape, v[0], &weights, (&lengths, direction), start)?;
                    // Both outputs matter, and x is used twice.
                    let again = recurrent(tape, v[0], &weights, (&lengths, direction), Some(out.last))?;
                    concat_cols(tape, &[out.y, again.y])
                });
                check(&case, |tape, v| {
                    let out = recurrent(tape, v[0], &weights, (&lengths, direction), None)?;
                    let last: Vec<Var> = out.last.vars().collect();
                    concat_cols(tape, &last)
                });
            }
        }
    }
}
