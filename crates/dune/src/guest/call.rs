//! Calls that the runtime itself makes from inside the guest, with interrupts off. Unlike
//! the program's own they are never interrupted or restarted by a signal.
#![expect(unsafe_code, reason = "the call page and the OUT instruction")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "fields of one raw structure"
)]

use core::arch::asm;
use core::sync::atomic::Ordering;

use crate::arch::{PORT_DIE, PORT_MASK, VECTOR_NOTIFY};
use crate::thread::ThreadArea;

/// Interrupts off until the guard is dropped; then as before.
pub(crate) struct InterruptsOff {
    flags: u64,
}

impl InterruptsOff {
    #[inline(always)]
    pub(crate) fn new() -> Self {
        let flags;
        // SAFETY: ring 0; the red zone is respected by the compiler.
        unsafe { asm!("pushfq", "pop {}", "cli", out(reg) flags) };
        Self { flags }
    }
}

impl Drop for InterruptsOff {
    #[inline(always)]
    fn drop(&mut self) {
        interrupts_as(self.flags);
    }
}

/// Turns interrupts on if the interrupted code had them on.
#[inline(always)]
pub(crate) fn interrupts_as(rflags: u64) {
    const IF: u64 = 1 << 9;
    if rflags & IF != 0 {
        // SAFETY: the thread is off the interrupt stack.
        unsafe { asm!("sti") };
        // The host side leaves a signal that came during a system call to the entry stub,
        // which could not deliver it.
        // SAFETY: the area is this thread's.
        if unsafe { (*ThreadArea::current()).pending.load(Ordering::Relaxed) } != 0 {
            // SAFETY: the gate leads to the stub that delivers what waits.
            unsafe { asm!("int {}", const VECTOR_NOTIFY) };
        }
    }
}

/// Turns interrupts off.
pub(crate) fn interrupts_off() {
    // SAFETY: ring 0.
    unsafe { asm!("cli", options(nomem, nostack)) };
}

/// Changes the mask that the program believes to have; returns the one before. Interrupts
/// must be off.
pub(crate) fn change_mask(how: usize, set: u64) -> u64 {
    let area = ThreadArea::current();
    // SAFETY: the area is this thread's, and interrupts are off.
    unsafe {
        (*area).arguments[0] = how;
        (*area).arguments[1] = set as usize;
        asm!("out {port}, al", port = const PORT_MASK, in("al") 0_u8);
        (*area).result as u64
    }
}

/// Ends the process by a signal.
pub(crate) fn die(signal: u32) -> ! {
    interrupts_off();
    let area = ThreadArea::current();
    // SAFETY: the area is this thread's, and interrupts are off.
    unsafe {
        (*area).result = signal as isize;
        asm!("out {port}, al", "ud2", port = const PORT_DIE, in("al") 0_u8, options(noreturn));
    }
}
