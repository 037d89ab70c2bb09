//! The gate arithmetic of the GRU whose reset gate acts before the recurrent product.
//!
//! ```text
//! r = σ(W_ir·x + b_ir + W_hr·h + b_hr)
//! z = σ(W_iz·x + b_iz + W_hz·h + b_hz)
//! q = r·h
//! n = tanh(W_in·x + b_in + W_hn·q + b_hn)
//! h' = (1 − z)·n + z·h
//! ```
//! The candidate's product waits for r, so a step has two products and a pass between them, each way; that is the
//! price of this convention, and why libraries prefer the other. A row of gates is `[n r z q]` as the other GRU's:
//! backward finds in q what `W_hn` was multiplied with, and leaves it there for the weights' gradient.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::context::Context;
use crate::lanes;
use crate::math;
use crate::view::{MatMut, MatRef};

use super::Window;
use super::gates::quarters;

/// The state's rows r and z, then, multiplied with q, the rows n.
pub(super) fn state_windows(hidden: usize) -> [Window; 2] {
    [
        Window { columns: hidden..3 * hidden, rows: 0..2 * hidden },
        Window { columns: 0..hidden, rows: 2 * hidden..3 * hidden },
    ]
}

/// The column q.
pub(super) fn reset_columns(hidden: usize) -> Range<usize> {
    3 * hidden..4 * hidden
}

/// Between the products, forward: r and z from their sums, q from r and the old state.
pub(super) fn reset(ctx: &Context, gates: MatMut<'_>, h_prev: MatRef<'_>) {
    ctx.isa().dispatch(Reset { gates, h_prev });
}

struct Reset<'a> {
    gates: MatMut<'a>,
    h_prev: MatRef<'a>,
}

impl WithSimd for Reset<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Reset { mut gates, h_prev } = self;
        for row in 0..gates.rows() {
            let h_prev = h_prev.row(row);
            let gates = gates.row_mut(row);
            lanes::map_in_place(
                simd,
                &mut gates[h_prev.len()..3 * h_prev.len()],
                #[inline(always)]
                |x| math::sigmoid(simd, x),
            );
            let [_, r, _, q] = quarters(gates);
            lanes::zip(
                simd,
                r,
                h_prev,
                q,
                #[inline(always)]
                |r, h_prev| simd.mul_f32s(r, h_prev),
            );
        }
    }
}

/// One row after both products: the candidate from its sum, old to new state.
#[inline(always)]
pub(super) fn forward_row<S: Simd>(simd: S, gates: &mut [f32], h_prev: &[f32], h: &mut [f32]) {
    let [n, _, z, _] = quarters(gates);
    lanes::visit(
        simd,
        [h_prev, z],
        [n, h],
        #[inline(always)]
        |[h_prev, z], [n, _]| {
            let n = math::tanh(simd, n);
            [n, simd.mul_add_e_f32s(z, simd.sub_f32s(h_prev, n), n)]
        },
    );
}

/// One row: n and z to gradients of their sums, `d_h` of the new state to its direct part for the old; r and q stay.
///
/// ```text
/// d_a_n = d_h·(1 − z)·(1 − n²)    d_a_z = d_h·(h − n)·z(1 − z)    d_h ← d_h·z
/// ```
#[inline(always)]
pub(super) fn backward_row<S: Simd>(simd: S, gates: &mut [f32], h_prev: &[f32], d_h: &mut [f32]) {
    let one = simd.splat_f32s(1.0);
    let [n, _, z, _] = quarters(gates);
    lanes::visit(
        simd,
        [h_prev],
        [n, z, d_h],
        #[inline(always)]
        |[h_prev], [n, z, d_h]| {
            let d_candidate = simd.mul_f32s(d_h, simd.sub_f32s(one, z));
            let d_z = simd.mul_f32s(d_h, simd.sub_f32s(h_prev, n));
            [
                simd.mul_f32s(d_candidate, math::tanh_derivative(simd, n)),
                simd.mul_f32s(d_z, math::sigmoid_derivative(simd, z)),
                simd.mul_f32s(d_h, z),
            ]
        },
    );
}

/// Between the products, backward: `d_q = d_a_n·W_hn` to the gradient of r's sum and to a part of `d_h`.
///
/// ```text
/// d_a_r = d_q·h·r(1 − r)    d_h ← d_h + d_q·r
/// ```
pub(super) fn reset_backward(
    ctx: &Context,
    gates: MatMut<'_>,
    h_prev: MatRef<'_>,
    d_q: MatRef<'_>,
    d_h: MatMut<'_>,
) {
    ctx.isa().dispatch(ResetBackward { gates, h_prev, d_q, d_h });
}

struct ResetBackward<'a> {
    gates: MatMut<'a>,
    h_prev: MatRef<'a>,
    d_q: MatRef<'a>,
    d_h: MatMut<'a>,
}

impl WithSimd for ResetBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let ResetBackward { mut gates, h_prev, d_q, mut d_h } = self;
        for row in 0..gates.rows() {
            let [_, r, _, _] = quarters(gates.row_mut(row));
            lanes::visit(
                simd,
                [h_prev.row(row), d_q.row(row)],
                [r, d_h.row_mut(row)],
                #[inline(always)]
                |[h_prev, d_q], [r, d_h]| {
                    let d_r = simd.mul_f32s(simd.mul_f32s(d_q, h_prev), math::sigmoid_derivative(simd, r));
                    [d_r, simd.mul_add_e_f32s(d_q, r, d_h)]
                },
            );
        }
    }
}
