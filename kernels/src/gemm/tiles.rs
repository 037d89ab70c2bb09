//! One thread's part of C on the tile unit: the loops around [`TileUnit::sums`].
//!
//! ```text
//! for jc in 0..n step nc                    panels of B, converted unless they were packed beforehand
//!   for pc in 0..k step kc                  K is summed block by block, in order
//!     for ic in 0..m step mc                a block of A is converted and fits L2
//!       for jr in jc..jc+nc step 32         a panel of B fits L1
//!         for ir in ic..ic+mc step 32       32 × 32 sums, then the epilogue
//! ```
//! f32 becomes bf16, or a sum of bf16 parts, while it is packed ([`super::split`]); C and everything outside stay f32.
//!
//! # Where parts do not do
//! Packing also sees the magnitudes of each row and column in the block. Where parts do not stand for them, every
//! element of that row or column is computed as the chain of f32 multiply-adds over the block, after the tiles: nothing is read twice where nothing
//! is odd, and an element depends on its own row and column alone.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::macrokernel::{Part, Problem, RightOperand};
use super::microkernel::amx::{BLOCK, SIDE, STEP, TileBlock, TileUnit};
use super::microkernel::{F32, Finish, Out, Storage, Tile};
use super::pack::Element;
use super::split::{Magnitudes, column_words, pack_left, pack_right, right_element};
use crate::context::Blocking;
use crate::isa::Tiles;
use crate::scratch::ScratchBuf;
use crate::view::MatRef;

/// A part of C, and the proof that tiles run.
pub(super) struct TilePart<'a> {
    pub(super) part: Part<'a>,
    pub(super) tiles: Tiles,
}

impl WithSimd for TilePart<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if const { S::F32_LANES < 8 } {
            unreachable!("tiles stand beside vectors of eight lanes and more");
        }
        match self.part.problem.kernel.storage.parts() {
            1 => self.run::<S, 1>(simd),
            2 => self.run::<S, 2>(simd),
            _ => self.run::<S, 3>(simd),
        }
    }
}

/// A panel of B in one block of K.
struct Panel<'a> {
    cols: Range<usize>,
    depth: Range<usize>,
    words: &'a [u32],
    /// Its columns for which parts do not stand.
    odd: [bool; BLOCK],
}

impl TilePart<'_> {
    #[inline(always)]
    fn run<S: Simd, const P: usize>(self, simd: S) {
        let TilePart { part: Part { problem, rows, cols }, tiles } = self;
        let unit = TileUnit::configure(tiles);
        let Blocking { mc, kc, nc } = problem.blocking;
        let k = problem.a.cols();
        let column = column_words(kc.min(k), P);
        let left_rows = mc.min(rows.len()).next_multiple_of(SIDE);
        let right_cols = match problem.b {
            RightOperand::Plain(_) => nc.min(cols.len()).next_multiple_of(BLOCK),
            RightOperand::Packed(_) => 0,
        };
        let mut left = ScratchBuf::take(left_rows * column);
        let mut right = ScratchBuf::take(right_cols * column);
        let mut decoded = ScratchBuf::take(BLOCK * kc.min(k));
        let mut left_magnitudes = vec![Magnitudes::NONE; left_rows];
        let mut right_magnitudes = vec![Magnitudes::NONE; right_cols];
        for jc in cols.clone().step_by(nc) {
            let block_cols = jc..(jc + nc).min(cols.end);
            for pc in (0..k).step_by(kc) {
                let depth = pc..(pc + kc).min(k);
                for ic in rows.clone().step_by(mc) {
                    let block = Block {
                        unit: &unit,
                        problem,
                        rows: ic..(ic + mc).min(rows.end),
                        depth: depth.clone(),
                        left: left.words_mut(),
                        magnitudes: &mut left_magnitudes,
                        decoded: &mut decoded,
                    };
                    let right = (right.words_mut(), &mut *right_magnitudes);
                    block.run::<S, P>(simd, block_cols.clone(), right, ic == rows.start);
                }
            }
        }
    }
}

/// One block of A, converted, and what it is multiplied with.
struct Block<'a> {
    unit: &'a TileUnit,
    problem: &'a Problem<'a>,
    rows: Range<usize>,
    depth: Range<usize>,
    left: &'a mut [u32],
    magnitudes: &'a mut [Magnitudes],
    /// A panel as f32, for rows that are odd.
    decoded: &'a mut [f32],
}

