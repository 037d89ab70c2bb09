//! Hints that memory will be wanted soon. They change no result, only when the memory arrives.
//!
//! Measured with weights of 1 to 16 MiB, which lie in the third-level cache, on a Zen 3 core: see docs/decisions/002-gemm.md.

use std::ops::Range;

/// Memory that the next strip will read, asked for bit by bit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ahead {
    at: *const u8,
    step: usize,
}

impl Ahead {
    /// The share of `rows`, of `all` rows, in the `len` elements from `start` on, in `steps` steps. A trickle: asked for
    /// in the first tiles alone, the memory comes later than they end where rows are few.
    #[inline(always)]
    pub(super) fn share<T>(
        start: *const T,
        len: usize,
        (rows, all): (Range<usize>, usize),
        steps: usize,
    ) -> Ahead {
        let bytes = len * size_of::<T>();
        let at = start.cast::<u8>().wrapping_add(bytes / all * rows.start);
        Ahead { at, step: bytes / all * rows.len() / steps.max(1) }
    }

    /// Nothing: [`Ahead::fetch`] stays at `at`, which is in the first-level cache already.
    #[inline(always)]
    pub(super) fn nothing<T>(at: *const T) -> Ahead {
        Ahead { at: at.cast(), step: 0 }
    }

    /// Goes so many steps, asking for the line of each, into the second-level cache: the first is full of what runs now.
    #[inline(always)]
    pub(super) fn fetch(&mut self, steps: usize) {
        for _ in 0..steps {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a prefetch reads nothing that the program could see, and faults at no address.
            unsafe {
                use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
                _mm_prefetch::<_MM_HINT_T1>(self.at.cast());
            }
            self.at = self.at.wrapping_add(self.step);
        }
    }
}

/// Asks for all of a row, into the first-level cache. For rows that lie far apart, which no hardware foresees.
#[inline(always)]
pub(crate) fn row(row: &[f32]) {
    for part in row.chunks(LINE) {
        line(part.as_ptr());
    }
}

/// Elements of a cache line.
const LINE: usize = 16;

/// Asks for the line that holds `at`, into the first-level cache.
#[inline(always)]
pub(super) fn line<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
