//! Signals in Dune mode: handlers, stacks, masks, order, and none that is lost.
#![expect(unsafe_code, reason = "sigaction, ucontext and faults on purpose")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "every call is libc's, with arguments made on the spot"
)]

mod common;

use std::arch::{asm, naked_asm};
use std::io::{Read, Write};
use std::os::unix::thread::JoinHandleExt;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use common::*;

type Info = *mut libc::siginfo_t;
type Context = *mut libc::c_void;

fn registers(context: Context) -> &'static mut [i64; 23] {
    unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs }
}

static COUNT: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: i32, _: Info, _: Context) {
    COUNT.fetch_add(1, Ordering::SeqCst);
}

fn counted() -> u64 {
    COUNT.load(Ordering::SeqCst)
}

/// What a handler saw.
struct Seen {
    signal: AtomicI32,
    code: AtomicI32,
    pid: AtomicI32,
    value: AtomicUsize,
    address: AtomicUsize,
    error: AtomicU64,
    trap: AtomicU64,
    inside: AtomicBool,
    times: AtomicU32,
}

static SEEN: Seen = Seen {
    signal: AtomicI32::new(0),
    code: AtomicI32::new(0),
    pid: AtomicI32::new(0),
    value: AtomicUsize::new(0),
    address: AtomicUsize::new(0),
    error: AtomicU64::new(0),
    trap: AtomicU64::new(0),
    inside: AtomicBool::new(false),
    times: AtomicU32::new(0),
};

impl Seen {
    fn take(&self, info: Info, context: Context) {
        let info = unsafe { &*info };
        self.signal.store(info.si_signo, Ordering::SeqCst);
        self.code.store(info.si_code, Ordering::SeqCst);
        self.pid.store(unsafe { info.si_pid() }, Ordering::SeqCst);
        self.value.store(
            unsafe { info.si_value() }.sival_ptr as usize,
            Ordering::SeqCst,
        );
        self.address
            .store(unsafe { info.si_addr() } as usize, Ordering::SeqCst);
        let registers = registers(context);
        self.error
            .store(registers[libc::REG_ERR as usize] as u64, Ordering::SeqCst);
        self.trap.store(
            registers[libc::REG_TRAPNO as usize] as u64,
            Ordering::SeqCst,
        );
        self.inside.store(dune::is_inside(), Ordering::SeqCst);
        self.times.fetch_add(1, Ordering::SeqCst);
    }
}

extern "C" fn see(_: i32, info: Info, context: Context) {
    SEEN.take(info, context);
}

fn queue(pid: i32, signal: i32, value: usize) {
    let value = libc::sigval {
        sival_ptr: value as *mut _,
    };
    assert_eq!(
        unsafe { libc::sigqueue(pid, signal, value) },
        0,
        "errno {}",
        errno()
    );
}

fn handlers_are_told_who_sent_the_signal() {
    enter();
    on_signal(libc::SIGUSR1, 0, see);
    queue(getpid(), libc::SIGUSR1, 0x1234_5678_9abc);
    assert_eq!(SEEN.signal.load(Ordering::SeqCst), libc::SIGUSR1);
    assert_eq!(SEEN.code.load(Ordering::SeqCst), libc::SI_QUEUE);
    assert_eq!(SEEN.pid.load(Ordering::SeqCst), getpid());
    assert_eq!(SEEN.value.load(Ordering::SeqCst), 0x1234_5678_9abc);
    assert!(SEEN.inside.load(Ordering::SeqCst));
    kill(getpid(), libc::SIGUSR1);
    assert_eq!(SEEN.code.load(Ordering::SeqCst), libc::SI_USER);
    raise(libc::SIGUSR1);
    assert_eq!(SEEN.code.load(Ordering::SeqCst), libc::SI_TKILL);
    let parent = getpid();
    let pid = fork(|| {
        kill(parent, libc::SIGUSR1);
        0
    });
    assert_eq!(wait(pid), Ended::Exited(0));
    eventually("the child's signal", || {
        SEEN.times.load(Ordering::SeqCst) == 4
    });
    assert_eq!(SEEN.pid.load(Ordering::SeqCst), pid);
}

fn a_handler_installed_before_entry_runs_inside() {
    on_signal(libc::SIGUSR1, 0, see);
    raise(libc::SIGUSR1);
    assert!(!SEEN.inside.load(Ordering::SeqCst));
    enter();
    raise(libc::SIGUSR1);
    assert!(SEEN.inside.load(Ordering::SeqCst));
    dune::leave();
    raise(libc::SIGUSR1);
    assert!(!SEEN.inside.load(Ordering::SeqCst));
    assert_eq!(SEEN.times.load(Ordering::SeqCst), 3);
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    enter();
    unsafe { libc::sigaction(libc::SIGUSR1, ptr::null(), &raw mut action) };
    assert_eq!(action.sa_sigaction, see as *const () as usize);
    assert_eq!(action.sa_flags & libc::SA_SIGINFO, libc::SA_SIGINFO);
}

fn one_shot_and_plain_handlers() {
    enter();
    on_signal(libc::SIGUSR1, libc::SA_RESETHAND, count);
    raise(libc::SIGUSR1);
    assert_eq!(counted(), 1);
    let ended = child(|| {
        raise(libc::SIGUSR1);
        0
    });
    assert_eq!(ended, Ended::Killed(libc::SIGUSR1));
    disposition(libc::SIGUSR1, libc::SIG_IGN);
    raise(libc::SIGUSR1);
    disposition(libc::SIGUSR1, count as *const () as usize);
    raise(libc::SIGUSR1);
    assert_eq!(counted(), 2);
}

/// A thread that sends this one a signal after a while, until it is dropped.
fn later(signal: i32) -> impl Drop {
    struct Sender(Arc<AtomicBool>);
    impl Drop for Sender {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let stop = Arc::new(AtomicBool::new(false));
    let (theirs, thread) = (Arc::clone(&stop), unsafe { libc::pthread_self() });
    thread::spawn(move || {
        loop {
            thread::sleep(Duration::from_millis(30));
            if theirs.load(Ordering::SeqCst) {
                break;
            }
            unsafe { libc::pthread_kill(thread, signal) };
        }
    });
    Sender(stop)
}

fn calls_are_interrupted_or_restarted_as_asked() {
    enter();
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    on_signal(libc::SIGUSR1, 0, count);
    {
        let _sender = later(libc::SIGUSR1);
        let error = unsafe {
            use std::os::fd::AsRawFd;
            let mut byte = 0_u8;
            let result = libc::read(reader.as_raw_fd(), (&raw mut byte).cast(), 1);
            assert_eq!(result, -1);
            errno()
        };
        assert_eq!(error, libc::EINTR);
        assert!(counted() >= 1);
    }
    thread::sleep(Duration::from_millis(80));
    on_signal(libc::SIGUSR1, libc::SA_RESTART, count);
    let before = counted();
    let _sender = later(libc::SIGUSR1);
    let feeder = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        writer.write_all(b"x").unwrap();
    });
    use std::os::fd::AsRawFd;
    let mut byte = 0_u8;
    let result = unsafe { libc::read(reader.as_raw_fd(), (&raw mut byte).cast(), 1) };
    assert_eq!((result, byte), (1, b'x'));
    assert!(counted() > before);
    // Never restarted, whatever was asked.
    let pause = libc::timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    let mut left = pause;
    let start = Instant::now();
    let result = unsafe { libc::nanosleep(&raw const pause, &raw mut left) };
    assert_eq!((result, errno()), (-1, libc::EINTR));
    assert!(left.tv_sec >= 10 && start.elapsed() < Duration::from_secs(10));
    feeder.join().unwrap();
    drop(reader.read(&mut []));
}

