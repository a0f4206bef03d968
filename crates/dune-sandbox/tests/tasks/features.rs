//! Memory that is shared, moved, advised on and made of files; what a program sees of
//! itself; and what it is refused, as by a kernel that does not have it.

#![expect(unsafe_code, reason = "raw memory, and raw system calls")]
#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "small system calls side by side"
)]

use std::ffi::CStr;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;

use super::{Scenario, is_sandboxed};

pub(crate) const SCENARIOS: &[Scenario] = &[
    ("shared_memory", shared_memory),
    ("remapped_memory", remapped_memory),
    ("advised_memory", advised_memory),
    ("memory_files", memory_files),
    ("views_of_oneself", views_of_oneself),
    ("thread_identities", thread_identities),
    ("refused_cleanly", refused_cleanly),
];

const PAGE: usize = 4096;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Maps, or says why not.
fn map(len: usize, flags: i32, fd: i32) -> Result<*mut u8, i32> {
    // SAFETY: at an address of the kernel's choice.
    let at = unsafe { libc::mmap(ptr::null_mut(), len, READ_WRITE, flags, fd, 0) };
    if at == libc::MAP_FAILED {
        return Err(errno());
    }
    Ok(at.cast())
}

fn word(at: *mut u8, index: usize) -> &'static AtomicU64 {
    // SAFETY: scenarios ask for words of memory that they have mapped, and stays mapped.
    unsafe { &*at.cast::<AtomicU64>().add(index) }
}

/// Runs `work` in a child; its exit code.
fn in_child(work: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child does little and ends by `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let code = work();
        // SAFETY: nothing runs afterwards.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: one number.
    unsafe { libc::waitpid(child, &mut status, 0) };
    libc::WEXITSTATUS(status)
}

fn memory_file(name: &CStr, flags: u32) -> i32 {
    // SAFETY: a string that lives as long as the program.
    unsafe { libc::memfd_create(name.as_ptr(), flags) }
}

/// A counter that parent and child add to at once, and a futex between them.
fn shared_memory() {
    let anonymous = map(PAGE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1).expect("memory");
    let name = format!("/dune-test-{}\0", std::process::id());
    let name = CStr::from_bytes_with_nul(name.as_bytes()).expect("a name");
    // SAFETY: a string that lives here.
    let fd = unsafe { libc::shm_open(name.as_ptr(), libc::O_CREAT | libc::O_RDWR, 0o600) };
    // SAFETY: no memory, and the same string.
    let made = unsafe {
        (
            libc::ftruncate(fd, PAGE as i64),
            libc::shm_unlink(name.as_ptr()),
        )
    };
    println!("{} {made:?}", fd >= 0);
    let named = map(PAGE, libc::MAP_SHARED, fd).expect("memory");
    let private = map(PAGE, libc::MAP_PRIVATE, fd).expect("memory");
    word(private, 9).store(1, Ordering::SeqCst);
    for at in [anonymous, named] {
        let add = || {
            for _ in 0..1000 {
                word(at, 0).fetch_add(1, Ordering::SeqCst);
            }
        };
        let code = in_child(|| {
            add();
            word(private, 9).store(2, Ordering::SeqCst);
            5
        });
        add();
        println!("{code} {}", word(at, 0).load(Ordering::SeqCst));
    }
    let seen = (
        word(named, 9).load(Ordering::SeqCst),
        word(private, 9).load(Ordering::SeqCst),
    );
    println!("private: {seen:?}");
    // SAFETY: in the shared page.
    let futex = unsafe { &*anonymous.add(64).cast::<AtomicU32>() };
    let call = |operation: i32, value: u32| {
        // SAFETY: the futex's word; no time limit.
        unsafe { libc::syscall(libc::SYS_futex, futex.as_ptr(), operation, value, 0, 0, 0) }
    };
    // The child is woken by its parent, who sees its answer in the same page.
    // SAFETY: the child does little and ends by `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        while futex.load(Ordering::SeqCst) == 0 {
            call(libc::FUTEX_WAIT, 0);
        }
        word(anonymous, 1).store(44, Ordering::SeqCst);
        // SAFETY: nothing runs afterwards.
        unsafe { libc::_exit(6) };
    }
    thread::sleep(std::time::Duration::from_millis(30));
    futex.store(1, Ordering::SeqCst);
    call(libc::FUTEX_WAKE, 1);
    let mut status = 0;
    // SAFETY: one number.
    unsafe { libc::waitpid(child, &mut status, 0) };
    println!(
        "futex: {} {}",
        status >> 8,
        word(anonymous, 1).load(Ordering::SeqCst)
    );
}

