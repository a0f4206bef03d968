//! Handlers of exceptions: frames read and changed, state kept, nesting, and a clear end.
#![expect(unsafe_code, reason = "exceptions on purpose")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "assembly that raises one exception each, and libc"
)]

mod common;

use std::arch::asm;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::*;
use dune::exceptions::{self, Outcome};
use dune::{PageFaultError, TrapFrame, vector};

static COUNT: AtomicU64 = AtomicU64::new(0);

fn counted() -> u64 {
    COUNT.load(Ordering::SeqCst)
}

fn count(_: &mut TrapFrame) -> Outcome {
    COUNT.fetch_add(1, Ordering::SeqCst);
    Outcome::Resume
}

fn breakpoint() {
    unsafe { asm!("int3") };
}

/// 10 / 0, or what the handler makes of it.
fn divide() -> u64 {
    let quotient: u64;
    unsafe {
        asm!("xor edx, edx", "div ecx", in("ecx") 0, inout("rax") 10_u64 => quotient, out("edx") _)
    };
    quotient
}

fn handlers_read_and_change_the_frame() {
    fn skip(frame: &mut TrapFrame) -> Outcome {
        assert_eq!(frame.vector, u64::from(vector::DIVIDE));
        assert_eq!((frame.rax, frame.rcx, frame.rdx), (10, 0, 0));
        assert_eq!(frame.depth, 1);
        assert!(!frame.from_ring3());
        frame.rip += 2;
        frame.rax = 77;
        Outcome::Resume
    }
    fn every(frame: &mut TrapFrame) -> Outcome {
        let expected = [
            (frame.rbx, 1),
            (frame.rcx, 2),
            (frame.rdx, 3),
            (frame.rsi, 4),
            (frame.rdi, 5),
            (frame.r8, 6),
            (frame.r9, 7),
            (frame.r10, 8),
            (frame.r12, 9),
            (frame.r15, 10),
        ];
        assert!(expected.iter().all(|(value, n)| value == n), "{expected:?}");
        for register in [
            &mut frame.rcx,
            &mut frame.rdx,
            &mut frame.rsi,
            &mut frame.r15,
        ] {
            *register += 100;
        }
        frame.rflags |= 1;
        Outcome::Resume
    }
    enter();
    assert!(exceptions::set_handler(vector::DIVIDE, skip).is_none());
    assert_eq!(divide(), 77);
    assert!(exceptions::clear_handler(vector::DIVIDE).is_some());
    assert!(exceptions::clear_handler(vector::DIVIDE).is_none());
    exceptions::set_handler(vector::BREAKPOINT, every);
    let (rcx, rdx, rsi, r15, carry): (u64, u64, u64, u64, u8);
    unsafe {
        asm!(
            "push rbx", "mov rbx, 1", "clc", "int3", "setc al", "pop rbx",
            inout("rcx") 2_u64 => rcx, inout("rdx") 3_u64 => rdx, inout("rsi") 4_u64 => rsi,
            in("rdi") 5, in("r8") 6, in("r9") 7, in("r10") 8, in("r12") 9,
            inout("r15") 10_u64 => r15, out("al") carry,
        );
    }
    assert_eq!((rcx, rdx, rsi, r15, carry), (102, 103, 104, 110, 1));
}

fn every_kind_of_exception_has_its_handler() {
    static LAST: AtomicU64 = AtomicU64::new(u64::MAX);
    static LENGTH: AtomicU64 = AtomicU64::new(0);
    fn skip(frame: &mut TrapFrame) -> Outcome {
        LAST.store(frame.vector, Ordering::SeqCst);
        frame.rip += LENGTH.load(Ordering::SeqCst);
        Outcome::Resume
    }
    #[track_caller]
    fn expect(vector: u8) {
        assert_eq!(LAST.swap(u64::MAX, Ordering::SeqCst), u64::from(vector));
    }
    enter();
    for vector in [
        vector::DIVIDE,
        vector::BREAKPOINT,
        vector::INVALID_OPCODE,
        vector::GENERAL_PROTECTION,
    ] {
        exceptions::set_handler(vector, skip);
    }
    for _ in 0..20 {
        LENGTH.store(2, Ordering::SeqCst);
        divide();
        expect(vector::DIVIDE);
        unsafe { asm!("ud2") };
        expect(vector::INVALID_OPCODE);
        LENGTH.store(0, Ordering::SeqCst);
        breakpoint();
        expect(vector::BREAKPOINT);
        // An address that is not canonical: three bytes, `mov rax, [rcx]`.
        LENGTH.store(3, Ordering::SeqCst);
        unsafe { asm!(".byte 0x48, 0x8b, 0x01", in("rcx") 1_u64 << 63, out("rax") _) };
        expect(vector::GENERAL_PROTECTION);
    }
}

