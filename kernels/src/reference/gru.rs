//! The GRU, gate by gate, with the reset gate after the recurrent product.

use super::recurrent::{self, GateGrads, Real, Recurrent, RecurrentGrads, RecurrentOutput, RowCell};

struct Gru;

/// r, z, n of unit `k`.
fn gates<T: Real>(from_x: &[T], from_h: &[T], k: usize) -> [T; 3] {
    let hidden = from_x.len() / 3;
    let r = (from_x[k] + from_h[k]).sigmoid();
    let z = (from_x[hidden + k] + from_h[hidden + k]).sigmoid();
    [r, z, (from_x[2 * hidden + k] + r * from_h[2 * hidden + k]).tanh()]
}

impl<T: Real> RowCell<T> for Gru {
    fn forward(from_x: &[T], from_h: &[T], h: &[T], c: &[T]) -> (Vec<T>, Vec<T>) {
        let unit = |k: usize| {
            let [_, z, n] = gates(from_x, from_h, k);
            (T::one() - z) * n + z * h[k]
        };
        ((0..h.len()).map(unit).collect(), c.to_vec())
    }

    fn backward(from_x: &[T], from_h: &[T], (h, _): (&[T], &[T]), (d_h, d_c): (&[T], &[T])) -> GateGrads<T> {
        let hidden = h.len();
        let one = T::one();
        let mut input = vec![T::zero(); 3 * hidden];
        let mut state = input.clone();
        let mut direct = vec![];
        for k in 0..hidden {
            let [r, z, n] = gates(from_x, from_h, k);
            let d_n = d_h[k] * (one - z) * (one - n * n);
            let d_r = d_n * from_h[2 * hidden + k] * r * (one - r);
            let d_z = d_h[k] * (h[k] - n) * z * (one - z);
            for (gate, d, factor) in [(0, d_r, one), (1, d_z, one), (2, d_n, r)] {
                input[gate * hidden + k] = d;
                state[gate * hidden + k] = d * factor;
            }
            direct.push(d_h[k] * z);
        }
        GateGrads { input, state, d_h: direct, d_c: d_c.to_vec() }
    }
}

/// A GRU over a padded batch: `h' = (1 − z)·n + z·h`, `n = tanh(W_in·x + b_in + r·(W_hn·h + b_hn))`; gates in
/// the order r, z, n.
///
/// # Panics
/// When a slice is shorter than its shape.
pub fn gru_forward<T: Real>(layer: &Recurrent<'_, T>) -> RecurrentOutput<T> {
    recurrent::forward::<T, Gru>(layer)
}

/// The gradients of [`gru_forward`] for gradients `d` of its outputs.
///
/// # Panics
/// When a slice is shorter than its shape.
pub fn gru_backward<T: Real>(layer: &Recurrent<'_, T>, d: &RecurrentOutput<T>) -> RecurrentGrads<T> {
    recurrent::backward::<T, Gru>(layer, d)
}
