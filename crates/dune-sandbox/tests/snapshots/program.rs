//! The programs of the snapshot tests, run in the sandbox: what they do after
//! the marker must leave no trace after a return.

use std::ffi::c_void;
use std::io::{Read, Write};

const PAGE: usize = 4096;

/// Whether it began: the program must not see its own earlier runs.
static mut RUNS: u64 = 0;
/// Data, bss, and room for reads from files.
static mut DATA: [u64; 3 * PAGE / 8] = [7; 3 * PAGE / 8];
static mut BUFFER: [u8; 4 * PAGE] = [0; 4 * PAGE];

pub(crate) fn run(name: &str) -> ! {
    match name {
        "random" => random(),
        "echo" => echo(),
        "short" => short(),
        "nested" => nested(),
        "threads" => threads(),
        "threads_before" => threads_before(),
        "endless" => endless(),
        "endings" => endings(),
        "closed" => closed(),
        "elsewhere" => elsewhere(),
        "execve_race" => execve_race(),
        "vast" => vast(),
        "numbers" => numbers(),
        "limits" => limits(),
        "left_behind" => left_behind(),
        other => panic!("no program {other}"),
    }
}

/// Marks the place for a snapshot.
fn marker() {
    // SAFETY: an option that no kernel knows.
    let result = unsafe { libc::prctl(dune_sandbox::snapshot::MARKER_OPTION as i32, 0, 0, 0, 0) };
    assert_eq!(result, 0, "not served");
}

fn exit(status: i32) -> ! {
    // SAFETY: nothing is left to be done.
    unsafe { libc::_exit(status) }
}

fn input() -> Vec<u8> {
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).unwrap();
    bytes
}

/// As xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// What the program has before the marker.
struct World {
    /// Anonymous memory, with the number of its pages.
    maps: Vec<(*mut u8, usize)>,
    file: i32,
    heap: Vec<Vec<u8>>,
}

fn map(pages: usize, protection: i32) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: new memory.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, protection, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at.cast()
}

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

impl World {
    fn new() -> Self {
        let mut maps: Vec<_> = (0..6).map(|_| (map(8, RW), 8)).collect();
        maps.push((map(64, RW), 64));
        for &(at, pages) in &maps {
            for page in (0..pages).step_by(2) {
                // SAFETY: just mapped.
                unsafe { at.add(page * PAGE).write_bytes(page as u8 + 1, PAGE) };
            }
        }
        // One that cannot be read, and one that cannot be written.
        maps.push((map(4, libc::PROT_NONE), 4));
        let (read_only, _) = maps[1];
        // SAFETY: of the program's own.
        unsafe { libc::mprotect(read_only.cast(), 2 * PAGE, libc::PROT_READ) };
        let name = std::env::current_exe().unwrap();
        let name = std::ffi::CString::new(name.into_os_string().into_encoded_bytes()).unwrap();
        // SAFETY: a string.
        let file = unsafe { libc::open(name.as_ptr(), libc::O_RDONLY) };
        assert!(file >= 0);
        // SAFETY: no memory.
        unsafe { libc::lseek(file, 1000, libc::SEEK_SET) };
        // A private mapping of a file that can be written.
        // SAFETY: new memory.
        let of_file = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4 * PAGE,
                RW,
                libc::MAP_PRIVATE,
                file,
                0,
            )
        };
        assert_ne!(of_file, libc::MAP_FAILED);
        maps.push((of_file.cast(), 4));
        // And one that cannot be, yet.
        // SAFETY: new memory.
        let of_file = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4 * PAGE,
                libc::PROT_READ,
                libc::MAP_PRIVATE,
                file,
                0,
            )
        };
        maps.push((of_file.cast(), 4));
        Self {
            maps,
            file,
            heap: (0..50).map(|len| vec![len as u8; len * 100]).collect(),
        }
    }
}

extern "C" fn handler(_: i32) {}

