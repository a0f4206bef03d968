//! Processes: `fork`, `vfork`, `posix_spawn`, programs that make programs.

#![expect(unsafe_code, reason = "fork and vfork")]
#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "small system calls side by side"
)]

use std::ffi::CStr;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::Scenario;

pub(crate) const SCENARIOS: &[Scenario] = &[
    ("a_tree_of_forks", a_tree_of_forks),
    ("fork_copies_memory", fork_copies_memory),
    ("fork_without_rights", fork_without_rights),
    ("fork_beside_threads", fork_beside_threads),
    ("threads_in_a_child", threads_in_a_child),
    ("vfork_shares_memory", vfork_shares_memory),
    ("vfork_beside_writers", vfork_beside_writers),
    ("vfork_and_the_heap", vfork_and_the_heap),
    ("vfork_and_reservations", vfork_and_reservations),
    ("spawn_errors_are_told", spawn_errors_are_told),
    ("children_end_by_signals", children_end_by_signals),
    ("children_tell_their_end", children_tell_their_end),
    ("pipes_between_processes", pipes_between_processes),
    ("chains_of_programs", chains_of_programs),
    ("stopped_and_continued", stopped_and_continued),
    ("guards_of_others", guards_of_others),
    ("bash_pipes", bash_pipes),
    ("bash_jobs_and_traps", bash_jobs_and_traps),
    ("xargs_in_parallel", xargs_in_parallel),
    ("make_in_parallel", make_in_parallel),
    ("python_processes", python_processes),
    ("git_history", git_history),
    ("clocks_agree", clocks_agree),
    ("clock_data_are_the_kernels", clock_data_are_the_kernels),
];

fn fork() -> i32 {
    // SAFETY: the children of these scenarios do little, and end by `_exit`.
    unsafe { libc::fork() }
}

fn end(status: i32) -> ! {
    // SAFETY: nothing runs afterwards.
    unsafe { libc::_exit(status) }
}

fn wait_for(child: i32) -> i32 {
    let mut status = 0;
    // SAFETY: one number.
    let waited = unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!(waited, child);
    status
}

/// What the kernel says, by a system call in any case.
fn asked(clock: i32) -> i128 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes the time.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, &raw mut time) };
    assert_eq!(result, 0);
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}

/// What libc says: by the vDSO, if there is one.
fn told(clock: i32) -> i128 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: libc writes the time.
    let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
    assert_eq!(result, 0);
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}

/// No clock goes backwards between the two ways of asking.
fn clocks_go_forwards(who: &str) {
    for clock in [
        libc::CLOCK_REALTIME,
        libc::CLOCK_MONOTONIC,
        libc::CLOCK_MONOTONIC_RAW,
        libc::CLOCK_BOOTTIME,
        libc::CLOCK_REALTIME_COARSE,
        libc::CLOCK_MONOTONIC_COARSE,
        libc::CLOCK_PROCESS_CPUTIME_ID,
    ] {
        for _ in 0..300 {
            let before = asked(clock);
            let between = told(clock);
            let after = asked(clock);
            assert!(
                before <= between && between <= after,
                "{who}: clock {clock}: {before} {between} {after}"
            );
        }
    }
    let mut day = libc::timeval {
        tv_sec: 0,
        tv_usec: 0,
    };
    let before = asked(libc::CLOCK_REALTIME) / 1000;
    // SAFETY: libc writes the time.
    let told_day = unsafe { libc::gettimeofday(&raw mut day, ptr::null_mut()) };
    assert_eq!(told_day, 0);
    let after = asked(libc::CLOCK_REALTIME) / 1000;
    let day = i128::from(day.tv_sec) * 1_000_000 + i128::from(day.tv_usec);
    assert!(
        before <= day && day <= after,
        "{who}: {before} {day} {after}"
    );
    // SAFETY: returns the time.
    let seconds = i128::from(unsafe { libc::time(ptr::null_mut()) });
    assert!(seconds >= asked(libc::CLOCK_REALTIME_COARSE) / 1_000_000_000 - 1);
    // SAFETY: asks for a number.
    let cpu = unsafe { libc::sched_getcpu() };
    // SAFETY: as above.
    let cpus = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_CONF) };
    assert!(
        cpu >= 0 && i64::from(cpu) < cpus,
        "{who}: CPU {cpu} of {cpus}"
    );
    println!("{who}: clocks agree");
}

