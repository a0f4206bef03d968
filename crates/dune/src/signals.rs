//! Signals, the part both sides share: which handlers the program has installed.
//!
//! The kernel knows one handler of ours for every signal that the program handles. In a
//! thread in Dune mode it captures the signal for delivery inside the guest
//! (`host/signals.rs`, `guest/signals.rs`); in any other thread of the process
//! it runs the program's handler on the spot.
//!
//! ```text
//!   kernel --signal--> host handler: store siginfo and mask in the ThreadArea,
//!                      block everything, make KVM_RUN or the system call return
//!          --> notify interrupt, or the check after a forwarded call
//!          --> guest: set the handler's mask, build the kernel's own frame layout on the
//!              program's stack, continue in the program's handler
//!          --> rt_sigreturn: read the frame back, all inside the guest
//! ```
//!
//! At most one signal is captured at a time, since everything is blocked until the guest has
//! it; the others wait in the kernel, which keeps their order and their siginfo.
#![expect(unsafe_code, reason = "rt_sigaction")]

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use dune_kvm::sys::{self, Errno, nr};
use dune_kvm::wall::Wall;

use crate::arch;
use crate::host::signals::{host_handler, walled_host_handler};

pub(crate) const SIG_DFL: u64 = 0;
pub(crate) const SIG_IGN: u64 = 1;
const FIRST_HANDLER: u64 = 2;

pub(crate) const SA_NOCLDSTOP: u64 = 1;
pub(crate) const SA_NOCLDWAIT: u64 = 2;
pub(crate) const SA_SIGINFO: u64 = 4;
pub(crate) const SA_ONSTACK: u64 = 0x0800_0000;
pub(crate) const SA_RESTART: u64 = 0x1000_0000;
pub(crate) const SA_NODEFER: u64 = 0x4000_0000;
pub(crate) const SA_RESETHAND: u64 = 0x8000_0000;
const SA_RESTORER: u64 = 0x0400_0000;

pub(crate) const SIGNALS: usize = 64;
/// Size of the kernel's signal sets in bytes.
pub(crate) const SIGSET: usize = 8;

/// The kernel's `struct sigaction` on x86-64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct KernelAction {
    pub(crate) handler: u64,
    pub(crate) flags: u64,
    pub(crate) restorer: u64,
    pub(crate) mask: u64,
}

const _: () = assert!(size_of::<KernelAction>() == 32);

impl KernelAction {
    /// Whether the program has a function to be called.
    pub(crate) fn is_handler(&self) -> bool {
        self.handler >= FIRST_HANDLER
    }

    pub(crate) fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (chunk, word) in
            bytes
                .chunks_exact_mut(8)
                .zip([self.handler, self.flags, self.restorer, self.mask])
        {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn from_bytes(bytes: [u8; 32]) -> Self {
        let mut words = [0_u64; 4];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut le = [0; 8];
            le.copy_from_slice(chunk);
            *word = u64::from_le_bytes(le);
        }
        let [handler, flags, restorer, mask] = words;
        Self {
            handler,
            flags,
            restorer,
            mask,
        }
    }
}

/// What the program asked for, signal by signal.
///
/// Readers never wait for a writer that was interrupted: an entry is written between two
/// increments of its version, and read again if the version changed or is odd.
#[derive(Debug)]
pub(crate) struct SignalTable {
    entries: [Entry; SIGNALS],
}

#[derive(Debug)]
struct Entry {
    version: AtomicU32,
    words: [AtomicU64; 4],
}

/// The table of the process. A child of `vfork`, which shares its parent's memory but not
/// its handlers, has one of its own.
pub(crate) static PROCESS_SIGNALS: SignalTable = SignalTable::new();

impl SignalTable {
    pub(crate) const fn new() -> Self {
        Self {
            entries: [const {
                Entry {
                    version: AtomicU32::new(0),
                    words: [const { AtomicU64::new(0) }; 4],
                }
            }; SIGNALS],
        }
    }

