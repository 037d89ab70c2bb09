//! Recurrent layers row by row and step by step, what all cells share.
//!
//! Everything is generic over f32 and f64: in f64 it is the oracle, in f32 the naive form whose error the
//! fast kernels are measured against.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Mul, Neg, Sub};

/// f32 or f64.
pub trait Real:
    Copy
    + Debug
    + PartialOrd
    + From<f32>
    + Into<f64>
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + Sum
{
    /// eˣ.
    fn exp(self) -> Self;
    /// The natural logarithm.
    fn ln(self) -> Self;
    /// tanh x.
    fn tanh(self) -> Self;

    /// 0.
    fn zero() -> Self {
        Self::from(0.0)
    }

    /// 1.
    fn one() -> Self {
        Self::from(1.0)
    }

    /// 1 / (1 + e⁻ˣ).
    fn sigmoid(self) -> Self {
        Self::one() / (Self::one() + (-self).exp())
    }
}

impl Real for f32 {
    fn exp(self) -> f32 {
        self.exp()
    }

    fn ln(self) -> f32 {
        self.ln()
    }

    fn tanh(self) -> f32 {
        self.tanh()
    }
}

impl Real for f64 {
    fn exp(self) -> f64 {
        self.exp()
    }

    fn ln(self) -> f64 {
        self.ln()
    }

    fn tanh(self) -> f64 {
        self.tanh()
    }
}

/// A recurrent layer and its inputs, gapless and row-major.
///
/// # Shapes
/// With G gates (4 for the LSTM, 3 for the GRU, 1 for the plain cell): `w_ih` `[G·hidden, input]`, `w_hh` `[G·hidden, hidden]`, biases
/// `[G·hidden]`, x `[seq, batch, input]`, `lengths` `[batch]`, h0 and c0 `[batch, hidden]` (only an LSTM reads c0).
#[derive(Debug, Clone)]
pub struct Recurrent<'a, T> {
    /// Steps of the padded batch.
    pub seq: usize,
    /// Width of an input.
    pub input: usize,
    /// Width of the state.
    pub hidden: usize,
    /// Weights of the input.
    pub w_ih: &'a [T],
    /// Weights of the state.
    pub w_hh: &'a [T],
    /// Bias of the input's product.
    pub b_ih: &'a [T],
    /// Bias of the state's product.
    pub b_hh: &'a [T],
    /// Inputs.
    pub x: &'a [T],
    /// Steps of each row.
    pub lengths: &'a [usize],
    /// From each row's last step to its first.
    pub reverse: bool,
    /// Initial state.
    pub h0: &'a [T],
    /// Initial cell state.
    pub c0: &'a [T],
}

/// What a recurrent layer computes: y `[seq, batch, hidden]` with zeros in the padding, final h and c.
#[derive(Debug, Clone, PartialEq)]
pub struct RecurrentOutput<T> {
    /// State after each step.
    pub y: Vec<T>,
    /// State after each row's last step.
    pub h: Vec<T>,
    /// Cell state after each row's last step (c0 for a cell without one).
    pub c: Vec<T>,
}

/// Gradients of all that [`Recurrent`] holds, in the same shapes.
#[derive(Debug, Clone, PartialEq)]
pub struct RecurrentGrads<T> {
    /// Of `w_ih`.
    pub d_w_ih: Vec<T>,
    /// Of `w_hh`.
    pub d_w_hh: Vec<T>,
    /// Of `b_ih`.
    pub d_b_ih: Vec<T>,
    /// Of `b_hh`.
    pub d_b_hh: Vec<T>,
    /// Of x.
    pub d_x: Vec<T>,
    /// Of h0.
    pub d_h0: Vec<T>,
    /// Of c0.
    pub d_c0: Vec<T>,
}

/// Gradients of one row's gates at one step: of the sums that the input's and the state's product enter.
pub(super) struct GateGrads<T> {
    pub(super) input: Vec<T>,
    pub(super) state: Vec<T>,
    /// What reaches the old state other than through `W_hh`.
    pub(super) d_h: Vec<T>,
    pub(super) d_c: Vec<T>,
}

/// One row of one step of a cell.
pub(super) trait RowCell<T> {
    /// New (h, c) from the two products (biases included) and the old state.
    fn forward(from_x: &[T], from_h: &[T], h: &[T], c: &[T]) -> (Vec<T>, Vec<T>);
    /// Gradients from those of the new state.
    fn backward(from_x: &[T], from_h: &[T], state: (&[T], &[T]), d: (&[T], &[T])) -> GateGrads<T>;
}

/// `W·x + b`.
pub(super) fn affine<T: Real>(w: &[T], x: &[T], b: &[T]) -> Vec<T> {
    b.iter()
        .enumerate()
        .map(|(j, &b)| (0..x.len()).map(|k| w[j * x.len() + k] * x[k]).sum::<T>() + b)
        .collect()
}

