//! The backward pass.
//!
//! ```text
//! D_i = Σ_d dO_id·O_id
//! P_ij = exp(s_ij − lse_i)     dP = dO·Vᵀ     dS = P ∘ (dP − D)
//! dV = Pᵀ·dO     dK = scale·dSᵀ·Q     dQ = scale·dS·K     d_bias = Σ_batch dS
//! ```
//! That is the naive form, with three matrices of the size of the scores. Here P is made again, block by
//! block, from the saved log-sum-exp, and nothing of that size is stored:
//! - Key blocks are the outer loop: Kᵀ and Vᵀ of a block are transposed once for all query rows, and the
//!   five products are [`tile::product`], Pᵀ and dSᵀ read across.
//! - Sums over keys (dQ) and over rows (dK, dV) are chains of multiply-adds in ascending order, so how the
//!   region is cut changes no bit. With enough heads a task does all three for a head; with few heads and
//!   several threads, tasks do dK and dV of some keys and then dQ of some rows (7 products instead of
//!   5, but every thread is at work), with the same bits.
//! - The bias gradient adds in the order batch, head. One thread does it on the way; several do it in a pass
//!   of its own over (bias head, rows), with the same bits.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::flash::{groups, vectors};
use super::mask::Sight;
use super::online::{Row, score, seen, shift};
use super::problem::{KEY_BLOCK, ROW_CHUNK, ROW_TILE, Shape, Shared, deal, piece};
use super::tile::{Dest, Extent, Left, Right, product};
use super::{AttentionSpec, Saved, stage};
use crate::context::Context;
use crate::lanes;
use crate::math::exp;
use crate::scratch::ScratchBuf;
use crate::view::{HeadsMut, HeadsRef, MatMut, MatRef};

/// Keys that one task of a split head owns.
const KEY_CHUNK: usize = 4 * KEY_BLOCK;

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

/// Which gradients a region writes.
#[derive(Clone, Copy)]
struct Parts {
    q: bool,
    kv: bool,
    bias: bool,
}

/// How the problem is cut into units.
#[derive(Clone, Copy)]
enum Cut {
    /// One key head with its query heads, all gradients; the bias too when the flag says so.
    Heads { bias: bool },
    /// dK and dV of some keys of one key head.
    Keys,
    /// dQ of some rows of one query head.
    Rows,
    /// d_bias of some rows of one head of the bias.
    BiasRows,
}

impl Backward<'_> {
    /// Runs all of it.
    pub(super) fn run(&self, ctx: &Context) {
        let Shape { batch, heads, kv_heads, seq_q, seq_k, dim, v_dim } = self.shape;
        let pairs = batch * kv_heads;
        let score_work =
            |rows: usize, keys: usize| rows.saturating_mul(keys).saturating_mul(2 * (dim + v_dim));
        let split = ctx.thread_count() > 1 && pairs < 2 * ctx.thread_count();
        let run = |units: usize, work: usize, cut: Cut| {
            deal(ctx, units, work, |units| Units { problem: *self, cut, units });
        };
        let bias = self.d_bias.is_some();
        if split {
            let rows = seq_q.saturating_mul(self.shape.group());
            run(pairs * seq_k.div_ceil(KEY_CHUNK), score_work(rows, seq_k.min(KEY_CHUNK)), Cut::Keys);
            run(
                batch * heads * seq_q.div_ceil(ROW_CHUNK),
                score_work(seq_q.min(ROW_CHUNK), seq_k),
                Cut::Rows,
            );
        } else {
            let rows = seq_q.saturating_mul(self.shape.group());
            run(pairs, score_work(rows, seq_k), Cut::Heads { bias: bias && ctx.thread_count() == 1 });
        }
        if bias && ctx.thread_count() > 1 {
            let bias_heads = self.bias_heads();
            let rows = seq_q.min(ROW_CHUNK).saturating_mul(batch * heads / bias_heads.max(1));
            run(bias_heads * seq_q.div_ceil(ROW_CHUNK), score_work(rows, seq_k), Cut::BiasRows);
        }
    }

    fn bias_heads(&self) -> usize {
        self.spec.mask.bias.map_or(0, |bias| bias.heads)
    }
}

