//! The recurrence of a small batch on several threads: each owns some hidden units for the whole sequence.
//!
//! A thread that owns rows reads all of `W_hh` at every step, and a batch of one has only one row to own. Here a
//! thread owns units: the columns of `W_hhᵀ` of all their gates, which stay in its own cache, and those of every
//! buffer. To its gates' pass a part is a layer that is narrower. What the next product needs of the others
//! (the new state; backward, the gradients of the sums) goes over a [`Board`] with one barrier a step:
//! ```text
//! for t in 0..seq:
//!     sums[:, own] += h · W_hhᵀ[:, own]           # h of all units: a copy of this thread
//!     h'[:, own] = cell(sums[:, own])
//!     board[t % 2][own] = h'[:, own];  arrive
//!     store what backward wants                   # while the others arrive
//!     wait;  h[:, others] = board[t % 2][others]
//! ```
//! - Each element is the same chain over k as in the whole product, so the bits are those of the other path.
//! - The board has two pages: a page is written again two steps later, after a barrier that its readers reach only
//!   when they have read it. So its locks are always free, and one barrier a step is enough.
//! - A part works on a gapless copy of its gates: two copies of `4 · units` values a row beside the product's
//!   `4 · units · hidden` multiply-adds. Rejected: sharing `h` itself, which needs `unsafe` to save the copy of
//!   `batch · hidden` values a step.

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use crate::context::Context;
use crate::gemm::{Accum, Epilogue, PackedWeights, gemm_packed};
use crate::scratch::ScratchBuf;
use crate::view::{MatMut, MatRef};

use super::plan::{Plan, copy, matrix, matrix_mut};
use super::sequence_backward::add_upstream;
use super::state_product::direct_gradient;
use super::team::{Barrier, run_together};
use super::weights::Sizes;
use super::{Cell, Weights, gates};

/// Units are dealt in blocks of so many, so that few panels of a kernel are cut.
const BLOCK: usize = 32;
/// A thread has at least so many units: with fewer the barrier would be a large part of a step (an estimate).
const MIN_UNITS: usize = 64;
/// Rows a thread from which on rows are dealt: then a step reads `W_hh` for enough rows, and needs no barrier (an estimate).
const ROWS_PER_THREAD: usize = 12;
/// Below this many floating-point operations (about 300 µs on one thread) a recurrence is over before a team stands.
const MIN_FLOPS: usize = 16_000_000;

/// How many threads should own units; 1 where rows are to be dealt instead, or where a step has two products one after
/// the other (a reset before the second, a projection) and so would have two barriers.
pub(super) fn team_size(ctx: &Context, plan: &Plan, sizes: &Sizes) -> usize {
    let threads = ctx.thread_count().min(sizes.hidden / MIN_UNITS);
    let few_rows = plan.batch() < ROWS_PER_THREAD * ctx.thread_count();
    let one_product = sizes.cell.state_windows(sizes.hidden).count() == 1 && !sizes.projected;
    let enough = plan.rows() * sizes.flops() >= MIN_FLOPS;
    if threads > 1 && few_rows && one_product && enough { threads } else { 1 }
}

/// The units of each of `parts` members.
fn split_units(hidden: usize, parts: usize) -> Vec<Range<usize>> {
    let blocks = hidden.div_ceil(BLOCK);
    let edge = |part: usize| (blocks * part / parts * BLOCK).min(hidden);
    (0..parts).map(|part| edge(part)..edge(part + 1)).collect()
}

/// The columns of each range of units, of a matrix that has one column a unit (or none at all).
fn split_columns<'m>(matrix: MatMut<'m>, units: &[Range<usize>]) -> Vec<MatMut<'m>> {
    let mut rest = matrix;
    let mut parts = Vec::with_capacity(units.len());
    for range in units {
        let at = range.len().min(rest.cols());
        let (part, right) = rest.split_cols(at);
        parts.push(part);
        rest = right;
    }
    parts
}

/// For each range of units, its columns in each of the gates.
fn split_gates<'m>(gates: MatMut<'m>, hidden: usize, units: &[Range<usize>]) -> Vec<Vec<MatMut<'m>>> {
    let mut parts: Vec<Vec<MatMut<'m>>> = units.iter().map(|_| Vec::new()).collect();
    let mut rest = gates;
    while rest.cols() > 0 {
        let (gate, right) = rest.split_cols(hidden);
        for (part, columns) in parts.iter_mut().zip(split_columns(gate, units)) {
            part.push(columns);
        }
        rest = right;
    }
    parts
}

/// Some rows, all columns.
fn rows_of<'m>(matrix: &'m mut MatMut<'_>, rows: Range<usize>) -> MatMut<'m> {
    let cols = matrix.cols();
    matrix.reborrow().sub(rows, 0..cols)
}