static STACK_POINTER: AtomicUsize = AtomicUsize::new(0);
static STACK_FLAGS: AtomicI32 = AtomicI32::new(-1);
static NESTED_POINTER: AtomicUsize = AtomicUsize::new(0);

fn current_stack() -> libc::stack_t {
    let mut stack: libc::stack_t = unsafe { std::mem::zeroed() };
    assert_eq!(unsafe { libc::sigaltstack(ptr::null(), &raw mut stack) }, 0);
    stack
}

fn set_stack(base: *mut u8, size: usize, flags: i32) -> i32 {
    let stack = libc::stack_t {
        ss_sp: base.cast(),
        ss_flags: flags,
        ss_size: size,
    };
    if unsafe { libc::sigaltstack(&raw const stack, ptr::null_mut()) } == 0 {
        0
    } else {
        errno()
    }
}

extern "C" fn look_at_stack(_: i32, _: Info, _: Context) {
    let here = 0_u8;
    if STACK_POINTER.swap(&raw const here as usize, Ordering::SeqCst) == 0 {
        STACK_FLAGS.store(current_stack().ss_flags, Ordering::SeqCst);
        // A second signal in the handler stays on the stack and goes on below.
        raise(libc::SIGUSR2);
    }
}

extern "C" fn look_nested(_: i32, _: Info, _: Context) {
    let here = 0_u8;
    NESTED_POINTER.store(&raw const here as usize, Ordering::SeqCst);
}

fn alternate_stacks_are_used() {
    const SIZE: usize = 64 << 10;
    enter();
    let base = map(SIZE, READ_WRITE);
    let range = base as usize..base as usize + SIZE;
    assert_eq!(current_stack().ss_flags & libc::SS_ONSTACK, 0);
    assert_eq!(set_stack(base, SIZE, 0), 0);
    assert_eq!(current_stack().ss_sp, base.cast());
    on_signal(libc::SIGUSR1, libc::SA_ONSTACK, look_at_stack);
    on_signal(libc::SIGUSR2, libc::SA_ONSTACK, look_nested);
    for _ in 0..3 {
        STACK_POINTER.store(0, Ordering::SeqCst);
        raise(libc::SIGUSR1);
        let first = STACK_POINTER.load(Ordering::SeqCst);
        let nested = NESTED_POINTER.load(Ordering::SeqCst);
        assert!(range.contains(&first) && range.contains(&nested));
        assert!(nested < first);
        assert_eq!(STACK_FLAGS.load(Ordering::SeqCst), libc::SS_ONSTACK);
        assert_eq!(current_stack().ss_flags, 0);
    }
    // Without the flag the handler stays where the program is.
    on_signal(libc::SIGUSR1, 0, look_nested);
    raise(libc::SIGUSR1);
    assert!(!range.contains(&NESTED_POINTER.load(Ordering::SeqCst)));
    // Bad ones are refused.
    assert_eq!(set_stack(base, 100, 0), libc::ENOMEM);
    assert_eq!(set_stack(base, SIZE, 77), libc::EINVAL);
    assert_eq!(set_stack(ptr::null_mut(), 0, libc::SS_DISABLE), 0);
    assert_eq!(current_stack().ss_flags, libc::SS_DISABLE);
    // Another thread has none of it.
    let none = thread::spawn(|| current_stack().ss_sp as usize)
        .join()
        .unwrap();
    assert_ne!(none, base as usize);
}

fn an_alternate_stack_can_disarm_itself() {
    const AUTODISARM: i32 = i32::MIN;
    const SIZE: usize = 64 << 10;
    static DURING: AtomicI32 = AtomicI32::new(0);
    extern "C" fn handler(_: i32, _: Info, _: Context) {
        let here = 0_u8;
        STACK_POINTER.store(&raw const here as usize, Ordering::SeqCst);
        DURING.store(current_stack().ss_flags, Ordering::SeqCst);
        // It may be given up and changed while the handler runs on it.
        assert_eq!(set_stack(ptr::null_mut(), 0, libc::SS_DISABLE), 0);
    }
    enter();
    let base = map(SIZE, READ_WRITE);
    assert_eq!(set_stack(base, SIZE, AUTODISARM), 0);
    on_signal(libc::SIGUSR1, libc::SA_ONSTACK, handler);
    for _ in 0..3 {
        raise(libc::SIGUSR1);
        let range = base as usize..base as usize + SIZE;
        assert!(range.contains(&STACK_POINTER.load(Ordering::SeqCst)));
        assert_eq!(DURING.load(Ordering::SeqCst), libc::SS_DISABLE);
        assert_eq!(current_stack().ss_flags, AUTODISARM);
        assert_eq!(current_stack().ss_sp, base.cast());
    }
}

fn entering_on_an_alternate_stack_is_refused() {
    static REFUSED: AtomicBool = AtomicBool::new(false);
    extern "C" fn handler(_: i32, _: Info, _: Context) {
        let error = dune::enter();
        let refused = matches!(error, Err(dune::EnterError::OnAlternateStack));
        REFUSED.store(refused && !dune::is_inside(), Ordering::SeqCst);
    }
    // Before the first entry, and after it.
    const SIZE: usize = 64 << 10;
    let base = map(SIZE, READ_WRITE);
    for _ in 0..2 {
        assert_eq!(set_stack(base, SIZE, 0), 0);
        on_signal(libc::SIGUSR1, libc::SA_ONSTACK, handler);
        REFUSED.store(false, Ordering::SeqCst);
        raise(libc::SIGUSR1);
        assert!(REFUSED.load(Ordering::SeqCst));
        enter();
        assert_eq!(current_stack().ss_sp, base.cast());
        dune::leave();
        assert_eq!(current_stack().ss_sp, base.cast());
    }
}

fn a_handler_may_enter_or_leave() {
    extern "C" fn toggle(_: i32, _: Info, _: Context) {
        if dune::is_inside() {
            dune::leave();
        } else {
            dune::enter().unwrap();
        }
    }
    enter();
    on_signal(libc::SIGUSR1, 0, toggle);
    let mut sum = 0.5_f64;
    for n in 0..20 {
        let before = dune::is_inside();
        let expected = sum + f64::from(n);
        sum += std::hint::black_box(f64::from(n));
        raise(libc::SIGUSR1);
        assert_ne!(dune::is_inside(), before, "round {n}");
        assert!((sum - expected).abs() < f64::EPSILON);
        assert!(blocked().is_empty());
    }
}

static MASK_SEEN: AtomicU64 = AtomicU64::new(0);

