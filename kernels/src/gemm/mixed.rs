//! Products with a bf16 matrix among A, B and C, around the kernels in f32.
//!
//! ```text
//! pack B, unless it is packed                  bf16 stays bf16: half the bytes to read
//! for each block of rows:
//!   widen the rows of A                        once, into the second-level cache
//!   for each block of columns:
//!     a block of C in f32, its epilogue included
//!     round it into C
//! ```
//! Kernels for pairs of bf16 take the rows as they are. Widening is exact and C is rounded once, at the very end, so the result is that of the f32 views of the same numbers, bit for bit, rounded
//! to bf16. A C in f32 is written in place.
//!
//! Rejected: kernels that load and store bf16 themselves. Each would be compiled twice, for two passes over a block that lies in a near cache.

use std::ops::Range;

use half::bf16;
use pulp::{Simd, WithSimd};

use super::Operand;
use super::driver::{Grid, run_pairs, run_part};
use super::epilogue::{Accum, Epilogue};
use super::macrokernel::{Part, Problem, RightOperand};
use super::microkernel::{Out, Storage, kernel_for};
use super::operand::Output;
use super::pack::Element;
use super::packed::PackedWeights;
use super::pair_packing::Paired;
use super::quantise::{WeightFormat, bf16_bits};
use super::tiles::{Proofs, TilePart};
use crate::context::{Blocking, Context};
use crate::error::ShapeError;
use crate::isa::{Bf16Dots, IsaName};
use crate::scratch::ScratchBuf;
use crate::view::{MatMut, MatRef};

/// Columns of a block of C, about: with 96 rows it takes 192 KiB of the second-level cache.
const COLS: usize = 512;

/// `B` as it is packed when it comes plain. The shapes have been checked.
pub(super) fn pack(ctx: &Context, b: Operand<'_>) -> Result<PackedWeights, ShapeError> {
    let selected = |format| kernel_for(ctx, b.rows(), format);
    let format = match b {
        Operand::F32(_) => WeightFormat::F32,
        // A kernel that reads A in f32 would widen every panel again with every tile, and where f32 runs on tiles they are faster; the products are the same.
        Operand::Bf16(_) if selected(WeightFormat::Bf16).left == Storage::F32 => WeightFormat::F32,
        Operand::Bf16(_) => WeightFormat::Bf16,
    };
    PackedWeights::pack_for_call_as(ctx, b, format)
}

/// The product with checked shapes.
pub(super) fn run(
    ctx: &Context,
    a: Operand<'_>,
    b: &PackedWeights,
    c: Output<'_>,
    accum: Accum,
    epilogue: &Epilogue<'_>,
) {
    let product = Product { ctx, a, b, accum, epilogue: *epilogue };
    let proofs = Proofs::of(ctx.isa()).filter(|_| b.kernel().isa == IsaName::Amx);
    match (c, proofs) {
        (Output::F32(c), None) => product.for_each_part(c, |piece| product.in_place(piece)),
        (Output::Bf16(c), None) => product.for_each_part(c, |piece| product.rounded(piece)),
        (Output::F32(c), Some(proofs)) => product.for_each_part(c, |piece| {
            let place = piece.place();
            product.on_tiles(proofs, place, (piece.out(), None));
        }),
        (Output::Bf16(c), Some(proofs)) => product.for_each_part(c, |piece| {
            let (place, nowhere) =
                (piece.place(), Out { ptr: std::ptr::null_mut(), row_stride: 0, col_stride: 0 });
            product.on_tiles(proofs, place, (nowhere, Some(piece.out())));
        }),
    }
}

struct Product<'a> {
    ctx: &'a Context,
    a: Operand<'a>,
    b: &'a PackedWeights,
    accum: Accum,
    epilogue: Epilogue<'a>,
}

/// What one task writes: a part of C and the place of its first element.
struct Piece<'c, T> {
    c: MatMut<'c, T>,
    row: usize,
    col: usize,
}

impl<T> Piece<'_, T> {
    /// Its rows and columns in C.
    fn place(&self) -> [Range<usize>; 2] {
        [self.row..self.row + self.c.rows(), self.col..self.col + self.c.cols()]
    }

    /// Its rows, and all columns of C.
    fn out(mut self) -> Out<T> {
        let (row_stride, col_stride) = (self.c.row_stride(), self.c.col_stride());
        Out { ptr: self.c.as_mut_ptr().wrapping_sub(self.col * col_stride), row_stride, col_stride }
    }
}

