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
//! A GRU that resets before its second product exchanges r·h, too, and so has two barriers a step.
//!
//! - Each element is the same chain over k as in the whole product, so the bits are those of the other path.
//! - The board has two pages: a page is written again two exchanges later, after a barrier that its readers reach only
//!   when they have read it. So its locks are always free, and one barrier an exchange is enough.
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
use super::team::{Barrier, run_together};
use super::weights::Sizes;
use super::{Cell, Weights, Window, gates, gru_reset_before};

/// Units are dealt in blocks of so many, so that few panels of a kernel are cut.
const BLOCK: usize = 32;
/// A thread has at least so many units: with fewer the barrier would be a large part of a step (an estimate).
const MIN_UNITS: usize = 64;
/// Rows a thread from which on rows are dealt: then a step reads `W_hh` for enough rows, and needs no barrier (an estimate).
const ROWS_PER_THREAD: usize = 12;
/// Below this many floating-point operations (about 300 µs on one thread) a recurrence is over before a team stands.
const MIN_FLOPS: usize = 16_000_000;

/// How many threads should own units; 1 where rows are to be dealt instead, or where the state is projected: then h has other columns than
/// the gates, and a thread would own two ranges.
pub(super) fn team_size(ctx: &Context, plan: &Plan, sizes: &Sizes) -> usize {
    let threads = ctx.thread_count().min(sizes.hidden / MIN_UNITS);
    let few_rows = plan.batch() < ROWS_PER_THREAD * ctx.thread_count();
    let enough = plan.rows() * sizes.flops() >= MIN_FLOPS;
    if threads > 1 && few_rows && !sizes.projected && enough { threads } else { 1 }
}

/// The units of each of `parts` members.
pub(super) fn split_units(hidden: usize, parts: usize) -> Vec<Range<usize>> {
    let blocks = hidden.div_ceil(BLOCK);
    let edge = |part: usize| (blocks * part / parts * BLOCK).min(hidden);
    (0..parts).map(|part| edge(part)..edge(part + 1)).collect()
}

/// The columns of each range of units, of a matrix that has one column a unit (or none at all).
pub(super) fn split_columns<'m>(matrix: MatMut<'m>, units: &[Range<usize>]) -> Vec<MatMut<'m>> {
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
pub(super) fn split_gates<'m>(
    gates: MatMut<'m>,
    hidden: usize,
    units: &[Range<usize>],
) -> Vec<Vec<MatMut<'m>>> {
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
pub(super) fn rows_of<'m>(matrix: &'m mut MatMut<'_>, rows: Range<usize>) -> MatMut<'m> {
    let cols = matrix.cols();
    matrix.reborrow().sub(rows, 0..cols)
}

/// Where the members leave what the others need for the next product: two pages, a sheet for each member.
pub(super) struct Board {
    pub(super) units: Vec<Range<usize>>,
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

    /// Leaves the values of a member for the exchange `visit`.
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

/// A member's exchanges with the others, one after the other.
pub(super) struct Exchange<'a> {
    board: &'a Board,
    barrier: &'a Barrier<'a>,
    place: usize,
    visit: usize,
}

impl<'a> Exchange<'a> {
    pub(super) fn new(board: &'a Board, barrier: &'a Barrier<'a>, place: usize) -> Exchange<'a> {
        Exchange { board, barrier, place, visit: 0 }
    }

    /// Leaves this member's values for the others.
    pub(super) fn give(&self, values: MatRef<'_>) {
        self.board.publish(self.visit, self.place, values);
        self.barrier.arrive();
    }

    /// Waits for the others and takes what all have given: group by group, a column for each unit of the layer.
    pub(super) fn take(&mut self, into: MatMut<'_>) {
        self.barrier.wait(self.visit);
        self.board.collect(self.visit, into);
        self.visit += 1;
    }
}

/// What all members read.
pub(super) struct Layer<'a> {
    pub(super) ctx: Context,
    pub(super) plan: &'a Plan,
    pub(super) weights: &'a Weights<'a>,
}