fn masks_hold_during_a_handler_and_come_back_after_it() {
    extern "C" fn handler(_: i32, _: Info, _: Context) {
        let bits = blocked().iter().fold(0, |sum, s| sum | 1_u64 << (s - 1));
        MASK_SEEN.store(bits, Ordering::SeqCst);
        // What the handler does to the mask itself ends with it.
        unblock(&[libc::SIGHUP]);
    }
    let bit = |signal: i32| 1_u64 << (signal - 1);
    enter();
    block(&[libc::SIGHUP]);
    on_signal_masked(libc::SIGUSR1, 0, handler, &[libc::SIGUSR2, libc::SIGINT]);
    raise(libc::SIGUSR1);
    let expected = bit(libc::SIGUSR1) | bit(libc::SIGUSR2) | bit(libc::SIGINT) | bit(libc::SIGHUP);
    assert_eq!(MASK_SEEN.load(Ordering::SeqCst), expected);
    assert_eq!(blocked(), [libc::SIGHUP]);
    on_signal_masked(libc::SIGUSR1, libc::SA_NODEFER, handler, &[]);
    raise(libc::SIGUSR1);
    assert_eq!(MASK_SEEN.load(Ordering::SeqCst), bit(libc::SIGHUP));
    assert_eq!(blocked(), [libc::SIGHUP]);
}

fn blocked_signals_wait() {
    enter();
    on_signal(libc::SIGUSR1, 0, count);
    block(&[libc::SIGUSR1]);
    raise(libc::SIGUSR1);
    raise(libc::SIGUSR1);
    assert_eq!(counted(), 0);
    let mut pending = set_of(&[]);
    unsafe { libc::sigpending(&raw mut pending) };
    assert_eq!(
        unsafe { libc::sigismember(&raw const pending, libc::SIGUSR1) },
        1
    );
    unblock(&[libc::SIGUSR1]);
    assert_eq!(counted(), 1);
}

static ORDER: [AtomicUsize; 128] = [const { AtomicUsize::new(usize::MAX) }; 128];
static NEXT: AtomicUsize = AtomicUsize::new(0);

extern "C" fn note_order(signal: i32, info: Info, _: Context) {
    let value = unsafe { (*info).si_value() }.sival_ptr as usize;
    let at = NEXT.fetch_add(1, Ordering::SeqCst);
    ORDER[at].store(
        (signal - libc::SIGRTMIN()) as usize * 1000 + value,
        Ordering::SeqCst,
    );
}

fn queued_signals_arrive_all_and_in_order() {
    enter();
    let signals: Vec<i32> = (0..4).map(|n| libc::SIGRTMIN() + n).collect();
    for signal in &signals {
        // All blocked in each handler: no nesting, so the order of delivery is seen.
        on_signal_masked(*signal, 0, note_order, &signals);
    }
    block(&signals);
    for n in 0..20 {
        for signal in signals.iter().rev() {
            queue(getpid(), *signal, n);
        }
    }
    unblock(&signals);
    assert_eq!(NEXT.load(Ordering::SeqCst), 80);
    let order: Vec<usize> = ORDER[..80]
        .iter()
        .map(|o| o.load(Ordering::SeqCst))
        .collect();
    let expected: Vec<usize> = (0..4)
        .flat_map(|s| (0..20).map(move |n| s * 1000 + n))
        .collect();
    assert_eq!(order, expected);
}

fn handlers_nest() {
    static DEPTH: AtomicU32 = AtomicU32::new(0);
    static DEEPEST: AtomicU32 = AtomicU32::new(0);
    extern "C" fn nest(_: i32, _: Info, _: Context) {
        let depth = DEPTH.fetch_add(1, Ordering::SeqCst) + 1;
        DEEPEST.fetch_max(depth, Ordering::SeqCst);
        if depth < 50 {
            raise(libc::SIGUSR1);
        }
        DEPTH.fetch_sub(1, Ordering::SeqCst);
    }
    enter();
    on_signal(libc::SIGUSR1, libc::SA_NODEFER, nest);
    let local = std::hint::black_box([3_u64; 64]);
    raise(libc::SIGUSR1);
    assert_eq!(DEEPEST.load(Ordering::SeqCst), 50);
    assert_eq!(DEPTH.load(Ordering::SeqCst), 0);
    assert_eq!(local, [3; 64]);
}

fn no_signal_is_lost_in_a_storm_against_blocking_reads() {
    const SENT: usize = 1_000;
    static EXCHANGED: AtomicU64 = AtomicU64::new(0);
    enter();
    // Queued signals are all delivered or not at all: count them.
    let signal = libc::SIGRTMIN() + 1;
    on_signal(signal, libc::SA_RESTART, count);
    let receiver = unsafe { libc::pthread_self() };
    let (mut from_echo, mut to_me) = std::io::pipe().unwrap();
    let (mut from_me, mut to_echo) = std::io::pipe().unwrap();
    let echo = thread::spawn(move || {
        block(&[libc::SIGRTMIN() + 1]);
        let mut byte = [0];
        while from_me.read(&mut byte).unwrap() == 1 {
            to_me.write_all(&[byte[0].wrapping_add(1)]).unwrap();
        }
    });
    let sender = thread::spawn(move || {
        block(&[libc::SIGRTMIN() + 1]);
        for n in 0..SENT {
            let value = libc::sigval {
                sival_ptr: n as *mut _,
            };
            loop {
                let result = unsafe { pthread_sigqueue(receiver, libc::SIGRTMIN() + 1, value) };
                if result == 0 {
                    break;
                }
                assert_eq!(result, libc::EAGAIN);
                thread::yield_now();
            }
            // In step with the exchange of bytes, or a little ahead of it.
            while n as u64 / 4 > EXCHANGED.load(Ordering::SeqCst) {
                thread::yield_now();
            }
        }
    });
    let mut byte = 0_u8;
    let mut exchanged = 0_u64;
    while counted() < SENT as u64 || exchanged < SENT as u64 / 4 {
        to_echo.write_all(&[byte]).unwrap();
        let mut answer = [0];
        from_echo.read_exact(&mut answer).unwrap();
        assert_eq!(answer[0], byte.wrapping_add(1), "after {exchanged} bytes");
        byte = answer[0];
        exchanged += 1;
        EXCHANGED.store(exchanged, Ordering::SeqCst);
        assert!(exchanged < 100_000, "{} signals arrived", counted());
    }
    sender.join().unwrap();
    eventually("all signals", || counted() == SENT as u64);
    drop(to_echo);
    echo.join().unwrap();
}

unsafe extern "C" {
    fn pthread_sigqueue(thread: libc::pthread_t, signal: i32, value: libc::sigval) -> i32;
}

