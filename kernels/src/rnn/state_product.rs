//! The state's part of a step's sums, `W_hh·h`, and the way back through it.
//!
//! It is one product for most cells. A GRU that resets before the product has two, because the second needs the reset
//! gate; what lies between them is a pass of `gru_reset_before`.
//!
//! An LSTM may project what its gates let through: `h = W_hr·m` with `m = o ⊙ tanh c`. Its row of gates has two blocks more, `[… m d_h]`:
//! forward leaves m there, backward the gradient of h, so that `d_W_hr = Σ d_h·mᵀ` is one product over all steps like the other weights'.

use crate::context::Context;
use crate::error::ShapeError;
use crate::gemm::{Accum, Epilogue, PackedWeights, gemm, gemm_packed};
use crate::scratch::ScratchBuf;
use crate::view::{MatMut, MatRef};

use super::plan::{copy, matrix, matrix_mut};
use super::weights::Sizes;
use super::{Cell, Weights, Window, gates, gru_reset_before};

/// The rows of one step, forward.
pub(super) struct Step<'a> {
    /// Sums in, activated gates out.
    pub(super) gates: MatMut<'a>,
    /// State before the step; `c` has no columns for a cell without it.
    pub(super) h_prev: MatRef<'a>,
    pub(super) c_prev: MatRef<'a>,
    /// State after the step.
    pub(super) h: MatMut<'a>,
    pub(super) c: MatMut<'a>,
}

/// The rows of one step, backward.
pub(super) struct BackStep<'a> {
    /// Activated gates in, gradients of the sums out.
    pub(super) gates: MatMut<'a>,
    /// State before the step.
    pub(super) h_prev: MatRef<'a>,
    pub(super) c_prev: MatRef<'a>,
    /// Gradient of the state after the step in, of that before it out.
    pub(super) d_h: MatMut<'a>,
    pub(super) d_c: MatMut<'a>,
}

/// What the recurrence multiplies with, packed product by product: for one way, forward or backward.
#[derive(Debug)]
pub(super) struct StateWeights {
    sizes: Sizes,
    products: Vec<PackedWeights>,
    peepholes: Vec<f32>,
    projection: Option<PackedWeights>,
}

