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
//! - A group's sums stay in registers; the chains in f32 wait in L1 meanwhile, and cost a load, a multiply-add and a store a group.

use pulp::Simd;

use super::bytes::{ByteKernel, ByteProducts, Order, WordBlock, less};
use super::finish::Tile;
use super::{F32, Finish, Out};

/// One panel of C, all of K.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GroupStrip<'a> {
    /// The scale of each row.
    pub(crate) rows: &'a [f32],
    pub(crate) cols: usize,
    /// Row-major; for each row of words in the groups' order its elements, as [`Order::Nibbles`] says.
    pub(crate) lhs: &'a [u32],
    /// Their words; NR scales stand before the first word of each.
    pub(crate) groups: &'a [WordBlock],
    /// `8·Σ_p lhs[p]` over each group, row-major `[rows, groups]`.
    pub(crate) excess: &'a [u32],
    pub(crate) out: Out<f32>,
    pub(crate) finish: Finish<'a>,
}

impl<P: ByteProducts, const MR: usize, const VECS: usize> ByteKernel<P, MR, VECS> {
    /// Computes one strip.
    ///
    /// # Safety
    /// - each group reaches `words` rows of NR readable words, and NR f32 before them;
    /// - `out` reaches `rows × cols` elements that no one else uses meanwhile, readable if it is added to;
    /// - bias, gate and residual, if any, have `cols` elements and `rows × cols`.
    #[inline(always)]
    pub(crate) unsafe fn run_groups(self, strip: &GroupStrip<'_>) {
        debug_assert!((1..=Self::NR).contains(&strip.cols));
        let (rows, words) = (strip.rows.len(), strip.groups.iter().map(|group| group.words).sum::<usize>());
        assert!(strip.lhs.len() == rows * Order::Nibbles.words() * words);
        assert!(strip.excess.len() == rows * strip.groups.len());
        let mut first = 0;
        while first < rows {
            let height = MR.min(rows - first);
            // SAFETY: the contract; rows `first .. first + height` are rows of the strip.
            unsafe {
                match height {
                    1 => self.tile_of_groups::<1>(first, strip),
                    2 => self.tile_of_groups::<2>(first, strip),
                    3 => self.tile_of_groups::<3>(first, strip),
                    4 => self.tile_of_groups::<4>(first, strip),
                    5 => self.tile_of_groups::<5>(first, strip),
                    6 => self.tile_of_groups::<6>(first, strip),
                    7 => self.tile_of_groups::<7>(first, strip),
                    _ => self.tile_of_groups::<8>(first, strip),
                }
            }
            first += height;
        }
    }

    /// The tile of H rows that starts at row `first`.
    ///
    /// # Safety
    /// As [`ByteKernel::run_groups`]; the rows are rows of the strip.
    #[inline(always)]
    unsafe fn tile_of_groups<const H: usize>(self, first: usize, strip: &GroupStrip<'_>) {
        if const { H > MR } {
            unreachable!("a tile is at most {MR} rows high");
        }
        let simd = self.0.simd();
        let row_words = strip.lhs.len() / strip.rows.len();
        let mut lhs = strip.lhs[first * row_words..(first + H) * row_words].as_ptr();
        let count = strip.groups.len();
        let excess = &strip.excess[first * count..(first + H) * count];
        let mut tile = [[simd.splat_f32s(0.0); VECS]; H];
        for (at, group) in strip.groups.iter().enumerate() {
            let mut sums = [[simd.splat_u32s(0); VECS]; H];
            // SAFETY: the contract on the group; `run_groups` checked that every row of lhs has as many words.
            unsafe { self.0.add_nibbles(&mut sums, (lhs, row_words), *group) };
            lhs = lhs.wrapping_add(Order::Nibbles.words() * group.words);
            let scales = group.ptr.wrapping_sub(Self::NR).cast::<<P::Simd as Simd>::f32s>();
            for w in 0..VECS {
                // SAFETY: the contract on the scales.
                let scale = unsafe { scales.add(w).read_unaligned() };
                for (i, (tile, sums)) in tile.iter_mut().zip(&sums).enumerate() {
                    let sum = less::<P::Simd>(sums[w], excess[i * count + at]);
                    tile[w] = simd.mul_add_e_f32s(sum, scale, tile[w]);
                }
            }
        }
        for (tile, scale) in tile.iter_mut().zip(&strip.rows[first..first + H]) {
            tile.iter_mut().for_each(
                #[inline(always)]
                |x| *x = simd.mul_f32s(*x, simd.splat_f32s(*scale)),
            );
        }
        let GroupStrip { cols, ref finish, out, .. } = *strip;
        // SAFETY: the contract on `out`, bias, gate and residual.
        unsafe { Tile { simd, acc: tile }.finish::<F32>(first, cols, finish, out) };
    }
}
