//! What all threads of a program share.
//!
//! One `Program` for each process, and a [`Guard`](crate::guard::Guard) for each of its
//! threads. Locks are held for bookkeeping alone, never while a call of the program may wait:
//!
//! | lock | guards | held |
//! |---|---|---|
//! | `threads` | which threads there are, and whether they must leave | to look or change |
//! | `fds` | which descriptors are the guard's | to look; shared across calls that replace or copy a descriptor; exclusively while the guard makes one |
//! | `memory` | areas, heap, placement | shared across a copy or an `admit`; exclusively across a change of mappings, with the host's part of it |
//! | `dispositions` | what signals do | across the change of the host's disposition too |
//! | `process` | names, limits | to look or change |
//! | that of `debugger` | who is stopped, breakpoints | to look or change |
//!
//! In this order, from top to bottom, where more than one is taken.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};

use crate::calls::memory::Space;
use crate::calls::process::Process;
use crate::calls::segment::Segment;
use crate::debug::Debugger;
use crate::debug::control::{self, Control};
use crate::engine::{Access, Engine, EngineError};
use crate::guard::MissingCall;
use crate::handler::{Handler, Handlers};
use crate::host::{self, Errno};
use crate::policy::enforced::Enforced;
use crate::range::{PAGE_SIZE, PageRange, UserRange};
use crate::signal::Dispositions;
use crate::snapshot::Served;
use crate::snapshot::memory::{Layer, Layers, Tracked, set_aside};
use crate::snapshot::watch::Watch;
use crate::table;
use crate::threads::{State, Threads};
use crate::trace::Tracer;
use crate::vfork::Journal;
use crate::vma::{Area, Areas, Sharing, effective};

/// The program's memory, as the guard keeps account of it.
#[derive(Debug, Default)]
pub struct Memory {
    /// What is mapped.
    pub(crate) areas: Areas,
    /// Where it grows.
    pub(crate) space: Space,
    /// What a child of `vfork` has to tell its parent.
    pub(crate) journal: Option<Mutex<Journal>>,
    /// Snapshots to return to, the latest last.
    pub(crate) layers: Option<Mutex<Layers>>,
}

impl Memory {
    /// Memory with these areas.
    #[must_use]
    pub fn new(areas: Areas) -> Self {
        Self {
            areas,
            ..Self::default()
        }
    }

    /// Notes, in a child of `vfork` and after a snapshot, that `range` is about
    /// to be written.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if a child of `vfork` writes too much; then it must not.
    pub(crate) fn note_write(&self, pid: u32, range: UserRange) -> Result<(), Errno> {
        if let Some(journal) = &self.journal {
            let mut journal = journal.lock().unwrap_or_else(PoisonError::into_inner);
            journal.note(&self.areas, pid, range)?;
        }
        if let Some(pages) = PageRange::covering(range) {
            self.with_top(|top| top.note(&self.areas, pid, pages));
        }
        Ok(())
    }

    /// Does something with the latest snapshot, if there is one.
    pub(crate) fn with_top<T>(&self, body: impl FnOnce(&mut Layer) -> T) -> Option<T> {
        let layers = self.layers.as_ref()?;
        let mut layers = layers.lock().unwrap_or_else(PoisonError::into_inner);
        layers.last_mut().map(body)
    }

    /// Before `range` is unmapped or replaced: keeps what a snapshot needs.
    ///
    /// # Errors
    ///
    /// `ENOMEM` for more than the guard can keep, or what the host kernel said.
    pub(crate) fn set_aside(&self, range: PageRange) -> Result<(), Errno> {
        let Some(layers) = self.layers.as_ref() else {
            return Ok(());
        };
        let mut layers = layers.lock().unwrap_or_else(PoisonError::into_inner);
        set_aside(&mut layers, &self.areas, range)
    }

    /// Before the program gains the right to write to `range`: keeps what a
    /// snapshot needs if calls wait that may write there. `self` is locked
    /// exclusively.
    ///
    /// # Errors
    ///
    /// What the host kernel said.
    pub(crate) fn keep_promised(&self, pid: u32, range: PageRange) -> Result<(), Errno> {
        self.with_top(|top| top.keep_promised(&self.areas, pid, range))
            .unwrap_or(Ok(()))
    }