impl Block<'_> {
    #[inline(always)]
    fn run<S: Simd, const P: usize>(
        mut self,
        simd: S,
        cols: Range<usize>,
        (right, right_magnitudes): (&mut [u32], &mut [Magnitudes]),
        pack: bool,
    ) {
        let a = self.problem.a.sub(self.rows.clone(), self.depth.clone());
        pack_left::<P>(a, self.left, self.magnitudes);
        let storage = self.problem.kernel.storage;
        let panel_words = BLOCK * column_words(self.depth.len(), P);
        for (number, first) in cols.clone().step_by(BLOCK).enumerate() {
            let panel_cols = first..(first + BLOCK).min(cols.end);
            let mut odd = [false; BLOCK];
            let words = match self.problem.b {
                RightOperand::Packed(packed) => {
                    packed.mark_odd(&self.depth, &panel_cols, &mut odd);
                    packed.tile_panel(self.depth.clone(), panel_cols.start)
                }
                RightOperand::Plain(b) => {
                    let words = &mut right[number * panel_words..][..panel_words];
                    let magnitudes = &mut right_magnitudes[number * BLOCK..][..BLOCK];
                    if pack {
                        let b = b.sub(self.depth.clone(), panel_cols.clone());
                        pack_right::<f32, P>(b, words, magnitudes);
                    }
                    for (odd, magnitudes) in odd.iter_mut().zip(&*magnitudes).take(panel_cols.len()) {
                        *odd = !magnitudes.fit(storage);
                    }
                    &*words
                }
            };
            self.panel::<S, P>(simd, &Panel { cols: panel_cols, depth: self.depth.clone(), words, odd });
        }
    }

    /// All rows of the block times one panel.
    #[inline(always)]
    fn panel<S: Simd, const P: usize>(&mut self, simd: S, panel: &Panel<'_>) {
        let storage = self.problem.kernel.storage;
        let column = column_words(panel.depth.len(), P);
        let odd_panel = panel.odd.contains(&true);
        let mut is_decoded = false;
        for first in (0..self.rows.len()).step_by(BLOCK) {
            let rows = first..(first + BLOCK).min(self.rows.len());
            let block = TileBlock {
                left: self.left[first * column..].as_ptr(),
                left_stride: SIDE * column,
                right: panel.words.as_ptr(),
                steps: panel.depth.len().div_ceil(STEP),
                two_rows: rows.len() > SIDE,
            };
            let mut sums = Sums([0.0; BLOCK * BLOCK]);
            // SAFETY: `pack_left` and `pack_right` wrote whole tiles for each step, for 16 rows and two times 16 columns.
            unsafe { self.unit.sums(storage, &block, &mut sums.0) };
            let odd_rows = self.magnitudes[rows.clone()].iter().any(|magnitudes| !magnitudes.fit(storage));
            if odd_rows && !is_decoded {
                decode::<P>(panel, self.problem, self.decoded);
                is_decoded = true;
            }
            if odd_rows || odd_panel {
                self.mend::<P>(rows.clone(), panel, &mut sums);
            }
            let rows = self.rows.start + rows.start..self.rows.start + rows.end;
            let finish = self.problem.finish(rows.clone(), panel.cols.clone(), panel.depth.clone());
            let out = self.problem.out(rows.start, panel.cols.start);
            // SAFETY: this task alone writes these rows and columns of C, and the driver checked the shapes of the epilogue.
            unsafe { store(simd, &sums, (rows.len(), panel.cols.len()), &finish, out) };
        }
    }

    /// Computes the elements of odd rows and columns by f32 multiply-adds.
    #[inline(always)]
    fn mend<const P: usize>(&self, rows: Range<usize>, panel: &Panel<'_>, sums: &mut Sums) {
        let storage = self.problem.kernel.storage;
        for (i, sums) in rows.zip(sums.0.as_chunks_mut::<BLOCK>().0) {
            let a = self.problem.a.sub(self.rows.start + i..self.rows.start + i + 1, panel.depth.clone());
            if !self.magnitudes[i].fit(storage) {
                *sums = [0.0; BLOCK];
                for (p, b) in self.decoded.as_chunks::<BLOCK>().0.iter().take(a.cols()).enumerate() {
                    let a = a.at(0, p);
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = a.mul_add(*b, *sum);
                    }
                }
            } else {
                for j in (0..panel.cols.len()).filter(|j| panel.odd[*j]) {
                    let chain = |sum: f32, p| a.at(0, p).mul_add(original(panel, self.problem, p, j), sum);
                    sums[j] = (0..a.cols()).fold(0.0, chain);
                }
            }
        }
    }
}

/// The panel as f32, a row of 32 for each p: columns that are odd as they were given, the others as their parts.
#[inline(always)]
fn decode<const P: usize>(panel: &Panel<'_>, problem: &Problem<'_>, decoded: &mut [f32]) {
    for (p, row) in decoded.as_chunks_mut::<BLOCK>().0.iter_mut().take(panel.depth.len()).enumerate() {
        for (j, x) in row.iter_mut().enumerate() {
            *x = if panel.odd[j] {
                original(panel, problem, p, j)
            } else {
                right_element(panel.words, P, p, j)
            };
        }
    }
}

