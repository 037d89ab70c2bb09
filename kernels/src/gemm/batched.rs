//! Many products of one shape: independent, so they are what threads share.
//!
//! ```text
//! for i in 0..count { C[i] = activation(scale·A[i]·B[i] [+ C[i]] + bias) }
//! ```
//! Where there are at least as many products as threads, each is computed by one thread; otherwise they are
//! computed one after the other by all threads. No bit depends on it.

use super::{Accum, Epilogue, gemm};
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::view::{MatBatchMut, MatBatchRef};

/// `C[i] = activation(scale·A[i]·B[i] [+ C[i]] + bias)` for every matrix of a batch, any strides.
///
/// A batch stride of 0 uses one A, or one B, for all products.
///
/// # Shapes
/// A `[count, m, k]`, B `[count, k, n]`, C `[count, m, n]`, bias `[n]`.
///
/// # Errors
/// [`ShapeError`] when the shapes do not fit together, or when the epilogue has a gate or a residual, of which there
/// could be one only; nothing has been read or written then.
///
/// # Accuracy
/// Each product is that of [`gemm`], bit for bit; asserted by `gemm::tests::batches_are_their_products`.
pub fn gemm_batched(
    ctx: &Context,
    a: MatBatchRef<'_>,
    b: MatBatchRef<'_>,
    c: MatBatchMut<'_>,
    accum: Accum,
    epilogue: &Epilogue<'_>,
) -> Result<(), ShapeError> {
    let (la, lb, lc) = (*a.layout(), *b.layout(), *c.layout());
    expect_dim("a", "count", lc.count, la.count)?;
    expect_dim("b", "count", lc.count, lb.count)?;
    expect_dim("b", "rows", la.cols, lb.rows)?;
    expect_dim("c", "rows", la.rows, lc.rows)?;
    expect_dim("c", "cols", lb.cols, lc.cols)?;
    epilogue.check(lc.rows, lc.cols)?;
    for (argument, matrix) in [("epilogue.gate", epilogue.gate), ("epilogue.residual", epilogue.residual)] {
        if matrix.is_some() {
            let expected = "none: a batch has no single matrix of that shape";
            return Err(ShapeError::Value { argument, value: "a matrix".to_owned(), expected });
        }
    }
    let alone = ctx.single_threaded();
    let (across, inside) = if lc.count >= ctx.thread_count() { (*ctx, alone) } else { (alone, *ctx) };
    let products: Vec<_> = c.into_matrices().into_iter().enumerate().collect();
    across.for_each_owned(products, |(i, c)| {
        let done = gemm(&inside, a.matrix(i), b.matrix(i), c, accum, epilogue);
        done.expect("the shapes were checked above");
    });
    Ok(())
}
