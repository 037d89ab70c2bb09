//! The loops around the microkernel, for one thread's part of C.
//!
//! ```text
//! for jc in 0..n step nc                    a block of B fits L3
//!   for pc in 0..k step kc                  K is summed block by block, in order
//!     for ic in 0..m step mc                a block of A fits L2
//!       for jr in jc..jc+nc step NR         a panel of B fits L1
//!         for ir in ic..ic+mc step MR       inside the microkernel's strip
//! ```
//! It is the picture of GotoBLAS with these deviations: for few rows panels of B are packed just before their first
//! use (so they are still in L1 or L2 then), a row-major A is read in place, and the last loop belongs to
//! the microkernel, which saves a call for each tile.

use std::ops::Range;

use pulp::Simd;

use super::epilogue::{Accum, Epilogue};
use super::microkernel::{Finish, KernelInfo, KernelVisitor, Lhs, Microkernel, Out, Rhs, Strip};
use super::pack::{Source, pack_panel, pack_panels, packed_at_once};
use super::packed::PackedWeights;
use super::placement::{self, Left};
use crate::context::Blocking;
use crate::scratch::ScratchBuf;
use crate::view::MatRef;

/// The right operand: as the caller has it, or packed beforehand.
#[derive(Clone, Copy)]
pub(super) enum RightOperand<'a> {
    Plain(MatRef<'a>),
    Packed(&'a PackedWeights),
}

impl RightOperand<'_> {
    pub(super) fn rows(&self) -> usize {
        match self {
            RightOperand::Plain(b) => b.rows(),
            RightOperand::Packed(b) => b.rows(),
        }
    }

    pub(super) fn cols(&self) -> usize {
        match self {
            RightOperand::Plain(b) => b.cols(),
            RightOperand::Packed(b) => b.cols(),
        }
    }
}

/// One product with checked shapes; every task sees the whole of it.
#[derive(Clone, Copy)]
pub(super) struct Problem<'a, A = f32> {
    /// The kernel of the context's ISA for a B that is stored so.
    pub(super) kernel: &'static KernelInfo,
    pub(super) a: MatRef<'a, A>,
    pub(super) b: RightOperand<'a>,
    pub(super) n: usize,
    pub(super) c: Out<f32>,
    pub(super) accum: Accum,
    pub(super) epilogue: Epilogue<'a>,
    /// `kc` is the depth of the blocks of K; `mc` and `nc` are in whole tiles.
    pub(super) blocking: Blocking,
}

impl<'a, A> Problem<'a, A> {
    /// C from element (`row`, `col`) on.
    #[inline(always)]
    pub(super) fn out(&self, row: usize, col: usize) -> Out<f32> {
        self.c.from(row, col)
    }

    /// What is done to the sums of these rows and columns over that block of K.
    #[inline(always)]
    pub(super) fn finish(&self, rows: Range<usize>, cols: Range<usize>, depth: Range<usize>) -> Finish<'a> {
        let add = depth.start > 0 || self.accum == Accum::Add;
        self.epilogue.finish(rows, cols, (add, depth.end == self.a.cols()))
    }

    /// Whether C is the sums and nothing else.
    #[inline(always)]
    pub(super) fn is_plain(&self) -> bool {
        self.accum == Accum::Overwrite && self.epilogue.is_plain()
    }

    /// The same where the sums are over all of K.
    #[inline(always)]
    pub(super) fn finish_all(&self, rows: Range<usize>, cols: Range<usize>) -> Finish<'a> {
        self.epilogue.finish(rows, cols, (self.accum == Accum::Add, true))
    }
}

// SAFETY: `c` is the only part that is not Sync by itself; tasks write disjoint parts of it.
unsafe impl<A: Sync> Sync for Problem<'_, A> {}

