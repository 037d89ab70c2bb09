//! Attention from one or a few queries to a cache.
//!
//! ```text
//! s_j = scale·q·k_j   for all cached j          p = softmax(s)          o = Σ_j p_j·v_j
//! ```
//! The naive form, in its own order, because the scores of a few queries are short. What is added:
//! - The cache stands in the order that the products read ([`super::cache`]), and query heads that share a key head
//!   go through it together, so memory is read once, as a stream.
//! - The softmax is that of the full pass, block by block with the same [`online::absorb`], and each product is one
//!   ascending chain: so the bits are those of the row in the full pass, however the keys are split into parts.
//! - With fewer heads than threads, tasks take [`KEYS_PER_TASK`] keys of the scores, and then [`COLS_PER_TASK`]
//!   columns of the output. Partial outputs of key chunks, merged by their maxima, would read V in one piece
//!   a thread too, but their sum would not have the bits of the full pass.
//! - Scores of all keys are held: `rows × keys` numbers, where K and V are `keys × (dim + v_dim)`.
//!
//! The two products are those of the full pass at the context's precision: [`super::decode_vectors`] or [`super::decode_tiles`]. A cache of int8, which has
//! no full pass to be equal to, is read by vectors.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::cache::{Cache, CacheLayout};
use super::decode_tiles::Unit;
use super::decode_vectors::Vectors;
use super::on_tiles::OnTiles;
use super::online::{self, Carried, Row};
use super::problem::{KEY_BLOCK, Shape, Shared, deal, piece};
use super::stored::GROUP_WORDS;
use super::tile::GROUP;
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::lanes;
use crate::scratch::ScratchBuf;
use crate::view::{HeadsLayout, HeadsMut, HeadsRef};

/// Keys whose scores one task makes when heads are split: a fixed number, whatever the threads.
const KEYS_PER_TASK: usize = 8 * KEY_BLOCK;

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

/// `out = softmax(scale·Q·Kᵀ)·V` over cached keys, and the log-sum-exp. The queries stand at the last positions of
/// their sequence: of `n`, query `i` sees all keys but the last `n − 1 − i`.
///
/// The bits are those of [`super::forward`] with a causal mask and the same keys.
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
    scale: f32,
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
    let group = shape.group();
    Decode { q, parts, scale, kv_heads, dim, v_dim, group, keys, out: &out, lse: Shared::new(lse) }.run(ctx);
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
    pub(super) scale: f32,
    kv_heads: usize,
    pub(super) dim: usize,
    pub(super) v_dim: usize,
    group: usize,
    /// The most keys of a sequence.
    keys: usize,
    out: &'a HeadsMut<'a>,
    lse: Shared,
}

/// What a task does.
#[derive(Clone, Copy)]
enum Step {
    /// The scores of some keys.
    Scores,
    /// m, l and P.
    Weights,
    /// Some columns of the output.
    Output,
    /// All of a unit, one after the other.
    All,
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
    fn cols_per_task(&self) -> usize {
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
    l: usize,
    m: usize,
    inverse: usize,
    /// Elements of a unit.
    pub(super) len: usize,
}

/// By what means the two products are made.
pub(super) trait Products {
    /// `scale·q·k_j` of all rows of a unit, for the keys among `keys`.
    fn scores<S: Simd>(&self, simd: S, tasks: &Tasks<'_>, unit: usize, keys: &Range<usize>);

    /// Columns `cols` of the output of a unit, whose weights are complete.
    fn output<S: Simd>(&self, simd: S, tasks: &Tasks<'_>, unit: usize, cols: Range<usize>);
}

pub(super) struct Tasks<'a> {
    pub(super) problem: Decode<'a>,
    pub(super) places: Places,
    pub(super) memory: Shared,
    tiles: Option<OnTiles>,
    step: Step,
    /// Tasks of one unit.
    pieces: usize,
    tasks: Range<usize>,
}

impl WithSimd for Tasks<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.tiles {
            None => self.run(simd, &Vectors),
            Some(OnTiles { tiles, parts: 1 }) => self.run(simd, &Unit::<1>::configure(tiles)),
            Some(OnTiles { tiles, .. }) => self.run(simd, &Unit::<2>::configure(tiles)),
        }
    }
}