/// Does at random whatever changes a program.
fn random() -> ! {
    let mut world = World::new();
    let mut signals = Vec::new();
    marker();
    // SAFETY: one thread.
    let runs = unsafe {
        RUNS += 1;
        RUNS
    };
    assert_eq!(runs, 1, "the program saw an earlier run");
    let seed = u64::from_le_bytes(input()[..8].try_into().unwrap());
    let mut random = Random(seed | 1);
    for _ in 0..5 + random.below(60) {
        step(&mut world, &mut random, &mut signals);
    }
    match random.below(4) {
        0 => std::process::abort(),
        // SAFETY: a crash is what is wanted.
        1 => unsafe { std::ptr::with_exposed_provenance_mut::<u8>(8).write_volatile(1) },
        _ => {}
    }
    exit(random.below(100) as i32)
}

fn step(world: &mut World, random: &mut Random, signals: &mut Vec<i32>) {
    let which = random.below(world.maps.len());
    let (at, pages) = world.maps[which];
    let page = random.below(pages);
    let count = 1 + random.below(pages - page);
    let start = at.wrapping_add(page * PAGE);
    let len = count * PAGE;
    let address = start.cast::<c_void>();
    let offset = random.below(3 * PAGE);
    // SAFETY: whatever it does, it does to itself, in areas of its own; writes
    // go to memory that was made writable just before.
    unsafe {
        match random.below(22) {
            0..=3 => {
                libc::mprotect(address, len, RW);
                for page in 0..count {
                    let place = start.add(page * PAGE + random.below(PAGE));
                    place.write(random.next() as u8);
                }
            }
            4 => {
                libc::munmap(address, len);
                // Nobody may write there until it is mapped again.
                remap(start, len, libc::PROT_NONE);
            }
            5 => remap(start, len, RW),
            6 => {
                libc::mprotect(address, len, random.below(4) as i32);
            }
            7 => {
                libc::mprotect(address, len, RW);
                // The kernel writes, not the program.
                libc::pread(world.file, address, len, offset as i64);
            }
            8 => {
                libc::read(world.file, (&raw mut BUFFER).cast(), 1 + offset);
            }
            9 => {
                libc::mprotect(address, len, RW);
                libc::madvise(address, len, libc::MADV_DONTNEED);
            }
            10 => {
                libc::mprotect(at.cast(), pages * PAGE, RW);
                let new = libc::mremap(
                    at.cast(),
                    pages * PAGE,
                    (pages + 3) * PAGE,
                    libc::MREMAP_MAYMOVE,
                );
                if new == libc::MAP_FAILED {
                    return;
                }
                world.maps[which] = (new.cast(), pages + 3);
            }
            11 => {
                let fresh = map(1 + random.below(20), RW);
                fresh.write_bytes(0xee, PAGE);
            }
            12 => {
                let grow = libc::sbrk(random.below(5 * PAGE) as isize);
                assert_ne!(grow.addr(), usize::MAX);
                libc::sbrk(-(random.below(2 * PAGE) as isize));
            }
            13 => {
                let place = &raw mut DATA[random.below(3 * PAGE / 8)];
                place.write_volatile(random.next());
                RUNS += 1;
            }
            14 => {
                let place = random.below(world.heap.len());
                world.heap[place] = vec![random.next() as u8; random.below(300_000)];
            }
            15 => {
                let signal = 10 + 2 * random.below(2) as i32;
                signals.push(signal);
                libc::signal(signal, handler as *const () as usize);
                libc::raise(signal);
            }
            16 => {
                let mut set: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&raw mut set);
                libc::sigaddset(&raw mut set, libc::SIGUSR1);
                libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
                libc::raise(libc::SIGUSR1);
            }
            17 => {
                libc::close(random.below(3) as i32);
                libc::dup2(world.file, 1 + random.below(20) as i32);
                libc::lseek(world.file, random.below(5000) as i64, libc::SEEK_SET);
            }
            18 => {
                let mut ends = [0; 2];
                libc::pipe(ends.as_mut_ptr());
                libc::fcntl(world.file, libc::F_SETFD, libc::FD_CLOEXEC);
            }
            19 => {
                libc::chdir(c"/".as_ptr());
                libc::umask(random.below(0o777) as u32);
                libc::alarm(1000);
            }
            20 => {
                // The extended state.
                let value = random.next();
                std::arch::asm!("movq xmm15, {}", in(reg) value);
                std::arch::asm!("movq mm3, {}", in(reg) value);
            }
            _ => {
                if random.below(8) == 0 {
                    fork();
                }
            }
        }
    }
}

