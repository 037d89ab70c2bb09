//! One thread's part of a product of bf16 and bf16 on vectors: the loops around [`Bf16Kernel`], and how f32 becomes pairs.
//!
//! ```text
//! for jc in 0..n step nc                    panels of B, rounded unless they were packed beforehand
//!   for pc in 0..k step kc                  K is summed block by block, in order
//!     for ic in 0..m step mc                a block of A is rounded and fits L2
//!       for jr in jc..jc+nc step NR         a panel of B fits L1
//!         for ir in ic..ic+mc step MR       inside the kernel's strip
//! ```
//! A row of A and a column of B become words of two bf16 that follow each other along k; at an odd end the upper half is 0.
//! A task rounds its own rows, again for each nc columns.
//!
//! # Accuracy
//! An operand is rounded to the nearest *finite* bf16: what lies beyond the largest, 2¹²⁸·(1 − 2⁻⁸), becomes that one, which is off by no
//! more than 2⁻⁸ of it. So with `â = a·(1 + δ)`, `|δ| ≤ 2⁻⁸`, for all normal numbers, and products that are exact in f32,
//! `|ĉ − c| ≤ (γ_k + 2·2⁻⁸·(1 + 2⁻⁷))·(|A|·|B|)`, to which each product and each sum below 2⁻¹²⁶, and each operand below that,
//! adds itself, because the instruction takes it for zero. An infinity stays one, NaN too. Asserted by
//! `gemm::tests::tiles::the_error_is_within_the_bound_of_the_precision` and `gemm::tests::bf16::the_ends_of_the_range`.

use pulp::{Simd, WithSimd};

use super::macrokernel::{Part, RightOperand};
use super::microkernel::{Bf16Kernel, Bf16Products, Bf16Strip, Bf16Visitor};
use super::pack::{Element, Source, pack_panel};
use super::packed::PackedWeights;
use super::quantise::bf16_bits;
use crate::context::Blocking;
use crate::scratch::ScratchBuf;
use crate::view::MatRef;

/// Columns of a panel.
const NR: usize = 48;
/// Rows that are staged in f32 where an operand does not lie as it is read.
const STAGED: usize = 16;

impl Bf16Visitor for Part<'_> {
    #[inline(always)]
    fn visit<D: Bf16Products, const VECS: usize>(self, kernel: Bf16Kernel<D, VECS>) {
        const { assert!(Bf16Kernel::<D, VECS>::NR == NR) };
        let Part { problem, ref rows, ref cols } = self;
        let Blocking { mc, kc, nc } = problem.blocking;
        let k = problem.a.cols();
        let depth_words = kc.min(k).div_ceil(2);
        let mut left = ScratchBuf::take(depth_words * mc.min(rows.len()));
        let plain = matches!(problem.b, RightOperand::Plain(_));
        let right_cols = if plain { nc.min(cols.len()).next_multiple_of(NR) } else { 0 };
        let mut right = ScratchBuf::take(depth_words * right_cols);
        for jc in cols.clone().step_by(nc) {
            let block_cols = jc..(jc + nc).min(cols.end);
            for pc in (0..k.max(1)).step_by(kc) {
                let depth = pc..(pc + kc).min(k);
                let words = depth.len().div_ceil(2);
                for ic in rows.clone().step_by(mc) {
                    let block_rows = ic..(ic + mc).min(rows.end);
                    let lhs = &mut left.words_mut()[..block_rows.len() * words];
                    round_rows(problem.a.sub(block_rows.clone(), depth.clone()), lhs);
                    for first in block_cols.clone().step_by(NR) {
                        let cols = first..(first + NR).min(block_cols.end);
                        let rhs = match problem.b {
                            RightOperand::Packed(b) => b.panels(depth.clone(), cols.clone()).ptr,
                            RightOperand::Plain(b) => {
                                let panel = &mut right.words_mut()[(first - jc) * words..][..NR * words];
                                if ic == rows.start {
                                    round_panel(b.sub(depth.clone(), cols.clone()), panel);
                                }
                                panel.as_ptr()
                            }
                        };
                        let strip = Bf16Strip {
                            lhs,
                            words,
                            rows: block_rows.len(),
                            cols: cols.len(),
                            rhs,
                            out: problem.out(ic, first),
                            finish: problem.finish(block_rows.clone(), cols.clone(), depth.clone()),
                        };
                        // SAFETY: `rhs` is a panel of this block, in whole rows of NR words; this task alone writes these rows
                        // and columns of C, and the driver checked the shapes of the epilogue.
                        unsafe { kernel.run(&strip) };
                    }
                }
            }
        }
    }
}