impl<T: Real> Recurrent<'_, T> {
    /// The steps of row `b` in the order of their visits.
    pub(super) fn steps(&self, b: usize) -> Vec<usize> {
        let forward = 0..self.lengths[b];
        if self.reverse { forward.rev().collect() } else { forward.collect() }
    }

    pub(super) fn input_at(&self, t: usize, b: usize) -> &[T] {
        let first = (t * self.lengths.len() + b) * self.input;
        &self.x[first..first + self.input]
    }

    fn products(&self, x: &[T], h: &[T]) -> (Vec<T>, Vec<T>) {
        (affine(self.w_ih, x, self.b_ih), affine(self.w_hh, h, self.b_hh))
    }

    pub(super) fn initial(&self, b: usize) -> (Vec<T>, Vec<T>) {
        let row =
            |state: &[T]| state.get(b * self.hidden..(b + 1) * self.hidden).map_or(Vec::new(), <[T]>::to_vec);
        (row(self.h0), row(self.c0))
    }
}

pub(super) fn forward<T: Real, C: RowCell<T>>(layer: &Recurrent<'_, T>) -> RecurrentOutput<T> {
    let (batch, hidden) = (layer.lengths.len(), layer.hidden);
    let mut out = RecurrentOutput { y: vec![T::zero(); layer.seq * batch * hidden], h: vec![], c: vec![] };
    for b in 0..batch {
        let (mut h, mut c) = layer.initial(b);
        for t in layer.steps(b) {
            let (from_x, from_h) = layer.products(layer.input_at(t, b), &h);
            (h, c) = C::forward(&from_x, &from_h, &h, &c);
            out.y[(t * batch + b) * hidden..][..hidden].copy_from_slice(&h);
        }
        out.h.extend(h);
        out.c.extend(c);
    }
    out
}

/// Zeros for what is added to, nothing for the initial states' gradients.
pub(super) fn empty_grads<T: Real>(layer: &Recurrent<'_, T>) -> RecurrentGrads<T> {
    let zeros = |like: &[T]| vec![T::zero(); like.len()];
    RecurrentGrads {
        d_w_ih: zeros(layer.w_ih),
        d_w_hh: zeros(layer.w_hh),
        d_b_ih: zeros(layer.b_ih),
        d_b_hh: zeros(layer.b_hh),
        d_x: zeros(layer.x),
        d_h0: vec![],
        d_c0: vec![],
    }
}

pub(super) fn backward<T: Real, C: RowCell<T>>(
    layer: &Recurrent<'_, T>,
    d: &RecurrentOutput<T>,
) -> RecurrentGrads<T> {
    let (batch, hidden, input) = (layer.lengths.len(), layer.hidden, layer.input);
    let mut grads = empty_grads(layer);
    for b in 0..batch {
        let steps = layer.steps(b);
        let mut states = vec![layer.initial(b)];
        for &t in &steps {
            let (h, c) = states.last().expect("holds the initial state");
            let (from_x, from_h) = layer.products(layer.input_at(t, b), h);
            states.push(C::forward(&from_x, &from_h, h, c));
        }
        let mut d_h = d.h[b * hidden..(b + 1) * hidden].to_vec();
        let mut d_c = d.c.get(b * hidden..(b + 1) * hidden).map_or(vec![], <[T]>::to_vec);
        for (&t, (h, c)) in steps.iter().zip(&states).rev() {
            let row = t * batch + b;
            for (d_h, &d_y) in d_h.iter_mut().zip(&d.y[row * hidden..]) {
                *d_h += d_y;
            }
            let x = layer.input_at(t, b);
            let (from_x, from_h) = layer.products(x, h);
            let gates = C::backward(&from_x, &from_h, (h, c), (&d_h, &d_c));
            accumulate(&mut grads.d_w_ih, &mut grads.d_b_ih, &gates.input, x);
            accumulate(&mut grads.d_w_hh, &mut grads.d_b_hh, &gates.state, h);
            for k in 0..input {
                grads.d_x[row * input + k] = transposed(layer.w_ih, &gates.input, input, k);
            }
            d_h =
                (0..hidden).map(|k| transposed(layer.w_hh, &gates.state, hidden, k) + gates.d_h[k]).collect();
            d_c = gates.d_c;
        }
        grads.d_h0.extend(d_h);
        grads.d_c0.extend(d_c);
    }
    grads
}

/// Element `k` of `Wᵀ·d`.
pub(super) fn transposed<T: Real>(w: &[T], d: &[T], cols: usize, k: usize) -> T {
    d.iter().enumerate().map(|(j, &d)| w[j * cols + k] * d).sum()
}

