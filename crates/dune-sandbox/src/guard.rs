//! The guard: what handles every trap of a thread of the program.
//!
//! One body of code for both placements; what runs ring 3 is the
//! [`Engine`] underneath. Everything that comes from the program (registers,
//! memory, frames) is hostile until checked, and only what was checked is
//! used: a value in the program's memory is read once, into the guard's.

use core::cell::RefCell;
use core::ops::ControlFlow;
use std::fs::File;
use std::io::Write;
use std::os::fd::RawFd;
use std::sync::Arc;

use linux_raw_sys::general::{__NR_kill, __NR_tgkill, __NR_tkill};

use crate::bounce::Bounce;
use crate::calls::fork::finish_vfork;
use crate::calls::paths::Pin;
use crate::calls::procfs;
use crate::calls::segment::Segment;
use crate::calls::{Answer, Strings};
use crate::clock;
use crate::crash::Crash;
use crate::debug::hook::Event;
use crate::engine::{Access, Engine, EngineError, PageFaultError, Passage, Trap, UserState};
use crate::handler::Request;
use crate::host::{Errno, SysResult};
use crate::policy::enforced::Enforced;
use crate::program::{Memory, Program};
use crate::range::{PageRange, UserRange};
use crate::signal::deliver::{
    Interrupted, Mapped, fault_context, signal_of_exception, signal_of_host_fault,
    signal_of_page_fault,
};
use crate::signal::host::{self, thread_id};
use crate::signal::{
    DefaultAction, Disposition, Dispositions, SIGKILL, SIGNALS, ThreadSignals, bit, default_action,
    record,
};
use crate::snapshot::{Ending, Next, Served};
use crate::table::{self, Args, Call, Handling, Restart};
use crate::threads::{Finish, Wake};
use crate::user::UserMemory;
use crate::vma::effective;

/// What is to be done after a trap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// Run on.
    Continue,
    /// Run on, after a debugger has been told why not at once.
    Stop,
    /// The program has ended with this status (0 to 255).
    Exit(u8),
    /// The thread alone has ended, with this status.
    ThreadExit(u8),
    /// The thread must leave: the program is ending, or has been replaced.
    Leave,
    /// The program died of this signal.
    Killed(u32),
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It called `exit` with this status.
    Exit(u8),
    /// It died of this signal.
    Killed(u32),
}

/// A system call that the guard does not have, and how often it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissingCall {
    /// Its number.
    pub nr: u32,
    /// Its name, if there is such a call.
    pub name: Option<&'static str>,
    /// How often the program made it.
    pub count: u64,
}

/// The guard of one thread of a program. See the module documentation.
///
/// What the threads share is in the `Program`; there can be one at a time in
/// a process: signal dispositions, descriptors and the user's part of the
/// address space are the process's.
pub struct Guard {
    pub(crate) program: Arc<Program>,
    pub(crate) engine: Box<dyn Engine>,
    pub(crate) signals: ThreadSignals,
    pub(crate) strings: Strings,
    /// What the kernel gets to see of the guard.
    pub(crate) bounce: Bounce,
    /// What the call in hand holds, until it is done.
    pub(crate) pins: RefCell<Vec<Pin>>,
    /// The thread's id, the same for the program and the host.
    pub(crate) tid: u32,
    /// Where a zero goes when the thread has ended; 0 for nowhere.
    pub(crate) clear_child_tid: u64,
    /// What it gave to `exit`.
    pub(crate) status: Option<u8>,
    /// Set by a call that must not start again, whatever its row says.
    pub(crate) never_restart: bool,
    /// What a debugger is to be told of this thread.
    pub(crate) event: Option<Event>,
    /// Whether the service of the program wants no more of it.
    finished: bool,
    /// Set when a signal is fatal: the host blocks all of them then.
    pub(crate) all_blocked: bool,
    /// Set when the engine failed inside a call.
    pub(crate) broken: Option<EngineError>,
}

impl core::fmt::Debug for Guard {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Guard")
            .field("program", &self.program)
            .finish_non_exhaustive()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The byte goes with the engine.
        record::set_kick(None);
        record::set_passage(Passage::Open);
    }
}

