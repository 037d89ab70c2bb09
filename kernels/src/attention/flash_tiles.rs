//! The forward pass with both products on tiles of words.
//!
//! ```text
//! for each block of keys:  pack Kᵀ and V                                     once for all rows of a chunk, of all heads that share the keys
//!   for 32 rows:           S = (scale·Q)·Kᵀ on tiles, 32 × 32 at a time      only where a row sees a key
//!                          P, m, l, α by the softmax of vectors              six rows at a time
//!                          pack P;  o = α·o + P·V, the product on tiles
//! ```
//! The naive form and the online softmax are those of [`super::flash`]; what differs are the two products.
//! - Q is scaled in f32 before it is rounded, once for a chunk: so no score is multiplied again. The scale of a power of two, as 1/√64, rounds nothing.
//! - The scores are stored where the softmax reads them, rows 512 bytes apart: 32 rows of one block of keys are 16 KiB of the first-level cache.
//! - l is the sum of the probabilities before they are rounded: the log-sum-exp has no error of theirs, and the backward pass makes the same P from it.
//! - o stays in f32 memory and takes the sums of a block by one multiply-add with α: tiles have no α, and the key block is as deep as a product gets.
//! - 32 rows know which steps of 32 keys they see, so causal order saves half of the tiles; inside of them P is 0 where a key is hidden.
//! - Where nothing is added, dropped or odd, P goes from its exponential straight into its tiles ([`conversion::weigh`]), with the same bits: no
//!   P in f32 is stored and read again. A sixth of the time of the pass at 64 elements.
//!
//! Rejected: S as K·Qᵀ, with queries across. P would come out as the right operand's rows, without a transposition of K, but the softmax
//! would run along rows of tiles that belong to different queries, and its sums would not be those of the vectors' pass or of decoding. The products of the next 32 rows
//! between the softmax of these: a tenth slower (docs/decisions/003-attention.md).

use std::ops::Range;

use pulp::Simd;

use super::chunk::{Chunk, Rows, groups, vectors};
use super::conversion::{self, Seen};
use super::flash::{First, Forward};
use super::on_tiles::{self, OnTiles, Operands, Unit, left_words, product, right_words, steps_of};
use super::online::{self, Carried};
use super::problem::{KEY_BLOCK, Shape, cut, take_first};
use super::stage::{self, Coming};
use crate::gemm::microkernel::amx::{BLOCK, SIDE, STEP};
use crate::isa::may_have_tiles;
use crate::scratch::ScratchBuf;
use crate::view::MatRef;

/// Scratch of one task.
struct State<'a> {
    unit: Unit,
    /// Kᵀ of a block as the right operand, and room for K as the left one on its way there.
    keys: &'a mut [u32],
    /// V of a block.
    values: &'a mut [u32],
    /// scale·Q of a head's rows, and what says which of them are odd; with o, l and m in `rows`, what [`Held`] is exchanged with.
    q: &'a mut [u32],
    odd_rows: &'a mut [bool],
    /// P of 32 rows.
    p: &'a mut [u32],
    /// scale·Q of 32 rows in f32.
    scaled: &'a mut [f32],
    /// P·V of 32 rows and a block [32, v_dim in whole panels].
    sums: &'a mut [f32],
    rows: Rows<'a>,
}

/// What the rows of one head keep while another's are at work.
struct Held<'a> {
    q: &'a mut [u32],
    odd_rows: &'a mut [bool],
    acc: &'a mut [f32],
    l: &'a mut [f32],
    m: &'a mut [f32],
}

impl<'a> State<'a> {
    /// Puts what one head keeps to work, or back.
    fn exchange(&mut self, held: &mut Held<'a>) {
        std::mem::swap(&mut self.q, &mut held.q);
        std::mem::swap(&mut self.odd_rows, &mut held.odd_rows);
        std::mem::swap(&mut self.rows.acc, &mut held.acc);
        std::mem::swap(&mut self.rows.l, &mut held.l);
        std::mem::swap(&mut self.rows.m, &mut held.m);
    }
}

/// One block of keys: what of it is odd.
struct Block {
    keys: Range<usize>,
    odd_keys: [bool; KEY_BLOCK],
    /// Odd values, if there are any.
    odd_values: Option<[bool; KEY_BLOCK]>,
}

