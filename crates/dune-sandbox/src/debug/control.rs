//! Who runs and who is stopped: what the program's threads and the debugger's
//! thread share.
//!
//! ```text
//!             a thread has something to report, or gdb interrupts
//!   Running ----------------------------------------------------> Stopping
//!     ^                                                             |
//!     |  gdb lets threads go on        every thread is parked, or   |
//!     +------------------- Stopped <--- away where it cannot run <--+
//!
//!   Off: nobody debugs (any more)
//! ```
//!
//! Threads of the program stop in one place, between two runs of ring 3
//! ([`Control::park`], called by the `hook`), with everything that gdb may
//! change handed over for the time. They are got there as for `execve`, by
//! kicks ([`crate::signal::record`]). One thread's report is told at a time;
//! who has another one keeps it, and reports it when it may go on.
//!
//! Threads of the program take the lock last of all ([`crate::program`]), and
//! wait for nothing under it. The debugger's thread takes that of the memory
//! under it, while everything is stopped.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::engine::UserState;
use crate::guard::End;
use crate::host::move_fd_high;
use crate::signal::{SigInfo, host};

/// How long the end of the program waits for gdb to be told of it.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a thread that has stopped can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Report {
    /// It is at the program's first instruction.
    Started,
    /// It is at a breakpoint.
    Breakpoint,
    /// It has made the step that was asked for.
    Step,
    /// It is about to get this signal.
    Signal(SigInfo),
    /// It is at the first instruction of a new program.
    Exec,
    /// It was interrupted.
    Interrupt,
    /// All threads that were to run have ended.
    NoneLeft,
}

/// What the debugger's thread learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// All threads have stopped because of `tid`'s report.
    Stopped { tid: u32, report: Report },
    /// The program has ended; `None` if the engine failed under it.
    Ended(Option<End>),
}

/// What gdb may see and change of a thread that is parked.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    pub(crate) user: UserState,
    /// The extended state in the standard XSAVE format.
    pub(crate) xstate: Vec<u8>,
    /// Its name.
    pub(crate) name: String,
    /// Whether anything was changed.
    pub(crate) changed: bool,
}

/// What becomes of the signal that a thread stopped for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Pass {
    /// It gets it.
    #[default]
    Own,
    /// It gets none.
    Nothing,
    /// It gets this one.
    Signal(u32),
}

/// How a thread goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Go {
    /// By single steps, as long as it is in this range; one at least.
    pub(crate) step: Option<Range<u64>>,
    pub(crate) pass: Pass,
}

/// What gdb wants of a thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Go(Go),
    Stay,
}

/// Why a thread is no longer parked.
#[derive(Debug)]
pub(crate) enum Parked {
    /// It must leave: the program is ending, or another one takes its place.
    Leave,
    /// It goes on.
    Go {
        go: Go,
        saved: Box<Saved>,
        /// Its report was told. If not, it still has it.
        told: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Running,
    /// In the guard, for longer, where it cannot be stopped and need not be.
    Away,
    Parked,
}

#[derive(Debug)]
struct Thread {
    status: Status,
    /// While it is parked or away.
    saved: Option<Box<Saved>>,
    /// That it may go on.
    go: Option<Go>,
    /// That it must not, once it is no longer away.
    stay: bool,
    /// That it must leave.
    leave: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Off,
    Running,
    Stopping { tid: u32, report: Report },
    Stopped,
}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct State {
    phase: Phase,
    pid: u32,
    threads: BTreeMap<u32, Thread>,
    news: Option<News>,
    /// Addresses of breakpoints, and what was there.
    breakpoints: BTreeMap<u64, u8>,
    /// Whether fatal signals are to be noted by the guard, if that has changed.
    notes_signals: Option<bool>,
    /// Whether the program has ended.
    ended: bool,
    /// Whether the debugger has nothing more to tell.
    done: bool,
}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Control {
    state: Mutex<State>,
    /// Parked threads wait here, and who ends the program.
    changed: Condvar,
    /// Whether the phase is any other than `Off`.
    on: AtomicBool,
    /// What is written to one end wakes the debugger's thread at the other.
    wake: [UnixStream; 2],
}

impl Control {
    /// Of a program that has not begun.
    ///
    /// # Errors
    ///
    /// If there is no descriptor left.
    pub(crate) fn new() -> std::io::Result<Self> {
        let (here, there) = UnixStream::pair()?;
        let out_of_the_way = |end: UnixStream| -> std::io::Result<UnixStream> {
            end.set_nonblocking(true)?;
            move_fd_high(OwnedFd::from(end)).map(UnixStream::from)
        };
        let state = State {
            phase: Phase::Off,
            pid: 0,
            threads: BTreeMap::new(),
            news: None,
            breakpoints: BTreeMap::new(),
            notes_signals: None,
            ended: false,
            done: false,
        };
        Ok(Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            on: AtomicBool::new(false),
            wake: [out_of_the_way(here)?, out_of_the_way(there)?],
        })
    }

