//! Signals of the host process that a handler of the program waits for.
//!
//! The host kernel stays the kernel of signals: dispositions (default, ignore)
//! and the mask of the program are those of the host thread, so pending,
//! queueing, coalescing, `sigtimedwait`, `signalfd` and job control are
//! Linux's own. Only where the program has a *handler*, the guard's recorder
//! stands in for it:
//!
//! ```text
//!  host kernel --> recorder: note siginfo, set PENDING and the kick byte,
//!                  return with every signal blocked
//!                       |
//!  guard, at the end of the trap: take(), build the program's frame, set the
//!                  host mask to that of the handler (the next one may come)
//! ```
//!
//! As every signal is blocked from the moment one is noted until the guard has
//! delivered it, one slot is enough, and the order is the kernel's.
//!
//! **No signal is lost before a blocking call.** [`call_interruptible`] looks
//! at `PENDING` and enters the kernel in a few instructions with known labels.
//! If the recorder finds the thread between the look and the `syscall`
//! instruction, it moves it to the way out: the call has not been made, and
//! the answer is [`Errno::ERESTARTSYS`].
//!
//! The process must have no other thread that takes signals: it is that of the
//! guard alone, or the others block them all.

#![expect(unsafe_code, reason = "signal handler, and a system call with labels")]

use core::arch::naked_asm;
use core::cell::UnsafeCell;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, AtomicU8, Ordering};

use crate::host::{Errno, SysResult, decode};
use crate::signal::SigInfo;

/// 1 while [`SLOT`] holds a signal that the guard has not taken.
static PENDING: AtomicU8 = AtomicU8::new(0);

/// The engine's kick byte, or null.
static KICK: AtomicPtr<AtomicU8> = AtomicPtr::new(ptr::null_mut());

static SLOT: Slot = Slot(UnsafeCell::new(SigInfo::ZERO));

struct Slot(UnsafeCell<SigInfo>);

// SAFETY: the recorder writes the slot only while PENDING is 0 and sets it
// afterwards; `take` reads it only while PENDING is 1 and clears it
// afterwards. All signals are blocked in between (see the module doc).
unsafe impl Sync for Slot {}

/// Offsets in the kernel's `ucontext` of x86-64.
mod ucontext {
    /// `uc_mcontext.gregs[REG_RIP]`.
    pub(super) const RIP: usize = 40 + 16 * 8;
    /// `uc_sigmask`.
    pub(super) const SIGMASK: usize = 40 + 256;
}

/// Tells the recorder which byte wakes the engine; `None` for no engine.
pub(crate) fn set_kick(byte: Option<NonNull<AtomicU8>>) {
    KICK.store(
        byte.map_or(ptr::null_mut(), NonNull::as_ptr),
        Ordering::SeqCst,
    );
}

/// Whether a signal waits to be taken.
pub(crate) fn is_pending() -> bool {
    PENDING.load(Ordering::Acquire) != 0
}

/// Takes the signal that was noted, if any. All signals stay blocked in the
/// host until the caller sets the mask.
pub(crate) fn take() -> Option<SigInfo> {
    if !is_pending() {
        return None;
    }
    // SAFETY: PENDING is set, so the recorder does not run (all signals are
    // blocked since) and has finished writing.
    let info = unsafe { *SLOT.0.get() };
    PENDING.store(0, Ordering::Release);
    Some(info)
}

/// The handler that the guard installs in the host process. Installed with
/// every signal in its mask.
///
/// # Safety
///
/// For the kernel only, as an `SA_SIGINFO` handler.
pub(crate) unsafe extern "C" fn recorder(signal: i32, info: *const SigInfo, context: *mut u8) {
    // SAFETY: the kernel passes a siginfo that lives on this stack.
    let info = unsafe { *info };
    if info.is_fault_of_the_thread() {
        // A defect of the guard itself: nothing of the program's memory is
        // touched without a check. Let the fault happen again, for good.
        crate::signal::host::set_default(signal as u32);
        return;
    }
    // SAFETY: PENDING is 0: all signals are blocked while it is 1.
    unsafe { *SLOT.0.get() = info };
    PENDING.store(1, Ordering::Release);
    let kick = KICK.load(Ordering::SeqCst);
    if !kick.is_null() {
        // SAFETY: the byte lives as long as the engine, which clears KICK
        // (by the guard) when it goes.
        unsafe { &*kick }.store(1, Ordering::SeqCst);
    }
    // SAFETY: `context` is the kernel's ucontext, writable, of that layout.
    let mask = unsafe { context.add(ucontext::SIGMASK) }.cast::<u64>();
    // SAFETY: likewise; the kernel loads the mask from there on return.
    unsafe { mask.write_unaligned(u64::MAX) };
    // SAFETY: likewise.
    let rip = unsafe { context.add(ucontext::RIP) }.cast::<u64>();
    // SAFETY: likewise.
    let at = unsafe { rip.read_unaligned() };
    if (label(&raw const dune_sandbox_call_start)..label(&raw const dune_sandbox_call_end))
        .contains(&at)
    {
        // SAFETY: likewise; the way out expects nothing but the stack as the
        // function found it.
        unsafe { rip.write_unaligned(label(&raw const dune_sandbox_call_given_up)) };
    }
}

fn label(at: *const u8) -> u64 {
    at.expose_provenance() as u64
}

unsafe extern "C" {
    static dune_sandbox_call_start: u8;
    static dune_sandbox_call_end: u8;
    static dune_sandbox_call_given_up: u8;
}

/// Makes the system call `nr`, unless a signal was noted before it began: then
/// `ERESTARTSYS`, and nothing was done. `EINTR` means what it always means.
///
/// # Safety
///
/// As [`crate::host::syscall`].
pub(crate) unsafe fn call_interruptible(nr: u32, args: &[u64; 6]) -> SysResult {
    // SAFETY: as the caller promises.
    decode(unsafe { raw_call_interruptible(u64::from(nr), args) })
}

/// rdi: number, rsi: arguments.
#[unsafe(naked)]
unsafe extern "C" fn raw_call_interruptible(nr: u64, args: *const [u64; 6]) -> u64 {
    naked_asm!(
        "mov rax, rdi",
        "mov r11, rsi",
        "mov rdi, [r11]",
        "mov rsi, [r11 + 8]",
        "mov rdx, [r11 + 16]",
        "mov r10, [r11 + 24]",
        "mov r8, [r11 + 32]",
        "mov r9, [r11 + 40]",
        // From here to the end of `syscall` the recorder sends us to the way
        // out. A `syscall` that was entered and interrupted leaves rip behind
        // it, so a call is never given up after it began.
        ".globl dune_sandbox_call_start",
        ".hidden dune_sandbox_call_start",
        "dune_sandbox_call_start:",
        "cmp byte ptr [rip + {pending}], 0",
        "jne dune_sandbox_call_given_up",
        "syscall",
        ".globl dune_sandbox_call_end",
        ".hidden dune_sandbox_call_end",
        "dune_sandbox_call_end:",
        "ret",
        ".globl dune_sandbox_call_given_up",
        ".hidden dune_sandbox_call_given_up",
        "dune_sandbox_call_given_up:",
        "mov rax, -{restart}",
        "ret",
        pending = sym PENDING,
        restart = const Errno::ERESTARTSYS.number(),
    )
}