fn clocks_agree() {
    clocks_go_forwards("the first");
    let thread = thread::spawn(|| clocks_go_forwards("a thread"));
    thread.join().unwrap();
    match fork() {
        0 => {
            clocks_go_forwards("a child");
            end(0)
        }
        child => assert_eq!(wait_for(child), 0),
    }
}

/// The memory that the vDSO computes from, where there is one.
fn clock_data_are_the_kernels() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let data = maps.lines().find(|line| line.ends_with("[vvar]"));
    if let Some(line) = data {
        let start = line.split('-').next().unwrap();
        let start = usize::from_str_radix(start, 16).unwrap();
        let page = start as *mut u8;
        for rights in [
            libc::PROT_READ | libc::PROT_WRITE,
            libc::PROT_WRITE,
            libc::PROT_READ | libc::PROT_EXEC,
        ] {
            // SAFETY: is refused; and nobody else knows of the page.
            let result = unsafe { libc::mprotect(page.cast(), 4096, rights) };
            if rights & libc::PROT_WRITE != 0 {
                assert_eq!((result, errno()), (-1, libc::EACCES));
            }
        }
        let file = std::fs::File::open("/dev/zero").unwrap();
        // SAFETY: the kernel may not write there.
        let got = unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&file), page.cast(), 8) };
        assert_eq!((got, errno()), (-1, libc::EFAULT));
        match fork() {
            0 => {
                // SAFETY: ends this process.
                unsafe { page.write_volatile(1) };
                end(0)
            }
            child => assert_eq!(wait_for(child) & 0x7f, libc::SIGSEGV),
        }
    }
    println!("{}", told(libc::CLOCK_MONOTONIC) > 0);
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

fn a_tree_of_forks() {
    fn grow(depth: i32) -> i32 {
        if depth == 0 {
            return 1;
        }
        let children: Vec<i32> = (0..2)
            .map(|_| match fork() {
                0 => end(grow(depth - 1)),
                child => child,
            })
            .collect();
        let leaves: i32 = children.into_iter().map(|child| wait_for(child) >> 8).sum();
        leaves
    }
    println!("leaves: {}", grow(3));
}

fn fork_copies_memory() {
    let word = Box::new(AtomicU64::new(1));
    let child = fork();
    if child == 0 {
        word.store(2, Ordering::SeqCst);
        end(word.load(Ordering::SeqCst) as i32);
    }
    println!("{} {}", wait_for(child) >> 8, word.load(Ordering::SeqCst));
    // SAFETY: no memory.
    let (parent, group) = unsafe { (libc::getpid(), libc::getpgrp()) };
    let child = fork();
    if child == 0 {
        // SAFETY: no memory.
        let related = unsafe { libc::getppid() == parent && libc::getpgrp() == group };
        // SAFETY: no memory.
        let new = unsafe { libc::getpid() } != parent;
        end(i32::from(related && new));
    }
    println!("related: {}", wait_for(child) >> 8);
}

/// The allocator and the guard's locks are whole in a child, whatever the other
/// threads were doing.
/// Who may open nothing any more can still fork.
fn fork_without_rights() {
    const NOBODY: u32 = 65_534;
    // SAFETY: takes nothing.
    if unsafe { libc::geteuid() } == 0 {
        // SAFETY: numbers.
        let given_up = unsafe {
            libc::setgroups(0, ptr::null()) == 0
                && libc::setgid(NOBODY) == 0
                && libc::setuid(NOBODY) == 0
        };
        assert!(given_up);
    }
    let grandchild = || match fork() {
        0 => end(7),
        child => end(wait_for(child) >> 8),
    };
    match fork() {
        0 => grandchild(),
        child => println!("status: {}", wait_for(child) >> 8),
    }
}

