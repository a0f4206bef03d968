//! A hostile program against the guard.
//!
//! This binary plays three parts. Without a role it is the test harness. With
//! the role `sandbox` it runs itself, in the sandbox, with the role `attack`,
//! and tells the attacker where a canary lies in the guard's memory; at the
//! end the canary must be untouched. An attack succeeds for the test if it ends
//! as the table in [`attacks`] says: refused, or dead.

#![expect(
    unsafe_code,
    reason = "attacks are made of raw calls, instructions and pointers"
)]

#[path = "attack_parts/shapes.rs"]
mod shapes;
#[path = "attack_parts/sockets.rs"]
mod sockets;
#[path = "attack_parts/stage.rs"]
mod stage;

use std::arch::asm;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Stdio};

use dune_sandbox::host::{Errno, SysResult, syscall};
use dune_sandbox::range::{PAGE_SIZE, USER_HI, USER_TOP};
use libtest_mimic::{Arguments, Failed, Trial};
use linux_raw_sys::general::*;

const ROLE: &str = "DUNE_TEST_ROLE";
const CANARY: &str = "DUNE_TEST_CANARY";
const CANARY_VALUE: u64 = 0x6361_6e61_7279_2121;

/// Exit codes of the parts.
const REFUSED: i32 = 0;
const SUCCEEDED: i32 = 90;
const CANARY_DEAD: i32 = 91;
const BROKEN: i32 = 92;

/// How an attack must end.
#[derive(Clone, Copy)]
enum Expected {
    /// All its attempts are refused, and it says so.
    Refused,
    /// It dies of this signal.
    Killed(i32),
    /// It dies of SIGSEGV or SIGILL: a weak KVM raises #UD where `int n` has
    /// no gate for ring 3.
    KilledByGate,
}

type Attack = fn(&Target);

/// An attack by one instruction.
macro_rules! instruction {
    ($text:literal) => {
        |_| {
            // SAFETY: it does nothing but end the program, or the test fails.
            unsafe { asm!($text) }
        }
    };
}

fn attacks() -> Vec<(&'static str, Attack, Expected)> {
    use Expected::{Killed, KilledByGate, Refused};
    let segv = Killed(SIGSEGV as i32);
    vec![
        (
            "pointers_of_forwarded_calls",
            forwarded_pointers as Attack,
            Refused,
        ),
        ("pointers_of_emulated_calls", emulated_pointers, Refused),
        ("answers_to_pointers", answers, Refused),
        ("nested_pointers", nested_pointers, Refused),
        ("structures_of_the_table", shapes::structures, Refused),
        ("pointers_of_socket_calls", sockets::pointers, Refused),
        ("pointers_of_messages", sockets::messages, Refused),
        ("options_of_sockets", sockets::options, Refused),
        (
            "sending_the_guards_descriptors",
            sockets::descriptors,
            Refused,
        ),
        ("kinds_of_sockets", sockets::kinds, Refused),
        ("messages_that_change", sockets::changing_message, Refused),
        ("pointers_that_flip", sockets::flipping_pointers, Refused),
        ("mapping_over_the_guard", mapping, Refused),
        ("descriptors_of_the_guard", descriptors, Refused),
        ("files_of_proc", proc_files, Refused),
        ("calls_that_do_not_exist", unknown_calls, Refused),
        ("registers_after_calls", registers, Refused),
        ("segment_bases", segment_bases, Refused),
        ("reading_the_guard", |target| read_at(target.canary), segv),
        ("writing_the_guard", |target| write_at(target.canary), segv),
        (
            "jumping_into_the_guard",
            |target| jump_to(target.canary & !15),
            segv,
        ),
        ("jumping_to_a_bad_address", |_| jump_to(1 << 47), segv),
        ("touching_the_hole", |_| write_at(USER_TOP + 8), segv),
        ("touching_page_zero", |_| write_at(8), segv),
        (
            "touching_the_kernel_half",
            |_| write_at(0xffff_8000_0000_0000),
            segv,
        ),
        ("frame_in_the_guard", frame_in_guard, segv),
        ("altstack_in_the_guard", altstack_in_guard, segv),
        ("sigreturn_to_a_bad_address", sigreturn_bad_rip, segv),
        (
            "sigreturn_with_state_in_the_guard",
            sigreturn_bad_state,
            segv,
        ),
        ("halt", instruction!("hlt"), segv),
        ("interrupts_off", instruction!("cli"), segv),
        ("port_output", instruction!("out 0x80, al"), segv),
        ("port_input", instruction!("in al, 0x60"), segv),
        ("control_registers", |_| control_register(), segv),
        ("model_specific_registers", instruction!("wrmsr"), segv),
        ("legacy_system_call", instruction!("int 0x80"), KilledByGate),
        (
            "interrupt_to_a_stub",
            instruction!("int 0x0e"),
            KilledByGate,
        ),
        ("kernel_segment", |_| kernel_segment(), segv),
        ("far_return_to_ring_0", |_| far_return(), segv),
        ("descriptor_table", |_| descriptor_table(), segv),
    ]
}

