//! The loops around the microkernel, for one thread's part of C.
//!
//! ```text
//! for jc in 0..n step nc                    a block of B fits L3
//!   for pc in 0..k step kc                  K is summed block by block, in order
//!     for ic in 0..m step mc                a block of A fits L2
//!       for jr in jc..jc+nc step NR         a panel of B fits L1
//!         for ir in ic..ic+mc step MR       inside the microkernel's strip
//! ```
//! It is the picture of GotoBLAS with these deviations: a panel of B is packed just before its first
//! use (so it is still in L1 then), a row-major A is read in place, and the last loop belongs to
//! the microkernel, which saves a call for each tile.

use std::ops::Range;

use pulp::Simd;

use super::epilogue::{Accum, Epilogue};
use super::microkernel::{Finish, KernelVisitor, Lhs, Microkernel, Out, Rhs, Strip};
use super::pack::{Source, pack_panel};
use crate::context::Blocking;
use crate::scratch::ScratchBuf;
use crate::view::MatRef;

/// The right operand: as the caller has it, or packed beforehand.
#[derive(Clone, Copy)]
pub(super) enum RightOperand<'a> {
    Plain(MatRef<'a>),
    Packed(&'a [f32]),
}

/// One product with checked shapes; every task sees the whole of it.
#[derive(Clone, Copy)]
pub(super) struct Problem<'a> {
    pub(super) a: MatRef<'a>,
    pub(super) b: RightOperand<'a>,
    pub(super) n: usize,
    pub(super) c: Out<f32>,
    pub(super) accum: Accum,
    pub(super) epilogue: Epilogue<'a>,
    /// `kc` is the depth of the blocks of K; `mc` and `nc` are in whole tiles.
    pub(super) blocking: Blocking,
}

// SAFETY: `c` is the only part that is not Sync by itself; tasks write disjoint parts of it.
unsafe impl Sync for Problem<'_> {}

/// One task: this part of C.
pub(super) struct Part<'a> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
}

/// Columns of a packed B of `n` columns: the last panel is filled up to whole vectors.
pub(super) fn packed_cols(n: usize, lanes: usize) -> usize {
    n.next_multiple_of(lanes)
}

impl KernelVisitor for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn visit<K: Microkernel<Lhs = f32, Rhs = f32, Out = f32>>(self, kernel: K) {
        let Part { problem, rows, cols } = self;
        let Blocking { mc, kc, nc } = problem.blocking;
        let k = problem.a.cols();
        debug_assert!(kc >= k || kc.is_multiple_of(K::K_STEP));
        let mut b_block = match problem.b {
            RightOperand::Plain(_) => {
                let lanes = <K::Simd as Simd>::F32_LANES;
                ScratchBuf::take(kc.min(k) * packed_cols(nc.min(cols.len()), lanes))
            }
            RightOperand::Packed(_) => ScratchBuf::take(0),
        };
        let mut a_block = if reads_in_place(&problem.a) {
            ScratchBuf::take(0)
        } else {
            ScratchBuf::take(kc.min(k) * mc.min(rows.len()).next_multiple_of(K::MR))
        };
        for jc in cols.clone().step_by(nc) {
            let block_cols = jc..(jc + nc).min(cols.end);
            for pc in (0..k.max(1)).step_by(kc) {
                let depth = pc..(pc + kc).min(k);
                for ic in rows.clone().step_by(mc) {
                    let block_rows = ic..(ic + mc).min(rows.end);
                    let lhs = left_block(kernel, problem, block_rows.clone(), depth.clone(), &mut a_block);
                    let block =
                        Block { problem, rows: block_rows, cols: block_cols.clone(), depth: depth.clone() };
                    block.run(kernel, lhs, &mut b_block, ic == rows.start);
                }
            }
        }
    }
}

/// Whether the kernel can read A where it is.
fn reads_in_place(a: &MatRef<'_>) -> bool {
    a.col_stride() == 1 || a.cols() <= 1
}

