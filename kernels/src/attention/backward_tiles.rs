//! The backward pass with its five products on tiles of words.
//!
//! ```text
//! for each block of keys:        pack Kᵀ, Vᵀ and scale·K                   once for all rows that see it
//!   for 128 rows of a head:      Q, dO and their transposes, packed once  (backward_operands)
//!     for 32 of them:            S = Q·Kᵀ, dP = dO·Vᵀ;  P and dS by vectors
//!     dVᵀ += dOᵀ·P               dKᵀ += Qᵀ·dS                              sums of the block, f32
//!     dQ  += dS·K                                                          in memory, f32
//!   dK and dV of the block are written
//! ```
//! The naive form, the cuts into regions, P and dS are those of [`super::flash_backward`]; Q stands for scale·Q. What differs:
//! - dV and dK are summed transposed. P and dS, the largest operands, are then right operands as they lie, and what is
//!   turned is dO and Q, half as many words at 64 elements and once for 128 rows. A block's sums are written, turned, when all rows have been added.
//! - 128 rows, not the 32 of the forward pass: P and dS are as deep for dV and dK as they are for dQ, and sums in memory are touched once for four steps of the unit.
//!   P and dS in f32 are then 128 KiB of the second-level cache.
//! - The tiles of rows begin at row 0, or where a list's blocks do, so dK and dV have the same bits for any cut. An element of dQ is a sum over the blocks of keys.
//! - 32 rows know which steps of 32 keys they see, and these alone take part in the five products: causal order saves three eighths of a block on the diagonal.
//! - Where nothing is added, dropped or odd, P and dS go straight into their tiles, dS into both of its orders
//!   ([`conversion::Gradients`]), with the same bits; the products before them pass through 32 KiB of the first-level cache, not 128 KiB of the second.
//! - dK, dV and the next block's keys and values are asked for, a share a tile, where their rows lie far apart.
//! - Odd numbers (see [`super::on_tiles`]) are zero where they are summed over, and their products are added in f32 for the scores that are visible. dS that
//!   rounds to a bf16 infinity becomes one.
//!
//! # Accuracy
//! With ρ = 2·δ of the row (see [`super::on_tiles`]), ε of the precision, up to terms of higher order and f32's roundings:
//!
//! | | error, at most |
//! |---|---|
//! | dS | `P·(ρ·(\|z·dP\| + \|D\|) + ε·z·Σ\|dO\|·\|V\| + (ρ + ε)·Σ_c \|dO\|·Σ_j P·z·\|V\|)` |
//! | dV | `(ρ + ε)·Σ_i P·z·\|dO\|` |
//! | dQ, dK | `scale·Σ (error of dS + ε·\|dS\|)·\|K\|`, `scale·Σ (error of dS + ε·\|dS\|)·\|Q\|` |
//!
//! Asserted by `attention::tests::tiles_backward`.

use std::ops::Range;

use pulp::Simd;

use super::backward_operands::{OddRows, Room, Tiles};
use super::backward_tile::Head;
use super::backward_weights::{HeadWeights, Scores, Weights};
use super::chunk::groups;
use super::conversion::{self, Seen};
use super::flash_backward::{AFTER, Backward, Next};
use super::mask::Sight;
use super::on_tiles::{self, OnTiles, Operands, Unit, left_words, product, right_words, steps_of};
use super::problem::{KEY_BLOCK, Shape, cut};
use super::regions::{Cut, Parts, Region, row_tiles};
use super::stage::{self, Coming};
use crate::gemm::microkernel::amx::{BLOCK, SIDE, STEP};
use crate::gemm::microkernel::prefetch;
use crate::isa::{Bf16Dots, may_have_tiles};
use crate::scratch::ScratchBuf;
use crate::view::MatRef;

/// Rows of a tile.
pub(super) const ROWS: usize = 128;

