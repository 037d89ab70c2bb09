//! The forward pass.
//!
//! ```text
//! for each row i:  s_j = scale·q_i·k_j + bias_ij      over the visible keys j
//!                  m = max s_j,  l = Σ exp(s_j − m)
//!                  o_i = Σ exp(s_j − m)·v_j / l,      lse_i = m + ln l
//! ```
//! That is the naive form: a matrix of scores, three passes over it. Here:
//! - Keys go by fixed blocks of [`KEY_BLOCK`] and a row carries (m, l, o) from block to block
//!   ([`super::online`]), so scores never leave the first-level cache.
//! - A block of keys is transposed once for the rows of a chunk ([`Shape::row_chunk`]): then both products (Q·Kᵀ and P·V) are
//!   [`super::tile::product`] with vectors along the contiguous axis, and no score needs a horizontal sum.
//! - [`ROW_TILE`] rows are taken through one product before the next one starts, so that the block's Kᵀ
//!   and then its V stay in the first-level cache while the rows stream past.
//! - Six rows at a time know which keys they see, so that causal order saves half of the work at the
//!   grain of six rows by one vector; blocks that nobody sees are not looked at.
//!
//! Where the CPU has tiles and the precision is High or Medium, both products are those of [`super::flash_tiles`]; the softmax between them
//! and all else is this.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::blocks::BlockList;
use super::chunk::{Chunk, Rows, groups, vectors};
use super::mask::Coverage;
use super::on_tiles::{self, OnTiles};
use super::problem::{HELD, KEY_BLOCK, ROW_TILE, Shape, Shared, cut, deal, piece, pieces_of};
use super::tile::{Dest, Extent, GROUP, Left, Onto, Right, product, right};
use super::{AttentionSpec, stage};
use crate::context::Context;
use crate::gemm::microkernel::amx::BLOCK;
use crate::scratch::ScratchBuf;
use crate::view::{HeadsMut, HeadsRef, MatRef};

/// A checked problem.
#[derive(Clone, Copy)]
pub(super) struct Forward<'a> {
    pub(super) shape: Shape,
    pub(super) q: HeadsRef<'a>,
    pub(super) k: HeadsRef<'a>,
    pub(super) v: HeadsRef<'a>,
    pub(super) spec: AttentionSpec<'a>,
    pub(super) out: &'a HeadsMut<'a>,
    pub(super) lse: Shared,
}

impl Forward<'_> {
    /// Rows of a unit, and the heads whose rows these are: under a list, the rows that share its entry; on tiles, the heads that share
    /// their keys, where there are units enough.
    fn unit(&self, means: Means) -> (usize, usize) {
        let (lists, group) = (self.spec.mask.blocks, self.shape.group());
        let rows_for = |heads: usize| {
            let held = if means.tiles.is_some() { (on_tiles::HELD / heads, BLOCK) } else { (HELD, ROW_TILE) };
            let list = lists.and_then(<[_]>::first);
            list.map_or_else(|| self.shape.row_chunk(means.threads, held), BlockList::block)
        };
        let together = means.tiles.is_some() && group > 1 && lists.is_none_or(|lists| lists.len() == 1);
        let chunks = if together { self.shape.seq_q.div_ceil(rows_for(group)) } else { 0 };
        let enough =
            means.threads == 1 || self.shape.batch * self.shape.kv_heads * chunks >= 4 * means.threads;
        if together && enough { (rows_for(group), group) } else { (rows_for(1), 1) }
    }

    fn units(&self, means: Means) -> usize {
        let Shape { batch, heads, seq_q, .. } = self.shape;
        let (rows, together) = self.unit(means);
        batch * (heads / together) * seq_q.div_ceil(rows)
    }

    fn work(&self) -> usize {
        let Shape { batch, heads, seq_q, seq_k, dim, v_dim, .. } = self.shape;
        (batch * heads * seq_q).saturating_mul(seq_k.saturating_mul(dim + v_dim))
    }
}

/// By what means a pass runs: the same for all of its problems.
#[derive(Clone, Copy)]
struct Means {
    threads: usize,
    tiles: Option<OnTiles>,
}

