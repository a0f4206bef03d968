//! Threads: that they run, that they end, and that their races leave the guard
//! whole.

#![expect(unsafe_code, reason = "races on raw memory, and raw system calls")]
#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "small system calls side by side"
)]

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::{Scenario, is_sandboxed};

pub(crate) const SCENARIOS: &[Scenario] = &[
    ("signals_of_the_c_library", signals_of_the_c_library),
    ("five_hundred_at_once", five_hundred_at_once),
    ("two_thousand_in_sequence", two_thousand_in_sequence),
    ("mutex_and_condition", mutex_and_condition),
    ("local_storage", local_storage),
    ("a_fault_beside_others", a_fault_beside_others),
    ("handled_faults_beside_others", handled_faults_beside_others),
    ("unmapping_beside_readers", unmapping_beside_readers),
    ("fewer_rights_beside_writers", fewer_rights_beside_writers),
    ("exit_ends_all", exit_ends_all),
    (
        "exit_with_no_room_for_signals",
        exit_with_no_room_for_signals,
    ),
    ("abort_ends_all", abort_ends_all),
    ("the_leader_leaves_first", the_leader_leaves_first),
    ("exec_ends_the_others", exec_ends_the_others),
    ("signals_find_their_thread", signals_find_their_thread),
    (
        "process_signals_find_a_thread",
        process_signals_find_a_thread,
    ),
    ("masks_that_block_everything", masks_that_block_everything),
    ("waits_time_out", waits_time_out),
    ("robust_mutexes", robust_mutexes),
    ("identities", identities),
    ("refused_flags", refused_flags),
    ("flipped_vectors", flipped_vectors),
    ("flipped_paths", flipped_paths),
    ("flipped_arguments", flipped_arguments),
    ("memory_file_race", memory_file_race),
    ("rendered_view_race", rendered_view_race),
    ("descriptor_race", descriptor_race),
    ("hidden_threads", hidden_threads),
];

/// Above the program's part of the address space, in the sandbox: the guard's.
const GUARD: u64 = 0x7000_0000_0000;
const PAGE: usize = 4096;

/// Stops threads that only make things difficult.
struct Disturbance {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Disturbance {
    fn by(count: usize, work: impl Fn() + Send + Sync + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let work = Arc::new(work);
        let threads = (0..count)
            .map(|_| {
                let (stop, work) = (Arc::clone(&stop), Arc::clone(&work));
                thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        work();
                    }
                })
            })
            .collect();
        Self { stop, threads }
    }
}

