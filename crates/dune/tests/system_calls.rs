//! System calls of code in Dune mode: what they return, and what they leave alone.
#![expect(unsafe_code, reason = "raw system calls with chosen registers")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "every call is libc's or of the assembly below, with arguments made on the spot"
)]

mod common;

use std::arch::naked_asm;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::*;

/// Registers before a system call, and after it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[repr(C)]
struct Registers {
    rax: u64,
    rbx: u64,
    rcx: u64,
    rdx: u64,
    rsi: u64,
    rdi: u64,
    rbp: u64,
    r8: u64,
    r9: u64,
    r10: u64,
    r11: u64,
    r12: u64,
    r13: u64,
    r14: u64,
    r15: u64,
    flags: u64,
    /// What the uppermost word of the red zone changed by.
    red_zone_top: u64,
    /// How many other words of it changed.
    red_zone_damage: u64,
}

/// Makes the system call with these registers and a red zone full of a pattern, and stores
/// the registers after it.
#[unsafe(naked)]
unsafe extern "C" fn system_call(registers: *mut Registers) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdi",
        // Every word of the red zone holds its own address.
        "lea rax, [rsp - 128]",
        "2:",
        "mov [rax], rax",
        "add rax, 8",
        "cmp rax, rsp",
        "jne 2b",
        "push [rdi + 120]",
        "popfq",
        "lea rcx, [rsp - 8]",
        "mov [rcx], rcx",
        "mov rax, [rdi]",
        "mov rbx, [rdi + 8]",
        "mov rcx, [rdi + 16]",
        "mov rdx, [rdi + 24]",
        "mov rsi, [rdi + 32]",
        "mov rbp, [rdi + 48]",
        "mov r8, [rdi + 56]",
        "mov r9, [rdi + 64]",
        "mov r10, [rdi + 72]",
        "mov r11, [rdi + 80]",
        "mov r12, [rdi + 88]",
        "mov r13, [rdi + 96]",
        "mov r14, [rdi + 104]",
        "mov r15, [rdi + 112]",
        "mov rdi, [rdi + 40]",
        "syscall",
        // rcx and r11 are the kernel's to destroy: use them to look.
        "mov r11, [rsp - 8]",
        "mov rcx, [rsp]",
        "mov [rcx + 128], r11",
        "mov [rcx], rax",
        "mov [rcx + 8], rbx",
        "pushfq",
        "pop [rcx + 120]",
        "cld",
        "mov [rcx + 24], rdx",
        "mov [rcx + 32], rsi",
        "mov [rcx + 40], rdi",
        "mov [rcx + 48], rbp",
        "mov [rcx + 56], r8",
        "mov [rcx + 64], r9",
        "mov [rcx + 72], r10",
        "mov [rcx + 88], r12",
        "mov [rcx + 96], r13",
        "mov [rcx + 104], r14",
        "mov [rcx + 112], r15",
        // The word at -8 was used again since: its copy is in r11.
        "lea rax, [rsp - 8]",
        "sub r11, rax",
        "mov [rcx + 128], r11",
        "mov qword ptr [rcx + 136], 0",
        "lea rax, [rsp - 128]",
        "lea rdx, [rsp - 8]",
        "3:",
        "cmp [rax], rax",
        "je 4f",
        "inc qword ptr [rcx + 136]",
        "4:",
        "add rax, 8",
        "cmp rax, rdx",
        "jne 3b",
        "pop rdi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
    )
}

fn pattern(number: i64, arguments: [u64; 6]) -> Registers {
    let [rdi, rsi, rdx, r10, r8, r9] = arguments;
    Registers {
        rax: number as u64,
        rbx: 0x1111_2222_3333_4444,
        rcx: 0xdead,
        rdx,
        rsi,
        rdi,
        rbp: 0x5555_6666_7777_8888,
        r8,
        r9,
        r10,
        r11: 0xbeef,
        r12: 0x9999_aaaa_bbbb_cccc,
        r13: 0xdddd_eeee_ffff_0000,
        r14: 0x0123_4567_89ab_cdef,
        r15: 0xfedc_ba98_7654_3210,
        flags: FLAGS,
        red_zone_top: 0,
        red_zone_damage: 0,
    }
}

