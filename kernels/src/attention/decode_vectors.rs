//! The two products of decoding on vectors, the cache in any format.
//!
//! Each element is one chain of multiply-adds in ascending order, as in the full pass: the keys of a panel are a right operand as it stands, and so are
//! values.

use std::ops::Range;

use pulp::Simd;

use super::cache::{CacheFormat, PANEL, Rows};
use super::decode::Places;
use super::decode_tasks::Tasks;
use super::problem::KEY_BLOCK;
use super::stored::{self, GROUP_WORDS};
use super::tile::{Dest, Extent, GROUP, Left, Onto, Right, product};
use crate::scratch::ScratchBuf;
use crate::view::MatRef;

/// [`product`] and [`stored::multiply`].
pub(super) struct Vectors;

impl Vectors {
    /// The scores of a unit's rows, see [`Tasks`].
    #[inline(always)]
    pub(super) fn scores<S: Simd>(&self, simd: S, tasks: &Tasks<'_>, unit: usize, columns: &Range<usize>) {
        let (b, kv) = tasks.problem.place(unit);
        let (rows, dim) = (tasks.problem.rows(), tasks.problem.dim);
        let scaled = tasks.scaled_queries(simd, unit);
        let mut sums = ScratchBuf::take(rows * PANEL);
        for run in tasks.runs_in(unit, columns) {
            for (part, position, keys) in tasks.held(b, &run.keys) {
                let mut at = keys.start;
                while at < keys.end {
                    let position = position + at - keys.start;
                    let (panel, first) = (position / PANEL, position % PANEL);
                    let rest = keys.end - at;
                    let place = unit * tasks.places.len + run.place() + at - run.keys.start;
                    let panels = panel..panel + (first + rest).div_ceil(PANEL);
                    let (k, cols) = match part.cache.panels(part.sequences[b], kv, panels) {
                        // From the first column of a panel on, it and all that follow are one right operand, unless it is to be read again.
                        Rows::F32(k) if first == 0 && rows <= GROUP => (k, rest),
                        Rows::F32(k) => (k, rest.min(PANEL - first)),
                        Rows::Stored(format, words, scales) => {
                            let columns = first..PANEL.min(first + rest);
                            at += columns.len();
                            let stored = (format, words, scales);
                            tasks.stored_scores(simd, (&scaled, &mut sums), stored, columns, place);
                            continue;
                        }
                    };
                    let extent = Extent { rows, cols, depth: dim };
                    at += cols;
                    // SAFETY: `scaled` is [rows, dim], each panel [dim, PANEL], and these are columns of the first or of all of them; the unit's
                    // scores are [rows, stride], of which columns from `place` belong to this task alone.
                    unsafe {
                        let q = Left { ptr: scaled.as_ptr(), stride: dim, across: false };
                        let k = Right::panels(k.as_ptr().add(first), dim);
                        let s = Dest { ptr: tasks.memory.at(place), stride: tasks.places.stride };
                        product(simd, extent, q, k, s, Onto::Zero);
                    }
                }
            }
        }
    }

    /// Columns of a unit's output.
    #[inline(always)]
    pub(super) fn output<S: Simd>(&self, simd: S, tasks: &Tasks<'_>, unit: usize, cols: Range<usize>) {
        let Places { stride, alpha, len, .. } = tasks.places;
        let (b, kv) = tasks.problem.place(unit);
        let (rows, v_dim) = (tasks.problem.rows(), tasks.problem.v_dim);
        // Stored values come in whole groups of columns.
        let width = cols.len().next_multiple_of(4 * GROUP_WORDS);
        let mut acc = ScratchBuf::zeroed(rows * width);
        let mut scaled = ScratchBuf::take(rows * KEY_BLOCK);
        for block in tasks.problem.blocks(unit) {
            for (part, position, keys) in tasks.held(b, &block.keys) {
                let (first, depth) = (keys.start == block.keys.start, keys.len());
                let place = block.place() + keys.start - block.keys.start;
                let values = match part.cache.values(part.sequences[b], kv) {
                    Rows::F32(values) => values,
                    Rows::Stored(format, words, scales) => {
                        // SAFETY: P and α of this unit are complete and only read now.
                        let memory = unsafe { tasks.memory.part(unit * len, len) };
                        if first && block.index > 0 {
                            let alpha = &memory[alpha + block.index * rows..][..rows];
                            for (acc, alpha) in acc.chunks_exact_mut(width).zip(alpha) {
                                acc.iter_mut().for_each(|x| *x *= alpha);
                            }
                        }
                        let p = MatRef::with_strides(&memory[place..], rows, depth, stride, 1);
                        let p = p.expect("P holds these keys");
                        let positions = position..position + depth;
                        let values = (format, words, scales);
                        let of_all = (positions, v_dim, cols.clone());
                        stored::add_values(simd, p, values, of_all, (&mut acc, &mut scaled));
                        continue;
                    }
                };
                // SAFETY: P [rows, stride] and α [blocks, rows] of this unit are complete and only read now; the
                // values hold these keys, of which `cols` are columns; `acc` has been cut for rows and columns.
                unsafe {
                    let unit = tasks.memory.at(unit * len);
                    let p = Left { ptr: unit.add(place), stride, across: false };
                    let v = Right::rows(values.as_ptr().add(position * v_dim + cols.start), v_dim);
                    let onto = match (first, block.index) {
                        (true, 0) => Onto::Zero,
                        (true, index) => Onto::Scaled(unit.add(alpha + index * rows)),
                        _ => Onto::Sum,
                    };
                    let o = Dest { ptr: acc.as_mut_ptr(), stride: width };
                    product(simd, Extent { rows, cols: cols.len(), depth }, p, v, o, onto);
                }
            }
        }
        tasks.store(simd, unit, (&acc, width), cols);
    }
}

impl Tasks<'_> {
    /// The scores of some columns of a panel in fewer bits, for all rows of a unit, whose first is at `place`.
    #[inline(always)]
    fn stored_scores<S: Simd>(
        &self,
        simd: S,
        (q, sums): (&[f32], &mut [f32]),
        (format, words, scales): (CacheFormat, &[u32], &[f32]),
        columns: Range<usize>,
        place: usize,
    ) {
        let (rows, dim) = (self.problem.rows(), self.problem.dim);
        sums.fill(0.0);
        let q = MatRef::new(q, rows, dim).expect("scaled queries");
        stored::multiply(simd, format, q, (words, PANEL / format.per_word()), (&mut *sums, PANEL, PANEL));
        for (r, acc) in sums.chunks_exact_mut(PANEL).enumerate() {
            acc.iter_mut().zip(scales).for_each(|(score, scale)| *score *= scale);
            // SAFETY: these columns of the unit's row of scores belong to this task alone.
            let scores = unsafe { self.memory.part(place + r * self.places.stride, columns.len()) };
            scores.copy_from_slice(&acc[columns.clone()]);
        }
    }
}
