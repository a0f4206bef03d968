//! Where the ring 0 tests run, and the labs in which they do when this machine
//! cannot, or when the Intel side is to be tested.
//!
//! A lab's emulator is one host thread, so as many labs as the host has cores
//! take the tests from one queue. They are brought up when the first test is
//! due. A test that takes its lab down has failed, and another lab goes on.

use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use dune_kvm::probe::{Kvm, probe};
use dune_lab::{Command, Config, Input, LabError, Output, Session};

use crate::event::{Event, Verdict};
use crate::test::Test;
use crate::{child, role};

/// How much longer than its own limit a test may be silent before the guest as
/// a whole counts as hanging.
const GRACE: Duration = Duration::from_secs(60);

/// How slow a lab is: time limits are multiplied by this.
const SVM_TIMEOUT_FACTOR: u32 = 3;
const INTEL_TIMEOUT_FACTOR: u32 = 10;

/// Fewer tests than this are not worth another lab.
const TESTS_WORTH_A_LAB: usize = 3;

/// Where ring 0 tests run, as far as the user decides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Here if this machine can, else in the lab.
    Best,
    /// In the lab with emulated SVM.
    Svm,
    /// In the lab with an emulated Intel CPU: smoke tests only.
    Intel,
}

impl Place {
    pub(crate) fn from_environment() -> Place {
        match std::env::var("DUNE_TEST_RING0").as_deref() {
            Ok("lab") => Place::Svm,
            Ok("intel") => Place::Intel,
            _ => Place::Best,
        }
    }
}

/// The ring 0 tests of this run.
#[derive(Debug)]
pub(crate) struct Pool {
    place: Place,
    tests: Vec<Test>,
    board: Arc<Board>,
    started: OnceLock<()>,
    here: OnceLock<bool>,
    /// At most as many children at once as there are processors.
    slots: Slots,
}

/// The verdicts, as they come in.
#[derive(Debug, Default)]
struct Board {
    verdicts: Mutex<HashMap<&'static str, Verdict>>,
    changed: Condvar,
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, HashMap<&'static str, Verdict>> {
        self.verdicts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post(&self, name: &'static str, verdict: Verdict) {
        self.lock().entry(name).or_insert(verdict);
        self.changed.notify_all();
    }

