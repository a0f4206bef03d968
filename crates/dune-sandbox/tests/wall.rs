//! The wall of protection keys: the host kernel itself refuses addresses of the
//! guard, with nobody else checking them.
//!
//! Everything here runs where there are protection keys, and the lab has them:
//! every attack of the suites `attack` and `attack_more` with the guard's checks
//! of pointers switched off (feature `testing`), in both placements; the same
//! without the wall, which must not hold; and signals, which find the guard in
//! the middle of calls behind the wall.

#![expect(
    clippy::duplicate_mod,
    reason = "test targets that also stand by themselves"
)]

#[path = "attack.rs"]
#[expect(dead_code, reason = "a test target of its own")]
mod attack;
#[path = "attack_more.rs"]
#[expect(dead_code, reason = "a test target of its own")]
mod attack_more;
#[path = "attack_parts/stage.rs"]
mod stage;
#[path = "attack_parts/storm.rs"]
mod storm;

use std::process::{Command, ExitCode, Stdio};

/// Attacks by so many calls that they take minutes in the lab, and without a
/// pointer.
const SLOW: [&str; 1] = ["rights_that_change_half_way"];

/// Set in the processes that play the storm of signals.
const STORM: &str = "DUNE_TEST_STORM";

/// Whether this machine has what these tests are about.
fn can_be_tested() -> bool {
    let has = dune_kvm::wall::has_protection_keys();
    if !has {
        eprintln!("ignored: this processor has no protection keys");
    }
    has
}

fn attacks_fail_unchecked(engine: &str) {
    if !can_be_tested() {
        return;
    }
    let stage = [
        (stage::ENGINE, engine),
        (stage::WITHOUT, stage::POINTER_CHECKS),
    ];
    let mut succeeded = Vec::new();
    let all = attack::names().into_iter().map(|name| (name, true));
    let more = attack_more::names().into_iter().map(|name| (name, false));
    for (name, first) in all.chain(more) {
        if SLOW.contains(&name) {
            println!("{name}: left out");
            continue;
        }
        let result = if first {
            attack::fails(name, &stage)
        } else {
            attack_more::fails(name, &stage)
        };
        match result {
            Ok(()) => println!("{name}: failed, as it must"),
            Err(why) => {
                println!("{name}: {}", why.message().unwrap_or("succeeded"));
                succeeded.push(name);
            }
        }
    }
    assert_eq!(succeeded, Vec::<&str>::new());
}

fn no_attack_succeeds_without_pointer_checks_on_host() {
    attacks_fail_unchecked("host");
}

fn no_attack_succeeds_without_pointer_checks_in_guest() {
    attacks_fail_unchecked("guest");
}

fn it_is_the_wall(engine: &str) {
    if !can_be_tested() {
        return;
    }
    let without = format!("{} {}", stage::POINTER_CHECKS, stage::WALL);
    for name in ["answers_to_pointers", "nested_pointers"] {
        let with_wall = [
            (stage::ENGINE, engine),
            (stage::WITHOUT, stage::POINTER_CHECKS),
        ];
        let with = attack::fails(name, &with_wall);
        assert!(with.is_ok(), "{name}: {:?}", with.map_err(text));
        let bare = [(stage::ENGINE, engine), (stage::WITHOUT, &*without)];
        assert!(
            attack::fails(name, &bare).is_err(),
            "{name} must succeed with neither checks nor wall"
        );
    }
}

fn text(failed: libtest_mimic::Failed) -> String {
    failed.message().unwrap_or_default().to_owned()
}

fn attacks_succeed_with_neither_checks_nor_wall_on_host() {
    it_is_the_wall("host");
}

fn attacks_succeed_with_neither_checks_nor_wall_in_guest() {
    it_is_the_wall("guest");
}

fn signals_arrive(engine: &str) {
    let output = Command::new(std::env::current_exe().unwrap())
        .env(STORM, "sandbox")
        .env(stage::ENGINE, engine)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    print!("{text}{errors}");
    assert!(output.status.success(), "{}", output.status);
}

fn signals_arrive_in_calls_behind_the_wall_on_host() {
    signals_arrive("host");
}

fn signals_arrive_in_calls_behind_the_wall_in_guest() {
    signals_arrive("guest");
}

