//! Where the guard meets the debugger.

use core::ops::{ControlFlow, Range};
use std::sync::Arc;

use linux_raw_sys::general::__NR_prctl;
use linux_raw_sys::prctl::PR_GET_NAME;

use super::control::{Control, Go, Parked, Pass, Report, Saved};
use super::memory;
use crate::calls::{Answer, forward_always, own_mut};
use crate::engine::{EngineError, Trap, UserState};
use crate::guard::{Guard, Resume};
use crate::signal::deliver::{Interrupted, SYSCALL_LEN, rewind};
use crate::signal::frame::{self, FaultContext};
use crate::signal::{Disposition, SI_USER, SIGNALS, SigInfo, bit, host, record};

/// The trap flag.
const TF: u64 = 1 << 8;
/// Of DR6: a single step was made (SDM volume 3, 18.2.3).
const BS: u64 = 1 << 14;
const DEBUG: u8 = 1;
const BREAKPOINT: u8 = 3;

/// What a thread has to report, until it is told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    report: Report,
    /// The signal that it gets afterwards.
    delivery: Option<Delivery>,
}

/// A signal on its way to the program.
#[derive(Clone, Copy, Debug)]
struct Delivery {
    info: SigInfo,
    /// What the hardware said, if an instruction of the thread caused it.
    fault: Option<FaultContext>,
    /// The call that it interrupted, which starts again unless a handler says
    /// otherwise, and where it would.
    interrupted: Option<(Interrupted, u64)>,
}

impl From<Report> for Event {
    fn from(report: Report) -> Self {
        Self {
            report,
            delivery: None,
        }
    }
}

impl Guard {
    fn control(&self) -> Option<Arc<Control>> {
        self.program.control().map(Arc::clone)
    }

    /// Whether somebody debugs the program.
    fn is_debugged(&self) -> bool {
        self.program
            .control()
            .is_some_and(|control| control.is_on())
    }

    /// The program is about to begin, on its first thread.
    pub(crate) fn begin_debugging(&mut self) {
        if self.is_debugged() {
            self.event = Some(Report::Started.into());
            self.join_debugger();
        }
    }

    /// The thread belongs to the program from now on.
    pub(crate) fn join_debugger(&mut self) {
        if let Some(control) = self.control()
            && (control.join(self.tid) || self.event.is_some())
        {
            record::kick_self();
        }
    }

    /// The thread will not run ring 3 any more.
    pub(crate) fn leave_debugger(&mut self) {
        self.event = None;
        if let Some(control) = self.control() {
            control.leave(self.tid);
        }
    }

    /// Another program has taken the place of the one that was debugged; this
    /// thread runs it.
    pub(crate) fn note_exec(&mut self) -> Answer {
        if self.is_debugged() {
            let _ = self.stop_for(Report::Exec.into());
            return Answer::Stop;
        }
        Answer::Registers
    }

    /// The old program's memory is gone.
    pub(crate) fn forget_breakpoints(&self) {
        if let Some(control) = self.control() {
            control.forget_breakpoints();
        }
    }

    /// The thread, with these registers, waits in the guard for longer.
    pub(crate) fn away_from_debugger(&self, user: &UserState, xstate: &[u8]) {
        if let Some(control) = self.control() {
            control.away(self.tid, saved(user, xstate.to_vec()));
        }
    }

    /// It is back.
    pub(crate) fn back_to_debugger(&self) {
        if let Some(control) = self.control()
            && control.back(self.tid)
        {
            record::kick_self();
        }
    }

    /// This is the child of a `fork`, which is not debugged.
    pub(crate) fn escape_debugger(&mut self) {
        self.event = None;
        let program = Arc::clone(&self.program);
        let Some(control) = program.control_of_parent() else {
            return;
        };
        if control.is_on() {
            memory::clean_child(&program, &control.lock());
            self.note_fatal_signals(host::Noted::Handled);
        }
    }

    /// The thread has something to report when the trap in hand is done with.
    fn stop_for(&mut self, event: Event) -> Resume {
        self.event = Some(event);
        record::kick_self();
        Resume::Stop
    }

