//! How the backward pass is cut into regions of the scores, blocks of keys and tiles of rows.

use std::ops::Range;

use super::blocks::BlockList;
use super::flash_backward::Backward;
use super::problem::{KEY_BLOCK, ROW_CHUNK, Shape, piece};

/// Keys that one task of a split head owns.
const KEY_CHUNK: usize = 2 * KEY_BLOCK;

/// Which gradients a region writes.
#[derive(Clone, Copy)]
pub(super) struct Parts {
    pub(super) q: bool,
    pub(super) kv: bool,
    pub(super) bias: bool,
}

/// How the problem is cut into units.
#[derive(Clone, Copy)]
pub(super) enum Cut {
    /// One key head with its query heads, all gradients; the bias too when the flag says so.
    Heads { bias: bool },
    /// dK and dV of some keys of one key head.
    Keys,
    /// dQ of some rows of one query head.
    Rows,
    /// d_bias of some rows of one head of the bias.
    BiasRows,
}

/// The scores `heads × rows × keys` of one sequence, and the gradients that are to be made from them.
pub(super) struct Region {
    pub(super) batch: usize,
    pub(super) kv: usize,
    pub(super) heads: Range<usize>,
    pub(super) rows: Range<usize>,
    pub(super) keys: Range<usize>,
    pub(super) parts: Parts,
}

impl Backward<'_> {
    /// Units of a cut.
    pub(super) fn units(&self, cut: Cut) -> usize {
        let Shape { batch, heads, kv_heads, seq_q, seq_k, .. } = self.shape;
        match cut {
            Cut::Heads { .. } => batch * kv_heads,
            Cut::Keys => batch * kv_heads * seq_k.div_ceil(KEY_CHUNK),
            Cut::Rows => batch * heads * seq_q.div_ceil(ROW_CHUNK),
            Cut::BiasRows => self.bias_heads() * seq_q.div_ceil(ROW_CHUNK),
        }
    }

    /// The most rows of a region, over all of its heads.
    pub(super) fn rows_of_region(&self, cut: Cut) -> usize {
        match cut {
            Cut::Heads { .. } | Cut::Keys => self.shape.group() * self.shape.seq_q,
            Cut::Rows | Cut::BiasRows => self.shape.seq_q.min(ROW_CHUNK),
        }
    }

    /// The most tiles of a region, over all of its heads, that several blocks of keys meet: none under lists, whose tiles differ from block to block.
    pub(super) fn tiles_that_come_again(&self, cut: Cut) -> usize {
        if self.spec.mask.blocks.is_some() || self.shape.seq_k <= KEY_BLOCK {
            return 0;
        }
        let heads = if matches!(cut, Cut::Heads { .. } | Cut::Keys) { self.shape.group() } else { 1 };
        heads * (self.rows_of_region(cut) / heads).div_ceil(super::backward_tiles::ROWS)
    }

    /// The regions of some units, in order.
    #[inline(always)]
    pub(super) fn regions(&self, cut: Cut, units: Range<usize>) -> impl Iterator<Item = Region> {
        let steps = self.steps(cut);
        units.flat_map(move |unit| (0..steps).map(move |step| self.region_of(cut, unit, step)))
    }

    /// Regions of one unit, in order.
    #[inline(always)]
    fn steps(&self, cut: Cut) -> usize {
        let Shape { batch, heads, .. } = self.shape;
        match cut {
            Cut::BiasRows => batch * heads / self.bias_heads().max(1),
            _ => 1,
        }
    }

    #[inline(always)]
    fn region_of(&self, cut: Cut, unit: usize, step: usize) -> Region {
        let Shape { heads, kv_heads, seq_q, seq_k, .. } = self.shape;
        let group = self.shape.group();
        let (rows, keys) = (0..seq_q, 0..seq_k);
        match cut {
            Cut::Heads { bias } => {
                let (batch, kv) = (unit / kv_heads, unit % kv_heads);
                let parts = Parts { q: true, kv: true, bias };
                Region { batch, kv, heads: kv * group..(kv + 1) * group, rows, keys, parts }
            }
            Cut::Keys => {
                let chunks = seq_k.div_ceil(KEY_CHUNK);
                let (batch, kv) = (unit / chunks / kv_heads, unit / chunks % kv_heads);
                let keys = piece(unit % chunks, KEY_CHUNK, seq_k);
                let parts = Parts { q: false, kv: true, bias: false };
                Region { batch, kv, heads: kv * group..(kv + 1) * group, rows, keys, parts }
            }
            Cut::Rows => {
                let chunks = seq_q.div_ceil(ROW_CHUNK);
                let (batch, head) = (unit / chunks / heads, unit / chunks % heads);
                let rows = piece(unit % chunks, ROW_CHUNK, seq_q);
                let parts = Parts { q: true, kv: false, bias: false };
                Region { batch, kv: head / group, heads: head..head + 1, rows, keys, parts }
            }
            Cut::BiasRows => {
                let chunks = seq_q.div_ceil(ROW_CHUNK);
                let rows = piece(unit % chunks, ROW_CHUNK, seq_q);
                let shared = heads / self.bias_heads();
                let (batch, head) = (step / shared, unit / chunks + step % shared);
                let parts = Parts { q: false, kv: false, bias: true };
                Region { batch, kv: head / group, heads: head..head + 1, rows, keys, parts }
            }
        }
    }

    /// Keys that a block does not reach beyond: those of a block of the list, where there is one.
    #[inline(always)]
    pub(super) fn block_size(&self) -> usize {
        self.spec.mask.blocks.and_then(<[_]>::first).map_or(KEY_BLOCK, BlockList::block)
    }

    /// The blocks of some keys. A block of the list is cut from its first key on, so that every region has the same blocks.
    #[inline(always)]
    pub(super) fn key_blocks(&self, keys: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let size = self.block_size();
        let mut from = keys.start;
        std::iter::from_fn(move || {
            let block = from..((from / size + 1) * size).min(from + KEY_BLOCK).min(keys.end);
            from = block.end;
            (!block.is_empty()).then_some(block)
        })
    }

    /// Heads of the bias, 0 without one.
    pub(super) fn bias_heads(&self) -> usize {
        self.spec.mask.bias.map_or(0, |bias| bias.heads)
    }
}

/// The tiles of `rows` that may see the keys from `key` on: all of them, or those that a list names.
#[inline(always)]
pub(super) fn row_tiles<'a>(
    list: Option<&'a BlockList>,
    key: usize,
    rows: Range<usize>,
    tile: usize,
) -> impl Iterator<Item = Range<usize>> + 'a {
    let seers = list.map(|list| list.seers(key / list.block(), rows.clone()));
    let all = list.is_none().then_some(rows);
    let tiles = move |rows: Range<usize>| {
        let end = rows.end;
        rows.step_by(tile).map(move |first| first..(first + tile).min(end))
    };
    all.into_iter().chain(seers.into_iter().flatten()).flat_map(tiles)
}