fn remapped_memory() {
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let remap = |at: *mut u8, old: usize, new: usize, flags: i32, to: *mut u8| {
        // SAFETY: memory of this scenario.
        let moved = unsafe { libc::mremap(at.cast(), old, new, flags, to) };
        if moved == libc::MAP_FAILED {
            Err(errno())
        } else {
            Ok(moved.cast::<u8>())
        }
    };
    let at = map(4 * PAGE, private, -1).expect("memory");
    for page in 0..4 {
        word(at, page * 512).store(page as u64 + 1, Ordering::SeqCst);
    }
    let contents = |at: *mut u8, pages: usize| -> Vec<u64> {
        let words = (0..pages).map(|page| word(at, page * 512).load(Ordering::SeqCst));
        words.collect()
    };
    let grown = remap(
        at,
        4 * PAGE,
        3000 * PAGE,
        libc::MREMAP_MAYMOVE,
        ptr::null_mut(),
    );
    let grown = grown.expect("more memory");
    println!(
        "{:?} {}",
        contents(grown, 5),
        word(grown, 2999 * 512).load(Ordering::SeqCst)
    );
    let shrunk = remap(grown, 3000 * PAGE, 2 * PAGE, 0, ptr::null_mut());
    println!("{:?}", shrunk.map(|at| (at == grown, contents(at, 2))));
    let place = map(8 * PAGE, private, -1).expect("memory");
    word(place, 0).store(77, Ordering::SeqCst);
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let moved = remap(grown, 2 * PAGE, 2 * PAGE, flags, place);
    println!("{:?}", moved.map(|at| (at == place, contents(at, 3))));
    // What was moved away is not there any more.
    println!("{:?}", remap(grown, 2 * PAGE, PAGE, 0, ptr::null_mut()));
    println!("{:?}", remap(place, PAGE, PAGE, flags, place).map(drop));
}

fn advised_memory() {
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let at = map(64 * PAGE, private, -1).expect("memory");
    let advise = |at: *mut u8, len: usize, advice: i32| {
        // SAFETY: memory of this scenario, which it does not use meanwhile.
        let result = unsafe { libc::madvise(at.cast(), len, advice) };
        if result == 0 { Ok(()) } else { Err(errno()) }
    };
    for advice in [
        libc::MADV_POPULATE_WRITE,
        libc::MADV_WILLNEED,
        libc::MADV_HUGEPAGE,
        libc::MADV_NOHUGEPAGE,
        libc::MADV_COLD,
        libc::MADV_PAGEOUT,
        libc::MADV_FREE,
        libc::MADV_DONTNEED,
        12345,
    ] {
        word(at, 0).store(3, Ordering::SeqCst);
        let done = advise(at, 64 * PAGE, advice);
        let kept = word(at, 0).load(Ordering::SeqCst);
        // What MADV_FREE leaves is the kernel's choice.
        let kept = (advice != libc::MADV_FREE).then_some(kept);
        println!("{advice}: {done:?} {kept:?}");
    }
    word(at, 512).store(4, Ordering::SeqCst);
    println!("{:?}", advise(at, PAGE, libc::MADV_WIPEONFORK));
    word(at, 0).store(5, Ordering::SeqCst);
    let seen = in_child(|| {
        (word(at, 0).load(Ordering::SeqCst) * 10) as i32
            + word(at, 512).load(Ordering::SeqCst) as i32
    });
    println!("in a child: {seen}");
    // SAFETY: the middle of the memory.
    unsafe { libc::munmap(at.add(16 * PAGE).cast(), PAGE) };
    println!(
        "with a hole: {:?}",
        advise(at, 64 * PAGE, libc::MADV_DONTNEED)
    );
    println!(
        "not a page: {:?}",
        advise(at.wrapping_add(8), PAGE, libc::MADV_DONTNEED)
    );
}