fn page_faults_tell_address_and_cause() {
    static ADDRESS: AtomicU64 = AtomicU64::new(0);
    static CAUSE: AtomicU64 = AtomicU64::new(0);
    fn open(frame: &mut TrapFrame) -> Outcome {
        ADDRESS.store(frame.fault_address(), Ordering::SeqCst);
        CAUSE.store(u64::from(frame.fault_cause().bits()), Ordering::SeqCst);
        let page = (frame.fault_address() & !0xfff) as *mut u8;
        protect(page, 4096, READ_WRITE);
        count(frame)
    }
    enter();
    exceptions::set_handler(vector::PAGE_FAULT, open);
    let cause = || PageFaultError::from_bits_truncate(CAUSE.load(Ordering::SeqCst) as u32);
    let page = map(4096, READ_WRITE);
    for round in 0..20 {
        unsafe { page.write_volatile(round) };
        protect(page, 4096, libc::PROT_READ);
        unsafe { page.add(16).write_volatile(round) };
        assert_eq!(ADDRESS.load(Ordering::SeqCst), page as u64 + 16);
        assert!(cause().contains(PageFaultError::WRITE | PageFaultError::PRESENT));
        protect(page, 4096, libc::PROT_NONE);
        assert_eq!(unsafe { page.add(32).read_volatile() }, 0);
        assert_eq!(ADDRESS.load(Ordering::SeqCst), page as u64 + 32);
        assert!(!cause().contains(PageFaultError::WRITE));
        assert!(!cause().contains(PageFaultError::USER));
        assert_eq!(counted(), 2 * (u64::from(round) + 1));
    }
}

fn a_handler_that_declines_gives_a_signal() {
    fn decline(_: &mut TrapFrame) -> Outcome {
        COUNT.fetch_add(1, Ordering::SeqCst);
        Outcome::Decline
    }
    extern "C" fn skip(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
        let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
        context.uc_mcontext.gregs[libc::REG_RIP as usize] += 2;
        COUNT.fetch_add(100, Ordering::SeqCst);
    }
    enter();
    exceptions::set_handler(vector::DIVIDE, decline);
    on_signal(libc::SIGFPE, 0, skip);
    divide();
    assert_eq!(counted(), 101);
}

fn single_steps_reach_the_handler() {
    enter();
    exceptions::set_handler(vector::DEBUG, count);
    unsafe {
        asm!(
            "pushfq",
            "or qword ptr [rsp], 0x100",
            "popfq",
            "nop",
            "nop",
            "nop",
            "nop",
            "pushfq",
            "and qword ptr [rsp], ~0x100",
            "popfq",
        );
    }
    // Four times nothing, and the way back.
    assert!((6..=8).contains(&counted()), "{} steps", counted());
}

