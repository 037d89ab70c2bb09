//! The one product of this room: at most six rows of `C = A·B` or `C += A·B`, straight from strided memory.
//!
//! ```text
//! for r, c:  for k ascending:  C[r][c] = A[r][k]·B[k][c] + C[r][c]
//! ```
//!
//! Every element is one chain of fused multiply-adds in the order of `k`, begun at 0 or at C. So its bits
//! depend neither on the shape of the tile nor on how the depth is cut into calls; that is what makes a
//! decoded row equal the row of the full pass. A's element is broadcast, so A may be read along either
//! axis (P for P·V, Pᵀ for Pᵀ·dO); rows of B and C are contiguous. Columns that fill no vector are
//! loaded and stored under a mask, so that no operand needs a padded copy.

use pulp::{MemMask, Simd, WithSimd};

use crate::view::{MatMut, MatRef};

/// The most rows of one call: 6 rows × 2 vectors of accumulators, 2 vectors of B and 1 broadcast fill the
/// 16 registers of AVX2.
pub(super) const GROUP: usize = 6;

/// A: element (r, k) at `ptr + r·row + k·depth`.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) ptr: *const f32,
    pub(super) row: usize,
    pub(super) depth: usize,
}

/// B: element (k, c) at `ptr + k·stride + c`.
#[derive(Clone, Copy)]
pub(super) struct Right {
    pub(super) ptr: *const f32,
    pub(super) stride: usize,
}

/// C: element (r, c) at `ptr + r·stride + c`.
#[derive(Clone, Copy)]
pub(super) struct Dest {
    pub(super) ptr: *mut f32,
    pub(super) stride: usize,
}

/// `view` from row `first` on, to be read along its rows.
#[inline(always)]
pub(super) fn left(view: MatRef<'_>, first: usize) -> Left {
    Left { ptr: view.as_ptr().wrapping_add(first * view.row_stride()), row: view.row_stride(), depth: 1 }
}

/// `view` from row `first` on, as the right factor.
#[inline(always)]
pub(super) fn right(view: MatRef<'_>, first: usize) -> Right {
    Right { ptr: view.as_ptr().wrapping_add(first * view.row_stride()), stride: view.row_stride() }
}

/// `view` from row `first` on, to be written.
#[inline(always)]
pub(super) fn dest(view: &mut MatMut<'_>, first: usize) -> Dest {
    Dest { stride: view.row_stride(), ptr: view.as_mut_ptr().wrapping_add(first * view.row_stride()) }
}

/// `rows × cols` outputs, each a sum over `depth`.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) depth: usize,
}

/// `C = A·B`, or `C += A·B` when `add`.
///
/// # Safety
/// Every element that the extent names lies in memory that may be read (A, B) or written (C); C overlaps
/// neither A nor B.
#[inline(always)]
pub(super) unsafe fn product<S: Simd>(simd: S, extent: Extent, a: Left, b: Right, c: Dest, add: bool) {
    let Extent { rows, cols, depth } = extent;
    let mut first = 0;
    while first < rows {
        let height = (rows - first).min(GROUP);
        // SAFETY: row `first` is one of the rows that the caller vouches for.
        let (a, c) = unsafe {
            (Left { ptr: a.ptr.add(first * a.row), ..a }, Dest { ptr: c.ptr.add(first * c.stride), ..c })
        };
        // A call boundary: one compiled body for each height, shared by all products of the room.
        match height {
            1 => simd.vectorize(Group::<1> { cols, depth, a, b, c, add }),
            2 => simd.vectorize(Group::<2> { cols, depth, a, b, c, add }),
            3 => simd.vectorize(Group::<3> { cols, depth, a, b, c, add }),
            4 => simd.vectorize(Group::<4> { cols, depth, a, b, c, add }),
            5 => simd.vectorize(Group::<5> { cols, depth, a, b, c, add }),
            _ => simd.vectorize(Group::<GROUP> { cols, depth, a, b, c, add }),
        }
        first += height;
    }
}

/// One call of [`product`] with `MR` rows; made there only, under its safety contract.
struct Group<const MR: usize> {
    cols: usize,
    depth: usize,
    a: Left,
    b: Right,
    c: Dest,
    add: bool,
}

impl<const MR: usize> WithSimd for Group<MR> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut col = 0;
        // One or two rows of two vectors are too few chains to hide the latency of the multiply-add.
        if const { MR == 1 } {
            while col + 8 * S::F32_LANES <= self.cols {
                self.strip::<S, 8, false>(simd, col);
                col += 8 * S::F32_LANES;
            }
        }
        if const { MR <= 2 } {
            while col + 4 * S::F32_LANES <= self.cols {
                self.strip::<S, 4, false>(simd, col);
                col += 4 * S::F32_LANES;
            }
        }
        while col + 2 * S::F32_LANES <= self.cols {
            self.strip::<S, 2, false>(simd, col);
            col += 2 * S::F32_LANES;
        }
        let rest = self.cols - col;
        if rest > S::F32_LANES {
            self.strip::<S, 2, true>(simd, col);
        } else if rest == S::F32_LANES {
            self.strip::<S, 1, false>(simd, col);
        } else if rest > 0 {
            self.strip::<S, 1, true>(simd, col);
        }
    }
}

