//! Products of int8 and int8, with exact sums in i32: `C = activation(scale·Â·B [+ C] + bias)∘gate + residual`.
//!
//! # Naive form
//! ```text
//! for i in 0..m {
//!     s[i] = max_p |a[i][p]| / 127, rounded up to 16 significant bits
//!     for p in 0..k { q[i][p] = round(a[i][p] / s[i]) }
//!     for j in 0..n { c[i][j] = s[i] * t[j] * (Σ_p q[i][p] * r[p][j]) }      // r: the weights' integers, t: their scales
//! }
//! ```
//! # Deviations
//! - Rows are quantised while they are packed into the pairs that the kernel reads, 48 at a time, by each task for
//!   itself.
//! - A tile's sums stay in registers over all of K: they are integers, so blocks of K need no order and C is not read
//!   back. Only the weights are laid out in blocks.
//! - Where the CPU has a tile unit, it multiplies bytes (`byte_tiles`); the sums are exact, so no bit depends on it.
//! - Rounding to an integer is the addition of 1.5·2²³, whose sum has the integer in its low bits.

use std::ops::Range;

use super::byte_tiles::TilePart;
use super::driver::{slab, threads_for};
use super::epilogue::{Accum, Epilogue};
use super::microkernel::{
    Finish, KernelInfo, Out, PairProducts, PairStrip, PairVisitor, Pairs, RowScale, WordBlock,
    int8_kernel_of, kernel_of, with_pairs,
};
use super::packed::PackedWeights;
use super::quantise::{WeightFormat, scale_of};
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::scratch::{ScratchBuf, Words};
use crate::view::{MatMut, MatRef};

/// The largest k: `128·127·k` must stay below 2³¹.
pub const INT8_MAX_DEPTH: usize = 132_104;
/// Rows that a task quantises at a time: whole tiles of every kernel, and with k = 4096 no more than 400 KiB.
const ROWS: usize = 48;

/// The left operand of [`gemm_int8`].
#[derive(Debug, Clone, Copy)]
pub enum Int8Rows<'a> {
    /// Each row is quantised by its own largest element: `a[i][p] ≈ s[i]·q[i][p]`, `|q| ≤ 127`.
    Quantise(MatRef<'a>),
    /// Already integers, and a scale for each row.
    Given {
        /// The integers `[m, k]`, any strides.
        values: MatRef<'a, i8>,
        /// The scales `[m]`.
        scales: &'a [f32],
    },
}

impl Int8Rows<'_> {
    fn shape(&self) -> (usize, usize) {
        match self {
            Int8Rows::Quantise(a) => (a.rows(), a.cols()),
            Int8Rows::Given { values, .. } => (values.rows(), values.cols()),
        }
    }
}

/// `C = activation(scale·Â·B [+ C] + bias)∘gate + residual`, where Â is A rounded to int8 row by row and B holds int8.
///
/// The sums of products are exact. A row's scale depends on that row alone, so its result has the same bits in any
/// batch and for any number of threads. A row with an element that is not finite gives NaN.
///
/// # Shapes
/// A `[m, k]`, B `[k, n]` packed as [`WeightFormat::Int8`], C `[m, n]`, bias `[n]`, gate and residual `[m, n]`.
///
/// # Errors
/// [`ShapeError`] when the shapes do not fit together, when B has another format or was packed for another
/// instruction set, or when k is beyond [`INT8_MAX_DEPTH`]; nothing has been read or written then.
///
/// # Accuracy
/// `|ĉ − s[i]·t[j]·sum| ≤ γ_4·|s[i]·t[j]·sum|` before the epilogue: the sum becomes an f32 and is scaled. Rounding A
/// adds at most `max|A[i]|/254·(1 + 2⁻¹³)·Σ_p |B[p][j]|`. Asserted by `gemm::tests::int8::sums_are_exact` and
/// `gemm::tests::int8::rounding_the_rows_is_within_half_a_step`.
pub fn gemm_int8(
    ctx: &Context,
    a: Int8Rows<'_>,
    b: &PackedWeights,
    mut c: MatMut<'_>,
    accum: Accum,
    epilogue: &Epilogue<'_>,
) -> Result<(), ShapeError> {
    let (m, k) = a.shape();
    check(ctx, &a, b)?;
    expect_dim("c", "rows", m, c.rows())?;
    expect_dim("c", "cols", b.cols(), c.cols())?;
    epilogue.check(m, b.cols())?;
    if m == 0 || b.cols() == 0 {
        return Ok(());
    }
    let (row_stride, col_stride) = (c.row_stride(), c.col_stride());
    let out = Out { ptr: c.as_mut_ptr(), row_stride, col_stride };
    let kernel = int8_kernel_of(ctx.isa());
    let product = Product { a, b, out, accum, epilogue: *epilogue, kernel };
    let threads = threads_for(ctx, kernel, [m, b.cols(), k]);
    let (row_tiles, col_tiles) = (m.div_ceil(kernel.mr), b.cols().div_ceil(kernel.nr));
    let by_rows = row_tiles >= threads;
    let parts = threads.min(if by_rows { row_tiles } else { col_tiles });
    ctx.for_each_task(parts, |task| {
        let (mut rows, mut cols) = (0..m, 0..b.cols());
        if by_rows {
            rows = slab(m, kernel.mr, parts, task);
        } else {
            cols = slab(b.cols(), kernel.nr, parts, task);
        }
        let part = Part { product: &product, rows, cols };
        match ctx.isa().tiles() {
            Some(tiles) => ctx.isa().dispatch(TilePart { part, tiles }),
            None => with_pairs(ctx.isa(), part),
        }
    });
    Ok(())
}

