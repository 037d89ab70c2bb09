//! One thread's part of C on the tile unit: the loops around [`TileUnit::sums_to`].
//!
//! ```text
//! for JC in 0..n step NC                    what is packed of B for all rows fits the third-level cache
//!   for ic in 0..m step mc
//!     for jc in JC..JC+NC step nc           mc · nc sums fit the second-level cache
//!       for pc in 0..k step kc              K is summed block by block, in order; a block of A and one of B are converted unless they were before
//!         for ir in ic..ic+mc step 32       a strip of A, kc deep, lies in L1
//!           for jr in jc..jc+nc step 32     the sums of 32 × 32 go on
//!           in the last block: the epilogue of the strip, row by row
//! ```
//! f32 becomes bf16, or a sum of bf16 parts, while it is packed ([`super::tile_packing`]); C and everything outside stay f32, or C is bf16 and rounded once.
//!
//! - A tile of sums goes on from block to block of K: to load 1 KiB takes the unit a sixth of the time in which vectors would add it, and C, which may lie far away, is
//!   written once. So an element is one chain over all of K, and blocks of K can be as shallow as the first-level cache wants them.
//! - A strip is finished along its rows. Block by block, 128 bytes of each of 32 rows, a C beyond the second-level cache is written at half of the rate of whole rows, and takes as
//!   long as the sums themselves.
//! - Up to 32 rows are all the rows that the unit is told of.
//!
//! # Where parts do not do
//! Packing also sees the magnitudes of each row and column in a block of K. Where parts do not stand for them, every
//! element of that row or column is computed as a chain of f32 multiply-adds over K, after the tiles: nothing is read twice where nothing
//! is odd, and an element depends on its own row and column alone.

use std::ops::Range;

use half::bf16;
use pulp::{Simd, WithSimd};

use super::epilogue::Accum;
use super::macrokernel::{Part, Problem, RightOperand};
use super::microkernel::Out;
use super::microkernel::amx::{BLOCK, SIDE, STEP, TileBlock, TileUnit};
use super::odd_elements::RightElements;
use super::pack::Element;
use super::pair_packing::Paired;
use super::split::column_words;
use super::tile_packing::{pack_left, pack_right};
use super::tile_store::{put_rows, rounded, store};
use crate::context::Blocking;
use crate::isa::{Bf16Dots, Isa, Tiles, may_have_tiles};
use crate::scratch::ScratchBuf;

/// Rows that are finished at a time.
const GROUP: usize = 8;
/// Words of B that are packed for all blocks of rows: 32 MiB.
const KEPT: usize = 8 * 1024 * 1024;

/// A part of C, and the proofs that tiles and conversions run.
pub(super) struct TilePart<'a, A = f32> {
    part: Part<'a, A>,
    proofs: Proofs,
    /// Where C is in bf16, in place of the problem's.
    rounded: Option<Out<bf16>>,
}

/// That tiles and conversions run.
#[derive(Clone, Copy)]
pub(super) struct Proofs {
    tiles: Tiles,
    conversion: Bf16Dots,
}

impl Proofs {
    /// Those of a set that has tiles.
    pub(super) fn of(isa: Isa) -> Option<Proofs> {
        Some(Proofs { tiles: isa.tiles()?, conversion: isa.bf16_conversion()? })
    }
}

impl<'a, A> TilePart<'a, A> {
    pub(super) fn new(part: Part<'a, A>, proofs: Proofs) -> TilePart<'a, A> {
        TilePart { part, proofs, rounded: None }
    }

    /// C is there, in bf16.
    ///
    /// # Safety
    /// No other task reads or writes those rows and columns of it.
    pub(super) unsafe fn rounded_to(self, c: Out<bf16>) -> TilePart<'a, A> {
        TilePart { rounded: Some(c), ..self }
    }
}

impl<A: Paired> WithSimd for TilePart<'_, A> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if const { !may_have_tiles::<S>() } {
            unreachable!("no tile unit stands beside these vectors");
        }
        match self.part.problem.kernel.storage.parts() {
            1 => self.run::<S, 1>(simd),
            2 => self.run::<S, 2>(simd),
            _ => self.run::<S, 3>(simd),
        }
    }
}

