//! The forward pass with both products on vectors.
//!
//! ```text
//! for each block of keys:  Kᵀ, and V where its rows spread            once for all rows of a chunk, of all heads that share the keys
//!   for 48 rows:           S = (scale·Q)·Kᵀ;  P, m, l, α              six rows at a time
//!                          o = α·o + P·V                              six rows at a time
//! ```
//! Between two groups of rows the next block's keys and values are asked for, and after the last block the first one of the next chunk with its
//! queries, and the output ([`Coming`]): at 1×16×1024×128, where rows of a head lie 8 KiB apart, an eighth of the time went into asking for them when they were staged.

use std::ops::Range;

use pulp::Simd;

use super::chunk::{Chunk, Rows, groups, vectors};
use super::flash::{First, Forward};
use super::mask::Coverage;
use super::problem::{KEY_BLOCK, ROW_TILE, Shape, cut};
use super::stage::{self, Coming};
use super::tile::{Dest, Extent, GROUP, Left, Onto, Right, product, right};
use crate::scratch::ScratchBuf;
use crate::view::MatRef;

/// Scratch of one task: Kᵀ of a block [dim, stride], its V [KEY_BLOCK, v_dim], and what belongs to rows.
struct State<'a> {
    keys: &'a mut [f32],
    values: &'a mut [f32],
    held: Held<'a>,
}

/// What belongs to rows: the scores of a tile and its α, and of `heads` heads, one after the other, scale·Q of the chunk [rows, dim], o, l and m.
struct Held<'a> {
    heads: usize,
    q: &'a mut [f32],
    scores: &'a mut [f32],
    alpha: &'a mut [f32],
    acc: &'a mut [f32],
    l: &'a mut [f32],
    m: &'a mut [f32],
}

impl Held<'_> {
    /// scale·Q and the rest of one head.
    #[inline(always)]
    fn head(&mut self, head: usize) -> (&mut [f32], Rows<'_>) {
        let heads = self.heads;
        let part = |all: usize| head * (all / heads)..(head + 1) * (all / heads);
        let (q, acc, l, m) =
            (part(self.q.len()), part(self.acc.len()), part(self.l.len()), part(self.m.len()));
        let rows = Rows {
            first: 0,
            scores: self.scores,
            alpha: self.alpha,
            acc: &mut self.acc[acc],
            l: &mut self.l[l],
            m: &mut self.m[m],
        };
        (&mut self.q[q], rows)
    }
}

/// One block of keys: Kᵀ [dim, stride] and V.
struct Block<'a> {
    keys: Range<usize>,
    /// Columns of Kᵀ and of a tile's scores.
    stride: usize,
    kt: &'a [f32],
    v: MatRef<'a>,
}

impl Forward<'_> {
    /// Some units, each of at most `chunk` rows of `heads` heads that share their keys.
    #[inline(always)]
    pub(super) fn run<S: Simd>(&self, simd: S, (chunk, heads): (usize, usize), units: Range<usize>) {
        let Shape { seq_q, dim, v_dim, .. } = self.shape;
        let rows = seq_q.min(chunk);
        let stride = KEY_BLOCK.next_multiple_of(S::F32_LANES);
        let rows_of_tile = rows.min(ROW_TILE);
        let [keys, values, scores] = [dim * stride, KEY_BLOCK * v_dim, rows_of_tile * stride];
        let of_heads = [rows * S::F32_LANES, rows * v_dim, rows * dim, rows].map(|len| heads * len);
        let [l, acc, q, m] = of_heads;
        let lens = [keys, values, scores, rows_of_tile, l, acc, q, m];
        let mut scratch = ScratchBuf::take(lens.iter().sum());
        let [keys, values, scores, alpha, l, acc, q, m] = cut(&mut scratch, lens);
        let mut state = State { keys, values, held: Held { heads, q, scores, alpha, acc, l, m } };
        let mut chunks = Vec::with_capacity(heads);
        for unit in units.clone() {
            let (batch, first, rows) = self.first_of(unit, (chunk, heads));
            chunks.clear();
            chunks.extend((first..first + heads).map(|head| self.chunk_of(batch, head, rows.clone())));
            let next = (unit + 1 < units.end).then(|| self.first_of(unit + 1, (chunk, heads)));
            self.run_chunks(simd, &mut state, &mut chunks, next);
        }
    }

    /// The same rows of heads that share their keys; `next` are the first head and the rows that come after.
    #[inline(always)]
    fn run_chunks<S: Simd>(
        &self,
        simd: S,
        state: &mut State<'_>,
        chunks: &mut [Chunk<'_>],
        next: Option<First>,
    ) {
        for (head, chunk) in chunks.iter().enumerate() {
            let (q, mut rows) = state.held.head(head);
            chunk.begin::<S>(&mut rows);
            stage::scaled(simd, self.spec.scale, chunk.q, chunk.rows.clone(), q);
            if self.spec.mask.blocks.is_some() {
                rows.acc[..chunk.rows.len() * self.shape.v_dim].fill(0.0);
            }
        }
        let Some(any) = chunks.first() else { return };
        let shares = 2 * chunks.len() * any.rows.len().div_ceil(GROUP);
        let mut blocks = any.blocks().peekable();
        while let Some(keys) = blocks.next() {
            let stride = keys.len().next_multiple_of(S::F32_LANES);
            let [k, v] = [any.k, any.v].map(|view| view.sub(keys.clone(), 0..view.cols()));
            stage::transpose(k, state.keys, stride);
            // One group of rows reads V once: a copy would read it once too.
            let v = if shares > 2 { stage::gather(simd, v, state.values) } else { v };
            let mut coming = Coming::new(self.coming_after(any, blocks.peek(), next.as_ref()), shares);
            let block = Block { keys, stride, kt: state.keys, v };
            for (head, chunk) in chunks.iter().enumerate() {
                let (q, mut rows) = state.held.head(head);
                chunk.block(simd, q, &mut rows, (&block, &mut coming));
            }
        }
        for (head, chunk) in chunks.iter_mut().enumerate() {
            chunk.finish(simd, &state.held.head(head).1);
        }
    }
}

impl Chunk<'_> {
    /// Takes all rows through one block of keys; on the way asks for what comes after it.
    #[inline(always)]
    fn block<S: Simd>(
        &self,
        simd: S,
        q: &[f32],
        rows: &mut Rows<'_>,
        (block, coming): (&Block<'_>, &mut Coming<4>),
    ) {
        let keys = &block.keys;
        for first in self.rows.clone().step_by(ROW_TILE) {
            let tile = first..(first + ROW_TILE).min(self.rows.end);
            if self.sight.classify(&tile, keys) == Coverage::Skip {
                continue;
            }
            rows.first = first;
            for group in groups(&tile) {
                coming.ask();
                self.scores(simd, q, rows, block, group);
            }
            // The first block that the tile sees writes o, the others add to it; under a list, to zeros.
            let add = self.problem.spec.mask.blocks.is_some()
                || self.sight.rows(&tile, &(0..keys.end)).start < keys.start;
            for group in groups(&tile) {
                coming.ask();
                self.values(simd, rows, block, group, add);
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
            let k = Right::rows(kt.as_ptr().add(columns.start), stride);
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
