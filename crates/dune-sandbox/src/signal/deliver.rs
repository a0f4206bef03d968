//! From a signal to the program's handler, or to its end.

use linux_raw_sys::general::{SA_NODEFER, SA_ONSTACK, SA_RESETHAND, SA_RESTART, SA_RESTORER};

use crate::engine::{Trap, UserState};
use crate::guard::{Guard, Resume};
use crate::host::Errno;
use crate::range::USER_HI;
use crate::signal::frame::{self, FaultContext, Frame, Placement};
use crate::signal::{
    Action, AltStack, DefaultAction, Disposition, SI_KERNEL, SIGBUS, SIGFPE, SIGILL, SIGSEGV,
    SIGTRAP, SS_AUTODISARM, SigInfo, UNBLOCKABLE, bit, default_action, host, record,
};
use crate::table::Restart;

/// TF, DF and RF are clear when a handler starts.
const FLAGS_CLEARED: u64 = (1 << 8) | (1 << 10) | (1 << 16);

/// Bytes of the `SYSCALL` instruction.
pub(crate) const SYSCALL_LEN: u64 = 2;

/// `si_code` values of faults (asm-generic/siginfo.h).
mod code {
    pub(super) const SEGV_MAPERR: i32 = 1;
    pub(super) const SEGV_ACCERR: i32 = 2;
    pub(super) const BUS_ADRALN: i32 = 1;
    pub(super) const BUS_ADRERR: i32 = 2;
    pub(super) const FPE_INTDIV: i32 = 1;
    pub(super) const FPE_FLTDIV: i32 = 3;
    pub(super) const ILL_ILLOPN: i32 = 2;
    pub(super) const TRAP_TRACE: i32 = 2;
}

/// A system call that may have been interrupted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interrupted {
    pub(crate) restart: Restart,
    /// What `rax` held when it was made.
    pub(crate) rax: u64,
    pub(crate) errno: Errno,
}

impl Interrupted {
    /// Whether it must start again after a handler with `action`.
    fn restarts(&self, action: &Action) -> bool {
        self.errno == Errno::ERESTARTSYS
            || (self.restart == Restart::IfHandlerSaysSo && action.has(SA_RESTART))
    }
}

impl Guard {
    /// Whether there may be something for [`Guard::deliver_pending`] to do.
    #[inline]
    pub(crate) fn is_disturbed(&self) -> bool {
        self.signals.held.is_some() || record::is_disturbed()
    }

    /// Delivers the signal that was noted, if there is one. `interrupted` is
    /// the system call that just failed with `EINTR` or was given up;
    /// otherwise `rax` is final already.
    #[cold]
    pub(crate) fn deliver_pending(
        &mut self,
        user: &mut UserState,
        interrupted: Option<Interrupted>,
    ) -> Resume {
        let Some(info) = self.next_signal() else {
            if let Some(interrupted) = interrupted {
                rewind(user, &interrupted);
            }
            return Resume::Continue;
        };
        match self.stop_for_signal(user, info, interrupted) {
            Some(stop) => stop,
            None => self.deliver_now(user, info, interrupted),
        }
    }

    /// Delivers `info`, which may have interrupted a system call.
    pub(crate) fn deliver_now(
        &mut self,
        user: &mut UserState,
        info: SigInfo,
        interrupted: Option<Interrupted>,
    ) -> Resume {
        self.trace_signal(&info);
        let signal = info.signal();
        let action = self.program.dispositions().action(signal);
        if let Some(interrupted) = &interrupted {
            if action.disposition() != Disposition::Handler || interrupted.restarts(&action) {
                rewind(user, interrupted);
            } else {
                user.regs.rax = Errno::EINTR.as_rax();
            }
        }
        match action.disposition() {
            Disposition::Handler => self.start_handler(user, info, action, FaultContext::default()),
            Disposition::Ignore => {
                host::set_mask(self.signals.mask);
                Resume::Continue
            }
            Disposition::Default => match default_action(signal) {
                DefaultAction::Ignore => {
                    host::set_mask(self.signals.mask);
                    Resume::Continue
                }
                DefaultAction::Terminate => Resume::Killed(signal),
                DefaultAction::Stop => {
                    // The host's own default: it stops us in `set_mask`.
                    host::raise(signal);
                    host::set_mask(self.signals.mask);
                    Resume::Continue
                }
            },
        }
    }