/// Where the members leave what the others need for the next product: two pages, a sheet for each member.
struct Board {
    units: Vec<Range<usize>>,
    hidden: usize,
    pages: [Vec<RwLock<ScratchBuf>>; 2],
}

impl Board {
    /// For `groups` columns a unit and `batch` rows.
    fn new(hidden: usize, units: Vec<Range<usize>>, [batch, groups]: [usize; 2]) -> Board {
        let page = || {
            let sheet = |range: &Range<usize>| RwLock::new(ScratchBuf::take(batch * groups * range.len()));
            units.iter().map(sheet).collect()
        };
        let pages = [page(), page()];
        Board { units, hidden, pages }
    }

    /// Leaves the values of a member for the step `visit`.
    fn publish(&self, visit: usize, place: usize, from: MatRef<'_>) {
        let mut sheet = self.pages[visit % 2][place].write().unwrap_or_else(PoisonError::into_inner);
        let len = from.rows() * from.cols();
        copy(from, matrix_mut(&mut sheet[..len], from.rows(), from.cols()));
    }

    /// Takes the values of all members: `into` has, group by group, a column for each unit of the layer.
    fn collect(&self, visit: usize, mut into: MatMut<'_>) {
        let (rows, groups) = (into.rows(), into.cols() / self.hidden);
        for (units, sheet) in self.units.iter().zip(&self.pages[visit % 2]) {
            let sheet = sheet.read().unwrap_or_else(PoisonError::into_inner);
            let width = units.len();
            for (row, from) in sheet.chunks_exact(groups * width).take(rows).enumerate() {
                for (group, from) in from.chunks_exact(width).enumerate() {
                    let first = group * self.hidden + units.start;
                    into.row_mut(row)[first..first + width].copy_from_slice(from);
                }
            }
        }
    }
}

/// What all members read.
pub(super) struct Layer<'a> {
    pub(super) ctx: Context,
    pub(super) plan: &'a Plan,
    pub(super) weights: &'a Weights<'a>,
}

impl Layer<'_> {
    fn hidden(&self) -> usize {
        self.weights.hidden()
    }

    /// The peepholes of the units, for a cell that has them.
    fn peepholes(&self, units: &Range<usize>) -> Vec<f32> {
        let gates = self.weights.peepholes.chunks_exact(self.hidden());
        gates.flat_map(|gate| &gate[units.clone()]).copied().collect()
    }

    /// The rows of all ranks at step `t`.
    fn rows_at(&self, t: usize) -> Range<usize> {
        self.plan.rows_at(t, &(0..self.plan.batch()))
    }

    fn board(&self, units: &[Range<usize>], groups: usize) -> Arc<Board> {
        Arc::new(Board::new(self.hidden(), units.to_vec(), [self.plan.batch(), groups]))
    }
}

/// The buffers of a layer, forward.
pub(super) struct Buffers<'a> {
    /// Projected gates in, activated gates out.
    pub(super) gates: MatMut<'a>,
    /// States before each step.
    pub(super) h: MatMut<'a>,
    pub(super) c: MatMut<'a>,
    /// Initial states by rank in, the states after each rank's last step out.
    pub(super) last_h: MatMut<'a>,
    pub(super) last_c: MatMut<'a>,
}

/// A member's columns of [`Buffers`].
struct Part<'a> {
    place: usize,
    board: Arc<Board>,
    gates: Vec<MatMut<'a>>,
    h: MatMut<'a>,
    c: MatMut<'a>,
    last_h: MatMut<'a>,
    last_c: MatMut<'a>,
}

/// The recurrence of all rows on a team of at most `asked`.
pub(super) fn forward(asked: usize, layer: &Layer<'_>, buffers: Buffers<'_>) {
    let (batch, hidden) = (layer.plan.batch(), layer.hidden());
    let mut start = ScratchBuf::take(batch * hidden);
    copy(buffers.last_h.as_ref(), matrix_mut(&mut start, batch, hidden));
    let deal = |members| {
        let units = split_units(hidden, members);
        let board = layer.board(&units, 1);
        let states = split_columns(buffers.h, &units).into_iter().zip(split_columns(buffers.c, &units));
        let last =
            split_columns(buffers.last_h, &units).into_iter().zip(split_columns(buffers.last_c, &units));
        split_gates(buffers.gates, hidden, &units)
            .into_iter()
            .zip(states.zip(last))
            .enumerate()
            .map(|(place, (gates, ((h, c), (last_h, last_c))))| {
                let board = Arc::clone(&board);
                Part { place, board, gates, h, c, last_h, last_c }
            })
            .collect()
    };
    run_together(asked, deal, |part, barrier| run(layer, &start, part, barrier));
}

