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
//!
//! A call asks for the rows of C below its own: gradients lie in the second- or third-level cache, each strip of six rows is a few hundred
//! cycles, and a fifth of them went into waiting for the sums to begin with.

use pulp::{MemMask, Simd, WithSimd};

use super::cache::PANEL;
use super::problem::even_parts;
use crate::gemm::microkernel::prefetch;
use crate::view::{MatMut, MatRef};

/// The most rows of one call: 6 rows × 2 vectors of accumulators, 2 vectors of B and 1 broadcast fill the
/// 16 registers of AVX2.
pub(super) const GROUP: usize = 6;

/// Steps of the depth that one turn of the innermost loop takes.
const UNROLL: usize = 4;

/// A: element (r, k) at `ptr + r·stride + k`, or at `ptr + r + k·stride` when it is read `across`.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) ptr: *const f32,
    pub(super) stride: usize,
    pub(super) across: bool,
}

impl Left {
    /// The same from row `first` on.
    #[inline(always)]
    fn rows_from(self, first: usize) -> Left {
        let step = if self.across { 1 } else { self.stride };
        Left { ptr: self.ptr.wrapping_add(first * step), ..self }
    }
}

/// B: element (k, c) at `ptr + k·stride + c`, or, of B in panels of [`PANEL`] columns, at `ptr + (c / PANEL)·panel + k·stride + c % PANEL`.
#[derive(Clone, Copy)]
pub(super) struct Right {
    ptr: *const f32,
    stride: usize,
    /// Elements from one panel to the next; [`PANEL`] where there are none.
    panel: usize,
}

impl Right {
    /// Rows `stride` apart.
    #[inline(always)]
    pub(super) fn rows(ptr: *const f32, stride: usize) -> Right {
        Right { ptr, stride, panel: PANEL }
    }

    /// Panels [depth, PANEL], one after the other.
    #[inline(always)]
    pub(super) fn panels(ptr: *const f32, depth: usize) -> Right {
        Right { ptr, stride: PANEL, panel: depth * PANEL }
    }

    /// Whether as many columns from one on that is a multiple of them may lie in two panels.
    #[inline(always)]
    fn parts(self, columns: usize) -> bool {
        columns > PANEL && self.panel != PANEL
    }

    /// Where column `col` begins.
    #[inline(always)]
    fn column(self, col: usize) -> *const f32 {
        self.ptr.wrapping_add(col / PANEL * self.panel + col % PANEL)
    }
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
    let stride = view.row_stride();
    Left { ptr: view.as_ptr().wrapping_add(first * stride), stride, across: false }
}

/// `view` from row `first` on, as the right factor.
#[inline(always)]
pub(super) fn right(view: MatRef<'_>, first: usize) -> Right {
    Right::rows(view.as_ptr().wrapping_add(first * view.row_stride()), view.row_stride())
}

/// `view` from row `first` on, to be written.
#[inline(always)]
pub(super) fn dest(view: &mut MatMut<'_>, first: usize) -> Dest {
    Dest { stride: view.row_stride(), ptr: view.as_mut_ptr().wrapping_add(first * view.row_stride()) }
}

/// What the sums begin with.
#[derive(Clone, Copy)]
pub(super) enum Onto {
    /// 0: C is only written.
    Zero,
    /// C.
    Sum,
    /// α·C, α being one number for each row.
    Scaled(*const f32),
}

impl Onto {
    /// C when `add`, else 0.
    #[inline(always)]
    pub(super) fn sum_if(add: bool) -> Onto {
        if add { Onto::Sum } else { Onto::Zero }
    }
}

/// `rows × cols` outputs, each a sum over `depth`.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) depth: usize,
}

