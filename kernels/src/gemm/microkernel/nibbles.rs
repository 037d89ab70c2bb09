//! The kernel of int8 rows and int4 weights: exact sums in i32 for each group of the weights, and a chain of the groups in f32.
//!
//! # Naive form
//! ```text
//! for i in 0..MR { for j in 0..NR { for g in groups {
//!     for p in g { sum[i][j] += lhs[i][p] * (nibble[p][j] - 8) }
//!     acc[i][j] += sum[i][j] * scale[g][j]
//! } } }
//! out[i][j] = lhs_scale[i] * acc[i][j]
//! ```
//! # Deviations
//! - The weights are those of the f32 kernel for int4. As in `bytes` the offset is not subtracted from each element: `8·Σ_{p∈g} lhs[i][p]` goes
//!   from the sum of the group.
//! - One or two rows take 4 or 2 panels at a time on AVX2, group by group: several streams of weights from memory arrive sooner than one.
//! - While the first tile runs it asks for the next panel, group by group: with weights in memory one row gains 1.09 (minima) and 1.18 (medians) on AVX2.
//! - One row goes through all panels of a block of K before the next block, as the weights lie in memory; its chains wait meanwhile.
//! - A group's sums stay in registers; the chains in f32 wait in L1 meanwhile, and cost a load, a multiply-add and a store a group.

use pulp::Simd;

use super::bytes::{ByteKernel, ByteProducts, Order, WordBlock, less};
use super::finish::Tile;
use super::prefetch::{self, Ahead};
use super::{F32, Finish, Out};

/// The chains of one row, from one block of K to the next.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chains {
    /// Where they wait: whole panels of them.
    pub(crate) at: *mut f32,
    /// Whether these groups are the first.
    pub(crate) begin: bool,
    /// Whether they are the last.
    pub(crate) end: bool,
}

/// One panel of C, all of K or, for one row, a part of it; or few rows of C over several whole panels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GroupStrip<'a> {
    /// The scale of each row.
    pub(crate) rows: &'a [f32],
    pub(crate) cols: usize,
    /// Whether the next panel follows this one and lies in no near cache.
    pub(crate) far: bool,
    /// Row-major; for each row of words in the groups' order its elements, as [`Order::Nibbles`] says.
    pub(crate) lhs: &'a [u32],
    /// Their words; NR scales stand before the first word of each.
    pub(crate) groups: &'a [WordBlock],
    /// `8·Σ_p lhs[p]` over each group, row-major `[rows, groups]`.
    pub(crate) excess: &'a [u32],
    pub(crate) chains: Chains,
    pub(crate) out: Out<f32>,
    pub(crate) finish: Finish<'a>,
}

impl<P: ByteProducts, const MR: usize, const VECS: usize> ByteKernel<P, MR, VECS> {
    /// Up to so many rows, a strip may span several panels.
    pub(crate) const THIN_GROUP_ROWS: usize = if P::Simd::F32_LANES == 8 { 2 } else { 0 };

    /// Computes one strip.
    ///
    /// # Safety
    /// - each group reaches `words` rows of NR readable words, and NR f32 before them;
    /// - where chains do not begin or end here, there is one row and they have their places, of which those that do not begin have been written;
    /// - `out` reaches `rows × cols` elements that no one else uses meanwhile, readable if it is added to;
    /// - bias, gate and residual, if any, have `cols` elements and `rows × cols`.
    #[inline(always)]
    pub(crate) unsafe fn run_groups(self, strip: &GroupStrip<'_>) {
        debug_assert!(strip.cols >= 1);
        let (rows, words) = (strip.rows.len(), strip.groups.iter().map(|group| group.words).sum::<usize>());
        assert!(strip.lhs.len() == rows * Order::Nibbles.words() * words);
        assert!(strip.excess.len() == rows * strip.groups.len());
        if strip.cols > Self::NR {
            debug_assert!(rows <= Self::THIN_GROUP_ROWS && strip.cols.is_multiple_of(Self::NR));
            // SAFETY: the contract.
            unsafe {
                match rows {
                    0 => {}
                    1 => self.panels_of_groups::<1, 4>(strip),
                    _ => self.panels_of_groups::<2, 2>(strip),
                }
            }
            return;
        }
        let mut first = 0;
        while first < rows {
            let height = MR.min(rows - first);
            // SAFETY: the contract; rows `first .. first + height` are rows of the strip.
            unsafe {
                match height {
                    1 => self.tile_of_groups::<1, 1>(first, 0, strip),
                    2 => self.tile_of_groups::<1, 2>(first, 0, strip),
                    3 => self.tile_of_groups::<1, 3>(first, 0, strip),
                    4 => self.tile_of_groups::<1, 4>(first, 0, strip),
                    5 => self.tile_of_groups::<1, 5>(first, 0, strip),
                    6 => self.tile_of_groups::<1, 6>(first, 0, strip),
                    7 => self.tile_of_groups::<1, 7>(first, 0, strip),
                    _ => self.tile_of_groups::<1, 8>(first, 0, strip),
                }
            }
            first += height;
        }
    }

