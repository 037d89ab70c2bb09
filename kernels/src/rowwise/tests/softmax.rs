//! Softmax, log-softmax and cross entropy.

use super::*;
use crate::ShapeError;
use crate::reference::{self, Labels};
use crate::rowwise::cross_entropy::{self, CrossEntropy};
use crate::rowwise::{log_softmax, softmax};
use crate::testing::{Guarded, assert_within, gamma, uniform};

/// The distance of each row's maximum to its least element.
fn spreads(x: &[f32], cols: usize) -> Vec<f64> {
    x.chunks(cols)
        .map(|x| {
            let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            f64::from(max) - f64::from(x.iter().copied().fold(f32::INFINITY, f32::min))
        })
        .collect()
}

#[test]
fn softmax() {
    for_each_width(|ctx, cols| {
        let (x, d_y) = (logits(ROWS, cols, 1), uniform(ROWS * cols, 2));
        let spread = spreads(&x, cols);
        let mut y = Guarded::poisoned(x.len());
        softmax::forward(ctx, mat(&x, cols), mat_mut(y.body_mut(), cols)).unwrap();
        y.check();
        let exact = reference::softmax_forward(mat(&x, cols));
        let relative = |i: usize| (2.0 * spread[i / cols] + cols as f64 + 10.0) * U;
        assert_within(y.body(), &exact, |i| exact[i] * relative(i) * (1.0 + relative(i)) + TINY);

        let y = y.body();
        let mut d_x = Guarded::poisoned(x.len());
        softmax::backward(ctx, mat(y, cols), mat(&d_y, cols), mat_mut(d_x.body_mut(), cols)).unwrap();
        d_x.check();
        let exact = reference::softmax_backward(mat(y, cols), mat(&d_y, cols));
        assert_within(d_x.body(), &exact, |i| {
            let row = i / cols * cols..(i / cols + 1) * cols;
            let mean: f64 = y[row.clone()].iter().zip(&d_y[row]).map(|(y, d)| f64::from((y * d).abs())).sum();
            gamma(cols + 3) * f64::from(y[i]) * (f64::from(d_y[i].abs()) + mean) + TINY
        });
    });
}

#[test]
fn log_softmax() {
    for_each_width(|ctx, cols| {
        let (x, d_y) = (logits(ROWS, cols, 3), uniform(ROWS * cols, 4));
        let spread = spreads(&x, cols);
        let mut y = Guarded::poisoned(x.len());
        log_softmax::forward(ctx, mat(&x, cols), mat_mut(y.body_mut(), cols)).unwrap();
        y.check();
        let exact = reference::log_softmax_forward(mat(&x, cols));
        assert_within(y.body(), &exact, |i| {
            (2.0 * exact[i].abs() + spread[i / cols] + cols as f64 + 10.0) * U * (1.0 + 1e-3)
        });

        let y = y.body();
        let mut d_x = Guarded::poisoned(x.len());
        log_softmax::backward(ctx, mat(y, cols), mat(&d_y, cols), mat_mut(d_x.body_mut(), cols)).unwrap();
        d_x.check();
        let exact = reference::log_softmax_backward(mat(y, cols), mat(&d_y, cols));
        assert_within(d_x.body(), &exact, |i| {
            let row = i / cols * cols..(i / cols + 1) * cols;
            let total: f64 = d_y[row].iter().map(|d| f64::from(d.abs())).sum();
            2.0 * U * f64::from(d_y[i].abs()) + gamma(cols + 5) * f64::from(y[i]).exp() * total + TINY
        });
    });
}