unsafe fn remap(start: *mut u8, len: usize, protection: i32) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: in place of memory of the caller's.
    let new = unsafe { libc::mmap(start.cast(), len, protection, flags, -1, 0) };
    assert_eq!(new, start.cast());
}

/// A child that nobody waits for.
unsafe fn fork() {
    // SAFETY: the child does nothing but wait.
    unsafe {
        if libc::fork() == 0 {
            loop {
                libc::pause();
            }
        }
    }
}

/// Prints its input in capitals, and how often it did so.
fn echo() -> ! {
    let before = "before the marker\n";
    marker();
    let text = input();
    // SAFETY: one thread.
    let runs = unsafe {
        RUNS += 1;
        RUNS
    };
    print!(
        "{before}{runs}: {}",
        String::from_utf8_lossy(&text).to_uppercase()
    );
    std::io::stdout().flush().unwrap();
    exit(text.len() as i32)
}

/// As little as possible: a few pages, a mapping, a descriptor.
fn short() -> ! {
    let memory = map(16, RW);
    marker();
    // SAFETY: the program's own memory and descriptors.
    unsafe {
        for page in 0..10 {
            memory.add(page * PAGE).write(1);
        }
        if std::env::args().nth(2).is_some() {
            libc::munmap(memory.cast(), PAGE);
            libc::munmap(map(3, RW).cast(), PAGE);
            libc::dup(0);
        }
    }
    exit(0)
}

/// Comes by the marker three times, each time with more in its memory.
fn nested() -> ! {
    let memory = map(4, RW);
    for depth in 1..=3_u8 {
        // SAFETY: the program's own memory.
        unsafe {
            memory.write(depth);
            memory.add(PAGE * usize::from(depth)).write(depth);
            if depth == 2 {
                libc::munmap(memory.add(3 * PAGE).cast(), PAGE);
                remap(memory.add(3 * PAGE), PAGE, RW);
            }
        }
        marker();
        let input = input();
        // SAFETY: the program's own memory.
        let seen: Vec<u8> = unsafe { (0..4).map(|page| *memory.add(page * PAGE)).collect() };
        println!("{depth} {seen:?} {}", String::from_utf8_lossy(&input));
        // SAFETY: likewise.
        unsafe { memory.write_bytes(0x77, PAGE) };
    }
    exit(0)
}

/// Threads made in a run, which ends in one of them.
fn threads() -> ! {
    marker();
    let seed = input()[0];
    let busy = std::thread::spawn(|| {
        loop {
            std::hint::spin_loop();
        }
    });
    let _waits = std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_secs(1000)));
    let _ends = std::thread::spawn(move || match seed % 3 {
        0 => exit(30),
        1 => std::process::abort(),
        // SAFETY: a crash is what is wanted.
        _ => unsafe { std::ptr::with_exposed_provenance_mut::<u8>(8).write_volatile(1) },
    });
    if seed.is_multiple_of(2) {
        // SAFETY: the thread alone.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    let _ = busy.join();
    exit(31)
}

fn threads_before() -> ! {
    let _other = std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_secs(1000)));
    marker();
    exit(0)
}

fn endless() -> ! {
    marker();
    match input()[0] {
        0 => loop {
            std::hint::spin_loop();
        },
        1 => loop {
            // SAFETY: no memory.
            unsafe { libc::pause() };
        },
        _ => exit(0),
    }
}

