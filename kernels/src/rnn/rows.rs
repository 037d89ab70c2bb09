//! The recurrence with rows dealt to the threads: each takes its rows from the first step to the last, with no barrier in between.
//!
//! Naively the input's product of all steps comes first. The gates of all steps are larger than any cache (34 MB for 32×128×512: batch, steps,
//! hidden), so each of them would travel to memory and back before the state's product adds to it. Here a chunk of steps goes through both:
//! ```text
//! for chunk in steps, as many as have CHUNK rows:
//!     gates[chunk] = x[chunk] · W_ihᵀ + b
//!     for t in chunk:
//!         gates[t] += h · W_hhᵀ
//!         h, c = cell(gates[t], h, c)
//! ```
//! Each element is the same sums in the same order, so no bit depends on it.
//!
//! Where nothing goes back, all chunks have one place in memory ([`Gates::Passing`]).

use std::ops::Range;

use crate::context::Context;
use crate::error::ShapeError;
use crate::gemm::PackedWeights;
use crate::scratch::ScratchBuf;
use crate::view::{MatMut, MatRef};

use super::input_product::InputWeights;
use super::plan::{Plan, copy, gates_matrix_mut, gates_stride, matrix, matrix_mut};
use super::sequence::split_rows;
use super::state_product::{StateWeights, Step};
use super::{Direction, Weights};

/// Rows whose inputs are projected at a time: so few that their gates stay in the second-level cache, so many that the weights, which pass through it
/// each time, are used enough.
pub(super) const CHUNK: usize = 32;
/// Where several threads keep the gates of all steps, the rows of one step are all that follow each other in memory. A thread that has fewer than
/// so many finds them projected.
const FEW: usize = 8;

/// What all strands read.
pub(super) struct Layer<'a> {
    pub(super) plan: &'a Plan,
    pub(super) input: InputWeights,
    pub(super) state: StateWeights,
    /// Without gaps.
    pub(super) x: MatRef<'a>,
}

impl<'a> Layer<'a> {
    /// Packs the weights for one call.
    pub(super) fn new(
        ctx: &Context,
        weights: &Weights<'_>,
        plan: &'a Plan,
        x: MatRef<'a>,
    ) -> Result<Layer<'a>, ShapeError> {
        let input = InputWeights::new(ctx, weights)?;
        Ok(Layer {
            plan,
            input,
            state: StateWeights::forward(ctx, weights, PackedWeights::pack_for_call)?,
            x,
        })
    }
}

/// The states of a range of ranks.
pub(super) struct States<'a> {
    /// Before each step.
    pub(super) before: Vec<MatMut<'a>>,
    /// After each rank's last step.
    pub(super) last: MatMut<'a>,
}

impl<'a> States<'a> {
    /// Of each range, in gapless buffers.
    pub(super) fn split(
        plan: &Plan,
        before: MatMut<'a>,
        last: MatMut<'a>,
        ranges: &[Range<usize>],
    ) -> Vec<States<'a>> {
        let parts = plan.split_steps(before, ranges).into_iter().zip(split_rows(last, ranges));
        parts.map(|(before, last)| States { before, last }).collect()
    }

    /// Of each range, in the outputs `y` of rows that all have full length: the state before a step is the output of the one before.
    pub(super) fn in_outputs(
        plan: &Plan,
        start: MatMut<'a>,
        y: MatMut<'a>,
        ranges: &[Range<usize>],
    ) -> Vec<States<'a>> {
        let parts = plan.split_steps(y, ranges).into_iter().zip(split_rows(start, ranges));
        let states = parts.map(|(mut states, start)| match plan.direction() {
            Direction::Forward => {
                states.insert(0, start);
                let last = states.pop().expect("there is a step");
                States { before: states, last }
            }
            Direction::Reverse => {
                states.push(start);
                let last = states.remove(0);
                States { before: states, last }
            }
        });
        states.collect()
    }
}

/// The rows of a range of ranks on their way through all steps, forward.
struct Strand<'a> {
    ranks: Range<usize>,
    chunks: Vec<Range<usize>>,
    /// The step from which on the inputs are projected already.
    projected: usize,
    gates: Gates<'a>,
    h: States<'a>,
    c: States<'a>,
}

/// The gates of a strand.
enum Gates<'a> {
    /// Of all chunks, for the way back.
    Kept(Vec<MatMut<'a>>),
    /// Of one chunk after the other.
    Passing,
}