fn a_timer_wakes_every_blocking_call() {
    enter();
    // Each round: a one-shot timer, and a read that only the signal's handler ends. A signal
    // that slips between the look and the call is a hang here.
    let mut ends = [0; 2];
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    static WRITE_END: AtomicI32 = AtomicI32::new(0);
    extern "C" fn write_byte(_: i32, _: Info, _: Context) {
        COUNT.fetch_add(1, Ordering::SeqCst);
        unsafe { libc::write(WRITE_END.load(Ordering::SeqCst), c"x".as_ptr().cast(), 1) };
    }
    WRITE_END.store(ends[1], Ordering::SeqCst);
    on_signal(libc::SIGALRM, libc::SA_RESTART, write_byte);
    for round in 0..1_500_u64 {
        let zero = libc::timeval {
            tv_sec: 0,
            tv_usec: 0,
        };
        let timer = libc::itimerval {
            it_interval: zero,
            it_value: libc::timeval {
                tv_sec: 0,
                tv_usec: 1 + (round % 150) as i64,
            },
        };
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, ptr::null_mut()) };
        let mut byte = 0_u8;
        let result = unsafe { libc::read(ends[0], (&raw mut byte).cast(), 1) };
        assert_eq!(
            (result, byte),
            (1, b'x'),
            "round {round}: errno {}",
            errno()
        );
        assert_eq!(counted(), round + 1);
    }
}

fn a_timer_wakes_a_spinning_guest() {
    enter();
    on_signal(libc::SIGALRM, 0, count);
    interval_timer(1_000);
    while counted() < 200 {
        std::hint::spin_loop();
    }
    interval_timer(0);
}

fn waiting_with_another_mask_loses_nothing() {
    enter();
    on_signal(libc::SIGUSR1, 0, count);
    block(&[libc::SIGUSR1]);
    let me = unsafe { libc::pthread_self() };
    const ROUNDS: u64 = 400;
    let turn = Arc::new(AtomicU64::new(0));
    let theirs = Arc::clone(&turn);
    let sender = thread::spawn(move || {
        for round in 0..ROUNDS {
            while theirs.load(Ordering::SeqCst) <= round {
                thread::yield_now();
            }
            unsafe { libc::pthread_kill(me, libc::SIGUSR1) };
        }
    });
    let empty = set_of(&[]);
    for round in 0..ROUNDS {
        turn.store(round + 1, Ordering::SeqCst);
        let result = match round % 3 {
            0 => unsafe { libc::sigsuspend(&raw const empty) },
            1 => unsafe { libc::ppoll(ptr::null_mut(), 0, ptr::null(), &raw const empty) },
            _ => unsafe {
                libc::pselect(
                    0,
                    ptr::null_mut(),
                    ptr::null_mut(),
                    ptr::null_mut(),
                    ptr::null(),
                    &raw const empty,
                )
            },
        };
        assert_eq!((result, errno()), (-1, libc::EINTR));
        assert_eq!(counted(), round + 1);
        assert_eq!(blocked(), [libc::SIGUSR1]);
    }
    sender.join().unwrap();
}

fn signals_can_be_waited_for() {
    enter();
    let signals = [libc::SIGUSR1, libc::SIGRTMIN() + 2];
    block(&signals);
    let set = set_of(&signals);
    queue(getpid(), libc::SIGRTMIN() + 2, 77);
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let signal = unsafe { libc::sigwaitinfo(&raw const set, &raw mut info) };
    assert_eq!(signal, libc::SIGRTMIN() + 2);
    assert_eq!(unsafe { info.si_value() }.sival_ptr as usize, 77);
    let short = libc::timespec {
        tv_sec: 0,
        tv_nsec: 10_000_000,
    };
    let none = unsafe { libc::sigtimedwait(&raw const set, &raw mut info, &raw const short) };
    assert_eq!((none, errno()), (-1, libc::EAGAIN));

    let fd = unsafe { libc::signalfd(-1, &raw const set, 0) };
    assert!(fd >= 0);
    raise(libc::SIGUSR1);
    let mut read: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
    let size = size_of_val(&read);
    assert_eq!(
        unsafe { libc::read(fd, (&raw mut read).cast(), size) },
        size as isize
    );
    assert_eq!(read.ssi_signo, libc::SIGUSR1 as u32);
}

fn the_end_of_children_is_told() {
    enter();
    on_signal(libc::SIGCHLD, 0, see);
    let pid = fork(|| 5);
    eventually("SIGCHLD", || SEEN.times.load(Ordering::SeqCst) > 0);
    assert_eq!(SEEN.pid.load(Ordering::SeqCst), pid);
    assert_eq!(SEEN.code.load(Ordering::SeqCst), libc::CLD_EXITED);
    assert_eq!(wait(pid), Ended::Exited(5));
    on_signal(libc::SIGCHLD, libc::SA_RESTART, count);
    let before = counted();
    for n in 0..20 {
        let status = Command::new("sh")
            .args(["-c", &format!("exit {n}")])
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(n));
    }
    assert!(counted() > before);
    // Children that nobody waits for.
    disposition(libc::SIGCHLD, libc::SIG_IGN);
    let pid = fork(|| 0);
    assert_eq!(unsafe { libc::waitpid(pid, ptr::null_mut(), 0) }, -1);
    assert_eq!(errno(), libc::ECHILD);
}

fn threads_signal_each_other() {
    const EACH: u64 = 300;
    static RECEIVED: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
    thread_local! { static ME: std::cell::Cell<usize> = const { std::cell::Cell::new(0) }; }
    extern "C" fn received(_: i32, _: Info, _: Context) {
        RECEIVED[ME.get()].fetch_add(1, Ordering::SeqCst);
    }
    enter();
    let signal = libc::SIGRTMIN() + 3;
    on_signal(signal, libc::SA_RESTART, received);
    let barrier = Arc::new(Barrier::new(5));
    let threads: Vec<_> = (0..4)
        .map(|me| {
            let barrier = Arc::clone(&barrier);
            thread::spawn(move || {
                // Two of them run natively.
                if me >= 2 {
                    dune::leave();
                }
                ME.set(me);
                barrier.wait();
                let mut sum = 0_u64;
                while RECEIVED[me].load(Ordering::SeqCst) < 2 * EACH {
                    sum = sum.wrapping_add(u64::from(getpid() as u32));
                    if sum.is_multiple_of(3) {
                        thread::yield_now();
                    }
                }
                barrier.wait();
                assert_eq!(dune::is_inside(), me < 2);
            })
        })
        .collect();
    barrier.wait();
    let targets: Vec<_> = threads.iter().map(|t| t.as_pthread_t()).collect();
    thread::scope(|scope| {
        for _ in 0..2 {
            let targets = &targets;
            scope.spawn(move || {
                let value = libc::sigval {
                    sival_ptr: ptr::null_mut(),
                };
                for _ in 0..EACH {
                    for target in targets {
                        while unsafe { pthread_sigqueue(*target, signal, value) } != 0 {
                            thread::yield_now();
                        }
                    }
                }
            });
        }
    });
    barrier.wait();
    threads.into_iter().for_each(|t| t.join().unwrap());
    for received in &RECEIVED {
        assert_eq!(received.load(Ordering::SeqCst), 2 * EACH);
    }
}