fn extended_state_survives_a_handler() {
    fn clobber(frame: &mut TrapFrame) -> Outcome {
        unsafe {
            asm!(
                "vpcmpeqd ymm0, ymm0, ymm0", "vmovdqa ymm3, ymm0", "vmovdqa ymm15, ymm0",
                "fninit", "fldz", "fldz",
                out("ymm0") _, out("ymm3") _, out("ymm15") _,
            );
            let mxcsr = 0x7f80_u32;
            asm!("ldmxcsr [{}]", in(reg) &raw const mxcsr);
        }
        count(frame)
    }
    enter();
    exceptions::set_handler(vector::BREAKPOINT, clobber);
    for n in 0..200_u64 {
        let (mut low, mut high, mut top) = ([0_u64; 4], [0_u64; 4], 0.0_f64);
        let mut mxcsr = 0_u32;
        unsafe {
            asm!(
                "vmovq xmm0, {n}", "vpbroadcastq ymm3, xmm0", "vpaddq ymm15, ymm3, ymm3",
                "fld1",
                "int3",
                "vmovdqu [{low}], ymm3", "vmovdqu [{high}], ymm15",
                "fstp qword ptr [{top}]", "stmxcsr [{mxcsr}]", "vzeroupper",
                n = in(reg) n, low = in(reg) &raw mut low, high = in(reg) &raw mut high,
                top = in(reg) &raw mut top, mxcsr = in(reg) &raw mut mxcsr,
                out("ymm0") _, out("ymm3") _, out("ymm15") _, out("st(0)") _,
            );
        }
        assert_eq!((low, high), ([n; 4], [2 * n; 4]));
        assert_eq!(top, 1.0);
        assert_eq!(mxcsr & !0x3f, 0x1f80);
    }
    assert_eq!(counted(), 200);
}

fn handlers_may_use_the_system() {
    static TEXT: Mutex<String> = Mutex::new(String::new());
    fn busy(frame: &mut TrapFrame) -> Outcome {
        let text = std::fs::read_to_string("/proc/self/stat").unwrap();
        let numbers: Vec<u64> = (0..10_000).collect();
        assert_eq!(numbers.iter().sum::<u64>(), 49_995_000);
        let inside = thread::spawn(dune::is_inside).join().unwrap();
        let code = child(|| i32::from(dune::is_inside()) + 6);
        assert_eq!((inside, code), (true, Ended::Exited(7)));
        println!("from a handler at depth {}", frame.depth);
        *TEXT.lock().unwrap() = text;
        count(frame)
    }
    enter();
    exceptions::set_handler(vector::BREAKPOINT, busy);
    for _ in 0..5 {
        breakpoint();
    }
    assert_eq!(counted(), 5);
    assert!(TEXT.lock().unwrap().starts_with(&getpid().to_string()));
}

fn a_backtrace_in_a_handler_shows_who_trapped() {
    static TRACE: Mutex<String> = Mutex::new(String::new());
    fn trace(frame: &mut TrapFrame) -> Outcome {
        *TRACE.lock().unwrap() = std::backtrace::Backtrace::force_capture().to_string();
        count(frame)
    }
    #[inline(never)]
    fn who_traps() {
        breakpoint();
        std::hint::black_box(());
    }
    enter();
    exceptions::set_handler(vector::BREAKPOINT, trace);
    who_traps();
    let text = TRACE.lock().unwrap();
    assert!(text.contains("who_traps"), "{text}");
    assert!(text.contains("a_backtrace_in_a_handler"), "{text}");
}

fn handlers_run_in_many_threads_at_once() {
    fn add(frame: &mut TrapFrame) -> Outcome {
        frame.rax += 1;
        if frame.rax.is_multiple_of(64) {
            thread::yield_now();
        }
        count(frame)
    }
    enter();
    exceptions::set_handler(vector::BREAKPOINT, add);
    let threads: Vec<_> = (0..6)
        .map(|_| {
            thread::spawn(|| {
                let mut sum = 0_u64;
                for _ in 0..2_000 {
                    unsafe { asm!("int3", inout("rax") sum) };
                }
                sum
            })
        })
        .collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap(), 2_000);
    }
    assert_eq!(counted(), 12_000);
}

static DEEPEST: AtomicU64 = AtomicU64::new(0);

/// Traps again until the depth is reached.
fn nest(frame: &mut TrapFrame) -> Outcome {
    let seen = DEEPEST.fetch_max(frame.depth, Ordering::SeqCst);
    let local = std::hint::black_box([frame.depth; 256]);
    if frame.depth < LIMIT.load(Ordering::SeqCst) {
        breakpoint();
    }
    assert!(local.iter().all(|n| *n == frame.depth) && seen <= 1 << 20);
    frame.rax += 1;
    Outcome::Resume
}

