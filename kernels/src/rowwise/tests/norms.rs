//! Layer normalisation and RMS normalisation.

use super::*;
use crate::reference;
use crate::rowwise::layernorm::{self, LayerNorm, RowStats};
use crate::rowwise::rmsnorm::{self, RmsNorm};
use crate::testing::{Guarded, assert_within, gamma, uniform};

const EPS: f32 = 1e-5;

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// The exact mean, 1/√(variance + eps) and mean of magnitudes of a row.
fn moments(x: &[f64]) -> (f64, f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    let magnitude = x.iter().map(|x| x.abs()).sum::<f64>() / n;
    (mean, 1.0 / (variance + f64::from(EPS)).sqrt(), magnitude)
}

/// Rows around 0, around 3, and equal elements but for noise.
fn rows(cols: usize, seed: u64) -> Vec<f32> {
    let x = uniform(ROWS * cols, seed);
    x.iter().enumerate().map(|(i, x)| [2.0 * x, 3.0 + x, 5.0 + 1e-3 * x][i / cols % 3]).collect()
}

#[test]
fn layernorm_forward() {
    for_each_width(|ctx, cols| {
        let x = rows(cols, 1);
        let (gamma_, beta) = (uniform(cols, 2), uniform(cols, 3));
        let norm = LayerNorm { gamma: &gamma_, beta: &beta, eps: EPS };
        let mut y = Guarded::poisoned(x.len());
        let mut stats = [RowStats::default(); ROWS];
        layernorm::forward(ctx, mat(&x, cols), &norm, mat_mut(y.body_mut(), cols), &mut stats).unwrap();
        y.check();
        let exact = reference::layernorm_forward(mat(&x, cols), &gamma_, &beta, f64::from(EPS));
        let x = wide(&x);
        let row = |i: usize| moments(&x[i * cols..(i + 1) * cols]);
        for (i, stats) in stats.iter().enumerate() {
            let (mean, rstd, magnitude) = row(i);
            let off = gamma(cols + 2) * magnitude;
            assert!((f64::from(stats.mean) - mean).abs() <= off);
            let relative = ((off * rstd).powi(2) + gamma(cols + 4)) / 2.0 + 4.0 * U;
            assert!((f64::from(stats.rstd) / rstd - 1.0).abs() <= relative);
        }
        assert_within(y.body(), &exact, |i| {
            let (mean, rstd, magnitude) = row(i / cols);
            // The error of the mean shifts all of x̂ and enters the variance squared.
            let off = gamma(cols + 2) * magnitude * rstd;
            let normal = ((x[i] - mean) * rstd).abs();
            let (scale, shift) = (f64::from(gamma_[i % cols].abs()), f64::from(beta[i % cols].abs()));
            let of_normal = off + normal * ((off * off + gamma(cols + 4)) / 2.0 + 6.0 * U);
            scale * of_normal + 2.0 * U * (normal * scale + shift)
        });
    });
}

/// What bounds of both backward passes share: for one row, g = d_y·gamma, x̂ and the error of x̂.
struct Row {
    rstd: f64,
    g: Vec<f64>,
    normal: Vec<f64>,
    off: Vec<f64>,
}

impl Row {
    fn new(x: &[f64], d_y: &[f32], gamma: &[f32], mean: f64, rstd: f64) -> Row {
        let normal: Vec<f64> = x.iter().map(|x| (x - mean) * rstd).collect();
        Row {
            rstd,
            g: d_y.iter().zip(gamma).map(|(&d, &gamma)| f64::from(d) * f64::from(gamma)).collect(),
            off: normal.iter().map(|x| rstd * U * mean.abs() + 3.0 * U * x.abs()).collect(),
            normal,
        }
    }

    /// The bound of d_x; `centred` when the mean of g is subtracted.
    fn bound(&self, j: usize, centred: bool) -> f64 {
        let n = self.g.len();
        let mean = |f: &dyn Fn(usize) -> f64| (0..n).map(f).sum::<f64>() / n as f64;
        let mean_g = if centred { mean(&|k| self.g[k].abs()) } else { 0.0 };
        let mean_gx = mean(&|k| (self.g[k] * self.normal[k]).abs());
        let off_gx = mean(&|k| self.g[k].abs() * self.off[k]) + gamma(n + 5) * mean_gx;
        let product = self.normal[j].abs() * off_gx + self.off[j] * (mean_gx + off_gx);
        let roundings = 5.0 * U * (self.g[j].abs() + mean_g + self.normal[j].abs() * mean_gx);
        self.rstd * (gamma(n + 4) * mean_g + product + roundings)
    }
}

