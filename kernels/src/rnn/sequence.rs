//! A layer over whole sequences, forward: states at the start, recurrence, outputs.

use std::ops::Range;

use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::scratch::ScratchBuf;
use crate::view::{MatMut, MatRef};

use super::plan::{Plan, gates_matrix_mut, gates_stride, matrix, matrix_mut};
use super::weights::Sizes;
use super::{ForwardPass, Output, Sequence, State, StateMut, Weights, columns, rows};

/// What [`backward`](super::backward) needs of a [`forward`]: gates, and states before each step, without the padding.
pub struct Saved {
    pub(super) sizes: Sizes,
    pub(super) plan: Plan,
    pub(super) gates: ScratchBuf,
    pub(super) h: ScratchBuf,
    pub(super) c: ScratchBuf,
}

impl Saved {
    fn new(weights: &Weights<'_>, plan: Plan) -> Saved {
        let (sizes, rows) = (weights.sizes(), plan.rows());
        Saved {
            sizes,
            gates: ScratchBuf::take(rows * gates_stride(sizes.gate_columns())),
            h: ScratchBuf::take(rows * sizes.output),
            c: ScratchBuf::take(rows * sizes.cell_columns()),
            plan,
        }
    }
}

/// Below this many floating-point operations a thread's part of a recurrence is not worth handing over.
const MIN_THREAD_FLOPS: usize = 2_000_000;

/// Ranges of ranks, one a thread, as far as each has enough to do.
pub(super) fn split(ctx: &Context, plan: &Plan, sizes: &Sizes) -> Vec<Range<usize>> {
    let flops = plan.rows() * sizes.flops();
    plan.split_ranks(ctx.thread_count().min(flops / MIN_THREAD_FLOPS).max(1))
}

/// A recurrent layer over a padded batch.
///
/// `h, c = cell(W_ih·x[t] + b_ih + W_hh·h + b_hh)` step by step in the sequence's direction, `y[t] = h`;
/// steps from a row's length on leave the state unchanged and output zeros.
///
/// # Shapes
/// See [`Sequence`], [`Weights`], [`Output`]; `initial` (zeros when `None`) as [`State`].
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
    let plan = check_forward(weights, sequence, initial, &output)?;
    let mut saved = Saved::new(weights, plan);
    let Saved { sizes, plan, gates, h, c } = &mut saved;
    let rows = plan.rows();
    let kept = Kept {
        gates: Some(gates_matrix_mut(gates, rows, sizes.gate_columns())),
        h: Some(matrix_mut(h, rows, sizes.output)),
        c: matrix_mut(c, rows, sizes.cell_columns()),
    };
    let pass = ForwardPass { weights: *weights, sequence: *sequence, initial, output };
    all_steps(ctx, plan, pass, kept)?;
    Ok(saved)
}

/// As [`forward`], for a layer through which nothing goes back: the gates of a few steps at a time are all that it keeps of them.
///
/// # Shapes
/// See [`forward`].
///
/// # Errors
/// As [`forward`].
///
/// The bits are those of [`forward`]: `tests::sequence`.
pub fn infer(
    ctx: &Context,
    weights: &Weights<'_>,
    sequence: &Sequence<'_>,
    initial: Option<State<'_>>,
    output: Output<'_>,
) -> Result<(), ShapeError> {
    let plan = check_forward(weights, sequence, initial, &output)?;
    let (rows, sizes) = (plan.rows(), weights.sizes());
    let in_outputs = plan.is_identity() && rows > 0 && columns::team_size(ctx, &plan, &sizes) == 1;
    let mut h = ScratchBuf::take(if in_outputs { 0 } else { rows * sizes.output });
    let mut c = ScratchBuf::take(rows * sizes.cell_columns());
    let h = (!in_outputs).then(|| matrix_mut(&mut h, rows, sizes.output));
    let kept = Kept { gates: None, h, c: matrix_mut(&mut c, rows, sizes.cell_columns()) };
    all_steps(ctx, &plan, ForwardPass { weights: *weights, sequence: *sequence, initial, output }, kept)
}

/// Where a pass leaves what it goes through.
struct Kept<'a> {
    /// Of all steps; `None` where nothing goes back.
    gates: Option<MatMut<'a>>,
    /// States before each step. `None`: each is found in the outputs, where rows lie as in the gapless buffers.
    h: Option<MatMut<'a>>,
    c: MatMut<'a>,
}

