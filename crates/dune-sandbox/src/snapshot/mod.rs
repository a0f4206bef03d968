//! Snapshots of the program, to return to any number of times.
//!
//! A [`Service`] is told when the program reaches a [`Marker`] and when it
//! ends. It may take a snapshot at the first, and return to it at the second,
//! with the program none the wiser:
//!
//! ```text
//!            Marker                  Ended
//!  start ------+------- a run --------+
//!              |  push                |  restore, other input
//!              +<---------------------+
//! ```
//!
//! ```no_run
//! use dune_sandbox::snapshot::{Event, Marker, Next, Service, Stopped};
//! use dune_sandbox::{Command, End};
//!
//! /// Runs the program's second half three times.
//! struct Thrice(u32);
//!
//! impl Service for Thrice {
//!     fn event(&mut self, event: Event, program: &mut Stopped<'_>) -> Next {
//!         let done = match event {
//!             Event::Marker if program.depth() == 0 => program.push().map(drop),
//!             Event::Marker => Ok(()),
//!             Event::Ended(_) if self.0 == 3 => return Next::Finish(End::Exit(0)),
//!             Event::Ended(_) => {
//!                 self.0 += 1;
//!                 program.restore().map(drop)
//!             }
//!         };
//!         done.map_or(Next::Finish(End::Exit(125)), |()| Next::Continue)
//!     }
//! }
//!
//! let engine = dune_sandbox::engine::on_host::OnHost::new()?;
//! let command = Command::new("sort").serve(Marker::ReadStdin, Box::new(Thrice(1)));
//! command.run(Box::new(engine))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What comes back
//!
//! - Private memory: contents, rights, and what is mapped, to the byte; the
//!   program break. However it was changed: by the program, by the guard, or by
//!   the host kernel for a call of the program.
//! - General and extended registers, segment bases.
//! - Signals: mask, handlers, alternate stack; signals that wait because they
//!   are blocked and were not waiting at the snapshot are discarded, whoever sent
//!   them. Interval timers (`setitimer`, `alarm`) are set as they were.
//! - Descriptors: those opened since are closed, those closed or replaced come
//!   back, with their flags and their file's offset. Standard output and error
//!   keep their offset: what was written there stays.
//! - Working directory, umask, resource limits and names. While there is a
//!   snapshot, no hard limit can be lowered (`EPERM`), for it could not be raised
//!   again; the service is told of the end of a run with the limits of the
//!   snapshot in force.
//! - Threads made since are ended; processes made since are killed and
//!   reaped.
//!
//! # What does not
//!
//! Whatever others can see: contents of files and of shared memory, what went
//! through pipes and sockets, counters of eventfds, timers of `timer_create`,
//! file locks; what children of children do. Clocks go on.
//!
//! A snapshot can be taken while the program has one thread, the one whose id
//! is the process's: [`SnapshotError::Threads`].
//!
//! # Signals that end the program
//!
//! While a program is served, a signal whose default action is to end it
//! (`SIGABRT`, `SIGALRM`, ...) ends the run, not this process, except for those
//! by which people end programs: `SIGHUP`, `SIGINT`, `SIGQUIT`, `SIGTERM` from
//! outside, and `SIGKILL`.

mod descriptors;
mod image;
pub(crate) mod memory;
mod ranges;
mod resume;
mod save;
mod state;
mod symbol;
pub(crate) mod watch;

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use linux_raw_sys::general::{
    __NR_clone, __NR_close, __NR_dup3, __NR_fork, __NR_prctl, __NR_pread64, __NR_read, __NR_readv,
    __NR_rt_sigaction, __NR_rt_sigprocmask, __NR_set_robust_list, CLONE_CHILD_CLEARTID,
    CLONE_CHILD_SETTID, SIGCHLD,
};

pub use self::image::{Header, ResumeError};
pub use self::memory::Restored;
pub(crate) use self::resume::Resumed;
pub use self::save::{SaveError, Saved};
pub(crate) use self::state::State;
use self::state::StateError;
pub(crate) use self::symbol::Breakpoint;
pub use self::symbol::SymbolError;
use self::watch::Watch;
use crate::calls::{Answer, forward_always};
use crate::engine::{EngineError, Trap, UserState};
use crate::guard::{End, Guard, Resume};
use crate::host::Errno;
use crate::program::Program;
use crate::range::PageRange;
use crate::signal::{Disposition, SIGNALS, host};
use crate::table::{Args, Call};

