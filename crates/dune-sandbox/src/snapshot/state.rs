//! What a snapshot holds beside memory: registers, signals, descriptors, and
//! the few things of the process that calls change.

use std::os::fd::RawFd;
use std::sync::Arc;

use linux_raw_sys::general::{
    __NR_fchdir, __NR_getitimer, __NR_kill, __NR_openat, __NR_prctl, __NR_prlimit64,
    __NR_rt_sigpending, __NR_rt_sigtimedwait, __NR_setitimer, __NR_umask, __NR_wait4, AT_FDCWD,
    O_CLOEXEC, O_DIRECTORY, O_PATH, RLIM_NLIMITS, SIGKILL, WNOHANG,
};
use linux_raw_sys::prctl::{PR_GET_NAME, PR_SET_NAME};

use super::descriptors::{Descriptors, into_high};
use super::watch::Watch;
use crate::calls::process::{Limit, Process};
use crate::calls::{forward_always, own, own_mut};
use crate::engine::{EngineError, UserState};
use crate::guard::Guard;
use crate::host::{self as host_calls, Errno};
use crate::program::Program;
use crate::signal::{Dispositions, SIGNALS, SigSet, ThreadSignals, host, record};

const TIMERS: usize = 3;

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) user: UserState,
    pub(crate) xstate: Vec<u8>,
    pub(crate) signals: ThreadSignals,
    pub(crate) clear_child_tid: u64,
    pub(crate) robust_list: u64,
    pub(crate) dispositions: Dispositions,
    pub(crate) descriptors: Descriptors,
    process: Process,
    name: [u8; 16],
    directory: RawFd,
    umask: u64,
    /// As the host process has them, by number.
    limits: [Limit; RLIM_NLIMITS as usize],
    timers: [[u64; 4]; TIMERS],
    pending: SigSet,
    /// What the program had done between the snapshot before this one and this
    /// one.
    pub(crate) before: Watch,
}

/// Why the state of a program could not be taken or given back.
#[derive(Debug)]
pub(crate) enum StateError {
    Host(&'static str, Errno),
    Engine(EngineError),
}

impl State {
    /// Takes the state of the program, whose one thread is `guard`'s.
    pub(crate) fn take(guard: &mut Guard, user: &UserState) -> Result<Self, StateError> {
        let program = Arc::clone(&guard.program);
        let mut xstate = vec![0; guard.engine.xstate_len()];
        guard
            .engine
            .save_xstate(&mut xstate)
            .map_err(StateError::Engine)?;
        let directory = directory(&program).map_err(failed("the working directory"))?;
        let mut timers = [[0; 4]; TIMERS];
        for (which, timer) in timers.iter_mut().enumerate() {
            // It cannot fail with these arguments.
            let _ = forward_always(__NR_getitimer, [which as u64, own_mut(timer), 0, 0, 0, 0]);
        }
        let umask = forward_always(__NR_umask, [0; 6]).unwrap_or(0);
        set_umask(umask);
        let mut name = [0; 16];
        let get = [u64::from(PR_GET_NAME), own_mut(&mut name), 0, 0, 0, 0];
        let _ = forward_always(__NR_prctl, get);
        let mut limits = [[0; 2]; RLIM_NLIMITS as usize];
        for (resource, limit) in limits.iter_mut().enumerate() {
            let get = [0, resource as u64, 0, own_mut(limit), 0, 0];
            forward_always(__NR_prlimit64, get).map_err(failed("a resource limit"))?;
        }
        let descriptors = Descriptors::take(&program).map_err(failed("a descriptor"))?;
        let tid = guard.tid;
        let dispositions = program.dispositions().clone();
        let process = program.process().clone();
        let member = program.threads.member(tid).unwrap_or_default();
        Ok(Self {
            user: *user,
            xstate,
            signals: guard.signals,
            clear_child_tid: guard.clear_child_tid,
            robust_list: member.robust_list,
            dispositions,
            descriptors,
            process,
            name,
            directory,
            umask,
            limits,
            timers,
            pending: pending(),
            before: program.watch_taken(),
        })
    }

    /// Gives the program all of it back. Host calls are made for what `watch`
    /// names, and where signals may wait: those come from anywhere.
    pub(crate) fn restore(
        &self,
        guard: &mut Guard,
        user: &mut UserState,
        watch: &Watch,
    ) -> Result<(), StateError> {
        let program = Arc::clone(&guard.program);
        if !watch.is_empty() {
            self.restore_process(&program, watch)?;
        }
        restore_dispositions(&program, &self.dispositions);
        guard.clear_child_tid = self.clear_child_tid;
        let tid = guard.tid;
        program
            .threads
            .update(tid, |member| member.robust_list = self.robust_list);
        *user = self.user;
        guard
            .engine
            .load_xstate(&self.xstate)
            .map_err(StateError::Engine)?;
        // Only what is blocked waits.
        if guard.signals.mask != 0 || guard.all_blocked {
            forget_signals(pending() & !self.pending);
        }
        let disturbed = record::is_disturbed();
        // What the run that ended was about to be told.
        if record::take().is_some() {
            // Since that came all are blocked, and others may wait behind it.
            forget_signals(pending() & !self.pending);
        }
        if disturbed || guard.signals.mask != self.signals.mask || guard.all_blocked {
            host::set_mask(self.signals.mask);
        }
        guard.all_blocked = false;
        guard.signals = self.signals;
        Ok(())
    }

