//! Products of int8 rows and int4 weights: `C = activation(scale·Â·B [+ C] + bias)∘gate + residual`.
//!
//! # Naive form
//! ```text
//! for i in 0..m {
//!     s[i], q[i] = the row as in `gemm::int8`
//!     for j in 0..n {
//!         for g in groups { c[i][j] += t[g][j] * (Σ_{p∈g} q[i][p] * r[p][j]) }      // r: integers of 4 bits, t: scales
//!         c[i][j] *= s[i]
//!     }
//! }
//! ```
//! # Deviations
//! - With an A in f32 the weights are widened element by element. Here eight of them lie in a word as bytes after one AND (and a shift), so a
//!   product of one row takes a fifth of the instructions, or a tenth where the CPU has dot products of bytes.
//! - Rows are quantised 48 at a time, by each task for itself.

use std::ops::Range;

use super::epilogue::{Accum, Epilogue};
use super::int8::rows_at_once;
use super::int8_rows::{Int8Rows, quantise_blocks};
use super::microkernel::{
    ByteKernel, ByteProducts, ByteVisitor, Chains, GroupStrip, Order, Out, Rhs, WordBlock,
};
use super::packed::PackedWeights;
use super::placement::lies_far;
use crate::scratch::{ScratchBuf, Words};

/// One product with checked shapes; every task sees the whole of it.
#[derive(Clone, Copy)]
pub(super) struct GroupProduct<'a> {
    pub(super) a: Int8Rows<'a>,
    pub(super) b: &'a PackedWeights,
    pub(super) out: Out<f32>,
    pub(super) accum: Accum,
    pub(super) epilogue: Epilogue<'a>,
}

// SAFETY: C is the only part that is not Sync by itself; tasks write disjoint parts of it.
unsafe impl Sync for GroupProduct<'_> {}

/// One task: this part of C.
pub(super) struct GroupPart<'a> {
    pub(super) product: GroupProduct<'a>,
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
}

impl ByteVisitor for GroupPart<'_> {
    #[inline(always)]
    fn visit<P: ByteProducts, const MR: usize, const VECS: usize>(self, kernel: ByteKernel<P, MR, VECS>) {
        let GroupPart { product: GroupProduct { a, b, out, accum, epilogue }, rows, cols } = self;
        let (order, nr) = (Order::Nibbles, ByteKernel::<P, MR, VECS>::NR);
        let all = b.depths();
        let depths: Vec<_> = all.iter().flat_map(|depth| groups(depth.clone(), b.group())).collect();
        let row_words = order.words() * depths.iter().map(words_of).sum::<usize>();
        let held = rows_at_once(rows.len(), row_words);
        let (mut left, mut excess) = (Words::default(), Words::default());
        left.resize(held * row_words);
        excess.resize(held * depths.len());
        let mut scales = vec![0.0; held];
        let mut staging = ScratchBuf::take(b.rows());
        let mut chains = ScratchBuf::take(cols.len().next_multiple_of(nr));
        let mut blocks = Vec::with_capacity(depths.len());
        for first in rows.clone().step_by(held) {
            let block = first..(first + held).min(rows.end);
            for (i, scale) in block.clone().zip(&mut scales) {
                let to = &mut left[(i - first) * row_words..][..row_words];
                let mut of_groups = excess[(i - first) * depths.len()..][..depths.len()].iter_mut();
                (*scale, _) = quantise_blocks(
                    a,
                    i,
                    b.group(),
                    order,
                    (&mut staging, to),
                    #[inline(always)]
                    |sum| *of_groups.next().expect("one sum a group") = sum.wrapping_mul(8),
                );
            }
            // One row goes through memory as it lies: all panels of a block of K, then the next block.
            let at_once = if block.len() == 1 { 1 } else { all.len() }.max(1);
            let sweeps = all.len().div_ceil(at_once).max(1);
            let (mut word, mut of_group) = (0, 0);
            for sweep in 0..sweeps {
                let part = &all[sweep * at_once..((sweep + 1) * at_once).min(all.len())];
                let (mut j, mut words) = (cols.start, 0);
                while j < cols.end {
                    // One panel; or, for few rows, all whole ones.
                    let whole = (cols.end - j) / nr;
                    let several = block.len() <= ByteKernel::<P, MR, VECS>::THIN_GROUP_ROWS;
                    let panel = match if several { whole } else { whole.min(1) } {
                        0 => j..cols.end,
                        panels => j..j + panels * nr,
                    };
                    blocks.clear();
                    for depth in part {
                        push_groups(&mut blocks, b, (depth, &panel), nr);
                    }
                    words = order.words() * blocks.iter().map(|group| group.words).sum::<usize>();
                    let strip = GroupStrip {
                        rows: &scales[..block.len()],
                        cols: panel.len(),
                        far: lies_far(b.bytes()),
                        lhs: &left[word..][..block.len() * words],
                        groups: &blocks,
                        excess: &excess[of_group..][..block.len() * blocks.len()],
                        chains: Chains {
                            at: chains[j - cols.start..].as_mut_ptr(),
                            begin: sweep == 0,
                            end: sweep + 1 == sweeps,
                        },
                        out: out.from(block.start, panel.start),
                        finish: epilogue.finish(block.clone(), panel.clone(), (accum == Accum::Add, true)),
                    };
                    // SAFETY: the groups are those of these panels, each with its scales; this task alone writes these rows and columns of C,
                    // and the shapes of the epilogue were checked. `chains` has whole panels of places; each sweep but the first begins
                    // where the one before has ended, and of several sweeps there are only where there is one row.
                    unsafe { kernel.run_groups(&strip) };
                    j = panel.end;
                }
                word += words;
                of_group += blocks.len();
            }
        }
    }
}

