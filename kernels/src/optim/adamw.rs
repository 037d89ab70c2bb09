//! AdamW: Adam with decoupled weight decay.
//!
//! ```text
//! for i:  g = grad_scale·grad[i]
//!         m[i] = beta1·m[i] + (1 − beta1)·g
//!         v[i] = beta2·v[i] + (1 − beta2)·g²
//!         param[i] = param[i] − lr·weight_decay·param[i] − lr·(m[i]/c1) / (√(v[i]/c2) + eps)
//!         c1 = 1 − beta1ᵗ,  c2 = 1 − beta2ᵗ
//! ```
//! - One pass: four reads and three writes an element; memory bounds it. Clipping comes as `grad_scale`, so it
//!   costs no pass of its own.
//! - c1 and c2 are made in f64 once a call, and enter as lr/c1 and 1/√c2.
//! - `m` moves by `(1 − beta1)·(g − m)`, which rounds less than the two products.
//! - A small tensor stays on the calling thread: 256×256 takes it 36 µs, and with a second thread, which sleeps when the call
//!   begins, 51 µs (medians; AMD EPYC Zen 3, 2 cores).
//!
//! A NaN or ∞ in the gradient spoils its own element only.

use pulp::{Simd, WithSimd};

use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::lanes;
use crate::rowwise::CHUNK;
use crate::view::{self, MatMut};

/// Up to so many elements no second thread is asked.
const ALONE: usize = 4 * CHUNK;

/// The hyperparameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

impl Default for AdamW {
    /// PyTorch's numbers, without weight decay.
    fn default() -> AdamW {
        AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// The numbers of one step.
#[derive(Clone, Copy)]
struct Step {
    spec: AdamW,
    grad_scale: f32,
    /// lr / (1 − beta1ᵗ).
    rate: f32,
    /// 1 / √(1 − beta2ᵗ).
    root_scale: f32,
}

/// The four buffers of a tensor, equally long.
#[derive(Debug)]
pub struct Buffers<'a> {
    /// The parameters.
    pub param: &'a mut [f32],
    /// Their gradient.
    pub grad: &'a [f32],
    /// The first moment.
    pub m: &'a mut [f32],
    /// The second moment.
    pub v: &'a mut [f32],
}

struct Update<'a>(Step, Buffers<'a>);

impl WithSimd for Update<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Update(Step { spec, grad_scale, rate, root_scale }, Buffers { param, grad, m, v }) = self;
        let splat = |x: f32| simd.splat_f32s(x);
        let (scale, rate, root_scale) = (splat(grad_scale), splat(rate), splat(root_scale));
        let (step_m, step_v) = (splat(1.0 - spec.beta1), splat(1.0 - spec.beta2));
        let (eps, decay) = (splat(spec.eps), splat(1.0 - spec.lr * spec.weight_decay));
        lanes::visit_aligned(
            simd,
            [grad],
            [param, m, v],
            #[inline(always)]
            |[grad], [param, m, v]| {
                let g = simd.mul_f32s(grad, scale);
                let m = simd.mul_add_e_f32s(step_m, simd.sub_f32s(g, m), m);
                let v = simd.mul_add_e_f32s(step_v, simd.sub_f32s(simd.mul_f32s(g, g), v), v);
                let root = simd.mul_add_e_f32s(simd.sqrt_f32s(v), root_scale, eps);
                let param = simd.mul_f32s(param, decay);
                [simd.negate_mul_add_e_f32s(rate, simd.div_f32s(m, root), param), m, v]
            },
        );
    }
}

