//! One tile of the backward pass: all gradients that some rows of a head and a block of keys give each other.
//!
//! The first tile that touches a place of dK, dV or dQ writes it, the later ones add: nothing is cleared
//! beforehand except what no tile touches.

use std::ops::Range;

use pulp::Simd;

use super::backward_weights::{HeadWeights, Scores, Weights, columns};
use super::chunk::groups;
use super::flash_backward::{AFTER, Backward, clear};
use super::mask::Sight;
use super::problem::Shape;
use super::stage::Coming;
use super::tile::{Dest, Extent, GROUP, Left, Onto, Right, dest, left, product, right};
use crate::view::{MatMut, MatRef};

/// The operands of one query head.
pub(super) struct Head<'a> {
    pub(super) fixed: HeadWeights<'a>,
    pub(super) q: MatRef<'a>,
    pub(super) d_out: MatRef<'a>,
    /// The region's rows, of which the first is `fixed.first_row`.
    pub(super) d_q: Option<MatMut<'a>>,
}

/// One block of keys.
pub(super) struct Block<'a> {
    pub(super) keys: Range<usize>,
    /// Columns of `kt` and `vt`, and of a tile's scores.
    pub(super) stride: usize,
    /// Kᵀ [dim, stride].
    pub(super) kt: &'a [f32],
    /// Vᵀ [v_dim, stride].
    pub(super) vt: &'a [f32],
    /// scale·K.
    pub(super) k: MatRef<'a>,
    pub(super) d_k: Option<MatMut<'a>>,
    pub(super) d_v: Option<MatMut<'a>>,
    pub(super) sight: Sight,
    /// No tile has written dK and dV yet.
    pub(super) fresh: bool,
}

impl Block<'_> {
    /// Zeros in dK and dV of these keys, counted from the block's first.
    #[inline(always)]
    fn clear(&mut self, keys: Range<usize>) {
        if keys.is_empty() {
            return;
        }
        for grad in [&mut self.d_k, &mut self.d_v].into_iter().flatten() {
            let cols = grad.cols();
            clear(&mut grad.reborrow().sub(keys.clone(), 0..cols));
        }
    }

    /// Zeros in dK and dV when no tile has seen the block.
    #[inline(always)]
    pub(super) fn clear_if_fresh(&mut self) {
        if self.fresh {
            self.clear(0..self.keys.len());
        }
    }
}

/// Some rows of a head against a block of keys.
pub(super) struct Tile<'t, 'h, 'b> {
    pub(super) problem: &'t Backward<'t>,
    pub(super) head: &'t mut Head<'h>,
    pub(super) block: &'t mut Block<'b>,
    pub(super) rows: Range<usize>,
    /// What the rows see of the block; not empty.
    pub(super) seen: Range<usize>,
    /// The rows of scale·Q.
    pub(super) q: MatRef<'t>,
    /// The rows of dO.
    pub(super) d_out: MatRef<'t>,
    pub(super) scores: Scores<'t>,
}

