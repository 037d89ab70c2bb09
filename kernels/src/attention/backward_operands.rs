//! The left operands of tiles of rows in the backward pass: scale·Q, dO and their transposes.
//!
//! ```text
//! for each block of keys:  for each tile of 128 rows:  Q, dO, Qᵀ, dOᵀ      packed for the first block that the tile meets, then held
//! ```
//! What is packed has as many bytes as the f32 that it is made of, so a later block reads no more than it would have read, and packs nothing: at 4,096 keys packing these had
//! taken a third of the time on AVX512-BF16. Up to [`HELD`] words are held, the tiles after those are packed for each block anew. Nothing is held where one block is all keys, and under
//! lists, whose tiles begin where a block's rows do.

use std::ops::Range;

use pulp::Simd;

use super::backward_tile::Head;
use super::backward_tiles::ROWS;
use super::flash_backward::Backward;
use super::on_tiles::{self, Unit, left_words};
use super::problem::{Shape, cut};
use super::regions::Region;
use super::stage;
use crate::gemm::microkernel::amx::{SIDE, TILE_WORDS};
use crate::view::MatRef;

/// Words of tiles that are held: 4 MiB, 8,192 rows of 64 + 64 elements in `Medium`.
const HELD: usize = 1 << 20;

/// The tiles of a region, and one more for those that are not held.
pub(super) struct Tiles<'a> {
    words: &'a mut [u32],
    /// Words of q, d_out and their transposes in one tile.
    lens: [usize; 4],
    /// Of the tiles that are held and packed: which of their rows are odd.
    packed: Vec<Option<OddRows>>,
}

/// Which rows of Q and dO are odd.
#[derive(Clone, Copy)]
pub(super) struct OddRows {
    pub(super) q: [bool; ROWS],
    pub(super) d_out: [bool; ROWS],
}

/// What one tile has.
pub(super) struct TileOperands<'a> {
    pub(super) q: &'a [u32],
    pub(super) d_out: &'a [u32],
    pub(super) q_across: &'a [u32],
    pub(super) d_out_across: &'a [u32],
}

/// Scratch for rows in f32 and for a right operand on its way to a left one.
pub(super) struct Room<'a> {
    pub(super) q: &'a mut [f32],
    pub(super) d_out: &'a mut [f32],
    pub(super) right: &'a mut [u32],
}

impl Tiles<'_> {
    /// Words of q, d_out and their transposes of one tile, and how many tiles there is room for, where the `tiles` of a region come again.
    pub(super) fn room(shape: &Shape, parts: usize, tiles: usize) -> ([usize; 4], usize) {
        let Shape { dim, v_dim, .. } = *shape;
        let [q, d_out] = [dim, v_dim].map(|dim| left_words(ROWS, dim, parts));
        let [q_across, d_out_across] = [dim, v_dim].map(|dim| left_words(dim, ROWS, parts));
        let lens = [q, d_out, q_across, d_out_across];
        (lens, tiles.min(HELD / lens.iter().sum::<usize>().max(1)) + 1)
    }

    /// Nothing is packed yet.
    pub(super) fn new(words: &mut [u32], (lens, tiles): ([usize; 4], usize)) -> Tiles<'_> {
        Tiles { words, lens, packed: vec![None; tiles - 1] }
    }

    /// Forgets what is packed, for another region.
    pub(super) fn clear(&mut self) {
        self.packed.fill(None);
    }

    /// Words of one tile.
    fn len(&self) -> usize {
        self.lens.iter().sum()
    }

    /// What tile `tile` has.
    #[inline(always)]
    pub(super) fn of(&self, tile: usize) -> TileOperands<'_> {
        let words = &self.words[tile * self.len()..];
        let (q, words) = words.split_at(self.lens[0]);
        let (d_out, words) = words.split_at(self.lens[1]);
        let (q_across, words) = words.split_at(self.lens[2]);
        TileOperands { q, d_out, q_across, d_out_across: &words[..self.lens[3]] }
    }
}

impl Backward<'_> {
    /// scale·Q and dO of the rows of a tile in f32, gapless.
    #[inline(always)]
    fn tile_rows<'r, S: Simd>(
        &self,
        simd: S,
        head: &Head<'_>,
        rows: &Range<usize>,
        (q, d_out): (&'r mut [f32], &'r mut [f32]),
    ) -> [MatRef<'r>; 2] {
        let q = stage::scaled(simd, self.spec.scale, head.q, rows.clone(), q);
        [q, stage::scaled(simd, 1.0, head.d_out, rows.clone(), d_out)]
    }

    /// Packs a tile, if it is not; where it lies, and its odd rows. `room` holds its rows in f32 afterwards where one of them is odd.
    #[inline(always)]
    pub(super) fn operands<S: Simd, const P: usize>(
        &self,
        means: (S, &Unit),
        tiles: &mut Tiles<'_>,
        (region, head): (&Region, &Head<'_>),
        rows: &Range<usize>,
        room: Room<'_>,
    ) -> (usize, OddRows) {
        let Shape { dim, v_dim, .. } = self.shape;
        let of_head = region.rows.len().div_ceil(ROWS);
        let index =
            (head.fixed.index - region.heads.start) * of_head + (rows.start - region.rows.start) / ROWS;
        let tile = index.min(tiles.packed.len());
        if let Some(odd) = tiles.packed.get(tile).copied().flatten() {
            if odd.q.contains(&true) || odd.d_out.contains(&true) {
                self.tile_rows(means.0, head, rows, (room.q, room.d_out));
            }
            return (tile, odd);
        }
        let [q, d_out] = self.tile_rows(means.0, head, rows, (room.q, room.d_out));
        let of_tile = tiles.len();
        let words = &mut tiles.words[tile * of_tile..][..of_tile];
        let [q_left, d_out_left, q_across, d_out_across] = cut(words, tiles.lens);
        let [mut of_q, mut of_d_out] = [[false; ROWS]; 2];
        on_tiles::pack_left::<P>(means.1, q, q_left, &mut of_q);
        on_tiles::pack_left::<P>(means.1, d_out, d_out_left, &mut of_d_out);
        if region.parts.kv {
            let deep = left_words(SIDE, rows.len(), P) / TILE_WORDS;
            for (rows, across, dim) in [(q, q_across, dim), (d_out, d_out_across, v_dim)] {
                on_tiles::pack_right::<P>(means.1, rows, room.right, &mut [false; ROWS]);
                on_tiles::turn_left(room.right, across, (dim, deep));
            }
        }
        let odd = OddRows { q: of_q, d_out: of_d_out };
        if let Some(packed) = tiles.packed.get_mut(tile) {
            *packed = Some(odd);
        }
        (tile, odd)
    }
}
