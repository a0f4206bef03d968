//! Signals of the program, natively and in the sandbox: each scenario prints
//! what it sees, and must print the same in both.

#![expect(
    unsafe_code,
    reason = "signal handlers and instructions that raise signals"
)]

use std::arch::asm;
use std::process::{Command, ExitCode, Stdio};
use std::ptr;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};

use libtest_mimic::{Arguments, Failed, Trial};

const ROLE: &str = "DUNE_TEST_ROLE";

const SCENARIOS: &[(&str, fn())] = &[
    ("fault_information", fault_information),
    ("fault_at_protected_memory", fault_at_protected_memory),
    ("continue_elsewhere", continue_elsewhere),
    ("arithmetic_and_traps", arithmetic_and_traps),
    ("bus_error", bus_error),
    ("alternate_stack", alternate_stack),
    ("nested_handlers", nested_handlers),
    ("handler_for_once", handler_for_once),
    ("mask_in_the_frame", mask_in_the_frame),
    ("extended_state_survives", extended_state_survives),
    (
        "extended_state_can_be_changed",
        extended_state_can_be_changed,
    ),
    ("restarted_read", restarted_read),
    ("interrupted_read", interrupted_read),
    ("interrupted_waits", interrupted_waits),
    ("suspend_with_a_mask", suspend_with_a_mask),
    ("queued_in_order", queued_in_order),
    ("ignored_and_blocked", ignored_and_blocked),
    ("storm_of_timers", storm_of_timers),
    ("red_zone_survives", red_zone_survives),
];

