//! Activations, elementwise operations, sums, embedding, dropout.

use proptest::prelude::*;

use super::*;
use crate::ShapeError;
use crate::reference;
use crate::rowwise::activation::{self, Activation};
use crate::rowwise::dropout::{self, Dropout};
use crate::rowwise::{elementwise, embedding, reduce};
use crate::testing::{Guarded, assert_within, gamma, straddle, uniform};

/// f and f′ in f64, and the bounds in ULP that `math` states (z ≤ 40 here).
pub(super) fn oracle(activation: Activation, x: f64) -> (f64, f64, f64) {
    let sum = |[a, b]: [f64; 2]| a + b;
    match activation {
        Activation::Identity => (x, 1.0, 0.0),
        Activation::Relu => (x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 }, 0.0),
        Activation::GeluErf => (reference::gelu(x), sum(reference::gelu_derivative(x)), 8.0),
        Activation::GeluTanh => (reference::gelu_tanh(x), sum(reference::gelu_tanh_derivative(x)), 200.0),
        Activation::Silu => (reference::silu(x), sum(reference::silu_derivative(x)), 6.0),
        Activation::Tanh => (x.tanh(), 1.0 - x.tanh().powi(2), 6.0),
        Activation::Sigmoid => (reference::sigmoid(x), reference::sigmoid(x) * reference::sigmoid(-x), 6.0),
    }
}

#[test]
fn activations() {
    testing::for_each_isa(|ctx| {
        for activation in Activation::ALL {
            for len in COLS {
                let x: Vec<f32> = uniform(len, 1).iter().map(|x| 4.0 * x).collect();
                let d_y = uniform(len, 2);
                let exact: Vec<_> = x.iter().map(|&x| oracle(activation, f64::from(x))).collect();
                let (mut y, mut d_x) = (Guarded::poisoned(len), Guarded::poisoned(len));
                activation::forward(ctx, activation, &x, y.body_mut()).unwrap();
                activation::backward(ctx, activation, &x, &d_y, d_x.body_mut()).unwrap();
                y.check();
                d_x.check();
                let expected: Vec<f64> = exact.iter().map(|e| e.0).collect();
                assert_within(y.body(), &expected, |i| exact[i].2 * testing::ulp_size(expected[i]));
                let expected: Vec<f64> = exact.iter().zip(&d_y).map(|(e, &d)| e.1 * f64::from(d)).collect();
                // f′ is at most 1.2 and a sum of terms of at most that size.
                assert_within(d_x.body(), &expected, |i| {
                    (2.0 * exact[i].2 + 1.0) * 1.2 * 2.0 * U * f64::from(d_y[i].abs())
                });
            }
        }
    });
}

#[test]
fn relu_at_its_edges() {
    testing::for_each_isa(|ctx| {
        let x = [f32::NAN, -0.0, 0.0, f32::NEG_INFINITY, f32::INFINITY, -1e-45, 1e-45];
        let mut y = [7.0; 7];
        activation::forward(ctx, Activation::Relu, &x, &mut y).unwrap();
        assert!(y[0].is_nan());
        assert_eq!(y[1..], [0.0, 0.0, 0.0, f32::INFINITY, 0.0, 1e-45]);
        activation::backward(ctx, Activation::Relu, &x, &[2.0; 7], &mut y).unwrap();
        assert_eq!(y[1..], [0.0, 0.0, 0.0, 2.0, 0.0, 2.0]);
    });
}

