//! Signal calls that change what the guard keeps; the others are forwarded, as
//! the host kernel's signals are the program's (see [`crate::signal::record`]).

use crate::calls::Answer;
use crate::engine::UserState;
use crate::guard::{Guard, Resume};
use crate::host::{Errno, SysResult};
use crate::signal::frame::FaultContext;
use crate::signal::{
    Action, AltStack, SI_KERNEL, SIGNALS, SIGSEGV, SS_AUTODISARM, SS_DISABLE, SS_ONSTACK, SigInfo,
    SigSet, UNBLOCKABLE, bit, host,
};
use crate::table::Args;

/// Bytes of a signal set; the only size the kernel takes.
const SIGSET_LEN: u64 = 8;

/// The kernel's `MINSIGSTKSZ`, in bytes.
const MIN_STACK: u64 = 2048;

pub(crate) fn rt_sigaction(guard: &mut Guard, args: Args) -> SysResult {
    let [signal, new, old, size, ..] = args;
    let signal = signal as u32;
    if size != SIGSET_LEN || signal == 0 || signal > SIGNALS {
        return Err(Errno::EINVAL);
    }
    let previous = guard.signals.action(signal);
    if new != 0 {
        let mut action: Action = guard.memory().read_value(new)?;
        if UNBLOCKABLE & bit(signal) != 0 {
            return Err(Errno::EINVAL);
        }
        action.mask &= !UNBLOCKABLE;
        guard.signals.set_action(signal, action);
        host::install(signal, &action)?;
    }
    if old != 0 {
        guard.memory().write_value(old, &previous)?;
    }
    Ok(0)
}

pub(crate) fn rt_sigprocmask(guard: &mut Guard, args: Args) -> SysResult {
    const SIG_BLOCK: u32 = 0;
    const SIG_UNBLOCK: u32 = 1;
    const SIG_SETMASK: u32 = 2;
    let [how, set, old, size, ..] = args;
    if size != SIGSET_LEN {
        return Err(Errno::EINVAL);
    }
    let previous = guard.signals.mask;
    if set != 0 {
        let set: SigSet = guard.memory().read_value(set)?;
        let mask = match how as u32 {
            SIG_BLOCK => previous | set,
            SIG_UNBLOCK => previous & !set,
            SIG_SETMASK => set,
            _ => return Err(Errno::EINVAL),
        };
        guard.signals.mask = mask & !UNBLOCKABLE;
        host::set_mask(guard.signals.mask);
    }
    if old != 0 {
        guard.memory().write_value(old, &previous)?;
    }
    Ok(0)
}

pub(crate) fn rt_sigreturn(guard: &mut Guard, user: &mut UserState, _args: Args) -> Answer {
    if guard.pop_frame(user).is_ok() {
        return Answer::Registers;
    }
    let info = SigInfo::fault(SIGSEGV, SI_KERNEL, 0);
    match guard.deliver_fault(user, info, FaultContext::default()) {
        Resume::Continue => Answer::Registers,
        Resume::Exit(status) => Answer::Exit(status),
        Resume::Killed(signal) => Answer::Killed(signal),
    }
}

pub(crate) fn sigaltstack(guard: &mut Guard, user: &mut UserState, args: Args) -> Answer {
    Answer::Return(altstack_call(guard, user.regs.rsp, args))
}

fn altstack_call(guard: &mut Guard, rsp: u64, args: Args) -> SysResult {
    let [new, old, ..] = args;
    let current = guard.signals.altstack;
    let told = AltStack {
        flags: current.flags_at(rsp),
        ..current
    };
    if new != 0 {
        let stack: AltStack = guard.memory().read_value(new)?;
        guard.set_altstack(stack, rsp)?;
    }
    if old != 0 {
        guard.memory().write_value(old, &told)?;
    }
    Ok(0)
}

impl Guard {
    /// Sets the alternate stack of a program whose stack pointer is `rsp`.
    ///
    /// # Errors
    ///
    /// Those of `sigaltstack`.
    pub(crate) fn set_altstack(&mut self, mut stack: AltStack, rsp: u64) -> Result<(), Errno> {
        let current = self.signals.altstack;
        if current.size != 0 && current.holds(rsp) {
            return Err(Errno::EPERM);
        }
        match stack.flags & !SS_AUTODISARM {
            SS_DISABLE => {
                stack = AltStack {
                    flags: stack.flags,
                    ..AltStack::default()
                }
            }
            0 | SS_ONSTACK if stack.size < MIN_STACK => return Err(Errno::ENOMEM),
            0 | SS_ONSTACK => {}
            _ => return Err(Errno::EINVAL),
        }
        self.signals.altstack = stack;
        Ok(())
    }
}