fn fork_beside_threads() {
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let threads: Vec<_> = (0..3)
        .map(|number| {
            let stop = std::sync::Arc::clone(&stop);
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if number == 0 {
                        drop(std::fs::read("/proc/self/status"));
                    } else {
                        drop(vec![0_u8; 300_000]);
                    }
                }
            })
        })
        .collect();
    let mut ends = 0;
    for _ in 0..20 {
        let child = fork();
        if child == 0 {
            let text = vec![b'x'; 200_000];
            end(i32::from(text.len() == 200_000));
        }
        ends += wait_for(child) >> 8;
    }
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().expect("its end");
    }
    println!("{ends}");
}

fn threads_in_a_child() {
    let child = fork();
    if child == 0 {
        let threads: Vec<_> = (0..8).map(|n| thread::spawn(move || n)).collect();
        let sum: i32 = threads
            .into_iter()
            .map(|t| t.join().expect("its end"))
            .sum();
        end(sum);
    }
    println!("{}", wait_for(child) >> 8);
}

/// `vfork`, whose child runs `work` in the parent's memory and never returns.
fn vfork_and(work: fn() -> !) -> i32 {
    // SAFETY: the child calls what only writes statics, and ends there.
    #[expect(deprecated, reason = "it is what is tested")]
    let child = unsafe { libc::vfork() };
    if child == 0 {
        work();
    }
    child
}

static WRITTEN: AtomicI32 = AtomicI32::new(0);
static PAGES: [AtomicU64; 4096] = [const { AtomicU64::new(0) }; 4096];

fn vfork_shares_memory() {
    let child = vfork_and(|| {
        for (index, word) in PAGES.iter().enumerate().step_by(100) {
            word.store(index as u64, Ordering::SeqCst);
        }
        let program: &CStr = c"/nonexistent/program";
        let arguments = [program.as_ptr(), ptr::null()];
        // SAFETY: strings that live as long as the program.
        unsafe { libc::execv(program.as_ptr(), arguments.as_ptr()) };
        WRITTEN.store(errno(), Ordering::SeqCst);
        end(3)
    });
    println!("{}", wait_for(child) >> 8);
    let sum: u64 = PAGES.iter().map(|word| word.load(Ordering::SeqCst)).sum();
    println!("{} {sum}", WRITTEN.load(Ordering::SeqCst));
    let child = vfork_and(|| {
        WRITTEN.store(77, Ordering::SeqCst);
        let arguments = [
            c"sh".as_ptr(),
            c"-c".as_ptr(),
            c"exit 6".as_ptr(),
            ptr::null(),
        ];
        // SAFETY: strings that live as long as the program.
        unsafe { libc::execv(c"/bin/sh".as_ptr(), arguments.as_ptr()) };
        end(1)
    });
    println!(
        "{} {}",
        WRITTEN.load(Ordering::SeqCst),
        wait_for(child) >> 8
    );
    // The kernel's writes on behalf of the child come back too.
    static ENDS: [AtomicI32; 2] = [const { AtomicI32::new(0) }; 2];
    let child = vfork_and(|| {
        // SAFETY: two descriptors.
        unsafe { libc::pipe(ENDS.as_ptr().cast_mut().cast()) };
        end(0)
    });
    wait_for(child);
    println!("{}", ENDS.iter().all(|end| end.load(Ordering::SeqCst) > 0));
}

