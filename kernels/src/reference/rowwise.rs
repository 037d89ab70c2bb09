//! The row-wise kernels as plain loops in f64.

use crate::view::MatRef;

/// Elements that an oracle takes: f32 as the kernel gets it, or f64 for differences.
pub trait Element: Copy + Into<f64> {}

impl<T: Copy + Into<f64>> Element for T {}

fn row<T: Element>(x: MatRef<'_, T>, i: usize) -> Vec<f64> {
    (0..x.cols()).map(|j| x.at(i, j).into()).collect()
}

fn by_rows<T: Element>(x: MatRef<'_, T>, f: impl Fn(usize, &[f64]) -> Vec<f64>) -> Vec<f64> {
    (0..x.rows()).flat_map(|i| f(i, &row(x, i))).collect()
}

/// The largest element, NaN when there is one, −∞ for an empty row.
fn max(x: &[f64]) -> f64 {
    x.iter().fold(f64::NEG_INFINITY, |m, &x| if x.is_nan() || x > m { x } else { m })
}

/// `y[j] = exp(x[j]) / Σ exp(x[k])` for each row; zeros for a row of −∞.
pub fn softmax_forward<T: Element>(x: MatRef<'_, T>) -> Vec<f64> {
    by_rows(x, |_, x| softmax_row(x))
}

fn softmax_row(x: &[f64]) -> Vec<f64> {
    let max = max(x);
    if max == f64::NEG_INFINITY {
        return vec![0.0; x.len()];
    }
    let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
    x.iter().map(|x| (x - max).exp() / sum).collect()
}

/// `d_x[j] = y[j]·(d_y[j] − Σ y[k]·d_y[k])` for each row.
///
/// # Panics
/// When the shapes differ.
pub fn softmax_backward<T: Element, U: Element>(y: MatRef<'_, T>, d_y: MatRef<'_, U>) -> Vec<f64> {
    by_rows(y, |i, y| {
        let d_y = row(d_y, i);
        let mean: f64 = y.iter().zip(&d_y).map(|(y, d)| y * d).sum();
        y.iter().zip(&d_y).map(|(y, d)| y * (d - mean)).collect()
    })
}

/// `y[j] = x[j] − log Σ exp(x[k])` for each row; −∞ for a row of −∞.
pub fn log_softmax_forward<T: Element>(x: MatRef<'_, T>) -> Vec<f64> {
    by_rows(x, |_, x| log_softmax_row(x))
}

fn log_softmax_row(x: &[f64]) -> Vec<f64> {
    let max = max(x);
    if max == f64::NEG_INFINITY {
        return vec![f64::NEG_INFINITY; x.len()];
    }
    let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
    x.iter().map(|x| x - max - sum.ln()).collect()
}

/// `d_x[j] = d_y[j] − exp(y[j])·Σ d_y[k]` for each row; zeros for a row of −∞.
///
/// # Panics
/// When the shapes differ.
pub fn log_softmax_backward<T: Element, U: Element>(y: MatRef<'_, T>, d_y: MatRef<'_, U>) -> Vec<f64> {
    by_rows(y, |i, y| {
        let d_y = row(d_y, i);
        let masked = max(y) == f64::NEG_INFINITY;
        let sum: f64 = d_y.iter().sum();
        y.iter().zip(&d_y).map(|(y, d)| if masked { 0.0 } else { d - y.exp() * sum }).collect()
    })
}

/// The mean of a row and its `1/√(variance + eps)`.
fn moments(x: &[f64], eps: f64) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// `y[j] = (x[j] − mean)/√(variance + eps)·gamma[j] + beta[j]` for each row.
///
/// # Panics
/// When the shapes differ.
pub fn layernorm_forward<T: Element, P: Element>(
    x: MatRef<'_, T>,
    gamma: &[P],
    beta: &[P],
    eps: f64,
) -> Vec<f64> {
    by_rows(x, |_, x| {
        let (mean, rstd) = moments(x, eps);
        (0..x.len()).map(|j| (x[j] - mean) * rstd * gamma[j].into() + beta[j].into()).collect()
    })
}

/// The gradients of a normalisation.
#[derive(Debug, Clone, PartialEq)]
pub struct NormGrads {
    /// Of x, `[rows, cols]`.
    pub d_x: Vec<f64>,
    /// Of gamma, `[cols]`.
    pub d_gamma: Vec<f64>,
    /// Of beta, `[cols]`; zeros where there is none.
    pub d_beta: Vec<f64>,
}

