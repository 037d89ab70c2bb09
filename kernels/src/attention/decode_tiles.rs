//! The two products of decoding on the tile unit.
//!
//! ```text
//! S = (scale·Q)·Kᵀ     a panel of the cache at a time: its rows are those of the right operand
//! o = α·o + P·V        a block of keys at a time, wherever its keys stand
//! ```
//! The rows of a unit, query heads that share a key head, are the rows of a tile, and what no row fills is zero. An element of a product depends on its own row
//! and column alone, so the bits are those of the full pass: the same parts are multiplied in the same order, and P·V goes by the same blocks of keys.
//! - The cache stays in f32 or bf16 and is converted on the way, a panel of 32 keys or columns at a time in the first-level cache. Memory is read as without tiles; what
//!   tiles save is little, since a few rows are bound by reading. Tiles are used for their bits.
//! - Rejected: the same sums on vectors, the even and the odd products of a step in two chains. It would rest on tile units doing exactly what the manual
//!   says of intermediate sums, which no CPU at hand could show.
//! - A block of keys that lies in one part of the cache in f32 is packed from there; others are copied first.

use std::ops::Range;

use pulp::Simd;

use super::cache::{PANEL, Rows};
use super::decode::{Block, Places};
use super::decode_tasks::Tasks;
use super::on_tiles::{self, Operands, Unit, left_words, product, right_words};
use super::online;
use super::problem::KEY_BLOCK;
use super::stored;
use crate::gemm::microkernel::amx::{BLOCK, SIDE};
use crate::isa::may_have_tiles;
use crate::scratch::ScratchBuf;
use crate::view::MatRef;

/// What multiplies in a task, with operands in P parts.
pub(super) struct InParts<const P: usize>(pub(super) Unit);

/// scale·Q of a unit, as it is and in tiles.
struct Queries {
    scaled: ScratchBuf,
    tiles: ScratchBuf,
    odd_rows: Vec<bool>,
}

impl<const P: usize> InParts<P> {
    /// The scores of a unit's rows, see [`Tasks`].
    #[inline(always)]
    pub(super) fn scores<S: Simd>(&self, simd: S, tasks: &Tasks<'_>, unit: usize, columns: &Range<usize>) {
        if const { !may_have_tiles::<S>() } {
            unreachable!("no tile unit stands beside these vectors");
        }
        let (b, kv) = tasks.problem.place(unit);
        let (rows, dim) = (tasks.problem.rows(), tasks.problem.dim);
        let mut queries = Queries {
            scaled: tasks.scaled_queries(simd, unit),
            tiles: ScratchBuf::take(left_words(rows, dim, P)),
            odd_rows: vec![false; rows],
        };
        let q = MatRef::new(&queries.scaled, rows, dim).expect("[rows, dim]");
        on_tiles::pack_left::<P>(&self.0, q, queries.tiles.words_mut(), &mut queries.odd_rows);
        let mut widened = ScratchBuf::take(dim * BLOCK);
        for run in tasks.runs_in(unit, columns) {
            for (part, position, keys) in tasks.held(b, &run.keys) {
                let mut at = keys.start;
                while at < keys.end {
                    let position = position + at - keys.start;
                    let (panel, first) = (position / PANEL, position % PANEL);
                    let (half, first) = (first / BLOCK, first % BLOCK);
                    let cols = first..BLOCK.min(first + keys.end - at);
                    let k = match part.cache.panel(part.sequences[b], kv, panel) {
                        Rows::F32(k) => MatRef::with_strides(&k[half * BLOCK..], dim, BLOCK, PANEL, 1),
                        Rows::Stored(_, words, _) => {
                            let rows = words.chunks_exact(PANEL / 2).zip(widened.chunks_exact_mut(BLOCK));
                            for (words, to) in rows {
                                stored::widen(&words[half * BLOCK / 2..][..BLOCK / 2], to);
                            }
                            MatRef::new(&widened, dim, BLOCK)
                        }
                    };
                    let k = k.expect("half of a panel is [dim, 32]");
                    let place = unit * tasks.places.len + run.place() + at - run.keys.start;
                    self.panel(tasks, (&mut queries, k), cols.clone(), place);
                    at += cols.len();
                }
            }
        }
    }

