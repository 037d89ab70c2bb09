//! A layer over whole sequences: projection of all steps, recurrence, gradients of all steps.

use std::ops::Range;

use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::gemm::{Accum, Epilogue, PackedWeights, gemm, gemm_packed};
use crate::lanes;
use crate::scratch::ScratchBuf;
use crate::view::{MatMut, MatRef};

use pulp::{Simd, WithSimd};

use super::plan::{Plan, matrix, matrix_mut};
use super::step::{project, state_gradient, weight_gradients};
use super::{Cell, InputGrads, Output, OutputGrads, Sequence, State, StateMut, Weights, Window, gates};

/// What [`backward`] needs of a [`forward`]: gates, and states before each step, without the padding.
pub struct Saved {
    cell: Cell,
    hidden: usize,
    input: usize,
    plan: Plan,
    gates: ScratchBuf,
    h: ScratchBuf,
    c: ScratchBuf,
}

impl Saved {
    fn new(weights: &Weights<'_>, plan: Plan) -> Saved {
        let (cell, hidden, rows) = (weights.cell, weights.hidden(), plan.rows());
        Saved {
            cell,
            hidden,
            input: weights.input(),
            gates: ScratchBuf::take(rows * cell.gate_columns(hidden)),
            h: ScratchBuf::take(rows * hidden),
            c: ScratchBuf::take(rows * cell.cell_columns(hidden)),
            plan,
        }
    }
}

/// Below this many floating-point operations a thread's part of a recurrence is not worth handing over.
const MIN_THREAD_FLOPS: usize = 2_000_000;

/// Ranges of ranks, one a thread, as far as each has enough to do.
fn split(ctx: &Context, plan: &Plan, cell: Cell, hidden: usize) -> Vec<Range<usize>> {
    let flops = 2 * plan.rows() * cell.gates() * hidden * hidden;
    plan.split_ranks(ctx.thread_count().min(flops / MIN_THREAD_FLOPS).max(1))
}

/// How the products of one part run: alone on their thread when there are several parts.
fn part_context(ctx: &Context, parts: usize) -> Context {
    if parts > 1 { ctx.single_threaded() } else { *ctx }
}

/// The rows of a range of ranks on their way through all steps, forward.
struct Strand<'a> {
    gates: Vec<MatMut<'a>>,
    /// State before each step.
    h: Vec<MatMut<'a>>,
    c: Vec<MatMut<'a>>,
    /// State after each rank's last step.
    last_h: MatMut<'a>,
    last_c: MatMut<'a>,
}

/// A recurrent layer over a padded batch.
///
/// `h, c = cell(W_ih·x[t] + b_ih + W_hh·h + b_hh)` step by step in the sequence's direction, `y[t] = h`;
/// steps from a row's length on leave the state unchanged and output zeros.
///
/// # Shapes
/// See [`Sequence`], [`Weights`], [`Output`]; `initial` (zeros when `None`) `[batch, hidden]`.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit or a length exceeds the sequence; nothing is written then.
///
/// Accuracy and bits: see the module; asserted by `tests::sequence`.
///
/// # Source
/// One input product for all steps: Appleyard, Kočiský and Blunsom 2016 (arXiv:1604.01946), section 3.
pub fn forward(
    ctx: &Context,
    weights: &Weights<'_>,
    sequence: &Sequence<'_>,
    initial: Option<State<'_>>,
    output: Output<'_>,
) -> Result<Saved, ShapeError> {
    let (cell, hidden) = (weights.cell, weights.hidden());
    let cell_columns = cell.cell_columns(hidden);
    let plan = check_forward(weights, sequence, initial, &output)?;
    let batch = plan.batch();
    let mut saved = Saved::new(weights, plan);
    let Saved { plan, gates, h, c, .. } = &mut saved;
    let rows = plan.rows();
    let mut gates = matrix_mut(gates, rows, cell.gate_columns(hidden));
    let mut gathered = None;
    project(ctx, weights, plan.gather(sequence.x, &mut gathered), gates.reborrow())?;
    drop(gathered);
    let w_hh = PackedWeights::pack(ctx, weights.w_hh.t())?;

    let mut last_h = ScratchBuf::take(batch * hidden);
    let mut last_c = ScratchBuf::take(batch * cell_columns);
    let mut h = matrix_mut(h, rows, hidden);
    let mut c = matrix_mut(c, rows, cell_columns);
    start_states(plan, initial.map(|s| s.h), h.reborrow(), matrix_mut(&mut last_h, batch, hidden));
    let initial_c = initial.and_then(|s| s.c);
    start_states(plan, initial_c, c.reborrow(), matrix_mut(&mut last_c, batch, cell_columns));

    let ranges = split(ctx, plan, cell, hidden);
    let strands: Vec<Strand<'_>> = plan
        .split_steps(gates, &ranges)
        .into_iter()
        .zip(plan.split_steps(h.reborrow(), &ranges))
        .zip(plan.split_steps(c, &ranges))
        .zip(split_rows(matrix_mut(&mut last_h, batch, hidden), &ranges))
        .zip(split_rows(matrix_mut(&mut last_c, batch, cell_columns), &ranges))
        .map(|((((gates, h), c), last_h), last_c)| Strand { gates, h, c, last_h, last_c })
        .collect();
    let part = part_context(ctx, strands.len());
    ctx.for_each_owned(strands, |strand| run(&part, cell, plan, &w_hh, strand));

    let last = matrix(&last_h, batch, hidden);
    let h = h.as_ref();
    plan.scatter(ctx, output.y, |t, rank| match plan.next(t) {
        Some(next) if rank < plan.continuing(t) => h.row(plan.rows_at(next, &(rank..rank + 1)).start),
        _ => last.row(rank),
    });
    if let Some(into) = output.last {
        unrank(plan, last, into.h);
        if let Some(into) = into.c {
            unrank(plan, matrix(&last_c, batch, cell_columns), into);
        }
    }
    Ok(saved)
}