    /// Before the program discards what is in `range`, or a debugger writes there:
    /// keeps what a snapshot needs. `self` is locked exclusively.
    ///
    /// # Errors
    ///
    /// What the host kernel said.
    pub(crate) fn keep(&self, pid: u32, range: PageRange) -> Result<(), Errno> {
        self.with_top(|top| top.keep(&self.areas, pid, range))
            .unwrap_or(Ok(()))
    }

    /// Whether the latest snapshot has a page of `range`.
    pub(crate) fn is_in_snapshot(&self, range: PageRange) -> bool {
        self.with_top(|top| top.has_part_of(range)) == Some(true)
    }

    /// The range and rights with which to admit the page of `addr` for an
    /// access that needs `needed`. In a child of `vfork`, and after a snapshot,
    /// no page can be written that was not noted.
    ///
    /// # Errors
    ///
    /// As [`Memory::note_write`].
    pub(crate) fn admissible(
        &self,
        pid: u32,
        addr: u64,
        area: Area,
        needed: Access,
    ) -> Result<Admission, Errno> {
        let access = effective(area.attributes.access);
        let whole = Admission {
            range: area.range,
            access,
        };
        match self.with_top(|top| top.admissible(pid, addr, area, needed)) {
            Some(Tracked::Whole(range)) => return Ok(Admission { range, access }),
            Some(Tracked::ReadOnly(range)) => {
                let access = access - Access::WRITE;
                return Ok(Admission { range, access });
            }
            None => {}
        }
        if self.journal.is_none()
            || area.attributes.sharing == Sharing::Shared
            || !access.contains(Access::WRITE)
        {
            return Ok(whole);
        }
        let page = addr & !(PAGE_SIZE - 1);
        Ok(match (needed, PageRange::new(page, PAGE_SIZE)) {
            (Access::WRITE, Some(range)) => {
                if let Some(bytes) = UserRange::new(page, PAGE_SIZE) {
                    self.note_write(pid, bytes)?;
                }
                Admission { range, access }
            }
            _ => Admission {
                access: access - Access::WRITE,
                ..whole
            },
        })
    }
}

/// Puts the descriptors `after` in the place of `before` in a sorted list.
pub(crate) fn replace_fds(hidden: &mut Vec<RawFd>, before: &[RawFd], after: &[RawFd]) {
    hidden.retain(|fd| !before.contains(fd));
    hidden.extend_from_slice(after);
    hidden.sort_unstable();
    hidden.dedup();
}

/// What an engine is told to admit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Admission {
    pub(crate) range: PageRange,
    pub(crate) access: Access,
}

/// All locks of a program, for the moment of a `fork`.
pub(crate) struct Locks<'a> {
    threads: MutexGuard<'a, State>,
    fds: RwLockWriteGuard<'a, Vec<RawFd>>,
    memory: RwLockWriteGuard<'a, Memory>,
    _dispositions: MutexGuard<'a, Dispositions>,
    _process: RwLockWriteGuard<'a, Process>,
    _missing: MutexGuard<'a, BTreeMap<u32, u64>>,
    _debugger: Option<MutexGuard<'a, control::State>>,
}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) threads: Threads,
    fds: RwLock<Vec<RawFd>>,
    /// Of these, those that one thread needs for a moment, and that a child must
    /// not keep open. Changed only while `fds` is held exclusively.
    passing: Mutex<Vec<RawFd>>,
    memory: RwLock<Memory>,
    dispositions: Mutex<Dispositions>,
    process: RwLock<Process>,
    missing: Mutex<BTreeMap<u32, u64>>,
    policy: Enforced,
    crash_report: Option<Arc<File>>,
    /// Shared memory that it may attach.
    segments: Vec<Segment>,
    /// Calls that the embedding program answers; set before the first runs.
    handlers: OnceLock<Handlers>,
    pid: AtomicU32,
    tracer: OnceLock<Arc<Tracer>>,
    /// Whether this process is the child of a `fork`, with nobody to return to.
    forked: AtomicBool,
    /// Whether no second thread was ever made in this process.
    single: AtomicBool,
    /// Whether the memory has a journal.
    journaling: AtomicBool,
    /// Whether there is a snapshot to return to.
    in_snapshot: AtomicBool,
    /// Who decides at markers and ends, if anybody does.
    served: Option<Served>,
    /// How a debugger stops threads, if there is one; set before the first
    /// runs.
    debugger: OnceLock<Arc<Control>>,
    /// Whether programs get a vDSO here.
    shows_clock: AtomicBool,
}

