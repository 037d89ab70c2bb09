//! Checked views of matrices and of [batch, seq, heads, head_dim] tensors: pointer, shape, strides.
//!
//! A constructor proves once that every index reaches inside the buffer and, for mutable views,
//! that no two indices name the same element; kernels then work on the parts without checks.
//! [`MatMut::split_rows`] and [`for_each_chunk`] hand disjoint parts to threads.

mod batch;
mod blocks;
mod heads;
mod matrix;

pub use batch::{BatchLayout, MatBatchMut, MatBatchRef};
pub use blocks::for_each_chunk;
pub(crate) use blocks::zip_row_blocks;
pub use heads::{HeadsLayout, HeadsMut, HeadsRef};
pub use matrix::{MatMut, MatRef};

use crate::error::ShapeError;

/// One more than the largest offset that the shape and strides reach (0 for an empty shape).
fn extent<const D: usize>(
    argument: &'static str,
    shape: [usize; D],
    strides: [usize; D],
) -> Result<usize, ShapeError> {
    let overflow = ShapeError::Overflow { argument };
    if shape.contains(&0) {
        return Ok(0);
    }
    let mut last = 0usize;
    for (n, stride) in shape.into_iter().zip(strides) {
        last =
            (n - 1).checked_mul(stride).and_then(|x| last.checked_add(x)).ok_or_else(|| overflow.clone())?;
    }
    match last.checked_add(1) {
        Some(extent) if extent <= isize::MAX as usize / 8 => Ok(extent),
        _ => Err(overflow),
    }
}

/// No two indices meet: from the smallest stride up, each stride steps over all that lies below it.
fn expect_disjoint<const D: usize>(
    argument: &'static str,
    shape: [usize; D],
    strides: [usize; D],
) -> Result<(), ShapeError> {
    if shape.contains(&0) {
        return Ok(());
    }
    let mut axes: [(usize, usize); D] = std::array::from_fn(|axis| (strides[axis], shape[axis]));
    axes.sort_unstable();
    let mut reached = 0;
    for (stride, n) in axes.into_iter().filter(|&(_, n)| n > 1) {
        if stride <= reached {
            return Err(ShapeError::Overlap { argument });
        }
        reached += (n - 1) * stride;
    }
    Ok(())
}

fn expect_len(argument: &'static str, expected: usize, actual: usize) -> Result<(), ShapeError> {
    if actual < expected { Err(ShapeError::BufferTooShort { argument, expected, actual }) } else { Ok(()) }
}
