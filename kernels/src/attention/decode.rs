//! Attention from one or a few queries to a cache.
//!
//! ```text
//! s_j = scale·q·k_j   for all cached j          p = softmax(s)          o = Σ_j p_j·v_j
//! ```
//! The naive form, in its own order, because the scores of a few queries are short. What is added:
//! - The cache stands in the order that the products read ([`super::cache`]), and query heads that share a key head
//!   go through it together, so memory is read once, as a stream.
//! - The softmax is that of the full pass, block by block with the same `absorb` ([`super::online`]), and each product is one
//!   ascending chain: so the bits are those of the row in the full pass, however the keys are split into parts.
//! - With too few heads for all threads, tasks take [`KEYS_PER_TASK`] keys of the scores, and then [`COLS_PER_TASK`]
//!   columns of the output. Partial outputs of key chunks, merged by their maxima, would read V in one piece
//!   a thread too, but their sum would not have the bits of the full pass.
//! - Scores of all keys are held: `rows × keys` numbers, where K and V are `keys × (dim + v_dim)`.
//!
//! The two products are those of the full pass at the context's precision: [`super::decode_vectors`], [`super::decode_tiles`] or [`super::decode_dots`]. A cache of int8, which has
//! no full pass to be equal to, is read by vectors.

use std::ops::Range;

use super::AttentionSpec;
use super::cache::{Cache, CacheLayout};
use super::decode_tasks::{Step, Tasks};
use super::mask::Mask;
use super::on_tiles::OnTiles;
use super::problem::{KEY_BLOCK, Shape, Shared, deal, piece};
use super::stored::GROUP_WORDS;
use crate::context::{Context, MEMORY_BOUND_ROWS};
use crate::error::{ShapeError, expect_dim};
use crate::scratch::ScratchBuf;
use crate::view::{HeadsLayout, HeadsMut, HeadsRef};

/// Keys whose scores one task makes when heads are split: a fixed number, whatever the threads.
pub(super) const KEYS_PER_TASK: usize = 8 * KEY_BLOCK;

/// Columns of the output that one task makes when heads are split.
const COLS_PER_TASK: usize = 32;

/// Some keys of each sequence, one part after the other: a shared prefix and a private tail, or all of them at
/// once.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// Where they stand.
    pub cache: Cache<'a>,
    /// Which sequence of the cache each sequence of the batch reads: a beam's parent, or one prefix for all.
    pub sequences: &'a [usize],
    /// How many keys each sequence of the batch reads, from the first on.
    pub lengths: &'a [usize],
}

