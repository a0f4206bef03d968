//! Processes made from Dune mode: fork, vfork, posix_spawn, execve, and how they end.
#![expect(unsafe_code, reason = "fork, vfork and friends")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "every call is libc's, with arguments made on the spot"
)]

mod common;

use std::arch::naked_asm;
use std::ffi::CStr;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use common::*;

fn a_forked_child_is_in_dune_mode() {
    enter();
    let before = descriptors();
    let ended = child(|| {
        assert!(dune::is_inside());
        assert_eq!(descriptors_named("kvm-vm"), 1);
        assert_eq!(vcpus(), 1);
        assert_eq!(descriptors(), before);
        let sum: u64 = (0..1_000_000_u64).collect::<Vec<_>>().iter().sum();
        i32::from(sum == 499_999_500_000)
    });
    assert_eq!(ended, Ended::Exited(1));
    assert!(dune::is_inside());
}

fn exit_codes_and_signals_are_seen_by_wait() {
    enter();
    for code in [0, 1, 7, 127, 255] {
        assert_eq!(child(|| code), Ended::Exited(code));
    }
    for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGUSR1, libc::SIGABRT] {
        let ended = child(|| {
            raise(signal);
            0
        });
        assert_eq!(ended, Ended::Killed(signal));
    }
    assert_eq!(child(|| panic!("expected")), Ended::Exited(101));
}

fn memory_is_copied_at_fork() {
    enter();
    let shared = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            READ_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    }
    .cast::<AtomicU64>();
    let shared = unsafe { &*shared };
    let mut private = vec![1_u64; 1 << 20];
    let pid = fork(|| {
        assert!(private.iter().all(|n| *n == 1));
        private.fill(2);
        shared.store(5, Ordering::SeqCst);
        i32::from(!private.iter().all(|n| *n == 2))
    });
    private[0] = 3;
    assert_eq!(wait(pid), Ended::Exited(0));
    assert_eq!(private[0], 3);
    assert!(private[1..].iter().all(|n| *n == 1));
    assert_eq!(shared.load(Ordering::SeqCst), 5);
}

fn a_tree_of_forks() {
    fn grow(depth: u32) -> i32 {
        assert!(dune::is_inside());
        if depth == 0 {
            return 1;
        }
        let mut sum = 1;
        let pids: Vec<i32> = (0..2).map(|_| fork(|| grow(depth - 1))).collect();
        for pid in pids {
            match wait(pid) {
                Ended::Exited(code) => sum += code,
                other => panic!("{other:?}"),
            }
        }
        sum
    }
    enter();
    assert_eq!(grow(4), 31);
}

fn generations_of_forks_keep_their_descriptors_few() {
    /// Each child is the parent of the next one, and passes the verdict on.
    fn descend(generations: u32, expected: usize) -> i32 {
        assert_eq!(descriptors(), expected, "{generations} to go");
        // A second vCPU, which the next generation does not inherit.
        thread::spawn(|| assert!(dune::is_inside())).join().unwrap();
        assert_eq!(vcpus(), 2);
        if generations == 0 {
            return 7;
        }
        match child(|| descend(generations - 1, expected)) {
            Ended::Exited(code) => code,
            other => panic!("{other:?}"),
        }
    }
    enter();
    assert_eq!(descend(20, descriptors()), 7);
}

fn a_thread_forks_while_others_run() {
    enter();
    let stop = Arc::new(AtomicBool::new(false));
    let noise: Vec<_> = (0..3)
        .map(|n| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    match n {
                        0 => thread::spawn(|| ()).join().unwrap(),
                        1 => {
                            let big = map(3 << 30, READ_WRITE);
                            unsafe { big.add(2 << 30).write(1) };
                            unmap(big, 3 << 30);
                        }
                        _ => {
                            dune::leave();
                            enter();
                        }
                    }
                }
            })
        })
        .collect();
    let forker = thread::spawn(|| {
        for n in 0..40 {
            let ended = child(|| {
                assert!(dune::is_inside());
                assert_eq!(gettid(), getpid());
                let big = map(3 << 30, READ_WRITE);
                unsafe { big.add(2 << 30).write(1) };
                // No allocation by other threads' leave: libc's own locks are fork-safe.
                let inner = thread::spawn(dune::is_inside).join().unwrap();
                if inner { n } else { 100 }
            });
            assert_eq!(ended, Ended::Exited(n));
        }
    });
    let result = forker.join();
    stop.store(true, Ordering::Relaxed);
    noise.into_iter().for_each(|t| t.join().unwrap());
    result.unwrap();
}

