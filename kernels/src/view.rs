//! Checked views of matrices and of [batch, seq, heads, head_dim] tensors: pointer, shape, strides.
//!
//! A constructor proves once that every index reaches inside the buffer and, for mutable views,
//! that no two indices name the same element; kernels then work on the parts without checks.
//! [`MatMut::split_rows`] and [`for_each_chunk`] hand disjoint parts to threads.

use std::marker::PhantomData;
use std::ops::Range;

use crate::context::Context;
use crate::error::{ShapeError, expect_dim};

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
    let mut axes: Vec<(usize, usize)> = strides.into_iter().zip(shape).filter(|&(_, n)| n > 1).collect();
    axes.sort_unstable();
    let mut reached = 0;
    for (stride, n) in axes {
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

/// A matrix to read: `rows × cols` with a stride for each, in elements.
#[derive(Debug)]
pub struct MatRef<'a, T = f32> {
    ptr: *const T,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
    lifetime: PhantomData<&'a [T]>,
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
    ptr: *mut T,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
    lifetime: PhantomData<&'a mut [T]>,
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
        context.for_each_task(whole.rows.div_ceil(rows_per_block), |block| {
            let first = block * rows_per_block;
            let last = (first + rows_per_block).min(whole.rows);
            let part = whole.as_ref().sub(first..last, 0..whole.cols);
            let (ptr, rows) = (part.ptr.cast_mut(), part.rows);
            // The view's own invariant (no two indices meet) makes the blocks disjoint, and
            // `for_each_task` runs each index once.
            f(first, MatMut { ptr, rows, lifetime: PhantomData, ..whole });
        });
    }

    /// `Ok` when rows are contiguous (column stride 1), which row-wise kernels ask for.
    pub(crate) fn expect_contiguous_rows(&self, argument: &'static str) -> Result<(), ShapeError> {
        self.as_ref().expect_contiguous_rows(argument)
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
    context.for_each_task(count, |index| {
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
    context.for_each_task(len.div_ceil(chunk_len), |index| {
        let first = index * chunk_len;
        let n = chunk_len.min(len - first);
        // SAFETY: `for_each_task` runs each index once, so each chunk is lent once; chunks are
        // disjoint and lie in `data`, which stays borrowed until all tasks have ended.
        f(index, unsafe { std::slice::from_raw_parts_mut(base.get().add(first), n) });
    });
}

/// The shape of a [batch, seq, heads, dim] tensor and its strides in elements; `dim` is contiguous.
///
/// Both memory orders of attention, and a slice of a fused QKV projection, are this with other strides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadsLayout {
    /// Sequences.
    pub batch: usize,
    /// Positions in a sequence (the padded length).
    pub seq: usize,
    /// Heads.
    pub heads: usize,
    /// Elements of one head at one position.
    pub dim: usize,
    /// Elements from one sequence to the next.
    pub batch_stride: usize,
    /// Elements from one position to the next.
    pub seq_stride: usize,
    /// Elements from one head to the next.
    pub head_stride: usize,
}

impl HeadsLayout {
    /// [batch, seq, heads, dim] without gaps: what a projection `x·W` leaves in memory.
    pub fn batch_seq_heads(batch: usize, seq: usize, heads: usize, dim: usize) -> HeadsLayout {
        HeadsLayout {
            batch,
            seq,
            heads,
            dim,
            batch_stride: seq * heads * dim,
            seq_stride: heads * dim,
            head_stride: dim,
        }
    }

    /// [batch, heads, seq, dim] without gaps.
    pub fn batch_heads_seq(batch: usize, heads: usize, seq: usize, dim: usize) -> HeadsLayout {
        HeadsLayout {
            batch,
            seq,
            heads,
            dim,
            batch_stride: heads * seq * dim,
            seq_stride: dim,
            head_stride: seq * dim,
        }
    }

    /// [seq, batch, dim] without gaps, one head: the time-major order of recurrent layers.
    pub fn seq_batch(seq: usize, batch: usize, dim: usize) -> HeadsLayout {
        HeadsLayout {
            batch,
            seq,
            heads: 1,
            dim,
            batch_stride: dim,
            seq_stride: batch * dim,
            head_stride: dim,
        }
    }

    fn shape(&self) -> [usize; 4] {
        [self.batch, self.seq, self.heads, self.dim]
    }

    fn strides(&self) -> [usize; 4] {
        [self.batch_stride, self.seq_stride, self.head_stride, 1]
    }

    fn offset(&self, batch: usize, head: usize) -> usize {
        assert!(batch < self.batch && head < self.heads, "({batch}, {head}) of {self:?}");
        if self.seq == 0 || self.dim == 0 { 0 } else { batch * self.batch_stride + head * self.head_stride }
    }
}

/// A [batch, seq, heads, dim] tensor to read.
#[derive(Debug, Clone, Copy)]
pub struct HeadsRef<'a> {
    ptr: *const f32,
    layout: HeadsLayout,
    lifetime: PhantomData<&'a [f32]>,
}