/// Causal attention of queries that stand at the last positions of their sequence, over cached keys, and the log-sum-exp. Of `n` keys
/// query `i` stands at position `n − seq_q + i` and sees none after its own.
///
/// The mask is that of the full pass over all positions, of which these queries are the last rows: a window, block lists and slopes with
/// `offset` 0, where lists may be made for more positions than there are. A bias has the rows of these queries alone, and its columns end
/// with each sequence's last key, since a bias of positions depends on how far back a key lies: [heads or 1, seq_q, longest sequence].
/// Keys that no query of a head sees are not read, at the grain of the full pass's blocks.
///
/// The bits are those of [`super::forward`] with this mask and a causal one over the same keys.
///
/// # Shapes
/// q [batch, seq_q, heads, dim], out [batch, seq_q, heads, v_dim], lse [batch, heads, seq_q]; heads is a multiple of
/// the caches' kv_heads.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit, a part names what its cache does not have, or the mask has an offset, lengths or dropout;
/// nothing has been written then.
///
/// Accuracy: that of [`super::forward`], by equality (`attention::tests::decode`, `attention::tests::decode_masks`).
pub fn decode(
    ctx: &Context,
    q: HeadsRef<'_>,
    parts: &[Part<'_>],
    spec: &AttentionSpec<'_>,
    out: HeadsMut<'_>,
    lse: &mut [f32],
) -> Result<(), ShapeError> {
    let layout = *q.layout();
    let Some(first) = parts.first() else {
        return Err(ShapeError::Value { argument: "parts", value: "empty".into(), expected: "one or more" });
    };
    let CacheLayout { kv_heads, dim, v_dim, .. } = *first.cache.layout();
    for part in parts {
        part.check(layout.batch, [kv_heads, dim, v_dim])?;
    }
    expect_dim("q", "dim", dim, layout.dim)?;
    if kv_heads == 0 || !layout.heads.is_multiple_of(kv_heads) {
        return Err(ShapeError::Value {
            argument: "q.heads",
            value: layout.heads.to_string(),
            expected: "a multiple of the cache's kv_heads",
        });
    }
    let total = |b: usize| parts.iter().map(|part| part.lengths[b]).sum::<usize>();
    let keys = (0..layout.batch).map(total).max().unwrap_or(0);
    let HeadsLayout { batch, seq: seq_q, heads, .. } = layout;
    let shape = Shape { batch, heads, kv_heads, seq_q, seq_k: keys, dim, v_dim };
    shape.expect_out("out", out.layout())?;
    expect_dim("lse", "elements", shape.rows()?, lse.len())?;
    check_mask(&spec.mask, &shape)?;
    let group = shape.group();
    Decode { q, parts, spec: *spec, kv_heads, dim, v_dim, group, keys, out: &out, lse: Shared::new(lse) }
        .run(ctx);
    Ok(())
}

/// The mask has a meaning for queries at the last positions, and fits these shapes.
fn check_mask(mask: &Mask<'_>, shape: &Shape) -> Result<(), ShapeError> {
    let offsets = [
        ("spec.mask.causal.offset", mask.causal.map_or(0, |causal| causal.offset)),
        ("spec.mask.window.offset", mask.window.map_or(0, |window| window.offset)),
        ("spec.mask.alibi.offset", mask.alibi.map_or(0, |alibi| alibi.offset)),
    ];
    if let Some((argument, offset)) = offsets.into_iter().find(|(_, offset)| *offset != 0) {
        let expected = "0: queries stand at the last positions";
        return Err(ShapeError::Value { argument, value: offset.to_string(), expected });
    }
    let misplaced = [
        ("spec.mask.key_lengths", mask.key_lengths.is_some(), "none: parts have lengths"),
        ("spec.mask.dropout", mask.dropout.is_some(), "none in decoding"),
    ];
    if let Some((argument, _, expected)) = misplaced.into_iter().find(|(_, given, _)| *given) {
        return Err(ShapeError::Value { argument, value: "given".into(), expected });
    }
    let Shape { batch, heads, seq_q, seq_k, .. } = *shape;
    for list in mask.blocks.into_iter().flatten() {
        list.check_reaches(seq_k)?;
    }
    if let Some(lists) = mask.blocks.filter(|lists| lists.len() != 1) {
        expect_dim("mask.blocks", "lists", heads, lists.len())?;
    }
    Mask { blocks: None, ..*mask }.check(batch, heads, seq_q, seq_k)
}

impl Part<'_> {
    fn check(&self, batch: usize, [kv_heads, dim, v_dim]: [usize; 3]) -> Result<(), ShapeError> {
        let layout = self.cache.layout();
        expect_dim("parts.cache", "kv_heads", kv_heads, layout.kv_heads)?;
        expect_dim("parts.cache", "dim", dim, layout.dim)?;
        expect_dim("parts.cache", "v_dim", v_dim, layout.v_dim)?;
        let limits = [
            ("parts.sequences", self.sequences, layout.sequences),
            ("parts.lengths", self.lengths, layout.capacity + 1),
        ];
        for (argument, indices, len) in limits {
            expect_dim(argument, "length", batch, indices.len())?;
            if let Some(position) = indices.iter().position(|&index| index >= len) {
                return Err(ShapeError::Index { argument, position, index: indices[position], len });
            }
        }
        Ok(())
    }
}

/// A checked problem. A unit is one key head of one sequence with the rows (query head, query) that read it; under block lists, one row,
/// because rows need not see the same blocks.
#[derive(Clone, Copy)]
pub(super) struct Decode<'a> {
    pub(super) q: HeadsRef<'a>,
    pub(super) parts: &'a [Part<'a>],
    pub(super) spec: AttentionSpec<'a>,
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
    pub(super) v_dim: usize,
    pub(super) group: usize,
    /// The most keys of a sequence.
    pub(super) keys: usize,
    pub(super) out: &'a HeadsMut<'a>,
    pub(super) lse: Shared,
}

