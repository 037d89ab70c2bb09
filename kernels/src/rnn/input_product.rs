//! The input's part of the gates' sums, for any number of steps at once, and the way back through it.

use std::ops::Range;

use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::gemm::{Accum, Epilogue, PackedWeights, gemm, gemm_packed};
use crate::scratch::ScratchBuf;
use crate::view::{MatMut, MatRef};

use super::state_product::Pack;
use super::weights::Sizes;
use super::{Cell, Weights, Window};

/// Rows up to which packing the input's weights takes more than about a tenth of their product. With two threads, LSTM forward on Zen 3,
/// packing in parts took 0.91 of the time with packing first at 1×128×512 (batch, steps, hidden) and 0.97 at 8×32×512.
const FEW_ROWS: usize = 256;
/// Elements of the input's weights (1 MiB, packed in about 200 µs) from which on threads share the packing.
const LARGE: usize = 1 << 18;
/// A part's columns are a multiple of so many, so that few panels of a kernel are cut.
const PANELS: usize = 32;

/// What the columns of a gates buffer start from: the sum of both biases where both act.
pub(super) fn start_bias(weights: &Weights<'_>) -> ScratchBuf {
    let hidden = weights.hidden();
    let mut bias = ScratchBuf::zeroed(weights.cell.gate_columns(hidden));
    for Window { columns, rows } in weights.cell.state_windows(hidden) {
        bias[columns].copy_from_slice(&weights.b_hh[rows]);
    }
    for Window { columns, rows } in weights.cell.input_windows(hidden) {
        for (sum, b) in bias[columns].iter_mut().zip(&weights.b_ih[rows]) {
            *sum += b;
        }
    }
    bias
}

/// A bias as an epilogue.
fn biased(bias: &[f32]) -> Epilogue<'_> {
    Epilogue { bias: Some(bias), ..Epilogue::default() }
}

/// Writes the bias of the columns that no input reaches.
pub(super) fn fill_untouched(cell: Cell, hidden: usize, bias: &[f32], gates: &mut MatMut<'_>) {
    if cell == Cell::Gru {
        for row in 0..gates.rows() {
            gates.row_mut(row)[3 * hidden..].copy_from_slice(&bias[3 * hidden..]);
        }
    }
}

/// The input's part of the gates of any number of steps: every column of `gates` becomes what the state's
/// product is to be added to, biases included.
///
/// `gates = x · W_ihᵀ + b` with b the biases that act on the column.
///
/// # Shapes
/// x `[rows, input]` → gates `[rows, gate_columns]`, rows contiguous.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit; nothing is written then.
pub fn project(
    ctx: &Context,
    weights: &Weights<'_>,
    x: MatRef<'_>,
    gates: MatMut<'_>,
) -> Result<(), ShapeError> {
    weights.check()?;
    let sizes = weights.sizes();
    if ctx.thread_count() > 1 && x.rows() <= FEW_ROWS && weights.w_ih.rows() * sizes.input >= LARGE {
        return project_in_parts(ctx, weights, x, gates);
    }
    let packed = pack_input(ctx, weights, PackedWeights::pack_for_call)?;
    project_packed(ctx, &sizes, &packed, &start_bias(weights), (x, gates))
}

/// As [`project_packed`], but each thread packs the columns that it then multiplies with: packing is a fifth of the work
/// with 128 rows, and one thread would do it while the others wait.
fn project_in_parts(
    ctx: &Context,
    weights: &Weights<'_>,
    x: MatRef<'_>,
    mut gates: MatMut<'_>,
) -> Result<(), ShapeError> {
    let (sizes, rows, bias) = (weights.sizes(), x.rows(), start_bias(weights));
    check_gates(gates.as_ref(), rows, &sizes)?;
    expect_dim("x", "columns", sizes.input, x.cols())?;
    let alone = ctx.single_threaded();
    for Window { columns, rows: gate_rows } in sizes.cell.input_windows(sizes.hidden) {
        let width = columns.len().div_ceil(ctx.thread_count()).next_multiple_of(PANELS);
        let mut rest = gates.reborrow().sub(0..rows, columns.clone());
        let mut parts = Vec::with_capacity(ctx.thread_count());
        for first in (0..columns.len()).step_by(width) {
            let (part, right) = rest.split_cols(width.min(columns.len() - first));
            parts.push((first, part));
            rest = right;
        }
        ctx.for_each_owned(parts, |(first, part)| {
            let of_part = |whole: &Range<usize>| whole.start + first..whole.start + first + part.cols();
            let w = weights.w_ih.sub(of_part(&gate_rows), 0..sizes.input).t();
            let w = PackedWeights::pack_for_call(&alone, w).expect("a part of what lies in memory");
            let epilogue = biased(&bias[of_part(&columns)]);
            gemm_packed(&alone, x, &w, part, Accum::Overwrite, &epilogue).expect("shapes were checked");
        });
    }
    fill_untouched(sizes.cell, sizes.hidden, &bias, &mut gates);
    Ok(())
}

