//! What all threads of a program share.
//!
//! One [`Program`] for each process, and a [`Guard`](crate::guard::Guard) for each of its
//! threads. Locks are held for bookkeeping alone, never while a call of the program may wait:
//!
//! | lock | guards | held |
//! |---|---|---|
//! | `fds` | which descriptors are the guard's | to look; shared across calls that replace or copy a descriptor; exclusively while the guard makes one |
//! | `memory` | areas, heap, placement | shared across a copy or an `admit`; exclusively across a change of mappings, with the host's part of it |
//! | `dispositions` | what signals do | across the change of the host's disposition too |
//! | `process` | names, limits | to look or change |
//!
//! In this order, from top to bottom, where more than one is taken.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::calls::memory::Space;
use crate::calls::process::Process;
use crate::guard::MissingCall;
use crate::host::Errno;
use crate::policy::enforced::Enforced;
use crate::signal::Dispositions;
use crate::table;
use crate::vma::Areas;

/// The program's memory, as the guard keeps account of it.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// What is mapped.
    pub(crate) areas: Areas,
    /// Where it grows.
    pub(crate) space: Space,
}

impl Memory {
    /// Memory with these areas.
    #[must_use]
    pub fn new(areas: Areas) -> Self {
        Self {
            areas,
            space: Space::default(),
        }
    }
}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Program {
    fds: RwLock<Vec<RawFd>>,
    memory: RwLock<Memory>,
    dispositions: Mutex<Dispositions>,
    process: RwLock<Process>,
    missing: Mutex<BTreeMap<u32, u64>>,
    policy: Enforced,
    crash_report: Option<Arc<File>>,
    pid: AtomicU32,
}

impl Program {
    pub(crate) fn new(dispositions: Dispositions, mut hidden_fds: Vec<RawFd>) -> Self {
        hidden_fds.sort_unstable();
        Self {
            fds: RwLock::new(hidden_fds),
            memory: RwLock::default(),
            dispositions: Mutex::new(dispositions),
            process: RwLock::new(Process::of_this_process()),
            missing: Mutex::default(),
            policy: Enforced::unrestricted(),
            crash_report: None,
            pid: AtomicU32::new(std::process::id()),
        }
    }

    /// Sets what the program may do, before it runs.
    pub(crate) fn set_policy(&mut self, policy: Enforced) {
        let fds = self.fds.get_mut().unwrap_or_else(PoisonError::into_inner);
        fds.extend(policy.fd());
        fds.sort_unstable();
        self.policy = policy;
    }

    /// Has the program's death by a signal described there.
    pub(crate) fn set_crash_report(&mut self, file: Arc<File>) {
        let fds = self.fds.get_mut().unwrap_or_else(PoisonError::into_inner);
        fds.push(file.as_raw_fd());
        fds.sort_unstable();
        self.crash_report = Some(file);
    }

    /// Where the program's death by a signal is described, if that was asked
    /// for.
    pub(crate) fn crash_report(&self) -> Option<&File> {
        self.crash_report.as_deref()
    }

    /// What the program may do.
    pub(crate) fn policy(&self) -> &Enforced {
        &self.policy
    }

    /// Has `make` make a descriptor, which is the guard's from the first
    /// moment until [`Program::give_back`].
    ///
    /// # Errors
    ///
    /// Those of `make`.
    pub(crate) fn take(&self, make: impl FnOnce() -> Result<RawFd, Errno>) -> Result<RawFd, Errno> {
        let mut fds = self.fds.write().unwrap_or_else(PoisonError::into_inner);
        let fd = make()?;
        let at = fds.partition_point(|&other| other < fd);
        fds.insert(at, fd);
        Ok(fd)
    }

    /// Has `close` close a descriptor of the guard.
    pub(crate) fn give_back(&self, fd: RawFd, close: impl FnOnce(RawFd)) {
        let mut fds = self.fds.write().unwrap_or_else(PoisonError::into_inner);
        if let Ok(at) = fds.binary_search(&fd) {
            fds.remove(at);
        }
        close(fd);
    }

    /// The process's id, the same for the program and the host.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }

    /// The lock itself, for [`UserMemory`](crate::user::UserMemory).
    pub(crate) fn memory_lock(&self) -> &RwLock<Memory> {
        &self.memory
    }

    /// The memory, which stays as it is until this is dropped.
    pub(crate) fn memory(&self) -> RwLockReadGuard<'_, Memory> {
        self.memory.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory, to be changed together with the host's mappings.
    pub(crate) fn memory_mut(&self) -> RwLockWriteGuard<'_, Memory> {
        self.memory.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// What signals do.
    pub(crate) fn dispositions(&self) -> MutexGuard<'_, Dispositions> {
        self.dispositions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// What the process is called, and its limits.
    pub(crate) fn process(&self) -> RwLockReadGuard<'_, Process> {
        self.process.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Program::process`], to be changed.
    pub(crate) fn process_mut(&self) -> RwLockWriteGuard<'_, Process> {
        self.process.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The descriptors that the program must not touch, sorted. While this is held, the guard
    /// makes none.
    pub(crate) fn hidden_fds(&self) -> RwLockReadGuard<'_, Vec<RawFd>> {
        self.fds.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call that the guard does not have.
    pub(crate) fn count_missing(&self, nr: u32) {
        // Numbers are the program's choice: do not let them fill memory.
        const MOST: usize = 1024;
        let mut missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        if missing.len() < MOST || missing.contains_key(&nr) {
            *missing.entry(nr).or_insert(0) += 1;
        }
    }

    /// Calls that the program made and the guard does not have.
    pub(crate) fn missing_calls(&self) -> Vec<MissingCall> {
        let missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        missing
            .iter()
            .map(|(&nr, &count)| MissingCall {
                nr,
                name: table::find(nr).map(|call| call.name),
                count,
            })
            .collect()
    }
}