/// Element (p, j) of a panel as it was given, where column j is odd.
fn original(panel: &Panel<'_>, problem: &Problem<'_>, p: usize, j: usize) -> f32 {
    let (p, j) = (panel.depth.start + p, panel.cols.start + j);
    match problem.b {
        RightOperand::Plain(b) => b.at(p, j),
        RightOperand::Packed(packed) => packed.odd_element(p, j),
    }
}

/// The sums of a block: 32 rows of 32, where the tile unit stores them.
#[repr(align(64))]
pub(super) struct Sums(pub(super) [f32; BLOCK * BLOCK]);

/// Applies the epilogue and stores the first rows and columns of a block of sums.
///
/// # Safety
/// `out` has so many rows and columns, and so have bias and residual.
#[inline(always)]
pub(super) unsafe fn store<S: Simd>(
    simd: S,
    sums: &Sums,
    (rows, cols): (usize, usize),
    finish: &Finish<'_>,
    out: Out<f32>,
) {
    // SAFETY: the contract.
    unsafe {
        match S::F32_LANES {
            8 => store_rows::<S, 2, 4>(simd, sums, (rows, cols), finish, out),
            _ => store_rows::<S, 4, 2>(simd, sums, (rows, cols), finish, out),
        }
    }
}

/// As [`store`], H rows of W vectors at a time.
///
/// # Safety
/// As [`store`]; W vectors are a row.
#[inline(always)]
unsafe fn store_rows<S: Simd, const H: usize, const W: usize>(
    simd: S,
    sums: &Sums,
    (rows, cols): (usize, usize),
    finish: &Finish<'_>,
    out: Out<f32>,
) {
    debug_assert_eq!(W * S::F32_LANES, BLOCK);
    let row = |i: usize| sums.0[i * BLOCK..(i + 1) * BLOCK].as_ptr().cast::<S::f32s>();
    let whole = rows / H * H;
    for first in (0..whole).step_by(H) {
        let mut acc = [[simd.splat_f32s(0.0); W]; H];
        for (i, acc) in acc.iter_mut().enumerate() {
            for (w, x) in acc.iter_mut().enumerate() {
                // SAFETY: a row is W vectors.
                *x = unsafe { row(first + i).add(w).read_unaligned() };
            }
        }
        // SAFETY: the contract, for these rows.
        unsafe { Tile { simd, acc }.finish::<F32>(first, cols, finish, out) };
    }
    for first in whole..rows {
        let mut acc = [[simd.splat_f32s(0.0); W]; 1];
        for (w, x) in acc[0].iter_mut().enumerate() {
            // SAFETY: a row is W vectors.
            *x = unsafe { row(first).add(w).read_unaligned() };
        }
        // SAFETY: the contract, for this row.
        unsafe { Tile { simd, acc }.finish::<F32>(first, cols, finish, out) };
    }
}

/// The columns of a packed operand for which parts do not stand, block of K by block.
#[derive(Debug, Clone, Default)]
pub(super) struct OddColumns(Vec<OddColumn>);

#[derive(Debug, Clone)]
struct OddColumn {
    col: usize,
    first: usize,
    elements: Vec<f32>,
}

impl OddColumns {
    /// Keeps the columns of `b`, a panel that starts at (`first`, `col`), that do not fit.
    pub(super) fn keep<T: Element>(
        &mut self,
        b: MatRef<'_, T>,
        (first, col): (usize, usize),
        storage: Storage,
        of: &[Magnitudes],
    ) {
        for (j, _) in of.iter().enumerate().filter(|(_, magnitudes)| !magnitudes.fit(storage)) {
            let elements = (0..b.rows()).map(|p| b.at(p, j).widen()).collect();
            self.0.push(OddColumn { col: col + j, first, elements });
        }
    }

    /// Marks those of a panel.
    pub(super) fn mark(&self, depth: &Range<usize>, cols: &Range<usize>, odd: &mut [bool; BLOCK]) {
        for column in self.0.iter().filter(|c| c.first == depth.start && cols.contains(&c.col)) {
            odd[column.col - cols.start] = true;
        }
    }

    /// Element (p, j), if it is in one of them.
    pub(super) fn element(&self, p: usize, j: usize) -> Option<f32> {
        let of_column = |c: &&OddColumn| c.col == j && (c.first..c.first + c.elements.len()).contains(&p);
        self.0.iter().find(of_column).map(|column| column.elements[p - column.first])
    }
}