fn check_forward(
    weights: &Weights<'_>,
    sequence: &Sequence<'_>,
    initial: Option<State<'_>>,
    output: &Output<'_>,
) -> Result<Plan, ShapeError> {
    weights.check()?;
    let plan = Plan::new(sequence)?;
    let (cell, shape) = (weights.cell, [plan.batch(), weights.hidden()]);
    expect_dim("x", "columns", weights.input(), sequence.x.cols())?;
    sequence.x.expect_contiguous_rows("x")?;
    expect_dim("y", "rows", sequence.x.rows(), output.y.rows())?;
    expect_dim("y", "columns", weights.hidden(), output.y.cols())?;
    output.y.expect_contiguous_rows("y")?;
    if let Some(state) = initial {
        state.check(["initial.h", "initial.c"], cell, shape)?;
    }
    if let Some(state) = &output.last {
        state.check(["last.h", "last.c"], cell, shape)?;
    }
    Ok(plan)
}

/// Puts the initial state where each rank starts, and into `last` for the ranks without any step.
fn start_states(plan: &Plan, initial: Option<MatRef<'_>>, mut states: MatMut<'_>, mut last: MatMut<'_>) {
    let put = |into: &mut [f32], rank: usize| match initial {
        Some(initial) => into.copy_from_slice(initial.row(plan.order()[rank])),
        None => into.fill(0.0),
    };
    for t in 0..plan.seq() {
        let block = plan.rows_at(t, &(0..plan.batch()));
        for rank in plan.continued(t)..block.len() {
            put(states.row_mut(block.start + rank), rank);
        }
    }
    for rank in 0..plan.batch() {
        put(last.row_mut(rank), rank);
    }
}

fn split_rows<'m>(matrix: MatMut<'m>, ranges: &[Range<usize>]) -> Vec<MatMut<'m>> {
    let mut rest = matrix;
    let mut parts = Vec::with_capacity(ranges.len());
    for range in ranges {
        let (part, below) = rest.split_rows(range.len());
        parts.push(part);
        rest = below;
    }
    parts
}

/// The recurrence of one strand.
fn run(ctx: &Context, cell: Cell, plan: &Plan, w_hh: &PackedWeights, strand: Strand<'_>) {
    let Strand { mut gates, mut h, mut c, mut last_h, mut last_c } = strand;
    let columns = cell.recurrent_columns(w_hh.rows());
    for t in (0..plan.seq()).map(|visit| plan.step(visit)) {
        let rows = gates[t].rows();
        if rows == 0 {
            continue;
        }
        let sums = gates[t].reborrow().sub(0..rows, columns.clone());
        gemm_packed(ctx, h[t].as_ref(), w_hh, sums, Accum::Add, &Epilogue::default())
            .expect("shapes fit by construction");
        let continuing = plan.next(t).map_or(0, |next| h[next].rows().min(rows));
        if let Some(next) = plan.next(t).filter(|_| continuing > 0) {
            let [h_now, h_next] = h.get_disjoint_mut([t, next]).expect("a step is not its successor");
            let [c_now, c_next] = c.get_disjoint_mut([t, next]).expect("a step is not its successor");
            let now = (gates[t].reborrow(), h_now.as_ref(), c_now.as_ref());
            update(ctx, cell, 0..continuing, now, (h_next.reborrow(), c_next.reborrow()));
        }
        if continuing < rows {
            let now = (gates[t].reborrow(), h[t].as_ref(), c[t].as_ref());
            update(ctx, cell, continuing..rows, now, (last_h.reborrow(), last_c.reborrow()));
        }
    }
}