/// Rows of A as words, row after row.
#[inline(always)]
fn round_rows(a: MatRef<'_>, words: &mut [u32]) {
    let (rows, depth) = (a.rows(), a.cols());
    let row_words = depth.div_ceil(2);
    if depth == 0 {
        return;
    }
    if a.col_stride() == 1 {
        for (i, words) in words.chunks_exact_mut(row_words).enumerate() {
            round_row(a.row(i), words);
        }
        return;
    }
    let mut staging = ScratchBuf::take(STAGED * depth);
    for first in (0..rows).step_by(STAGED) {
        let part = a.sub(first..(first + STAGED).min(rows), 0..depth);
        let staged = &mut staging[..part.rows() * depth];
        // SAFETY: the source is the view `part`, its rows as the depth.
        unsafe { pack_panel(Source::of(&part), part.rows(), depth, staged, depth) };
        let words = words[first * row_words..].chunks_exact_mut(row_words);
        for (row, words) in staged.chunks_exact(depth).zip(words) {
            round_row(row, words);
        }
    }
}

/// A row as words.
#[inline(always)]
fn round_row(row: &[f32], words: &mut [u32]) {
    let (pairs, rest) = row.as_chunks::<2>();
    for (word, [low, high]) in words.iter_mut().zip(pairs) {
        *word = rounded(*low) | rounded(*high) << 16;
    }
    if let ([last], Some(word)) = (rest, words.last_mut()) {
        *word = rounded(*last);
    }
}

/// Up to NR columns of B as rows of NR words; the columns that are missing are zero.
#[inline(always)]
fn round_panel<T: Element>(b: MatRef<'_, T>, words: &mut [u32]) {
    let mut staging = [0.0; STAGED * NR];
    let (depth, cols) = (b.rows(), b.cols());
    let rows_of_words = words.as_chunks_mut::<NR>().0;
    for (words, first) in rows_of_words.chunks_mut(STAGED / 2).zip((0..depth).step_by(STAGED)) {
        let part = b.sub(first..(first + STAGED).min(depth), 0..cols);
        let (staged, beyond) = staging.split_at_mut(part.rows() * NR);
        beyond.fill(0.0);
        // SAFETY: the source is the view `part`.
        unsafe { pack_panel(Source::of(&part), part.rows(), cols, staged, NR) };
        let (rows, _) = staging.as_chunks::<NR>();
        for (words, [low, high]) in words.iter_mut().zip(rows.as_chunks::<2>().0) {
            for ((word, low), high) in words.iter_mut().zip(low).zip(high) {
                *word = rounded(*low) | rounded(*high) << 16;
            }
        }
    }
}

/// The finite bf16 next to `x`, ties to even; infinity and NaN stay what they are.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    /// The largest f32 that rounds to the largest finite bf16.
    const LARGEST: u32 = 0x7f7f_7fff;
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let held = if magnitude < f32::INFINITY.to_bits() { magnitude.min(LARGEST) } else { magnitude };
    bf16_bits(f32::from_bits(bits & 0x8000_0000 | held))
}

/// Packs the words of weights, block of K after block of K, in the shell of the vectors.
pub(super) struct PackPairs<'a, T>(pub(super) &'a mut PackedWeights, pub(super) MatRef<'a, T>);

impl<T: Element> WithSimd for PackPairs<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let PackPairs(packed, b) = self;
        for depth in packed.depths() {
            for first in (0..b.cols()).step_by(NR) {
                let cols = first..(first + NR).min(b.cols());
                round_panel(b.sub(depth.clone(), cols.clone()), packed.panel_mut(depth.clone(), first));
            }
        }
    }
}
