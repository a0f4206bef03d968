//! System calls of the process itself: most go to the kernel as they are, some concern what
//! Dune keeps.
#![expect(unsafe_code, reason = "system calls on behalf of the guest")]

use core::sync::atomic::Ordering;

use dune_kvm::sys::{self, Errno, nr};
use dune_kvm::wall::Wall;

use crate::arch;
use crate::host::{clone, outputs, run, wall};
use crate::machine::Machine;
use crate::signals::{
    AltStack, KernelAction, SIGNALS, SIGSET, SS_AUTODISARM, SS_DISABLE, SS_ONSTACK,
};
use crate::thread::ThreadArea;

/// The smallest alternate stack that the kernel accepts.
const MINSIGSTKSZ: u64 = 2048;

/// Flag in the number of a forwarded system call: its arguments come from ring 3. Where the
/// process has a wall ([`dune_kvm::wall`]), the call is made behind it: the kernel reaches
/// memory that was given away by `mmap` with this flag, or by [`Wall::give`], and answers
/// `EFAULT` to any other address. Where there is none, or outside Dune mode, the flag changes
/// nothing.
pub const WALLED: usize = 1 << 32;

/// Numbers of calls that are not simply forwarded, as a bit set.
static SPECIAL: [u64; 8] = special_calls();

const fn special_calls() -> [u64; 8] {
    const CALLS: [usize; 12] = [
        nr::CLONE,
        nr::FORK,
        nr::VFORK,
        nr::CLONE3,
        nr::EXIT,
        nr::RT_SIGACTION,
        nr::SIGALTSTACK,
        nr::ARCH_PRCTL,
        nr::RSEQ,
        nr::CLOSE,
        nr::CLOSE_RANGE,
        nr::DUP2,
    ];
    let mut set = [0; 8];
    let mut i = 0;
    while i < CALLS.len() {
        set[CALLS[i] / 64] |= 1 << (CALLS[i] % 64);
        i += 1;
    }
    set[nr::DUP3 / 64] |= 1 << (nr::DUP3 % 64);
    set
}

/// Executes the call in the call page and returns its result.
///
/// # Safety
/// On the host side of the thread that owns `area`, which has just made the call.
#[inline]
pub(crate) unsafe fn system_call(area: *mut ThreadArea) -> isize {
    // SAFETY: as in the caller.
    let result = unsafe { execute(area) };
    if crate::dirty::is_tracking() {
        // SAFETY: the area is this thread's.
        let this = unsafe { &*area };
        outputs::note(this.number, &this.arguments, result);
    }
    result
}

#[inline(always)]
unsafe fn execute(area: *mut ThreadArea) -> isize {
    // SAFETY: the area is this thread's.
    let this = unsafe { &mut *area };
    // The kernel looks at the lower half only; the upper one says who asks, where there is
    // somebody who has a wall. Elsewhere anything may be in it.
    let wall = if this.number & WALLED != 0 {
        Wall::get()
    } else {
        None
    };
    let number = this.number as u32 as usize;
    this.number = number;
    let special = SPECIAL
        .get(number / 64)
        .is_some_and(|bits| bits >> (number % 64) & 1 == 1);
    if !special {
        return match wall {
            // SAFETY: as in the caller.
            Some(wall) => unsafe { wall::system_call(area, wall, number) },
            // SAFETY: the process's own call, with the process's own arguments.
            None => unsafe { arch::dune_safe_syscall(area) },
        };
    }
    if wall.is_some() && !matches!(number, nr::CLOSE | nr::CLOSE_RANGE | nr::DUP2 | nr::DUP3) {
        // The others follow pointers, here and not in the kernel.
        return -(Errno::ENOSYS.0 as isize);
    }
    if this.pending.load(Ordering::Relaxed) != 0 {
        return arch::RESTART;
    }
    let [a0, a1, a2, a3, ..] = this.arguments;
    match number {
        nr::CLONE | nr::FORK | nr::VFORK | nr::CLONE3 => clone::system_call(this),
        nr::EXIT => run::exit_thread(area, a0),
        nr::RT_SIGACTION => done(signal_action(this, a0, a1, a2, a3)),
        nr::SIGALTSTACK => done(alternate_stack(this, a0, a1)),
        nr::ARCH_PRCTL => architecture(this, a0, a1),
        // The kernel would watch an instruction pointer that it never sees.
        nr::RSEQ => -(Errno::ENOSYS.0 as isize),
        nr::CLOSE if is_ours(a0) => -(Errno::EBADF.0 as isize),
        nr::DUP2 | nr::DUP3 if is_ours(a1) || is_ours(a0) => -(Errno::EBADF.0 as isize),
        nr::CLOSE_RANGE => close_range(a0, a1, a2),
        // SAFETY: the process's own call.
        _ => unsafe { arch::dune_safe_syscall(area) },
    }
}

fn done(result: Result<(), Errno>) -> isize {
    match result {
        Ok(()) => 0,
        Err(errno) => -(errno.0 as isize),
    }
}

