//! The LSTM's gate arithmetic.
//!
//! ```text
//! i = σ(a_i)    f = σ(a_f)    g = tanh(a_g)    o = σ(a_o)        a = W_ih·x + b_ih + W_hh·h + b_hh
//! c' = f·c + i·g
//! h' = o·tanh(c')
//! ```
//! A row of gates is `[i f g o]`. Backward needs i, f, g, o and c: c' is recomputed with the same bits.

use pulp::Simd;

use crate::lanes;
use crate::math;

use super::Window;
use super::gates::quarters;

/// All gates receive the input's product, in the order of the weights.
pub(super) fn input_window(hidden: usize) -> Window {
    Window { columns: 0..4 * hidden, rows: 0..4 * hidden }
}

/// One row: sums to activated gates, old to new state.
///
/// Two loops: the chain sums → c' → tanh c' → h' is so long that one loop keeps too few vectors in flight to
/// hide its latency; apart, the row is read from L1 once more and the pass takes a third less time.
#[inline(always)]
pub(super) fn forward_row<S: Simd>(simd: S, gates: &mut [f32], c_prev: &[f32], h: &mut [f32], c: &mut [f32]) {
    let [i, f, g, o] = quarters(gates);
    lanes::visit(
        simd,
        [c_prev],
        [i, f, g, &mut *o, &mut *c],
        #[inline(always)]
        |[c_prev], [i, f, g, o, _]| {
            let i = math::sigmoid(simd, i);
            let f = math::sigmoid(simd, f);
            let g = math::tanh(simd, g);
            [i, f, g, math::sigmoid(simd, o), new_cell(simd, [i, f, g], c_prev)]
        },
    );
    lanes::zip(
        simd,
        o,
        c,
        h,
        #[inline(always)]
        |o, c| simd.mul_f32s(o, math::tanh(simd, c)),
    );
}

/// c' = f·c + i·g.
#[inline(always)]
pub(super) fn new_cell<S: Simd>(simd: S, [i, f, g]: [S::f32s; 3], c_prev: S::f32s) -> S::f32s {
    simd.mul_add_e_f32s(f, c_prev, simd.mul_f32s(i, g))
}

/// One row: gates to gradients of their sums, `d_c` of the new to that of the old state.
///
/// ```text
/// d_c' = d_c + d_h·o·(1 − tanh² c')
/// d_a_i = d_c'·g·i(1 − i)    d_a_f = d_c'·c·f(1 − f)    d_a_g = d_c'·i·(1 − g²)    d_a_o = d_h·tanh(c')·o(1 − o)
/// d_c  = d_c'·f
/// ```
#[inline(always)]
pub(super) fn backward_row<S: Simd>(
    simd: S,
    gates: &mut [f32],
    c_prev: &[f32],
    d_h: &[f32],
    d_c: &mut [f32],
) {
    let [i, f, g, o] = quarters(gates);
    lanes::visit(
        simd,
        [c_prev, d_h],
        [i, f, g, o, d_c],
        #[inline(always)]
        |[c_prev, d_h], [i, f, g, o, d_c]| {
            let tanh_c = math::tanh(simd, new_cell(simd, [i, f, g], c_prev));
            let d_tanh = simd.mul_f32s(simd.mul_f32s(d_h, o), math::tanh_derivative(simd, tanh_c));
            let d_c = simd.add_f32s(d_c, d_tanh);
            let d_o = simd.mul_f32s(d_h, tanh_c);
            [
                simd.mul_f32s(simd.mul_f32s(d_c, g), math::sigmoid_derivative(simd, i)),
                simd.mul_f32s(simd.mul_f32s(d_c, c_prev), math::sigmoid_derivative(simd, f)),
                simd.mul_f32s(simd.mul_f32s(d_c, i), math::tanh_derivative(simd, g)),
                simd.mul_f32s(d_o, math::sigmoid_derivative(simd, o)),
                simd.mul_f32s(d_c, f),
            ]
        },
    );
}
