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
//! - How a word is multiplied is the instruction set's own: bytes where it has dot products of them (`dots`) or the rows have 7 bits
//!   (`sevens`), else pairs of 16 bits (`pairs`). All are exact, so the bits are the same.
//! - A left operand of unsigned integers with a zero point fits 16 bits as it is. Bytes hold it less 128, and the rest, which
//!   is the same for all of a row, is multiplied by the sum of each column's weights.

use std::ops::Range;

use pulp::{Simd, WithSimd};

#[cfg(target_arch = "x86_64")]
use super::dots;
use super::finish::Tile;
use super::prefetch::{self, Ahead, Share};
use super::{F32, Finish, Out};
use crate::isa::{Isa, IsaName};

/// How the integers of a row of the left operand are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Of each four elements the even ones, then the odd ones: pairs of 16 bits.
    Pairs,
    /// Four elements in a word, as they are.
    Bytes,
    /// Of each eight elements the even ones, then the odd ones: four in a word.
    Nibbles,
}

impl Order {
    /// The elements that a word of weights holds.
    pub(crate) const fn elements(self) -> usize {
        match self {
            Order::Pairs | Order::Bytes => 4,
            Order::Nibbles => 8,
        }
    }

    /// Whether the left operand's words are those of the weights.
    const fn whole_words(self) -> bool {
        matches!(self, Order::Bytes)
    }

    /// The words of the left operand beside one word of weights.
    pub(crate) const fn words(self) -> usize {
        match self {
            Order::Bytes => 1,
            Order::Pairs | Order::Nibbles => 2,
        }
    }
}

/// How an instruction set multiplies words of four integers of 8 bits, or of eight of 4 bits.
pub(crate) trait ByteProducts: Copy {
    /// The vectors of the sums.
    type Simd: Simd;
    /// How it reads the left operand.
    const LEFT: Order;

    /// The proof of the vectors.
    fn simd(self) -> Self::Simd;

    /// Adds the products of one block of K to the sums of P panels, of H rows and W of the panel's VECS vectors of columns each, modulo 2³². On
    /// the way it may ask for what lies `ahead`.
    ///
    /// # Safety
    /// The block reaches `words` rows of VECS readable vectors in each panel. So do H rows of the left operand, `row_words` apart and in the
    /// order LEFT, as many words as belong to the block.
    unsafe fn add_block<const P: usize, const H: usize, const W: usize, const VECS: usize>(
        self,
        sums: &mut [[[Vector<Self>; W]; H]; P],
        left: (*const u32, usize),
        block: WordBlock,
        ahead: Option<(Share, Ahead)>,
    );

    /// As [`ByteProducts::add_block`], with words of eight integers of 4 bits.
    ///
    /// # Safety
    /// As there, in the order [`Order::Nibbles`].
    unsafe fn add_nibbles<const H: usize, const VECS: usize>(
        self,
        sums: &mut [[Vector<Self>; VECS]; H],
        left: (*const u32, usize),
        block: WordBlock,
    );
}

/// A vector of sums.
pub(crate) type Vector<P> = <<P as ByteProducts>::Simd as Simd>::u32s;

/// Lane `j` of a vector.
#[inline(always)]
pub(super) fn lane<S: Simd>(vector: &S::u32s, j: usize) -> u32 {
    debug_assert!(j < S::F32_LANES);
    // SAFETY: a vector of u32 is its lanes, and `j` is one of them.
    unsafe { *std::ptr::from_ref(vector).cast::<u32>().add(j) }
}

/// Lane `j` of a vector, to be written.
#[inline(always)]
pub(super) fn lane_mut<S: Simd>(vector: &mut S::u32s, j: usize) -> &mut u32 {
    debug_assert!(j < S::F32_LANES);
    // SAFETY: a vector of u32 is its lanes, and `j` is one of them.
    unsafe { &mut *std::ptr::from_mut(vector).cast::<u32>().add(j) }
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

/// A block of K in a panel of rhs: rows of words, NR wide. The next panel lies `panel_stride` words on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WordBlock {
    pub(crate) ptr: *const u32,
    pub(crate) words: usize,
    pub(crate) panel_stride: usize,
}

