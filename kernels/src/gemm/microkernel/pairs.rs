//! The kernel of int8 × int8 products: sums in i32, exact, and a result in f32.
//!
//! # Naive form
//! ```text
//! for i in 0..MR { for j in 0..NR { for p in 0..depth { sum[i][j] += lhs[i][p] * (word[p][j] - 128) } } }
//! out[i][j] = lhs_scale[i] * rhs_scale[j] * sum[i][j]
//! ```
//! # Deviations
//! - The weights are those of the f32 kernel for int8: words of 4 elements along k, each with 128 added. The 128 are
//!   not subtracted from each: `128·Σ_p lhs[i][p]` is subtracted from the sum. All of it is arithmetic modulo 2³², so
//!   only the final sum must fit an i32.
//! - A word is cut into its even and its odd bytes, pairs of 16 bits each, in 3 instructions that all rows of the tile
//!   share. One multiply-add of pairs (`vpmaddwd`) and one addition then make 16 multiply-adds of 8 columns: up to
//!   twice the rate of f32, because more ports take them. The products of two bytes are exact in it.
//! - The even bytes of a whole block come first, then the odd ones, from words that lie in L1 by then. Both in one turn of
//!   the loop left no register for two of the sums, which waited for their way through memory, 16 cycles a turn.
//! - The left operand lies as pairs of 16 bits in the same order, so that one broadcast of 32 bits feeds a vector.
//!
//! Rejected: the instruction for bytes (`vpmaddubsw`) is faster still and saturates: sums are wrong without a warning.

use pulp::{Simd, WithSimd};

use super::finish::EdgeTile;
use super::{Finish, Out};
use crate::isa::{Isa, IsaName};

/// Instruction sets with vectors of 32-bit lanes, each two 16-bit integers.
pub(crate) trait PairProducts: Simd {
    /// `sum + a.low·b.low + a.high·b.high` in each lane, signed, modulo 2³².
    ///
    /// This form is plain arithmetic, lane by lane, for the compiler to make vectors of.
    #[inline(always)]
    fn add_pair_products(self, sum: Self::u32s, a: Self::u32s, b: Self::u32s) -> Self::u32s {
        let mut sums = sum;
        let half = |x: u32, shift: u32| i32::from((x >> shift) as u16 as i16);
        for j in 0..Self::F32_LANES {
            let (a, b) = (lane::<Self>(&a, j), lane::<Self>(&b, j));
            let product = half(a, 0) * half(b, 0) + half(a, 16) * half(b, 16);
            // SAFETY: a vector of u32 is its lanes, and `j` is one of them.
            let sum = unsafe { &mut *std::ptr::from_mut(&mut sums).cast::<u32>().add(j) };
            *sum = sum.wrapping_add(product as u32);
        }
        sums
    }
}

/// Lane `j` of a vector.
#[inline(always)]
fn lane<S: Simd>(vector: &S::u32s, j: usize) -> u32 {
    debug_assert!(j < S::F32_LANES);
    // SAFETY: a vector of u32 is its lanes, and `j` is one of them.
    unsafe { *std::ptr::from_ref(vector).cast::<u32>().add(j) }
}

impl PairProducts for pulp::Scalar {}

#[cfg(target_arch = "aarch64")]
impl PairProducts for pulp::aarch64::Neon {}

#[cfg(target_arch = "x86_64")]
impl PairProducts for pulp::x86::V3 {
    #[inline(always)]
    fn add_pair_products(self, sum: Self::u32s, a: Self::u32s, b: Self::u32s) -> Self::u32s {
        use pulp::bytemuck::cast;
        let products = self.avx2._mm256_madd_epi16(cast(a), cast(b));
        cast(self.avx2._mm256_add_epi32(cast(sum), products))
    }
}

#[cfg(target_arch = "x86_64")]
impl PairProducts for pulp::x86::V4 {
    #[inline(always)]
    fn add_pair_products(self, sum: Self::u32s, a: Self::u32s, b: Self::u32s) -> Self::u32s {
        use pulp::bytemuck::cast;
        let products = self.avx512bw._mm512_madd_epi16(cast(a), cast(b));
        cast(self.avx512f._mm512_add_epi32(cast(sum), products))
    }
}

/// What a row of the left operand was multiplied by, and what its sums have too much.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RowScale {
    pub(crate) scale: f32,
    /// `128·Σ_p lhs[p]`.
    pub(crate) excess: u32,
    /// What each element of the row has too little; only where bytes hold the row.
    pub(crate) shift: u32,
}