fn a_fork_outside_after_having_been_inside() {
    enter();
    let keep = thread::spawn(|| {
        // Holds an area and a vCPU of the parent's.
        thread::park_timeout(std::time::Duration::from_millis(500));
    });
    dune::leave();
    for round in 0..3 {
        let ended = child(|| {
            assert!(!dune::is_inside());
            // Two threads at once find the parent's machine.
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    thread::spawn(|| {
                        enter();
                        assert!(thread::spawn(dune::is_inside).join().unwrap());
                    })
                })
                .collect();
            threads.into_iter().for_each(|t| t.join().unwrap());
            enter();
            assert_eq!(descriptors_named("kvm-vm"), 1);
            let inner = child(|| i32::from(dune::is_inside()) + 40);
            assert_eq!(inner, Ended::Exited(41));
            dune::leave();
            round
        });
        assert_eq!(ended, Ended::Exited(round));
    }
    assert_eq!(child(|| 3), Ended::Exited(3));
    enter();
    keep.thread().unpark();
    keep.join().unwrap();
}

fn a_child_that_never_enters_is_plain() {
    enter();
    dune::leave();
    let ended = child(|| {
        let text = Command::new("/bin/echo").arg("x").output().unwrap();
        assert_eq!(text.stdout, b"x\n");
        thread::spawn(|| assert!(!dune::is_inside()))
            .join()
            .unwrap();
        3
    });
    assert_eq!(ended, Ended::Exited(3));
}

fn commands_run_with_pipes() {
    enter();
    for _ in 0..10 {
        let mut cat = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = cat.stdin.take().unwrap();
        let mut output = cat.stdout.take().unwrap();
        let writer = thread::spawn(move || {
            for n in 0..20_000 {
                writeln!(input, "{n}").unwrap();
            }
        });
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        writer.join().unwrap();
        assert_eq!(text.lines().count(), 20_000);
        assert!(cat.wait().unwrap().success());
    }
    let shell = Command::new("sh")
        .args(["-c", "echo $VALUE; pwd; exit 3"])
        .env("VALUE", "hello")
        .current_dir("/usr")
        .output()
        .unwrap();
    assert_eq!(shell.status.code(), Some(3));
    assert_eq!(shell.stdout, b"hello\n/usr\n");
    let killed = Command::new("sh")
        .args(["-c", "kill -TERM $$"])
        .status()
        .unwrap();
    assert_eq!(killed.signal(), Some(libc::SIGTERM));
}

fn the_slow_way_of_a_command_works_too() {
    enter();
    // A closure before exec makes the standard library use fork and exec.
    let mut command = Command::new("sh");
    command.args(["-c", "echo $0 $(umask)", "named"]);
    unsafe {
        command.pre_exec(|| {
            assert!(dune::is_inside());
            libc::umask(0o123);
            Ok(())
        });
    }
    assert_eq!(command.output().unwrap().stdout, b"named 0123\n");
    let mut failing = Command::new("true");
    unsafe { failing.pre_exec(|| Err(std::io::Error::from_raw_os_error(libc::EXDEV))) };
    let error = failing.spawn().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EXDEV));
}

fn a_program_that_cannot_be_run_is_an_error() {
    enter();
    let missing = Command::new("/no/such/program").spawn().unwrap_err();
    assert_eq!(missing.kind(), std::io::ErrorKind::NotFound);
    let folder = Command::new("/usr").spawn().unwrap_err();
    assert_eq!(folder.kind(), std::io::ErrorKind::PermissionDenied);
    // The same by execve itself, which then returns.
    let ended = child(|| {
        let arguments = [c"x".as_ptr(), std::ptr::null()];
        unsafe { libc::execv(c"/no/such/program".as_ptr(), arguments.as_ptr()) };
        assert_eq!(errno(), libc::ENOENT);
        assert!(dune::is_inside());
        7
    });
    assert_eq!(ended, Ended::Exited(7));
}

fn execve_replaces_the_program() {
    enter();
    let ended = child(|| {
        // Other threads in Dune mode end with it.
        for _ in 0..3 {
            thread::spawn(|| {
                loop {
                    std::hint::spin_loop();
                }
            });
        }
        let error = Command::new("sh")
            .args(["-c", "ls -l /proc/self/fd | grep -c kvm; exit 6"])
            .exec();
        panic!("{error}");
    });
    assert_eq!(ended, Ended::Exited(6));
}