impl Decode<'_> {
    fn run(&self, ctx: &Context) {
        let rows = self.rows();
        let units =
            self.q.layout().batch * if self.listed() { self.heads_and_queries() } else { self.kv_heads };
        if rows * units == 0 {
            return;
        }
        let places = self.places(ctx.isa().f32_lanes(), units);
        let mut scratch = ScratchBuf::take(units * places.len);
        let memory = Shared::new(&mut scratch);
        let int8 = self.parts.iter().any(|part| part.cache.is_int8());
        let tiles = OnTiles::of(ctx, self.dim).filter(|_| !int8);
        let run = |step: Step, pieces: usize, work: usize| {
            deal(ctx, units * pieces, work, |tasks| Tasks {
                problem: *self,
                places,
                memory,
                tiles,
                step,
                pieces,
                tasks,
            });
        };
        let keys = places.stride;
        let reading = rows.max(MEMORY_BOUND_ROWS);
        if self.whole_units(ctx.thread_count(), units) {
            run(Step::All, 1, reading.saturating_mul((self.dim + self.v_dim).saturating_mul(keys)));
            return;
        }
        run(Step::Scores, keys.div_ceil(KEYS_PER_TASK), reading * keys.min(KEYS_PER_TASK) * self.dim);
        run(Step::Weights, 1, rows.saturating_mul(16 * keys));
        let cols = self.cols_per_task();
        run(Step::Output, self.v_dim.div_ceil(cols), reading.saturating_mul(keys * cols));
    }

    /// Whether a unit is one task: where there are enough of them, or as many of the same length for every thread. Three passes over parts of units, each of which
    /// waits for the one before, took 127 µs on two threads where two whole units take 82 (14 query heads over 2 of 64, 4,096 keys; 157 on one).
    fn whole_units(&self, threads: usize, units: usize) -> bool {
        let mut totals = (0..self.q.layout().batch).map(|b| self.total(b));
        let first = totals.next().unwrap_or(0);
        threads == 1
            || units >= 2 * threads
            || (units.is_multiple_of(threads) && !self.listed() && totals.all(|total| total == first))
    }

    /// [`COLS_PER_TASK`], or a group of columns of integers, which is larger.
    #[inline(always)]
    pub(super) fn cols_per_task(&self) -> usize {
        if self.parts.iter().any(|part| part.cache.is_int8()) { 4 * GROUP_WORDS } else { COLS_PER_TASK }
    }

    #[inline(always)]
    fn listed(&self) -> bool {
        self.spec.mask.blocks.is_some()
    }

    fn heads_and_queries(&self) -> usize {
        self.q.layout().heads * self.q.layout().seq
    }

    /// Rows of a unit.
    #[inline(always)]
    pub(super) fn rows(&self) -> usize {
        if self.listed() { 1 } else { self.group * self.q.layout().seq }
    }

    /// Sequence and key head of a unit.
    #[inline(always)]
    pub(super) fn place(&self, unit: usize) -> (usize, usize) {
        if self.listed() {
            let within = unit % self.heads_and_queries();
            (unit / self.heads_and_queries(), within / self.q.layout().seq / self.group)
        } else {
            (unit / self.kv_heads, unit % self.kv_heads)
        }
    }

    /// Query head and query of row `r` of a unit.
    #[inline(always)]
    pub(super) fn row(&self, unit: usize, r: usize) -> (usize, usize) {
        let queries = self.q.layout().seq;
        if self.listed() {
            let within = unit % self.heads_and_queries();
            (within / queries, within % queries)
        } else {
            (unit % self.kv_heads * self.group + r / queries, r % queries)
        }
    }

    /// The keys that row `r` of a unit sees, but for block lists: up to its own position.
    #[inline(always)]
    pub(super) fn visible(&self, unit: usize, r: usize) -> Range<usize> {
        let (b, _) = self.place(unit);
        let later = self.q.layout().seq - 1 - self.row(unit, r).1;
        let end = self.total(b).saturating_sub(later);
        let left = self.spec.mask.window.map_or(usize::MAX, |window| window.left);
        end.saturating_sub(1).saturating_sub(left)..end
    }

    /// The blocks of keys that a unit goes through: those of the full pass that one of its rows may see.
    #[inline(always)]
    pub(super) fn blocks(&self, unit: usize) -> impl Iterator<Item = Block> + '_ {
        let (b, _) = self.place(unit);
        let seen = self.visible(unit, 0).start..self.total(b);
        let first = seen.start / KEY_BLOCK;
        let (head, _) = self.row(unit, 0);
        let list = self.spec.mask.list(head);
        let listed = list.map(|list| {
            let visible = self.visible(unit, 0);
            let row = visible.end.saturating_sub(1) / list.block();
            let pieces = list.pieces(row, KEY_BLOCK).map(move |keys| keys.start..keys.end.min(visible.end));
            pieces.filter(move |keys| !keys.is_empty() && keys.end > visible.start)
        });
        let all = (first..seen.end.div_ceil(KEY_BLOCK)).map(move |block| piece(block, KEY_BLOCK, seen.end));
        let all = list.is_none().then_some(all);
        let keys = listed.into_iter().flatten().chain(all.into_iter().flatten());
        keys.enumerate().map(|(index, keys)| Block { index, keys })
    }

    /// Keys of sequence `b`.
    #[inline(always)]
    pub(super) fn total(&self, b: usize) -> usize {
        self.parts.iter().map(|part| part.lengths[b]).sum()
    }

    fn places(&self, lanes: usize, units: usize) -> Places {
        let rows = self.rows();
        let blocks = (0..units).map(|unit| self.blocks(unit).count()).max().unwrap_or(0);
        let stride = blocks * KEY_BLOCK;
        let alpha = rows * stride;
        let shift = alpha + blocks * rows;
        let l = (shift + blocks * rows).next_multiple_of(16);
        let m = l + rows * lanes;
        Places { stride, alpha, shift, l, m, inverse: m + rows, len: (m + 2 * rows).next_multiple_of(16) }
    }
}

/// The block of keys whose scores stand from column [`Block::place`] on.
pub(super) struct Block {
    pub(super) index: usize,
    pub(super) keys: Range<usize>,
}

impl Block {
    #[inline(always)]
    pub(super) fn place(&self) -> usize {
        self.index * KEY_BLOCK
    }
}

/// Where a unit's scratch holds what: scores and then P [rows, stride] at 0, the maxima of blocks and then α [blocks, rows], what is
/// subtracted from the scores [blocks, rows], l (one vector a row), m and 1/l of each row.
#[derive(Clone, Copy)]
pub(super) struct Places {
    /// Elements of a row of scores: all blocks.
    pub(super) stride: usize,
    pub(super) alpha: usize,
    pub(super) shift: usize,
    pub(super) l: usize,
    pub(super) m: usize,
    pub(super) inverse: usize,
    /// Elements of a unit.
    pub(super) len: usize,
}
