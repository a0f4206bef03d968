//! Threads in Dune mode: made, ended, many, natively made, and going in and out.
#![expect(unsafe_code, reason = "pthreads")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "every call is libc's, with arguments made on the spot"
)]

mod common;

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;

use common::*;

fn a_thread_made_in_dune_mode_is_in_dune_mode() {
    enter();
    let answer = thread::spawn(|| {
        assert!(dune::is_inside());
        thread::spawn(dune::is_inside).join().unwrap()
    });
    assert!(answer.join().unwrap());
}

fn five_hundred_and_twelve_threads_live_at_once() {
    const COUNT: usize = 512;
    enter();
    let barrier = Arc::new(Barrier::new(COUNT + 1));
    let sum = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..COUNT as u64)
        .map(|n| {
            let (barrier, sum) = (Arc::clone(&barrier), Arc::clone(&sum));
            thread::Builder::new()
                .stack_size(64 << 10)
                .spawn(move || {
                    assert!(dune::is_inside());
                    barrier.wait();
                    sum.fetch_add(n, Ordering::Relaxed);
                    barrier.wait();
                    gettid()
                })
                .unwrap()
        })
        .collect();
    barrier.wait();
    assert!(vcpus() > COUNT, "{} vCPUs", vcpus());
    barrier.wait();
    let mut tids: Vec<i32> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    tids.sort_unstable();
    tids.dedup();
    assert_eq!(tids.len(), COUNT);
    assert_eq!(sum.load(Ordering::Relaxed), (0..COUNT as u64).sum::<u64>());
    // The vCPUs are used again, not made again.
    let before = vcpus();
    for _ in 0..COUNT {
        thread::spawn(|| ()).join().unwrap();
    }
    assert_eq!(vcpus(), before);
}

fn ten_thousand_threads_in_sequence_leave_nothing_behind() {
    enter();
    let count = Arc::new(AtomicU32::new(0));
    let run = |times: u32| {
        for _ in 0..times {
            let count = Arc::clone(&count);
            let thread = thread::spawn(move || count.fetch_add(1, Ordering::Relaxed));
            thread.join().unwrap();
        }
    };
    run(100);
    let before = (descriptors(), vcpus(), mappings());
    run(9_900);
    assert_eq!(count.load(Ordering::Relaxed), 10_000);
    let after = (descriptors(), vcpus(), mappings());
    assert_eq!(after.0, before.0, "descriptors");
    assert_eq!(after.1, before.1, "vCPUs");
    assert!(
        after.2 <= before.2 + 4,
        "mappings: {} then {}",
        before.2,
        after.2
    );
}

fn ten_thousand_entries_leave_nothing_behind() {
    enter();
    dune::leave();
    let before = (descriptors(), vcpus(), mappings());
    for n in 0..10_000 {
        enter();
        if n % 1000 == 0 {
            println!("{n}");
        }
        dune::leave();
        assert!(!dune::is_inside());
    }
    assert_eq!((descriptors(), vcpus()), (before.0, before.1));
    assert!(mappings() <= before.2 + 2);
}

fn native_threads_enter_and_end_again_and_again() {
    enter();
    dune::leave();
    let run = |times: u32| {
        for n in 0..times {
            thread::spawn(move || {
                assert!(!dune::is_inside());
                enter();
                // Half of them end in Dune mode.
                if n % 2 == 0 {
                    dune::leave();
                }
            })
            .join()
            .unwrap();
        }
    };
    run(20);
    let before = (descriptors(), vcpus());
    run(500);
    assert_eq!((descriptors(), vcpus()), before);
}

fn many_native_threads_enter_at_the_same_moment() {
    const COUNT: usize = 16;
    let barrier = Barrier::new(COUNT);
    thread::scope(|scope| {
        for _ in 0..COUNT {
            scope.spawn(|| {
                barrier.wait();
                for _ in 0..50 {
                    enter();
                    assert!(thread::spawn(dune::is_inside).join().unwrap());
                    dune::leave();
                    assert!(!dune::is_inside());
                }
            });
        }
    });
    assert_eq!(descriptors_named("kvm-vm"), 1);
}

fn a_thread_that_left_makes_native_threads() {
    enter();
    thread::spawn(|| {
        dune::leave();
        let native = thread::spawn(|| {
            assert!(!dune::is_inside());
            // No trace of the maker's own base.
            let mut gs = 1_u64;
            unsafe { libc::syscall(libc::SYS_arch_prctl, 0x1004, &raw mut gs) };
            assert_eq!(gs, 0);
            enter();
            assert!(thread::spawn(dune::is_inside).join().unwrap());
        });
        native.join().unwrap();
        assert!(!dune::is_inside());
        enter();
        dune::leave();
        enter();
    })
    .join()
    .unwrap();
    assert!(dune::is_inside());
}