impl Drop for Disturbance {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn map(pages: usize) -> *mut u8 {
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping.
    let at = unsafe { libc::mmap(ptr::null_mut(), pages * PAGE, rights, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at.cast()
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

fn handle(signal: i32, handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void)) {
    // SAFETY: an all-zero sigaction is one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handlers of this file are made for it.
    let result = unsafe { libc::sigaction(signal, &action, ptr::null_mut()) };
    assert_eq!(result, 0);
}

fn five_hundred_at_once() {
    const COUNT: usize = 512;
    let barrier = Arc::new(Barrier::new(COUNT));
    let threads: Vec<_> = (0..COUNT)
        .map(|number| {
            let barrier = Arc::clone(&barrier);
            thread::Builder::new()
                .stack_size(64 << 10)
                .spawn(move || {
                    barrier.wait();
                    number
                })
                .expect("a thread")
        })
        .collect();
    let sum: usize = threads
        .into_iter()
        .map(|t| t.join().expect("its end"))
        .sum();
    println!("{sum}");
}

fn two_thousand_in_sequence() {
    let mut sum = 0;
    for number in 0..2_000_u64 {
        sum += thread::spawn(move || number).join().expect("its end");
    }
    println!("{sum}");
}

fn mutex_and_condition() {
    const ROUNDS: u32 = 2_000;
    let shared = Arc::new((Mutex::new(0_u32), Condvar::new()));
    let other = Arc::clone(&shared);
    let thread = thread::spawn(move || turns(&other, 1, ROUNDS));
    turns(&shared, 0, ROUNDS);
    thread.join().expect("its end");
    println!("{}", shared.0.lock().expect("the count"));
}

fn turns((count, changed): &(Mutex<u32>, Condvar), parity: u32, rounds: u32) {
    for _ in 0..rounds {
        let mut count = count.lock().expect("the count");
        while *count % 2 != parity {
            count = changed.wait(count).expect("the count");
        }
        *count += 1;
        changed.notify_all();
    }
}

fn local_storage() {
    thread_local! { static MINE: Cell<u64> = const { Cell::new(0) } }
    let threads: Vec<_> = (1..=16_u64)
        .map(|number| {
            thread::spawn(move || {
                for _ in 0..200 {
                    MINE.with(|mine| mine.set(mine.get() + number));
                    thread::yield_now();
                }
                MINE.with(Cell::get)
            })
        })
        .collect();
    let values: Vec<u64> = threads
        .into_iter()
        .map(|t| t.join().expect("its end"))
        .collect();
    println!("{values:?} {}", MINE.with(Cell::get));
}

fn a_fault_beside_others() {
    let _spin = Disturbance::by(2, std::hint::spin_loop);
    let _wait = Disturbance::by(2, || thread::sleep(Duration::from_millis(1)));
    let thread = thread::spawn(|| {
        let at = map(1);
        // SAFETY: none: this is the fault that ends the program.
        unsafe {
            at.wrapping_add(PAGE * 1000)
                .wrapping_sub(PAGE * 1000)
                .write_volatile(1)
        };
        // SAFETY: likewise.
        unsafe { ptr::without_provenance_mut::<u8>(16).write_volatile(1) };
    });
    let _ = thread.join();
}

static LANDED: AtomicUsize = AtomicUsize::new(0);

/// Steps over the two bytes of `ud2`.
extern "C" fn step_over(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the third argument of a handler.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    context.uc_mcontext.gregs[libc::REG_RIP as usize] += 2;
    LANDED.fetch_add(1, Ordering::Relaxed);
}

fn handled_faults_beside_others() {
    handle(libc::SIGILL, step_over);
    let threads: Vec<_> = (0..4)
        .map(|_| {
            thread::spawn(|| {
                for _ in 0..250 {
                    // SAFETY: the handler steps over it.
                    unsafe { std::arch::asm!("ud2") };
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("its end");
    }
    println!("{}", LANDED.load(Ordering::Relaxed));
}

/// Where a reader that faults goes on: it ends its thread's look.
extern "C" fn give_up_reading(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the third argument of a handler.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let registers = &mut context.uc_mcontext.gregs;
    // The reader's instruction is two bytes long: `mov al, [rdi]`.
    registers[libc::REG_RIP as usize] += 2;
    registers[libc::REG_RAX as usize] = i64::from(FAULTED);
}

const FAULTED: u8 = 0xee;

/// Reads a byte, or [`FAULTED`] where there is none.
fn read_byte(at: *const u8) -> u8 {
    let value: u64;
    // SAFETY: a fault is stepped over by the handler.
    unsafe {
        std::arch::asm!("mov al, [rdi]", in("rdi") at, inout("rax") 0_u64 => value,
            options(nostack, readonly));
    }
    value as u8
}

/// A page is mapped, filled, unmapped, and something else mapped there: nobody
/// may ever see the old contents once the unmapping is done.
fn unmapping_beside_readers() {
    handle(libc::SIGSEGV, give_up_reading);
    // The pages beside it stay, so that nothing else finds room in its place.
    let at = map(3) as usize + PAGE;
    let ready = Arc::new(AtomicU64::new(0));
    let generation = Arc::new(AtomicU64::new(0));
    let stale = Arc::new(AtomicU64::new(0));
    let readers = {
        let (generation, stale) = (Arc::clone(&generation), Arc::clone(&stale));
        let ready = Arc::clone(&ready);
        Disturbance::by(2, move || {
            ready.fetch_add(1, Ordering::Relaxed);
            let before = generation.load(Ordering::SeqCst);
            let value = read_byte(ptr::with_exposed_provenance(at));
            // Odd: the page was gone before the read began.
            if before % 2 == 1 && generation.load(Ordering::SeqCst) == before && value != FAULTED {
                stale.fetch_add(1, Ordering::SeqCst);
            }
        })
    };
    while ready.load(Ordering::Relaxed) < 1_000 {
        thread::yield_now();
    }
    for _ in 0..300 {
        // SAFETY: the page is this scenario's.
        unsafe { libc::munmap(ptr::with_exposed_provenance_mut(at), PAGE) };
        generation.fetch_add(1, Ordering::SeqCst);
        for _ in 0..20 {
            std::hint::spin_loop();
        }
        generation.fetch_add(1, Ordering::SeqCst);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the place of the page.
        unsafe {
            libc::mmap(
                ptr::with_exposed_provenance_mut(at),
                PAGE,
                rights,
                flags,
                -1,
                0,
            );
            ptr::with_exposed_provenance_mut::<u8>(at).write_volatile(7);
        }
    }
    drop(readers);
    println!("stale: {}", stale.load(Ordering::SeqCst));
}

static REFUSED: AtomicBool = AtomicBool::new(false);

/// Steps over `mov [rdi], al`, two bytes.
extern "C" fn give_up_writing(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    REFUSED.store(true, Ordering::SeqCst);
    // SAFETY: the third argument of a handler.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    context.uc_mcontext.gregs[libc::REG_RIP as usize] += 2;
}

/// After `mprotect` has taken the right to write, the page does not change.
fn fewer_rights_beside_writers() {
    handle(libc::SIGSEGV, give_up_writing);
    let at = map(1) as usize;
    let counter = AtomicU64::new(0);
    let writers = Disturbance::by(2, move || {
        let value = counter.fetch_add(1, Ordering::Relaxed) as u8;
        // SAFETY: a fault is stepped over by the handler.
        unsafe {
            std::arch::asm!("mov [rdi], al", in("rdi") at, in("al") value, options(nostack));
        }
    });
    let mut changed = 0;
    for _ in 0..300 {
        let page: *mut u8 = ptr::with_exposed_provenance_mut(at);
        // SAFETY: the page is this scenario's.
        unsafe { libc::mprotect(page.cast(), PAGE, libc::PROT_READ) };
        // SAFETY: it can be read.
        let before = unsafe { page.read_volatile() };
        for _ in 0..200 {
            std::hint::spin_loop();
        }
        // SAFETY: likewise.
        changed += u32::from(unsafe { page.read_volatile() } != before);
        // SAFETY: as above.
        unsafe { libc::mprotect(page.cast(), PAGE, libc::PROT_READ | libc::PROT_WRITE) };
        thread::yield_now();
    }
    drop(writers);
    println!("changed: {changed}");
}

/// Threads in every state: in ring 3, in a call that waits, in a lock.
fn threads_in_every_state() {
    thread::spawn(|| {
        loop {
            std::hint::spin_loop();
        }
    });
    thread::spawn(|| {
        loop {
            thread::park();
        }
    });
    thread::spawn(|| {
        let mut ends = [0; 2];
        // SAFETY: two descriptors.
        unsafe { libc::pipe(ends.as_mut_ptr()) };
        let mut byte = 0_u8;
        // SAFETY: one byte, which never comes.
        unsafe { libc::read(ends[0], (&raw mut byte).cast(), 1) };
    });
    thread::sleep(Duration::from_millis(20));
}

fn exit_ends_all() {
    threads_in_every_state();
    let _ = thread::spawn(|| std::process::exit(7)).join();
}

/// However few signals may be queued, other threads learn of the end.
fn exit_with_no_room_for_signals() {
    threads_in_every_state();
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: a limit of this process.
    let set = unsafe { libc::setrlimit(libc::RLIMIT_SIGPENDING, &raw const none) };
    println!("{set}");
    std::process::exit(9);
}

fn abort_ends_all() {
    threads_in_every_state();
    let _ = thread::spawn(|| std::process::abort()).join();
}

fn the_leader_leaves_first() {
    // SAFETY: no memory.
    let leader = unsafe { libc::getpid() };
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        // SAFETY: no memory.
        let same = unsafe { libc::getpid() } == leader;
        println!("still there: {same}");
    });
    // SAFETY: the other thread owns nothing of this one.
    unsafe { libc::syscall(libc::SYS_exit, 3) };
}

fn exec_ends_the_others() {
    threads_in_every_state();
    println!("before");
    let thread = thread::spawn(|| {
        let script = c"[ $$ = $(sh -c 'echo $PPID') ] && echo pid kept; exit 5";
        let arguments = [c"sh".as_ptr(), c"-c".as_ptr(), script.as_ptr(), ptr::null()];
        // SAFETY: strings that live here.
        unsafe { libc::execv(c"/bin/sh".as_ptr(), arguments.as_ptr()) };
    });
    let _ = thread.join();
    println!("not reached");
}

static HANDLED_BY: AtomicI32 = AtomicI32::new(0);

fn tid() -> i32 {
    // SAFETY: no memory.
    unsafe { libc::syscall(libc::SYS_gettid) as i32 }
}

extern "C" fn note_thread(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    HANDLED_BY.store(tid(), Ordering::SeqCst);
}

fn await_handler() -> i32 {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        let by = HANDLED_BY.swap(0, Ordering::SeqCst);
        if by != 0 {
            return by;
        }
        thread::sleep(Duration::from_millis(1));
    }
    0
}

fn signals_find_their_thread() {
    handle(libc::SIGUSR1, note_thread);
    let (sender, tids) = std::sync::mpsc::channel();
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..3)
        .map(|number| {
            let (sender, stop) = (sender.clone(), Arc::clone(&stop));
            thread::spawn(move || {
                sender.send(tid()).expect("somebody listens");
                while !stop.load(Ordering::Relaxed) {
                    match number {
                        0 => std::hint::spin_loop(),
                        1 => thread::sleep(Duration::from_millis(100)),
                        _ => thread::yield_now(),
                    }
                }
            })
        })
        .collect();
    let mut right = 0;
    for _ in 0..3 {
        let tid = tids.recv().expect("a thread");
        for _ in 0..20 {
            // SAFETY: a signal that is handled.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, libc::SIGUSR1) };
            right += u32::from(await_handler() == tid);
        }
    }
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().expect("its end");
    }
    println!("right: {right}");
}

fn process_signals_find_a_thread() {
    handle(libc::SIGUSR1, note_thread);
    let (sender, tids) = std::sync::mpsc::channel();
    let stop = Arc::new(AtomicBool::new(false));
    let thread = {
        let stop = Arc::clone(&stop);
        thread::spawn(move || {
            sender.send(tid()).expect("somebody listens");
            while !stop.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(50));
            }
        })
    };
    let open = tids.recv().expect("a thread");
    // SAFETY: an all-zero set is the empty one, filled below.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is ours.
    unsafe { libc::sigaddset(&mut set, libc::SIGUSR1) };
    // SAFETY: likewise.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut()) };
    let mut right = 0;
    for _ in 0..20 {
        // SAFETY: a signal that is handled.
        unsafe { libc::kill(libc::getpid(), libc::SIGUSR1) };
        right += u32::from(await_handler() == open);
    }
    stop.store(true, Ordering::Relaxed);
    thread.join().expect("its end");
    println!("right: {right}");
}