/// How a part is cut.
struct Plan {
    mc: usize,
    nc: usize,
    kc: usize,
    /// Columns of what is packed of B at a time.
    wide: usize,
    /// Whether that stands for all blocks of rows, over all of K; or for one block of K.
    kept: bool,
    /// Whether what is packed of A stands for several blocks of columns, over all of K; or for one block of K.
    kept_left: bool,
}

impl Plan {
    fn of<A>(problem: &Problem<'_, A>, (rows, cols): (usize, usize)) -> Plan {
        let Blocking { mc, kc, nc } = problem.blocking;
        let k = problem.a.cols();
        let plain = matches!(problem.b, RightOperand::Plain(_));
        let (kept, nc) = (plain && rows > mc, nc.min(cols));
        let wide = if kept {
            let column = column_words(k, problem.kernel.storage.parts());
            (KEPT / column / nc).max(1) * nc
        } else {
            cols
        };
        Plan { mc: mc.min(rows), nc, kc: kc.min(k), wide: wide.min(cols), kept, kept_left: cols > nc }
    }
}

impl<A: Paired> TilePart<'_, A> {
    #[inline(always)]
    fn run<S: Simd, const P: usize>(self, simd: S) {
        let TilePart { part: Part { problem, rows, cols }, proofs, rounded } = self;
        if rows.is_empty() || cols.is_empty() {
            return;
        }
        let unit = if rows.len() <= BLOCK {
            TileUnit::configure_rows(proofs.tiles, rows.len())
        } else {
            TileUnit::configure(proofs.tiles)
        };
        let Plan { mc, nc, kc, wide, kept, kept_left } = Plan::of(problem, (rows.len(), cols.len()));
        let (k, storage) = (problem.a.cols(), problem.kernel.storage);
        let tall = mc.next_multiple_of(SIDE);
        let mut left = ScratchBuf::take(tall * column_words(if kept_left { k } else { kc }, P));
        let of_b = match problem.b {
            RightOperand::Plain(_) if kept => wide.next_multiple_of(BLOCK) * column_words(k, P),
            RightOperand::Plain(_) => nc.next_multiple_of(BLOCK) * column_words(kc, P),
            RightOperand::Packed(_) => 0,
        };
        let mut right = ScratchBuf::take(of_b);
        // Sums of one strip, or of all where they go on through K.
        let strips = if k > kc { mc.div_ceil(BLOCK) } else { 1 };
        let mut sums = ScratchBuf::take(strips * BLOCK * nc.next_multiple_of(BLOCK));
        let (mut odd_rows, mut odd_cols) = (vec![false; mc], vec![false; wide]);
        for all_cols in blocks(cols, wide) {
            odd_cols.fill(false);
            for block_rows in blocks(rows.clone(), mc) {
                odd_rows.fill(false);
                let of_left =
                    |depth: &Range<usize>| if kept_left { tall * column_words(depth.start, P) } else { 0 };
                for block_cols in blocks(all_cols.clone(), nc) {
                    let first = block_cols.start - all_cols.start;
                    for depth in blocks(0..k, kc) {
                        if first == 0 {
                            let a = problem.a.sub(block_rows.clone(), depth.clone());
                            let to = &mut left.words_mut()[of_left(&depth)..];
                            pack_left::<A, P>(proofs.conversion, a, to, storage, &mut odd_rows);
                        }
                        let at = if kept {
                            wide.next_multiple_of(BLOCK) * column_words(depth.start, P)
                                + first * column_words(depth.len(), P)
                        } else {
                            0
                        };
                        if let (RightOperand::Plain(b), true) =
                            (problem.b, !kept || block_rows.start == rows.start)
                        {
                            let b = b.sub(depth.clone(), block_cols.clone());
                            let (to, odd) = (&mut right.words_mut()[at..], &mut odd_cols[first..]);
                            pack_right::<f32, P>(proofs.conversion, b, to, storage, odd);
                        }
                        let block = Block {
                            unit: &unit,
                            problem,
                            rounded,
                            rows: block_rows.clone(),
                            cols: block_cols.clone(),
                            left: &left.words()[of_left(&depth)..],
                            right: &right.words()[at.min(of_b)..],
                            depth,
                            odd: (&odd_rows, &odd_cols[first..]),
                        };
                        block.run::<S, P>(simd, &mut sums, strips > 1);
                    }
                }
            }
        }
    }
}

/// A range in pieces of `step`.
pub(super) fn blocks(all: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    all.clone().step_by(step).map(move |first| first..(first + step).min(all.end))
}

