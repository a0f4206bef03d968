//! The GS base of a thread on the host: its area while its host loop runs, and zero
//! otherwise. Linux programs do not use GS, and a signal handler can read it whatever the
//! thread was doing.
#![expect(unsafe_code, reason = "RDGSBASE and WRGSBASE, or arch_prctl")]

use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering};

use dune_kvm::sys::{self, nr};

/// Whether the host kernel lets programs use the instructions (Linux 5.9 and later).
static INSTRUCTIONS: AtomicBool = AtomicBool::new(false);

/// Finds out what the host kernel allows. Once, before the first entry.
pub(crate) fn prepare() {
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    // SAFETY: no preconditions.
    let capabilities = unsafe { libc::getauxval(libc::AT_HWCAP2) };
    INSTRUCTIONS.store(capabilities & HWCAP2_FSGSBASE != 0, Ordering::Relaxed);
}

/// The thread's GS base. Host side only.
#[inline]
pub(crate) fn get() -> u64 {
    const ARCH_GET_GS: usize = 0x1004;
    let mut value = 0_u64;
    if INSTRUCTIONS.load(Ordering::Relaxed) {
        // SAFETY: the kernel said that the instruction may be used.
        unsafe { asm!("rdgsbase {}", out(reg) value, options(nomem, nostack, preserves_flags)) };
    } else {
        // SAFETY: the kernel writes 8 bytes.
        let _ = unsafe {
            sys::raw(
                nr::ARCH_PRCTL,
                [ARCH_GET_GS, &raw mut value as usize, 0, 0, 0, 0],
            )
        };
    }
    value
}

/// Sets the thread's GS base. Host side only.
#[inline]
pub(crate) fn set(value: u64) {
    const ARCH_SET_GS: usize = 0x1001;
    if INSTRUCTIONS.load(Ordering::Relaxed) {
        // SAFETY: the kernel said that the instruction may be used; nothing else uses GS.
        unsafe { asm!("wrgsbase {}", in(reg) value, options(nomem, nostack, preserves_flags)) };
    } else {
        // SAFETY: nothing else uses GS.
        let _ = unsafe { sys::raw(nr::ARCH_PRCTL, [ARCH_SET_GS, value as usize, 0, 0, 0, 0]) };
    }
}
