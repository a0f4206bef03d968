//! Dispositions and mask of the host process, by raw calls.

#![expect(
    unsafe_code,
    reason = "rt_sigaction and rt_sigprocmask of the host process"
)]

use core::arch::naked_asm;
use core::sync::atomic::{AtomicU8, Ordering};

use linux_raw_sys::general::{
    __NR_exit_group, __NR_getpid, __NR_gettid, __NR_prlimit64, __NR_rt_sigaction,
    __NR_rt_sigprocmask, __NR_rt_sigreturn, __NR_rt_tgsigqueueinfo, __NR_tgkill, RLIMIT_CORE,
    SA_NOCLDSTOP, SA_NOCLDWAIT, SA_RESTORER, SA_SIGINFO, SIGHUP, SIGINT, SIGQUIT, SIGTERM,
};

use crate::host::{SysResult, syscall};
use crate::signal::record::{KICK, call_interruptible, handler, kick_info, take, take_kick};
use crate::signal::{
    Action, DefaultAction, Disposition, SIG_DFL, SIG_IGN, SIGKILL, SIGNALS, SigSet, bit,
    default_action,
};

/// Bytes of the kernel's signal set.
const SIGSET_LEN: u64 = 8;
const SIG_SETMASK: u64 = 2;

/// The disposition of `signal` as the host process has it.
pub(crate) fn disposition(signal: u32) -> Option<Action> {
    let mut old = Action::default();
    let args = [
        u64::from(signal),
        0,
        (&raw mut old).expose_provenance() as u64,
        SIGSET_LEN,
        0,
        0,
    ];
    // SAFETY: the kernel writes one sigaction to `old`.
    unsafe { syscall(__NR_rt_sigaction, args) }
        .ok()
        .map(|_| old)
}

/// Which signals the guard notes that the program has no handler for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Noted {
    /// None: the host acts on them.
    Handled,
    /// Those whose default action is to end the process, except those by which
    /// people end programs.
    Fatal,
    /// All whose default action is to end the process and that can be caught.
    AllFatal,
}

/// A [`Noted`].
static NOTED: AtomicU8 = AtomicU8::new(Noted::Handled as u8);

/// From now on these signals are noted, as soon as they are installed again.
pub(crate) fn note(which: Noted) {
    NOTED.store(which as u8, Ordering::Relaxed);
}

/// Whether the guard sees to the default action of `signal`.
fn records_default(signal: u32) -> bool {
    let by_people = matches!(signal, SIGHUP | SIGINT | SIGQUIT | SIGTERM);
    let noted = NOTED.load(Ordering::Relaxed);
    let is_noted = noted == Noted::AllFatal as u8 || noted == Noted::Fatal as u8 && !by_people;
    is_noted && signal != SIGKILL && default_action(signal) == DefaultAction::Terminate
}

/// Gives `signal` its default action.
pub(crate) fn set_default(signal: u32) {
    if signal == KICK {
        listen_to_kicks();
        return;
    }
    if records_default(signal) {
        let _ = record_it(signal, 0);
        return;
    }
    set_hosts_default(signal);
}

/// Gives `signal` the host's own default action, whoever serves the program.
pub(crate) fn set_hosts_default(signal: u32) {
    // Fails only for signals whose action cannot be changed.
    let _ = set(
        signal,
        &Action {
            handler: SIG_DFL,
            ..Action::default()
        },
    );
}

/// Makes the host process treat `signal` as the program asked by `action`:
/// default and ignore are the host's own, a handler becomes the recorder.
pub(crate) fn install(signal: u32, action: &Action) -> SysResult {
    if signal == KICK {
        // What the program wants of it is the guard's to do.
        listen_to_kicks();
        return Ok(0);
    }
    let kept = action.flags & u64::from(SA_NOCLDSTOP | SA_NOCLDWAIT);
    match action.disposition() {
        Disposition::Default if records_default(signal) => record_it(signal, kept),
        Disposition::Default => set(
            signal,
            &Action {
                handler: SIG_DFL,
                flags: kept,
                ..Action::default()
            },
        ),
        Disposition::Ignore => set(
            signal,
            &Action {
                handler: SIG_IGN,
                flags: kept,
                ..Action::default()
            },
        ),
        Disposition::Handler => record_it(signal, kept),
    }
}

/// Has the recorder note `signal`.
fn record_it(signal: u32, flags: u64) -> SysResult {
    set(
        signal,
        &Action {
            handler: handler(),
            // No SA_RESTART: the guard decides about that.
            flags: flags | u64::from(SA_SIGINFO | SA_RESTORER),
            restorer: restorer as *const () as usize as u64,
            mask: u64::MAX,
        },
    )
}

/// From now on threads of this process can be kicked.
pub(crate) fn listen_to_kicks() {
    // Cannot fail for this signal.
    let _ = record_it(KICK, 0);
}

/// Kicks the thread `tid` of the process `pid`, which is this one.
pub(crate) fn kick(pid: u32, tid: u32) {
    let info = kick_info();
    let args = [
        u64::from(pid),
        u64::from(tid),
        u64::from(KICK),
        (&raw const info).expose_provenance() as u64,
        0,
        0,
    ];
    // A thread that has ended needs none.
    // SAFETY: the kernel reads one siginfo; the recorder handles the signal.
    let _ = unsafe { syscall(__NR_rt_tgsigqueueinfo, args) };
}