/// The `prctl` option by which a program says that it is where snapshots
/// should be taken: "dune", which no kernel knows. Elsewhere the call fails
/// with `EINVAL` and does nothing; here it returns 0.
pub const MARKER_OPTION: u32 = 0x6475_6e65;

/// Where the program stops for its [`Service`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Marker {
    /// Just before its first read from standard input (`read`, `readv` or
    /// `pread64` of descriptor 0), once.
    ReadStdin,
    /// After each `prctl(`[`MARKER_OPTION`]`)`.
    ///
    /// This one and all others count on the program's first thread, the one whose
    /// id is the process's; another thread goes on as if there were none.
    Call,
    /// At the first instruction of this function of the program's own file,
    /// the first time.
    Symbol(String),
    /// Where it calls `fork` (or `clone` to the same effect) for the first
    /// time, from the main thread. No process is made: the program goes on as
    /// the child would. So a fork server, which forks for each run, is served
    /// by snapshots instead.
    Fork,
    /// As [`Marker::Fork`], and then after it has closed this descriptor, as a
    /// fork server's child does with what belongs to the server: each run need
    /// not do it again. Earlier, if it makes a call that does not belong to that.
    ForkedClosing(RawFd),
}

/// Why the program has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is at the marker.
    Marker,
    /// It has ended, and cannot go on from where it is.
    Ended(Ending),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// By the program.
    End(End),
    /// By an [`Interrupter`].
    Interrupted,
}

/// What is to happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The program runs on, from where it is. After [`Event::Ended`] it must
    /// have been [restored](Stopped::restore).
    Continue,
    /// This was the program's end.
    Finish(End),
}

/// What decides at a program's markers and ends. See the module documentation.
///
/// Called on the program's first thread. After [`Event::Ended`] it is the only one;
/// at a marker others may run, until the program is
/// [restored](Stopped::restore).
pub trait Service: Send {
    /// The program has stopped.
    fn event(&mut self, event: Event, program: &mut Stopped<'_>) -> Next;

    /// Descriptors of the service, which the program must not have. See
    /// [`crate::host::move_fd_high`].
    fn descriptors(&self) -> Vec<RawFd> {
        Vec::new()
    }
}

/// Why a snapshot could not be taken or returned to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The program has more than one thread.
    #[error(
        "the program has {0} threads; a snapshot can be taken while it has one: choose a marker \
         before it makes the others"
    )]
    Threads(usize),
    /// The program has ended for good.
    #[error("the program has ended, and not only a run of it")]
    Ended,
    /// There is no snapshot to return to.
    #[error("there is no snapshot; take one at a marker first")]
    None,
    /// A descriptor could not be kept.
    #[error(
        "cannot keep {what} aside: {errno}; raise the limit on open files (ulimit -n): each \
         descriptor of the program needs a second one"
    )]
    Descriptor {
        /// What it was for.
        what: &'static str,
        /// What the host kernel said.
        errno: Errno,
    },
    /// Memory could not be protected or put back.
    #[error(
        "cannot put the program's memory in order: {0}; raise the memory limit (ulimit -v) or \
         vm.max_map_count"
    )]
    Memory(Errno),
    /// The virtual CPU did not answer.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl From<StateError> for SnapshotError {
    fn from(error: StateError) -> Self {
        match error {
            StateError::Host(what, errno) => Self::Descriptor { what, errno },
            StateError::Engine(error) => Self::Engine(error),
        }
    }
}

/// What the guard keeps for a served program.
#[derive(Default)]
pub(crate) struct Served {
    service: Mutex<Option<Box<dyn Service>>>,
    marker: Option<Marker>,
    breakpoint: Mutex<Option<Breakpoint>>,
    /// Whether it goes on as the child of a `fork`, for
    /// [`Marker::ForkedClosing`].
    forked: AtomicBool,
    /// The program's file, and where its entry point is.
    image: OnceLock<(PathBuf, u64)>,
    points: Mutex<Vec<State>>,
    watch: Mutex<Watch>,
    /// Counts the returns.
    run: AtomicU64,
    /// The run that is to be interrupted, and 1; 0 for none.
    interrupt: Arc<AtomicU64>,
}

