//! [`HeadsRef`] and [`HeadsMut`]: [batch, seq, heads, dim] tensors in any memory order.

use std::marker::PhantomData;
use std::ops::Range;

use super::{MatMut, MatRef, expect_disjoint, expect_len, extent};
use crate::error::ShapeError;

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

impl<'a> HeadsRef<'a> {
    /// The positions `range` of every sequence.
    ///
    /// # Panics
    /// When there are no such positions.
    #[inline]
    pub fn positions(&self, range: Range<usize>) -> HeadsRef<'a> {
        let layout = &self.layout;
        assert!(range.start <= range.end && range.end <= layout.seq, "positions {range:?} of {layout:?}");
        let empty = layout.shape().contains(&0) || range.is_empty();
        let offset = if empty { 0 } else { range.start * layout.seq_stride };
        // SAFETY: the first of these positions exists unless the offset is 0, so its first element lies in the buffer.
        let ptr = unsafe { self.ptr.add(offset) };
        HeadsRef { ptr, layout: HeadsLayout { seq: range.len(), ..self.layout }, ..*self }
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

    /// Where a row (position) of a head begins: an address to ask the cache for, while others write there.
    ///
    /// # Panics
    /// When there is no such sequence or head.
    #[inline]
    pub(crate) fn address(&self, batch: usize, head: usize, row: usize) -> *const f32 {
        self.ptr.wrapping_add(self.layout.offset(batch, head) + row * self.layout.seq_stride)
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

    /// The positions from each offset to the next one, of every sequence: packed sequences, to hand to threads.
    ///
    /// # Panics
    /// When the offsets descend, or one is beyond the positions.
    pub fn split_positions(self, offsets: &[usize]) -> Vec<Self> {
        let whole = HeadsRef { ptr: self.ptr, layout: self.layout, lifetime: PhantomData };
        let parts = offsets.windows(2).map(|pair| whole.positions(pair[0]..pair[1]));
        // No two indices of the whole meet and the ranges are disjoint, so the parts are; `self` is consumed.
        parts
            .map(|part| HeadsMut { ptr: part.ptr.cast_mut(), layout: part.layout, lifetime: PhantomData })
            .collect()
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
    use super::*;

    #[test]
    fn overlapping_mutable_heads_are_refused() {
        let mut data = [0.0f32; 12];
        let mut heads = HeadsLayout::batch_seq_heads(2, 3, 1, 2);
        assert!(HeadsMut::new(&mut data, heads).is_ok());
        heads.seq_stride = 1;
        assert!(matches!(HeadsMut::new(&mut data, heads), Err(ShapeError::Overlap { .. })));
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
    fn packed_sequences_are_disjoint_positions() {
        let mut data = vec![0.0f32; 6 * 2 * 3];
        let layout = HeadsLayout::batch_seq_heads(1, 6, 2, 3);
        let mut parts = HeadsMut::new(&mut data, layout).unwrap().split_positions(&[0, 2, 2, 6]);
        assert_eq!(parts.iter().map(|part| part.layout().seq).collect::<Vec<_>>(), [2, 0, 4]);
        parts[0].head_mut(0, 1).row_mut(1).fill(1.0);
        parts[2].head_mut(0, 0).row_mut(3).fill(2.0);
        assert_eq!(data[9..12], [1.0; 3]);
        assert_eq!(data[30..33], [2.0; 3]);
        assert_eq!(data.iter().sum::<f32>(), 9.0);
        let view = HeadsRef::new(&data, layout).unwrap().positions(5..6);
        assert_eq!(view.head(0, 0).row(0), [2.0; 3]);
        assert_eq!(HeadsRef::new(&data, layout).unwrap().positions(6..6).layout().seq, 0);
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
}
