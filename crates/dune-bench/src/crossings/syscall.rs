//! System calls as a program makes them, without a library in between.
#![expect(unsafe_code, reason = "the SYSCALL instruction")]

use core::arch::asm;

/// A system call without arguments that only asks for something.
#[inline(always)]
pub(crate) fn ask(number: libc::c_long) -> i64 {
    let answer;
    // SAFETY: the calls made through this take no argument and change nothing.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => answer,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    answer
}