    /// A signal is about to be delivered: the debugger hears of it first. The
    /// call that it interrupted begins again, unless a handler says otherwise
    /// in the end.
    pub(crate) fn stop_for_signal(
        &mut self,
        user: &mut UserState,
        info: SigInfo,
        interrupted: Option<Interrupted>,
    ) -> Option<Resume> {
        self.is_debugged().then(|| {
            let interrupted = interrupted.map(|call| {
                rewind(user, &call);
                (call, user.regs.rip)
            });
            self.stop_for(Event {
                report: Report::Signal(info),
                delivery: Some(Delivery {
                    info,
                    fault: None,
                    interrupted,
                }),
            })
        })
    }

    /// The same, of a signal that the thread's own instruction caused.
    pub(crate) fn stop_for_fault(&mut self, info: SigInfo, fault: FaultContext) -> Option<Resume> {
        self.is_debugged().then(|| {
            self.stop_for(Event {
                report: Report::Signal(info),
                delivery: Some(Delivery {
                    info,
                    fault: Some(fault),
                    interrupted: None,
                }),
            })
        })
    }

    /// If the exception is a breakpoint of the debugger: stops there.
    pub(crate) fn stop_at_breakpoint(
        &mut self,
        vector: u8,
        user: &mut UserState,
    ) -> Option<Resume> {
        if vector != BREAKPOINT {
            return None;
        }
        let control = self.program.control()?;
        let at = user.regs.rip.wrapping_sub(1);
        control.has_breakpoint(at).then(|| {
            user.regs.rip = at;
            self.stop_for(Report::Breakpoint.into())
        })
    }

    /// Stops if the debugger wants that, or is to be told something, for as
    /// long as it wants, and makes the steps that it wants.
    pub(crate) fn stop_for_debugger(&mut self, user: &mut UserState) -> ControlFlow<Option<u8>> {
        let mut steps = None;
        loop {
            let Some(control) = self.control() else {
                self.event = None;
                return ControlFlow::Continue(());
            };
            let mut fault = None;
            let resume = if self.event.is_some() || control.wants(self.tid) {
                self.park(&control, user, &mut steps, &mut fault)
            } else if let Some(range) = steps.take() {
                self.step(user, range, &mut steps)
            } else {
                return ControlFlow::Continue(());
            };
            match resume {
                Ok(Resume::Continue | Resume::Stop) => {}
                end => return self.conclude(end, fault, user),
            }
        }
    }

    /// Waits until the debugger lets the thread go on, with registers and
    /// signal as it wants them, and learns whether it shall make steps.
    fn park(
        &mut self,
        control: &Control,
        user: &mut UserState,
        steps: &mut Option<Range<u64>>,
        fault: &mut Option<u64>,
    ) -> Result<Resume, EngineError> {
        let event = self.event.take();
        let mut xstate = vec![0; self.engine.xstate_len()];
        self.engine.save_xstate(&mut xstate)?;
        let mxcsr_mask = frame::mxcsr_mask(&xstate);
        let report = event.as_ref().map(|event| event.report);
        let parked = control.park(self.tid, report, saved(user, xstate));
        if let Some(all) = control.take_notes_signals() {
            self.note_fatal_signals(self.signals_to_note(all));
        }
        let (go, mut saved, told) = match parked {
            Parked::Leave => return Ok(Resume::Leave),
            Parked::Go { go, saved, told } => (go, saved, told),
        };
        if saved.changed {
            *user = saved.user;
            frame::sanitise_xstate(&mut saved.xstate, self.engine.xcr0(), mxcsr_mask);
            self.engine.load_xstate(&saved.xstate)?;
        }
        let Go { step, pass } = go;
        if let Some(event) = event.filter(|event| !told && event.must_be_told()) {
            self.event = Some(event);
            return Ok(Resume::Stop);
        }
        *steps = step;
        let delivery = event.and_then(|event| event.delivery);
        *fault = delivery
            .filter(|delivery| delivery.fault.is_some())
            .map(|delivery| delivery.info.fields[0]);
        let rsp = user.regs.rsp;
        let resume = self.deliver_as_told(user, delivery, pass);
        if steps.is_some() && user.regs.rsp != rsp {
            // As on Linux, a step into a handler ends at its first instruction.
            *steps = None;
            self.event = Some(Report::Step.into());
        }
        Ok(resume)
    }