/// As [`endless`], but the first thread has ended.
fn left_behind() -> ! {
    marker();
    let input = input()[0];
    let busy = std::thread::spawn(move || {
        loop {
            match input {
                0 => std::hint::spin_loop(),
                1 => std::thread::sleep(std::time::Duration::from_secs(1000)),
                _ => exit(0),
            }
        }
    });
    // SAFETY: the thread alone.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    let _ = busy.join();
    exit(1)
}

fn last_errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Has the kernel write where the program cannot, and discards what it cannot
/// write; and looks whether that came back.
fn closed() -> ! {
    let none = map(4, RW);
    let read_only = map(4, RW);
    let World { file, .. } = World::new();
    // Mappings of a file with contents of their own, which stay so.
    let of_file = || {
        let place = std::ptr::null_mut();
        // SAFETY: new memory.
        let at = unsafe { libc::mmap(place, 2 * PAGE, RW, libc::MAP_PRIVATE, file, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        at.cast::<u8>()
    };
    let (file_read_only, file_none) = (of_file(), of_file());
    let all = [
        (none, 4, 0x11, libc::PROT_NONE),
        (read_only, 4, 0x22, libc::PROT_READ),
        (file_read_only, 2, 0x33, libc::PROT_READ),
        (file_none, 2, 0x44, libc::PROT_NONE),
    ];
    for (at, pages, byte, rights) in all {
        // SAFETY: the program's own memory.
        unsafe {
            at.write_bytes(byte, pages * PAGE);
            libc::mprotect(at.cast(), pages * PAGE, rights);
        }
    }
    marker();
    match input()[0] {
        0 | 4 => {
            for at in [none, read_only, file_read_only, file_none] {
                let parts = [libc::iovec {
                    iov_base: at.cast(),
                    iov_len: PAGE,
                }];
                // SAFETY: the kernel writes nowhere.
                unsafe {
                    assert_eq!(libc::pread(file, at.cast(), PAGE, 0), -1);
                    assert_eq!(last_errno(), libc::EFAULT);
                    assert_eq!(libc::preadv(file, parts.as_ptr(), 1, 0), -1);
                    assert_eq!(last_errno(), libc::EFAULT);
                }
            }
            for at in [file_read_only, file_none] {
                // SAFETY: the program's own memory.
                let discarded = unsafe { libc::madvise(at.cast(), PAGE, libc::MADV_DONTNEED) };
                assert_eq!(discarded, 0);
            }
        }
        // SAFETY: the program's own memory; the kernel writes it while the
        // other thread waits.
        2 => unsafe {
            let mut ends = [0; 2];
            assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
            let address = none.addr();
            let waits = std::thread::spawn(move || {
                let at = std::ptr::with_exposed_provenance_mut::<c_void>(address);
                libc::read(ends[0], at, PAGE)
            });
            none.expose_provenance();
            std::thread::sleep(std::time::Duration::from_millis(300));
            libc::mprotect(none.cast(), PAGE, RW);
            assert_eq!(libc::write(ends[1], [0x99_u8; 64].as_ptr().cast(), 64), 64);
            assert_eq!(waits.join().unwrap(), 64);
            assert_eq!(none.read(), 0x99);
        },
        _ => {
            for (at, pages, byte, _) in all {
                // SAFETY: the program's own memory.
                unsafe {
                    libc::mprotect(at.cast(), pages * PAGE, libc::PROT_READ);
                    for offset in 0..pages * PAGE {
                        assert_eq!(at.add(offset).read(), byte, "{byte:#x} at {offset:#x}");
                    }
                }
            }
        }
    }
    exit(0)
}

/// Comes to the marker with threads beside it, and with one that is not the
/// first.
fn elsewhere() -> ! {
    marker();
    let run = input()[0];
    let _busy = std::thread::spawn(|| {
        loop {
            // SAFETY: a count that this thread alone changes.
            unsafe { BUFFER[0] = BUFFER[0].wrapping_add(1) };
        }
    });
    let _waits = std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_secs(1000)));
    let other = std::thread::spawn(|| {
        let option = dune_sandbox::snapshot::MARKER_OPTION as i32;
        // SAFETY: an option that no kernel knows.
        (unsafe { libc::prctl(option, 0, 0, 0, 0) }, last_errno())
    });
    assert_eq!(other.join().unwrap(), (-1, libc::EINVAL));
    if run < 3 {
        marker();
        exit(50)
    }
    exit(run.into())
}