// SAFETY: a `HeadsRef` is a `&[f32]` with strides.
unsafe impl Send for HeadsRef<'_> {}
// SAFETY: as above.
unsafe impl Sync for HeadsRef<'_> {}

impl<'a> HeadsRef<'a> {
    /// A view of `data`; strides may be zero (a key shared by a batch).
    ///
    /// # Errors
    /// [`ShapeError`] when an index would reach outside of `data`.
    pub fn new(data: &'a [f32], layout: HeadsLayout) -> Result<Self, ShapeError> {
        expect_len("heads", extent("heads", layout.shape(), layout.strides())?, data.len())?;
        Ok(HeadsRef { ptr: data.as_ptr(), layout, lifetime: PhantomData })
    }

    /// Shape and strides.
    #[inline]
    pub fn layout(&self) -> &HeadsLayout {
        &self.layout
    }

    /// One head of one sequence: `seq × dim`, rows contiguous.
    ///
    /// # Panics
    /// When there is no such sequence or head.
    #[inline]
    pub fn head(&self, batch: usize, head: usize) -> MatRef<'a> {
        MatRef {
            // SAFETY: `offset` checked the indices; the constructor checked that they lie in the buffer.
            ptr: unsafe { self.ptr.add(self.layout.offset(batch, head)) },
            rows: self.layout.seq,
            cols: self.layout.dim,
            row_stride: self.layout.seq_stride,
            col_stride: 1,
            lifetime: PhantomData,
        }
    }
}

/// A [batch, seq, heads, dim] tensor to write; no two indices name the same element.
#[derive(Debug)]
pub struct HeadsMut<'a> {
    ptr: *mut f32,
    layout: HeadsLayout,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `HeadsMut` is a `&mut [f32]` with strides.
unsafe impl Send for HeadsMut<'_> {}
// SAFETY: as above; through a shared `HeadsMut` safe code can only read the layout.
unsafe impl Sync for HeadsMut<'_> {}

impl<'a> HeadsMut<'a> {
    /// A view of `data`.
    ///
    /// # Errors
    /// [`ShapeError`] when an index would reach outside of `data`, or when two indices meet.
    pub fn new(data: &'a mut [f32], layout: HeadsLayout) -> Result<Self, ShapeError> {
        expect_len("heads", extent("heads", layout.shape(), layout.strides())?, data.len())?;
        expect_disjoint("heads", layout.shape(), layout.strides())?;
        Ok(HeadsMut { ptr: data.as_mut_ptr(), layout, lifetime: PhantomData })
    }

    /// Shape and strides.
    #[inline]
    pub fn layout(&self) -> &HeadsLayout {
        &self.layout
    }