/// One task: this part of C.
pub(super) struct Part<'a, A = f32> {
    pub(super) problem: &'a Problem<'a, A>,
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
    fn visit<K: Microkernel<Lhs = f32, Out = f32>>(self, kernel: K) {
        let Part { problem, ref rows, ref cols } = self;
        debug_assert_eq!(K::NAME, problem.kernel.name);
        let Blocking { mc, kc, nc } = problem.blocking;
        let k = problem.a.cols();
        let left = placement::left::<K>(&problem.a, cols.len());
        let depth = kc.min(k);
        let (right_in_place, b_cols) = self.right::<K>();
        let mut a_block = (left != Left::InPlace)
            .then(|| ScratchBuf::take(depth * mc.min(rows.len()).next_multiple_of(K::MR)));
        let mut b_block = (b_cols > 0).then(|| ScratchBuf::take(depth * b_cols));
        for jc in cols.clone().step_by(nc) {
            let block_cols = jc..(jc + nc).min(cols.end);
            for pc in (0..k.max(1)).step_by(kc) {
                let depth = pc..(pc + kc).min(k);
                for ic in rows.clone().step_by(mc) {
                    let block_rows = ic..(ic + mc).min(rows.end);
                    let a = problem.a.sub(block_rows.clone(), depth.clone());
                    let lhs = left_block::<K>(a, left, a_block.as_deref_mut().unwrap_or_default());
                    let block = Block {
                        problem,
                        rows: block_rows,
                        cols: block_cols.clone(),
                        depth: depth.clone(),
                        right_in_place,
                    };
                    block.run(kernel, lhs, b_block.as_deref_mut().unwrap_or_default(), ic == rows.start);
                }
            }
        }
    }
}

impl Part<'_> {
    /// Whether B is read in place, and how many columns of it are packed at a time.
    #[inline(always)]
    fn right<K: Microkernel>(&self) -> (bool, usize) {
        let lanes = <K::Simd as Simd>::F32_LANES;
        let Blocking { kc, nc, .. } = self.problem.blocking;
        let (rows, cols) = (self.rows.len(), self.cols.len());
        match self.problem.b {
            RightOperand::Packed(_) => (true, 0),
            RightOperand::Plain(b) if placement::right_in_place::<K>(&b, kc.min(b.rows()), rows) => {
                // A vector that reaches beyond the last column cannot be loaded: its panel is packed.
                (true, if cols.is_multiple_of(lanes) { 0 } else { K::NR })
            }
            RightOperand::Plain(_) => (false, packed_cols(nc.min(cols), lanes)),
        }
    }
}

/// A block of A as the kernel reads it: in place, or from `scratch`.
#[inline(always)]
fn left_block<K: Microkernel<Lhs = f32>>(a: MatRef<'_>, left: Left, scratch: &mut [f32]) -> Lhs<f32> {
    let (rows, depth) = (a.rows(), a.cols());
    match left {
        Left::InPlace => Lhs {
            ptr: a.as_ptr(),
            tile_stride: K::MR * a.row_stride(),
            row_stride: a.row_stride(),
            depth_stride: a.col_stride(),
        },
        Left::Rows => {
            // SAFETY: the source is the view `a`, its rows as the depth.
            unsafe { pack_panel(Source::of(&a), rows, depth, &mut scratch[..rows * depth], depth) };
            Lhs { ptr: scratch.as_ptr(), tile_stride: K::MR * depth, row_stride: depth, depth_stride: 1 }
        }
        Left::Tiles => {
            let (tiles, packed) = (a.t(), &mut scratch[..rows.next_multiple_of(K::MR) * depth]);
            // SAFETY: the source is the view `tiles`.
            unsafe { pack_panels(Source::of(&tiles), depth, rows, packed, (K::MR, K::MR)) };
            Lhs { ptr: scratch.as_ptr(), tile_stride: K::MR * depth, row_stride: 1, depth_stride: K::MR }
        }
    }
}

/// The two innermost loops: one block of A times one block of B.
struct Block<'a> {
    problem: &'a Problem<'a>,
    rows: Range<usize>,
    cols: Range<usize>,
    depth: Range<usize>,
    right_in_place: bool,
}