impl Guard {
    /// The guard of the first thread, without a program yet.
    #[must_use]
    pub(crate) fn new(
        engine: Box<dyn Engine>,
        dispositions: Dispositions,
        signals: ThreadSignals,
    ) -> Self {
        let program = Arc::new(Program::new(dispositions, engine.fds()));
        Self::of_thread(program, engine, signals)
    }

    /// The guard of the calling thread.
    pub(crate) fn of_thread(
        program: Arc<Program>,
        engine: Box<dyn Engine>,
        signals: ThreadSignals,
    ) -> Self {
        record::set_kick(Some(engine.kick_byte()));
        record::set_passage(engine.passage());
        Self {
            program,
            engine,
            signals,
            strings: Strings::default(),
            bounce: Bounce::default(),
            pins: RefCell::default(),
            tid: thread_id(),
            clear_child_tid: 0,
            status: None,
            never_restart: false,
            event: None,
            finished: false,
            all_blocked: false,
            broken: None,
        }
    }

    /// Runs the program from `user` to its end, with all threads that it makes.
    ///
    /// # Errors
    ///
    /// If the engine fails.
    pub fn run(&mut self, user: &mut UserState) -> Result<End, EngineError> {
        host::listen_to_kicks();
        // A program that has just begun is not ending.
        if !self.program.threads.has(self.tid) {
            let _ = self.program.threads.join(self.tid);
        }
        self.begin_debugging();
        self.live(user).unwrap_or(Ok(End::Exit(0)))
    }

    /// Runs the thread to its end, and the leader to the program's. `None` for
    /// any other thread.
    pub(crate) fn live(&mut self, user: &mut UserState) -> Option<Finish> {
        let unseen = self.program.lets_calls_pass_unseen();
        if let Err(error) = self.engine.answer_by_itself(unseen) {
            self.engine_failed(error);
        }
        loop {
            self.status = self.run_thread(user);
            self.leave_debugger();
            self.die_of_robust_futexes();
            if self.tid != self.pid() {
                return None;
            }
            // Its signals are the others' now.
            host::block_all();
            self.release_child_tid();
            let program = Arc::clone(&self.program);
            program.threads.leave(self.tid, self.status);
            let interrupted = || program.served().is_some_and(Served::take_interrupt);
            let wake = program.threads.wait_as_leader(self.tid, interrupted);
            let ended = match &wake {
                Wake::RunEnded(ending) => Some(*ending),
                // All threads are gone, one by one.
                Wake::Finish(Ok(end)) if program.served().is_some() && !self.finished => {
                    Some(Ending::End(*end))
                }
                _ => None,
            };
            if let Some(ending) = ended {
                self.join_debugger();
                self.all_blocked = true;
                match self.run_ended(ending, user) {
                    Ok(Next::Continue) => continue,
                    Ok(Next::Finish(end)) => return Some(Ok(end)),
                    Err(error) => return Some(Err(error)),
                }
            }
            match wake {
                Wake::RunEnded(_) => return Some(Ok(End::Exit(0))),
                Wake::Finish(finish) if program.is_forked() => {
                    finish_vfork(&program);
                    leave_process(finish)
                }
                Wake::Finish(finish) => return Some(finish),
                Wake::Takeover(new) => {
                    *user = new.user;
                    self.signals = ThreadSignals {
                        mask: new.mask,
                        ..ThreadSignals::default()
                    };
                    self.clear_child_tid = 0;
                    if let Err(error) = self.engine.reset_xstate() {
                        program.threads.end(self.tid, Err(error));
                    }
                    if program.served().is_some() {
                        // It may have been interrupted while nobody looked.
                        host::kick(self.pid(), self.tid);
                    }
                    host::set_mask(self.signals.mask);
                    let _ = self.note_exec();
                    self.join_debugger();
                }
            }
        }
    }

