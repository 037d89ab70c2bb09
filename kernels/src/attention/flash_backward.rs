//! The backward pass.
//!
//! ```text
//! D_i = Σ_d dO_id·O_id
//! P_ij = exp(s_ij − lse_i)     dP = dO·Vᵀ     dS = P ∘ (dP − D)
//! dV = Pᵀ·dO     dK = scale·dSᵀ·Q     dQ = scale·dS·K     d_bias = Σ_batch dS
//! ```
//! That is the naive form, with three matrices of the size of the scores. Here P is made again, block by
//! block, from the saved log-sum-exp, and nothing of that size is stored:
//! - As many rows as fit [`super::problem::HELD`], of a head or of several that share their keys, are taken against all blocks of keys, tile by tile of [`TILE`] rows. Kᵀ and Vᵀ of a block are
//!   transposed once for these rows, and the five products are [`product`](super::tile::product), Pᵀ and dSᵀ read across.
//! - Q and dO of the held rows, and the sums dQ, dK and dV, stand in gapless scratch where heads interleave: their rows lie a power of two
//!   apart, meet in few sets of the first- and second-level cache, and would come from the third for every block.
//! - Sums over keys (dQ) and over rows (dK, dV) are chains of multiply-adds in ascending order, so how the
//!   region is cut changes no bit. With enough heads, or as many as threads, a task does all three for a head; with few heads and
//!   several threads, tasks do dK and dV of some keys and then dQ of some rows (7 products instead of
//!   5, but every thread is at work), with the same bits.
//! - The bias gradient adds in the order batch, head. One thread does it on the way; several do it in a pass
//!   of its own over (bias head, rows), with the same bits.
//!
//! Where bf16 parts are multiplied, on tiles or by dot products, the five products are those of [`super::backward_tiles`].

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::backward_held::{Held, RowScratch};
use super::backward_tile::{Block, Head, Tile};
use super::backward_weights::{HeadWeights, Scores};
use super::on_tiles::OnTiles;
use super::problem::{KEY_BLOCK, ROW_CHUNK, Shape, Shared, cut, deal, even_parts, pieces_of, take_first};
use super::regions::{Cut, Parts, Region, row_tiles};
use super::stage::{self, Coming, Place};
use super::tile::GROUP;
use super::{AttentionSpec, Saved};
use crate::context::Context;
use crate::gemm::microkernel::prefetch;
use crate::lanes;
use crate::scratch::ScratchBuf;
use crate::view::{HeadsMut, HeadsRef, MatMut, MatRef};

/// Query rows of a tile: so many that the sums dK and dV, which pass through memory once a tile, cost little beside their multiply-adds
/// (24, 48, 72, 96 and 126 rows: docs/decisions/003-attention.md).
pub(super) const TILE: usize = 96;

/// Places that [`Backward::coming`] names.
pub(super) const AFTER: usize = 8;

/// Rows that are one tile where a head has no more: dK and dV then do not pass through memory.
const ALONE: usize = 132;

/// Rows of a tile of a region of `rows` rows: equal parts of whole groups.
pub(super) fn tile_of(rows: usize) -> usize {
    even_parts(rows, if rows <= ALONE { ALONE } else { TILE }, GROUP)
}

impl Backward<'_> {
    /// The most rows of a tile: the last region of a head may have fewer rows than the others, and then one tile.
    fn most_of_tile(&self, cut: Cut) -> usize {
        let seq_q = self.shape.seq_q;
        let rows = match cut {
            Cut::Heads { .. } | Cut::Keys => seq_q,
            Cut::Rows | Cut::BiasRows => seq_q.min(ROW_CHUNK),
        };
        let of = |rows: usize| tile_of(rows).min(rows);
        of(rows).max(of(seq_q % rows.max(1)))
    }
}