fn handlers_change_while_signals_arrive() {
    enter();
    let stop = AtomicBool::new(false);
    on_signal(libc::SIGUSR1, libc::SA_RESTART, count);
    thread::scope(|scope| {
        for n in 0..3 {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if n == 0 {
                        disposition(libc::SIGUSR1, libc::SIG_IGN);
                    }
                    on_signal(libc::SIGUSR1, libc::SA_RESTART, count);
                }
            });
        }
        for _ in 0..3_000 {
            kill(getpid(), libc::SIGUSR1);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(counted() > 0);
    on_signal(libc::SIGUSR1, 0, count);
    let before = counted();
    raise(libc::SIGUSR1);
    assert_eq!(counted(), before + 1);
}

// ---- jumps and contexts

#[repr(C, align(16))]
struct JumpBuffer([u64; 40]);

unsafe extern "C" {
    fn siglongjmp(buffer: *mut JumpBuffer, value: i32) -> !;
}

/// Calls `body(argument)` under `sigsetjmp`; returns what was jumped with, or 0.
#[unsafe(naked)]
unsafe extern "C" fn with_jump(
    buffer: *mut JumpBuffer,
    body: extern "C" fn(*mut JumpBuffer),
) -> i32 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "sub rsp, 8",
        "mov rbx, rdi",
        "mov rbp, rsi",
        "mov esi, 1",
        "call {setjmp}",
        "test eax, eax",
        "jnz 2f",
        "mov rdi, rbx",
        "call rbp",
        "xor eax, eax",
        "2:",
        "add rsp, 8",
        "pop rbp",
        "pop rbx",
        "ret",
        setjmp = sym __sigsetjmp,
    )
}

unsafe extern "C" {
    fn __sigsetjmp(buffer: *mut JumpBuffer, save_mask: i32) -> i32;
}

static JUMP: AtomicUsize = AtomicUsize::new(0);

extern "C" fn jump_out(signal: i32, _: Info, _: Context) {
    unsafe { siglongjmp(JUMP.load(Ordering::SeqCst) as *mut JumpBuffer, signal) }
}

fn handlers_may_jump_out() {
    extern "C" fn raises(_: *mut JumpBuffer) {
        raise(libc::SIGUSR1);
        unreachable!();
    }
    extern "C" fn faults(_: *mut JumpBuffer) {
        unsafe { ptr::without_provenance::<u8>(8).read_volatile() };
        unreachable!();
    }
    extern "C" fn divides(_: *mut JumpBuffer) {
        unsafe { asm!("xor edx, edx", "div {0:e}", in(reg) 0, inout("eax") 1 => _, out("edx") _) };
        unreachable!();
    }
    enter();
    let base = map(64 << 10, READ_WRITE);
    let mut buffer = Box::new(JumpBuffer([0; 40]));
    JUMP.store(&raw mut *buffer as usize, Ordering::SeqCst);
    for round in 0..60 {
        // On the alternate stack half of the time.
        let flags = if round % 2 == 0 {
            assert_eq!(set_stack(base, 64 << 10, 0), 0);
            libc::SA_ONSTACK
        } else {
            0
        };
        let (signal, body): (i32, extern "C" fn(*mut JumpBuffer)) = match round % 3 {
            0 => (libc::SIGUSR1, raises),
            1 => (libc::SIGSEGV, faults),
            _ => (libc::SIGFPE, divides),
        };
        on_signal(signal, flags, jump_out);
        assert_eq!(
            unsafe { with_jump(&raw mut *buffer, body) },
            signal,
            "round {round}"
        );
        assert!(blocked().is_empty(), "round {round}");
        assert_eq!(current_stack().ss_flags & libc::SS_ONSTACK, 0);
        assert!(dune::is_inside());
    }
}

fn a_handler_may_change_the_registers() {
    extern "C" fn skip(_: i32, _: Info, context: Context) {
        let registers = registers(context);
        registers[libc::REG_RIP as usize] += 2;
        registers[libc::REG_RAX as usize] = 0x1234;
    }
    enter();
    on_signal(libc::SIGILL, 0, skip);
    on_signal(libc::SIGFPE, 0, skip);
    let (ud2, div): (u64, u64);
    unsafe {
        asm!("ud2", out("rax") ud2);
        asm!("xor edx, edx", "div ecx", in("ecx") 0, inout("rax") 5_u64 => div, out("edx") _);
    }
    assert_eq!((ud2, div), (0x1234, 0x1234));
}

/// Spins until `*stop` is not zero, with a pattern in all registers; the number of those
/// that changed.
#[unsafe(naked)]
unsafe extern "C" fn spin_with_pattern(stop: *const u64) -> u64 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov rax, 0x1001",
        "mov rbx, 0x1002",
        "mov rcx, 0x1003",
        "mov rdx, 0x1004",
        "mov rsi, 0x1005",
        "mov rbp, 0x1006",
        "mov r8, 0x1007",
        "mov r9, 0x1008",
        "mov r10, 0x1009",
        "mov r11, 0x100a",
        "mov r12, 0x100b",
        "mov r13, 0x100c",
        "mov r14, 0x100d",
        "mov r15, 0x100e",
        "vmovq xmm0, rax",
        "vpbroadcastq ymm1, xmm0",
        "vmovq xmm0, r15",
        "vpbroadcastq ymm15, xmm0",
        "vpaddq ymm7, ymm1, ymm15",
        "fld1",
        "fldpi",
        "stc",
        "2:",
        // Neither flags nor registers change in the loop.
        "jnc 3f",
        "xchg rdi, rdi",
        "lea rdi, [rdi]",
        "push rcx",
        "mov rcx, [rdi]",
        "jrcxz 4f",
        "pop rcx",
        "jmp 3f",
        "4:",
        "pop rcx",
        "jmp 2b",
        "3:",
        "mov edi, 0",
        "adc edi, -1", // carry was set: 0
        "neg edi",
        "mov edi, 0",
        "cmp rax, 0x1001",
        "je 5f",
        "inc edi",
        "5:",
        "cmp rbx, 0x1002",
        "je 5f",
        "inc edi",
        "5:",
        "cmp rcx, 0x1003",
        "je 5f",
        "inc edi",
        "5:",
        "cmp rdx, 0x1004",
        "je 5f",
        "inc edi",
        "5:",
        "cmp rsi, 0x1005",
        "je 5f",
        "inc edi",
        "5:",
        "cmp rbp, 0x1006",
        "je 5f",
        "inc edi",
        "5:",
        "cmp r8, 0x1007",
        "je 5f",
        "inc edi",
        "5:",
        "cmp r9, 0x1008",
        "je 5f",
        "inc edi",
        "5:",
        "cmp r10, 0x1009",
        "je 5f",
        "inc edi",
        "5:",
        "cmp r11, 0x100a",
        "je 5f",
        "inc edi",
        "5:",
        "cmp r12, 0x100b",
        "je 5f",
        "inc edi",
        "5:",
        "cmp r13, 0x100c",
        "je 5f",
        "inc edi",
        "5:",
        "cmp r14, 0x100d",
        "je 5f",
        "inc edi",
        "5:",
        "cmp r15, 0x100e",
        "je 5f",
        "inc edi",
        "5:",
        "vmovq xmm0, rax",
        "vpbroadcastq ymm2, xmm0",
        "vpcmpeqq ymm2, ymm2, ymm1",
        "vmovmskpd eax, ymm2",
        "cmp eax, 15",
        "je 5f",
        "inc edi",
        "5:",
        "vmovq xmm0, r15",
        "vpbroadcastq ymm2, xmm0",
        "vpcmpeqq ymm2, ymm2, ymm15",
        "vmovmskpd eax, ymm2",
        "cmp eax, 15",
        "je 5f",
        "inc edi",
        "5:",
        "vpaddq ymm2, ymm1, ymm15",
        "vpcmpeqq ymm2, ymm2, ymm7",
        "vmovmskpd eax, ymm2",
        "cmp eax, 15",
        "je 5f",
        "inc edi",
        "5:",
        "fldpi",
        "fcomip st, st(1)",
        "fstp st(0)",
        "je 5f",
        "inc edi",
        "5:",
        "fld1",
        "fcomip st, st(1)",
        "fstp st(0)",
        "je 5f",
        "inc edi",
        "5:",
        "vzeroupper",
        "mov eax, edi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
    )
}

