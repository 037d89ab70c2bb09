//! The LSTM, gate by gate.

use super::recurrent::{self, GateGrads, Real, Recurrent, RecurrentGrads, RecurrentOutput, RowCell};

struct Lstm;

/// i, f, g, o of unit `k`.
fn gates<T: Real>(from_x: &[T], from_h: &[T], k: usize) -> [T; 4] {
    let hidden = from_x.len() / 4;
    let sum = |gate: usize| from_x[gate * hidden + k] + from_h[gate * hidden + k];
    [sum(0).sigmoid(), sum(1).sigmoid(), sum(2).tanh(), sum(3).sigmoid()]
}

impl<T: Real> RowCell<T> for Lstm {
    fn forward(from_x: &[T], from_h: &[T], _: &[T], c: &[T]) -> (Vec<T>, Vec<T>) {
        let unit = |k: usize| {
            let [i, f, g, o] = gates(from_x, from_h, k);
            let c = f * c[k] + i * g;
            (o * c.tanh(), c)
        };
        (0..c.len()).map(unit).unzip()
    }

    fn backward(from_x: &[T], from_h: &[T], (_, c): (&[T], &[T]), (d_h, d_c): (&[T], &[T])) -> GateGrads<T> {
        let hidden = c.len();
        let one = T::one();
        let mut d_sums = vec![T::zero(); 4 * hidden];
        let mut d_c_prev = vec![];
        for k in 0..hidden {
            let [i, f, g, o] = gates(from_x, from_h, k);
            let tanh_c = (f * c[k] + i * g).tanh();
            let d_o = d_h[k] * tanh_c;
            let d_c = d_c[k] + d_h[k] * o * (one - tanh_c * tanh_c);
            d_sums[k] = d_c * g * i * (one - i);
            d_sums[hidden + k] = d_c * c[k] * f * (one - f);
            d_sums[2 * hidden + k] = d_c * i * (one - g * g);
            d_sums[3 * hidden + k] = d_o * o * (one - o);
            d_c_prev.push(d_c * f);
        }
        GateGrads { input: d_sums.clone(), state: d_sums, d_h: vec![T::zero(); hidden], d_c: d_c_prev }
    }
}

/// An LSTM over a padded batch: `c' = f·c + i·g`, `h' = o·tanh c'`; gates in the order i, f, g, o.
///
/// # Panics
/// When a slice is shorter than its shape.
pub fn lstm_forward<T: Real>(layer: &Recurrent<'_, T>) -> RecurrentOutput<T> {
    recurrent::forward::<T, Lstm>(layer)
}

/// The gradients of [`lstm_forward`] for gradients `d` of its outputs.
///
/// # Panics
/// When a slice is shorter than its shape.
pub fn lstm_backward<T: Real>(layer: &Recurrent<'_, T>, d: &RecurrentOutput<T>) -> RecurrentGrads<T> {
    recurrent::backward::<T, Lstm>(layer, d)
}