/// Threads that block every signal, while they run and while they wait, end
/// with the program all the same.
fn masks_that_block_everything() {
    // SAFETY: a full set is all ones.
    let all: libc::sigset_t = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigfillset(&mut set);
        set
    };
    for waits in [false, true] {
        thread::spawn(move || {
            // SAFETY: the set is ours.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &all, ptr::null_mut()) };
            loop {
                if waits {
                    // SAFETY: the set is ours.
                    unsafe { libc::sigsuspend(&all) };
                }
            }
        });
    }
    thread::spawn(move || {
        loop {
            // SAFETY: no descriptors; the set is ours.
            unsafe { libc::ppoll(ptr::null_mut(), 0, ptr::null(), &all) };
        }
    });
    // The signal that the guard's own threads use is the program's as well.
    handle(64, note_thread);
    // SAFETY: a signal that is handled.
    unsafe { libc::raise(64) };
    println!("64 handled: {}", HANDLED_BY.load(Ordering::SeqCst) == tid());
    thread::sleep(Duration::from_millis(20));
    std::process::exit(9);
}

fn waits_time_out() {
    let word = AtomicI32::new(1);
    let wait = |expected: i32| {
        let limit = libc::timespec {
            tv_sec: 0,
            tv_nsec: 30_000_000,
        };
        let start = Instant::now();
        // SAFETY: the word and the time live here.
        let result = unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAIT,
                expected,
                &limit,
            )
        };
        (
            result,
            errno(),
            start.elapsed() >= Duration::from_millis(25),
        )
    };
    println!("{:?} {}", wait(1), wait(2).1);
}

