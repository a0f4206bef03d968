//! A hostile program against the guard: what goes wrong half-way, what looks
//! like something else, and what `execve` must take away.
//!
//! This binary plays three parts, as the test `attack` does: the harness, the
//! sandbox that runs the attacker, and the attacker.

#![expect(unsafe_code, reason = "attacks are made of raw calls and pointers")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "an attack is a sequence of calls with one reason for all"
)]

#[path = "attack_parts/stage.rs"]
mod stage;

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use libc::{c_int, c_long, c_void, siginfo_t};
use libtest_mimic::{Arguments, Failed, Trial};

const ROLE: &str = "DUNE_TEST_ROLE";
const PAGE: usize = 4096;

/// How an attacker says that an attempt came to nothing, as it must.
const REFUSED: i32 = 0;
const SUCCEEDED: i32 = 90;

type Attack = fn();

fn attacks() -> Vec<(&'static str, Attack, Option<c_int>)> {
    vec![
        ("a_move_that_fails_half_way", move_half_way as Attack, None),
        ("rights_that_change_half_way", rights_half_way, None),
        ("a_queued_fault", queued_fault, None),
        ("a_queued_fault_of_a_thread", queued_fault_of_a_thread, None),
        (
            "descriptors_kept_over_execve",
            descriptors_over_execve,
            None,
        ),
        ("identity_kept_over_execve", identity_over_execve, None),
        (
            "death_while_a_signal_waits",
            death_in_a_storm,
            Some(libc::SIGSEGV),
        ),
    ]
}

fn main() -> ExitCode {
    part().unwrap_or_else(harness)
}

/// The part that this process was started for.
pub(crate) fn part() -> Option<ExitCode> {
    let name = std::env::args().nth(1).unwrap_or_default();
    match std::env::var(ROLE).as_deref() {
        Ok("sandbox") => Some(sandbox()),
        Ok("attack") => Some(
            match attacks().into_iter().find(|(other, ..)| *other == name) {
                Some((_, attack, _)) => {
                    attack();
                    ExitCode::from(REFUSED as u8)
                }
                None => after_execve(&name),
            },
        ),
        _ => None,
    }
}

/// The names of all attacks.
pub(crate) fn names() -> Vec<&'static str> {
    attacks().into_iter().map(|(name, ..)| name).collect()
}

