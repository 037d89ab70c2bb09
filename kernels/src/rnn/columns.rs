//! The recurrence of a small batch on several threads: each owns some hidden units for the whole sequence.
//!
//! A thread that owns rows reads all of `W_hh` at every step, and a batch of one has only one row to own. Here a
//! thread owns units: the columns of `W_hhᵀ` of all their gates, which stay in its own cache, and those of every
//! buffer. To its gates' pass a part is a layer that is narrower. What the next product needs of the others
//! (the new state; backward, the gradients of the sums) goes over a [`Board`] with one barrier a step:
//! ```text
//! for t in 0..seq:                                # the inputs of some steps are projected before, see `rows`
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
//! - A part works on gates of its own, which hold a few steps. Where backward wants them, they are copied when they are done: `4 · units` values a
//!   row beside the product's `4 · units · hidden` multiply-adds. Rejected: sharing `h` itself, which needs `unsafe` to save the copy of
//!   `batch · hidden` values a step.

use std::ops::Range;
use std::sync::{OnceLock, PoisonError, RwLock};

use crate::context::Context;
use crate::gemm::{Accum, Epilogue, PackedWeights, gemm_packed};
use crate::scratch::ScratchBuf;
use crate::view::{MatMut, MatRef};

use super::input_product::{fill_untouched, start_bias};
use super::plan::{Plan, copy, gates_matrix_mut, gates_stride, matrix, matrix_mut};
use super::rows::CHUNK;
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

    /// Lies with the caller, who so gets the memory back that was taken from its scratch list.
    pub(super) fn board<'b>(
        &self,
        place: &'b OnceLock<Board>,
        units: &[Range<usize>],
        groups: usize,
    ) -> &'b Board {
        place.get_or_init(|| Board::new(self.hidden(), units.to_vec(), [self.plan.batch(), groups]))
    }
}

/// The buffers of a layer, forward.
pub(super) struct Buffers<'a> {
    /// The inputs of all steps, without gaps.
    pub(super) x: MatRef<'a>,
    /// Activated gates out, where something goes back.
    pub(super) gates: Option<MatMut<'a>>,
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
    board: &'a Board,
    x: MatRef<'a>,
    gates: Option<Vec<MatMut<'a>>>,
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
    let board = OnceLock::new();
    let deal = |members| {
        let units = split_units(hidden, members);
        let board = layer.board(&board, &units, 1);
        let states = split_columns(buffers.h, &units).into_iter().zip(split_columns(buffers.c, &units));
        let last =
            split_columns(buffers.last_h, &units).into_iter().zip(split_columns(buffers.last_c, &units));
        let gates: Vec<_> = match buffers.gates {
            Some(gates) => split_gates(gates, hidden, &units).into_iter().map(Some).collect(),
            None => units.iter().map(|_| None).collect(),
        };
        let parts = gates.into_iter().zip(states.zip(last)).enumerate();
        let x = buffers.x;
        parts
            .map(|(place, (gates, ((h, c), (last_h, last_c))))| Part {
                place,
                board,
                x,
                gates,
                h,
                c,
                last_h,
                last_c,
            })
            .collect()
    };
    run_together(asked, deal, |part, barrier| run(layer, &start, part, barrier));
}

fn run(layer: &Layer<'_>, start: &[f32], part: Part<'_>, barrier: &Barrier<'_>) {
    let Layer { ref ctx, plan, weights: &Weights { cell, w_hh, .. } } = *layer;
    let (batch, units) = (plan.batch(), part.board.units[part.place].clone());
    let inputs = Inputs::new(ctx, layer.weights, units.clone());
    let products = Products::new(ctx, cell, w_hh, units.clone());
    let mut exchange = Exchange::new(part.board, barrier, part.place);
    let mut h_now = ScratchBuf::take(batch * layer.hidden());
    h_now.copy_from_slice(start);
    let (width, cell_width) = (units.len(), part.c.cols());
    let [mut next_h, mut next_c] = [width, cell_width].map(|cols| ScratchBuf::take(batch * cols));
    let mut member = Member {
        layer,
        peepholes: layer.peepholes(&units),
        h_now: matrix_mut(&mut h_now, batch, layer.hidden()),
        next_h: matrix_mut(&mut next_h, batch, width),
        next_c: matrix_mut(&mut next_c, batch, cell_width),
        part,
    };
    let ranks = 0..batch;
    let chunks = plan.chunks(&ranks, CHUNK);
    let most = chunks.iter().map(|steps| plan.rows_in(steps, &ranks)).max().unwrap_or(0);
    let columns = cell.gate_columns(width);
    let mut work = ScratchBuf::take(most * gates_stride(columns));
    for steps in plan.visits(&(0..chunks.len())).map(|index| chunks[index].clone()) {
        let rows = plan.rows_in(&steps, &ranks);
        let first = plan.rows_at(steps.start, &ranks).start;
        let mut work = gates_matrix_mut(&mut work[..rows * gates_stride(columns)], rows, columns);
        inputs.project(member.part.x.sub(first..first + rows, 0..layer.weights.input()), work.reborrow());
        for t in plan.visits(&steps) {
            let at = layer.rows_at(t);
            if !at.is_empty() {
                let sums = rows_of(&mut work, at.start - first..at.end - first);
                member.step(t, &products, sums, &mut exchange);
            }
        }
    }
}