/// Where the sums of a strip go.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Sink<'a> {
    /// Scaled, and through the epilogue.
    Scaled { out: Out<f32>, finish: Finish<'a> },
    /// As they are; added to what is there, modulo 2³², if `add` is set.
    Integers { out: Out<i32>, add: bool },
}

impl Out<i32> {
    /// Stores a sum, or adds it to what is there.
    ///
    /// # Safety
    /// The first element is writable, and readable if `add` is set.
    #[inline(always)]
    pub(crate) unsafe fn put(self, sum: i32, add: bool) {
        // SAFETY: the contract.
        unsafe { *self.ptr = if add { (*self.ptr).wrapping_add(sum) } else { sum } };
    }
}

/// A block of K in one panel of rhs: rows of words, NR wide.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WordBlock {
    pub(crate) ptr: *const u32,
    pub(crate) words: usize,
}

/// One panel of C, all of K.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PairStrip<'a> {
    pub(crate) rows: &'a [RowScale],
    pub(crate) cols: usize,
    /// Row-major; for each row of words in the blocks' order its pair of even and its pair of odd elements.
    pub(crate) lhs: &'a [u32],
    pub(crate) blocks: &'a [WordBlock],
    /// NR scales of the columns.
    pub(crate) scales: *const f32,
    pub(crate) sink: Sink<'a>,
}

/// The kernel with tiles of MR rows and VECS vectors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pairs<S, const MR: usize, const VECS: usize>(S);

/// Something to be done with the kernel of an ISA, inside the ISA's shell.
pub(crate) trait PairVisitor {
    /// Does it. Must be `#[inline(always)]`, or it is compiled outside of the shell.
    fn visit<S: PairProducts, const MR: usize, const VECS: usize>(self, kernel: Pairs<S, MR, VECS>);
}

/// Runs `visitor` with the kernel of `isa`; its tiles are those of the f32 kernel for int8 weights.
pub(crate) fn with_pairs<V: PairVisitor>(isa: Isa, visitor: V) {
    const PROOF: &str = "an Isa is the proof that the CPU has it";
    match isa.vectors() {
        #[cfg(target_arch = "x86_64")]
        IsaName::Avx2 => Shell::<_, _, 6, 2>::enter(pulp::x86::V3::try_new().expect(PROOF), visitor),
        #[cfg(target_arch = "x86_64")]
        IsaName::Avx512 => Shell::<_, _, 8, 3>::enter(pulp::x86::V4::try_new().expect(PROOF), visitor),
        #[cfg(target_arch = "aarch64")]
        IsaName::Neon => Shell::<_, _, 8, 3>::enter(pulp::aarch64::Neon::try_new().expect(PROOF), visitor),
        _ => Shell::<_, _, 4, 4>::enter(pulp::Scalar::new(), visitor),
    }
}

struct Shell<S, V, const MR: usize, const VECS: usize>(S, V);

impl<S: PairProducts, V: PairVisitor, const MR: usize, const VECS: usize> Shell<S, V, MR, VECS> {
    fn enter(simd: S, visitor: V) {
        simd.vectorize(Shell::<S, V, MR, VECS>(simd, visitor));
    }
}

impl<S: PairProducts, V: PairVisitor, const MR: usize, const VECS: usize> WithSimd for Shell<S, V, MR, VECS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<U: Simd>(self, _: U) {
        self.1.visit(Pairs::<S, MR, VECS>(self.0));
    }
}

impl<S: PairProducts, const MR: usize, const VECS: usize> Pairs<S, MR, VECS> {
    pub(crate) const MR: usize = MR;
    pub(crate) const NR: usize = VECS * S::F32_LANES;

    /// Computes one strip.
    ///
    /// # Safety
    /// - each block reaches `words` rows of NR readable words, `scales` NR f32;
    /// - the sink reaches `rows × cols` elements that no one else uses meanwhile, readable if it adds to them;
    /// - bias, gate and residual, if any, have `cols` elements and `rows × cols`.
    #[inline(always)]
    pub(crate) unsafe fn run(self, strip: &PairStrip<'_>) {
        debug_assert!((1..=Self::NR).contains(&strip.cols));
        let words: usize = strip.blocks.iter().map(|block| block.words).sum();
        assert!(strip.lhs.len() == strip.rows.len() * 2 * words);
        let full = strip.rows.len() / MR * MR;
        // SAFETY (all below): the contract; rows `first .. first + H` are rows of the strip.
        for first in (0..full).step_by(MR) {
            // SAFETY: see above.
            unsafe { self.tile::<MR>(first, strip) };
        }
        // SAFETY: see above.
        unsafe {
            match strip.rows.len() - full {
                0 => {}
                1 => self.tile::<1>(full, strip),
                2 => self.tile::<2>(full, strip),
                3 => self.tile::<3>(full, strip),
                4 => self.tile::<4>(full, strip),
                5 => self.tile::<5>(full, strip),
                6 => self.tile::<6>(full, strip),
                _ => self.tile::<7>(full, strip),
            }
        }
    }