/// The gradients of [`layernorm_forward`].
///
/// # Panics
/// When the shapes differ.
pub fn layernorm_backward<T: Element, P: Element, U: Element>(
    x: MatRef<'_, T>,
    gamma: &[P],
    eps: f64,
    d_y: MatRef<'_, U>,
) -> NormGrads {
    let n = x.cols();
    let mut grads = NormGrads { d_x: Vec::new(), d_gamma: vec![0.0; n], d_beta: vec![0.0; n] };
    for i in 0..x.rows() {
        let (x, d_y) = (row(x, i), row(d_y, i));
        let (mean, rstd) = moments(&x, eps);
        let normal: Vec<f64> = x.iter().map(|x| (x - mean) * rstd).collect();
        let g: Vec<f64> = (0..n).map(|j| d_y[j] * gamma[j].into()).collect();
        let mean_g = g.iter().sum::<f64>() / n as f64;
        let mean_gx = (0..n).map(|j| g[j] * normal[j]).sum::<f64>() / n as f64;
        for j in 0..n {
            grads.d_x.push(rstd * (g[j] - mean_g - normal[j] * mean_gx));
            grads.d_gamma[j] += d_y[j] * normal[j];
            grads.d_beta[j] += d_y[j];
        }
    }
    grads
}

fn rstd_of(x: &[f64], eps: f64) -> f64 {
    1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + eps).sqrt()
}

/// `y[j] = x[j]/√(Σ x²/n + eps)·gamma[j]` for each row.
///
/// # Panics
/// When the shapes differ.
pub fn rmsnorm_forward<T: Element, P: Element>(x: MatRef<'_, T>, gamma: &[P], eps: f64) -> Vec<f64> {
    by_rows(x, |_, x| {
        let rstd = rstd_of(x, eps);
        (0..x.len()).map(|j| x[j] * rstd * gamma[j].into()).collect()
    })
}

/// The gradients of [`rmsnorm_forward`].
///
/// # Panics
/// When the shapes differ.
pub fn rmsnorm_backward<T: Element, P: Element, U: Element>(
    x: MatRef<'_, T>,
    gamma: &[P],
    eps: f64,
    d_y: MatRef<'_, U>,
) -> NormGrads {
    let n = x.cols();
    let mut grads = NormGrads { d_x: Vec::new(), d_gamma: vec![0.0; n], d_beta: vec![0.0; n] };
    for i in 0..x.rows() {
        let (x, d_y) = (row(x, i), row(d_y, i));
        let rstd = rstd_of(&x, eps);
        let mean = (0..n).map(|j| d_y[j] * gamma[j].into() * x[j] * rstd).sum::<f64>() / n as f64;
        for j in 0..n {
            grads.d_x.push(rstd * (d_y[j] * gamma[j].into() - x[j] * rstd * mean));
            grads.d_gamma[j] += d_y[j] * x[j] * rstd;
        }
    }
    grads
}

/// What a cross entropy compares with.
#[derive(Debug, Clone, Copy)]
pub struct Labels<'a> {
    /// A class for each row.
    pub targets: &'a [u32],
    /// ε: the mass taken from the target and spread over all classes.
    pub smoothing: f64,
    /// Rows with this target count nothing.
    pub ignore: Option<u32>,
}

impl Labels<'_> {
    /// The target distribution of row `i` over `classes`, or `None` when the row is ignored.
    pub fn distribution(&self, i: usize, classes: usize) -> Option<Vec<f64>> {
        if Some(self.targets[i]) == self.ignore {
            return None;
        }
        let mut q = vec![self.smoothing / classes as f64; classes];
        q[self.targets[i] as usize] += 1.0 - self.smoothing;
        Some(q)
    }
}

/// `−Σ q[j]·log softmax(x)[j]` for each row, 0 for ignored rows.
///
/// # Panics
/// When a target is no class.
pub fn cross_entropy_forward<T: Element>(logits: MatRef<'_, T>, labels: Labels) -> Vec<f64> {
    by_rows(logits, |i, x| {
        let Some(q) = labels.distribution(i, x.len()) else { return vec![0.0] };
        let log_p = log_softmax_row(x);
        vec![q.iter().zip(log_p).map(|(&q, log_p)| if q == 0.0 { 0.0 } else { -q * log_p }).sum()]
    })
}

/// `d_loss·(softmax(x)[j] − q[j])` for each row, 0 for ignored rows and rows of −∞.
///
/// # Panics
/// When a target is no class.
pub fn cross_entropy_backward<T: Element, U: Element>(
    logits: MatRef<'_, T>,
    labels: Labels,
    d_loss: &[U],
) -> Vec<f64> {
    by_rows(logits, |i, x| match labels.distribution(i, x.len()) {
        Some(q) if max(x) != f64::NEG_INFINITY => {
            softmax_row(x).iter().zip(q).map(|(p, q)| (p - q) * d_loss[i].into()).collect()
        }
        _ => vec![0.0; x.len()],
    })
}