    /// What is registered for `signal` (1 to 64); the default for any other number.
    pub(crate) fn get(&self, signal: u32) -> KernelAction {
        let Some(entry) = self.entry(signal) else {
            return KernelAction::default();
        };
        loop {
            let before = entry.version.load(Ordering::Acquire);
            let [handler, flags, restorer, mask] = [0, 1, 2, 3]
                .map(|i: usize| entry.words.get(i).map_or(0, |w| w.load(Ordering::Acquire)));
            if before & 1 == 0 && entry.version.load(Ordering::Acquire) == before {
                return KernelAction {
                    handler,
                    flags,
                    restorer,
                    mask,
                };
            }
            // The writer may be waiting for the CPU.
            sys::sched_yield();
        }
    }

    /// Registers an action and returns the one before.
    pub(crate) fn set(&self, signal: u32, action: KernelAction) -> KernelAction {
        self.replace(signal, action, || Ok(())).unwrap_or_default()
    }

    /// The same, together with telling the kernel: what two threads ask for at the same time
    /// happens in the same order here and there. Nothing changes if the kernel refuses.
    pub(crate) fn replace(
        &self,
        signal: u32,
        action: KernelAction,
        tell: impl FnOnce() -> Result<(), Errno>,
    ) -> Result<KernelAction, Errno> {
        let Some(entry) = self.entry(signal) else {
            return Err(Errno::EINVAL);
        };
        let version = loop {
            let version = entry.version.load(Ordering::Acquire) & !1;
            if entry
                .version
                .compare_exchange(version, version + 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
            {
                break version;
            }
            sys::sched_yield();
        };
        let swap = |i: usize, value| {
            entry
                .words
                .get(i)
                .map_or(0, |w| w.swap(value, Ordering::AcqRel))
        };
        let result = tell().map(|()| KernelAction {
            handler: swap(0, action.handler),
            flags: swap(1, action.flags),
            restorer: swap(2, action.restorer),
            mask: swap(3, action.mask),
        });
        entry
            .version
            .store(version.wrapping_add(2), Ordering::Release);
        result
    }

    /// Puts every handler back to the default, and leaves what is ignored ignored.
    pub(crate) fn clear_handlers(&self) {
        for signal in 1..=SIGNALS as u32 {
            if self.get(signal).is_handler() {
                self.set(signal, KernelAction::default());
            }
        }
    }

    fn entry(&self, signal: u32) -> Option<&Entry> {
        self.entries.get((signal as usize).checked_sub(1)?)
    }

    /// In the child of a `fork`: writers of other threads did not survive.
    pub(crate) fn drop_stale_writers(&self) {
        for entry in &self.entries {
            let version = entry.version.load(Ordering::Relaxed);
            entry
                .version
                .store(version.wrapping_add(version & 1), Ordering::Relaxed);
        }
    }

    /// Makes this a copy of another table.
    pub(crate) fn copy_from(&self, other: &Self) {
        for signal in 1..=SIGNALS as u32 {
            self.set(signal, other.get(signal));
        }
    }
}

/// The alternate signal stack of a thread in Dune mode, as the kernel's `stack_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct AltStack {
    pub(crate) base: u64,
    pub(crate) flags: u32,
    pub(crate) pad: u32,
    pub(crate) size: u64,
}

const _: () = assert!(size_of::<AltStack>() == 24);

pub(crate) const SS_ONSTACK: u32 = 1;
pub(crate) const SS_DISABLE: u32 = 2;
pub(crate) const SS_AUTODISARM: u32 = 1 << 31;

impl AltStack {
    pub(crate) const DISABLED: Self = Self {
        base: 0,
        flags: SS_DISABLE,
        pad: 0,
        size: 0,
    };

    /// Whether a stack pointer lies on it.
    pub(crate) fn holds(&self, rsp: u64) -> bool {
        self.flags & SS_DISABLE == 0 && rsp > self.base && rsp - self.base <= self.size
    }

    /// Whether the thread counts as running on it.
    pub(crate) fn in_use(&self, rsp: u64) -> bool {
        self.flags & SS_AUTODISARM == 0 && self.holds(rsp)
    }
}

/// Asks the kernel for the action it has for a signal.
pub(crate) fn kernel_action(signal: u32) -> Result<KernelAction, Errno> {
    let mut action = KernelAction::default();
    // SAFETY: the kernel writes the structure.
    unsafe {
        sys::call(
            nr::RT_SIGACTION,
            [signal as usize, 0, &raw mut action as usize, SIGSET, 0, 0],
        )
    }?;
    Ok(action)
}