    /// Columns of a unit's output.
    #[inline(always)]
    pub(super) fn output<S: Simd>(&self, simd: S, tasks: &Tasks<'_>, unit: usize, cols: Range<usize>) {
        if const { !may_have_tiles::<S>() } {
            unreachable!("no tile unit stands beside these vectors");
        }
        if cols.is_empty() {
            return;
        }
        let rows = tasks.problem.rows();
        let width = cols.len().next_multiple_of(BLOCK);
        let mut acc = ScratchBuf::zeroed(rows * width);
        let mut copied = ScratchBuf::take(KEY_BLOCK.min(tasks.problem.keys) * cols.len());
        let mut sums = ScratchBuf::take(BLOCK * width);
        let mut right = ScratchBuf::take(right_words(KEY_BLOCK, cols.len(), P));
        let mut left = ScratchBuf::take(left_words(BLOCK, KEY_BLOCK, P));
        for block in tasks.problem.blocks(unit) {
            let v = tasks.values(unit, &block.keys, &cols, &mut copied);
            let mut odd = [false; KEY_BLOCK];
            on_tiles::pack_right::<P>(&self.0, v, right.words_mut(), &mut odd);
            let odd = odd.contains(&true).then_some(&odd);
            for top in (0..rows).step_by(BLOCK) {
                let rows = top..(top + BLOCK).min(rows);
                let block = OutputBlock { unit, block: &block, v, odd, rows };
                let words = (left.words_mut(), &*right.words_mut());
                self.weighted_sum(simd, tasks, &block, words, (&mut sums, &mut acc[top * width..]));
            }
        }
        tasks.store(simd, unit, (&acc, width), cols);
    }
}

/// Some rows of a unit and a block of keys.
struct OutputBlock<'a> {
    unit: usize,
    block: &'a Block,
    v: MatRef<'a>,
    /// Which values are odd, if any is.
    odd: Option<&'a [bool; KEY_BLOCK]>,
    rows: Range<usize>,
}