impl Tasks<'_> {
    #[inline(always)]
    fn run<S: Simd>(&self, simd: S, products: &impl Products) {
        let Decode { keys, v_dim, .. } = self.problem;
        for task in self.tasks.clone() {
            let (unit, index) = (task / self.pieces, task % self.pieces);
            match self.step {
                Step::Scores => {
                    products.scores(simd, self, unit, &piece(index, KEYS_PER_TASK, keys));
                }
                Step::Weights => self.weights(simd, unit),
                Step::Output => {
                    let cols = piece(index, self.problem.cols_per_task(), v_dim);
                    products.output(simd, self, unit, cols);
                }
                Step::All => {
                    products.scores(simd, self, unit, &(0..keys));
                    self.weights(simd, unit);
                    products.output(simd, self, unit, 0..v_dim);
                }
            }
        }
    }

    /// Sequence and key head of a unit.
    #[inline(always)]
    pub(super) fn place(&self, unit: usize) -> (usize, usize) {
        (unit / self.problem.kv_heads, unit % self.problem.kv_heads)
    }

    /// One past the last key that row `r` of a unit sees.
    #[inline(always)]
    pub(super) fn visible_end(&self, unit: usize, r: usize) -> usize {
        let queries = self.problem.q.layout().seq;
        let later = queries - 1 - r % queries;
        self.problem.total(self.place(unit).0).saturating_sub(later)
    }

    /// scale·q of all rows of a unit, [rows, dim].
    #[inline(always)]
    pub(super) fn scaled_queries<S: Simd>(&self, simd: S, unit: usize) -> ScratchBuf {
        let Decode { q, scale, dim, .. } = self.problem;
        let (b, kv) = self.place(unit);
        let mut scaled = ScratchBuf::take(self.problem.rows() * dim);
        for (r, to) in scaled.chunks_exact_mut(dim.max(1)).enumerate() {
            let head = kv * self.problem.group + r / q.layout().seq;
            let scale = simd.splat_f32s(scale);
            lanes::map(
                simd,
                q.head(b, head).row(r % q.layout().seq),
                to,
                #[inline(always)]
                |x| simd.mul_f32s(x, scale),
            );
        }
        scaled
    }

    /// P of a unit, each row's α for each block, 1/l, and lse.
    #[inline(always)]
    fn weights<S: Simd>(&self, simd: S, unit: usize) {
        let Decode { q, group, lse, .. } = self.problem;
        let Places { stride, alpha, l, m, inverse, len } = self.places;
        let (b, kv) = self.place(unit);
        let (rows, total) = (self.problem.rows(), self.problem.total(b));
        // SAFETY: a unit's weights are one task, and its scores are complete, so nobody else uses its scratch.
        let memory = unsafe { self.memory.part(unit * len, len) };
        let (scores, rest) = memory.split_at_mut(alpha);
        let (alphas, rest) = rest.split_at_mut(l - alpha);
        let (ls, rest) = rest.split_at_mut(m - l);
        let (ms, inverses) = rest.split_at_mut(inverse - m);
        ls.fill(0.0);
        ms.fill(f32::NEG_INFINITY);
        for (index, first_key) in (0..total).step_by(KEY_BLOCK).enumerate() {
            let keys = first_key..(first_key + KEY_BLOCK).min(total);
            let vectors = first_key / S::F32_LANES..keys.end.div_ceil(S::F32_LANES);
            for first in (0..rows).step_by(GROUP) {
                let n = GROUP.min(rows - first);
                let carried = Carried {
                    m: &mut ms[first..][..n],
                    l: &mut ls[first * S::F32_LANES..][..n * S::F32_LANES],
                    alpha: &mut alphas[index * rows + first..][..n],
                };
                let scores = &mut scores[first * stride..][..n * stride];
                online::absorb(
                    simd,
                    scores,
                    (stride / S::F32_LANES, &vectors),
                    #[inline(always)]
                    |r| {
                        let end = self.visible_end(unit, first + r).clamp(first_key, keys.end);
                        let whole = end == vectors.end * S::F32_LANES;
                        (!whole).then(|| Row { bias: None, alibi: None, visible: 0..end - first_key })
                    },
                    carried,
                );
            }
        }
        for r in 0..rows {
            let l = S::as_simd_f32s(&ls[r * S::F32_LANES..][..S::F32_LANES]).0[0];
            let (head, i) = (kv * group + r / q.layout().seq, r % q.layout().seq);
            let (inverse, sum) = online::finish(simd, ms[r], l);
            inverses[r] = inverse;
            // SAFETY: (b, head, i) is an element of lse [batch, heads, seq_q], which this unit alone writes.
            unsafe { lse.part((b * q.layout().heads + head) * q.layout().seq + i, 1)[0] = sum };
        }
    }

    /// Divides the sums of a unit's rows, `width` apart, by l, and writes columns `cols` of the output.
    #[inline(always)]
    pub(super) fn store<S: Simd>(
        &self,
        simd: S,
        unit: usize,
        (acc, width): (&[f32], usize),
        cols: Range<usize>,
    ) {
        let Decode { q, group, out, .. } = self.problem;
        let Places { inverse, len, .. } = self.places;
        let (b, kv) = self.place(unit);
        for (r, acc) in acc.chunks_exact(width.max(1)).enumerate() {
            let (head, i) = (kv * group + r / q.layout().seq, r % q.layout().seq);
            // SAFETY: this task alone writes these columns of this row; 1/l is complete and only read.
            let (out, inverse) =
                unsafe { (out.rows_unsync(b, head, i..i + 1), *self.memory.at(unit * len + inverse + r)) };
            let (inverse, zero) = (simd.splat_f32s(inverse), simd.splat_f32s(0.0));
            lanes::map(
                simd,
                &acc[..cols.len()],
                out.sub(0..1, cols.clone()).row_mut(0),
                #[inline(always)]
                |x| simd.mul_add_e_f32s(x, inverse, zero),
            );
        }
    }
}
