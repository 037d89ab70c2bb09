//! Kernels that go over rows or elements: one or two passes over memory, forward and backward.
//!
//! Rows and chunks of elements go to threads in blocks whose places depend on the shape alone. What is
//! summed over rows (`d_gamma`, [`reduce::col_sum`]) is summed within blocks of [`ROWS_PER_SUM`] rows
//! first, then over the blocks in their order, whatever the number of threads.

pub mod activation;
pub mod cross_entropy;
pub mod dropout;
pub mod elementwise;
pub mod embedding;
pub mod gated;
pub mod layernorm;
pub mod log_softmax;
pub mod masked_softmax;
pub mod projected_cross_entropy;
pub mod reduce;
pub mod residual_norm;
pub mod rmsnorm;
pub mod softmax;

#[cfg(test)]
mod tests;

pub use activation::Activation;

use crate::error::{ShapeError, expect_dim};
use crate::view::MatRef;

/// Elements of one parallel task, and the unit of deterministic sums over elements.
pub(crate) const CHUNK: usize = 16 * 1024;

/// Rows that are summed one after the other; part of the numerical result.
pub const ROWS_PER_SUM: usize = 128;

/// Rows of one parallel task when rows are independent.
fn rows_per_block(cols: usize) -> usize {
    (CHUNK / cols.max(1)).max(1)
}

/// `Ok` when `matrix` is `rows × cols` with contiguous rows.
fn expect_rows(argument: &'static str, matrix: MatRef, rows: usize, cols: usize) -> Result<(), ShapeError> {
    expect_dim(argument, "rows", rows, matrix.rows())?;
    expect_dim(argument, "columns", cols, matrix.cols())?;
    matrix.expect_contiguous_rows(argument)
}
