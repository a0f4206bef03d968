//! A program whose system calls are interrupted by signals as often as can be:
//! threads that pass bytes through pipes and sleep, each shot at by another,
//! while a timer ticks. Nothing may get lost, and every answer must be one that
//! Linux gives.

#![expect(unsafe_code, reason = "raw calls, interrupted")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a structure made and used"
)]

use core::ffi::{c_int, c_long};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const THREADS: usize = 3;
const BYTES: usize = 600;

static SEEN: AtomicU64 = AtomicU64::new(0);
static DONE: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: c_int) {
    SEEN.fetch_add(1, Ordering::Relaxed);
}

/// Plays the program; its exit code tells whether all went well.
pub(crate) fn program() -> ExitCode {
    for signal in [libc::SIGUSR1, libc::SIGALRM] {
        install(signal);
    }
    tick();
    let pairs: Vec<_> = (0..THREADS).map(|_| std::thread::spawn(pass)).collect();
    let ids = wait_for_ids();
    let shooter = std::thread::spawn(move || {
        let mut shots = 0_u64;
        while !DONE.load(Ordering::Relaxed) {
            for id in &ids {
                shoot(*id);
                shots += 1;
            }
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        shots
    });
    let interrupted: u64 = pairs.into_iter().map(|pair| pair.join().unwrap_or(0)).sum();
    DONE.store(true, Ordering::Relaxed);
    let shots = shooter.join().unwrap_or(0);
    let seen = SEEN.load(Ordering::Relaxed);
    println!("{shots} shots, {seen} signals seen, {interrupted} calls interrupted");
    if seen > 100 && interrupted > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

static IDS: [AtomicU64; THREADS] = [const { AtomicU64::new(0) }; THREADS];

fn wait_for_ids() -> Vec<c_long> {
    loop {
        let ids: Vec<c_long> = IDS
            .iter()
            .map(|id| id.load(Ordering::Acquire) as c_long)
            .collect();
        if ids.iter().all(|id| *id != 0) {
            return ids;
        }
        std::thread::yield_now();
    }
}

fn install(signal: c_int) {
    // SAFETY: zero is a valid sigaction, and the handler adds to a number.
    unsafe {
        let mut action: libc::sigaction = core::mem::zeroed();
        action.sa_sigaction = note as *const () as usize;
        assert_eq!(
            libc::sigaction(signal, &raw const action, core::ptr::null_mut()),
            0
        );
    }
}

fn tick() {
    let every = libc::timeval {
        tv_sec: 0,
        tv_usec: 1500,
    };
    let timer = libc::itimerval {
        it_interval: every,
        it_value: every,
    };
    // SAFETY: there is a handler.
    let set =
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, core::ptr::null_mut()) };
    assert_eq!(set, 0);
}

fn shoot(id: c_long) {
    let pid = c_long::from(std::process::id());
    // SAFETY: there is a handler; a thread that has ended is not found.
    unsafe { libc::syscall(libc::SYS_tgkill, pid, id, c_long::from(libc::SIGUSR1)) };
}

/// Passes numbered bytes through a pipe, with vectors and without, asleep in
/// between; returns how many calls were interrupted.
fn pass() -> u64 {
    // SAFETY: no pointer.
    let id = unsafe { libc::syscall(libc::SYS_gettid) } as u64;
    let slot = IDS
        .iter()
        .find(|slot| {
            slot.compare_exchange(0, id, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        })
        .is_some();
    assert!(slot, "a thread too many");
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two descriptors.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    let mut interrupted = 0;
    let mut again = |what: &str, call: &dyn Fn() -> isize| loop {
        let done = call();
        if done >= 0 {
            return done;
        }
        let error = std::io::Error::last_os_error();
        assert_eq!(error.raw_os_error(), Some(libc::EINTR), "{what}: {error}");
        interrupted += 1;
    };
    for number in 0..BYTES {
        let sent = [number as u8, !(number as u8)];
        let vector = libc::iovec {
            iov_base: sent.as_ptr().cast_mut().cast(),
            iov_len: 2,
        };
        // SAFETY: the kernel reads two bytes.
        let done = again("writev", &|| unsafe {
            libc::writev(ends[1], &raw const vector, 1)
        });
        assert_eq!(done, 2);
        let mut got = [0_u8; 2];
        let into = got.as_mut_ptr();
        // SAFETY: the kernel writes two bytes.
        let done = again("read", &|| unsafe { libc::read(ends[0], into.cast(), 2) });
        assert_eq!((done, got), (2, sent));
        let nap = libc::timespec {
            tv_sec: 0,
            tv_nsec: 100_000,
        };
        // SAFETY: the kernel reads one timespec.
        let _ = again("nanosleep", &|| unsafe {
            libc::nanosleep(&raw const nap, core::ptr::null_mut()) as isize
        });
    }
    interrupted
}
