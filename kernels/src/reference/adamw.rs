//! AdamW in f64.

/// The hyperparameters of [`adamw_step`].
#[derive(Debug, Clone, Copy)]
pub struct AdamWSpec {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// Step `t` (from 1) in place: `[param, m, v]` of each element, with its gradient.
///
/// # Source
/// Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2, the schedule multiplier inside `lr`.
pub fn adamw_step(spec: &AdamWSpec, t: u64, grad: &[f64], state: &mut [[f64; 3]]) {
    for (g, [param, m, v]) in grad.iter().zip(state) {
        *m = spec.beta1 * *m + (1.0 - spec.beta1) * g;
        *v = spec.beta2 * *v + (1.0 - spec.beta2) * g * g;
        let m_hat = *m / (1.0 - spec.beta1.powf(t as f64));
        let v_hat = *v / (1.0 - spec.beta2.powf(t as f64));
        *param -= spec.lr * spec.weight_decay * *param + spec.lr * m_hat / (v_hat.sqrt() + spec.eps);
    }
}