/// Scratch of one task.
pub(super) struct State<'a> {
    pub(super) unit: Unit,
    /// Right operands of a block: Kᵀ, Vᵀ, scale·K.
    pub(super) keys: &'a mut [u32],
    pub(super) values: &'a mut [u32],
    pub(super) k: &'a mut [u32],
    /// Left operands of tiles.
    pub(super) tiles: Tiles<'a>,
    /// P or dS of a tile, as the right operand or the left one; room on the way of others.
    pub(super) right: &'a mut [u32],
    pub(super) left: &'a mut [u32],
    /// dS as the right operand where P and dS are packed as they are made.
    pub(super) right_d_s: &'a mut [u32],
    /// P and dS [128, 128].
    pub(super) scores: Scores<'a>,
    /// scale·Q and dO of a tile, K of a block.
    pub(super) q_rows: &'a mut [f32],
    pub(super) d_out_rows: &'a mut [f32],
    pub(super) k_rows: &'a mut [f32],
    /// dKᵀ and dVᵀ of a block [dim or v_dim in whole panels, 128].
    pub(super) d_k: &'a mut [f32],
    pub(super) d_v: &'a mut [f32],
    /// Of which 32 keys after 32 they hold sums; where not, they are anything.
    pub(super) written: [bool; KEY_BLOCK / BLOCK],
    /// What a product gives: as large as any of them.
    pub(super) sums: &'a mut [f32],
    pub(super) delta: &'a mut [f32],
}

/// One block of keys.
pub(super) struct Block<'a> {
    pub(super) region: &'a Region,
    pub(super) keys: Range<usize>,
    pub(super) sight: Sight,
    pub(super) k: MatRef<'a>,
    pub(super) v: MatRef<'a>,
    pub(super) odd_keys: [bool; KEY_BLOCK],
    pub(super) odd_values: [bool; KEY_BLOCK],
    /// Odd rows of scale·K, if there are any.
    pub(super) odd_scaled: Option<[bool; KEY_BLOCK]>,
}

/// How often a tile of so many rows asks for what comes.
fn shares(rows: usize) -> usize {
    rows.div_ceil(BLOCK) + 2
}

/// Some rows of a head against a block.
pub(super) struct Rows {
    pub(super) rows: Range<usize>,
    /// What they see of the block; not empty.
    pub(super) seen: Range<usize>,
    /// The steps of the block's keys that hold it.
    pub(super) steps: Range<usize>,
    /// The steps that 32 of them after 32 see.
    pub(super) own: [Range<usize>; ROWS / BLOCK],
    /// Their place among [`State::tiles`].
    pub(super) tile: usize,
    pub(super) odd: OddRows,
    /// Whether P and dS are packed as they are made.
    pub(super) packed: bool,
}

impl Rows {
    /// The rows, 32 at a time, and the steps that they see.
    #[inline(always)]
    pub(super) fn blocks(&self) -> impl Iterator<Item = (Range<usize>, &Range<usize>)> {
        let end = self.rows.end;
        let blocks = self.rows.clone().step_by(BLOCK).map(move |first| first..(first + BLOCK).min(end));
        blocks.zip(&self.own)
    }

    /// Which 32 of the rows see something of the step of keys: outside of them P and dS are zero there, or not even made.
    #[inline(always)]
    pub(super) fn seers(&self, step: usize) -> Range<usize> {
        let of = |own: &Range<usize>| own.contains(&step);
        let Some(first) = self.own.iter().position(of) else { return 0..0 };
        // What rows see moves with them, so those that see a key are neighbours.
        first..first + self.own[first..].iter().take_while(|own| of(own)).count()
    }

    /// Columns of the block in steps that are seen.
    pub(super) fn columns(&self) -> Range<usize> {
        self.steps.start * STEP..self.steps.end * STEP
    }
}

