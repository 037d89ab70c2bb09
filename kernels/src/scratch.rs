//! Per-thread scratch memory: 64-byte aligned f32 buffers that are kept for the next kernel call.
//!
//! A kernel that packs or stages data takes a [`ScratchBuf`] and drops it; the memory goes to the
//! dropping thread's free list, so a training loop allocates in its first step only.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

use pulp::bytemuck::{cast_slice, cast_slice_mut};

use crate::memory::AlignedVec;

/// At most this many buffers wait in one thread's free list; what goes beyond is freed. A training step of a deep
/// recurrent model keeps three for each layer until it goes back.
const KEPT_BUFFERS: usize = 64;

thread_local! {
    static FREE: RefCell<Vec<AlignedVec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// A 64-byte aligned `[f32]`. Its contents are whatever the last user left: initialised memory, but not zero.
pub struct ScratchBuf {
    memory: AlignedVec<f32>,
    len: usize,
}

impl ScratchBuf {
    /// A buffer of `len` f32 with unspecified contents.
    pub fn take(len: usize) -> ScratchBuf {
        let mut memory = FREE.with(|free| {
            let mut free = free.borrow_mut();
            // The smallest that fits, else the largest there is (it will grow).
            let fit = free.iter().enumerate().filter(|(_, b)| b.len() >= len).min_by_key(|(_, b)| b.len());
            let pick = fit.or_else(|| free.iter().enumerate().max_by_key(|(_, b)| b.len())).map(|(i, _)| i);
            pick.map(|i| free.swap_remove(i)).unwrap_or_default()
        });
        if memory.len() < len {
            memory.resize(0);
            memory.resize(len);
        }
        ScratchBuf { memory, len }
    }

    /// The buffer as 32-bit words.
    pub(crate) fn words_mut(&mut self) -> &mut [u32] {
        cast_slice_mut(self)
    }

    /// The same to read.
    pub(crate) fn words(&self) -> &[u32] {
        cast_slice(self)
    }

    /// A buffer of `len` zeros.
    pub fn zeroed(len: usize) -> ScratchBuf {
        let mut buf = ScratchBuf::take(len);
        buf.fill(0.0);
        buf
    }
}

impl Deref for ScratchBuf {
    type Target = [f32];

    #[inline]
    fn deref(&self) -> &[f32] {
        &self.memory[..self.len]
    }
}

impl DerefMut for ScratchBuf {
    #[inline]
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.memory[..self.len]
    }
}

impl Drop for ScratchBuf {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        // During thread exit the list may be gone already; then the memory is simply freed.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < KEPT_BUFFERS && !memory.is_empty() {
                free.push(memory);
            }
        });
    }
}

/// 64-byte aligned 32-bit words that stay with their owner: no load of a vector crosses a cache line.
#[derive(Default)]
pub(crate) struct Words {
    memory: AlignedVec<u32>,
    len: usize,
    /// Whether the memory goes to the free list of the thread that drops it.
    lent: bool,
}

impl Words {
    /// `len` words out of the thread's free list, with unspecified values: for an owner that lives for one call.
    pub(crate) fn lent(len: usize) -> Words {
        let memory = std::mem::take(&mut ScratchBuf::take(len).memory).cast();
        Words { memory, len, lent: true }
    }

    /// Makes it `len` words; those it had keep their values, new ones are 0 or what they were before.
    pub(crate) fn resize(&mut self, len: usize) {
        if !self.lent || len > self.memory.len() {
            self.memory.resize(len);
        }
        self.len = len;
    }

    /// Some of the words as f32.
    pub(crate) fn as_f32(&self, part: std::ops::Range<usize>) -> &[f32] {
        cast_slice(&self[part])
    }

    /// The words as f32.
    pub(crate) fn as_f32_mut(&mut self) -> &mut [f32] {
        cast_slice_mut(self)
    }
}

impl Clone for Words {
    /// A copy that is nobody's scratch memory.
    fn clone(&self) -> Words {
        Words { memory: AlignedVec::from(&self[..]), len: self.len, lent: false }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        if self.lent {
            drop(ScratchBuf { memory: std::mem::take(&mut self.memory).cast(), len: self.len });
        }
    }
}

impl Deref for Words {
    type Target = [u32];

    #[inline]
    fn deref(&self) -> &[u32] {
        &self.memory[..self.len]
    }
}

impl DerefMut for Words {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u32] {
        &mut self.memory[..self.len]
    }
}

impl std::fmt::Debug for Words {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Words({})", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_reused() {
        let first = ScratchBuf::take(1000);
        assert_eq!(first.len(), 1000);
        let address = first.as_ptr() as usize;
        assert_eq!(address % 64, 0);
        drop(first);
        let again = ScratchBuf::take(900);
        assert_eq!(again.as_ptr() as usize, address);
        assert_eq!(again.len(), 900);
    }

    #[test]
    fn lent_words_go_back_and_their_copies_do_not() {
        let buffer = ScratchBuf::take(5000);
        let address = buffer.as_ptr().cast::<u32>();
        drop(buffer);
        let mut words = Words::lent(4990);
        assert_eq!((words.as_ptr(), words.len()), (address, 4990));
        words.resize(100);
        words[99] = 7;
        let copy = words.clone();
        assert_eq!((copy.len(), copy[99]), (100, 7));
        drop(words);
        drop(copy);
        let again = ScratchBuf::take(5000);
        assert_eq!(again.as_ptr().cast::<u32>(), address, "the whole buffer came back");
    }

    #[test]
    fn two_at_once_do_not_overlap() {
        let mut a = ScratchBuf::zeroed(64);
        let mut b = ScratchBuf::zeroed(64);
        a.fill(1.0);
        b.fill(2.0);
        assert!(a.iter().all(|&x| x == 1.0) && b.iter().all(|&x| x == 2.0));
        assert!(ScratchBuf::take(0).is_empty());
    }
}
