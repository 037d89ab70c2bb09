//! The GRU, gate by gate, with the reset gate before the recurrent product.

use super::recurrent::{
    Real, Recurrent, RecurrentGrads, RecurrentOutput, accumulate, affine, empty_grads, transposed,
};

/// One row at one step.
struct Step<T> {
    r: Vec<T>,
    z: Vec<T>,
    n: Vec<T>,
    /// r·h.
    reset: Vec<T>,
    h: Vec<T>,
}

fn step<T: Real>(layer: &Recurrent<'_, T>, x: &[T], h: &[T]) -> Step<T> {
    let hidden = layer.hidden;
    let from_x = affine(layer.w_ih, x, layer.b_ih);
    let from_h = affine(layer.w_hh, h, layer.b_hh);
    let gate = |first: usize| (first..first + hidden).map(|j| (from_x[j] + from_h[j]).sigmoid()).collect();
    let (r, z): (Vec<T>, Vec<T>) = (gate(0), gate(hidden));
    let reset: Vec<T> = r.iter().zip(h).map(|(&r, &h)| r * h).collect();
    let from_reset = affine(&layer.w_hh[2 * hidden * hidden..], &reset, &layer.b_hh[2 * hidden..]);
    let n: Vec<T> = (0..hidden).map(|k| (from_x[2 * hidden + k] + from_reset[k]).tanh()).collect();
    let new = (0..hidden).map(|k| (T::one() - z[k]) * n[k] + z[k] * h[k]).collect();
    Step { r, z, n, reset, h: new }
}

/// A GRU over a padded batch: `h' = (1 − z)·n + z·h`, `n = tanh(W_in·x + b_in + W_hn·(r·h) + b_hn)`; gates in
/// the order r, z, n.
///
/// # Panics
/// When a slice is shorter than its shape.
pub fn gru_reset_before_forward<T: Real>(layer: &Recurrent<'_, T>) -> RecurrentOutput<T> {
    let (batch, hidden) = (layer.lengths.len(), layer.hidden);
    let mut out = RecurrentOutput { y: vec![T::zero(); layer.seq * batch * hidden], h: vec![], c: vec![] };
    for b in 0..batch {
        let (mut h, c) = layer.initial(b);
        for t in layer.steps(b) {
            h = step(layer, layer.input_at(t, b), &h).h;
            out.y[(t * batch + b) * hidden..][..hidden].copy_from_slice(&h);
        }
        out.h.extend(h);
        out.c.extend(c);
    }
    out
}

/// The gradients of [`gru_reset_before_forward`] for gradients `d` of its outputs.
///
/// # Panics
/// When a slice is shorter than its shape.
pub fn gru_reset_before_backward<T: Real>(
    layer: &Recurrent<'_, T>,
    d: &RecurrentOutput<T>,
) -> RecurrentGrads<T> {
    let (batch, hidden, input) = (layer.lengths.len(), layer.hidden, layer.input);
    let one = T::one();
    let mut grads = empty_grads(layer);
    // The rows of W_hh that are multiplied with h, and those that are multiplied with r·h.
    let (w_gates, w_candidate) = layer.w_hh.split_at(2 * hidden * hidden);
    for b in 0..batch {
        let steps = layer.steps(b);
        let mut states = vec![layer.initial(b).0];
        for &t in &steps {
            let h = states.last().expect("holds the initial state");
            states.push(step(layer, layer.input_at(t, b), h).h);
        }
        let mut d_h = d.h[b * hidden..(b + 1) * hidden].to_vec();
        for (&t, h) in steps.iter().zip(&states).rev() {
            let (row, x) = (t * batch + b, layer.input_at(t, b));
            for (d_h, &d_y) in d_h.iter_mut().zip(&d.y[row * hidden..]) {
                *d_h += d_y;
            }
            let Step { r, z, n, reset, .. } = step(layer, x, h);
            let d_n: Vec<T> = (0..hidden).map(|k| d_h[k] * (one - z[k]) * (one - n[k] * n[k])).collect();
            let d_z = (0..hidden).map(|k| d_h[k] * (h[k] - n[k]) * z[k] * (one - z[k]));
            let d_reset: Vec<T> = (0..hidden).map(|k| transposed(w_candidate, &d_n, hidden, k)).collect();
            let d_r = (0..hidden).map(|k| d_reset[k] * h[k] * r[k] * (one - r[k]));
            let sums: Vec<T> = d_r.chain(d_z).chain(d_n.iter().copied()).collect();
            let (d_gates, _) = sums.split_at(2 * hidden);
            accumulate(&mut grads.d_w_ih, &mut grads.d_b_ih, &sums, x);
            let (d_w_gates, d_w_candidate) = grads.d_w_hh.split_at_mut(2 * hidden * hidden);
            let (d_b_gates, d_b_candidate) = grads.d_b_hh.split_at_mut(2 * hidden);
            accumulate(d_w_gates, d_b_gates, d_gates, h);
            accumulate(d_w_candidate, d_b_candidate, &d_n, &reset);
            for k in 0..input {
                grads.d_x[row * input + k] = transposed(layer.w_ih, &sums, input, k);
            }
            let old = |k: usize| d_h[k] * z[k] + d_reset[k] * r[k] + transposed(w_gates, d_gates, hidden, k);
            d_h = (0..hidden).map(old).collect();
        }
        grads.d_h0.extend(d_h);
    }
    grads.d_c0 = d.c.clone();
    grads
}
