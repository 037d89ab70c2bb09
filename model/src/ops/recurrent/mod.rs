//! A recurrent layer over whole sequences, in one direction or in both: LSTM, GRU or a plain cell.

mod weights;

pub use weights::RecurrentWeights;

use std::sync::Arc;

use kavanam_kernels::rnn::{
    self, Direction, ForwardPass, InputGrads, Output, OutputGrads, Saved, Sequence, State, StateMut,
    WeightGrads,
};
use kavanam_kernels::{MatMut, MatRef, ShapeError};

use crate::param::{Grads, ParamStore};
use crate::pool::Buffer;
use crate::tape::{Backward, BackwardPass, Tape, Var};

use weights::TENSORS;

/// Layers side by side: both directions.
const MAX_LAYERS: usize = 2;

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

/// One of the layers that [`recurrent_layers`] runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecurrentPass {
    /// Its weights.
    pub weights: RecurrentWeights,
    /// The order of its steps.
    pub direction: Direction,
    /// Its initial state; zeros for `None`.
    pub initial: Option<StateVars>,
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
    recurrent_layers(tape, x, lengths, vec![RecurrentPass { weights: *weights, direction, initial }])
}

/// Up to two layers over the same input, at the same time where there are threads for it; what they give stands side by side.
///
/// # Shapes
/// As [`recurrent()`]; outputs and final states have the columns of the first layer, then those of the second.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit.
///
/// # Panics
/// When there are more than two layers.
pub fn recurrent_layers(
    tape: &mut Tape<'_>,
    x: Var,
    lengths: &Arc<[usize]>,
    layers: Vec<RecurrentPass>,
) -> Result<RecurrentOutput, ShapeError> {
    assert!(layers.len() <= MAX_LAYERS, "{} layers side by side", layers.len());
    let (rows, batch) = (tape.shape(x).0, lengths.len());
    let widths = Widths::of(tape.params(), &layers);
    let [output, cells] = widths.total();
    let mut y = tape.buffer(rows * output);
    let mut h = tape.buffer(batch * output);
    let mut c = tape.buffer(batch * cells);
    let ys = widths.split(MatMut::new(&mut y, rows, output)?, 0);
    let hs = widths.split(MatMut::new(&mut h, batch, output)?, 0);
    let cs = widths.split(MatMut::new(&mut c, batch, cells)?, 1);
    let outputs = ys.into_iter().zip(hs).zip(cs);
    let passes = layers.iter().zip(outputs).map(|(layer, ((y, h), c))| {
        let RecurrentPass { weights, direction, initial } = layer;
        ForwardPass {
            weights: weights.views(tape.params()),
            sequence: Sequence { x: tape.matrix(x), lengths, direction: *direction },
            initial: initial.map(|state| state.views(|var| tape.matrix(var))),
            output: Output { y, last: Some(StateMut { h, c: weights.cell.has_cell_state().then_some(c) }) },
        }
    });
    let (ctx, passes) = (tape.context(), passes.collect());
    let saved = if tape.is_recording() {
        rnn::forward_all(ctx, passes)?
    } else {
        rnn::infer_all(ctx, passes)?;
        vec![]
    };
    let op = RecurrentOp { x, layers, widths, lengths: lengths.clone(), saved };
    let [y, h, c] = tape.push_all([(y, rows, output), (h, batch, output), (c, batch, cells)], || op);
    Ok(RecurrentOutput { y, last: StateVars { h, c: (cells > 0).then_some(c) } })
}

/// The widths of each layer's h and c.
struct Widths(Vec<[usize; 2]>);

impl Widths {
    fn of(params: &ParamStore, layers: &[RecurrentPass]) -> Widths {
        let widths = |RecurrentPass { weights, .. }: &RecurrentPass| {
            let c = if weights.cell.has_cell_state() { weights.hidden(params) } else { 0 };
            [weights.output(params), c]
        };
        Widths(layers.iter().map(widths).collect())
    }

