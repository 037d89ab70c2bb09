//! As [`columns`](super::columns), backward: each thread owns some hidden units, and the gradients of the sums go over the board.

use std::sync::OnceLock;

use crate::context::Context;
use crate::gemm::{Accum, Epilogue, PackedWeights, gemm_packed};
use crate::scratch::ScratchBuf;
use crate::view::{MatMut, MatRef};

use super::columns::{Board, Exchange, Layer, load, rows_of, split_columns, split_gates, split_units, store};
use super::plan::{matrix, matrix_mut};
use super::sequence_backward::add_upstream;
use super::state_product::direct_gradient;
use super::team::{Barrier, run_together};
use super::{Weights, Window, gates, gru_reset_before};

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
    board: &'a Board,
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
    let board = OnceLock::new();
    let deal = |members| {
        let units = split_units(hidden, members);
        let board = layer.board(&board, &units, layer.weights.cell.gates());
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
                    board,
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
    let (width, cell_width) = (units.len(), c.cols());
    let peepholes = layer.peepholes(&units);
    let mut exchange = Exchange::new(board, barrier, place);
    let pack = |window: Window| {
        let w = w_hh.sub(window.rows, units.clone());
        PackedWeights::pack_for_call(ctx, w).expect("a part of what lies in memory")
    };
    let weights: Vec<PackedWeights> = cell.state_windows(layer.hidden()).map(pack).collect();
    let mut d_sums = ScratchBuf::take(batch * w_hh.rows());
    let mut work = ScratchBuf::take(batch * gates.len() * width);
    let mut work = matrix_mut(&mut work, batch, gates.len() * width);
    let steps = (0..plan.seq()).rev().map(|visit| plan.step(visit));
    let alive = steps.map(|t| (t, layer.rows_at(t))).filter(|(_, at)| !at.is_empty());
    for (t, at) in alive {
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
        let mut windows = cell.state_windows(width).zip(&weights);
        let (first, w) = windows.next().expect("every cell multiplies its state");
        if let Some((second, w)) = windows.next() {
            exchange.give(d_gates.as_ref().sub(0..rows, second.columns));
            let mut d_q = ScratchBuf::take(rows * width);
            product(
                ctx,
                &mut exchange,
                w,
                (&mut d_sums, matrix_mut(&mut d_q, rows, width)),
                Accum::Overwrite,
            );
            let (h_prev, d_q) = (h.sub(at.clone(), 0..width), matrix(&d_q, rows, width));
            gru_reset_before::reset_backward(ctx, d_gates.reborrow(), h_prev, d_q, d_h.reborrow());
        }
        exchange.give(d_gates.as_ref().sub(0..rows, first.columns));
        store(d_gates.as_ref(), &mut gates, at);
        product(ctx, &mut exchange, w, (&mut d_sums, d_h), direct_gradient(cell));
    }
}

/// Takes the gradients of the sums that all members have given, and multiplies them with this member's columns.
fn product(
    ctx: &Context,
    exchange: &mut Exchange<'_>,
    w: &PackedWeights,
    (d_sums, into): (&mut [f32], MatMut<'_>),
    accum: Accum,
) {
    let (rows, sums) = (into.rows(), w.rows());
    let d_sums = &mut d_sums[..rows * sums];
    exchange.take(matrix_mut(d_sums, rows, sums));
    gemm_packed(ctx, matrix(d_sums, rows, sums), w, into, accum, &Epilogue::default())
        .expect("shapes fit by construction");
}
