//! Products of int8 and int8, with exact sums in i32: `C = activation(scale·Â·B [+ C] + bias)∘gate + residual`.
//!
//! # Naive form
//! ```text
//! for i in 0..m {
//!     s[i] = max_p |a[i][p]| / 127 (or 63), rounded up to 16 significant bits
//!     for p in 0..k { q[i][p] = round(a[i][p] / s[i]) }
//!     for j in 0..n { c[i][j] = s[i] * t[j] * (Σ_p q[i][p] * r[p][j]) }      // r: the weights' integers, t: their scales
//! }
//! ```
//! # Deviations
//! - Rows are quantised while they are packed into the pairs or bytes that the kernel reads, 48 at a time, by each task for
//!   itself.
//! - A tile's sums stay in registers over all of K: they are integers, so blocks of K need no order and C is not read
//!   back. Only the weights are laid out in blocks.
//! - Where the CPU has a tile unit, it multiplies bytes (`byte_tiles`), else vectors with dot products of bytes do if there are any
//!   (`microkernel::dots`); the sums are exact, so no bit depends on it.
//! - Rounding to an integer is the addition of 1.5·2²³, whose sum has the integer in its low bits.

use std::ops::Range;

use super::byte_tiles::TilePart;
use super::driver::Grid;
use super::epilogue::{Accum, Epilogue};
use super::int8_int4::{GroupPart, GroupProduct};
use super::int8_rows::{Int8Rows, Integers, quantise_row};
use super::microkernel::{
    ByteKernel, ByteProducts, ByteStrip, ByteVisitor, KernelInfo, Out, Rhs, RowScale, Sink, Storage,
    WordBlock, int8_kernel_of, kernel_of, with_byte_kernel, with_nibble_kernel, with_seven_kernel,
};
use super::packed::PackedWeights;
use super::placement::lies_far;
use super::quantise::WeightFormat;
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::scratch::{ScratchBuf, Words};
use crate::view::MatMut;

/// Rows that a task quantises at a time: at least whole tiles of every kernel (with k = 4096 no more than 400 KiB), and more of short rows, as many as lie in the
/// second-level cache beside a panel, so that weights from farther away are read less often.
pub(super) fn rows_at_once(rows: usize, row_words: usize) -> usize {
    const TILES: usize = 48;
    const WORDS: usize = 48 << 10;
    let held = (WORDS / row_words.max(1)).clamp(TILES, 4 * TILES) / TILES * TILES;
    held.min(rows)
}

/// `C = activation(scale·Â·B [+ C] + bias)∘gate + residual`, where Â is A rounded to int8 row by row and B holds int8 or int4.
///
/// The sums of products are exact, with int4 those of each group of weights. A row's scale depends on that row alone, so its result has the same bits in any
/// batch and for any number of threads. A row with an element that is not finite gives NaN.
///
/// # Shapes
/// A `[m, k]`, B `[k, n]` packed as [`WeightFormat::Int8`] or [`WeightFormat::Int4`], C `[m, n]`, bias `[n]`, gate and residual `[m, n]`.
///
/// # Errors
/// [`ShapeError`] when the shapes do not fit together, when B has another format or was packed for another
/// instruction set, when A is unsigned beside int4, or when k is beyond [`INT8_MAX_DEPTH`](super::INT8_MAX_DEPTH) (or [`UINT8_MAX_DEPTH`](super::UINT8_MAX_DEPTH)); nothing has been
/// read or written then.
///
/// # Accuracy
/// `|ĉ − s[i]·t[j]·sum| ≤ γ_4·|s[i]·t[j]·sum|` before the epilogue: the sum becomes an f32 and is scaled. Rounding A
/// adds at most `max|A[i]|/254·(1 + 2⁻¹³)·Σ_p |B[p][j]|`, to 7 bits ([`Int8Rows::Quantise7`]) `max|A[i]|/126·(1 + 2⁻¹³)·Σ_p |B[p][j]|`.
/// Asserted by `gemm::tests::int8::sums_are_exact`, `gemm::tests::int8::rounding_the_rows_is_within_half_a_step` and
/// `gemm::tests::int7::rounding_the_rows_is_within_half_a_step`. With int4 in G groups it is `γ_{2G+3}·s[i]·Σ_g |t[g][j]·sum_g|`: each sum
/// becomes an f32, a chain adds them up, and the row's scale comes last. Asserted by `gemm::tests::int8_int4::the_error_is_that_of_a_chain_of_groups`.
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
    if let WeightFormat::Int4 { .. } = b.format() {
        run_groups(ctx, GroupProduct { a, b, out, accum, epilogue: *epilogue });
    } else {
        run(ctx, a, b, Target::Scaled { out, accum, epilogue: *epilogue });
    }
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
    if b.format() != WeightFormat::Int8 {
        let value = format!("{:?}", b.format());
        return Err(ShapeError::Value { argument: "b.format", value, expected: "Int8" });
    }
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
    let kernel = int8_kernel_of(ctx.isa(), a.storage(), Storage::Int8);
    let product = Product { a, b, target, kernel };
    let grid = Grid::of(ctx, kernel, [m, b.cols(), k], true);
    ctx.for_each_task(grid.parts(), |task| {
        let (rows, cols) = grid.part(task);
        let part = Part { product: &product, rows, cols };
        match (ctx.isa().tiles(), kernel.left) {
            (Some(tiles), _) => ctx.isa().dispatch(TilePart { part, tiles }),
            (None, Storage::Int7) => with_seven_kernel(ctx.isa(), part),
            (None, _) => with_byte_kernel(ctx.isa(), part),
        }
    });
}

