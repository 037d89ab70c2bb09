//! Per-thread scratch memory: 64-byte aligned f32 buffers that are kept for the next kernel call.
//!
//! A kernel that packs or stages data takes a [`ScratchBuf`] and drops it; the memory goes to the
//! dropping thread's free list, so a training loop allocates in its first step only.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

use crate::huge_pages;

/// One cache line of f32; a `Vec` of these is 64-byte aligned.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; Line::LEN]);

impl Line {
    const LEN: usize = 16;
}

/// At most this many buffers wait in one thread's free list; what goes beyond is freed. A training step of a deep
/// recurrent model keeps three for each layer until it goes back.
const KEPT_BUFFERS: usize = 64;

thread_local! {
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Makes it `needed` lines; new ones are zero.
fn lengthen(lines: &mut Vec<Line>, needed: usize) {
    if needed > lines.capacity() {
        lines.reserve_exact(needed - lines.len());
        huge_pages::advise(lines.as_ptr(), needed * size_of::<Line>());
    }
    lines.resize(needed, Line([0.0; Line::LEN]));
}

/// A 64-byte aligned `[f32]`. Its contents are whatever the last user left: initialised memory, but not zero.
pub struct ScratchBuf {
    lines: Vec<Line>,
    len: usize,
}

impl ScratchBuf {
    /// A buffer of `len` f32 with unspecified contents.
    pub fn take(len: usize) -> ScratchBuf {
        let needed = len.div_ceil(Line::LEN);
        let mut lines = FREE.with(|free| {
            let mut free = free.borrow_mut();
            // The smallest that fits, else the largest there is (it will grow).
            let fit = free.iter().enumerate().filter(|(_, b)| b.len() >= needed).min_by_key(|(_, b)| b.len());
            let pick = fit.or_else(|| free.iter().enumerate().max_by_key(|(_, b)| b.len())).map(|(i, _)| i);
            pick.map(|i| free.swap_remove(i)).unwrap_or_default()
        });
        if lines.len() < needed {
            lines.clear();
            lengthen(&mut lines, needed);
        }
        ScratchBuf { lines, len }
    }

    /// The buffer as 32-bit words.
    pub(crate) fn words_mut(&mut self) -> &mut [u32] {
        // SAFETY: as in `deref_mut`; f32 and u32 have the same size and alignment, and every bit pattern is one of both.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast::<u32>(), self.len) }
    }

    /// The same to read.
    pub(crate) fn words(&self) -> &[u32] {
        // SAFETY: as in `deref`; f32 and u32 have the same size and alignment, and every bit pattern is one of both.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast::<u32>(), self.len) }
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
        // SAFETY: `Line` is `repr(C)` around `[f32; 16]` with no padding, and `take` made sure that
        // `lines` holds at least `len` initialised f32.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast::<f32>(), self.len) }
    }
}

impl DerefMut for ScratchBuf {
    #[inline]
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`; `&mut self` makes the access unique.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast::<f32>(), self.len) }
    }
}

impl Drop for ScratchBuf {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        // During thread exit the list may be gone already; then the memory is simply freed.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < KEPT_BUFFERS && !lines.is_empty() {
                free.push(lines);
            }
        });
    }
}

/// 64-byte aligned 32-bit words that stay with their owner: no load of a vector crosses a cache line.
#[derive(Default)]
pub(crate) struct Words {
    lines: Vec<Line>,
    len: usize,
    /// Whether the memory goes to the free list of the thread that drops it.
    lent: bool,
}

impl Words {
    /// `len` words out of the thread's free list, with unspecified values: for an owner that lives for one call.
    pub(crate) fn lent(len: usize) -> Words {
        let lines = std::mem::take(&mut ScratchBuf::take(len).lines);
        Words { lines, len, lent: true }
    }

    /// Makes it `len` words; those it had keep their values, new ones are 0 or what they were before.
    pub(crate) fn resize(&mut self, len: usize) {
        let needed = len.div_ceil(Line::LEN);
        if !self.lent || needed > self.lines.len() {
            lengthen(&mut self.lines, needed);
        }
        self.len = len;
    }

    /// Some of the words as f32.
    pub(crate) fn as_f32(&self, part: std::ops::Range<usize>) -> &[f32] {
        let words = &self[part];
        // SAFETY: u32 and f32 have the same size and alignment, and every bit pattern is one of both.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<f32>(), words.len()) }
    }

    /// The words as f32.
    pub(crate) fn as_f32_mut(&mut self) -> &mut [f32] {
        // SAFETY: `resize` made sure that `lines` holds at least `len` initialised f32; `&mut self` makes
        // the access unique.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast::<f32>(), self.len) }
    }
}

impl Clone for Words {
    /// A copy that is nobody's scratch memory.
    fn clone(&self) -> Words {
        Words { lines: self.lines[..self.len.div_ceil(Line::LEN)].to_vec(), len: self.len, lent: false }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        if self.lent {
            drop(ScratchBuf { lines: std::mem::take(&mut self.lines), len: self.len });
        }
    }
}

impl Deref for Words {
    type Target = [u32];

    #[inline]
    fn deref(&self) -> &[u32] {
        // SAFETY: `resize` made sure that `lines` holds at least `len` words; every bit pattern is a u32.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast::<u32>(), self.len) }
    }
}

impl DerefMut for Words {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u32] {
        // SAFETY: as in `deref`, and every bit pattern is an f32; `&mut self` makes the access unique.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast::<u32>(), self.len) }
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