    fn deliver_as_told(
        &mut self,
        user: &mut UserState,
        own: Option<Delivery>,
        pass: Pass,
    ) -> Resume {
        let delivery = match (pass, own) {
            (Pass::Own, own) => own,
            (Pass::Nothing, _) => None,
            (Pass::Signal(signal), Some(own)) if own.info.signal() == signal => Some(own),
            (Pass::Signal(signal), own) => Some(Delivery {
                info: self.signal_of_debugger(signal),
                fault: None,
                interrupted: own.and_then(|own| own.interrupted),
            }),
        };
        let Some(delivery) = delivery else {
            // All signals are blocked since this one was noted.
            host::set_mask(self.signals.mask);
            return Resume::Continue;
        };
        if let Some(fault) = delivery.fault {
            return self.deliver_fault_now(user, delivery.info, fault);
        }
        let signal = delivery.info.signal();
        if self.signals.mask & bit(signal) != 0 {
            // One that the debugger made up: it waits in the host.
            host::raise(signal);
            host::set_mask(self.signals.mask);
            return Resume::Continue;
        }
        // The call was made to begin again; whether it does, the handler says.
        let interrupted = delivery
            .interrupted
            .filter(|(call, at)| user.regs.rip == *at && user.regs.rax == call.rax)
            .map(|(call, _)| {
                user.regs.rip = user.regs.rip.wrapping_add(SYSCALL_LEN);
                call
            });
        self.deliver_now(user, delivery.info, interrupted)
    }

    fn signal_of_debugger(&self, signal: u32) -> SigInfo {
        let mut info = SigInfo::ZERO;
        info.signo = signal as i32;
        info.code = SI_USER;
        info.fields[0] = self.pid().into();
        info
    }

    /// Runs one instruction. When it has been, and the program has left
    /// `range`, that is reported; otherwise there are steps to be made still.
    fn step(
        &mut self,
        user: &mut UserState,
        range: Range<u64>,
        steps: &mut Option<Range<u64>>,
    ) -> Result<Resume, EngineError> {
        // The program may step on its own account.
        let own = user.regs.rflags & TF;
        user.regs.rflags |= TF;
        let trap = self.engine.run(user)?;
        if own == 0 {
            user.regs.rflags &= !TF;
            if trap == Trap::Syscall {
                // Where the instruction has put the flags.
                user.regs.r11 &= !TF;
            }
        }
        let is_step = matches!(trap, Trap::Exception { vector: DEBUG, dr6, .. } if dr6 & BS != 0);
        if !(is_step && own == 0) {
            let behind = user.regs.rip;
            let resume = self.on_trap(trap, user)?;
            let begins_again = user.regs.rip == behind.wrapping_sub(SYSCALL_LEN);
            if resume != Resume::Continue || trap != Trap::Syscall || begins_again {
                *steps = Some(range);
                return Ok(resume);
            }
        }
        if range.contains(&user.regs.rip) {
            *steps = Some(range);
        } else {
            self.event = Some(Report::Step.into());
        }
        Ok(Resume::Continue)
    }

    /// Which signals the guard notes while gdb is told of all, and afterwards.
    fn signals_to_note(&self, all: bool) -> host::Noted {
        if all {
            host::Noted::AllFatal
        } else if self.program.served().is_some() {
            host::Noted::Fatal
        } else {
            host::Noted::Handled
        }
    }

    fn note_fatal_signals(&self, which: host::Noted) {
        let dispositions = self.program.dispositions();
        host::note(which);
        for signal in 1..=SIGNALS {
            let action = dispositions.action(signal);
            if action.disposition() == Disposition::Default {
                // Fails for those whose action cannot be changed.
                let _ = host::install(signal, &action);
            }
        }
    }
}

impl Event {
    /// Whether it is lost if it is not told. Who has come to a breakpoint comes
    /// to it again, and who has made a step is asked for another.
    fn must_be_told(&self) -> bool {
        self.delivery.is_some() || self.report == Report::Exec
    }
}

/// What is handed over of this thread.
fn saved(user: &UserState, xstate: Vec<u8>) -> Box<Saved> {
    const NAME_LEN: usize = 16;
    let mut name = [0_u8; NAME_LEN];
    let args = [u64::from(PR_GET_NAME), own_mut(&mut name), 0, 0, 0, 0];
    let len = match forward_always(__NR_prctl, args) {
        Ok(_) => name.iter().position(|&byte| byte == 0).unwrap_or(0),
        Err(_) => 0,
    };
    Box::new(Saved {
        user: *user,
        xstate,
        name: String::from_utf8_lossy(&name[..len]).into_owned(),
        changed: false,
    })
}