impl Forward<'_> {
    /// Some units, each of at most `chunk` rows of `heads` heads that share their keys.
    #[inline(always)]
    pub(super) fn run_on_tiles<S: Simd>(
        &self,
        simd: S,
        means: OnTiles,
        unit: (usize, usize),
        units: Range<usize>,
    ) {
        if const { !may_have_tiles::<S>() } {
            unreachable!("no tile unit stands beside these vectors");
        }
        match means.parts {
            1 => self.run_in_parts::<S, 1>(simd, means, unit, units),
            _ => self.run_in_parts::<S, 2>(simd, means, unit, units),
        }
    }

    #[inline(always)]
    fn run_in_parts<S: Simd, const P: usize>(
        &self,
        simd: S,
        means: OnTiles,
        (chunk, heads): (usize, usize),
        units: Range<usize>,
    ) {
        let Shape { seq_q, dim, v_dim, .. } = self.shape;
        let rows = seq_q.min(chunk);
        let q_words = left_words(rows, dim, P);
        let lens = [
            right_words(dim, KEY_BLOCK, P),
            right_words(KEY_BLOCK, v_dim, P),
            heads * q_words,
            left_words(BLOCK, KEY_BLOCK, P),
        ];
        let mut words = ScratchBuf::take(lens.iter().sum());
        let [keys, values, q, p] = cut(words.words_mut(), lens);
        let (scores, sums) = (BLOCK * KEY_BLOCK, BLOCK * v_dim.next_multiple_of(BLOCK));
        let (l_len, acc_len) = (rows * S::F32_LANES, rows * v_dim);
        let lens = [scores, sums, BLOCK * dim, BLOCK, heads * l_len, heads * acc_len, heads * rows];
        let mut scratch = ScratchBuf::take(lens.iter().sum());
        let [scores, sums, scaled, alpha, mut l, mut acc, mut m] = cut(&mut scratch, lens);
        let mut all_odd = vec![false; heads * rows];
        let (mut q, mut odd_rows) = (q, &mut all_odd[..]);
        let mut held = Vec::with_capacity(heads);
        for _ in 0..heads {
            held.push(Held {
                q: take_first(&mut q, q_words),
                odd_rows: take_first(&mut odd_rows, rows),
                acc: take_first(&mut acc, acc_len),
                l: take_first(&mut l, l_len),
                m: take_first(&mut m, rows),
            });
        }
        let rows = Rows { first: 0, scores, alpha, acc, l, m };
        let unit = means.unit();
        let mut state = State { unit, keys, values, q, odd_rows, p, scaled, sums, rows };
        for unit in units.clone() {
            let first = self.first_of(unit, (chunk, heads));
            let next = (unit + 1 < units.end).then(|| self.first_of(unit + 1, (chunk, heads)));
            let chunks = (0..heads).map(|head| self.chunk_of(first.0, first.1 + head, first.2.clone()));
            let mut chunks: Vec<Chunk<'_>> = chunks.collect();
            self.run_heads::<S, P>(simd, &mut state, (&mut chunks, next), &mut held);
        }
    }

    /// The same rows of heads that share their keys.
    #[inline(always)]
    fn run_heads<'s, S: Simd, const P: usize>(
        &self,
        simd: S,
        state: &mut State<'s>,
        (chunks, next): (&mut [Chunk<'_>], Option<First>),
        held: &mut [Held<'s>],
    ) {
        for (chunk, held) in chunks.iter().zip(&mut *held) {
            state.exchange(held);
            chunk.begin::<S>(&mut state.rows);
            state.rows.acc[..chunk.rows.len() * chunk.v.cols()].fill(0.0);
            chunk.queries::<S, P>(simd, state);
            state.exchange(held);
        }
        let Some(any) = chunks.first() else { return };
        let shares = 2 * chunks.len() * any.rows.len().div_ceil(BLOCK);
        let mut blocks = any.blocks().peekable();
        while let Some(keys) = blocks.next() {
            let mut block = Block { keys, odd_keys: [false; KEY_BLOCK], odd_values: None };
            let mut odd = [false; KEY_BLOCK];
            let k = any.k.sub(block.keys.clone(), 0..any.k.cols());
            let v = any.v.sub(block.keys.clone(), 0..any.v.cols());
            on_tiles::pack_across::<P>(&state.unit, k, state.keys, &mut block.odd_keys);
            on_tiles::pack_right::<P>(&state.unit, v, state.values, &mut odd);
            block.odd_values = odd.contains(&true).then_some(odd);
            let mut coming = Coming::new(self.coming_after(any, blocks.peek(), next.as_ref()), shares);
            for (chunk, held) in chunks.iter().zip(&mut *held) {
                state.exchange(held);
                for first in chunk.rows.clone().step_by(BLOCK) {
                    let rows = first..(first + BLOCK).min(chunk.rows.end);
                    chunk.tile::<S, P>(simd, state, (&block, &mut coming), rows);
                }
                state.exchange(held);
            }
        }
        for (chunk, held) in chunks.iter_mut().zip(held) {
            state.exchange(held);
            chunk.finish(simd, &state.rows);
            state.exchange(held);
        }
    }
}

impl Chunk<'_> {
    /// Packs scale·Q of all rows.
    #[inline(always)]
    fn queries<S: Simd, const P: usize>(&self, simd: S, state: &mut State<'_>) {
        let words = left_words(SIDE, self.q.cols(), P);
        for first in self.rows.clone().step_by(BLOCK) {
            let rows = first..(first + BLOCK).min(self.rows.end);
            let local = first - self.rows.start;
            let odd_rows = &mut state.odd_rows[local..][..rows.len()];
            let scaled = stage::scaled(simd, self.problem.spec.scale, self.q, rows, state.scaled);
            on_tiles::pack_left::<P>(&state.unit, scaled, &mut state.q[local / SIDE * words..], odd_rows);
        }
    }

    /// At most 32 rows and a block of keys.
    #[inline(always)]
    fn tile<S: Simd, const P: usize>(
        &self,
        simd: S,
        state: &mut State<'_>,
        (block, coming): (&Block, &mut Coming<4>),
        rows: Range<usize>,
    ) {
        let keys = &block.keys;
        let seen = self.sight.rows(&rows, keys);
        if seen.is_empty() {
            return;
        }
        let seen_steps = steps_of(&seen, keys);
        coming.ask();
        let odd = self.scores_on_tiles::<P>(state, block, &rows, &seen_steps);
        state.rows.first = rows.start;
        let local = rows.start - self.rows.start;
        let plain = block.odd_values.is_none() && !odd && self.problem.spec.mask.takes_scores();
        let fused = state.unit.conversion::<P>().filter(|_| plain);
        if let Some(proof) = fused {
            let carried = Carried {
                m: &mut state.rows.m[local..][..rows.len()],
                l: &mut state.rows.l[local * S::F32_LANES..][..rows.len() * S::F32_LANES],
                alpha: &mut state.rows.alpha[..rows.len()],
            };
            let seen = Seen { sight: self.sight, first_row: rows.start, keys };
            conversion::weigh(proof, state.rows.scores, (&seen_steps, seen), carried, state.p);
            coming.ask();
            self.values_on_tiles::<S, P>(simd, state, block, &rows, &seen_steps);
            return;
        }
        let columns = seen_steps.start * STEP..seen_steps.end * STEP;
        for group in groups(&rows) {
            let seen = self.sight.rows(&group, keys);
            let own = vectors::<S>(&seen, keys);
            let own = if seen.is_empty() {
                columns.start..columns.start
            } else {
                own.start * S::F32_LANES..own.end * S::F32_LANES
            };
            if !seen.is_empty() {
                self.weigh(simd, &mut state.rows, (keys, KEY_BLOCK), group.clone(), own.clone());
            }
            let scores = &mut state.rows.scores[(group.start - rows.start) * KEY_BLOCK..];
            for row in scores.chunks_exact_mut(KEY_BLOCK).take(group.len()) {
                row[columns.start..own.start].fill(0.0);
                row[own.end..columns.end].fill(0.0);
            }
        }
        // Of the steps that are seen alone: P has no other, and the panels of V are as deep as the block.
        on_tiles::pack_score_rows::<P>(&state.unit, state.rows.scores, (rows.len(), &seen_steps), state.p);
        coming.ask();
        self.values_on_tiles::<S, P>(simd, state, block, &rows, &seen_steps);
    }

    /// S of at most 32 rows, over the steps of keys that they see; whether one of them or of the keys is odd.
    #[inline(always)]
    fn scores_on_tiles<const P: usize>(
        &self,
        state: &mut State<'_>,
        block: &Block,
        rows: &Range<usize>,
        seen: &Range<usize>,
    ) -> bool {
        let dim = self.q.cols();
        let (steps, local) = (on_tiles::steps(dim), rows.start - self.rows.start);
        let left = &state.q[local / SIDE * left_words(SIDE, dim, P)..];
        for panel in seen.clone() {
            let right = &state.keys[panel * right_words(dim, BLOCK, P)..];
            let operands = Operands { left, right, steps, rows: rows.len() };
            let to = &mut state.rows.scores[panel * BLOCK..];
            product::<P>(&state.unit, operands, 0..steps, to, KEY_BLOCK);
        }
        let odd_rows = &state.odd_rows[local..][..rows.len()];
        let odd = block.odd_keys.contains(&true) || odd_rows.contains(&true);
        if odd {
            self.mend(state, block, rows, seen);
        }
        odd
    }

    /// Computes the scores of odd queries and odd keys by f32 multiply-adds.
    #[cold]
    fn mend(&self, state: &mut State<'_>, block: &Block, rows: &Range<usize>, seen: &Range<usize>) {
        let scale = self.problem.spec.scale;
        for (i, scores) in rows.clone().zip(state.rows.scores.chunks_exact_mut(KEY_BLOCK)) {
            let odd_row = state.odd_rows[i - self.rows.start];
            let columns = seen.start * STEP..(seen.end * STEP).min(block.keys.len());
            for j in columns.filter(|j| odd_row || block.odd_keys[*j]) {
                let (q, k) = (self.q.row(i), self.k.row(block.keys.start + j));
                scores[j] = on_tiles::chain(q.iter().map(|q| scale * q), k.iter().copied());
            }
        }
    }

    /// `o = α·o + P·V` of at most 32 rows, whose P is packed.
    #[inline(always)]
    fn values_on_tiles<S: Simd, const P: usize>(
        &self,
        simd: S,
        state: &mut State<'_>,
        block: &Block,
        rows: &Range<usize>,
        seen: &Range<usize>,
    ) {
        let v_dim = self.v.cols();
        let width = v_dim.next_multiple_of(BLOCK);
        let deep = on_tiles::steps(block.keys.len());
        let panel = right_words(block.keys.len(), BLOCK, P);
        let step = panel / deep;
        for first in (0..v_dim).step_by(BLOCK) {
            let right = &state.values[first / BLOCK * panel + seen.start * step..];
            let operands = Operands { left: state.p, right, steps: seen.len(), rows: rows.len() };
            product::<P>(&state.unit, operands, 0..seen.len(), &mut state.sums[first..], width);
        }
        for group in groups(rows) {
            if self.sight.rows(&group, &block.keys).is_empty() {
                continue;
            }
            for i in group {
                let (local, in_tile) = (i - self.rows.start, i - rows.start);
                let o = &mut state.rows.acc[local * v_dim..][..v_dim];
                online::carry(simd, state.rows.alpha[in_tile], &state.sums[in_tile * width..][..v_dim], o);
                if let Some(odd) = &block.odd_values {
                    let p = &state.rows.scores[in_tile * KEY_BLOCK..][..KEY_BLOCK];
                    add_odd(p, &self.v, (odd, block.keys.start), self.sight.row(i, &block.keys), o);
                }
            }
        }
    }
}

/// `o += p·v` over the odd values of the block that begins with key `first`, among the keys that the row sees, in ascending order.
#[cold]
fn add_odd(
    p: &[f32],
    v: &MatRef<'_>,
    (odd, first): (&[bool; KEY_BLOCK], usize),
    visible: Range<usize>,
    o: &mut [f32],
) {
    for j in visible {
        let at = j - first;
        if odd[at] {
            on_tiles::add_scaled(p[at], v.row(j), o);
        }
    }
}
