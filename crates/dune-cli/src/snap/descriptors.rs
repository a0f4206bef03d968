//! Descriptors that stand in for others.
#![expect(unsafe_code, reason = "memfd_create, dup2 and close")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use anyhow::Context;
use dune_sandbox::host::move_fd_high;

/// A file in memory, empty, out of the program's way.
///
/// # Errors
///
/// If there is no descriptor left.
pub(super) fn memory_file() -> anyhow::Result<File> {
    // SAFETY: the name ends with a zero byte; the call makes a descriptor.
    let fd = unsafe { libc::memfd_create(c"input".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error()).context("cannot make a file in memory");
    }
    // SAFETY: made above, and nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let fd = move_fd_high(fd).context("cannot keep a descriptor")?;
    Ok(fd.into())
}

/// A duplicate of `fd`, out of the program's way.
///
/// # Errors
///
/// If there is no descriptor left.
pub(super) fn aside(fd: impl AsFd) -> io::Result<File> {
    let copy = fd.as_fd().try_clone_to_owned()?;
    Ok(move_fd_high(copy)?.into())
}

/// As [`aside`], of a descriptor that may not be there.
///
/// # Errors
///
/// `EBADF` if it is not; or if there is no descriptor left.
pub(super) fn aside_of(number: RawFd) -> io::Result<File> {
    // SAFETY: duplicates a descriptor, if there is one.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: made above, and nobody else's.
    let copy = unsafe { OwnedFd::from_raw_fd(copy) };
    Ok(move_fd_high(copy)?.into())
}

/// Makes standard input what `file` holds, opened anew for reading alone.
///
/// # Errors
///
/// If it cannot be opened again.
pub(super) fn become_stdin(file: &File) -> anyhow::Result<()> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let reading = File::open(path).context("cannot open a file in memory again")?;
    // SAFETY: replaces descriptor 0, which nothing of this process holds as its
    // own; the runtime's `Stdin` only names it.
    let result = unsafe { libc::dup2(reading.as_raw_fd(), 0) };
    if result < 0 {
        return Err(io::Error::last_os_error()).context("cannot replace standard input");
    }
    Ok(())
}

/// Closes a descriptor that the program is not to have.
pub(super) fn close(number: RawFd) {
    // SAFETY: a descriptor that this process was started with and that nothing
    // of it holds as its own.
    unsafe { libc::close(number) };
}

/// Closes what this process was started with, but for the standard three: who
/// resumes the program does not have it. Everything that this process opened
/// itself would be closed by `execve`.
///
/// # Errors
///
/// If `/proc` cannot be read.
pub(super) fn close_inherited() -> anyhow::Result<()> {
    let folder = std::fs::read_dir("/proc/self/fd").context("cannot read /proc/self/fd")?;
    let open: Vec<RawFd> = folder
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|&fd| fd > 2)
        .collect();
    for fd in open {
        // SAFETY: asks for a flag of a descriptor.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
        if flags >= 0 && flags & libc::FD_CLOEXEC == 0 {
            close(fd);
        }
    }
    Ok(())
}
