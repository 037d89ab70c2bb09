//! The rows that the backward pass holds while keys stream past: where they are brought to, and how many there are.
//!
//! ```text
//! hold:     scale·Q, dO, D of some rows of a head; room for dQ where its rows spread        release:  dQ to its place
//! ```

use std::ops::Range;

use pulp::Simd;

use super::backward_tile::Head;
use super::flash_backward::{Backward, TILE, tile_of};
use super::mask::Sight;
use super::problem::{HELD, Shape, even_parts};
use super::regions::Region;
use super::stage;
use crate::view::{MatMut, MatRef};

/// Of the rows that are held: scale·Q, dO, dQ and D.
pub(super) struct RowScratch<'a> {
    pub(super) q: &'a mut [f32],
    pub(super) d_out: &'a mut [f32],
    pub(super) d_q: &'a mut [f32],
    pub(super) delta: &'a mut [f32],
}

/// Some rows of one head, which are held while keys stream past.
pub(super) struct Held<'a> {
    pub(super) rows: Range<usize>,
    /// scale·Q.
    pub(super) q: MatRef<'a>,
    pub(super) d_out: MatRef<'a>,
    pub(super) head: Head<'a>,
    /// Where dQ goes in the end, when it is summed apart.
    pub(super) apart: Option<MatMut<'a>>,
    pub(super) sight: Sight,
    /// Nothing has been added to dK and dV before these heads.
    pub(super) fresh: bool,
}

impl Backward<'_> {
    /// The most rows that are held.
    pub(super) fn most_held(&self) -> usize {
        let Shape { dim, v_dim, .. } = self.shape;
        (HELD / (2 * dim + v_dim).max(1)).max(1) + TILE
    }

    /// Of so many rows of a head those that are held together: whole tiles.
    pub(super) fn held_rows(&self, rows: usize) -> usize {
        let Shape { dim, v_dim, .. } = self.shape;
        even_parts(rows, HELD / (2 * dim + v_dim).max(1), tile_of(rows))
    }

    /// Brings the rows of the one head of a region to where they are held.
    #[inline(always)]
    pub(super) fn hold<'a, S: Simd>(
        &'a self,
        simd: S,
        region: &Region,
        (sight, fresh): (Sight, bool),
        scratch: RowScratch<'a>,
    ) -> Held<'a> {
        let Shape { dim, v_dim, .. } = self.shape;
        let Region { batch, ref heads, ref rows, .. } = *region;
        let d_out = self.d_out.head(batch, heads.start).sub(rows.clone(), 0..v_dim);
        let d_out = stage::gather(simd, d_out, scratch.d_out);
        self.deltas(simd, (batch, heads.start), (rows, d_out), scratch.delta);
        let mut head = self.head(region, heads.start, scratch.delta);
        let q = stage::scaled(simd, self.spec.scale, head.q, rows.clone(), scratch.q);
        let several = self.key_blocks(region.keys.clone()).nth(1).is_some();
        let mut apart = None;
        if let Some(d_q) = head.d_q.take_if(|d_q| several && stage::spreads(d_q.as_ref())) {
            if self.spec.mask.blocks.is_some() {
                scratch.d_q.fill(0.0);
            }
            head.d_q = Some(MatMut::new(scratch.d_q, rows.len(), dim).expect("cut to rows × dim"));
            apart = Some(d_q);
        }
        Held { rows: rows.clone(), q, d_out, head, apart, sight, fresh }
    }

    /// Writes what was summed apart.
    #[inline(always)]
    pub(super) fn release(&self, held: Held<'_>, keys: &Range<usize>, tile: usize) {
        let Held { rows, head, apart, sight, .. } = held;
        let (Some(mut d_q), Some(held)) = (apart, &head.d_q) else { return };
        let dim = self.shape.dim;
        for tile in rows.clone().step_by(tile).map(|first| first..(first + tile).min(rows.end)) {
            if self.spec.mask.blocks.is_some() || !sight.rows(&tile, keys).is_empty() {
                let tile = tile.start - rows.start..tile.end - rows.start;
                stage::copy(held.as_ref().sub(tile.clone(), 0..dim), d_q.reborrow().sub(tile, 0..dim));
            }
        }
    }
}