impl Backward<'_> {
    /// Some units of one cut.
    #[inline(always)]
    pub(super) fn run_on_tiles<S: Simd>(&self, simd: S, means: OnTiles, cut: Cut, units: Range<usize>) {
        if const { !may_have_tiles::<S>() } {
            unreachable!("no tile unit stands beside these vectors");
        }
        match means.parts {
            1 => self.run_in_parts::<S, 1>(simd, means, cut, units),
            _ => self.run_in_parts::<S, 2>(simd, means, cut, units),
        }
    }

    #[inline(always)]
    fn run_in_parts<S: Simd, const P: usize>(
        &self,
        simd: S,
        means: OnTiles,
        cut_into: Cut,
        units: Range<usize>,
    ) {
        let Shape { dim, v_dim, .. } = self.shape;
        let [of_dim, of_v] = [dim, v_dim].map(|dim| right_words(KEY_BLOCK, dim, P));
        let [across_dim, across_v] = [dim, v_dim].map(|dim| right_words(dim, KEY_BLOCK, P));
        // A tile of rows is as long as a block of keys, so operands over either have the same size.
        let square = right_words(KEY_BLOCK, KEY_BLOCK, P);
        let room = square.max(of_dim).max(of_v).max(across_dim).max(across_v);
        let tiles = self.tiles_that_come_again(cut_into);
        let of_tiles = Tiles::room(&self.shape, P, tiles);
        let lens =
            [across_dim, across_v, of_dim, of_tiles.0.iter().sum::<usize>() * of_tiles.1, room, room, square];
        let mut words = ScratchBuf::take(lens.iter().sum());
        let [keys, values, k, tiles, right, left, right_d_s] = cut(words.words_mut(), lens);
        let tiles = Tiles::new(tiles, of_tiles);
        let [of_k, of_v] = [dim, v_dim].map(|dim| dim.next_multiple_of(BLOCK) * KEY_BLOCK);
        let scores = ROWS * KEY_BLOCK;
        let delta = self.rows_of_region(cut_into);
        let lens =
            [scores, scores, of_k, of_v, of_k.max(of_v), ROWS * dim, ROWS * v_dim, KEY_BLOCK * dim, delta];
        let mut scratch = ScratchBuf::take(lens.iter().sum());
        let [p, d_s, d_k, d_v, sums, q_rows, d_out_rows, k_rows, delta] = cut(&mut scratch, lens);
        let unit = means.unit();
        let scores = Scores { p, d_s };
        let mut state = State {
            unit,
            keys,
            values,
            k,
            tiles,
            right,
            left,
            right_d_s,
            scores,
            q_rows,
            d_out_rows,
            k_rows,
            d_k,
            d_v,
            written: [false; KEY_BLOCK / BLOCK],
            sums,
            delta,
        };
        let mut regions = self.regions(cut_into, units).peekable();
        while let Some(region) = regions.next() {
            self.region_on_tiles::<S, P>(simd, (&region, regions.peek()), &mut state);
        }
    }

    #[inline(always)]
    fn region_on_tiles<S: Simd, const P: usize>(
        &self,
        simd: S,
        (region, after): (&Region, Option<&Region>),
        state: &mut State<'_>,
    ) {
        let Region { batch, parts, .. } = *region;
        let sight = self.spec.mask.sight(batch, self.shape.seq_k);
        let seen = self.open(region, ROWS);
        state.tiles.clear();
        let delta = std::mem::take(&mut state.delta);
        let rows = &region.rows;
        if !seen.is_empty() {
            for (head, delta) in region.heads.clone().zip(delta.chunks_exact_mut(rows.len())) {
                let d_out = self.d_out.head(region.batch, head).sub(rows.clone(), 0..self.shape.v_dim);
                self.deltas(simd, (region.batch, head), (rows, d_out), delta);
            }
        }
        let mut blocks = self.key_blocks(seen).peekable();
        while let Some(keys) = blocks.next() {
            let written = Parts { q: false, ..parts };
            let coming = self.coming(region, &keys, (Next::of(blocks.peek(), after), written));
            let tiles = region.heads.len() * rows.len().div_ceil(ROWS);
            let mut coming = Coming::new(coming, tiles * shares(rows.len().min(ROWS)));
            let block = self.block::<S, P>(simd, state, (region, sight), keys);
            for head in region.heads.clone() {
                let mut head = self.head(region, head, delta);
                let list = self.spec.mask.list(head.fixed.index);
                for rows in row_tiles(list, block.keys.start, region.rows.clone(), ROWS) {
                    let seen = sight.rows(&rows, &block.keys);
                    if !seen.is_empty() {
                        self.tile::<S, P>(simd, state, (&block, &mut coming), &mut head, (rows, seen));
                    }
                }
            }
            if parts.kv {
                self.write_keys(&block, state);
            }
        }
        state.delta = delta;
    }

    /// Packs a block, and begins its sums.
    #[inline(always)]
    fn block<'b, S: Simd, const P: usize>(
        &'b self,
        simd: S,
        state: &mut State<'_>,
        (region, sight): (&'b Region, Sight),
        keys: Range<usize>,
    ) -> Block<'b> {
        let k = self.saved.k.head(region.batch, region.kv).sub(keys.clone(), 0..self.shape.dim);
        let v = self.saved.v.head(region.batch, region.kv).sub(keys.clone(), 0..self.shape.v_dim);
        let odd = [false; KEY_BLOCK];
        let mut block = Block { region, keys, sight, k, v, odd_keys: odd, odd_values: odd, odd_scaled: None };
        on_tiles::pack_across::<P>(&state.unit, k, state.keys, &mut block.odd_keys);
        on_tiles::pack_across::<P>(&state.unit, v, state.values, &mut block.odd_values);
        if region.parts.q {
            let k = stage::scaled(simd, self.spec.scale, k, 0..k.rows(), state.k_rows);
            let mut odd = [false; KEY_BLOCK];
            on_tiles::pack_right::<P>(&state.unit, k, state.k, &mut odd);
            block.odd_scaled = odd.contains(&true).then_some(odd);
        }
        if region.parts.kv {
            state.written = [false; KEY_BLOCK / BLOCK];
        }
        block
    }

    /// All gradients that some rows of a head and a block give each other.
    #[inline(always)]
    fn tile<S: Simd, const P: usize>(
        &self,
        simd: S,
        state: &mut State<'_>,
        (block, coming): (&Block<'_>, &mut Coming<AFTER>),
        head: &mut Head<'_>,
        (rows, seen): (Range<usize>, Range<usize>),
    ) {
        let steps = steps_of(&seen, &block.keys);
        let room = Room { q: state.q_rows, d_out: state.d_out_rows, right: state.right };
        let (means, of) = ((simd, &state.unit), (block.region, &*head));
        let (tile, odd) = self.operands::<S, P>(means, &mut state.tiles, of, &rows, room);
        let own = std::array::from_fn(|i| {
            let some = rows.start + i * BLOCK..(rows.start + (i + 1) * BLOCK).min(rows.end);
            if some.is_empty() { 0..0 } else { steps_of(&block.sight.rows(&some, &block.keys), &block.keys) }
        });
        let mut rows = Rows { rows, seen, steps, own, tile, odd, packed: false };
        let proof = state.unit.conversion::<P>().filter(|_| self.is_plain(block, &rows.odd));
        rows.packed = proof.is_some();
        if let Some(d_q) = &head.d_q {
            // These sums are wanted when the five products are done.
            let first = rows.rows.start - head.fixed.first_row;
            (first..first + rows.rows.len()).for_each(|i| prefetch::row_for_later(d_q.as_ref().row(i)));
        }
        for (some, own) in rows.blocks() {
            coming.ask();
            match proof {
                Some(proof) => self.packed_weights::<P>(proof, state, (block, head), &rows, (&some, own)),
                None => self.weights::<S, P>(simd, state, (block, head), &rows, (some, own)),
            }
        }
        coming.ask();
        if block.region.parts.kv {
            self.keys_and_values::<S, P>(simd, state, block, &rows);
        }
        coming.ask();
        if block.region.parts.q {
            self.queries::<S, P>(simd, state, (block, head), &rows);
        }
    }

    /// Whether nothing of a tile is odd, added or dropped.
    #[inline(always)]
    fn is_plain(&self, block: &Block<'_>, odd: &OddRows) -> bool {
        self.spec.mask.takes_scores()
            && !block.region.parts.bias
            && block.odd_scaled.is_none()
            && ![&odd.q, &odd.d_out, &block.odd_keys, &block.odd_values].iter().any(|odd| odd.contains(&true))
    }

    /// P and dS of 32 rows of a plain tile, packed. Their products pass through the first 32 rows of the scores, so that they stay in the first-level cache.
    #[inline(always)]
    fn packed_weights<const P: usize>(
        &self,
        proof: Bf16Dots,
        state: &mut State<'_>,
        (block, head): (&Block<'_>, &Head<'_>),
        rows: &Rows,
        (some, own): (&Range<usize>, &Range<usize>),
    ) {
        if own.is_empty() {
            return;
        }
        self.products::<P>(state, block, rows, (some, own, 0));
        let HeadWeights { lse, delta, first_row, .. } = head.fixed;
        let made = conversion::Gradients {
            scores: state.scores.p,
            d_p: state.scores.d_s,
            lse: &lse[some.clone()],
            delta: &delta[some.start - first_row..some.end - first_row],
            seen: Seen { sight: block.sight, first_row: some.start, keys: &block.keys },
            steps: own,
            of_tile: &rows.steps,
            place: some.start - rows.rows.start,
            depth: rows.rows.len(),
            p: state.right,
            d_s: state.right_d_s,
            d_s_left: state.left,
        };
        made.make(proof);
    }

    /// P and dS of at most 32 rows of a tile; zero in columns of the tile's steps that they do not see.
    #[inline(always)]
    fn weights<S: Simd, const P: usize>(
        &self,
        simd: S,
        state: &mut State<'_>,
        (block, head): (&Block<'_>, &Head<'_>),
        rows: &Rows,
        (some, own): (Range<usize>, &Range<usize>),
    ) {
        let (keys, all) = (&block.keys, rows.columns());
        let local = some.start - rows.rows.start;
        if !own.is_empty() {
            self.products::<P>(state, block, rows, (&some, own, local));
        }
        let weights = Weights {
            problem: self,
            head: head.fixed,
            keys,
            stride: KEY_BLOCK,
            sight: block.sight,
            first: rows.rows.start,
            seen: &rows.seen,
        };
        for group in groups(&some) {
            let seen = block.sight.rows(&group, keys);
            let own = if seen.is_empty() {
                all.start..all.start
            } else {
                super::backward_weights::columns::<S>(&seen, keys)
            };
            if !seen.is_empty() {
                weights.make(simd, &mut state.scores, (group.clone(), &seen), block.region.parts.bias);
            }
            let first = (group.start - some.start + local) * KEY_BLOCK;
            for scores in [&mut *state.scores.p, &mut *state.scores.d_s] {
                for row in scores[first..].chunks_exact_mut(KEY_BLOCK).take(group.len()) {
                    row[all.start..own.start].fill(0.0);
                    row[own.end..all.end].fill(0.0);
                }
            }
        }
    }

    /// S and dP of at most 32 rows of a tile, over some steps of keys, to the scores from row `to` on.
    #[inline(always)]
    fn products<const P: usize>(
        &self,
        state: &mut State<'_>,
        block: &Block<'_>,
        rows: &Rows,
        (some, steps, to): (&Range<usize>, &Range<usize>, usize),
    ) {
        let Shape { dim, v_dim, .. } = self.shape;
        let local = some.start - rows.rows.start;
        let to = to * KEY_BLOCK;
        let of_tile = state.tiles.of(rows.tile);
        for panel in steps.clone() {
            let left = &of_tile.q[local / SIDE * left_words(SIDE, dim, P)..];
            let right = &state.keys[panel * right_words(dim, BLOCK, P)..];
            let deep = on_tiles::steps(dim);
            let operands = Operands { left, right, steps: deep, rows: some.len() };
            let s = &mut state.scores.p[to + panel * BLOCK..];
            product::<P>(&state.unit, operands, 0..deep, s, KEY_BLOCK);
            let d_p = &mut state.scores.d_s[to + panel * BLOCK..];
            if v_dim == 0 {
                d_p.chunks_mut(KEY_BLOCK).take(some.len()).for_each(|row| row[..BLOCK].fill(0.0));
                continue;
            }
            let left = &of_tile.d_out[local / SIDE * left_words(SIDE, v_dim, P)..];
            let right = &state.values[panel * right_words(v_dim, BLOCK, P)..];
            let deep = on_tiles::steps(v_dim);
            let operands = Operands { left, right, steps: deep, rows: some.len() };
            product::<P>(&state.unit, operands, 0..deep, d_p, KEY_BLOCK);
        }
        let odd = |odd: &[bool]| odd.contains(&true);
        if odd(&rows.odd.q) || odd(&rows.odd.d_out) || odd(&block.odd_keys) || odd(&block.odd_values) {
            self.mend(state, block, rows, (some, steps));
        }
    }

    /// Computes what odd rows of Q, K, dO and V make of S and dP by f32 multiply-adds.
    #[cold]
    fn mend(
        &self,
        state: &mut State<'_>,
        block: &Block<'_>,
        rows: &Rows,
        (some, steps): (&Range<usize>, &Range<usize>),
    ) {
        let Shape { dim, v_dim, .. } = self.shape;
        let columns = steps.start * STEP..(steps.end * STEP).min(block.keys.len());
        for local in some.start - rows.rows.start..some.end - rows.rows.start {
            let (q, d_out) =
                (&state.q_rows[local * dim..][..dim], &state.d_out_rows[local * v_dim..][..v_dim]);
            for j in columns.clone() {
                let (k, v) = (block.k.row(j).iter().copied(), block.v.row(j).iter().copied());
                if rows.odd.q[local] || block.odd_keys[j] {
                    state.scores.p[local * KEY_BLOCK + j] = on_tiles::chain(q.iter().copied(), k);
                }
                if rows.odd.d_out[local] || block.odd_values[j] {
                    state.scores.d_s[local * KEY_BLOCK + j] = on_tiles::chain(d_out.iter().copied(), v);
                }
            }
        }
    }
}
