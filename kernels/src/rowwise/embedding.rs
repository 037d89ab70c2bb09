//! Embedding: rows of a table by index.
//!
//! ```text
//! forward:   out[i] = scale · table[ids[i]]
//! backward:  for i ascending: d_table[ids[i]] += scale · d_out[i]
//! ```
//! Backward gives each thread some rows of the table and lets it go over all ids: every row of the table is
//! summed by one thread in the order of i, so no atomics, no sorting, and the same bits for any number of
//! threads. Going over ids costs one comparison an id and thread.
//!
//! A NaN stays where its row goes.

use pulp::{Simd, WithSimd};

use super::{expect_rows, rows_per_block};
use crate::context::Context;
use crate::error::{ShapeError, expect_dim};
use crate::lanes;
use crate::view::{MatMut, MatRef};

fn check_ids(ids: &[u32], len: usize) -> Result<(), ShapeError> {
    match ids.iter().position(|&id| id as usize >= len) {
        Some(position) => {
            Err(ShapeError::Index { argument: "ids", position, index: ids[position] as usize, len })
        }
        None => Ok(()),
    }
}

struct Forward<'a> {
    table: MatRef<'a>,
    ids: &'a [u32],
    scale: f32,
    out: MatMut<'a>,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let scale = simd.splat_f32s(self.scale);
        for (i, &id) in self.ids.iter().enumerate() {
            let row = self.table.row(id as usize);
            lanes::map(
                simd,
                row,
                self.out.row_mut(i),
                #[inline(always)]
                |x| simd.mul_f32s(x, scale),
            );
        }
    }
}

struct Backward<'a> {
    d_out: MatRef<'a>,
    ids: &'a [u32],
    scale: f32,
    /// The first row of the table that `d_table` holds.
    first: usize,
    d_table: MatMut<'a>,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let scale = simd.splat_f32s(self.scale);
        for (i, &id) in self.ids.iter().enumerate() {
            let row = (id as usize).wrapping_sub(self.first);
            if row < self.d_table.rows() {
                lanes::update(
                    simd,
                    self.d_out.row(i),
                    self.d_table.row_mut(row),
                    #[inline(always)]
                    |d_out, d_row| simd.mul_add_e_f32s(d_out, scale, d_row),
                );
            }
        }
    }
}

/// `out[i] = scale · table[ids[i]]`.
///
/// # Shapes
/// table: `[vocab, dim]`; ids: `[rows]`; out: `[rows, dim]`; rows contiguous.
///
/// # Errors
/// [`ShapeError`] when the shapes differ, a row is not contiguous, or an id is no row of the table. Nothing
/// has been written then.
///
/// Accuracy: one rounding, none when scale is 1.
pub fn forward(ctx: &Context, table: MatRef, ids: &[u32], scale: f32, out: MatMut) -> Result<(), ShapeError> {
    table.expect_contiguous_rows("table")?;
    expect_rows("out", out.as_ref(), ids.len(), table.cols())?;
    check_ids(ids, table.rows())?;
    out.for_each_row_block(ctx, rows_per_block(table.cols()), |first, out| {
        let ids = &ids[first..first + out.rows()];
        ctx.isa().dispatch(Forward { table, ids, scale, out });
    });
    Ok(())
}

/// `d_table[ids[i]] += scale · d_out[i]`, i ascending.
///
/// # Shapes
/// d_out: `[rows, dim]`; ids: `[rows]`; d_table: `[vocab, dim]`; rows contiguous.
///
/// # Errors
/// As [`forward`]. Nothing has been written then.
///
/// Accuracy: error at most `γ_k·(|d_table| + Σ |scale·d_out|)` for a row that k ids name, k + 1 roundings
/// (`rowwise::tests::embedding`).
pub fn backward(
    ctx: &Context,
    d_out: MatRef,
    ids: &[u32],
    scale: f32,
    d_table: MatMut,
) -> Result<(), ShapeError> {
    d_out.expect_contiguous_rows("d_out")?;
    d_table.expect_contiguous_rows("d_table")?;
    expect_dim("ids", "length", d_out.rows(), ids.len())?;
    expect_dim("d_table", "columns", d_out.cols(), d_table.cols())?;
    check_ids(ids, d_table.rows())?;
    // A row is summed in the same order whatever block it lies in, so blocks may follow the threads.
    let workers = if ids.len() < rows_per_block(d_out.cols()) { 1 } else { ctx.thread_count() };
    let block = d_table.rows().div_ceil(workers).max(1);
    d_table.for_each_row_block(ctx, block, |first, d_table| {
        ctx.isa().dispatch(Backward { d_out, ids, scale, first, d_table });
    });
    Ok(())
}