impl<const MR: usize> Group<MR> {
    /// The columns of `NV` vectors from `col` on; the last vector ends at `cols` when `TAIL`.
    #[inline(always)]
    fn strip<S: Simd, const NV: usize, const TAIL: bool>(&self, simd: S, col: usize) {
        let last = (self.cols - col).saturating_sub((NV - 1) * S::F32_LANES).min(S::F32_LANES);
        let mask = MemMask::new(simd.mask_between_m32s(0, last as u32).mask());
        let partial = |v: usize| TAIL && v + 1 == NV;
        let mut acc = [[simd.splat_f32s(0.0); NV]; MR];
        // SAFETY (all blocks): rows below MR, columns below `cols` and depths below `depth` are elements that
        // the caller of `product` vouches for; a vector that would pass `cols` is accessed under the mask.
        if self.add {
            for (r, acc) in acc.iter_mut().enumerate() {
                for (v, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: see above.
                    *acc = unsafe {
                        let at = self.c.ptr.add(r * self.c.stride + col + v * S::F32_LANES);
                        if partial(v) { simd.mask_load_ptr_f32s(mask, at) } else { load::<S>(at) }
                    };
                }
            }
        }
        let mut b_row = self.b.ptr.wrapping_add(col);
        let mut a_col = self.a.ptr;
        for _ in 0..self.depth {
            let mut b = [simd.splat_f32s(0.0); NV];
            for (v, b) in b.iter_mut().enumerate() {
                // SAFETY: see above.
                *b = unsafe {
                    let at = b_row.add(v * S::F32_LANES);
                    if partial(v) { simd.mask_load_ptr_f32s(mask, at) } else { load::<S>(at) }
                };
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                // SAFETY: see above.
                let a = simd.splat_f32s(unsafe { *a_col.add(r * self.a.row) });
                for (acc, b) in acc.iter_mut().zip(b) {
                    *acc = simd.mul_add_e_f32s(a, b, *acc);
                }
            }
            b_row = b_row.wrapping_add(self.b.stride);
            a_col = a_col.wrapping_add(self.a.depth);
        }
        for (r, acc) in acc.into_iter().enumerate() {
            for (v, acc) in acc.into_iter().enumerate() {
                // SAFETY: see above.
                unsafe {
                    let at = self.c.ptr.add(r * self.c.stride + col + v * S::F32_LANES);
                    if partial(v) {
                        simd.mask_store_ptr_f32s(mask, at, acc);
                    } else {
                        at.cast::<S::f32s>().write_unaligned(acc);
                    }
                }
            }
        }
    }
}

/// One vector from `at`.
///
/// # Safety
/// `at` points to a whole vector that may be read.
#[inline(always)]
unsafe fn load<S: Simd>(at: *const f32) -> S::f32s {
    // SAFETY: by the contract.
    unsafe { at.cast::<S::f32s>().read_unaligned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use crate::testing::{Guarded, assert_within, for_each_isa, gamma, uniform};

    struct Run<'a> {
        extent: Extent,
        a: MatRef<'a>,
        b: &'a [f32],
        c: &'a mut [f32],
        cut: usize,
    }

    impl WithSimd for Run<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let n = self.extent.cols;
            let mut done = 0;
            for depth in [self.cut, self.extent.depth - self.cut] {
                let a = Left {
                    ptr: self.a.as_ptr().wrapping_add(done * self.a.col_stride()),
                    row: self.a.row_stride(),
                    depth: self.a.col_stride(),
                };
                let b = Right { ptr: self.b.as_ptr().wrapping_add(done * n), stride: n };
                let c = Dest { ptr: self.c.as_mut_ptr(), stride: n };
                // SAFETY: the buffers below have exactly the extent's shape.
                unsafe { product(simd, Extent { depth, ..self.extent }, a, b, c, done > 0) };
                done += depth;
            }
        }
    }

    #[test]
    fn every_shape_every_cut_both_orders_of_a() {
        for_each_isa(|ctx| {
            for rows in [1, 2, 5, 6, 7, 13] {
                for cols in [1, 3, 8, 9, 15, 16, 17, 31, 32, 33, 40, 63, 64, 71, 129] {
                    for depth in [1, 2, 9] {
                        let a = uniform(rows * depth, 1);
                        let b = uniform(depth * cols, 2);
                        let b_view = MatRef::new(&b, depth, cols).unwrap();
                        let mut first: Option<Vec<f32>> = None;
                        for a_view in [
                            MatRef::new(&a, rows, depth).unwrap(),
                            MatRef::new(&transposed(&a, rows, depth), depth, rows).unwrap().t(),
                        ] {
                            for cut in [depth, depth / 2] {
                                if cut == 0 {
                                    continue;
                                }
                                let mut c = Guarded::poisoned(rows * cols);
                                let extent = Extent { rows, cols, depth };
                                ctx.isa().dispatch(Run { extent, a: a_view, b: &b, c: c.body_mut(), cut });
                                c.check();
                                let bound = reference::gemm_abs(a_view, b_view);
                                let expected = reference::gemm(a_view, b_view);
                                assert_within(c.body(), &expected, |i| gamma(2 * depth) * bound[i]);
                                let first = first.get_or_insert_with(|| c.body().to_vec());
                                assert_eq!(first, c.body(), "the chain does not depend on cut or layout");
                            }
                        }
                    }
                }
            }
        });
    }

    fn transposed(a: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        (0..rows * cols).map(|x| a[(x % rows) * cols + x / rows]).collect()
    }
}