/// How weights are packed: to stay, or for one call.
pub(super) type Pack = fn(&Context, MatRef<'_>) -> Result<PackedWeights, ShapeError>;

impl StateWeights {
    /// To go forward: `W_hhᵀ` and `W_hrᵀ`.
    pub(super) fn forward(
        ctx: &Context,
        weights: &Weights<'_>,
        pack: Pack,
    ) -> Result<StateWeights, ShapeError> {
        StateWeights::pack(weights, |w| pack(ctx, w.t()))
    }

    /// To go backward: `W_hh` and `W_hr`, for one call.
    pub(super) fn backward(ctx: &Context, weights: &Weights<'_>) -> Result<StateWeights, ShapeError> {
        StateWeights::pack(weights, |w| PackedWeights::pack_for_call(ctx, w))
    }

    fn pack(
        weights: &Weights<'_>,
        pack: impl Fn(MatRef<'_>) -> Result<PackedWeights, ShapeError>,
    ) -> Result<StateWeights, ShapeError> {
        let sizes = weights.sizes();
        let windows = sizes.cell.state_windows(sizes.hidden);
        let products = windows.map(|Window { rows, .. }| pack(weights.w_hh.sub(rows, 0..sizes.output)));
        Ok(StateWeights {
            sizes,
            products: products.collect::<Result<_, _>>()?,
            peepholes: weights.peepholes.to_vec(),
            projection: weights.w_hr.map(&pack).transpose()?,
        })
    }

    pub(super) fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    /// Adds the state's part to the sums in `gates`. A GRU that resets before the product finds r, z and q done
    /// afterwards, and n as a sum.
    ///
    /// # Errors
    /// [`ShapeError`] when the weights were packed for another kernel.
    pub(super) fn add(
        &self,
        ctx: &Context,
        mut gates: MatMut<'_>,
        h_prev: MatRef<'_>,
    ) -> Result<(), ShapeError> {
        let rows = gates.rows();
        let hidden = self.sizes.hidden;
        let mut windows = self.sizes.cell.state_windows(hidden).zip(&self.products);
        let (Window { columns, .. }, w) = windows.next().expect("every cell multiplies its state");
        let sums = gates.reborrow().sub(0..rows, columns);
        gemm_packed(ctx, h_prev, w, sums, Accum::Add, &Epilogue::default())?;
        let Some((Window { columns, .. }, w)) = windows.next() else { return Ok(()) };
        gru_reset_before::reset(ctx, gates.reborrow(), h_prev);
        let first = gru_reset_before::reset_columns(hidden).start;
        let (sums, q) = gates.split_cols(first);
        gemm_packed(ctx, q.as_ref(), w, sums.sub(0..rows, columns), Accum::Add, &Epilogue::default())
    }

    /// From the sums to the new state: the gates' pass and the projection.
    ///
    /// # Errors
    /// [`ShapeError`] when the weights were packed for another kernel.
    pub(super) fn update(&self, ctx: &Context, step: Step<'_>) -> Result<(), ShapeError> {
        let Step { mut gates, h_prev, c_prev, h, c } = step;
        let (cell, peepholes) = (self.sizes.cell, &self.peepholes[..]);
        let Some(w) = &self.projection else {
            gates::forward(ctx, cell, gates::Forward { gates, peepholes, h_prev, c_prev, h, c });
            return Ok(());
        };
        let (sums, m) = self.split(gates.reborrow());
        gates::forward(ctx, cell, gates::Forward { gates: sums, peepholes, h_prev, c_prev, h: m, c });
        let m = gates.as_ref().sub(0..h.rows(), self.sizes.unprojected());
        gemm_packed(ctx, m, w, h, Accum::Overwrite, &Epilogue::default())
    }

    /// A row of gates as the cell's pass sees it, and what the projection multiplies.
    fn split<'g>(&self, gates: MatMut<'g>) -> (MatMut<'g>, MatMut<'g>) {
        let columns = self.sizes.unprojected();
        let (sums, rest) = gates.split_cols(columns.start);
        (sums, rest.split_cols(columns.len()).0)
    }

    /// One step back: the gates become the gradients of their sums, `d_h` and `d_c` go from the new state to the old.
    /// A projected layer leaves the gradient of the new h in its columns of the gates, for the gradient of `W_hr`.
    ///
    /// # Errors
    /// [`ShapeError`] when the weights were packed for another kernel.
    pub(super) fn step_back(&self, ctx: &Context, step: BackStep<'_>) -> Result<(), ShapeError> {
        let BackStep { mut gates, h_prev, c_prev, mut d_h, d_c } = step;
        let (cell, peepholes, rows) = (self.sizes.cell, &self.peepholes[..], d_h.rows());
        let Some(w) = &self.projection else {
            let (sums, d_h_now) = (gates.reborrow(), d_h.reborrow());
            let pass = gates::Backward { gates: sums, peepholes, h_prev, c_prev, d_h: d_h_now, d_c };
            gates::backward(ctx, cell, pass);
            return self.gradient(ctx, gates, h_prev, d_h);
        };
        let kept = gates.reborrow().sub(0..rows, self.sizes.projected_gradient());
        copy(d_h.as_ref(), kept);
        let mut d_m = ScratchBuf::take(rows * self.sizes.hidden);
        let mut d_m = matrix_mut(&mut d_m, rows, self.sizes.hidden);
        gemm_packed(ctx, d_h.as_ref(), w, d_m.reborrow(), Accum::Overwrite, &Epilogue::default())?;
        let (sums, _) = self.split(gates.reborrow());
        let pass = gates::Backward { gates: sums, peepholes, h_prev, c_prev, d_h: d_m, d_c };
        gates::backward(ctx, cell, pass);
        self.gradient(ctx, gates, h_prev, d_h)
    }

    /// From the gradients of the sums in `gates`, the gradient of the old state: added to the direct part in `d_h` where
    /// the cell has one. A GRU that resets before the product gets the gradient of r's sum here too.
    fn gradient(
        &self,
        ctx: &Context,
        mut gates: MatMut<'_>,
        h_prev: MatRef<'_>,
        mut d_h: MatMut<'_>,
    ) -> Result<(), ShapeError> {
        let Sizes { cell, hidden, .. } = self.sizes;
        let rows = gates.rows();
        let mut windows = cell.state_windows(hidden).zip(&self.products);
        let (Window { columns: first, .. }, w) = windows.next().expect("every cell multiplies its state");
        if let Some((Window { columns, .. }, w)) = windows.next() {
            let mut d_q = ScratchBuf::take(rows * hidden);
            let d_n = gates.as_ref().sub(0..rows, columns);
            let into = matrix_mut(&mut d_q, rows, hidden);
            gemm_packed(ctx, d_n, w, into, Accum::Overwrite, &Epilogue::default())?;
            let d_q = matrix(&d_q, rows, hidden);
            gru_reset_before::reset_backward(ctx, gates.reborrow(), h_prev, d_q, d_h.reborrow());
        }
        let d_sums = gates.as_ref().sub(0..rows, first);
        gemm_packed(ctx, d_sums, w, d_h, direct_gradient(cell), &Epilogue::default())
    }
}

/// Whether the gates' pass has left a part of `d_h` that does not go through `W_hh`.
pub(super) fn direct_gradient(cell: Cell) -> Accum {
    match cell {
        Cell::Gru | Cell::GruResetBefore => Accum::Add,
        Cell::Lstm | Cell::LstmPeephole | Cell::Tanh | Cell::Relu => Accum::Overwrite,
    }
}

/// `d_W_hh += d_sumsᵀ·h_prev` over any number of steps, and `d_b_hh += Σ d_sums` from the sums over the rows of `d_gates`;
/// the rows that were multiplied with r·h take that for `h_prev`.
pub(super) fn weight_gradient(
    ctx: &Context,
    cell: Cell,
    (d_gates, col_sums): (MatRef<'_>, &[f32]),
    h_prev: MatRef<'_>,
    (mut d_w_hh, d_b_hh): (MatMut<'_>, &mut [f32]),
) -> Result<(), ShapeError> {
    let (rows, output) = (h_prev.rows(), h_prev.cols());
    let hidden = d_w_hh.rows() / cell.gates();
    for (index, Window { columns, rows: gate_rows }) in cell.state_windows(hidden).enumerate() {
        let multiplied = match index {
            0 => h_prev,
            _ => d_gates.sub(0..rows, gru_reset_before::reset_columns(hidden)),
        };
        let d_sums = d_gates.sub(0..rows, columns.clone()).t();
        let part = d_w_hh.reborrow().sub(gate_rows.clone(), 0..output);
        gemm(ctx, d_sums, multiplied, part, Accum::Add, &Epilogue::default())?;
        add(&mut d_b_hh[gate_rows], &col_sums[columns]);
    }
    Ok(())
}

/// `into += from`.
pub(super) fn add(into: &mut [f32], from: &[f32]) {
    for (into, from) in into.iter_mut().zip(from) {
        *into += from;
    }
}