/// What comes after a block of keys.
pub(super) enum Next<'a> {
    Keys(&'a Range<usize>),
    Region(&'a Region),
    Nothing,
}

impl<'a> Next<'a> {
    /// The next block of a region, or, after the last one, the next region.
    pub(super) fn of(keys: Option<&'a Range<usize>>, region: Option<&'a Region>) -> Next<'a> {
        keys.map(Next::Keys).or(region.map(Next::Region)).unwrap_or(Next::Nothing)
    }
}

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
    let faster = tiles.map_or(1, OnTiles::faster);
    let deal = |cut: Cut| {
        let units = problems.iter().map(|problem| problem.units(cut)).sum::<usize>();
        let work = problems.iter().fold(0usize, |sum, problem| sum.saturating_add(problem.work()));
        deal(ctx, units, work / faster / units.max(1), |units| Units { problems, tiles, cut, units });
    };
    // As many heads of one length as threads have a whole head each; else few heads leave threads without work, and the seven products of two cuts take less time.
    let even = match problems {
        [problem] => problem.spec.mask.key_lengths.is_none() && pairs.is_multiple_of(threads),
        _ => false,
    };
    if threads > 1 && pairs < 2 * threads && !even {
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
        let Shape { dim, v_dim, .. } = self.shape;
        let stride = KEY_BLOCK.next_multiple_of(S::F32_LANES);
        let held = self.rows_of_region(cut_into).min(self.most_held());
        let tile = self.most_of_tile(cut_into);
        let of_rows = [held * dim, held * v_dim, held * dim, held];
        let of_keys = [dim * stride, v_dim * stride, KEY_BLOCK * dim, KEY_BLOCK * dim, KEY_BLOCK * v_dim];
        let of_tile = [tile * stride, tile * stride];
        let lens = [of_rows.iter().sum(), of_keys.iter().sum(), of_tile.iter().sum()];
        let mut scratch = ScratchBuf::take(lens.iter().sum());
        let [rows, keys, scores] = cut(&mut scratch, lens);
        let [q, d_out, d_q, delta] = cut(rows, of_rows);
        let [kt, vt, k, d_k, d_v] = cut(keys, of_keys);
        let [p, d_s] = cut(scores, of_tile);
        let mut state = (RowScratch { q, d_out, d_q, delta }, KeyScratch { kt, vt, k, d_k, d_v, p, d_s });
        let mut regions = self.regions(cut_into, units).peekable();
        while let Some(region) = regions.next() {
            self.region(simd, (&region, regions.peek()), &mut state);
        }
    }
}

/// Of a block of keys: Kᵀ and Vᵀ [dim, stride], scale·K, dK and dV; P and dS of a tile [TILE, stride].
struct KeyScratch<'a> {
    kt: &'a mut [f32],
    vt: &'a mut [f32],
    k: &'a mut [f32],
    d_k: &'a mut [f32],
    d_v: &'a mut [f32],
    p: &'a mut [f32],
    d_s: &'a mut [f32],
}