impl Tile<'_, '_, '_> {
    /// How often a tile of so many rows asks for what comes, against so many keys.
    pub(super) fn shares(rows: usize, keys: usize) -> usize {
        2 * rows.div_ceil(GROUP) + keys.div_ceil(GROUP)
    }

    /// All gradients that the tile gives; on the way asks for what comes.
    #[inline(always)]
    pub(super) fn run<S: Simd>(mut self, simd: S, bias: bool, coming: &mut Coming<AFTER>) {
        for rows in groups(&self.rows) {
            coming.ask();
            let seen = self.block.sight.rows(&rows, &self.block.keys);
            self.products(simd, &rows, &seen);
            let weights = Weights {
                problem: self.problem,
                head: self.head.fixed,
                keys: &self.block.keys,
                stride: self.block.stride,
                sight: self.block.sight,
                first: self.rows.start,
                seen: &self.seen,
            };
            weights.make(simd, &mut self.scores, (rows, &seen), bias);
        }
        if self.block.d_k.is_some() {
            self.keys_and_values(simd, coming);
        }
        if self.head.d_q.is_some() {
            self.queries(simd, coming);
        }
    }

    /// Q·Kᵀ and dO·Vᵀ of at most six rows, in the vectors that hold `seen`.
    #[inline(always)]
    fn products<S: Simd>(&mut self, simd: S, rows: &Range<usize>, seen: &Range<usize>) {
        let Shape { dim, v_dim, .. } = self.problem.shape;
        let columns = columns::<S>(seen, &self.block.keys);
        let stride = self.block.stride;
        let local = rows.start - self.rows.start;
        let p = &mut self.scores.p[local * stride..][..rows.len() * stride];
        let d_s = &mut self.scores.d_s[local * stride..][..rows.len() * stride];
        let of_q = Extent { rows: rows.len(), cols: columns.len(), depth: dim };
        let of_d_out = Extent { depth: v_dim, ..of_q };
        // SAFETY: q and dO have these rows of `dim` and `v_dim` elements; Kᵀ and Vᵀ have as many rows of `stride`
        // columns, which hold all columns; P and dS have been cut for these rows.
        unsafe {
            let k = Right::rows(self.block.kt.as_ptr().wrapping_add(columns.start), stride);
            let s = Dest { ptr: p.as_mut_ptr().wrapping_add(columns.start), stride };
            product(simd, of_q, left(self.q, local), k, s, Onto::Zero);
            let v = Right::rows(self.block.vt.as_ptr().wrapping_add(columns.start), stride);
            let d_p = Dest { ptr: d_s.as_mut_ptr().wrapping_add(columns.start), stride };
            product(simd, of_d_out, left(self.d_out, local), v, d_p, Onto::Zero);
        }
    }

    /// `dV += Pᵀ·dO` and `dK += dSᵀ·Q`, six keys at a time.
    #[inline(always)]
    fn keys_and_values<S: Simd>(&mut self, simd: S, coming: &mut Coming<AFTER>) {
        let Shape { dim, v_dim, .. } = self.problem.shape;
        let (stride, start) = (self.block.stride, self.block.keys.start);
        let onto = Onto::sum_if(!self.block.fresh);
        if self.block.fresh {
            self.block.fresh = false;
            self.block.clear(0..self.seen.start - start);
            self.block.clear(self.seen.end - start..self.block.keys.len());
        }
        let (Some(d_k), Some(d_v)) = (&mut self.block.d_k, &mut self.block.d_v) else { return };
        for keys in groups(&self.seen) {
            coming.ask();
            let rows = self.block.sight.seers(&keys, &self.rows);
            let first = rows.start.min(self.rows.end) - self.rows.start;
            let place = first * stride + keys.start - start;
            let of_v = Extent { rows: keys.len(), cols: v_dim, depth: rows.len() };
            let of_k = Extent { cols: dim, ..of_v };
            // SAFETY: P and dS hold these rows in all columns that the tile sees; q and dO have these rows; dK and
            // dV are views of the block's keys, of which these are some.
            unsafe {
                let p = Left { ptr: self.scores.p.as_ptr().wrapping_add(place), stride, across: true };
                product(simd, of_v, p, right(self.d_out, first), dest(d_v, keys.start - start), onto);
                let d_s = Left { ptr: self.scores.d_s.as_ptr().wrapping_add(place), ..p };
                product(simd, of_k, d_s, right(self.q, first), dest(d_k, keys.start - start), onto);
            }
        }
    }

    /// `dQ += dS·K`, six rows at a time.
    #[inline(always)]
    fn queries<S: Simd>(&mut self, simd: S, coming: &mut Coming<AFTER>) {
        let (stride, start) = (self.block.stride, self.block.keys.start);
        let add = self.problem.spec.mask.blocks.is_some()
            || self.block.sight.rows(&self.rows, &(0..self.block.keys.end)).start < start;
        let Some(d_q) = &mut self.head.d_q else { return };
        for rows in groups(&self.rows) {
            coming.ask();
            let keys = self.block.sight.rows(&rows, &self.block.keys);
            if keys.is_empty() && add {
                continue;
            }
            let place = (rows.start - self.rows.start) * stride + keys.start - start;
            let extent = Extent { rows: rows.len(), cols: self.problem.shape.dim, depth: keys.len() };
            // SAFETY: dS holds these rows in all columns that they see; the block's K has these keys; dQ is a view
            // of the region's rows, of which these are some.
            unsafe {
                let d_s = Left { ptr: self.scores.d_s.as_ptr().wrapping_add(place), stride, across: false };
                let k = right(self.block.k, keys.start - start);
                product(
                    simd,
                    extent,
                    d_s,
                    k,
                    dest(d_q, rows.start - self.head.fixed.first_row),
                    Onto::sum_if(add),
                );
            }
        }
    }
}