    /// The signal to deliver, if any is noted or was held and is not any more.
    fn next_signal(&mut self) -> Option<SigInfo> {
        let is_held = self.signals.mask & bit(record::KICK) != 0;
        match record::take() {
            Some(info) if is_held && info.signal() == record::KICK => {
                self.signals.held = Some(info);
                host::set_mask(self.signals.mask);
                None
            }
            None if !is_held => self.signals.held.take(),
            info => info,
        }
    }

    /// Sends the program the signal that its own instruction caused.
    pub(crate) fn deliver_fault(
        &mut self,
        user: &mut UserState,
        info: SigInfo,
        fault: FaultContext,
    ) -> Resume {
        match self.stop_for_fault(info, fault) {
            Some(stop) => stop,
            None => self.deliver_fault_now(user, info, fault),
        }
    }

    /// As [`Guard::deliver_fault`], whoever debugs the program.
    pub(crate) fn deliver_fault_now(
        &mut self,
        user: &mut UserState,
        info: SigInfo,
        fault: FaultContext,
    ) -> Resume {
        self.trace_signal(&info);
        let signal = info.signal();
        let action = self.program.dispositions().action(signal);
        let blocked = self.signals.mask & bit(signal) != 0;
        if action.disposition() != Disposition::Handler || blocked {
            return Resume::Killed(signal);
        }
        self.start_handler(user, info, action, fault)
    }

    /// Builds the frame and lets the program go on in its handler.
    fn start_handler(
        &mut self,
        user: &mut UserState,
        info: SigInfo,
        action: Action,
        fault: FaultContext,
    ) -> Resume {
        let signal = info.signal();
        if self.push_frame(user, info, action, fault).is_err() {
            // As the kernel: no room for a frame is a SIGSEGV that no handler
            // could get either.
            return Resume::Killed(SIGSEGV);
        }
        if action.has(SA_RESETHAND) {
            let mut dispositions = self.program.dispositions();
            dispositions.set_action(
                signal,
                Action {
                    handler: super::SIG_DFL,
                    ..action
                },
            );
            host::set_default(signal);
        }
        let mut mask = self.signals.mask | action.mask;
        if !action.has(SA_NODEFER) {
            mask |= bit(signal);
        }
        self.signals.mask = mask & !UNBLOCKABLE;
        host::set_mask(self.signals.mask);
        Resume::Continue
    }

    fn push_frame(
        &mut self,
        user: &mut UserState,
        info: SigInfo,
        action: Action,
        fault: FaultContext,
    ) -> Result<(), Errno> {
        if !action.has(SA_RESTORER) || action.handler >= USER_HI {
            return Err(Errno::EFAULT);
        }
        let altstack = self.signals.altstack;
        let rsp = user.regs.rsp;
        let switch = action.has(SA_ONSTACK) && altstack.size != 0 && !altstack.holds(rsp);
        let top = switch.then(|| altstack.sp.wrapping_add(altstack.size));
        let xstate_len = self.engine.xstate_len();
        let at = Placement::new(rsp, top, xstate_len).ok_or(Errno::EFAULT)?;
        let on_altstack = switch || (altstack.size != 0 && altstack.holds(rsp));
        if on_altstack && altstack.flags & SS_AUTODISARM == 0 && at.frame < altstack.sp {
            return Err(Errno::EFAULT);
        }

        let mut xstate = vec![0; frame::fpstate_len(xstate_len) as usize];
        if let Err(error) = self.engine.save_xstate(&mut xstate[..xstate_len]) {
            return Err(self.engine_failed(error));
        }
        frame::seal_xstate(&mut xstate, self.engine.xcr0());
        let mask = self.signals.mask;
        let told = AltStack {
            flags: altstack.flags_at(rsp),
            ..altstack
        };
        let frame = frame::build(user, info, fault, mask, told, action.restorer, at);
        self.memory().write(at.fpstate, &xstate)?;
        self.memory().write_value(at.frame, &frame)?;

        if altstack.flags & SS_AUTODISARM != 0 {
            self.signals.altstack = AltStack::default();
        }
        let regs = &mut user.regs;
        regs.rip = action.handler;
        regs.rsp = at.frame;
        regs.rdi = u64::from(info.signal());
        regs.rsi = at.frame + core::mem::offset_of!(Frame, info) as u64;
        regs.rdx = at.frame + 8;
        regs.rax = 0;
        regs.rflags &= !FLAGS_CLEARED;
        Ok(())
    }

