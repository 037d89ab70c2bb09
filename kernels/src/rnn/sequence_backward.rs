//! A layer over whole sequences, backward: the recurrence of the state's gradient, then the gradients of
//! weights and inputs from all steps at once.

use std::ops::Range;

use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::lanes;
use crate::scratch::ScratchBuf;
use crate::view::{MatMut, MatRef};

use pulp::{Simd, WithSimd};

use super::input_product::input_gradient;
use super::plan::{Plan, gates_matrix, gates_matrix_mut, matrix, matrix_mut};
use super::rows::part_context;
use super::sequence::{Saved, split, split_rows, unrank};
use super::state_product::{BackStep, StateWeights};
use super::step::weight_gradients;
use super::weights::Sizes;
use super::{InputGrads, OutputGrads, Sequence, StateMut, Weights, columns, columns_backward};

/// Rows by batch entry to rows by rank; zeros for `None`.
fn rank(plan: &Plan, by_entry: Option<MatRef<'_>>, mut by_rank: MatMut<'_>) {
    for (rank, &b) in plan.order().iter().enumerate() {
        match by_entry {
            Some(from) => by_rank.row_mut(rank).copy_from_slice(from.row(b)),
            None => by_rank.row_mut(rank).fill(0.0),
        }
    }
}

/// The rows of a range of ranks on their way back.
struct BackStrand<'a> {
    ranks: Range<usize>,
    gates: Vec<MatMut<'a>>,
    d_h: MatMut<'a>,
    d_c: MatMut<'a>,
}

/// What all strands read on the way back.
struct Back<'a> {
    plan: &'a Plan,
    weights: StateWeights,
    h: MatRef<'a>,
    c: MatRef<'a>,
    d_y: Option<MatRef<'a>>,
}

/// The gradients of [`forward`](super::forward), which consume what it saved.
///
/// `d_h` goes back step by step through the gates and `W_hh`; then `d_W_ih`, `d_W_hh`, the biases' gradients
/// (all added to) and `d_x` (overwritten) follow from the gates' gradients of all steps, a product each.
///
/// # Shapes
/// `weights` and `sequence` as given to [`forward`](super::forward); see [`OutputGrads`] and [`InputGrads`].
///
/// # Errors
/// [`ShapeError`] when shapes do not fit; nothing is written then.
///
/// Accuracy and bits: see the module; asserted by `tests::sequence`.
pub fn backward(
    ctx: &Context,
    weights: &Weights<'_>,
    sequence: &Sequence<'_>,
    saved: Saved,
    upstream: OutputGrads<'_>,
    grads: InputGrads<'_>,
) -> Result<(), ShapeError> {
    check_backward(weights, sequence, &saved, &upstream, &grads)?;
    let Saved { sizes, plan, mut gates, h, c } = saved;
    let (batch, rows, gate_columns) = (plan.batch(), plan.rows(), sizes.gate_columns());
    let (width, cell_columns) = (sizes.output, sizes.cell_columns());
    let mut d_h = ScratchBuf::take(batch * width);
    let mut d_c = ScratchBuf::take(batch * cell_columns);
    rank(&plan, upstream.d_last.map(|s| s.h), matrix_mut(&mut d_h, batch, width));
    rank(&plan, upstream.d_last.and_then(|s| s.c), matrix_mut(&mut d_c, batch, cell_columns));

    let (h, c) = (matrix(&h, rows, width), matrix(&c, rows, cell_columns));
    let recurrence = columns_backward::BackBuffers {
        gates: gates_matrix_mut(&mut gates, rows, gate_columns),
        h,
        c,
        d_h: matrix_mut(&mut d_h, batch, width),
        d_c: matrix_mut(&mut d_c, batch, cell_columns),
        d_y: upstream.d_y,
    };
    match columns::team_size(ctx, &plan, &sizes) {
        1 => by_rows(ctx, &plan, StateWeights::backward(ctx, weights)?, recurrence),
        team => {
            let layer = columns::Layer { ctx: ctx.single_threaded(), plan: &plan, weights };
            columns_backward::backward(team, &layer, recurrence);
        }
    }

    let InputGrads { weights: d_weights, d_x, d_initial } = grads;
    if let Some(StateMut { h: into_h, c: into_c }) = d_initial {
        unrank(&plan, matrix(&d_h, batch, width), into_h);
        if let Some(into_c) = into_c {
            unrank(&plan, matrix(&d_c, batch, cell_columns), into_c);
        }
    }
    let d_gates = gates_matrix(&gates, rows, gate_columns);
    let mut gathered = None;
    weight_gradients(ctx, sizes.cell, d_gates, plan.gather(sequence.x, &mut gathered), h, d_weights)?;
    match d_x {
        Some(d_x) => padded_input_gradient(ctx, weights, &plan, d_gates, d_x),
        None => Ok(()),
    }
}

/// The recurrence backward with rows dealt to the threads.
fn by_rows(ctx: &Context, plan: &Plan, weights: StateWeights, buffers: columns_backward::BackBuffers<'_>) {
    let columns_backward::BackBuffers { gates, h, c, d_h, d_c, d_y } = buffers;
    let ranges = split(ctx, plan, weights.sizes());
    let back = Back { plan, weights, h, c, d_y };
    let strands: Vec<BackStrand<'_>> = plan
        .split_steps(gates, &ranges)
        .into_iter()
        .zip(&ranges)
        .zip(split_rows(d_h, &ranges))
        .zip(split_rows(d_c, &ranges))
        .map(|(((gates, ranks), d_h), d_c)| BackStrand { ranks: ranks.clone(), gates, d_h, d_c })
        .collect();
    let part = part_context(ctx, strands.len());
    ctx.for_each_owned(strands, |strand| run_back(&part, &back, strand));
}

