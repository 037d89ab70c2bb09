//! The kernel of bf16 × bf16 products with sums in f32, by dot products of pairs (AVX512-BF16).
//!
//! # Naive form
//! ```text
//! for i in 0..MR { for j in 0..NR { for q in 0..words {
//!     acc[i][j] += lhs[i][2·q] * rhs[2·q][j] + lhs[i][2·q + 1] * rhs[2·q + 1][j]
//! } } }
//! ```
//! # Deviations
//! - `vdpbf16ps` does the inner line for 16 columns. Both operands are bf16, so a product is exact in f32; the two
//!   products of a pair join the sum with at most two roundings, to nearest. Operands and results below 2⁻¹²⁶ count as zero,
//!   whatever the thread's rounding mode says. So an element is one chain over the words of a block of K, with at most
//!   as many roundings as the chain of f32 has, but not its bits.
//! - The words of rhs are those that lie for the kernel with an A in f32: pairs along k. The left operand is words too: a row-major matrix of
//!   bf16 as it lies, anything else as `gemm::bf16_pairs` made it. One load and one broadcast feed 32 multiply-adds a vector.
//! - The tile is that of f32: 24 sums, 3 vectors of words and a broadcast of 32 registers. Up to four rows take two or four panels at a time: one
//!   or two have too few chains to hide the latency, and several streams of weights from far away arrive sooner than one.
//! - As in the kernel of f32, tiles over far panels ask for the next one and for their rows of C.
//!
//! # Source
//! Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, `VDPBF16PS`.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "its proof exists on x86-64 only"))]

use pulp::Simd;

use super::bf16_products::Bf16Products;
#[cfg(target_arch = "x86_64")]
use super::bf16_products::Wide;
#[cfg(all(target_arch = "x86_64", any(test, feature = "testing")))]
use super::bf16_products::plain;
use super::finish::Tile;
use super::prefetch::{self, ALL, Ahead, HALF, NOTHING, Share};
use super::{F32, Finish, Out, Rhs};
use crate::isa::Bf16Dots;

/// Bytes from one row to another that lies in the same set of the first-level cache.
const PAGE: usize = 4096;

/// Rows of a group of the left operand.
pub(crate) const GROUP: usize = 16;

/// Words of two bf16 along k: word `q` of row `i` lies `i / GROUP · group_stride + i % GROUP · row_stride + q · word_stride` bf16 after the first,
/// at any alignment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PairRows {
    pub(crate) ptr: *const u16,
    pub(crate) group_stride: usize,
    pub(crate) row_stride: usize,
    pub(crate) word_stride: usize,
}

impl PairRows {
    /// Rows as they follow each other, `row_stride` bf16 apart.
    #[inline(always)]
    pub(crate) fn row_major(ptr: *const u16, row_stride: usize) -> PairRows {
        PairRows { ptr, group_stride: GROUP * row_stride, row_stride, word_stride: 2 }
    }

    /// Groups of `words` rows of GROUP words.
    #[inline(always)]
    pub(crate) fn groups(ptr: *const u32, words: usize) -> PairRows {
        let word_stride = 2 * GROUP;
        PairRows { ptr: ptr.cast(), group_stride: words * word_stride, row_stride: 2, word_stride }
    }

    /// The same from row `first` on, which begins a tile.
    #[inline(always)]
    fn from(self, first: usize) -> *const u16 {
        self.ptr.wrapping_add(first / GROUP * self.group_stride + first % GROUP * self.row_stride)
    }
}

/// A panel of C over one block of K; or one or two rows of C over several whole panels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bf16Strip<'a> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Words of a row of lhs, rows of words of rhs.
    pub(crate) words: usize,
    pub(crate) lhs: PairRows,
    /// Rows of NR words.
    pub(crate) rhs: Rhs,
    pub(crate) out: Out<f32>,
    pub(crate) finish: Finish<'a>,
}

/// The kernel with tiles of 8 rows and VECS vectors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bf16Kernel<D, const VECS: usize>(pub(super) D);

/// Something to be done with the kernel, inside its shell.
pub(crate) trait Bf16Visitor {
    /// Does it. Must be `#[inline(always)]`, or it is compiled outside of the shell.
    fn visit<D: Bf16Products, const VECS: usize>(self, kernel: Bf16Kernel<D, VECS>);
}

/// Runs `visitor` with the kernel.
pub(crate) fn with_bf16_kernel<V: Bf16Visitor>(proof: Bf16Dots, visitor: V) {
    match proof {
        // SAFETY: the value is the proof that the CPU has the instruction, beside the vectors.
        #[cfg(target_arch = "x86_64")]
        Bf16Dots::Wide(simd, _) => unsafe { wide(Wide(simd), visitor) },
        #[cfg(all(target_arch = "x86_64", any(test, feature = "testing")))]
        Bf16Dots::Emulated(simd) => plain::with_plain_dots(simd, visitor),
        #[cfg(not(target_arch = "x86_64"))]
        Bf16Dots::Never(nowhere) => {
            _ = visitor;
            nowhere.never()
        }
    }
}