/// Threads of the parent that write beside the child lose nothing.
fn vfork_beside_writers() {
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writer = {
        let stop = std::sync::Arc::clone(&stop);
        thread::spawn(move || {
            let mut last = 0;
            while !stop.load(Ordering::Relaxed) {
                // The same page as the child's word.
                if PAGES[1].load(Ordering::SeqCst) != last {
                    return false;
                }
                last += 1;
                PAGES[1].store(last, Ordering::SeqCst);
            }
            true
        })
    };
    for _ in 0..10 {
        let child = vfork_and(|| {
            for _ in 0..1000 {
                PAGES[2].fetch_add(1, Ordering::SeqCst);
            }
            end(0)
        });
        wait_for(child);
    }
    stop.store(true, Ordering::Relaxed);
    let kept = writer.join().expect("its end");
    println!("{kept} {}", PAGES[2].load(Ordering::SeqCst));
}

/// What the child allocates is there in the parent, as on Linux.
fn vfork_and_the_heap() {
    static BLOCK: AtomicU64 = AtomicU64::new(0);
    for _ in 0..3 {
        let child = vfork_and(|| {
            // SAFETY: a block that is never freed.
            let block = unsafe { libc::malloc(3_000_000) }.cast::<u8>();
            // SAFETY: within the block.
            unsafe { block.add(2_000_000).write_volatile(9) };
            BLOCK.store(block as u64, Ordering::SeqCst);
            end(0)
        });
        wait_for(child);
        let block = BLOCK.load(Ordering::SeqCst) as usize + 2_000_000;
        // SAFETY: the child's block, which is in the shared memory.
        println!("{}", unsafe {
            ptr::with_exposed_provenance::<u8>(block).read()
        });
        drop(vec![1_u8; 5_000_000]);
    }
}

/// A child asks for a read into memory that it cannot write: nothing comes of it,
/// and nothing is spent on it.
fn vfork_and_reservations() {
    const LEN: usize = 1 << 30;
    static PLACE: AtomicU64 = AtomicU64::new(0);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: new memory.
    let at = unsafe { libc::mmap(ptr::null_mut(), LEN, libc::PROT_NONE, flags, -1, 0) };
    PLACE.store(at.expose_provenance() as u64, Ordering::SeqCst);
    let child = vfork_and(|| {
        // SAFETY: a string.
        let zero = unsafe { libc::open(c"/dev/zero".as_ptr(), libc::O_RDONLY) };
        let at = ptr::with_exposed_provenance_mut(PLACE.load(Ordering::SeqCst) as usize);
        // SAFETY: the memory is there, and cannot be written.
        unsafe { libc::read(zero, at, LEN) };
        end(errno())
    });
    let mut status = 0;
    // SAFETY: numbers alone.
    let mut used: libc::rusage = unsafe { core::mem::zeroed() };
    // SAFETY: a number and a structure.
    unsafe { libc::wait4(child, &raw mut status, 0, &raw mut used) };
    println!(
        "{} {}",
        status >> 8 == libc::EFAULT,
        used.ru_maxrss < 400_000
    );
}

fn spawn_errors_are_told() {
    let error = Command::new("/nonexistent/program").spawn().map(drop);
    println!("{:?}", error.map_err(|error| error.raw_os_error()));
    let error = Command::new("/etc/passwd").spawn().map(drop);
    println!("{:?}", error.map_err(|error| error.raw_os_error()));
    let output = Command::new("echo").arg("spawned").output().expect("echo");
    println!("{:?}", String::from_utf8_lossy(&output.stdout));
}

fn children_end_by_signals() {
    for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGUSR1] {
        let child = fork();
        if child == 0 {
            loop {
                thread::sleep(Duration::from_secs(1));
            }
        }
        // SAFETY: a signal for our child.
        unsafe { libc::kill(child, signal) };
        println!("{:#x}", wait_for(child));
    }
    let child = fork();
    if child == 0 {
        // SAFETY: none: this is the fault.
        unsafe { ptr::without_provenance_mut::<u8>(8).write_volatile(1) };
    }
    println!("{:#x}", wait_for(child));
}