#[test]
fn elementwise_is_exact_to_one_rounding() {
    for_each_width(|ctx, len| {
        let (a, b) = (uniform(len, 3), uniform(len, 4));
        let mut y = Guarded::poisoned(len);
        elementwise::add(ctx, &a, &b, y.body_mut()).unwrap();
        assert!(y.body().iter().zip(a.iter().zip(&b)).all(|(y, (a, b))| *y == a + b));
        elementwise::mul(ctx, &a, &b, y.body_mut()).unwrap();
        assert!(y.body().iter().zip(a.iter().zip(&b)).all(|(y, (a, b))| *y == a * b));
        elementwise::scale(ctx, 3.0, y.body_mut()).unwrap();
        assert!(y.body().iter().zip(a.iter().zip(&b)).all(|(y, (a, b))| *y == (a * b) * 3.0));
        y.body_mut().copy_from_slice(&b);
        elementwise::add_assign(ctx, &a, y.body_mut()).unwrap();
        assert!(y.body().iter().zip(a.iter().zip(&b)).all(|(y, (a, b))| *y == a + b));
        y.body_mut().copy_from_slice(&b);
        elementwise::axpy(ctx, 0.3, &a, y.body_mut()).unwrap();
        let exact: Vec<f64> =
            a.iter().zip(&b).map(|(&a, &b)| f64::from(0.3f32) * f64::from(a) + f64::from(b)).collect();
        assert_within(y.body(), &exact, |i| U * (exact[i].abs() + 0.3 * f64::from(a[i].abs())) * 1.01);
        y.check();
        assert!(elementwise::add(ctx, &a, &b[1..], y.body_mut()).is_err());
    });
}