    /// One head of one sequence, to write: `seq × dim`, rows contiguous.
    ///
    /// # Panics
    /// When there is no such sequence or head.
    #[inline]
    pub fn head_mut(&mut self, batch: usize, head: usize) -> MatMut<'_> {
        // SAFETY: `self` is borrowed mutably, so this is the only loan.
        unsafe { self.head_unsync(batch, head) }
    }

    /// The heads before `at`, and those from `at` on: how a fused projection's gradient is written in parts.
    ///
    /// # Panics
    /// When `at` is larger than the number of heads.
    pub fn split_heads(self, at: usize) -> (Self, Self) {
        let HeadsLayout { heads, head_stride, .. } = self.layout;
        assert!(at <= heads, "split at head {at} of {heads}");
        let empty = self.layout.shape().contains(&0) || at == heads;
        let offset = if empty { 0 } else { at * head_stride };
        // SAFETY: head `at` exists unless the offset is 0, so its first element lies in the buffer.
        let ptr = unsafe { self.ptr.add(offset) };
        // No two indices of the whole meet, so the two parts are disjoint; `self` is consumed.
        (
            HeadsMut { layout: HeadsLayout { heads: at, ..self.layout }, ..self },
            HeadsMut { ptr, layout: HeadsLayout { heads: heads - at, ..self.layout }, lifetime: PhantomData },
        )
    }

    /// Every head of every sequence, head by head within a sequence: disjoint parts to hand to threads.
    pub fn into_heads(self) -> Vec<MatMut<'a>> {
        let HeadsLayout { batch, heads, seq, dim, seq_stride, .. } = self.layout;
        let pairs = (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h)));
        pairs
            .map(|(b, h)| MatMut {
                // SAFETY: `offset` checked the indices; the constructor checked that they lie in the buffer.
                // Each pair occurs once and no two indices meet, so the parts are disjoint; `self` is consumed.
                ptr: unsafe { self.ptr.add(self.layout.offset(b, h)) },
                rows: seq,
                cols: dim,
                row_stride: seq_stride,
                col_stride: 1,
                lifetime: PhantomData,
            })
            .collect()
    }

    /// As [`HeadsMut::head_mut`] through a shared borrow, for tasks that each own one head.
    ///
    /// # Safety
    /// No two views of the same (batch, head) may live at the same time.
    #[inline]
    pub unsafe fn head_unsync(&self, batch: usize, head: usize) -> MatMut<'_> {
        MatMut {
            // SAFETY: `offset` checked the indices; the constructor checked that they lie in the buffer.
            ptr: unsafe { self.ptr.add(self.layout.offset(batch, head)) },
            rows: self.layout.seq,
            cols: self.layout.dim,
            row_stride: self.layout.seq_stride,
            col_stride: 1,
            lifetime: PhantomData,
        }
    }

    /// As [`HeadsMut::head_unsync`] for some rows (positions) of the head, for tasks that share a head.
    ///
    /// # Panics
    /// When the head has no such rows.
    ///
    /// # Safety
    /// No two views of the same row of the same (batch, head) may live at the same time.
    #[inline]
    pub unsafe fn rows_unsync(&self, batch: usize, head: usize, rows: Range<usize>) -> MatMut<'_> {
        // SAFETY: the view of the whole head ends here; what is left of it reaches only these rows.
        let head = unsafe { self.head_unsync(batch, head) };
        let cols = head.cols;
        head.sub(rows, 0..cols)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::isa::Isa;

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
        let mut heads = HeadsLayout::batch_seq_heads(2, 3, 1, 2);
        assert!(HeadsMut::new(&mut data, heads).is_ok());
        heads.seq_stride = 1;
        assert!(matches!(HeadsMut::new(&mut data, heads), Err(ShapeError::Overlap { .. })));
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

    #[test]
    fn both_head_orders_see_the_same_element() {
        let (batch, seq, heads, dim) = (2, 3, 4, 5);
        let data: Vec<f32> = (0..batch * seq * heads * dim).map(|i| i as f32).collect();
        let bshd = HeadsRef::new(&data, HeadsLayout::batch_seq_heads(batch, seq, heads, dim)).unwrap();
        let bhsd = HeadsRef::new(&data, HeadsLayout::batch_heads_seq(batch, heads, seq, dim)).unwrap();
        assert_eq!(bshd.head(1, 2).at(2, 3), (((3 + 2) * 4 + 2) * 5 + 3) as f32);
        assert_eq!(bhsd.head(1, 2).at(2, 3), (((4 + 2) * 3 + 2) * 5 + 3) as f32);
    }

    #[test]
    fn a_fused_tensor_splits_into_disjoint_heads() {
        let mut data = vec![0.0f32; 2 * 3 * 4 * 5];
        let fused = HeadsMut::new(&mut data, HeadsLayout::batch_seq_heads(2, 3, 4, 5)).unwrap();
        let (mut one, rest) = fused.split_heads(1);
        let (mut three, none) = rest.split_heads(3);
        assert_eq!((one.layout().heads, three.layout().heads, none.layout().heads), (1, 3, 0));
        one.head_mut(1, 0).row_mut(2).fill(1.0);
        three.head_mut(1, 2).row_mut(2).fill(3.0);
        assert_eq!(data[100..105], [1.0; 5]);
        assert_eq!(data[115..120], [3.0; 5]);
        assert_eq!(data.iter().sum::<f32>(), 20.0);
    }

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