/// The recurrence of all rows, those of each range on a thread. `gates` is where those of all steps are to be kept, if they are.
pub(super) fn forward(
    ctx: &Context,
    layer: &Layer<'_>,
    ranges: &[Range<usize>],
    gates: Option<MatMut<'_>>,
    (h, c): (Vec<States<'_>>, Vec<States<'_>>),
) {
    let Layer { plan, input, x, .. } = layer;
    let chunks: Vec<Vec<Range<usize>>> = match ranges.len() > 1 && gates.is_some() {
        true => ranges.iter().map(|_| plan.steps()).collect(),
        false => ranges.iter().map(|ranks| plan.chunks(ranks, CHUNK)).collect(),
    };
    let mut projected = plan.seq();
    let gates: Vec<Gates<'_>> = match gates {
        Some(mut gates) => {
            if ranges.len() > 1 {
                projected = plan.first_step_below(ranges, FEW);
                let (late, cols) = (plan.rows_from(projected), gates.cols());
                input.project(ctx, x.sub(late.clone(), 0..x.cols()), gates.reborrow().sub(late, 0..cols));
            }
            plan.split_chunks(gates, ranges, &chunks[0]).into_iter().map(Gates::Kept).collect()
        }
        None => ranges.iter().map(|_| Gates::Passing).collect(),
    };
    let strands = ranges.iter().zip(chunks).zip(gates).zip(h.into_iter().zip(c));
    let strands: Vec<Strand<'_>> = strands
        .map(|(((ranks, chunks), gates), (h, c))| Strand {
            ranks: ranks.clone(),
            chunks,
            projected,
            gates,
            h,
            c,
        })
        .collect();
    let part = part_context(ctx, strands.len());
    ctx.for_each_owned(strands, |strand| run(&part, layer, strand));
}

/// How the products of one part run: alone on their thread when there are several parts.
pub(super) fn part_context(ctx: &Context, parts: usize) -> Context {
    if parts > 1 { ctx.single_threaded() } else { *ctx }
}

/// All steps of one strand.
fn run(ctx: &Context, layer: &Layer<'_>, mut strand: Strand<'_>) {
    let (plan, sizes) = (layer.plan, layer.state.sizes());
    let mut own_x = None;
    // Taken by the thread that drops it: else it would go from one thread's scratch list to another's, a larger one with it.
    let mut passing = ScratchBuf::take(match &strand.gates {
        Gates::Kept(_) => 0,
        Gates::Passing => {
            let rows = strand.chunks.iter().map(|steps| plan.rows_in(steps, &strand.ranks));
            rows.max().unwrap_or(0) * gates_stride(sizes.gate_columns())
        }
    });
    for index in plan.visits(&(0..strand.chunks.len())) {
        let Strand { ranks, chunks, projected, gates, h, c } = &mut strand;
        let steps = chunks[index].clone();
        let rows = plan.rows_in(&steps, ranks);
        let mut block = match gates {
            Gates::Kept(chunks) => chunks[index].reborrow(),
            Gates::Passing => {
                let columns = sizes.gate_columns();
                gates_matrix_mut(&mut passing[..rows * gates_stride(columns)], rows, columns)
            }
        };
        if rows > 0 && steps.start < *projected {
            layer.input.project(ctx, inputs(layer, &steps, ranks, &mut own_x), block.reborrow());
        }
        for t in plan.visits(&steps) {
            let first = plan.rows_in(&(steps.start..t), ranks);
            let (rows, cols) = (plan.rows_at(t, ranks).len(), block.cols());
            if rows > 0 {
                step(ctx, layer, t, block.reborrow().sub(first..first + rows, 0..cols), [h, c]);
            }
        }
    }
}

/// The inputs of some ranks at some steps: where they are if they follow each other there.
fn inputs<'x>(
    layer: &Layer<'x>,
    steps: &Range<usize>,
    ranks: &Range<usize>,
    buffer: &'x mut Option<ScratchBuf>,
) -> MatRef<'x> {
    let Layer { plan, x, .. } = *layer;
    let (rows, cols) = (plan.rows_in(steps, ranks), x.cols());
    if plan.is_one_block(steps, ranks) {
        let first = plan.rows_at(steps.start, ranks).start;
        return x.sub(first..first + rows, 0..cols);
    }
    let mut rest = matrix_mut(buffer.insert(ScratchBuf::take(rows * cols)), rows, cols);
    for t in steps.clone() {
        let at = plan.rows_at(t, ranks);
        let (block, below) = rest.split_rows(at.len());
        copy(x.sub(at, 0..cols), block);
        rest = below;
    }
    matrix(buffer.as_ref().expect("filled above"), rows, cols)
}

/// One step of a strand: the state's product, the gates, the new states.
fn step(ctx: &Context, layer: &Layer<'_>, t: usize, mut gates: MatMut<'_>, [h, c]: [&mut States<'_>; 2]) {
    let (plan, state, rows) = (layer.plan, &layer.state, gates.rows());
    state.add(ctx, gates.reborrow(), h.before[t].as_ref()).expect("shapes fit by construction");
    let next = plan.next(t);
    let continuing = next.map_or(0, |next| h.before[next].rows().min(rows));
    if let Some(next) = next.filter(|_| continuing > 0) {
        let [h_now, h_next] = h.before.get_disjoint_mut([t, next]).expect("a step is not its successor");
        let [c_now, c_next] = c.before.get_disjoint_mut([t, next]).expect("a step is not its successor");
        let now = (gates.reborrow(), h_now.as_ref(), c_now.as_ref());
        update(ctx, state, 0..continuing, now, (h_next.reborrow(), c_next.reborrow()));
    }
    if continuing < rows {
        let now = (gates, h.before[t].as_ref(), c.before[t].as_ref());
        update(ctx, state, continuing..rows, now, (h.last.reborrow(), c.last.reborrow()));
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
