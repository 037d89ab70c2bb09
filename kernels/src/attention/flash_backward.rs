//! The backward pass.
//!
//! ```text
//! D_i = Σ_d dO_id·O_id
//! P_ij = exp(s_ij − lse_i)     dP = dO·Vᵀ     dS = P ∘ (dP − D)
//! dV = Pᵀ·dO     dK = scale·dSᵀ·Q     dQ = scale·dS·K     d_bias = Σ_batch dS
//! ```
//! That is the naive form, with three matrices of the size of the scores. Here P is made again, block by
//! block, from the saved log-sum-exp, and nothing of that size is stored, only D:
//! - Key blocks are the outer loop: Kᵀ and Vᵀ of a block are transposed once for all query rows, and the
//!   five products are [`product`](super::tile::product), Pᵀ and dSᵀ read across.
//! - Sums over keys (dQ) and over rows (dK, dV) are chains of multiply-adds in ascending order, so how the
//!   region is cut changes no bit. With enough heads a task does all three for a head; with few heads and
//!   several threads, tasks do dK and dV of some keys and then dQ of some rows (7 products instead of
//!   5, but every thread is at work), with the same bits.
//! - The bias gradient adds in the order batch, head. One thread does it on the way; several do it in a pass
//!   of its own over (bias head, rows), with the same bits.
//!
//! Where the CPU has tiles and the precision is High or Medium, the five products are those of [`super::backward_tiles`].

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::backward_tile::{Block, Head, Tile};
use super::backward_weights::{HeadWeights, Scores};
use super::on_tiles::{self, OnTiles};
use super::problem::{KEY_BLOCK, ROW_TILE, Shape, Shared, cut, deal, pieces_of};
use super::regions::{Cut, Region, row_tiles};
use super::{AttentionSpec, Saved, stage};
use crate::context::Context;
use crate::gemm::microkernel::prefetch;
use crate::lanes;
use crate::scratch::ScratchBuf;
use crate::view::{HeadsMut, HeadsRef, MatMut};

/// A checked problem.
#[derive(Clone, Copy)]
pub(super) struct Backward<'a> {
    pub(super) shape: Shape,
    pub(super) saved: &'a Saved<'a>,
    pub(super) d_out: HeadsRef<'a>,
    pub(super) spec: AttentionSpec<'a>,
    pub(super) d_q: &'a HeadsMut<'a>,
    pub(super) d_k: &'a HeadsMut<'a>,
    pub(super) d_v: &'a HeadsMut<'a>,
    pub(super) d_bias: Option<Shared>,
}

/// Runs all of several problems, whose units are dealt together.
pub(super) fn run(ctx: &Context, problems: &[Backward<'_>]) {
    let threads = ctx.thread_count();
    let pairs = problems.iter().map(|problem| problem.shape.batch * problem.shape.kv_heads).sum::<usize>();
    let bias = problems.iter().any(|problem| problem.d_bias.is_some());
    let dim = problems.first().map_or(0, |problem| problem.shape.dim);
    let tiles = OnTiles::of(ctx, dim);
    let faster = if tiles.is_some() { on_tiles::FASTER } else { 1 };
    let deal = |cut: Cut| {
        let units = problems.iter().map(|problem| problem.units(cut)).sum::<usize>();
        let work = problems.iter().fold(0usize, |sum, problem| sum.saturating_add(problem.work()));
        deal(ctx, units, work / faster / units.max(1), |units| Units { problems, tiles, cut, units });
    };
    if threads > 1 && pairs < 2 * threads {
        deal(Cut::Keys);
        deal(Cut::Rows);
    } else {
        deal(Cut::Heads { bias: bias && threads == 1 });
    }
    if bias && threads > 1 {
        deal(Cut::BiasRows);
    }
}

impl Backward<'_> {
    fn work(&self) -> usize {
        let Shape { batch, heads, seq_q, seq_k, dim, v_dim, .. } = self.shape;
        (batch * heads * seq_q).saturating_mul(seq_k.saturating_mul(2 * (dim + v_dim)))
    }
}

struct Units<'a> {
    problems: &'a [Backward<'a>],
    tiles: Option<OnTiles>,
    cut: Cut,
    units: Range<usize>,
}

