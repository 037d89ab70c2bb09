//! The state's part of a step's sums, `W_hh·h`, and the way back through it.
//!
//! It is one product for most cells. A GRU that resets before the product has two, because the second needs the reset
//! gate; what lies between them is a pass of `gru_reset_before`.

use crate::context::Context;
use crate::error::ShapeError;
use crate::gemm::{Accum, Epilogue, PackedWeights, gemm, gemm_packed};
use crate::scratch::ScratchBuf;
use crate::view::{MatMut, MatRef};

use super::plan::{matrix, matrix_mut};
use super::{Cell, Window, gru_reset_before};

/// The weights of the state, packed product by product: for one way, forward or backward.
#[derive(Debug)]
pub(super) struct StateWeights {
    cell: Cell,
    hidden: usize,
    products: Vec<PackedWeights>,
}

impl StateWeights {
    /// To go forward: `W_hhᵀ`.
    pub(super) fn forward(ctx: &Context, cell: Cell, w_hh: MatRef<'_>) -> Result<StateWeights, ShapeError> {
        StateWeights::pack(cell, w_hh, |w| PackedWeights::pack(ctx, w.t()))
    }

    /// To go backward: `W_hh`.
    pub(super) fn backward(ctx: &Context, cell: Cell, w_hh: MatRef<'_>) -> Result<StateWeights, ShapeError> {
        StateWeights::pack(cell, w_hh, |w| PackedWeights::pack(ctx, w))
    }

    fn pack(
        cell: Cell,
        w_hh: MatRef<'_>,
        pack: impl Fn(MatRef<'_>) -> Result<PackedWeights, ShapeError>,
    ) -> Result<StateWeights, ShapeError> {
        let hidden = w_hh.cols();
        let products = cell.state_windows(hidden).map(|Window { rows, .. }| pack(w_hh.sub(rows, 0..hidden)));
        Ok(StateWeights { cell, hidden, products: products.collect::<Result<_, _>>()? })
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
        let mut windows = self.cell.state_windows(self.hidden).zip(&self.products);
        let (Window { columns, .. }, w) = windows.next().expect("every cell multiplies its state");
        let sums = gates.reborrow().sub(0..rows, columns);
        gemm_packed(ctx, h_prev, w, sums, Accum::Add, &Epilogue::default())?;
        let Some((Window { columns, .. }, w)) = windows.next() else { return Ok(()) };
        gru_reset_before::reset(ctx, gates.reborrow(), h_prev);
        let first = gru_reset_before::reset_columns(self.hidden).start;
        let (sums, q) = gates.split_cols(first);
        gemm_packed(ctx, q.as_ref(), w, sums.sub(0..rows, columns), Accum::Add, &Epilogue::default())
    }

    /// From the gradients of the sums in `gates`, the gradient of the old state: added to the direct part in `d_h` where
    /// the cell has one. A GRU that resets before the product gets the gradient of r's sum here too.
    ///
    /// # Errors
    /// [`ShapeError`] when the weights were packed for another kernel.
    pub(super) fn gradient(
        &self,
        ctx: &Context,
        mut gates: MatMut<'_>,
        h_prev: MatRef<'_>,
        mut d_h: MatMut<'_>,
    ) -> Result<(), ShapeError> {
        let (rows, hidden) = (gates.rows(), self.hidden);
        let mut windows = self.cell.state_windows(hidden).zip(&self.products);
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
        gemm_packed(ctx, d_sums, w, d_h, direct_gradient(self.cell), &Epilogue::default())
    }
}

/// Whether the gates' pass has left a part of `d_h` that does not go through `W_hh`.
pub(super) fn direct_gradient(cell: Cell) -> Accum {
    match cell {
        Cell::Gru | Cell::GruResetBefore => Accum::Add,
        Cell::Lstm | Cell::Tanh | Cell::Relu => Accum::Overwrite,
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
    let (rows, hidden) = (h_prev.rows(), h_prev.cols());
    for (index, Window { columns, rows: gate_rows }) in cell.state_windows(hidden).enumerate() {
        let multiplied = match index {
            0 => h_prev,
            _ => d_gates.sub(0..rows, gru_reset_before::reset_columns(hidden)),
        };
        let d_sums = d_gates.sub(0..rows, columns.clone()).t();
        let part = d_w_hh.reborrow().sub(gate_rows.clone(), 0..hidden);
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