/// `pthread_mutex_t` that tells of an owner that died.
fn robust_mutexes() {
    let shared = map(1) as usize;
    let mutex = move || ptr::with_exposed_provenance_mut::<libc::pthread_mutex_t>(shared);
    // SAFETY: room for a mutex, which nobody uses yet.
    unsafe {
        let mut attributes = std::mem::zeroed();
        libc::pthread_mutexattr_init(&mut attributes);
        libc::pthread_mutexattr_setrobust(&mut attributes, libc::PTHREAD_MUTEX_ROBUST);
        libc::pthread_mutex_init(mutex(), &attributes);
    }
    let held = Arc::new(Barrier::new(2));
    let other = Arc::clone(&held);
    let owner = thread::spawn(move || {
        // SAFETY: the mutex is there.
        unsafe { libc::pthread_mutex_lock(mutex()) };
        other.wait();
        thread::sleep(Duration::from_millis(20));
    });
    held.wait();
    // SAFETY: the mutex is there.
    let result = unsafe { libc::pthread_mutex_lock(mutex()) };
    println!("the owner died: {}", result == libc::EOWNERDEAD);
    owner.join().expect("its end");
}

fn identities() {
    let leader = tid();
    // SAFETY: no memory.
    println!("leader: {}", unsafe { libc::getpid() } == leader);
    let (mine, parent) = thread::spawn(|| {
        // SAFETY: no memory.
        (tid(), unsafe { libc::getpid() })
    })
    .join()
    .expect("its end");
    println!("other: {} {}", mine != leader, parent == leader);
    let count = || {
        std::fs::read_dir("/proc/self/task")
            .expect("its threads")
            .count()
    };
    let _two = Disturbance::by(2, || thread::sleep(Duration::from_millis(5)));
    // A thread that was joined may need a moment yet to be gone.
    let start = Instant::now();
    while count() > 3 && start.elapsed() < Duration::from_secs(5) {
        thread::yield_now();
    }
    println!("threads: {}", count());
}