/// Blocks every signal in this thread, until [`set_mask`].
pub(crate) fn block_all() {
    let all = u64::MAX;
    let new = (&raw const all).expose_provenance() as u64;
    // SAFETY: the kernel reads 8 bytes.
    let _ = unsafe { syscall(__NR_rt_sigprocmask, [SIG_SETMASK, new, 0, SIGSET_LEN, 0, 0]) };
}

fn set(signal: u32, action: &Action) -> SysResult {
    let new = (&raw const *action).expose_provenance() as u64;
    // SAFETY: the kernel reads one sigaction; its handler is the default, to
    // ignore, or the recorder, which is made for it.
    unsafe {
        syscall(
            __NR_rt_sigaction,
            [u64::from(signal), new, 0, SIGSET_LEN, 0, 0],
        )
    }
}

/// `set` as the host may have it, to block or to wait for: without the kick.
pub(crate) const fn mask_for_host(set: SigSet) -> SigSet {
    set & !bit(KICK)
}

/// Sets the thread's mask of blocked signals.
///
/// If a signal was noted already, or is before the kernel has changed the
/// mask, nothing happens: everything stays blocked, and who takes that signal
/// sets the mask. Were it set here, a second signal would overwrite the first.
pub(crate) fn set_mask(mask: SigSet) {
    let mask = mask_for_host(mask);
    let new = (&raw const mask).expose_provenance() as u64;
    // SAFETY: the kernel reads 8 bytes. Otherwise it cannot fail with these
    // arguments.
    let _ = unsafe {
        call_interruptible(
            __NR_rt_sigprocmask,
            &[SIG_SETMASK, new, 0, SIGSET_LEN, 0, 0],
        )
    };
}

/// The thread's mask of blocked signals.
pub(crate) fn mask() -> SigSet {
    let mut old: SigSet = 0;
    let out = (&raw mut old).expose_provenance() as u64;
    // SAFETY: the kernel writes 8 bytes to `old`.
    let _ = unsafe { syscall(__NR_rt_sigprocmask, [SIG_SETMASK, 0, out, SIGSET_LEN, 0, 0]) };
    old
}

/// Sends `signal` to this thread.
pub(crate) fn raise(signal: u32) {
    // SAFETY: neither call touches memory.
    let pid = unsafe { syscall(__NR_getpid, [0; 6]) }.unwrap_or(0);
    // SAFETY: likewise.
    let tid = unsafe { syscall(__NR_gettid, [0; 6]) }.unwrap_or(0);
    // SAFETY: a signal to ourselves; what it does is what the caller wants.
    let _ = unsafe { syscall(__NR_tgkill, [pid, tid, u64::from(signal), 0, 0, 0]) };
}

/// The id of the calling thread.
pub(crate) fn thread_id() -> u32 {
    // SAFETY: no memory. It cannot fail.
    unsafe { syscall(__NR_gettid, [0; 6]) }.unwrap_or(0) as u32
}

/// Ends this process at once, with all of its threads.
pub(crate) fn exit_process(status: u8) -> ! {
    loop {
        // SAFETY: nothing runs in this process afterwards.
        let _ = unsafe { syscall(__NR_exit_group, [u64::from(status), 0, 0, 0, 0, 0]) };
    }
}

/// Ends this process by `signal`; returns only if that is one that does not
/// kill. No other signal may come before it: those that wait are discarded,
/// whether in the host or noted already.
pub(crate) fn die_of(signal: u32) {
    let ignore = Action {
        handler: SIG_IGN,
        ..Action::default()
    };
    for other in (1..=SIGNALS).filter(|&other| other != signal) {
        // Fails for those that cannot be ignored.
        let _ = set(other, &ignore);
    }
    let default = Action {
        handler: SIG_DFL,
        ..Action::default()
    };
    let _ = set(signal, &default);
    let _ = (take(), take_kick());
    set_mask(0);
    raise(signal);
}

/// Takes from the C library the signal by which its threads tell each other of `setuid`. It
/// installs its handler when it makes its first thread, which would be in the place of the
/// program's, and the handler believes whoever sends the signal. So that happens here, by a
/// thread that there is no memory for, and the program gets what it has after `execve`.
///
/// The guard does not change its identity by the C library.
pub(crate) fn take_over_from_libc() {
    /// `SIGSETXID` of glibc.
    const TELLS_OF_SETUID: u32 = 33;
    /// More than there is address space.
    const TOO_MUCH: usize = 1 << 60;
    let none = std::thread::Builder::new()
        .stack_size(TOO_MUCH)
        .spawn(|| ());
    debug_assert!(none.is_err());
    let installed = disposition(TELLS_OF_SETUID).map(|action| action.disposition());
    if installed == Some(Disposition::Handler) {
        set_hosts_default(TELLS_OF_SETUID);
    }
}

/// Forbids core dumps of this process: they would hold the guard.
///
/// One byte, not none: where dumps go to a program, the kernel does not look at the limit but
/// for this value, with which it refuses (core(5)); and into one byte no file fits.
pub(crate) fn forbid_core_dumps() {
    let none = [1_u64; 2];
    let new = (&raw const none).expose_provenance() as u64;
    // SAFETY: the kernel reads one rlimit64.
    let _ = unsafe { syscall(__NR_prlimit64, [0, u64::from(RLIMIT_CORE), new, 0, 0, 0]) };
}

/// Where the kernel sends the recorder's return.
#[unsafe(naked)]
unsafe extern "C" fn restorer() {
    naked_asm!("mov eax, {nr}", "syscall", nr = const __NR_rt_sigreturn)
}
