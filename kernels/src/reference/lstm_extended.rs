//! The LSTM with peepholes and a projection of its state, gate by gate.

use super::recurrent::{
    Real, Recurrent, RecurrentGrads, RecurrentOutput, accumulate, affine, empty_grads, transposed,
};

/// What an LSTM may have besides its gates.
#[derive(Debug, Clone, Copy)]
pub struct LstmExtras<'a, T> {
    /// p_i, p_f, p_o, `[3·hidden]`; empty for none.
    pub peepholes: &'a [T],
    /// `[output, hidden]`; without it output is hidden.
    pub w_hr: Option<&'a [T]>,
}

/// Gradients of [`LstmExtras`], in the same shapes; empty for what is not there.
#[derive(Debug, Clone, PartialEq)]
pub struct LstmExtraGrads<T> {
    /// Of the peepholes.
    pub d_peepholes: Vec<T>,
    /// Of `w_hr`.
    pub d_w_hr: Vec<T>,
}

impl<T: Real> LstmExtras<'_, T> {
    fn output(&self, hidden: usize) -> usize {
        self.w_hr.map_or(hidden, |w| w.len().checked_div(hidden).unwrap_or(0))
    }

    /// Peephole `which` (i, f, o) of unit `k`.
    fn peephole(&self, which: usize, hidden: usize, k: usize) -> T {
        self.peepholes.get(which * hidden + k).copied().unwrap_or(T::zero())
    }
}

/// One row at one step.
struct Step<T> {
    /// i, f, g, o of each unit.
    gates: Vec<[T; 4]>,
    c: Vec<T>,
    /// o ⊙ tanh c.
    m: Vec<T>,
    h: Vec<T>,
}

fn step<T: Real>(
    layer: &Recurrent<'_, T>,
    extras: &LstmExtras<'_, T>,
    x: &[T],
    (h, c): (&[T], &[T]),
) -> Step<T> {
    let hidden = layer.hidden;
    let from_x = affine(layer.w_ih, x, layer.b_ih);
    let from_h = affine(layer.w_hh, h, layer.b_hh);
    let mut new = Step { gates: vec![], c: vec![], m: vec![], h: vec![] };
    for k in 0..hidden {
        let sum = |gate: usize| from_x[gate * hidden + k] + from_h[gate * hidden + k];
        let i = (sum(0) + extras.peephole(0, hidden, k) * c[k]).sigmoid();
        let f = (sum(1) + extras.peephole(1, hidden, k) * c[k]).sigmoid();
        let g = sum(2).tanh();
        let c_new = f * c[k] + i * g;
        let o = (sum(3) + extras.peephole(2, hidden, k) * c_new).sigmoid();
        new.gates.push([i, f, g, o]);
        new.c.push(c_new);
        new.m.push(o * c_new.tanh());
    }
    new.h = match extras.w_hr {
        Some(w_hr) => affine(w_hr, &new.m, &vec![T::zero(); extras.output(hidden)]),
        None => new.m.clone(),
    };
    new
}

/// Row `b` of a state of that width.
fn row<T: Real>(state: &[T], b: usize, width: usize) -> Vec<T> {
    state[b * width..(b + 1) * width].to_vec()
}

/// An LSTM over a padded batch: `c' = f·c + i·g`, `h' = W_hr·(o ⊙ tanh c')`, where i and f also see `p·c` and o sees `p·c'`.
///
/// # Shapes
/// As [`Recurrent`], but with output instead of hidden for `w_hh`'s columns, h0 and y.
///
/// # Panics
/// When a slice is shorter than its shape.
pub fn lstm_extended_forward<T: Real>(
    layer: &Recurrent<'_, T>,
    extras: &LstmExtras<'_, T>,
) -> RecurrentOutput<T> {
    let (batch, output) = (layer.lengths.len(), extras.output(layer.hidden));
    let mut out = RecurrentOutput { y: vec![T::zero(); layer.seq * batch * output], h: vec![], c: vec![] };
    for b in 0..batch {
        let (mut h, mut c) = (row(layer.h0, b, output), row(layer.c0, b, layer.hidden));
        for t in layer.steps(b) {
            Step { h, c, .. } = step(layer, extras, layer.input_at(t, b), (&h, &c));
            out.y[(t * batch + b) * output..][..output].copy_from_slice(&h);
        }
        out.h.extend(h);
        out.c.extend(c);
    }
    out
}