fn memory_files() {
    let fd = memory_file(c"a file", libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
    // SAFETY: no memory.
    unsafe { libc::ftruncate(fd, 4 * PAGE as i64) };
    let first = map(4 * PAGE, libc::MAP_SHARED, fd).expect("memory");
    let second = map(4 * PAGE, libc::MAP_SHARED, fd).expect("memory");
    word(first, 700).store(6, Ordering::SeqCst);
    println!("twice: {}", word(second, 700).load(Ordering::SeqCst));
    let mut bytes = [0; 8];
    // SAFETY: the buffer is ours.
    let count = unsafe { libc::pread(fd, bytes.as_mut_ptr().cast(), 8, 5600) };
    println!("read: {count} {bytes:?}");
    // SAFETY: no memory.
    let seal = |seals: i32| unsafe { (libc::fcntl(fd, libc::F_ADD_SEALS, seals), errno()) };
    println!(
        "sealed against writing while mapped: {:?}",
        seal(libc::F_SEAL_WRITE)
    );
    println!(
        "sealed: {}",
        seal(libc::F_SEAL_SHRINK | libc::F_SEAL_GROW).0
    );
    // SAFETY: no memory.
    println!("{} {}", unsafe { libc::ftruncate(fd, 0) }, errno());
    // SAFETY: no memory.
    println!("{:#x}", unsafe { libc::fcntl(fd, libc::F_GET_SEALS) });
    let name = std::fs::read_link(format!("/proc/self/fd/{fd}"));
    println!("{:?}", name.ok());
    // A program that exists in memory only.
    let program = memory_file(c"program", 0);
    let bytes = std::fs::read("/bin/true").expect("a program");
    // SAFETY: the bytes live here.
    let written = unsafe { libc::write(program, bytes.as_ptr().cast(), bytes.len()) };
    println!("{}", written == bytes.len() as isize);
    let code = in_child(|| {
        let words = [c"true".as_ptr(), ptr::null()];
        // SAFETY: vectors that end by null.
        unsafe { libc::fexecve(program, words.as_ptr(), words[1..].as_ptr().cast()) };
        99
    });
    println!("run: {code}");
}

/// What `/proc/self` says is about the program, not about what runs it.
fn views_of_oneself() {
    let read =
        |name: &str| std::fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
    let own = std::env::current_exe().expect("the program");
    println!(
        "{}",
        std::fs::read_link("/proc/self/exe").is_ok_and(|exe| exe == own)
    );
    println!(
        "{:?}",
        read("cmdline").split('\0').skip(1).collect::<Vec<_>>()
    );
    println!(
        "{}",
        read("environ")
            .split('\0')
            .any(|one| one == "DUNE_TEST_ROLE=program")
    );
    println!("{}", read("comm").len() > 1);
    let place = |at: usize| {
        read("maps").lines().any(|line| {
            let range = line
                .split(' ')
                .next()
                .and_then(|range| range.split_once('-'));
            let number = |text| usize::from_str_radix(text, 16).unwrap_or(0);
            range.is_some_and(|(start, end)| (number(start)..number(end)).contains(&at))
        })
    };
    let (local, heap) = (0_u8, Box::new(0_u8));
    let mapped = map(PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1).expect("memory");
    println!(
        "{} {} {} {}",
        place((&raw const local).addr()),
        place((&raw const *heap).addr()),
        place(mapped.addr()),
        place(views_of_oneself as fn() as usize)
    );
    // SAFETY: the page is this scenario's.
    unsafe { libc::munmap(mapped.cast(), PAGE) };
    println!("{}", place(mapped.addr()));
    let status = read("status");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u32>().ok())
    };
    println!("{}", field("Pid:") == Some(std::process::id()));
    println!("{:?} {:?}", field("Threads:"), field("TracerPid:"));
    let stat = read("stat");
    let pid = stat.split(' ').next().and_then(|pid| pid.parse().ok());
    println!("{}", pid == Some(std::process::id()));
    println!("{}", read("limits").contains("Max open files"));
    println!(
        "{:?}",
        std::fs::read_link("/proc/self/cwd").ok() == std::env::current_dir().ok()
    );
    println!(
        "{:?}",
        std::fs::read_link("/proc/self")
            .ok()
            .map(|name| name == std::path::Path::new(&std::process::id().to_string()))
    );
}

/// The kernel clears the word and wakes who waits for it, also after it was given another.
fn thread_identities() {
    static WORD: AtomicU32 = AtomicU32::new(u32::MAX);
    let thread = thread::spawn(|| {
        // SAFETY: the word lives as long as the program.
        let tid = unsafe { libc::syscall(libc::SYS_set_tid_address, WORD.as_ptr()) };
        // SAFETY: no memory.
        let is_own = tid == unsafe { libc::syscall(libc::SYS_gettid) };
        WORD.store(tid as u32, Ordering::SeqCst);
        println!("{is_own}");
        // The library must not wait for the word that it gave: this thread ends by itself.
        // SAFETY: the thread is detached below, and nobody joins it.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    });
    loop {
        let value = WORD.load(Ordering::SeqCst);
        if value == 0 {
            break;
        }
        let second = libc::timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        // SAFETY: the futex's word and a time.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                WORD.as_ptr(),
                libc::FUTEX_WAIT,
                value,
                &second,
            )
        };
    }
    println!("cleared");
    std::mem::forget(thread);
}