    /// H rows over whole panels, Q at a time, the rest one by one.
    ///
    /// # Safety
    /// As [`ByteKernel::run_groups`].
    #[inline(always)]
    unsafe fn panels_of_groups<const H: usize, const Q: usize>(self, strip: &GroupStrip<'_>) {
        if const { Self::THIN_GROUP_ROWS == 0 } {
            unreachable!("a strip is one panel wide");
        }
        let count = strip.cols / Self::NR;
        let whole = count / Q * Q;
        // SAFETY: the contract, for all of it; these are panels of the strip.
        unsafe {
            for panel in (0..whole).step_by(Q) {
                self.tile_of_groups::<Q, H>(0, panel, strip);
            }
            for panel in whole..count {
                self.tile_of_groups::<1, H>(0, panel, strip);
            }
        }
    }

    /// The tile of H rows that starts at row `first`, in Q panels from `panel` on.
    ///
    /// # Safety
    /// As [`ByteKernel::run_groups`]; the rows are rows of the strip, the panels its panels.
    #[inline(always)]
    unsafe fn tile_of_groups<const Q: usize, const H: usize>(
        self,
        first: usize,
        panel: usize,
        strip: &GroupStrip<'_>,
    ) {
        if const { H > MR } {
            unreachable!("a tile is at most {MR} rows high");
        }
        let simd = self.0.simd();
        let row_words = strip.lhs.len() / strip.rows.len();
        let mut lhs = strip.lhs[first * row_words..(first + H) * row_words].as_ptr();
        let count = strip.groups.len();
        let excess = &strip.excess[first * count..(first + H) * count];
        let mut tiles = [[[simd.splat_f32s(0.0); VECS]; H]; Q];
        let Chains { at: waiting, begin, end } = strip.chains;
        let waiting = waiting.wrapping_add(panel * Self::NR).cast::<<P::Simd as Simd>::f32s>();
        debug_assert!(begin && end || H == 1 && strip.rows.len() == 1);
        if const { H == 1 } && !begin {
            for (x, w) in tiles.as_flattened_mut().as_flattened_mut().iter_mut().zip(0..) {
                // SAFETY: the contract on chains.
                *x = unsafe { waiting.add(w).read_unaligned() };
            }
        }
        for (at, group) in strip.groups.iter().enumerate() {
            for (q, tile) in tiles.iter_mut().enumerate() {
                let ptr = group.ptr.wrapping_add((panel + q) * group.panel_stride);
                if const { P::Simd::F32_LANES == 8 } && strip.far && first == 0 {
                    let lines = (1 + group.words) * const { Self::NR.div_ceil(prefetch::LINE) };
                    Ahead::from(ptr.wrapping_add(Q * group.panel_stride - Self::NR)).fetch(lines);
                }
                let mut sums = [[simd.splat_u32s(0); VECS]; H];
                // SAFETY: the contract on the group; `run_groups` checked that every row of lhs has as many words.
                unsafe { self.0.add_nibbles(&mut sums, (lhs, row_words), WordBlock { ptr, ..*group }) };
                let scales = ptr.wrapping_sub(Self::NR).cast::<<P::Simd as Simd>::f32s>();
                for w in 0..VECS {
                    // SAFETY: the contract on the scales.
                    let scale = unsafe { scales.add(w).read_unaligned() };
                    for (i, (tile, sums)) in tile.iter_mut().zip(&sums).enumerate() {
                        let sum = less::<P::Simd>(sums[w], excess[i * count + at]);
                        tile[w] = simd.mul_add_e_f32s(sum, scale, tile[w]);
                    }
                }
            }
            lhs = lhs.wrapping_add(Order::Nibbles.words() * group.words);
        }
        if const { H == 1 } && !end {
            for (x, w) in tiles.as_flattened().as_flattened().iter().zip(0..) {
                // SAFETY: the contract on chains.
                unsafe { waiting.add(w).write_unaligned(*x) };
            }
            return;
        }
        let GroupStrip { cols, ref finish, out, .. } = *strip;
        for (panel, mut tile) in (panel..).zip(tiles) {
            for (tile, scale) in tile.iter_mut().zip(&strip.rows[first..first + H]) {
                tile.iter_mut().for_each(
                    #[inline(always)]
                    |x| *x = simd.mul_f32s(*x, simd.splat_f32s(*scale)),
                );
            }
            let start = panel * Self::NR;
            let (cols, out) = (Self::NR.min(cols - start), out.from(0, start));
            // SAFETY: the contract on `out`, bias, gate and residual: this panel's columns of them.
            unsafe { Tile { simd, acc: tile }.finish::<F32>(first, cols, &finish.after_col(start), out) };
        }
    }
}
