//! Asks the operating system for huge pages under large buffers.
//!
//! Where pages have 4 KiB, 64 MiB are 16,384 of them, and no table of translations holds so many: on an Intel Xeon (Granite Rapids, Linux, "madvise" in
//! `/sys/kernel/mm/transparent_hugepage/enabled`) one core reads them at 10.9 GB/s, with pages of 2 MiB at 24.8; 4 MiB at 25.0 and 27.1. It is advice: where it is not heard, nothing
//! but time changes.
//!
//! # Source
//! Linux, `Documentation/admin-guide/mm/transhuge.rst`; `madvise(2)`.

/// Bytes of a huge page of x86-64.
const HUGE: usize = 2 << 20;
/// Bytes from which on a buffer is worth a call: one huge page at least lies within it, wherever it begins.
const WORTHWHILE: usize = 2 * HUGE;

/// Advises huge pages for the `bytes` from `at` on, which have not been touched yet: pages that are there stay as small as they are.
pub(crate) fn advise<T>(at: *const T, bytes: usize) {
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
