//! The two products of decoding on vectors, the cache in any format.
//!
//! Each element is one chain of multiply-adds in ascending order, as in the full pass: the keys of a panel are a right operand as it stands, and so are
//! values.

use std::ops::Range;

use pulp::Simd;

use super::cache::{CacheFormat, PANEL, Rows};
use super::decode::{Decode, Places};
use super::decode_tasks::{Products, Tasks};
use super::problem::KEY_BLOCK;
use super::stored::{self, GROUP_WORDS};
use super::tile::{Dest, Extent, Left, Onto, Right, product};
use crate::scratch::ScratchBuf;
use crate::view::MatRef;

/// [`product`] and [`stored::multiply`].
pub(super) struct Vectors;

impl Products for Vectors {
    #[inline(always)]
    fn scores<S: Simd>(&self, simd: S, tasks: &Tasks<'_>, unit: usize, keys: &Range<usize>) {
        let Decode { parts, dim, .. } = tasks.problem;
        let (b, kv) = tasks.place(unit);
        let rows = tasks.problem.rows();
        let scaled = tasks.scaled_queries(simd, unit);
        let mut start = 0;
        for part in parts {
            let end = start + part.lengths[b];
            let seen = keys.start.max(start)..keys.end.min(end);
            let mut at = seen.start;
            while at < seen.end {
                let (panel, first) = ((at - start) / PANEL, (at - start) % PANEL);
                let cols = (PANEL - first).min(seen.end - at);
                let k = match part.cache.panel(part.sequences[b], kv, panel) {
                    Rows::F32(k) => k,
                    Rows::Stored(format, words, scales) => {
                        let place = unit * tasks.places.len + at;
                        let columns = first..first + cols;
                        tasks.stored_scores(simd, &scaled, (format, words, scales), columns, place);
                        at += cols;
                        continue;
                    }
                };
                let extent = Extent { rows, cols, depth: dim };
                // SAFETY: `scaled` is [rows, dim], the panel [dim, PANEL] of which these are columns; the unit's
                // scores are [rows, stride], of which columns from `at` belong to this task alone.
                unsafe {
                    let q = Left { ptr: scaled.as_ptr(), stride: dim, across: false };
                    let k = Right { ptr: k.as_ptr().add(first), stride: PANEL };
                    let s = tasks.memory.at(unit * tasks.places.len + at);
                    product(simd, extent, q, k, Dest { ptr: s, stride: tasks.places.stride }, Onto::Zero);
                }
                at += cols;
            }
            start = end;
        }
    }

    #[inline(always)]
    fn output<S: Simd>(&self, simd: S, tasks: &Tasks<'_>, unit: usize, cols: Range<usize>) {
        let Decode { parts, v_dim, .. } = tasks.problem;
        let Places { stride, alpha, len, .. } = tasks.places;
        let (b, kv) = tasks.place(unit);
        let (rows, total) = (tasks.problem.rows(), tasks.problem.total(b));
        // Stored values come in whole groups of columns.
        let width = cols.len().next_multiple_of(4 * GROUP_WORDS);
        let mut acc = ScratchBuf::zeroed(rows * width);
        let mut start = 0;
        for part in parts {
            let end = start + part.lengths[b];
            let values = part.cache.values(part.sequences[b], kv);
            let mut at = start;
            while at < end {
                let (block, first) = (at / KEY_BLOCK, at % KEY_BLOCK);
                let depth = (KEY_BLOCK - first).min(end - at);
                let values = match values {
                    Rows::F32(values) => values,
                    Rows::Stored(format, words, scales) => {
                        // SAFETY: P and α of this unit are complete and only read now.
                        let memory = unsafe { tasks.memory.part(unit * len, len) };
                        if first == 0 && block > 0 {
                            let alpha = &memory[alpha + block * rows..][..rows];
                            for (acc, alpha) in acc.chunks_exact_mut(width).zip(alpha) {
                                acc.iter_mut().for_each(|x| *x *= alpha);
                            }
                        }
                        let p = MatRef::with_strides(&memory[at..], rows, depth, stride, 1);
                        let p = p.expect("P holds these keys");
                        let keys = at - start..at - start + depth;
                        let values = (format, words, scales);
                        stored::add_values(simd, p, values, (keys, v_dim, cols.clone()), &mut acc);
                        at += depth;
                        continue;
                    }
                };
                // SAFETY: P [rows, stride] and α [blocks, rows] of this unit are complete and only read now; the
                // values hold these keys, of which `cols` are columns; `acc` has been cut for rows and columns.
                unsafe {
                    let unit = tasks.memory.at(unit * len);
                    let p = Left { ptr: unit.add(at), stride, across: false };
                    let v =
                        Right { ptr: values.as_ptr().add((at - start) * v_dim + cols.start), stride: v_dim };
                    let onto = match (first, block) {
                        (0, 0) => Onto::Zero,
                        (0, _) => Onto::Scaled(unit.add(alpha + block * rows)),
                        _ => Onto::Sum,
                    };
                    let o = Dest { ptr: acc.as_mut_ptr(), stride: width };
                    product(simd, Extent { rows, cols: cols.len(), depth }, p, v, o, onto);
                }
                at += depth;
            }
            start = end;
        }
        debug_assert_eq!(start, total, "the parts are all keys");
        tasks.store(simd, unit, (&acc, width), cols);
    }
}

impl Tasks<'_> {
    /// The scores of some columns of a panel in fewer bits, for all rows of a unit, whose first is at `place`.
    #[inline(always)]
    fn stored_scores<S: Simd>(
        &self,
        simd: S,
        q: &[f32],
        (format, words, scales): (CacheFormat, &[u32], &[f32]),
        columns: Range<usize>,
        place: usize,
    ) {
        let dim = self.problem.dim;
        for r in 0..self.problem.rows() {
            let mut acc = [0.0; PANEL];
            stored::multiply(
                simd,
                format,
                &q[r * dim..][..dim],
                (words, PANEL / format.per_word()),
                &mut acc,
            );
            acc.iter_mut().zip(scales).for_each(|(score, scale)| *score *= scale);
            // SAFETY: these columns of the unit's row of scores belong to this task alone.
            let scores = unsafe { self.memory.part(place + r * self.places.stride, columns.len()) };
            scores.copy_from_slice(&acc[columns.clone()]);
        }
    }
}