/// A frame that others can write is not what a call returns by.
mod frames {
    #![expect(unsafe_code, reason = "a handler that destroys its own frame")]
    #![expect(
        clippy::multiple_unsafe_ops_per_block,
        reason = "structures made for a call"
    )]

    use core::ffi::{c_int, c_void};
    use core::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};

    use dune_kvm::wall::{self, Region, Stack, Wall};

    static SEEN: AtomicU64 = AtomicU64::new(0);
    static PENDING: AtomicU8 = AtomicU8::new(0);
    /// The stack for frames: from, to.
    static STACK: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];

    dune_kvm::wall_signal_handler! {
        handler => destroy
    }

    /// What another thread's call could do to the frame, with the worst luck.
    unsafe extern "C" fn destroy(_signal: c_int, _info: *mut c_void, context: *mut u8) {
        SEEN.fetch_add(1, Ordering::Relaxed);
        let [from, to] = [&STACK[0], &STACK[1]].map(|at| at.load(Ordering::Relaxed));
        // SAFETY: the handler stands elsewhere, and the registers are at this offset.
        unsafe {
            core::ptr::with_exposed_provenance_mut::<u8>(from).write_bytes(0xa5, to - from);
            let rip = context.add(wall::frame::RIP).cast::<u64>();
            if let Some(way_out) = wall::gives_up_at(rip.read_unaligned()) {
                rip.write_unaligned(way_out);
            }
        }
    }

    pub(crate) fn are_not_believed() {
        const NAP: i64 = 300_000;
        const TIMES: usize = 2000;
        dune::forgo_restartable_sequences();
        // SAFETY: the registration was taken back above.
        let wall = unsafe { Wall::build() }.expect("there are protection keys");
        let stack = Stack::take(wall).unwrap();
        let end = wall::ARENA.load(Ordering::Relaxed) + index(&stack) * wall::STACK_SIZE;
        STACK[0].store(end, Ordering::Relaxed);
        STACK[1].store(end + wall::STACK_SIZE, Ordering::Relaxed);
        let lent = Region::map(4096, Some(wall)).unwrap();
        // SAFETY: zero is a valid sigaction, and the handler is made for it; the timer has it.
        unsafe {
            let mut action: libc::sigaction = core::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            let none = core::ptr::null_mut();
            assert_eq!(libc::sigaction(libc::SIGALRM, &raw const action, none), 0);
            let every = libc::timeval {
                tv_sec: 0,
                tv_usec: 400,
            };
            let timer = libc::itimerval {
                it_interval: every,
                it_value: every,
            };
            let none = core::ptr::null_mut();
            assert_eq!(
                libc::setitimer(libc::ITIMER_REAL, &raw const timer, none),
                0
            );
            lent.as_ptr().cast::<[i64; 2]>().write([0, NAP]);
        }
        let sleep = [lent.start(), 0, 0, 0, 0, 0];
        let mut interrupted = 0;
        for _ in 0..TIMES {
            // SAFETY: reads what is lent; wall, stack and handler are as they must be.
            let answer =
                unsafe { wall::call(nr_nanosleep(), &sleep, PENDING.as_ptr(), stack.slot()) };
            match answer as i32 {
                0 => {}
                answer if answer == -libc::EINTR || answer as isize == wall::GIVEN_UP => {
                    interrupted += 1;
                }
                answer => panic!("nanosleep answered {answer}"),
            }
        }
        println!(
            "{} signals, {interrupted} calls interrupted",
            SEEN.load(Ordering::Relaxed)
        );
        assert!(interrupted > 100);
    }

    fn nr_nanosleep() -> usize {
        libc::SYS_nanosleep as usize
    }

    fn index(stack: &Stack) -> usize {
        wall::SLOTS
            .iter()
            .position(|slot| core::ptr::eq(slot, stack.slot()))
            .unwrap()
    }
}

fn frames_that_others_can_write_are_not_believed() {
    if can_be_tested() {
        frames::are_not_believed();
    }
}

/// Runs the storm in the sandbox.
fn storm_in_sandbox() -> ExitCode {
    let run = || -> Result<dune_sandbox::Outcome, Box<dyn std::error::Error>> {
        let command = dune_sandbox::Command::new(std::env::current_exe()?).env(STORM, "program");
        Ok(command.run(stage::engine()?)?)
    };
    match run() {
        Ok(outcome) => outcome.end.leave(),
        Err(error) => {
            println!("the sandbox failed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The part that this process was started for, if it is not the harness.
fn part() -> Option<ExitCode> {
    match std::env::var(STORM).as_deref() {
        Ok("sandbox") => return Some(storm_in_sandbox()),
        Ok("program") => return Some(storm::program()),
        _ => {}
    }
    let name = std::env::args().nth(1).unwrap_or_default();
    if attack::names().contains(&&*name) {
        attack::part()
    } else {
        attack_more::part()
    }
}

fn main() -> ExitCode {
    const TESTS: &[dune_testing::Test] = dune_testing::list! {
        ring0 no_attack_succeeds_without_pointer_checks_on_host, timeout 400,
        ring0 no_attack_succeeds_without_pointer_checks_in_guest, timeout 400,
        ring0 attacks_succeed_with_neither_checks_nor_wall_on_host, timeout 100,
        ring0 attacks_succeed_with_neither_checks_nor_wall_in_guest, timeout 100,
        ring0 frames_that_others_can_write_are_not_believed,
        ring0 signals_arrive_in_calls_behind_the_wall_on_host, timeout 200,
        ring0 signals_arrive_in_calls_behind_the_wall_in_guest, timeout 200,
    };
    part().unwrap_or_else(|| dune_testing::main(TESTS))
}
