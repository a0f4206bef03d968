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