impl Layer<'_> {
    pub(super) fn hidden(&self) -> usize {
        self.weights.hidden()
    }

    /// The peepholes of the units, for a cell that has them.
    pub(super) fn peepholes(&self, units: &Range<usize>) -> Vec<f32> {
        let gates = self.weights.peepholes.chunks_exact(self.hidden());
        gates.flat_map(|gate| &gate[units.clone()]).copied().collect()
    }

    /// The rows of all ranks at step `t`.
    pub(super) fn rows_at(&self, t: usize) -> Range<usize> {
        self.plan.rows_at(t, &(0..self.plan.batch()))
    }

    pub(super) fn board(&self, units: &[Range<usize>], groups: usize) -> Arc<Board> {
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
    let products = Products::new(ctx, cell, w_hh, units.clone());
    let peepholes = layer.peepholes(&units);
    let mut exchange = Exchange::new(&board, barrier, place);
    let mut h_now = ScratchBuf::take(batch * hidden);
    h_now.copy_from_slice(start);
    let mut h_now = matrix_mut(&mut h_now, batch, hidden);
    let [mut work, mut next_h, mut next_c] =
        [gates.len() * width, width, cell_width].map(|cols| ScratchBuf::take(batch * cols));
    let mut work = matrix_mut(&mut work, batch, gates.len() * width);
    let mut next_h = matrix_mut(&mut next_h, batch, width);
    let mut next_c = matrix_mut(&mut next_c, batch, cell_width);
    for t in (0..plan.seq()).map(|visit| plan.step(visit)) {
        let at = layer.rows_at(t);
        let rows = at.len();
        if rows == 0 {
            continue;
        }
        let mut sums = rows_of(&mut work, 0..rows);
        load(&gates, at.clone(), sums.reborrow());
        products.add(sums.reborrow(), h_now.as_ref().sub(0..rows, 0..hidden), &mut exchange);
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
            exchange.give(next_h.as_ref().sub(0..continuing, 0..width));
        }
        store(sums.as_ref(), &mut gates, at);
        let next = plan.next(t).map_or(0, |next| layer.rows_at(next).start);
        for (new, states, last) in [(&next_h, &mut h, &mut last_h), (&next_c, &mut c, &mut last_c)] {
            let (new, cols) = (new.as_ref(), new.cols());
            copy(new.sub(0..continuing, 0..cols), rows_of(states, next..next + continuing));
            copy(new.sub(continuing..rows, 0..cols), rows_of(last, continuing..rows));
        }
        if continuing > 0 {
            exchange.take(rows_of(&mut h_now, 0..continuing));
        }
    }
}

/// A member's part of the state's products: its columns of `W_hhᵀ`, gate by gate.
struct Products<'a> {
    ctx: &'a Context,
    cell: Cell,
    units: Range<usize>,
    gates: Vec<PackedWeights>,
}

impl<'a> Products<'a> {
    fn new(ctx: &'a Context, cell: Cell, w_hh: MatRef<'_>, units: Range<usize>) -> Products<'a> {
        let hidden = w_hh.cols();
        let gate = |gate: usize| {
            let rows = gate * hidden + units.start..gate * hidden + units.end;
            let w = w_hh.sub(rows, 0..hidden).t();
            PackedWeights::pack_for_call(ctx, w).expect("a part of what lies in memory")
        };
        let gates = (0..cell.gates()).map(gate).collect();
        Products { ctx, cell, units, gates }
    }

    /// Adds the products with the state of all units to the sums of the own ones. Where a reset stands between two products, r, z and q
    /// are done afterwards, and the others' q has been exchanged.
    fn add(&self, mut sums: MatMut<'_>, h: MatRef<'_>, exchange: &mut Exchange<'_>) {
        let (rows, width, hidden) = (h.rows(), self.units.len(), h.cols());
        let mut windows = self.cell.state_windows(width);
        let first = windows.next().expect("every cell multiplies its state");
        self.multiply(&first, h, sums.reborrow());
        let Some(second) = windows.next() else { return };
        gru_reset_before::reset(self.ctx, sums.reborrow(), h.sub(0..rows, self.units.clone()));
        exchange.give(sums.as_ref().sub(0..rows, gru_reset_before::reset_columns(width)));
        let mut q = ScratchBuf::take(rows * hidden);
        exchange.take(matrix_mut(&mut q, rows, hidden));
        self.multiply(&second, matrix(&q, rows, hidden), sums);
    }

    /// The product with the gates of one window.
    fn multiply(&self, window: &Window, state: MatRef<'_>, mut sums: MatMut<'_>) {
        let (rows, width) = (state.rows(), self.units.len());
        let gates = window.rows.start / width..window.rows.end / width;
        for (gate, w) in self.gates[gates].iter().enumerate() {
            let columns = window.columns.start + gate * width..window.columns.start + (gate + 1) * width;
            let sums = sums.reborrow().sub(0..rows, columns);
            gemm_packed(self.ctx, state, w, sums, Accum::Add, &Epilogue::default())
                .expect("shapes fit by construction");
        }
    }
}

/// The rows `at` of a member's gates, gapless.
pub(super) fn load(gates: &[MatMut<'_>], at: Range<usize>, mut into: MatMut<'_>) {
    for (gate, columns) in gates.iter().enumerate() {
        let width = columns.cols();
        let to = into.reborrow().sub(0..at.len(), gate * width..(gate + 1) * width);
        copy(columns.as_ref().sub(at.clone(), 0..width), to);
    }
}

/// Back to where [`load`] took them.
pub(super) fn store(from: MatRef<'_>, gates: &mut [MatMut<'_>], at: Range<usize>) {
    for (gate, columns) in gates.iter_mut().enumerate() {
        let width = columns.cols();
        copy(from.sub(0..at.len(), gate * width..(gate + 1) * width), rows_of(columns, at.clone()));
    }
}
