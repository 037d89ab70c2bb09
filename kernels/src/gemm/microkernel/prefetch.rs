//! Hints that memory will be wanted soon. They change no result, only when the memory arrives.
//!
//! Measured with weights of 1 to 16 MiB, which lie in the third-level cache, on a Zen 3 core: see docs/decisions/002-gemm.md.

use std::ops::Range;

use super::Out;

/// Lines of memory, one after the other, that the next strip will read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ahead {
    at: *const f32,
}

impl Ahead {
    /// From `at` on.
    #[inline(always)]
    pub(super) fn from<T>(at: *const T) -> Ahead {
        Ahead { at: at.cast() }
    }

    /// Asks for the share of a turn's `lines` that the constant names.
    #[inline(always)]
    pub(super) fn fetch_share<const SHARE: usize>(&mut self, lines: usize) {
        match SHARE {
            ALL => self.fetch(Share::All.lines(lines)),
            HALF => self.fetch(Share::Half.lines(lines)),
            _ => {}
        }
    }

    /// Asks for the next `lines` lines, into the second-level cache: the first is full of what runs now.
    #[inline(always)]
    pub(super) fn fetch(&mut self, lines: usize) {
        for _ in 0..lines {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a prefetch reads nothing that the program could see, and faults at no address.
            unsafe {
                use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
                _mm_prefetch::<_MM_HINT_T1>(self.at.cast());
            }
            self.at = self.at.wrapping_add(LINE);
        }
    }
}

/// What a loop asks for on its way, as a constant of its instance: nothing, all of the next panel, or half of it.
pub(super) const NOTHING: usize = 0;
pub(super) const ALL: usize = 1;
pub(super) const HALF: usize = 2;

/// How much of the next panel each tile of a strip asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Share {
    /// All: it is the only tile, or low, so that there are likely to be few.
    All,
    /// Half, so that two tiles share the work.
    Half,
}

impl Share {
    /// That of a tile of `height` rows in a strip of `rows`, with tiles of up to `mr`.
    #[inline(always)]
    pub(super) fn of(height: usize, rows: usize, mr: usize) -> Share {
        if height <= 4 || rows <= mr { Share::All } else { Share::Half }
    }

    /// Of `lines` of a turn of the loop, those that the tile asks for.
    pub(super) const fn lines(self, lines: usize) -> usize {
        match self {
            Share::All => lines,
            Share::Half => lines.div_ceil(2),
        }
    }
}

/// Asks for all of a row, into the first-level cache. For rows that lie far apart, which no hardware foresees.
#[inline(always)]
pub(crate) fn row(row: &[f32]) {
    for at in (0..row.len()).step_by(LINE) {
        line(row.as_ptr().wrapping_add(at));
    }
    // A row that does not begin with a line ends in one more.
    line(row.as_ptr().wrapping_add(row.len().saturating_sub(1)));
}

/// Asks for rows of C that a tile of `cols` columns, about so many `lines`, will write when it has its sums. Left to the stores, rows of C that lie in memory are waited for
/// (docs/decisions/002-gemm.md). Of a single line, or two halves, the strip before has touched the first. `lines` is a constant of the tile and not made from `cols`: a loop of unknown
/// length puts sums of AVX2 tiles on the stack.
#[inline(always)]
pub(super) fn rows_of(out: Out<f32>, rows: Range<usize>, cols: usize, lines: usize) {
    if out.col_stride != 1 {
        return;
    }
    for i in rows {
        let row = out.ptr.wrapping_add(i * out.row_stride);
        if lines > 1 {
            (0..lines).for_each(|l| line(row.wrapping_add(l * LINE)));
        }
        line(row.wrapping_add(cols - 1));
    }
}

/// Asks for all of a row, into the second-level cache: what is wanted later, while the first is full of what runs now.
#[inline(always)]
pub(crate) fn row_for_later(row: &[f32]) {
    lines_for_later(row.as_ptr(), row.len());
}

/// The same of `len` elements from `row` on.
#[inline(always)]
pub(crate) fn lines_for_later(row: *const f32, len: usize) {
    Ahead::from(row).fetch(len.div_ceil(LINE));
    Ahead::from(row.wrapping_add(len.saturating_sub(1))).fetch(1);
}

/// Elements of a cache line.
pub(super) const LINE: usize = 16;

/// Asks for the line that holds `at`, into the first-level cache.
#[inline(always)]
pub(crate) fn line<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