/// One block of A times one of B.
struct Block<'a, A> {
    unit: &'a TileUnit,
    problem: &'a Problem<'a, A>,
    rounded: Option<Out<bf16>>,
    rows: Range<usize>,
    cols: Range<usize>,
    depth: Range<usize>,
    left: &'a [u32],
    /// Nothing where B was packed beforehand.
    right: &'a [u32],
    /// Rows and columns for which parts do not stand; of columns as far as K was read.
    odd: (&'a [bool], &'a [bool]),
}

impl<A: Paired> Block<'_, A> {
    #[inline(always)]
    fn run<S: Simd, const P: usize>(self, simd: S, sums: &mut [f32], running: bool) {
        let column = column_words(self.depth.len(), P);
        let storage = self.problem.kernel.storage;
        let (is_first, is_last) = (self.depth.start == 0, self.depth.end == self.problem.a.cols());
        let strip_len = self.cols.len().next_multiple_of(BLOCK) * BLOCK;
        for (strip, rows) in blocks(0..self.rows.len(), BLOCK).enumerate() {
            let at = if running { strip * strip_len } else { 0 };
            let sums = sums[at..][..strip_len].as_chunks_mut().0;
            for (panel, sums) in sums.iter_mut().enumerate() {
                let right = match self.problem.b {
                    RightOperand::Packed(packed) => {
                        packed.tile_panel(self.depth.clone(), self.cols.start + panel * BLOCK)
                    }
                    RightOperand::Plain(_) => &self.right[panel * BLOCK * column..][..BLOCK * column],
                };
                let block = TileBlock {
                    left: self.left[rows.start * column..].as_ptr(),
                    left_stride: SIDE * column,
                    right: right.as_ptr(),
                    steps: self.depth.len().div_ceil(STEP),
                    two_rows: rows.len() > SIDE,
                };
                // SAFETY: `pack_left` and `pack_right` wrote whole tiles for each step, for 16 rows and two times 16 columns; the sums are 32 rows of 32.
                unsafe {
                    if is_first {
                        self.unit.sums_to(storage, &block, sums.as_mut_ptr(), BLOCK);
                    } else {
                        self.unit.go_on(storage, &block, sums.as_mut_ptr(), BLOCK);
                    }
                }
            }
            if is_last {
                self.finish_strip::<S, P>(simd, rows, sums);
            }
        }
    }

    /// From the sums of a strip over all of K to C.
    #[inline(always)]
    fn finish_strip<S: Simd, const P: usize>(
        &self,
        simd: S,
        rows: Range<usize>,
        sums: &mut [[f32; BLOCK * BLOCK]],
    ) {
        let odd_rows = &self.odd.0[rows.clone()];
        let rows = self.rows.start + rows.start..self.rows.start + rows.end;
        if const { P > 1 } {
            for (cols, sums) in blocks(self.cols.clone(), BLOCK).zip(&mut *sums) {
                self.mend((&rows, odd_rows), &cols, sums);
            }
        }
        if self.problem.is_plain() && self.store_rows(&rows, sums) {
            return;
        }
        for (group, rows) in blocks(rows, GROUP).enumerate() {
            for (cols, sums) in blocks(self.cols.clone(), BLOCK).zip(&*sums) {
                let sums = sums[group * GROUP * BLOCK..].first_chunk().expect("a block is whole groups");
                self.finish(simd, sums, rows.clone(), cols);
            }
        }
    }

    /// Stores the sums of a strip where rows of C are contiguous; whether they are.
    #[inline(always)]
    fn store_rows(&self, rows: &Range<usize>, sums: &[[f32; BLOCK * BLOCK]]) -> bool {
        let shape = (rows.len(), self.cols.len());
        match self.rounded.map(|c| c.from(rows.start, self.cols.start)) {
            None => {
                let c = self.problem.out(rows.start, self.cols.start);
                if c.col_stride == 1 {
                    // SAFETY: this task alone writes these rows and columns of C.
                    unsafe { put_rows(c, shape, sums, |x| x) };
                }
                c.col_stride == 1
            }
            Some(c) => {
                if c.col_stride == 1 {
                    // SAFETY: the contract of `rounded_to`.
                    unsafe { put_rows(c, shape, sums, rounded) };
                }
                c.col_stride == 1
            }
        }
    }

    /// From the sums of some rows of a block to C.
    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, sums: &[f32; GROUP * BLOCK], rows: Range<usize>, cols: Range<usize>) {
        let shape = (rows.len(), cols.len());
        let (row, col) = (rows.start, cols.start);
        let finish = self.problem.finish_all(rows, cols);
        let Some(c) = self.rounded else {
            // SAFETY: this task alone writes these rows and columns of C, and the driver checked the shapes of the epilogue.
            unsafe { store(simd, sums, shape, &finish, self.problem.out(row, col)) };
            return;
        };
        let mut wide = [0.0; GROUP * BLOCK];
        let c = c.from(row, col);
        let element = |i: usize, j: usize| c.ptr.wrapping_add(i * c.row_stride + j * c.col_stride);
        if self.problem.accum == Accum::Add {
            for (i, row) in wide.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate().take(shape.0) {
                for (j, x) in row.iter_mut().enumerate().take(shape.1) {
                    // SAFETY: the contract of `rounded_to`; C has these rows and columns.
                    *x = unsafe { element(i, j).read() }.widen();
                }
            }
        }
        let out = Out { ptr: wide.as_mut_ptr(), row_stride: BLOCK, col_stride: 1 };
        // SAFETY: as many rows of 32 elements are there, and the driver checked the shapes of the epilogue.
        unsafe { store(simd, sums, shape, &finish, out) };
        for (i, row) in wide.as_chunks::<BLOCK>().0.iter().enumerate().take(shape.0) {
            if shape.1 == BLOCK && c.col_stride == 1 {
                let mut halves = [bf16::ZERO; BLOCK];
                halves.iter_mut().zip(row).for_each(|(half, x)| *half = rounded(*x));
                // SAFETY: as above; the elements of a row follow each other.
                unsafe { element(i, 0).cast::<[bf16; BLOCK]>().write_unaligned(halves) };
            } else {
                for (j, x) in row.iter().enumerate().take(shape.1) {
                    // SAFETY: as above.
                    unsafe { element(i, j).write(rounded(*x)) };
                }
            }
        }
    }

    /// Marks the columns of a panel that are odd in any block of K.
    #[inline(always)]
    fn odd_columns(&self, cols: &Range<usize>, odd: &mut [bool; BLOCK]) {
        match self.problem.b {
            RightOperand::Packed(packed) => packed.mark_odd(cols, odd),
            RightOperand::Plain(_) => {
                let at = cols.start - self.cols.start;
                odd[..cols.len()].copy_from_slice(&self.odd.1[at..at + cols.len()]);
            }
        }
    }

    /// Computes the elements of odd rows and columns by f32 multiply-adds, where there are any.
    #[inline(always)]
    fn mend(
        &self,
        (rows, odd_rows): (&Range<usize>, &[bool]),
        cols: &Range<usize>,
        sums: &mut [f32; BLOCK * BLOCK],
    ) {
        let mut odd_cols = [false; BLOCK];
        self.odd_columns(cols, &mut odd_cols);
        if odd_cols.contains(&true) || odd_rows.contains(&true) {
            self.mend_odd((rows, odd_rows), (cols, &odd_cols), sums);
        }
    }

    #[cold]
    #[inline(never)]
    fn mend_odd(
        &self,
        (rows, odd_rows): (&Range<usize>, &[bool]),
        (cols, odd_cols): (&Range<usize>, &[bool; BLOCK]),
        sums: &mut [f32; BLOCK * BLOCK],
    ) {
        let k = self.problem.a.cols();
        let b = RightElements {
            of: self.problem.b,
            storage: self.problem.kernel.storage,
            kc: self.problem.blocking.kc,
        };
        let elements: Vec<Vec<f32>> = cols
            .clone()
            .zip(odd_cols)
            .map(|(j, odd)| if *odd || odd_rows.contains(&true) { b.column(j, k) } else { Vec::new() })
            .collect();
        for (i, sums) in rows.clone().zip(sums.as_chunks_mut::<BLOCK>().0) {
            for (j, elements) in elements.iter().enumerate() {
                if odd_rows[i - rows.start] || odd_cols[j] {
                    let chain =
                        |sum: f32, (p, b): (usize, &f32)| self.problem.a.at(i, p).widen().mul_add(*b, sum);
                    sums[j] = elements.iter().enumerate().fold(0.0, chain);
                }
            }
        }
    }
}