static LIMIT: AtomicU64 = AtomicU64::new(16);

fn handlers_trap_in_handlers_up_to_the_depth() {
    enter();
    exceptions::set_handler(vector::BREAKPOINT, nest);
    for _ in 0..20 {
        let mut value = 5_u64;
        unsafe { asm!("int3", inout("rax") value) };
        assert_eq!(value, 6);
    }
    assert_eq!(DEEPEST.load(Ordering::SeqCst), 16);
}

#[track_caller]
fn expect_report(why: &str, signal: i32, body: impl FnOnce()) {
    let (ended, text) = child_with_stderr(|| {
        for signal in [libc::SIGSEGV, libc::SIGBUS] {
            disposition(signal, libc::SIG_DFL);
        }
        body();
        0
    });
    assert_eq!(ended, Ended::Killed(signal), "{text}");
    assert!(text.contains(why), "{text}");
    for part in ["vector ", "rip 0", "rsp 0", "r15 ", "cr2 ", "backtrace:"] {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
    // A stack overflow is noticed in a prologue, which the unwinder may not understand.
    let is_prologue = text.contains("while that was reported");
    assert!(is_prologue || text.contains("exceptions.rs"), "{text}");
    assert!(!is_prologue || why.contains("used up"), "{text}");
}

fn traps_nested_too_deeply_end_with_a_report() {
    enter();
    exceptions::set_handler(vector::BREAKPOINT, nest);
    LIMIT.store(1_000, Ordering::SeqCst);
    expect_report("nested too deeply", libc::SIGTRAP, breakpoint);
    // The parent goes on.
    LIMIT.store(3, Ordering::SeqCst);
    breakpoint();
    assert_eq!(DEEPEST.load(Ordering::SeqCst), 3);
}

fn a_handler_that_faults_in_itself_ends_with_a_report() {
    fn fault(_: &mut TrapFrame) -> Outcome {
        unsafe { (64 as *const u8).read_volatile() };
        Outcome::Resume
    }
    enter();
    exceptions::set_handler(vector::PAGE_FAULT, fault);
    expect_report("nested too deeply", libc::SIGSEGV, || {
        unsafe { (64 as *const u8).read_volatile() };
    });
}

#[expect(unconditional_recursion, reason = "uses up the trap stack on purpose")]
fn use_stack(n: u64) -> u64 {
    let local = std::hint::black_box([n; 512]);
    use_stack(n + 1) + local[7]
}

fn a_handler_that_uses_up_its_stack_ends_with_a_report() {
    fn deep(frame: &mut TrapFrame) -> Outcome {
        frame.rax = use_stack(0);
        Outcome::Resume
    }
    fn large(frame: &mut TrapFrame) -> Outcome {
        let local = std::hint::black_box([frame.rax; 5 << 10]);
        breakpoint();
        frame.rax = local[9];
        Outcome::Resume
    }
    enter();
    exceptions::set_handler(vector::BREAKPOINT, deep);
    expect_report("trap stack is used up", libc::SIGSEGV, breakpoint);
    exceptions::set_handler(vector::BREAKPOINT, large);
    expect_report("trap stack is used up", libc::SIGTRAP, breakpoint);
    // And in a thread.
    exceptions::set_handler(vector::BREAKPOINT, deep);
    expect_report("trap stack is used up", libc::SIGSEGV, || {
        thread::spawn(breakpoint).join().unwrap();
    });
}

fn a_panicking_handler_ends_the_process() {
    fn panics(_: &mut TrapFrame) -> Outcome {
        panic!("in a handler")
    }
    enter();
    exceptions::set_handler(vector::BREAKPOINT, panics);
    let (ended, text) = child_with_stderr(|| {
        breakpoint();
        0
    });
    assert_eq!(ended, Ended::Killed(libc::SIGABRT));
    assert!(text.contains("in a handler"), "{text}");
}

fn signals_are_delivered_in_handlers() {
    static IN_HANDLER: AtomicBool = AtomicBool::new(false);
    static DELIVERED: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn on_alarm(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        if IN_HANDLER.load(Ordering::SeqCst) {
            DELIVERED.fetch_add(1, Ordering::SeqCst);
        }
        // Signal handlers trap too.
        let mut value = 1_u64;
        unsafe { asm!("ud2", inout("rax") value) };
        assert_eq!(value, 2);
    }
    fn skip(frame: &mut TrapFrame) -> Outcome {
        frame.rax += 1;
        frame.rip += 2;
        Outcome::Resume
    }
    fn slow(frame: &mut TrapFrame) -> Outcome {
        let local = std::hint::black_box([frame.rax; 64]);
        IN_HANDLER.store(true, Ordering::SeqCst);
        for n in 0..20_000_u64 {
            std::hint::black_box(n);
        }
        std::hint::black_box(unsafe { libc::getppid() });
        IN_HANDLER.store(false, Ordering::SeqCst);
        assert!(local.iter().all(|n| *n == frame.rax));
        frame.rax += 1;
        Outcome::Resume
    }
    enter();
    exceptions::set_handler(vector::BREAKPOINT, slow);
    exceptions::set_handler(vector::INVALID_OPCODE, skip);
    let stack = map(128 << 10, READ_WRITE);
    for flags in [0, libc::SA_ONSTACK] {
        let alternate = libc::stack_t {
            ss_sp: stack.cast(),
            ss_flags: 0,
            ss_size: 128 << 10,
        };
        assert_eq!(
            unsafe { libc::sigaltstack(&raw const alternate, std::ptr::null_mut()) },
            0
        );
        on_signal(libc::SIGALRM, flags | libc::SA_RESTART, on_alarm);
        DELIVERED.store(0, Ordering::SeqCst);
        interval_timer(500);
        let start = Instant::now();
        while DELIVERED.load(Ordering::SeqCst) < 150 && start.elapsed() < Duration::from_secs(20) {
            let mut value = 40_u64;
            unsafe { asm!("int3", inout("rax") value) };
            assert_eq!(value, 41);
        }
        interval_timer(0);
        assert!(DELIVERED.load(Ordering::SeqCst) > 20);
    }
}

fn threads_that_touch_new_memory_together_all_get_it() {
    // A page fault that another thread has seen to already is nobody's signal.
    const GIB: usize = 1 << 30;
    enter();
    for round in 0..40_usize {
        let base = map(3 * GIB, READ_WRITE) as usize;
        let chunk = (base + GIB).next_multiple_of(GIB);
        let barrier = std::sync::Barrier::new(4);
        thread::scope(|scope| {
            for n in 0..4 {
                let barrier = &barrier;
                scope.spawn(move || {
                    let at = (chunk + n * 4096) as *mut usize;
                    barrier.wait();
                    unsafe { at.write_volatile(round + n) };
                    assert_eq!(unsafe { at.read_volatile() }, round + n);
                });
            }
        });
        // Not given back: each round needs a window that is not there yet.
    }
}

dune_testing::tests! {
    smoke handlers_read_and_change_the_frame,
    smoke every_kind_of_exception_has_its_handler,
    smoke page_faults_tell_address_and_cause,
    ring0 a_handler_that_declines_gives_a_signal,
    ring0 single_steps_reach_the_handler,
    ring0 extended_state_survives_a_handler,
    ring0 handlers_may_use_the_system,
    ring0 a_backtrace_in_a_handler_shows_who_trapped,
    ring0 handlers_run_in_many_threads_at_once,
    ring0 handlers_trap_in_handlers_up_to_the_depth,
    ring0 traps_nested_too_deeply_end_with_a_report,
    ring0 a_handler_that_faults_in_itself_ends_with_a_report,
    ring0 a_handler_that_uses_up_its_stack_ends_with_a_report,
    ring0 a_panicking_handler_ends_the_process,
    ring0 signals_are_delivered_in_handlers,
    ring0 threads_that_touch_new_memory_together_all_get_it,
}
