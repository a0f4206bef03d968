//! A child whose system calls are taken by ptrace.
#![expect(unsafe_code, reason = "fork and ptrace")]

use core::hint::black_box;
use core::mem;
use core::ptr;
use std::io;

use super::syscall::ask;

/// A child that calls `getppid` for ever, stopped at one of the calls. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Tracee {
    pid: libc::pid_t,
}

/// Not in the libc crate for every target (`asm/ptrace-abi.h`).
const PTRACE_SYSEMU: libc::c_uint = 31;

impl Tracee {
    /// Starts the child.
    ///
    /// # Errors
    /// What the kernel says when it does not allow a process to be traced.
    pub(crate) fn start() -> io::Result<Self> {
        // SAFETY: this program has one thread; the child only makes system calls.
        let pid = unsafe { libc::fork() };
        match pid {
            -1 => return Err(io::Error::last_os_error()),
            0 => child(),
            _ => {}
        }
        let mut tracee = Self { pid };
        let status = tracee.wait()?;
        if !libc::WIFSTOPPED(status) {
            return Err(io::Error::other("the child may not be traced"));
        }
        tracee.go_on()?;
        Ok(tracee)
    }

    /// One round trip as a tracer that virtualises system calls makes it: reads the call,
    /// writes a result, lets the child go to its next call.
    pub(crate) fn answer_call(&mut self) {
        // SAFETY: all zeros are registers.
        let mut registers: libc::user_regs_struct = unsafe { mem::zeroed() };
        let none = ptr::null_mut::<u8>();
        // SAFETY: the child is stopped; the kernel writes the structure.
        unsafe { libc::ptrace(libc::PTRACE_GETREGS, self.pid, none, &raw mut registers) };
        registers.rax = 1;
        let registers = black_box(&registers);
        // SAFETY: as above; the kernel reads it.
        unsafe { libc::ptrace(libc::PTRACE_SETREGS, self.pid, none, &raw const *registers) };
        self.pass_call();
    }

    /// The least that a round trip costs: the child goes on to its next call.
    pub(crate) fn pass_call(&mut self) {
        // The child does nothing that could end it.
        let _ = self.go_on();
    }

    fn go_on(&mut self) -> io::Result<()> {
        let none = ptr::null_mut::<u8>();
        // SAFETY: the child is stopped.
        if unsafe { libc::ptrace(PTRACE_SYSEMU, self.pid, none, none) } != 0 {
            return Err(io::Error::last_os_error());
        }
        self.wait().map(drop)
    }

    fn wait(&mut self) -> io::Result<libc::c_int> {
        let mut status = 0;
        // SAFETY: the kernel writes the status.
        if unsafe { libc::waitpid(self.pid, &raw mut status, 0) } == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(status)
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        // SAFETY: our own child.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        let _ = self.wait();
    }
}

fn child() -> ! {
    let none = ptr::null_mut::<u8>();
    // SAFETY: asks to be traced by the parent.
    if unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, none, none) } != 0 {
        // SAFETY: ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(1) };
    }
    // SAFETY: stops until the parent goes on.
    unsafe { libc::raise(libc::SIGSTOP) };
    loop {
        ask(libc::SYS_getppid);
    }
}
