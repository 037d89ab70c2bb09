//! Softmax and log-softmax of scaled scores of which rows see their first columns.

use super::*;
use crate::rowwise::masked_softmax::{CausalRows, Form, MaskedSoftmax, backward, forward};
use crate::rowwise::{log_softmax, softmax};
use crate::testing::{Guarded, uniform};

const FORMS: [Form; 2] = [Form::Softmax, Form::LogSoftmax];

/// The columns that row `i` sees, by the definition.
fn seen(spec: &MaskedSoftmax<'_>, i: usize, cols: usize) -> usize {
    let sees = |j: usize| {
        spec.lengths.is_none_or(|lengths| j < lengths[i])
            && spec.causal.is_none_or(|causal| j <= i % causal.queries + causal.offset)
    };
    (0..cols).filter(|&j| sees(j)).count()
}

/// Masks of nine rows.
fn specs(form: Form, lengths: &[usize]) -> [MaskedSoftmax<'_>; 5] {
    let plain = MaskedSoftmax { form, scale: 0.3, causal: None, lengths: None };
    let causal = |queries, offset| Some(CausalRows { queries, offset });
    [
        plain,
        MaskedSoftmax { causal: causal(9, 0), ..plain },
        MaskedSoftmax { causal: causal(3, 5), scale: 1.0, ..plain },
        MaskedSoftmax { lengths: Some(lengths), ..plain },
        MaskedSoftmax { lengths: Some(lengths), causal: causal(4, 1), ..plain },
    ]
}

/// The plain kernels on scores that were scaled and hidden by −∞.
fn by_parts(ctx: &Context, spec: &MaskedSoftmax<'_>, (x, cols): (&[f32], usize)) -> Vec<f32> {
    let hide = |(at, x): (usize, &f32)| {
        if at % cols < seen(spec, at / cols, cols) { x * spec.scale } else { f32::NEG_INFINITY }
    };
    let scores: Vec<f32> = x.iter().enumerate().map(hide).collect();
    let mut y = vec![0.0; x.len()];
    match spec.form {
        Form::Softmax => softmax::forward(ctx, mat(&scores, cols), mat_mut(&mut y, cols)).unwrap(),
        Form::LogSoftmax => log_softmax::forward(ctx, mat(&scores, cols), mat_mut(&mut y, cols)).unwrap(),
    }
    y
}

#[test]
fn the_bits_of_scaling_hiding_and_softmax() {
    for_each_width(|ctx, cols| {
        let lengths = [0, 1, cols, cols / 2, 3, cols + 7, 0, 2, cols];
        let x = logits(9, cols, 1);
        for form in FORMS {
            for spec in specs(form, &lengths) {
                let expected = by_parts(ctx, &spec, (&x, cols));
                // What is hidden is not read.
                let hide = |(at, x): (usize, &f32)| {
                    if at % cols < seen(&spec, at / cols, cols) { *x } else { f32::NAN }
                };
                let poisoned: Vec<f32> = x.iter().enumerate().map(hide).collect();
                for n in [1, 3] {
                    let mut y = Guarded::poisoned(x.len());
                    forward(&threads(ctx, n), &spec, mat(&poisoned, cols), mat_mut(y.body_mut(), cols))
                        .unwrap();
                    y.check();
                    assert_same_bits(y.body(), &expected);
                }
            }
        }
    });
}