static TOLD: AtomicI32 = AtomicI32::new(0);

extern "C" fn child_ended(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the second argument of a handler for SIGCHLD.
    TOLD.store(unsafe { (*info).si_pid() }, Ordering::SeqCst);
}

fn children_tell_their_end() {
    // SAFETY: an all-zero sigaction is one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = child_ended;
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler is made for it.
    unsafe { libc::sigaction(libc::SIGCHLD, &action, ptr::null_mut()) };
    let child = fork();
    if child == 0 {
        end(4);
    }
    while TOLD.load(Ordering::SeqCst) == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    println!("{}", TOLD.load(Ordering::SeqCst) == child);
    // SAFETY: an all-zero siginfo is one.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: one siginfo.
    let waited = unsafe { libc::waitid(libc::P_PID, child as u32, &mut info, libc::WEXITED) };
    // SAFETY: of an ended child.
    println!("{waited} {}", unsafe { info.si_status() });
    // SAFETY: no child is left.
    println!("{} {}", unsafe { libc::wait(ptr::null_mut()) }, errno());
}

fn pipes_between_processes() {
    let mut ends = [0; 2];
    // SAFETY: two descriptors.
    unsafe { libc::pipe(ends.as_mut_ptr()) };
    let child = fork();
    if child == 0 {
        let text = [7_u8; 100_000];
        // SAFETY: the text lives here.
        let written = unsafe { libc::write(ends[1], text.as_ptr().cast(), text.len()) };
        end(i32::from(written == 100_000));
    }
    // SAFETY: ours.
    unsafe { libc::close(ends[1]) };
    let mut sum = 0;
    let mut buffer = [0_u8; 5000];
    loop {
        // SAFETY: the buffer is ours.
        let count = unsafe { libc::read(ends[0], buffer.as_mut_ptr().cast(), buffer.len()) };
        if count <= 0 {
            break;
        }
        sum += buffer[..count as usize]
            .iter()
            .map(|&b| u64::from(b))
            .sum::<u64>();
    }
    println!("{sum} {}", wait_for(child) >> 8);
}

