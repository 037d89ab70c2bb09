//! Gated activations against f64, from halves of one matrix.

use super::elements::oracle;
use super::*;
use crate::rowwise::Activation;
use crate::rowwise::gated;
use crate::testing::{Guarded, assert_within, uniform};

/// Gate and up as halves of rows of one projection.
fn halves(x: &[f32], cols: usize) -> (MatRef<'_>, MatRef<'_>) {
    let whole = mat(x, 2 * cols);
    (whole.sub(0..whole.rows(), 0..cols), whole.sub(0..whole.rows(), cols..2 * cols))
}

#[test]
fn gated() {
    for_each_width(|ctx, cols| {
        let x: Vec<f32> = uniform(ROWS * 2 * cols, 1).iter().map(|x| 4.0 * x).collect();
        let d_y = uniform(ROWS * cols, 2);
        let (gate, up) = halves(&x, cols);
        for activation in Activation::ALL {
            let (mut y, mut d_x) = (Guarded::poisoned(d_y.len()), Guarded::poisoned(x.len()));
            gated::forward(ctx, activation, (gate, up), mat_mut(y.body_mut(), cols)).unwrap();
            let (d_gate, d_up) = mat_mut(d_x.body_mut(), 2 * cols).split_cols(cols);
            gated::backward(ctx, activation, (gate, up), mat(&d_y, cols), (d_gate, d_up)).unwrap();
            y.check();
            d_x.check();
            let at = |i: usize| {
                let (i, j) = (i / cols, i % cols);
                let (gate, up) = (f64::from(gate.at(i, j)), f64::from(up.at(i, j)));
                (oracle(activation, gate), up, f64::from(d_y[i * cols + j]))
            };
            let expected: Vec<f64> = (0..d_y.len()).map(|i| at(i).0.0 * at(i).1).collect();
            assert_within(y.body(), &expected, |i| (at(i).0.2 + 1.0) * testing::ulp_size(expected[i]) * 2.0);
            let (d_gate, d_up) = halves(d_x.body(), cols);
            let rows = |m: MatRef<'_>| (0..ROWS).flat_map(|i| m.row(i).to_vec()).collect::<Vec<f32>>();
            let expected: Vec<f64> = (0..d_y.len()).map(|i| at(i).2 * at(i).0.0).collect();
            assert_within(&rows(d_up), &expected, |i| {
                (at(i).0.2 + 1.0) * testing::ulp_size(expected[i]) * 2.0
            });
            let expected: Vec<f64> = (0..d_y.len()).map(|i| at(i).2 * at(i).1 * at(i).0.1).collect();
            // f′ is at most 1.2 and a sum of terms of at most that size.
            assert_within(&rows(d_gate), &expected, |i| {
                let ((_, _, ulps), up, d_y) = at(i);
                (2.0 * ulps + 2.0) * 1.2 * 2.0 * U * (up * d_y).abs()
            });
        }
    });
}

#[test]
fn misfits_of_gates_are_named() {
    let ctx = Context::with_isa(crate::Isa::scalar());
    let x = [0.0; 12];
    let mut y = [0.0; 6];
    let error = gated::forward(&ctx, Activation::Silu, (mat(&x, 3), mat(&x[..6], 3)), mat_mut(&mut y, 3));
    assert!(error.unwrap_err().to_string().contains("up"));
    let error = gated::forward(&ctx, Activation::Silu, (mat(&x, 3), mat(&x, 3)), mat_mut(&mut y, 3));
    assert!(error.unwrap_err().to_string().contains("y: rows"));
}