/// The name of the kernel that [`gemm_int8`] runs under `ctx`, for example `int8_6x16_avx2`.
pub fn int8_kernel_name(ctx: &Context) -> &'static str {
    int8_kernel_of(ctx.isa()).name
}

/// The operands against each other and against the context.
fn check(ctx: &Context, a: &Int8Rows<'_>, b: &PackedWeights) -> Result<(), ShapeError> {
    let (m, k) = a.shape();
    if b.format() != WeightFormat::Int8 {
        let value = format!("{:?}", b.format());
        return Err(ShapeError::Value { argument: "b.format", value, expected: "Int8" });
    }
    let kernel = kernel_of(ctx.isa(), b.format().storage()).name;
    if b.kernel_name() != kernel {
        let packed_for = b.kernel_name();
        return Err(ShapeError::PackedForAnotherKernel { argument: "b", packed_for, kernel });
    }
    expect_dim("b", "rows", k, b.rows())?;
    if k > INT8_MAX_DEPTH {
        let expected = "at most 132104 columns, whose sums fit 32 bits";
        return Err(ShapeError::Value { argument: "a.cols", value: k.to_string(), expected });
    }
    match a {
        Int8Rows::Given { scales, .. } => expect_dim("scales", "elements", m, scales.len()),
        Int8Rows::Quantise(_) => Ok(()),
    }
}

/// One product with checked shapes; every task sees the whole of it.
pub(super) struct Product<'a> {
    pub(super) a: Int8Rows<'a>,
    pub(super) b: &'a PackedWeights,
    out: Out<f32>,
    accum: Accum,
    epilogue: Epilogue<'a>,
    kernel: &'static KernelInfo,
}

// SAFETY: `out` is the only part that is not Sync by itself; tasks write disjoint parts of it.
unsafe impl Sync for Product<'_> {}

/// One task: this part of C.
pub(super) struct Part<'a> {
    pub(super) product: &'a Product<'a>,
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
}

impl PairVisitor for Part<'_> {
    #[inline(always)]
    fn visit<S: PairProducts, const MR: usize, const VECS: usize>(self, kernel: Pairs<S, MR, VECS>) {
        let Part { product, rows, cols } = self;
        let b = product.b;
        let nr = Pairs::<S, MR, VECS>::NR;
        debug_assert_eq!((Pairs::<S, MR, VECS>::MR, nr), (product.kernel.mr, product.kernel.nr));
        let depths = b.depths();
        let row_words: usize =
            depths.iter().map(|depth| Order::Pairs.words() * depth.len().div_ceil(4)).sum();
        let mut pairs = Words::default();
        pairs.resize(ROWS.min(rows.len()) * row_words);
        let mut scales = [RowScale::default(); ROWS];
        let mut staging = ScratchBuf::take(b.rows());
        let mut blocks = Vec::with_capacity(depths.len());
        for first in rows.clone().step_by(ROWS) {
            let block = first..(first + ROWS).min(rows.end);
            for (i, scale) in block.clone().zip(&mut scales) {
                let to = &mut pairs[(i - first) * row_words..][..row_words];
                *scale = quantise_row::<false>(product.a, i, b.depth(), &mut staging, to);
            }
            for j in cols.clone().step_by(nr) {
                let panel = j..(j + nr).min(cols.end);
                blocks.clear();
                blocks.extend(depths.iter().map(
                    #[inline(always)]
                    |depth| {
                        // The words of a block follow its row of scales.
                        let ptr = b.panels(depth.clone(), panel.clone()).ptr.wrapping_add(nr);
                        WordBlock { ptr, words: depth.len().div_ceil(4) }
                    },
                ));
                let lhs = &pairs[..block.len() * row_words];
                let strip = product.strip(block.clone(), panel, (&scales[..block.len()], lhs, &blocks), nr);
                // SAFETY: the blocks are those of this panel, the weights have NR scales before the first; this
                // task alone writes these rows and columns of C, and the shapes of the epilogue were checked.
                unsafe { kernel.run(&strip) };
            }
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    fn strip<'a>(
        &'a self,
        rows: Range<usize>,
        cols: Range<usize>,
        (scales_of_rows, lhs, blocks): (&'a [RowScale], &'a [u32], &'a [WordBlock]),
        nr: usize,
    ) -> PairStrip<'a> {
        let (out, finish) = (self.out(rows.start, cols.start), self.finish(rows, cols.clone()));
        let scales = blocks.first().map_or(ONES.as_ptr(), |block| block.ptr.wrapping_sub(nr).cast());
        PairStrip { rows: scales_of_rows, cols: cols.len(), lhs, blocks, scales, out, finish }
    }

    /// C from element (`row`, `col`) on.
    #[inline(always)]
    pub(super) fn out(&self, row: usize, col: usize) -> Out<f32> {
        let offset = row * self.out.row_stride + col * self.out.col_stride;
        Out { ptr: self.out.ptr.wrapping_add(offset), ..self.out }
    }

    /// What is done to the sums of these rows and columns.
    #[inline(always)]
    pub(super) fn finish(&self, rows: Range<usize>, cols: Range<usize>) -> Finish<'_> {
        self.epilogue.finish(rows, cols, (self.accum == Accum::Add, true))
    }
}

