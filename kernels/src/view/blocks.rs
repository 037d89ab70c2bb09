//! Disjoint parts of matrices and slices for the context's threads.
//!
//! Where the parts lie depends on no number of threads, so that no bit does.

use std::marker::PhantomData;
use std::time::Duration;

use super::MatMut;
use crate::context::Context;

/// `context` for a pass over so many elements in so many pieces: half a nanosecond each, as between an addition in a cache and an exact GELU.
fn for_pass_over(context: &Context, elements: usize, pieces: usize) -> Context {
    if pieces <= 1 { *context } else { context.for_call_of(Duration::from_nanos(elements as u64 / 2)) }
}

impl<T> MatMut<'_, T> {
    /// Calls `f(first_row, block)` once for each block of `rows_per_block` rows (the last may have
    /// fewer), on the context's threads. Where the blocks lie depends on no number of threads.
    ///
    /// # Panics
    /// When `rows_per_block` is 0.
    pub fn for_each_row_block(
        self,
        context: &Context,
        rows_per_block: usize,
        f: impl Fn(usize, MatMut<'_, T>) + Sync,
    ) where
        T: Send + Sync,
    {
        assert!(rows_per_block > 0);
        let whole = self;
        let blocks = whole.rows.div_ceil(rows_per_block);
        for_pass_over(context, whole.rows * whole.cols, blocks).for_each_piece(blocks, |block| {
            let first = block * rows_per_block;
            let last = (first + rows_per_block).min(whole.rows);
            let part = whole.as_ref().sub(first..last, 0..whole.cols);
            let (ptr, rows) = (part.ptr.cast_mut(), part.rows);
            // The view's own invariant (no two indices meet) makes the blocks disjoint, and
            // `for_each_piece` runs each index once.
            f(first, MatMut { ptr, rows, lifetime: PhantomData, ..whole });
        });
    }
}

/// Calls `f(index, blocks)` once for each index, with block `index` of each of three matrices: so many
/// rows of each as stand beside it, the last block shorter. On the context's threads; where the blocks
/// lie depends on no number of threads. A kernel with fewer outputs gives [`MatMut::empty`].
///
/// # Panics
/// When the matrices have different numbers of blocks (empty ones aside).
pub(crate) fn zip_row_blocks<T: Send + Sync, U: Send + Sync, V: Send + Sync>(
    context: &Context,
    first: (MatMut<'_, T>, usize),
    second: (MatMut<'_, U>, usize),
    third: (MatMut<'_, V>, usize),
    f: impl Fn(usize, (MatMut<'_, T>, MatMut<'_, U>, MatMut<'_, V>)) + Sync,
) {
    fn block<'a, T>((matrix, rows_per_block): &'a (MatMut<'_, T>, usize), index: usize) -> MatMut<'a, T> {
        let first = (index * rows_per_block).min(matrix.rows);
        let last = (first + rows_per_block).min(matrix.rows);
        let part = matrix.as_ref().sub(first..last, 0..matrix.cols);
        // As in `for_each_row_block`: each index is run once, so each block is lent once.
        MatMut { ptr: part.ptr.cast_mut(), rows: part.rows, lifetime: PhantomData, ..*matrix }
    }
    let blocks =
        [first.0.rows.div_ceil(first.1), second.0.rows.div_ceil(second.1), third.0.rows.div_ceil(third.1)];
    let count = blocks[0].max(blocks[1]).max(blocks[2]);
    assert!(blocks.iter().all(|&n| n == count || n == 0), "blocks {blocks:?}");
    let elements = [first.0.rows * first.0.cols, second.0.rows * second.0.cols, third.0.rows * third.0.cols];
    let elements = elements[0].max(elements[1]).max(elements[2]);
    for_pass_over(context, elements, count).for_each_piece(count, |index| {
        f(index, (block(&first, index), block(&second, index), block(&third, index)));
    });
}

/// Calls `f(index, chunk)` once for each `chunk_len` elements of `data` (the last chunk may be
/// shorter), on the context's threads. Where the chunks lie depends on no number of threads.
///
/// # Panics
/// When `chunk_len` is 0.
pub fn for_each_chunk<T: Send + Sync>(
    context: &Context,
    data: &mut [T],
    chunk_len: usize,
    f: impl Fn(usize, &mut [T]) + Sync,
) {
    assert!(chunk_len > 0);
    struct Base<T>(*mut T);
    // SAFETY: the pointer is used for disjoint chunks only, see below.
    unsafe impl<T: Send> Sync for Base<T> {}
    impl<T> Base<T> {
        fn get(&self) -> *mut T {
            self.0
        }
    }
    let len = data.len();
    let base = Base(data.as_mut_ptr());
    let chunks = len.div_ceil(chunk_len);
    for_pass_over(context, len, chunks).for_each_piece(chunks, |index| {
        let first = index * chunk_len;
        let n = chunk_len.min(len - first);
        // SAFETY: `for_each_piece` runs each index once, so each chunk is lent once; chunks are
        // disjoint and lie in `data`, which stays borrowed until all tasks have ended.
        f(index, unsafe { std::slice::from_raw_parts_mut(base.get().add(first), n) });
    });
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::isa::Isa;

    #[test]
    fn blocks_cover_every_row_once() {
        let context = Context::with_isa(Isa::scalar()).threads(NonZeroUsize::new(3).unwrap());
        let mut data = vec![0.0f32; 7 * 3];
        MatMut::new(&mut data, 7, 3).unwrap().for_each_row_block(&context, 2, |first, mut block| {
            for i in 0..block.rows() {
                for x in block.row_mut(i) {
                    *x += (first + i) as f32 + 1.0;
                }
            }
        });
        assert!(data.iter().enumerate().all(|(i, &x)| x == (i / 3) as f32 + 1.0));
        for_each_chunk(&context, &mut data, 4, |index, chunk| chunk.fill(index as f32));
        assert!(data.iter().enumerate().all(|(i, &x)| x == (i / 4) as f32));
    }
}