    fn total(&self) -> [usize; 2] {
        self.0.iter().fold([0, 0], |[h, c], [next_h, next_c]| [h + next_h, c + next_c])
    }

    /// Each layer's columns of `h` (`which` 0) or `c` (1).
    fn split<'m>(&self, matrix: MatMut<'m>, which: usize) -> Vec<MatMut<'m>> {
        let mut rest = Some(matrix);
        let mut take = |widths: &[usize; 2]| {
            let (part, right) = rest.take().expect("put back below").split_cols(widths[which]);
            rest = Some(right);
            part
        };
        self.0.iter().map(&mut take).collect()
    }

    /// As [`Widths::split`], of one layer, to read.
    fn part<'m>(&self, matrix: MatRef<'m>, layer: usize, which: usize) -> MatRef<'m> {
        let first = self.0[..layer].iter().map(|widths| widths[which]).sum::<usize>();
        matrix.sub(0..matrix.rows(), first..first + self.0[layer][which])
    }
}

struct RecurrentOp {
    x: Var,
    layers: Vec<RecurrentPass>,
    widths: Widths,
    lengths: Arc<[usize]>,
    saved: Vec<Saved>,
}

/// The gradients that one layer gives to its input and its initial state.
struct Flow {
    d_x: Buffer,
    d_h0: Buffer,
    d_c0: Buffer,
}

impl Flow {
    fn views(
        &mut self,
        initial: Option<StateVars>,
        [rows, input, batch]: [usize; 3],
        [h, c]: [usize; 2],
    ) -> Result<(MatMut<'_>, Option<StateMut<'_>>), ShapeError> {
        let Flow { d_x, d_h0, d_c0 } = self;
        let d_x = MatMut::new(d_x, rows, input)?;
        let Some(initial) = initial else { return Ok((d_x, None)) };
        let c = initial.c.map(|_| MatMut::new(d_c0, batch, c)).transpose()?;
        Ok((d_x, Some(StateMut { h: MatMut::new(d_h0, batch, h)?, c })))
    }
}

impl Backward for RecurrentOp {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let RecurrentOp { x, layers, widths, lengths, saved } = *self;
        let (batch, [output, cells]) = (lengths.len(), widths.total());
        let d_y = pass.take_grad(out);
        let [d_h, d_c] = last_grads(pass, out, [batch * output, batch * cells]);
        let x_value = pass.nodes.matrix(x);
        let (rows, input) = (x_value.rows(), x_value.cols());
        let d_y = d_y.as_ref().map(|d| d.matrix(rows, output)).transpose()?;
        let d_h = d_h.as_ref().map(|d| d.matrix(batch, output)).transpose()?;
        let d_c = d_c.as_ref().map(|d| d.matrix(batch, cells)).transpose()?;
        let flow = |[h, c]: &[usize; 2]| {
            let [d_x, d_h0, d_c0] = [rows * input, batch * h, batch * c].map(|len| pass.pool.take(len));
            Flow { d_x, d_h0, d_c0 }
        };
        let mut flows: Vec<Flow> = widths.0.iter().map(flow).collect();
        let mut passes = Vec::with_capacity(layers.len());
        let grads = weight_grads(&layers, pass.params, pass.grads)?;
        let along = layers.iter().zip(saved).zip(grads).zip(&mut flows).enumerate();
        for (l, (((layer, saved), weights), flow)) in along {
            let views = layer.weights.views(pass.params);
            let h = d_h.map(|d| widths.part(d, l, 0));
            let c = d_c.filter(|_| views.cell.has_cell_state()).map(|d| widths.part(d, l, 1));
            let (d_x, d_initial) = flow.views(layer.initial, [rows, input, batch], widths.0[l])?;
            passes.push(rnn::BackwardPass {
                weights: views,
                sequence: Sequence { x: x_value, lengths: &lengths, direction: layer.direction },
                saved,
                upstream: OutputGrads {
                    d_y: d_y.map(|d| widths.part(d, l, 0)),
                    d_last: h.map(|h| State { h, c }),
                },
                grads: InputGrads { weights, d_x: Some(d_x), d_initial },
            });
        }
        rnn::backward_all(&pass.ctx, passes)?;
        for (layer, Flow { d_x, d_h0, d_c0 }) in layers.iter().zip(flows).rev() {
            pass.hand_on(x, d_x)?;
            if let Some(StateVars { h, c }) = layer.initial {
                pass.hand_on(h, d_h0)?;
                if let Some(c) = c {
                    pass.hand_on(c, d_c0)?;
                }
            }
        }
        Ok(())
    }
}

