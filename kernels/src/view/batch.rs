//! [`MatBatchRef`] and [`MatBatchMut`]: matrices of one shape at equal distances in one buffer.

use std::marker::PhantomData;

use super::{MatMut, MatRef, expect_disjoint, expect_len, extent};
use crate::error::ShapeError;

/// Shape and strides, in elements, of `count` matrices of `rows × cols`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLayout {
    /// Matrices.
    pub count: usize,
    /// Rows of each.
    pub rows: usize,
    /// Columns of each.
    pub cols: usize,
    /// Elements from one matrix to the next; 0 to read one matrix again and again.
    pub batch_stride: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl BatchLayout {
    /// Row-major matrices one after the other, no gaps.
    pub fn contiguous(count: usize, rows: usize, cols: usize) -> BatchLayout {
        BatchLayout { count, rows, cols, batch_stride: rows * cols, row_stride: cols, col_stride: 1 }
    }

    /// The same memory with the axes of every matrix exchanged.
    #[must_use]
    pub fn t(self) -> BatchLayout {
        BatchLayout {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    fn shape(&self) -> [usize; 3] {
        [self.count, self.rows, self.cols]
    }

    fn strides(&self) -> [usize; 3] {
        [self.batch_stride, self.row_stride, self.col_stride]
    }

    /// Where matrix `index` begins; 0 for matrices without elements, whose offsets may reach anywhere.
    fn offset(&self, index: usize) -> usize {
        assert!(index < self.count, "matrix {index} of {}", self.count);
        if self.rows == 0 || self.cols == 0 { 0 } else { index * self.batch_stride }
    }
}

/// Matrices to read.
#[derive(Debug, Clone, Copy)]
pub struct MatBatchRef<'a, T = f32> {
    data: &'a [T],
    layout: BatchLayout,
}

impl<'a, T> MatBatchRef<'a, T> {
    /// A view of `data`; strides may be zero (one matrix for the whole batch).
    ///
    /// # Errors
    /// [`ShapeError`] when an index would reach outside of `data`.
    pub fn new(data: &'a [T], layout: BatchLayout) -> Result<Self, ShapeError> {
        expect_len("batch", extent("batch", layout.shape(), layout.strides())?, data.len())?;
        Ok(MatBatchRef { data, layout })
    }

    /// Shape and strides.
    pub fn layout(&self) -> &BatchLayout {
        &self.layout
    }

    /// Matrix `index`.
    ///
    /// # Panics
    /// When there is none.
    pub fn matrix(&self, index: usize) -> MatRef<'a, T> {
        let BatchLayout { rows, cols, row_stride, col_stride, .. } = self.layout;
        MatRef {
            // SAFETY: `offset` checked the index; the constructor checked that it lies in the buffer.
            ptr: unsafe { self.data.as_ptr().add(self.layout.offset(index)) },
            rows,
            cols,
            row_stride,
            col_stride,
            lifetime: PhantomData,
        }
    }
}

/// Matrices to write; no two indices name the same element.
#[derive(Debug)]
pub struct MatBatchMut<'a, T = f32> {
    data: &'a mut [T],
    layout: BatchLayout,
}

impl<'a, T> MatBatchMut<'a, T> {
    /// A view of `data`.
    ///
    /// # Errors
    /// [`ShapeError`] when an index would reach outside of `data`, or when two indices meet.
    pub fn new(data: &'a mut [T], layout: BatchLayout) -> Result<Self, ShapeError> {
        expect_len("batch", extent("batch", layout.shape(), layout.strides())?, data.len())?;
        expect_disjoint("batch", layout.shape(), layout.strides())?;
        Ok(MatBatchMut { data, layout })
    }

    /// Shape and strides.
    pub fn layout(&self) -> &BatchLayout {
        &self.layout
    }

    /// Every matrix: disjoint parts to hand to threads.
    pub fn into_matrices(self) -> Vec<MatMut<'a, T>> {
        let BatchLayout { count, rows, cols, row_stride, col_stride, .. } = self.layout;
        let base = self.data.as_mut_ptr();
        (0..count)
            .map(|index| MatMut {
                // SAFETY: `offset` checked the index; the constructor checked that it lies in the buffer. No two
                // indices meet, so the matrices are disjoint; `self`, the only loan of the buffer, is consumed.
                ptr: unsafe { base.add(self.layout.offset(index)) },
                rows,
                cols,
                row_stride,
                col_stride,
                lifetime: PhantomData,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_stand_where_the_strides_say() {
        let mut data: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let layout = BatchLayout::contiguous(2, 3, 4);
        let batch = MatBatchRef::new(&data, layout).unwrap();
        assert_eq!(batch.matrix(1).at(2, 3), 23.0);
        assert_eq!(MatBatchRef::new(&data, layout.t()).unwrap().matrix(1).at(3, 2), 23.0);
        let shared = BatchLayout { count: 7, batch_stride: 0, ..layout };
        assert_eq!(MatBatchRef::new(&data, shared).unwrap().matrix(6).at(2, 3), 11.0);
        let interleaved = BatchLayout { batch_stride: 4, row_stride: 8, ..layout };
        let mut parts = MatBatchMut::new(&mut data, interleaved).unwrap().into_matrices();
        parts[1].row_mut(2).fill(-1.0);
        assert_eq!(data[20..24], [-1.0; 4]);
        assert_eq!(data.iter().filter(|&&x| x == -1.0).count(), 4);
    }

    #[test]
    fn layouts_that_do_not_fit_are_refused() {
        let mut data = [0.0f32; 24];
        let layout = BatchLayout::contiguous(2, 3, 4);
        assert!(matches!(MatBatchRef::new(&data[..23], layout), Err(ShapeError::BufferTooShort { .. })));
        let far = BatchLayout { batch_stride: usize::MAX / 2, ..layout };
        assert!(matches!(MatBatchRef::new(&data, far), Err(ShapeError::Overflow { .. })));
        let shared = BatchLayout { batch_stride: 0, ..layout };
        assert!(matches!(MatBatchMut::new(&mut data, shared), Err(ShapeError::Overlap { .. })));
        let none = BatchLayout { rows: 0, batch_stride: usize::MAX, ..layout };
        assert_eq!(MatBatchMut::new(&mut data, none).unwrap().into_matrices().len(), 2);
    }
}
