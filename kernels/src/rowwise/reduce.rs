//! Sums over rows and over all elements, in an order that no number of threads changes.
//!
//! ```text
//! col_sum:      for i: for j: out[j] += x[i][j]
//! sum_squares:  for i: sum += x[i]²
//! ```
//! Both are cut into chunks of fixed size (128 rows; 16,384 elements). A chunk is summed by one thread; the
//! chunks' sums are added in order, those of `sum_squares` in f64. That also bounds the error by the chunk
//! rather than by the whole.
//!
//! NaN and infinities follow IEEE 754.

use pulp::{Simd, WithSimd};

use super::{CHUNK, ROWS_PER_SUM};
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::lanes;
use crate::scratch::ScratchBuf;
use crate::view::{self, MatMut, MatRef};

/// `out[j] += Σᵢ x[i][j]`, the rows one after the other.
struct AddRows<'a> {
    x: MatRef<'a>,
    out: &'a mut [f32],
}

impl WithSimd for AddRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for i in 0..self.x.rows() {
            lanes::update(
                simd,
                self.x.row(i),
                self.out,
                #[inline(always)]
                |x, sum| simd.add_f32s(sum, x),
            );
        }
    }
}

/// `out[j] += Σᵢ x[i][j]` for few rows, on this thread, in the order of the rows.
pub(super) fn add_rows(ctx: &Context, x: MatRef, out: &mut [f32]) {
    ctx.isa().dispatch(AddRows { x, out });
}

/// `out[j] += Σᵢ x[i][j]`: the gradient of a bias.
///
/// # Shapes
/// x: `[rows, cols]`, rows contiguous; out: `[cols]`.
///
/// # Errors
/// [`ShapeError`] when the shapes differ or a row is not contiguous.
///
/// Accuracy: error at most `γ_k·(|out| + Σ |x|)`, k = 128 + rows/128 (`rowwise::tests::col_sum`).
pub fn col_sum(ctx: &Context, x: MatRef, out: &mut [f32]) -> Result<(), ShapeError> {
    let (rows, cols) = (x.rows(), x.cols());
    x.expect_contiguous_rows("x")?;
    expect_dim("out", "length", cols, out.len())?;
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let chunks = rows.div_ceil(ROWS_PER_SUM);
    let mut partial = ScratchBuf::zeroed(chunks * cols);
    MatMut::new(&mut partial, chunks, cols)?.for_each_row_block(ctx, 1, |index, mut sums| {
        let first = index * ROWS_PER_SUM;
        let x = x.sub(first..(first + ROWS_PER_SUM).min(rows), 0..cols);
        ctx.isa().dispatch(AddRows { x, out: sums.row_mut(0) });
    });
    add_rows(ctx, MatRef::new(&partial, chunks, cols)?, out);
    Ok(())
}

struct SumSquares<'a>(&'a [f32]);

impl WithSimd for SumSquares<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        lanes::dot(simd, self.0, self.0)
    }
}

/// `Σ x[i]²`: one tensor's part of a global gradient norm. Add the parts in a fixed order.
///
/// Accuracy: relative error at most γ of 16,384/(4·lanes) + 8, whatever the length; ∞ when a chunk's sum is
/// beyond f32, which takes elements of 10¹⁷ (`rowwise::tests::sum_squares`).
pub fn sum_squares(ctx: &Context, x: &[f32]) -> f64 {
    if x.len() <= CHUNK {
        return f64::from(ctx.isa().dispatch(SumSquares(x)));
    }
    let mut partial = ScratchBuf::take(x.len().div_ceil(CHUNK));
    view::for_each_chunk(ctx, &mut partial, 1, |index, sum| {
        let first = index * CHUNK;
        sum[0] = ctx.isa().dispatch(SumSquares(&x[first..(first + CHUNK).min(x.len())]));
    });
    partial.iter().map(|&sum| f64::from(sum)).sum()
}