#[test]
fn sums() {
    testing::for_each_isa(|ctx| {
        for (rows, cols) in [(0, 5), (1, 1), (127, 9), (128, 16), (129, 33), (700, 65)] {
            let x = uniform(rows * cols, 5);
            let mut out = Guarded::new(&vec![0.5; cols]);
            reduce::col_sum(ctx, MatRef::new(&x, rows, cols).unwrap(), out.body_mut()).unwrap();
            out.check();
            let column = |f: &dyn Fn(f64) -> f64| -> Vec<f64> {
                (0..cols)
                    .map(|j| 0.5 + (0..rows).map(|i| f(f64::from(x[i * cols + j]))).sum::<f64>())
                    .collect()
            };
            let (exact, magnitude) = (column(&|x| x), column(&|x| x.abs()));
            assert_within(out.body(), &exact, |j| gamma(129 + rows / 128) * magnitude[j]);
            let mut other = vec![0.5; cols];
            reduce::col_sum(&threads(ctx, 3), MatRef::new(&x, rows, cols).unwrap(), &mut other).unwrap();
            assert_same_bits(&other, out.body());
        }
        for len in [0, 1, 9, 16_383, 16_384, 16_385, 50_000] {
            let x = uniform(len, 6);
            let exact: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
            let sum = reduce::sum_squares(ctx, &x);
            let chain = 16_384 / (4 * ctx.isa().f32_lanes()) + 8;
            assert!((sum - exact).abs() <= gamma(chain) * exact, "{len}: {sum} {exact}");
            assert_eq!(reduce::sum_squares(&threads(ctx, 3), &x).to_bits(), sum.to_bits());
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn embeddings(vocab in 1usize..9, dim in straddle(&[8, 16]), ids in prop::collection::vec(0u32..9, 0..40), scale in -2.0f32..2.0) {
        let ids: Vec<u32> = ids.into_iter().map(|id| id % vocab as u32).collect();
        let (table, d_out) = (uniform(vocab * dim, 7), uniform(ids.len() * dim, 8));
        let (table, d_out) = (MatRef::new(&table, vocab, dim).unwrap(), MatRef::new(&d_out, ids.len(), dim).unwrap());
        testing::for_each_isa(|ctx| {
            let mut out = Guarded::poisoned(ids.len() * dim);
            embedding::forward(ctx, table, &ids, scale, MatMut::new(out.body_mut(), ids.len(), dim).unwrap()).unwrap();
            out.check();
            let exact = reference::embedding_forward(table, &ids, f64::from(scale));
            assert_within(out.body(), &exact, |i| U * exact[i].abs() + TINY);

            let mut d_table = Guarded::new(&vec![0.5; vocab * dim]);
            embedding::backward(ctx, d_out, &ids, scale, MatMut::new(d_table.body_mut(), vocab, dim).unwrap()).unwrap();
            d_table.check();
            let exact: Vec<f64> =
                reference::embedding_backward(d_out, &ids, f64::from(scale), vocab).iter().map(|d| d + 0.5).collect();
            assert_within(d_table.body(), &exact, |_| {
                gamma(ids.len() + 1) * (0.5 + f64::from(scale.abs()) * ids.len() as f64) + TINY
            });
        });
    }
}

#[test]
fn embedding_gradients_do_not_depend_on_threads_and_ids_are_checked() {
    const N: usize = 3000;
    let ids: Vec<u32> = (0..N as u32).map(|i| i * i % 37).collect();
    let d_out = uniform(N * 24, 9);
    testing::for_each_isa(|ctx| {
        let run = |ctx: &Context| {
            let mut d_table = vec![0.0; 37 * 24];
            embedding::backward(ctx, mat(&d_out, 24), &ids, 0.7, mat_mut(&mut d_table, 24)).unwrap();
            d_table
        };
        let expected = run(ctx);
        for n in [2, 3, 7] {
            assert_same_bits(&run(&threads(ctx, n)), &expected);
        }
        let mut out = [7.0; 6];
        let error =
            embedding::forward(ctx, mat(&d_out[..6], 2), &[0, 3, 1], 1.0, mat_mut(&mut out, 2)).unwrap_err();
        assert_eq!(error, ShapeError::Index { argument: "ids", position: 1, index: 3, len: 3 });
        assert!(
            embedding::backward(ctx, mat(&d_out[..6], 2), &[0, 3, 1], 1.0, mat_mut(&mut out, 2)).is_err()
        );
        assert_eq!(out, [7.0; 6]);
    });
}

#[test]
fn dropout_follows_its_reference_mask() {
    for len in [0, 1, 7, 63, 64, 65, 129, 1000, 16_384 + 70] {
        let x: Vec<f32> = uniform(len, 10).iter().map(|x| x + 2.0).collect();
        let spec = Dropout { p: 0.3, seed: 0x0123_4567_89AB_CDEF, stream: (7 << 32) + 5 };
        let keeps: Vec<bool> = (0..len as u64)
            .map(|i| reference::dropout_keeps(f64::from(spec.p), spec.seed, spec.stream, i))
            .collect();
        testing::for_each_isa(|ctx| {
            for n in [1, 3] {
                let mut y = Guarded::poisoned(len);
                dropout::apply(&threads(ctx, n), &spec, &x, y.body_mut()).unwrap();
                y.check();
                let exact: Vec<f64> = x
                    .iter()
                    .zip(&keeps)
                    .map(|(&x, &keep)| if keep { f64::from(x) / (1.0 - f64::from(spec.p)) } else { 0.0 })
                    .collect();
                assert_within(y.body(), &exact, |i| 4.0 * U * exact[i]);
            }
        });
    }
}

#[test]
fn dropout_keeps_its_share_and_drops_nan() {
    testing::for_each_isa(|ctx| {
        for p in [0.1f32, 0.5, 0.9] {
            let n = 100_000;
            let mut y = vec![0.0; n];
            let spec = Dropout { p, seed: 1, stream: 2 };
            dropout::apply(ctx, &spec, &vec![1.0; n], &mut y).unwrap();
            let kept = y.iter().filter(|&&y| y != 0.0).count() as f64;
            let expected = n as f64 * (1.0 - f64::from(p));
            // Five standard deviations.
            let deviation = (expected * f64::from(p)).sqrt();
            assert!((kept - expected).abs() < 5.0 * deviation, "{kept} {expected}");
            let mut other = vec![0.0; n];
            dropout::apply(ctx, &spec, &vec![f32::NAN; n], &mut other).unwrap();
            assert!(y.iter().zip(&other).all(|(y, other)| (*y == 0.0) == (*other == 0.0)));
            dropout::apply(ctx, &Dropout { stream: 3, ..spec }, &vec![1.0; n], &mut other).unwrap();
            assert_ne!(y, other);
        }
        let mut y = [0.0; 2];
        dropout::apply(ctx, &Dropout { p: 0.0, seed: 1, stream: 2 }, &[1.5, -2.5], &mut y).unwrap();
        assert_eq!(y, [1.5, -2.5]);
        for p in [1.0, -0.1, f32::NAN] {
            let error =
                dropout::apply(ctx, &Dropout { p, seed: 0, stream: 0 }, &[1.0], &mut y[..1]).unwrap_err();
            assert!(error.to_string().starts_with("p is"), "{error}");
        }
    });
}