    fn wait_for(&self, name: &str) -> Verdict {
        let mut verdicts = self.lock();
        loop {
            if let Some(verdict) = verdicts.get(name) {
                return verdict.clone();
            }
            verdicts = self
                .changed
                .wait(verdicts)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Pool {
    pub(crate) fn new(place: Place, tests: Vec<Test>) -> Pool {
        Pool {
            place,
            tests,
            board: Arc::default(),
            started: OnceLock::new(),
            here: OnceLock::new(),
            slots: Slots::new(thread::available_parallelism().map_or(1, usize::from)),
        }
    }

    /// Runs a test on this machine.
    pub(crate) fn run_here(&self, test: &Test) -> Verdict {
        self.slots.with(|| child::run(test, test.timeout()))
    }

    /// Runs a ring 0 test where it can run.
    pub(crate) fn verdict(&self, test: &Test) -> Verdict {
        let runs_here = || self.place == Place::Best && matches!(probe().kvm, Kvm::Hardware { .. });
        if *self.here.get_or_init(runs_here) {
            return self.run_here(test);
        }
        self.started.get_or_init(|| {
            let place = self.place;
            let tests = self.tests.clone();
            let board = Arc::clone(&self.board);
            match place {
                Place::Best | Place::Svm => run_in_labs(&tests, &board),
                Place::Intel => {
                    thread::spawn(move || run_on_intel(&tests, &board));
                }
            }
        });
        self.board.wait_for(test.name())
    }
}

/// The tests that are still due.
type Queue = Arc<Mutex<VecDeque<Test>>>;

fn lock(queue: &Queue) -> MutexGuard<'_, VecDeque<Test>> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the tests in as many labs as are worth it, the longest first, so that
/// no lab is left with a long one at the end.
fn run_in_labs(tests: &[Test], board: &Arc<Board>) {
    let mut due = tests.to_vec();
    due.sort_by_key(|test| std::cmp::Reverse(test.timeout()));
    let cores = thread::available_parallelism().map_or(1, usize::from);
    // Waking a lab takes as long as a few short tests.
    let worth = due.len().div_ceil(TESTS_WORTH_A_LAB);
    let labs = number("DUNE_TEST_LABS", cores).clamp(1, worth.max(1));
    let queue: Queue = Arc::new(Mutex::new(due.into()));
    // A lab ends with the thread that starts it.
    for _ in 0..labs {
        let queue = Arc::clone(&queue);
        let board = Arc::clone(board);
        thread::spawn(move || serve(&queue, &board));
    }
}

/// One lab, and another one whenever a test took it down.
fn serve(queue: &Queue, board: &Board) {
    let mut session = None;
    loop {
        let Some(test) = lock(queue).pop_front() else {
            return;
        };
        let lab = match session.take().map_or_else(start_lab, Ok) {
            Ok(lab) => lab,
            Err(error) => {
                // Where there is no lab for one, there is none for the others.
                let mut rest = std::mem::take(&mut *lock(queue));
                rest.push_front(test);
                return give_up(&rest, board, &error);
            }
        };
        session = run_on_svm(lab, test, board);
    }
}

/// Runs a test; returns the lab if it lives.
fn run_on_svm(mut lab: Session, test: Test, board: &Board) -> Option<Session> {
    let limit = test.timeout() * SVM_TIMEOUT_FACTOR;
    let command = batch(SVM_TIMEOUT_FACTOR, &[test]).timeout(Some(limit + GRACE));
    let mut listener = Listener::new(board, std::slice::from_ref(&test));
    let mut output = Output {
        stdout: &mut listener,
        stderr: &mut std::io::stderr(),
    };
    let result = lab.run(&command, Input::Nothing, &mut output);
    let why = match &result {
        Ok(outcome) => format!("its process in the lab ended with code {}", outcome.code),
        Err(error) => format!("it took the lab down: {error}"),
    };
    // The first verdict is the one that counts.
    board.post(test.name(), Verdict::failed(why, String::new()));
    result.is_ok().then_some(lab)
}

/// Runs the tests on the Intel lab, all in one boot, because a boot takes a
/// minute. When a test takes the guest down, it has failed, and another lab
/// goes on behind it.
fn run_on_intel(tests: &[Test], board: &Board) {
    let mut due: VecDeque<Test> = tests.iter().copied().collect();
    while !due.is_empty() {
        let all: Vec<Test> = due.iter().copied().collect();
        let limit = all.iter().map(Test::timeout).sum::<Duration>() * INTEL_TIMEOUT_FACTOR;
        let command = batch(INTEL_TIMEOUT_FACTOR, &all).timeout(Some(limit + GRACE));
        let mut listener = Listener::new(board, &all);
        let mut output = Output {
            stdout: &mut listener,
            stderr: &mut std::io::stderr(),
        };
        let result = dune_lab::run_on_intel(&Config::default(), &command, &[], &mut output);
        let (running, finished) = (listener.running, listener.finished);
        due.retain(|test| !finished.contains(&test.name()));
        let why = match result {
            Ok(outcome) => format!(
                "the batch in the lab ended early with code {}",
                outcome.code
            ),
            Err(error) => error.to_string(),
        };
        if let Some(name) = running {
            let message = format!("it took the lab down: {why}");
            board.post(name, Verdict::failed(message, String::new()));
            due.retain(|test| test.name() != name);
        } else if finished.is_empty() {
            // Not even a first test was begun: another lab would fare no better.
            return give_up(&due, board, &why);
        }
    }
}

/// This binary again, in the guest, to run these tests.
fn batch(factor: u32, tests: &[Test]) -> Command {
    // Without a path of its own the binary is not found, and the lab says so.
    let program = std::env::current_exe().unwrap_or_default();
    Command::new(program)
        .args([role::BATCH, &factor.to_string()])
        .args(tests.iter().map(Test::name))
}

fn start_lab() -> Result<Session, LabError> {
    Session::start(&Config {
        cpus: number("DUNE_TEST_CPUS", 2),
        memory_mib: number("DUNE_TEST_MEMORY", 2048),
        ..Config::default()
    })
}

/// A number from the environment.
fn number<T: std::str::FromStr>(name: &str, default: T) -> T {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

/// No lab: the tests that are still due are ignored, loudly, or fail.
fn give_up(due: &VecDeque<Test>, board: &Board, why: &dyn std::fmt::Display) {
    let required = std::env::var_os("DUNE_REQUIRE_RING0").is_some_and(|value| value == "1");
    if !required {
        eprintln!(
            "\n*** {} ring 0 tests are IGNORED: this machine's KVM cannot run ring 0, and the lab \
             cannot run here:\n*** {why}\n*** (with DUNE_REQUIRE_RING0=1 they fail)\n",
            due.len()
        );
    }
    for test in due {
        let message = format!("needs ring 0, and the lab cannot run: {why}");
        let verdict = if required {
            Verdict::failed(message, String::new())
        } else {
            Verdict::ignored(message)
        };
        board.post(test.name(), verdict);
    }
}

/// Takes the batch's standard output apart into events.
struct Listener<'a> {
    board: &'a Board,
    names: Vec<&'static str>,
    running: Option<&'static str>,
    finished: Vec<&'static str>,
    line: Vec<u8>,
}

impl<'a> Listener<'a> {
    fn new(board: &'a Board, tests: &[Test]) -> Self {
        Listener {
            board,
            names: tests.iter().map(Test::name).collect(),
            running: None,
            finished: Vec::new(),
            line: Vec::new(),
        }
    }

    fn take(&mut self, line: &[u8]) {
        let Ok(event) = serde_json::from_slice::<Event>(line) else {
            // Not ours; a person may want to see it.
            eprintln!("{}", String::from_utf8_lossy(line));
            return;
        };
        let find = |name: &str| self.names.iter().copied().find(|known| *known == name);
        match event {
            Event::Started(name) => self.running = find(&name),
            Event::Finished(name, verdict) => {
                self.running = None;
                if let Some(name) = find(&name) {
                    self.finished.push(name);
                    self.board.post(name, verdict);
                }
            }
        }
    }
}

impl Write for Listener<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.line.extend_from_slice(bytes);
        while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
            let rest = self.line.split_off(end + 1);
            let line = std::mem::replace(&mut self.line, rest);
            self.take(&line[..end]);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A counting semaphore.
#[derive(Debug)]
struct Slots {
    free: Mutex<usize>,
    freed: Condvar,
}

impl Slots {
    fn new(count: usize) -> Slots {
        Slots {
            free: Mutex::new(count),
            freed: Condvar::new(),
        }
    }

    fn with<T>(&self, action: impl FnOnce() -> T) -> T {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        while *free == 0 {
            free = self
                .freed
                .wait(free)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *free -= 1;
        drop(free);
        let result = action();
        *self.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.freed.notify_one();
        result
    }
}
