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
//! Every thread of the program has its own record, in the thread-local storage
//! of the host thread that runs it. The process must have no other threads that
//! take signals: those that are not the program's block them all.
//!
//! **The kick** is how one thread makes another one look up, wherever it is: a
//! queued [`KICK`] with a number that only the guard knows. It blocks nothing
//! and is no signal of the program; a call that waits returns, one that has not
//! begun is given up, and ring 3 is left.

#![expect(unsafe_code, reason = "signal handler, and a system call with labels")]

use core::arch::naked_asm;
use core::cell::{Cell, UnsafeCell};
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU64, Ordering};

use dune_kvm::wall::{self, Slot};

use crate::engine::Passage;
use crate::host::{Errno, SysResult, decode};
use crate::peel::has_wall;
use crate::signal::{SI_QUEUE, SI_USER, SigInfo};

/// What a thread knows of its signals.
struct Record {
    /// What waits for the guard: [`SIGNAL`], [`KICKED`].
    pending: AtomicU8,
    /// The engine's kick byte, or null.
    kick: AtomicPtr<AtomicU8>,
    /// Written by the recorder only while [`SIGNAL`] is clear, read by `take`
    /// only while it is set; all signals are blocked in between.
    slot: UnsafeCell<SigInfo>,
    /// The thread's [`Passage`]: what goes into the number of a call, and the
    /// stack for signal frames.
    flag: Cell<u64>,
    stack: Cell<Option<&'static Slot>>,
}

/// The slot holds a signal that the guard has not taken.
const SIGNAL: u8 = 1;
/// The thread was kicked.
const KICKED: u8 = 2;

// Constant and without a destructor: the recorder may use it at any moment.
thread_local! {
    static RECORD: Record = const {
        Record {
            pending: AtomicU8::new(0),
            kick: AtomicPtr::new(ptr::null_mut()),
            slot: UnsafeCell::new(SigInfo::ZERO),
            flag: Cell::new(0),
            stack: Cell::new(None),
        }
    };
}

/// The number that a kick carries; 0 for none yet.
static TOKEN: AtomicU64 = AtomicU64::new(0);

/// The signal that kicks come by. The program may use it too, but cannot block
/// it in the host: what it blocked is held by the guard.
///
/// A standard one, because those are sent even if the program has used up its
/// queue (`RLIMIT_SIGPENDING`), and the one that nothing on Linux raises.
pub(crate) const KICK: u32 = linux_raw_sys::general::SIGSTKFLT;

/// Offsets in the kernel's `ucontext` of x86-64.
mod ucontext {
    /// `uc_mcontext.gregs[REG_RIP]`.
    pub(super) const RIP: usize = 40 + 16 * 8;
    /// `uc_sigmask`.
    pub(super) const SIGMASK: usize = 40 + 256;
}

/// Tells the recorder which byte wakes the engine; `None` for no engine.
pub(crate) fn set_kick(byte: Option<NonNull<AtomicU8>>) {
    RECORD.with(|record| {
        record.kick.store(
            byte.map_or(ptr::null_mut(), NonNull::as_ptr),
            Ordering::SeqCst,
        );
    });
}

/// Whether calls of this process are made behind the wall by the guard itself.
static WALLED_HERE: AtomicBool = AtomicBool::new(false);

/// Tells how calls of this thread that have arguments of the program are made.
pub(crate) fn set_passage(passage: Passage) {
    let (flag, stack) = match passage {
        _ if !has_wall() => (0, None),
        Passage::Open => (0, None),
        Passage::ByRuntime => (dune::WALLED as u64, None),
        Passage::Walled { stack } => (0, Some(stack)),
    };
    if stack.is_some() {
        WALLED_HERE.store(true, Ordering::Relaxed);
    }
    RECORD.with(|record| {
        record.flag.set(flag);
        record.stack.set(stack);
    });
}

/// What is or'ed to the number of a call that the Dune runtime is to make
/// behind the wall; nothing where there is no such runtime.
pub(crate) fn passage_flag() -> u64 {
    RECORD.with(|record| record.flag.get())
}

/// The address of the handler that notes signals.
pub(crate) fn handler() -> u64 {
    let (plain, walled): (
        unsafe extern "C" fn(i32, *const SigInfo, *mut u8),
        unsafe extern "C" fn(),
    ) = (recorder, walled_recorder);
    if WALLED_HERE.load(Ordering::Relaxed) {
        walled as usize as u64
    } else {
        plain as usize as u64
    }
}

dune_kvm::wall_signal_handler! {
    /// [`recorder`], where it may interrupt a call behind the wall.
    walled_recorder => recorder
}

/// Whether a signal waits to be taken.
pub(crate) fn is_pending() -> bool {
    RECORD.with(|record| record.pending.load(Ordering::Acquire) & SIGNAL != 0)
}

/// Whether a kick or a signal waits.
pub(crate) fn is_disturbed() -> bool {
    RECORD.with(|record| record.pending.load(Ordering::Acquire) != 0)
}

/// Whether this thread was kicked since the last look.
pub(crate) fn take_kick() -> bool {
    RECORD.with(|record| {
        record.pending.load(Ordering::Acquire) & KICKED != 0
            && record.pending.fetch_and(!KICKED, Ordering::AcqRel) & KICKED != 0
    })
}

/// Has this thread look up before it runs ring 3 again, as if it were kicked.
pub(crate) fn kick_self() {
    RECORD.with(|record| record.pending.fetch_or(KICKED, Ordering::AcqRel));
}