/// The signal by which a C library tells its threads of `setuid` is the program's own, however
/// the guard makes threads: one without the C library, which sets nothing up for it.
fn signals_of_the_c_library() {
    const SETXID: i64 = 33;
    extern "C" fn work(_: *mut libc::c_void) -> i32 {
        // SAFETY: ends the thread.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
        0
    }
    let ignore = [libc::SIG_IGN as u64, 0, 0, 0];
    let stack: &'static mut [u128] = Box::leak(vec![0_u128; 4096].into());
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    // SAFETY: a structure of the kernel's, and a stack that is nobody else's.
    let results = unsafe {
        [
            libc::syscall(libc::SYS_rt_sigaction, SETXID, ignore.as_ptr(), 0, 8),
            libc::clone(
                work,
                stack.as_mut_ptr_range().end.cast(),
                flags,
                ptr::null_mut(),
            )
            .min(1)
            .into(),
            libc::syscall(libc::SYS_tkill, libc::syscall(libc::SYS_gettid), SETXID),
        ]
    };
    println!("{results:?}");
}

fn refused_flags() {
    let clone = |flags: i32| {
        // SAFETY: refused.
        let result = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        (result, errno())
    };
    println!("{:?}", clone(libc::CLONE_THREAD));
    println!("{:?}", clone(libc::CLONE_SIGHAND));
    println!("{:?}", clone(libc::CLONE_THREAD | libc::CLONE_VM));
}

/// Flips a word between a good and a hostile value, from another thread.
fn flip(word: &'static AtomicU64, good: u64, bad: u64) -> Disturbance {
    Disturbance::by(1, move || {
        for _ in 0..64 {
            word.store(bad, Ordering::Relaxed);
            word.store(good, Ordering::Relaxed);
        }
    })
}

/// Words that outlive every thread.
fn words(count: usize) -> &'static [AtomicU64] {
    Box::leak((0..count).map(|_| AtomicU64::new(0)).collect())
}