struct Units<'a> {
    problem: Backward<'a>,
    cut: Cut,
    units: Range<usize>,
}

impl WithSimd for Units<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Shape { seq_q, dim, v_dim, .. } = self.problem.shape;
        let stride = KEY_BLOCK.next_multiple_of(S::F32_LANES);
        let tile = seq_q.min(ROW_TILE) * stride;
        let mut scratch = ScratchBuf::take(dim * stride + v_dim * stride + 2 * tile + ROW_TILE);
        let (keys, rest) = scratch.split_at_mut(dim * stride);
        let (values, rest) = rest.split_at_mut(v_dim * stride);
        let (p, rest) = rest.split_at_mut(tile);
        let (d_s, delta) = rest.split_at_mut(tile);
        let mut state = State { keys, values, p, d_s, delta };
        for unit in self.units.clone() {
            self.unit(simd, unit, &mut state);
        }
    }
}

impl Units<'_> {
    /// One unit: its heads, rows, keys and parts.
    #[inline(always)]
    fn unit<S: Simd>(&self, simd: S, unit: usize, state: &mut State<'_>) {
        let Shape { batch, heads, kv_heads, seq_q, seq_k, .. } = self.problem.shape;
        let group = self.problem.shape.group();
        match self.cut {
            Cut::Heads { bias } => {
                let (batch, kv) = (unit / kv_heads, unit % kv_heads);
                let parts = Parts { q: true, kv: true, bias };
                let region = Region {
                    batch,
                    kv,
                    heads: kv * group..(kv + 1) * group,
                    rows: 0..seq_q,
                    keys: 0..seq_k,
                    parts,
                };
                self.problem.region(simd, region, state);
            }
            Cut::Keys => {
                let chunks = seq_k.div_ceil(KEY_CHUNK);
                let (batch, kv) = (unit / chunks / kv_heads, unit / chunks % kv_heads);
                let keys = piece(unit % chunks, KEY_CHUNK, seq_k);
                let parts = Parts { q: false, kv: true, bias: false };
                let region =
                    Region { batch, kv, heads: kv * group..(kv + 1) * group, rows: 0..seq_q, keys, parts };
                self.problem.region(simd, region, state);
            }
            Cut::Rows => {
                let chunks = seq_q.div_ceil(ROW_CHUNK);
                let (batch, head) = (unit / chunks / heads, unit / chunks % heads);
                let rows = piece(unit % chunks, ROW_CHUNK, seq_q);
                let parts = Parts { q: true, kv: false, bias: false };
                let region =
                    Region { batch, kv: head / group, heads: head..head + 1, rows, keys: 0..seq_k, parts };
                self.problem.region(simd, region, state);
            }
            Cut::BiasRows => {
                let chunks = seq_q.div_ceil(ROW_CHUNK);
                let rows = piece(unit % chunks, ROW_CHUNK, seq_q);
                let one_for_all = self.problem.bias_heads() == 1;
                let bias_head = unit / chunks;
                let shared = if one_for_all { 0..heads } else { bias_head..bias_head + 1 };
                let parts = Parts { q: false, kv: false, bias: true };
                for batch in 0..batch {
                    for head in shared.clone() {
                        let (rows, keys) = (rows.clone(), 0..seq_k);
                        let region =
                            Region { batch, kv: head / group, heads: head..head + 1, rows, keys, parts };
                        self.problem.region(simd, region, state);
                    }
                }
            }
        }
    }
}

/// Scratch of one task: Kᵀ and Vᵀ of a block [dim, stride], P and dS of a tile [ROW_TILE, stride], and the
/// D of the tile's rows.
struct State<'a> {
    keys: &'a mut [f32],
    values: &'a mut [f32],
    p: &'a mut [f32],
    d_s: &'a mut [f32],
    delta: &'a mut [f32],
}

/// The scores `heads × rows × keys` of one sequence, and the gradients that are to be made from them.
struct Region {
    batch: usize,
    kv: usize,
    heads: Range<usize>,
    rows: Range<usize>,
    keys: Range<usize>,
    parts: Parts,
}

/// The operands of one query head.
struct Head<'a> {
    index: usize,
    q: MatRef<'a>,
    out: MatRef<'a>,
    d_out: MatRef<'a>,
    lse: &'a [f32],
    first_row: usize,
    /// The region's rows, of which the first is `first_row`.
    d_q: Option<MatMut<'a>>,
}

