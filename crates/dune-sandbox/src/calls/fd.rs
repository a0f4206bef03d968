//! Descriptors: keeping the guard's out of the program's reach.

use std::os::fd::RawFd;

use linux_raw_sys::general::{__NR_close, __NR_close_range, __NR_fcntl, F_GETFD, FD_CLOEXEC};

use crate::calls::forward_always;
use crate::guard::Guard;
use crate::host::{Errno, SysResult};
use crate::table::Args;

/// Flags of `close_range` (linux/close_range.h).
const CLOSE_RANGE_UNSHARE: u64 = 2;
const CLOSE_RANGE_CLOEXEC: u64 = 4;

/// Closes a descriptor that the program never saw.
pub(crate) fn close(fd: u64) {
    // Nothing can be done about an error, and the descriptor is gone anyway.
    let _ = forward_always(__NR_close, [fd, 0, 0, 0, 0, 0]);
}

/// The range without the guard's descriptors.
pub(crate) fn close_range(guard: &mut Guard, args: Args) -> SysResult {
    let [first, last, flags, ..] = args;
    let (first, last) = (first as u32, last as u32);
    if first > last || flags & !(CLOSE_RANGE_UNSHARE | CLOSE_RANGE_CLOEXEC) != 0 {
        return Err(Errno::EINVAL);
    }
    // One thread: there is nobody to share the descriptors with.
    let flags = flags & CLOSE_RANGE_CLOEXEC;
    for (first, last) in pieces(first, last, guard.hidden_fds()) {
        forward_always(
            __NR_close_range,
            [u64::from(first), u64::from(last), flags, 0, 0, 0],
        )?;
    }
    Ok(0)
}

/// `first..=last` without the numbers in `hidden`, which is sorted.
fn pieces(first: u32, last: u32, hidden: &[RawFd]) -> Vec<(u32, u32)> {
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

/// Closes what `execve` closes, except `kept`, which the guard still needs.
pub(crate) fn close_on_exec(guard: &Guard, kept: &[RawFd]) {
    let Ok(folder) = std::fs::read_dir("/proc/self/fd") else {
        return;
    };
    // First all numbers, so that the folder's own descriptor is gone again
    // before anything is closed.
    let fds: Vec<RawFd> = folder
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for fd in fds {
        if guard.is_hidden_fd(fd) || kept.contains(&fd) {
            continue;
        }
        let get = [fd as u64, u64::from(F_GETFD), 0, 0, 0, 0];
        if let Ok(flags) = forward_always(__NR_fcntl, get)
            && flags & u64::from(FD_CLOEXEC) != 0
        {
            close(fd as u64);
        }
    }
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
