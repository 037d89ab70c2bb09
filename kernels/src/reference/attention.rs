//! Attention as loops over every score, forward and backward.

use super::Real;

/// One attention problem; every tensor is [batch, seq, heads, dim] without gaps.
#[derive(Clone, Copy)]
pub struct Attention<'a, T = f64> {
    /// Sequences.
    pub batch: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads; query head `h` reads key head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Queries of a sequence.
    pub seq_q: usize,
    /// Keys of a sequence.
    pub seq_k: usize,
    /// Elements of a query or key.
    pub dim: usize,
    /// Elements of a value.
    pub v_dim: usize,
    /// Queries.
    pub q: &'a [T],
    /// Keys.
    pub k: &'a [T],
    /// Values.
    pub v: &'a [T],
    /// Multiplies q·k.
    pub scale: T,
    /// Added to the scaled scores: [heads, seq_q, seq_k], or [1, seq_q, seq_k] for all heads.
    pub bias: Option<&'a [T]>,
    /// Whether query `i` of a sequence sees key `j`: `sees(batch, i, j)`.
    pub sees: &'a dyn Fn(usize, usize, usize) -> bool,
    /// What dropout multiplies the probability of `(batch, head, query, key)` by before P·V.
    pub factor: Option<&'a dyn Fn([usize; 4]) -> T>,
}

/// The gradients of one attention problem, each of the shape of its input.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionGrads<T = f64> {
    /// Of the queries.
    pub d_q: Vec<T>,
    /// Of the keys.
    pub d_k: Vec<T>,
    /// Of the values.
    pub d_v: Vec<T>,
    /// Of the bias; empty without one.
    pub d_bias: Vec<T>,
}

impl<T: Real> Attention<'_, T> {
    fn q_at(&self, b: usize, i: usize, h: usize) -> usize {
        ((b * self.seq_q + i) * self.heads + h) * self.dim
    }

    fn k_at(&self, b: usize, j: usize, h: usize) -> usize {
        ((b * self.seq_k + j) * self.kv_heads + h / (self.heads / self.kv_heads)) * self.dim
    }

    fn v_at(&self, b: usize, j: usize, h: usize) -> usize {
        ((b * self.seq_k + j) * self.kv_heads + h / (self.heads / self.kv_heads)) * self.v_dim
    }

    fn out_at(&self, b: usize, i: usize, h: usize) -> usize {
        ((b * self.seq_q + i) * self.heads + h) * self.v_dim
    }

    fn bias_at(&self, h: usize, i: usize, j: usize) -> usize {
        let one_for_all = self.bias.is_some_and(|bias| bias.len() == self.seq_q * self.seq_k);
        let head = if one_for_all { 0 } else { h };
        (head * self.seq_q + i) * self.seq_k + j
    }

    fn score(&self, b: usize, h: usize, i: usize, j: usize) -> T {
        if !(self.sees)(b, i, j) {
            return T::from(f32::NEG_INFINITY);
        }
        let mut sum = T::zero();
        for d in 0..self.dim {
            sum += self.q[self.q_at(b, i, h) + d] * self.k[self.k_at(b, j, h) + d];
        }
        let score = self.scale * sum;
        self.bias.map_or(score, |bias| score + bias[self.bias_at(h, i, j)])
    }

    /// The row's probabilities and its log-sum-exp.
    fn row(&self, b: usize, h: usize, i: usize) -> (Vec<T>, T) {
        let mut row: Vec<T> = (0..self.seq_k).map(|j| self.score(b, h, i, j)).collect();
        let top = row.iter().copied().fold(T::from(f32::NEG_INFINITY), |m, x| if x > m { x } else { m });
        if top == T::from(f32::NEG_INFINITY) {
            return (vec![T::zero(); self.seq_k], T::from(f32::NEG_INFINITY));
        }
        let mut sum = T::zero();
        for x in &mut row {
            *x = (*x - top).exp();
            sum += *x;
        }
        row.iter_mut().for_each(|x| *x = *x / sum);
        (row, top + sum.ln())
    }
}

