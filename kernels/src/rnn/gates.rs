//! The pass over the gates after the state's product: one read and one write of each value.
//!
//! Naively every gate is its own activation over its own matrix, and the state update three more passes.
//! Here a row's gates, old state and new state are visited once, a vector at a time, while the product's
//! result is still in the cache; the activated gates replace the sums, because backward wants exactly them.
//! What backward can recompute from them with a few operations (tanh c) is not stored.

use pulp::{Simd, WithSimd};

use crate::context::Context;
use crate::view::{MatMut, MatRef};

use super::elman::{self, Plain};
use super::{Cell, gru, gru_reset_before, lstm, lstm_peephole};

/// Rows of one step, forward.
pub(super) struct Forward<'a> {
    /// Sums in, activated gates out.
    pub(super) gates: MatMut<'a>,
    /// Of the rows' units; empty for a cell that has none.
    pub(super) peepholes: &'a [f32],
    /// State before the step; `c` has no columns for a cell without it.
    pub(super) h_prev: MatRef<'a>,
    pub(super) c_prev: MatRef<'a>,
    /// State after the step.
    pub(super) h: MatMut<'a>,
    pub(super) c: MatMut<'a>,
}

/// Rows of one step, backward.
pub(super) struct Backward<'a> {
    /// Activated gates in, gradients of the sums out.
    pub(super) gates: MatMut<'a>,
    /// Of the rows' units; empty for a cell that has none.
    pub(super) peepholes: &'a [f32],
    /// State before the step.
    pub(super) h_prev: MatRef<'a>,
    pub(super) c_prev: MatRef<'a>,
    /// Gradient of the state after the step in; out, the part of the gradient of the state before it that
    /// does not go through the recurrent product (only the GRUs have one; the others leave `d_h` as it was).
    pub(super) d_h: MatMut<'a>,
    pub(super) d_c: MatMut<'a>,
}

/// Activates the gates and updates the state, after the state's products.
pub(super) fn forward(ctx: &Context, cell: Cell, rows: Forward<'_>) {
    match cell {
        Cell::Lstm => ctx.isa().dispatch(LstmForward(rows)),
        Cell::LstmPeephole => ctx.isa().dispatch(LstmPeepholeForward(rows)),
        Cell::Gru => ctx.isa().dispatch(GruForward(rows)),
        Cell::GruResetBefore => ctx.isa().dispatch(GruResetBeforeForward(rows)),
        Cell::Tanh => ctx.isa().dispatch(PlainForward(rows, Plain::Tanh)),
        Cell::Relu => ctx.isa().dispatch(PlainForward(rows, Plain::Relu)),
    }
}

/// Turns gates into the gradients of their sums, and the state's gradient one step back, before the state's products.
pub(super) fn backward(ctx: &Context, cell: Cell, rows: Backward<'_>) {
    match cell {
        Cell::Lstm => ctx.isa().dispatch(LstmBackward(rows)),
        Cell::LstmPeephole => ctx.isa().dispatch(LstmPeepholeBackward(rows)),
        Cell::Gru => ctx.isa().dispatch(GruBackward(rows)),
        Cell::GruResetBefore => ctx.isa().dispatch(GruResetBeforeBackward(rows)),
        Cell::Tanh => ctx.isa().dispatch(PlainBackward(rows, Plain::Tanh)),
        Cell::Relu => ctx.isa().dispatch(PlainBackward(rows, Plain::Relu)),
    }
}

struct LstmForward<'a>(Forward<'a>);

impl WithSimd for LstmForward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Forward { mut gates, c_prev, mut h, mut c, .. } = self.0;
        for row in 0..gates.rows() {
            lstm::forward_row(simd, gates.row_mut(row), c_prev.row(row), h.row_mut(row), c.row_mut(row));
        }
    }
}

struct LstmBackward<'a>(Backward<'a>);

impl WithSimd for LstmBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Backward { mut gates, c_prev, d_h, mut d_c, .. } = self.0;
        for row in 0..gates.rows() {
            let d_h = d_h.as_ref();
            lstm::backward_row(simd, gates.row_mut(row), c_prev.row(row), d_h.row(row), d_c.row_mut(row));
        }
    }
}

struct LstmPeepholeForward<'a>(Forward<'a>);

impl WithSimd for LstmPeepholeForward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Forward { mut gates, peepholes, c_prev, mut h, mut c, .. } = self.0;
        for row in 0..gates.rows() {
            let old = (gates.row_mut(row), c_prev.row(row));
            lstm_peephole::forward_row(simd, peepholes, old, h.row_mut(row), c.row_mut(row));
        }
    }
}

struct LstmPeepholeBackward<'a>(Backward<'a>);

impl WithSimd for LstmPeepholeBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Backward { mut gates, peepholes, c_prev, d_h, mut d_c, .. } = self.0;
        for row in 0..gates.rows() {
            let old = (gates.row_mut(row), c_prev.row(row));
            lstm_peephole::backward_row(simd, peepholes, old, d_h.as_ref().row(row), d_c.row_mut(row));
        }
    }
}

struct GruForward<'a>(Forward<'a>);

impl WithSimd for GruForward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Forward { mut gates, h_prev, mut h, .. } = self.0;
        for row in 0..gates.rows() {
            gru::forward_row(simd, gates.row_mut(row), h_prev.row(row), h.row_mut(row));
        }
    }
}

struct GruBackward<'a>(Backward<'a>);

impl WithSimd for GruBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Backward { mut gates, h_prev, mut d_h, .. } = self.0;
        for row in 0..gates.rows() {
            gru::backward_row(simd, gates.row_mut(row), h_prev.row(row), d_h.row_mut(row));
        }
    }
}

struct GruResetBeforeForward<'a>(Forward<'a>);

impl WithSimd for GruResetBeforeForward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Forward { mut gates, h_prev, mut h, .. } = self.0;
        for row in 0..gates.rows() {
            gru_reset_before::forward_row(simd, gates.row_mut(row), h_prev.row(row), h.row_mut(row));
        }
    }
}

struct GruResetBeforeBackward<'a>(Backward<'a>);

impl WithSimd for GruResetBeforeBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Backward { mut gates, h_prev, mut d_h, .. } = self.0;
        for row in 0..gates.rows() {
            gru_reset_before::backward_row(simd, gates.row_mut(row), h_prev.row(row), d_h.row_mut(row));
        }
    }
}

struct PlainForward<'a>(Forward<'a>, Plain);

impl WithSimd for PlainForward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let PlainForward(Forward { mut gates, mut h, .. }, f) = self;
        for row in 0..gates.rows() {
            elman::forward_row(simd, f, gates.row_mut(row), h.row_mut(row));
        }
    }
}

struct PlainBackward<'a>(Backward<'a>, Plain);

impl WithSimd for PlainBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let PlainBackward(Backward { mut gates, d_h, .. }, f) = self;
        for row in 0..gates.rows() {
            elman::backward_row(simd, f, gates.row_mut(row), d_h.as_ref().row(row));
        }
    }
}

/// The four equal parts of a row of gates.
#[inline(always)]
pub(super) fn quarters(row: &mut [f32]) -> [&mut [f32]; 4] {
    let hidden = row.len() / 4;
    let (first, rest) = row.split_at_mut(hidden);
    let (second, rest) = rest.split_at_mut(hidden);
    let (third, fourth) = rest.split_at_mut(hidden);
    [first, second, third, fourth]
}