/// The product with int4 weights, with checked shapes.
fn run_groups(ctx: &Context, product: GroupProduct<'_>) {
    let ((m, k), n) = (product.a.shape(), product.b.cols());
    if m == 0 || n == 0 {
        return;
    }
    let grid = Grid::of(ctx, int8_kernel_of(ctx.isa(), product.a.storage(), Storage::Int4), [m, n, k], true);
    ctx.for_each_task(grid.parts(), |task| {
        let (rows, cols) = grid.part(task);
        with_nibble_kernel(ctx.isa(), GroupPart { product, rows, cols });
    });
}

/// The name of the kernel that [`gemm_int8`] runs under `ctx` with those rows and weights in `format`, for example `int8_6x16_avx2`.
///
/// # Panics
/// When it takes no such weights.
pub fn int8_kernel_name(ctx: &Context, a: &Int8Rows<'_>, format: WeightFormat) -> &'static str {
    int8_kernel_of(ctx.isa(), a.storage(), format.storage()).name
}

/// The operands against each other and against the context.
fn check(ctx: &Context, a: &Int8Rows<'_>, b: &PackedWeights) -> Result<(), ShapeError> {
    if !matches!(b.format(), WeightFormat::Int8 | WeightFormat::Int4 { .. }) {
        let value = format!("{:?}", b.format());
        return Err(ShapeError::Value { argument: "b.format", value, expected: "Int8 or Int4" });
    }
    let unsigned = matches!(a, Int8Rows::Given { values: Integers::Unsigned { .. }, .. });
    if unsigned && b.format() != WeightFormat::Int8 {
        let (value, expected) = ("unsigned".to_owned(), "signed beside int4 weights");
        return Err(ShapeError::Value { argument: "a", value, expected });
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

impl ByteVisitor for Part<'_> {
    #[inline(always)]
    fn visit<P: ByteProducts, const MR: usize, const VECS: usize>(self, kernel: ByteKernel<P, MR, VECS>) {
        let Part { product, rows, cols } = self;
        let b = product.b;
        let nr = ByteKernel::<P, MR, VECS>::NR;
        debug_assert_eq!((ByteKernel::<P, MR, VECS>::MR, nr), (product.kernel.mr, product.kernel.nr));
        let depths = b.depths();
        let row_words: usize = depths.iter().map(|depth| P::LEFT.words() * depth.len().div_ceil(4)).sum();
        let held = rows_at_once(rows.len(), row_words);
        let mut left = Words::default();
        left.resize(held * row_words);
        let mut scales = vec![RowScale::default(); held];
        let mut staging = ScratchBuf::take(b.rows());
        let mut blocks = Vec::with_capacity(depths.len());
        for first in rows.clone().step_by(held) {
            let block = first..(first + held).min(rows.end);
            for (i, scale) in block.clone().zip(&mut scales) {
                let to = &mut left[(i - first) * row_words..][..row_words];
                *scale = quantise_row(product.a, i, b.depth(), P::LEFT, (&mut staging, to));
            }
            let mut j = cols.start;
            while j < cols.end {
                // One panel; or, for few rows, all whole ones.
                let whole = (cols.end - j) / nr;
                let several = block.len() <= ByteKernel::<P, MR, VECS>::THIN_ROWS;
                let end = match if several { whole } else { whole.min(1) } {
                    0 => cols.end,
                    panels => j + panels * nr,
                };
                blocks.clear();
                blocks.extend(depths.iter().map(
                    #[inline(always)]
                    |depth| word_block(b, depth, j..end, nr),
                ));
                let lhs = &left[..block.len() * row_words];
                let strip = product.strip(block.clone(), j..end, (&scales[..block.len()], lhs, &blocks), nr);
                // SAFETY: the blocks are those of these panels, the weights have NR scales before the first; this
                // task alone writes these rows and columns of C, and the shapes of the epilogue were checked.
                unsafe { kernel.run(&strip) };
                j = end;
            }
        }
    }
}

/// The words of a block of K in those panels, which follow their row of scales.
#[inline(always)]
fn word_block(b: &PackedWeights, depth: &Range<usize>, cols: Range<usize>, nr: usize) -> WordBlock {
    let Rhs { ptr, panel_stride, .. } = b.panels(depth.clone(), cols);
    WordBlock { ptr: ptr.wrapping_add(nr), words: depth.len().div_ceil(4), panel_stride }
}

impl Product<'_> {
    #[inline(always)]
    fn strip<'a>(
        &'a self,
        rows: Range<usize>,
        cols: Range<usize>,
        (scales_of_rows, lhs, blocks): (&'a [RowScale], &'a [u32], &'a [WordBlock]),
        nr: usize,
    ) -> ByteStrip<'a> {
        let sink = self.sink(rows, cols.clone());
        let scales = blocks.first().map_or(ONES.as_ptr(), |block| block.ptr.wrapping_sub(nr).cast());
        let column_sums = self.b.column_sums(&cols);
        let far = lies_far(self.b.bytes());
        ByteStrip { rows: scales_of_rows, cols: cols.len(), lhs, blocks, far, scales, column_sums, sink }
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

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::super::int8_rows::Integers;
    use super::super::microkernel::with_plain_dots;
    use super::*;
    use crate::context::Blocking;
    use crate::isa::Isa;
    use crate::testing::{assert_same_bits, for_each_isa, uniform};
    use crate::view::MatRef;

    /// The order of bytes and what it leaves for the end, where the CPU itself multiplies pairs.
    #[test]
    fn dot_products_of_bytes_have_the_bits_of_pairs() {
        let bytes = |len: usize, seed: u64| -> Vec<u8> {
            uniform(len, seed).iter().map(|x| ((x + 1.0) * 128.0) as u8).collect()
        };
        for (m, n, k) in [(1, 1, 1), (5, 17, 30), (8, 48, 4), (53, 50, 67), (3, 4, 0)] {
            let (a, b, zero_points) = (bytes(m * k, 1), bytes(k * n, 2), bytes(m, 3));
            let b: Vec<i8> = b.iter().map(|x| *x as i8).collect();
            let signed: Vec<i8> = a.iter().map(|x| *x as i8).collect();
            let (scales, of_cols) = (vec![0.25; m], uniform(n, 4));
            let values = MatRef::new(&a, m, k).unwrap();
            let unsigned = Integers::Unsigned { values, zero_points: &zero_points };
            for values in [unsigned, Integers::Signed(MatRef::new(&signed, m, k).unwrap())] {
                let a = Int8Rows::Given { values, scales: &scales };
                for_each_isa(|ctx| {
                    let ctx = &ctx.blocking(Blocking { mc: 8, kc: 13, nc: 16 });
                    // Beside a tile unit the products of bytes that are meant stand on its vectors.
                    let vectors = Isa::new(ctx.isa().vectors()).unwrap();
                    let isa = if ctx.isa().tiles().is_some() { vectors } else { ctx.isa() };
                    let b = MatRef::new(&b, k, n).unwrap();
                    let b = &PackedWeights::from_int8(ctx, b, &of_cols).unwrap();
                    let [mut expected, mut found] = [0, 1].map(|x| vec![x as f32; m * n]);
                    let c = MatMut::new(&mut expected, m, n).unwrap();
                    gemm_int8(ctx, a, b, c, Accum::Overwrite, &Epilogue::new()).unwrap();
                    let out = Out { ptr: found.as_mut_ptr(), row_stride: n, col_stride: 1 };
                    let target = Target::Scaled { out, accum: Accum::Overwrite, epilogue: Epilogue::new() };
                    let product =
                        &Product { a, b, target, kernel: int8_kernel_of(isa, Storage::Int8, Storage::Int8) };
                    with_plain_dots(ctx.isa(), Part { product, rows: 0..m, cols: 0..n });
                    assert_same_bits(&found, &expected);

                    let [mut expected, mut found] = [0, 1].map(|x| vec![x; m * n]);
                    let c = MatMut::new(&mut expected, m, n).unwrap();
                    gemm_int8_sums(ctx, values, b, c, Accum::Overwrite).unwrap();
                    let out = Out { ptr: found.as_mut_ptr(), row_stride: n, col_stride: 1 };
                    let target = Target::Integers { out, accum: Accum::Overwrite };
                    let product =
                        &Product { a, b, target, kernel: int8_kernel_of(isa, Storage::Int8, Storage::Int8) };
                    with_plain_dots(ctx.isa(), Part { product, rows: 0..m, cols: 0..n });
                    assert_eq!(found, expected);
                });
            }
        }
    }
}