    fn restore_process(&self, program: &Program, watch: &Watch) -> Result<(), StateError> {
        for &child in &watch.children {
            end_child(child);
        }
        if watch.limits {
            // Before descriptors, whose numbers are limited.
            self.restore_limits().map_err(failed("a resource limit"))?;
        }
        self.descriptors
            .restore(program, watch)
            .map_err(failed("a descriptor"))?;
        if watch.directory {
            forward_always(__NR_fchdir, [self.directory as u64, 0, 0, 0, 0, 0])
                .map_err(failed("the working directory"))?;
        }
        if watch.umask {
            set_umask(self.umask);
        }
        if watch.timers {
            for (which, timer) in self.timers.iter().enumerate() {
                let _ = forward_always(__NR_setitimer, [which as u64, own(timer), 0, 0, 0, 0]);
            }
        }
        if watch.process {
            program.process_mut().clone_from(&self.process);
            let set = [u64::from(PR_SET_NAME), own(&self.name), 0, 0, 0, 0];
            let _ = forward_always(__NR_prctl, set);
        }
        Ok(())
    }

    /// Gives back the resource limits of the host process.
    ///
    /// # Errors
    ///
    /// What the host kernel said; no hard limit was lowered since, so that there
    /// is no reason for it.
    pub(crate) fn restore_limits(&self) -> Result<(), Errno> {
        for (resource, limit) in self.limits.iter().enumerate() {
            let resource = resource as u64;
            let mut now: Limit = [0; 2];
            forward_always(__NR_prlimit64, [0, resource, 0, own_mut(&mut now), 0, 0])?;
            if now != *limit {
                forward_always(__NR_prlimit64, [0, resource, own(limit), 0, 0, 0])?;
            }
        }
        Ok(())
    }

    /// Gives up what is kept in the host process.
    pub(crate) fn give_up(self, program: &Program) {
        program.give_back(self.directory, host_calls::close);
        self.descriptors.give_up(program);
    }
}

fn failed(what: &'static str) -> impl Fn(Errno) -> StateError {
    move |errno| StateError::Host(what, errno)
}

fn directory(program: &Program) -> Result<RawFd, Errno> {
    program.take(|| {
        let here = b".\0";
        let flags = u64::from(O_PATH | O_DIRECTORY | O_CLOEXEC);
        let args = [AT_FDCWD as i64 as u64, own(here), flags, 0, 0, 0];
        into_high(forward_always(__NR_openat, args)? as RawFd)
    })
}

fn set_umask(mask: u64) {
    let _ = forward_always(__NR_umask, [mask, 0, 0, 0, 0, 0]);
}

/// Signals that wait, because they are blocked.
fn pending() -> SigSet {
    let mut set: SigSet = 0;
    let len = size_of_val(&set) as u64;
    let _ = forward_always(__NR_rt_sigpending, [own_mut(&mut set), len, 0, 0, 0, 0]);
    set
}

/// Takes signals that wait, for nobody.
fn forget_signals(set: SigSet) {
    let no_time = [0_u64; 2];
    let len = size_of_val(&set) as u64;
    for _ in 0..2 * SIGNALS {
        let args = [own(&set), 0, own(&no_time), len, 0, 0];
        if set == 0 || forward_always(__NR_rt_sigtimedwait, args).is_err() {
            return;
        }
    }
}

/// Ends a child that the run made, if it is still one.
fn end_child(pid: u32) {
    let pid = u64::from(pid);
    let wait = |flags: u32| forward_always(__NR_wait4, [pid, 0, u64::from(flags), 0, 0, 0]);
    if wait(WNOHANG) == Ok(0) {
        // Still there, and nobody else's: the number cannot be another's.
        let _ = forward_always(__NR_kill, [pid, u64::from(SIGKILL), 0, 0, 0, 0]);
        while wait(0) == Err(Errno::EINTR) {}
    }
}

fn restore_dispositions(program: &Program, wanted: &Dispositions) {
    let mut now = program.dispositions();
    if *now == *wanted {
        return;
    }
    for signal in 1..=SIGNALS {
        let action = wanted.action(signal);
        if now.action(signal) != action {
            now.set_action(signal, action);
            // As it could be set once.
            let _ = host::install(signal, &action);
        }
    }
}