/// Carry, parity, adjust, zero, sign, direction, overflow, ID: what user code may set.
const CHANGEABLE: u64 = 0x0020_0cd5;
/// The same, and those that are always set.
const FLAGS: u64 = CHANGEABLE | 0x202;

/// Makes the call and checks that nothing changed but what the kernel's own calls change.
#[track_caller]
fn checked(number: i64, arguments: [u64; 6]) -> i64 {
    let before = pattern(number, arguments);
    let mut after = before.clone();
    // Ring 0's privilege level is in the flags too; keep what is there.
    let kept: u64;
    unsafe { std::arch::asm!("pushfq", "pop {}", out(reg) kept) };
    after.flags = (kept & !CHANGEABLE) | CHANGEABLE;
    let flags = after.flags;
    unsafe { system_call(&raw mut after) };
    assert_eq!(after.flags, flags, "flags after call {number}");
    assert_eq!(
        (after.red_zone_top, after.red_zone_damage),
        (0, 0),
        "red zone after call {number}"
    );
    let result = after.rax as i64;
    let expected = Registers {
        rax: after.rax,
        rcx: after.rcx,
        r11: after.r11,
        flags,
        ..before
    };
    assert_eq!(after, expected, "after call {number}");
    result
}

const SOME: [u64; 6] = [
    0x1001_0000_0000_0001,
    0x2002_0000_0000_0002,
    0x3003_0000_0000_0003,
    0x4004_0000_0000_0004,
    0x5005_0000_0000_0005,
    0x6006_0000_0000_0006,
];

fn registers_flags_and_red_zone_survive_every_kind_of_call() {
    // First on Linux: the test itself must hold there.
    for round in 0..2 {
        for _ in 0..200 {
            assert_eq!(checked(libc::SYS_getpid, SOME), i64::from(getpid()));
            assert_eq!(checked(libc::SYS_gettid, SOME), i64::from(gettid()));
            assert_eq!(
                checked(libc::SYS_getppid, SOME),
                i64::from(unsafe { libc::getppid() })
            );
            assert_eq!(
                checked(libc::SYS_close, [u64::MAX; 6]),
                -i64::from(libc::EBADF)
            );
            assert_eq!(
                checked(libc::SYS_close_range, [5, 4, 0, 0, 0, 0]),
                -i64::from(libc::EINVAL)
            );
            assert_eq!(checked(libc::SYS_sigaltstack, [0; 6]), 0);
            assert_eq!(
                checked(libc::SYS_rt_sigaction, [99, 0, 0, 8, 0, 0]),
                -i64::from(libc::EINVAL)
            );
            assert_eq!(checked(0xfff, SOME), -i64::from(libc::ENOSYS));
        }
        if round == 0 {
            enter();
        }
    }
}

fn they_survive_a_storm_of_signals_too() {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    extern "C" fn count(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // Uses the stack below the interrupted code.
        std::hint::black_box([0xff_u8; 512]);
    }
    enter();
    on_signal(libc::SIGALRM, libc::SA_RESTART, count);
    interval_timer(500);
    let start = Instant::now();
    while COUNT.load(Ordering::Relaxed) < 300 && start.elapsed() < Duration::from_secs(20) {
        for _ in 0..50 {
            assert_eq!(checked(libc::SYS_getpid, SOME), i64::from(getpid()));
            checked(libc::SYS_getppid, SOME);
            assert_eq!(
                checked(libc::SYS_close, [u64::MAX; 6]),
                -i64::from(libc::EBADF)
            );
        }
    }
    interval_timer(0);
    assert!(COUNT.load(Ordering::Relaxed) >= 100);
}

/// Spins for a while with a pattern in the red zone; returns how many words changed.
#[unsafe(naked)]
unsafe extern "C" fn spin_over_red_zone(rounds: u64) -> u64 {
    naked_asm!(
        "xor eax, eax",
        "2:",
        "lea rcx, [rsp - 128]",
        "3:",
        "mov [rcx], rcx",
        "add rcx, 8",
        "cmp rcx, rsp",
        "jne 3b",
        "mov edx, 300",
        "4:",
        "dec edx",
        "jnz 4b",
        "lea rcx, [rsp - 128]",
        "5:",
        "cmp [rcx], rcx",
        "je 6f",
        "inc rax",
        "6:",
        "add rcx, 8",
        "cmp rcx, rsp",
        "jne 5b",
        "dec rdi",
        "jnz 2b",
        "ret",
    )
}