fn run(layer: &Layer<'_>, start: &[f32], part: Part<'_>, barrier: &Barrier<'_>) {
    let Layer { ref ctx, plan, weights: &Weights { cell, w_hh, .. } } = *layer;
    let Part { place, board, mut gates, mut h, mut c, mut last_h, mut last_c } = part;
    let (batch, hidden, units) = (plan.batch(), layer.hidden(), board.units[place].clone());
    let (width, cell_width) = (units.len(), c.cols());
    let weights = pack(ctx, cell, w_hh, &units);
    let peepholes = layer.peepholes(&units);
    let mut h_now = ScratchBuf::take(batch * hidden);
    h_now.copy_from_slice(start);
    let mut h_now = matrix_mut(&mut h_now, batch, hidden);
    let [mut work, mut next_h, mut next_c] =
        [gates.len() * width, width, cell_width].map(|cols| ScratchBuf::take(batch * cols));
    let mut work = matrix_mut(&mut work, batch, gates.len() * width);
    let mut next_h = matrix_mut(&mut next_h, batch, width);
    let mut next_c = matrix_mut(&mut next_c, batch, cell_width);
    let mut visit = 0;
    for t in (0..plan.seq()).map(|visit| plan.step(visit)) {
        let at = layer.rows_at(t);
        let rows = at.len();
        if rows == 0 {
            continue;
        }
        let mut sums = rows_of(&mut work, 0..rows);
        load(&gates, at.clone(), sums.reborrow());
        let first = cell.recurrent_columns(width).start;
        for (gate, w) in weights.iter().enumerate() {
            let columns = first + gate * width..first + (gate + 1) * width;
            let h = h_now.as_ref().sub(0..rows, 0..hidden);
            let sums = sums.reborrow().sub(0..rows, columns);
            gemm_packed(ctx, h, w, sums, Accum::Add, &Epilogue::default())
                .expect("shapes fit by construction");
        }
        let step = gates::Forward {
            gates: sums.reborrow(),
            peepholes: &peepholes,
            h_prev: h_now.as_ref().sub(0..rows, units.clone()),
            c_prev: c.as_ref().sub(at.clone(), 0..cell_width),
            h: rows_of(&mut next_h, 0..rows),
            c: rows_of(&mut next_c, 0..rows),
        };
        gates::forward(ctx, cell, step);
        let continuing = plan.continuing(t);
        if continuing > 0 {
            board.publish(visit, place, next_h.as_ref().sub(0..continuing, 0..width));
            barrier.arrive();
        }
        store(sums.as_ref(), &mut gates, at);
        let next = plan.next(t).map_or(0, |next| layer.rows_at(next).start);
        for (new, states, last) in [(&next_h, &mut h, &mut last_h), (&next_c, &mut c, &mut last_c)] {
            let (new, cols) = (new.as_ref(), new.cols());
            copy(new.sub(0..continuing, 0..cols), rows_of(states, next..next + continuing));
            copy(new.sub(continuing..rows, 0..cols), rows_of(last, continuing..rows));
        }
        if continuing > 0 {
            barrier.wait(visit);
            board.collect(visit, rows_of(&mut h_now, 0..continuing));
            visit += 1;
        }
    }
}

/// The weights of the units' gates, gate by gate.
fn pack(ctx: &Context, cell: Cell, w_hh: MatRef<'_>, units: &Range<usize>) -> Vec<PackedWeights> {
    let hidden = w_hh.cols();
    let gate = |gate: usize| {
        let rows = gate * hidden + units.start..gate * hidden + units.end;
        PackedWeights::pack(ctx, w_hh.sub(rows, 0..hidden).t()).expect("a part of what lies in memory")
    };
    (0..cell.gates()).map(gate).collect()
}

/// The rows `at` of a member's gates, gapless.
fn load(gates: &[MatMut<'_>], at: Range<usize>, mut into: MatMut<'_>) {
    for (gate, columns) in gates.iter().enumerate() {
        let width = columns.cols();
        let to = into.reborrow().sub(0..at.len(), gate * width..(gate + 1) * width);
        copy(columns.as_ref().sub(at.clone(), 0..width), to);
    }
}

/// Back to where [`load`] took them.
fn store(from: MatRef<'_>, gates: &mut [MatMut<'_>], at: Range<usize>) {
    for (gate, columns) in gates.iter_mut().enumerate() {
        let width = columns.cols();
        copy(from.sub(0..at.len(), gate * width..(gate + 1) * width), rows_of(columns, at.clone()));
    }
}