fn harness() -> ExitCode {
    let report = dune_kvm::probe::probe();
    let no_kvm = report.natural_placement() == dune_kvm::probe::Placement::Lab;
    let trials = names()
        .into_iter()
        .map(|name| Trial::test(name, move || fails(name, &[])).with_ignored_flag(no_kvm))
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Whether an attack fails, as it must, on the stage that `environment` sets.
pub(crate) fn fails(name: &str, environment: &[(&str, &str)]) -> Result<(), Failed> {
    let attack = attacks().into_iter().find(|(other, ..)| *other == name);
    let (_, _, signal) = attack.ok_or("there is no such attack")?;
    check(name, signal, environment)
}

fn check(name: &str, signal: Option<c_int>, environment: &[(&str, &str)]) -> Result<(), Failed> {
    let output = Command::new(std::env::current_exe()?)
        .env(ROLE, "sandbox")
        .envs(environment.iter().copied())
        .arg(name)
        .stdin(Stdio::null())
        .output()?;
    let status = output.status;
    let fits = match signal {
        None => status.code() == Some(REFUSED),
        Some(_) => status.signal() == signal,
    };
    if fits {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(format!("ended with {status}\n{text}{errors}").into())
}

fn sandbox() -> ExitCode {
    let run = || -> Result<dune_sandbox::Outcome, Box<dyn std::error::Error>> {
        let command = dune_sandbox::Command::new(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .env(ROLE, "attack");
        Ok(command.run(stage::engine()?)?)
    };
    match run() {
        Ok(outcome) => outcome.end.leave(),
        Err(error) => {
            println!("the sandbox failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn insist(what: &str, holds: bool) {
    if !holds {
        println!("{what}: {}", std::io::Error::last_os_error());
        std::process::exit(SUCCEEDED);
    }
}

fn map(pages: usize, prot: c_int) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping.
    let at = unsafe { libc::mmap(core::ptr::null_mut(), pages * PAGE, prot, flags, -1, 0) };
    insist("mmap", at != libc::MAP_FAILED);
    at.cast()
}

fn advise(at: *mut u8, page: usize, pages: usize, advice: c_int) -> bool {
    // SAFETY: advice about dumps changes no memory.
    unsafe { libc::madvise(at.wrapping_add(page * PAGE).cast(), pages * PAGE, advice) == 0 }
}

/// Makes the guard itself read from the page: from memory, or not at all.
fn have_the_guard_read(at: *mut u8, page: usize) -> bool {
    // SAFETY: the call blocks no signal that anybody waits for, and reads.
    unsafe {
        let set = at.wrapping_add(page * PAGE);
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, set, 0, 8) == 0
    }
}

/// One area of the table, two mappings of the host: older kernels shorten the
/// range before they refuse to move it.
fn move_half_way() {
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let (at, to) = (map(16, rw), map(64, libc::PROT_NONE));
    insist("madvise", advise(at, 4, 4, libc::MADV_DONTDUMP));
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    for new_pages in [12, 16, 32] {
        // SAFETY: both ranges are this function's own.
        let _ = unsafe {
            libc::mremap(
                at.cast(),
                16 * PAGE,
                new_pages * PAGE,
                flags,
                to.cast::<c_void>(),
            )
        };
        for page in 0..64 {
            let _ = have_the_guard_read(at, page % 16);
            let _ = have_the_guard_read(to, page);
        }
    }
}

/// With one mapping left to the process, a change of rights over two of them
/// fails at the second.
fn rights_half_way() {
    const MOST: usize = 200_000;
    for spare in [1, 3] {
        let at = map(8, libc::PROT_READ | libc::PROT_EXEC);
        insist("madvise", advise(at, 4, 4, libc::MADV_DONTDUMP));
        let filler = map(MOST, libc::PROT_READ);
        let full = (1..MOST - 3)
            .step_by(2)
            .find(|&page| !advise(filler, page, 1, libc::MADV_DONTDUMP));
        let Some(full) = full else {
            return; // The machine allows more mappings than are worth making.
        };
        // Each gives two back; one with a border takes one again.
        for step in 0..spare / 2 {
            let _ = advise(filler, full - 2 * (step + 1), 1, libc::MADV_DODUMP);
        }
        if spare % 2 == 1 {
            let _ = advise(filler, full - spare / 2 * 2, 2, libc::MADV_DONTDUMP);
        }
        // SAFETY: the range is this function's own.
        let _ =
            unsafe { libc::mprotect(at.wrapping_add(2 * PAGE).cast(), 4 * PAGE, libc::PROT_READ) };
        for page in 0..8 {
            insist("reading", have_the_guard_read(at, page));
        }
        // SAFETY: likewise.
        let _ = unsafe { libc::munmap(filler.cast(), MOST * PAGE) };
    }
}

static CODE: AtomicU32 = AtomicU32::new(0);

extern "C" fn note(_signal: c_int, info: *const siginfo_t, _context: *const c_void) {
    // SAFETY: the guard passes a siginfo on the stack.
    CODE.store(unsafe { (*info).si_code } as u32, Ordering::SeqCst);
}

fn install(signal: c_int) {
    // SAFETY: zero is a valid sigaction, and the handler is made for it.
    unsafe {
        let mut action: libc::sigaction = core::mem::zeroed();
        action.sa_sigaction = note as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        insist(
            "sigaction",
            libc::sigaction(signal, &raw const action, core::ptr::null_mut()) == 0,
        );
    }
}

/// A signal that looks like a fault of the guard, and is none.
fn queued_fault() {
    install(libc::SIGSEGV);
    let pid = std::process::id() as c_long;
    // SAFETY: zero is a valid siginfo.
    let mut info: siginfo_t = unsafe { core::mem::zeroed() };
    for round in 1..4 {
        info.si_code = round;
        // SAFETY: the call reads the siginfo.
        let queued = unsafe {
            let signal = c_long::from(libc::SIGSEGV);
            libc::syscall(
                libc::SYS_rt_tgsigqueueinfo,
                pid,
                pid,
                signal,
                &raw const info,
            )
        };
        insist("queueing", queued == 0);
        insist("the handler", CODE.load(Ordering::SeqCst) == round as u32);
    }
    // And an ordinary one still arrives.
    // SAFETY: it has a handler.
    insist(
        "kill",
        unsafe { libc::kill(pid as c_int, libc::SIGSEGV) } == 0,
    );
    insist(
        "the handler",
        CODE.load(Ordering::SeqCst) == libc::SI_USER as u32,
    );
}

/// The same, by a thread that names itself; and for another thread, to which the
/// kernel lets nobody send such a thing.
fn queued_fault_of_a_thread() {
    install(libc::SIGSEGV);
    let pid = std::process::id() as c_long;
    let thread = std::thread::spawn(move || {
        // SAFETY: zero is a valid siginfo.
        let mut info: siginfo_t = unsafe { core::mem::zeroed() };
        info.si_code = 2;
        let at = &raw const info;
        let signal = c_long::from(libc::SIGSEGV);
        // SAFETY: the calls read the siginfo.
        unsafe {
            let tid = libc::syscall(libc::SYS_gettid);
            let queue = libc::SYS_rt_tgsigqueueinfo;
            insist("queueing", libc::syscall(queue, pid, tid, signal, at) == 0);
            insist("the handler", CODE.swap(0, Ordering::SeqCst) == 2);
            let queue_by_id = libc::SYS_rt_sigqueueinfo;
            insist("queueing", libc::syscall(queue_by_id, tid, signal, at) == 0);
            insist("the handler", CODE.swap(0, Ordering::SeqCst) == 2);
            insist("others", libc::syscall(queue, pid, pid, signal, at) == -1);
        }
    });
    insist("the thread", thread.join().is_ok());
    // SAFETY: it has a handler.
    insist(
        "kill",
        unsafe { libc::kill(pid as c_int, libc::SIGSEGV) } == 0,
    );
}

fn execve_self(name: &str) {
    use std::os::unix::process::CommandExt;
    let error = Command::new("/proc/self/exe").arg(name).exec();
    insist(&format!("execve: {error}"), false);
}

/// Leaves two descriptors free, which the new program's two files take.
fn descriptors_over_execve() {
    // SAFETY: plain calls on this process's descriptors and limits.
    unsafe {
        let secret = libc::open(c"/etc/passwd".as_ptr(), libc::O_CLOEXEC);
        let moved = libc::fcntl(secret, libc::F_DUPFD_CLOEXEC, 100);
        insist("fcntl", moved == 100);
        let limit = libc::rlimit {
            rlim_cur: secret as u64 + 2,
            rlim_max: 4096,
        };
        libc::close(secret);
        insist(
            "setrlimit",
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0,
        );
    }
    execve_self("is_100_closed");
}

/// A saved id and capabilities that were kept for a while.
fn identity_over_execve() {
    const NOBODY: u32 = 65534;
    // SAFETY: plain calls on this process's identity.
    unsafe {
        if libc::geteuid() != 0 {
            println!("not root: nothing to give up");
            return;
        }
        libc::prctl(libc::PR_SET_KEEPCAPS, 1);
        insist("setresuid", libc::setresuid(NOBODY, NOBODY, 0) == 0);
    }
    execve_self("is_root_gone");
}

fn after_execve(name: &str) -> ExitCode {
    // SAFETY: plain calls on this process.
    let holds = unsafe {
        match name {
            "is_100_closed" => libc::fcntl(100, libc::F_GETFD) == -1,
            "is_root_gone" => {
                libc::setresuid(0, 0, 0) == -1
                    && std::fs::read_to_string("/proc/self/status")
                        .is_ok_and(|status| status.contains("CapPrm:\t0000000000000000"))
            }
            _ => false,
        }
    };
    insist(name, holds);
    ExitCode::from(REFUSED as u8)
}

/// A fatal fault while another signal has been noted is still that death.
fn death_in_a_storm() {
    install(libc::SIGALRM);
    let every = libc::timeval {
        tv_sec: 0,
        tv_usec: 2000,
    };
    let timer = libc::itimerval {
        it_interval: every,
        it_value: every,
    };
    // SAFETY: the last access is meant to be fatal: Rust's own handler for it
    // is taken away first.
    unsafe {
        libc::signal(libc::SIGSEGV, libc::SIG_DFL);
        libc::setitimer(libc::ITIMER_REAL, &raw const timer, core::ptr::null_mut());
        while CODE.load(Ordering::SeqCst) == 0 {}
        core::ptr::without_provenance_mut::<u8>(8).write_volatile(1);
    }
}