/// One panel of C, all of K; or few rows of C over several whole panels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ByteStrip<'a> {
    pub(crate) rows: &'a [RowScale],
    pub(crate) cols: usize,
    /// Row-major; for each row of words in the blocks' order its elements, as [`ByteProducts::LEFT`] says.
    pub(crate) lhs: &'a [u32],
    pub(crate) blocks: &'a [WordBlock],
    /// Whether the next panel lies in no near cache.
    pub(crate) far: bool,
    /// NR scales of the columns; those of the next panel are as far away as its words in the first block.
    pub(crate) scales: *const f32,
    /// The sums of the columns' integers.
    pub(crate) column_sums: &'a [i32],
    pub(crate) sink: Sink<'a>,
}

/// Rows whose sums leave registers for more than a part of the words.
const FREE_ROWS: usize = 2;

/// Up to so many rows read the weights as fast as they arrive: the hardware asks for them early enough, and asking once more costs up to a tenth. (Pairs of 16 bits gain.)
const FEW_ROWS: usize = 4;

/// Calls `each` with every word of a block and every one of its `parts`: a word in all its parts where H rows leave registers
/// for that, else all words in their first part, then in the next.
#[inline(always)]
pub(super) fn for_each_part<const H: usize>(words: usize, parts: usize, mut each: impl FnMut(usize, usize)) {
    if const { H <= FREE_ROWS } {
        for q in 0..words {
            for part in 0..parts {
                each(q, part);
            }
        }
    } else {
        for part in 0..parts {
            for q in 0..words {
                each(q, part);
            }
        }
    }
}

/// The first W vectors of row `q` of the words of a block, whose rows have VECS.
///
/// # Safety
/// They are readable.
#[inline(always)]
pub(super) unsafe fn row_of<S: Simd, const W: usize, const VECS: usize>(
    block: *const u32,
    q: usize,
) -> [S::u32s; W] {
    let row = block.wrapping_add(q * VECS * S::F32_LANES).cast::<[S::u32s; W]>();
    // SAFETY: the contract; an array of vectors is its lanes.
    unsafe { row.read_unaligned() }
}

/// As [`row_of`], shifted to the right and what a mask leaves of it.
///
/// # Safety
/// As there.
#[inline(always)]
pub(super) unsafe fn part_of<S: Simd, const W: usize, const VECS: usize>(
    simd: S,
    block: *const u32,
    q: usize,
    (shift, mask): (usize, S::u32s),
) -> [S::u32s; W] {
    let shift = simd.splat_u32s(shift as u32);
    // SAFETY: the contract.
    let mut row = unsafe { row_of::<S, W, VECS>(block, q) };
    // Not `map`: the compiler does not always inline what it calls.
    for words in &mut row {
        *words = simd.and_u32s(simd.wrapping_dyn_shr_u32s(*words, shift), mask);
    }
    row
}

/// The kernel with tiles of MR rows and VECS vectors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ByteKernel<P, const MR: usize, const VECS: usize>(pub(super) P);

/// Something to be done with the kernel of an ISA, inside the ISA's shell.
pub(crate) trait ByteVisitor {
    /// Does it. Must be `#[inline(always)]`, or it is compiled outside of the shell.
    fn visit<P: ByteProducts, const MR: usize, const VECS: usize>(self, kernel: ByteKernel<P, MR, VECS>);
}

pub(crate) const PROOF: &str = "an Isa is the proof that the CPU has it";

/// Runs `visitor` with the kernel of `isa` for int8 weights; its tiles are those of the f32 kernel for them.
pub(crate) fn with_byte_kernel<V: ByteVisitor>(isa: Isa, visitor: V) {
    match isa.bytes() {
        #[cfg(target_arch = "x86_64")]
        IsaName::Avx2Vnni | IsaName::Avx512Vnni => dots::enter(isa, visitor),
        #[cfg(target_arch = "x86_64")]
        IsaName::Avx2 => Shell::<_, _, 6, 2>::enter(pulp::x86::V3::try_new().expect(PROOF), visitor),
        #[cfg(target_arch = "x86_64")]
        IsaName::Avx512 => Shell::<_, _, 8, 3>::enter(pulp::x86::V4::try_new().expect(PROOF), visitor),
        #[cfg(target_arch = "aarch64")]
        IsaName::Neon => Shell::<_, _, 8, 3>::enter(pulp::aarch64::Neon::try_new().expect(PROOF), visitor),
        _ => Shell::<_, _, 4, 4>::enter(pulp::Scalar::new(), visitor),
    }
}

