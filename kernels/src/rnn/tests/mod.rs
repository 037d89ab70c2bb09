//! Properties of the recurrent kernels, each on every instruction set of the machine.

mod attention;
mod min_rnn;
mod sequence;
mod steps;

use crate::Context;
use crate::reference::{self, Real, Recurrent, RecurrentGrads, RecurrentOutput};
use crate::testing::{UNIT_ROUNDOFF, uniform};
use crate::view::{MatMut, MatRef};

use super::{
    Cell, Direction, InputGrads, Output, OutputGrads, Sequence, State, StateMut, WeightGrads, Weights,
    backward, forward,
};

/// A layer with its inputs and the gradients of its outputs.
#[derive(Debug, Clone)]
struct Case {
    cell: Cell,
    direction: Direction,
    seq: usize,
    input: usize,
    hidden: usize,
    lengths: Vec<usize>,
    w_ih: Vec<f32>,
    w_hh: Vec<f32>,
    b_ih: Vec<f32>,
    b_hh: Vec<f32>,
    x: Vec<f32>,
    h0: Vec<f32>,
    c0: Vec<f32>,
    d: RecurrentOutput<f32>,
}

fn scaled(len: usize, factor: f32, seed: u64) -> Vec<f32> {
    uniform(len, seed).into_iter().map(|x| x * factor).collect()
}

impl Case {
    fn new(cell: Cell, direction: Direction, [seq, input, hidden]: [usize; 3], lengths: &[usize]) -> Case {
        let (batch, rows) = (lengths.len(), cell.gates() * hidden);
        let cell_columns = cell.cell_columns(hidden);
        let weight = 1.5 / (hidden.max(1) as f32).sqrt();
        Case {
            cell,
            direction,
            seq,
            input,
            hidden,
            lengths: lengths.to_vec(),
            w_ih: scaled(rows * input, weight, 1),
            w_hh: scaled(rows * hidden, weight, 2),
            b_ih: scaled(rows, 0.5, 3),
            b_hh: scaled(rows, 0.5, 4),
            x: scaled(seq * batch * input, 2.0, 5),
            h0: scaled(batch * hidden, 0.9, 6),
            c0: scaled(batch * cell_columns, 1.5, 7),
            d: RecurrentOutput {
                y: uniform(seq * batch * hidden, 8),
                h: uniform(batch * hidden, 9),
                c: uniform(batch * cell_columns, 10),
            },
        }
    }

    fn batch(&self) -> usize {
        self.lengths.len()
    }

    fn weights(&self) -> Weights<'_> {
        let rows = self.cell.gates() * self.hidden;
        Weights {
            cell: self.cell,
            w_ih: MatRef::new(&self.w_ih, rows, self.input).unwrap(),
            w_hh: MatRef::new(&self.w_hh, rows, self.hidden).unwrap(),
            b_ih: &self.b_ih,
            b_hh: &self.b_hh,
        }
    }

    fn sequence(&self) -> Sequence<'_> {
        let x = MatRef::new(&self.x, self.seq * self.batch(), self.input).unwrap();
        Sequence { x, lengths: &self.lengths, direction: self.direction }
    }

    /// The rows of a state: `[batch, hidden]`.
    fn state<'a>(&self, h: &'a [f32], c: &'a [f32]) -> State<'a> {
        let part = |data| MatRef::new(data, self.batch(), self.hidden).unwrap();
        State { h: part(h), c: self.cell.has_cell_state().then(|| part(c)) }
    }

    fn state_mut<'a>(&self, h: &'a mut [f32], c: &'a mut [f32]) -> StateMut<'a> {
        let (batch, hidden) = (self.batch(), self.hidden);
        let c = self.cell.has_cell_state().then(|| MatMut::new(c, batch, hidden).unwrap());
        StateMut { h: MatMut::new(h, batch, hidden).unwrap(), c }
    }

    /// Forward and backward by the kernels. Outputs start as NaN, accumulated gradients as zeros.
    fn run(&self, ctx: &Context) -> (RecurrentOutput<f32>, RecurrentGrads<f32>) {
        let nan = |like: &[f32]| vec![f32::NAN; like.len()];
        let zeros = |like: &[f32]| vec![0.0; like.len()];
        let mut out = RecurrentOutput { y: nan(&self.d.y), h: nan(&self.d.h), c: nan(&self.d.c) };
        let (weights, sequence) = (self.weights(), self.sequence());
        let (rows, input, hidden) = (self.seq * self.batch(), self.input, self.hidden);
        let last = Some(self.state_mut(&mut out.h, &mut out.c));
        let output = Output { y: MatMut::new(&mut out.y, rows, hidden).unwrap(), last };
        let initial = Some(self.state(&self.h0, &self.c0));
        let saved = forward(ctx, &weights, &sequence, initial, output).unwrap();
        let mut grads = RecurrentGrads {
            d_w_ih: zeros(&self.w_ih),
            d_w_hh: zeros(&self.w_hh),
            d_b_ih: zeros(&self.b_ih),
            d_b_hh: zeros(&self.b_hh),
            d_x: nan(&self.x),
            d_h0: nan(&self.h0),
            d_c0: nan(&self.c0),
        };
        let upstream = OutputGrads {
            d_y: Some(MatRef::new(&self.d.y, rows, hidden).unwrap()),
            d_last: Some(self.state(&self.d.h, &self.d.c)),
        };
        let gate_rows = self.cell.gates() * hidden;
        let into = InputGrads {
            weights: WeightGrads {
                d_w_ih: MatMut::new(&mut grads.d_w_ih, gate_rows, input).unwrap(),
                d_w_hh: MatMut::new(&mut grads.d_w_hh, gate_rows, hidden).unwrap(),
                d_b_ih: &mut grads.d_b_ih,
                d_b_hh: &mut grads.d_b_hh,
            },
            d_x: Some(MatMut::new(&mut grads.d_x, rows, input).unwrap()),
            d_initial: Some(self.state_mut(&mut grads.d_h0, &mut grads.d_c0)),
        };
        backward(ctx, &weights, &sequence, saved, upstream, into).unwrap();
        (out, grads)
    }

    /// Forward and backward by the naive form in T.
    fn naive<T: Real>(&self) -> (RecurrentOutput<T>, RecurrentGrads<T>) {
        let real = |data: &[f32]| data.iter().map(|&x| T::from(x)).collect::<Vec<T>>();
        let weights = [&self.w_ih, &self.w_hh, &self.b_ih, &self.b_hh].map(|w| real(w));
        let (x, h0, c0) = (real(&self.x), real(&self.h0), real(&self.c0));
        let layer = Recurrent {
            seq: self.seq,
            input: self.input,
            hidden: self.hidden,
            w_ih: &weights[0],
            w_hh: &weights[1],
            b_ih: &weights[2],
            b_hh: &weights[3],
            x: &x,
            lengths: &self.lengths,
            reverse: self.direction == Direction::Reverse,
            h0: &h0,
            c0: &c0,
        };
        let d = RecurrentOutput { y: real(&self.d.y), h: real(&self.d.h), c: real(&self.d.c) };
        match self.cell {
            Cell::Lstm => (reference::lstm_forward(&layer), reference::lstm_backward(&layer, &d)),
            Cell::Gru => (reference::gru_forward(&layer), reference::gru_backward(&layer, &d)),
            Cell::GruResetBefore => {
                let out = reference::gru_reset_before_forward(&layer);
                (out, reference::gru_reset_before_backward(&layer, &d))
            }
            Cell::Tanh | Cell::Relu => {
                let relu = self.cell == Cell::Relu;
                (reference::elman_forward(&layer, relu), reference::elman_backward(&layer, relu, &d))
            }
        }
    }
}

