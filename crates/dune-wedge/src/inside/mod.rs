//! What runs inside a compartment, in ring 3: the entry, the requests to the guard, and what
//! stands in for parts of libc.
//!
//! Nothing here is trusted. It makes life easier for the function that runs, and the guard
//! checks whatever comes out of it.
#![expect(unsafe_code, reason = "requests to the guard are SYSCALL instructions")]

pub(crate) mod auxiliary;
pub(crate) mod entry;
pub(crate) mod heap;
pub(crate) mod panic;

use core::arch::asm;
use core::ffi::CStr;
use core::sync::atomic::{AtomicU8, Ordering};

/// Requests to the guard, as numbers of system calls that no kernel has.
pub(crate) mod request {
    const OURS: u64 = 0x5744_0000;
    /// The function has returned; its result is in its place.
    pub(crate) const RETURN: u64 = OURS;
    /// `(text, length)`: the function has panicked.
    pub(crate) const PANIC: u64 = OURS + 1;
    /// `(gate, input, its size, output, its size)`.
    pub(crate) const GATE: u64 = OURS + 2;
    /// `(gate, input, its length, output, its length)`; returns the output's length.
    pub(crate) const BYTES_GATE: u64 = OURS + 3;
    /// `(tag, size, alignment)`; returns the address.
    pub(crate) const TAG_ALLOCATE: u64 = OURS + 4;
    /// `(tag, address)`.
    pub(crate) const TAG_FREE: u64 = OURS + 5;
}

/// 1 in the variables that compartments see, and 0 in the process's own.
static MARK: AtomicU8 = AtomicU8::new(0);

/// Where the mark is, for the image.
pub(crate) fn mark() -> u64 {
    MARK.as_ptr() as u64
}

/// An environment without variables.
static EMPTY_ENVIRONMENT: [usize; 1] = [0];

/// Where it is, for the image.
pub(crate) fn empty_environment() -> u64 {
    EMPTY_ENVIRONMENT.as_ptr() as u64
}

/// Whether the caller runs inside a compartment. Two instructions.
#[inline]
#[must_use]
pub fn is_inside() -> bool {
    MARK.load(Ordering::Relaxed) != 0
}

/// Asks the guard.
#[inline]
pub(crate) fn ask(number: u64, arguments: [u64; 5]) -> u64 {
    let result;
    let [a, b, c, d, e] = arguments;
    // SAFETY: in a compartment the guard answers; it writes nowhere but where the request
    // says. Outside, the kernel does not know the number.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// libc's functions that a compartment has of its own, and where those are.
pub(crate) fn replacements() -> Vec<(&'static CStr, u64)> {
    let heap = heap::functions();
    let clocks = [
        (c"time", time as *const () as u64),
        (c"gettimeofday", gettimeofday as *const () as u64),
    ];
    let others = [
        (c"exit", exit as *const () as u64),
        (c"getauxval", auxiliary::getauxval as *const () as u64),
    ];
    heap.into_iter().chain(clocks).chain(others).collect()
}

/// The functions that the process wants to have called at its end are not the compartment's
/// to call.
extern "C" fn exit(status: i32) -> ! {
    loop {
        ask(libc::SYS_exit_group as u64, [status as u64, 0, 0, 0, 0]);
    }
}

// The kernel's vDSO provides these; a compartment asks the guard, as for every call.

extern "C" fn time(into: *mut i64) -> i64 {
    let now = ask(libc::SYS_time as u64, [0; 5]) as i64;
    if !into.is_null() {
        // SAFETY: the caller's own pointer.
        unsafe { into.write(now) };
    }
    now
}

extern "C" fn gettimeofday(into: *mut libc::timeval, _: *mut libc::timezone) -> i32 {
    ask(libc::SYS_gettimeofday as u64, [into as u64, 0, 0, 0, 0]) as i32
}