impl Product<'_> {
    /// Runs `task` on the parts of C, each on one thread.
    fn for_each_part<T: Send>(&self, c: MatMut<'_, T>, task: impl Fn(Piece<'_, T>) + Sync) {
        if c.rows() == 0 || c.cols() == 0 {
            return;
        }
        let grid = Grid::of(self.ctx, self.b.kernel(), [c.rows(), c.cols(), self.b.rows()], true);
        self.ctx.for_each_owned(pieces(c, &grid), task);
    }

    /// Those rows and columns on the tile unit, which reads and writes either type itself.
    fn on_tiles(&self, proofs: Proofs, [rows, cols]: [Range<usize>; 2], c: (Out<f32>, Option<Out<bf16>>)) {
        match self.a {
            Operand::F32(a) => {
                self.rows_on_tiles(proofs, a.sub(rows.clone(), 0..a.cols()), rows.start, cols, c)
            }
            Operand::Bf16(a) => {
                self.rows_on_tiles(proofs, a.sub(rows.clone(), 0..a.cols()), rows.start, cols, c)
            }
        }
    }

    fn rows_on_tiles<A: Paired>(
        &self,
        proofs: Proofs,
        a: MatRef<'_, A>,
        first: usize,
        cols: Range<usize>,
        (c, rounded): (Out<f32>, Option<Out<bf16>>),
    ) {
        let rows = 0..a.rows();
        let problem = self.problem(a, first, (c, self.accum));
        let part = TilePart::new(Part { problem: &problem, rows, cols }, proofs);
        self.ctx.isa().dispatch(match rounded {
            // SAFETY: the piece of C is this task's own.
            Some(c) => unsafe { part.rounded_to(c) },
            None => part,
        });
    }

    /// A part of C in f32: block of rows after block of rows.
    fn in_place(&self, piece: Piece<'_, f32>) {
        let Piece { mut c, row, col } = piece;
        let cols = col..col + c.cols();
        let step = self.block_rows(c.rows());
        for first in (0..c.rows()).step_by(step) {
            let rows = first..(first + step).min(c.rows());
            let (row_stride, col_stride) = (c.row_stride(), c.col_stride());
            let ptr = c.as_mut_ptr().wrapping_add(rows.start * row_stride).wrapping_sub(col * col_stride);
            let out = Out { ptr, row_stride, col_stride };
            let a = self.rows_of_a(row + rows.start..row + rows.end);
            self.block(&a, row + rows.start, cols.clone(), (out, self.accum));
        }
    }

    /// A part of C in bf16: blocks of rows and columns that are computed in f32 and rounded.
    fn rounded(&self, piece: Piece<'_, bf16>) {
        let Piece { mut c, row, col } = piece;
        let step = self.block_rows(c.rows());
        let width = (COLS / self.b.panel_cols()).max(1) * self.b.panel_cols();
        let mut sums = ScratchBuf::take(step * width.min(c.cols()));
        for first in (0..c.rows()).step_by(step) {
            let rows = first..(first + step).min(c.rows());
            let a = self.rows_of_a(row + rows.start..row + rows.end);
            for left in (0..c.cols()).step_by(width) {
                let cols = left..(left + width).min(c.cols());
                let c = c.reborrow().sub(rows.clone(), cols.clone());
                let sums = &mut sums[..rows.len() * cols.len()];
                if self.accum == Accum::Add {
                    for (i, sums) in sums.chunks_exact_mut(cols.len()).enumerate() {
                        sums.iter_mut().zip(0..).for_each(|(sum, j)| *sum = c.as_ref().at(i, j).widen());
                    }
                }
                let ptr = sums.as_mut_ptr().wrapping_sub(col + cols.start);
                let out = Out { ptr, row_stride: cols.len(), col_stride: 1 };
                self.block(&a, row + rows.start, col + cols.start..col + cols.end, (out, self.accum));
                self.ctx.isa().dispatch(Round { from: sums, to: c });
            }
        }
    }

    /// Rows of a block: those that the kernels take at a time.
    fn block_rows(&self, rows: usize) -> usize {
        super::blocking::blocking(self.ctx, self.b.kernel()).mc.min(rows)
    }

    /// Those rows of A: where they are, or widened.
    fn rows_of_a(&self, rows: Range<usize>) -> Rows<'_> {
        match (self.a, self.ctx.isa().bf16_dots()) {
            (Operand::F32(a), _) => Rows::F32(a.sub(rows, 0..a.cols())),
            (Operand::Bf16(a), Some(dots)) if self.b.kernel().left == Storage::Bf16 => {
                Rows::Bf16(a.sub(rows, 0..a.cols()), dots)
            }
            (Operand::Bf16(a), _) => {
                let a = a.sub(rows, 0..a.cols());
                let mut wide = ScratchBuf::take(a.rows() * a.cols());
                for (i, wide) in wide.chunks_exact_mut(a.cols().max(1)).enumerate() {
                    if a.col_stride() == 1 {
                        wide.iter_mut().zip(a.row(i)).for_each(|(to, x)| *to = x.widen());
                    } else {
                        wide.iter_mut().zip(0..).for_each(|(to, p)| *to = a.at(i, p).widen());
                    }
                }
                Rows::Widened(wide, a.rows(), a.cols())
            }
        }
    }

    /// Rows of C from `first` on, as many as `a` has, on this thread. `out` is where element (`first`, 0) would be.
    fn block(&self, a: &Rows<'_>, first: usize, cols: Range<usize>, out: (Out<f32>, Accum)) {
        let isa = self.ctx.isa();
        match a {
            Rows::Bf16(a, dots) => {
                let (problem, rows) = (self.problem(*a, first, out), 0..a.rows());
                run_pairs(*dots, Part { problem: &problem, rows, cols });
            }
            Rows::F32(a) => {
                let (problem, rows) = (self.problem(*a, first, out), 0..a.rows());
                run_part(isa, Part { problem: &problem, rows, cols });
            }
            Rows::Widened(wide, m, k) => {
                let a = MatRef::new(wide, *m, *k).expect("it was cut to this size");
                run_part(isa, Part { problem: &self.problem(a, first, out), rows: 0..*m, cols });
            }
        }
    }

    fn problem<'s, A>(
        &'s self,
        a: MatRef<'s, A>,
        first: usize,
        (c, accum): (Out<f32>, Accum),
    ) -> Problem<'s, A> {
        let kernel = self.b.kernel();
        let blocking = Blocking { kc: self.b.depth(), ..super::blocking::blocking(self.ctx, kernel) };
        let epilogue = self.epilogue.rows(first..first + a.rows());
        let b = RightOperand::Packed(self.b);
        Problem { kernel, a, b, n: self.b.cols(), c, accum, epilogue, blocking }
    }
}