fn the_red_zone_of_a_leaf_survives_asynchronous_signals() {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    extern "C" fn count(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        COUNT.fetch_add(1, Ordering::Relaxed);
        std::hint::black_box([0xff_u8; 512]);
    }
    enter();
    on_signal(libc::SIGALRM, 0, count);
    interval_timer(500);
    let start = Instant::now();
    while COUNT.load(Ordering::Relaxed) < 300 && start.elapsed() < Duration::from_secs(20) {
        assert_eq!(unsafe { spin_over_red_zone(100) }, 0);
    }
    interval_timer(0);
    assert!(COUNT.load(Ordering::Relaxed) >= 100);
}

fn vector_registers_survive_forwarded_calls() {
    #[unsafe(naked)]
    unsafe extern "C" fn call_with_vectors(number: u64, into: *mut [[u64; 4]; 16]) {
        naked_asm!(
            "push rsi",
            "mov rax, rdi",
            "vpcmpeqd ymm0, ymm0, ymm0",
            "vpsrlq ymm1, ymm0, 1",
            "vpsrlq ymm2, ymm0, 2",
            "vpsrlq ymm3, ymm0, 3",
            "vpsrlq ymm4, ymm0, 4",
            "vpsrlq ymm5, ymm0, 5",
            "vpsrlq ymm6, ymm0, 6",
            "vpsrlq ymm7, ymm0, 7",
            "vpsrlq ymm8, ymm0, 8",
            "vpsrlq ymm9, ymm0, 9",
            "vpsrlq ymm10, ymm0, 10",
            "vpsrlq ymm11, ymm0, 11",
            "vpsrlq ymm12, ymm0, 12",
            "vpsrlq ymm13, ymm0, 13",
            "vpsrlq ymm14, ymm0, 14",
            "vpsrlq ymm15, ymm0, 15",
            "syscall",
            "pop rsi",
            "vmovdqu [rsi], ymm0",
            "vmovdqu [rsi + 32], ymm1",
            "vmovdqu [rsi + 64], ymm2",
            "vmovdqu [rsi + 96], ymm3",
            "vmovdqu [rsi + 128], ymm4",
            "vmovdqu [rsi + 160], ymm5",
            "vmovdqu [rsi + 192], ymm6",
            "vmovdqu [rsi + 224], ymm7",
            "vmovdqu [rsi + 256], ymm8",
            "vmovdqu [rsi + 288], ymm9",
            "vmovdqu [rsi + 320], ymm10",
            "vmovdqu [rsi + 352], ymm11",
            "vmovdqu [rsi + 384], ymm12",
            "vmovdqu [rsi + 416], ymm13",
            "vmovdqu [rsi + 448], ymm14",
            "vmovdqu [rsi + 480], ymm15",
            "vzeroupper",
            "ret",
        )
    }
    enter();
    let threads: Vec<_> = (0..3)
        .map(|_| {
            thread::spawn(|| {
                for _ in 0..300 {
                    let mut found = [[0; 4]; 16];
                    let number = libc::SYS_sched_yield as u64;
                    unsafe { call_with_vectors(number, &raw mut found) };
                    for (n, lanes) in found.iter().enumerate() {
                        assert_eq!(*lanes, [u64::MAX >> n; 4], "ymm{n}");
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
}

fn identities_are_right_in_threads_and_children() {
    enter();
    let process = getpid();
    assert_eq!(process, std::process::id() as i32);
    let kernels = |name: &str| -> i32 {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let check = move |pid: i32| {
        assert_eq!(getpid(), pid);
        assert_eq!(getpid(), kernels("Tgid:"));
        assert_eq!(gettid(), kernels("Pid:"));
    };
    check(process);
    assert_eq!(gettid(), process);
    let threads: Vec<_> = (0..8)
        .map(|_| {
            thread::spawn(move || {
                check(process);
                gettid()
            })
        })
        .collect();
    let mut tids: Vec<i32> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    tids.push(process);
    tids.sort_unstable();
    tids.dedup();
    assert_eq!(tids.len(), 9);
    assert_eq!(
        child(|| {
            let me = getpid();
            assert_ne!(me, process);
            assert_eq!(unsafe { libc::getppid() }, process);
            check(me);
            thread::spawn(move || check(me)).join().unwrap();
            child(|| {
                check(gettid());
                assert_eq!(unsafe { libc::getppid() }, me);
                0
            });
            0
        }),
        Ended::Exited(0)
    );
    check(process);
    dune::leave();
    check(process);
}

fn errno_belongs_to_the_call_that_failed() {
    static TOUCHED: AtomicU64 = AtomicU64::new(0);
    extern "C" fn fails(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        let saved = errno();
        assert_eq!(unsafe { libc::close(-1) }, -1);
        unsafe { *libc::__errno_location() = saved };
        TOUCHED.fetch_add(1, Ordering::Relaxed);
    }
    enter();
    on_signal(libc::SIGALRM, libc::SA_RESTART, fails);
    interval_timer(2_000);
    type Call = fn() -> i32;
    let calls: [(Call, i32); 6] = [
        (|| unsafe { libc::close(-1) }, libc::EBADF),
        (
            || unsafe { libc::open(c"/no/such/file".as_ptr(), 0) },
            libc::ENOENT,
        ),
        (
            || unsafe { libc::mkdir(c"/".as_ptr(), 0o777) },
            libc::EEXIST,
        ),
        (
            || unsafe { libc::chdir(std::ptr::without_provenance(1)) },
            libc::EFAULT,
        ),
        (|| unsafe { libc::kill(getpid(), 999) }, libc::EINVAL),
        (
            || unsafe { libc::open(c"/dev/null/x".as_ptr(), 0) },
            libc::ENOTDIR,
        ),
    ];
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let hammers: Vec<_> = calls
            .into_iter()
            .map(|(call, expected)| {
                scope.spawn(move || {
                    for round in 0..60 {
                        assert_eq!(call(), -1);
                        assert_eq!(errno(), expected);
                        // What the runtime does behind the program's back leaves it alone.
                        unsafe { *libc::__errno_location() = 1000 + round };
                        let page = map(64 << 10, READ_WRITE);
                        assert_eq!(errno(), 1000 + round);
                        unsafe { page.add(32 << 10).write_volatile(1) };
                        assert_eq!(errno(), 1000 + round);
                        unmap(page, 64 << 10);
                        std::hint::black_box(getpid());
                        assert_eq!(errno(), 1000 + round);
                    }
                })
            })
            .collect();
        let noise = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                thread::spawn(|| assert_eq!(unsafe { libc::close(-1) }, -1))
                    .join()
                    .unwrap();
            }
        });
        let results: Vec<_> = hammers.into_iter().map(|h| h.join()).collect();
        stop.store(true, Ordering::Relaxed);
        noise.join().unwrap();
        assert!(results.iter().all(Result::is_ok));
    });
    interval_timer(0);
    assert!(TOUCHED.load(Ordering::Relaxed) > 10);
}

/// The descriptors that belong to the runtime.
fn runtimes_own() -> Vec<i32> {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| {
            let path = entry.unwrap().path();
            let target = std::fs::read_link(&path).ok()?;
            let fd = path.file_name()?.to_str()?.parse().ok()?;
            target.to_string_lossy().contains("kvm").then_some(fd)
        })
        .collect()
}

fn the_runtimes_descriptors_can_neither_be_closed_nor_replaced() {
    enter();
    let threads: Vec<_> = (0..3).map(|_| thread::spawn(|| ())).collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    let own = runtimes_own();
    assert!(own.len() >= 3, "{own:?}");
    for fd in &own {
        assert_eq!(unsafe { libc::close(*fd) }, -1);
        assert_eq!(errno(), libc::EBADF);
        assert_eq!(unsafe { libc::dup2(0, *fd) }, -1);
        assert_eq!(errno(), libc::EBADF);
        assert_eq!(unsafe { libc::dup3(0, *fd, libc::O_CLOEXEC) }, -1);
        assert_eq!(errno(), libc::EBADF);
    }
    assert_eq!(runtimes_own(), own);
    for fd in &own {
        assert!(*fd > 2);
        let flags = unsafe { libc::fcntl(*fd, libc::F_GETFD) };
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    }
}

fn ranges_of_descriptors_are_closed_around_the_runtimes() {
    unsafe extern "C" {
        fn closefrom(first: i32);
    }
    enter();
    let own = runtimes_own();
    let files: Vec<File> = (0..10).map(|_| File::open("/dev/null").unwrap()).collect();
    let high = unsafe { libc::dup2(files[0].as_raw_fd(), 1000) };
    assert_eq!(high, 1000);
    let is_open = |fd: i32| unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
    unsafe { closefrom(3) };
    assert!(!is_open(1000));
    for file in files {
        assert!(!is_open(file.as_raw_fd()));
        std::mem::forget(file);
    }
    assert_eq!(runtimes_own(), own);
    // The flags, and a range that is not one.
    let file = File::open("/dev/null").unwrap();
    let range = |first: u32, last: u32, flags: i32| unsafe {
        libc::syscall(libc::SYS_close_range, first, last, flags)
    };
    const CLOEXEC: i32 = 4;
    assert_eq!(range(3, u32::MAX, CLOEXEC), 0);
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFD) };
    assert_eq!(flags, libc::FD_CLOEXEC);
    assert_eq!(range(7, 6, 0), -1);
    assert_eq!(errno(), libc::EINVAL);
    assert_eq!(range(3, 4, 1 << 20), -1);
    assert_eq!(errno(), libc::EINVAL);
    assert_eq!(range(3, u32::MAX, 0), 0);
    std::mem::forget(file);
    // And everything still works.
    thread::spawn(|| assert!(dune::is_inside())).join().unwrap();
    assert_eq!(child(|| 5), Ended::Exited(5));
}

