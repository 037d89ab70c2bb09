//! [`MatRef`] and [`MatMut`]: a matrix with a stride for each axis.

use std::marker::PhantomData;
use std::ops::Range;

use super::{expect_disjoint, expect_len, extent};
use crate::error::{ShapeError, expect_dim};

/// A matrix to read: `rows × cols` with a stride for each, in elements.
#[derive(Debug)]
pub struct MatRef<'a, T = f32> {
    pub(super) ptr: *const T,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
    pub(super) lifetime: PhantomData<&'a [T]>,
}

impl<T> Clone for MatRef<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for MatRef<'_, T> {}

// SAFETY: a `MatRef` is a `&[T]` with strides.
unsafe impl<T: Sync> Send for MatRef<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for MatRef<'_, T> {}

impl<'a, T> MatRef<'a, T> {
    /// Row-major, no gaps; `data` must hold exactly `rows · cols` elements.
    ///
    /// # Errors
    /// [`ShapeError`] when it does not.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Result<Self, ShapeError> {
        let len = rows.checked_mul(cols).ok_or(ShapeError::Overflow { argument: "matrix" })?;
        expect_dim("matrix", "elements", len, data.len())?;
        MatRef::with_strides(data, rows, cols, cols, 1)
    }

    /// Any strides, zero included (a broadcast).
    ///
    /// # Errors
    /// [`ShapeError`] when an index would reach outside of `data`.
    pub fn with_strides(
        data: &'a [T],
        rows: usize,
        cols: usize,
        row_stride: usize,
        col_stride: usize,
    ) -> Result<Self, ShapeError> {
        expect_len("matrix", extent("matrix", [rows, cols], [row_stride, col_stride])?, data.len())?;
        Ok(MatRef { ptr: data.as_ptr(), rows, cols, row_stride, col_stride, lifetime: PhantomData })
    }

    /// The number of rows.
    #[inline]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    #[inline]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements from one row to the next.
    #[inline]
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Elements from one column to the next.
    #[inline]
    pub fn col_stride(&self) -> usize {
        self.col_stride
    }

    /// The address of element (0, 0).
    #[inline]
    pub fn as_ptr(&self) -> *const T {
        self.ptr
    }

    /// The transpose: the same memory with the axes exchanged.
    #[inline]
    #[must_use]
    pub fn t(self) -> Self {
        MatRef {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// The rows and columns of these ranges.
    ///
    /// # Panics
    /// When a range reaches outside of the matrix.
    #[inline]
    #[must_use]
    pub fn sub(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?} of {}", self.cols);
        let offset = if rows.is_empty() || cols.is_empty() {
            0
        } else {
            rows.start * self.row_stride + cols.start * self.col_stride
        };
        MatRef {
            // SAFETY: (rows.start, cols.start) is an index of this matrix, so its offset lies in the buffer.
            ptr: unsafe { self.ptr.add(offset) },
            rows: rows.len(),
            cols: cols.len(),
            ..self
        }
    }

    /// Row `i` as a slice.
    ///
    /// # Panics
    /// When there is no row `i`, or when the columns are not contiguous.
    #[inline]
    pub fn row(&self, i: usize) -> &'a [T] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        assert!(
            self.col_stride == 1 || self.cols <= 1,
            "a row with column stride {} is no slice",
            self.col_stride
        );
        if self.cols == 0 {
            return &[];
        }
        // SAFETY: the constructor checked that row `i`, `cols` contiguous elements, lies in the buffer.
        unsafe { std::slice::from_raw_parts(self.ptr.add(i * self.row_stride), self.cols) }
    }

    /// The whole matrix as one slice, when it is row-major without gaps.
    #[inline]
    pub fn as_slice(&self) -> Option<&'a [T]> {
        if self.rows == 0 || self.cols == 0 {
            return Some(&[]);
        }
        let gapless =
            (self.col_stride == 1 || self.cols == 1) && (self.row_stride == self.cols || self.rows == 1);
        // SAFETY: the constructor checked the last element; without gaps all before it are the matrix's own.
        gapless.then(|| unsafe { std::slice::from_raw_parts(self.ptr, self.rows * self.cols) })
    }

    /// `Ok` when rows are contiguous (column stride 1), which row-wise kernels ask for.
    pub(crate) fn expect_contiguous_rows(&self, argument: &'static str) -> Result<(), ShapeError> {
        if self.cols <= 1 { Ok(()) } else { expect_dim(argument, "column stride", 1, self.col_stride) }
    }
}