fn native_and_dune_threads_work_together() {
    let (to_native, from_dune) = mpsc::channel::<u64>();
    let (to_dune, from_native) = mpsc::channel::<u64>();
    let native = thread::spawn(move || {
        for n in from_dune {
            assert!(!dune::is_inside());
            to_dune.send(n + 1).unwrap();
        }
    });
    enter();
    let mut n = 0;
    for _ in 0..2_000 {
        to_native.send(n).unwrap();
        n = from_native.recv().unwrap();
    }
    assert_eq!(n, 2_000);
    drop(to_native);
    native.join().unwrap();
}

thread_local! {
    static NOISY: Noisy = const { Noisy(Cell::new(None)) };
}

struct Noisy(Cell<Option<fn()>>);

impl Drop for Noisy {
    fn drop(&mut self) {
        if let Some(action) = self.0.get() {
            action();
        }
    }
}

static DESTROYED: AtomicU32 = AtomicU32::new(0);

fn thread_local_destructors_run() {
    enter();
    for inside_at_end in [true, false] {
        thread::spawn(move || {
            NOISY.with(|n| {
                n.0.set(Some(|| {
                    DESTROYED.fetch_add(1, Ordering::Relaxed);
                }));
            });
            if !inside_at_end {
                dune::leave();
            }
        })
        .join()
        .unwrap();
    }
    assert_eq!(DESTROYED.load(Ordering::Relaxed), 2);
}

fn destructors_may_enter_and_leave() {
    enter();
    let run = |times| {
        for n in 0..times {
            thread::spawn(move || {
                // Before the crate's own thread-local variable, and after it: destructors run
                // in the opposite order.
                let early = n % 2 == 0;
                let action: fn() = match n % 8 / 2 {
                    0 => dune::leave,
                    1 => enter,
                    2 => || {
                        dune::leave();
                        enter();
                    },
                    _ => || {
                        enter();
                        dune::leave();
                    },
                };
                if early {
                    NOISY.with(|noisy| noisy.0.set(Some(action)));
                }
                dune::leave();
                if n % 16 < 8 {
                    enter();
                }
                if !early {
                    NOISY.with(|noisy| noisy.0.set(Some(action)));
                }
            })
            .join()
            .unwrap();
        }
    };
    run(64);
    let before = (descriptors(), vcpus());
    run(320);
    assert_eq!((descriptors(), vcpus()), before);
}

fn pthread_exit_ends_a_thread_in_dune_mode() {
    type Body = extern "C" fn(*mut libc::c_void) -> *mut libc::c_void;
    type Unwinding = extern "C-unwind" fn(*mut libc::c_void) -> *mut libc::c_void;
    unsafe extern "C-unwind" {
        fn pthread_exit(result: *mut libc::c_void) -> !;
    }
    // Ends the thread by unwinding it.
    extern "C-unwind" fn body(argument: *mut libc::c_void) -> *mut libc::c_void {
        assert!(dune::is_inside());
        unsafe { pthread_exit(argument) }
    }
    let body: Body = unsafe { std::mem::transmute::<Unwinding, Body>(body) };
    enter();
    let run = |times: usize| {
        for n in 1..=times {
            let mut thread = 0;
            let argument = n as *mut libc::c_void;
            let made =
                unsafe { libc::pthread_create(&raw mut thread, ptr::null(), body, argument) };
            assert_eq!(made, 0);
            let mut result = ptr::null_mut();
            assert_eq!(unsafe { libc::pthread_join(thread, &raw mut result) }, 0);
            assert_eq!(result, argument);
        }
    };
    run(10);
    let before = vcpus();
    run(300);
    assert_eq!(vcpus(), before);
}

fn the_main_thread_may_end_before_the_others() {
    let ended = child(|| {
        enter();
        thread::spawn(|| {
            thread::sleep(std::time::Duration::from_millis(100));
            unsafe { libc::_exit(9) };
        });
        // SYS_exit and not pthread_exit, which would unwind through Rust.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
        1
    });
    assert_eq!(ended, Ended::Exited(9));
}

