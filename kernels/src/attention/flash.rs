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
//! - A block of keys is transposed once for the rows of a chunk ([`Shape::row_chunk`]), and of several heads that share their keys: then both products (Q·Kᵀ and P·V) are
//!   [`super::tile::product`] with vectors along the contiguous axis, and no score needs a horizontal sum.
//! - [`ROW_TILE`] rows are taken through one product before the next one starts, so that the block's Kᵀ
//!   and then its V stay in the first-level cache while the rows stream past.
//! - Six rows at a time know which keys they see, so that causal order saves half of the work at the
//!   grain of six rows by one vector; blocks that nobody sees are not looked at.
//!
//! Here is how the work is cut; the passes over blocks are in [`super::flash_vectors`] and, where bf16 parts are multiplied, on tiles or by dot products,
//! [`super::flash_tiles`].

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::blocks::BlockList;
use super::chunk::Chunk;
use super::mask::Sight;
use super::on_tiles::{self, OnTiles};
use super::problem::{HELD, KEY_BLOCK, ROW_TILE, Shape, Shared, deal, piece, pieces_of};
use super::stage::Place;
use super::{AttentionSpec, stage};
use crate::context::Context;
use crate::gemm::microkernel::amx::BLOCK;
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
    /// Rows of a unit, and the heads whose rows these are: under a list, the rows that share its entry; heads that share their keys,
    /// where there are units enough.
    fn unit(&self, means: Means) -> (usize, usize) {
        let (lists, group) = (self.spec.mask.blocks, self.shape.group());
        let rows_for = |heads: usize| {
            let held = if means.tiles.is_some() { (on_tiles::HELD / heads, BLOCK) } else { (HELD, ROW_TILE) };
            let list = lists.and_then(<[_]>::first);
            list.map_or_else(|| self.shape.row_chunk(means.threads, held), BlockList::block)
        };
        if means.tiles.is_none() {
            let rows = rows_for(1);
            return (rows, self.heads_together(rows, means.threads));
        }
        let together = group > 1 && lists.is_none_or(|lists| lists.len() == 1);
        let chunks = if together { self.shape.seq_q.div_ceil(rows_for(group)) } else { 0 };
        let enough =
            means.threads == 1 || self.shape.batch * self.shape.kv_heads * chunks >= 4 * means.threads;
        if together && enough { (rows_for(group), group) } else { (rows_for(1), 1) }
    }

    /// How many heads that share their keys are one unit on vectors, of `rows` rows each: as many as hold no more than the rows of a long
    /// head would.
    fn heads_together(&self, rows: usize, threads: usize) -> usize {
        let Shape { batch, heads, seq_q, dim, v_dim, .. } = self.shape;
        if self.spec.mask.blocks.is_some_and(|lists| lists.len() != 1) {
            return 1;
        }
        let group = self.shape.group();
        let fit = HELD / (dim + v_dim).max(1) / rows.min(seq_q).max(1);
        let enough = |n: usize| threads == 1 || batch * (heads / n) * seq_q.div_ceil(rows) >= 4 * threads;
        (2..=group.min(fit)).rev().find(|&n| group.is_multiple_of(n) && enough(n)).unwrap_or(1)
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

/// Where a unit begins: sequence, first head, rows.
pub(super) type First = (usize, usize, Range<usize>);

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
    let work = means.tiles.map_or(work, |tiles| work / tiles.faster());
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
                None => problem.run(simd, unit, units),
                Some(tiles) => problem.run_on_tiles(simd, tiles, unit, units),
            }
        }
    }
}

impl Forward<'_> {
    /// The blocks of keys that some rows of a head go through, up to the last key that one of them sees.
    pub(super) fn blocks<'a>(
        &self,
        sight: &Sight,
        head: usize,
        rows: Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + use<'a>
    where
        Self: 'a,
    {
        let seen = sight.rows(&rows, &(0..self.shape.seq_k));
        let end = seen.end;
        let list = self.spec.mask.list(head);
        let listed = list.map(|list| list.pieces(rows.start / list.block(), KEY_BLOCK));
        let all = seen.start / KEY_BLOCK..end.div_ceil(KEY_BLOCK);
        let all = listed.is_none().then(|| all.map(move |block| piece(block, KEY_BLOCK, end)));
        let listed = listed.into_iter().flatten().map(move |keys| keys.start..keys.end.min(end));
        listed.chain(all.into_iter().flatten()).filter(move |keys| !seen.is_empty() && !keys.is_empty())
    }

    /// Where a unit of at most `chunk` rows of `heads` heads begins.
    #[inline(always)]
    pub(super) fn first_of(&self, unit: usize, (chunk, heads): (usize, usize)) -> First {
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

    /// What comes after a block of keys, where rows lie far apart: the next block, or, after the last one, the output and what the next unit begins with.
    #[inline(always)]
    pub(super) fn coming_after(
        &self,
        chunk: &Chunk<'_>,
        keys: Option<&Range<usize>>,
        next: Option<&First>,
    ) -> [Place; 4] {
        match (keys, next) {
            _ if !stage::spreads(chunk.k) => [Place::NOWHERE; 4],
            (Some(keys), _) => self.coming((chunk.k, chunk.v), keys),
            (None, Some(next)) => self.coming_chunk(chunk, next),
            (None, None) => [Place::of(chunk.out()), Place::NOWHERE, Place::NOWHERE, Place::NOWHERE],
        }
    }

    /// These keys and their values.
    #[inline(always)]
    fn coming(&self, (k, v): (MatRef<'_>, MatRef<'_>), keys: &Range<usize>) -> [Place; 4] {
        let [k, v] = [k, v].map(|view| Place::of(view.sub(keys.clone(), 0..view.cols())));
        [k, v, Place::NOWHERE, Place::NOWHERE]
    }

    /// What comes after the last block of keys: the output, and the first keys and the rows of the next chunk.
    #[inline(always)]
    fn coming_chunk(&self, chunk: &Chunk<'_>, (batch, head, rows): &First) -> [Place; 4] {
        let sight = self.spec.mask.sight(*batch, self.shape.seq_k);
        let keys = self.blocks(&sight, *head, rows.clone()).next().unwrap_or(0..0);
        let kv = head / self.shape.group();
        let [k, v, ..] = self.coming((self.k.head(*batch, kv), self.v.head(*batch, kv)), &keys);
        let q = self.q.head(*batch, *head).sub(rows.clone(), 0..self.shape.dim);
        [Place::of(chunk.out()), Place::of(q), k, v]
    }
}