/// Pushes where the words of each group of a block of K stand, in a panel or in the first of several.
#[inline(always)]
fn push_groups(
    blocks: &mut Vec<WordBlock>,
    b: &PackedWeights,
    (depth, panel): (&Range<usize>, &Range<usize>),
    nr: usize,
) {
    let Rhs { mut ptr, panel_stride, .. } = b.panels(depth.clone(), panel.clone());
    for group in groups(depth.clone(), b.group()) {
        let words = words_of(&group);
        // They follow the row of its scales.
        blocks.push(WordBlock { ptr: ptr.wrapping_add(nr), words, panel_stride });
        ptr = ptr.wrapping_add((1 + words) * nr);
    }
}

/// Words of a column of a group.
#[inline(always)]
fn words_of(group: &Range<usize>) -> usize {
    group.len().div_ceil(Order::Nibbles.elements())
}

/// The groups of a block of K, which begins with a group.
fn groups(depth: Range<usize>, group: usize) -> impl Iterator<Item = Range<usize>> {
    let end = depth.end;
    depth.step_by(group).map(move |first| first..(first + group).min(end))
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::super::microkernel::with_plain_dots;
    use super::*;
    use crate::gemm::{WeightFormat, gemm_int8};
    use crate::testing::{assert_same_bits, for_each_isa, uniform};
    use crate::view::{MatMut, MatRef};

    /// The tiles and the loop of VNNI, where the CPU has products of bytes by other means.
    #[test]
    fn dot_products_of_bytes_have_the_same_bits() {
        for (m, n, k) in [(1, 1, 1), (5, 17, 30), (8, 48, 8), (53, 50, 67), (3, 4, 0)] {
            let (a, b) = (uniform(m * k, 1), uniform(k * n, 2));
            let a = Int8Rows::Quantise(MatRef::new(&a, m, k).unwrap());
            for_each_isa(|ctx| {
                let format = WeightFormat::Int4 { group: 16 };
                let b = &PackedWeights::pack_as(ctx, MatRef::new(&b, k, n).unwrap(), format).unwrap();
                let [mut expected, mut found] = [0, 1].map(|x| vec![x as f32; m * n]);
                let c = MatMut::new(&mut expected, m, n).unwrap();
                gemm_int8(ctx, a, b, c, Accum::Overwrite, &Epilogue::new()).unwrap();
                let out = Out { ptr: found.as_mut_ptr(), row_stride: n, col_stride: 1 };
                let product = GroupProduct { a, b, out, accum: Accum::Overwrite, epilogue: Epilogue::new() };
                with_plain_dots(ctx.isa(), GroupPart { product, rows: 0..m, cols: 0..n });
                assert_same_bits(&found, &expected);
            });
        }
    }
}
