//! Additive (Bahdanau) attention as loops over batch, queries, keys and width.

use super::recurrent::Real;

/// Additive attention and its inputs, gapless and batch-major.
///
/// # Shapes
/// query `[batch, T, A]`, keys `[batch, S, A]`, v `[A]`, values `[batch, S, E]`, lengths `[batch]`.
#[derive(Debug, Clone)]
pub struct AdditiveAttention<'a, T> {
    /// T: queries of an entry.
    pub queries: usize,
    /// S: keys of an entry.
    pub keys_len: usize,
    /// E: width of a value.
    pub dim: usize,
    /// Projected queries.
    pub query: &'a [T],
    /// Projected keys.
    pub keys: &'a [T],
    /// Score vector.
    pub v: &'a [T],
    /// What is averaged.
    pub values: &'a [T],
    /// How many keys count.
    pub lengths: &'a [usize],
}

/// Gradients of what [`AdditiveAttention`] holds, in the same shapes.
#[derive(Debug, Clone, PartialEq)]
pub struct AdditiveAttentionGrads<T> {
    /// Of the queries.
    pub d_query: Vec<T>,
    /// Of the keys.
    pub d_keys: Vec<T>,
    /// Of v.
    pub d_v: Vec<T>,
    /// Of the values.
    pub d_values: Vec<T>,
}

impl<T: Real> AdditiveAttention<'_, T> {
    fn tanh(&self, b: usize, t: usize, s: usize, a: usize) -> T {
        let width = self.v.len();
        let q = self.query[(b * self.queries + t) * width + a];
        (q + self.keys[(b * self.keys_len + s) * width + a]).tanh()
    }

    fn weights(&self, b: usize, t: usize) -> Vec<T> {
        let score = |s| (0..self.v.len()).map(|a| self.v[a] * self.tanh(b, t, s, a)).sum::<T>();
        let scores: Vec<T> = (0..self.lengths[b]).map(score).collect();
        let max = scores.iter().copied().fold(T::from(f32::NEG_INFINITY), |m, x| if x > m { x } else { m });
        let sum = scores.iter().map(|&x| (x - max).exp()).sum::<T>();
        scores.iter().map(|&x| (x - max).exp() / sum).collect()
    }
}

/// α `[batch, T, S]` and context `[batch, T, E]`: `softmax_s(Σ_a v_a·tanh(q + k))` over the keys before the length.
///
/// # Panics
/// When a slice is shorter than its shape.
pub fn additive_attention_forward<T: Real>(p: &AdditiveAttention<'_, T>) -> (Vec<T>, Vec<T>) {
    let (batch, dim) = (p.lengths.len(), p.dim);
    let mut alpha = vec![T::zero(); batch * p.queries * p.keys_len];
    let mut context = vec![T::zero(); batch * p.queries * dim];
    for b in 0..batch {
        for t in 0..p.queries {
            let row = b * p.queries + t;
            for (s, weight) in p.weights(b, t).into_iter().enumerate() {
                alpha[row * p.keys_len + s] = weight;
                for e in 0..dim {
                    context[row * dim + e] += weight * p.values[(b * p.keys_len + s) * dim + e];
                }
            }
        }
    }
    (alpha, context)
}

/// The gradients of [`additive_attention_forward`] for gradients of α and of the context.
///
/// # Panics
/// When a slice is shorter than its shape.
pub fn additive_attention_backward<T: Real>(
    p: &AdditiveAttention<'_, T>,
    d_alpha: &[T],
    d_context: &[T],
) -> AdditiveAttentionGrads<T> {
    let (dim, width) = (p.dim, p.v.len());
    let zeros = |len: usize| vec![T::zero(); len];
    let mut grads = AdditiveAttentionGrads {
        d_query: zeros(p.query.len()),
        d_keys: zeros(p.keys.len()),
        d_v: zeros(width),
        d_values: zeros(p.values.len()),
    };
    for b in 0..p.lengths.len() {
        for t in 0..p.queries {
            let row = b * p.queries + t;
            let alpha = p.weights(b, t);
            let mut d_weights = vec![];
            for (s, &weight) in alpha.iter().enumerate() {
                let mut d_weight = d_alpha[row * p.keys_len + s];
                for e in 0..dim {
                    let at = (b * p.keys_len + s) * dim + e;
                    d_weight += d_context[row * dim + e] * p.values[at];
                    grads.d_values[at] += weight * d_context[row * dim + e];
                }
                d_weights.push(d_weight);
            }
            let mean = alpha.iter().zip(&d_weights).map(|(&a, &d)| a * d).sum::<T>();
            for (s, (&weight, &d_weight)) in alpha.iter().zip(&d_weights).enumerate() {
                let d_score = weight * (d_weight - mean);
                for a in 0..width {
                    let tanh = p.tanh(b, t, s, a);
                    let d_sum = d_score * p.v[a] * (T::one() - tanh * tanh);
                    grads.d_v[a] += d_score * tanh;
                    grads.d_query[row * width + a] += d_sum;
                    grads.d_keys[(b * p.keys_len + s) * width + a] += d_sum;
                }
            }
        }
    }
    grads
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTHS: [usize; 3] = [3, 0, 2];

    fn values(len: usize, seed: f64) -> Vec<f64> {
        (0..len).map(|i| (seed + 1.7 * i as f64).sin()).collect()
    }

    fn problem(p: &[Vec<f64>; 4]) -> AdditiveAttention<'_, f64> {
        let [query, keys, v, values] = p.each_ref().map(Vec::as_slice);
        AdditiveAttention { queries: 2, keys_len: 3, dim: 5, query, keys, v, values, lengths: &LENGTHS }
    }

    /// Central differences; with a step of 1e-5 their own error is about 1e-10.
    #[test]
    fn gradients_are_central_differences() {
        let mut p = [values(24, 1.0), values(36, 2.0), values(4, 3.0), values(45, 4.0)];
        let (d_alpha, d_context) = (values(18, 5.0), values(30, 6.0));
        let grads = additive_attention_backward(&problem(&p), &d_alpha, &d_context);
        let grads = [grads.d_query, grads.d_keys, grads.d_v, grads.d_values];
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        for (which, grad) in grads.iter().enumerate() {
            for (i, &analytic) in grad.iter().enumerate() {
                let value = p[which][i];
                let mut at = |x: f64| {
                    p[which][i] = x;
                    let (alpha, context) = additive_attention_forward(&problem(&p));
                    dot(&alpha, &d_alpha) + dot(&context, &d_context)
                };
                let numeric = (at(value + 1e-5) - at(value - 1e-5)) / 2e-5;
                p[which][i] = value;
                assert!((numeric - analytic).abs() < 1e-8, "tensor {which}[{i}]: {analytic} and {numeric}");
            }
        }
    }

    #[test]
    fn an_entry_without_keys_is_zero() {
        let p = [values(24, 1.0), values(36, 2.0), values(4, 3.0), values(45, 4.0)];
        let (alpha, context) = additive_attention_forward(&problem(&p));
        assert!(alpha[6..12].iter().chain(&context[10..20]).all(|&x| x == 0.0));
        assert!((alpha[..3].iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }
}