/// All steps, and the outputs.
fn all_steps(
    ctx: &Context,
    plan: &Plan,
    ForwardPass { weights, sequence, initial, output }: ForwardPass<'_>,
    Kept { gates, mut h, mut c }: Kept<'_>,
) -> Result<(), ShapeError> {
    let (sizes, Output { mut y, last }) = (weights.sizes(), output);
    let (batch, width, cell_columns) = (plan.batch(), sizes.output, sizes.cell_columns());
    let mut gathered = None;
    let x = plan.gather(sequence.x, &mut gathered);
    let [mut end_h, mut end_c] = [width, cell_columns].map(|columns| ScratchBuf::take(batch * columns));
    let mut ends = (matrix_mut(&mut end_h, batch, width), matrix_mut(&mut end_c, batch, cell_columns));
    let (initial_h, initial_c) = (initial.map(|state| state.h), initial.and_then(|state| state.c));
    start_states(plan, initial_c, c.reborrow(), ends.1.reborrow());
    match &mut h {
        Some(h) => start_states(plan, initial_h, h.reborrow(), ends.0.reborrow()),
        None => start_ranks(plan, initial_h, ends.0.reborrow()),
    }
    match (columns::team_size(ctx, plan, &sizes), &mut h) {
        (team @ 2.., Some(h)) => {
            let layer = columns::Layer { ctx: ctx.single_threaded(), plan, weights: &weights };
            let (h, (last_h, last_c)) = (h.reborrow(), ends);
            columns::forward(team, &layer, columns::Buffers { x, gates, h, c, last_h, last_c });
        }
        (_, h) => {
            let ranges = split(ctx, plan, &sizes);
            let layer = rows::Layer::new(ctx, &weights, plan, x)?;
            let h = match h {
                Some(h) => rows::States::split(plan, h.reborrow(), ends.0, &ranges),
                None => rows::States::in_outputs(plan, ends.0, y.reborrow(), &ranges),
            };
            rows::forward(ctx, &layer, &ranges, gates, (h, rows::States::split(plan, c, ends.1, &ranges)));
        }
    }
    let end_c = matrix(&end_c, batch, cell_columns);
    let Some(h) = h else {
        let end = plan.step(plan.seq() - 1) * batch;
        return last_states(plan, (y.as_ref().sub(end..end + batch, 0..width), end_c), last);
    };
    let (h, end_h) = (h.as_ref(), matrix(&end_h, batch, width));
    plan.scatter(ctx, y, |t, rank| match plan.next(t) {
        Some(next) if rank < plan.continuing(t) => h.row(plan.rows_at(next, &(rank..rank + 1)).start),
        _ => end_h.row(rank),
    });
    last_states(plan, (end_h, end_c), last)
}

/// The states after each rank's last step, to where they are wanted.
fn last_states(
    plan: &Plan,
    (h, c): (MatRef<'_>, MatRef<'_>),
    into: Option<StateMut<'_>>,
) -> Result<(), ShapeError> {
    let Some(into) = into else { return Ok(()) };
    unrank(plan, h, into.h);
    if let Some(into) = into.c {
        unrank(plan, c, into);
    }
    Ok(())
}

pub(super) fn check_forward(
    weights: &Weights<'_>,
    sequence: &Sequence<'_>,
    initial: Option<State<'_>>,
    output: &Output<'_>,
) -> Result<Plan, ShapeError> {
    weights.check()?;
    let plan = Plan::new(sequence)?;
    let (sizes, batch) = (weights.sizes(), plan.batch());
    expect_dim("x", "columns", weights.input(), sequence.x.cols())?;
    sequence.x.expect_contiguous_rows("x")?;
    expect_dim("y", "rows", sequence.x.rows(), output.y.rows())?;
    expect_dim("y", "columns", sizes.output, output.y.cols())?;
    output.y.expect_contiguous_rows("y")?;
    if let Some(state) = initial {
        state.check(["initial.h", "initial.c"], &sizes, batch)?;
    }
    if let Some(state) = &output.last {
        state.check(["last.h", "last.c"], &sizes, batch)?;
    }
    Ok(plan)
}

/// Puts the initial state where each rank starts, and into `last` for the ranks without any step.
fn start_states(plan: &Plan, initial: Option<MatRef<'_>>, mut states: MatMut<'_>, last: MatMut<'_>) {
    for t in 0..plan.seq() {
        let block = plan.rows_at(t, &(0..plan.batch()));
        for rank in plan.continued(t)..block.len() {
            start_rank(plan, initial, rank, states.row_mut(block.start + rank));
        }
    }
    start_ranks(plan, initial, last);
}

/// The initial state of every rank.
fn start_ranks(plan: &Plan, initial: Option<MatRef<'_>>, mut states: MatMut<'_>) {
    for rank in 0..plan.batch() {
        start_rank(plan, initial, rank, states.row_mut(rank));
    }
}

fn start_rank(plan: &Plan, initial: Option<MatRef<'_>>, rank: usize, into: &mut [f32]) {
    match initial {
        Some(initial) => into.copy_from_slice(initial.row(plan.order()[rank])),
        None => into.fill(0.0),
    }
}

pub(super) fn split_rows<'m>(matrix: MatMut<'m>, ranges: &[Range<usize>]) -> Vec<MatMut<'m>> {
    let mut rest = matrix;
    let mut parts = Vec::with_capacity(ranges.len());
    for range in ranges {
        let (part, below) = rest.split_rows(range.len());
        parts.push(part);
        rest = below;
    }
    parts
}

/// Rows by rank to rows by batch entry.
pub(super) fn unrank(plan: &Plan, by_rank: MatRef<'_>, mut by_entry: MatMut<'_>) {
    for (rank, &b) in plan.order().iter().enumerate() {
        by_entry.row_mut(b).copy_from_slice(by_rank.row(rank));
    }
}
