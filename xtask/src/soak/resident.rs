//! The program that stays for the whole soak: if the sandbox leaks anything by
//! a thread, a child, a mapping or a signal, it shows here.

use std::io::{BufRead, BufReader};
use std::process::Child;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::load::RESIDENT;
use super::run::{PATIENCE, Runner, collect, end_group};

/// The program, and what it had once it was warm.
#[derive(Debug)]
pub(super) struct Resident {
    child: Child,
    lines: Receiver<String>,
    stderr: thread::JoinHandle<String>,
    warm: Usage,
}

/// What a process has.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    descriptors: u64,
    threads: u64,
    mappings: u64,
    resident_kib: u64,
}

/// Rounds after which everything that is kept for later is there.
const WARM: u64 = 5;
/// What may come and go between two looks.
const MORE_DESCRIPTORS: u64 = 8;
const MORE_THREADS: u64 = 4;
const MORE_MAPPINGS: u64 = 64;
const MORE_KIB: u64 = 32 << 10;

impl Resident {
    pub(super) fn start(runner: &Runner) -> Result<Self, String> {
        let mut child = runner.start("/usr/bin/python3", &["-c", RESIDENT])?;
        let stdout = child.stdout.take();
        let stderr = collect(child.stderr.take());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            let Some(stdout) = stdout else { return };
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut resident = Self {
            warm: Usage::default(),
            child,
            lines,
            stderr,
        };
        for _ in 0..WARM {
            if let Err(trouble) = resident.next_line(Instant::now() + PATIENCE) {
                return Err(resident.give_up(trouble));
            }
        }
        resident.warm = Usage::of(resident.child.id());
        Ok(resident)
    }

    /// Asks the program to end, and compares.
    ///
    /// # Errors
    /// It hangs, went wrong, or has more than it had.
    pub(super) fn end(mut self) -> Result<String, String> {
        let outcome = self.compare();
        match outcome {
            Ok(summary) => Ok(summary),
            Err(trouble) => Err(self.give_up(trouble)),
        }
    }

    fn compare(&mut self) -> Result<String, String> {
        // It must still be at work.
        while self.lines.try_recv().is_ok() {}
        let deadline = Instant::now() + PATIENCE;
        self.next_line(deadline)?;
        let now = Usage::of(self.child.id());
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            kill_process(pid, Signal::TERM).map_err(|error| format!("it has ended: {error}"))?;
        }
        let last = loop {
            let line = self.next_line(deadline)?;
            if let Some(rounds) = line.strip_prefix("end ") {
                break rounds.to_owned();
            }
        };
        let status = self.child.wait().map_err(|error| error.to_string())?;
        if !status.success() {
            return Err(format!("it ended with {status}"));
        }
        let summary = format!(
            "the program that stays: {last} rounds; descriptors {} then {}, threads {} then {}, \
             mappings {} then {}, resident {} then {} KiB",
            self.warm.descriptors,
            now.descriptors,
            self.warm.threads,
            now.threads,
            self.warm.mappings,
            now.mappings,
            self.warm.resident_kib,
            now.resident_kib
        );
        if now.has_more_than(&self.warm) {
            return Err(format!("it leaks: {summary}"));
        }
        Ok(summary)
    }

    fn next_line(&self, deadline: Instant) -> Result<String, String> {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left.max(Duration::from_millis(1))) {
            Ok(line) if line.starts_with("wrong") => Err(line),
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => Err("it hangs".to_owned()),
            Err(RecvTimeoutError::Disconnected) => Err("it ended early".to_owned()),
        }
    }

    /// Ends the program; the trouble with its last words.
    fn give_up(mut self, trouble: String) -> String {
        end_group(&mut self.child);
        let said = self.stderr.join().unwrap_or_default();
        format!("{trouble}; it said {said:?}")
    }
}

impl Usage {
    fn of(pid: u32) -> Self {
        let count = |folder: &str| {
            std::fs::read_dir(format!("/proc/{pid}/{folder}")).map_or(0, |list| list.count() as u64)
        };
        let text =
            |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let resident = text("status");
        let resident = resident
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"));
        Self {
            descriptors: count("fd"),
            threads: count("task"),
            mappings: text("maps").lines().count() as u64,
            resident_kib: resident
                .and_then(|value| value.split_whitespace().next()?.parse().ok())
                .unwrap_or(0),
        }
    }

    fn has_more_than(&self, before: &Self) -> bool {
        self.descriptors > before.descriptors + MORE_DESCRIPTORS
            || self.threads > before.threads + MORE_THREADS
            || self.mappings > before.mappings + MORE_MAPPINGS
            || self.resident_kib > before.resident_kib + MORE_KIB
    }
}