fn an_executed_program_sees_no_trace_of_the_runtime() {
    extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    enter();
    on_signal(libc::SIGUSR1, 0, nothing);
    disposition(libc::SIGUSR2, libc::SIG_IGN);
    block(&[libc::SIGHUP]);
    for slow in [false, true] {
        let mut cat = Command::new("cat");
        cat.arg("/proc/self/status");
        if slow {
            unsafe { cat.pre_exec(|| Ok(())) };
        }
        let output = cat.output().unwrap();
        let status = String::from_utf8(output.stdout).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|l| l.starts_with(name)).unwrap();
            u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
        };
        let bit = |signal: i32| 1_u64 << (signal - 1);
        assert_eq!(field("SigCgt:"), 0);
        assert_ne!(field("SigIgn:") & bit(libc::SIGUSR2), 0);
        // The standard library gives its children an empty mask.
        assert_eq!(field("SigBlk:") & !bit(libc::SIGHUP), 0);
    }
    let ended = child(|| {
        let error = Command::new("sh")
            .args([
                "-c",
                "test $(grep SigBlk /proc/self/status | cut -f 2) = 0000000000000001",
            ])
            .exec();
        panic!("{error}");
    });
    // `exec` resets the mask too: what counts is that it is one of the two.
    assert!(matches!(ended, Ended::Exited(0 | 1)), "{ended:?}");
}

/// `vfork`, whose child must not return from the function that called it.
#[unsafe(naked)]
unsafe extern "C" fn in_vfork(body: extern "C" fn(*mut u64) -> i32, argument: *mut u64) -> i32 {
    naked_asm!(
        "push rbx",
        "push r12",
        "push r13",
        "mov rbx, rdi",
        "mov r12, rsi",
        "mov eax, 58",
        "syscall",
        "test eax, eax",
        "jnz 2f",
        "mov rdi, r12",
        "call rbx",
        "mov edi, eax",
        "mov eax, 231",
        "syscall",
        "ud2",
        "2:",
        "pop r13",
        "pop r12",
        "pop rbx",
        "ret",
    )
}

fn vfork_shares_memory_and_waits() {
    extern "C" fn body(value: *mut u64) -> i32 {
        unsafe { *value = u64::from(dune::is_inside()) + 1 };
        unsafe { *value.add(1) = getpid() as u64 };
        9
    }
    enter();
    let before = (descriptors(), getpid());
    for _ in 0..50 {
        let mut values = [0_u64; 2];
        let pid = unsafe { in_vfork(body, values.as_mut_ptr()) };
        assert!(pid > 0);
        // The child has ended: its writes are here already.
        assert_eq!(values, [2, pid as u64]);
        assert_eq!(wait(pid), Ended::Exited(9));
        assert_eq!(getpid(), before.1);
    }
    // One more vCPU, used again and again.
    assert!(descriptors() <= before.0 + 1);
}

fn a_vforked_child_may_run_a_program_or_die() {
    extern "C" fn run(_: *mut u64) -> i32 {
        let arguments = [
            c"sh".as_ptr(),
            c"-c".as_ptr(),
            c"exit 12".as_ptr(),
            std::ptr::null(),
        ];
        unsafe { libc::execv(c"/bin/sh".as_ptr(), arguments.as_ptr()) };
        1
    }
    extern "C" fn die(_: *mut u64) -> i32 {
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        1
    }
    extern "C" fn fork_again(value: *mut u64) -> i32 {
        let pid = unsafe { libc::syscall(libc::SYS_fork) } as i32;
        if pid == 0 {
            unsafe { libc::_exit(if dune::is_inside() { 3 } else { 4 }) };
        }
        let mut status = 0;
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        unsafe { *value = status as u64 };
        5
    }
    enter();
    let mut value = 0;
    let pid = unsafe { in_vfork(run, &raw mut value) };
    assert_eq!(wait(pid), Ended::Exited(12));
    let pid = unsafe { in_vfork(die, &raw mut value) };
    assert_eq!(wait(pid), Ended::Killed(libc::SIGKILL));
    let pid = unsafe { in_vfork(fork_again, &raw mut value) };
    assert_eq!(wait(pid), Ended::Exited(5));
    assert_eq!(value, 3 << 8);
    assert!(dune::is_inside());
    assert_eq!(child(|| 1), Ended::Exited(1));
}

