//! Single steps for decoding and for decoders with attention, and the products that a layer consists of.
//!
//! A decoder that feeds attention into its next input cannot project all inputs beforehand. It packs the
//! weights once ([`PackedCell`]), steps ([`step`]), keeps each step's gates, goes back step by step
//! ([`step_backward`], which leaves the gates' gradients in the gates buffer), and at the end computes
//! the weights' gradients of all steps at once ([`weight_gradients`]). The part of the input that is known
//! beforehand (the embedding) can still be projected at once: [`project`](super::project) with the columns of `W_ih` that
//! belong to it, then steps with [`Accum::Add`] and a cell packed from the other columns.

use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::gemm::{Accum, Epilogue, PackedWeights, gemm, gemm_packed};
use crate::rowwise::reduce;
use crate::scratch::ScratchBuf;
use crate::view::{MatMut, MatRef};

use super::input_product::{check_gates, pack_input, project_packed, start_bias};
use super::plan::{matrix, matrix_mut};
use super::state_product::{BackStep, Pack, StateWeights, Step, add, weight_gradient};
use super::weights::Sizes;
use super::{Cell, State, StateMut, WeightGrads, Weights, Window, lstm_peephole};

/// The weights of a cell, packed for many steps.
#[derive(Debug)]
pub struct PackedCell {
    w_ih: Vec<PackedWeights>,
    state: StateWeights,
    bias: Vec<f32>,
}

impl PackedCell {
    /// Packs the weights for this context's kernel.
    ///
    /// # Errors
    /// [`ShapeError`] when the weights do not fit together.
    pub fn pack(ctx: &Context, weights: &Weights<'_>) -> Result<PackedCell, ShapeError> {
        PackedCell::pack_by(ctx, weights, |ctx, w| PackedWeights::pack(ctx, w))
    }

    /// As [`PackedCell::pack`], into memory that the thread which drops the cell keeps for the next call: for weights that change
    /// before they are packed again, as in training.
    ///
    /// # Errors
    /// [`ShapeError`] when the weights do not fit together.
    pub fn pack_for_call(ctx: &Context, weights: &Weights<'_>) -> Result<PackedCell, ShapeError> {
        PackedCell::pack_by(ctx, weights, PackedWeights::pack_for_call)
    }

    fn pack_by(ctx: &Context, weights: &Weights<'_>, pack: Pack) -> Result<PackedCell, ShapeError> {
        weights.check()?;
        Ok(PackedCell {
            w_ih: pack_input(ctx, weights, pack)?,
            state: StateWeights::forward(ctx, weights, pack)?,
            bias: start_bias(weights).to_vec(),
        })
    }

    /// The kind of cell.
    pub fn cell(&self) -> Cell {
        self.state.sizes().cell
    }

    /// Width of the gates and of the state c.
    pub fn hidden(&self) -> usize {
        self.state.sizes().hidden
    }

    /// Width of the state h.
    pub fn output(&self) -> usize {
        self.state.sizes().output
    }

    /// Width of the input.
    pub fn input(&self) -> usize {
        self.state.sizes().input
    }

    /// Columns of a gates buffer.
    pub fn gate_columns(&self) -> usize {
        self.state.sizes().gate_columns()
    }
}

/// As [`project`](super::project) with weights that were packed beforehand, and with the same bits: for decoding, where each
/// step projects one token a row.
///
/// # Shapes
/// x `[rows, input]` → gates `[rows, gate_columns]`, rows contiguous.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit, or the cell was packed for another kernel.
pub fn project_with(
    ctx: &Context,
    cell: &PackedCell,
    x: MatRef<'_>,
    gates: MatMut<'_>,
) -> Result<(), ShapeError> {
    expect_dim("x", "columns", cell.input(), x.cols())?;
    project_packed(ctx, cell.state.sizes(), &cell.w_ih, &cell.bias, (x, gates))
}

