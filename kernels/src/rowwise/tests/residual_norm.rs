//! The fused residual and normalisation against the kernels apart, bit by bit.

use super::*;
use crate::rowwise::dropout::{self, Dropout};
use crate::rowwise::elementwise;
use crate::rowwise::layernorm::{self, LayerNorm, RowStats};
use crate::rowwise::residual_norm::{self, Grads, Join, Norm, Outputs, Saved};
use crate::rowwise::rmsnorm::{self, RmsNorm};
use crate::testing::{Guarded, uniform};

const EPS: f32 = 1e-5;
const MASKS: [Option<Dropout>; 2] = [None, Some(Dropout { p: 0.25, seed: 7, stream: 3 })];

/// x, what forward saved, d_y.
type Inputs<'a, T> = (MatRef<'a>, &'a [T], MatRef<'a>);

/// Writes d_x and adds to d_gamma and d_beta.
type BackwardApart<N> = fn(&Context, &N, Inputs<'_, <N as Norm>::Stats>, MatMut<'_>, [&mut [f32]; 2]);

/// A norm and its two kernels apart.
struct Apart<N: Norm> {
    norm: N,
    forward: fn(&Context, &N, MatRef<'_>, MatMut<'_>, &mut [N::Stats]),
    backward: BackwardApart<N>,
}

fn layernorm_apart<'a>(gamma: &'a [f32], beta: &'a [f32]) -> Apart<LayerNorm<'a>> {
    Apart {
        norm: LayerNorm { gamma, beta, eps: EPS },
        forward: |ctx, norm, x, y, stats| layernorm::forward(ctx, x, norm, y, stats).unwrap(),
        backward: |ctx, norm, (x, stats, d_y), d_x, [d_gamma, d_beta]| {
            let saved = layernorm::Saved { x, gamma: norm.gamma, stats };
            layernorm::backward(ctx, &saved, d_y, d_x, d_gamma, d_beta).unwrap();
        },
    }
}

fn rmsnorm_apart(gamma: &[f32]) -> Apart<RmsNorm<'_>> {
    Apart {
        norm: RmsNorm { gamma, eps: EPS },
        forward: |ctx, norm, x, y, rstd| rmsnorm::forward(ctx, x, norm, y, rstd).unwrap(),
        backward: |ctx, norm, (x, rstd, d_y), d_x, [d_gamma, _]| {
            let saved = rmsnorm::Saved { x, gamma: norm.gamma, rstd };
            rmsnorm::backward(ctx, &saved, d_y, d_x, d_gamma).unwrap();
        },
    }
}

/// Compares everything that both ways write, for `rows × cols`.
fn compare<N: Norm>(ctx: &Context, apart: &Apart<N>, (rows, cols): (usize, usize), stats: N::Stats) {
    let len = rows * cols;
    let [x, residual, d_y, d_sum] = [20, 21, 22, 23].map(|seed| uniform(len, seed));
    for (dropout, with_sum) in MASKS.into_iter().flat_map(|mask| [(mask, true), (mask, false)]) {
        let mut dropped = x.clone();
        if let Some(dropout) = &dropout {
            dropout::apply(ctx, dropout, &x, &mut dropped).unwrap();
        }
        let (mut sum, mut y, mut of_rows) = (vec![0.0; len], vec![0.0; len], vec![stats; rows]);
        elementwise::add(ctx, &dropped, &residual, &mut sum).unwrap();
        (apart.forward)(ctx, &apart.norm, mat(&sum, cols), mat_mut(&mut y, cols), &mut of_rows);
        let shift = if N::SHIFTS { cols } else { 0 };
        let (mut d_stream, mut d_gamma, mut d_beta) = (vec![0.0; len], vec![0.5; cols], vec![0.25; shift]);
        let inputs = (mat(&sum, cols), &of_rows[..], mat(&d_y, cols));
        let sums = [&mut d_gamma[..], &mut d_beta[..]];
        (apart.backward)(ctx, &apart.norm, inputs, mat_mut(&mut d_stream, cols), sums);
        if with_sum {
            elementwise::add_assign(ctx, &d_sum, &mut d_stream).unwrap();
        }
        let mut d_x = d_stream.clone();
        if let Some(dropout) = &dropout {
            dropout::apply(ctx, dropout, &d_stream, &mut d_x).unwrap();
        }

        for n in [1, 3] {
            let ctx = threads(ctx, n);
            let (mut to_sum, mut to_y) = (Guarded::poisoned(len), Guarded::poisoned(len));
            let mut of_rows = vec![stats; rows];
            let join = Join { x: mat(&x, cols), residual: mat(&residual, cols), dropout };
            let outputs = Outputs {
                sum: mat_mut(to_sum.body_mut(), cols),
                y: mat_mut(to_y.body_mut(), cols),
                stats: &mut of_rows,
            };
            residual_norm::forward(&ctx, &apart.norm, &join, outputs).unwrap();
            assert_same_bits(to_sum.body(), &sum);
            assert_same_bits(to_y.body(), &y);

            let saved = Saved {
                sum: mat(to_sum.body(), cols),
                stats: &of_rows,
                dropout,
                d_y: mat(&d_y, cols),
                d_sum: with_sum.then(|| mat(&d_sum, cols)),
            };
            let [mut to_residual, mut to_x] = [(); 2].map(|()| Guarded::poisoned(len));
            let [mut to_gamma, mut to_beta] = [vec![0.5; cols], vec![0.25; shift]].map(|x| Guarded::new(&x));
            let grads = Grads {
                d_residual: mat_mut(to_residual.body_mut(), cols),
                d_x: Some(mat_mut(to_x.body_mut(), cols)),
                d_gamma: to_gamma.body_mut(),
                d_beta: to_beta.body_mut(),
            };
            residual_norm::backward(&ctx, &apart.norm, &saved, grads).unwrap();
            for (actual, expected) in [
                (&to_residual, &d_stream),
                (&to_x, &d_x),
                (&to_gamma, &d_gamma),
                (&to_beta, &d_beta),
                (&to_sum, &sum),
                (&to_y, &y),
            ] {
                actual.check();
                assert_same_bits(actual.body(), expected);
            }

            let mut alone = vec![f32::NAN; len];
            let grads = Grads {
                d_residual: mat_mut(&mut alone, cols),
                d_x: None,
                d_gamma: to_gamma.body_mut(),
                d_beta: to_beta.body_mut(),
            };
            residual_norm::backward(&ctx, &apart.norm, &saved, grads).unwrap();
            assert_same_bits(&alone, &d_stream);
        }
    }
}