/// Runs all of several problems, whose units are dealt together.
pub(super) fn run(ctx: &Context, problems: &[Forward<'_>]) {
    let dim = problems.first().map_or(0, |problem| problem.shape.dim);
    let means = Means { threads: ctx.thread_count(), tiles: OnTiles::of(ctx, dim) };
    let units = problems.iter().map(|problem| problem.units(means)).sum::<usize>();
    let work = problems.iter().fold(0usize, |sum, problem| sum.saturating_add(problem.work()));
    let work = if means.tiles.is_some() { work / on_tiles::FASTER } else { work };
    deal(ctx, units, work / units.max(1), |units| Units { problems, means, units });
}

struct Units<'a> {
    problems: &'a [Forward<'a>],
    means: Means,
    units: Range<usize>,
}

impl WithSimd for Units<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (problem, units) in pieces_of(self.problems, &self.units, |problem| problem.units(self.means)) {
            let unit = problem.unit(self.means);
            match self.means.tiles {
                None => problem.run(simd, unit.0, units),
                Some(tiles) => problem.run_on_tiles(simd, tiles, unit, units),
            }
        }
    }
}

impl Forward<'_> {
    /// Some units, each of at most `chunk` rows.
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, chunk: usize, units: Range<usize>) {
        let Shape { seq_q, dim, v_dim, .. } = self.shape;
        let rows = seq_q.min(chunk);
        let stride = KEY_BLOCK.next_multiple_of(S::F32_LANES);
        let rows_of_tile = rows.min(ROW_TILE);
        let [keys, values, scores] = [dim * stride, KEY_BLOCK * v_dim, rows_of_tile * stride];
        let l = rows * S::F32_LANES;
        let lens = [keys, values, scores, rows_of_tile, l, rows * v_dim, rows * dim, rows];
        let mut scratch = ScratchBuf::take(lens.iter().sum());
        let [keys, values, scores, alpha, l, acc, q, m] = cut(&mut scratch, lens);
        let mut state = State { keys, values, q, rows: Rows { first: 0, scores, alpha, acc, l, m } };
        for unit in units {
            let (batch, head, rows) = self.first_of(unit, (chunk, 1));
            self.chunk_of(batch, head, rows).run(simd, &mut state);
        }
    }

    /// Where a unit of at most `chunk` rows of `heads` heads begins: sequence, first head, rows.
    #[inline(always)]
    pub(super) fn first_of(
        &self,
        unit: usize,
        (chunk, heads): (usize, usize),
    ) -> (usize, usize, Range<usize>) {
        let chunks = self.shape.seq_q.div_ceil(chunk);
        let groups = self.shape.heads / heads;
        let (batch, group) = (unit / chunks / groups, unit / chunks % groups);
        (batch, group * heads, piece(unit % chunks, chunk, self.shape.seq_q))
    }

    /// Some rows of a head, which a unit owns.
    #[inline(always)]
    pub(super) fn chunk_of(&self, batch: usize, head: usize, rows: Range<usize>) -> Chunk<'_> {
        Chunk::new(self, batch, head, rows)
    }
}

/// Scratch of one task: Kᵀ of a block [dim, stride], its V [KEY_BLOCK, v_dim], and what belongs to rows.
struct State<'a> {
    keys: &'a mut [f32],
    values: &'a mut [f32],
    /// scale·Q of the chunk [rows, dim].
    q: &'a mut [f32],
    rows: Rows<'a>,
}

/// One block of keys: Kᵀ [dim, stride] and V.
struct Block<'a> {
    keys: Range<usize>,
    /// Columns of Kᵀ and of a tile's scores.
    stride: usize,
    kt: &'a [f32],
    v: MatRef<'a>,
}