fn all_registers_survive_a_handler() {
    static STOP: AtomicU64 = AtomicU64::new(0);
    extern "C" fn clobber(_: i32, _: Info, _: Context) {
        // Everything in its initial state, and the direction flag as the ABI has it.
        let (control, mxcsr): (u16, u32);
        let (mut word, mut csr) = (0_u16, 0_u32);
        unsafe {
            asm!("fnstcw [{}]", in(reg) &raw mut word);
            asm!("stmxcsr [{}]", in(reg) &raw mut csr);
            asm!(
                "vpcmpeqd ymm0, ymm0, ymm0", "vmovdqa ymm1, ymm0", "vmovdqa ymm7, ymm0",
                "vmovdqa ymm15, ymm0", "fninit", "fldz", "fldz", "fldz",
                out("ymm0") _, out("ymm1") _, out("ymm7") _, out("ymm15") _,
            );
        }
        (control, mxcsr) = (word, csr);
        assert_eq!((control, mxcsr & !0x3f), (0x37f, 0x1f80));
        let n = COUNT.fetch_add(1, Ordering::SeqCst);
        STOP.store(u64::from(n % 4 == 3), Ordering::SeqCst);
    }
    for round in 0..2 {
        on_signal(libc::SIGALRM, 0, clobber);
        interval_timer(800);
        for _ in 0..40 {
            STOP.store(0, Ordering::SeqCst);
            assert_eq!(
                unsafe { spin_with_pattern(STOP.as_ptr()) },
                0,
                "round {round}"
            );
        }
        interval_timer(0);
        if round == 0 {
            enter();
        }
    }
}

// ---- faults

static RECOVER_AT: AtomicUsize = AtomicUsize::new(0);

extern "C" fn recover(_: i32, info: Info, context: Context) {
    SEEN.take(info, context);
    registers(context)[libc::REG_RIP as usize] = RECOVER_AT.load(Ordering::SeqCst) as i64;
}

#[derive(Clone, Copy)]
enum Access {
    Read,
    Write,
    Execute,
}

/// Makes an access that faults; the handler goes on behind it.
fn access(address: usize, access: Access) {
    let recover = RECOVER_AT.as_ptr();
    unsafe {
        match access {
            Access::Read => asm!(
                "lea {t}, [rip + 2f]", "mov [{r}], {t}", "mov {t:l}, [{a}]", "2:",
                t = out(reg) _, r = in(reg) recover, a = in(reg) address,
            ),
            Access::Write => asm!(
                "lea {t}, [rip + 2f]", "mov [{r}], {t}", "mov byte ptr [{a}], 1", "2:",
                t = out(reg) _, r = in(reg) recover, a = in(reg) address,
            ),
            // Execution leaves nothing on the stack: a jump, not a call.
            Access::Execute => asm!(
                "lea {t}, [rip + 2f]", "mov [{r}], {t}", "jmp {a}", "2:",
                t = out(reg) _, r = in(reg) recover, a = in(reg) address,
            ),
        }
    }
}

const MAPERR: i32 = 1;
const ACCERR: i32 = 2;

#[track_caller]
fn expect_fault(at: usize, how: Access, signal: i32, code: i32) {
    let before = SEEN.times.load(Ordering::SeqCst);
    access(at, how);
    assert_eq!(
        SEEN.times.load(Ordering::SeqCst),
        before + 1,
        "handlers called"
    );
    assert_eq!(SEEN.signal.load(Ordering::SeqCst), signal);
    assert_eq!(SEEN.code.load(Ordering::SeqCst), code);
    assert_eq!(SEEN.address.load(Ordering::SeqCst), at);
    assert_eq!(SEEN.trap.load(Ordering::SeqCst), 14);
    let write = match how {
        Access::Write => 2,
        Access::Read | Access::Execute => 0,
    };
    let error = SEEN.error.load(Ordering::SeqCst);
    assert_eq!(error & 6, 4 | write, "error code {error:#x}");
    assert!(blocked().is_empty());
}

fn faults_are_told_as_linux_tells_them() {
    use std::os::fd::AsRawFd;
    let file = std::fs::File::create_new(format!("/tmp/dune-fault-{}", getpid())).unwrap();
    file.set_len(100).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let readable = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let beyond = unsafe {
        libc::mmap(
            ptr::null_mut(),
            3 * 4096,
            READ_WRITE,
            libc::MAP_SHARED,
            readable.as_raw_fd(),
            0,
        )
    } as usize;
    std::fs::remove_file(format!("/tmp/dune-fault-{}", getpid())).unwrap();
    let forbidden = map(4096, libc::PROT_NONE) as usize;
    let constant = map(2 * 4096, READ_WRITE);
    unsafe { constant.write(1) };
    protect(constant, 2 * 4096, libc::PROT_READ);
    let constant = constant as usize;
    let far = 0x1234_5678_9000_usize;
    // On Linux first: the expectations are its own.
    for round in 0..2 {
        on_signal(libc::SIGSEGV, 0, recover);
        on_signal(libc::SIGBUS, 0, recover);
        // Nothing else is mapped from here on that could take its place.
        let unmapped = map(4096, READ_WRITE);
        unsafe { unmapped.write(1) };
        unmap(unmapped, 4096);
        let unmapped = unmapped as usize;
        for _ in 0..3 {
            for (at, code) in [
                (0, MAPERR),
                (8, MAPERR),
                (unmapped, MAPERR),
                (far, MAPERR),
                (forbidden, ACCERR),
            ] {
                expect_fault(at, Access::Read, libc::SIGSEGV, code);
                expect_fault(at, Access::Write, libc::SIGSEGV, code);
                expect_fault(at, Access::Execute, libc::SIGSEGV, code);
            }
            expect_fault(constant, Access::Write, libc::SIGSEGV, ACCERR);
            expect_fault(constant + 4096, Access::Write, libc::SIGSEGV, ACCERR);
            expect_fault(beyond + 4096, Access::Read, libc::SIGBUS, 2);
            expect_fault(beyond + 2 * 4096, Access::Write, libc::SIGBUS, 2);
        }
        // Not canonical: no address is told.
        let before = SEEN.times.load(Ordering::SeqCst);
        access(0x8000_0000_0000_0000, Access::Read);
        assert_eq!(SEEN.times.load(Ordering::SeqCst), before + 1);
        assert_eq!(SEEN.signal.load(Ordering::SeqCst), libc::SIGSEGV);
        assert_eq!(SEEN.code.load(Ordering::SeqCst), 0x80);
        assert_eq!(SEEN.address.load(Ordering::SeqCst), 0);
        if round == 0 {
            enter();
        }
    }
}