pub(super) fn check_backward(
    weights: &Weights<'_>,
    sequence: &Sequence<'_>,
    saved: &Saved,
    upstream: &OutputGrads<'_>,
    grads: &InputGrads<'_>,
) -> Result<(), ShapeError> {
    weights.check()?;
    let Saved { sizes, plan, .. } = saved;
    let Sizes { cell, hidden, input, output, .. } = *sizes;
    let (batch, x) = (plan.batch(), sequence.x);
    expect_dim("w_hh", "rows (as in forward)", cell.gates() * hidden, weights.w_hh.rows())?;
    expect_dim("w_hh", "columns (as in forward)", output, weights.output())?;
    let projection = |sizes: Sizes| if sizes.projected { sizes.hidden } else { 0 };
    expect_dim("w_hr", "columns (as in forward)", projection(*sizes), projection(weights.sizes()))?;
    expect_dim("peepholes", "length (as in forward)", cell.peepholes(hidden), weights.peepholes.len())?;
    expect_dim("w_ih", "columns (as in forward)", input, weights.input())?;
    expect_dim("x", "rows (as in forward)", plan.batch() * plan.seq(), x.rows())?;
    expect_dim("x", "columns (as in forward)", input, x.cols())?;
    x.expect_contiguous_rows("x")?;
    if let Some(d_y) = upstream.d_y {
        expect_dim("d_y", "rows", x.rows(), d_y.rows())?;
        expect_dim("d_y", "columns", output, d_y.cols())?;
        d_y.expect_contiguous_rows("d_y")?;
    }
    if let Some(d_last) = &upstream.d_last {
        d_last.check(["d_last.h", "d_last.c"], sizes, batch)?;
    }
    if let Some(d_initial) = &grads.d_initial {
        d_initial.check(["d_initial.h", "d_initial.c"], sizes, batch)?;
    }
    if let Some(d_x) = &grads.d_x {
        expect_dim("d_x", "rows", x.rows(), d_x.rows())?;
        expect_dim("d_x", "columns", input, d_x.cols())?;
        d_x.expect_contiguous_rows("d_x")?;
    }
    grads.weights.check(sizes)
}

/// The recurrence of one strand, backward: gates become the gradients of their sums.
fn run_back(ctx: &Context, back: &Back<'_>, strand: BackStrand<'_>) {
    let Back { plan, h, c, .. } = *back;
    let BackStrand { ranks, mut gates, mut d_h, mut d_c } = strand;
    for t in (0..plan.seq()).rev().map(|visit| plan.step(visit)) {
        let rows = gates[t].rows();
        if rows == 0 {
            continue;
        }
        let at = plan.rows_at(t, &ranks);
        let (h_cols, c_cols) = (h.cols(), c.cols());
        let mut d_h_now = d_h.reborrow().sub(0..rows, 0..h_cols);
        if let Some(d_y) = back.d_y {
            add_upstream(ctx, d_h_now.reborrow(), d_y, |rank| plan.padded_row(t, ranks.start + rank));
        }
        let step = BackStep {
            gates: gates[t].reborrow(),
            h_prev: h.sub(at.clone(), 0..h_cols),
            c_prev: c.sub(at, 0..c_cols),
            d_h: d_h_now,
            d_c: d_c.reborrow().sub(0..rows, 0..c_cols),
        };
        back.weights.step_back(ctx, step).expect("shapes fit by construction");
    }
}

/// `d_h[i] += d_y[row_of(i)]`.
pub(super) fn add_upstream(ctx: &Context, d_h: MatMut<'_>, d_y: MatRef<'_>, row_of: impl Fn(usize) -> usize) {
    ctx.isa().dispatch(AddRows { d_h, d_y, row_of });
}

struct AddRows<'a, F> {
    d_h: MatMut<'a>,
    d_y: MatRef<'a>,
    row_of: F,
}

impl<F: Fn(usize) -> usize> WithSimd for AddRows<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        for i in 0..self.d_h.rows() {
            let d_y = self.d_y.row((self.row_of)(i));
            lanes::update(
                simd,
                d_y,
                self.d_h.row_mut(i),
                #[inline(always)]
                |d_y, d_h| simd.add_f32s(d_h, d_y),
            );
        }
    }
}

/// `d_x = d_sums · W_ih`, in the time-major order.
fn padded_input_gradient(
    ctx: &Context,
    weights: &Weights<'_>,
    plan: &Plan,
    d_gates: MatRef<'_>,
    d_x: MatMut<'_>,
) -> Result<(), ShapeError> {
    if plan.is_identity() {
        return input_gradient(ctx, weights, d_gates, d_x);
    }
    let (rows, input) = (plan.rows(), weights.input());
    let mut gapless = ScratchBuf::take(rows * input);
    input_gradient(ctx, weights, d_gates, matrix_mut(&mut gapless, rows, input))?;
    let gapless = matrix(&gapless, rows, input);
    plan.scatter(ctx, d_x, |t, rank| gapless.row(plan.rows_at(t, &(rank..rank + 1)).start));
    Ok(())
}