fn handlers_set_in_a_vforked_child_do_not_reach_the_parent() {
    static PARENT: AtomicU32 = AtomicU32::new(0);
    extern "C" fn of_parent(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        PARENT.fetch_add(1, Ordering::SeqCst);
    }
    static CHILD: AtomicU32 = AtomicU32::new(0);
    extern "C" fn of_child(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        CHILD.fetch_add(1, Ordering::SeqCst);
    }
    extern "C" fn body(_: *mut u64) -> i32 {
        raise(libc::SIGUSR1);
        on_signal(libc::SIGUSR1, 0, of_child);
        raise(libc::SIGUSR1);
        disposition(libc::SIGUSR1, libc::SIG_IGN);
        raise(libc::SIGUSR1);
        0
    }
    enter();
    on_signal(libc::SIGUSR1, 0, of_parent);
    let mut value = 0;
    let pid = unsafe { in_vfork(body, &raw mut value) };
    assert_eq!(wait(pid), Ended::Exited(0));
    assert_eq!(
        (PARENT.load(Ordering::SeqCst), CHILD.load(Ordering::SeqCst)),
        (1, 1)
    );
    raise(libc::SIGUSR1);
    assert_eq!(
        (PARENT.load(Ordering::SeqCst), CHILD.load(Ordering::SeqCst)),
        (2, 1)
    );
}

fn children_run_while_signals_storm() {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    extern "C" fn count(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    enter();
    on_signal(libc::SIGALRM, libc::SA_RESTART, count);
    interval_timer(700);
    for n in 0..30 {
        let output = Command::new("/bin/echo")
            .arg(n.to_string())
            .output()
            .unwrap();
        assert_eq!(output.stdout, format!("{n}\n").as_bytes());
        assert_eq!(child(|| n), Ended::Exited(n));
    }
    interval_timer(0);
    assert!(COUNT.load(Ordering::Relaxed) > 10);
}

fn posix_spawn_reports_errors_and_sets_attributes() {
    enter();
    let spawn = |path: &CStr, attributes: *const libc::posix_spawnattr_t| {
        let arguments = [path.as_ptr().cast_mut(), std::ptr::null_mut()];
        let environment = [std::ptr::null_mut()];
        let mut pid = 0;
        let error = unsafe {
            libc::posix_spawn(
                &raw mut pid,
                path.as_ptr(),
                std::ptr::null(),
                attributes,
                arguments.as_ptr(),
                environment.as_ptr(),
            )
        };
        (error, pid)
    };
    assert_eq!(spawn(c"/no/such/file", std::ptr::null()).0, libc::ENOENT);
    let (error, pid) = spawn(c"/bin/true", std::ptr::null());
    assert_eq!(error, 0);
    assert_eq!(wait(pid), Ended::Exited(0));
    let mut attributes = unsafe { std::mem::zeroed() };
    unsafe {
        libc::posix_spawnattr_init(&raw mut attributes);
        libc::posix_spawnattr_setflags(&raw mut attributes, libc::POSIX_SPAWN_SETPGROUP as i16);
    }
    let (error, pid) = spawn(c"/bin/false", &raw const attributes);
    assert_eq!(error, 0);
    assert_eq!(wait(pid), Ended::Exited(1));
}

fn many_threads_spawn_commands_at_once() {
    enter();
    let outputs = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for n in 0..6 {
            let outputs = &outputs;
            scope.spawn(move || {
                for m in 0..8 {
                    let text = format!("{n}-{m}");
                    let output = Command::new("/bin/echo").arg(&text).output().unwrap();
                    assert_eq!(output.stdout, format!("{text}\n").as_bytes());
                    outputs.lock().unwrap().push(text);
                }
            });
        }
    });
    assert_eq!(outputs.into_inner().unwrap().len(), 48);
}

dune_testing::tests! {
    smoke a_forked_child_is_in_dune_mode,
    ring0 exit_codes_and_signals_are_seen_by_wait,
    ring0 memory_is_copied_at_fork,
    smoke a_tree_of_forks,
    ring0 generations_of_forks_keep_their_descriptors_few,
    ring0 a_thread_forks_while_others_run,
    ring0 a_fork_outside_after_having_been_inside,
    ring0 a_child_that_never_enters_is_plain,
    ring0 commands_run_with_pipes,
    ring0 the_slow_way_of_a_command_works_too,
    ring0 a_program_that_cannot_be_run_is_an_error,
    ring0 execve_replaces_the_program,
    ring0 an_executed_program_sees_no_trace_of_the_runtime,
    smoke vfork_shares_memory_and_waits,
    ring0 a_vforked_child_may_run_a_program_or_die,
    ring0 handlers_set_in_a_vforked_child_do_not_reach_the_parent,
    ring0 children_run_while_signals_storm,
    ring0 posix_spawn_reports_errors_and_sets_attributes,
    ring0 many_threads_spawn_commands_at_once,
}
