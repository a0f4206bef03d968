//! Descriptors: keeping the guard's out of the program's reach.

use std::os::fd::RawFd;
use std::sync::Arc;

use linux_raw_sys::general::{
    __NR_close, __NR_close_range, __NR_dup2, __NR_dup3, __NR_fcntl, __NR_openat, __NR_prlimit64,
    __NR_read, AT_FDCWD, F_DUPFD_CLOEXEC, F_GETFD, FD_CLOEXEC, O_CLOEXEC, O_RDONLY, RLIMIT_NOFILE,
};

use crate::calls::{forward, forward_always, own, own_mut};
use crate::guard::Guard;
use crate::host::{self, Errno, SysResult};
use crate::program::Program;
use crate::table::Args;

/// Flags of `close_range` (linux/close_range.h).
const CLOSE_RANGE_UNSHARE: u64 = 2;
const CLOSE_RANGE_CLOEXEC: u64 = 4;

/// Closes a descriptor that the program never saw.
pub(crate) fn close(fd: u64) {
    // Nothing can be done about an error, and the descriptor is gone anyway.
    let _ = forward_always(__NR_close, [fd, 0, 0, 0, 0, 0]);
}

/// A descriptor that no other thread of the program can put something else in the place of.
pub(crate) struct Held {
    fd: u64,
    /// Whose descriptor it is, if it is not the program's own.
    program: Option<Arc<Program>>,
}

impl Held {
    /// The program's own, where nobody could replace it, or it would not matter.
    pub(crate) fn as_it_is(fd: u64) -> Self {
        Self { fd, program: None }
    }

    /// A copy of one of the program's.
    ///
    /// # Errors
    ///
    /// `EBADF`, `EMFILE`.
    pub(crate) fn copy(program: &Arc<Program>, fd: u64) -> Result<Self, Errno> {
        Self::make(
            program,
            __NR_fcntl,
            [fd, u64::from(F_DUPFD_CLOEXEC), 0, 0, 0, 0],
        )
    }

    /// The file `path`, which ends with a zero, for reading.
    ///
    /// # Errors
    ///
    /// Those of `open`.
    pub(crate) fn open(program: &Arc<Program>, path: &str) -> Result<Self, Errno> {
        debug_assert!(path.ends_with('\0'));
        let flags = u64::from(O_RDONLY | O_CLOEXEC);
        let cwd = AT_FDCWD as i64 as u64;
        Self::make(
            program,
            __NR_openat,
            [cwd, own(path.as_bytes()), flags, 0, 0, 0],
        )
    }

    fn make(program: &Arc<Program>, nr: u32, args: Args) -> Result<Self, Errno> {
        let fd = program.take(|| forward_always(nr, args).map(|fd| fd as RawFd))?;
        Ok(Self {
            fd: fd as u64,
            program: Some(Arc::clone(program)),
        })
    }

    pub(crate) fn fd(&self) -> u64 {
        self.fd
    }

    /// As many bytes of the file as fit.
    ///
    /// # Errors
    ///
    /// Those of `read`.
    pub(crate) fn read<'a>(&self, bytes: &'a mut [u8]) -> Result<&'a [u8], Errno> {
        let len = bytes.len() as u64;
        let count = forward_always(__NR_read, [self.fd, own_mut(bytes), len, 0, 0, 0])?;
        Ok(bytes.get(..count as usize).unwrap_or_default())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(program) = &self.program {
            program.give_back(self.fd as RawFd, |fd| close(fd as u64));
        }
    }
}

/// Makes the call `NR`, which copies or replaces descriptors, while the guard
/// makes none: between the moment when a new one of the guard's has a number and
/// the moment when that number is known to be the guard's, another thread must
/// not get hold of it.
pub(crate) fn steadily<const NR: u32>(guard: &mut Guard, args: Args) -> SysResult {
    let hidden = guard.program.hidden_fds();
    // The second argument is a descriptor of `dup2` and `dup3` alone.
    let named = if NR == __NR_dup2 || NR == __NR_dup3 {
        2
    } else {
        1
    };
    if args[..named]
        .iter()
        .any(|&fd| hidden.binary_search(&(fd as RawFd)).is_ok())
    {
        return Err(Errno::EBADF);
    }
    forward(NR, args)
}

