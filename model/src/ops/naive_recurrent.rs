//! LSTM and GRU as they stand in a textbook, on the same matrix products: what the care in the kernels' recurrent
//! layers is worth.
//!
//! ```text
//! for each step:
//!     for each gate: a = x[t]·W_ihᵀ;  a += b_ih;  s = h·W_hhᵀ;  s += b_hh      # four passes, none fused
//!     the gates one after the other, each operation a pass of its own into new memory
//!     a row that has ended keeps its state
//! backward, for each step from the last, for each gate: d_x, d_h and the gradients of both weights by one product each
//! ```
//! No product over several steps or gates, no weights packed once, no fused gates, and full work for padding.
//! Everything that this layer calls is fast by itself. Its mathematics is that of [`super::recurrent()`].

use std::sync::Arc;

use kavanam_kernels::gemm::{self, Accum, Epilogue};
use kavanam_kernels::rnn::{Cell, Direction};
use kavanam_kernels::{Context, MatMut, MatRef, ShapeError};

use crate::ops::recurrent::{RecurrentOutput, RecurrentWeights, StateVars};
use crate::tape::{Backward, BackwardPass, Tape, Var};

/// A layer over one batch of sequences; weights in PyTorch's layout.
#[derive(Debug, Clone, Copy)]
pub struct NaiveLayer<'a> {
    /// How the products run.
    pub ctx: Context,
    /// [`Cell::Lstm`] or [`Cell::Gru`].
    pub cell: Cell,
    /// `[gates · hidden, input]` and `[gates · hidden, hidden]`.
    pub weights: [&'a [f32]; 2],
    /// `[gates · hidden]` each, of the input's product and of the state's.
    pub biases: [&'a [f32]; 2],
    /// The widths of the input and of the state.
    pub widths: [usize; 2],
    /// The length of each sequence.
    pub lengths: &'a [usize],
    /// Along or against time.
    pub direction: Direction,
}

/// What a forward pass leaves.
#[derive(Debug, Default)]
pub struct NaiveRun {
    /// `[seq · batch, hidden]`, zeros in the padding.
    pub y: Vec<f32>,
    /// The states after each sequence's last step, `[batch, hidden]`: h, and c of the LSTM (empty for the GRU).
    pub last: [Vec<f32>; 2],
    /// In the order in which they were taken.
    steps: Vec<Step>,
}

/// Gradients of the outputs; those that are not there are zero.
#[derive(Debug, Clone, Copy, Default)]
pub struct NaiveUpstream<'a> {
    /// `[seq · batch, hidden]`.
    pub d_y: Option<&'a [f32]>,
    /// `[batch, hidden]` each, of the last h and c.
    pub d_last: [Option<&'a [f32]>; 2],
}

/// What a step leaves for the way back, `[batch, hidden]` each.
#[derive(Debug)]
struct Step {
    t: usize,
    h_prev: Vec<f32>,
    c_prev: Vec<f32>,
    /// i f g o, or r z n and the state's part of n.
    gates: [Vec<f32>; 4],
    /// The LSTM's new cell.
    c: Vec<f32>,
}

/// One elementwise operation: a pass into new memory.
fn each<const N: usize>(inputs: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> Vec<f32> {
    (0..inputs[0].len()).map(|i| f(inputs.map(|input| input[i]))).collect()
}

fn sigmoid(x: &[f32]) -> Vec<f32> {
    each([x], |[x]| 1.0 / (1.0 + (-x).exp()))
}

fn tanh(x: &[f32]) -> Vec<f32> {
    each([x], |[x]| x.tanh())
}

fn add(x: &[f32], y: &[f32]) -> Vec<f32> {
    each([x, y], |[x, y]| x + y)
}

impl NaiveLayer<'_> {
    fn batch(&self) -> usize {
        self.lengths.len()
    }

    /// The rows of gate `g` in the weights of the input (0) or of the state (1).
    fn gate(&self, which: usize, g: usize) -> Result<MatRef<'_>, ShapeError> {
        let (hidden, width) = (self.widths[1], self.widths[which]);
        MatRef::new(&self.weights[which][g * hidden * width..(g + 1) * hidden * width], hidden, width)
    }

    /// `input·Wᵀ + b` of one gate.
    fn sums(&self, input: &[f32], which: usize, g: usize) -> Result<Vec<f32>, ShapeError> {
        let (batch, hidden) = (self.batch(), self.widths[1]);
        let mut a = vec![0.0; batch * hidden];
        let into = MatMut::new(&mut a, batch, hidden)?;
        let input = MatRef::new(input, batch, self.widths[which])?;
        let weights = self.gate(which, g)?.t();
        gemm::gemm(&self.ctx, input, weights, into, Accum::Overwrite, &Epilogue::default())?;
        for row in a.chunks_exact_mut(hidden) {
            row.iter_mut().zip(&self.biases[which][g * hidden..]).for_each(|(a, b)| *a += b);
        }
        Ok(a)
    }

    /// `new` in the rows that are within their length at step `t`, `old` in the others.
    fn where_alive(&self, t: usize, new: Vec<f32>, old: &[f32]) -> Vec<f32> {
        let mut new = new;
        let hidden = self.widths[1];
        for (b, (new, old)) in new.chunks_exact_mut(hidden).zip(old.chunks_exact(hidden)).enumerate() {
            if t >= self.lengths[b] {
                new.copy_from_slice(old);
            }
        }
        new
    }

    /// All steps from the initial states `[batch, hidden]`, zeros where there are none.
    ///
    /// # Shapes
    /// x `[seq · batch, input]`, time-major.
    ///
    /// # Errors
    /// [`ShapeError`] when shapes do not fit.
    pub fn forward(&self, x: &[f32], initial: [Option<&[f32]>; 2]) -> Result<NaiveRun, ShapeError> {
        let (state, input) = (self.batch() * self.widths[1], self.batch() * self.widths[0]);
        let seq = x.len().checked_div(input).unwrap_or(0);
        let lstm = self.cell == Cell::Lstm;
        let [mut h, mut c] = initial.map(|s| s.map_or_else(|| vec![0.0; state], <[f32]>::to_vec));
        let (mut y, mut steps) = (vec![0.0; seq * state], Vec::new());
        let zeros = vec![0.0; state];
        for i in 0..seq {
            let t = if self.direction == Direction::Forward { i } else { seq - 1 - i };
            let x_t = &x[t * input..(t + 1) * input];
            let from_state = |g| self.sums(&h, 1, g);
            let both = |g| Ok::<_, ShapeError>(add(&self.sums(x_t, 0, g)?, &from_state(g)?));
            let (gates, h_new, mut c_new);
            if lstm {
                let [i, f, o] = [sigmoid(&both(0)?), sigmoid(&both(1)?), sigmoid(&both(3)?)];
                let g = tanh(&both(2)?);
                c_new = each([&f, &c, &i, &g], |[f, c, i, g]| f * c + i * g);
                h_new = each([&o, &tanh(&c_new)], |[o, c]| o * c);
                gates = [i, f, g, o];
            } else {
                let [r, z] = [sigmoid(&both(0)?), sigmoid(&both(1)?)];
                let q = from_state(2)?;
                let n = tanh(&each([&self.sums(x_t, 0, 2)?, &r, &q], |[a, r, q]| a + r * q));
                h_new = each([&z, &n, &h], |[z, n, h]| (1.0 - z) * n + z * h);
                c_new = Vec::new();
                gates = [r, z, n, q];
            }
            let said = self.where_alive(t, h_new.clone(), &zeros);
            y[t * state..(t + 1) * state].copy_from_slice(&said);
            let h_new = self.where_alive(t, h_new, &h);
            let saved = c_new.clone();
            if lstm {
                c_new = self.where_alive(t, c_new, &c);
            }
            let h_prev = std::mem::replace(&mut h, h_new);
            let c_prev = std::mem::replace(&mut c, c_new);
            steps.push(Step { t, h_prev, c_prev, gates, c: saved });
        }
        Ok(NaiveRun { y, last: [h, if lstm { c } else { Vec::new() }], steps })
    }

    /// The gradients of x and of the initial states; those of both weights and both biases are added to `grads`.
    ///
    /// # Errors
    /// [`ShapeError`] when shapes do not fit.
    pub fn backward(
        &self,
        x: &[f32],
        run: NaiveRun,
        upstream: NaiveUpstream<'_>,
        grads: &mut [&mut [f32]; 4],
    ) -> Result<(Vec<f32>, [Vec<f32>; 2]), ShapeError> {
        let (state, input) = (self.batch() * self.widths[1], self.batch() * self.widths[0]);
        let zeros = vec![0.0; state];
        let mut d_x = vec![0.0; x.len()];
        let [mut d_h, mut d_c] = upstream.d_last.map(|d| d.map_or_else(|| zeros.clone(), <[f32]>::to_vec));
        for step in run.steps.into_iter().rev() {
            let t = step.t;
            let d_y = upstream.d_y.map_or(&*zeros, |d| &d[t * state..(t + 1) * state]);
            // What belongs to rows that have ended passes the step by.
            let d = self.where_alive(t, add(&d_h, d_y), &zeros);
            let mut d_c_new = self.where_alive(t, d_c.clone(), &zeros);
            // The gradients of each gate's sums, with the input and with the state, and of the old state itself.
            let (of_input, of_state, direct);
            if self.cell == Cell::Lstm {
                let d_sums = lstm_gradients(&step, &d, &mut d_c_new);
                (of_input, of_state, direct) = (d_sums.clone(), d_sums, vec![0.0; state]);
                d_c = self.where_alive(t, d_c_new, &d_c);
            } else {
                (of_input, of_state, direct) = gru_gradients(&step, &d);
            }
            let mut d_h_new = direct;
            let here = t * input..(t + 1) * input;
            let (x_t, d_x_t) = (&x[here.clone()], &mut d_x[here]);
            for (g, (d_a, d_s)) in of_input.iter().zip(&of_state).enumerate() {
                self.through(0, g, d_a, (x_t, d_x_t), grads)?;
                self.through(1, g, d_s, (&step.h_prev, &mut d_h_new), grads)?;
            }
            d_h = self.where_alive(t, d_h_new, &d_h);
        }
        Ok((d_x, [d_h, d_c]))
    }

    /// Backward through one product: adds to the gradients of its input, its weights (of the input, or of the state)
    /// and its bias.
    fn through(
        &self,
        which: usize,
        g: usize,
        d_sums: &[f32],
        (input, d_input): (&[f32], &mut [f32]),
        grads: &mut [&mut [f32]; 4],
    ) -> Result<(), ShapeError> {
        let (batch, hidden, width) = (self.batch(), self.widths[1], self.widths[which]);
        let (d, plain) = (MatRef::new(d_sums, batch, hidden)?, Epilogue::default());
        let d_input = MatMut::new(d_input, batch, width)?;
        gemm::gemm(&self.ctx, d, self.gate(which, g)?, d_input, Accum::Add, &plain)?;
        let d_w = &mut grads[which][g * hidden * width..(g + 1) * hidden * width];
        let (d_w, input) = (MatMut::new(d_w, hidden, width)?, MatRef::new(input, batch, width)?);
        gemm::gemm(&self.ctx, d.t(), input, d_w, Accum::Add, &plain)?;
        for row in d_sums.chunks_exact(hidden) {
            grads[2 + which][g * hidden..].iter_mut().zip(row).for_each(|(d_b, d)| *d_b += d);
        }
        Ok(())
    }
}