/// The buffers of a layer, backward.
pub(super) struct BackBuffers<'a> {
    /// Activated gates in, gradients of their sums out.
    pub(super) gates: MatMut<'a>,
    /// States before each step.
    pub(super) h: MatRef<'a>,
    pub(super) c: MatRef<'a>,
    /// Gradients of the last states in, of the initial ones out, by rank.
    pub(super) d_h: MatMut<'a>,
    pub(super) d_c: MatMut<'a>,
    /// Of the outputs, time-major.
    pub(super) d_y: Option<MatRef<'a>>,
}

/// A member's columns of [`BackBuffers`].
struct BackPart<'a> {
    place: usize,
    board: Arc<Board>,
    gates: Vec<MatMut<'a>>,
    h: MatRef<'a>,
    c: MatRef<'a>,
    d_h: MatMut<'a>,
    d_c: MatMut<'a>,
    d_y: Option<MatRef<'a>>,
}

/// The recurrence of all rows, backward, on a team of at most `asked`.
pub(super) fn backward(asked: usize, layer: &Layer<'_>, buffers: BackBuffers<'_>) {
    let hidden = layer.hidden();
    let deal = |members| {
        let units = split_units(hidden, members);
        let board = layer.board(&units, layer.weights.cell.gates());
        let d_states = split_columns(buffers.d_h, &units).into_iter().zip(split_columns(buffers.d_c, &units));
        let (h, c, d_y) = (buffers.h, buffers.c, buffers.d_y);
        split_gates(buffers.gates, hidden, &units)
            .into_iter()
            .zip(d_states)
            .enumerate()
            .map(|(place, (gates, (d_h, d_c)))| {
                let own = |m: MatRef<'_>| units[place].start.min(m.cols())..units[place].end.min(m.cols());
                BackPart {
                    place,
                    board: Arc::clone(&board),
                    gates,
                    h: h.sub(0..h.rows(), own(h)),
                    c: c.sub(0..c.rows(), own(c)),
                    d_h,
                    d_c,
                    d_y: d_y.map(|d_y| d_y.sub(0..d_y.rows(), own(d_y))),
                }
            })
            .collect()
    };
    run_together(asked, deal, |part, barrier| run_back(layer, part, barrier));
}

fn run_back(layer: &Layer<'_>, part: BackPart<'_>, barrier: &Barrier<'_>) {
    let Layer { ref ctx, plan, weights: &Weights { cell, w_hh, .. } } = *layer;
    let BackPart { place, board, mut gates, h, c, mut d_h, mut d_c, d_y } = part;
    let (batch, units) = (plan.batch(), board.units[place].clone());
    let (width, cell_width, sums_width) = (units.len(), c.cols(), w_hh.rows());
    let peepholes = layer.peepholes(&units);
    let weights =
        PackedWeights::pack(ctx, w_hh.sub(0..sums_width, units)).expect("a part of what lies in memory");
    let mut d_sums = ScratchBuf::take(batch * sums_width);
    let mut work = ScratchBuf::take(batch * gates.len() * width);
    let mut work = matrix_mut(&mut work, batch, gates.len() * width);
    let steps = (0..plan.seq()).rev().map(|visit| plan.step(visit));
    let alive = steps.map(|t| (t, layer.rows_at(t))).filter(|(_, at)| !at.is_empty());
    for (visit, (t, at)) in alive.enumerate() {
        let rows = at.len();
        let mut d_h = rows_of(&mut d_h, 0..rows);
        if let Some(d_y) = d_y {
            add_upstream(ctx, d_h.reborrow(), d_y, |rank| plan.padded_row(t, rank));
        }
        let mut d_gates = rows_of(&mut work, 0..rows);
        load(&gates, at.clone(), d_gates.reborrow());
        let step = gates::Backward {
            gates: d_gates.reborrow(),
            peepholes: &peepholes,
            h_prev: h.sub(at.clone(), 0..width),
            c_prev: c.sub(at.clone(), 0..cell_width),
            d_h: d_h.reborrow(),
            d_c: rows_of(&mut d_c, 0..rows),
        };
        gates::backward(ctx, cell, step);
        board.publish(visit, place, d_gates.as_ref().sub(0..rows, cell.recurrent_columns(width)));
        barrier.arrive();
        store(d_gates.as_ref(), &mut gates, at);
        barrier.wait(visit);
        let d_sums = &mut d_sums[..rows * sums_width];
        board.collect(visit, matrix_mut(d_sums, rows, sums_width));
        let d_sums = matrix(d_sums, rows, sums_width);
        gemm_packed(ctx, d_sums, &weights, d_h, direct_gradient(cell), &Epilogue::default())
            .expect("shapes fit by construction");
    }
}
