//! Signals of the program.
//!
//! What arrives from outside is noted by [`record`]; what the program causes
//! itself (a fault) comes from its traps. Both end here, in a frame on the
//! program's stack ([`frame`]) or in its death.

pub(crate) mod deliver;
pub(crate) mod frame;
pub(crate) mod host;
pub(crate) mod record;

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Signals as a set: bit `n - 1` for signal `n`.
pub(crate) type SigSet = u64;

/// Highest signal number.
pub(crate) const SIGNALS: u32 = 64;

pub(crate) const SIG_DFL: u64 = 0;
pub(crate) const SIG_IGN: u64 = 1;

pub(crate) use linux_raw_sys::general::{
    SIGBUS, SIGCHLD, SIGCONT, SIGFPE, SIGILL, SIGKILL, SIGPIPE, SIGSEGV, SIGSTOP, SIGTRAP, SIGTSTP,
    SIGTTIN, SIGTTOU, SIGURG, SIGWINCH,
};

/// The set with `signal` alone.
#[must_use]
pub(crate) const fn bit(signal: u32) -> SigSet {
    1 << (signal - 1)
}

/// Signals that can be neither blocked nor caught.
pub(crate) const UNBLOCKABLE: SigSet = bit(SIGKILL) | bit(SIGSTOP);

/// `siginfo_t`, as bytes that the kernel made, with the few fields that the
/// guard reads or writes.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub(crate) struct SigInfo {
    /// The signal.
    pub(crate) signo: i32,
    /// `errno`, unused on Linux.
    pub(crate) errno: i32,
    /// Where it came from (`SI_USER`, `SEGV_MAPERR`...).
    pub(crate) code: i32,
    pad: i32,
    /// The union; its first eight bytes are `si_addr` for faults.
    pub(crate) fields: [u64; 14],
}

const _: () = assert!(size_of::<SigInfo>() == 128);

/// `SI_USER`.
pub(crate) const SI_USER: i32 = 0;

/// `SI_QUEUE`.
pub(crate) const SI_QUEUE: i32 = -1;

/// `SI_KERNEL`.
pub(crate) const SI_KERNEL: i32 = 0x80;

impl SigInfo {
    pub(crate) const ZERO: Self = Self {
        signo: 0,
        errno: 0,
        code: 0,
        pad: 0,
        fields: [0; 14],
    };

    /// A fault of the program at `addr`.
    #[must_use]
    pub(crate) const fn fault(signal: u32, code: i32, addr: u64) -> Self {
        let mut info = Self::ZERO;
        info.signo = signal as i32;
        info.code = code;
        info.fields[0] = addr;
        info
    }

    /// The signal's number.
    #[must_use]
    pub(crate) const fn signal(&self) -> u32 {
        self.signo as u32
    }

    /// Whether the kernel raised it for an instruction of the thread itself,
    /// not for anybody's `kill`.
    pub(crate) const fn is_fault_of_the_thread(&self) -> bool {
        matches!(
            self.signo as u32,
            SIGSEGV | SIGBUS | SIGFPE | SIGILL | SIGTRAP
        ) && self.code > 0
    }
}

/// The kernel's `struct sigaction` of x86-64.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub(crate) struct Action {
    /// 0 for the default action, 1 to ignore, else the handler's address.
    pub(crate) handler: u64,
    /// `SA_*`.
    pub(crate) flags: u64,
    /// Where the handler returns to.
    pub(crate) restorer: u64,
    /// Blocked while the handler runs.
    pub(crate) mask: SigSet,
}

const _: () = assert!(size_of::<Action>() == 32);

/// What an action amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disposition {
    /// The default action of the signal.
    Default,
    /// Nothing.
    Ignore,
    /// A handler of the program.
    Handler,
}

impl Action {
    /// What it amounts to.
    #[must_use]
    pub(crate) const fn disposition(&self) -> Disposition {
        match self.handler {
            SIG_DFL => Disposition::Default,
            SIG_IGN => Disposition::Ignore,
            _ => Disposition::Handler,
        }
    }

    pub(crate) const fn has(&self, flag: u32) -> bool {
        self.flags & flag as u64 != 0
    }
}

