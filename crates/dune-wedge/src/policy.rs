//! What a compartment was given besides memory.

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::gate::Behind;
use crate::learn::Learned;

bitflags::bitflags! {
    /// What a compartment may do with a file descriptor.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FileRights: u32 {
        /// `read`, `pread64` (with [`SEEK`](Self::SEEK)), `recvfrom` without an address.
        const READ = 1;
        /// `write`, `pwrite64` (with [`SEEK`](Self::SEEK)), `sendto` without an address.
        const WRITE = 2;
        /// `lseek`, and reading and writing at a position.
        const SEEK = 4;
        /// `fstat`.
        const STAT = 8;
    }

    /// System calls that a compartment may make beyond those on its descriptors. There are no
    /// others: what the guard does not know how to check cannot be granted.
    ///
    /// Answered for every compartment, because they say and do nothing: `getpid` and `gettid`
    /// (1), `sched_yield`,
    /// `rt_sigprocmask`, `sigaltstack` and `munmap` (0). `exit` and `exit_group` end it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Calls: u32 {
        /// `clock_gettime`, `gettimeofday`, `time`.
        const CLOCKS = 1;
        /// `getrandom`.
        const RANDOM = 2;
    }
}

/// What happens when a compartment makes a system call that it was not given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnRefusal {
    /// It is ended.
    #[default]
    End,
    /// The call fails with `EPERM`, and it goes on. Meant for libraries that can do without.
    Errno,
}

/// A descriptor that was granted.
#[derive(Debug)]
pub(crate) struct File<'a> {
    pub(crate) fd: BorrowedFd<'a>,
    pub(crate) rights: FileRights,
}

/// A gate that was granted.
pub(crate) struct GateEntry<'a> {
    pub(crate) address: u64,
    pub(crate) name: &'static str,
    pub(crate) behind: Behind<'a>,
}

impl core::fmt::Debug for GateEntry<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_tuple("GateEntry").field(&self.name).finish()
    }
}

/// Everything but memory.
#[derive(Debug, Default)]
pub(crate) struct Policy<'a> {
    pub(crate) files: Vec<File<'a>>,
    pub(crate) calls: Calls,
    pub(crate) gates: Vec<GateEntry<'a>>,
    pub(crate) on_refusal: OnRefusal,
    /// In a run in which everything is allowed: what it used.
    pub(crate) learned: Option<Box<Learned>>,
}

impl Default for Calls {
    fn default() -> Self {
        Self::empty()
    }
}

impl Policy<'_> {
    /// Whether a descriptor may be used so.
    pub(crate) fn allows_file(&mut self, fd: u64, needed: FileRights) -> bool {
        if self.rights_of(fd).contains(needed) {
            return true;
        }
        let Some(learned) = &mut self.learned else {
            return false;
        };
        let rights = learned
            .files
            .entry(fd as i32)
            .or_insert(FileRights::empty());
        *rights |= needed;
        true
    }

    /// Whether calls may be made.
    pub(crate) fn allows_calls(&mut self, needed: Calls) -> bool {
        if self.calls.contains(needed) {
            return true;
        }
        let Some(learned) = &mut self.learned else {
            return false;
        };
        learned.calls |= needed;
        true
    }

    fn rights_of(&self, fd: u64) -> FileRights {
        self.files
            .iter()
            .filter(|file| i64::from(file.fd.as_raw_fd()) == i64::from(fd as i32))
            .fold(FileRights::empty(), |all, file| all | file.rights)
    }
}