#[test]
fn one_kernel_has_the_bits_of_three() {
    testing::for_each_isa(|ctx| {
        let shapes = COLS.iter().map(|&cols| (ROWS, cols)).chain([(300, 77), (17, 64), (130, 3), (0, 5)]);
        for (rows, cols) in shapes {
            let (gamma, beta) = (uniform(cols, 24), uniform(cols, 25));
            compare(ctx, &layernorm_apart(&gamma, &beta), (rows, cols), RowStats::default());
            compare(ctx, &rmsnorm_apart(&gamma), (rows, cols), 0.0);
        }
    });
}

#[test]
fn shapes_are_checked() {
    let ctx = Context::with_isa(crate::isa::Isa::best());
    let (gamma, beta) = ([1.0; 5], [0.0; 5]);
    let x = [1.0; 10];
    let error = |norm: &LayerNorm<'_>, residual: &[f32], dropout, stats: usize| {
        let (mut sum, mut y, mut stats) = ([7.0; 10], [7.0; 10], vec![RowStats::default(); stats]);
        let join = Join { x: mat(&x, 5), residual: mat(residual, 5), dropout };
        let outputs = Outputs { sum: mat_mut(&mut sum, 5), y: mat_mut(&mut y, 5), stats: &mut stats };
        let error = residual_norm::forward(&ctx, norm, &join, outputs).unwrap_err().to_string();
        assert_eq!((sum, y), ([7.0; 10], [7.0; 10]));
        error
    };
    let norm = LayerNorm { gamma: &gamma, beta: &beta, eps: EPS };
    assert!(error(&norm, &x[..5], None, 2).contains("residual: rows is 1, expected 2"));
    assert!(error(&norm, &x, None, 1).contains("stats: length is 1, expected 2"));
    assert!(error(&LayerNorm { beta: &beta[..4], ..norm }, &x, None, 2).contains("beta: length is 4"));
    let all = Some(Dropout { p: 1.0, seed: 0, stream: 0 });
    assert!(error(&norm, &x, all, 2).contains("p is 1"));

    let norm = RmsNorm { gamma: &gamma, eps: EPS };
    let saved = Saved { sum: mat(&x, 5), stats: &[1.0; 2], dropout: None, d_y: mat(&x, 5), d_sum: None };
    let (mut d, mut d_gamma) = ([0.0; 10], [0.0; 5]);
    let d_residual = mat_mut(&mut d, 5);
    let grads = Grads { d_residual, d_x: None, d_gamma: &mut d_gamma, d_beta: &mut [0.0; 5] };
    let error = residual_norm::backward(&ctx, &norm, &saved, grads).unwrap_err().to_string();
    assert!(error.contains("d_beta: length is 5, expected 0"), "{error}");
}
