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
    /// `[gates · hidden, output]`; without `w_hr` output is hidden.
    pub w_hh: ParamId,
    /// `[gates · hidden]`.
    pub b_ih: ParamId,
    /// `[gates · hidden]`.
    pub b_hh: ParamId,
    /// `[3 · hidden]`, for a cell with peepholes.
    pub peepholes: Option<ParamId>,
    /// `[output, hidden]`, where the state h is a projection.
    pub w_hr: Option<ParamId>,
}

impl RecurrentWeights {
    /// The width of the gates and of the state c.
    pub fn hidden(&self, params: &ParamStore) -> usize {
        params.shape(self.w_ih)[0] / self.cell.gates()
    }

    /// The width of the state h.
    pub fn output(&self, params: &ParamStore) -> usize {
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
            peepholes: self.peepholes.map_or(&[], |p| params.get(p)),
            w_hr: self.w_hr.map(|w| params.matrix(w)),
        }
    }

    pub(crate) fn grads<'g>(
        &self,
        params: &ParamStore,
        grads: &'g mut Grads,
    ) -> Result<WeightGrads<'g>, ShapeError> {
        let (rows, output) = (params.shape(self.w_ih)[0], self.output(params));
        let always = [self.w_ih, self.w_hh, self.b_ih, self.b_hh].map(Some);
        let [w_ih, w_hh, b_ih, b_hh] = always;
        let [d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_peepholes, d_w_hr] =
            grads.get_disjoint_mut([w_ih, w_hh, b_ih, b_hh, self.peepholes, self.w_hr]);
        Ok(WeightGrads {
            d_w_ih: MatMut::new(d_w_ih, rows, self.input(params))?,
            d_w_hh: MatMut::new(d_w_hh, rows, output)?,
            d_b_ih,
            d_b_hh,
            d_peepholes,
            d_w_hr: match self.w_hr {
                Some(_) => Some(MatMut::new(d_w_hr, output, self.hidden(params))?),
                None => None,
            },
        })
    }
}

/// A recurrent state on the tape: h `[batch, output]`, c `[batch, hidden]`.
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
    /// The state h after every step, `[seq · batch, output]`, zeros in the padding.
    pub y: Var,
    /// The state after each row's last step.
    pub last: StateVars,
}

/// `h[t], c[t] = cell(W_ih·x[t] + b_ih + W_hh·h[t−1] + b_hh)` within each row's length; with `w_hr`, an LSTM's h is
/// `W_hr·(o ⊙ tanh c)`.
///
/// # Shapes
/// x `[seq · batch, input]`, time-major; `lengths` one for each of the batch; initial state as [`StateVars`],
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
    let (hidden, output) = (weights.hidden(tape.params()), weights.output(tape.params()));
    let with_c = weights.cell.has_cell_state();
    let mut y = tape.buffer(rows * output);
    let mut h = tape.buffer(batch * output);
    let mut c = tape.buffer(if with_c { batch * hidden } else { 0 });
    let last = StateMut {
        h: MatMut::new(&mut h, batch, output)?,
        c: if with_c { Some(MatMut::new(&mut c, batch, hidden)?) } else { None },
    };
    let into = Output { y: MatMut::new(&mut y, rows, output)?, last: Some(last) };
    let sequence = Sequence { x: tape.matrix(x), lengths, direction };
    let state = initial.map(|state| state.views(|var| tape.matrix(var)));
    let views = weights.views(tape.params());
    let saved = rnn::forward(tape.context(), &views, &sequence, state, into)?;
    let op = RecurrentOp { x, weights: *weights, lengths: lengths.clone(), direction, initial, saved };
    let c_cols = if with_c { hidden } else { 0 };
    let [y, h, c] = tape.push_all([(y, rows, output), (h, batch, output), (c, batch, c_cols)], || op);
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
        let (batch, hidden, output) =
            (lengths.len(), weights.hidden(pass.params), weights.output(pass.params));
        let d_y = pass.take_grad(out);
        let d_last = last_grads(pass, out, weights.cell, [batch * output, batch * hidden]);
        let [mut d_h0, mut d_c0] = [output, hidden].map(|width| pass.pool.take(batch * width));
        let mut d_x = pass.target(x);
        let x_value = pass.nodes.matrix(x);
        let (rows, input) = (x_value.rows(), x_value.cols());
        let upstream = OutputGrads {
            d_y: d_y.as_ref().map(|d| MatRef::new(d, rows, output)).transpose()?,
            d_last: state_view(&d_last, batch, [output, hidden])?,
        };
        let d_initial = match initial {
            None => None,
            Some(StateVars { c, .. }) => Some(StateMut {
                h: MatMut::new(&mut d_h0, batch, output)?,
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
    [output, hidden]: [usize; 2],
) -> Result<Option<State<'_>>, ShapeError> {
    let Some(h) = h else { return Ok(None) };
    let c = c.as_ref().map(|c| c.matrix(batch, hidden)).transpose()?;
    Ok(Some(State { h: h.matrix(batch, output)?, c }))
}

/// The gradients of the final state's vectors: both or none, with zeros for one that was not used.
fn last_grads(
    pass: &mut BackwardPass<'_>,
    out: Var,
    cell: Cell,
    [h_len, c_len]: [usize; 2],
) -> [Option<Buffer>; 2] {
    let [h, c] = [out.after(1), out.after(2)].map(|var| pass.take_grad(var));
    if h.is_none() && c.is_none() {
        return [None, None];
    }
    let or_zeros = |grad: Option<Buffer>, len| Some(grad.unwrap_or_else(|| pass.pool.zeroed(len)));
    [or_zeros(h, h_len), if cell.has_cell_state() { or_zeros(c, c_len) } else { None }]
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
        projected_weights(store, cell, input, [hidden, hidden])
    }

    /// With a projection where the widths of gates and state differ.
    fn projected_weights(
        store: &mut ParamStore,
        cell: Cell,
        input: usize,
        [hidden, output]: [usize; 2],
    ) -> RecurrentWeights {
        let rows = cell.gates() * hidden;
        let mut add = |name, shape: &[usize]| store.add(name, shape, Init::Uniform(0.5));
        RecurrentWeights {
            cell,
            w_ih: add("w_ih", &[rows, input]),
            w_hh: add("w_hh", &[rows, output]),
            b_ih: add("b_ih", &[rows]),
            b_hh: add("b_hh", &[rows]),
            peepholes: (cell == Cell::LstmPeephole).then(|| add("peepholes", &[3 * hidden])),
            w_hr: (output != hidden).then(|| add("w_hr", &[output, hidden])),
        }
    }

    #[test]
    fn gradients_of_outputs_and_final_states() {
        let plain = [Cell::Lstm, Cell::LstmPeephole, Cell::Gru, Cell::GruResetBefore, Cell::Tanh];
        let projected = [(Cell::Lstm, 2), (Cell::LstmPeephole, 4)];
        for (cell, output) in plain.map(|cell| (cell, 5)).into_iter().chain(projected) {
            for direction in [Direction::Forward, Direction::Reverse] {
                let mut case = Case::new(6);
                let weights = projected_weights(&mut case.store, cell, 3, [5, output]);
                let lengths: Arc<[usize]> = [2, 4, 0].into();
                case.input(4 * 3, 3);
                case.input(3, output);
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
