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
//!
//! A NaN or ∞ in the gradient spoils its own element only.

use pulp::{Simd, WithSimd};

use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::lanes;
use crate::rowwise::CHUNK;
use crate::view::{self, MatMut};

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
        lanes::visit(simd, [grad], [param, m, v], |[grad], [param, m, v]| {
            let g = simd.mul_f32s(grad, scale);
            let m = simd.mul_add_e_f32s(step_m, simd.sub_f32s(g, m), m);
            let v = simd.mul_add_e_f32s(step_v, simd.sub_f32s(simd.mul_f32s(g, g), v), v);
            let root = simd.mul_add_e_f32s(simd.sqrt_f32s(v), root_scale, eps);
            let param = simd.mul_f32s(param, decay);
            [simd.negate_mul_add_e_f32s(rate, simd.div_f32s(m, root), param), m, v]
        });
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