impl WithSimd for Units<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (problem, units) in pieces_of(self.problems, &self.units, |problem| problem.units(self.cut)) {
            match self.tiles {
                None => problem.run(simd, self.cut, units),
                Some(tiles) => problem.run_on_tiles(simd, tiles, self.cut, units),
            }
        }
    }
}

impl Backward<'_> {
    /// Some units of one cut.
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, cut_into: Cut, units: Range<usize>) {
        let Shape { seq_q, dim, v_dim, .. } = self.shape;
        let stride = KEY_BLOCK.next_multiple_of(S::F32_LANES);
        let rows = seq_q.min(ROW_TILE);
        let lens = [dim * stride, v_dim * stride, KEY_BLOCK * dim, rows * dim, rows * v_dim, rows * stride];
        let [keys, values, k_rows, q_rows, d_out_rows, scores] = lens;
        let delta = self.rows_of_region(cut_into);
        let lens = [keys, values, k_rows, q_rows, d_out_rows, scores, scores, delta];
        let mut scratch = ScratchBuf::take(lens.iter().sum());
        let [keys, values, k_rows, q_rows, d_out_rows, p, d_s, delta] = cut(&mut scratch, lens);
        let mut state = State { keys, values, k_rows, q_rows, d_out_rows, p, d_s, delta };
        for region in self.regions(cut_into, units) {
            self.region(simd, region, &mut state);
        }
    }
}

/// Scratch of one task: Kᵀ and Vᵀ of a block [dim, stride], gapless copies of K of the block and of Q and dO of
/// a tile where they are needed, P and dS of a tile [ROW_TILE, stride], and D of all rows of a region.
struct State<'a> {
    keys: &'a mut [f32],
    values: &'a mut [f32],
    k_rows: &'a mut [f32],
    q_rows: &'a mut [f32],
    d_out_rows: &'a mut [f32],
    p: &'a mut [f32],
    d_s: &'a mut [f32],
    delta: &'a mut [f32],
}