impl<T: Copy> MatRef<'_, T> {
    /// Element (i, j).
    ///
    /// # Panics
    /// When it is outside of the matrix.
    #[inline]
    pub fn at(&self, i: usize, j: usize) -> T {
        assert!(i < self.rows && j < self.cols, "({i}, {j}) of {} × {}", self.rows, self.cols);
        // SAFETY: in bounds by the assertion and the constructor's check.
        unsafe { *self.ptr.add(i * self.row_stride + j * self.col_stride) }
    }
}

/// A matrix to write: as [`MatRef`], and no two indices name the same element.
#[derive(Debug)]
pub struct MatMut<'a, T = f32> {
    pub(super) ptr: *mut T,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
    pub(super) lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: a `MatMut` is a `&mut [T]` with strides.
unsafe impl<T: Send> Send for MatMut<'_, T> {}
// SAFETY: as above; through a shared `MatMut` one can only read.
unsafe impl<T: Sync> Sync for MatMut<'_, T> {}

impl<'a, T> MatMut<'a, T> {
    /// Row-major, no gaps; `data` must hold exactly `rows · cols` elements.
    ///
    /// # Errors
    /// [`ShapeError`] when it does not.
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> Result<Self, ShapeError> {
        let len = rows.checked_mul(cols).ok_or(ShapeError::Overflow { argument: "matrix" })?;
        expect_dim("matrix", "elements", len, data.len())?;
        MatMut::with_strides(data, rows, cols, cols, 1)
    }

    /// Any strides under which no two indices meet.
    ///
    /// # Errors
    /// [`ShapeError`] when an index would reach outside of `data`, or when two indices meet.
    pub fn with_strides(
        data: &'a mut [T],
        rows: usize,
        cols: usize,
        row_stride: usize,
        col_stride: usize,
    ) -> Result<Self, ShapeError> {
        expect_len("matrix", extent("matrix", [rows, cols], [row_stride, col_stride])?, data.len())?;
        expect_disjoint("matrix", [rows, cols], [row_stride, col_stride])?;
        Ok(MatMut { ptr: data.as_mut_ptr(), rows, cols, row_stride, col_stride, lifetime: PhantomData })
    }

    /// The number of rows.
    #[inline]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    #[inline]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements from one row to the next.
    #[inline]
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Elements from one column to the next.
    #[inline]
    pub fn col_stride(&self) -> usize {
        self.col_stride
    }