fn exceptions_become_the_signals_of_linux() {
    extern "C" fn skip(_: i32, info: Info, context: Context) {
        SEEN.take(info, context);
        let registers = registers(context);
        registers[libc::REG_RIP as usize] += RECOVER_AT.load(Ordering::SeqCst) as i64;
    }
    #[track_caller]
    fn saw(signal: i32, code: i32, trap: u64) {
        assert_eq!(SEEN.signal.load(Ordering::SeqCst), signal);
        assert_eq!(SEEN.code.load(Ordering::SeqCst), code);
        assert_eq!(SEEN.trap.load(Ordering::SeqCst), trap);
        SEEN.signal.store(0, Ordering::SeqCst);
    }
    for round in 0..2 {
        for signal in [libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSEGV] {
            on_signal(signal, 0, skip);
        }
        RECOVER_AT.store(2, Ordering::SeqCst);
        unsafe { asm!("xor edx, edx", "div ecx", in("ecx") 0, inout("eax") 5 => _, out("edx") _) };
        saw(libc::SIGFPE, 1, 0);
        unsafe { asm!("ud2") };
        saw(libc::SIGILL, 2, 6);
        RECOVER_AT.store(0, Ordering::SeqCst);
        unsafe { asm!("int3") };
        saw(libc::SIGTRAP, 0x80, 3);
        if round == 0 {
            enter();
        }
    }
}

fn single_steps_are_told() {
    static STEPS: AtomicU64 = AtomicU64::new(0);
    static OUTSIDE: AtomicU64 = AtomicU64::new(0);
    extern "C" fn step(_: i32, info: Info, context: Context) {
        STEPS.fetch_add(1, Ordering::SeqCst);
        let rip = registers(context)[libc::REG_RIP as usize] as u64;
        if rip >> 47 != 0 {
            OUTSIDE.fetch_add(1, Ordering::SeqCst);
        }
        assert_eq!(unsafe { (*info).si_code }, 2);
    }
    let mut counts = [0; 2];
    for (round, steps) in counts.iter_mut().enumerate() {
        on_signal(libc::SIGTRAP, 0, step);
        STEPS.store(0, Ordering::SeqCst);
        unsafe {
            asm!(
                "pushfq", "or qword ptr [rsp], 0x100", "popfq",
                "nop", "nop", "mov eax, 110", "syscall", "nop", "mov eax, 39", "syscall", "nop",
                "pushfq", "and qword ptr [rsp], ~0x100", "popfq", "nop",
                out("rax") _, out("rcx") _, out("r11") _,
            );
        }
        *steps = STEPS.load(Ordering::SeqCst);
        if round == 0 {
            enter();
        }
    }
    assert_eq!(
        OUTSIDE.load(Ordering::SeqCst),
        0,
        "steps inside the entry stub"
    );
    // Around a system call CPUs and kernels differ by a step.
    assert!(
        counts[0].abs_diff(counts[1]) <= 2 && counts[1] >= 10,
        "{counts:?}"
    );
}

fn what_nobody_handles_kills_as_on_linux() {
    enter();
    for (signal, body) in [
        (libc::SIGSEGV, (|| access(8, Access::Read)) as fn()),
        (libc::SIGILL, || unsafe { asm!("ud2") }),
        (libc::SIGTRAP, || unsafe { asm!("int3") }),
        (libc::SIGFPE, || unsafe {
            asm!("xor edx, edx", "div ecx", in("ecx") 0, inout("eax") 5 => _, out("edx") _);
        }),
        (libc::SIGSEGV, || unsafe {
            asm!("mov rax, cr8", "mov rax, [{}]", in(reg) 1_u64 << 63, out("rax") _)
        }),
        (libc::SIGALRM, || {
            interval_timer(1000);
            loop {
                std::hint::spin_loop();
            }
        }),
        (libc::SIGABRT, || std::process::abort()),
    ] {
        let ended = child(|| {
            // What the standard library handles would come back as an abort.
            for signal in [libc::SIGSEGV, libc::SIGBUS] {
                disposition(signal, libc::SIG_DFL);
            }
            body();
            0
        });
        assert_eq!(ended, Ended::Killed(signal));
        // And in a thread.
        let ended = child(|| {
            disposition(libc::SIGSEGV, libc::SIG_DFL);
            thread::spawn(body).join().unwrap();
            0
        });
        assert_eq!(ended, Ended::Killed(signal));
    }
    // A fault while its signal is blocked, or ignored, kills as well.
    let ended = child(|| {
        on_signal(libc::SIGSEGV, 0, recover);
        block(&[libc::SIGSEGV]);
        access(8, Access::Read);
        0
    });
    assert_eq!(ended, Ended::Killed(libc::SIGSEGV));
    let ended = child(|| {
        disposition(libc::SIGSEGV, libc::SIG_IGN);
        access(8, Access::Read);
        0
    });
    assert_eq!(ended, Ended::Killed(libc::SIGSEGV));
}

fn faults_are_handled_in_a_storm_of_signals() {
    enter();
    on_signal(libc::SIGSEGV, 0, recover);
    on_signal(libc::SIGALRM, libc::SA_RESTART, count);
    interval_timer(700);
    let forbidden = map(4096, libc::PROT_NONE) as usize;
    let start = Instant::now();
    let mut rounds = 0;
    // Where a signal takes about as long as the timer's period, rounds are few.
    while (counted() < 600 || rounds < 30) && start.elapsed() < Duration::from_secs(25) {
        expect_fault(forbidden, Access::Write, libc::SIGSEGV, ACCERR);
        expect_fault(8, Access::Read, libc::SIGSEGV, MAPERR);
        rounds += 1;
    }
    interval_timer(0);
    assert!(
        counted() > 100 && rounds > 20,
        "{} signals, {rounds} rounds",
        counted()
    );
}

fn one_shot_handlers_of_faults_in_a_storm() {
    enter();
    on_signal(libc::SIGALRM, libc::SA_RESTART, count);
    interval_timer(700);
    for _ in 0..300 {
        on_signal(libc::SIGSEGV, libc::SA_RESETHAND, recover);
        expect_fault(8, Access::Read, libc::SIGSEGV, MAPERR);
    }
    interval_timer(0);
    assert!(counted() > 20);
}