/// Gates, `h` and `c` of one step; of each the same rows are meant.
type Now<'a> = (MatMut<'a>, MatRef<'a>, MatRef<'a>);

/// The gates' pass over some rows of a step.
fn update(
    ctx: &Context,
    cell: Cell,
    rows: Range<usize>,
    (gates, h_prev, c_prev): Now<'_>,
    (h, c): (MatMut<'_>, MatMut<'_>),
) {
    let all = |cols: usize| 0..cols;
    let (g, hp, cp, hn, cn) = (gates.cols(), h_prev.cols(), c_prev.cols(), h.cols(), c.cols());
    let part = gates::Forward {
        gates: gates.sub(rows.clone(), all(g)),
        h_prev: h_prev.sub(rows.clone(), all(hp)),
        c_prev: c_prev.sub(rows.clone(), all(cp)),
        h: h.sub(rows.clone(), all(hn)),
        c: c.sub(rows, all(cn)),
    };
    gates::forward(ctx, cell, part);
}

/// Rows by rank to rows by batch entry.
fn unrank(plan: &Plan, by_rank: MatRef<'_>, mut by_entry: MatMut<'_>) {
    for (rank, &b) in plan.order().iter().enumerate() {
        by_entry.row_mut(b).copy_from_slice(by_rank.row(rank));
    }
}

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
    cell: Cell,
    plan: &'a Plan,
    w_hh: PackedWeights,
    h: MatRef<'a>,
    c: MatRef<'a>,
    d_y: Option<MatRef<'a>>,
}

/// The gradients of [`forward`], which consume what it saved.
///
/// `d_h` goes back step by step through the gates and `W_hh`; then `d_W_ih`, `d_W_hh`, the biases' gradients
/// (all added to) and `d_x` (overwritten) follow from the gates' gradients of all steps, a product each.
///
/// # Shapes
/// `weights` and `sequence` as given to [`forward`]; see [`OutputGrads`] and [`InputGrads`].
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
    let Saved { cell, hidden, plan, mut gates, h, c, .. } = saved;
    let (batch, rows, columns) = (plan.batch(), plan.rows(), cell.gate_columns(hidden));
    let cell_columns = cell.cell_columns(hidden);
    let mut d_h = ScratchBuf::take(batch * hidden);
    let mut d_c = ScratchBuf::take(batch * cell_columns);
    rank(&plan, upstream.d_last.map(|s| s.h), matrix_mut(&mut d_h, batch, hidden));
    rank(&plan, upstream.d_last.and_then(|s| s.c), matrix_mut(&mut d_c, batch, cell_columns));

    let back = Back {
        cell,
        plan: &plan,
        w_hh: PackedWeights::pack(ctx, weights.w_hh)?,
        h: matrix(&h, rows, hidden),
        c: matrix(&c, rows, cell_columns),
        d_y: upstream.d_y,
    };
    let ranges = split(ctx, &plan, cell, hidden);
    let strands: Vec<BackStrand<'_>> = plan
        .split_steps(matrix_mut(&mut gates, rows, columns), &ranges)
        .into_iter()
        .zip(&ranges)
        .zip(split_rows(matrix_mut(&mut d_h, batch, hidden), &ranges))
        .zip(split_rows(matrix_mut(&mut d_c, batch, cell_columns), &ranges))
        .map(|(((gates, ranks), d_h), d_c)| BackStrand { ranks: ranks.clone(), gates, d_h, d_c })
        .collect();
    let part = part_context(ctx, strands.len());
    ctx.for_each_owned(strands, |strand| run_back(&part, &back, strand));

    let InputGrads { weights: d_weights, d_x, d_initial } = grads;
    if let Some(StateMut { h: into_h, c: into_c }) = d_initial {
        unrank(&plan, matrix(&d_h, batch, hidden), into_h);
        if let Some(into_c) = into_c {
            unrank(&plan, matrix(&d_c, batch, cell_columns), into_c);
        }
    }
    let d_gates = matrix(&gates, rows, columns);
    let mut gathered = None;
    weight_gradients(ctx, cell, d_gates, plan.gather(sequence.x, &mut gathered), back.h, d_weights)?;
    match d_x {
        Some(d_x) => input_gradient(ctx, weights, &plan, d_gates, d_x),
        None => Ok(()),
    }
}