fn zero() -> std::fs::File {
    std::fs::File::open("/dev/zero").expect("zeroes")
}

/// `readv` into a vector whose base another thread flips to the guard's memory.
/// It fails or it reads into the program; the guard lives.
fn flipped_vectors() {
    use std::os::fd::AsRawFd;
    let target = map(1) as u64;
    let vector = words(2);
    vector[1].store(64, Ordering::Relaxed);
    let zero = zero();
    let flipping = flip(&vector[0], target, GUARD);
    let mut strange = 0;
    for _ in 0..3_000 {
        // SAFETY: the target is a page of this scenario's.
        let result = unsafe { libc::readv(zero.as_raw_fd(), vector.as_ptr().cast(), 1) };
        if result != 64 && !(result == -1 && errno() == libc::EFAULT) {
            strange += 1;
        }
    }
    drop(flipping);
    println!("strange: {strange}");
}

/// `open` of a path that another thread rewrites.
fn flipped_paths() {
    let path = words(2);
    let text = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes);
    path[0].store(text(b"/dev/nul"), Ordering::Relaxed);
    let flipping = flip(&path[1], text(b"l\0\0\0\0\0\0\0"), text(b"lxxxxxxx"));
    let mut strange = 0;
    for _ in 0..1_000 {
        // SAFETY: a string with an end, at the latest behind the words... or not.
        let fd = unsafe { libc::open(path.as_ptr().cast(), libc::O_RDONLY) };
        if fd >= 0 {
            // SAFETY: just opened.
            unsafe { libc::close(fd) };
        } else if errno() != libc::ENOENT && errno() != libc::ENAMETOOLONG {
            strange += 1;
        }
    }
    drop(flipping);
    println!("strange: {strange}");
}

/// `execve` whose arguments another thread flips to the guard's memory: it
/// fails, or the new program gets what was checked.
fn flipped_arguments() {
    let good = c"good".as_ptr() as u64;
    let arguments = words(3);
    arguments[0].store(c"echo".as_ptr() as u64, Ordering::Relaxed);
    arguments[1].store(good, Ordering::Relaxed);
    let flipping = flip(&arguments[1], good, GUARD);
    let none: [*const libc::c_char; 1] = [ptr::null()];
    for _ in 0..200 {
        // SAFETY: there is no such program.
        unsafe {
            libc::execve(
                c"/nonexistent".as_ptr(),
                arguments.as_ptr().cast(),
                none.as_ptr(),
            )
        };
        assert!(matches!(errno(), libc::ENOENT | libc::EFAULT));
    }
    // Whatever is read here is a string of the program.
    loop {
        // SAFETY: the new program prints its argument.
        unsafe {
            libc::execve(
                c"/bin/echo".as_ptr(),
                arguments.as_ptr().cast(),
                none.as_ptr(),
            )
        };
        if errno() != libc::EFAULT {
            break;
        }
    }
    drop(flipping);
    println!("not reached");
}

/// `/proc/self/mem` must not be usable even for a moment: another thread tries
/// to write through every descriptor that appears.
fn memory_file_race() {
    if std::fs::File::open("/proc/self/mem").is_ok() {
        // Natively it is there.
        println!("reached: 0");
        return;
    }
    let reached = Arc::new(AtomicU64::new(0));
    let secret: &'static AtomicU64 = Box::leak(Box::new(AtomicU64::new(1)));
    let thieves = {
        let reached = Arc::clone(&reached);
        Disturbance::by(2, move || {
            for fd in 3..8 {
                let value = 2_u64;
                let at = secret.as_ptr() as i64;
                // SAFETY: eight bytes; where they go is the question.
                let written = unsafe { libc::pwrite(fd, (&raw const value).cast(), 8, at) };
                if written == 8 {
                    reached.fetch_add(1, Ordering::SeqCst);
                }
            }
        })
    };
    for path in [c"/proc/self/mem", c"/proc/thread-self/mem"] {
        for _ in 0..500 {
            // SAFETY: a constant string.
            let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDWR) };
            assert!(fd < 0, "{path:?} was opened");
        }
    }
    drop(thieves);
    println!(
        "reached: {}",
        reached.load(Ordering::SeqCst) + secret.load(Ordering::SeqCst) - 1
    );
}