/// The block of A as the kernel reads it: in place, or packed into `scratch`.
#[inline(always)]
fn left_block<K: Microkernel<Lhs = f32>>(
    kernel: K,
    problem: &Problem<'_>,
    rows: Range<usize>,
    depth: Range<usize>,
    scratch: &mut [f32],
) -> Lhs<f32> {
    let block = problem.a.sub(rows, depth);
    if reads_in_place(&problem.a) {
        let row_stride = block.row_stride();
        return Lhs { ptr: block.as_ptr(), tile_stride: K::MR * row_stride, row_stride, depth_stride: 1 };
    }
    let (rows, depth) = (block.rows(), block.cols());
    for first in (0..rows).step_by(K::MR) {
        let tile = block.sub(first..(first + K::MR).min(rows), 0..depth);
        let source =
            Source { ptr: tile.as_ptr(), depth_stride: tile.col_stride(), lane_stride: tile.row_stride() };
        let packed = &mut scratch[first * depth..(first + K::MR) * depth];
        // SAFETY: the source is the view `tile`.
        unsafe { pack_panel(kernel.simd(), source, depth, tile.rows(), packed, K::MR) };
    }
    Lhs { ptr: scratch.as_ptr(), tile_stride: K::MR * depth, row_stride: 1, depth_stride: K::MR }
}

/// The two innermost loops: one block of A times one block of B.
struct Block<'a> {
    problem: &'a Problem<'a>,
    rows: Range<usize>,
    cols: Range<usize>,
    depth: Range<usize>,
}

impl Block<'_> {
    #[inline(always)]
    fn run<K: Microkernel<Lhs = f32, Rhs = f32, Out = f32>>(
        &self,
        kernel: K,
        lhs: Lhs<f32>,
        b_block: &mut [f32],
        pack: bool,
    ) {
        let depth = self.depth.len();
        for first in self.cols.clone().step_by(K::NR) {
            let cols = first..(first + K::NR).min(self.cols.end);
            let width = packed_cols(cols.len(), <K::Simd as Simd>::F32_LANES);
            let panel = match self.problem.b {
                RightOperand::Plain(b) => {
                    let at = (first - self.cols.start) * depth;
                    let panel = &mut b_block[at..at + width * depth];
                    if pack {
                        let b = b.sub(self.depth.clone(), cols.clone());
                        let source = Source {
                            ptr: b.as_ptr(),
                            depth_stride: b.row_stride(),
                            lane_stride: b.col_stride(),
                        };
                        // SAFETY: the source is the view `b`.
                        unsafe { pack_panel(kernel.simd(), source, depth, cols.len(), panel, width) };
                    }
                    &*panel
                }
                RightOperand::Packed(packed) => {
                    let n = packed_cols(self.problem.n, <K::Simd as Simd>::F32_LANES);
                    let at = self.depth.start * n + first * depth;
                    &packed[at..at + width * depth]
                }
            };
            let rhs = Rhs { ptr: panel.as_ptr(), depth_stride: width };
            let strip = self.strip(cols, lhs, rhs);
            // SAFETY: `lhs` and `rhs` are packed panels of this block or views of it; this task alone
            // writes these rows and columns of C, and the driver checked the shapes of the epilogue.
            unsafe { kernel.run(&strip) };
        }
    }

    #[inline(always)]
    fn strip<K: Microkernel<Lhs = f32, Rhs = f32, Out = f32>>(
        &self,
        cols: Range<usize>,
        lhs: Lhs<f32>,
        rhs: Rhs<f32>,
    ) -> Strip<'_, K> {
        let Problem { a, c, accum, epilogue, .. } = self.problem;
        let last = self.depth.end == a.cols();
        let offset = self.rows.start * c.row_stride + cols.start * c.col_stride;
        Strip {
            rows: self.rows.len(),
            cols: cols.len(),
            depth: self.depth.len(),
            lhs,
            rhs,
            out: Out { ptr: c.ptr.wrapping_add(offset), ..*c },
            finish: Finish {
                scale: epilogue.scale,
                add: self.depth.start > 0 || *accum == Accum::Add,
                bias: epilogue.bias.filter(|_| last).map(|bias| &bias[cols.clone()]),
                activation: if last { epilogue.activation } else { Default::default() },
                residual: epilogue.residual.filter(|_| last).map(|r| r.sub(self.rows.clone(), cols)),
            },
        }
    }
}