#[test]
fn gradients_are_those_of_the_columns_that_are_seen() {
    for_each_width(|ctx, cols| {
        let lengths = [0, 1, cols, cols / 2, 3, cols + 7, 0, 2, cols];
        let (x, d_y) = (logits(9, cols, 2), uniform(9 * cols, 3));
        for form in FORMS {
            for spec in specs(form, &lengths) {
                let mut y = vec![0.0; x.len()];
                forward(ctx, &spec, mat(&x, cols), mat_mut(&mut y, cols)).unwrap();
                let mut d_x = Guarded::poisoned(x.len());
                let to = mat_mut(d_x.body_mut(), cols);
                backward(ctx, &spec, mat(&y, cols), mat(&d_y, cols), to).unwrap();
                d_x.check();
                for i in 0..9 {
                    let n = seen(&spec, i, cols);
                    let row = i * cols..i * cols + n;
                    let (y, d_y) = (mat(&y[row.clone()], n), mat(&d_y[row.clone()], n));
                    let mut alone = vec![0.0; n];
                    if n > 0 {
                        let to = mat_mut(&mut alone, n);
                        match form {
                            Form::Softmax => softmax::backward(ctx, y, d_y, to).unwrap(),
                            Form::LogSoftmax => log_softmax::backward(ctx, y, d_y, to).unwrap(),
                        }
                    }
                    let scaled: Vec<f32> = alone.iter().map(|d| d * spec.scale).collect();
                    assert_same_bits(&d_x.body()[row.clone()], &scaled);
                    assert!(d_x.body()[row.end..(i + 1) * cols].iter().all(|&d| d == 0.0));
                }
            }
        }
    });
}

#[test]
fn rows_that_see_nothing_and_nan_stay_by_themselves() {
    testing::for_each_isa(|ctx| {
        let mut x = vec![0.5; 4 * 11];
        x[11..22].fill(f32::NEG_INFINITY);
        x[2 * 11 + 3] = f32::NAN;
        for (form, hidden) in [(Form::Softmax, 0.0), (Form::LogSoftmax, f32::NEG_INFINITY)] {
            let spec = MaskedSoftmax { form, scale: 2.0, causal: None, lengths: Some(&[0, 11, 5, 3]) };
            let (mut y, mut d_x) = (vec![7.0; 44], vec![7.0; 44]);
            forward(ctx, &spec, mat(&x, 11), mat_mut(&mut y, 11)).unwrap();
            assert!(y[..22].iter().all(|&y| y == hidden));
            assert!(y[22..27].iter().all(|y| y.is_nan()) && y[27..33].iter().all(|&y| y == hidden));
            assert!(y[33..36].iter().all(|y| y.is_finite()) && y[36..].iter().all(|&y| y == hidden));
            backward(ctx, &spec, mat(&y, 11), mat(&[1.0; 44], 11), mat_mut(&mut d_x, 11)).unwrap();
            assert!(d_x[..22].iter().chain(&d_x[27..33]).chain(&d_x[36..]).all(|&d| d == 0.0));
        }
    });
}

#[test]
fn misfits_are_named() {
    let ctx = Context::with_isa(crate::Isa::scalar());
    let x = [0.0; 6];
    let plain = MaskedSoftmax { form: Form::Softmax, scale: 1.0, causal: None, lengths: None };
    let causal = Some(CausalRows { queries: 0, offset: 0 });
    for (spec, named) in [
        (MaskedSoftmax { scale: 0.0, ..plain }, "scale is 0"),
        (MaskedSoftmax { scale: f32::NAN, ..plain }, "scale is NaN"),
        (MaskedSoftmax { causal, ..plain }, "causal.queries is 0"),
        (MaskedSoftmax { lengths: Some(&[1]), ..plain }, "lengths: length is 1, expected 2"),
    ] {
        let mut y = [7.0; 6];
        let error = forward(&ctx, &spec, mat(&x, 3), mat_mut(&mut y, 3)).unwrap_err().to_string();
        assert!(error.contains(named), "{named}: {error}");
        let error = backward(&ctx, &spec, mat(&x, 3), mat(&x, 3), mat_mut(&mut y, 3)).unwrap_err();
        assert!(error.to_string().contains(named), "{named}: {error}");
        assert_eq!(y, [7.0; 6]);
    }
    assert!(forward(&ctx, &plain, mat(&x, 3), mat_mut(&mut [0.0; 6], 2)).is_err());
    forward(&ctx, &plain, mat(&[], 3), mat_mut(&mut [], 3)).unwrap();
}