/// While `/proc/self/maps` is opened, other threads put a name of the true file in the place of
/// every descriptor that appears: none of the lines that the program is not to see may be had.
fn rendered_view_race() {
    let view = std::fs::read_to_string("/proc/self/maps").expect("the own mappings");
    let stack = view.lines().find(|line| line.ends_with("[stack]"));
    let (_, top) = range_of(stack.expect("a stack"));
    // Natively the kernel's own are there.
    let is_foreign = move |line: &str| range_of(line).0 >= top && is_sandboxed();

    // Far from the numbers that appear.
    const AWAY: i32 = 100;
    // SAFETY: a constant string, and no memory.
    let name = unsafe {
        let name = libc::open(c"/proc/self/maps".as_ptr(), libc::O_PATH);
        let away = libc::fcntl(name, libc::F_DUPFD, AWAY);
        libc::close(name);
        away
    };
    assert!(name >= AWAY, "a name of the file");
    let replacing = Disturbance::by(2, move || {
        for fd in 3..8 {
            // SAFETY: no memory.
            unsafe {
                libc::dup2(name, fd);
                libc::close(fd);
            }
        }
    });
    let mut foreign = 0;
    let mut seen = 0;
    for _ in 0..300 {
        // SAFETY: a constant string.
        let file = unsafe { libc::open(c"/proc/self/maps".as_ptr(), libc::O_RDONLY) };
        let mut text = vec![0_u8; 1 << 16];
        let mut len = 0;
        // Until its end, or until it is replaced by what cannot be read.
        while len < text.len() {
            let rest = &mut text[len..];
            // SAFETY: the rest of the buffer, with its length.
            let count = unsafe { libc::read(file, rest.as_mut_ptr().cast(), rest.len()) };
            if count <= 0 {
                break;
            }
            len += count as usize;
        }
        let text = String::from_utf8_lossy(&text[..len]);
        seen += u32::from(!text.is_empty());
        foreign += text.lines().filter(|line| is_foreign(line)).count();
        // SAFETY: no memory.
        unsafe { libc::close(file) };
    }
    drop(replacing);
    println!("foreign: {foreign}, some seen: {}", seen > 0);
}

/// The first address of a line of `maps`, and the one after its last.
fn range_of(line: &str) -> (u64, u64) {
    let range = line.split(' ').next().unwrap_or_default();
    let (start, end) = range.split_once('-').unwrap_or_default();
    let address = |text| u64::from_str_radix(text, 16).unwrap_or_default();
    (address(start), address(end))
}

/// Threads come while others copy every descriptor that appears: no copy of a
/// virtual CPU may be had.
fn descriptor_race() {
    let copies = Arc::new(Mutex::new(Vec::<i32>::new()));
    let thieves = {
        let copies = Arc::clone(&copies);
        Disturbance::by(2, move || {
            for fd in 3..8 {
                // SAFETY: no memory.
                let copy = unsafe { libc::dup(fd) };
                if copy >= 0 {
                    copies.lock().expect("the copies").push(copy);
                }
            }
        })
    };
    for _ in 0..20 {
        // The guard has it read by a thread of its own. The copies may have used
        // up all numbers.
        drop(std::fs::read("/proc/self/stat"));
        let barrier = Arc::new(Barrier::new(8));
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let barrier = Arc::clone(&barrier);
                thread::spawn(move || {
                    barrier.wait();
                })
            })
            .collect();
        for thread in threads {
            thread.join().expect("its end");
        }
    }
    drop(thieves);
    let names: Vec<_> = copies
        .lock()
        .expect("the copies")
        .iter()
        .filter_map(|fd| std::fs::read_link(format!("/proc/self/fd/{fd}")).ok())
        .filter(|name| name.to_string_lossy().contains("kvm"))
        .collect();
    println!("{names:?}");
}

/// Threads of the process that the program did not make cannot be signalled.
fn hidden_threads() {
    // SAFETY: no memory.
    let pid = unsafe { libc::getpid() };
    let mut others = 0;
    for tid in pid - 50..pid + 200 {
        // SAFETY: no signal is sent.
        let there = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, 0) } == 0;
        others += u32::from(there && tid != pid);
    }
    println!("others: {others}");
}
