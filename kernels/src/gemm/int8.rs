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
use super::driver::Grid;
use super::epilogue::{Accum, Epilogue};
use super::int8_rows::{Int8Rows, Integers, Order, quantise_row};
use super::microkernel::{
    KernelInfo, Out, PairProducts, PairStrip, PairVisitor, Pairs, RowScale, Sink, WordBlock, int8_kernel_of,
    kernel_of, with_pairs,
};
use super::packed::PackedWeights;
use super::quantise::WeightFormat;
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::scratch::{ScratchBuf, Words};
use crate::view::MatMut;

/// Rows that a task quantises at a time: whole tiles of every kernel, and with k = 4096 no more than 400 KiB.
const ROWS: usize = 48;

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
/// instruction set, or when k is beyond [`INT8_MAX_DEPTH`](super::INT8_MAX_DEPTH) (or [`UINT8_MAX_DEPTH`](super::UINT8_MAX_DEPTH)); nothing has been
/// read or written then.
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
    let m = a.shape().0;
    check(ctx, &a, b)?;
    expect_dim("c", "rows", m, c.rows())?;
    expect_dim("c", "cols", b.cols(), c.cols())?;
    epilogue.check(m, b.cols())?;
    let (row_stride, col_stride) = (c.row_stride(), c.col_stride());
    let out = Out { ptr: c.as_mut_ptr(), row_stride, col_stride };
    run(ctx, a, b, Target::Scaled { out, accum, epilogue: *epilogue });
    Ok(())
}

/// `C = A·B [+ C]` in integers: the exact sums, as they are, for those who scale them in their own way.
///
/// # Shapes
/// A `[m, k]`, B `[k, n]` packed as [`WeightFormat::Int8`] ([`PackedWeights::from_int8`] takes integers), C `[m, n]`.
///
/// # Errors
/// As [`gemm_int8`].
///
/// # Accuracy
/// Exact; with [`Accum::Add`] modulo 2³². Asserted by `gemm::tests::int8::raw_sums_are_exact`.
pub fn gemm_int8_sums<'a>(
    ctx: &Context,
    a: impl Into<Integers<'a>>,
    b: &PackedWeights,
    mut c: MatMut<'_, i32>,
    accum: Accum,
) -> Result<(), ShapeError> {
    let values = a.into();
    // The scales are not used.
    let scales = vec![1.0; Int8Rows::Given { values, scales: &[] }.shape().0];
    let a = Int8Rows::Given { values, scales: &scales };
    check(ctx, &a, b)?;
    expect_dim("c", "rows", scales.len(), c.rows())?;
    expect_dim("c", "cols", b.cols(), c.cols())?;
    let (row_stride, col_stride) = (c.row_stride(), c.col_stride());
    let out = Out { ptr: c.as_mut_ptr(), row_stride, col_stride };
    run(ctx, a, b, Target::Integers { out, accum });
    Ok(())
}

/// The product with checked shapes.
fn run(ctx: &Context, a: Int8Rows<'_>, b: &PackedWeights, target: Target<'_>) {
    let (m, k) = a.shape();
    if m == 0 || b.cols() == 0 {
        return;
    }
    let kernel = int8_kernel_of(ctx.isa());
    let product = Product { a, b, target, kernel };
    let grid = Grid::of(ctx, kernel, [m, b.cols(), k], true);
    ctx.for_each_task(grid.parts(), |task| {
        let (rows, cols) = grid.part(task);
        let part = Part { product: &product, rows, cols };
        match ctx.isa().tiles() {
            Some(tiles) => ctx.isa().dispatch(TilePart { part, tiles }),
            None => with_pairs(ctx.isa(), part),
        }
    });
}

/// The name of the kernel that [`gemm_int8`] runs under `ctx`, for example `int8_6x16_avx2`.
pub fn int8_kernel_name(ctx: &Context) -> &'static str {
    int8_kernel_of(ctx.isa()).name
}

/// The operands against each other and against the context.
fn check(ctx: &Context, a: &Int8Rows<'_>, b: &PackedWeights) -> Result<(), ShapeError> {
    if b.format() != WeightFormat::Int8 {
        let value = format!("{:?}", b.format());
        return Err(ShapeError::Value { argument: "b.format", value, expected: "Int8" });
    }
    let kernel = kernel_of(ctx.isa(), b.format().storage()).name;
    if b.kernel_name() != kernel {
        let packed_for = b.kernel_name();
        return Err(ShapeError::PackedForAnotherKernel { argument: "b", packed_for, kernel });
    }
    expect_dim("b", "rows", a.shape().1, b.rows())?;
    a.check()
}

/// One product with checked shapes; every task sees the whole of it.
pub(super) struct Product<'a> {
    pub(super) a: Int8Rows<'a>,
    pub(super) b: &'a PackedWeights,
    target: Target<'a>,
    kernel: &'static KernelInfo,
}

/// Where all sums go.
enum Target<'a> {
    Scaled { out: Out<f32>, accum: Accum, epilogue: Epilogue<'a> },
    Integers { out: Out<i32>, accum: Accum },
}

// SAFETY: C is the only part that is not Sync by itself; tasks write disjoint parts of it.
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
        let sink = self.sink(rows, cols.clone());
        let scales = blocks.first().map_or(ONES.as_ptr(), |block| block.ptr.wrapping_sub(nr).cast());
        PairStrip { rows: scales_of_rows, cols: cols.len(), lhs, blocks, scales, sink }
    }

    /// Where the sums of these rows and columns go, and what is done to them.
    #[inline(always)]
    pub(super) fn sink(&self, rows: Range<usize>, cols: Range<usize>) -> Sink<'_> {
        match &self.target {
            Target::Scaled { out, accum, epilogue } => {
                let out = out.from(rows.start, cols.start);
                Sink::Scaled { out, finish: epilogue.finish(rows, cols, (*accum == Accum::Add, true)) }
            }
            Target::Integers { out, accum } => {
                Sink::Integers { out: out.from(rows.start, cols.start), add: *accum == Accum::Add }
            }
        }
    }
}

/// The scales of a panel without rows, for the widest panel.
static ONES: [f32; 64] = [1.0; 64];