/// One thread replaces the program while the first one ends it: mostly by
/// `exit_group`, and in some runs by a signal that comes during a long call, so
/// that the other thread is sure to wait when the run ends.
fn execve_race() -> ! {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;
    const LONG: usize = 64 << 20;
    static GO: AtomicBool = AtomicBool::new(false);
    let World { file, .. } = World::new();
    let long = map(LONG / PAGE, RW);
    marker();
    let number = input()[0];
    let by_signal = number.is_multiple_of(10);
    let delay = u64::from(number) * 40;
    // SAFETY: one thread, and the buffer's own length.
    unsafe { (&raw mut BUFFER).cast::<u8>().write_bytes(1, 4 * PAGE) };
    let _replaces = std::thread::spawn(move || {
        GO.store(true, Ordering::SeqCst);
        if by_signal {
            std::thread::sleep(Duration::from_millis(10));
        }
        let program = if by_signal {
            c"/bin/false"
        } else {
            c"/bin/true"
        };
        let arguments = [program.as_ptr(), std::ptr::null()];
        // SAFETY: strings.
        unsafe { libc::execv(program.as_ptr(), arguments.as_ptr()) };
        exit(60)
    });
    while !GO.load(Ordering::SeqCst) {
        std::hint::spin_loop();
    }
    if by_signal {
        // SAFETY: a timer, and memory of the program's.
        unsafe {
            let mut timer: libc::itimerval = std::mem::zeroed();
            timer.it_value.tv_usec = 5000;
            libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut());
            // Where one is over before the signal, the next is not.
            for _ in 0..100_000 {
                libc::pread(file, long.cast(), LONG, 0);
            }
        }
        exit(61)
    }
    for _ in 0..delay {
        std::hint::spin_loop();
    }
    exit(7)
}

/// Has more address space than the guard may set aside.
fn vast() -> ! {
    const PIECE: usize = 10 << 40;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let pieces: Vec<_> = (0..4)
        .map(|_| {
            let place = std::ptr::null_mut();
            // SAFETY: new memory.
            let at = unsafe { libc::mmap(place, PIECE, libc::PROT_NONE, flags, -1, 0) };
            assert_ne!(at, libc::MAP_FAILED);
            at
        })
        .collect();
    marker();
    if input()[0] % 2 == 1 {
        let arguments = [c"true".as_ptr(), std::ptr::null()];
        // SAFETY: strings.
        unsafe { libc::execv(c"/bin/true".as_ptr(), arguments.as_ptr()) };
        exit(60)
    }
    // SAFETY: the program's own memory.
    let outcomes = pieces.iter().map(|&at| unsafe { libc::munmap(at, PIECE) });
    let outcomes: Vec<_> = outcomes.collect();
    assert_eq!(last_errno(), libc::ENOMEM);
    assert_eq!(outcomes, [0, 0, 0, -1]);
    std::thread::spawn(|| ()).join().unwrap();
    exit(0)
}

fn limit_of(resource: u32) -> libc::rlimit {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: one limit.
    assert_eq!(unsafe { libc::getrlimit(resource, &raw mut limit) }, 0);
    limit
}

fn set_soft_limit(resource: u32, soft: u64) {
    let mut limit = limit_of(resource);
    limit.rlim_cur = soft;
    // SAFETY: one limit.
    assert_eq!(unsafe { libc::setrlimit(resource, &raw const limit) }, 0);
}