impl core::fmt::Debug for Served {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Served")
            .field("marker", &self.marker)
            .finish_non_exhaustive()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Served {
    pub(crate) fn new(marker: Marker, service: Box<dyn Service>) -> Self {
        Self {
            service: Mutex::new(Some(service)),
            marker: Some(marker),
            ..Self::default()
        }
    }

    /// Descriptors of the service.
    pub(crate) fn descriptors(&self) -> Vec<RawFd> {
        let service = locked(&self.service);
        service
            .as_ref()
            .map_or_else(Vec::new, |service| service.descriptors())
    }

    /// The function at which to stop, if that is the marker.
    pub(crate) fn symbol(&self) -> Option<&str> {
        match &self.marker {
            Some(Marker::Symbol(name)) => Some(name),
            _ => None,
        }
    }

    pub(crate) fn set_breakpoint(&self, breakpoint: Breakpoint) {
        *locked(&self.breakpoint) = Some(breakpoint);
    }

    /// The watch, which begins anew.
    pub(crate) fn take_watch(&self) -> Watch {
        core::mem::take(&mut *locked(&self.watch))
    }

    /// Notes a call that was answered.
    pub(crate) fn note(&self, call: &Call, args: Args, answer: &Answer) {
        locked(&self.watch).note(call, args, answer);
    }

    /// Whether this run shall end.
    pub(crate) fn take_interrupt(&self) -> bool {
        let this = self.run.load(Ordering::SeqCst) + 1;
        self.interrupt
            .compare_exchange(this, 0, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }
}

/// Ends a run from another thread, however busy or idle the program is.
#[derive(Clone, Debug)]
pub struct Interrupter {
    program: Arc<Program>,
    run: u64,
    interrupt: Arc<AtomicU64>,
}

impl Interrupter {
    /// Ends the run for which this was made, unless it is over.
    pub fn interrupt(&self) {
        self.interrupt.store(self.run + 1, Ordering::SeqCst);
        let leader = self.program.pid();
        host::kick(leader, leader);
        // If it has left, it waits for the others and takes no signals.
        self.program.threads.wake_leader();
    }
}

/// The program while its first thread does not run.
#[derive(Debug)]
pub struct Stopped<'a> {
    guard: &'a mut Guard,
    user: &'a mut UserState,
    /// Whether the program can go on.
    can_run: bool,
}

impl Stopped<'_> {
    fn served(&self) -> Option<Arc<Program>> {
        let program = Arc::clone(&self.guard.program);
        program.served().is_some().then_some(program)
    }

    /// How many snapshots there are.
    #[must_use]
    pub fn depth(&self) -> usize {
        let program = &self.guard.program;
        program
            .served()
            .map_or(0, |served| locked(&served.points).len())
    }

    /// Takes a snapshot, on top of those that there are.
    ///
    /// No private memory is copied, except that private mappings of files which
    /// the program can write become anonymous memory the first time. Costs
    /// some host calls for each descriptor, and afterwards one fault for each
    /// page that the program reads or writes.
    ///
    /// # Errors
    ///
    /// [`SnapshotError`]; then there is no new snapshot, and the program may go
    /// on.
    pub fn push(&mut self) -> Result<usize, SnapshotError> {
        let program = self.served().ok_or(SnapshotError::None)?;
        let served = program.served().ok_or(SnapshotError::None)?;
        let threads = program.threads.lock().members().count();
        if threads > 1 || self.guard.tid != program.pid() {
            return Err(SnapshotError::Threads(threads));
        }
        let state = State::take(self.guard, self.user)?;
        let mut all = program.memory_mut();
        if let Err(errno) = memory::push(self.guard, &mut all) {
            drop(all);
            state.give_up(&program);
            return Err(SnapshotError::Memory(errno));
        }
        drop(all);
        let mut points = locked(&served.points);
        points.push(state);
        program.set_in_snapshot(true);
        Ok(points.len())
    }

    /// Returns to the latest snapshot, which stays. Ends all threads that were made
    /// since.
    ///
    /// Costs a copy of each page that was written since (and of some that
    /// earlier runs wrote), and host calls for what the program did to
    /// descriptors and mappings.
    ///
    /// # Errors
    ///
    /// [`SnapshotError`]; after any other than [`SnapshotError::None`] the
    /// program cannot go on.
    pub fn restore(&mut self) -> Result<Restored, SnapshotError> {
        let program = self.served().ok_or(SnapshotError::None)?;
        let served = program.served().ok_or(SnapshotError::None)?;
        if locked(&served.points).is_empty() {
            return Err(SnapshotError::None);
        }
        self.can_run = false;
        if let Err(finish) = program.threads.gather(program.pid()) {
            program.threads.end(program.pid(), finish);
            return Err(SnapshotError::Ended);
        }
        let points = locked(&served.points);
        let state = points.last().ok_or(SnapshotError::None)?;
        let watch = served.take_watch();
        let restored = {
            let mut all = program.memory_mut();
            memory::restore(self.guard, &mut all).map_err(SnapshotError::Memory)?
        };
        state.restore(self.guard, self.user, &watch)?;
        served.run.fetch_add(1, Ordering::SeqCst);
        self.can_run = true;
        Ok(restored)
    }