/// The shell of AVX-512 with bf16: pulp has none.
#[cfg(target_arch = "x86_64")]
#[target_feature(
    enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16,fma,bmi1,bmi2,lzcnt,popcnt"
)]
fn wide<V: Bf16Visitor>(dots: Wide, visitor: V) {
    visitor.visit(Bf16Kernel::<_, 3>(dots));
}

impl<D: Bf16Products, const VECS: usize> Bf16Kernel<D, VECS> {
    pub(crate) const MR: usize = 8;
    pub(crate) const NR: usize = VECS * D::Simd::F32_LANES;
    /// Cache lines of a row of words.
    const LINES: usize = Self::NR.div_ceil(prefetch::LINE);
    /// Up to so many rows, a strip may span several panels.
    pub(crate) const THIN_ROWS: usize = 4;

    /// The products, for those who round operands.
    #[inline(always)]
    pub(crate) fn products(self) -> D {
        self.0
    }

    /// Computes one strip.
    ///
    /// # Safety
    /// - `lhs` reaches `rows` rows of `words` readable words;
    /// - `rhs` reaches `words` rows of NR readable words, in each panel;
    /// - `out` reaches `rows × cols` elements that no one else uses meanwhile, readable if `finish.add` is set;
    /// - bias, gate and residual, if any, have `cols` elements and `rows × cols`.
    #[inline(always)]
    pub(crate) unsafe fn run(self, strip: &Bf16Strip<'_>) {
        debug_assert!(strip.cols >= 1 && strip.rhs.depth_stride == Self::NR);
        // SAFETY: the contract, for all of it.
        unsafe {
            if strip.cols > Self::NR {
                debug_assert!(strip.rows <= Self::THIN_ROWS && strip.cols.is_multiple_of(Self::NR));
                match strip.rows {
                    0 => {}
                    1 => self.panels::<1, 4>(strip),
                    2 => self.panels::<2, 4>(strip),
                    3 => self.panels::<3, 2>(strip),
                    _ => self.panels::<4, 2>(strip),
                }
                return;
            }
            // Fewer vectors where a panel is not full; on the vectors of tests it is as wide as it is.
            match strip.cols.div_ceil(D::Simd::F32_LANES) {
                1 if const { VECS == 3 } => self.tiles::<1>(strip),
                2 if const { VECS == 3 } => self.tiles::<2>(strip),
                _ => self.tiles::<VECS>(strip),
            }
        }
    }

    /// All tiles of a strip of one panel, W vectors of which count.
    ///
    /// # Safety
    /// As [`Bf16Kernel::run`].
    #[inline(always)]
    unsafe fn tiles<const W: usize>(self, strip: &Bf16Strip<'_>) {
        // One vector a row is too few chains for 8 rows to run at full speed. But 16 rows that lie pages apart meet in one set of a first-level cache of eight ways: 64x64x16384
        // in place had 0.78 of oneDNN's speed (Zen 4).
        let meet = (2 * strip.lhs.row_stride).is_multiple_of(PAGE);
        let high = if const { W == 1 } && !meet { strip.rows / GROUP * GROUP } else { 0 };
        let full = strip.rows / Self::MR * Self::MR;
        // SAFETY: the contract, for all of it; these are rows of the strip.
        unsafe {
            for first in (0..high).step_by(GROUP) {
                self.tile::<GROUP, W>(first, strip);
            }
            for first in (high..full).step_by(Self::MR) {
                self.tile::<8, W>(first, strip);
            }
            match strip.rows - full {
                0 => {}
                1 => self.tile::<1, W>(full, strip),
                2 => self.tile::<2, W>(full, strip),
                3 => self.tile::<3, W>(full, strip),
                4 => self.tile::<4, W>(full, strip),
                5 => self.tile::<5, W>(full, strip),
                6 => self.tile::<6, W>(full, strip),
                _ => self.tile::<7, W>(full, strip),
            }
        }
    }