#[test]
fn cross_entropy() {
    for_each_width(|ctx, cols| {
        for label_smoothing in [0.0, 0.1, 1.0] {
            let x = logits(ROWS, cols, 5);
            let d_loss = uniform(ROWS, 6);
            let targets = [cols as u32 - 1, 77_777, cols as u32 / 2];
            let spec = CrossEntropy { label_smoothing, ignore_index: Some(77_777) };
            let labels = Labels {
                targets: &targets,
                smoothing: f64::from(label_smoothing),
                ignore: spec.ignore_index,
            };
            let spread = spreads(&x, cols);
            let mut losses = Guarded::poisoned(ROWS);
            cross_entropy::forward(ctx, mat(&x, cols), &targets, &spec, losses.body_mut()).unwrap();
            losses.check();
            assert_eq!(losses.body()[1], 0.0);
            let exact = reference::cross_entropy_forward(mat(&x, cols), labels);
            assert_within(losses.body(), &exact, |i| {
                (cols as f64 + spread[i] + 12.0) * 2.0 * U * spread[i].max(1.0)
            });

            let mut d_x = Guarded::poisoned(x.len());
            let d_logits = mat_mut(d_x.body_mut(), cols);
            cross_entropy::backward(ctx, mat(&x, cols), &targets, &spec, &d_loss, d_logits).unwrap();
            d_x.check();
            assert!(d_x.body()[cols..2 * cols].iter().all(|&d| d == 0.0));
            let exact = reference::cross_entropy_backward(mat(&x, cols), labels, &d_loss);
            let p = reference::softmax_forward(mat(&x, cols));
            assert_within(d_x.body(), &exact, |i| {
                let q = labels.distribution(i / cols, cols).map_or(0.0, |q| q[i % cols]);
                let of_p = p[i] * (2.0 * spread[i / cols] + cols as f64 + 10.0);
                U * (of_p + 6.0 * p[i].max(q)) * f64::from(d_loss[i / cols].abs()) + TINY
            });
        }
    });
}

#[test]
fn rows_do_not_depend_on_each_other_nor_on_threads() {
    const N: usize = 300;
    const C: usize = 77;
    let (x, d_y) = (logits(N, C, 7), uniform(N * C, 8));
    let targets: Vec<u32> = (0..N as u32).map(|i| i % C as u32).collect();
    let spec = CrossEntropy { label_smoothing: 0.1, ignore_index: Some(5) };
    assert_rows_independent(N, |ctx, rows| {
        let (x, d_y) = (pick(&x, C, rows), pick(&d_y, C, rows));
        let (x, d_y) = (mat(&x, C), mat(&d_y, C));
        let targets: Vec<u32> = rows.iter().map(|&row| targets[row]).collect();
        let mut out = vec![vec![0.0; rows.len() * C]; 5];
        let mut losses = vec![0.0; rows.len()];
        let [y, d_x, log_y, d_log, d_logits] = &mut out[..] else { unreachable!() };
        softmax::forward(ctx, x, mat_mut(y, C)).unwrap();
        softmax::backward(ctx, mat(y, C), d_y, mat_mut(d_x, C)).unwrap();
        log_softmax::forward(ctx, x, mat_mut(log_y, C)).unwrap();
        log_softmax::backward(ctx, mat(log_y, C), d_y, mat_mut(d_log, C)).unwrap();
        cross_entropy::forward(ctx, x, &targets, &spec, &mut losses).unwrap();
        let d_loss = losses.clone();
        cross_entropy::backward(ctx, x, &targets, &spec, &d_loss, mat_mut(d_logits, C)).unwrap();
        (0..rows.len())
            .flat_map(|i| {
                let row = i * C..(i + 1) * C;
                out.iter()
                    .flat_map(move |out| out[row.clone()].to_vec())
                    .chain([losses[i]])
                    .collect::<Vec<_>>()
            })
            .collect()
    });
}

#[test]
fn masked_columns_change_no_bits() {
    testing::for_each_isa(|ctx| {
        let x = logits(1, 37, 9);
        let padded = [&x[..], &[f32::NEG_INFINITY; 70]].concat();
        let mut y = vec![0.0; 37];
        let mut y_padded = vec![1.0; 107];
        softmax::forward(ctx, mat(&x, 37), mat_mut(&mut y, 37)).unwrap();
        softmax::forward(ctx, mat(&padded, 107), mat_mut(&mut y_padded, 107)).unwrap();
        assert_same_bits(&y_padded[..37], &y);
        assert!(y_padded[37..].iter().all(|&y| y == 0.0));
    });
}

#[test]
fn a_fully_masked_row_gives_zeros_and_zero_gradients() {
    for_each_width(|ctx, cols| {
        let x = vec![f32::NEG_INFINITY; cols];
        let d = uniform(cols, 10);
        let (mut y, mut d_x) = (vec![1.0; cols], vec![1.0; cols]);
        softmax::forward(ctx, mat(&x, cols), mat_mut(&mut y, cols)).unwrap();
        assert!(y.iter().all(|&y| y == 0.0));
        softmax::backward(ctx, mat(&y, cols), mat(&d, cols), mat_mut(&mut d_x, cols)).unwrap();
        assert!(d_x.iter().all(|&d| d == 0.0));
        log_softmax::forward(ctx, mat(&x, cols), mat_mut(&mut y, cols)).unwrap();
        assert!(y.iter().all(|&y| y == f32::NEG_INFINITY));
        d_x.fill(1.0);
        log_softmax::backward(ctx, mat(&y, cols), mat(&d, cols), mat_mut(&mut d_x, cols)).unwrap();
        assert!(d_x.iter().all(|&d| d == 0.0));
        let spec = CrossEntropy::default();
        let mut loss = [0.0];
        cross_entropy::forward(ctx, mat(&x, cols), &[0], &spec, &mut loss).unwrap();
        assert_eq!(loss[0], f32::INFINITY);
        d_x.fill(1.0);
        cross_entropy::backward(ctx, mat(&x, cols), &[0], &spec, &[1.0], mat_mut(&mut d_x, cols)).unwrap();
        assert!(d_x.iter().all(|&d| d == 0.0));
    });
}