/// Runs `visitor` with the kernel of `isa` for rows of 7 bits and int8 weights.
///
/// # Panics
/// When the table has none for it.
pub(crate) fn with_seven_kernel<V: ByteVisitor>(isa: Isa, visitor: V) {
    match (isa.bytes(), visitor) {
        #[cfg(target_arch = "x86_64")]
        (IsaName::Avx2, visitor) => super::sevens::enter(visitor),
        (other, _) => unreachable!("{other} has no kernel for rows of 7 bits"),
    }
}

/// Runs `visitor` with the kernel of `isa` for int4 weights, whose tiles have fewer rows on some sets: sums of 16 bits need registers, and so do
/// addresses. (Not by way of [`with_byte_kernel`], which would compile the taller ones too.)
pub(crate) fn with_nibble_kernel<V: ByteVisitor>(isa: Isa, visitor: V) {
    match isa.bytes() {
        #[cfg(target_arch = "x86_64")]
        IsaName::Avx2Vnni | IsaName::Avx512Vnni => dots::enter(isa, visitor),
        #[cfg(target_arch = "x86_64")]
        IsaName::Avx2 => Shell::<_, _, 4, 2>::enter(pulp::x86::V3::try_new().expect(PROOF), visitor),
        #[cfg(target_arch = "x86_64")]
        IsaName::Avx512 => Shell::<_, _, 6, 3>::enter(pulp::x86::V4::try_new().expect(PROOF), visitor),
        #[cfg(target_arch = "aarch64")]
        IsaName::Neon => Shell::<_, _, 8, 3>::enter(pulp::aarch64::Neon::try_new().expect(PROOF), visitor),
        _ => Shell::<_, _, 4, 4>::enter(pulp::Scalar::new(), visitor),
    }
}

/// The shell that pulp has for its sets.
struct Shell<S, V, const MR: usize, const VECS: usize>(S, V);

impl<S: ByteProducts<Simd = S> + Simd, V: ByteVisitor, const MR: usize, const VECS: usize>
    Shell<S, V, MR, VECS>
{
    fn enter(simd: S, visitor: V) {
        simd.vectorize(Shell::<S, V, MR, VECS>(simd, visitor));
    }
}

impl<S: ByteProducts<Simd = S> + Simd, V: ByteVisitor, const MR: usize, const VECS: usize> WithSimd
    for Shell<S, V, MR, VECS>
{
    type Output = ();

    #[inline(always)]
    fn with_simd<U: Simd>(self, _: U) {
        self.1.visit(ByteKernel::<S, MR, VECS>(self.0));
    }
}

impl<P: ByteProducts, const MR: usize, const VECS: usize> ByteKernel<P, MR, VECS> {
    pub(crate) const MR: usize = MR;
    pub(crate) const NR: usize = VECS * P::Simd::F32_LANES;

    /// Up to so many rows, a strip may span several panels: few chains do not hide the latency of a dot product of bytes, and several streams of weights
    /// from far away arrive sooner than one.
    /// (With pairs of 16 bits, on AVX2: one row of 4 MiB that lie in memory 14.4 with one panel, 17.8 with four and 18.5 GB/s with the next ones asked for, where plain
    /// reading takes 18.6.)
    pub(crate) const THIN_ROWS: usize = if P::LEFT.whole_words() || P::Simd::F32_LANES == 8 { 2 } else { 0 };

    /// Computes one strip.
    ///
    /// # Safety
    /// - each block reaches `words` rows of NR readable words, `scales` NR f32, in each panel;
    /// - the sink reaches `rows × cols` elements that no one else uses meanwhile, readable if it adds to them;
    /// - bias, gate and residual, if any, have `cols` elements and `rows × cols`.
    #[inline(always)]
    pub(crate) unsafe fn run(self, strip: &ByteStrip<'_>) {
        debug_assert!(strip.cols >= 1);
        let words: usize = strip.blocks.iter().map(|block| block.words).sum();
        assert!(strip.lhs.len() == strip.rows.len() * P::LEFT.words() * words);
        // SAFETY: the contract, for all of it.
        unsafe {
            if strip.cols > Self::NR {
                debug_assert!(strip.rows.len() <= Self::THIN_ROWS && strip.cols.is_multiple_of(Self::NR));
                match strip.rows.len() {
                    0 => {}
                    1 => self.panels::<1, 4>(strip),
                    _ => self.panels::<2, 2>(strip),
                }
                return;
            }
            // Fewer vectors where a panel is not full. Pairs keep all of them: they are for older CPUs, and their instances many.
            match strip.cols.div_ceil(P::Simd::F32_LANES) {
                1 if const { P::LEFT.whole_words() && VECS > 1 } => self.tiles::<1>(strip),
                2 if const { P::LEFT.whole_words() && VECS > 2 } => self.tiles::<2>(strip),
                _ => self.tiles::<VECS>(strip),
            }
        }
    }