fn protection_changes_under_running_threads() {
    // One thread takes the right to write away and gives it back, all the time; the others
    // write, and wait in their handler. Every fault is the truth: SIGSEGV, never SIGBUS.
    static WRONG: AtomicU64 = AtomicU64::new(0);
    static STOP: AtomicBool = AtomicBool::new(false);
    extern "C" fn retry(signal: i32, _: Info, _: Context) {
        if signal != libc::SIGSEGV {
            WRONG.fetch_add(1, Ordering::SeqCst);
        }
        COUNT.fetch_add(1, Ordering::SeqCst);
    }
    enter();
    on_signal(libc::SIGSEGV, libc::SA_NODEFER, retry);
    on_signal(libc::SIGBUS, libc::SA_NODEFER, retry);
    let page = map(4096, READ_WRITE);
    let address = page as usize;
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(move || {
                let word = unsafe { &*(address as *const AtomicU64) };
                while !STOP.load(Ordering::Relaxed) {
                    word.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        scope.spawn(move || {
            let page = address as *mut u8;
            for n in 0..400 {
                let rights = if n % 2 == 0 {
                    libc::PROT_NONE
                } else {
                    libc::PROT_READ
                };
                protect(page, 4096, rights);
                protect(page, 4096, READ_WRITE);
            }
            STOP.store(true, Ordering::Relaxed);
        });
    });
    assert_eq!(WRONG.load(Ordering::SeqCst), 0);
}

fn stop_and_continue() {
    enter();
    let pid = fork(|| {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(20) {
            std::hint::spin_loop();
        }
        1
    });
    for _ in 0..3 {
        kill(pid, libc::SIGSTOP);
        assert_eq!(
            wait_with(pid, libc::WUNTRACED),
            Ended::Stopped(libc::SIGSTOP)
        );
        kill(pid, libc::SIGCONT);
        assert_eq!(wait_with(pid, libc::WCONTINUED), Ended::Continued);
    }
    kill(pid, libc::SIGTERM);
    assert_eq!(wait(pid), Ended::Killed(libc::SIGTERM));
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    let pid = fork(|| {
        let mut byte = [0];
        reader.read_exact(&mut byte).unwrap();
        i32::from(byte[0])
    });
    kill(pid, libc::SIGTSTP);
    assert_eq!(
        wait_with(pid, libc::WUNTRACED),
        Ended::Stopped(libc::SIGTSTP)
    );
    kill(pid, libc::SIGCONT);
    writer.write_all(&[42]).unwrap();
    assert_eq!(wait(pid), Ended::Exited(42));
}

fn a_child_may_be_stopped_while_it_gets_its_vm() {
    enter();
    for round in 0..60 {
        let pid = fork(|| {
            loop {
                unsafe { libc::pause() };
            }
        });
        // A signal that is pending makes KVM give up the making of a VM: meet that moment.
        thread::sleep(Duration::from_micros(200 * (round % 30)));
        for _ in 0..2 {
            kill(pid, libc::SIGSTOP);
            assert_eq!(
                wait_with(pid, libc::WUNTRACED),
                Ended::Stopped(libc::SIGSTOP)
            );
            kill(pid, libc::SIGCONT);
        }
        kill(pid, libc::SIGTERM);
        assert_eq!(wait(pid), Ended::Killed(libc::SIGTERM));
    }
}

#[expect(unconditional_recursion, reason = "overflows the stack on purpose")]
fn overflow(n: u64) -> u64 {
    let local = std::hint::black_box([n; 100]);
    overflow(n + 1) + local[50]
}

fn the_standard_librarys_message_on_stack_overflow() {
    enter();
    let (ended, text) = child_with_stderr(|| overflow(0) as i32);
    assert_eq!(ended, Ended::Killed(libc::SIGABRT), "{text}");
    assert!(text.contains("has overflowed its stack"), "{text}");
    let (ended, text) = child_with_stderr(|| {
        let thread = thread::Builder::new().name("deep".into());
        thread.spawn(|| overflow(0)).unwrap().join().unwrap() as i32
    });
    assert_eq!(ended, Ended::Killed(libc::SIGABRT), "{text}");
    assert!(text.contains("thread 'deep'"), "{text}");
    assert!(text.contains("has overflowed its stack"), "{text}");
}

fn a_signal_on_the_way_out_is_delivered() {
    enter();
    on_signal(libc::SIGALRM, libc::SA_RESTART, count);
    interval_timer(1000);
    let start = Instant::now();
    let mut rounds = 0_u64;
    while (counted() < 400 || rounds < 60) && start.elapsed() < Duration::from_secs(20) {
        dune::leave();
        assert!(!blocked().contains(&libc::SIGALRM), "round {rounds}");
        enter();
        assert!(!blocked().contains(&libc::SIGALRM), "round {rounds}");
        rounds += 1;
    }
    interval_timer(0);
    assert!(counted() > 100 && rounds > 50, "{} in {rounds}", counted());
}

fn timers_of_the_process_work() {
    enter();
    on_signal(libc::SIGPROF, libc::SA_RESTART, count);
    let timer = libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 0,
            tv_usec: 10_000,
        },
        it_value: libc::timeval {
            tv_sec: 0,
            tv_usec: 10_000,
        },
    };
    unsafe { libc::setitimer(libc::ITIMER_PROF, &raw const timer, ptr::null_mut()) };
    let start = Instant::now();
    while counted() < 5 && start.elapsed() < Duration::from_secs(20) {
        std::hint::spin_loop();
    }
    assert!(counted() >= 5);
}

dune_testing::tests! {
    smoke handlers_are_told_who_sent_the_signal,
    ring0 a_handler_installed_before_entry_runs_inside,
    ring0 one_shot_and_plain_handlers,
    ring0 calls_are_interrupted_or_restarted_as_asked,
    ring0 alternate_stacks_are_used,
    ring0 an_alternate_stack_can_disarm_itself,
    ring0 entering_on_an_alternate_stack_is_refused,
    ring0 a_handler_may_enter_or_leave,
    ring0 masks_hold_during_a_handler_and_come_back_after_it,
    ring0 blocked_signals_wait,
    ring0 queued_signals_arrive_all_and_in_order,
    ring0 handlers_nest,
    ring0 no_signal_is_lost_in_a_storm_against_blocking_reads,
    ring0 a_timer_wakes_every_blocking_call,
    smoke a_timer_wakes_a_spinning_guest,
    ring0 waiting_with_another_mask_loses_nothing,
    ring0 signals_can_be_waited_for,
    ring0 the_end_of_children_is_told,
    ring0 threads_signal_each_other,
    ring0 handlers_change_while_signals_arrive,
    ring0 handlers_may_jump_out,
    ring0 a_handler_may_change_the_registers,
    ring0 all_registers_survive_a_handler,
    smoke faults_are_told_as_linux_tells_them,
    ring0 exceptions_become_the_signals_of_linux,
    ring0 single_steps_are_told,
    ring0 what_nobody_handles_kills_as_on_linux,
    ring0 faults_are_handled_in_a_storm_of_signals,
    ring0 one_shot_handlers_of_faults_in_a_storm,
    ring0 protection_changes_under_running_threads,
    ring0 stop_and_continue,
    ring0 a_child_may_be_stopped_while_it_gets_its_vm,
    ring0 the_standard_librarys_message_on_stack_overflow,
    ring0 a_signal_on_the_way_out_is_delivered,
    ring0 timers_of_the_process_work,
}
