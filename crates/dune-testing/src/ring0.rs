//! Where the ring 0 tests run, and the lab in which they do when this machine
//! cannot, or when the Intel side is to be tested.
//!
//! One lab serves all ring 0 tests of the target: it is brought up when the
//! first of them is due, on a thread of its own. When a test takes the guest
//! down, another lab goes on, with that test first: it is run once more, and
//! has failed if it does it again. (QEMU's emulation of SVM with several CPUs
//! locks up now and then, with no interrupt taken any more; a test that is at
//! fault does it every time.) A test that fails in the lab is run once more
//! too, and both are said loudly.

use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use dune_kvm::probe::{Kvm, probe};
use dune_lab::{Command, Config, Input, LabError, Outcome, Output, Session};

use crate::event::{Event, Verdict};
use crate::test::{Outcome as TestOutcome, Test};
use crate::{child, role};

/// How much longer than its own limit a test may be silent before the guest as
/// a whole counts as hanging.
const GRACE: Duration = Duration::from_secs(60);

/// How slow a lab is: time limits are multiplied by this.
const SVM_TIMEOUT_FACTOR: u32 = 3;
const INTEL_TIMEOUT_FACTOR: u32 = 10;

/// Virtual CPUs of the lab where `DUNE_TEST_CPUS` says nothing.
pub(crate) static DEFAULT_CPUS: AtomicU32 = AtomicU32::new(2);

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

    fn timeout_factor(self) -> u32 {
        match self {
            Place::Best | Place::Svm => SVM_TIMEOUT_FACTOR,
            Place::Intel => INTEL_TIMEOUT_FACTOR,
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
            // The lab ends with the thread that starts it.
            thread::spawn(move || run_in_labs(place, &tests, &board));
        });
        self.board.wait_for(test.name())
    }
}

fn run_in_labs(place: Place, tests: &[Test], board: &Board) {
    let mut due: VecDeque<Test> = tests.iter().copied().collect();
    let mut suspects: Vec<&'static str> = Vec::new();
    let mut again: Vec<&'static str> = Vec::new();
    while !due.is_empty() {
        let program = match std::env::current_exe() {
            Ok(program) => program,
            Err(error) => return give_up(&due, board, &error),
        };
        let factor = place.timeout_factor();
        let command = Command::new(program)
            .args([role::BATCH, &factor.to_string()])
            .args(due.iter().map(Test::name));
        let limits: Vec<Duration> = due.iter().map(|test| test.timeout() * factor).collect();
        let mut listener = Listener {
            due: &mut due,
            board,
            running: None,
            again: &mut again,
            progress: false,
            line: Vec::new(),
        };
        let result = match place {
            Place::Best | Place::Svm => run_on_svm(&command, &limits, &mut listener),
            Place::Intel => run_on_intel(&command, &limits, &mut listener),
        };
        let running = listener.running.take();
        let progress = listener.progress;
        let why = match result {
            Ok(outcome) => format!(
                "the batch in the lab ended early with code {}",
                outcome.code
            ),
            Err(error) => error.to_string(),
        };
        match running {
            Some(name) if !suspects.contains(&name) => {
                eprintln!("*** {name} took the lab down, and is run once more: {why}");
                suspects.push(name);
                if let Some(at) = due.iter().position(|test| test.name() == name) {
                    due.swap(0, at);
                }
            }
            Some(name) => {
                let message = format!("it took the lab down: {why}");
                board.post(name, Verdict::failed(message, String::new()));
                due.retain(|test| test.name() != name);
            }
            // Not even a first test was begun: another lab would fare no better.
            None if !due.is_empty() && !progress => return give_up(&due, board, &why),
            None => {}
        }
    }
}

fn run_on_svm(
    command: &Command,
    limits: &[Duration],
    listener: &mut Listener<'_>,
) -> Result<Outcome, LabError> {
    let slowest = limits.iter().max().copied().unwrap_or_default();
    let command = command.clone().idle_timeout(Some(slowest + GRACE));
    let mut output = Output {
        stdout: listener,
        stderr: &mut std::io::stderr(),
    };
    start_lab()?.run(&command, Input::Nothing, &mut output)
}

fn run_on_intel(
    command: &Command,
    limits: &[Duration],
    listener: &mut Listener<'_>,
) -> Result<Outcome, LabError> {
    let all = limits.iter().sum::<Duration>();
    let command = command.clone().timeout(Some(all + GRACE));
    let mut output = Output {
        stdout: listener,
        stderr: &mut std::io::stderr(),
    };
    dune_lab::run_on_intel(&Config::default(), &command, &[], &mut output)
}

fn start_lab() -> Result<Session, LabError> {
    let number = |name: &str, default: u32| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(default)
    };
    Session::start(&Config {
        cpus: number("DUNE_TEST_CPUS", DEFAULT_CPUS.load(Ordering::Relaxed)),
        memory_mib: number("DUNE_TEST_MEMORY", 2048),
        ..Config::default()
    })
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
    due: &'a mut VecDeque<Test>,
    board: &'a Board,
    running: Option<&'static str>,
    /// Tests that failed once.
    again: &'a mut Vec<&'static str>,
    progress: bool,
    line: Vec<u8>,
}

impl Listener<'_> {
    fn take(&mut self, line: &[u8]) {
        let Ok(event) = serde_json::from_slice::<Event>(line) else {
            // Not ours; a person may want to see it.
            eprintln!("{}", String::from_utf8_lossy(line));
            return;
        };
        let find = |due: &VecDeque<Test>, name: &str| {
            due.iter()
                .map(Test::name)
                .find(|candidate| *candidate == name)
        };
        match event {
            Event::Started(name) => self.running = find(self.due, &name),
            Event::Finished(name, verdict) => {
                self.running = None;
                self.progress = true;
                if let Some(name) = find(self.due, &name) {
                    if verdict.outcome == TestOutcome::Failed && !self.again.contains(&name) {
                        eprintln!("*** {name} failed in the lab, and is run once more");
                        self.again.push(name);
                        return;
                    }
                    self.due.retain(|test| test.name() != name);
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