/// What the sandbox does not have it refuses as a kernel without it does, at once, and the
/// program goes on. Natively nothing of it is tried: much of it would succeed.
fn refused_cleanly() {
    let refused = |name: &str, call: &dyn Fn() -> i64, expected: &[i32]| {
        if is_sandboxed() {
            let result = call();
            let errno = errno();
            assert!(
                result == -1 && expected.contains(&errno),
                "{name}: {result}, errno {errno}"
            );
        }
        println!("{name}: refused");
    };
    let none = 0_usize;
    for (name, flag) in [
        ("mount namespace", libc::CLONE_NEWNS),
        ("user namespace", libc::CLONE_NEWUSER),
        ("process namespace", libc::CLONE_NEWPID),
        ("network namespace", libc::CLONE_NEWNET),
        ("host name namespace", libc::CLONE_NEWUTS),
        ("IPC namespace", libc::CLONE_NEWIPC),
        ("cgroup namespace", libc::CLONE_NEWCGROUP),
    ] {
        let flags = libc::c_long::from(flag);
        // SAFETY: refused, or else the assertion ends both.
        let clone =
            || unsafe { libc::syscall(libc::SYS_clone, flags | 17, none, none, none, none) };
        refused(name, &clone, &[libc::EPERM]);
        // SAFETY: no memory.
        let unshare = || unsafe { libc::syscall(libc::SYS_unshare, flags) };
        refused(name, &unshare, &[libc::EPERM]);
        let arguments = [flag as u64, 0, 0, 0, 17, 0, 0, 0];
        // SAFETY: eight words, as the second argument says.
        let clone3 = || unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), 64_usize) };
        refused(name, &clone3, &[libc::EPERM]);
    }
    // SAFETY: no memory.
    let setns = || unsafe { libc::syscall(libc::SYS_setns, 0, none) };
    refused("another's namespace", &setns, &[libc::EPERM]);
    // SAFETY: no memory is named.
    let traced =
        || unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_TRACEME, none, none, none) };
    refused("being traced", &traced, &[libc::EPERM, libc::ENOSYS]);
    // SAFETY: likewise.
    let parent = || unsafe {
        libc::syscall(
            libc::SYS_ptrace,
            libc::PTRACE_ATTACH,
            libc::getppid(),
            none,
            none,
        )
    };
    refused("tracing", &parent, &[libc::EPERM, libc::ENOSYS]);
    let area = [0_u64; 8];
    // SAFETY: an area that is refused.
    let rseq =
        || unsafe { libc::syscall(libc::SYS_rseq, area.as_ptr(), 32_usize, 0, 0x5305_3053_u32) };
    refused("restartable sequences", &rseq, &[libc::ENOSYS]);
    // SAFETY: no memory.
    let personality = || unsafe { libc::syscall(libc::SYS_personality, 0x0040_0000) };
    refused(
        "memory that is executable unasked",
        &personality,
        &[libc::EINVAL],
    );
    // SAFETY: a null structure is refused before it is read.
    let ring = || unsafe { libc::syscall(libc::SYS_io_uring_setup, 8, none) };
    refused("rings", &ring, &[libc::ENOSYS]);
    // SAFETY: no memory.
    let faults = || unsafe { libc::syscall(libc::SYS_userfaultfd, 0) };
    refused("others' page faults", &faults, &[libc::ENOSYS]);
    // The program is whole: threads, children and memory as before.
    let sum: i32 = (0..4)
        .map(|n| thread::spawn(move || n))
        .map(|t| t.join().expect("its end"))
        .sum();
    println!("{sum} {}", in_child(|| 8));
    // Its own personality it may ask for, and choose where programs go.
    // SAFETY: no memory.
    let ask = |value: u32| unsafe { libc::syscall(libc::SYS_personality, value) };
    println!(
        "{} {} {:#x}",
        ask(u32::MAX),
        ask(0x0004_0000),
        ask(u32::MAX)
    );
}