impl Program {
    pub(crate) fn new(dispositions: Dispositions, mut hidden_fds: Vec<RawFd>) -> Self {
        hidden_fds.sort_unstable();
        Self {
            fds: RwLock::new(hidden_fds),
            passing: Mutex::default(),
            memory: RwLock::default(),
            dispositions: Mutex::new(dispositions),
            process: RwLock::new(Process::of_this_process()),
            missing: Mutex::default(),
            policy: Enforced::unrestricted(),
            crash_report: None,
            segments: Vec::new(),
            handlers: OnceLock::new(),
            pid: AtomicU32::new(std::process::id()),
            tracer: OnceLock::new(),
            forked: AtomicBool::new(false),
            single: AtomicBool::new(true),
            journaling: AtomicBool::new(false),
            in_snapshot: AtomicBool::new(false),
            shows_clock: AtomicBool::new(false),
            served: None,
            debugger: OnceLock::new(),
            threads: Threads::default(),
        }
    }

    /// Sets what the program may do, before it runs.
    pub(crate) fn set_policy(&mut self, policy: Enforced) {
        self.policy = policy;
        self.hide_reports();
    }

    /// Descriptors of the guard that are there as long as the program is.
    fn reports(&self) -> impl Iterator<Item = RawFd> {
        let crash = self.crash_report.as_deref().map(AsRawFd::as_raw_fd);
        self.policy.fd().into_iter().chain(crash)
    }

    fn hide_reports(&mut self) {
        let reports: Vec<RawFd> = self.reports().collect();
        let fds = self.fds.get_mut().unwrap_or_else(PoisonError::into_inner);
        fds.extend(reports);
        fds.sort_unstable();
        fds.dedup();
    }

    /// Has the program's death by a signal described there.
    pub(crate) fn set_crash_report(&mut self, file: Arc<File>) {
        self.crash_report = Some(file);
        self.hide_reports();
    }

    /// Where the program's death by a signal is described, if that was asked
    /// for.
    pub(crate) fn crash_report(&self) -> Option<&File> {
        self.crash_report.as_deref()
    }

    /// Sets which shared memory the program may attach, before it runs.
    pub(crate) fn set_segments(&mut self, segments: Vec<Segment>) {
        self.segments = segments;
    }

    /// The segment `id`, if the program may attach it.
    pub(crate) fn segment(&self, id: i32) -> Option<Segment> {
        let mut segments = self.segments.iter();
        segments.find(|segment| segment.id() == id).copied()
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
        let mut fds = self.hidden_fds_mut();
        let fd = make()?;
        let at = fds.partition_point(|&other| other < fd);
        fds.insert(at, fd);
        self.passing().push(fd);
        Ok(fd)
    }

    /// Has `close` close a descriptor of the guard.
    pub(crate) fn give_back(&self, fd: RawFd, close: impl FnOnce(RawFd)) {
        let mut fds = self.hidden_fds_mut();
        if let Ok(at) = fds.binary_search(&fd) {
            fds.remove(at);
        }
        self.passing().retain(|&other| other != fd);
        close(fd);
    }

    /// Hides descriptors of the embedding program for good.
    pub(crate) fn hide(&self, descriptors: &[RawFd]) {
        replace_fds(&mut self.hidden_fds_mut(), &[], descriptors);
    }

    /// Has every call traced from now on. Only the first tracer counts.
    pub(crate) fn set_tracer(&self, tracer: Arc<Tracer>) {
        let mut fds = self.fds.write().unwrap_or_else(PoisonError::into_inner);
        fds.extend(tracer.descriptors());
        fds.sort_unstable();
        drop(fds);
        let _ = self.tracer.set(tracer);
    }