/// The tensors of a result by name.
fn tensors<'a, T>(
    out: &'a RecurrentOutput<T>,
    grads: &'a RecurrentGrads<T>,
) -> [(&'static str, &'a [T]); 10] {
    [
        ("y", &out.y),
        ("h", &out.h),
        ("c", &out.c),
        ("d_w_ih", &grads.d_w_ih),
        ("d_w_hh", &grads.d_w_hh),
        ("d_b_ih", &grads.d_b_ih),
        ("d_b_hh", &grads.d_b_hh),
        ("d_x", &grads.d_x),
        ("d_h0", &grads.d_h0),
        ("d_c0", &grads.d_c0),
    ]
}

/// Asserts that the largest error of `fast` is at most `factor` times that of `naive` in f32. Where the naive form
/// happens to be (almost) exact, a few roundings of the largest element are allowed: those of the activations
/// (2.5 ULP each) that a single element goes through.
#[track_caller]
fn assert_near(what: &str, factor: f64, fast: &[f32], naive: &[f32], exact: &[f64]) {
    assert_near_scaled(what, factor, (fast, naive, exact), largest(exact));
}

/// The largest magnitude.
fn largest(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |m, x| m.max(x.abs()))
}

/// The largest magnitude in several tensors.
fn scale_of<'a>(tensors: impl Iterator<Item = (&'a str, &'a [f64])>) -> f64 {
    tensors.map(|(_, x)| largest(x)).fold(0.0, f64::max)
}

/// As [`assert_near`], with roundings of `largest`. A gradient may be a sum of large terms that cancel (think of a
/// state of width 1); its roundings are those of the terms, which the other gradients of the layer show. So may a new
/// state be: its terms are of the size of 1.
#[track_caller]
fn assert_near_scaled(what: &str, factor: f64, (fast, naive, exact): (&[f32], &[f32], &[f64]), largest: f64) {
    assert!(fast.len() == exact.len() && naive.len() == exact.len(), "{what}: lengths");
    let worst = |x: &[f32]| {
        let error =
            |(&x, &e): (&f32, &f64)| if x.is_nan() { f64::INFINITY } else { (f64::from(x) - e).abs() };
        x.iter().zip(exact).map(error).fold(0.0, f64::max)
    };
    let (ours, theirs) = (worst(fast), worst(naive));
    let bound = factor * theirs.max(6.0 * UNIT_ROUNDOFF * largest);
    assert!(
        ours <= bound,
        "{what}: error {ours:e}, the naive form's is {theirs:e}, the largest element {largest:e}"
    );
}