/// Tells the kernel of an action of the program: our handler in place of the program's, the
/// defaults as they are.
pub(crate) fn install(signal: u32, action: KernelAction) -> Result<(), Errno> {
    let installed = if action.is_handler() {
        const KEPT: u64 = SA_NOCLDSTOP | SA_NOCLDWAIT | SA_RESTART | SA_ONSTACK;
        KernelAction {
            handler: the_handler(),
            flags: (action.flags & KEPT) | SA_SIGINFO | SA_RESTORER,
            restorer: arch::address(arch::dune_restorer),
            mask: u64::MAX,
        }
    } else {
        action
    };
    // SAFETY: the kernel reads the structure; the handler is ours and lives forever.
    unsafe {
        sys::call(
            nr::RT_SIGACTION,
            [
                signal as usize,
                &raw const installed as usize,
                0,
                SIGSET,
                0,
                0,
            ],
        )
    }
    .map(drop)
}

/// The one handler that the kernel knows.
fn the_handler() -> u64 {
    if Wall::get().is_some() {
        walled_host_handler as *const () as u64
    } else {
        host_handler as *const () as u64
    }
}

/// Takes over the handlers that the program has installed outside Dune mode so far.
///
/// Called at the first entry. A program that calls `sigaction` outside Dune mode after that
/// calls this again before its threads enter.
pub fn adopt_handlers() {
    for signal in 1..=SIGNALS as u32 {
        let Ok(action) = kernel_action(signal) else {
            continue;
        };
        if action.handler == the_handler() {
            continue;
        }
        if action.handler == host_handler as *const () as u64 {
            // Installed before there was a wall.
            let _ = install(signal, PROCESS_SIGNALS.get(signal));
            continue;
        }
        PROCESS_SIGNALS.set(signal, action);
        if action.is_handler() {
            let _ = install(signal, action);
        }
    }
}

/// Changes the signal mask of the thread and returns the one before. `how` is the kernel's:
/// 0 block, 1 unblock, 2 set. Either side; forwarded from the guest.
pub(crate) fn change_mask(how: usize, mask: u64) -> u64 {
    let mut before = 0_u64;
    // SAFETY: the kernel reads and writes 8 bytes each.
    let _ = unsafe {
        sys::raw(
            nr::RT_SIGPROCMASK,
            [
                how,
                &raw const mask as usize,
                &raw mut before as usize,
                SIGSET,
                0,
                0,
            ],
        )
    };
    before
}

pub(crate) const MASK_BLOCK: usize = 0;
pub(crate) const MASK_SET: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_action_survives_its_bytes() {
        let action = KernelAction {
            handler: 0x1234,
            flags: SA_SIGINFO,
            restorer: 7,
            mask: !5,
        };
        assert_eq!(KernelAction::from_bytes(action.to_bytes()), action);
    }

    #[test]
    fn a_table_returns_what_was_set_and_the_one_before() {
        let table = SignalTable::new();
        let first = KernelAction {
            handler: 10,
            flags: 1,
            restorer: 2,
            mask: 3,
        };
        assert_eq!(table.set(64, first), KernelAction::default());
        assert_eq!(table.set(64, KernelAction::default()), first);
        assert_eq!(table.get(64), KernelAction::default());
        assert_eq!(table.get(0), KernelAction::default());
        assert_eq!(table.get(65), KernelAction::default());
    }

    #[test]
    fn an_interrupted_writer_does_not_survive_fork() {
        let table = SignalTable::new();
        table.entry(3).unwrap().version.store(7, Ordering::Relaxed);
        table.drop_stale_writers();
        assert_eq!(table.get(3), KernelAction::default());
    }

    #[test]
    fn a_stack_pointer_is_on_the_alternate_stack_at_its_top_but_not_at_its_base() {
        let stack = AltStack {
            base: 0x1000,
            flags: 0,
            pad: 0,
            size: 0x1000,
        };
        assert!(stack.holds(0x2000) && stack.holds(0x1001));
        assert!(!stack.holds(0x1000) && !stack.holds(0x2001));
        assert!(!AltStack::DISABLED.holds(0));
    }
}
