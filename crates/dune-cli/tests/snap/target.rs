//! The programs of the tests: this test binary again, in the sandbox.

use std::io::Read as _;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};

/// Says what this process is, if it is not the harness.
pub(crate) const ROLE: &str = "DUNE_TEST_SNAP";

/// What the target's fork server says first: something that Dune does not know.
pub(crate) const HELLO: u32 = 0x1234_5678;

/// As afl-cc's; here for the one test that has Dune say hello.
#[unsafe(no_mangle)]
static __afl_map_size: AtomicU32 = AtomicU32::new(crate::fuzzer::MAP_BYTES as u32);

/// What this process was started for.
pub(crate) fn role() -> Option<ExitCode> {
    match std::env::var(ROLE).ok()?.as_str() {
        "marked" => marked(),
        "target" => target(),
        "saved" => saved(),
        other => panic!("no role {other}"),
    }
}

/// A place to stop at.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn snap_test_marker() {
    std::hint::black_box(());
}

/// Counts its runs, and prints its line.
fn marked() -> ! {
    static RUNS: AtomicU32 = AtomicU32::new(0);
    if std::env::args().nth(1).as_deref() == Some("call") {
        // SAFETY: an option that no kernel knows.
        unsafe { libc::prctl(0x6475_6e65, 0, 0, 0, 0) };
    }
    snap_test_marker();
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let runs = RUNS.fetch_add(1, Ordering::Relaxed) + 1;
    println!("{runs} {}", line.trim_end());
    std::process::exit(0);
}

/// Keeps something in every place that a saved program has, and looks at it.
fn saved() -> ! {
    let path = std::env::args().nth(1).unwrap();
    let mut file = std::fs::File::open(path).unwrap();
    let mut before = [0; 6];
    file.read_exact(&mut before).unwrap();
    let on_the_heap: Vec<u64> = (0..100_000).collect();
    std::env::set_current_dir("/usr").unwrap();
    let float = std::hint::black_box(1.5_f64);
    // SAFETY: an option that no kernel knows.
    unsafe { libc::prctl(0x6475_6e65, 0, 0, 0, 0) };
    let mut after = String::new();
    file.read_to_string(&mut after).unwrap();
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let sum: u64 = on_the_heap.iter().sum();
    let folder = std::env::current_dir().unwrap();
    println!(
        "{} {after} {} {sum} {} {}",
        String::from_utf8_lossy(&before),
        line.trim_end(),
        folder.display(),
        float * 2.0
    );
    // Threads need an id that is right, and handlers one that is called.
    let thread = std::thread::spawn(move || on_the_heap.len());
    assert_eq!(thread.join().unwrap(), 100_000);
    std::process::exit(7);
}

/// A map of branches, as the compiler's instrumentation fills it.
struct Map {
    at: *mut u8,
    before: usize,
}

impl Map {
    fn of_the_fuzzer() -> Self {
        let id: i32 = std::env::var("__AFL_SHM_ID").unwrap().parse().unwrap();
        // SAFETY: attaches the fuzzer's memory, wherever there is room.
        let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        assert_ne!(at as isize, -1, "{}", std::io::Error::last_os_error());
        Self {
            at: at.cast(),
            before: 0,
        }
    }

    fn here(&mut self, place: usize) {
        let index = (place ^ self.before) % crate::fuzzer::MAP_BYTES;
        let count = self.at.wrapping_add(index);
        // SAFETY: of the memory attached above, which is that large.
        let before = unsafe { count.read_volatile() };
        // SAFETY: likewise.
        unsafe { count.write_volatile(before.wrapping_add(1)) };
        self.before = place >> 1;
    }
}

/// The usual fork server: says hello, and has a child do each run.
fn fork_server() {
    let mut word = [0; 4];
    let hello = HELLO;
    // SAFETY: four bytes; the descriptors may not be there.
    let told = unsafe { libc::write(199, (&raw const hello).cast(), 4) };
    if told != 4 {
        return;
    }
    loop {
        // SAFETY: four bytes.
        if unsafe { libc::read(198, word.as_mut_ptr().cast(), 4) } != 4 {
            std::process::exit(1);
        }
        // SAFETY: one thread.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: nobody here holds them.
            unsafe { libc::close(198) };
            // SAFETY: likewise.
            unsafe { libc::close(199) };
            return;
        }
        let mut status = 0;
        // SAFETY: four bytes each.
        unsafe { libc::write(199, (&raw const child).cast(), 4) };
        // SAFETY: the kernel writes the status.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        // SAFETY: four bytes.
        unsafe { libc::write(199, (&raw const status).cast(), 4) };
    }
}

fn target() -> ! {
    /// What a run finds changed if one before it has left anything.
    static SEEN: AtomicU32 = AtomicU32::new(0);
    std::hint::black_box(&__afl_map_size);
    let mut map = Map::of_the_fuzzer();
    fork_server();
    snap_test_marker();
    let mut input = Vec::new();
    std::io::stdin().read_to_end(&mut input).unwrap();
    map.here(1000 + SEEN.fetch_add(1, Ordering::Relaxed) as usize);
    for &byte in &input {
        map.here(byte as usize * 17);
    }
    match input.as_slice() {
        // SAFETY: not safe at all.
        b"crash" => unsafe {
            std::ptr::null_mut::<u8>()
                .wrapping_add(16)
                .write_volatile(1)
        },
        b"abort" => std::process::abort(),
        b"exit" => std::process::exit(42),
        b"spin" => loop {
            std::hint::spin_loop();
        },
        b"wait" => loop {
            std::thread::sleep(std::time::Duration::from_secs(1000));
        },
        _ => {}
    }
    std::process::exit(0);
}