#[test]
fn layernorm_backward() {
    for_each_width(|ctx, cols| {
        let (x, d_y) = (rows(cols, 4), uniform(ROWS * cols, 5));
        let gamma_ = uniform(cols, 6);
        let wide_x = wide(&x);
        let exact_rows: Vec<_> = wide_x.chunks(cols).map(moments).collect();
        let stats: Vec<RowStats> =
            exact_rows.iter().map(|m| RowStats { mean: m.0 as f32, rstd: m.1 as f32 }).collect();
        let saved = layernorm::Saved { x: mat(&x, cols), gamma: &gamma_, stats: &stats };
        let mut d_x = Guarded::poisoned(x.len());
        let (mut d_gamma, mut d_beta) = (Guarded::new(&vec![0.5; cols]), Guarded::new(&vec![-0.5; cols]));
        layernorm::backward(
            ctx,
            &saved,
            mat(&d_y, cols),
            mat_mut(d_x.body_mut(), cols),
            d_gamma.body_mut(),
            d_beta.body_mut(),
        )
        .unwrap();
        [&d_x, &d_gamma, &d_beta].iter().for_each(|buffer| buffer.check());

        let exact = reference::layernorm_backward(mat(&x, cols), &gamma_, f64::from(EPS), mat(&d_y, cols));
        let of_row: Vec<Row> = (0..ROWS)
            .map(|i| {
                let row = i * cols..(i + 1) * cols;
                Row::new(&wide_x[row.clone()], &d_y[row], &gamma_, exact_rows[i].0, exact_rows[i].1)
            })
            .collect();
        assert_within(d_x.body(), &exact.d_x, |i| of_row[i / cols].bound(i % cols, true));
        let column = |j: usize, f: &dyn Fn(&Row) -> f64| {
            (0..ROWS).map(|i| f64::from(d_y[i * cols + j].abs()) * f(&of_row[i])).sum::<f64>()
        };
        let expected: Vec<f64> = exact.d_gamma.iter().map(|d| d + 0.5).collect();
        assert_within(d_gamma.body(), &expected, |j| {
            column(j, &|row| row.off[j]) * (1.0 + 1e-3)
                + gamma(ROWS + 3) * (0.5 + column(j, &|row| row.normal[j].abs()))
        });
        let expected: Vec<f64> = exact.d_beta.iter().map(|d| d - 0.5).collect();
        assert_within(d_beta.body(), &expected, |j| gamma(ROWS + 2) * (0.5 + column(j, &|_| 1.0)));
    });
}

#[test]
fn rmsnorm_both() {
    for_each_width(|ctx, cols| {
        let (x, d_y) = (rows(cols, 7), uniform(ROWS * cols, 8));
        let gamma_ = uniform(cols, 9);
        let mut y = Guarded::poisoned(x.len());
        let mut rstd = Guarded::poisoned(ROWS);
        let out = mat_mut(y.body_mut(), cols);
        let norm = RmsNorm { gamma: &gamma_, eps: EPS };
        rmsnorm::forward(ctx, mat(&x, cols), &norm, out, rstd.body_mut()).unwrap();
        y.check();
        rstd.check();
        let exact = reference::rmsnorm_forward(mat(&x, cols), &gamma_, f64::from(EPS));
        assert_within(y.body(), &exact, |i| (cols as f64 / 2.0 + 5.0) * U * exact[i].abs() * (1.0 + 1e-3));

        let wide_x = wide(&x);
        let exact_rstd: Vec<f64> = wide_x
            .chunks(cols)
            .map(|x| 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / cols as f64 + f64::from(EPS)).sqrt())
            .collect();
        let rounded: Vec<f32> = exact_rstd.iter().map(|&r| r as f32).collect();
        let saved = rmsnorm::Saved { x: mat(&x, cols), gamma: &gamma_, rstd: &rounded };
        let mut d_x = Guarded::poisoned(x.len());
        let mut d_gamma = Guarded::new(&vec![0.5; cols]);
        let out = mat_mut(d_x.body_mut(), cols);
        rmsnorm::backward(ctx, &saved, mat(&d_y, cols), out, d_gamma.body_mut()).unwrap();
        d_x.check();
        d_gamma.check();
        let exact = reference::rmsnorm_backward(mat(&x, cols), &gamma_, f64::from(EPS), mat(&d_y, cols));
        let of_row: Vec<Row> = (0..ROWS)
            .map(|i| {
                let row = i * cols..(i + 1) * cols;
                Row::new(&wide_x[row.clone()], &d_y[row], &gamma_, 0.0, exact_rstd[i])
            })
            .collect();
        assert_within(d_x.body(), &exact.d_x, |i| of_row[i / cols].bound(i % cols, false));
        let expected: Vec<f64> = exact.d_gamma.iter().map(|d| d + 0.5).collect();
        assert_within(d_gamma.body(), &expected, |j| {
            let column = |f: &dyn Fn(&Row) -> f64| {
                (0..ROWS).map(|i| f64::from(d_y[i * cols + j].abs()) * f(&of_row[i])).sum::<f64>()
            };
            column(&|row| row.off[j]) + gamma(ROWS + 3) * (0.5 + column(&|row| row.normal[j].abs()))
        });
    });
}

