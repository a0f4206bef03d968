//! The descriptors of a snapshot: each is kept aside as a duplicate, which
//! shares everything with it but its number.
//!
//! The numbers themselves stay the program's: no descriptor of the guard is put
//! among them from then on ([`host::keep_free_below`]), even if the program
//! closes its own and lowers its limit.

#![expect(unsafe_code, reason = "a descriptor that was made a moment ago")]

use std::collections::BTreeMap;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};

use linux_raw_sys::general::{
    __NR_close, __NR_close_range, __NR_dup, __NR_fcntl, __NR_lseek, F_GETFD, F_GETFL, F_SETFL,
    FD_CLOEXEC, O_CLOEXEC, SEEK_CUR, SEEK_SET,
};

use super::watch::Watch;
use crate::calls::fd::{open_descriptors, pieces};
use crate::calls::forward_always;
use crate::host::{self, Errno, move_fd_high};
use crate::program::Program;

/// Standard output and standard error, which lead out of the sandbox: what was
/// written there stays, and so does where the next output goes.
const OUTPUTS: [RawFd; 2] = [1, 2];

/// See the module documentation.
#[derive(Debug, Default)]
pub(crate) struct Descriptors {
    kept: BTreeMap<RawFd, Kept>,
}

#[derive(Clone, Copy, Debug)]
struct Kept {
    copy: RawFd,
    /// `None` for what has none.
    offset: Option<u64>,
    /// `FD_*`.
    flags: u64,
    /// `O_*` of the open file.
    status: u64,
}

fn fcntl(fd: RawFd, command: u32, argument: u64) -> Result<u64, Errno> {
    let args = [fd as u64, u64::from(command), argument, 0, 0, 0];
    forward_always(__NR_fcntl, args)
}

fn seek(fd: RawFd, offset: u64, from: u32) -> Result<u64, Errno> {
    forward_always(__NR_lseek, [fd as u64, offset, u64::from(from), 0, 0, 0])
}

/// A duplicate of `fd` among the guard's descriptors.
///
/// # Errors
///
/// `EMFILE` above all.
pub(crate) fn keep(program: &Program, fd: RawFd) -> Result<RawFd, Errno> {
    program.take(|| {
        let copy = forward_always(__NR_dup, [fd as u64, 0, 0, 0, 0, 0])?;
        into_high(copy as RawFd)
    })
}

/// Moves a descriptor that nobody knows yet among the guard's.
pub(crate) fn into_high(fd: RawFd) -> Result<RawFd, Errno> {
    let owned = own(fd);
    let moved = move_fd_high(owned).map_err(|error| Errno::of(&error))?;
    Ok(moved.into_raw_fd())
}

fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the callers have just made it, and nobody knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

impl Descriptors {
    /// Keeps every descriptor of the program. Costs five host calls for each.
    ///
    /// # Errors
    ///
    /// `EMFILE` for one that could not be given back, as it is above the hard
    /// limit, or what the host kernel said; nothing is kept then.
    pub(crate) fn take(program: &Program) -> Result<Self, Errno> {
        let mut all = Self::default();
        let open = open_descriptors().ok_or(Errno::ENOENT)?;
        let mut open: Vec<RawFd> = {
            let hidden = program.hidden_fds();
            let is_programs = |fd: &RawFd| hidden.binary_search(fd).is_err();
            open.into_iter().filter(is_programs).collect()
        };
        // The folder's own is gone again by now.
        open.retain(|&fd| fcntl(fd, F_GETFD, 0).is_ok());
        if let Some(&highest) = open.iter().max() {
            if highest as u64 >= host::most_descriptors() {
                return Err(Errno::EMFILE);
            }
            host::keep_free_below(highest + 1);
        }
        for fd in open {
            let Ok(flags) = fcntl(fd, F_GETFD, 0) else {
                continue;
            };
            let status = fcntl(fd, F_GETFL, 0).unwrap_or(0);
            let offset = seek(fd, 0, SEEK_CUR).ok();
            match keep(program, fd) {
                Ok(copy) => all.kept.insert(
                    fd,
                    Kept {
                        copy,
                        offset,
                        flags,
                        status,
                    },
                ),
                Err(errno) => {
                    all.give_up(program);
                    return Err(errno);
                }
            };
        }
        Ok(all)
    }

    /// Closes what was kept.
    pub(crate) fn give_up(self, program: &Program) {
        for kept in self.kept.into_values() {
            program.give_back(kept.copy, host::close);
        }
    }

    /// Gives the program the descriptors it had. Costs a host call for each
    /// whose offset may have moved, and some for each that was opened, closed
    /// or replaced.
    ///
    /// # Errors
    ///
    /// What the host kernel said; `EBUSY` if the guard has taken a number that
    /// belongs to the program, which must not happen.
    pub(crate) fn restore(&self, program: &Program, watch: &Watch) -> Result<(), Errno> {
        // Nobody makes descriptors meanwhile.
        let hidden = program.hidden_fds();
        let replace = |fd: RawFd, kept: &Kept| {
            if hidden.binary_search(&fd).is_ok() {
                return Err(Errno::EBUSY);
            }
            replace(fd, kept)
        };
        let mut moved = watch.moved.clone();
        if watch.any_descriptor {
            let mut spared: Vec<RawFd> = hidden.iter().copied().collect();
            spared.extend(self.kept.keys());
            spared.sort_unstable();
            spared.dedup();
            for (first, last) in pieces(0, u32::MAX, &spared) {
                forward_always(
                    __NR_close_range,
                    [u64::from(first), u64::from(last), 0, 0, 0, 0],
                )?;
            }
            for (&fd, kept) in &self.kept {
                replace(fd, kept)?;
            }
            moved.extend(self.kept.keys());
        }
        for &fd in &watch.replaced {
            match self.kept.get(&fd) {
                Some(kept) => {
                    replace(fd, kept)?;
                    moved.insert(fd);
                }
                None if hidden.binary_search(&fd).is_err() => {
                    // It may be closed already.
                    let _ = forward_always(__NR_close, [fd as u64, 0, 0, 0, 0, 0]);
                }
                None => {}
            }
        }
        for fd in moved.into_iter().filter(|fd| !OUTPUTS.contains(fd)) {
            if let Some(offset) = self.kept.get(&fd).and_then(|kept| kept.offset) {
                // A file that cannot go back any more is no reason to give up.
                let _ = seek(fd, offset, SEEK_SET);
            }
        }
        Ok(())
    }
}

fn replace(fd: RawFd, kept: &Kept) -> Result<(), Errno> {
    let cloexec = if kept.flags & u64::from(FD_CLOEXEC) != 0 {
        u64::from(O_CLOEXEC)
    } else {
        0
    };
    host::duplicate_to(kept.copy, fd, cloexec)?;
    if fcntl(fd, F_GETFL, 0) != Ok(kept.status) {
        let _ = fcntl(fd, F_SETFL, kept.status);
    }
    Ok(())
}