/// Of the sums of i f g o; `d_c` becomes that of the old cell.
fn lstm_gradients(step: &Step, d: &[f32], d_c: &mut Vec<f32>) -> Vec<Vec<f32>> {
    let [i, f, g, o] = &step.gates;
    let c = tanh(&step.c);
    let d_o = each([d, &c, o], |[d, c, o]| d * c * o * (1.0 - o));
    *d_c = each([d_c, d, o, &c], |[d_c, d, o, c]| d_c + d * o * (1.0 - c * c));
    let d_i = each([d_c, g, i], |[d, g, i]| d * g * i * (1.0 - i));
    let d_g = each([d_c, i, g], |[d, i, g]| d * i * (1.0 - g * g));
    let d_f = each([d_c, &step.c_prev, f], |[d, c, f]| d * c * f * (1.0 - f));
    *d_c = each([d_c, f], |[d, f]| d * f);
    vec![d_i, d_f, d_g, d_o]
}

/// Of the sums of r z n with the input, of those with the state, and of the old state where it goes into the new.
fn gru_gradients(step: &Step, d: &[f32]) -> (Vec<Vec<f32>>, Vec<Vec<f32>>, Vec<f32>) {
    let [r, z, n, q] = &step.gates;
    let d_n = each([d, z, n], |[d, z, n]| d * (1.0 - z) * (1.0 - n * n));
    let d_z = each([d, &step.h_prev, n, z], |[d, h, n, z]| d * (h - n) * z * (1.0 - z));
    let d_r = each([&d_n, q, r], |[d, q, r]| d * q * r * (1.0 - r));
    let d_q = each([&d_n, r], |[d, r]| d * r);
    (vec![d_r.clone(), d_z.clone(), d_n], vec![d_r, d_z, d_q], each([d, z], |[d, z]| d * z))
}

