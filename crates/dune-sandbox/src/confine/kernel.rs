//! What this kernel can confine.

#![expect(unsafe_code, reason = "asks the kernel by raw calls")]

use linux_raw_sys::general::{__NR_landlock_create_ruleset, __NR_seccomp};

use crate::host::{Errno, syscall};

/// What the kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Landlock's ABI, 0 for none.
    pub landlock: u32,
    /// Whether system calls can be filtered.
    pub seccomp: bool,
}

impl Kernel {
    /// This machine's.
    #[must_use]
    pub fn this() -> Self {
        const LANDLOCK_CREATE_RULESET_VERSION: u64 = 1;
        const SECCOMP_SET_MODE_FILTER: u64 = 1;
        const SECCOMP_FILTER_FLAG_TSYNC: u64 = 1;
        let version = [0, 0, LANDLOCK_CREATE_RULESET_VERSION, 0, 0, 0];
        // SAFETY: without a ruleset the call only answers.
        let landlock = unsafe { syscall(__NR_landlock_create_ruleset, version) };
        let null = [
            SECCOMP_SET_MODE_FILTER,
            SECCOMP_FILTER_FLAG_TSYNC,
            0,
            0,
            0,
            0,
        ];
        // SAFETY: with a null filter the call fails, by EFAULT where there are
        // filters.
        let seccomp = unsafe { syscall(__NR_seccomp, null) };
        Self {
            landlock: landlock.map_or(0, |abi| abi as u32),
            seccomp: seccomp == Err(Errno::EFAULT),
        }
    }
}