/// A block of rows of A.
enum Rows<'a> {
    F32(MatRef<'a>),
    Widened(ScratchBuf, usize, usize),
    /// For a kernel that reads them so.
    Bf16(MatRef<'a, bf16>, Bf16Dots),
}

/// C cut as the grid says.
fn pieces<'c, T>(c: MatMut<'c, T>, grid: &Grid) -> Vec<Piece<'c, T>> {
    let mut pieces = Vec::with_capacity(grid.parts());
    let (mut below, mut row) = (c, 0);
    for rows in grid.rows() {
        let (mut right, rest) = below.split_rows(rows.end - row);
        (below, row) = (rest, rows.end);
        let mut col = 0;
        for cols in grid.cols() {
            let (c, rest) = right.split_cols(cols.end - col);
            pieces.push(Piece { c, row: rows.start, col });
            (right, col) = (rest, cols.end);
        }
    }
    pieces
}

/// Rows of f32, rounded to nearest, ties to even, in the shell of the vectors.
struct Round<'a, 'c> {
    from: &'a [f32],
    to: MatMut<'c, bf16>,
}

impl WithSimd for Round<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Round { from, mut to } = self;
        let cols = to.cols();
        let rounded = |x: f32| bf16::from_bits(bf16_bits(x) as u16);
        for (i, from) in from.chunks_exact(cols).enumerate() {
            if to.col_stride() == 1 {
                to.row_mut(i).iter_mut().zip(from).for_each(|(to, x)| *to = rounded(*x));
            } else {
                for (j, x) in from.iter().enumerate() {
                    to.reborrow().sub(i..i + 1, j..j + 1).row_mut(0)[0] = rounded(*x);
                }
            }
        }
    }
}
