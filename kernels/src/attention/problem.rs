//! The shape of a problem, checked once; how its units of work are dealt to tasks; the blocks.

use std::ops::Range;

use pulp::WithSimd;

use super::mask::Mask;
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::view::{HeadsLayout, HeadsRef};

/// Keys of one block. Part of the numerical result: the softmax is rescaled from block to block. 128 beat 64 by 5 %
/// (each block costs a row its reductions, an α and a pass over o) and 256 beat it no more.
pub(super) const KEY_BLOCK: usize = 128;

/// Query rows whose scores against one key block are held at a time; a multiple of the tile's height.
pub(super) const ROW_TILE: usize = 48;

/// Query rows of one task of a split head.
pub(super) const ROW_CHUNK: usize = 192;

/// Elements of Q and O together, and in the backward pass of Q, dO and dQ, that rows hold while keys stream past: 1.5 MiB, about a
/// second-level cache or more. Rows that share the staging of a key block pay it once, and their own come back from the third-level
/// cache one tile after the other, which the hardware foresees. 288, 576 and 768 KiB were slower, 3 MiB no faster (docs/decisions/003-attention.md).
pub(super) const HELD: usize = 384 * 1024;

/// A task should hold at least this many multiplications, about 20 µs.
const TASK_WORK: usize = 1 << 20;

/// The dimensions of a problem.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) batch: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) seq_q: usize,
    pub(super) seq_k: usize,
    pub(super) dim: usize,
    pub(super) v_dim: usize,
}

impl Shape {
    /// The dimensions that `q`, `k` and `v` agree on.
    pub(super) fn of(q: &HeadsRef<'_>, k: &HeadsRef<'_>, v: &HeadsRef<'_>) -> Result<Shape, ShapeError> {
        let shape = Shape { v_dim: v.layout().dim, ..Shape::of_scores(q, k)? };
        shape.expect("v", v.layout(), shape.seq_k, shape.kv_heads, shape.v_dim)?;
        Ok(shape)
    }

    /// The dimensions that `q` and `k` agree on; `v_dim` is 0.
    pub(super) fn of_scores(q: &HeadsRef<'_>, k: &HeadsRef<'_>) -> Result<Shape, ShapeError> {
        let (q, k) = (q.layout(), k.layout());
        let shape = Shape {
            batch: q.batch,
            heads: q.heads,
            kv_heads: k.heads,
            seq_q: q.seq,
            seq_k: k.seq,
            dim: q.dim,
            v_dim: 0,
        };
        shape.expect("k", k, shape.seq_k, shape.kv_heads, shape.dim)?;
        if !(if k.heads == 0 { q.heads == 0 } else { q.heads.is_multiple_of(k.heads) }) {
            return Err(ShapeError::Value {
                argument: "q.heads",
                value: q.heads.to_string(),
                expected: "a multiple of the heads of k",
            });
        }
        Ok(shape)
    }

    /// `layout` is [batch, seq, heads, dim] of this problem.
    pub(super) fn expect(
        &self,
        argument: &'static str,
        layout: &HeadsLayout,
        seq: usize,
        heads: usize,
        dim: usize,
    ) -> Result<(), ShapeError> {
        expect_dim(argument, "batch", self.batch, layout.batch)?;
        expect_dim(argument, "seq", seq, layout.seq)?;
        expect_dim(argument, "heads", heads, layout.heads)?;
        expect_dim(argument, "dim", dim, layout.dim)
    }

    /// `layout` is that of the output.
    pub(super) fn expect_out(&self, argument: &'static str, layout: &HeadsLayout) -> Result<(), ShapeError> {
        self.expect(argument, layout, self.seq_q, self.heads, self.v_dim)
    }

    /// The mask fits.
    pub(super) fn expect_mask(&self, mask: &Mask<'_>) -> Result<(), ShapeError> {
        mask.check(self.batch, self.heads, self.seq_q, self.seq_k)
    }

    /// Rows of [batch, heads, seq_q].
    pub(super) fn rows(&self) -> Result<usize, ShapeError> {
        let rows = self.batch.checked_mul(self.heads).and_then(|n| n.checked_mul(self.seq_q));
        rows.ok_or(ShapeError::Overflow { argument: "q" })
    }