    /// Runs until the thread must leave. Returns its status, if it ended by
    /// itself.
    fn run_thread(&mut self, user: &mut UserState) -> Option<u8> {
        loop {
            if record::take_kick()
                && let ControlFlow::Break(status) = self.look_up(user)
            {
                return status;
            }
            let (resume, fault) = match self.engine.run(user) {
                Ok(ref trap) => {
                    let resume = self.handle(trap, user);
                    // Nearly every trap.
                    if resume == Resume::Continue && self.broken.is_none() {
                        continue;
                    }
                    (self.unless_broken(resume), trap.address())
                }
                Err(error) => (Err(error), None),
            };
            if let ControlFlow::Break(status) = self.conclude(resume, fault, user) {
                return status;
            }
        }
    }

    /// This thread was kicked: finds out what for. Breaks with its status if it
    /// must leave.
    fn look_up(&mut self, user: &mut UserState) -> ControlFlow<Option<u8>> {
        // While the kick waited, no mask could be set.
        host::set_mask(self.signals.mask);
        if self.program.threads.must_leave(self.tid) {
            return ControlFlow::Break(None);
        }
        if self.tid == self.pid()
            && let Some(ending) = self.run_was_ended()
        {
            return match self.next_run(ending, user) {
                Some(finish) => {
                    self.end_program(finish);
                    ControlFlow::Break(None)
                }
                None => ControlFlow::Continue(()),
            };
        }
        self.stop_for_debugger(user)
    }

    /// Does what is to be done after a trap. Breaks with the thread's status if
    /// it must leave.
    pub(crate) fn conclude(
        &mut self,
        resume: Result<Resume, EngineError>,
        fault: Option<u64>,
        user: &mut UserState,
    ) -> ControlFlow<Option<u8>> {
        let finish = match resume {
            Ok(Resume::Continue | Resume::Stop) => return ControlFlow::Continue(()),
            Ok(Resume::ThreadExit(status)) if self.is_last_of_run() => Ok(End::Exit(status)),
            Ok(Resume::ThreadExit(status)) => return ControlFlow::Break(Some(status)),
            Ok(Resume::Leave) => return ControlFlow::Break(None),
            Ok(Resume::Exit(status)) => Ok(End::Exit(status)),
            Ok(Resume::Killed(signal)) => {
                self.report_crash(signal, fault, user);
                self.all_blocked = true;
                Ok(End::Killed(signal))
            }
            Err(error) => Err(error),
        };
        let finish = match finish {
            Ok(end) if self.program.served().is_some() => {
                if self.tid != self.pid() {
                    // The first thread sees to it.
                    let ending = Ending::End(end);
                    self.program.threads.end_run(self.pid(), ending);
                    return ControlFlow::Break(None);
                }
                match self.next_run(Ending::End(end), user) {
                    Some(finish) => finish,
                    None => return ControlFlow::Continue(()),
                }
            }
            finish => finish,
        };
        self.end_program(finish);
        ControlFlow::Break(None)
    }

    /// Whether this thread's end is that of a run of a served program.
    fn is_last_of_run(&self) -> bool {
        self.tid == self.pid()
            && self.program.served().is_some()
            && self.program.threads.lock().members().count() == 1
    }

    /// How the run in hand ended, if it did by another thread's doing.
    fn run_was_ended(&self) -> Option<Ending> {
        let served = self.program.served()?;
        if served.take_interrupt() {
            return Some(Ending::Interrupted);
        }
        self.program.threads.take_run_end()
    }

    /// Lets the service decide after a run. `None` if the program goes on.
    fn next_run(&mut self, ending: Ending, user: &mut UserState) -> Option<Finish> {
        let finish = match self.run_ended(ending, user) {
            Ok(Next::Continue) => return None,
            Ok(Next::Finish(end)) => Ok(end),
            Err(error) => Err(error),
        };
        self.finished = true;
        Some(finish)
    }

    /// Ends the program; the other threads are told to leave.
    fn end_program(&mut self, finish: Finish) {
        if self.program.is_forked() {
            // Nobody waits for the outcome, so the others need not leave one
            // by one.
            let state = self.program.threads.lock();
            if state.is_running() {
                let members: Vec<_> = state.members().collect();
                drop(state);
                for (tid, member) in members {
                    self.release_robust_futexes(tid, member.robust_list);
                }
                finish_vfork(&self.program);
                leave_process(finish);
            }
            return;
        }
        self.program.threads.end(self.pid(), finish);
    }

