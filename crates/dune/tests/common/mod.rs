//! What the ring 0 tests share: children, signals, mappings, and a look at the process.
#![allow(dead_code, reason = "each test target uses a part of it")]

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::ptr;
use std::time::{Duration, Instant};

/// Enters Dune mode and checks that it did.
#[track_caller]
pub(crate) fn enter() {
    dune::enter().expect("Dune mode can be entered");
    assert!(dune::is_inside());
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Exited(i32),
    Killed(i32),
    Stopped(i32),
    Continued,
}

/// Waits for a change of a child.
#[track_caller]
pub(crate) fn wait_with(pid: i32, options: i32) -> Ended {
    let mut status = 0;
    loop {
        let waited = unsafe { libc::waitpid(pid, &raw mut status, options) };
        if waited == pid {
            break;
        }
        assert_eq!(errno(), libc::EINTR, "waitpid({pid}) returned {waited}");
    }
    if libc::WIFEXITED(status) {
        Ended::Exited(libc::WEXITSTATUS(status))
    } else if libc::WIFSIGNALED(status) {
        Ended::Killed(libc::WTERMSIG(status))
    } else if libc::WIFSTOPPED(status) {
        Ended::Stopped(libc::WSTOPSIG(status))
    } else {
        Ended::Continued
    }
}

/// Waits for the end of a child.
#[track_caller]
pub(crate) fn wait(pid: i32) -> Ended {
    wait_with(pid, 0)
}

/// Forks a child that runs `body` and exits with its result, or with 101 if it panics.
#[track_caller]
pub(crate) fn fork(body: impl FnOnce() -> i32) -> i32 {
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork failed: {}", std::io::Error::last_os_error());
    if pid != 0 {
        return pid;
    }
    let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(101);
    let _ = std::io::stdout().flush();
    unsafe { libc::_exit(code) }
}

/// Runs `body` in a forked child, and waits for its end.
#[track_caller]
pub(crate) fn child(body: impl FnOnce() -> i32) -> Ended {
    wait(fork(body))
}

/// The same; what the child writes to standard error comes back too.
#[track_caller]
pub(crate) fn child_with_stderr(body: impl FnOnce() -> i32) -> (Ended, String) {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let pid = fork(|| {
        unsafe { libc::dup2(writer.as_raw_fd(), 2) };
        body()
    });
    drop(writer);
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    (wait(pid), String::from_utf8_lossy(&bytes).into_owned())
}

pub(crate) fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

pub(crate) type Action = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

/// Installs a handler of three arguments.
#[track_caller]
pub(crate) fn on_signal(signal: i32, flags: i32, handler: Action) {
    on_signal_masked(signal, flags, handler, &[]);
}

/// The same, with signals that are blocked while it runs.
#[track_caller]
pub(crate) fn on_signal_masked(signal: i32, flags: i32, handler: Action, blocked: &[i32]) {
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = flags | libc::SA_SIGINFO;
    action.sa_mask = set_of(blocked);
    let result = unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
    assert_eq!(result, 0, "sigaction({signal}): errno {}", errno());
}

/// Gives a signal its default action, or ignores it.
pub(crate) fn disposition(signal: i32, what: libc::sighandler_t) {
    unsafe { libc::signal(signal, what) };
}

pub(crate) fn set_of(signals: &[i32]) -> libc::sigset_t {
    let mut set = unsafe { std::mem::zeroed() };
    unsafe { libc::sigemptyset(&raw mut set) };
    for signal in signals {
        unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    set
}

pub(crate) fn change_mask(how: i32, signals: &[i32]) -> libc::sigset_t {
    let set = set_of(signals);
    let mut before = set_of(&[]);
    let result = unsafe { libc::pthread_sigmask(how, &raw const set, &raw mut before) };
    assert_eq!(result, 0);
    before
}

pub(crate) fn block(signals: &[i32]) {
    change_mask(libc::SIG_BLOCK, signals);
}

pub(crate) fn unblock(signals: &[i32]) {
    change_mask(libc::SIG_UNBLOCK, signals);
}

/// The signals that are blocked in the calling thread.
pub(crate) fn blocked() -> Vec<i32> {
    let set = change_mask(libc::SIG_BLOCK, &[]);
    (1..=64)
        .filter(|s| unsafe { libc::sigismember(&raw const set, *s) } == 1)
        .collect()
}

pub(crate) fn kill(pid: i32, signal: i32) {
    let result = unsafe { libc::kill(pid, signal) };
    assert_eq!(result, 0, "kill({pid}, {signal}): errno {}", errno());
}

pub(crate) fn raise(signal: i32) {
    assert_eq!(unsafe { libc::raise(signal) }, 0);
}

pub(crate) fn getpid() -> i32 {
    unsafe { libc::getpid() }
}

pub(crate) fn gettid() -> i32 {
    unsafe { libc::gettid() }
}

/// Starts or stops (0) a real-time interval timer that sends `SIGALRM`.
pub(crate) fn interval_timer(microseconds: i64) {
    let time = libc::timeval {
        tv_sec: 0,
        tv_usec: microseconds,
    };
    let timer = libc::itimerval {
        it_interval: time,
        it_value: time,
    };
    let result = unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, ptr::null_mut()) };
    assert_eq!(result, 0);
}

pub(crate) const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Maps anonymous private memory.
#[track_caller]
pub(crate) fn map(length: usize, rights: i32) -> *mut u8 {
    map_at(ptr::null_mut(), length, rights, 0)
}

#[track_caller]
pub(crate) fn map_at(at: *mut u8, length: usize, rights: i32, flags: i32) -> *mut u8 {
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let mapped = unsafe { libc::mmap(at.cast(), length, rights, flags, -1, 0) };
    assert_ne!(
        mapped,
        libc::MAP_FAILED,
        "mmap at {at:p}: errno {}",
        errno()
    );
    mapped.cast()
}

#[track_caller]
pub(crate) fn unmap(at: *mut u8, length: usize) {
    assert_eq!(unsafe { libc::munmap(at.cast(), length) }, 0);
}

#[track_caller]
pub(crate) fn protect(at: *mut u8, length: usize, rights: i32) {
    assert_eq!(unsafe { libc::mprotect(at.cast(), length, rights) }, 0);
}

/// How many descriptors the process has.
pub(crate) fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// How many vCPUs the process has.
pub(crate) fn vcpus() -> usize {
    descriptors_named("kvm-vcpu")
}

/// How many descriptors of the process have a name that contains `part`.
pub(crate) fn descriptors_named(part: &str) -> usize {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .filter(|target| target.to_string_lossy().contains(part))
        .count()
}

/// How many mappings the process has.
pub(crate) fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .count()
}

/// Waits until `condition` holds; fails the test after ten seconds.
#[track_caller]
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(30), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
