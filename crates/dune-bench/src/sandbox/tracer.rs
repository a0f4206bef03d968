//! The ptrace-based tracer of `dune-bench sandbox`: what a sandbox costs that takes every
//! system call of its programs by `PTRACE_SYSEMU`, and does as little as can be done.
//!
//! ```text
//!   call of a tracee -> stop -> answered here: result into the registers, go on   (one stop)
//!                           \-> passed on:     end of the call not made, the same call
//!                                              made again, let through at its start (three stops)
//! ```
#![expect(unsafe_code, reason = "fork, exec and ptrace")]

use core::mem;
use core::ptr;
use std::collections::BTreeMap;
use std::ffi::{CString, OsString};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::process::ExitCode;

/// Not in the libc crate for every target (`asm/ptrace-abi.h`).
const PTRACE_SYSEMU: libc::c_uint = 31;
const SYSCALL_STOP: libc::c_int = libc::SIGTRAP | 0x80;
/// Length of the `SYSCALL` instruction.
const SYSCALL_LENGTH: u64 = 2;

/// How a tracee was resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resumed {
    /// Its next call stops it and is not made.
    Take,
    /// It stops at the end of the call that is not made.
    Leave,
    /// Its next call stops it and is made then.
    Pass,
}

/// Runs a command and all that it starts under the tracer; ends as it does.
///
/// # Errors
/// What the kernel says when it does not allow it.
pub(crate) fn main(command: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let words: Vec<CString> = command
        .into_iter()
        .map(|word| CString::new(word.into_vec()))
        .collect::<Result<_, _>>()?;
    let root = start(&words)?;
    let mut tracees = BTreeMap::from([(root, Resumed::Take)]);
    let mut code = ExitCode::FAILURE;
    wait(root)?;
    let options = libc::PTRACE_O_TRACESYSGOOD
        | libc::PTRACE_O_TRACECLONE
        | libc::PTRACE_O_TRACEFORK
        | libc::PTRACE_O_TRACEVFORK
        | libc::PTRACE_O_TRACEEXEC
        | libc::PTRACE_O_EXITKILL;
    request(libc::PTRACE_SETOPTIONS, root, options as usize)?;
    resume(root, Resumed::Take, 0);
    while !tracees.is_empty() {
        let (pid, status) = wait(-1)?;
        if libc::WIFSTOPPED(status) {
            on_stop(&mut tracees, pid, status);
            continue;
        }
        tracees.remove(&pid);
        if pid == root {
            code = ExitCode::from(if libc::WIFEXITED(status) {
                libc::WEXITSTATUS(status) as u8
            } else {
                128 + libc::WTERMSIG(status) as u8
            });
        }
    }
    Ok(code)
}

fn on_stop(tracees: &mut BTreeMap<libc::pid_t, Resumed>, pid: libc::pid_t, status: libc::c_int) {
    let signal = libc::WSTOPSIG(status);
    let is_event = status >> 16 != 0;
    let known = tracees.get(&pid).copied();
    let resumed = known.unwrap_or(Resumed::Take);
    let (next, signal) = match (resumed, signal) {
        (Resumed::Take, SYSCALL_STOP) => (take(pid), 0),
        (Resumed::Leave, SYSCALL_STOP) => (Resumed::Pass, 0),
        (Resumed::Pass, SYSCALL_STOP) => (Resumed::Take, 0),
        _ if is_event => (resumed, 0),
        // The first stop of a new one.
        (_, libc::SIGSTOP) if known.is_none() => (resumed, 0),
        (_, signal) => (resumed, signal),
    };
    tracees.insert(pid, next);
    resume(pid, next, signal);
}

/// Answers the call at which a tracee stands, or prepares it to be made after all.
fn take(pid: libc::pid_t) -> Resumed {
    // SAFETY: all zeros are registers.
    let mut registers: libc::user_regs_struct = unsafe { mem::zeroed() };
    let none = ptr::null_mut::<u8>();
    // SAFETY: the tracee is stopped; the kernel writes the structure.
    if unsafe { libc::ptrace(libc::PTRACE_GETREGS, pid, none, &raw mut registers) } != 0 {
        // Killed meanwhile.
        return Resumed::Take;
    }
    let next = match answer(registers.orig_rax, pid) {
        Some(result) => {
            registers.rax = result as u64;
            Resumed::Take
        }
        None => {
            registers.rax = registers.orig_rax;
            registers.rip -= SYSCALL_LENGTH;
            Resumed::Leave
        }
    };
    // SAFETY: as above; the kernel reads it.
    unsafe { libc::ptrace(libc::PTRACE_SETREGS, pid, none, &raw const registers) };
    next
}

/// The calls that are answered without being made.
fn answer(number: u64, pid: libc::pid_t) -> Option<i64> {
    match number as libc::c_long {
        libc::SYS_rseq => Some(-i64::from(libc::ENOSYS)),
        libc::SYS_gettid => Some(i64::from(pid)),
        _ => None,
    }
}

fn resume(pid: libc::pid_t, how: Resumed, signal: libc::c_int) {
    let how = match how {
        Resumed::Take => PTRACE_SYSEMU,
        Resumed::Leave | Resumed::Pass => libc::PTRACE_SYSCALL,
    };
    // One that was killed meanwhile is reported by `wait`.
    let _ = request(how, pid, signal as usize);
}

fn request(what: libc::c_uint, pid: libc::pid_t, data: usize) -> io::Result<()> {
    let none = ptr::null_mut::<u8>();
    // SAFETY: the requests made through this take a number.
    match unsafe { libc::ptrace(what, pid, none, data) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn wait(pid: libc::pid_t) -> io::Result<(libc::pid_t, libc::c_int)> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes the status.
        let pid = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
        if pid > 0 {
            return Ok((pid, status));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Starts the command, stopped before it becomes itself.
fn start(words: &[CString]) -> io::Result<libc::pid_t> {
    let mut arguments: Vec<_> = words.iter().map(|word| word.as_ptr()).collect();
    arguments.push(ptr::null());
    // SAFETY: this program has one thread; the child makes system calls only.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let none = ptr::null_mut::<u8>();
            // SAFETY: asks to be traced by the parent.
            unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, none, none) };
            // SAFETY: stops until the parent goes on.
            unsafe { libc::raise(libc::SIGSTOP) };
            // SAFETY: strings with their ends, and a list with its end; clap has made sure
            // that there is a word.
            unsafe { libc::execvp(arguments[0], arguments.as_ptr()) };
            // SAFETY: ends the child as a shell ends what it does not find.
            unsafe { libc::_exit(127) }
        }
        pid => Ok(pid),
    }
}