/// The range without the guard's descriptors.
///
/// `CLOSE_RANGE_UNSHARE` is taken as if the caller had the descriptors for
/// itself: threads that share nothing but memory are not there.
pub(crate) fn close_range(guard: &mut Guard, args: Args) -> SysResult {
    let [first, last, flags, ..] = args;
    let (first, last) = (first as u32, last as u32);
    if first > last || flags & !(CLOSE_RANGE_UNSHARE | CLOSE_RANGE_CLOEXEC) != 0 {
        return Err(Errno::EINVAL);
    }
    let flags = flags & CLOSE_RANGE_CLOEXEC;
    let hidden = guard.program.hidden_fds();
    for (first, last) in pieces(first, last, &hidden) {
        forward_always(
            __NR_close_range,
            [u64::from(first), u64::from(last), flags, 0, 0, 0],
        )?;
    }
    Ok(0)
}

/// `first..=last` without the numbers in `hidden`, which is sorted.
pub(crate) fn pieces(first: u32, last: u32, hidden: &[RawFd]) -> Vec<(u32, u32)> {
    let mut pieces = Vec::new();
    let mut start = Some(first);
    for &fd in hidden {
        let fd = fd as u32;
        let Some(from) = start.filter(|&from| from <= last) else {
            return pieces;
        };
        if fd < from || fd > last {
            continue;
        }
        if from < fd {
            pieces.push((from, fd - 1));
        }
        start = fd.checked_add(1);
    }
    if let Some(from) = start.filter(|&from| from <= last) {
        pieces.push((from, last));
    }
    pieces
}

/// Closes what `execve` closes, except what is the guard's.
pub(crate) fn close_on_exec(guard: &Guard) {
    let close_if_told = |fd: RawFd| {
        if guard.is_hidden_fd(fd) {
            return;
        }
        let get = [fd as u64, u64::from(F_GETFD), 0, 0, 0, 0];
        if let Ok(flags) = forward_always(__NR_fcntl, get)
            && flags & u64::from(FD_CLOEXEC) != 0
        {
            close(fd as u64);
        }
    };
    // The files of the new program may have taken the last numbers below the
    // limit. The other threads are gone, so none can use the room meanwhile.
    let fds = open_descriptors().or_else(|| host::with_hard_nofile(open_descriptors)?);
    match fds {
        Some(fds) => fds.into_iter().for_each(close_if_told),
        // None may be left over: try every number there can be, at one exit each.
        None => (0..most_descriptors()).for_each(close_if_told),
    }
}

/// All descriptors of the process, or `None` if it cannot be known: procfs is
/// not there, or the program has left no descriptor for the folder.
pub(crate) fn open_descriptors() -> Option<Vec<RawFd>> {
    // All numbers are taken down before anything is closed, so that the
    // folder's own descriptor is gone again by then.
    std::fs::read_dir("/proc/self/fd")
        .ok()?
        .map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

/// One past the highest number that a descriptor may have. The limit may have
/// been lowered since it was made, so this is at least the kernel's default
/// for the highest limit (`fs.nr_open`).
fn most_descriptors() -> RawFd {
    const NR_OPEN: u64 = 1 << 20;
    /// More cannot be tried in less than a second.
    const MOST: u64 = 1 << 24;
    let mut limit = [0_u64; 2];
    let get = [0, u64::from(RLIMIT_NOFILE), 0, own_mut(&mut limit), 0, 0];
    let hard = forward_always(__NR_prlimit64, get).map_or(0, |_| limit[1]);
    hard.clamp(NR_OPEN, MOST) as RawFd
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_descriptors_are_left_out_of_ranges() {
        assert_eq!(pieces(3, 10, &[]), [(3, 10)]);
        assert_eq!(
            pieces(3, u32::MAX, &[1000, 1001, 1005]),
            [(3, 999), (1002, 1004), (1006, u32::MAX)]
        );
        assert_eq!(pieces(5, 5, &[5]), []);
        assert_eq!(pieces(5, 7, &[3, 5, 7, 9]), [(6, 6)]);
        assert_eq!(pieces(u32::MAX, u32::MAX, &[4]), [(u32::MAX, u32::MAX)]);
    }
}