    /// The tile of H rows that starts at row `first`.
    ///
    /// # Safety
    /// As [`Bf16Kernel::run`]; the rows are rows of the strip.
    #[inline(always)]
    unsafe fn tile<const H: usize, const W: usize>(self, first: usize, strip: &Bf16Strip<'_>) {
        let Rhs { ptr, panel_stride, far, .. } = strip.rhs;
        let left = (strip.lhs.from(first), strip.lhs);
        if far {
            prefetch::rows_of(strip.out, first..first + H, strip.cols, Self::NR / prefetch::LINE);
        }
        // Its share of the next panel, if not all of it was asked for.
        let share = Share::of(H, strip.rows, Self::MR);
        let start = first / Self::MR * strip.words * share.lines(Self::LINES) * prefetch::LINE;
        let ahead = Ahead::from(ptr.wrapping_add(panel_stride + start));
        let (words, rhs) = (strip.words, strip.rhs);
        // SAFETY: the contract.
        let [acc] = unsafe {
            match share {
                _ if !far || start >= panel_stride => {
                    self.chains::<1, H, W, NOTHING>(words, left, rhs, ahead)
                }
                Share::All => self.chains::<1, H, W, ALL>(words, left, rhs, ahead),
                Share::Half => self.chains::<1, H, W, HALF>(words, left, rhs, ahead),
            }
        };
        let tile = Tile { simd: self.0.simd(), acc };
        // SAFETY: the contract on `out`, bias, gate and residual.
        unsafe { tile.finish::<F32>(first, strip.cols, &strip.finish, strip.out) };
    }

    /// H rows over whole panels, P at a time, the rest one by one.
    ///
    /// # Safety
    /// As [`Bf16Kernel::run`].
    #[inline(always)]
    unsafe fn panels<const H: usize, const P: usize>(self, strip: &Bf16Strip<'_>) {
        let count = strip.cols / Self::NR;
        let whole = count / P * P;
        // SAFETY: the contract, for all of it; these are panels of the strip.
        unsafe {
            for first in (0..whole).step_by(P) {
                self.group::<H, P>(first, strip);
            }
            for panel in whole..count {
                self.group::<H, 1>(panel, strip);
            }
        }
    }

    /// H rows of the P panels from panel `first` on.
    ///
    /// # Safety
    /// As [`Bf16Kernel::run`]; the panels are panels of the strip.
    #[inline(always)]
    unsafe fn group<const H: usize, const P: usize>(self, first: usize, strip: &Bf16Strip<'_>) {
        let rhs = Rhs { ptr: strip.rhs.ptr.wrapping_add(first * strip.rhs.panel_stride), ..strip.rhs };
        let (left, nothing) = ((strip.lhs.ptr, strip.lhs), Ahead::from(rhs.ptr));
        // SAFETY: the contract.
        let acc = unsafe { self.chains::<P, H, VECS, NOTHING>(strip.words, left, rhs, nothing) };
        for (panel, acc) in (first..).zip(acc) {
            let (out, finish) =
                (strip.out.from(0, panel * Self::NR), strip.finish.after_col(panel * Self::NR));
            // SAFETY: the contract on `out`, bias, gate and residual: this panel's columns of them.
            unsafe { Tile { simd: self.0.simd(), acc }.finish::<F32>(0, Self::NR, &finish, out) };
        }
    }

    /// `acc[r][i][w] = Σ_q left[i][q] · right[r][q][w]`, one chain over `q` for each element, of P panels.
    ///
    /// # Safety
    /// H rows of `left` reach `words` words, and so many rows of W vectors each of P panels.
    #[inline(always)]
    unsafe fn chains<const P: usize, const H: usize, const W: usize, const AHEAD: usize>(
        self,
        words: usize,
        (mut left, lies): (*const u16, PairRows),
        right: Rhs,
        mut ahead: Ahead,
    ) -> [[[<D::Simd as Simd>::f32s; W]; H]; P] {
        let simd = self.0.simd();
        let mut acc = [[[simd.splat_f32s(0.0); W]; H]; P];
        let mut right_ptr = right.ptr;
        for _ in 0..words {
            ahead.fetch_share::<AHEAD>(Self::LINES);
            for (panel, acc) in acc.iter_mut().enumerate() {
                let from =
                    right_ptr.wrapping_add(panel * right.panel_stride).cast::<<D::Simd as Simd>::u32s>();
                let mut row = [simd.splat_u32s(0); W];
                for (w, row) in row.iter_mut().enumerate() {
                    // SAFETY: the contract on `right`.
                    *row = unsafe { from.add(w).read_unaligned() };
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    let pair = left.wrapping_add(i * lies.row_stride).cast::<u32>();
                    // SAFETY: the contract on `left`.
                    let pair = simd.splat_u32s(unsafe { pair.read_unaligned() });
                    for (acc, row) in acc.iter_mut().zip(row) {
                        *acc = self.0.add_dots(*acc, pair, row);
                    }
                }
            }
            (left, right_ptr) = (left.wrapping_add(lies.word_stride), right_ptr.wrapping_add(Self::NR));
        }
        acc
    }
}