    /// Its descriptors, which the program must not have.
    pub(crate) fn descriptors(&self) -> [RawFd; 2] {
        self.wake.each_ref().map(AsRawFd::as_raw_fd)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_phase(&self, state: &mut State, phase: Phase) {
        state.phase = phase;
        self.on.store(phase != Phase::Off, Ordering::SeqCst);
    }

    /// Whether anybody debugs.
    pub(crate) fn is_on(&self) -> bool {
        self.on.load(Ordering::SeqCst)
    }

    /// What becomes readable when there is news.
    pub(crate) fn wake_fd(&self) -> RawFd {
        self.wake[0].as_raw_fd()
    }

    fn tell(&self, state: &mut State, news: News) {
        state.news = Some(news);
        // If there is no room, there is enough to wake it.
        let _ = (&self.wake[1]).write(&[1]);
    }

    // ---- For the program's threads.

    /// The program `pid` is about to begin, with one thread.
    pub(crate) fn begin(&self, pid: u32) {
        let mut state = self.lock();
        state.pid = pid;
        state.notes_signals = Some(true);
        let (tid, report) = (pid, Report::Started);
        self.set_phase(&mut state, Phase::Stopping { tid, report });
    }

    /// A new thread. Returns whether it must park before it runs.
    pub(crate) fn join(&self, tid: u32) -> bool {
        let mut state = self.lock();
        state.threads.insert(tid, Thread::new());
        matches!(state.phase, Phase::Stopping { .. } | Phase::Stopped)
    }

    /// The thread has ended.
    pub(crate) fn leave(&self, tid: u32) {
        let mut state = self.lock();
        state.threads.remove(&tid);
        self.stop_if_none_is_left(&mut state);
        self.settle(&mut state);
    }

    /// All threads but `except` must leave: those that are parked do not hear
    /// of it otherwise.
    pub(crate) fn release(&self, except: Option<u32>) {
        let mut state = self.lock();
        for (tid, thread) in &mut state.threads {
            thread.leave |= Some(*tid) != except;
        }
        self.changed.notify_all();
    }

    /// Whether the thread, which was kicked, must park.
    pub(crate) fn wants(&self, tid: u32) -> bool {
        let state = self.lock();
        match state.phase {
            Phase::Off => false,
            Phase::Running => state.threads.get(&tid).is_some_and(|thread| thread.stay),
            Phase::Stopping { .. } | Phase::Stopped => true,
        }
    }

    /// Stops the thread, and all others if it has something to report, until it
    /// may go on.
    pub(crate) fn park(&self, tid: u32, report: Option<Report>, saved: Box<Saved>) -> Parked {
        let mut state = self.lock();
        let told = match (state.phase, report) {
            (Phase::Off, _) => return Parked::go(saved),
            (Phase::Running, Some(report)) => {
                self.stop(&mut state, tid, report);
                true
            }
            // Who begins has told already what it stops for.
            (Phase::Stopping { tid: by, .. }, Some(Report::Started)) => by == tid,
            (_, None) => true,
            (Phase::Stopping { .. } | Phase::Stopped, Some(_)) => false,
        };
        let Some(thread) = state.threads.get_mut(&tid) else {
            return Parked::go(saved);
        };
        if thread.leave {
            return Parked::Leave;
        }
        thread.status = Status::Parked;
        thread.stay = false;
        thread.go = None;
        thread.saved = Some(saved);
        self.settle(&mut state);
        loop {
            let Some(thread) = state.threads.get_mut(&tid) else {
                return Parked::Leave;
            };
            if thread.leave {
                thread.status = Status::Running;
                return Parked::Leave;
            }
            if let Some(go) = thread.go.take()
                && let Some(saved) = thread.saved.take()
            {
                return Parked::Go { go, saved, told };
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The thread will be in the guard for longer; it counts as stopped.
    pub(crate) fn away(&self, tid: u32, saved: Box<Saved>) {
        let mut state = self.lock();
        if let Some(thread) = state.threads.get_mut(&tid) {
            thread.status = Status::Away;
            thread.saved = Some(saved);
        }
        self.settle(&mut state);
    }

    /// The thread is back. Returns whether it must park before it runs.
    pub(crate) fn back(&self, tid: u32) -> bool {
        let mut state = self.lock();
        let phase = state.phase;
        let Some(thread) = state.threads.get_mut(&tid) else {
            return false;
        };
        thread.status = Status::Running;
        thread.saved = None;
        thread.stay || matches!(phase, Phase::Stopping { .. } | Phase::Stopped)
    }

    /// Whether there is a breakpoint at `addr`.
    pub(crate) fn has_breakpoint(&self, addr: u64) -> bool {
        self.is_on() && self.lock().breakpoints.contains_key(&addr)
    }

    /// Another program takes the place of this one: its memory is gone.
    pub(crate) fn forget_breakpoints(&self) {
        self.lock().breakpoints.clear();
    }

    /// Whether fatal signals are to be noted from now on, or no more; told
    /// once.
    pub(crate) fn take_notes_signals(&self) -> Option<bool> {
        self.lock().notes_signals.take()
    }

    /// The program has ended. Returns when gdb has been told, or has had time
    /// enough.
    pub(crate) fn end(&self, end: Option<End>) {
        let mut state = self.lock();
        if state.phase == Phase::Off {
            return;
        }
        state.ended = true;
        state.threads.clear();
        self.tell(&mut state, News::Ended(end));
        let until = Instant::now() + PATIENCE;
        while !state.done {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    // ---- For the debugger's thread.

    /// What has happened, if anything has.
    pub(crate) fn take_news(&self) -> Option<News> {
        // Does not wait.
        let _ = (&self.wake[0]).read(&mut [0; 64]);
        self.lock().news.take()
    }

    /// Whether nothing of the program runs.
    pub(crate) fn has_stopped(&self) -> bool {
        let state = self.lock();
        state.ended || matches!(state.phase, Phase::Stopped | Phase::Off)
    }

    /// Lets every thread go on as `order_of` says.
    pub(crate) fn resume(&self, order_of: impl Fn(u32) -> Order) {
        let mut state = self.lock();
        if state.phase != Phase::Stopped {
            return;
        }
        state.phase = Phase::Running;
        for (&tid, thread) in &mut state.threads {
            match (order_of(tid), thread.status) {
                (Order::Go(go), Status::Parked) => {
                    thread.go = Some(go);
                    thread.status = Status::Running;
                }
                (order, Status::Away) => thread.stay = order == Order::Stay,
                _ => {}
            }
        }
        self.changed.notify_all();
        self.stop_if_none_is_left(&mut state);
        self.settle(&mut state);
    }

    /// Stops all threads.
    pub(crate) fn interrupt(&self) {
        let mut state = self.lock();
        if state.phase == Phase::Running {
            // Between two programs there may be no thread; the next one stops.
            let tid = state.any_thread().unwrap_or(state.pid);
            self.stop(&mut state, tid, Report::Interrupt);
            self.settle(&mut state);
        }
    }

    /// Lets the program run on its own, for good. The breakpoints must have
    /// been removed.
    pub(crate) fn detach(&self) {
        let mut state = self.lock();
        self.set_phase(&mut state, Phase::Off);
        state.notes_signals = Some(false);
        state.news = None;
        state.done = true;
        for thread in state.threads.values_mut() {
            thread.stay = false;
            if thread.status == Status::Parked {
                thread.status = Status::Running;
                thread.go = Some(Go::default());
            }
        }
        self.changed.notify_all();
    }

    // ---- Under the lock.

    /// All threads have to stop, because of `tid`'s report.
    fn stop(&self, state: &mut State, tid: u32, report: Report) {
        self.set_phase(state, Phase::Stopping { tid, report });
        for (&other, thread) in &state.threads {
            // Who reports is on its way already.
            let is_told = other == tid && report != Report::Interrupt;
            if thread.status == Status::Running && !is_told {
                host::kick(state.pid, other);
            }
        }
    }

    /// The threads that gdb let run have all ended, and others have not.
    fn stop_if_none_is_left(&self, state: &mut State) {
        let is_left = |thread: &Thread| thread.status != Status::Parked;
        if state.phase == Phase::Running
            && !state.threads.values().any(is_left)
            && let Some(tid) = state.any_thread()
        {
            self.stop(state, tid, Report::NoneLeft);
        }
    }

    /// If all threads have stopped: says so.
    fn settle(&self, state: &mut State) {
        let runs = |thread: &Thread| thread.status == Status::Running;
        if let Phase::Stopping { tid, report } = state.phase
            && !state.threads.is_empty()
            && !state.threads.values().any(runs)
        {
            state.phase = Phase::Stopped;
            // Who was to be interrupted may have ended meanwhile.
            let tid = if state.threads.contains_key(&tid) {
                tid
            } else {
                state.any_thread().unwrap_or(tid)
            };
            self.tell(state, News::Stopped { tid, report });
        }
    }
}

impl State {
    /// The first thread if it is there, else any.
    fn any_thread(&self) -> Option<u32> {
        let first = self.threads.contains_key(&self.pid).then_some(self.pid);
        first.or_else(|| self.threads.keys().next().copied())
    }

    /// All threads.
    pub(crate) fn threads(&self) -> impl Iterator<Item = u32> + '_ {
        self.threads.keys().copied()
    }

    /// What is known of a thread that has stopped.
    pub(crate) fn saved(&self, tid: u32) -> Option<&Saved> {
        self.threads.get(&tid)?.saved.as_deref()
    }

    /// The same, to be changed; `None` if the thread would not learn of it.
    pub(crate) fn saved_mut(&mut self, tid: u32) -> Option<&mut Saved> {
        let thread = self.threads.get_mut(&tid)?;
        if thread.status == Status::Parked {
            thread.saved.as_deref_mut()
        } else {
            None
        }
    }

    pub(crate) fn breakpoints(&self) -> &BTreeMap<u64, u8> {
        &self.breakpoints
    }

    pub(crate) fn breakpoints_mut(&mut self) -> &mut BTreeMap<u64, u8> {
        &mut self.breakpoints
    }
}

impl Thread {
    fn new() -> Self {
        Self {
            status: Status::Running,
            saved: None,
            go: None,
            stay: false,
            leave: false,
        }
    }
}

impl Parked {
    /// Nobody debugs: it gets the signal that it stopped for.
    fn go(saved: Box<Saved>) -> Self {
        Self::Go {
            go: Go::default(),
            saved,
            told: true,
        }
    }
}
