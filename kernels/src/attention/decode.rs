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
//! - With fewer heads than threads, tasks take [`KEYS_PER_TASK`] keys of the scores, and then [`COLS_PER_TASK`]
//!   columns of the output. Partial outputs of key chunks, merged by their maxima, would read V in one piece
//!   a thread too, but their sum would not have the bits of the full pass.
//! - Scores of all keys are held: `rows × keys` numbers, where K and V are `keys × (dim + v_dim)`.
//!
//! The two products are those of the full pass at the context's precision: [`super::decode_vectors`] or [`super::decode_tiles`]. A cache of int8, which has
//! no full pass to be equal to, is read by vectors.

use super::cache::{Cache, CacheLayout};
use super::decode_tasks::{Step, Tasks};
use super::on_tiles::OnTiles;
use super::problem::{KEY_BLOCK, Shape, Shared, deal};
use super::stored::GROUP_WORDS;
use crate::context::Context;
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

/// What decoding computes.
#[derive(Debug, Clone, Copy)]
pub struct DecodeSpec<'a> {
    /// Multiplies q·k; 1/√dim in the paper.
    pub scale: f32,
    /// A slope for each query head: a score loses `slope·distance`, from the query's position to the key's ([`super::Alibi`]).
    pub slopes: Option<&'a [f32]>,
}

/// `out = softmax(scale·Q·Kᵀ − slope·distance)·V` over cached keys, and the log-sum-exp. The queries stand at the last positions of
/// their sequence: of `n`, query `i` sees all keys but the last `n − 1 − i`.
///
/// The bits are those of [`super::forward`] with a causal mask, the same keys and the same slopes.
///
/// # Shapes
/// q [batch, seq_q, heads, dim], out [batch, seq_q, heads, v_dim], lse [batch, heads, seq_q]; heads is a multiple of
/// the caches' kv_heads.
///
/// # Errors
/// [`ShapeError`] when shapes do not fit or a part names what its cache does not have; nothing has been written
/// then.
///
/// Accuracy: that of [`super::forward`], by equality (`attention::tests::decode`).
pub fn decode(
    ctx: &Context,
    q: HeadsRef<'_>,
    parts: &[Part<'_>],
    spec: &DecodeSpec<'_>,
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
    if let Some(slopes) = spec.slopes {
        expect_dim("spec.slopes", "entries", heads, slopes.len())?;
    }
    let group = shape.group();
    Decode { q, parts, spec: *spec, kv_heads, dim, v_dim, group, keys, out: &out, lse: Shared::new(lse) }
        .run(ctx);
    Ok(())
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

/// A checked problem. A unit is one key head of one sequence with the rows (query head, query) that read it.
#[derive(Clone, Copy)]
pub(super) struct Decode<'a> {
    pub(super) q: HeadsRef<'a>,
    pub(super) parts: &'a [Part<'a>],
    pub(super) spec: DecodeSpec<'a>,
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
        let units = self.q.layout().batch * self.kv_heads;
        let rows = self.rows();
        let places = self.places(ctx.isa().f32_lanes());
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
        if ctx.thread_count() == 1 || units >= 2 * ctx.thread_count() {
            run(Step::All, 1, rows.saturating_mul((self.dim + self.v_dim).saturating_mul(self.keys)));
            return;
        }
        let keys = self.keys.min(KEYS_PER_TASK);
        run(Step::Scores, self.keys.div_ceil(KEYS_PER_TASK), rows.saturating_mul(keys * self.dim));
        run(Step::Weights, 1, rows.saturating_mul(16 * self.keys));
        let cols = self.cols_per_task();
        run(Step::Output, self.v_dim.div_ceil(cols), rows.saturating_mul(self.keys * cols));
    }

    /// [`COLS_PER_TASK`], or a group of columns of integers, which is larger.
    #[inline(always)]
    pub(super) fn cols_per_task(&self) -> usize {
        if self.parts.iter().any(|part| part.cache.is_int8()) { 4 * GROUP_WORDS } else { COLS_PER_TASK }
    }

    /// Rows of a unit; row `r` is query `r mod seq_q` of the group's head `r / seq_q`.
    #[inline(always)]
    pub(super) fn rows(&self) -> usize {
        self.group * self.q.layout().seq
    }

    /// Keys of sequence `b`.
    #[inline(always)]
    pub(super) fn total(&self, b: usize) -> usize {
        self.parts.iter().map(|part| part.lengths[b]).sum()
    }

    fn places(&self, lanes: usize) -> Places {
        let (rows, blocks) = (self.rows(), self.keys.div_ceil(KEY_BLOCK));
        let stride = blocks * KEY_BLOCK;
        let alpha = rows * stride;
        let l = (alpha + blocks * rows).next_multiple_of(16);
        let m = l + rows * lanes;
        Places { stride, alpha, l, m, inverse: m + rows, len: (m + 2 * rows).next_multiple_of(16) }
    }
}

/// Where a unit's scratch holds what: scores and then P [rows, stride] at 0, α [blocks, rows], l (one vector a row),
/// m and 1/l of each row.
#[derive(Clone, Copy)]
pub(super) struct Places {
    /// Elements of a row of scores: all blocks.
    pub(super) stride: usize,
    pub(super) alpha: usize,
    pub(super) l: usize,
    pub(super) m: usize,
    pub(super) inverse: usize,
    /// Elements of a unit.
    pub(super) len: usize,
}