impl<T: Real> Attention<'_, T> {
    fn factor(&self, at: [usize; 4]) -> T {
        self.factor.map_or(T::from(1.0), |factor| factor(at))
    }
}

/// `P = softmax(scale·Q·Kᵀ + bias)` over the keys seen, 0 elsewhere and in rows that see nothing.
///
/// # Shapes
/// [batch, heads, seq_q, seq_k].
pub fn attention_probabilities<T: Real>(a: &Attention<'_, T>) -> Vec<T> {
    let mut all = Vec::new();
    for b in 0..a.batch {
        for h in 0..a.heads {
            for i in 0..a.seq_q {
                all.extend(a.row(b, h, i).0);
            }
        }
    }
    all
}

/// `O = (P ∘ factor)·V` and the log-sum-exp of each row (−∞ where nothing is seen).
///
/// # Shapes
/// O [batch, seq_q, heads, v_dim], log-sum-exp [batch, heads, seq_q].
pub fn attention_forward<T: Real>(a: &Attention<'_, T>) -> (Vec<T>, Vec<T>) {
    let mut out = vec![T::zero(); a.batch * a.seq_q * a.heads * a.v_dim];
    let mut lse = Vec::new();
    for b in 0..a.batch {
        for h in 0..a.heads {
            for i in 0..a.seq_q {
                let (p, row_lse) = a.row(b, h, i);
                lse.push(row_lse);
                for (j, &p) in p.iter().enumerate() {
                    let p = p * a.factor([b, h, i, j]);
                    for d in 0..a.v_dim {
                        let o = &mut out[a.out_at(b, i, h) + d];
                        *o += p * a.v[a.v_at(b, j, h) + d];
                    }
                }
            }
        }
    }
    (out, lse)
}

/// The gradients, by `dP = factor ∘ dO·Vᵀ`, `dS = P ∘ (dP − Σ_j P∘dP)`.
///
/// # Shapes
/// `d_out` as O; each gradient as its input.
pub fn attention_backward<T: Real>(a: &Attention<'_, T>, d_out: &[T]) -> AttentionGrads<T> {
    let mut grads = AttentionGrads {
        d_q: vec![T::zero(); a.q.len()],
        d_k: vec![T::zero(); a.k.len()],
        d_v: vec![T::zero(); a.v.len()],
        d_bias: vec![T::zero(); a.bias.map_or(0, <[T]>::len)],
    };
    for b in 0..a.batch {
        for h in 0..a.heads {
            for i in 0..a.seq_q {
                backward_row(a, d_out, (b, h, i), &mut grads);
            }
        }
    }
    grads
}