/// The input's weights and biases, for many products of a few rows.
pub(super) struct InputWeights {
    sizes: Sizes,
    packed: Vec<PackedWeights>,
    bias: ScratchBuf,
}

impl InputWeights {
    /// Packs the weights for one call.
    pub(super) fn new(ctx: &Context, weights: &Weights<'_>) -> Result<InputWeights, ShapeError> {
        let packed = pack_input(ctx, weights, PackedWeights::pack_for_call)?;
        Ok(InputWeights { sizes: weights.sizes(), packed, bias: start_bias(weights) })
    }

    /// As [`project`], of shapes that fit.
    pub(super) fn project(&self, ctx: &Context, x: MatRef<'_>, gates: MatMut<'_>) {
        project_packed(ctx, &self.sizes, &self.packed, &self.bias, (x, gates))
            .expect("shapes fit by construction");
    }
}

/// `W_ihᵀ`, window by window.
pub(super) fn pack_input(
    ctx: &Context,
    weights: &Weights<'_>,
    pack: Pack,
) -> Result<Vec<PackedWeights>, ShapeError> {
    let windows = weights.cell.input_windows(weights.hidden());
    windows.map(|Window { rows, .. }| pack(ctx, weights.w_ih.sub(rows, 0..weights.input()).t())).collect()
}

pub(super) fn project_packed(
    ctx: &Context,
    sizes: &Sizes,
    packed: &[PackedWeights],
    bias: &[f32],
    (x, mut gates): (MatRef<'_>, MatMut<'_>),
) -> Result<(), ShapeError> {
    let rows = x.rows();
    check_gates(gates.as_ref(), rows, sizes)?;
    for (Window { columns, .. }, w) in sizes.cell.input_windows(sizes.hidden).zip(packed) {
        expect_dim("x", "columns", w.rows(), x.cols())?;
        let part = gates.reborrow().sub(0..rows, columns.clone());
        gemm_packed(ctx, x, w, part, Accum::Overwrite, &biased(&bias[columns]))?;
    }
    fill_untouched(sizes.cell, sizes.hidden, bias, &mut gates);
    Ok(())
}

pub(super) fn check_gates(gates: MatRef<'_>, rows: usize, sizes: &Sizes) -> Result<(), ShapeError> {
    expect_dim("gates", "rows", rows, gates.rows())?;
    expect_dim("gates", "columns", sizes.gate_columns(), gates.cols())?;
    gates.expect_contiguous_rows("gates")
}

/// The inputs' gradients from the gates' gradients of any number of steps: `d_x = d_sums·W_ih`, overwritten.
///
/// # Shapes
/// d_gates `[rows, gate_columns]` as [`step_backward`](super::step_backward) left it → d_x `[rows, input]`.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit; nothing is written then.
///
/// A row has the bits that it has step by step.
pub fn input_gradient(
    ctx: &Context,
    weights: &Weights<'_>,
    d_gates: MatRef<'_>,
    mut d_x: MatMut<'_>,
) -> Result<(), ShapeError> {
    weights.check()?;
    let (sizes, rows) = (weights.sizes(), d_x.rows());
    check_gates(d_gates, rows, &sizes)?;
    expect_dim("d_x", "columns", sizes.input, d_x.cols())?;
    let mut accum = Accum::Overwrite;
    for Window { columns, rows: gate_rows } in sizes.cell.input_windows(sizes.hidden) {
        let d_sums = d_gates.sub(0..rows, columns);
        let w = weights.w_ih.sub(gate_rows, 0..sizes.input);
        gemm(ctx, d_sums, w, d_x.reborrow(), accum, &Epilogue::default())?;
        accum = Accum::Add;
    }
    Ok(())
}