    /// Forgets the latest snapshot; the program stays as it is now. What
    /// changed since counts as changed since the snapshot before it.
    ///
    /// # Errors
    ///
    /// [`SnapshotError::None`]; [`SnapshotError::Memory`] if the host kernel
    /// refuses to unmap what was kept.
    pub fn pop(&mut self) -> Result<(), SnapshotError> {
        let program = self.served().ok_or(SnapshotError::None)?;
        let served = program.served().ok_or(SnapshotError::None)?;
        let mut points = locked(&served.points);
        let mut state = points.pop().ok_or(SnapshotError::None)?;
        let earlier = core::mem::take(&mut state.before);
        if points.is_empty() {
            program.set_in_snapshot(false);
            served.take_watch();
        } else {
            locked(&served.watch).add(earlier);
        }
        state.give_up(&program);
        memory::pop(&mut program.memory_mut()).map_err(SnapshotError::Memory)
    }

    /// The registers.
    #[must_use]
    pub fn registers(&self) -> UserState {
        *self.user
    }

    /// The extended state, in the standard XSAVE format.
    ///
    /// # Errors
    ///
    /// If the virtual CPU does not answer.
    pub fn extended_state(&mut self) -> Result<Vec<u8>, SnapshotError> {
        let mut state = vec![0; self.guard.engine.xstate_len()];
        self.guard.engine.save_xstate(&mut state)?;
        Ok(state)
    }

    /// What the program has mapped.
    #[must_use]
    pub fn areas(&self) -> Vec<crate::vma::Area> {
        self.guard.program.memory().areas.iter().collect()
    }

    /// Where the function or variable `name` of the program's own file is.
    /// Reads the file.
    ///
    /// # Errors
    ///
    /// [`SymbolError`], if its symbol table has none of that name.
    pub fn symbol(&self, name: &str) -> Result<u64, SymbolError> {
        let program = &self.guard.program;
        let image = program.served().and_then(|served| served.image.get());
        let (path, entry) = image.ok_or_else(|| SymbolError::Unknown {
            path: PathBuf::new(),
            name: name.to_owned(),
        })?;
        symbol::address_of(path, *entry, name)
    }

    /// Copies from the program's memory.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the program could not read all of it.
    pub fn read(&self, addr: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        self.guard.memory().read(addr, buffer)
    }

    /// Copies into the program's memory.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the program could not write all of it.
    pub fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.guard.memory().write(addr, bytes)
    }

    /// Gives the program a duplicate of `fd`, a descriptor of the service, as
    /// its descriptor `to`, for this run: with the next return it is what the
    /// snapshot saw.
    ///
    /// # Errors
    ///
    /// `EBADF` if `to` is none that the program may have.
    pub fn give_descriptor(&mut self, fd: RawFd, to: RawFd) -> Result<(), Errno> {
        let program = Arc::clone(&self.guard.program);
        let hidden = program.hidden_fds();
        if hidden.binary_search(&to).is_ok() {
            return Err(Errno::EBADF);
        }
        forward_always(__NR_dup3, [fd as u64, to as u64, 0, 0, 0, 0])?;
        if let Some(served) = program.served() {
            locked(&served.watch).replaced.insert(to);
        }
        Ok(())
    }

    /// Closes a descriptor of the program, such as one that its service has a
    /// duplicate of. With a return to an earlier snapshot it is back.
    ///
    /// # Errors
    ///
    /// `EBADF` if it is none of the program's.
    pub fn close_descriptor(&mut self, fd: RawFd) -> Result<(), Errno> {
        let program = Arc::clone(&self.guard.program);
        let hidden = program.hidden_fds();
        if hidden.binary_search(&fd).is_ok() {
            return Err(Errno::EBADF);
        }
        forward_always(__NR_close, [fd as u64, 0, 0, 0, 0, 0])?;
        if let Some(served) = program.served() {
            locked(&served.watch).replaced.insert(fd);
        }
        Ok(())
    }

    /// What ends the run that is about to go on.
    #[must_use]
    pub fn interrupter(&self) -> Interrupter {
        let program = &self.guard.program;
        let (run, interrupt) = program.served().map_or_else(
            || (0, Arc::default()),
            |served| {
                let run = served.run.load(Ordering::SeqCst);
                (run, Arc::clone(&served.interrupt))
            },
        );
        Interrupter {
            program: Arc::clone(program),
            run,
            interrupt,
        }
    }

    /// The process's id, which is the program's too.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.guard.pid()
    }
}