    /// The address of element (0, 0).
    #[inline]
    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.ptr
    }

    /// The same matrix, to read.
    #[inline]
    pub fn as_ref(&self) -> MatRef<'_, T> {
        MatRef {
            ptr: self.ptr,
            rows: self.rows,
            cols: self.cols,
            row_stride: self.row_stride,
            col_stride: self.col_stride,
            lifetime: PhantomData,
        }
    }

    /// No rows, no columns.
    pub(crate) fn empty() -> Self {
        MatMut {
            ptr: std::ptr::NonNull::dangling().as_ptr(),
            rows: 0,
            cols: 0,
            row_stride: 0,
            col_stride: 1,
            lifetime: PhantomData,
        }
    }

    /// The whole matrix as one slice, when it is row-major without gaps.
    #[inline]
    pub fn as_mut_slice(&mut self) -> Option<&mut [T]> {
        let slice = self.as_ref().as_slice()?;
        let (ptr, len) = (slice.as_ptr().cast_mut(), slice.len());
        // SAFETY: the elements are this view's own, and `self` is borrowed mutably.
        Some(unsafe { std::slice::from_raw_parts_mut(ptr, len) })
    }

    /// A shorter loan of the same matrix.
    #[inline]
    pub fn reborrow(&mut self) -> MatMut<'_, T> {
        MatMut { lifetime: PhantomData, ..*self }
    }

    /// The transpose: the same memory with the axes exchanged.
    #[inline]
    #[must_use]
    pub fn t(self) -> Self {
        MatMut {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// The rows and columns of these ranges.
    ///
    /// # Panics
    /// When a range reaches outside of the matrix.
    #[inline]
    #[must_use]
    pub fn sub(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        let part = self.as_ref().sub(rows, cols);
        MatMut { ptr: part.ptr.cast_mut(), rows: part.rows, cols: part.cols, ..self }
    }

    /// Row `i` as a slice.
    ///
    /// # Panics
    /// When there is no row `i`, or when the columns are not contiguous.
    #[inline]
    pub fn row_mut(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        assert!(
            self.col_stride == 1 || self.cols <= 1,
            "a row with column stride {} is no slice",
            self.col_stride
        );
        if self.cols == 0 {
            return &mut [];
        }
        // SAFETY: the constructor checked that row `i`, `cols` contiguous elements, lies in the buffer;
        // `self` is borrowed mutably for as long as the slice lives.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(i * self.row_stride), self.cols) }
    }

    /// The rows before `at`, and those from `at` on.
    ///
    /// # Panics
    /// When `at` is larger than the number of rows.
    #[inline]
    pub fn split_rows(self, at: usize) -> (Self, Self) {
        assert!(at <= self.rows, "split at row {at} of {}", self.rows);
        let (rows, cols) = (self.rows, self.cols);
        let below = self.as_ref().sub(at..rows, 0..cols).ptr.cast_mut();
        (MatMut { rows: at, ..self }, MatMut { ptr: below, rows: rows - at, ..self })
    }

    /// The columns before `at`, and those from `at` on.
    ///
    /// # Panics
    /// When `at` is larger than the number of columns.
    #[inline]
    pub fn split_cols(self, at: usize) -> (Self, Self) {
        let (left, right) = self.t().split_rows(at);
        (left.t(), right.t())
    }

    /// `Ok` when rows are contiguous (column stride 1), which row-wise kernels ask for.
    pub(crate) fn expect_contiguous_rows(&self, argument: &'static str) -> Result<(), ShapeError> {
        self.as_ref().expect_contiguous_rows(argument)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_that_do_not_fit_are_refused_before_any_access() {
        let data = [0.0f32; 12];
        assert!(MatRef::new(&data, 3, 5).is_err());
        assert!(MatRef::with_strides(&data, 3, 4, 4, 1).is_ok());
        assert!(matches!(MatRef::with_strides(&data, 3, 4, 5, 1), Err(ShapeError::BufferTooShort { .. })));
        assert!(matches!(MatRef::new(&data, usize::MAX, 2), Err(ShapeError::Overflow { .. })));
        assert!(matches!(MatRef::with_strides(&data, usize::MAX, 2, 8, 1), Err(ShapeError::Overflow { .. })));
        assert!(MatRef::with_strides(&data, 100, 4, 0, 1).is_ok(), "a broadcast may be read");
    }

    #[test]
    fn overlapping_mutable_views_are_refused() {
        let mut data = [0.0f32; 12];
        assert!(matches!(MatMut::with_strides(&mut data, 3, 4, 0, 1), Err(ShapeError::Overlap { .. })));
        assert!(matches!(MatMut::with_strides(&mut data, 3, 4, 3, 1), Err(ShapeError::Overlap { .. })));
        assert!(MatMut::with_strides(&mut data, 4, 3, 1, 4).is_ok(), "a transpose may be written");
    }

    #[test]
    fn both_parts_of_a_split_are_written_alone() {
        let mut data = [0.0f32; 12];
        let (mut left, mut right) = MatMut::new(&mut data, 3, 4).unwrap().split_cols(3);
        left.row_mut(1).fill(1.0);
        right.row_mut(1).fill(2.0);
        let (none, all) = right.split_cols(1);
        assert_eq!((none.cols(), all.cols()), (1, 0));
        assert_eq!(data, [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn transpose_and_sub_agree_with_indices() {
        let data: Vec<f32> = (0..20).map(|i| i as f32).collect();
        let m = MatRef::new(&data, 4, 5).unwrap();
        assert_eq!(m.t().at(3, 2), m.at(2, 3));
        let part = m.sub(1..3, 2..5);
        assert_eq!((part.at(0, 0), part.at(1, 2)), (7.0, 14.0));
        assert_eq!(part.row(1), [12.0, 13.0, 14.0]);
        assert!(part.as_slice().is_none());
        assert_eq!(m.as_slice().unwrap(), data);
        let empty = m.sub(4..4, 5..5);
        assert_eq!((empty.rows(), empty.cols()), (0, 0));
    }
}