fn check_backward(
    weights: &Weights<'_>,
    sequence: &Sequence<'_>,
    saved: &Saved,
    upstream: &OutputGrads<'_>,
    grads: &InputGrads<'_>,
) -> Result<(), ShapeError> {
    weights.check()?;
    let Saved { cell, hidden, input, plan, .. } = saved;
    let (cell, hidden, input, x) = (*cell, *hidden, *input, sequence.x);
    let state = [plan.batch(), hidden];
    expect_dim("w_hh", "rows (as in forward)", cell.gates() * hidden, weights.w_hh.rows())?;
    expect_dim("w_hh", "columns (as in forward)", hidden, weights.hidden())?;
    expect_dim("w_ih", "columns (as in forward)", input, weights.input())?;
    expect_dim("x", "rows (as in forward)", plan.batch() * plan.seq(), x.rows())?;
    expect_dim("x", "columns (as in forward)", input, x.cols())?;
    x.expect_contiguous_rows("x")?;
    if let Some(d_y) = upstream.d_y {
        expect_dim("d_y", "rows", x.rows(), d_y.rows())?;
        expect_dim("d_y", "columns", hidden, d_y.cols())?;
        d_y.expect_contiguous_rows("d_y")?;
    }
    if let Some(d_last) = &upstream.d_last {
        d_last.check(["d_last.h", "d_last.c"], cell, state)?;
    }
    if let Some(d_initial) = &grads.d_initial {
        d_initial.check(["d_initial.h", "d_initial.c"], cell, state)?;
    }
    if let Some(d_x) = &grads.d_x {
        expect_dim("d_x", "rows", x.rows(), d_x.rows())?;
        expect_dim("d_x", "columns", input, d_x.cols())?;
        d_x.expect_contiguous_rows("d_x")?;
    }
    grads.weights.check(cell, hidden, input)
}

/// The recurrence of one strand, backward: gates become the gradients of their sums.
fn run_back(ctx: &Context, back: &Back<'_>, strand: BackStrand<'_>) {
    let Back { cell, plan, h, c, .. } = *back;
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
            let (first, d_h) = (ranks.start, d_h_now.reborrow());
            ctx.isa().dispatch(AddRows { d_h, d_y, row_of: |rank| plan.padded_row(t, first + rank) });
        }
        let step = gates::Backward {
            gates: gates[t].reborrow(),
            h_prev: h.sub(at.clone(), 0..h_cols),
            c_prev: c.sub(at, 0..c_cols),
            d_h: d_h_now.reborrow(),
            d_c: d_c.reborrow().sub(0..rows, 0..c_cols),
        };
        gates::backward(ctx, cell, step);
        state_gradient(ctx, (cell, &back.w_hh), gates[t].as_ref(), d_h_now)
            .expect("shapes fit by construction");
    }
}

/// `d_h[i] += d_y[row_of(i)]`.
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
fn input_gradient(
    ctx: &Context,
    weights: &Weights<'_>,
    plan: &Plan,
    d_gates: MatRef<'_>,
    d_x: MatMut<'_>,
) -> Result<(), ShapeError> {
    let (rows, input) = (plan.rows(), weights.input());
    let product = |mut d_x: MatMut<'_>| {
        let mut accum = Accum::Overwrite;
        for Window { columns, rows: gate_rows } in weights.cell.input_windows(weights.hidden()) {
            let d_sums = d_gates.sub(0..rows, columns);
            let w = weights.w_ih.sub(gate_rows, 0..input);
            gemm(ctx, d_sums, w, d_x.reborrow(), accum, &Epilogue::default())?;
            accum = Accum::Add;
        }
        Ok(())
    };
    if plan.is_identity() {
        return product(d_x);
    }
    let mut gapless = ScratchBuf::take(rows * input);
    product(matrix_mut(&mut gapless, rows, input))?;
    let gapless = matrix(&gapless, rows, input);
    plan.scatter(ctx, d_x, |t, rank| gapless.row(plan.rows_at(t, &(rank..rank + 1)).start));
    Ok(())
}