impl Guard {
    /// Has a service decide at markers and ends, before the program runs.
    ///
    /// # Panics
    ///
    /// If it runs.
    pub(crate) fn serve(&mut self, served: Served) {
        let program = Arc::get_mut(&mut self.program).expect("the program has not begun");
        program.set_served(served);
    }

    /// Stops the program where its service wants it, now that it is loaded, and
    /// has the guard see the signals that would end it.
    ///
    /// # Errors
    ///
    /// [`SymbolError`].
    pub(crate) fn prepare_to_serve(&mut self, path: &Path, entry: u64) -> Result<(), SymbolError> {
        let program = Arc::clone(&self.program);
        let Some(served) = program.served() else {
            return Ok(());
        };
        let _ = served.image.set((path.to_owned(), entry));
        if let Some(name) = served.symbol() {
            served.set_breakpoint(Breakpoint::set(self, path, entry, name)?);
        }
        let dispositions = program.dispositions();
        host::note(host::Noted::Fatal);
        for signal in 1..=SIGNALS {
            let action = dispositions.action(signal);
            if action.disposition() == Disposition::Default {
                let _ = host::install(signal, &action);
            }
        }
        Ok(())
    }

    /// Tells the service of an event, on the program's first thread.
    pub(crate) fn tell_service(
        &mut self,
        event: Event,
        user: &mut UserState,
    ) -> Result<Next, EngineError> {
        let program = Arc::clone(&self.program);
        let Some(served) = program.served() else {
            return Ok(Next::Continue);
        };
        let mut service = locked(&served.service);
        let Some(service) = service.as_mut() else {
            return Ok(Next::Continue);
        };
        let mut stopped = Stopped {
            guard: self,
            user,
            can_run: matches!(event, Event::Marker),
        };
        let next = service.event(event, &mut stopped);
        let can_run = stopped.can_run;
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        Ok(match (next, event) {
            (Next::Continue, Event::Ended(Ending::End(end))) if !can_run => Next::Finish(end),
            (Next::Continue, _) if !can_run => {
                Next::Finish(End::Killed(linux_raw_sys::general::SIGKILL))
            }
            (next, _) => next,
        })
    }

    /// If `trap` is the program's arrival at the marker: stops for the service.
    /// Threads other than the first pass by: the service returns to a snapshot
    /// with the first one.
    pub(crate) fn look_for_marker(
        &mut self,
        trap: Trap,
        user: &mut UserState,
    ) -> Result<Option<Resume>, EngineError> {
        let program = Arc::clone(&self.program);
        let Some(served) = program.served() else {
            return Ok(None);
        };
        let is_leader = self.tid == program.pid();
        let arrived = match (trap, &served.marker) {
            (Trap::Syscall, _) if !is_leader => false,
            (Trap::Syscall, Some(Marker::Call)) => {
                let is_marker =
                    user.regs.rax as u32 == __NR_prctl && user.regs.rdi as u32 == MARKER_OPTION;
                if is_marker {
                    user.regs.rax = 0;
                }
                is_marker
            }
            (Trap::Syscall, Some(Marker::ReadStdin)) => {
                let first = locked(&served.points).is_empty();
                let reads = [__NR_read, __NR_readv, __NR_pread64].contains(&(user.regs.rax as u32));
                let is_marker = first && reads && user.regs.rdi as u32 == 0;
                if is_marker {
                    // The call itself belongs to the run.
                    user.regs.rip = user.regs.rip.wrapping_sub(SYSCALL_LEN);
                }
                is_marker
            }
            (Trap::Syscall, Some(Marker::Fork)) => {
                let first = locked(&served.points).is_empty();
                first && self.becomes_the_child(user)
            }
            (Trap::Syscall, Some(Marker::ForkedClosing(fd))) => {
                if !locked(&served.points).is_empty() {
                    false
                } else if !served.forked.load(Ordering::Relaxed) {
                    if self.becomes_the_child(user) {
                        served.forked.store(true, Ordering::Relaxed);
                        // On to where it has closed the descriptor.
                        return Ok(Some(Resume::Continue));
                    }
                    false
                } else {
                    self.has_left_the_server(*fd, user)
                }
            }
            (Trap::Exception { vector: 3, .. }, Some(Marker::Symbol(_))) => {
                let mut breakpoint = locked(&served.breakpoint);
                match breakpoint.take_if(|breakpoint| breakpoint.is_behind(user.regs.rip)) {
                    Some(breakpoint) => {
                        user.regs.rip = breakpoint.at();
                        if breakpoint.remove(self).is_err() {
                            return Ok(Some(Resume::Killed(crate::signal::SIGTRAP)));
                        }
                        if !is_leader {
                            return Ok(Some(Resume::Continue));
                        }
                        true
                    }
                    None => false,
                }
            }
            _ => false,
        };
        if !arrived {
            return Ok(None);
        }
        match self.tell_service(Event::Marker, user)? {
            Next::Continue => Ok(Some(Resume::Continue)),
            Next::Finish(End::Exit(status)) => Ok(Some(Resume::Exit(status))),
            Next::Finish(End::Killed(signal)) => Ok(Some(Resume::Killed(signal))),
        }
    }