/// As [`super::recurrent()`], by a [`NaiveLayer`].
///
/// # Errors
/// [`ShapeError`] when shapes do not fit.
///
/// # Panics
/// When the cell is neither LSTM nor GRU.
pub fn naive_recurrent(
    tape: &mut Tape<'_>,
    x: Var,
    weights: &RecurrentWeights,
    (lengths, direction): (&Arc<[usize]>, Direction),
    initial: Option<StateVars>,
) -> Result<RecurrentOutput, ShapeError> {
    assert!(matches!(weights.cell, Cell::Lstm | Cell::Gru), "{:?} has no naive form", weights.cell);
    assert!(weights.w_hr.is_none(), "a projected LSTM has no naive form");
    let (rows, batch, hidden) = (tape.shape(x).0, lengths.len(), weights.hidden(tape.params()));
    let op = Naive { x, weights: *weights, lengths: lengths.clone(), direction, initial };
    let state = [initial.map(|s| tape.value(s.h)), initial.and_then(|s| s.c).map(|c| tape.value(c))];
    let run = op.layer(tape.context(), tape.params()).forward(tape.value(x), state)?;
    let copy = |tape: &Tape<'_>, values: &[f32]| {
        let mut buffer = tape.buffer(values.len());
        buffer.copy_from_slice(values);
        buffer
    };
    let (y, [h, c]) = (copy(tape, &run.y), [0, 1].map(|i| copy(tape, &run.last[i])));
    let c_cols = if run.last[1].is_empty() { 0 } else { hidden };
    let outputs = [(y, rows, hidden), (h, batch, hidden), (c, batch, c_cols)];
    let [y, h, c] = tape.push_all(outputs, || Saved { op, run });
    Ok(RecurrentOutput { y, last: StateVars { h, c: (weights.cell == Cell::Lstm).then_some(c) } })
}

