//! [`Pool`]: f32 buffers that go back to a free list instead of the allocator.
//!
//! A training step makes and drops a few hundred buffers of the same few sizes. Through the
//! allocator each would be mapped, zeroed page by page and unmapped again; through the pool it is
//! memory that the last step left in the cache. What a taken buffer holds is unspecified (in builds
//! with debug assertions it is NaN, so that a test fails when an op reads what it did not write).

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use kavanam_kernels::memory::AlignedVec;
use kavanam_kernels::{MatRef, ShapeError};

/// A free list of buffers, shared by its clones.
#[derive(Debug, Clone, Default)]
pub struct Pool(Arc<Mutex<BTreeMap<usize, Vec<AlignedVec<f32>>>>>);

impl Pool {
    /// An empty free list.
    pub fn new() -> Pool {
        Pool::default()
    }

    /// A buffer of `len` values that are unspecified.
    pub fn take(&self, len: usize) -> Buffer {
        // A larger one will do, but not one more than twice as large: that would pin memory.
        let reused = {
            let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            free.range_mut(len..=len.saturating_mul(2)).find_map(|(_, buffers)| buffers.pop())
        };
        let values = reused.unwrap_or_else(|| AlignedVec::zeroed(round_up(len)));
        let mut buffer = Buffer { values, len, pool: self.clone() };
        if cfg!(debug_assertions) {
            buffer.fill(f32::NAN);
        }
        buffer
    }

    /// A buffer of `len` zeros.
    pub fn zeroed(&self, len: usize) -> Buffer {
        let mut buffer = self.take(len);
        buffer.fill(0.0);
        buffer
    }

    /// How many values wait in the free list.
    pub fn idle(&self) -> usize {
        let free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.iter().map(|(len, buffers)| len * buffers.len()).sum()
    }
}

/// To the next eighth of a power of two, so that batches of similar length share buffers.
fn round_up(len: usize) -> usize {
    len.next_multiple_of((len.next_power_of_two() / 16).max(16))
}

/// `[f32]` that goes back to its [`Pool`] when it is dropped.
#[derive(Debug)]
pub struct Buffer {
    values: AlignedVec<f32>,
    len: usize,
    pool: Pool,
}

impl Buffer {
    /// The values as a row-major matrix.
    ///
    /// # Errors
    /// [`ShapeError`] when they are not `rows · cols`.
    pub fn matrix(&self, rows: usize, cols: usize) -> Result<MatRef<'_>, ShapeError> {
        MatRef::new(self, rows, cols)
    }
}

impl Deref for Buffer {
    type Target = [f32];

    #[inline]
    fn deref(&self) -> &[f32] {
        &self.values[..self.len]
    }
}

impl DerefMut for Buffer {
    #[inline]
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        if !values.is_empty() {
            let mut free = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
            free.entry(values.len()).or_default().push(values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropped_buffers_are_lent_again_and_start_as_nan_in_tests() {
        let pool = Pool::new();
        let mut first = pool.zeroed(1000);
        first[999] = 7.0;
        let address = first.as_ptr();
        drop(first);
        assert!(pool.idle() >= 1000);
        let second = pool.take(990);
        assert_eq!(second.as_ptr(), address);
        assert_eq!(second.len(), 990);
        assert!(second.iter().all(|x| x.is_nan()));
        assert_eq!(pool.idle(), 0);
        let small = pool.take(10);
        drop(second);
        assert_ne!(pool.take(11).as_ptr(), address, "a buffer ninety times too large stays");
        assert!(pool.take(0).is_empty());
        drop(small);
    }
}
