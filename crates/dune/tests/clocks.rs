//! Clocks: right in the guest, by the vDSO without an exit, and by system calls where the
//! vDSO cannot be used.
#![expect(
    unsafe_code,
    reason = "asks the kernel behind the standard library's back"
)]

use std::time::{Duration, Instant, SystemTime};

use dune::Options;

/// What the kernel says, whatever the vDSO does.
fn kernel_clock(clock: i32) -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel fills the structure.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, &raw mut time) };
    assert_eq!(result, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn library_clock(clock: i32) -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: libc fills the structure.
    assert_eq!(unsafe { libc::clock_gettime(clock, &raw mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn clocks_agree_and_advance() {
    for clock in [
        libc::CLOCK_REALTIME,
        libc::CLOCK_MONOTONIC,
        libc::CLOCK_BOOTTIME,
        libc::CLOCK_REALTIME_COARSE,
        libc::CLOCK_MONOTONIC_COARSE,
        libc::CLOCK_THREAD_CPUTIME_ID,
    ] {
        let mut last = Duration::ZERO;
        for _ in 0..200 {
            let before = kernel_clock(clock);
            let between = library_clock(clock);
            let after = kernel_clock(clock);
            assert!(
                before <= between && between <= after,
                "{clock}: {before:?} {between:?}"
            );
            assert!(between >= last);
            last = between;
        }
    }
    let start = (Instant::now(), SystemTime::now());
    std::thread::sleep(Duration::from_millis(30));
    assert!(start.0.elapsed() >= Duration::from_millis(30));
    assert!(start.1.elapsed().unwrap() >= Duration::from_millis(29));
    // SAFETY: no argument.
    let seconds = unsafe { libc::time(std::ptr::null_mut()) } as u64;
    assert!(
        kernel_clock(libc::CLOCK_REALTIME)
            .as_secs()
            .abs_diff(seconds)
            <= 1
    );
}

fn the_vdso_tells_the_time_in_the_guest() {
    dune::enter().unwrap();
    clocks_agree_and_advance();
    dune::leave();
    clocks_agree_and_advance();
}

fn system_calls_tell_the_time_where_the_vdso_cannot() {
    dune::enter_with(&Options::new().system_call_clocks()).unwrap();
    clocks_agree_and_advance();
    std::thread::spawn(clocks_agree_and_advance).join().unwrap();
    dune::leave();
    clocks_agree_and_advance();
    dune::enter().unwrap();
    clocks_agree_and_advance();
}

dune_testing::tests! {
    ring0 the_vdso_tells_the_time_in_the_guest,
    ring0 system_calls_tell_the_time_where_the_vdso_cannot,
}