impl Backward<'_> {
    /// Writes what no block of keys touches; the keys that are seen, from the start of a block on. `tile` is the number of rows
    /// that are written together.
    #[inline(always)]
    pub(super) fn open(&self, region: &Region, tile: usize) -> Range<usize> {
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
        if seen.is_empty() { keys.end..keys.end } else { before..seen.end }
    }

    /// As many rows of heads as are held at a time against all keys. Where there are more, dK and dV begin with zeros.
    #[inline(always)]
    fn region<S: Simd>(
        &self,
        simd: S,
        (region, next): (&Region, Option<&Region>),
        state: &mut (RowScratch<'_>, KeyScratch<'_>),
    ) {
        let tile = tile_of(region.rows.len());
        let keys = self.open(region, tile);
        if keys.is_empty() {
            return;
        }
        let Region { batch, kv, ref heads, ref rows, parts, .. } = *region;
        let together = (self.most_held() / rows.len()).clamp(1, heads.len());
        let held = if together > 1 { rows.len() } else { self.held_rows(rows.len()) };
        let fresh = together == heads.len() && rows.len() <= held;
        if !fresh && parts.kv {
            self.clear_keys(region, keys.clone());
        }
        for head in heads.clone().step_by(together) {
            for first in rows.clone().step_by(held) {
                let rows = first..(first + held).min(rows.end);
                let heads = head..(head + together).min(heads.end);
                let region = Region { batch, kv, heads, rows, keys: keys.clone(), parts };
                self.rows(simd, (&region, next), (fresh, tile), state);
            }
        }
    }

    /// Some rows of heads against the keys of a region.
    #[inline(always)]
    fn rows<S: Simd>(
        &self,
        simd: S,
        (region, after): (&Region, Option<&Region>),
        (fresh, tile): (bool, usize),
        (scratch, key_scratch): &mut (RowScratch<'_>, KeyScratch<'_>),
    ) {
        let Shape { dim, v_dim, seq_k, .. } = self.shape;
        let Region { batch, kv, ref rows, ref keys, parts, .. } = *region;
        let sight = self.spec.mask.sight(batch, seq_k);
        let RowScratch { q, d_out, d_q, delta } = scratch;
        let (mut q, mut d_out, mut d_q, mut delta) = (&mut **q, &mut **d_out, &mut **d_q, &mut **delta);
        let mut held = Vec::with_capacity(region.heads.len());
        for head in region.heads.clone() {
            let scratch = RowScratch {
                q: take_first(&mut q, rows.len() * dim),
                d_out: take_first(&mut d_out, rows.len() * v_dim),
                d_q: take_first(&mut d_q, rows.len() * dim),
                delta: take_first(&mut delta, rows.len()),
            };
            let of_head =
                Region { batch, kv, heads: head..head + 1, rows: rows.clone(), keys: keys.clone(), parts };
            held.push(self.hold(simd, &of_head, (sight, fresh), scratch));
        }
        let mut blocks = self.key_blocks(keys.clone()).peekable();
        while let Some(keys) = blocks.next() {
            if !sight.rows(rows, &keys).is_empty() {
                let next = Next::of(blocks.peek(), after);
                self.keys(simd, region, &mut held, (keys, next, tile), key_scratch);
            } else if fresh && parts.kv {
                self.clear_keys(region, keys);
            }
        }
        held.into_iter().for_each(|held| self.release(held, keys, tile));
    }

    /// Rows of some heads that are held against a block of keys; on the way asks for the next ones.
    #[inline(always)]
    fn keys<S: Simd>(
        &self,
        simd: S,
        region: &Region,
        held: &mut [Held<'_>],
        (keys, next, tile): (Range<usize>, Next<'_>, usize),
        scratch: &mut KeyScratch<'_>,
    ) {
        let Shape { dim, v_dim, .. } = self.shape;
        let Region { batch, kv, parts, .. } = *region;
        let Some(&Held { sight, fresh, ref apart, .. }) = held.first() else { return };
        let stride = keys.len().next_multiple_of(S::F32_LANES);
        let (k_head, v_head) = (self.saved.k.head(batch, kv), self.saved.v.head(batch, kv));
        let (k, v) = (k_head.sub(keys.clone(), 0..dim), v_head.sub(keys.clone(), 0..v_dim));
        stage::transpose(k, scratch.kt, stride);
        stage::transpose(v, scratch.vt, stride);
        let k = if parts.q { stage::scaled(simd, self.spec.scale, k, 0..k.rows(), scratch.k) } else { k };
        let several = held.len() * region.rows.len() > tile;
        let [mut apart_k, mut apart_v] = [None, None];
        // SAFETY (both): a unit that owns dK and dV owns these keys of this key head alone, and blocks are disjoint.
        let grads = [
            (self.d_k, &mut *scratch.d_k, &mut apart_k, dim),
            (self.d_v, &mut *scratch.d_v, &mut apart_v, v_dim),
        ]
        .map(|(grad, scratch, apart, dim)| {
            // SAFETY: see above.
            let grad = parts.kv.then(|| unsafe { grad.rows_unsync(batch, kv, keys.clone()) })?;
            if !(several && stage::spreads(grad.as_ref())) {
                return Some(grad);
            }
            let mut held_grad =
                MatMut::new(&mut scratch[..keys.len() * dim], keys.len(), dim).expect("cut to keys × dim");
            if !fresh {
                stage::copy(grad.as_ref(), held_grad.reborrow());
            }
            *apart = Some(grad);
            Some(held_grad)
        });
        let [d_k, d_v] = grads;
        let tiles = held.len() * region.rows.len().div_ceil(tile);
        // In other blocks the copies of dK and dV ask for themselves, and at the end that of a dQ that is summed apart does.
        let last = !matches!(next, Next::Keys(_));
        let written = Parts { q: parts.q && last && apart.is_none(), kv: parts.kv && last, bias: false };
        let coming = self.coming(region, &keys, (next, written));
        let mut coming = Coming::new(coming, tiles * Tile::shares(tile.min(region.rows.len()), keys.len()));
        let (kt, vt) = (&*scratch.kt, &*scratch.vt);
        let mut block = Block { keys, stride, kt, vt, k, d_k, d_v, sight, fresh };
        for held in held {
            let list = self.spec.mask.list(held.head.fixed.index);
            for rows in row_tiles(list, block.keys.start, held.rows.clone(), tile) {
                let seen = sight.rows(&rows, &block.keys);
                if seen.is_empty() {
                    continue;
                }
                let local = rows.start - held.rows.start..rows.end - held.rows.start;
                let (q, d_out) = (held.q.sub(local.clone(), 0..dim), held.d_out.sub(local, 0..v_dim));
                let scores = Scores { p: scratch.p, d_s: scratch.d_s };
                let (head, block) = (&mut held.head, &mut block);
                let tile = Tile { problem: self, head, block, rows, seen, q, d_out, scores };
                tile.run(simd, parts.bias, &mut coming);
            }
        }
        block.clear_if_fresh();
        for (apart, held) in [(apart_k, &block.d_k), (apart_v, &block.d_v)] {
            if let (Some(apart), Some(held)) = (apart, held) {
                stage::copy(held.as_ref(), apart);
            }
        }
    }

    /// What is asked for on the way through a block of keys: the places of the gradients that `written` names, and the next block, or, after the last one, what the
    /// next region begins with. For heads of 128 positions that was a seventh of the pass.
    #[inline(always)]
    pub(super) fn coming(
        &self,
        region: &Region,
        keys: &Range<usize>,
        (next, written): (Next<'_>, Parts),
    ) -> [Place; AFTER] {
        let Saved { q, k, v, out, .. } = self.saved;
        let Region { batch, kv, ref heads, ref rows, .. } = *region;
        if !stage::spreads(k.head(batch, kv)) {
            return [Place::NOWHERE; AFTER];
        }
        let place = |grad: &HeadsMut<'_>, head: usize, rows: &Range<usize>, wanted: bool| {
            if wanted { Place::in_head(grad, (batch, head), rows) } else { Place::NOWHERE }
        };
        let read = |of: &HeadsRef<'_>, batch: usize, head: usize, rows: &Range<usize>| {
            let head = of.head(batch, head);
            Place::of(head.sub(rows.clone(), 0..head.cols()))
        };
        let [d_k, d_v] = [self.d_k, self.d_v].map(|grad| place(grad, kv, keys, written.kv));
        let d_q = place(self.d_q, heads.start, rows, written.q);
        let [of_q, of_d_out, of_out, of_k, of_v] = match next {
            Next::Nothing => [Place::NOWHERE; 5],
            Next::Keys(keys) => {
                let [k, v] = [k, v].map(|of| read(of, batch, kv, keys));
                [Place::NOWHERE, Place::NOWHERE, Place::NOWHERE, k, v]
            }
            Next::Region(Region { batch, kv, heads, rows, keys, .. }) => {
                let rows = rows.start..rows.end.min(rows.start + tile_of(rows.len()));
                let keys = self.key_blocks(keys.clone()).next().unwrap_or(0..0);
                let [q, d_out, out] = [q, &self.d_out, out].map(|of| read(of, *batch, heads.start, &rows));
                let [k, v] = [k, v].map(|of| read(of, *batch, *kv, &keys));
                [q, d_out, out, k, v]
            }
        };
        [d_k, d_v, d_q, of_q, of_d_out, of_out, of_k, of_v]
    }

    /// D of some rows of a head, of which `d_out` holds these rows of dO: once, where every block of keys would have to read O again.
    #[inline(always)]
    pub(super) fn deltas<S: Simd>(
        &self,
        simd: S,
        (batch, head): (usize, usize),
        (rows, d_out): (&Range<usize>, MatRef<'_>),
        delta: &mut [f32],
    ) {
        let out = self.saved.out.head(batch, head).sub(rows.clone(), 0..self.shape.v_dim);
        for (i, delta) in delta.iter_mut().enumerate() {
            if i + stage::AHEAD < rows.len() {
                [out, d_out].iter().for_each(|view| prefetch::row(view.row(i + stage::AHEAD)));
            }
            *delta = lanes::dot(simd, d_out.row(i), out.row(i));
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