    /// All tiles of a strip of one panel, W vectors of which count.
    ///
    /// # Safety
    /// As [`ByteKernel::run`].
    #[inline(always)]
    unsafe fn tiles<const W: usize>(self, strip: &ByteStrip<'_>) {
        let full = strip.rows.len() / MR * MR;
        // SAFETY: the contract, for all of it; rows `first .. first + H` are rows of the strip.
        unsafe {
            for first in (0..full).step_by(MR) {
                self.tile::<1, MR, W>(first, 0, strip);
            }
            match strip.rows.len() - full {
                0 => {}
                1 => self.tile::<1, 1, W>(full, 0, strip),
                2 => self.tile::<1, 2, W>(full, 0, strip),
                3 => self.tile::<1, 3, W>(full, 0, strip),
                4 => self.tile::<1, 4, W>(full, 0, strip),
                5 => self.tile::<1, 5, W>(full, 0, strip),
                6 => self.tile::<1, 6, W>(full, 0, strip),
                _ => self.tile::<1, 7, W>(full, 0, strip),
            }
        }
    }

    /// H rows over whole panels, Q at a time, the rest one by one.
    ///
    /// # Safety
    /// As [`ByteKernel::run`].
    #[inline(always)]
    unsafe fn panels<const H: usize, const Q: usize>(self, strip: &ByteStrip<'_>) {
        if const { Self::THIN_ROWS == 0 } {
            unreachable!("a strip is one panel wide");
        }
        let count = strip.cols / Self::NR;
        let whole = count / Q * Q;
        // SAFETY: the contract, for all of it; these are panels of the strip.
        unsafe {
            for panel in (0..whole).step_by(Q) {
                self.tile::<Q, H, VECS>(0, panel, strip);
            }
            for panel in whole..count {
                self.tile::<1, H, VECS>(0, panel, strip);
            }
        }
    }

    /// The tile of H rows that starts at row `first`, in Q panels from `panel` on.
    ///
    /// # Safety
    /// As [`ByteKernel::run`]; the rows are rows of the strip, the panels its panels.
    #[inline(always)]
    unsafe fn tile<const Q: usize, const H: usize, const W: usize>(
        self,
        first: usize,
        panel: usize,
        strip: &ByteStrip<'_>,
    ) {
        if const { H > MR } {
            unreachable!("a tile is at most {MR} rows high");
        }
        let simd = self.0.simd();
        let row_words = strip.lhs.len() / strip.rows.len();
        let mut lhs = strip.lhs[first * row_words..(first + H) * row_words].as_ptr();
        let mut sums = [[[simd.splat_u32s(0); W]; H]; Q];
        if let Sink::Scaled { out, .. } = strip.sink
            && const { Q == 1 }
            && strip.far
        {
            prefetch::rows_of(out, first..first + H, strip.cols, Self::NR / prefetch::LINE);
        }
        for block in strip.blocks {
            // Its share of the next panel, if not all of it was asked for.
            let share = Share::of(H, strip.rows.len(), MR);
            let start =
                first / MR * block.words * share.lines(Self::NR.div_ceil(prefetch::LINE)) * prefetch::LINE;
            let next = block.ptr.wrapping_add((panel + Q) * block.panel_stride + start);
            let few = const { Self::THIN_ROWS > 0 && !P::LEFT.whole_words() };
            let wanted = strip.far && (few || strip.rows.len() > FEW_ROWS) && start < block.words * Self::NR;
            let ahead = wanted.then(|| (share, Ahead::from(next)));
            let block = WordBlock { ptr: block.ptr.wrapping_add(panel * block.panel_stride), ..*block };
            // SAFETY: the contract on the block; `run` checked that every row of lhs has as many words.
            unsafe { self.0.add_block::<Q, H, W, VECS>(&mut sums, (lhs, row_words), block, ahead) };
            lhs = lhs.wrapping_add(P::LEFT.words() * block.words);
        }
        let stride = strip.blocks.first().map_or(0, |block| block.panel_stride);
        for (panel, sums) in (panel..).zip(sums) {
            let cols = panel * Self::NR..strip.cols.min((panel + 1) * Self::NR);
            let scales = strip.scales.wrapping_add(panel * stride);
            // SAFETY: the contract; these are columns of the strip, and their scales.
            unsafe { self.finish(sums, first, (cols, scales), strip) };
        }
    }