#[test]
fn nan_and_infinity_spoil_their_own_row_only() {
    for_each_width(|ctx, cols| {
        for (bad, rest) in [(f32::NAN, 0.5), (f32::INFINITY, 0.5), (f32::NAN, f32::NEG_INFINITY)] {
            for place in [0, cols / 2, cols - 1] {
                let mut x = vec![rest; 2 * cols];
                x[cols..].fill(0.25);
                x[place] = bad;
                let mut y = vec![0.0; 2 * cols];
                softmax::forward(ctx, mat(&x, cols), mat_mut(&mut y, cols)).unwrap();
                assert!(y[..cols].iter().all(|y| y.is_nan()), "{cols} {place} {bad} {rest}: {y:?}");
                assert!(y[cols..].iter().all(|y| y.is_finite()));
                log_softmax::forward(ctx, mat(&x, cols), mat_mut(&mut y, cols)).unwrap();
                assert!(y[..cols].iter().all(|y| y.is_nan()));
                let mut losses = [0.0; 2];
                let spec = CrossEntropy { label_smoothing: 0.1, ignore_index: None };
                cross_entropy::forward(ctx, mat(&x, cols), &[0, 0], &spec, &mut losses).unwrap();
                assert!(losses[0].is_nan() && losses[1].is_finite());
                let d_logits = mat_mut(&mut y, cols);
                cross_entropy::backward(ctx, mat(&x, cols), &[0, 0], &spec, &[1.0; 2], d_logits).unwrap();
                assert!(y[..cols].iter().all(|y| y.is_nan()));
            }
        }
    });
}

#[test]
fn a_caller_s_mistake_is_an_error_and_nothing_is_written() {
    testing::for_each_isa(|ctx| {
        let x = logits(2, 4, 11);
        let x = mat(&x, 4);
        let mut losses = [7.0; 2];
        let spec = CrossEntropy { label_smoothing: 0.0, ignore_index: Some(9) };
        let error = cross_entropy::forward(ctx, x, &[0, 4], &spec, &mut losses).unwrap_err();
        assert_eq!(error, ShapeError::Index { argument: "targets", position: 1, index: 4, len: 4 });
        let spec = CrossEntropy { label_smoothing: f32::NAN, ..spec };
        let error = cross_entropy::forward(ctx, x, &[0, 9], &spec, &mut losses).unwrap_err();
        assert!(error.to_string().contains("label_smoothing is NaN"), "{error}");
        let error = cross_entropy::forward(ctx, x, &[0], &CrossEntropy::default(), &mut losses).unwrap_err();
        assert!(error.to_string().contains("targets: length is 1, expected 2"), "{error}");
        assert_eq!(losses, [7.0; 2]);
        let mut y = [7.0; 8];
        assert!(softmax::forward(ctx, x, mat_mut(&mut y, 2)).is_err());
        assert!(softmax::forward(ctx, x.t(), mat_mut(&mut y, 2)).is_err());
        assert!(log_softmax::backward(ctx, x, mat(&[0.0; 8], 2), mat_mut(&mut y, 4)).is_err());
        assert_eq!(y, [7.0; 8]);
    });
}

#[test]
fn empty_shapes() {
    testing::for_each_isa(|ctx| {
        softmax::forward(ctx, mat(&[], 5), mat_mut(&mut [], 5)).unwrap();
        let none = MatRef::new(&[][..], 3, 0).unwrap();
        softmax::forward(ctx, none, MatMut::new(&mut [], 3, 0).unwrap()).unwrap();
        log_softmax::forward(ctx, none, MatMut::new(&mut [], 3, 0).unwrap()).unwrap();
        cross_entropy::forward(ctx, mat(&[], 5), &[], &CrossEntropy::default(), &mut []).unwrap();
    });
}
