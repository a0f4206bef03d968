//! Operations of several threads or processes, and whole commands.
#![expect(unsafe_code, reason = "fork, pipes, futexes")]

use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};
use std::ffi::CString;
use std::io;
use std::process::ExitCode;
use std::thread;

use crate::meter::{Meter, ticks};

fn last_error(what: &str) -> String {
    format!("{what}: {}", io::Error::last_os_error())
}

/// A thread that is made, ends at once, and is joined.
pub(crate) fn thread(meter: &Meter<'_>) -> Result<(), String> {
    meter.repeat(|| {
        let thread = thread::Builder::new().spawn(|| 7);
        let thread = thread.map_err(|error| format!("make a thread: {error}"))?;
        match thread.join() {
            Ok(7) => Ok(()),
            _ => Err("the thread gave something else".to_owned()),
        }
    })
}

/// Whose turn it is, as a futex.
static TURN: AtomicU32 = AtomicU32::new(MAIN);
const MAIN: u32 = 0;
const OTHER: u32 = 1;
const OVER: u32 = 2;

/// Two threads on one CPU that hand the turn to each other by a futex: two switches.
pub(crate) fn context_switch(meter: &Meter<'_>) -> Result<(), String> {
    stay_on_one_cpu();
    TURN.store(MAIN, Ordering::SeqCst);
    let other = thread::Builder::new().spawn(|| {
        loop {
            match wait_while(MAIN) {
                OVER => break,
                _ => hand_to(MAIN),
            }
        }
    });
    let other = other.map_err(|error| format!("make a thread: {error}"))?;
    let result = meter.repeat(|| {
        hand_to(OTHER);
        wait_while(OTHER);
        Ok(())
    });
    hand_to(OVER);
    other.join().map_err(|_| "the other thread panicked")?;
    result
}

/// Where the call is refused the threads are on as many CPUs as there are: still two waits
/// and two wakes.
fn stay_on_one_cpu() {
    // SAFETY: all zeros is an empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: asks for the CPU only.
    let cpu = unsafe { libc::sched_getcpu() };
    // SAFETY: sets a bit of the set; numbers out of range change nothing.
    unsafe { libc::CPU_SET(usize::try_from(cpu).unwrap_or(0), &mut set) };
    // SAFETY: the kernel reads the set.
    unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
}

fn hand_to(whom: u32) {
    TURN.store(whom, Ordering::SeqCst);
    let turn = TURN.as_ptr();
    // SAFETY: wakes who waits at a static.
    unsafe { libc::syscall(libc::SYS_futex, turn, libc::FUTEX_WAKE, 1) };
}

/// Waits for as long as the turn is somebody's; whose it is then.
fn wait_while(whose: u32) -> u32 {
    loop {
        let turn = TURN.load(Ordering::SeqCst);
        if turn != whose {
            return turn;
        }
        let forever = ptr::null::<libc::timespec>();
        // SAFETY: waits at a static.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                TURN.as_ptr(),
                libc::FUTEX_WAIT,
                whose,
                forever,
            )
        };
    }
}

/// A child that ends at once.
pub(crate) fn fork_wait(meter: &Meter<'_>) -> Result<(), String> {
    meter.repeat(|| child(|| ()).and_then(|child| wait_for(child).map(drop)))
}

/// A child that becomes another program, which ends at once.
pub(crate) fn fork_exec_wait(meter: &Meter<'_>) -> Result<(), String> {
    meter.repeat(|| {
        let program = c"/bin/true".as_ptr();
        let arguments = [program, ptr::null()];
        let child = child(|| {
            // SAFETY: strings with their ends, and a list with its end.
            unsafe { libc::execv(program, arguments.as_ptr()) };
            // SAFETY: ends the child as a shell ends what it does not find.
            unsafe { libc::_exit(127) };
        })?;
        wait_for(child).map(drop)
    })
}

/// Does `work` in a child, which then ends with 0.
fn child(work: impl FnOnce()) -> Result<libc::pid_t, String> {
    // SAFETY: this process has one thread; the child makes system calls only.
    match unsafe { libc::fork() } {
        -1 => Err(last_error("fork")),
        0 => {
            work();
            // SAFETY: ends the child without running what the parent registered.
            unsafe { libc::_exit(0) }
        }
        pid => Ok(pid),
    }
}

/// What a child used.
fn wait_for(child: libc::pid_t) -> Result<libc::rusage, String> {
    let mut status = 0;
    // SAFETY: all zeros are a value.
    let mut usage: libc::rusage = unsafe { mem::zeroed() };
    loop {
        // SAFETY: the kernel writes the status and what was used.
        let ended = unsafe { libc::wait4(child, &raw mut status, 0, &raw mut usage) };
        if ended == child {
            break;
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return Err(last_error("wait4"));
        }
    }
    match status {
        0 => Ok(usage),
        _ => Err(format!("the child ended with status {status:#x}")),
    }
}

/// A byte to another process and back, through two pipes.
pub(crate) fn ping_pong(meter: &Meter<'_>) -> Result<(), String> {
    let (there, back) = (pipe()?, pipe()?);
    let echo = child(|| {
        close(there[1]);
        close(back[0]);
        while read_byte(there[0]) && write_byte(back[1]) {}
    })?;
    close(there[0]);
    close(back[1]);
    let result = meter.repeat(|| {
        if write_byte(there[1]) && read_byte(back[0]) {
            Ok(())
        } else {
            Err(last_error("pass a byte through a pipe"))
        }
    });
    close(there[1]);
    close(back[0]);
    wait_for(echo)?;
    result
}

fn pipe() -> Result<[libc::c_int; 2], String> {
    let mut ends = [-1; 2];
    // SAFETY: the kernel writes both ends.
    match unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } {
        0 => Ok(ends),
        _ => Err(last_error("pipe2")),
    }
}

fn close(descriptor: libc::c_int) {
    // SAFETY: one of our own pipes' ends.
    unsafe { libc::close(descriptor) };
}

fn read_byte(from: libc::c_int) -> bool {
    let mut byte = 0_u8;
    // SAFETY: the kernel writes the byte.
    unsafe { libc::read(from, (&raw mut byte).cast(), 1) == 1 }
}

fn write_byte(to: libc::c_int) -> bool {
    let byte = 1_u8;
    // SAFETY: the kernel reads the byte.
    unsafe { libc::write(to, (&raw const byte).cast(), 1) == 1 }
}

/// Runs a command from start to end, and says what it took: ticks, and the peak of the
/// largest of its processes. This program is small, so that what a command inherits of it
/// before it becomes itself does not count.
pub(crate) fn run(command: &[&str]) -> ExitCode {
    let strings: Result<Vec<CString>, _> = command.iter().map(|word| CString::new(*word)).collect();
    let Ok(strings) = strings else {
        return ExitCode::from(2);
    };
    let mut arguments: Vec<_> = strings.iter().map(|word| word.as_ptr()).collect();
    let Some(&program) = arguments.first() else {
        return ExitCode::from(2);
    };
    arguments.push(ptr::null());
    let start = ticks();
    let outcome = child(|| {
        // SAFETY: strings with their ends, and a list with its end.
        unsafe { libc::execvp(program, arguments.as_ptr()) };
        // SAFETY: ends the child as a shell ends what it does not find.
        unsafe { libc::_exit(127) };
    })
    .and_then(wait_for);
    let taken = ticks() - start;
    match outcome {
        Ok(usage) => {
            println!("run {taken} {}", usage.ru_maxrss);
            ExitCode::SUCCESS
        }
        Err(reason) => {
            eprintln!("dune-operations: {reason}");
            ExitCode::FAILURE
        }
    }
}