    /// If the program calls `fork`: lets it go on as the child would.
    #[expect(non_upper_case_globals, reason = "the kernel's names, matched against")]
    fn becomes_the_child(&mut self, user: &mut UserState) -> bool {
        let regs = &mut user.regs;
        match regs.rax as u32 {
            __NR_fork => {}
            __NR_clone => {
                let flags = regs.rdi as u32;
                let known = CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID;
                if flags & !known != SIGCHLD || regs.rsi != 0 {
                    return false;
                }
                // The id that `CLONE_CHILD_SETTID` stores is there already: it
                // stays the same.
                if flags & CLONE_CHILD_CLEARTID != 0 {
                    self.clear_child_tid = regs.r10;
                }
            }
            _ => return false,
        }
        regs.rax = 0;
        true
    }

    /// Whether the program, a fork server's child, is done with what belongs to
    /// the server: closes `fd` right now, or calls what does not belong to it.
    #[expect(non_upper_case_globals, reason = "the kernel's names, matched against")]
    fn has_left_the_server(&mut self, fd: RawFd, user: &mut UserState) -> bool {
        let regs = &mut user.regs;
        match regs.rax as u32 {
            __NR_close if regs.rdi as RawFd == fd => {
                let hidden = self.program.hidden_fds();
                if hidden.binary_search(&fd).is_err() {
                    let _ = forward_always(__NR_close, [fd as u64, 0, 0, 0, 0, 0]);
                }
                regs.rax = 0;
                true
            }
            __NR_close | __NR_rt_sigaction | __NR_rt_sigprocmask | __NR_set_robust_list => false,
            _ => {
                // The call itself belongs to the run.
                regs.rip = regs.rip.wrapping_sub(SYSCALL_LEN);
                true
            }
        }
    }

    /// A run has ended. Ends the other threads and asks the service.
    ///
    /// # Errors
    ///
    /// If the engine failed.
    pub(crate) fn run_ended(
        &mut self,
        ending: Ending,
        user: &mut UserState,
    ) -> Result<Next, EngineError> {
        let program = Arc::clone(&self.program);
        if let Err(finish) = program.threads.gather(program.pid()) {
            return finish.map(Next::Finish);
        }
        if let Some(served) = program.served() {
            let changed = locked(&served.watch).limits;
            let points = locked(&served.points);
            if let Some(point) = points.last().filter(|_| changed) {
                // What the run could not write or open, its service may. If this
                // fails, so does the return.
                let _ = point.restore_limits();
            }
        }
        self.tell_service(Event::Ended(ending), user)
    }
}

/// Bytes of the `SYSCALL` instruction.
const SYSCALL_LEN: u64 = 2;

/// The pages of `addr`, where there is one.
pub(crate) fn page_of(addr: u64) -> Option<PageRange> {
    let page = addr & !(crate::range::PAGE_SIZE - 1);
    PageRange::new(page, crate::range::PAGE_SIZE)
}