/// The gradients of [`lstm_extended_forward`] for gradients `d` of its outputs.
///
/// # Panics
/// When a slice is shorter than its shape.
pub fn lstm_extended_backward<T: Real>(
    layer: &Recurrent<'_, T>,
    extras: &LstmExtras<'_, T>,
    d: &RecurrentOutput<T>,
) -> (RecurrentGrads<T>, LstmExtraGrads<T>) {
    let (batch, input, output) = (layer.lengths.len(), layer.input, extras.output(layer.hidden));
    let mut grads = empty_grads(layer);
    let mut extra = LstmExtraGrads {
        d_peepholes: vec![T::zero(); extras.peepholes.len()],
        d_w_hr: vec![T::zero(); extras.w_hr.map_or(0, <[T]>::len)],
    };
    for b in 0..batch {
        let steps = layer.steps(b);
        let mut states = vec![(row(layer.h0, b, output), row(layer.c0, b, layer.hidden))];
        for &t in &steps {
            let (h, c) = states.last().expect("holds the initial state");
            let new = step(layer, extras, layer.input_at(t, b), (h, c));
            states.push((new.h, new.c));
        }
        let (mut d_h, mut d_c) = (row(&d.h, b, output), row(&d.c, b, layer.hidden));
        for (&t, (h, c)) in steps.iter().zip(&states).rev() {
            let (at, x) = (t * batch + b, layer.input_at(t, b));
            d_h.iter_mut().zip(&d.y[at * output..]).for_each(|(d_h, &d_y)| *d_h += d_y);
            let now = step(layer, extras, x, (h, c));
            let d_sums = unit_gradients(extras, &now, c, (&d_h, &mut d_c), &mut extra);
            accumulate(&mut grads.d_w_ih, &mut grads.d_b_ih, &d_sums, x);
            accumulate(&mut grads.d_w_hh, &mut grads.d_b_hh, &d_sums, h);
            for k in 0..input {
                grads.d_x[at * input + k] = transposed(layer.w_ih, &d_sums, input, k);
            }
            d_h = (0..output).map(|k| transposed(layer.w_hh, &d_sums, output, k)).collect();
        }
        grads.d_h0.extend(d_h);
        grads.d_c0.extend(d_c);
    }
    (grads, extra)
}