    /// Who wants to know of every call.
    pub(crate) fn tracer(&self) -> Option<&Tracer> {
        self.tracer.get().map(AsRef::as_ref)
    }

    /// Whether a call with an answer that never changes need not be seen:
    /// nobody traces or debugs the program, and the embedding program handles
    /// no call.
    pub(crate) fn lets_calls_pass_unseen(&self) -> bool {
        self.tracer.get().is_none()
            && self.debugger.get().is_none()
            && self.handlers.get().is_none()
    }

    /// Has `debugger` stop the program where gdb wants it. Only the first
    /// counts.
    pub(crate) fn set_debugger(&self, debugger: &Debugger) {
        let mut hidden = self.hidden_fds_mut();
        for fd in debugger.descriptors() {
            self.pass(&mut hidden, fd);
        }
        drop(hidden);
        let control = debugger.control();
        self.threads.set_debugger(Arc::clone(control));
        let _ = self.debugger.set(Arc::clone(control));
    }

    /// How a debugger stops the threads of this process, if there is one.
    pub(crate) fn control(&self) -> Option<&Arc<Control>> {
        self.debugger.get().filter(|_| !self.is_forked())
    }

    /// In the child of a `fork`: how one stops the parent's.
    pub(crate) fn control_of_parent(&self) -> Option<&Arc<Control>> {
        self.debugger.get()
    }

    /// Whether programs get a vDSO here; not where their calls are to be seen, nor where
    /// their memory may be saved and be resumed elsewhere.
    pub(crate) fn shows_clock(&self) -> bool {
        self.shows_clock.load(Ordering::Relaxed)
            && self.lets_calls_pass_unseen()
            && self.served.is_none()
    }

    /// Sets what the engine can do; before the first program.
    pub(crate) fn set_shows_clock(&self, shown: bool) {
        self.shows_clock.store(shown, Ordering::Relaxed);
    }

    /// The process's id, the same for the program and the host.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }

    /// Gives the program's calls these handlers, once. None at all is as before.
    pub(crate) fn set_handlers(&self, handlers: Handlers) {
        if !handlers.is_empty() {
            let _ = self.handlers.set(handlers);
        }
    }

    /// The handler of a call, if it has one.
    pub(crate) fn handler(&self, nr: u32) -> Option<Arc<Handler>> {
        self.handlers.get()?.find(nr)
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

    /// As [`Program::hidden_fds`], while the guard makes or closes some.
    pub(crate) fn hidden_fds_mut(&self) -> RwLockWriteGuard<'_, Vec<RawFd>> {
        self.fds.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `fd` out of the program's reach for a moment; `hidden` is the list,
    /// held since before the descriptor was made.
    pub(crate) fn pass(&self, hidden: &mut Vec<RawFd>, fd: RawFd) {
        replace_fds(hidden, &[], &[fd]);
        self.passing().push(fd);
    }

    /// Closes a descriptor of [`Program::pass`].
    pub(crate) fn close_passing(&self, fd: impl Into<OwnedFd>) {
        let fd = fd.into();
        let mut hidden = self.hidden_fds_mut();
        replace_fds(&mut hidden, &[fd.as_raw_fd()], &[]);
        self.passing().retain(|&other| other != fd.as_raw_fd());
        drop(fd);
    }

    fn passing(&self) -> MutexGuard<'_, Vec<RawFd>> {
        self.passing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this process is the child of a `fork` of the program.
    pub(crate) fn is_forked(&self) -> bool {
        self.forked.load(Ordering::Relaxed)
    }

    /// Takes every lock: nothing of the program is half-way then.
    pub(crate) fn lock_all(&self) -> Locks<'_> {
        Locks {
            threads: self.threads.lock(),
            fds: self.hidden_fds_mut(),
            memory: self.memory_mut(),
            _dispositions: self.dispositions(),
            _process: self.process_mut(),
            _missing: self.missing.lock().unwrap_or_else(PoisonError::into_inner),
            _debugger: self.debugger.get().map(|control| control.lock()),
        }
    }