fn main() -> ExitCode {
    match std::env::var(ROLE).as_deref() {
        Ok("sandbox") => sandbox(),
        Ok("program") => program(),
        _ => harness(),
    }
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
    let trials = SCENARIOS
        .iter()
        .map(|&(name, _)| {
            Trial::test(name, move || compare(name))
                .with_kind(kind.clone())
                .with_ignored_flag(no_kvm)
        })
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn compare(name: &str) -> Result<(), Failed> {
    let run = |role: &str| {
        Command::new(std::env::current_exe()?)
            .env(ROLE, role)
            .arg(name)
            .stdin(Stdio::null())
            .output()
    };
    let (native, sandboxed) = (run("program")?, run("sandbox")?);
    if native.status == sandboxed.status && native.stdout == sandboxed.stdout {
        return Ok(());
    }
    let text = |output: &std::process::Output| {
        format!(
            "{}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    };
    Err(format!(
        "natively: {}in the sandbox: {}",
        text(&native),
        text(&sandboxed)
    )
    .into())
}

fn sandbox() -> ExitCode {
    let run = || -> Result<dune_sandbox::Outcome, Box<dyn std::error::Error>> {
        let command = dune_sandbox::Command::new(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .env(ROLE, "program");
        let engine = dune_sandbox::engine::on_host::OnHost::new()?;
        Ok(command.run(Box::new(engine))?)
    };
    match run() {
        Ok(outcome) => outcome.end.leave(),
        Err(error) => {
            println!("the sandbox failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn program() -> ExitCode {
    let name = std::env::args().nth(1).unwrap_or_default();
    match SCENARIOS.iter().find(|(other, _)| *other == name) {
        Some((_, scenario)) => {
            scenario();
            println!("end");
            ExitCode::SUCCESS
        }
        None => ExitCode::FAILURE,
    }
}

type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

fn handle(signal: i32, flags: i32, masked: &[i32], handler: Handler) {
    // SAFETY: an all-zero sigaction is one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = flags | libc::SA_SIGINFO;
    for &other in masked {
        // SAFETY: the set is ours.
        unsafe { libc::sigaddset(&mut action.sa_mask, other) };
    }
    // SAFETY: the handlers of this file are made for it.
    let result = unsafe { libc::sigaction(signal, &action, ptr::null_mut()) };
    assert_eq!(result, 0);
}

fn pid() -> i32 {
    std::process::id() as i32
}

fn raise(signal: i32) {
    // SAFETY: a signal to ourselves, which has a handler.
    unsafe { libc::kill(pid(), signal) };
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: an all-zero set is the empty one.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    for &signal in signals {
        // SAFETY: the set is ours.
        unsafe { libc::sigaddset(&mut set, signal) };
    }
    set
}

fn block(how: i32, signals: &[i32]) {
    // SAFETY: both sets are ours or null.
    unsafe { libc::sigprocmask(how, &set_of(signals), ptr::null_mut()) };
}

fn is_blocked(signal: i32) -> bool {
    let mut set = set_of(&[]);
    // SAFETY: the set is ours.
    unsafe { libc::sigprocmask(libc::SIG_BLOCK, ptr::null(), &mut set) };
    // SAFETY: likewise.
    unsafe { libc::sigismember(&set, signal) == 1 }
}

/// The context of a handler.
///
/// # Safety
///
/// For the third argument of a handler only.
unsafe fn context<'a>(context: *mut libc::c_void) -> &'a mut libc::ucontext_t {
    // SAFETY: as the caller says.
    unsafe { &mut *context.cast() }
}

const RIP: usize = libc::REG_RIP as usize;
const RAX: usize = libc::REG_RAX as usize;
const RSP: usize = libc::REG_RSP as usize;

static SKIP: AtomicUsize = AtomicUsize::new(0);
static COUNT: AtomicU64 = AtomicU64::new(0);
static BASE: AtomicU64 = AtomicU64::new(0);

/// Prints what it is told, relative to [`BASE`], and steps over [`SKIP`] bytes
/// of code.
extern "C" fn report(signal: i32, info: *mut libc::siginfo_t, uc: *mut libc::c_void) {
    // SAFETY: the arguments of a handler.
    let info = unsafe { &*info };
    // SAFETY: likewise.
    let context = unsafe { context(uc) };
    // SAFETY: a fault's siginfo has an address.
    let addr = unsafe { info.si_addr() } as u64;
    let base = BASE.load(Ordering::SeqCst);
    let regs = &mut context.uc_mcontext.gregs;
    let err = regs[libc::REG_ERR as usize];
    let trap = regs[libc::REG_TRAPNO as usize];
    println!(
        "signal {signal} code {} address {:#x} error {err:#x} trap {trap} rax {:#x} cs {:#x}",
        info.si_code,
        addr.wrapping_sub(base),
        regs[RAX],
        regs[libc::REG_CSGSFS as usize] & 0xffff,
    );
    regs[RIP] += SKIP.load(Ordering::SeqCst) as i64;
}

fn fault_information() {
    handle(libc::SIGSEGV, 0, &[], report);
    // mov (%rdi), %rax and mov %rax, (%rdi): three bytes each
    SKIP.store(3, Ordering::SeqCst);
    for address in [0_u64, 8, 0x1234_5000, 0x7000_0000_0000_0000] {
        // SAFETY: the handler steps over the instruction.
        unsafe {
            asm!("mov rax, [rdi]", in("rdi") address, inout("rax") 0x11_u64 => _);
        }
        // SAFETY: likewise.
        unsafe { asm!("mov [rdi], rax", in("rdi") address, in("rax") 0x22_u64) };
    }
}

fn pages(count: usize, prot: i32) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping.
    unsafe { libc::mmap(ptr::null_mut(), count * 4096, prot, flags, -1, 0) }.cast()
}

fn fault_at_protected_memory() {
    handle(libc::SIGSEGV, 0, &[], report);
    SKIP.store(3, Ordering::SeqCst);
    let page = pages(1, libc::PROT_READ | libc::PROT_WRITE);
    BASE.store(page.expose_provenance() as u64, Ordering::SeqCst);
    let write = || {
        // SAFETY: the handler steps over it when it faults.
        unsafe { asm!("mov [rdi], rax", in("rdi") page, in("rax") 7_u64) };
    };
    let read = || {
        let value: u64;
        // SAFETY: likewise.
        unsafe { asm!("mov rax, [rdi]", in("rdi") page, inout("rax") 99_u64 => value) };
        println!("value {value}");
    };
    write();
    read();
    for prot in [
        libc::PROT_READ,
        libc::PROT_NONE,
        libc::PROT_READ | libc::PROT_WRITE,
    ] {
        // SAFETY: the page is ours.
        unsafe { libc::mprotect(page.cast(), 4096, prot) };
        println!("rights {prot}");
        write();
        read();
    }
    // SAFETY: likewise.
    unsafe { libc::munmap(page.cast(), 4096) };
    write();
}

static ELSEWHERE: AtomicI64 = AtomicI64::new(0);

extern "C" fn go_elsewhere(_: i32, _: *mut libc::siginfo_t, uc: *mut libc::c_void) {
    // SAFETY: the argument of a handler.
    let context = unsafe { context(uc) };
    context.uc_mcontext.gregs[RIP] = ELSEWHERE.load(Ordering::SeqCst);
    context.uc_mcontext.gregs[RAX] = 4711;
}

fn continue_elsewhere() {
    handle(libc::SIGSEGV, 0, &[], go_elsewhere);
    let value: u64;
    // SAFETY: the handler continues at the label, with another rax.
    unsafe {
        asm!(
            "lea rdx, [rip + 2f]",
            "mov [rcx], rdx",
            "xor edx, edx",
            "mov rax, [rdx]",
            "ud2",
            "2:",
            in("rcx") ELSEWHERE.as_ptr(),
            out("rdx") _,
            out("rax") value,
        );
    }
    println!("came back with {value}");
}

fn arithmetic_and_traps() {
    for signal in [libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSEGV] {
        handle(signal, 0, &[], report);
    }
    SKIP.store(2, Ordering::SeqCst);
    // SAFETY: si_addr is the instruction's: compare relative to it.
    unsafe {
        asm!("lea {0}, [rip + 2f]", "mov [{1}], {0}", "2: div ecx", out(reg) _, in(reg) BASE.as_ptr(),
            in("ecx") 0, inout("eax") 1 => _, inout("edx") 0 => _);
    }
    // SAFETY: likewise.
    unsafe {
        asm!("lea {0}, [rip + 2f]", "mov [{1}], {0}", "2: ud2", out(reg) _, in(reg) BASE.as_ptr(), inout("eax") 5 => _);
    }
    // Privileged, one byte.
    SKIP.store(1, Ordering::SeqCst);
    BASE.store(0, Ordering::SeqCst);
    // SAFETY: likewise.
    unsafe { asm!("hlt", inout("eax") 6 => _) };
    // After the instruction already.
    SKIP.store(0, Ordering::SeqCst);
    // SAFETY: likewise.
    unsafe { asm!("int3", inout("eax") 7 => _) };
}

fn bus_error() {
    handle(libc::SIGBUS, 0, &[], report);
    SKIP.store(3, Ordering::SeqCst);
    let file = tempfile::tempfile().unwrap();
    file.set_len(8192).unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    // SAFETY: a new mapping.
    let map = unsafe {
        libc::mmap(
            ptr::null_mut(),
            8192,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    BASE.store(map.expose_provenance() as u64, Ordering::SeqCst);
    file.set_len(0).unwrap();
    let mut buffer = [0_u8; 4];
    for offset in [0, 4096] {
        let at = map.wrapping_byte_add(offset);
        // SAFETY: the handler steps over it.
        unsafe { asm!("mov rax, [rdi]", in("rdi") at, inout("rax") 1_u64 => _) };
        // And the kernel, on our behalf, says EFAULT.
        // SAFETY: the kernel checks.
        let count = unsafe { libc::write(1, at, 4) };
        println!("write {count} {}", std::io::Error::last_os_error());
    }
    file.set_len(8192).unwrap();
    // SAFETY: the page is there again.
    unsafe { ptr::copy_nonoverlapping(map.cast(), buffer.as_mut_ptr(), 4) };
    println!("{buffer:?}");
}

static STACK_AT: AtomicU64 = AtomicU64::new(0);

extern "C" fn where_is_the_stack(_: i32, _: *mut libc::siginfo_t, uc: *mut libc::c_void) {
    let local = 0_u8;
    let here = (&raw const local).expose_provenance() as u64;
    let stack = STACK_AT.load(Ordering::SeqCst);
    // SAFETY: an all-zero stack_t is one.
    let mut current: libc::stack_t = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is ours.
    unsafe { libc::sigaltstack(ptr::null(), &mut current) };
    // SAFETY: the argument of a handler.
    let context = unsafe { context(uc) };
    println!(
        "on it: {} flags {} size {} interrupted on it: {}",
        (stack..stack + 65536).contains(&here),
        current.ss_flags,
        context.uc_stack.ss_size,
        (stack..stack + 65536).contains(&(context.uc_mcontext.gregs[RSP] as u64)),
    );
    if COUNT.fetch_add(1, Ordering::SeqCst) == 0 {
        raise(libc::SIGUSR2);
    }
}

fn alternate_stack() {
    let memory = pages(16, libc::PROT_READ | libc::PROT_WRITE);
    STACK_AT.store(memory.expose_provenance() as u64, Ordering::SeqCst);
    let stack = libc::stack_t {
        ss_sp: memory.cast(),
        ss_flags: 0,
        ss_size: 65536,
    };
    // SAFETY: memory of our own.
    println!("{}", unsafe { libc::sigaltstack(&stack, ptr::null_mut()) });
    let small = libc::stack_t {
        ss_size: 100,
        ..stack
    };
    // SAFETY: refused.
    println!("{}", unsafe { libc::sigaltstack(&small, ptr::null_mut()) });
    handle(libc::SIGUSR1, libc::SA_ONSTACK, &[], where_is_the_stack);
    handle(libc::SIGUSR2, libc::SA_ONSTACK, &[], where_is_the_stack);
    raise(libc::SIGUSR1);
    handle(libc::SIGUSR1, 0, &[], where_is_the_stack);
    raise(libc::SIGUSR1);
}

extern "C" fn nest(signal: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let depth = COUNT.fetch_add(1, Ordering::SeqCst);
    println!(
        "in {signal} at {depth}, blocked: {} {} {}",
        is_blocked(libc::SIGUSR1),
        is_blocked(libc::SIGUSR2),
        is_blocked(libc::SIGHUP)
    );
    if depth < 4 {
        raise(libc::SIGUSR1);
        raise(libc::SIGUSR2);
        raise(libc::SIGHUP);
    }
    println!("out {signal}");
}

fn nested_handlers() {
    handle(libc::SIGUSR1, 0, &[], nest);
    handle(libc::SIGUSR2, libc::SA_NODEFER, &[], nest);
    handle(libc::SIGHUP, 0, &[libc::SIGUSR1], nest);
    raise(libc::SIGUSR1);
    println!("blocked after: {}", is_blocked(libc::SIGUSR1));
}

extern "C" fn count(signal: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    COUNT.fetch_add(signal as u64, Ordering::SeqCst);
}

fn handler_for_once() {
    handle(libc::SIGURG, libc::SA_RESETHAND, &[], count);
    raise(libc::SIGURG);
    raise(libc::SIGURG);
    println!("{}", COUNT.load(Ordering::SeqCst));
}

extern "C" fn block_in_frame(_: i32, _: *mut libc::siginfo_t, uc: *mut libc::c_void) {
    // SAFETY: the argument of a handler.
    let context = unsafe { context(uc) };
    // SAFETY: the set in the frame.
    unsafe { libc::sigaddset(&mut context.uc_sigmask, libc::SIGHUP) };
}

fn mask_in_the_frame() {
    handle(libc::SIGUSR1, 0, &[], block_in_frame);
    raise(libc::SIGUSR1);
    println!("{} {}", is_blocked(libc::SIGHUP), is_blocked(libc::SIGUSR1));
}

extern "C" fn clobber_vectors(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    COUNT.fetch_add(1, Ordering::SeqCst);
    // SAFETY: declared; the point is that the interrupted code keeps its own.
    unsafe {
        asm!(
            "vpcmpeqd ymm0, ymm0, ymm0", "vmovdqa ymm7, ymm0", "vmovdqa ymm15, ymm0", "fld1", "fstp st(0)",
            out("ymm0") _, out("ymm7") _, out("ymm15") _, out("st(0)") _,
        );
    }
}

/// Values in vector registers around a system call that raises a signal.
fn vectors_around_a_signal() -> [[u64; 4]; 2] {
    let mut kept = [[1, 2, 3, 4], [5, 6, 7, 8_u64]];
    // SAFETY: kill with a handler; all that is changed is declared.
    unsafe {
        asm!(
            "vmovdqu ymm7, [{kept}]",
            "vmovdqu ymm15, [{kept} + 32]",
            "syscall",
            "vmovdqu [{kept}], ymm7",
            "vmovdqu [{kept} + 32], ymm15",
            kept = in(reg) &raw mut kept,
            inout("rax") libc::SYS_kill => _,
            in("rdi") u64::from(std::process::id()),
            in("rsi") libc::SIGUSR1 as u64,
            out("rcx") _, out("r11") _, out("ymm7") _, out("ymm15") _,
        );
    }
    kept
}

fn extended_state_survives() {
    if !std::is_x86_feature_detected!("avx2") {
        println!("no AVX2");
        return;
    }
    handle(libc::SIGUSR1, 0, &[], clobber_vectors);
    println!(
        "{:?} {}",
        vectors_around_a_signal(),
        COUNT.load(Ordering::SeqCst)
    );
}

extern "C" fn change_vectors(_: i32, _: *mut libc::siginfo_t, uc: *mut libc::c_void) {
    // SAFETY: the argument of a handler.
    let context = unsafe { context(uc) };
    // SAFETY: the frame has its extended state.
    let state = unsafe { &mut *context.uc_mcontext.fpregs };
    state._xmm[7].element = [0xaa; 4];
    println!("mxcsr {:#x}", state.mxcsr);
}

fn extended_state_can_be_changed() {
    if !std::is_x86_feature_detected!("avx2") {
        println!("no AVX2");
        return;
    }
    handle(libc::SIGUSR1, 0, &[], change_vectors);
    println!("{:x?}", vectors_around_a_signal());
}

struct Pipe([i32; 2]);

impl Pipe {
    fn new() -> Self {
        let mut fds = [0; 2];
        // SAFETY: two descriptors go into the array.
        assert_eq!(unsafe { libc::pipe(fds.as_mut_ptr()) }, 0);
        PIPE.store(fds[1] as u64, Ordering::SeqCst);
        Self(fds)
    }

    fn read(&self) -> isize {
        let mut byte = 0_u8;
        // SAFETY: one byte into `byte`.
        unsafe { libc::read(self.0[0], (&raw mut byte).cast(), 1) }
    }
}

static PIPE: AtomicU64 = AtomicU64::new(0);

extern "C" fn write_to_pipe(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    COUNT.fetch_add(1, Ordering::SeqCst);
    // SAFETY: one byte.
    unsafe { libc::write(PIPE.load(Ordering::SeqCst) as i32, c"x".as_ptr().cast(), 1) };
}

fn alarm_after_ms(first: i64, then: i64) {
    let time = |ms| libc::timeval {
        tv_sec: 0,
        tv_usec: ms * 1000,
    };
    let timer = libc::itimerval {
        it_interval: time(then),
        it_value: time(first),
    };
    // SAFETY: the structure is ours.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, ptr::null_mut()) };
}

fn restarted_read() {
    let pipe = Pipe::new();
    handle(libc::SIGALRM, libc::SA_RESTART, &[], write_to_pipe);
    alarm_after_ms(50, 0);
    println!(
        "read {}, handler ran {}",
        pipe.read(),
        COUNT.load(Ordering::SeqCst)
    );
}

fn interrupted_read() {
    let pipe = Pipe::new();
    handle(libc::SIGALRM, 0, &[], write_to_pipe);
    alarm_after_ms(50, 0);
    println!("read {} {}", pipe.read(), std::io::Error::last_os_error());
    println!("read {}", pipe.read());
}

fn interrupted_waits() {
    handle(libc::SIGALRM, libc::SA_RESTART, &[], count);
    let errno = || std::io::Error::last_os_error();
    alarm_after_ms(50, 0);
    // SAFETY: no descriptors.
    let ready = unsafe { libc::poll(ptr::null_mut(), 0, 10_000) };
    println!("poll {ready} {}", errno());
    alarm_after_ms(50, 0);
    let long = libc::timespec {
        tv_sec: 10,
        tv_nsec: 0,
    };
    let mut rest = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: both structures are ours.
    let slept = unsafe { libc::nanosleep(&long, &mut rest) };
    println!("sleep {slept} {}", errno());
    println!("rest {}", rest.tv_sec);
    alarm_after_ms(50, 0);
    // SAFETY: no arguments.
    println!("pause {} {}", unsafe { libc::pause() }, errno());
    println!("{}", COUNT.load(Ordering::SeqCst));
}

fn suspend_with_a_mask() {
    handle(libc::SIGUSR1, 0, &[], nest_reports_mask);
    handle(libc::SIGALRM, 0, &[], nest_reports_mask);
    block(libc::SIG_BLOCK, &[libc::SIGUSR1, libc::SIGALRM]);
    raise(libc::SIGUSR1);
    println!("blocked");
    // SAFETY: the set is ours.
    unsafe { libc::sigsuspend(&set_of(&[libc::SIGALRM])) };
    println!(
        "after: {} {}",
        is_blocked(libc::SIGUSR1),
        is_blocked(libc::SIGALRM)
    );
    alarm_after_ms(30, 0);
    let mut timeout = libc::timespec {
        tv_sec: 5,
        tv_nsec: 0,
    };
    // SAFETY: likewise.
    let ready = unsafe { libc::ppoll(ptr::null_mut(), 0, &timeout, &set_of(&[libc::SIGUSR1])) };
    println!("ppoll {ready} {}", std::io::Error::last_os_error());
    alarm_after_ms(30, 0);
    // SAFETY: likewise.
    println!("waited {}", unsafe {
        libc::sigtimedwait(&set_of(&[libc::SIGALRM]), ptr::null_mut(), &timeout)
    });
    timeout.tv_sec = 0;
    // SAFETY: likewise.
    println!("waited {}", unsafe {
        libc::sigtimedwait(&set_of(&[libc::SIGALRM]), ptr::null_mut(), &timeout)
    });
}

extern "C" fn nest_reports_mask(signal: i32, _: *mut libc::siginfo_t, uc: *mut libc::c_void) {
    // SAFETY: the argument of a handler.
    let context = unsafe { context(uc) };
    // SAFETY: the set in the frame.
    let saved = unsafe { libc::sigismember(&context.uc_sigmask, libc::SIGALRM) };
    println!("in {signal}, saved mask has SIGALRM: {saved}");
}

extern "C" fn value_of(signal: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the argument of a handler.
    let info = unsafe { &*info };
    // SAFETY: a queued signal has a value.
    let value = unsafe { info.si_value() }.sival_ptr.addr();
    println!(
        "{} code {} value {value}",
        signal - libc::SIGRTMIN(),
        info.si_code
    );
}

fn queued_in_order() {
    let signals = [libc::SIGRTMIN(), libc::SIGRTMIN() + 1];
    for signal in signals {
        handle(signal, 0, &signals, value_of);
    }
    block(libc::SIG_BLOCK, &signals);
    for value in 0..20_usize {
        let value_of = libc::sigval {
            sival_ptr: ptr::without_provenance_mut(value),
        };
        // SAFETY: a signal to ourselves, which has a handler.
        unsafe { libc::sigqueue(pid(), signals[value % 2], value_of) };
    }
    println!("queued");
    block(libc::SIG_UNBLOCK, &signals);
}

fn ignored_and_blocked() {
    // SAFETY: ignoring needs no handler.
    unsafe { libc::signal(libc::SIGUSR1, libc::SIG_IGN) };
    raise(libc::SIGUSR1);
    handle(libc::SIGUSR2, 0, &[], count);
    block(libc::SIG_BLOCK, &[libc::SIGUSR2]);
    raise(libc::SIGUSR2);
    raise(libc::SIGUSR2);
    let mut pending = set_of(&[]);
    // SAFETY: the set is ours.
    unsafe { libc::sigpending(&mut pending) };
    // SAFETY: likewise.
    println!("pending {}", unsafe {
        libc::sigismember(&pending, libc::SIGUSR2)
    });
    println!("{}", COUNT.load(Ordering::SeqCst));
    block(libc::SIG_UNBLOCK, &[libc::SIGUSR2]);
    println!(
        "once: {}",
        COUNT.load(Ordering::SeqCst) == libc::SIGUSR2 as u64
    );
}

/// Each byte that is read was written by a handler: a lost signal is a hang.
fn storm_of_timers() {
    let pipe = Pipe::new();
    handle(libc::SIGALRM, libc::SA_RESTART, &[], write_to_pipe);
    alarm_after_ms(1, 1);
    for _ in 0..500 {
        assert_eq!(pipe.read(), 1);
    }
    alarm_after_ms(0, 0);
    println!("{}", COUNT.load(Ordering::SeqCst) >= 500);
}

/// A leaf that keeps values below its stack pointer while signals arrive.
fn red_zone_survives() {
    handle(libc::SIGALRM, 0, &[], count);
    alarm_after_ms(1, 1);
    let mut bad = 0_u64;
    while COUNT.load(Ordering::SeqCst) < 200 * libc::SIGALRM as u64 {
        let wrong: u64;
        // SAFETY: only the red zone is used.
        unsafe {
            asm!(
                "mov [rsp - 8], {a}", "mov [rsp - 128], {b}",
                "mov {i}, 100000",
                "2:", "dec {i}", "jnz 2b",
                "xor {i}, {i}",
                "cmp [rsp - 8], {a}", "jne 3f",
                "cmp [rsp - 128], {b}", "je 4f",
                "3:", "mov {i}, 1",
                "4:",
                a = in(reg) 0x1111_u64, b = in(reg) 0x2222_u64, i = out(reg) wrong,
            );
        }
        bad += wrong;
    }
    alarm_after_ms(0, 0);
    println!("bad {bad}");
}