/// One block of keys.
struct Block<'a> {
    keys: Range<usize>,
    stride: usize,
    k: MatRef<'a>,
    d_k: Option<MatMut<'a>>,
    d_v: Option<MatMut<'a>>,
    sight: Sight,
}

impl Backward<'_> {
    #[inline(always)]
    fn region<S: Simd>(&self, simd: S, region: Region, state: &mut State<'_>) {
        let Region { batch, kv, heads, rows, keys, parts } = region;
        let sight = self.spec.mask.sight(batch, self.shape.seq_k);
        if parts.kv {
            // SAFETY: a unit that owns dK and dV owns these keys of this key head alone.
            let mut views = unsafe {
                [self.d_k.rows_unsync(batch, kv, keys.clone()), self.d_v.rows_unsync(batch, kv, keys.clone())]
            };
            views.iter_mut().for_each(clear);
        }
        if parts.q {
            for head in heads.clone() {
                // SAFETY: a unit that owns dQ owns these rows of this query head alone.
                clear(&mut unsafe { self.d_q.rows_unsync(batch, head, rows.clone()) });
            }
        }
        if rows.is_empty() {
            return;
        }
        let seen = sight.rows(&rows, &keys);
        if seen.is_empty() {
            return;
        }
        for index in seen.start / KEY_BLOCK..seen.end.div_ceil(KEY_BLOCK) {
            let keys = piece(index, KEY_BLOCK, seen.end);
            let stride = keys.len().next_multiple_of(S::F32_LANES);
            let k = self.saved.k.head(batch, kv).sub(keys.clone(), 0..self.shape.dim);
            let v = self.saved.v.head(batch, kv).sub(keys.clone(), 0..self.shape.v_dim);
            stage::transpose(k, state.keys, stride);
            stage::transpose(v, state.values, stride);
            // SAFETY: as above; the views of the whole range have ended, and blocks are disjoint.
            let (d_k, d_v) = unsafe {
                (
                    parts.kv.then(|| self.d_k.rows_unsync(batch, kv, keys.clone())),
                    parts.kv.then(|| self.d_v.rows_unsync(batch, kv, keys.clone())),
                )
            };
            let mut block = Block { keys, stride, k, d_k, d_v, sight };
            for head in heads.clone() {
                let mut head = self.head(batch, head, &rows, parts);
                for first in rows.clone().step_by(ROW_TILE) {
                    let rows = first..(first + ROW_TILE).min(rows.end);
                    let seen = sight.rows(&rows, &block.keys);
                    if !seen.is_empty() {
                        let (head, block) = (&mut head, &mut block);
                        Tile { problem: self, head, block, rows, seen }.run(simd, parts.bias, state);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn head(&self, batch: usize, index: usize, rows: &Range<usize>, parts: Parts) -> Head<'_> {
        let Shape { heads, seq_q, .. } = self.shape;
        Head {
            index,
            q: self.saved.q.head(batch, index),
            out: self.saved.out.head(batch, index),
            d_out: self.d_out.head(batch, index),
            lse: &self.saved.lse[(batch * heads + index) * seq_q..][..seq_q],
            first_row: rows.start,
            // SAFETY: the unit owns these rows of dQ, and no other view of them is alive in it.
            d_q: parts.q.then(|| unsafe { self.d_q.rows_unsync(batch, index, rows.clone()) }),
        }
    }
}

/// One tile of scores: some rows of a head against a block of keys.
struct Tile<'t, 'a> {
    problem: &'t Backward<'a>,
    head: &'t mut Head<'a>,
    block: &'t mut Block<'a>,
    rows: Range<usize>,
    /// What the rows see of the block.
    seen: Range<usize>,
}

impl Tile<'_, '_> {
    /// All gradients that the tile gives.
    #[inline(always)]
    fn run<S: Simd>(&mut self, simd: S, bias: bool, state: &mut State<'_>) {
        for (delta, i) in state.delta.iter_mut().zip(self.rows.clone()) {
            *delta = lanes::dot(simd, self.head.d_out.row(i), self.head.out.row(i));
        }
        for rows in groups(&self.rows) {
            self.products(simd, &rows, state);
            for i in rows.clone() {
                self.row(simd, i, bias, &rows, state);
            }
        }
        for keys in groups(&self.seen) {
            self.keys_and_values(simd, keys, state);
        }
        for rows in groups(&self.rows) {
            self.queries(simd, rows, state);
        }
    }

    /// The first column of the tile's vectors, and how many columns they have.
    #[inline(always)]
    fn columns<S: Simd>(&self, seen: &Range<usize>) -> Range<usize> {
        let vectors = vectors::<S>(seen, &self.block.keys);
        vectors.start * S::F32_LANES..vectors.end * S::F32_LANES
    }

    /// Q·Kᵀ and dO·Vᵀ of at most six rows.
    #[inline(always)]
    fn products<S: Simd>(&self, simd: S, rows: &Range<usize>, state: &mut State<'_>) {
        let Shape { dim, v_dim, .. } = self.problem.shape;
        let seen = self.block.sight.rows(rows, &self.block.keys);
        let columns = self.columns::<S>(&seen);
        let stride = self.block.stride;
        let place = (rows.start - self.rows.start) * stride;
        let p = &mut state.p[place..][..rows.len() * stride];
        let d_s = &mut state.d_s[place..][..rows.len() * stride];
        let extent = Extent { rows: rows.len(), cols: columns.len(), depth: dim };
        // SAFETY: q and dO have these rows of `dim` and `v_dim` elements; Kᵀ and Vᵀ have as many rows of `stride`
        // columns, which hold all columns; P and dS have been cut for these rows.
        unsafe {
            let k = Right { ptr: state.keys.as_ptr().add(columns.start), stride };
            let s = Dest { ptr: p.as_mut_ptr().add(columns.start), stride };
            product(simd, extent, left(self.head.q, rows.start), k, s, false);
            let v = Right { ptr: state.values.as_ptr().add(columns.start), stride };
            let d_p = Dest { ptr: d_s.as_mut_ptr().add(columns.start), stride };
            product(
                simd,
                Extent { depth: v_dim, ..extent },
                left(self.head.d_out, rows.start),
                v,
                d_p,
                false,
            );
        }
    }

    /// P and dS of row `i` of `group`, in the columns of the whole tile.
    #[inline(always)]
    fn row<S: Simd>(&self, simd: S, i: usize, bias: bool, group: &Range<usize>, state: &mut State<'_>) {
        let Shape { seq_q, seq_k, .. } = self.problem.shape;
        let (stride, keys) = (self.block.stride, &self.block.keys);
        let place = (i - self.rows.start) * stride;
        let p = &mut state.p[place..][..stride];
        let d_s = &mut state.d_s[place..][..stride];
        let whole = self.columns::<S>(&self.seen);
        let columns = self.columns::<S>(&self.block.sight.rows(group, keys));
        for outside in [whole.start..columns.start.max(whole.start), columns.end.min(whole.end)..whole.end] {
            p[outside.clone()].fill(0.0);
            d_s[outside].fill(0.0);
        }
        let from = keys.start + columns.start;
        let visible = self.block.sight.row(i, keys);
        let visible = visible.start.max(from) - from..visible.end.max(from) - from;
        let spec = &self.problem.spec;
        let bias_row = spec.mask.bias.map(|b| &b.row(self.head.index, i, seq_q, seq_k)[from..keys.end]);
        let row = Row { scale: spec.scale, bias: bias_row };
        let lse = simd.splat_f32s(shift(self.head.lse[i]));
        let delta = simd.splat_f32s(state.delta[i - self.rows.start]);
        let scale = simd.splat_f32s(spec.scale);
        let p = S::as_mut_simd_f32s(&mut p[columns.clone()]).0;
        let d_s = S::as_mut_simd_f32s(&mut d_s[columns]).0;
        for (v, (p, d_s)) in p.iter_mut().zip(d_s.iter_mut()).enumerate() {
            *p = exp(simd, simd.sub_f32s(score(simd, *p, v, &row, &visible), lse));
            let unscaled = simd.mul_f32s(*p, simd.sub_f32s(seen(simd, *d_s, v, &visible), delta));
            *d_s = unscaled;
        }
        if bias && let Some(d_bias) = self.problem.d_bias {
            let bias_head = if self.problem.bias_heads() == 1 { 0 } else { self.head.index };
            let first = (bias_head * seq_q + i) * seq_k + from + visible.start;
            // SAFETY: d_bias has the shape of the bias, [bias heads, seq_q, seq_k]; the unit that adds to it owns
            // this row of this bias head alone.
            let d_bias = unsafe { d_bias.part(first, visible.len()) };
            let d_s: &[f32] = pulp::bytemuck::cast_slice(d_s);
            for (sum, x) in d_bias.iter_mut().zip(&d_s[visible.clone()]) {
                *sum += x;
            }
        }
        for d_s in d_s {
            *d_s = simd.mul_f32s(*d_s, scale);
        }
    }

    /// `dV += Pᵀ·dO` and `dK += dSᵀ·Q` of at most six keys.
    #[inline(always)]
    fn keys_and_values<S: Simd>(&mut self, simd: S, keys: Range<usize>, state: &State<'_>) {
        let Shape { dim, v_dim, .. } = self.problem.shape;
        let (Some(d_k), Some(d_v)) = (&mut self.block.d_k, &mut self.block.d_v) else { return };
        let stride = self.block.stride;
        let rows = self.block.sight.seers(&keys, &self.rows);
        let place = (rows.start - self.rows.start) * stride + keys.start - self.block.keys.start;
        let extent = Extent { rows: keys.len(), cols: v_dim, depth: rows.len() };
        // SAFETY: P and dS hold these rows in all columns that the tile sees; q and dO have these rows; dK and dV
        // are views of the block's keys, of which these are some.
        unsafe {
            let p = Left { ptr: state.p.as_ptr().add(place), row: 1, depth: stride };
            let d_o = right(self.head.d_out, rows.start);
            product(simd, extent, p, d_o, dest(d_v, keys.start - self.block.keys.start), true);
            let d_s = Left { ptr: state.d_s.as_ptr().add(place), ..p };
            let q = right(self.head.q, rows.start);
            product(
                simd,
                Extent { cols: dim, ..extent },
                d_s,
                q,
                dest(d_k, keys.start - self.block.keys.start),
                true,
            );
        }
    }

    /// `dQ += dS·K` of at most six rows.
    #[inline(always)]
    fn queries<S: Simd>(&mut self, simd: S, rows: Range<usize>, state: &State<'_>) {
        let Some(d_q) = &mut self.head.d_q else { return };
        let stride = self.block.stride;
        let keys = self.block.sight.rows(&rows, &self.block.keys);
        let place = (rows.start - self.rows.start) * stride + keys.start - self.block.keys.start;
        let extent = Extent { rows: rows.len(), cols: self.problem.shape.dim, depth: keys.len() };
        // SAFETY: dS holds these rows in all columns that they see; the block's K has these keys; dQ is a view of
        // the region's rows, of which these are some.
        unsafe {
            let d_s = Left { ptr: state.d_s.as_ptr().add(place), row: stride, depth: 1 };
            let k = right(self.block.k, keys.start - self.block.keys.start);
            product(simd, extent, d_s, k, dest(d_q, rows.start - self.head.first_row), true);
        }
    }
}

/// `view` from row `first` on, to be read along its rows.
#[inline(always)]
fn left(view: MatRef<'_>, first: usize) -> Left {
    Left { ptr: view.as_ptr().wrapping_add(first * view.row_stride()), row: view.row_stride(), depth: 1 }
}

/// `view` from row `first` on, as the right factor.
#[inline(always)]
fn right(view: MatRef<'_>, first: usize) -> Right {
    Right { ptr: view.as_ptr().wrapping_add(first * view.row_stride()), stride: view.row_stride() }
}

/// `view` from row `first` on, to be written.
#[inline(always)]
fn dest(view: &mut MatMut<'_>, first: usize) -> Dest {
    Dest { stride: view.row_stride(), ptr: view.as_mut_ptr().wrapping_add(first * view.row_stride()) }
}

fn clear(view: &mut MatMut<'_>) {
    for i in 0..view.rows() {
        view.row_mut(i).fill(0.0);
    }
}
