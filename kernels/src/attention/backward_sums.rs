//! The sums of the backward pass on tiles: dV and dK of a block, transposed and in scratch until it is done, and dQ in memory.

use pulp::Simd;

use super::backward_tile::Head;
use super::backward_tiles::{Block, Rows, State};
use super::backward_weights::Scores;
use super::flash_backward::Backward;
use super::on_tiles::{self, Operands, left_words, product, right_words};
use super::problem::{KEY_BLOCK, Shape};
use super::regions::Region;
use super::stage;
use crate::gemm::microkernel::amx::{BLOCK, SIDE};
use crate::lanes;
use crate::view::MatRef;

impl Backward<'_> {
    /// `dVᵀ += dOᵀ·P` and `dKᵀ += Qᵀ·dS`.
    #[inline(always)]
    pub(super) fn keys_and_values<S: Simd, const P: usize>(
        &self,
        simd: S,
        state: &mut State<'_>,
        block: &Block<'_>,
        rows: &Rows,
    ) {
        let Shape { dim, v_dim, .. } = self.shape;
        let Scores { p, d_s } = &state.scores;
        let of_tile = state.tiles.of(rows.tile);
        let of_v = (of_tile.d_out_across, &state.d_out_rows[..rows.rows.len() * v_dim], &rows.odd.d_out);
        let of_k = (of_tile.q_across, &state.q_rows[..rows.rows.len() * dim], &rows.odd.q);
        let to_v = (&mut *state.right, &mut *state.d_v, v_dim);
        let to_k = (&mut *state.right_d_s, &mut *state.d_k, dim);
        for (scores, (left, odd_rows, odd), (right, acc, dim)) in [(p, of_v, to_v), (d_s, of_k, to_k)] {
            let columns = rows.columns();
            let (n, depth) = (columns.len(), rows.rows.len());
            let view = MatRef::with_strides(&scores[columns.start..], depth, n, KEY_BLOCK, 1);
            let view = view.expect("scores of these rows");
            if !rows.packed {
                on_tiles::pack_scores::<P>(&state.unit, view, right);
            }
            let deep = on_tiles::steps(depth);
            for first in (0..dim).step_by(BLOCK) {
                let left = &left[first / SIDE * left_words(SIDE, depth, P)..];
                let height = BLOCK.min(dim - first);
                for panel in rows.steps.clone() {
                    // No step of the depth where nobody sees these keys.
                    let seers = rows.seers(panel);
                    if seers.is_empty() {
                        continue;
                    }
                    let right = &right[(panel - rows.steps.start) * right_words(depth, BLOCK, P)..];
                    let operands = Operands { left, right, steps: deep, rows: height };
                    product::<P>(&state.unit, operands, seers, state.sums, BLOCK);
                    let acc = &mut acc[first * KEY_BLOCK + panel * BLOCK..];
                    add_block(simd, (state.sums, height), acc, state.written[panel]);
                }
            }
            for local in (0..depth).filter(|local| odd[*local]) {
                let row = &odd_rows[local * dim..][..dim];
                for j in block.sight.row(rows.rows.start + local, &block.keys) {
                    let j = j - block.keys.start;
                    let weight = scores[local * KEY_BLOCK + j];
                    for (c, x) in row.iter().enumerate() {
                        let sum = &mut acc[c * KEY_BLOCK + j];
                        *sum = weight.mul_add(*x, *sum);
                    }
                }
            }
        }
        for panel in rows.steps.clone() {
            state.written[panel] |= !rows.seers(panel).is_empty();
        }
    }

    /// `dQ += dS·K`.
    #[inline(always)]
    pub(super) fn queries<S: Simd, const P: usize>(
        &self,
        simd: S,
        state: &mut State<'_>,
        (block, head): (&Block<'_>, &mut Head<'_>),
        rows: &Rows,
    ) {
        let dim = self.shape.dim;
        let (n, width) = (rows.rows.len(), dim.next_multiple_of(BLOCK));
        let columns = rows.columns();
        if !rows.packed {
            on_tiles::pack_score_rows::<P>(&state.unit, state.scores.d_s, (n, &rows.steps), state.left);
        }
        let panel = right_words(block.keys.len(), BLOCK, P);
        let step = panel / on_tiles::steps(block.keys.len());
        let add_to = self.spec.mask.blocks.is_some()
            || block.sight.rows(&rows.rows, &(0..block.keys.end)).start < block.keys.start;
        let Some(d_q) = &mut head.d_q else { return };
        for (some, own) in rows.blocks() {
            let (top, height) = (some.start - rows.rows.start, some.len());
            let own = [own.start, own.end].map(|step| step.saturating_sub(rows.steps.start));
            let own = own[0]..own[1];
            let left = &state.left[top / SIDE * left_words(SIDE, columns.len(), P)..];
            for first in (0..dim).step_by(BLOCK) {
                let right = &state.k[first / BLOCK * panel + rows.steps.start * step..];
                let operands = Operands { left, right, steps: rows.steps.len(), rows: height };
                let sums = &mut state.sums[first..];
                if own.is_empty() {
                    sums.chunks_mut(width)
                        .take(height)
                        .for_each(|row| row[..BLOCK.min(dim - first)].fill(0.0));
                } else {
                    product::<P>(&state.unit, operands, own.clone(), sums, width);
                }
            }
            for (r, sums) in state.sums.chunks_exact(width).enumerate().take(height) {
                let i = rows.rows.start + top + r;
                let sums = &sums[..dim];
                let d_q = d_q.row_mut(i - head.fixed.first_row);
                // To zeros, so that no zero is negative: its sign would tell what the row does not see.
                if !add_to {
                    d_q.fill(0.0);
                }
                add(simd, sums, d_q);
                let Some(odd) = &block.odd_scaled else { continue };
                for j in block.sight.row(i, &block.keys).map(|j| j - block.keys.start) {
                    if odd[j] {
                        let k = &state.k_rows[j * dim..][..dim];
                        on_tiles::add_scaled(state.scores.d_s[(top + r) * KEY_BLOCK + j], k, d_q);
                    }
                }
            }
        }
    }

    /// Writes dK and dV of a block.
    #[inline(always)]
    pub(super) fn write_keys(&self, block: &Block<'_>, state: &mut State<'_>) {
        let Region { batch, kv, .. } = *block.region;
        for (grad, sums, dim) in
            [(self.d_k, &mut *state.d_k, self.shape.dim), (self.d_v, &mut *state.d_v, self.shape.v_dim)]
        {
            for panel in (0..block.keys.len().div_ceil(BLOCK)).filter(|panel| !state.written[*panel]) {
                sums.chunks_exact_mut(KEY_BLOCK)
                    .take(dim)
                    .for_each(|row| row[panel * BLOCK..][..BLOCK].fill(0.0));
            }
            let stride = dim.next_multiple_of(8);
            let sums = MatRef::with_strides(&*sums, dim, block.keys.len(), KEY_BLOCK, 1)
                .expect("sums of these keys");
            stage::transpose(sums, state.sums, stride);
            // SAFETY: a unit that owns dK and dV owns these keys of this key head alone, and blocks are disjoint.
            let mut grad = unsafe { grad.rows_unsync(batch, kv, block.keys.clone()) };
            for j in 0..block.keys.len() {
                grad.row_mut(j).copy_from_slice(&state.sums[j * stride..][..dim]);
            }
        }
    }
}

/// `to += x`.
#[inline(always)]
fn add<S: Simd>(simd: S, x: &[f32], to: &mut [f32]) {
    lanes::update(
        simd,
        x,
        to,
        #[inline(always)]
        |x, to| simd.add_f32s(x, to),
    );
}

/// `to += sums` of 32 columns, rows [`KEY_BLOCK`] apart; to zeros, so that no zero is negative, if nothing is written there.
#[inline(always)]
fn add_block<S: Simd>(simd: S, (sums, rows): (&[f32], usize), to: &mut [f32], written: bool) {
    let sums = sums.as_chunks::<BLOCK>().0.iter().take(rows);
    for (sums, to) in sums.zip(to.chunks_mut(KEY_BLOCK)) {
        let to = to.first_chunk_mut::<BLOCK>().expect("the columns of a panel");
        for (sum, to) in S::as_simd_f32s(sums).0.iter().zip(S::as_mut_simd_f32s(to).0) {
            let before = if written { *to } else { simd.splat_f32s(0.0) };
            *to = simd.add_f32s(*sum, before);
        }
    }
}