    /// Query rows that share one staging of a key block in the forward pass, whole tiles of `tile` rows, when Q and O of all of
    /// them may have about `held` elements. No bit depends on it.
    pub(super) fn row_chunk(&self, threads: usize, (held, tile): (usize, usize)) -> usize {
        let rows = even_parts(self.seq_q, held / (self.dim + self.v_dim).max(1), tile).max(ROW_CHUNK);
        let few = threads > 1 && self.batch * self.heads * self.seq_q.div_ceil(rows) < 4 * threads;
        if few { ROW_CHUNK } else { rows }
    }

    /// Query heads that share one key head.
    #[inline]
    pub(super) fn group(&self) -> usize {
        self.heads / self.kv_heads.max(1)
    }
}

/// The `index`-th piece of `len` things cut into pieces of `size`.
#[inline]
pub(super) fn piece(index: usize, size: usize, len: usize) -> Range<usize> {
    index * size..((index + 1) * size).min(len)
}

/// Rows of a part when `rows` rows go by equal parts of about `most` rows at most, whole tiles of `tile` rows: no part is a remainder, for which
/// all keys would be staged once more.
pub(super) fn even_parts(rows: usize, most: usize, tile: usize) -> usize {
    rows.div_ceil(rows.div_ceil(most.max(1)).max(1)).next_multiple_of(tile).max(tile)
}

/// Runs `units` units of about `work` multiplications each: several to a task when they are small, each task
/// inside one ISA shell. `job(range)` makes the operation for a range of units.
pub(super) fn deal<Op: WithSimd<Output = ()>>(
    ctx: &Context,
    units: usize,
    work: usize,
    job: impl Fn(Range<usize>) -> Op + Sync,
) {
    let isa = ctx.isa();
    let per_task = (TASK_WORK / work.max(1)).clamp(1, units.max(1));
    let tasks = units.div_ceil(per_task);
    let ctx =
        if tasks > 1 { ctx.for_multiply_adds(units.saturating_mul(work)) } else { ctx.single_threaded() };
    if ctx.thread_count() == 1 {
        if units > 0 {
            isa.dispatch(job(0..units));
        }
        return;
    }
    // In pieces: neighbouring heads lie in the same pages and lines, which two threads by turns would both ask for.
    ctx.for_each_piece(tasks, |task| {
        isa.dispatch(job(piece(task, per_task, units)));
    });
}

/// The problems that some of the units of all of them belong to, each with its own units among them, counted from its
/// first. `len` counts the units of a problem.
#[inline(always)]
pub(super) fn pieces_of<'a, P>(
    problems: &'a [P],
    units: &Range<usize>,
    len: impl Fn(&P) -> usize,
) -> impl Iterator<Item = (&'a P, Range<usize>)> {
    let units = units.clone();
    let mut first = 0;
    problems.iter().filter_map(move |problem| {
        let all = first..first + len(problem);
        first = all.end;
        let mine = units.start.max(all.start)..units.end.min(all.end);
        (mine.start < mine.end).then(|| (problem, mine.start - all.start..mine.end - all.start))
    })
}

/// Cuts scratch memory into parts of these lengths.
#[inline(always)]
pub(super) fn cut<T, const N: usize>(mut memory: &mut [T], lens: [usize; N]) -> [&mut [T]; N] {
    lens.map(|len| {
        let (part, rest) = std::mem::take(&mut memory).split_at_mut(len);
        memory = rest;
        part
    })
}

/// Takes the first `len` elements off a slice.
#[inline(always)]
pub(super) fn take_first<'a, T>(slice: &mut &'a mut [T], len: usize) -> &'a mut [T] {
    let (first, rest) = std::mem::take(slice).split_at_mut(len);
    *slice = rest;
    first
}

/// A pointer to an output that tasks write to in disjoint places.
#[derive(Clone, Copy)]
pub(super) struct Shared(*mut f32);

// SAFETY: each user writes to places that no other task touches, and says so where it does.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Of `data`, which the caller keeps borrowed while tasks run.
    pub(super) fn new(data: &mut [f32]) -> Shared {
        Shared(data.as_mut_ptr())
    }

    /// The address of element `start`, to be read or written where no other task does.
    #[inline(always)]
    pub(super) fn at(self, start: usize) -> *mut f32 {
        self.0.wrapping_add(start)
    }

    /// What lies from element `start` on.
    pub(super) fn from(self, start: usize) -> Shared {
        Shared(self.at(start))
    }

    /// `len` elements from `start` on.
    ///
    /// # Safety
    /// They lie in the data, nobody else holds them, and the data is still borrowed.
    #[inline(always)]
    pub(super) unsafe fn part<'a>(self, start: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}