    /// From the sums of H rows from `first` on, in those columns, to C.
    ///
    /// # Safety
    /// As [`ByteKernel::run`]; the rows and columns are the strip's, the scales NR f32.
    #[inline(always)]
    unsafe fn finish<const H: usize, const W: usize>(
        self,
        mut sums: [[Vector<P>; W]; H],
        first: usize,
        (cols, scales): (Range<usize>, *const f32),
        strip: &ByteStrip<'_>,
    ) {
        let simd = self.0.simd();
        let rows = &strip.rows[first..first + H];
        if P::LEFT == Order::Bytes {
            add_shifts::<P::Simd, W>(&mut sums, rows, &strip.column_sums[cols.clone()]);
        }
        let (out, finish) = match &strip.sink {
            Sink::Scaled { out, finish } => (out.from(0, cols.start), finish.after_col(cols.start)),
            Sink::Integers { out, add } => {
                for (i, (sums, row)) in sums.iter().zip(rows).enumerate() {
                    for j in 0..cols.len() {
                        let lanes = P::Simd::F32_LANES;
                        let sum = lane::<P::Simd>(&sums[j / lanes], j % lanes).wrapping_sub(row.excess);
                        // SAFETY: the contract on the sink.
                        unsafe { out.from(first + i, cols.start + j).put(sum as i32, *add) };
                    }
                }
                return;
            }
        };
        let mut acc = [[simd.splat_f32s(0.0); W]; H];
        for ((acc, sums), row) in acc.iter_mut().zip(&sums).zip(rows) {
            for (w, acc) in acc.iter_mut().enumerate() {
                // SAFETY: the contract on the scales.
                let scale = unsafe { scales.cast::<<P::Simd as Simd>::f32s>().add(w).read_unaligned() };
                let sum = less::<P::Simd>(sums[w], row.excess);
                *acc = simd.mul_f32s(sum, simd.mul_f32s(scale, simd.splat_f32s(row.scale)));
            }
        }
        // SAFETY: the contract on the sink, bias, gate and residual.
        unsafe { Tile { simd, acc }.finish::<F32>(first, cols.len(), &finish, out) };
    }
}

/// Adds what bytes could not hold of unsigned rows, modulo 2³².
#[inline(always)]
fn add_shifts<S: Simd, const VECS: usize>(
    sums: &mut [[S::u32s; VECS]],
    rows: &[RowScale],
    column_sums: &[i32],
) {
    for (sums, row) in sums.iter_mut().zip(rows).filter(|(_, row)| row.shift != 0) {
        for (j, column) in column_sums.iter().enumerate() {
            let sum = lane_mut::<S>(&mut sums[j / S::F32_LANES], j % S::F32_LANES);
            *sum = sum.wrapping_add(row.shift.wrapping_mul(*column as u32));
        }
    }
}

/// `sum − excess`, modulo 2³² and then as a signed integer, rounded to f32.
#[inline(always)]
pub(super) fn less<S: Simd>(sum: S::u32s, excess: u32) -> S::f32s {
    let mut out = pulp::bytemuck::Zeroable::zeroed();
    for j in 0..S::F32_LANES {
        let signed = lane::<S>(&sum, j).wrapping_sub(excess) as i32;
        // SAFETY: a vector of f32 is its lanes, and `j` is one of them.
        unsafe { *std::ptr::from_mut::<S::f32s>(&mut out).cast::<f32>().add(j) = signed as f32 };
    }
    out
}
