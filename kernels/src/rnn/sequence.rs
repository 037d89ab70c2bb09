//! A layer over whole sequences, forward: projection of all steps, recurrence, outputs.

use std::ops::Range;

use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::gemm::PackedWeights;
use crate::scratch::ScratchBuf;
use crate::view::{MatMut, MatRef};

use super::input_product::project;
use super::plan::{Plan, gates_matrix_mut, gates_stride, matrix, matrix_mut};
use super::state_product::{StateWeights, Step};
use super::weights::Sizes;
use super::{Output, Sequence, State, Weights, columns};

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

/// How the products of one part run: alone on their thread when there are several parts.
pub(super) fn part_context(ctx: &Context, parts: usize) -> Context {
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
    let batch = plan.batch();
    let mut saved = Saved::new(weights, plan);
    let Saved { sizes, plan, gates, h, c } = &mut saved;
    let (rows, width, cell_columns) = (plan.rows(), sizes.output, sizes.cell_columns());
    let mut gates = gates_matrix_mut(gates, rows, sizes.gate_columns());
    let mut gathered = None;
    project(ctx, weights, plan.gather(sequence.x, &mut gathered), gates.reborrow())?;
    drop(gathered);

    let mut last_h = ScratchBuf::take(batch * width);
    let mut last_c = ScratchBuf::take(batch * cell_columns);
    let mut h = matrix_mut(h, rows, width);
    let mut c = matrix_mut(c, rows, cell_columns);
    start_states(plan, initial.map(|s| s.h), h.reborrow(), matrix_mut(&mut last_h, batch, width));
    let initial_c = initial.and_then(|s| s.c);
    start_states(plan, initial_c, c.reborrow(), matrix_mut(&mut last_c, batch, cell_columns));

    let recurrence = columns::Buffers {
        gates,
        h: h.reborrow(),
        c,
        last_h: matrix_mut(&mut last_h, batch, width),
        last_c: matrix_mut(&mut last_c, batch, cell_columns),
    };
    match columns::team_size(ctx, plan, sizes) {
        1 => {
            let weights = StateWeights::forward(ctx, weights, PackedWeights::pack_for_call)?;
            by_rows(ctx, plan, &weights, recurrence);
        }
        team => {
            let layer = columns::Layer { ctx: ctx.single_threaded(), plan, weights };
            columns::forward(team, &layer, recurrence);
        }
    }

    let last = matrix(&last_h, batch, width);
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

/// The recurrence with rows dealt to the threads.
fn by_rows(ctx: &Context, plan: &Plan, weights: &StateWeights, buffers: columns::Buffers<'_>) {
    let columns::Buffers { gates, h, c, last_h, last_c } = buffers;
    let ranges = split(ctx, plan, weights.sizes());
    let strands: Vec<Strand<'_>> = plan
        .split_steps(gates, &ranges)
        .into_iter()
        .zip(plan.split_steps(h, &ranges))
        .zip(plan.split_steps(c, &ranges))
        .zip(split_rows(last_h, &ranges))
        .zip(split_rows(last_c, &ranges))
        .map(|((((gates, h), c), last_h), last_c)| Strand { gates, h, c, last_h, last_c })
        .collect();
    let part = part_context(ctx, strands.len());
    ctx.for_each_owned(strands, |strand| run(&part, plan, weights, strand));
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

/// The recurrence of one strand.
fn run(ctx: &Context, plan: &Plan, weights: &StateWeights, strand: Strand<'_>) {
    let Strand { mut gates, mut h, mut c, mut last_h, mut last_c } = strand;
    for t in (0..plan.seq()).map(|visit| plan.step(visit)) {
        let rows = gates[t].rows();
        if rows == 0 {
            continue;
        }
        weights.add(ctx, gates[t].reborrow(), h[t].as_ref()).expect("shapes fit by construction");
        let continuing = plan.next(t).map_or(0, |next| h[next].rows().min(rows));
        if let Some(next) = plan.next(t).filter(|_| continuing > 0) {
            let [h_now, h_next] = h.get_disjoint_mut([t, next]).expect("a step is not its successor");
            let [c_now, c_next] = c.get_disjoint_mut([t, next]).expect("a step is not its successor");
            let now = (gates[t].reborrow(), h_now.as_ref(), c_now.as_ref());
            update(ctx, weights, 0..continuing, now, (h_next.reborrow(), c_next.reborrow()));
        }
        if continuing < rows {
            let now = (gates[t].reborrow(), h[t].as_ref(), c[t].as_ref());
            update(ctx, weights, continuing..rows, now, (last_h.reborrow(), last_c.reborrow()));
        }
    }
}

/// Gates, `h` and `c` of one step; of each the same rows are meant.
type Now<'a> = (MatMut<'a>, MatRef<'a>, MatRef<'a>);

/// The new state of some rows of a step.
fn update(
    ctx: &Context,
    weights: &StateWeights,
    rows: Range<usize>,
    (gates, h_prev, c_prev): Now<'_>,
    (h, c): (MatMut<'_>, MatMut<'_>),
) {
    let all = |cols: usize| 0..cols;
    let (g, hp, cp, hn, cn) = (gates.cols(), h_prev.cols(), c_prev.cols(), h.cols(), c.cols());
    let part = Step {
        gates: gates.sub(rows.clone(), all(g)),
        h_prev: h_prev.sub(rows.clone(), all(hp)),
        c_prev: c_prev.sub(rows.clone(), all(cp)),
        h: h.sub(rows.clone(), all(hn)),
        c: c.sub(rows, all(cn)),
    };
    weights.update(ctx, part).expect("shapes fit by construction");
}

/// Rows by rank to rows by batch entry.
pub(super) fn unrank(plan: &Plan, by_rank: MatRef<'_>, mut by_entry: MatMut<'_>) {
    for (rank, &b) in plan.order().iter().enumerate() {
        by_entry.row_mut(b).copy_from_slice(by_rank.row(rank));
    }
}