/// `d_W += d·xᵀ`, `d_b += d`.
pub(super) fn accumulate<T: Real>(d_w: &mut [T], d_b: &mut [T], d: &[T], x: &[T]) {
    for (j, &d) in d.iter().enumerate() {
        d_b[j] += d;
        for (k, &x_k) in x.iter().enumerate() {
            d_w[j * x.len() + k] += d * x_k;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::{
        elman_backward, elman_forward, gru_backward, gru_forward, gru_reset_before_backward,
        gru_reset_before_forward, lstm_backward, lstm_forward,
    };

    const SEQ: usize = 4;
    const INPUT: usize = 2;
    const HIDDEN: usize = 3;
    const LENGTHS: [usize; 3] = [4, 0, 2];

    /// Values that repeat with no short period, in (−1, 1).
    fn values(len: usize, seed: f64) -> Vec<f64> {
        (0..len).map(|i| (seed + 1.7 * i as f64).sin() * 0.8).collect()
    }

    /// w_ih, w_hh, b_ih, b_hh, x, h0, c0.
    fn parameters(gates: usize) -> [Vec<f64>; 7] {
        let (rows, batch) = (gates * HIDDEN, LENGTHS.len());
        let lens =
            [rows * INPUT, rows * HIDDEN, rows, rows, SEQ * batch * INPUT, batch * HIDDEN, batch * HIDDEN];
        let mut seed = 0.0;
        lens.map(|len| {
            seed += 0.31;
            values(len, seed)
        })
    }

    fn layer<'a>(p: &'a [Vec<f64>; 7], reverse: bool) -> Recurrent<'a, f64> {
        let [w_ih, w_hh, b_ih, b_hh, x, h0, c0] = p.each_ref().map(Vec::as_slice);
        Recurrent {
            seq: SEQ,
            input: INPUT,
            hidden: HIDDEN,
            w_ih,
            w_hh,
            b_ih,
            b_hh,
            x,
            lengths: &LENGTHS,
            reverse,
            h0,
            c0,
        }
    }

    fn loss(out: &RecurrentOutput<f64>, d: &RecurrentOutput<f64>) -> f64 {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        dot(&out.y, &d.y) + dot(&out.h, &d.h) + dot(&out.c, &d.c)
    }

    /// Central differences for every element of every tensor; with a step of 1e-5 their own error is about
    /// 1e-10 (truncation) plus 1e-11 (rounding).
    fn check(
        gates: usize,
        forward: impl Fn(&Recurrent<'_, f64>) -> RecurrentOutput<f64>,
        backward: impl Fn(&Recurrent<'_, f64>, &RecurrentOutput<f64>) -> RecurrentGrads<f64>,
    ) {
        let d = RecurrentOutput {
            y: values(SEQ * LENGTHS.len() * HIDDEN, 5.0),
            h: values(LENGTHS.len() * HIDDEN, 6.0),
            c: values(LENGTHS.len() * HIDDEN, 7.0),
        };
        for reverse in [false, true] {
            let mut p = parameters(gates);
            let g = backward(&layer(&p, reverse), &d);
            let grads = [g.d_w_ih, g.d_w_hh, g.d_b_ih, g.d_b_hh, g.d_x, g.d_h0, g.d_c0];
            for (which, grad) in grads.iter().enumerate() {
                for (i, &analytic) in grad.iter().enumerate() {
                    let value = p[which][i];
                    let mut at = |x: f64| {
                        p[which][i] = x;
                        loss(&forward(&layer(&p, reverse)), &d)
                    };
                    let numeric = (at(value + 1e-5) - at(value - 1e-5)) / 2e-5;
                    p[which][i] = value;
                    assert!(
                        (numeric - analytic).abs() < 1e-8,
                        "tensor {which}[{i}]: {analytic} and {numeric}"
                    );
                }
            }
        }
    }

    #[test]
    fn lstm_gradients_are_central_differences() {
        check(4, lstm_forward, lstm_backward);
    }

    #[test]
    fn gru_gradients_are_central_differences() {
        check(3, gru_forward, gru_backward);
        check(3, gru_reset_before_forward, gru_reset_before_backward);
    }

    #[test]
    fn plain_gradients_are_central_differences() {
        for relu in [false, true] {
            check(1, |layer| elman_forward(layer, relu), |layer, d| elman_backward(layer, relu, d));
        }
    }

    #[test]
    fn padding_is_zero_and_leaves_the_state() {
        let p = parameters(4);
        let out = lstm_forward(&layer(&p, true));
        let row = |t: usize, b: usize| &out.y[(t * LENGTHS.len() + b) * HIDDEN..][..HIDDEN];
        assert!((2..SEQ).all(|t| row(t, 2) == [0.0; HIDDEN]) && row(1, 2) != [0.0; HIDDEN]);
        assert_eq!(out.h[HIDDEN..2 * HIDDEN], p[5][HIDDEN..2 * HIDDEN]);
        assert_eq!(&out.h[2 * HIDDEN..], row(0, 2));
    }
}
