//! Whether the tile unit (AMX) of this CPU may be used: CPUID, and the permission of the operating system.
//!
//! The detection macro of the standard library is unstable for AMX, so the bits are read here. Linux keeps the 8 KiB of tile
//! registers from a process until it asks for them.
//!
//! # Source
//! Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18; Linux, `Documentation/arch/x86/xstate.rst`.

use std::sync::OnceLock;

/// Whether tile instructions with bf16 and int8 run in this process. The first call asks the operating system.
pub(super) fn available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| cpu_has_tiles() && request_permission())
}

/// CPUID leaf 7: EDX bits 22 (bf16), 24 (tiles), 25 (int8).
fn cpu_has_tiles() -> bool {
    const BITS: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & BITS == BITS
}

/// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`: for the whole process, once.
#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let answer: isize;
    // SAFETY: the call takes two numbers, touches no memory of ours, and changes the two registers that are named.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => answer,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    answer == 0
}

/// Other systems are not known to give tiles on request.
#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}
