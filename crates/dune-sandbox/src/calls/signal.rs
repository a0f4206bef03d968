//! Signal calls that change what the guard keeps; the others are forwarded, as
//! the host kernel's signals are the program's (see [`crate::signal::record`]).

use linux_raw_sys::general::{
    __NR_pidfd_send_signal, __NR_rt_sigqueueinfo, __NR_rt_tgsigqueueinfo,
};

use crate::calls::{Answer, forward};
use crate::engine::UserState;
use crate::guard::{Guard, Resume};
use crate::host::{Errno, SysResult};
use crate::signal::frame::FaultContext;
use crate::signal::{
    Action, AltStack, Disposition, SI_KERNEL, SIGNALS, SIGSEGV, SS_AUTODISARM, SS_DISABLE,
    SS_ONSTACK, SigInfo, SigSet, UNBLOCKABLE, bit, host,
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
    let previous = if new == 0 {
        guard.program.dispositions().action(signal)
    } else {
        let mut action: Action = guard.memory().read_value(new)?;
        if UNBLOCKABLE & bit(signal) != 0 {
            return Err(Errno::EINVAL);
        }
        action.mask &= !UNBLOCKABLE;
        let mut dispositions = guard.program.dispositions();
        let previous = dispositions.action(signal);
        dispositions.set_action(signal, action);
        host::install(signal, &action)?;
        previous
    };
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

pub(crate) fn rt_sigqueueinfo(guard: &mut Guard, user: &mut UserState, args: Args) -> Answer {
    const INFO: usize = 2;
    queue::<INFO>(guard, user, __NR_rt_sigqueueinfo, args)
}

pub(crate) fn rt_tgsigqueueinfo(guard: &mut Guard, user: &mut UserState, args: Args) -> Answer {
    const INFO: usize = 3;
    queue::<INFO>(guard, user, __NR_rt_tgsigqueueinfo, args)
}

/// Sends a signal with a `siginfo` of the program's making. The arguments are
/// the ids of the target, the signal, and in the place `INFO` its `siginfo`.
fn queue<const INFO: usize>(
    guard: &mut Guard,
    user: &mut UserState,
    nr: u32,
    mut args: Args,
) -> Answer {
    if args[INFO] == 0 {
        return Answer::Return(forward(nr, args));
    }
    let mut info: SigInfo = match guard.memory().read_value(args[INFO]) {
        Ok(info) => info,
        Err(errno) => return Answer::Return(Err(errno)),
    };
    info.signo = args[INFO - 1] as i32;
    let (pid, tid) = (guard.pid(), guard.tid);
    let ids = &args[..INFO - 1];
    let Some((&target, groups)) = ids.split_last() else {
        return Answer::Return(Err(Errno::EINVAL));
    };
    if groups.iter().all(|&group| group as u32 == pid) && guard.is_hidden_thread(target) {
        return Answer::Return(Err(Errno::ESRCH));
    }
    if info.is_fault_of_the_thread() {
        // The kernel lets a thread do this to itself alone. What the guard does not
        // do itself would reach the recorder as a fault of its own.
        return if target as u32 == tid {
            queue_fault(guard, user, info)
        } else {
            Answer::Return(Err(Errno::EPERM))
        };
    }
    // The copy that was looked at.
    let lent = match guard.lend(&info) {
        Ok(lent) => lent,
        Err(errno) => return Answer::Return(Err(errno)),
    };
    args[INFO] = lent.pointer();
    Answer::Return(forward(nr, args))
}

/// Sends the program what looks like a fault that the kernel found. Others may
/// not send such a thing; to itself a program may, and crash reporters do. In
/// the host process it would be taken for a fault of the guard.
fn queue_fault(guard: &mut Guard, user: &mut UserState, mut info: SigInfo) -> Answer {
    const SI_QUEUE: i32 = -1;
    let signal = info.signal();
    let blocked = guard.signals.mask & bit(signal) != 0;
    let action = guard.program.dispositions().action(signal);
    if blocked || action.disposition() != Disposition::Handler {
        // It waits in the host, or the host acts on it: as an ordinary signal.
        info.code = SI_QUEUE;
        let pid = u64::from(guard.pid());
        return Answer::Return(guard.lend(&info).and_then(|info| {
            let args = [pid, u64::from(signal), info.pointer(), 0, 0, 0];
            forward(__NR_rt_sigqueueinfo, args)
        }));
    }
    user.regs.rax = 0;
    answer_of(guard.deliver_fault(user, info, FaultContext::default()))
}

fn answer_of(resume: Resume) -> Answer {
    match resume {
        Resume::Continue => Answer::Registers,
        Resume::Stop => Answer::Stop,
        Resume::Exit(status) => Answer::Exit(status),
        Resume::ThreadExit(status) => Answer::ThreadExit(status),
        Resume::Leave => Answer::Leave,
        Resume::Killed(signal) => Answer::Killed(signal),
    }
}

/// Without a `siginfo` that looks like a fault: through a descriptor it cannot
/// be told whether it is for the program itself.
pub(crate) fn pidfd_send_signal(guard: &mut Guard, args: Args) -> SysResult {
    let [fd, signal, info, flags, ..] = args;
    let target = guard.hold_signal_target(fd)?;
    let fd = target.fd();
    if info == 0 {
        return forward(__NR_pidfd_send_signal, [fd, signal, 0, flags, 0, 0]);
    }
    let info: SigInfo = guard.memory().read_value(info)?;
    if info.is_fault_of_the_thread() {
        return Err(Errno::EPERM);
    }
    let info = guard.lend(&info)?;
    forward(
        __NR_pidfd_send_signal,
        [fd, signal, info.pointer(), flags, 0, 0],
    )
}

pub(crate) fn rt_sigreturn(guard: &mut Guard, user: &mut UserState, _args: Args) -> Answer {
    if guard.pop_frame(user).is_ok() {
        return Answer::Registers;
    }
    let info = SigInfo::fault(SIGSEGV, SI_KERNEL, 0);
    answer_of(guard.deliver_fault(user, info, FaultContext::default()))
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