/// The gradients of all layers' weights at once.
fn weight_grads<'g>(
    layers: &[RecurrentPass],
    params: &ParamStore,
    grads: &'g mut Grads,
) -> Result<Vec<WeightGrads<'g>>, ShapeError> {
    let mut ids = [None; MAX_LAYERS * TENSORS];
    for (ids, layer) in ids.chunks_exact_mut(TENSORS).zip(layers) {
        ids.copy_from_slice(&layer.weights.ids());
    }
    let mut slices = grads.get_disjoint_mut(ids).into_iter();
    let mut next = || std::array::from_fn(|_| slices.next().expect("as many as ids"));
    layers.iter().map(|layer| layer.weights.grads_in(params, next())).collect()
}

/// The gradients of the final states' vectors: both or none, with zeros for one that was not used.
fn last_grads(pass: &mut BackwardPass<'_>, out: Var, [h_len, c_len]: [usize; 2]) -> [Option<Buffer>; 2] {
    let grads = [out.after(1), out.after(2)].map(|var| pass.take_grad(var));
    if grads.iter().all(Option::is_none) {
        return [None, None];
    }
    let [h, c] = grads;
    let or_zeros = |grad: Option<Buffer>, len| Some(grad.unwrap_or_else(|| pass.pool.zeroed(len)));
    [or_zeros(h, h_len), or_zeros(c, c_len)]
}

#[cfg(test)]
pub(crate) mod tests {
    use kavanam_kernels::rnn::Cell;

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
    pub(crate) fn projected_weights(
        store: &mut ParamStore,
        cell: Cell,
        input: usize,
        [hidden, output]: [usize; 2],
    ) -> RecurrentWeights {
        let rows = cell.gates() * hidden;
        let layer = store.ids().count();
        let mut add =
            |name, shape: &[usize]| store.add(&format!("{layer}.{name}"), shape, Init::Uniform(0.5));
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

    #[test]
    fn gradients_of_layers_side_by_side() {
        for cells in [[Cell::Lstm, Cell::Lstm], [Cell::Gru, Cell::LstmPeephole], [Cell::Tanh, Cell::Gru]] {
            let mut case = Case::new(6);
            let weights = cells.map(|cell| projected_weights(&mut case.store, cell, 3, [5, 5]));
            let lengths: Arc<[usize]> = [2, 4, 0].into();
            case.input(4 * 3, 3);
            case.input(3, 5);
            case.input(3, 5);
            for outputs in [true, false] {
                check(&case, |tape, v| {
                    let [there, back] = weights;
                    let start = StateVars { h: v[1], c: there.cell.has_cell_state().then_some(v[2]) };
                    let layers = vec![
                        RecurrentPass { weights: there, direction: Direction::Forward, initial: Some(start) },
                        RecurrentPass { weights: back, direction: Direction::Reverse, initial: None },
                    ];
                    let out = recurrent_layers(tape, v[0], &lengths, layers)?;
                    let last: Vec<Var> = out.last.vars().collect();
                    if outputs { Ok(out.y) } else { concat_cols(tape, &last) }
                });
            }
        }
    }
}