/// A member, and what it works on from step to step.
struct Member<'a> {
    layer: &'a Layer<'a>,
    peepholes: Vec<f32>,
    /// The state of all units.
    h_now: MatMut<'a>,
    /// The new states of its own.
    next_h: MatMut<'a>,
    next_c: MatMut<'a>,
    part: Part<'a>,
}

impl Member<'_> {
    /// From the projected inputs of a step to the next states.
    fn step(&mut self, t: usize, products: &Products<'_>, mut sums: MatMut<'_>, exchange: &mut Exchange<'_>) {
        let Layer { ref ctx, plan, weights: &Weights { cell, .. } } = *self.layer;
        let Part {
            board, place, ref mut gates, ref mut h, ref mut c, ref mut last_h, ref mut last_c, ..
        } = self.part;
        let (at, hidden, units) = (self.layer.rows_at(t), self.layer.hidden(), board.units[place].clone());
        let (rows, width, cell_width) = (at.len(), units.len(), c.cols());
        products.add(sums.reborrow(), self.h_now.as_ref().sub(0..rows, 0..hidden), exchange);
        let step = gates::Forward {
            gates: sums.reborrow(),
            peepholes: &self.peepholes,
            h_prev: self.h_now.as_ref().sub(0..rows, units),
            c_prev: c.as_ref().sub(at.clone(), 0..cell_width),
            h: rows_of(&mut self.next_h, 0..rows),
            c: rows_of(&mut self.next_c, 0..rows),
        };
        gates::forward(ctx, cell, step);
        let continuing = plan.continuing(t);
        if continuing > 0 {
            exchange.give(self.next_h.as_ref().sub(0..continuing, 0..width));
        }
        if let Some(gates) = gates {
            store(sums.as_ref(), gates, at);
        }
        let next = plan.next(t).map_or(0, |next| self.layer.rows_at(next).start);
        for (new, states, last) in [(&self.next_h, h, last_h), (&self.next_c, c, last_c)] {
            let (new, cols) = (new.as_ref(), new.cols());
            copy(new.sub(0..continuing, 0..cols), rows_of(states, next..next + continuing));
            copy(new.sub(continuing..rows, 0..cols), rows_of(last, continuing..rows));
        }
        if continuing > 0 {
            exchange.take(rows_of(&mut self.h_now, 0..continuing));
        }
    }
}

/// A member's part of the inputs' products: its columns of `W_ihᵀ`, gate by gate.
struct Inputs<'a> {
    ctx: &'a Context,
    cell: Cell,
    width: usize,
    /// Of its columns of the gates.
    bias: Vec<f32>,
    gates: Vec<PackedWeights>,
}

impl<'a> Inputs<'a> {
    fn new(ctx: &'a Context, weights: &Weights<'_>, units: Range<usize>) -> Inputs<'a> {
        let (cell, hidden) = (weights.cell, weights.hidden());
        let bias = start_bias(weights);
        let bias = bias.chunks_exact(hidden).flat_map(|block| &block[units.clone()]).copied().collect();
        let gates = pack_gates(ctx, cell, weights.w_ih, hidden, &units);
        Inputs { ctx, cell, width: units.len(), bias, gates }
    }

    /// The inputs' part of the sums, biases included.
    fn project(&self, x: MatRef<'_>, mut sums: MatMut<'_>) {
        let (rows, width) = (x.rows(), self.width);
        for Window { columns, rows: gate_rows } in self.cell.input_windows(width) {
            let gates = gate_rows.start / width..gate_rows.end / width;
            for (w, first) in self.gates[gates].iter().zip(columns.step_by(width)) {
                let columns = first..first + width;
                let epilogue = Epilogue { bias: Some(&self.bias[columns.clone()]), ..Epilogue::default() };
                let sums = sums.reborrow().sub(0..rows, columns);
                gemm_packed(self.ctx, x, w, sums, Accum::Overwrite, &epilogue)
                    .expect("shapes fit by construction");
            }
        }
        fill_untouched(self.cell, width, &self.bias, &mut sums);
    }
}

/// Of each gate, the rows of some units, packed as columns.
fn pack_gates(
    ctx: &Context,
    cell: Cell,
    w: MatRef<'_>,
    hidden: usize,
    units: &Range<usize>,
) -> Vec<PackedWeights> {
    let gate = |gate: usize| {
        let rows = gate * hidden + units.start..gate * hidden + units.end;
        let w = w.sub(rows, 0..w.cols()).t();
        PackedWeights::pack_for_call(ctx, w).expect("a part of what lies in memory")
    };
    (0..cell.gates()).map(gate).collect()
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
        let gates = pack_gates(ctx, cell, w_hh, w_hh.cols(), &units);
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