    /// Says where the program is when it dies of a signal, if that was asked
    /// for.
    pub(crate) fn report_crash(&self, signal: u32, address: Option<u64>, user: &UserState) {
        let Some(file) = self.program.crash_report() else {
            return;
        };
        // Files are opened for it, and read: by nobody but the guard.
        let memory = self.memory();
        let crash = procfs::apart(self, || Crash::of(signal, address, user, memory));
        let lines = match crash {
            Ok(crash) => crash.to_string(),
            Err(_) => Crash::without_frames(signal, address, user).to_string(),
        };
        let lines: String = lines
            .lines()
            .map(|line| format!("dune: {line}\n"))
            .collect();
        // There is nobody to tell that it cannot be written.
        let _ = { file }.write_all(lines.as_bytes());
    }

    /// Handles one trap.
    ///
    /// # Errors
    ///
    /// If the engine fails under it; the program cannot go on then.
    pub fn on_trap(&mut self, trap: Trap, user: &mut UserState) -> Result<Resume, EngineError> {
        let resume = self.handle(&trap, user);
        self.unless_broken(resume)
    }

    /// What came of a trap, or what the engine failed of under it.
    fn unless_broken(&mut self, resume: Resume) -> Result<Resume, EngineError> {
        match self.broken.take() {
            Some(error) => Err(error),
            None => Ok(resume),
        }
    }

    /// Handles one trap, after which the engine may be broken.
    fn handle(&mut self, trap: &Trap, user: &mut UserState) -> Resume {
        if self.program.served().is_some() {
            match self.look_for_marker(*trap, user) {
                Ok(None) => {}
                Ok(Some(resume)) => return resume,
                Err(error) => {
                    self.engine_failed(error);
                    return Resume::Continue;
                }
            }
        }
        let resume = match *trap {
            Trap::Syscall => self.on_syscall(user),
            Trap::PageFault { addr, error } => {
                self.on_page_fault(*trap, addr, error.needed(), user)
            }
            Trap::HostFault { addr, .. } => {
                self.deliver_fault(user, signal_of_host_fault(addr), fault_context(trap))
            }
            Trap::Exception { vector, .. } => match self.stop_at_breakpoint(vector, user) {
                Some(stop) => stop,
                None => {
                    let info = signal_of_exception(vector, user.regs.rip);
                    self.deliver_fault(user, info, fault_context(trap))
                }
            },
            Trap::Interrupted => Resume::Continue,
        };
        match resume {
            Resume::Continue if self.is_disturbed() => self.deliver_pending(user, None),
            end => end,
        }
    }

    /// Sets what the program may do and attach, and where its death is described. Only
    /// before it runs: nobody else may know of it yet.
    ///
    /// # Panics
    ///
    /// If somebody does.
    pub(crate) fn configure(
        &mut self,
        policy: Enforced,
        segments: Vec<Segment>,
        crash_report: Option<Arc<File>>,
    ) {
        // Going on without the policy is the one thing that must not happen.
        let program = Arc::get_mut(&mut self.program).expect("the program has not begun");
        program.set_policy(policy);
        program.set_segments(segments);
        if let Some(file) = crash_report {
            program.set_crash_report(file);
        }
    }

    /// Calls that the program made and the guard does not have.
    #[must_use]
    pub fn missing_calls(&self) -> Vec<MissingCall> {
        self.program.missing_calls()
    }

    /// The process's id, the same for the program and the host.
    pub(crate) fn pid(&self) -> u32 {
        self.program.pid()
    }