impl Backward<'_> {
    /// Writes what no block of keys touches, and makes D; the keys that are seen, from the start of a block on. `tile` is the
    /// number of rows that are written together.
    #[inline(always)]
    pub(super) fn open<S: Simd>(
        &self,
        simd: S,
        region: &Region,
        tile: usize,
        delta: &mut [f32],
    ) -> Range<usize> {
        let Region { rows, keys, parts, .. } = region;
        let sight = self.spec.mask.sight(region.batch, self.shape.seq_k);
        let seen = if rows.is_empty() { keys.end..keys.end } else { sight.rows(rows, keys) };
        let size = self.block_size();
        let of_list = seen.start / size * size;
        let before = of_list + (seen.start - of_list) / KEY_BLOCK * KEY_BLOCK;
        let before = if seen.is_empty() { keys.end } else { before.max(keys.start) };
        if parts.kv {
            self.clear_keys(region, keys.start..before);
            self.clear_keys(region, seen.end.max(before)..keys.end);
        }
        if parts.q {
            self.clear_blind_rows(region, tile);
        }
        if seen.is_empty() {
            return keys.end..keys.end;
        }
        self.deltas(simd, region, delta);
        before..seen.end
    }

    #[inline(always)]
    fn region<S: Simd>(&self, simd: S, region: Region, state: &mut State<'_>) {
        let Region { batch, kv, ref rows, parts, .. } = region;
        let sight = self.spec.mask.sight(batch, self.shape.seq_k);
        let seen = self.open(simd, &region, ROW_TILE, state.delta);
        for keys in self.key_blocks(seen) {
            let stride = keys.len().next_multiple_of(S::F32_LANES);
            let k = self.saved.k.head(batch, kv).sub(keys.clone(), 0..self.shape.dim);
            let v = self.saved.v.head(batch, kv).sub(keys.clone(), 0..self.shape.v_dim);
            stage::transpose(k, state.keys, stride);
            stage::transpose(v, state.values, stride);
            let scale = self.spec.scale;
            let k = if parts.q { stage::scaled(simd, scale, k, 0..k.rows(), state.k_rows) } else { k };
            let (kt, vt) = (&*state.keys, &*state.values);
            // SAFETY: a unit that owns dK and dV owns these keys of this key head alone, and blocks are disjoint.
            let (d_k, d_v) = unsafe {
                (
                    parts.kv.then(|| self.d_k.rows_unsync(batch, kv, keys.clone())),
                    parts.kv.then(|| self.d_v.rows_unsync(batch, kv, keys.clone())),
                )
            };
            let mut block = Block { keys, stride, kt, vt, k, d_k, d_v, sight, fresh: true };
            for head in region.heads.clone() {
                let mut head = self.head(&region, head, state.delta);
                let list = self.spec.mask.list(head.fixed.index);
                for rows in row_tiles(list, block.keys.start, rows.clone(), ROW_TILE) {
                    let seen = sight.rows(&rows, &block.keys);
                    if seen.is_empty() {
                        continue;
                    }
                    let q = stage::scaled(simd, scale, head.q, rows.clone(), state.q_rows);
                    let d_out = head.d_out.sub(rows.clone(), 0..self.shape.v_dim);
                    let d_out = stage::gather(simd, d_out, state.d_out_rows);
                    let scores = Scores { p: state.p, d_s: state.d_s };
                    let (head, block) = (&mut head, &mut block);
                    Tile { problem: self, head, block, rows, seen, q, d_out, scores }.run(simd, parts.bias);
                }
            }
            block.clear_if_fresh();
        }
    }

    /// D of the region's rows, head after head: once, where every block of keys would have to read O again.
    #[inline(always)]
    fn deltas<S: Simd>(&self, simd: S, region: &Region, delta: &mut [f32]) {
        let rows = region.rows.clone();
        for (head, delta) in region.heads.clone().zip(delta.chunks_exact_mut(rows.len())) {
            let (out, d_out) = (self.saved.out.head(region.batch, head), self.d_out.head(region.batch, head));
            for (i, delta) in rows.clone().zip(delta) {
                if i + stage::AHEAD < rows.end {
                    [out, d_out].iter().for_each(|view| prefetch::row(view.row(i + stage::AHEAD)));
                }
                *delta = lanes::dot(simd, d_out.row(i), out.row(i));
            }
        }
    }

    #[inline(always)]
    pub(super) fn head<'a>(&'a self, region: &Region, index: usize, delta: &'a [f32]) -> Head<'a> {
        let Shape { heads, seq_q, .. } = self.shape;
        let batch = region.batch;
        let rows = region.rows.len();
        let fixed = HeadWeights {
            index,
            delta: &delta[(index - region.heads.start) * rows..][..rows],
            lse: &self.saved.lse[(batch * heads + index) * seq_q..][..seq_q],
            first_row: region.rows.start,
            dropout: self.spec.mask.dropout.map(|dropout| dropout.head(batch, index)),
        };
        Head {
            fixed,
            q: self.saved.q.head(batch, index),
            d_out: self.d_out.head(batch, index),
            // SAFETY: the unit owns these rows of dQ, and no other view of them is alive in it.
            d_q: region.parts.q.then(|| unsafe { self.d_q.rows_unsync(batch, index, region.rows.clone()) }),
        }
    }

    /// Zeros in dK and dV of keys that nobody sees.
    #[inline(always)]
    fn clear_keys(&self, region: &Region, keys: Range<usize>) {
        if keys.is_empty() {
            return;
        }
        for grad in [self.d_k, self.d_v] {
            // SAFETY: a unit that owns dK and dV owns these keys of this key head alone; no other view of them
            // is alive in it.
            clear(&mut unsafe { grad.rows_unsync(region.batch, region.kv, keys.clone()) });
        }
    }

    /// Zeros in dQ of tiles that see no key; every other tile is written by the first block that it sees, except
    /// that under a list all tiles begin with zeros.
    #[inline(always)]
    fn clear_blind_rows(&self, region: &Region, tile: usize) {
        let sight = self.spec.mask.sight(region.batch, self.shape.seq_k);
        for first in region.rows.clone().step_by(tile) {
            let tile = first..(first + tile).min(region.rows.end);
            if self.spec.mask.blocks.is_some() || sight.rows(&tile, &region.keys).is_empty() {
                for head in region.heads.clone() {
                    // SAFETY: the unit owns these rows of dQ; no other view of them is alive in it.
                    clear(&mut unsafe { self.d_q.rows_unsync(region.batch, head, tile.clone()) });
                }
            }
        }
    }
}

/// Zeros in all of `view`.
pub(super) fn clear(view: &mut MatMut<'_>) {
    for i in 0..view.rows() {
        view.row_mut(i).fill(0.0);
    }
}
