//! minGRU and minLSTM row by row, channel by channel and step by step, with each gate as the paper writes it.

use super::Real;

/// Which recurrence, over which sums.
///
/// # Shapes
/// gates `[seq, batch, G·hidden]` (columns z n, or f i n), lengths `[batch]`, h0 `[batch, hidden]`.
#[derive(Debug, Clone)]
pub struct MinRnn<'a, T> {
    /// Whether there are the gates f and i instead of z.
    pub lstm: bool,
    /// Whether the candidate is a + ½ where a ≥ 0, else σ(a), instead of a.
    pub positive: bool,
    /// Width of the state.
    pub hidden: usize,
    /// The sums of all gates.
    pub gates: &'a [T],
    /// Steps of each row.
    pub lengths: &'a [usize],
    /// From each row's last step to its first.
    pub reverse: bool,
    /// Initial state.
    pub h0: &'a [T],
}

impl<T: Real> MinRnn<'_, T> {
    fn columns(&self) -> usize {
        if self.lstm { 3 * self.hidden } else { 2 * self.hidden }
    }

    fn seq(&self) -> usize {
        self.gates.len().checked_div(self.lengths.len() * self.columns()).unwrap_or(0)
    }

    fn steps(&self, row: usize) -> Vec<usize> {
        let forward = 0..self.lengths[row];
        if self.reverse { forward.rev().collect() } else { forward.collect() }
    }

    /// Where the sum of gate `gate` of a channel stands.
    fn at(&self, t: usize, row: usize, gate: usize, channel: usize) -> usize {
        (t * self.lengths.len() + row) * self.columns() + gate * self.hidden + channel
    }

    /// The share of the old state, the share of the candidate, and the candidate.
    fn shares(&self, t: usize, row: usize, channel: usize) -> (T, T, T) {
        let sum = |gate| self.gates[self.at(t, row, gate, channel)];
        let a = sum(if self.lstm { 2 } else { 1 });
        let positive = if a < T::zero() { a.sigmoid() } else { a + T::from(0.5) };
        let n = if self.positive { positive } else { a };
        if self.lstm {
            let (f, i) = (sum(0).sigmoid(), sum(1).sigmoid());
            (f / (f + i), i / (f + i), n)
        } else {
            let z = sum(0).sigmoid();
            (T::one() - z, z, n)
        }
    }
}

/// y `[seq, batch, hidden]` with zeros in the padding, and the state after each row's last step.
pub fn min_rnn_forward<T: Real>(rnn: &MinRnn<'_, T>) -> (Vec<T>, Vec<T>) {
    let (batch, hidden) = (rnn.lengths.len(), rnn.hidden);
    let mut y = vec![T::zero(); rnn.seq() * batch * hidden];
    let mut h = rnn.h0.to_vec();
    for row in 0..batch {
        for t in rnn.steps(row) {
            for channel in 0..hidden {
                let (keep, take, n) = rnn.shares(t, row, channel);
                let h = &mut h[row * hidden + channel];
                *h = keep * *h + take * n;
                y[(t * batch + row) * hidden + channel] = *h;
            }
        }
    }
    (y, h)
}

/// The gradients of the gates' sums and of h0, given those of y and of the last state.
pub fn min_rnn_backward<T: Real>(rnn: &MinRnn<'_, T>, d_y: &[T], d_last: &[T]) -> (Vec<T>, Vec<T>) {
    let (batch, hidden) = (rnn.lengths.len(), rnn.hidden);
    let (y, _) = min_rnn_forward(rnn);
    let mut d_gates = vec![T::zero(); rnn.gates.len()];
    let mut d_h = d_last.to_vec();
    for row in 0..batch {
        let steps = rnn.steps(row);
        for channel in 0..hidden {
            let at = |t: usize| (t * batch + row) * hidden + channel;
            let d = &mut d_h[row * hidden + channel];
            for (visit, &t) in steps.iter().enumerate().rev() {
                *d += d_y[at(t)];
                let before =
                    if visit == 0 { rnn.h0[row * hidden + channel] } else { y[at(steps[visit - 1])] };
                let (keep, take, n) = rnn.shares(t, row, channel);
                let sum = |gate| rnn.gates[rnn.at(t, row, gate, channel)];
                let a = sum(if rnn.lstm { 2 } else { 1 });
                let slope = if rnn.positive && a < T::zero() { n * (T::one() - n) } else { T::one() };
                let d_take = *d * (n - before);
                if rnn.lstm {
                    let (f, i) = (sum(0).sigmoid(), sum(1).sigmoid());
                    d_gates[rnn.at(t, row, 0, channel)] = -d_take * take * keep * (T::one() - f);
                    d_gates[rnn.at(t, row, 1, channel)] = d_take * take * keep * (T::one() - i);
                    d_gates[rnn.at(t, row, 2, channel)] = *d * take * slope;
                } else {
                    d_gates[rnn.at(t, row, 0, channel)] = d_take * take * keep;
                    d_gates[rnn.at(t, row, 1, channel)] = *d * take * slope;
                }
                *d = *d * keep;
            }
        }
    }
    (d_gates, d_h)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Central differences in f64 of Σ d·y.
    #[test]
    fn the_backward_is_the_derivative_of_the_forward() {
        let (seq, hidden, lengths) = (4, 3, [4usize, 2, 0]);
        for (lstm, positive, reverse) in
            [(false, false, false), (false, true, true), (true, false, true), (true, true, false)]
        {
            let columns = if lstm { 3 * hidden } else { 2 * hidden };
            let wave =
                |len: usize, k: f64| (0..len).map(|i| (k * (i as f64 + 1.0)).sin()).collect::<Vec<f64>>();
            let mut gates = wave(seq * lengths.len() * columns, 0.7);
            let mut h0 = wave(lengths.len() * hidden, 1.3);
            let (d_y, d_last) = (wave(seq * lengths.len() * hidden, 0.3), wave(lengths.len() * hidden, 0.9));
            let loss = |gates: &[f64], h0: &[f64]| {
                let rnn = MinRnn { lstm, positive, hidden, gates, lengths: &lengths, reverse, h0 };
                let (y, last) = min_rnn_forward(&rnn);
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                dot(&y, &d_y) + dot(&last, &d_last)
            };
            let rnn = MinRnn { lstm, positive, hidden, gates: &gates, lengths: &lengths, reverse, h0: &h0 };
            let (d_gates, d_h0) = min_rnn_backward(&rnn, &d_y, &d_last);
            let step = 1e-5;
            for (i, &d) in d_gates.iter().enumerate() {
                let x = gates[i];
                gates[i] = x + step;
                let up = loss(&gates, &h0);
                gates[i] = x - step;
                let down = loss(&gates, &h0);
                gates[i] = x;
                assert!(((up - down) / (2.0 * step) - d).abs() < 1e-8, "gate {i}: {d}");
            }
            for (i, &d) in d_h0.iter().enumerate() {
                let x = h0[i];
                h0[i] = x + step;
                let up = loss(&gates, &h0);
                h0[i] = x - step;
                let down = loss(&gates, &h0);
                h0[i] = x;
                assert!(((up - down) / (2.0 * step) - d).abs() < 1e-8, "h0 {i}: {d}");
            }
        }
    }
}