fn shell(script: &str) {
    let output = Command::new("bash")
        .arg("-c")
        .arg(script)
        .output()
        .expect("bash");
    println!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn chains_of_programs() {
    shell("exec env A=1 sh -c 'exec sh -c \"exec echo chained\"'");
}

fn stopped_and_continued() {
    let child = fork();
    if child == 0 {
        loop {
            thread::sleep(Duration::from_millis(10));
        }
    }
    let send = |signal| {
        // SAFETY: a signal for our child.
        unsafe { libc::kill(child, signal) };
    };
    let wait = || {
        let mut status = 0;
        // SAFETY: one number.
        unsafe { libc::waitpid(child, &mut status, libc::WUNTRACED | libc::WCONTINUED) };
        status
    };
    send(libc::SIGSTOP);
    println!("{:#x}", wait());
    send(libc::SIGCONT);
    println!("{:#x}", wait());
    send(libc::SIGTERM);
    println!("{:#x}", wait());
}

/// The guard of another sandboxed process lies at the same addresses.
fn guards_of_others() {
    let child = fork();
    if child == 0 {
        loop {
            thread::sleep(Duration::from_secs(1));
        }
    }
    // Natively these are there; in the sandbox nothing of them may be.
    let is_sandbox = std::fs::File::open("/proc/self/mem").is_err();
    for name in ["mem", "maps", "auxv", "syscall"] {
        let readable = std::fs::read(format!("/proc/{child}/{name}")).is_ok_and(|t| !t.is_empty());
        assert!(!(is_sandbox && readable), "{name}");
    }
    let mut word = 0_u64;
    let local = libc::iovec {
        iov_base: (&raw mut word).cast(),
        iov_len: 8,
    };
    let remote = libc::iovec {
        iov_base: ptr::without_provenance_mut(0x7000_0000_0000),
        iov_len: 8,
    };
    // SAFETY: the local vector is ours.
    let count = unsafe { libc::process_vm_readv(child, &local, 1, &remote, 1, 0) };
    println!("{count}");
    // SAFETY: our child.
    unsafe { libc::kill(child, libc::SIGKILL) };
    println!("{:#x}", wait_for(child));
}

fn bash_pipes() {
    shell(
        "seq 1 1000 | sort -n | tail -1; x=$(echo a; echo b); echo $x; cat <(echo c) | tr c d; (exit 3); echo $?; echo one | { read x; echo got $x; }",
    );
}

/// A child that is killed before it has become another program is still a shell, whose trap may
/// run: hence the waits.
fn bash_jobs_and_traps() {
    shell(
        "{ trap 'echo usr1' USR1; trap 'echo bye' EXIT; kill -USR1 $$; sleep 0.05 & wait $!; echo $?; \
         sleep 5 & p=$!; sleep 0.1; kill $p; wait $p; echo $?; set -m; sleep 0.05 & wait %1; echo $?; \
         f=$(mktemp -u); (trap 'echo term; exit 9' TERM; : >$f; while :; do sleep 0.02; done) & p=$!; \
         until [ -e $f ]; do sleep 0.02; done; kill $p; wait $p; echo $?; rm $f; } 2>/dev/null",
    );
}

fn xargs_in_parallel() {
    shell("seq 1 12 | xargs -P 4 -n 1 sh -c 'echo item $0' | sort -k 2 -n");
}

fn make_in_parallel() {
    let folder = std::env::temp_dir().join(format!("dune-make-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let put = |name: &str, text: &str| std::fs::write(folder.join(name), text).expect("a file");
    put("a.c", "int a(void) { return 40; }\n");
    put("b.c", "int b(void) { return 2; }\n");
    put(
        "main.c",
        "#include <stdio.h>\nint a(void), b(void);\nint main(void) { printf(\"%d\\n\", a() + b()); }\n",
    );
    put(
        "Makefile",
        "p: main.o a.o b.o\n\tcc -o p main.o a.o b.o\n%.o: %.c\n\t@cc -c -O1 -o $@ $<\n",
    );
    let built = Command::new("make")
        .args(["-s", "-j2"])
        .current_dir(&folder)
        .status();
    println!("{:?}", built.map(|status| status.success()).ok());
    let output = Command::new(folder.join("p")).output();
    println!("{:?}", output.map(|output| output.stdout).ok());
    let _ = std::fs::remove_dir_all(&folder);
}

fn python_processes() {
    const SCRIPT: &str = "
import subprocess, threading, multiprocessing, os
print(subprocess.run(['echo', 'hi'], capture_output=True).stdout)
try: subprocess.run(['/nonexistent'])
except FileNotFoundError as error: print(error)
done = []
threads = [threading.Thread(target=lambda i=i: done.append(i)) for i in range(20)]
[t.start() for t in threads]; [t.join() for t in threads]
print(sorted(done))
context = multiprocessing.get_context('fork')
queue = context.Pipe()
def work(): queue[1].send(os.getppid() != os.getpid())
p = context.Process(target=work); p.start(); print(queue[0].recv()); p.join(); print(p.exitcode)
";
    let output = Command::new("python3").arg("-c").arg(SCRIPT).output();
    match output {
        Ok(output) => println!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(error) => println!("{error}"),
    }
}

fn git_history() {
    shell(
        "command -v git >/dev/null || exit 0; d=$(mktemp -d); cd $d && git init -q a && cd a && \
         git config user.email a@b && git config user.name n && echo x > f && git add f && \
         git commit -q -m first --date '2020-01-01T00:00:00Z' && cd .. && git clone -q a b && \
         git -C b log --format=%s; rm -rf $d",
    );
}
