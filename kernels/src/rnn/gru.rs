//! The GRU's gate arithmetic.
//!
//! ```text
//! r = σ(W_ir·x + b_ir + W_hr·h + b_hr)
//! z = σ(W_iz·x + b_iz + W_hz·h + b_hz)
//! q = W_hn·h + b_hn
//! n = tanh(W_in·x + b_in + r·q)
//! h' = (1 − z)·n + z·h
//! ```
//! The candidate's two parts must stay apart, so a row of gates has four columns a unit, `[n r z q]`: the
//! state's product (r, z, n in the weights) falls onto the columns `r z q` without a gap, in one call; the
//! input's falls onto `r z` and onto `n`.

use pulp::Simd;

use crate::lanes;
use crate::math;

use super::Window;
use super::gates::quarters;

use std::ops::Range;

/// The weights' r and z rows go to the columns r and z, the n rows to the column n.
pub(super) fn input_windows(hidden: usize) -> [Window; 2] {
    [
        Window { columns: hidden..3 * hidden, rows: 0..2 * hidden },
        Window { columns: 0..hidden, rows: 2 * hidden..3 * hidden },
    ]
}

/// The columns r, z, q.
pub(super) fn recurrent_columns(hidden: usize) -> Range<usize> {
    hidden..4 * hidden
}

/// One row: sums to activated gates, old to new state. In two loops, as the LSTM's.
#[inline(always)]
pub(super) fn forward_row<S: Simd>(simd: S, gates: &mut [f32], h_prev: &[f32], h: &mut [f32]) {
    let hidden = h.len();
    lanes::map_in_place(
        simd,
        &mut gates[hidden..3 * hidden],
        #[inline(always)]
        |x| math::sigmoid(simd, x),
    );
    let [n, r, z, q] = quarters(gates);
    lanes::visit(
        simd,
        [h_prev, r, z, q],
        [n, h],
        #[inline(always)]
        |[h_prev, r, z, q], [n, _]| {
            let n = math::tanh(simd, simd.mul_add_e_f32s(r, q, n));
            [n, simd.mul_add_e_f32s(z, simd.sub_f32s(h_prev, n), n)]
        },
    );
}

/// One row: gates to gradients of their sums, `d_h` of the new state to its direct part for the old.
///
/// ```text
/// d_a_n = d_h·(1 − z)·(1 − n²)    d_a_z = d_h·(h − n)·z(1 − z)    d_a_r = d_a_n·q·r(1 − r)    d_q = d_a_n·r
/// d_h  ← d_h·z
/// ```
#[inline(always)]
pub(super) fn backward_row<S: Simd>(simd: S, gates: &mut [f32], h_prev: &[f32], d_h: &mut [f32]) {
    let one = simd.splat_f32s(1.0);
    let [n, r, z, q] = quarters(gates);
    lanes::visit(
        simd,
        [h_prev],
        [n, r, z, q, d_h],
        #[inline(always)]
        |[h_prev], [n, r, z, q, d_h]| {
            let d_candidate = simd.mul_f32s(d_h, simd.sub_f32s(one, z));
            let d_n = simd.mul_f32s(d_candidate, math::tanh_derivative(simd, n));
            let d_z = simd.mul_f32s(d_h, simd.sub_f32s(h_prev, n));
            [
                d_n,
                simd.mul_f32s(simd.mul_f32s(d_n, q), math::sigmoid_derivative(simd, r)),
                simd.mul_f32s(d_z, math::sigmoid_derivative(simd, z)),
                simd.mul_f32s(d_n, r),
                simd.mul_f32s(d_h, z),
            ]
        },
    );
}