/// The input of one step.
#[derive(Debug, Clone, Copy)]
pub struct StepInput<'a> {
    /// `[rows, input]`.
    pub x: MatRef<'a>,
    /// `Overwrite`: the gates start from the biases. `Add`: they hold a part that [`project`](super::project) has put
    /// there, biases included, and x is the rest of the input.
    pub accum: Accum,
}

/// One step of `rows` independent rows.
///
/// # Shapes
/// x `[rows, input]`, states as [`State`], gates `[rows, gate_columns]`, rows contiguous. The gates are left
/// activated, as [`step_backward`] wants them.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit, or the cell was packed for another kernel.
///
/// The bits are those of the same step within [`forward`](super::forward).
pub fn step(
    ctx: &Context,
    cell: &PackedCell,
    input: StepInput<'_>,
    state: State<'_>,
    mut gates: MatMut<'_>,
    next: StateMut<'_>,
) -> Result<(), ShapeError> {
    let (rows, sizes) = (input.x.rows(), cell.state.sizes());
    check_gates(gates.as_ref(), rows, sizes)?;
    expect_dim("x", "columns", sizes.input, input.x.cols())?;
    state.check(["state.h", "state.c"], sizes, rows)?;
    next.check(["next.h", "next.c"], sizes, rows)?;
    match input.accum {
        Accum::Overwrite => {
            project_packed(ctx, sizes, &cell.w_ih, &cell.bias, (input.x, gates.reborrow()))?;
        }
        Accum::Add => {
            for (Window { columns, .. }, w) in sizes.cell.input_windows(sizes.hidden).zip(&cell.w_ih) {
                let part = gates.reborrow().sub(0..rows, columns);
                gemm_packed(ctx, input.x, w, part, Accum::Add, &Epilogue::default())?;
            }
        }
    }
    cell.state.add(ctx, gates.reborrow(), state.h)?;
    let (c_prev, c) = (state.c.unwrap_or(no_columns(rows)), next.c.unwrap_or(no_columns_mut(rows)));
    cell.state.update(ctx, Step { gates, h_prev: state.h, c_prev, h: next.h, c })
}

/// The state `c` of a cell that has none.
fn no_columns(rows: usize) -> MatRef<'static> {
    matrix(&[], rows, 0)
}

fn no_columns_mut(rows: usize) -> MatMut<'static> {
    matrix_mut(&mut [], rows, 0)
}

/// The weights of a cell, packed for many steps backward, in memory that the thread which drops it keeps for the next call.
#[derive(Debug)]
pub struct PackedBackward {
    w_ih: Vec<PackedWeights>,
    state: StateWeights,
}

impl PackedBackward {
    /// Packs the weights for this context's kernel.
    ///
    /// # Errors
    /// [`ShapeError`] when the weights do not fit together.
    pub fn pack(ctx: &Context, weights: &Weights<'_>) -> Result<PackedBackward, ShapeError> {
        weights.check()?;
        let (hidden, input) = (weights.hidden(), weights.input());
        let windows = weights.cell.input_windows(hidden);
        Ok(PackedBackward {
            w_ih: windows
                .map(|Window { rows, .. }| {
                    PackedWeights::pack_for_call(ctx, weights.w_ih.sub(rows, 0..input))
                })
                .collect::<Result<_, _>>()?,
            state: StateWeights::backward(ctx, weights)?,
        })
    }
}