    /// In the child of a `fork`, with the locks that the parent's thread took:
    /// makes all of this the child's own, and returns its id. `before` are the
    /// descriptors of the parent's engine; `pipe` leads to the parent of a
    /// `vfork`.
    ///
    /// # Errors
    ///
    /// If there is no new engine.
    pub(crate) fn became_child(
        &self,
        mut locks: Locks<'_>,
        engine: &mut dyn Engine,
        before: &[RawFd],
        pipe: Option<OwnedFd>,
    ) -> Result<u32, EngineError> {
        let pid = std::process::id();
        self.pid.store(pid, Ordering::Relaxed);
        self.forked.store(true, Ordering::Relaxed);
        self.single.store(true, Ordering::Relaxed);
        locks.threads.reset(pid);
        // What other threads had in hand: pipes of their `vfork`s above all. The
        // parent's own journal, if it has one, is about one of them.
        core::mem::forget(locks.memory.journal.take());
        // A child returns to nothing.
        locks.memory.layers = None;
        self.in_snapshot.store(false, Ordering::SeqCst);
        let mine = pipe.as_ref().map(AsRawFd::as_raw_fd);
        let passing = core::mem::take(&mut *self.passing());
        for fd in passing.into_iter().filter(|&fd| Some(fd) != mine) {
            host::close(fd);
            replace_fds(&mut locks.fds, &[fd], &[]);
        }
        self.passing().extend(mine);
        engine.renew()?;
        replace_fds(&mut locks.fds, before, &engine.fds());
        self.journaling.store(pipe.is_some(), Ordering::SeqCst);
        if let Some(pipe) = pipe {
            let journal = Journal::new(&locks.memory, pipe);
            locks.memory.journal = Some(Mutex::new(journal));
        }
        Ok(pid)
    }

    /// Whether this is a child of `vfork` that has not told its parent yet.
    pub(crate) fn is_journaling(&self) -> bool {
        self.journaling.load(Ordering::Relaxed)
    }

    /// Has a service decide at the program's markers and ends.
    pub(crate) fn set_served(&mut self, served: Served) {
        let fds = self.fds.get_mut().unwrap_or_else(PoisonError::into_inner);
        replace_fds(fds, &[], &served.descriptors());
        self.served = Some(served);
    }

    /// What serves this process, which is not the case for children.
    pub(crate) fn served(&self) -> Option<&Served> {
        self.served.as_ref().filter(|_| !self.is_forked())
    }

    /// What the program did since the latest snapshot; the watch begins anew.
    pub(crate) fn watch_taken(&self) -> Watch {
        self.served
            .as_ref()
            .map_or_else(Watch::default, Served::take_watch)
    }

    /// Sets whether there is a snapshot to return to.
    pub(crate) fn set_in_snapshot(&self, is: bool) {
        self.in_snapshot.store(is, Ordering::SeqCst);
    }

    /// Whether there is a snapshot to return to.
    pub(crate) fn is_in_snapshot(&self) -> bool {
        self.in_snapshot.load(Ordering::Relaxed)
    }

    /// Whether somebody wants to know of writes to the memory.
    fn notes_writes(&self) -> bool {
        self.is_journaling() || self.is_in_snapshot()
    }

    /// Notes that the kernel may write `len` bytes at `addr`, checked user
    /// memory, on behalf of a child of `vfork` or after a snapshot.
    ///
    /// # Errors
    ///
    /// As [`Memory::note_write`].
    pub(crate) fn note_write(&self, addr: u64, len: u64) -> Result<(), Errno> {
        match UserRange::new(addr, len) {
            Some(range) if self.notes_writes() => self.memory().note_write(self.pid(), range),
            _ => Ok(()),
        }
    }

    /// The journal; nothing is noted any more.
    pub(crate) fn take_journal(&self) -> Option<Journal> {
        if !self.journaling.swap(false, Ordering::SeqCst) {
            return None;
        }
        let journal = self.memory_mut().journal.take()?;
        Some(journal.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether one thread is all there ever was in this process: nobody else
    /// can change what it looks at.
    pub(crate) fn is_single(&self) -> bool {
        self.single.load(Ordering::Relaxed)
    }

    /// From now on there are threads.
    pub(crate) fn becomes_shared(&self) {
        self.single.store(false, Ordering::SeqCst);
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