impl<const P: usize> InParts<P> {
    /// The scores of `cols` of a panel of 32 keys, [dim, 32], for all rows of a unit, whose first is at `place`.
    #[inline(always)]
    fn panel(
        &self,
        tasks: &Tasks<'_>,
        (queries, k): (&mut Queries, MatRef<'_>),
        cols: Range<usize>,
        place: usize,
    ) {
        let (rows, dim) = (tasks.problem.rows(), k.rows());
        let mut right = ScratchBuf::take(right_words(dim, BLOCK, P));
        let mut odd = [false; BLOCK];
        on_tiles::pack_panel::<P>(&self.0, k, right.words_mut(), &mut odd);
        let mut sums = ScratchBuf::take(BLOCK * BLOCK);
        for first in (0..rows).step_by(BLOCK) {
            let height = BLOCK.min(rows - first);
            let left = &queries.tiles.words_mut()[first / SIDE * left_words(SIDE, dim, P)..];
            let steps = on_tiles::steps(dim);
            let operands = Operands { left, right: right.words_mut(), steps, rows: height };
            product::<P>(&self.0, operands, 0..steps, &mut sums, BLOCK);
            for (r, sums) in (first..first + height).zip(sums.chunks_exact_mut(BLOCK)) {
                let odd_row = queries.odd_rows[r];
                for j in cols.clone().filter(|j| odd_row || odd[*j]) {
                    let q = queries.scaled[r * dim..][..dim].iter().copied();
                    sums[j] = on_tiles::chain(q, (0..dim).map(|d| k.at(d, j)));
                }
                // SAFETY: these columns of the unit's row of scores belong to this task alone.
                let scores = unsafe { tasks.memory.part(place + r * tasks.places.stride, cols.len()) };
                scores.copy_from_slice(&sums[cols.clone()]);
            }
        }
    }

    /// `acc = α·acc + P·V` of at most 32 rows and a block of keys.
    #[inline(always)]
    fn weighted_sum<S: Simd>(
        &self,
        simd: S,
        tasks: &Tasks<'_>,
        block: &OutputBlock<'_>,
        (left, right): (&mut [u32], &[u32]),
        (sums, acc): (&mut [f32], &mut [f32]),
    ) {
        let OutputBlock { unit, block: Block { index, keys }, v, rows, .. } = block;
        let Places { stride, alpha, len, .. } = tasks.places;
        let width = v.cols().next_multiple_of(BLOCK);
        // SAFETY: P and α of this unit are complete and only read now.
        let memory = unsafe { tasks.memory.part(unit * len, len) };
        let p = &memory[rows.start * stride + index * KEY_BLOCK..];
        let p = MatRef::with_strides(p, rows.len(), keys.len(), stride, 1).expect("P holds these keys");
        on_tiles::pack_left::<P>(&self.0, p, left, &mut [false; BLOCK]);
        let steps = on_tiles::steps(keys.len());
        for first in (0..v.cols()).step_by(BLOCK) {
            let right = &right[first / BLOCK * right_words(keys.len(), BLOCK, P)..];
            let operands = Operands { left, right, steps, rows: rows.len() };
            product::<P>(&self.0, operands, 0..steps, &mut sums[first..], width);
        }
        let alphas = &memory[alpha + index * tasks.problem.rows() + rows.start..];
        for (r, (acc, sums)) in
            acc.chunks_exact_mut(width).zip(sums.chunks_exact(width)).enumerate().take(rows.len())
        {
            online::carry(simd, alphas[r], sums, acc);
            if let Some(odd) = block.odd {
                let visible = tasks.problem.visible(*unit, rows.start + r);
                let visible = visible.start.max(keys.start)..visible.end.min(keys.end);
                for j in visible.filter(|j| odd[j - keys.start]) {
                    on_tiles::add_scaled(p.at(r, j - keys.start), v.row(j - keys.start), acc);
                }
            }
        }
    }
}

impl Tasks<'_> {
    /// Columns `cols` of the values of some keys of a unit, as they stand or copied.
    #[inline(always)]
    pub(super) fn values<'v>(
        &'v self,
        unit: usize,
        keys: &Range<usize>,
        cols: &Range<usize>,
        copied: &'v mut [f32],
    ) -> MatRef<'v> {
        let (b, kv) = self.problem.place(unit);
        let v_dim = self.problem.v_dim;
        for (part, position, mine) in self.held(b, keys) {
            match part.cache.values(part.sequences[b], kv) {
                Rows::F32(values) if mine == *keys => {
                    let values = &values[position * v_dim + cols.start..];
                    let view = MatRef::with_strides(values, keys.len(), cols.len(), v_dim, 1);
                    return view.expect("the values of these keys");
                }
                Rows::F32(values) => {
                    for (j, position) in mine.zip(position..) {
                        let to = &mut copied[(j - keys.start) * cols.len()..][..cols.len()];
                        to.copy_from_slice(&values[position * v_dim..][cols.clone()]);
                    }
                }
                Rows::Stored(format, words, _) => {
                    let stride = format.words(v_dim);
                    let mut row = ScratchBuf::take(2 * stride);
                    for (j, position) in mine.zip(position..) {
                        stored::widen(&words[position * stride..][..stride], &mut row);
                        let to = &mut copied[(j - keys.start) * cols.len()..][..cols.len()];
                        to.copy_from_slice(&row[cols.clone()]);
                    }
                }
            }
        }
        MatRef::new(&copied[..keys.len() * cols.len()], keys.len(), cols.len()).expect("a copy of the values")
    }
}