/// Gives up descriptors of the snapshot where the guard puts its own.
fn numbers() -> ! {
    const ABOVE: i32 = 250;
    const BELOW: i32 = 40;
    set_soft_limit(libc::RLIMIT_NOFILE, 300);
    for number in [ABOVE, BELOW] {
        // SAFETY: no memory.
        assert_eq!(unsafe { libc::dup2(1, number) }, number);
    }
    set_soft_limit(libc::RLIMIT_NOFILE, ABOVE as u64);
    marker();
    let run = input()[0];
    // SAFETY: no memory.
    let flags = [ABOVE, BELOW].map(|number| unsafe { libc::fcntl(number, libc::F_GETFD) });
    assert_eq!(flags, [0, 0]);
    assert_eq!(limit_of(libc::RLIMIT_NOFILE).rlim_cur, ABOVE as u64);
    let number = if run.is_multiple_of(2) { ABOVE } else { BELOW };
    set_soft_limit(libc::RLIMIT_NOFILE, number as u64);
    // SAFETY: no memory.
    assert_eq!(unsafe { libc::close(number) }, 0);
    // Each time more of them, so that not all have a virtual CPU that was there.
    let barrier = std::sync::Barrier::new(usize::from(run) + 1);
    std::thread::scope(|scope| {
        for _ in 0..=run {
            scope.spawn(|| barrier.wait());
        }
    });
    exit(0)
}

/// Lowers limits, and leaves a signal behind.
fn limits() -> ! {
    const LOWERED: [u32; 3] = [libc::RLIMIT_FSIZE, libc::RLIMIT_NOFILE, libc::RLIMIT_NPROC];
    let before = LOWERED.map(|resource| limit_of(resource).rlim_cur);
    marker();
    let now = LOWERED.map(|resource| limit_of(resource).rlim_cur);
    assert_eq!(now, before);
    let run = input()[0];
    if run == 0 {
        for resource in LOWERED {
            let limit = limit_of(resource);
            let lower = libc::rlimit {
                rlim_cur: 0,
                rlim_max: limit.rlim_max - 1,
            };
            // SAFETY: one limit.
            assert_eq!(unsafe { libc::setrlimit(resource, &raw const lower) }, -1);
            assert_eq!(last_errno(), libc::EPERM);
            set_soft_limit(resource, 0);
        }
    }
    if run == 1 {
        let blocked = 1_u64 << (libc::SIGALRM - 1);
        // SAFETY: sets and a timer, made for the calls.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&raw mut set, libc::SIGALRM);
            libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            let mut timer: libc::itimerval = std::mem::zeroed();
            timer.it_value.tv_usec = 10_000;
            libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut());
            let mut waiting = 0_u64;
            while waiting & blocked == 0 {
                let set = &raw mut waiting;
                libc::syscall(libc::SYS_rt_sigpending, set, size_of::<u64>());
            }
        }
    }
    exit(0)
}

/// Ends in every way there is.
fn endings() -> ! {
    marker();
    let which = input()[0];
    // SAFETY: the end of the program, one way or another.
    unsafe {
        match which {
            0 => exit(7),
            1 => libc::abort(),
            2 => {
                libc::raise(libc::SIGTERM);
            }
            3 => {
                libc::kill(libc::getpid(), libc::SIGKILL);
            }
            4 => {
                libc::alarm(1);
                loop {
                    libc::pause();
                }
            }
            5 => std::arch::asm!("ud2"),
            6 => {
                libc::syscall(libc::SYS_exit, 9);
            }
            7 => {
                libc::execl(
                    c"/bin/sh".as_ptr(),
                    c"sh".as_ptr(),
                    c"-c".as_ptr(),
                    c"exit 11".as_ptr(),
                    0,
                );
            }
            _ => exit(99),
        }
    }
    exit(98)
}
