//! [`AlignedVec`]: elements that begin at a cache line, on huge pages where they are many.
//!
//! Why it is fast:
//! - No load of a vector crosses a cache line, where a large `Vec<f32>` begins 16 bytes behind one: decoding one query over a cache of 8 MiB takes
//!   0.95 of the time (AMD EPYC, Zen 4).
//! - Where pages have 4 KiB, 64 MiB are 16,384 of them, and no table of translations holds so many. On an Intel Xeon (Granite Rapids, Linux, "madvise" in
//!   `/sys/kernel/mm/transparent_hugepage/enabled`) one core reads them at 10.9 GB/s, with pages of 2 MiB at 24.8; 4 MiB at 25.0 and 27.1. On the Zen 4 decoding
//!   over 128 MiB takes 0.76 of the time on one thread, products of one row with weights that no cache holds 0.81 to 0.98 (docs/decisions/001-foundations.md).
//!
//! Huge pages are advice to the system: where it is not heard, nothing but time changes.
//!
//! # Source
//! Linux, `Documentation/admin-guide/mm/transhuge.rst`; `madvise(2)`.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use pulp::bytemuck::{Pod, Zeroable, cast_slice, cast_slice_mut};

/// One cache line; a `Vec` of these is 64-byte aligned.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; Line::LEN]);

impl Line {
    const LEN: usize = 16;
}

// SAFETY: zeros are words.
unsafe impl Zeroable for Line {}
// SAFETY: words without padding, since 16 of them are 64 bytes.
unsafe impl Pod for Line {}

mod sealed {
    pub trait Bits32: super::Pod {}
    impl Bits32 for f32 {}
    impl Bits32 for u32 {}
}

/// What an [`AlignedVec`] holds: f32, or u32.
pub trait Element: sealed::Bits32 {}
impl<T: sealed::Bits32> Element for T {}

/// Elements that begin at a cache line, on huge pages where they are many and the system gives them: for large operands, such as weights, activations,
/// caches of keys and values.
pub struct AlignedVec<T> {
    /// As many as `len` elements need.
    lines: Vec<Line>,
    len: usize,
    elements: PhantomData<T>,
}

impl<T> AlignedVec<T> {
    /// No elements, and no memory.
    pub const fn new() -> AlignedVec<T> {
        AlignedVec { lines: Vec::new(), len: 0, elements: PhantomData }
    }

    /// How many elements.
    #[inline]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Room for so many lines.
    fn reserve(&mut self, lines: usize) {
        if lines > self.lines.capacity() {
            let mut old = std::mem::take(&mut self.lines);
            let room = if old.is_empty() {
                // Given back before more is asked for.
                old = Vec::new();
                lines
            } else {
                // What has grown once grows on.
                lines.max(2 * old.capacity())
            };
            // A new vector and not a longer one, whose pages would be touched before the advice.
            self.lines.reserve_exact(room);
            advise_huge_pages(self.lines.as_ptr(), room * size_of::<Line>());
            self.lines.extend_from_slice(&old);
        }
    }
}

impl<T: Element> AlignedVec<T> {
    /// `len` zeros.
    pub fn zeroed(len: usize) -> AlignedVec<T> {
        let mut new = AlignedVec::new();
        new.resize(len);
        new
    }

    /// `len` times that value.
    pub fn filled(len: usize, value: T) -> AlignedVec<T> {
        AlignedVec::from_fn(len, |_| value)
    }

    /// `f(0)`, `f(1)`, … `f(len − 1)`.
    pub fn from_fn(len: usize, mut f: impl FnMut(usize) -> T) -> AlignedVec<T> {
        let mut new = AlignedVec::zeroed(len);
        for (i, element) in new.iter_mut().enumerate() {
            *element = f(i);
        }
        new
    }

    /// Makes it `len` elements: those it had keep their values, new ones are 0. A shorter length gives no memory back.
    pub fn resize(&mut self, len: usize) {
        let (old, lines) = (self.len, len.div_ceil(Line::LEN));
        self.reserve(lines);
        self.lines.resize(lines, Line::zeroed());
        self.len = len;
        if old < len {
            // What a shorter length has left behind in its last line.
            self[old..old.next_multiple_of(Line::LEN).min(len)].fill(T::zeroed());
        }
    }