    /// The program's memory.
    pub(crate) fn memory(&self) -> UserMemory<'_> {
        UserMemory::new(self.program.memory_lock(), self.pid())
    }

    /// Whether `fd` is a descriptor of the guard.
    pub(crate) fn is_hidden_fd(&self, fd: RawFd) -> bool {
        self.program.hidden_fds().binary_search(&fd).is_ok()
    }

    /// Notes that the engine failed; the trap in hand will end the program.
    pub(crate) fn engine_failed(&mut self, error: EngineError) -> Errno {
        self.broken.get_or_insert(error);
        Errno::EIO
    }

    /// Takes `range` out of ring 3's reach, before the host mapping changes.
    /// The caller holds the memory's lock exclusively until that is done.
    pub(crate) fn revoke(&mut self, range: PageRange) -> Result<(), Errno> {
        self.engine
            .revoke(range)
            .map_err(|error| self.engine_failed(error))
    }

    /// Offers `range`, which lies in one area and is not admitted, to the engine
    /// before the program touches it. The caller holds the memory's lock.
    pub(crate) fn admit_ahead(&mut self, memory: &Memory, range: PageRange) {
        let Some(area) = memory.areas.find(range.start()) else {
            return;
        };
        if effective(area.attributes.access).is_empty() {
            return;
        }
        let what = memory.admissible(self.pid(), range.start(), area, Access::READ);
        let Ok(what) = what else {
            return;
        };
        if let Some(range) = what.range.intersect(range)
            && let Err(error) = self.engine.admit_ahead(range, what.access)
        {
            self.engine_failed(error);
        }
    }

    fn on_syscall(&mut self, user: &mut UserState) -> Resume {
        let regs = &user.regs;
        let rax = regs.rax;
        let args = [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9];
        // As the kernel: the number is the low half.
        let nr = rax as u32;
        let begun = self.trace_call(nr, &args);
        let Some(call) = table::find(nr) else {
            if let Some(begun) = begun {
                self.trace_answer(begun, &Answer::Return(Err(Errno::ENOSYS)));
            }
            self.count_missing(nr);
            user.regs.rax = Errno::ENOSYS.as_rax();
            return Resume::Continue;
        };
        self.never_restart = false;
        let answer = self.dispatch(call, user, &args);
        if self.program.is_in_snapshot()
            && let Some(served) = self.program.served()
        {
            served.note(call, args, &answer);
        }
        self.pins.get_mut().clear();
        if let Some(begun) = begun {
            self.trace_answer(begun, &answer);
        }
        match answer {
            Answer::Return(Ok(value)) => {
                user.regs.rax = value;
                Resume::Continue
            }
            Answer::Return(Err(errno)) => self.on_failed_call(call, user, rax, errno),
            other => resume_of(other),
        }
    }

    /// A call, made with this `rax`, has failed; perhaps it is to start again.
    #[inline(never)]
    fn on_failed_call(
        &mut self,
        call: &'static Call,
        user: &mut UserState,
        rax: u64,
        errno: Errno,
    ) -> Resume {
        let is_interrupted = match errno {
            Errno::ERESTARTSYS => true,
            Errno::EINTR => record::is_disturbed(),
            _ => false,
        };
        if !is_interrupted {
            user.regs.rax = errno.as_rax();
            return Resume::Continue;
        }
        let interrupted = Interrupted {
            restart: if self.never_restart {
                Restart::Never
            } else {
                call.restart
            },
            rax,
            errno,
        };
        self.deliver_pending(user, Some(interrupted))
    }

    fn dispatch(&mut self, call: &'static Call, user: &mut UserState, args: &Args) -> Answer {
        if self.program.crash_report().is_some()
            && let Some(signal) = self.kills_itself_by(call.nr, args)
            && self.signals.mask & bit(signal) == 0
        {
            self.report_crash(signal, None, user);
        }
        if self.program.served().is_some()
            && let Some(signal) = self.kills_itself_by(call.nr, args)
            && self.signals.mask & bit(signal) == 0
        {
            // It would end this process, and with it what serves the program.
            return Answer::Killed(signal);
        }
        if let Handling::Control(handler) = call.handling {
            return match self.check(call, args) {
                Ok(checked) => handler(self, user, checked.values()),
                Err(errno) => Answer::Return(Err(errno)),
            };
        }
        Answer::Return(match self.program.handler(call.nr) {
            Some(handler) => handler(&mut Request::new(self, call, *args)),
            None => self.handle_without_handler(call, args),
        })
    }

    /// Handles a call that only has a result, by its row in the table.
    #[inline]
    pub(crate) fn handle_without_handler(&mut self, call: &'static Call, args: &Args) -> SysResult {
        match call.handling {
            Handling::Refused(errno) => Err(errno),
            // `Control` has been seen to; a row like any other that is not there.
            Handling::Missing | Handling::Control(_) => {
                self.count_missing(call.nr);
                Err(Errno::ENOSYS)
            }
            Handling::Forwarded | Handling::Emulated(_) => {
                let checked = self.check(call, args)?;
                match call.handling {
                    Handling::Emulated(handler) => handler(self, checked.values()),
                    _ => checked.forward(call.nr),
                }
            }
        }
    }

    #[expect(non_upper_case_globals, reason = "the kernel's names, matched against")]
    /// The signal by which a call of this thread is about to end the process.
    fn kills_itself_by(&self, nr: u32, args: &Args) -> Option<u32> {
        let pid = u64::from(self.pid());
        let signal = match nr {
            __NR_kill | __NR_tkill if args[0] == pid => args[1] as u32,
            __NR_tgkill if args[0] == pid => args[2] as u32,
            _ => return None,
        };
        let fatal = (1..=SIGNALS).contains(&signal)
            && default_action(signal) == DefaultAction::Terminate
            && self.program.dispositions().action(signal).disposition() == Disposition::Default;
        fatal.then_some(signal)
    }

    pub(crate) fn count_missing(&self, nr: u32) {
        self.program.count_missing(nr);
    }

    fn on_page_fault(
        &mut self,
        trap: Trap,
        addr: u64,
        needed: Access,
        user: &mut UserState,
    ) -> Resume {
        // Shared, until the page is admitted: who takes rights away waits.
        let program = Arc::clone(&self.program);
        let memory = program.memory();
        let area = UserRange::new(addr, 1).and_then(|_| memory.areas.find(addr));
        let mut fault = fault_context(&trap);
        let mapped = match area {
            Some(area) => {
                let access = effective(area.attributes.access);
                if access.contains(needed)
                    && let Some(offset) = clock::offset_of(&memory, area)
                    && let Some(clock) = clock::host()
                {
                    if let Err(error) = self.engine.admit_clock(area.range, clock.data + offset) {
                        self.engine_failed(error);
                    }
                    return Resume::Continue;
                }
                if access.contains(needed) {
                    let pid = program.pid();
                    let Ok(what) = memory.admissible(pid, addr, area, needed) else {
                        // As where Linux has no memory left for a page.
                        return Resume::Killed(SIGKILL);
                    };
                    if let Err(error) = self.engine.admit(addr, what.range, what.access) {
                        self.engine_failed(error);
                    }
                    return Resume::Continue;
                }
                // An engine may have left the page out although it can be
                // read; Linux would have it there.
                if !access.is_empty() {
                    fault.error |= u64::from(PageFaultError::PRESENT.bits());
                }
                Mapped::WithoutTheRight
            }
            None => Mapped::Nothing,
        };
        drop(memory);
        self.deliver_fault(user, signal_of_page_fault(addr, mapped), fault)
    }
}