/// Forgets what was noted: in the child of a `fork`, it was the parent's.
pub(crate) fn forget() {
    RECORD.with(|record| record.pending.store(0, Ordering::Release));
}

/// Chooses the number that tells kicks from signals, once in a process.
pub(crate) fn choose_token(token: u64) {
    let _ = TOKEN.compare_exchange(0, token.max(1), Ordering::AcqRel, Ordering::Relaxed);
}

/// The `siginfo` of a kick.
pub(crate) fn kick_info() -> SigInfo {
    let mut info = SigInfo::ZERO;
    info.signo = KICK as i32;
    info.code = SI_QUEUE;
    info.fields[1] = TOKEN.load(Ordering::Relaxed);
    info
}

fn is_kick(info: &SigInfo) -> bool {
    // With the queue full, the kernel sends the signal and loses the rest.
    let is_bare = info.code == SI_USER && info.fields[0] == 0;
    let is_marked = info.code == SI_QUEUE && info.fields[1] == TOKEN.load(Ordering::Relaxed);
    info.signal() == KICK && (is_bare || is_marked)
}

/// Takes the signal that was noted, if any. All signals stay blocked in the
/// host until the caller sets the mask.
pub(crate) fn take() -> Option<SigInfo> {
    if !is_pending() {
        return None;
    }
    RECORD.with(|record| {
        // SAFETY: SIGNAL is set, so the recorder does not run (all signals are
        // blocked since) and has finished writing.
        let info = unsafe { *record.slot.get() };
        record.pending.fetch_and(!SIGNAL, Ordering::AcqRel);
        Some(info)
    })
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
        crate::signal::host::set_hosts_default(signal as u32);
        return;
    }
    let kicked = is_kick(&info);
    RECORD.with(|record| {
        if info.signal() == KICK {
            // Also if it is the program's: one that waited already stands for
            // the kick that came after it.
            record.pending.fetch_or(KICKED, Ordering::AcqRel);
        }
        if !kicked {
            // SAFETY: SIGNAL is clear: all signals are blocked while it is set.
            unsafe { *record.slot.get() = info };
            record.pending.fetch_or(SIGNAL, Ordering::AcqRel);
        }
        let kick = record.kick.load(Ordering::SeqCst);
        if !kick.is_null() {
            // SAFETY: the byte lives as long as the engine, and the guard
            // clears the pointer when that goes.
            unsafe { &*kick }.store(1, Ordering::SeqCst);
        }
    });
    if !kicked {
        // SAFETY: `context` is the kernel's ucontext, writable, of that layout.
        let mask = unsafe { context.add(ucontext::SIGMASK) }.cast::<u64>();
        // SAFETY: likewise; the kernel loads the mask from there on return.
        unsafe { mask.write_unaligned(u64::MAX) };
    }
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
    if let Some(way_out) = wall::gives_up_at(at) {
        // SAFETY: likewise; the way out takes up what the call keeps in registers.
        unsafe { rip.write_unaligned(way_out) };
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
    RECORD.with(|record| {
        // SAFETY: as the caller promises.
        decode(unsafe { raw_call_interruptible(u64::from(nr), args, &record.pending) })
    })
}

/// As [`call_interruptible`], for a call with arguments of the program: behind
/// the wall of protection keys, where there is one. Everything that it points at
/// must be user memory or lent ([`crate::bounce`]).
///
/// # Safety
///
/// As [`crate::host::syscall`].
pub(crate) unsafe fn call_walled(nr: u32, args: &[u64; 6]) -> SysResult {
    RECORD.with(|record| {
        let Some(stack) = record.stack.get() else {
            let nr = u64::from(nr) | record.flag.get();
            // SAFETY: as the caller promises; the flag is the runtime's.
            return decode(unsafe { raw_call_interruptible(nr, args, &record.pending) });
        };
        let args = args.map(|arg| arg as usize);
        // SAFETY: as the caller promises. There is a wall, and the engine of this
        // thread has taken back its restartable sequences and made the stack
        // (`Passage::Walled`). The handlers of the guard begin as they must.
        decode(unsafe { wall::call(nr as usize, &args, record.pending.as_ptr(), stack) } as u64)
    })
}

/// As [`call_walled`], for calls that must be made whatever waits, and that do
/// not wait themselves.
///
/// # Safety
///
/// As [`crate::host::syscall`].
pub(crate) unsafe fn call_walled_always(nr: u32, args: &[u64; 6]) -> SysResult {
    let (flag, stack) = RECORD.with(|record| (record.flag.get(), record.stack.get()));
    let nothing = AtomicU8::new(0);
    let words = args.map(|arg| arg as usize);
    loop {
        let rax = match stack {
            // SAFETY: as the caller promises; the flag is the runtime's.
            None => unsafe { raw_call_interruptible(u64::from(nr) | flag, args, &nothing) },
            // SAFETY: as in `call_walled`.
            Some(stack) => unsafe {
                wall::call(nr as usize, &words, nothing.as_ptr(), stack) as u64
            },
        };
        // A signal came just before it: it was noted, and nothing was done.
        if decode(rax) != Err(Errno::ERESTARTSYS) {
            return decode(rax);
        }
    }
}

/// rdi: number, rsi: arguments, rdx: what waits.
#[unsafe(naked)]
unsafe extern "C" fn raw_call_interruptible(
    nr: u64,
    args: *const [u64; 6],
    pending: *const AtomicU8,
) -> u64 {
    naked_asm!(
        "mov rax, rdi",
        "mov r11, rsi",
        "mov rcx, rdx",
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
        "cmp byte ptr [rcx], 0",
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
        restart = const Errno::ERESTARTSYS.number(),
    )
}