#[test]
fn rows_do_not_depend_on_each_other_nor_on_threads() {
    const N: usize = 300;
    const C: usize = 77;
    let (x, d_y) = (uniform(N * C, 10), uniform(N * C, 11));
    let (gamma_, beta) = (uniform(C, 12), uniform(C, 13));
    let norm = LayerNorm { gamma: &gamma_, beta: &beta, eps: EPS };
    assert_rows_independent(N, |ctx, rows| {
        let (x, d_y) = (pick(&x, C, rows), pick(&d_y, C, rows));
        let (x, d_y) = (mat(&x, C), mat(&d_y, C));
        let mut out = vec![vec![0.0; rows.len() * C]; 4];
        let [y, d_x, rms_y, rms_d] = &mut out[..] else { unreachable!() };
        let mut stats = vec![RowStats::default(); rows.len()];
        let mut rstd = vec![0.0; rows.len()];
        layernorm::forward(ctx, x, &norm, mat_mut(y, C), &mut stats).unwrap();
        let (mut d_gamma, mut d_beta) = ([0.0; C], [0.0; C]);
        let saved = layernorm::Saved { x, gamma: &gamma_, stats: &stats };
        layernorm::backward(ctx, &saved, d_y, mat_mut(d_x, C), &mut d_gamma, &mut d_beta).unwrap();
        rmsnorm::forward(ctx, x, &RmsNorm { gamma: &gamma_, eps: EPS }, mat_mut(rms_y, C), &mut rstd)
            .unwrap();
        let saved = rmsnorm::Saved { x, gamma: &gamma_, rstd: &rstd };
        rmsnorm::backward(ctx, &saved, d_y, mat_mut(rms_d, C), &mut d_gamma).unwrap();
        (0..rows.len())
            .flat_map(|i| out.iter().flat_map(|out| out[i * C..(i + 1) * C].to_vec()).collect::<Vec<_>>())
            .collect()
    });
}

#[test]
fn sums_over_rows_do_not_depend_on_threads() {
    const N: usize = 1000;
    const C: usize = 19;
    let (x, d_y) = (uniform(N * C, 14), uniform(N * C, 15));
    let gamma_ = uniform(C, 16);
    let stats = vec![RowStats { mean: 0.01, rstd: 1.7 }; N];
    let rstd = vec![1.7; N];
    testing::for_each_isa(|ctx| {
        let run = |ctx: &Context| {
            let mut sums = vec![vec![0.25f32; C]; 3];
            let [d_gamma, d_beta, rms_gamma] = &mut sums[..] else { unreachable!() };
            let mut d_x = vec![0.0; N * C];
            let saved = layernorm::Saved { x: mat(&x, C), gamma: &gamma_, stats: &stats };
            layernorm::backward(ctx, &saved, mat(&d_y, C), mat_mut(&mut d_x, C), d_gamma, d_beta).unwrap();
            let saved = rmsnorm::Saved { x: mat(&x, C), gamma: &gamma_, rstd: &rstd };
            rmsnorm::backward(ctx, &saved, mat(&d_y, C), mat_mut(&mut d_x, C), rms_gamma).unwrap();
            sums.concat()
        };
        let expected = run(ctx);
        for n in [2, 3, 7] {
            assert_same_bits(&run(&threads(ctx, n)), &expected);
        }
    });
}

#[test]
fn equal_elements_give_beta_and_shapes_are_checked() {
    testing::for_each_isa(|ctx| {
        let x = [4.0; 10];
        let norm = LayerNorm { gamma: &[3.0; 5], beta: &[1.0, 2.0, 3.0, 4.0, 5.0], eps: EPS };
        let mut y = [0.0; 10];
        let mut stats = [RowStats::default(); 2];
        layernorm::forward(ctx, mat(&x, 5), &norm, mat_mut(&mut y, 5), &mut stats).unwrap();
        assert_eq!(y, [1.0, 2.0, 3.0, 4.0, 5.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(stats[0].mean, 4.0);
        let short = LayerNorm { gamma: &[1.0; 4], ..norm };
        let error = layernorm::forward(ctx, mat(&x, 5), &short, mat_mut(&mut y, 5), &mut stats).unwrap_err();
        assert!(error.to_string().contains("gamma: length is 4, expected 5"), "{error}");
        let error =
            layernorm::forward(ctx, mat(&x, 5), &norm, mat_mut(&mut y, 5), &mut stats[..1]).unwrap_err();
        assert!(error.to_string().contains("stats"), "{error}");
        let nan = [f32::NAN, 1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0, 5.0];
        layernorm::forward(ctx, mat(&nan, 5), &norm, mat_mut(&mut y, 5), &mut stats).unwrap();
        assert!(y[..5].iter().all(|y| y.is_nan()) && y[5..].iter().all(|y| y.is_finite()));
        layernorm::forward(ctx, mat(&[], 5), &norm, mat_mut(&mut [], 5), &mut []).unwrap();
    });
}