/// The scales of a panel without rows, for the widest panel.
static ONES: [f32; 64] = [1.0; 64];

/// How the integers of a row are laid out for a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Of each four elements the even ones, then the odd ones: pairs of 16 bits.
    Pairs,
    /// Four elements in a word, as they are.
    Bytes,
}

impl Order {
    /// Words of each four elements.
    pub(super) const fn words(self) -> usize {
        match self {
            Order::Pairs => 2,
            Order::Bytes => 1,
        }
    }
}

/// Row `i` in an order, block of K by block.
#[inline(always)]
pub(super) fn quantise_row<const BYTES: bool>(
    a: Int8Rows<'_>,
    i: usize,
    depth: usize,
    staging: &mut [f32],
    words: &mut [u32],
) -> RowScale {
    let order = if BYTES { Order::Bytes } else { Order::Pairs };
    let (row, scale, inverse): (&[f32], f32, f32) = match a {
        Int8Rows::Given { values, scales } => {
            staging.iter_mut().zip(0..).for_each(|(x, p)| *x = f32::from(values.at(i, p)));
            (staging, scales[i], 1.0)
        }
        Int8Rows::Quantise(a) => {
            let row = if a.col_stride() == 1 {
                a.row(i)
            } else {
                staging.iter_mut().zip(0..).for_each(|(x, p)| *x = a.at(i, p));
                staging
            };
            // As integers the magnitudes are ordered, infinity and NaN last.
            let largest = row.iter().map(|x| x.to_bits() & 0x7fff_ffff).fold(0, u32::max);
            let largest = f32::from_bits(largest);
            let scale = if largest.is_finite() { scale_of(largest, 127) } else { f32::NAN };
            (row, scale, 1.0 / scale)
        }
    };
    let (mut sum, mut to) = (0u32, words);
    for block in row.chunks(depth) {
        let (here, rest) = to.split_at_mut(order.words() * block.len().div_ceil(4));
        sum = sum.wrapping_add(integers_of::<BYTES>(block, inverse, here));
        to = rest;
    }
    RowScale { scale, excess: sum.wrapping_mul(128) }
}

/// Writes one block's integers and returns their sum, modulo 2³².
#[inline(always)]
fn integers_of<const BYTES: bool>(row: &[f32], inverse: f32, to: &mut [u32]) -> u32 {
    /// 1.5·2²³: the last place of its neighbours is 1.
    const ROUND: f32 = 12_582_912.0;
    let (fours, rest) = row.as_chunks::<4>();
    let mut last = [0.0; 4];
    last[..rest.len()].copy_from_slice(rest);
    let tail = (!rest.is_empty()).then_some(&last);
    let mut sum = 0u32;
    let quantised = fours.iter().chain(tail).map(
        #[inline(always)]
        |four| {
            let q = four.map(
                #[inline(always)]
                |x| (x * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()),
            );
            sum = q.iter().fold(sum, |sum, q| sum.wrapping_add(*q));
            q
        },
    );
    if BYTES {
        for (q, to) in quantised.zip(to) {
            *to = (q[0] & 0xff) | (q[1] & 0xff) << 8 | (q[2] & 0xff) << 16 | q[3] << 24;
        }
    } else {
        for (q, to) in quantised.zip(to.as_chunks_mut::<2>().0) {
            *to = [(q[0] & 0xffff) | q[2] << 16, (q[1] & 0xffff) | q[3] << 16];
        }
    }
    sum
}