impl Chunk<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S, state: &mut State<'_>) {
        self.begin::<S>(&mut state.rows);
        stage::scaled(simd, self.problem.spec.scale, self.q, self.rows.clone(), state.q);
        if self.problem.spec.mask.blocks.is_some() {
            state.rows.acc[..self.rows.len() * self.problem.shape.v_dim].fill(0.0);
        }
        for keys in self.blocks() {
            self.block(simd, state, keys);
        }
        self.finish(simd, &state.rows);
    }

    /// Takes all rows through one block of keys.
    #[inline(always)]
    fn block<S: Simd>(&self, simd: S, state: &mut State<'_>, keys: Range<usize>) {
        let stride = keys.len().next_multiple_of(S::F32_LANES);
        stage::transpose(self.k.sub(keys.clone(), 0..self.k.cols()), state.keys, stride);
        let v = self.v.sub(keys.clone(), 0..self.v.cols());
        // One group of rows reads V once: a copy would read it once too.
        let v = if self.rows.len() > GROUP { stage::gather(simd, v, state.values) } else { v };
        let block = Block { keys, stride, kt: state.keys, v };
        let keys = &block.keys;
        for first in self.rows.clone().step_by(ROW_TILE) {
            let tile = first..(first + ROW_TILE).min(self.rows.end);
            if self.sight.classify(&tile, keys) == Coverage::Skip {
                continue;
            }
            state.rows.first = first;
            for group in groups(&tile) {
                self.scores(simd, state.q, &mut state.rows, &block, group);
            }
            // The first block that the tile sees writes o, the others add to it; under a list, to zeros.
            let add = self.problem.spec.mask.blocks.is_some()
                || self.sight.rows(&tile, &(0..keys.end)).start < keys.start;
            for group in groups(&tile) {
                self.values(simd, &mut state.rows, &block, group, add);
            }
        }
    }

    /// `P` of at most six rows, and their new m and l.
    #[inline(always)]
    fn scores<S: Simd>(
        &self,
        simd: S,
        q: &[f32],
        state: &mut Rows<'_>,
        block: &Block<'_>,
        rows: Range<usize>,
    ) {
        let Block { keys, stride, kt, .. } = block;
        let stride = *stride;
        let dim = self.problem.shape.dim;
        let seen = self.sight.rows(&rows, keys);
        if seen.is_empty() {
            return;
        }
        let vectors = vectors::<S>(&seen, keys);
        let columns = vectors.start * S::F32_LANES..vectors.end * S::F32_LANES;
        let extent = Extent { rows: rows.len(), cols: columns.len(), depth: dim };
        let in_tile = rows.start - state.first;
        let scores = &mut state.scores[in_tile * stride..][..rows.len() * stride];
        let q = &q[(rows.start - self.rows.start) * dim..][..rows.len() * dim];
        // SAFETY: `q` has these rows of `dim` elements; Kᵀ and the scores have `stride` columns, a multiple of
        // the lanes, which holds all columns; Kᵀ has `dim` rows and the scores have been cut for these rows.
        unsafe {
            let q = Left { ptr: q.as_ptr(), stride: dim, across: false };
            let k = Right { ptr: kt.as_ptr().add(columns.start), stride };
            let s = Dest { ptr: scores.as_mut_ptr().add(columns.start), stride };
            product(simd, extent, q, k, s, Onto::Zero);
        }
        self.weigh(simd, state, (keys, stride), rows, columns);
    }

    /// `o = P·V`, or `o = α·o + P·V` when `add`, of at most six rows; `v` is the block's values.
    #[inline(always)]
    fn values<S: Simd>(
        &self,
        simd: S,
        state: &mut Rows<'_>,
        block: &Block<'_>,
        rows: Range<usize>,
        add: bool,
    ) {
        let Block { keys, stride, v, .. } = block;
        let stride = *stride;
        let v_dim = self.problem.shape.v_dim;
        let seen = self.sight.rows(&rows, keys);
        if seen.is_empty() && add {
            return;
        }
        let extent = Extent { rows: rows.len(), cols: v_dim, depth: seen.len() };
        let in_tile = rows.start - state.first;
        let scores = &state.scores[in_tile * stride..][..rows.len() * stride];
        let alpha = &state.alpha[in_tile..][..rows.len()];
        let onto = if add { Onto::Scaled(alpha.as_ptr()) } else { Onto::Zero };
        let acc = &mut state.acc[(rows.start - self.rows.start) * v_dim..][..rows.len() * v_dim];
        let first = seen.start - keys.start;
        // SAFETY: the scores of these rows hold the columns of all keys of the block; V has these keys, each
        // `v_dim` elements; `acc` and α have been cut for these rows.
        unsafe {
            let p = Left { ptr: scores.as_ptr().wrapping_add(first), stride, across: false };
            product(simd, extent, p, right(*v, first), Dest { ptr: acc.as_mut_ptr(), stride: v_dim }, onto);
        }
    }
}