fn a_cancelled_thread_ends() {
    unsafe extern "C" {
        fn pthread_cancel(thread: libc::pthread_t) -> i32;
    }
    extern "C" fn sleeps(_: *mut libc::c_void) -> *mut libc::c_void {
        loop {
            unsafe { libc::pause() };
        }
    }
    enter();
    for _ in 0..20 {
        let mut thread = 0;
        let made =
            unsafe { libc::pthread_create(&raw mut thread, ptr::null(), sleeps, ptr::null_mut()) };
        assert_eq!(made, 0);
        thread::yield_now();
        assert_eq!(unsafe { pthread_cancel(thread) }, 0);
        let mut result = ptr::null_mut();
        assert_eq!(unsafe { libc::pthread_join(thread, &raw mut result) }, 0);
        assert_eq!(result as isize, -1, "PTHREAD_CANCELED");
    }
}

fn detached_threads_come_and_go() {
    enter();
    let left = Arc::new(AtomicU32::new(0));
    let run = |times: u32| {
        for _ in 0..times {
            left.fetch_add(1, Ordering::SeqCst);
            let theirs = Arc::clone(&left);
            drop(thread::spawn(move || theirs.fetch_sub(1, Ordering::SeqCst)));
            if left.load(Ordering::SeqCst) > 8 {
                thread::yield_now();
            }
        }
        eventually("all threads end", || left.load(Ordering::SeqCst) == 0);
        let tasks = || std::fs::read_dir("/proc/self/task").unwrap().count();
        eventually("all tasks end", || tasks() == 1);
    };
    run(500);
    let most = vcpus();
    assert!(most < 500, "{most} vCPUs");
    run(500);
    assert!(vcpus() <= most.max(64));
}

fn scoped_threads_share_the_stack() {
    enter();
    let mut numbers = vec![0_u64; 1000];
    for round in 1..=20 {
        thread::scope(|scope| {
            for chunk in numbers.chunks_mut(100) {
                scope.spawn(move || chunk.iter_mut().for_each(|n| *n += round));
            }
        });
    }
    assert!(numbers.iter().all(|n| *n == 210));
}

fn threads_get_their_makers_mask_in_a_storm_of_signals() {
    extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    enter();
    on_signal(libc::SIGALRM, libc::SA_RESTART, nothing);
    block(&[libc::SIGUSR2]);
    interval_timer(300);
    for n in 0..600 {
        if n % 2 == 0 {
            let mask = thread::spawn(blocked).join().unwrap();
            assert_eq!(mask, [libc::SIGUSR2], "thread {n}");
        } else if n % 20 == 1 {
            let ended = child(|| i32::from(blocked() != [libc::SIGUSR2]));
            assert_eq!(ended, Ended::Exited(0), "child {n}");
        }
        assert_eq!(blocked(), [libc::SIGUSR2], "after {n}");
    }
    interval_timer(0);
}

fn threads_are_made_and_ended_everywhere_at_once() {
    enter();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for n in 0..150_u32 {
                    let made = thread::spawn(move || {
                        if n.is_multiple_of(3) {
                            dune::leave();
                            enter();
                        }
                        n
                    });
                    assert_eq!(made.join().unwrap(), n);
                }
            });
        }
        scope.spawn(|| {
            dune::leave();
            while !stop.load(Ordering::Relaxed) {
                enter();
                dune::leave();
            }
        });
        thread::sleep(std::time::Duration::from_millis(200));
        stop.store(true, Ordering::Relaxed);
    });
}

dune_testing::tests! {
    smoke a_thread_made_in_dune_mode_is_in_dune_mode,
    ring0 five_hundred_and_twelve_threads_live_at_once, timeout 120,
    ring0 ten_thousand_threads_in_sequence_leave_nothing_behind, timeout 200,
    ring0 ten_thousand_entries_leave_nothing_behind, timeout 120,
    ring0 native_threads_enter_and_end_again_and_again,
    ring0 many_native_threads_enter_at_the_same_moment,
    ring0 a_thread_that_left_makes_native_threads,
    ring0 native_and_dune_threads_work_together,
    ring0 thread_local_destructors_run,
    ring0 destructors_may_enter_and_leave,
    ring0 pthread_exit_ends_a_thread_in_dune_mode,
    ring0 the_main_thread_may_end_before_the_others,
    ring0 a_cancelled_thread_ends,
    ring0 detached_threads_come_and_go,
    ring0 scoped_threads_share_the_stack,
    ring0 threads_get_their_makers_mask_in_a_storm_of_signals,
    smoke threads_are_made_and_ended_everywhere_at_once,
}
