//! Properties of the recurrent kernels, each on every instruction set of the machine.

mod attention;
mod min_rnn;
mod precision;
mod sequence;
mod steps;

use crate::Context;
use crate::reference::{self, LstmExtraGrads, LstmExtras, Real, Recurrent, RecurrentGrads, RecurrentOutput};
use crate::testing::{UNIT_ROUNDOFF, uniform};
use crate::view::{MatMut, MatRef};

use super::{
    BackwardPass, Cell, Direction, ForwardPass, InputGrads, Output, OutputGrads, Saved, Sequence, State,
    StateMut, WeightGrads, Weights, backward, backward_all, forward, forward_all, infer, infer_all,
};

/// A kind of layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kind {
    cell: Cell,
    projected: bool,
}

impl Kind {
    /// Every cell, and those that can be projected so as well; the ReLU last.
    fn all() -> Vec<Kind> {
        let projected = [Cell::Lstm, Cell::LstmPeephole].map(|cell| Kind { cell, projected: true });
        projected.into_iter().chain(Cell::ALL.map(Kind::from)).collect()
    }
}

impl From<Cell> for Kind {
    fn from(cell: Cell) -> Kind {
        Kind { cell, projected: false }
    }
}

/// What [`Case::run`] gives.
type Run<T> = (RecurrentOutput<T>, Grads<T>);

/// The gradients of everything that a layer reads.
#[derive(Debug, Clone)]
struct Grads<T> {
    layer: RecurrentGrads<T>,
    extra: LstmExtraGrads<T>,
}

/// A layer with its inputs and the gradients of its outputs.
#[derive(Debug, Clone)]
struct Case {
    cell: Cell,
    direction: Direction,
    seq: usize,
    input: usize,
    hidden: usize,
    /// Width of h: about half of hidden where it is projected.
    output: usize,
    projected: bool,
    lengths: Vec<usize>,
    w_ih: Vec<f32>,
    w_hh: Vec<f32>,
    b_ih: Vec<f32>,
    b_hh: Vec<f32>,
    peepholes: Vec<f32>,
    w_hr: Vec<f32>,
    x: Vec<f32>,
    h0: Vec<f32>,
    c0: Vec<f32>,
    d: RecurrentOutput<f32>,
}

fn scaled(len: usize, factor: f32, seed: u64) -> Vec<f32> {
    uniform(len, seed).into_iter().map(|x| x * factor).collect()
}

impl Case {
    fn new(
        kind: impl Into<Kind>,
        direction: Direction,
        [seq, input, hidden]: [usize; 3],
        lengths: &[usize],
    ) -> Case {
        let Kind { cell, projected } = kind.into();
        let output = if projected { hidden / 2 + 1 } else { hidden };
        let (batch, rows) = (lengths.len(), cell.gates() * hidden);
        let cell_columns = cell.cell_columns(hidden);
        let weight = 1.5 / (hidden.max(1) as f32).sqrt();
        Case {
            cell,
            direction,
            seq,
            input,
            hidden,
            output,
            projected,
            lengths: lengths.to_vec(),
            w_ih: scaled(rows * input, weight, 1),
            w_hh: scaled(rows * output, weight, 2),
            b_ih: scaled(rows, 0.5, 3),
            b_hh: scaled(rows, 0.5, 4),
            x: scaled(seq * batch * input, 2.0, 5),
            peepholes: scaled(cell.peepholes(hidden), 1.0, 11),
            w_hr: scaled(if projected { output * hidden } else { 0 }, weight, 12),
            h0: scaled(batch * output, 0.9, 6),
            c0: scaled(batch * cell_columns, 1.5, 7),
            d: RecurrentOutput {
                y: uniform(seq * batch * output, 8),
                h: uniform(batch * output, 9),
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
            w_hh: MatRef::new(&self.w_hh, rows, self.output).unwrap(),
            b_ih: &self.b_ih,
            b_hh: &self.b_hh,
            peepholes: &self.peepholes,
            w_hr: self.projected.then(|| MatRef::new(&self.w_hr, self.output, self.hidden).unwrap()),
        }
    }

    fn sequence(&self) -> Sequence<'_> {
        let x = MatRef::new(&self.x, self.seq * self.batch(), self.input).unwrap();
        Sequence { x, lengths: &self.lengths, direction: self.direction }
    }

    /// The rows of a state: `[batch, output]` and `[batch, hidden]`.
    fn state<'a>(&self, h: &'a [f32], c: &'a [f32]) -> State<'a> {
        let part = |data, width| MatRef::new(data, self.batch(), width).unwrap();
        State { h: part(h, self.output), c: self.cell.has_cell_state().then(|| part(c, self.hidden)) }
    }

    fn state_mut<'a>(&self, h: &'a mut [f32], c: &'a mut [f32]) -> StateMut<'a> {
        let (batch, hidden) = (self.batch(), self.hidden);
        let c = self.cell.has_cell_state().then(|| MatMut::new(c, batch, hidden).unwrap());
        StateMut { h: MatMut::new(h, batch, self.output).unwrap(), c }
    }