/// What is to be done after a call that did more than to return something.
#[inline(never)]
fn resume_of(answer: Answer) -> Resume {
    match answer {
        Answer::Return(_) | Answer::Registers => Resume::Continue,
        Answer::Stop => Resume::Stop,
        Answer::Exit(status) => Resume::Exit(status),
        Answer::ThreadExit(status) => Resume::ThreadExit(status),
        Answer::Leave => Resume::Leave,
        Answer::Killed(signal) => Resume::Killed(signal),
    }
}

/// Ends a process that has nobody to return to, as its program ended.
pub(crate) fn leave_process(finish: Finish) -> ! {
    const SANDBOX_FAILED: u8 = 125;
    let status = match finish {
        Ok(End::Exit(status)) => status,
        Ok(End::Killed(signal)) => {
            host::die_of(signal);
            128_u8.wrapping_add(signal as u8)
        }
        Err(error) => {
            eprintln!("dune: {error}");
            SANDBOX_FAILED
        }
    };
    host::exit_process(status)
}

#[cfg(test)]
mod tests {
    use linux_raw_sys::general as nr;

    use super::*;
    use crate::engine::mock::{MockEngine, Request};
    use crate::range::PAGE_SIZE;
    use crate::signal::{SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGTRAP};
    use crate::testing::guard;
    use crate::vma::Attributes;