fn signal_action(
    this: &ThreadArea,
    signal: usize,
    new: usize,
    old: usize,
    size: usize,
) -> Result<(), Errno> {
    const SIGKILL: usize = 9;
    const SIGSTOP: usize = 19;
    if size != SIGSET || signal == 0 || signal > SIGNALS {
        return Err(Errno::EINVAL);
    }
    if new != 0 && (signal == SIGKILL || signal == SIGSTOP) {
        return Err(Errno::EINVAL);
    }
    let signal = signal as u32;
    // SAFETY: points to a static, or into the area.
    let table = unsafe { &*this.signals };
    let before = if new == 0 {
        table.get(signal)
    } else {
        let mut bytes = [0; 32];
        sys::read_memory(new as u64, &mut bytes)?;
        let action = KernelAction::from_bytes(bytes);
        table.replace(signal, action, || crate::signals::install(signal, action))?
    };
    if old != 0 {
        sys::write_memory(old as u64, &before.to_bytes())?;
    }
    Ok(())
}

fn alternate_stack(this: &mut ThreadArea, new: usize, old: usize) -> Result<(), Errno> {
    const EPERM: Errno = Errno(1);
    let before = this.altstack;
    if new != 0 {
        let mut bytes = [0; 24];
        sys::read_memory(new as u64, &mut bytes)?;
        let word = |at: usize| {
            let mut le = [0; 8];
            le.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(le)
        };
        let stack = AltStack {
            base: word(0),
            flags: word(8) as u32,
            pad: 0,
            size: word(16),
        };
        let mode = stack.flags & !SS_AUTODISARM;
        if before.in_use(this.call_rsp) {
            return Err(EPERM);
        }
        if mode != SS_DISABLE && mode != SS_ONSTACK && mode != 0 {
            return Err(Errno::EINVAL);
        }
        this.altstack = if mode == SS_DISABLE {
            AltStack::DISABLED
        } else if stack.size < MINSIGSTKSZ {
            return Err(Errno::ENOMEM);
        } else {
            AltStack {
                flags: stack.flags & SS_AUTODISARM,
                ..stack
            }
        };
    }
    if old != 0 {
        let mut bytes = [0; 24];
        let used = if before.in_use(this.call_rsp) {
            SS_ONSTACK
        } else {
            0
        };
        bytes[0..8].copy_from_slice(&before.base.to_le_bytes());
        bytes[8..12].copy_from_slice(&(before.flags | used).to_le_bytes());
        bytes[16..24].copy_from_slice(&before.size.to_le_bytes());
        sys::write_memory(old as u64, &bytes)?;
    }
    Ok(())
}

/// `arch_prctl`: the FS base is the thread's TLS on both sides; the GS base is Dune's.
fn architecture(this: &mut ThreadArea, code: usize, address: usize) -> isize {
    const ARCH_SET_GS: usize = 0x1001;
    const ARCH_SET_FS: usize = 0x1002;
    const ARCH_GET_GS: usize = 0x1004;
    match code {
        ARCH_SET_GS | ARCH_GET_GS => -(Errno::EINVAL.0 as isize),
        ARCH_SET_FS => {
            // SAFETY: the process's own call.
            let result = unsafe { arch::dune_safe_syscall(this) };
            if result == 0
                && let Some(vcpu) = this.vcpu.as_ref()
            {
                // SAFETY: the vCPU is stopped.
                let changed = unsafe { vcpu.special_registers() }.and_then(|mut sregs| {
                    sregs.fs.base = address as u64;
                    // SAFETY: as above.
                    unsafe { vcpu.set_special_registers_raw(&sregs) }
                });
                return done(changed);
            }
            result
        }
        // SAFETY: the process's own call.
        _ => unsafe { arch::dune_safe_syscall(this) },
    }
}

/// Whether a descriptor belongs to the runtime: the program can neither close nor replace it.
fn is_ours(fd: usize) -> bool {
    let fd = fd as u32 as i32;
    Machine::get().is_some_and(|machine| machine.vm().descriptors().contains(&fd))
        || ThreadArea::descriptors().any(|ours| ours == fd)
}

/// Closes a range of descriptors around the runtime's own.
fn close_range(first: usize, last: usize, flags: usize) -> isize {
    let last = (last as u32).min(i32::MAX as u32);
    let mut from = first as u32;
    if from > last {
        return -(Errno::EINVAL.0 as isize);
    }
    loop {
        // The first of the runtime's own at or after `from`.
        let next = ours().filter(|fd| *fd >= from && *fd <= last).min();
        let until = next.map_or(Some(last), |fd| fd.checked_sub(1));
        if let Some(until) = until
            && until >= from
        {
            // SAFETY: the process's own call, on descriptors that are its own.
            let result = unsafe {
                sys::raw(
                    nr::CLOSE_RANGE,
                    [from as usize, until as usize, flags, 0, 0, 0],
                )
            };
            if result < 0 {
                return result;
            }
        }
        match next {
            Some(fd) if fd < last => from = fd + 1,
            _ => return 0,
        }
    }
}

fn ours() -> impl Iterator<Item = u32> {
    let vm = Machine::get().map(|machine| machine.vm().descriptors());
    vm.into_iter()
        .flatten()
        .chain(ThreadArea::descriptors())
        .filter(|fd| *fd >= 0)
        .map(|fd| fd as u32)
}