/// `C = A·B` onto what `onto` says.
///
/// # Safety
/// Every element that the extent names lies in memory that may be read (A, B) or written (C); C overlaps
/// neither A nor B.
// Not inlined: its bodies would be compiled once more in every unit that calls it.
#[inline(never)]
pub(super) unsafe fn product<S: Simd>(simd: S, extent: Extent, a: Left, b: Right, c: Dest, onto: Onto) {
    let Extent { rows, cols, depth } = extent;
    // Equal heights: of 7 rows, 6 and 1 take 1.12 times as long as 4 and 3.
    let most = even_parts(rows, GROUP, 1);
    let mut first = 0;
    while first < rows {
        let height = (rows - first).min(most);
        let a = a.rows_from(first);
        let c = Dest { ptr: c.ptr.wrapping_add(first * c.stride), ..c };
        let onto = match onto {
            Onto::Scaled(alpha) => Onto::Scaled(alpha.wrapping_add(first)),
            other => other,
        };
        let call = Call { cols, depth, a, b, c, onto };
        // A call boundary: one compiled body for each height and order of A, shared by all products of the room.
        match (height, a.across) {
            (1, false) => simd.vectorize(Group::<1, false>(call)),
            (2, false) => simd.vectorize(Group::<2, false>(call)),
            (3, false) => simd.vectorize(Group::<3, false>(call)),
            (4, false) => simd.vectorize(Group::<4, false>(call)),
            (5, false) => simd.vectorize(Group::<5, false>(call)),
            (_, false) => simd.vectorize(Group::<GROUP, false>(call)),
            (1, true) => simd.vectorize(Group::<1, true>(call)),
            (2, true) => simd.vectorize(Group::<2, true>(call)),
            (3, true) => simd.vectorize(Group::<3, true>(call)),
            (4, true) => simd.vectorize(Group::<4, true>(call)),
            (5, true) => simd.vectorize(Group::<5, true>(call)),
            (_, true) => simd.vectorize(Group::<GROUP, true>(call)),
        }
        first += height;
    }
}

/// Some rows of [`product`]; made there only, under its safety contract.
#[derive(Clone, Copy)]
struct Call {
    cols: usize,
    depth: usize,
    a: Left,
    b: Right,
    c: Dest,
    onto: Onto,
}

/// Where the innermost loop stands: the element of each row of A, and the row of B.
struct Place<const MR: usize> {
    a: [*const f32; MR],
    b: *const f32,
}

/// A call with `MR` rows, whose A is read `ACROSS` or along its rows.
struct Group<const MR: usize, const ACROSS: bool>(Call);

impl<const MR: usize, const ACROSS: bool> WithSimd for Group<MR, ACROSS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let cols = self.0.cols;
        let mut col = 0;
        // One or two rows of two vectors are too few chains to hide the latency of the multiply-add.
        if const { MR == 1 } {
            while col + 8 * S::F32_LANES <= cols && !self.0.b.parts(8 * S::F32_LANES) {
                self.strip::<S, 8, false>(simd, col);
                col += 8 * S::F32_LANES;
            }
        }
        // Where 32 registers hold the sums of six rows of four vectors, they need 10 loads a step where two strips of two vectors need 16.
        if const { MR <= 2 || S::F32_LANES == 16 } {
            while col + 4 * S::F32_LANES <= cols {
                self.strip::<S, 4, false>(simd, col);
                col += 4 * S::F32_LANES;
            }
        }
        while col + 2 * S::F32_LANES <= cols {
            self.strip::<S, 2, false>(simd, col);
            col += 2 * S::F32_LANES;
        }
        let rest = cols - col;
        if rest > S::F32_LANES {
            self.strip::<S, 2, true>(simd, col);
        } else if rest == S::F32_LANES {
            self.strip::<S, 1, false>(simd, col);
        } else if rest > 0 {
            self.strip::<S, 1, true>(simd, col);
        }
    }
}

