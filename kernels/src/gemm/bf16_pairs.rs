//! One thread's part of a product of bf16 and bf16 on vectors: the loops around [`Bf16Kernel`], and how f32 becomes pairs.
//!
//! ```text
//! for jc in 0..n step nc                    panels of B, rounded unless they were packed beforehand
//!   for pc in 0..k step kc                  K is summed block by block, in order
//!     for ic in 0..m step mc                a block of A is rounded and fits L2
//!       for jr in jc..jc+nc step NR         a panel of B fits L1
//!         for ir in ic..ic+mc step MR       inside the kernel's strip
//! ```
//! A row of A and a column of B become words of two bf16 that follow each other along k (`super::pair_packing`); a row-major A in bf16 is
//! such words where it lies. A task rounds its own rows, again for each nc columns.
//!
//! # Accuracy
//! An operand is rounded to the nearest *finite* bf16: what lies beyond the largest, 2¹²⁸·(1 − 2⁻⁸), becomes that one, which is off by no
//! more than 2⁻⁸ of it. So with `â = a·(1 + δ)`, `|δ| ≤ 2⁻⁸`, for all normal numbers, and products that are exact in f32,
//! `|ĉ − c| ≤ (γ_k + 2·2⁻⁸·(1 + 2⁻⁷))·(|A|·|B|)`, to which each product and each sum below 2⁻¹²⁶, and each operand below that,
//! adds itself, because the instruction takes it for zero. An infinity stays one, NaN too. Asserted by
//! `gemm::tests::tiles::the_error_is_within_the_bound_of_the_precision` and `gemm::tests::bf16::the_ends_of_the_range`.

use super::macrokernel::{Part, RightOperand};
use super::microkernel::{
    Bf16Kernel, Bf16Products, Bf16Strip, Bf16Visitor, PAIR_GROUP as GROUP, PairRows, Rhs,
};
use super::packed::PackedWeights;
use super::pair_packing::{Paired, pack_columns, pack_rows};
use super::placement::lies_far;
use crate::context::Blocking;
use crate::scratch::ScratchBuf;
use crate::view::MatRef;

/// Columns of a panel.
const NR: usize = 48;

impl<A: Paired> Bf16Visitor for Part<'_, A> {
    #[inline(always)]
    fn visit<D: Bf16Products, const VECS: usize>(self, kernel: Bf16Kernel<D, VECS>) {
        const { assert!(Bf16Kernel::<D, VECS>::NR == NR) };
        let Part { problem, ref rows, ref cols } = self;
        let Blocking { mc, kc, nc } = problem.blocking;
        let k = problem.a.cols();
        let depth_words = kc.min(k).div_ceil(2);
        let mut left = ScratchBuf::take(depth_words * mc.min(rows.len()).next_multiple_of(GROUP));
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
                    let a = problem.a.sub(block_rows.clone(), depth.clone());
                    let lhs = left_block(kernel.products(), a, left.words_mut());
                    let mut first = jc;
                    while first < block_cols.end {
                        // One panel; or, for few rows over panels that lie ready, all whole ones.
                        let whole = (block_cols.end - first) / NR;
                        let several = !plain && block_rows.len() <= Bf16Kernel::<D, VECS>::THIN_ROWS;
                        let end = match if several { whole } else { whole.min(1) } {
                            0 => block_cols.end,
                            panels => first + panels * NR,
                        };
                        let cols = first..end;
                        let rhs = match problem.b {
                            RightOperand::Packed(b) => b.panels(depth.clone(), cols.clone()),
                            RightOperand::Plain(b) => {
                                let block = right.words_mut();
                                let far = ic != rows.start && lies_far(size_of_val(block));
                                let panel = &mut block[(first - jc) * words..][..NR * words];
                                if ic == rows.start {
                                    let b = b.sub(depth.clone(), cols.clone());
                                    pack_columns::<_, _, NR>(kernel.products(), b, panel);
                                }
                                let (ptr, panel_stride) = (panel.as_ptr(), panel.len());
                                Rhs { ptr, depth_stride: NR, panel_stride, group: depth.len(), far }
                            }
                        };
                        let strip = Bf16Strip {
                            rows: block_rows.len(),
                            cols: cols.len(),
                            words,
                            lhs,
                            rhs,
                            out: problem.out(ic, first),
                            finish: problem.finish(block_rows.clone(), cols, depth.clone()),
                        };
                        // SAFETY: `lhs` and `rhs` are the words of this block; this task alone writes these rows and columns of C,
                        // and the driver checked the shapes of the epilogue.
                        unsafe { kernel.run(&strip) };
                        first = end;
                    }
                }
            }
        }
    }
}

/// A block of A as the kernel reads it: where it lies, or from `scratch`.
#[inline(always)]
fn left_block<D: Bf16Products, A: Paired>(dots: D, a: MatRef<'_, A>, scratch: &mut [u32]) -> PairRows {
    let words = a.cols().div_ceil(2);
    if let Some(ready) = A::as_it_lies(a) {
        return ready;
    }
    if a.col_stride() == 1 {
        pack_rows(dots, a, &mut scratch[..a.rows() * words]);
        return PairRows::row_major(scratch.as_ptr().cast(), 2 * words);
    }
    for first in (0..a.rows()).step_by(GROUP) {
        let group = a.sub(first..(first + GROUP).min(a.rows()), 0..a.cols()).t();
        pack_columns::<_, _, GROUP>(dots, group, &mut scratch[first * words..][..GROUP * words]);
    }
    PairRows::groups(scratch.as_ptr(), words)
}

/// Packs the words of weights, block of K after block of K.
pub(super) struct PackPairs<'a, T>(pub(super) &'a mut PackedWeights, pub(super) MatRef<'a, T>);

impl<T: Paired> Bf16Visitor for PackPairs<'_, T> {
    #[inline(always)]
    fn visit<D: Bf16Products, const VECS: usize>(self, kernel: Bf16Kernel<D, VECS>) {
        let PackPairs(packed, b) = self;
        for depth in packed.depths() {
            for first in (0..b.cols()).step_by(NR) {
                let panel = b.sub(depth.clone(), first..(first + NR).min(b.cols()));
                let words = packed.panel_mut(depth.clone(), first);
                pack_columns::<_, _, NR>(kernel.products(), panel, words);
            }
        }
    }
}