struct Naive {
    x: Var,
    weights: RecurrentWeights,
    lengths: Arc<[usize]>,
    direction: Direction,
    initial: Option<StateVars>,
}

impl Naive {
    fn layer<'a>(&'a self, ctx: &Context, params: &'a crate::ParamStore) -> NaiveLayer<'a> {
        let RecurrentWeights { cell, w_ih, w_hh, b_ih, b_hh, .. } = self.weights;
        NaiveLayer {
            ctx: *ctx,
            cell,
            weights: [params.get(w_ih), params.get(w_hh)],
            biases: [params.get(b_ih), params.get(b_hh)],
            widths: [self.weights.input(params), self.weights.hidden(params)],
            lengths: &self.lengths,
            direction: self.direction,
        }
    }
}

struct Saved {
    op: Naive,
    run: NaiveRun,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, pass: &mut BackwardPass<'_>, out: Var) -> Result<(), ShapeError> {
        let Saved { op, run } = *self;
        let d_y = pass.take_grad(out);
        let d_last = [out.after(1), out.after(2)].map(|var| pass.take_grad(var));
        let upstream = NaiveUpstream { d_y: d_y.as_deref(), d_last: [0, 1].map(|i| d_last[i].as_deref()) };
        let mut d_x = pass.target(op.x);
        let layer = op.layer(&pass.ctx, pass.params);
        let RecurrentWeights { w_ih, w_hh, b_ih, b_hh, .. } = op.weights;
        let mut grads = pass.grads.get_disjoint_mut([w_ih, w_hh, b_ih, b_hh]);
        let (d, [d_h, d_c]) = layer.backward(pass.nodes.value(op.x), run, upstream, &mut grads)?;
        d_x.buffer().copy_from_slice(&d);
        pass.put(op.x, d_x)?;
        if let Some(StateVars { h, c }) = op.initial {
            for (var, d) in [(Some(h), d_h), (c, d_c)] {
                if let Some(var) = var {
                    let mut buffer = pass.pool.take(d.len());
                    buffer.copy_from_slice(&d);
                    pass.hand_on(var, buffer)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::concat_cols;
    use crate::ops::gradient_check::{Case, check};
    use crate::ops::recurrent::recurrent;
    use crate::ops::recurrent::tests::recurrent_weights;
    use crate::{Grads, Pool};

    const CELLS: [Cell; 2] = [Cell::Lstm, Cell::Gru];
    const DIRECTIONS: [Direction; 2] = [Direction::Forward, Direction::Reverse];

    #[test]
    fn gradients_of_outputs_and_final_states() {
        for (cell, direction) in CELLS.into_iter().flat_map(|c| DIRECTIONS.map(|d| (c, d))) {
            let mut case = Case::new(6);
            let weights = recurrent_weights(&mut case.store, cell, 3, 5);
            let lengths: Arc<[usize]> = [2, 4, 0].into();
            case.input(4 * 3, 3);
            case.input(3, 5);
            case.input(3, 5);
            check(&case, |tape, v| {
                let start = Some(StateVars { h: v[1], c: cell.has_cell_state().then_some(v[2]) });
                let out = naive_recurrent(tape, v[0], &weights, (&lengths, direction), start)?;
                let again = naive_recurrent(tape, v[0], &weights, (&lengths, direction), Some(out.last))?;
                concat_cols(tape, &[out.y, again.y])
            });
        }
    }

    /// y, the last states and the gradients of all weights.
    fn everything(
        case: &Case,
        weights: &RecurrentWeights,
        direction: Direction,
        naive: bool,
    ) -> Vec<Vec<f32>> {
        let (pool, ctx) = (Pool::new(), Context::with_isa(kavanam_kernels::Isa::best()));
        let lengths: Arc<[usize]> = [7, 3, 0, 6].into();
        let mut tape = Tape::recording(&ctx, &case.store, &pool);
        let x: Vec<f32> = (0..7 * 4 * 9).map(|i| ((i * 37 % 101) as f32 - 50.0) / 60.0).collect();
        let x = tape.constant(&x, 28, 9).unwrap();
        let run = if naive { naive_recurrent } else { recurrent };
        let out = run(&mut tape, x, weights, (&lengths, direction), None).unwrap();
        let mut all: Vec<Vec<f32>> =
            out.last.vars().chain([out.y]).map(|var| tape.value(var).to_vec()).collect();
        let targets = (0..28).map(|i| i % 17).collect();
        let loss = crate::ops::classification_loss(&mut tape, out.y, &targets, 0.0).unwrap();
        let mut grads = Grads::zeros(&case.store);
        tape.backward(loss, &mut grads).unwrap();
        all.extend(case.store.ids().map(|id| grads.get(id).to_vec()));
        all
    }

    #[test]
    fn the_fast_layer_computes_the_same() {
        for (cell, direction) in CELLS.into_iter().flat_map(|c| DIRECTIONS.map(|d| (c, d))) {
            let mut case = Case::new(8);
            let weights = recurrent_weights(&mut case.store, cell, 9, 17);
            let [naive, fast] = [true, false].map(|naive| everything(&case, &weights, direction, naive));
            // A gate is a sum of 9 + 17 products and two biases, and two functions of a few roundings: (26 + 10)·ε
            // relative to the sum of its terms' sizes, below 8 here. Seven steps carry it on, each with a factor below
            // 2 as its gates' slopes and weights have it; the way back as often again.
            let tolerance = 36.0 * 8.0 * 2.0 * 7.0 * f32::EPSILON;
            for (naive, fast) in naive.iter().zip(&fast) {
                assert_eq!(naive.len(), fast.len());
                let scale = fast.iter().fold(1.0f32, |scale, x| scale.max(x.abs()));
                for (naive, fast) in naive.iter().zip(fast) {
                    assert!(
                        (naive - fast).abs() <= tolerance * scale,
                        "{cell:?} {direction:?}: {naive} {fast}"
                    );
                }
            }
        }
    }
}