fn main() -> ExitCode {
    part().unwrap_or_else(harness)
}

/// The part that this process was started for.
pub(crate) fn part() -> Option<ExitCode> {
    match std::env::var(ROLE).as_deref() {
        Ok("sandbox") => Some(sandbox()),
        Ok("attack") => Some(attack()),
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
    if no_kvm && std::env::var_os("DUNE_REQUIRE_RING0").is_some_and(|value| value == "1") {
        eprintln!("this machine has no usable KVM: {}", report.kvm);
        return ExitCode::FAILURE;
    }
    let kind = if no_kvm {
        report.kvm.to_string()
    } else {
        String::new()
    };
    let trials = names()
        .into_iter()
        .map(|name| {
            Trial::test(name, move || fails(name, &[]))
                .with_kind(kind.clone())
                .with_ignored_flag(no_kvm)
        })
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Whether an attack fails, as it must, on the stage that `environment` sets.
pub(crate) fn fails(name: &str, environment: &[(&str, &str)]) -> Result<(), Failed> {
    let attack = attacks().into_iter().find(|(other, ..)| *other == name);
    let (_, _, expected) = attack.ok_or("there is no such attack")?;
    check(name, expected, environment)
}

fn check(name: &str, expected: Expected, environment: &[(&str, &str)]) -> Result<(), Failed> {
    let output = Command::new(std::env::current_exe()?)
        .env(ROLE, "sandbox")
        .envs(environment.iter().copied())
        .arg(name)
        .stdin(Stdio::null())
        .output()?;
    let status = output.status;
    let fits = match expected {
        Expected::Refused => status.code() == Some(REFUSED),
        Expected::Killed(signal) => status.signal() == Some(signal),
        Expected::KilledByGate => {
            matches!(
                status.signal().map(|signal| signal as u32),
                Some(SIGSEGV | SIGILL)
            )
        }
    };
    if fits && !output.stdout.windows(4).any(|text| text == b"DEAD") {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(format!("ended with {status}\n{text}{errors}").into())
}

/// Runs the attack in the sandbox, with a canary beside it.
fn sandbox() -> ExitCode {
    let canary = Box::new(CANARY_VALUE);
    let address = (&raw const *canary).expose_provenance();
    let run = || -> Result<dune_sandbox::Outcome, Box<dyn std::error::Error>> {
        let command = dune_sandbox::Command::new(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .env(ROLE, "attack")
            .env(CANARY, address.to_string());
        Ok(command.run(stage::engine()?)?)
    };
    let outcome = run();
    // SAFETY: the box is alive; volatile, for who knows who wrote it.
    let value = unsafe { (&raw const *canary).read_volatile() };
    if value != CANARY_VALUE {
        println!("DEAD: the canary is {value:#x}");
        return ExitCode::from(CANARY_DEAD as u8);
    }
    match outcome {
        Ok(outcome) => outcome.end.leave(),
        Err(error) => {
            println!("the sandbox failed: {error}");
            ExitCode::from(BROKEN as u8)
        }
    }
}

/// What the attacker knows.
struct Target {
    /// An address in the guard's heap.
    canary: u64,
}

impl Target {
    /// Addresses that must not be taken.
    fn addresses(&self) -> [u64; 6] {
        [
            self.canary,
            self.canary & !(PAGE_SIZE - 1),
            USER_HI,
            USER_HI - 1,
            0xffff_8000_0000_0000,
            u64::MAX - 7,
        ]
    }
}

fn attack() -> ExitCode {
    let name = std::env::args().nth(1).unwrap_or_default();
    let canary = std::env::var(CANARY)
        .ok()
        .and_then(|text| text.parse().ok());
    let attack = attacks().into_iter().find(|(other, ..)| *other == name);
    let (Some(canary), Some((_, attack, _))) = (canary, attack) else {
        return ExitCode::from(BROKEN as u8);
    };
    // The standard library handles SIGSEGV to tell stack overflows.
    let default = [0_u64; 4];
    works(
        "sigaction",
        call(__NR_rt_sigaction, &[u64::from(SIGSEGV), at(&default), 0, 8]),
    );
    attack(&Target { canary });
    ExitCode::from(REFUSED as u8)
}

/// A system call of the attacker.
fn call(nr: u32, args: &[u64]) -> SysResult {
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    // SAFETY: the attacker cares for nothing; what works out is the guard's
    // affair.
    unsafe { syscall(nr, all) }
}

/// Fails the test if the call was not refused.
fn refused(what: &str, result: SysResult) {
    if let Ok(value) = result {
        println!("{what} succeeded with {value:#x}");
        std::process::exit(SUCCEEDED);
    }
}

/// As [`refused`]; but where the kernel itself finds the bad pointer, it has
/// done `short` bytes by then, and says so.
fn refused_or_short(what: &str, result: SysResult, short: u64) {
    if stage::checks_pointers() || result != Ok(short) {
        refused(what, result);
    }
}

/// Fails the test if something ordinary does not work.
fn works(what: &str, result: SysResult) -> u64 {
    result.unwrap_or_else(|errno| {
        println!("{what} failed: {errno}");
        std::process::exit(BROKEN)
    })
}

fn at<T: ?Sized>(value: &T) -> u64 {
    (&raw const *value).cast::<u8>().expose_provenance() as u64
}

/// Every pointer argument of the table, by its row.
fn forwarded_pointers(target: &Target) {
    use dune_sandbox::table::{Arg, Handling, calls};
    let quiet = [__NR_exit, __NR_exit_group, __NR_rt_sigreturn];
    for entry in calls() {
        if !matches!(entry.handling, Handling::Forwarded | Handling::Emulated(_))
            || quiet.contains(&entry.nr)
        {
            continue;
        }
        for (index, kind) in entry.args.iter().enumerate() {
            if !matches!(
                kind,
                Arg::In(_)
                    | Arg::Out(_)
                    | Arg::InOut(_)
                    | Arg::Path
                    | Arg::Text
                    | Arg::SigSet
                    | Arg::Pages(_)
            ) {
                continue;
            }
            for address in target.addresses() {
                // Large enough for any length, and a valid set size.
                let mut args = [4096; 6];
                for (other, kind) in entry.args.iter().enumerate() {
                    args[other] = match kind {
                        Arg::Value => 4096,
                        Arg::Fd => u64::MAX,
                        _ => 0,
                    };
                }
                args[index] = address;
                let result = call(entry.nr, &args);
                // An answer may be empty: the kernel writes nothing then, and the
                // canary says so.
                if stage::checks_pointers() || !matches!(kind, Arg::Out(_)) {
                    refused(entry.name, result);
                }
            }
        }
    }
}

fn emulated_pointers(target: &Target) {
    let cwd = AT_FDCWD as i64 as u64;
    for address in target.addresses() {
        refused("open", call(__NR_open, &[address, 0]));
        refused("openat", call(__NR_openat, &[cwd, address, 0]));
        refused("creat", call(__NR_creat, &[address, 0o600]));
        refused("openat2", call(__NR_openat2, &[cwd, at(c"/"), address, 24]));
        refused(
            "openat2",
            call(__NR_openat2, &[cwd, address, at(&[0_u64; 3]), 24]),
        );
        refused(
            "readlink",
            call(__NR_readlink, &[address, at(&[0_u8; 64]), 64]),
        );
        refused(
            "readlink",
            call(__NR_readlink, &[at(c"/proc/self/exe"), address, 64]),
        );
        refused("readv", call(__NR_readv, &[0, address, 1]));
        refused("writev", call(__NR_writev, &[1, address, 1]));
        refused("execve", call(__NR_execve, &[address, 0, 0]));
        refused("execve", call(__NR_execve, &[at(c"/bin/true"), address, 0]));
        refused("execve", call(__NR_execve, &[at(c"/bin/true"), 0, address]));
        refused("prctl", call(__NR_prctl, &[15, address]));
        refused("prctl", call(__NR_prctl, &[16, address]));
        refused("arch_prctl", call(__NR_arch_prctl, &[0x1003, address]));
        refused(
            "futex",
            call(__NR_futex, &[address, u64::from(FUTEX_WAKE), 1]),
        );
        refused(
            "futex",
            call(__NR_futex, &[address, u64::from(FUTEX_WAIT), 0]),
        );
        refused("sigaction", call(__NR_rt_sigaction, &[10, address, 0, 8]));
        refused("sigaction", call(__NR_rt_sigaction, &[10, 0, address, 8]));
        refused(
            "sigprocmask",
            call(__NR_rt_sigprocmask, &[0, 0, address, 8]),
        );
        refused("sigaltstack", call(__NR_sigaltstack, &[address, 0]));
        refused("sigaltstack", call(__NR_sigaltstack, &[0, address]));
        refused("prlimit", call(__NR_prlimit64, &[0, 7, 0, address]));
        refused("prlimit", call(__NR_prlimit64, &[0, 7, address, 0]));
        refused("robust", call(__NR_get_robust_list, &[0, address, address]));
    }
    let mut pipe = [0_i32; 2];
    works(
        "pipe",
        call(__NR_pipe, &[(&raw mut pipe).expose_provenance() as u64]),
    );
    for address in target.addresses() {
        refused(
            "ioctl",
            call(
                __NR_ioctl,
                &[
                    pipe[0] as u64,
                    u64::from(linux_raw_sys::ioctl::FIONREAD),
                    address,
                ],
            ),
        );
        refused(
            "fcntl",
            call(__NR_fcntl, &[pipe[0] as u64, u64::from(F_GETLK), address]),
        );
        refused("write", call(__NR_write, &[pipe[1] as u64, address, 8]));
        refused(
            "vmsplice",
            call(__NR_vmsplice, &[pipe[1] as u64, at(&[address, 8]), 1, 0]),
        );
    }
    // And with something to read, into the guard.
    works(
        "write",
        call(__NR_write, &[pipe[1] as u64, at(&[0x41_u8; 64]), 64]),
    );
    for address in target.addresses() {
        refused("read", call(__NR_read, &[pipe[0] as u64, address, 8]));
        refused(
            "readv",
            call(__NR_readv, &[pipe[0] as u64, at(&[address, 8]), 1]),
        );
    }
}

/// The guard's memory is no memory: not for reading, writing, or by vectors.
fn answers(target: &Target) {
    let zero = works("open", call(__NR_open, &[at(c"/dev/zero"), 0]));
    let mut pipe = [0_i32; 2];
    let ends = (&raw mut pipe).expose_provenance() as u64;
    works("pipe", call(__NR_pipe, &[ends]));
    let vector = [target.canary, 8];
    for (what, answer) in [
        ("read", call(__NR_read, &[zero, target.canary, 8])),
        ("readv", call(__NR_readv, &[zero, at(&vector), 1])),
        (
            "write",
            call(__NR_write, &[pipe[1] as u64, target.canary, 8]),
        ),
        (
            "writev",
            call(__NR_writev, &[pipe[1] as u64, at(&vector), 1]),
        ),
        ("uname", call(__NR_uname, &[target.canary])),
        ("getcwd", call(__NR_getcwd, &[target.canary, 4096])),
        ("nanosleep", call(__NR_nanosleep, &[target.canary, 0])),
    ] {
        if answer != Err(Errno::EFAULT) {
            println!("{what}: {answer:?}");
            std::process::exit(SUCCEEDED);
        }
    }
}

fn nested_pointers(target: &Target) {
    let file = works("open", call(__NR_open, &[at(c"/proc/self/exe"), 0]));
    let buffer = [0_u8; 16];
    for address in target.addresses() {
        let second_bad = [at(&buffer), 16, address, 16];
        for nr in [__NR_readv, __NR_preadv, __NR_preadv2] {
            refused("readv", call(nr, &[file, at(&[address, 16]), 1]));
            refused_or_short("readv", call(nr, &[file, at(&second_bad), 2]), 16);
        }
        for nr in [__NR_writev, __NR_pwritev, __NR_pwritev2] {
            refused("writev", call(nr, &[1, at(&[address, 16]), 1]));
        }
        refused(
            "pselect6",
            call(
                __NR_pselect6,
                &[0, 0, 0, 0, at(&[0_u64; 2]), at(&[address, 8])],
            ),
        );
        refused(
            "execve",
            call(__NR_execve, &[at(c"/bin/true"), at(&[address, 0]), 0]),
        );
        refused(
            "execve",
            call(__NR_execve, &[at(c"/bin/true"), 0, at(&[address, 0])]),
        );
        for nr in [__NR_process_vm_readv, __NR_process_vm_writev] {
            let pid = u64::from(std::process::id());
            let local = [at(&buffer), 16];
            refused(
                "process_vm",
                call(nr, &[pid, at(&local), 1, at(&[address, 16]), 1]),
            );
        }
    }
    refused(
        "readv",
        call(__NR_readv, &[file, at(&[at(&buffer), u64::MAX]), 1]),
    );
    refused(
        "readv",
        call(__NR_readv, &[file, at(&[at(&buffer), 16]), u64::MAX]),
    );
}

fn mapping(target: &Target) {
    refused(
        "memfd_create",
        call(__NR_memfd_create, &[at(c"huge"), u64::from(MFD_HUGETLB)]),
    );
    let event = works("eventfd", call(__NR_eventfd2, &[0, 0]));
    let shared = u64::from(MAP_SHARED);
    refused(
        "mmap",
        call(__NR_mmap, &[0, PAGE_SIZE, 3, shared, event, 0]),
    );
    let private = u64::from(MAP_PRIVATE | MAP_ANONYMOUS);
    let map = call(__NR_mmap, &[0, PAGE_SIZE, 3, private, u64::MAX, 0]);
    let page = works("mmap", map);
    let advice = u64::from(MADV_DONTFORK);
    refused("madvise", call(__NR_madvise, &[page, PAGE_SIZE, advice]));
    let fixed = u64::from(MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED);
    let rw = u64::from(PROT_READ | PROT_WRITE);
    let own = works(
        "mmap",
        call(
            __NR_mmap,
            &[0, PAGE_SIZE, rw, fixed & !u64::from(MAP_FIXED), u64::MAX],
        ),
    );
    for address in target.addresses().map(|address| address & !(PAGE_SIZE - 1)) {
        refused(
            "mmap",
            call(__NR_mmap, &[address, PAGE_SIZE, rw, fixed, u64::MAX]),
        );
        refused("munmap", call(__NR_munmap, &[address, PAGE_SIZE]));
        refused("mprotect", call(__NR_mprotect, &[address, PAGE_SIZE, rw]));
        refused(
            "madvise",
            call(
                __NR_madvise,
                &[address, PAGE_SIZE, u64::from(MADV_DONTNEED)],
            ),
        );
        refused(
            "mremap",
            call(__NR_mremap, &[address, PAGE_SIZE, 2 * PAGE_SIZE, 1]),
        );
        refused(
            "mremap",
            call(__NR_mremap, &[own, PAGE_SIZE, PAGE_SIZE, 3, address]),
        );
        refused("mlock", call(__NR_mlock, &[address, PAGE_SIZE]));
        refused("msync", call(__NR_msync, &[address, PAGE_SIZE, 4]));
        refused("remap", call(__NR_remap_file_pages, &[address, PAGE_SIZE]));
        refused("shmat", call(__NR_shmat, &[0, address, 0]));
        // A hint may be ignored, never followed.
        let plain = fixed & !u64::from(MAP_FIXED);
        let got = works(
            "mmap",
            call(__NR_mmap, &[address, PAGE_SIZE, rw, plain, u64::MAX]),
        );
        assert!(got < USER_TOP, "a mapping at {got:#x}");
    }
    // Lengths that wrap or straddle.
    refused("munmap", call(__NR_munmap, &[own, u64::MAX]));
    refused(
        "munmap",
        call(__NR_munmap, &[own, USER_HI - own + PAGE_SIZE]),
    );
    refused(
        "mmap",
        call(__NR_mmap, &[own, u64::MAX - PAGE_SIZE, rw, fixed, u64::MAX]),
    );
    refused("mprotect", call(__NR_mprotect, &[own, u64::MAX - own, rw]));
    let top = call(__NR_brk, &[0]).unwrap_or(0);
    assert_eq!(call(__NR_brk, &[target.canary]), Ok(top), "the break stays");
    works(
        "mprotect",
        call(__NR_mprotect, &[own, PAGE_SIZE, u64::from(PROT_READ)]),
    );
}

/// Numbers that the guard's descriptors may have: low ones, and those around
/// the limit.
fn suspects() -> impl Iterator<Item = u64> {
    const AROUND: u64 = 200;
    let mut limit = [0_u64; 2];
    let out = (&raw mut limit).expose_provenance() as u64;
    works(
        "prlimit",
        call(__NR_prlimit64, &[0, u64::from(RLIMIT_NOFILE), 0, out]),
    );
    let [soft, hard] = limit;
    (3..AROUND)
        .chain(soft.saturating_sub(AROUND).max(AROUND)..soft + AROUND)
        .chain((hard.saturating_sub(AROUND)..hard).filter(move |&fd| fd >= soft + AROUND))
}

fn descriptors(_target: &Target) {
    // What the attacker was given is not of interest.
    works(
        "close_range",
        call(__NR_close_range, &[3, u64::from(u32::MAX), 0]),
    );
    // Whatever the guard has open: none of it can be used or closed.
    let mut stat = [0_u64; 18];
    for fd in suspects() {
        let stat = (&raw mut stat).expose_provenance() as u64;
        refused("fstat", call(__NR_fstat, &[fd, stat]));
        let path = std::ffi::CString::new(format!("/proc/self/fd/{fd}")).unwrap_or_default();
        let path = at(path.as_bytes_with_nul());
        refused("open", call(__NR_open, &[path, u64::from(O_RDWR)]));
        refused("dup", call(__NR_dup, &[fd]));
        refused("ioctl", call(__NR_ioctl, &[fd, 0xae01, 0]));
    }
    works(
        "close_range",
        call(__NR_close_range, &[3, u64::from(u32::MAX), 0]),
    );
    let zero = works("open", call(__NR_open, &[at(c"/dev/zero"), 0]));
    for fd in suspects() {
        if let Ok(other) = call(__NR_dup2, &[zero, fd])
            && other != zero
        {
            works("close", call(__NR_close, &[other]));
        }
    }
    // And the guard still works.
    works("getpid", call(__NR_getpid, &[]));
    works("open", call(__NR_open, &[at(c"/etc/passwd"), 0]));
}

fn proc_files(_target: &Target) {
    let pid = std::process::id();
    for path in [
        "/proc/self/mem",
        "/proc/thread-self/mem",
        "/proc/1/mem",
        "/proc/1/environ",
        "/dev/mem",
        "/dev/kmsg",
        "/dev/kvm",
        "/proc/kcore",
    ] {
        let path = std::ffi::CString::new(path).unwrap_or_default();
        for flags in [O_RDONLY, O_RDWR, O_PATH] {
            refused(
                &path.to_string_lossy(),
                call(__NR_open, &[at(path.as_bytes_with_nul()), u64::from(flags)]),
            );
        }
    }
    for path in [
        format!("/proc/{pid}/mem"),
        format!("/proc/{pid}/task/{pid}/mem"),
        "/proc/self/pagemap".into(),
        "/proc/self/smaps".into(),
    ] {
        assert!(std::fs::File::open(&path).is_err(), "{path}");
    }
    // By a folder, and by a link.
    let folder = works(
        "open",
        call(__NR_open, &[at(c"/proc/self"), u64::from(O_DIRECTORY)]),
    );
    refused("openat", call(__NR_openat, &[folder, at(c"mem"), 2]));
    works("fchdir", call(__NR_fchdir, &[folder]));
    refused("open", call(__NR_open, &[at(c"mem"), 2]));
    refused("open", call(__NR_open, &[at(c"./task/../mem"), 2]));
    let how = [2_u64, 0, 0];
    refused(
        "openat2",
        call(__NR_openat2, &[folder, at(c"mem"), at(&how), 24]),
    );

    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    assert!(maps.lines().count() > 3, "own mappings are shown");
    for line in maps.lines() {
        let start = line
            .split('-')
            .next()
            .and_then(|text| u64::from_str_radix(text, 16).ok());
        assert!(start.is_some_and(|start| start < USER_HI), "{line}");
    }
}

fn unknown_calls(_target: &Target) {
    for nr in (336..424)
        .chain(470..1024)
        .chain([0x4000_0000, 0x4000_0001, u32::MAX])
    {
        assert_eq!(
            call(nr, &[1, 2, 3, 4, 5, 6]),
            Err(Errno::ENOSYS),
            "call {nr}"
        );
    }
}

/// Nothing of the guard is left in registers.
fn registers(target: &Target) {
    let (rcx, r11, rdi, rsi, rdx, r10, r8, r9): (u64, u64, u64, u64, u64, u64, u64, u64);
    // SAFETY: getpid; every register that it may change is declared.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") u64::from(__NR_getpid) => _,
            inlateout("rdi") 1_u64 => rdi,
            inlateout("rsi") 2_u64 => rsi,
            inlateout("rdx") 3_u64 => rdx,
            inlateout("r10") 4_u64 => r10,
            inlateout("r8") 5_u64 => r8,
            inlateout("r9") 6_u64 => r9,
            out("rcx") rcx,
            out("r11") r11,
        );
    }
    assert_eq!([rdi, rsi, rdx, r10, r8, r9], [1, 2, 3, 4, 5, 6]);
    assert!(rcx < USER_HI && r11 < 1 << 22);
    assert_ne!(rcx, target.canary);
}

fn segment_bases(target: &Target) {
    for address in [target.canary, USER_HI, 1 << 47, u64::MAX] {
        refused("arch_prctl", call(__NR_arch_prctl, &[0x1002, address]));
        refused("arch_prctl", call(__NR_arch_prctl, &[0x1001, address]));
    }
}

fn read_at(address: u64) {
    let address: *const u64 = core::ptr::with_exposed_provenance(address as usize);
    // SAFETY: it is meant to fault.
    let value = unsafe { address.read_volatile() };
    println!("read {value:#x}");
    std::process::exit(SUCCEEDED)
}

fn write_at(address: u64) {
    let address: *mut u64 = core::ptr::with_exposed_provenance_mut(address as usize);
    // SAFETY: it is meant to fault.
    unsafe { address.write_volatile(0) };
    std::process::exit(SUCCEEDED)
}

fn jump_to(address: u64) {
    // SAFETY: it is meant to fault.
    unsafe { asm!("call {}", in(reg) address, clobber_abi("C")) };
    std::process::exit(SUCCEEDED)
}

fn control_register() {
    // SAFETY: it is meant to fault.
    unsafe { asm!("mov cr3, {}", in(reg) 0_u64) };
}

fn kernel_segment() {
    // SAFETY: it is meant to fault.
    unsafe { asm!("mov ss, {0:x}", in(reg) 0x8_u64) };
}

fn far_return() {
    // SAFETY: it is meant to fault.
    unsafe { asm!("lea {0}, [rip + 2f]", "push 0x8", "push {0}", "retfq", "2:", out(reg) _) };
}

fn descriptor_table() {
    let table = [0_u8; 16];
    // SAFETY: it is meant to fault.
    unsafe { asm!("lidt [{}]", in(reg) &raw const table) };
}

/// `struct sigaction` with a handler that only returns.
fn handle(signal: u32, flags: u32) {
    extern "C" fn handler() {}
    #[unsafe(naked)]
    extern "C" fn restorer() {
        core::arch::naked_asm!("mov eax, 15", "syscall")
    }
    let handler: extern "C" fn() = handler;
    let restorer: extern "C" fn() = restorer;
    let action = [
        handler as usize as u64,
        u64::from(flags | SA_RESTORER),
        restorer as usize as u64,
        0,
    ];
    works(
        "sigaction",
        call(__NR_rt_sigaction, &[u64::from(signal), at(&action), 0, 8]),
    );
}

/// A signal while the stack pointer is in the guard.
fn frame_in_guard(target: &Target) {
    handle(SIGUSR1, 0);
    let pid = u64::from(std::process::id());
    // SAFETY: the stack pointer comes back, unless the signal kills us.
    unsafe {
        asm!(
            "xchg rsp, {stack}",
            "syscall",
            "mov rsp, {stack}",
            stack = inout(reg) target.canary + 2048 => _,
            inout("rax") u64::from(__NR_kill) => _,
            in("rdi") pid,
            in("rsi") u64::from(SIGUSR1),
            out("rcx") _,
            out("r11") _,
        );
    }
    std::process::exit(SUCCEEDED)
}

fn altstack_in_guard(target: &Target) {
    handle(SIGUSR1, SA_ONSTACK);
    let stack = [target.canary - 65536, 0, 1 << 17];
    works("sigaltstack", call(__NR_sigaltstack, &[at(&stack), 0]));
    let _ = call(
        __NR_kill,
        &[u64::from(std::process::id()), u64::from(SIGUSR1)],
    );
    std::process::exit(SUCCEEDED)
}

/// Offsets in `struct rt_sigframe`, from the address that `rt_sigreturn` is
/// called with in `rsp` (8 bytes into it).
mod frame {
    pub(crate) const WORDS: usize = 64;
    pub(crate) const RSP: usize = 20;
    pub(crate) const RIP: usize = 21;
    pub(crate) const FPSTATE: usize = 28;
}

fn sigreturn(frame: &[u64; frame::WORDS]) {
    // SAFETY: it is meant to fault; the frame holds a stack pointer that is
    // mapped.
    unsafe {
        asm!(
            "mov rsp, {0}",
            "mov eax, 15",
            "syscall",
            "ud2",
            in(reg) frame.as_ptr(),
            options(noreturn),
        )
    }
}

fn sigreturn_bad_rip(target: &Target) {
    let mut words = [0; frame::WORDS];
    words[frame::RSP] = at(&words);
    words[frame::RIP] = target.canary;
    sigreturn(&words)
}

fn sigreturn_bad_state(target: &Target) {
    let mut words = [0; frame::WORDS];
    words[frame::RSP] = at(&words);
    words[frame::RIP] = (sigreturn_bad_state as fn(&Target) as usize) as u64;
    words[frame::FPSTATE] = target.canary & !63;
    sigreturn(&words)
}