impl<const MR: usize, const ACROSS: bool> Group<MR, ACROSS> {
    /// The columns of `NV` vectors from `col` on; the last vector ends at `cols` when `TAIL`.
    #[inline(always)]
    fn strip<S: Simd, const NV: usize, const TAIL: bool>(&self, simd: S, col: usize) {
        let Call { cols, depth, a, b, c, onto } = self.0;
        let last = (cols - col).saturating_sub((NV - 1) * S::F32_LANES).min(S::F32_LANES);
        let mask = MemMask::new(simd.mask_between_m32s(0, last as u32).mask());
        let partial = |v: usize| TAIL && v + 1 == NV;
        let mut acc = [[simd.splat_f32s(0.0); NV]; MR];
        if const { MR == GROUP } && !matches!(onto, Onto::Zero) {
            // The rows that the next call adds to: left to the hardware, its sums would wait for them.
            for r in MR..2 * MR {
                prefetch::line(c.ptr.wrapping_add(r * c.stride + col));
            }
        }
        // SAFETY (all blocks): rows below MR, columns below `cols` and depths below `depth` are elements that
        // the caller of `product` vouches for; a vector that would pass `cols` is accessed under the mask.
        if !matches!(onto, Onto::Zero) {
            for (r, acc) in acc.iter_mut().enumerate() {
                for (v, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: see above.
                    *acc = unsafe {
                        let at = c.ptr.add(r * c.stride + col + v * S::F32_LANES);
                        if partial(v) { simd.mask_load_ptr_f32s(mask, at) } else { load::<S>(at) }
                    };
                }
            }
        }
        if let Onto::Scaled(alpha) = onto {
            for (r, acc) in acc.iter_mut().enumerate() {
                // SAFETY: α has a number for each row.
                let alpha = simd.splat_f32s(unsafe { *alpha.add(r) });
                for acc in acc {
                    *acc = simd.mul_f32s(*acc, alpha);
                }
            }
        }
        let mut at = Place { a: std::array::from_fn(|r| a.rows_from(r).ptr), b: b.column(col) };
        // One row is bound by reading B: unrolled, the compiler orders four steps by columns, and no prefetcher follows.
        let unrolled = if const { MR == 1 } { 0 } else { depth / UNROLL };
        for _ in 0..unrolled {
            self.steps::<S, NV, UNROLL>(simd, &mut at, &mut acc, TAIL.then_some(mask));
        }
        for _ in unrolled * UNROLL..depth {
            self.steps::<S, NV, 1>(simd, &mut at, &mut acc, TAIL.then_some(mask));
        }
        for (r, acc) in acc.into_iter().enumerate() {
            for (v, acc) in acc.into_iter().enumerate() {
                // SAFETY: see above.
                unsafe {
                    let at = c.ptr.add(r * c.stride + col + v * S::F32_LANES);
                    if partial(v) {
                        simd.mask_store_ptr_f32s(mask, at, acc);
                    } else {
                        at.cast::<S::f32s>().write_unaligned(acc);
                    }
                }
            }
        }
    }

    /// `STEPS` steps of the depth: `acc[r][v] += A[r][k]·B[k][v]`.
    #[inline(always)]
    fn steps<S: Simd, const NV: usize, const STEPS: usize>(
        &self,
        simd: S,
        at: &mut Place<MR>,
        acc: &mut [[S::f32s; NV]; MR],
        tail: Option<MemMask<S::m32s>>,
    ) {
        let Call { a: Left { stride: a_stride, .. }, b: Right { stride: b_stride, .. }, .. } = self.0;
        for k in 0..STEPS {
            let mut b = [simd.splat_f32s(0.0); NV];
            for (v, b) in b.iter_mut().enumerate() {
                // SAFETY: as in `strip`.
                *b = unsafe {
                    let at = at.b.add(k * b_stride + v * S::F32_LANES);
                    match tail {
                        Some(mask) if v + 1 == NV => simd.mask_load_ptr_f32s(mask, at),
                        _ => load::<S>(at),
                    }
                };
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                // SAFETY: as in `strip`.
                let a = simd.splat_f32s(unsafe {
                    if ACROSS { *at.a[0].add(k * a_stride + r) } else { *at.a[r].add(k) }
                });
                for (acc, b) in acc.iter_mut().zip(b) {
                    *acc = simd.mul_add_e_f32s(a, b, *acc);
                }
            }
        }
        at.b = at.b.wrapping_add(STEPS * b_stride);
        let a_step = if ACROSS { STEPS * a_stride } else { STEPS };
        at.a = at.a.map(|a| a.wrapping_add(a_step));
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
                let across = self.a.row_stride() == 1 && self.a.col_stride() > 1;
                let stride = if across { self.a.col_stride() } else { self.a.row_stride() };
                let ptr = self.a.as_ptr().wrapping_add(done * self.a.col_stride());
                let a = Left { ptr, stride, across };
                let b = Right::rows(self.b.as_ptr().wrapping_add(done * n), n);
                let c = Dest { ptr: self.c.as_mut_ptr(), stride: n };
                // SAFETY: the buffers below have exactly the extent's shape.
                unsafe { product(simd, Extent { depth, ..self.extent }, a, b, c, Onto::sum_if(done > 0)) };
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