/// `out[i] = scale·table[ids[i]]`.
///
/// # Panics
/// When an id is no row of the table.
pub fn embedding_forward<T: Element>(table: MatRef<'_, T>, ids: &[u32], scale: f64) -> Vec<f64> {
    ids.iter().flat_map(|&id| row(table, id as usize)).map(|x| scale * x).collect()
}

/// `d_table[ids[i]] += scale·d_out[i]`, from zeros.
///
/// # Panics
/// When an id is not below `vocab`.
pub fn embedding_backward<T: Element>(
    d_out: MatRef<'_, T>,
    ids: &[u32],
    scale: f64,
    vocab: usize,
) -> Vec<f64> {
    let mut d_table = vec![0.0; vocab * d_out.cols()];
    for (i, &id) in ids.iter().enumerate() {
        for j in 0..d_out.cols() {
            d_table[id as usize * d_out.cols() + j] += scale * d_out.at(i, j).into();
        }
    }
    d_table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    const ROWS: usize = 3;
    const COLS: usize = 5;

    fn data(len: usize, seed: u64) -> Vec<f64> {
        testing::uniform(len, seed).into_iter().map(f64::from).collect()
    }

    fn matrix(x: &[f64]) -> MatRef<'_, f64> {
        MatRef::new(x, x.len() / COLS, COLS).unwrap()
    }

    /// Compares `gradient` with the central difference of `Σ weights·f(x)` in every element of x.
    fn check_gradient(x: &[f64], weights: &[f64], gradient: &[f64], f: impl Fn(&[f64]) -> Vec<f64>) {
        let h = 1e-5;
        let total = |x: &[f64]| f(x).iter().zip(weights).map(|(y, w)| y * w).sum::<f64>();
        for i in 0..x.len() {
            let mut moved = x.to_vec();
            moved[i] = x[i] + h;
            let above = total(&moved);
            moved[i] = x[i] - h;
            let slope = (above - total(&moved)) / (2.0 * h);
            // h²·f‴/6 and the cancellation 10⁻¹⁶/h.
            assert!(
                (slope - gradient[i]).abs() <= 1e-8 * (1.0 + slope.abs()),
                "{i}: {slope} {}",
                gradient[i]
            );
        }
    }

    #[test]
    fn softmax_gradients() {
        let (x, w) = (data(ROWS * COLS, 1), data(ROWS * COLS, 2));
        let y = softmax_forward(matrix(&x));
        let d_x = softmax_backward(matrix(&y), matrix(&w));
        check_gradient(&x, &w, &d_x, |x| softmax_forward(matrix(x)));
        let y = log_softmax_forward(matrix(&x));
        let d_x = log_softmax_backward(matrix(&y), matrix(&w));
        check_gradient(&x, &w, &d_x, |x| log_softmax_forward(matrix(x)));
    }

    #[test]
    fn norm_gradients() {
        let (x, w) = (data(ROWS * COLS, 3), data(ROWS * COLS, 4));
        let (gamma, beta) = (data(COLS, 5), data(COLS, 6));
        let g = layernorm_backward(matrix(&x), &gamma, 1e-3, matrix(&w));
        check_gradient(&x, &w, &g.d_x, |x| layernorm_forward(matrix(x), &gamma, &beta, 1e-3));
        check_gradient(&gamma, &w, &g.d_gamma, |gamma| layernorm_forward(matrix(&x), gamma, &beta, 1e-3));
        check_gradient(&beta, &w, &g.d_beta, |beta| layernorm_forward(matrix(&x), &gamma, beta, 1e-3));
        let g = rmsnorm_backward(matrix(&x), &gamma, 1e-3, matrix(&w));
        check_gradient(&x, &w, &g.d_x, |x| rmsnorm_forward(matrix(x), &gamma, 1e-3));
        check_gradient(&gamma, &w, &g.d_gamma, |gamma| rmsnorm_forward(matrix(&x), gamma, 1e-3));
    }

    #[test]
    fn cross_entropy_gradients() {
        let (x, w) = (data(ROWS * COLS, 7), data(ROWS, 8));
        for smoothing in [0.0, 0.1, 1.0] {
            let labels = Labels { targets: &[4, 9, 0], smoothing, ignore: Some(9) };
            let d_x = cross_entropy_backward(matrix(&x), labels, &w);
            assert!(d_x[COLS..2 * COLS].iter().all(|&d| d == 0.0));
            check_gradient(&x, &w, &d_x, |x| cross_entropy_forward(matrix(x), labels));
        }
    }

    #[test]
    fn embedding_gradients() {
        let (table, w) = (data(4 * COLS, 9), data(ROWS * COLS, 10));
        let ids = [2, 0, 2];
        let d_table = embedding_backward(matrix(&w), &ids, 1.5, 4);
        check_gradient(&table, &w, &d_table, |table| embedding_forward(matrix(table), &ids, 1.5));
    }
}