    /// The tile of H rows that starts at row `first`.
    ///
    /// # Safety
    /// As [`Pairs::run`]; the rows are rows of the strip.
    #[inline(always)]
    unsafe fn tile<const H: usize>(self, first: usize, strip: &PairStrip<'_>) {
        if const { H > MR } {
            unreachable!("a tile is at most {MR} rows high");
        }
        let simd = self.0;
        let row_words = strip.lhs.len() / strip.rows.len();
        let mut lhs = strip.lhs[first * row_words..(first + H) * row_words].as_ptr();
        let mut sums = [[simd.splat_u32s(0); VECS]; H];
        for block in strip.blocks {
            // SAFETY: the contract on the block; `run` checked that every row of lhs has as many pairs.
            unsafe { self.add_block(&mut sums, lhs, row_words, *block) };
            lhs = lhs.wrapping_add(2 * block.words);
        }
        let (out, finish) = match &strip.sink {
            Sink::Scaled { out, finish } => (*out, finish),
            Sink::Integers { out, add } => {
                for (i, (sums, row)) in sums.iter().zip(&strip.rows[first..first + H]).enumerate() {
                    for j in 0..strip.cols {
                        let sum =
                            lane::<S>(&sums[j / S::F32_LANES], j % S::F32_LANES).wrapping_sub(row.excess);
                        // SAFETY: the contract on the sink.
                        unsafe { out.from(first + i, j).put(sum as i32, *add) };
                    }
                }
                return;
            }
        };
        let mut tile = [[simd.splat_f32s(0.0); VECS]; H];
        for ((tile, sums), row) in tile.iter_mut().zip(&sums).zip(&strip.rows[first..first + H]) {
            for (w, tile) in tile.iter_mut().enumerate() {
                // SAFETY: the contract on the scales.
                let scale = unsafe { strip.scales.cast::<S::f32s>().add(w).read_unaligned() };
                let sum = less::<S>(sums[w], row.excess);
                *tile = simd.mul_f32s(sum, simd.mul_f32s(scale, simd.splat_f32s(row.scale)));
            }
        }
        let (tile, cols) = (tile.as_flattened(), strip.cols);
        simd.vectorize(EdgeTile { simd, tile, width: VECS, first, cols, finish, out });
    }

    /// Adds the products of one block of K.
    ///
    /// # Safety
    /// The block is readable; so are `2·words` pairs at `lhs`, and of H − 1 rows that follow `row_words` apart.
    #[inline(always)]
    unsafe fn add_block<const H: usize>(
        self,
        sums: &mut [[S::u32s; VECS]; H],
        lhs: *const u32,
        row_words: usize,
        block: WordBlock,
    ) {
        let simd = self.0;
        let even_bytes = simd.splat_u32s(0x00ff_00ff);
        let mut local = *sums;
        for odd in 0..2 {
            for q in 0..block.words {
                let rhs = block.ptr.wrapping_add(q * Self::NR).cast::<S::u32s>();
                let mut row = [simd.splat_u32s(0); VECS];
                for (w, row) in row.iter_mut().enumerate() {
                    // SAFETY: the contract on the block.
                    let words = unsafe { rhs.add(w).read_unaligned() };
                    let shift = simd.splat_u32s(8 * odd as u32);
                    *row = simd.and_u32s(simd.wrapping_dyn_shr_u32s(words, shift), even_bytes);
                }
                for (i, sums) in local.iter_mut().enumerate() {
                    // SAFETY: the contract on lhs.
                    let pair = simd.splat_u32s(unsafe { *lhs.wrapping_add(i * row_words + 2 * q + odd) });
                    for (sum, row) in sums.iter_mut().zip(row) {
                        *sum = simd.add_pair_products(*sum, pair, row);
                    }
                }
            }
        }
        *sums = local;
    }
}

/// `sum − excess`, modulo 2³² and then as a signed integer, rounded to f32.
#[inline(always)]
fn less<S: PairProducts>(sum: S::u32s, excess: u32) -> S::f32s {
    let mut out = pulp::bytemuck::Zeroable::zeroed();
    for j in 0..S::F32_LANES {
        let signed = lane::<S>(&sum, j).wrapping_sub(excess) as i32;
        // SAFETY: a vector of f32 is its lanes, and `j` is one of them.
        unsafe { *std::ptr::from_mut::<S::f32s>(&mut out).cast::<f32>().add(j) = signed as f32 };
    }
    out
}