    /// The same memory as elements of another kind, bit by bit.
    pub(crate) fn cast<U: Element>(self) -> AlignedVec<U> {
        AlignedVec { lines: self.lines, len: self.len, elements: PhantomData }
    }
}

impl<T: Element> Deref for AlignedVec<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        &cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Element> DerefMut for AlignedVec<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl<T> Default for AlignedVec<T> {
    fn default() -> AlignedVec<T> {
        AlignedVec::new()
    }
}

impl<T> Clone for AlignedVec<T> {
    fn clone(&self) -> AlignedVec<T> {
        let mut new = AlignedVec::new();
        new.reserve(self.lines.len());
        new.lines.extend_from_slice(&self.lines);
        AlignedVec { len: self.len, ..new }
    }
}

impl<T: Element> From<&[T]> for AlignedVec<T> {
    fn from(elements: &[T]) -> AlignedVec<T> {
        let mut new = AlignedVec::zeroed(elements.len());
        new.copy_from_slice(elements);
        new
    }
}

impl<T: Element + PartialEq> PartialEq for AlignedVec<T> {
    fn eq(&self, other: &AlignedVec<T>) -> bool {
        self[..] == other[..]
    }
}

impl<T: Element + fmt::Debug> fmt::Debug for AlignedVec<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self[..].fmt(f)
    }
}

impl<'a, T: Element> IntoIterator for &'a AlignedVec<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<'a, T: Element> IntoIterator for &'a mut AlignedVec<T> {
    type Item = &'a mut T;
    type IntoIter = std::slice::IterMut<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter_mut()
    }
}

/// Bytes of a huge page of x86-64.
const HUGE: usize = 2 << 20;
/// Bytes from which on memory is worth a call: one huge page at least lies within it, wherever it begins.
const WORTHWHILE: usize = 2 * HUGE;

/// Advises huge pages for the `bytes` from `at` on, which have not been touched yet: pages that are there stay as small as they are.
fn advise_huge_pages<T>(at: *const T, bytes: usize) {
    if bytes < WORTHWHILE {
        return;
    }
    let first = at.addr().next_multiple_of(HUGE);
    let last = (at.addr() + bytes) / HUGE * HUGE;
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if first < last {
        const MADVISE: usize = 28;
        const MADV_HUGEPAGE: usize = 14;
        // SAFETY: the call changes how the system maps memory that the caller owns, not what is in it; it changes the registers that are named, and
        // an error means that nothing was done.
        unsafe {
            std::arch::asm!(
                "syscall",
                inlateout("rax") MADVISE => _,
                in("rdi") first,
                in("rsi") last - first,
                in("rdx") MADV_HUGEPAGE,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack),
            );
        }
    }
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    let _ = (first, last);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_stay_and_new_ones_are_zero() {
        let mut a = AlignedVec::from_fn(40, |i| i as f32);
        assert_eq!(a.as_ptr().addr() % 64, 0);
        a.resize(3);
        a.resize(50);
        assert!(a.iter().enumerate().all(|(i, &x)| x == if i < 3 { i as f32 } else { 0.0 }), "{a:?}");
        a.resize(2 * WORTHWHILE / size_of::<f32>() + 5);
        assert_eq!((a[2], a[3], a[a.len() - 1], a.as_ptr().addr() % 64), (2.0, 0.0, 0.0, 0));
        let mut copy = a.clone();
        assert_eq!(copy, a);
        copy[7] = 1.0;
        assert_ne!(copy, a);
        assert_eq!(AlignedVec::from(&a[1..4]), AlignedVec::from_fn(3, |i| [1.0, 2.0, 0.0][i]));
    }

    #[test]
    fn bits_are_kept() {
        let nan = f32::from_bits(0x7fc0_1234);
        let mut words = AlignedVec::from(&[1.0, nan][..]).cast::<u32>();
        assert_eq!(words[1], 0x7fc0_1234);
        words[0] = (-2.0f32).to_bits();
        assert_eq!(words.cast::<f32>()[0], -2.0);
    }
}