/// One step backward.
///
/// `gates` holds what [`step`] left and becomes the gradients of the sums; `d_state` holds the gradient of the
/// new state (all that flows into it) and becomes that of the old; `d_x` is overwritten.
///
/// # Shapes
/// As [`step`]; `state` is the state before the step; d_x `[rows, input]`.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit, or the cell was packed for another kernel.
pub fn step_backward(
    ctx: &Context,
    cell: &PackedBackward,
    state: State<'_>,
    mut gates: MatMut<'_>,
    d_state: StateMut<'_>,
    d_x: Option<MatMut<'_>>,
) -> Result<(), ShapeError> {
    let (rows, sizes) = (state.h.rows(), cell.state.sizes());
    check_gates(gates.as_ref(), rows, sizes)?;
    state.check(["state.h", "state.c"], sizes, rows)?;
    d_state.check(["d_state.h", "d_state.c"], sizes, rows)?;
    if let Some(d_x) = &d_x {
        expect_dim("d_x", "rows", rows, d_x.rows())?;
        expect_dim("d_x", "columns", sizes.input, d_x.cols())?;
    }
    let c_prev = state.c.unwrap_or(no_columns(rows));
    let d_c = d_state.c.unwrap_or(no_columns_mut(rows));
    let step = BackStep { gates: gates.reborrow(), h_prev: state.h, c_prev, d_h: d_state.h, d_c };
    cell.state.step_back(ctx, step)?;
    let Some(mut d_x) = d_x else { return Ok(()) };
    let mut accum = Accum::Overwrite;
    for (Window { columns, .. }, w) in sizes.cell.input_windows(sizes.hidden).zip(&cell.w_ih) {
        let d_sums = gates.as_ref().sub(0..rows, columns);
        gemm_packed(ctx, d_sums, w, d_x.reborrow(), accum, &Epilogue::default())?;
        accum = Accum::Add;
    }
    Ok(())
}

/// The weights' gradients from the gates' gradients of any number of steps, **added** to `grads`.
///
/// `d_W_ih += d_sumsᵀ·x`, `d_W_hh += d_sumsᵀ·h_prev`, `d_b += Σ d_sums`, each over the gates that the weight
/// acts on; `d_W_hr += d_hᵀ·m` and `d_p += Σ d_sums·c` from what the steps have left beside them.
///
/// # Shapes
/// d_gates `[rows, gate_columns]` as [`step_backward`] left it, x `[rows, input]`, h_prev `[rows, output]` (the state before each step).
///
/// # Errors
/// [`ShapeError`] when shapes do not fit.
///
/// The sums over rows go in a fixed order: the same bits for any number of threads.
pub fn weight_gradients(
    ctx: &Context,
    cell: Cell,
    d_gates: MatRef<'_>,
    x: MatRef<'_>,
    h_prev: MatRef<'_>,
    grads: WeightGrads<'_>,
) -> Result<(), ShapeError> {
    let (rows, output, input) = (x.rows(), h_prev.cols(), x.cols());
    let hidden = grads.d_w_hr.as_ref().map_or(output, |d_w_hr| d_w_hr.cols());
    let sizes = Sizes { cell, input, hidden, output, projected: grads.d_w_hr.is_some() };
    expect_dim("h_prev", "rows", rows, h_prev.rows())?;
    check_gates(d_gates, rows, &sizes)?;
    grads.check(&sizes)?;
    let WeightGrads { mut d_w_ih, d_w_hh, d_b_ih, d_b_hh, d_peepholes, d_w_hr } = grads;
    let columns = cell.gate_columns(hidden);
    let mut sums = ScratchBuf::zeroed(columns);
    reduce::col_sum(ctx, d_gates.sub(0..rows, 0..columns), &mut sums)?;
    if cell == Cell::LstmPeephole {
        add(d_peepholes, &sums[lstm_peephole::product_columns(hidden)]);
    }
    if let Some(d_w_hr) = d_w_hr {
        let d_h = d_gates.sub(0..rows, sizes.projected_gradient()).t();
        let m = d_gates.sub(0..rows, sizes.unprojected());
        gemm(ctx, d_h, m, d_w_hr, Accum::Add, &Epilogue::default())?;
    }
    weight_gradient(ctx, cell, (d_gates, &sums), h_prev, (d_w_hh, d_b_hh))?;
    for Window { columns, rows: gate_rows } in cell.input_windows(hidden) {
        let d_sums = d_gates.sub(0..rows, columns.clone()).t();
        let part = d_w_ih.reborrow().sub(gate_rows.clone(), 0..input);
        gemm(ctx, d_sums, x, part, Accum::Add, &Epilogue::default())?;
        add(&mut d_b_ih[gate_rows], &sums[columns]);
    }
    Ok(())
}