/// The gradients of a step's sums; `d_c` goes from the new to the old state.
fn unit_gradients<T: Real>(
    extras: &LstmExtras<'_, T>,
    now: &Step<T>,
    c: &[T],
    (d_h, d_c): (&[T], &mut [T]),
    extra: &mut LstmExtraGrads<T>,
) -> Vec<T> {
    let (hidden, one) = (c.len(), T::one());
    let d_m = match extras.w_hr {
        Some(w_hr) => {
            accumulate(&mut extra.d_w_hr, &mut vec![T::zero(); d_h.len()], d_h, &now.m);
            (0..hidden).map(|k| transposed(w_hr, d_h, hidden, k)).collect()
        }
        None => d_h.to_vec(),
    };
    let mut d_sums = vec![T::zero(); 4 * hidden];
    for k in 0..hidden {
        let [i, f, g, o] = now.gates[k];
        let tanh_c = now.c[k].tanh();
        let d_o = d_m[k] * tanh_c * o * (one - o);
        let d_new = d_c[k] + d_m[k] * o * (one - tanh_c * tanh_c) + d_o * extras.peephole(2, hidden, k);
        let d_i = d_new * g * i * (one - i);
        let d_f = d_new * c[k] * f * (one - f);
        let d_g = d_new * i * (one - g * g);
        d_c[k] = d_new * f + d_i * extras.peephole(0, hidden, k) + d_f * extras.peephole(1, hidden, k);
        for (gate, d) in [d_i, d_f, d_g, d_o].into_iter().enumerate() {
            d_sums[gate * hidden + k] = d;
        }
        for (which, product) in [d_i * c[k], d_f * c[k], d_o * now.c[k]].into_iter().enumerate() {
            if let Some(d_p) = extra.d_peepholes.get_mut(which * hidden + k) {
                *d_p += product;
            }
        }
    }
    d_sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::{lstm_backward, lstm_forward};

    const SEQ: usize = 4;
    const INPUT: usize = 2;
    const HIDDEN: usize = 3;
    const LENGTHS: [usize; 3] = [4, 0, 2];

    fn values(len: usize, seed: f64) -> Vec<f64> {
        (0..len).map(|i| (seed + 1.7 * i as f64).sin() * 0.8).collect()
    }

    /// w_ih, w_hh, b_ih, b_hh, x, h0, c0, peepholes, w_hr; the gradients of y, h, c.
    type Tensors = ([Vec<f64>; 9], RecurrentOutput<f64>);

    fn tensors(peepholes: bool, output: Option<usize>) -> Tensors {
        let (rows, batch, width) = (4 * HIDDEN, LENGTHS.len(), output.unwrap_or(HIDDEN));
        let lens = [
            rows * INPUT,
            rows * width,
            rows,
            rows,
            SEQ * batch * INPUT,
            batch * width,
            batch * HIDDEN,
            if peepholes { 3 * HIDDEN } else { 0 },
            output.unwrap_or(0) * HIDDEN,
        ];
        let mut seed = 0.0;
        let tensors = lens.map(|len| {
            seed += 0.31;
            values(len, seed)
        });
        let d = RecurrentOutput {
            y: values(SEQ * batch * width, 5.0),
            h: values(batch * width, 6.0),
            c: values(batch * HIDDEN, 7.0),
        };
        (tensors, d)
    }

    fn layer(p: &[Vec<f64>; 9], reverse: bool) -> (Recurrent<'_, f64>, LstmExtras<'_, f64>) {
        let [w_ih, w_hh, b_ih, b_hh, x, h0, c0, peepholes, w_hr] = p.each_ref().map(Vec::as_slice);
        let (seq, input, hidden, lengths) = (SEQ, INPUT, HIDDEN, &LENGTHS[..]);
        let layer = Recurrent { seq, input, hidden, w_ih, w_hh, b_ih, b_hh, x, lengths, reverse, h0, c0 };
        (layer, LstmExtras { peepholes, w_hr: (!w_hr.is_empty()).then_some(w_hr) })
    }

    #[test]
    fn gradients_are_central_differences() {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        for (peepholes, output) in [(true, None), (false, Some(2)), (true, Some(2)), (true, Some(HIDDEN))] {
            for reverse in [false, true] {
                let (mut p, d) = tensors(peepholes, output);
                let loss = |p: &[Vec<f64>; 9]| {
                    let (layer, extras) = layer(p, reverse);
                    let out = lstm_extended_forward(&layer, &extras);
                    dot(&out.y, &d.y) + dot(&out.h, &d.h) + dot(&out.c, &d.c)
                };
                let (at, extras) = layer(&p, reverse);
                let (g, extra) = lstm_extended_backward(&at, &extras, &d);
                let RecurrentGrads { d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_x, d_h0, d_c0 } = g;
                let LstmExtraGrads { d_peepholes, d_w_hr } = extra;
                let grads = [d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_x, d_h0, d_c0, d_peepholes, d_w_hr];
                for (which, grad) in grads.iter().enumerate() {
                    assert_eq!(grad.len(), p[which].len());
                    for (i, &analytic) in grad.iter().enumerate() {
                        let value = p[which][i];
                        let mut at = |x: f64| {
                            p[which][i] = x;
                            loss(&p)
                        };
                        let numeric = (at(value + 1e-5) - at(value - 1e-5)) / 2e-5;
                        p[which][i] = value;
                        assert!((numeric - analytic).abs() < 1e-8, "{which}[{i}]: {analytic} and {numeric}");
                    }
                }
            }
        }
    }

    #[test]
    fn without_extras_it_is_the_lstm() {
        let (p, d) = tensors(false, None);
        let (layer, extras) = layer(&p, true);
        assert_eq!(lstm_extended_forward(&layer, &extras), lstm_forward(&layer));
        assert_eq!(lstm_extended_backward(&layer, &extras, &d).0, lstm_backward(&layer, &d));
    }
}
