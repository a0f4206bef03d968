//! Restartable sequences. The kernel restarts a sequence when it interrupts a thread whose
//! instruction pointer lies in one; it never sees the guest's. So a thread's registration
//! is taken back at entry and made again on leaving.
#![expect(unsafe_code, reason = "libc's variables and the system call")]

use core::sync::atomic::{AtomicUsize, Ordering};

use dune_kvm::sys::{self, nr};

/// The signature that libc and the kernel agree on for x86.
const SIGNATURE: usize = 0x5305_3053;
const UNREGISTER: usize = 1;
/// The size that the kernel's first version of the structure has.
const FIRST_SIZE: u32 = 32;

/// Offset of the area from the thread pointer plus one; 0 where libc registers none.
static OFFSET: AtomicUsize = AtomicUsize::new(0);

/// Asks libc where its areas are (glibc 2.35 and later).
pub(crate) fn prepare() {
    // SAFETY: a terminated name.
    let offset = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) };
    // SAFETY: as above.
    let size = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()) };
    if offset.is_null() || size.is_null() {
        return;
    }
    // SAFETY: libc defines it as an unsigned int.
    if unsafe { size.cast::<u32>().read() } == 0 {
        return;
    }
    // SAFETY: libc defines it as a ptrdiff_t.
    let offset = unsafe { offset.cast::<isize>().read() };
    OFFSET.store((offset as usize).wrapping_add(1), Ordering::Relaxed);
}

/// Takes the thread's registration back and returns what to register again.
pub(crate) fn unregister() -> (usize, u32) {
    let offset = OFFSET.load(Ordering::Relaxed);
    if offset == 0 {
        return (0, 0);
    }
    let thread: usize;
    // SAFETY: the psABI: the first word at the thread pointer is its address.
    unsafe {
        core::arch::asm!("mov {}, fs:[0]", out(reg) thread, options(nostack, readonly, preserves_flags));
    }
    let area = thread.wrapping_add(offset.wrapping_sub(1));
    // SAFETY: the kernel compares the address with the one that it has.
    let result = unsafe {
        sys::raw(
            nr::RSEQ,
            [area, FIRST_SIZE as usize, UNREGISTER, SIGNATURE, 0, 0],
        )
    };
    if result == 0 {
        (area, FIRST_SIZE)
    } else {
        (0, 0)
    }
}

/// Takes the calling thread's registration for restartable sequences back, for good, where
/// libc has made one: for native threads with which the host kernel must not meddle. libc does
/// without them.
pub fn forgo_restartable_sequences() {
    prepare();
    let _ = unregister();
}

/// Registers an area again.
pub(crate) fn register((area, size): (usize, u32)) {
    if area != 0 {
        // SAFETY: the area is the thread's own, as before.
        let _ = unsafe { sys::raw(nr::RSEQ, [area, size as usize, 0, SIGNATURE, 0, 0]) };
    }
}