impl Block<'_> {
    #[inline(always)]
    fn run<K: Microkernel<Lhs = f32, Out = f32>>(
        &self,
        kernel: K,
        lhs: Lhs<f32>,
        b_block: &mut [f32],
        pack: bool,
    ) {
        let mut first = self.cols.start;
        while first < self.cols.end {
            let cols = first..self.strip_end::<K>(first);
            first = cols.end;
            let rhs = self.panel::<K>(cols.clone(), b_block, pack);
            let strip = self.strip(cols, lhs, rhs);
            // SAFETY: `lhs` and `rhs` are packed panels of this block or views of it; this task alone
            // writes these rows and columns of C, and the driver checked the shapes of the epilogue.
            unsafe { kernel.run(&strip) };
        }
    }

    /// Where the strip from column `first` on ends: after one panel; or, for few rows over panels that lie ready,
    /// after the last whole one.
    #[inline(always)]
    fn strip_end<K: Microkernel>(&self, first: usize) -> usize {
        let whole = (self.cols.end - first) / K::NR;
        let several = self.right_in_place && self.rows.len() <= K::THIN_ROWS;
        match if several { whole } else { whole.min(1) } {
            0 => self.cols.end,
            panels => first + panels * K::NR,
        }
    }

    /// The panel (or panels) of B with these columns: where they are, or from `b_block`, packed now if `pack` says so.
    #[inline(always)]
    fn panel<K: Microkernel>(&self, cols: Range<usize>, b_block: &mut [f32], pack: bool) -> Rhs {
        let (depth, lanes) = (self.depth.len(), <K::Simd as Simd>::F32_LANES);
        let width = packed_cols(cols.len(), lanes);
        let b = match self.problem.b {
            RightOperand::Plain(b) => b,
            RightOperand::Packed(packed) => return packed.panels(self.depth.clone(), cols),
        };
        if self.right_in_place && width == cols.len() {
            let panel = b.sub(self.depth.clone(), cols);
            let (ptr, depth_stride) = (panel.as_ptr().cast(), panel.row_stride());
            return Rhs { ptr, depth_stride, panel_stride: K::NR, group: depth, far: false };
        }
        // Read in place, only the last panel of all can have a partial vector: it has the buffer alone.
        let offset = if self.right_in_place { 0 } else { cols.start - self.cols.start };
        let at_once = packed_at_once(self.rows.len(), self.cols.len(), K::NR);
        if pack && (self.right_in_place || offset.is_multiple_of(at_once)) {
            let group = cols.start..(cols.start + at_once).min(self.cols.end);
            let b = b.sub(self.depth.clone(), group.clone());
            let packed = &mut b_block[offset * depth..(offset + packed_cols(group.len(), lanes)) * depth];
            // SAFETY: the source is the view `b`.
            unsafe { pack_panels(Source::of(&b), depth, group.len(), packed, (K::NR, lanes)) };
        }
        // Packed just now, a panel is in a near cache; else it is where the whole block is.
        let near = pack && at_once < self.cols.len();
        let far = !near && width == K::NR && placement::lies_far(size_of_val(b_block));
        let ptr = b_block[offset * depth..(offset + width) * depth].as_ptr().cast();
        Rhs { ptr, depth_stride: width.min(K::NR), panel_stride: K::NR * depth, group: depth, far }
    }

    #[inline(always)]
    fn strip<K: Microkernel<Lhs = f32, Out = f32>>(
        &self,
        cols: Range<usize>,
        lhs: Lhs<f32>,
        rhs: Rhs,
    ) -> Strip<'_, K> {
        let finish = self.problem.finish(self.rows.clone(), cols.clone(), self.depth.clone());
        Strip {
            rows: self.rows.len(),
            cols: cols.len(),
            depth: self.depth.len(),
            lhs,
            rhs,
            out: self.problem.out(self.rows.start, cols.start),
            finish,
        }
    }
}