fn only_the_lower_half_of_the_number_counts() {
    // As Linux has it; `clone` by such a number must be seen for what it is.
    for round in 0..2 {
        let garbage = 0x7_0000_0000_i64;
        assert_eq!(
            checked(libc::SYS_getppid | garbage, SOME),
            i64::from(unsafe { libc::getppid() })
        );
        let pid = checked_fork(libc::SYS_fork | garbage);
        if pid == 0 {
            unsafe {
                libc::_exit(if dune::is_inside() == (round == 1) {
                    3
                } else {
                    4
                })
            };
        }
        assert_eq!(wait(pid as i32), Ended::Exited(3));
        if round == 0 {
            enter();
        }
    }
}

fn checked_fork(number: i64) -> i64 {
    let result: i64;
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") number => result, out("rcx") _, out("r11") _);
    }
    result
}

fn pointers_that_are_bad_give_efault() {
    enter();
    let mut set = 0_u64;
    for bad in [8_usize, 0x7fff_ffff_f000, 0xffff_8000_0000_0000] {
        let call =
            |number: i64, a: [usize; 4]| unsafe { libc::syscall(number, a[0], a[1], a[2], a[3]) };
        for (number, arguments) in [
            (libc::SYS_rt_sigaction, [10, bad, 0, 8]),
            (libc::SYS_rt_sigaction, [10, 0, bad, 8]),
            (libc::SYS_sigaltstack, [bad, 0, 0, 0]),
            (libc::SYS_sigaltstack, [0, bad, 0, 0]),
            (libc::SYS_rt_sigprocmask, [0, bad, 0, 8]),
            (libc::SYS_rt_sigprocmask, [0, 0, bad, 8]),
            (libc::SYS_clone3, [bad, 88, 0, 0]),
            (libc::SYS_pipe, [bad, 0, 0, 0]),
        ] {
            assert_eq!(call(number, arguments), -1, "call {number} {arguments:x?}");
            assert_eq!(errno(), libc::EFAULT, "call {number} {arguments:x?}");
        }
    }
    let size = unsafe { libc::syscall(libc::SYS_rt_sigprocmask, 0, 0, &raw mut set, 8) };
    assert_eq!((size, set), (0, 0));
}

dune_testing::tests! {
    smoke registers_flags_and_red_zone_survive_every_kind_of_call,
    ring0 they_survive_a_storm_of_signals_too,
    ring0 the_red_zone_of_a_leaf_survives_asynchronous_signals,
    ring0 vector_registers_survive_forwarded_calls,
    ring0 identities_are_right_in_threads_and_children,
    ring0 errno_belongs_to_the_call_that_failed,
    ring0 the_runtimes_descriptors_can_neither_be_closed_nor_replaced,
    ring0 ranges_of_descriptors_are_closed_around_the_runtimes,
    ring0 only_the_lower_half_of_the_number_counts,
    ring0 pointers_that_are_bad_give_efault,
}