fn backward_row<T: Real>(
    a: &Attention<'_, T>,
    d_out: &[T],
    (b, h, i): (usize, usize, usize),
    grads: &mut AttentionGrads<T>,
) {
    let (p, _) = a.row(b, h, i);
    let d_out = &d_out[a.out_at(b, i, h)..][..a.v_dim];
    let mut d_p = vec![T::zero(); a.seq_k];
    let mut delta = T::zero();
    for j in 0..a.seq_k {
        let factor = a.factor([b, h, i, j]);
        for (d, &g) in d_out.iter().enumerate() {
            d_p[j] += g * a.v[a.v_at(b, j, h) + d];
            let d_v = &mut grads.d_v[a.v_at(b, j, h) + d];
            *d_v += p[j] * factor * g;
        }
        d_p[j] = d_p[j] * factor;
        delta += p[j] * d_p[j];
    }
    for j in 0..a.seq_k {
        let d_s = p[j] * (d_p[j] - delta);
        if a.bias.is_some() {
            let d_bias = &mut grads.d_bias[a.bias_at(h, i, j)];
            *d_bias += d_s;
        }
        for d in 0..a.dim {
            let (q, k) = (a.q_at(b, i, h) + d, a.k_at(b, j, h) + d);
            grads.d_q[q] += a.scale * d_s * a.k[k];
            grads.d_k[k] += a.scale * d_s * a.q[q];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, seed: u64) -> Vec<f64> {
        crate::testing::uniform(len, seed).into_iter().map(f64::from).collect()
    }

    /// q, k, v and bias.
    type Inputs = [Vec<f64>; 4];

    fn problem<'a>(
        inputs: &'a Inputs,
        kv_heads: usize,
        sees: &'a dyn Fn(usize, usize, usize) -> bool,
        factor: Option<&'a dyn Fn([usize; 4]) -> f64>,
    ) -> Attention<'a> {
        let [q, k, v, bias] = inputs;
        Attention {
            batch: 2,
            heads: 2,
            kv_heads,
            seq_q: 3,
            seq_k: 4,
            dim: 3,
            v_dim: 2,
            q,
            k,
            v,
            scale: 0.7,
            bias: (!bias.is_empty()).then_some(bias),
            sees,
            factor,
        }
    }

    #[test]
    fn gradients_are_the_central_differences() {
        let sees = |b: usize, i: usize, j: usize| j <= i + 1 && j < [3, 4][b] && i != 2;
        let dropout = |[b, h, i, j]: [usize; 4]| [0.0, 1.5, 2.0][(b + 2 * h + i + j) % 3];
        for (kv_heads, bias_heads, dropped) in [(1, 2, false), (2, 1, true), (2, 0, false)] {
            let factor: Option<&dyn Fn([usize; 4]) -> f64> = if dropped { Some(&dropout) } else { None };
            let lens = [2 * 3 * 2 * 3, 2 * 4 * kv_heads * 3, 2 * 4 * kv_heads * 2, bias_heads * 3 * 4];
            let mut inputs: Inputs = [0, 1, 2, 3].map(|i| values(lens[i], i as u64));
            let w = values(2 * 3 * 2 * 2, 5);
            let grads = attention_backward(&problem(&inputs, kv_heads, &sees, factor), &w);
            let grads = [grads.d_q, grads.d_k, grads.d_v, grads.d_bias];
            let loss = |inputs: &Inputs| -> f64 {
                attention_forward(&problem(inputs, kv_heads, &sees, factor))
                    .0
                    .iter()
                    .zip(&w)
                    .map(|(o, w)| o * w)
                    .sum()
            };
            for (which, grad) in grads.iter().enumerate() {
                assert_eq!(grad.len(), lens[which]);
                for (i, &grad) in grad.iter().enumerate() {
                    let (x, step) = (inputs[which][i], 1e-5);
                    inputs[which][i] = x + step;
                    let above = loss(&inputs);
                    inputs[which][i] = x - step;
                    let below = loss(&inputs);
                    inputs[which][i] = x;
                    let expected = (above - below) / (2.0 * step);
                    assert!((grad - expected).abs() < 1e-9, "input {which}[{i}]: {grad} {expected}");
                }
            }
        }
    }

    #[test]
    fn a_row_that_sees_nothing_is_zero() {
        let one = [1.0];
        let sees = |_: usize, _: usize, _: usize| false;
        let (q, k, v) = (&one[..], &one[..], &one[..]);
        let sizes = Attention {
            batch: 1,
            heads: 1,
            kv_heads: 1,
            seq_q: 1,
            seq_k: 1,
            dim: 1,
            v_dim: 1,
            q,
            k,
            v,
            scale: 1.0,
            bias: None,
            sees: &sees,
            factor: None,
        };
        assert_eq!(attention_forward(&sizes), (vec![0.0], vec![f64::NEG_INFINITY]));
        assert_eq!(attention_probabilities(&sizes), [0.0]);
        assert_eq!(attention_backward(&sizes, &[1.0]).d_q, [0.0]);
    }
}