    const AT: u64 = 0x2000_0000_0000;

    fn fault(addr: u64, error: PageFaultError) -> Trap {
        Trap::PageFault {
            addr,
            error: error | PageFaultError::USER,
        }
    }

    fn with_area(access: Access) -> (Guard, PageRange) {
        let guard = guard();
        let range = PageRange::new(AT, 4 * PAGE_SIZE).unwrap();
        guard
            .program
            .memory_mut()
            .areas
            .map(range, Attributes::anonymous(access));
        (guard, range)
    }

    fn call(guard: &mut Guard, nr: u32, args: &[u64]) -> (Resume, u64) {
        let mut user = UserState::default();
        user.regs.rax = u64::from(nr);
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        let regs = &mut user.regs;
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = all;
        let resume = guard.on_trap(Trap::Syscall, &mut user).unwrap();
        (resume, user.regs.rax)
    }

    #[test]
    fn permitted_faults_are_admitted_with_the_rights_of_their_area() {
        let rw = Access::READ | Access::WRITE;
        let range = PageRange::new(AT, 4 * PAGE_SIZE).unwrap();
        let mock = MockEngine::new();
        let requests = Arc::clone(&mock.requests);
        let mut guard = Guard::new(
            Box::new(mock),
            Dispositions::new(),
            ThreadSignals::default(),
        );
        // Writable alone: x86 makes it readable.
        guard
            .program
            .memory_mut()
            .areas
            .map(range, Attributes::anonymous(Access::WRITE));
        let mut user = UserState::default();
        for trap in [
            fault(AT + 5000, PageFaultError::WRITE),
            fault(AT, PageFaultError::empty()),
        ] {
            assert_eq!(guard.on_trap(trap, &mut user).unwrap(), Resume::Continue);
        }
        let expected = [
            Request::Admit(AT + 5000, range, rw),
            Request::Admit(AT, range, rw),
        ];
        assert_eq!(*requests.lock().unwrap(), expected);
    }

    #[test]
    fn nothing_is_done_for_the_program_after_the_engine_has_failed() {
        let mut mock = MockEngine::new();
        let requests = Arc::clone(&mock.requests);
        let mut call = UserState::default();
        call.regs.rax = nr::__NR_getppid.into();
        mock.script.push_back((call, Trap::Syscall));
        mock.script
            .push_back((call, fault(AT, PageFaultError::empty())));
        let mut guard = Guard::new(
            Box::new(mock),
            Dispositions::new(),
            ThreadSignals::default(),
        );
        let range = PageRange::new(AT, PAGE_SIZE).unwrap();
        guard
            .program
            .memory_mut()
            .areas
            .map(range, Attributes::anonymous(Access::READ));
        guard.engine_failed(EngineError::NoMemory { what: "a test" });
        // The call itself goes well.
        assert_eq!(guard.run_thread(&mut UserState::default()), None);
        assert_eq!(*requests.lock().unwrap(), []);
    }

    #[test]
    fn faults_without_a_right_are_fatal() {
        let mut user = UserState::default();
        for (access, error, addr) in [
            (Access::READ, PageFaultError::WRITE, AT),
            (Access::READ | Access::WRITE, PageFaultError::INSTR, AT),
            (Access::empty(), PageFaultError::empty(), AT),
            (Access::all(), PageFaultError::empty(), AT - 1),
            (Access::all(), PageFaultError::empty(), AT + 4 * PAGE_SIZE),
            (Access::all(), PageFaultError::empty(), 0),
            (Access::all(), PageFaultError::empty(), u64::MAX),
        ] {
            let (mut guard, _) = with_area(access);
            let resume = guard.on_trap(fault(addr, error), &mut user).unwrap();
            assert_eq!(
                resume,
                Resume::Killed(SIGSEGV),
                "{access:?} {error:?} {addr:#x}"
            );
        }
    }

