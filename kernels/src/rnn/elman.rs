//! The plain recurrent cell: one activation, no gate.
//!
//! ```text
//! h' = f(a)        f = tanh or ReLU        a = W_ih·x + b_ih + W_hh·h + b_hh
//! ```
//! A row of gates is h' itself: both derivatives are functions of the value.
//!
//! # Source
//! Elman 1990, *Finding Structure in Time*; with ReLU, Le, Jaitly and Hinton 2015 (arXiv:1504.00941).

use pulp::Simd;

use crate::lanes;
use crate::math;

use super::Window;

/// The activation of a plain cell.
#[derive(Clone, Copy)]
pub(super) enum Plain {
    Tanh,
    Relu,
}

/// All columns receive the input's product.
pub(super) fn input_window(hidden: usize) -> Window {
    Window { columns: 0..hidden, rows: 0..hidden }
}

/// One row: sums to activated values, which are the new state.
#[inline(always)]
pub(super) fn forward_row<S: Simd>(simd: S, f: Plain, gates: &mut [f32], h: &mut [f32]) {
    lanes::visit(
        simd,
        [],
        [gates, h],
        #[inline(always)]
        |[], [a, _]| {
            let y = match f {
                Plain::Tanh => math::tanh(simd, a),
                Plain::Relu => simd.max_f32s(a, simd.splat_f32s(0.0)),
            };
            [y, y]
        },
    );
}

/// One row: the new state, which the gates hold, to the gradient of its sum, `d_h·f'`.
#[inline(always)]
pub(super) fn backward_row<S: Simd>(simd: S, f: Plain, gates: &mut [f32], d_h: &[f32]) {
    let zero = simd.splat_f32s(0.0);
    lanes::update(
        simd,
        d_h,
        gates,
        #[inline(always)]
        |d_h, y| match f {
            Plain::Tanh => simd.mul_f32s(d_h, math::tanh_derivative(simd, y)),
            Plain::Relu => simd.select_f32s(simd.greater_than_f32s(y, zero), d_h, zero),
        },
    );
}