    /// Undoes [`Guard::push_frame`] from what the program left on its stack.
    ///
    /// # Errors
    ///
    /// If the frame cannot be read or holds a state that cannot be.
    pub(crate) fn pop_frame(&mut self, user: &mut UserState) -> Result<(), Errno> {
        // The handler's `ret` has taken the return address.
        let at = user.regs.rsp.wrapping_sub(8);
        let frame: Frame = self.memory().read_value(at)?;
        let regs = frame.context.registers();
        if regs.rip >= USER_HI {
            return Err(Errno::EFAULT);
        }
        self.load_frame_xstate(frame.context.fpstate)?;
        user.regs = regs;
        self.signals.mask = frame.mask & !UNBLOCKABLE;
        host::set_mask(self.signals.mask);
        // As the kernel: an alternate stack that cannot be is not an error.
        let _ = self.set_altstack(frame.altstack, regs.rsp);
        Ok(())
    }

    fn load_frame_xstate(&mut self, addr: u64) -> Result<(), Errno> {
        const FXSAVE_LEN: usize = 512;
        let result = if addr == 0 {
            self.engine.reset_xstate()
        } else {
            let xstate_len = self.engine.xstate_len();
            let mut area = vec![0; frame::fpstate_len(xstate_len) as usize];
            if self.memory().read(addr, &mut area).is_err() || !frame::is_sealed(&area) {
                area.fill(0);
                self.memory().read(addr, &mut area[..FXSAVE_LEN])?;
                // x87 and SSE from the FXSAVE part, the rest initial.
                area[FXSAVE_LEN] = 3;
            }
            let area = &mut area[..xstate_len];
            let mut current = vec![0; xstate_len];
            match self.engine.save_xstate(&mut current) {
                Ok(()) => {
                    let mask = frame::mxcsr_mask(&current);
                    frame::sanitise_xstate(area, self.engine.xcr0(), mask);
                    self.engine.load_xstate(area)
                }
                Err(error) => Err(error),
            }
        };
        result.map_err(|error| self.engine_failed(error))
    }
}

/// Lets the program make the call again.
pub(crate) fn rewind(user: &mut UserState, interrupted: &Interrupted) {
    user.regs.rip = user.regs.rip.wrapping_sub(SYSCALL_LEN);
    user.regs.rax = interrupted.rax;
}

/// The signal that Linux sends for an exception that is not a page fault.
pub(crate) fn signal_of_exception(vector: u8, rip: u64) -> SigInfo {
    match vector {
        0 => SigInfo::fault(SIGFPE, code::FPE_INTDIV, rip),
        1 => SigInfo::fault(SIGTRAP, code::TRAP_TRACE, rip),
        3 => SigInfo::fault(SIGTRAP, SI_KERNEL, 0),
        6 => SigInfo::fault(SIGILL, code::ILL_ILLOPN, rip),
        10..=12 => SigInfo::fault(SIGBUS, SI_KERNEL, 0),
        16 | 19 => SigInfo::fault(SIGFPE, code::FPE_FLTDIV, rip),
        17 => SigInfo::fault(SIGBUS, code::BUS_ADRALN, 0),
        _ => SigInfo::fault(SIGSEGV, SI_KERNEL, 0),
    }
}

/// The SIGSEGV for a page fault at `addr`; `mapped` says whether there is
/// anything at all.
pub(crate) fn signal_of_page_fault(addr: u64, mapped: Mapped) -> SigInfo {
    let code = match mapped {
        Mapped::Nothing => code::SEGV_MAPERR,
        Mapped::WithoutTheRight => code::SEGV_ACCERR,
    };
    SigInfo::fault(SIGSEGV, code, addr)
}

/// The SIGBUS for memory that the host could not supply.
pub(crate) fn signal_of_host_fault(addr: u64) -> SigInfo {
    SigInfo::fault(SIGBUS, code::BUS_ADRERR, addr)
}

/// What is at the address of a page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapped {
    Nothing,
    WithoutTheRight,
}

/// What the hardware said, for the frame.
pub(crate) fn fault_context(trap: &Trap) -> FaultContext {
    const PAGE_FAULT_VECTOR: u64 = 14;
    match *trap {
        Trap::PageFault { addr, error } | Trap::HostFault { addr, error } => FaultContext {
            error: u64::from(error.bits()),
            vector: PAGE_FAULT_VECTOR,
            cr2: addr,
        },
        Trap::Exception { vector, error, .. } => FaultContext {
            error: u64::from(error),
            vector: u64::from(vector),
            cr2: 0,
        },
        Trap::Syscall | Trap::Interrupted => FaultContext::default(),
    }
}