    #[test]
    fn exceptions_are_the_signals_of_linux() {
        let mut user = UserState::default();
        for (vector, signal) in [
            (0, SIGFPE),
            (1, SIGTRAP),
            (3, SIGTRAP),
            (4, SIGSEGV),
            (5, SIGSEGV),
            (6, SIGILL),
            (11, SIGBUS),
            (12, SIGBUS),
            (13, SIGSEGV),
            (16, SIGFPE),
            (17, SIGBUS),
            (19, SIGFPE),
        ] {
            let trap = Trap::Exception {
                vector,
                error: 0,
                dr6: 0,
            };
            let resume = guard().on_trap(trap, &mut user).unwrap();
            assert_eq!(resume, Resume::Killed(signal), "vector {vector}");
        }
        let trap = Trap::HostFault {
            addr: AT,
            error: PageFaultError::USER,
        };
        assert_eq!(
            guard().on_trap(trap, &mut user).unwrap(),
            Resume::Killed(SIGBUS)
        );
    }

    #[test]
    fn missing_calls_are_refused_and_counted() {
        let mut guard = guard();
        for number in [350, 350, 400, u32::MAX] {
            let (resume, rax) = call(&mut guard, number, &[]);
            assert_eq!((resume, rax), (Resume::Continue, Errno::ENOSYS.as_rax()));
        }
        // Refused on purpose: nothing to warn of.
        assert_eq!(
            call(&mut guard, nr::__NR_rseq, &[]).1,
            Errno::ENOSYS.as_rax()
        );
        assert_eq!(
            call(&mut guard, nr::__NR_ptrace, &[]).1,
            Errno::EPERM.as_rax()
        );
        let missing: Vec<MissingCall> = guard.missing_calls();
        assert_eq!(
            missing,
            [
                MissingCall {
                    nr: 350,
                    name: None,
                    count: 2
                },
                MissingCall {
                    nr: 400,
                    name: None,
                    count: 1
                },
                MissingCall {
                    nr: u32::MAX,
                    name: None,
                    count: 1
                },
            ]
        );
    }

    #[test]
    fn numbers_of_missing_calls_do_not_fill_memory() {
        let mut guard = guard();
        for number in 1_000..10_000 {
            call(&mut guard, number, &[]);
        }
        assert!(guard.missing_calls().len() <= 1024);
    }

    #[test]
    fn exit_ends_with_the_low_byte() {
        assert_eq!(
            call(&mut guard(), nr::__NR_exit_group, &[0x1_07]).0,
            Resume::Exit(7)
        );
    }

    #[test]
    fn rights_are_revoked_before_the_host_changes_and_given_at_the_next_fault() {
        let mock = MockEngine::new();
        let requests = Arc::clone(&mock.requests);
        let mut guard = Guard::new(
            Box::new(mock),
            Dispositions::new(),
            ThreadSignals::default(),
        );
        guard.program.memory_mut().space.mmap_top = 0x2100_0000_0000;
        let flags = u64::from(nr::MAP_PRIVATE | nr::MAP_ANONYMOUS);
        let len = 4 * PAGE_SIZE;
        let (_, at) = call(&mut guard, nr::__NR_mmap, &[0, len, 3, flags, u64::MAX]);
        assert_eq!(at, 0x2100_0000_0000 - len);
        assert!(guard.program.memory().areas.find(at).is_some());
        assert_eq!(
            call(&mut guard, nr::__NR_mprotect, &[at, PAGE_SIZE, 1]).1,
            0
        );
        assert_eq!(
            guard
                .program
                .memory()
                .areas
                .find(at)
                .unwrap()
                .attributes
                .access,
            Access::READ
        );
        assert_eq!(guard.memory().write(at, b"x"), Err(Errno::EFAULT));
        assert_eq!(guard.memory().write(at + PAGE_SIZE, b"x"), Ok(()));
        assert_eq!(call(&mut guard, nr::__NR_munmap, &[at, len]).1, 0);
        let range = |len| PageRange::new(at, len).unwrap();
        let expected = [
            Request::Revoke(range(PAGE_SIZE)),
            Request::Revoke(range(len)),
        ];
        assert_eq!(*requests.lock().unwrap(), expected);
        assert!(guard.program.memory().areas.find(at).is_none());
        assert_eq!(guard.program.memory().areas.bytes(), 0);
    }
}