    /// Gradients in the shapes of the layer's tensors: zeros for what is added to, NaN for what is overwritten.
    fn empty_grads(&self) -> Grads<f32> {
        let nan = |like: &[f32]| vec![f32::NAN; like.len()];
        let zeros = |like: &[f32]| vec![0.0; like.len()];
        Grads {
            layer: RecurrentGrads {
                d_w_ih: zeros(&self.w_ih),
                d_w_hh: zeros(&self.w_hh),
                d_b_ih: zeros(&self.b_ih),
                d_b_hh: zeros(&self.b_hh),
                d_x: nan(&self.x),
                d_h0: nan(&self.h0),
                d_c0: nan(&self.c0),
            },
            extra: LstmExtraGrads { d_peepholes: zeros(&self.peepholes), d_w_hr: zeros(&self.w_hr) },
        }
    }

    /// The gradients of the weights, and those of x, h0 and c0.
    fn split_grads<'a>(&self, grads: &'a mut Grads<f32>) -> (WeightGrads<'a>, [&'a mut Vec<f32>; 3]) {
        let rows = self.cell.gates() * self.hidden;
        let Grads { layer, extra } = grads;
        let RecurrentGrads { d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_x, d_h0, d_c0 } = layer;
        let d_w_hr = &mut extra.d_w_hr;
        let weights = WeightGrads {
            d_w_ih: MatMut::new(d_w_ih, rows, self.input).unwrap(),
            d_w_hh: MatMut::new(d_w_hh, rows, self.output).unwrap(),
            d_b_ih,
            d_b_hh,
            d_peepholes: &mut extra.d_peepholes,
            d_w_hr: self.projected.then(|| MatMut::new(d_w_hr, self.output, self.hidden).unwrap()),
        };
        (weights, [d_x, d_h0, d_c0])
    }

    fn forward_pass<'a>(&'a self, out: &'a mut RecurrentOutput<f32>) -> ForwardPass<'a> {
        let last = Some(self.state_mut(&mut out.h, &mut out.c));
        let y = MatMut::new(&mut out.y, self.seq * self.batch(), self.output).unwrap();
        ForwardPass {
            weights: self.weights(),
            sequence: self.sequence(),
            initial: Some(self.state(&self.h0, &self.c0)),
            output: Output { y, last },
        }
    }

    fn backward_pass<'a>(&'a self, saved: Saved, grads: &'a mut Grads<f32>) -> BackwardPass<'a> {
        let rows = self.seq * self.batch();
        let upstream = OutputGrads {
            d_y: Some(MatRef::new(&self.d.y, rows, self.output).unwrap()),
            d_last: Some(self.state(&self.d.h, &self.d.c)),
        };
        let (weights, [d_x, d_h0, d_c0]) = self.split_grads(grads);
        let grads = InputGrads {
            weights,
            d_x: Some(MatMut::new(d_x, rows, self.input).unwrap()),
            d_initial: Some(self.state_mut(d_h0, d_c0)),
        };
        BackwardPass { weights: self.weights(), sequence: self.sequence(), saved, upstream, grads }
    }

    /// Outputs that nothing has been written to.
    fn nan_output(&self) -> RecurrentOutput<f32> {
        let nan = |like: &[f32]| vec![f32::NAN; like.len()];
        RecurrentOutput { y: nan(&self.d.y), h: nan(&self.d.h), c: nan(&self.d.c) }
    }

    /// Forward and backward by the kernels. Outputs start as NaN, accumulated gradients as zeros.
    fn run(&self, ctx: &Context) -> Run<f32> {
        let (mut out, mut grads) = (self.nan_output(), self.empty_grads());
        let ForwardPass { weights, sequence, initial, output } = self.forward_pass(&mut out);
        let saved = forward(ctx, &weights, &sequence, initial, output).unwrap();
        let BackwardPass { weights, sequence, saved, upstream, grads: into } =
            self.backward_pass(saved, &mut grads);
        backward(ctx, &weights, &sequence, saved, upstream, into).unwrap();
        (out, grads)
    }

    /// Forward and backward by the naive form in T.
    fn naive<T: Real>(&self) -> Run<T> {
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
        let (peepholes, w_hr) = (real(&self.peepholes), real(&self.w_hr));
        let extras = LstmExtras { peepholes: &peepholes, w_hr: self.projected.then_some(&w_hr[..]) };
        let (out, grads) = match self.cell {
            Cell::Lstm if !self.projected => {
                (reference::lstm_forward(&layer), reference::lstm_backward(&layer, &d))
            }
            Cell::Lstm | Cell::LstmPeephole => {
                let (layer_grads, extra) = reference::lstm_extended_backward(&layer, &extras, &d);
                let out = reference::lstm_extended_forward(&layer, &extras);
                return (out, Grads { layer: layer_grads, extra });
            }
            Cell::Gru => (reference::gru_forward(&layer), reference::gru_backward(&layer, &d)),
            Cell::GruResetBefore => {
                let out = reference::gru_reset_before_forward(&layer);
                (out, reference::gru_reset_before_backward(&layer, &d))
            }
            Cell::Tanh | Cell::Relu => {
                let relu = self.cell == Cell::Relu;
                (reference::elman_forward(&layer, relu), reference::elman_backward(&layer, relu, &d))
            }
        };
        (out, Grads { layer: grads, extra: LstmExtraGrads { d_peepholes: vec![], d_w_hr: vec![] } })
    }
}

/// The tensors of a result by name.
fn tensors<'a, T>(
    out: &'a RecurrentOutput<T>,
    Grads { layer: grads, extra }: &'a Grads<T>,
) -> [(&'static str, &'a [T]); 12] {
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
        ("d_peepholes", &extra.d_peepholes),
        ("d_w_hr", &extra.d_w_hr),
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
