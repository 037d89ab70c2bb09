//! The gate arithmetic of the LSTM with peepholes.
//!
//! ```text
//! i = σ(a_i + p_i·c)    f = σ(a_f + p_f·c)    g = tanh(a_g)        a = W_ih·x + b_ih + W_hh·h + b_hh
//! c' = f·c + i·g
//! o = σ(a_o + p_o·c')
//! h' = o·tanh(c')
//! ```
//! A row of gates is `[i f g o]` and three columns a unit more: backward leaves in them the products `d_a·c` of which the
//! peepholes' gradients are the sums over all rows. So the sum of a buffer's columns, which the biases need anyway, gives them
//! too, in an order that no thread changes. Rejected: adding them up step by step, which would depend on who owns a row.

use pulp::Simd;

use crate::lanes;
use crate::math;

use super::gates::quarters;
use super::lstm::new_cell;

/// p_i, p_f and p_o, or what belongs to them.
#[inline(always)]
fn thirds(row: &[f32]) -> [&[f32]; 3] {
    let hidden = row.len() / 3;
    let (i, rest) = row.split_at(hidden);
    let (f, o) = rest.split_at(hidden);
    [i, f, o]
}

/// The columns where backward leaves what the peepholes' gradients are sums of.
pub(super) fn product_columns(hidden: usize) -> std::ops::Range<usize> {
    4 * hidden..7 * hidden
}

/// One row: sums to activated gates, old to new state. In two loops, as the LSTM's: o waits for c'.
#[inline(always)]
pub(super) fn forward_row<S: Simd>(
    simd: S,
    peepholes: &[f32],
    (gates, c_prev): (&mut [f32], &[f32]),
    h: &mut [f32],
    c: &mut [f32],
) {
    let [p_i, p_f, p_o] = thirds(peepholes);
    let [i, f, g, o] = quarters(&mut gates[..4 * c_prev.len()]);
    lanes::visit(
        simd,
        [c_prev, p_i, p_f],
        [i, f, g, &mut *c],
        #[inline(always)]
        |[c_prev, p_i, p_f], [i, f, g, _]| {
            let i = math::sigmoid(simd, simd.mul_add_e_f32s(p_i, c_prev, i));
            let f = math::sigmoid(simd, simd.mul_add_e_f32s(p_f, c_prev, f));
            let g = math::tanh(simd, g);
            [i, f, g, new_cell(simd, [i, f, g], c_prev)]
        },
    );
    lanes::visit(
        simd,
        [&*c, p_o],
        [o, h],
        #[inline(always)]
        |[c, p_o], [o, _]| {
            let o = math::sigmoid(simd, simd.mul_add_e_f32s(p_o, c, o));
            [o, simd.mul_f32s(o, math::tanh(simd, c))]
        },
    );
}

/// One row: gates to gradients of their sums and to the products that the peepholes' gradients are sums of, `d_c` of the new to
/// that of the old state.
///
/// ```text
/// d_a_o = d_h·tanh(c')·o(1 − o)    d_c' = d_c + d_h·o·(1 − tanh² c') + d_a_o·p_o
/// d_a_i = d_c'·g·i(1 − i)    d_a_f = d_c'·c·f(1 − f)    d_a_g = d_c'·i·(1 − g²)
/// d_c  = d_c'·f + d_a_i·p_i + d_a_f·p_f
/// d_p_i = Σ d_a_i·c    d_p_f = Σ d_a_f·c    d_p_o = Σ d_a_o·c'
/// ```
#[inline(always)]
pub(super) fn backward_row<S: Simd>(
    simd: S,
    peepholes: &[f32],
    (gates, c_prev): (&mut [f32], &[f32]),
    d_h: &[f32],
    d_c: &mut [f32],
) {
    let [p_i, p_f, p_o] = thirds(peepholes);
    let hidden = c_prev.len();
    let (gates, products) = gates.split_at_mut(product_columns(hidden).start);
    let [i, f, g, o] = quarters(gates);
    let (q_i, rest) = products.split_at_mut(hidden);
    let (q_f, q_o) = rest.split_at_mut(hidden);
    lanes::visit(
        simd,
        [c_prev, d_h, p_i, p_f, p_o],
        [i, f, g, o, d_c, q_i, q_f, &mut q_o[..hidden]],
        #[inline(always)]
        |[c_prev, d_h, p_i, p_f, p_o], [i, f, g, o, d_c, ..]| {
            let c = new_cell(simd, [i, f, g], c_prev);
            let tanh_c = math::tanh(simd, c);
            let d_tanh = simd.mul_f32s(simd.mul_f32s(d_h, o), math::tanh_derivative(simd, tanh_c));
            let d_o = simd.mul_f32s(simd.mul_f32s(d_h, tanh_c), math::sigmoid_derivative(simd, o));
            let d_c = simd.mul_add_e_f32s(d_o, p_o, simd.add_f32s(d_c, d_tanh));
            let d_i = simd.mul_f32s(simd.mul_f32s(d_c, g), math::sigmoid_derivative(simd, i));
            let d_f = simd.mul_f32s(simd.mul_f32s(d_c, c_prev), math::sigmoid_derivative(simd, f));
            let d_g = simd.mul_f32s(simd.mul_f32s(d_c, i), math::tanh_derivative(simd, g));
            let through_gates = simd.mul_add_e_f32s(d_i, p_i, simd.mul_f32s(d_f, p_f));
            [
                d_i,
                d_f,
                d_g,
                d_o,
                simd.mul_add_e_f32s(d_c, f, through_gates),
                simd.mul_f32s(d_i, c_prev),
                simd.mul_f32s(d_f, c_prev),
                simd.mul_f32s(d_o, c),
            ]
        },
    );
}