/// What the kernel does by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DefaultAction {
    /// The process dies (with or without a core dump: the guard makes none).
    Terminate,
    /// Nothing (also `SIGCONT`, which has done its work before).
    Ignore,
    /// The process stops.
    Stop,
}

/// The default action of `signal` (signal(7)).
#[must_use]
pub(crate) const fn default_action(signal: u32) -> DefaultAction {
    match signal {
        SIGCHLD | SIGURG | SIGWINCH | SIGCONT => DefaultAction::Ignore,
        SIGSTOP | SIGTSTP | SIGTTIN | SIGTTOU => DefaultAction::Stop,
        _ => DefaultAction::Terminate,
    }
}

/// The program's alternate stack, as `stack_t` says it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub(crate) struct AltStack {
    /// Its lowest address.
    pub(crate) sp: u64,
    /// `SS_DISABLE`, `SS_AUTODISARM`, or 0.
    pub(crate) flags: u32,
    pub(crate) pad: u32,
    /// Its length in bytes.
    pub(crate) size: u64,
}

pub(crate) const SS_ONSTACK: u32 = 1;
pub(crate) const SS_DISABLE: u32 = 2;
pub(crate) const SS_AUTODISARM: u32 = 1 << 31;

impl Default for AltStack {
    fn default() -> Self {
        Self {
            sp: 0,
            flags: SS_DISABLE,
            pad: 0,
            size: 0,
        }
    }
}

impl AltStack {
    /// Whether a stack pointer is on it (the kernel's `on_sig_stack`).
    #[must_use]
    pub(crate) const fn holds(&self, sp: u64) -> bool {
        self.flags & SS_AUTODISARM == 0 && sp > self.sp && sp.wrapping_sub(self.sp) <= self.size
    }

    /// The flags that a program is told when its stack pointer is `sp`.
    #[must_use]
    pub(crate) const fn flags_at(&self, sp: u64) -> u32 {
        if self.size == 0 {
            SS_DISABLE
        } else if self.holds(sp) {
            SS_ONSTACK | (self.flags & SS_AUTODISARM)
        } else {
            self.flags & SS_AUTODISARM
        }
    }
}

/// The signal state of one thread.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ThreadSignals {
    /// Blocked signals; the host thread's mask is the same, except while a
    /// noted signal waits (then everything is blocked there).
    pub(crate) mask: SigSet,
    pub(crate) altstack: AltStack,
    /// The program's own [`record::KICK`], which it blocked and the host did not.
    pub(crate) held: Option<SigInfo>,
}

impl ThreadSignals {
    /// As the program inherits it from whoever started this process: what was
    /// blocked stays so.
    pub(crate) fn inherited() -> Self {
        Self {
            mask: host::mask(),
            ..Self::default()
        }
    }
}

/// What the program does with each signal: the same for all of its threads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dispositions {
    actions: [Action; SIGNALS as usize],
}

impl Dispositions {
    /// No signal has a handler.
    pub(crate) fn new() -> Self {
        Self {
            actions: [Action::default(); SIGNALS as usize],
        }
    }

    /// As the program inherits it from whoever started this process: what was
    /// ignored stays so. `SIGPIPE`, which the Rust runtime ignores
    /// on its own account, and the faults that it catches get their default.
    pub(crate) fn inherited() -> Self {
        let mut dispositions = Self::new();
        for signal in 1..=SIGNALS {
            let Some(host) = host::disposition(signal) else {
                continue;
            };
            let ours = host.disposition() == Disposition::Handler || signal == SIGPIPE;
            if ours {
                host::set_default(signal);
            } else {
                dispositions.actions[signal as usize - 1].handler = host.handler;
            }
        }
        dispositions
    }

    /// The action of `signal`, 1 to 64.
    pub(crate) fn action(&self, signal: u32) -> Action {
        self.actions
            .get((signal as usize).wrapping_sub(1))
            .copied()
            .unwrap_or_default()
    }

    pub(crate) fn set_action(&mut self, signal: u32, action: Action) {
        if let Some(slot) = self.actions.get_mut((signal as usize).wrapping_sub(1)) {
            *slot = action;
        }
    }
}