/// One step of AdamW on one tensor, in place. `t` counts from 1; the gradient is multiplied by `grad_scale`
/// first (1, or the factor of clipping by the global norm).
///
/// # Shapes
/// param, grad, m, v: equally long; m and v start as zeros.
///
/// # Errors
/// [`ShapeError`] when the lengths differ or t is 0.
///
/// Accuracy: a few roundings an element (`optim::adamw::tests`).
///
/// # Source
/// Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
pub fn step(
    ctx: &Context,
    spec: &AdamW,
    t: u64,
    grad_scale: f32,
    buffers: Buffers,
) -> Result<(), ShapeError> {
    let Buffers { param, grad, m, v } = buffers;
    let len = param.len();
    expect_dim("grad", "length", len, grad.len())?;
    expect_dim("m", "length", len, m.len())?;
    expect_dim("v", "length", len, v.len())?;
    if t == 0 {
        return Err(ShapeError::Value { argument: "t", value: "0".into(), expected: "a step from 1 on" });
    }
    let correction = |beta: f32| 1.0 - f64::from(beta).powf(t as f64);
    let rate = (f64::from(spec.lr) / correction(spec.beta1)) as f32;
    let root_scale = correction(spec.beta2).sqrt().recip() as f32;
    let step = Step { spec: *spec, grad_scale, rate, root_scale };
    let ctx = &if len <= ALONE { ctx.single_threaded() } else { *ctx };
    let column = |slice| Ok((MatMut::new(slice, len, 1)?, CHUNK));
    view::zip_row_blocks(ctx, column(param)?, column(m)?, column(v)?, |index, (mut param, mut m, mut v)| {
        let grad = &grad[index * CHUNK..][..param.rows()];
        let contiguous = "a block of a slice is a slice";
        let buffers = Buffers {
            param: param.as_mut_slice().expect(contiguous),
            grad,
            m: m.as_mut_slice().expect(contiguous),
            v: v.as_mut_slice().expect(contiguous),
        };
        ctx.isa().dispatch(Update(step, buffers));
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::reference::{AdamWSpec, adamw_step};
    use crate::testing::{UNIT_ROUNDOFF as U, assert_same_bits, for_each_isa, uniform};

    const SPEC: AdamW = AdamW { lr: 3e-3, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.01 };

    fn wide(x: f32) -> f64 {
        f64::from(x)
    }

    /// Steps from the kernel's own rounded state, so that each step's error is bounded by itself.
    #[test]
    fn each_step_is_within_its_roundings() {
        let oracle = AdamWSpec {
            lr: wide(SPEC.lr),
            beta1: wide(SPEC.beta1),
            beta2: wide(SPEC.beta2),
            eps: wide(SPEC.eps),
            weight_decay: wide(SPEC.weight_decay),
        };
        for_each_isa(|ctx| {
            for len in [0, 1, 7, 8, 9, 31, 65, 200] {
                let mut param = uniform(len, 1);
                let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
                for t in 1..=20 {
                    let grad = uniform(len, 100 + t);
                    let scaled: Vec<f64> = grad.iter().map(|&g| wide(g * 0.5)).collect();
                    let mut exact: Vec<[f64; 3]> =
                        (0..len).map(|i| [param[i], m[i], v[i]].map(wide)).collect();
                    let before = exact.clone();
                    adamw_step(&oracle, t, &scaled, &mut exact);
                    let buffers = Buffers { param: &mut param, grad: &grad, m: &mut m, v: &mut v };
                    step(ctx, &SPEC, t, 0.5, buffers).unwrap();
                    for i in 0..len {
                        let ([p, m_old, _], [p_new, m_new, v_new], g) = (before[i], exact[i], scaled[i]);
                        // Exact: 1 − β (β in ½..1), the scaled gradient. v is a sum of positive terms.
                        let off_m = 4.0 * U * (m_new.abs() + 0.1 * (g.abs() + m_old.abs()));
                        assert!((wide(m[i]) - m_new).abs() <= off_m);
                        assert!((wide(v[i]) - v_new).abs() <= 5.0 * U * v_new);
                        let c = |beta: f64| 1.0 - beta.powf(t as f64);
                        let root = (v_new / c(oracle.beta2)).sqrt() + oracle.eps;
                        let rate = oracle.lr / c(oracle.beta1) / root;
                        let off = 5.0 * U * p.abs() + rate * (1.01 * off_m + 12.0 * U * m_new.abs());
                        assert!((wide(param[i]) - p_new).abs() <= off, "step {t}, {i}: {} {p_new}", param[i]);
                    }
                }
            }
        });
    }

    #[test]
    fn threads_change_no_bits_and_mistakes_are_errors() {
        let len = ALONE + 2 * CHUNK + 5;
        for_each_isa(|ctx| {
            let run = |threads: usize| {
                let ctx = ctx.threads(NonZeroUsize::new(threads).unwrap());
                let (mut param, grad) = (uniform(len, 1), uniform(len, 2));
                let (mut m, mut v) = (uniform(len, 3), vec![0.5; len]);
                let buffers = Buffers { param: &mut param, grad: &grad, m: &mut m, v: &mut v };
                step(&ctx, &SPEC, 3, 1.0, buffers).unwrap();
                [param, m, v].concat()
            };
            assert_same_bits(&run(1), &run(3));
            let (mut a, mut b, mut c) = ([1.0; 2], [0.0; 2], [0.0; 2]);
            let buffers = Buffers { param: &mut a, grad: &[1.0; 2], m: &mut b, v: &mut c };
            let error = step(ctx, &SPEC, 0, 1.0, buffers).unwrap_err();
            assert!(error.to_string().contains("t is 0"), "{error}");
            let buffers = Buffers { param: &mut a, grad: &[1.0], m: &mut b, v: &mut c };
            let error = step(ctx, &SPEC, 1, 1.0, buffers).unwrap_err();
            assert!(error.to_string().contains("grad: length is 1, expected 2"), "{error}");
            assert_eq!(a, [1.0; 2]);
        });
    }
}
