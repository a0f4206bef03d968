//! Programs that stay for the whole soak: if the sandbox leaks anything by a
//! thread, a child, a mapping, a signal or a connection, it shows here.

use std::io::{BufRead, BufReader};
use std::process::Child;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::load::Stay;
use super::run::{Runner, collect, end_group, patience};

/// The program, and what it had once it was warm.
#[derive(Debug)]
pub(super) struct Resident {
    stay: &'static Stay,
    child: Child,
    lines: Receiver<String>,
    stderr: thread::JoinHandle<String>,
    warm: Usage,
}

/// What a process has.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    descriptors: u64,
    vcpus: u64,
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
/// Memory slots that a program may have at its end, whatever it did before: more than
/// those from which on the guard looks for ones that are of no use any more, and as many
/// as a guest with addresses of 40 bits has at all.
const MOST_SLOTS: u64 = 1024;

impl Resident {
    pub(super) fn start(runner: &Runner, stay: &'static Stay) -> Result<Self, String> {
        let mut child = runner.start(&["--stats"], "/usr/bin/python3", &["-c", stay.script])?;
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
            stay,
            warm: Usage::default(),
            child,
            lines,
            stderr,
        };
        for _ in 0..WARM {
            match resident.next_line(Instant::now() + patience()) {
                Ok(line) => {
                    if let Some(port) = line.strip_prefix("port ") {
                        runner.serve_at(port);
                    }
                }
                Err(trouble) => return Err(resident.give_up(&trouble)),
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
        match self.compare() {
            Ok(summary) => self.look_at_the_end(summary),
            Err(trouble) => Err(self.give_up(&trouble)),
        }
    }

    fn compare(&mut self) -> Result<String, String> {
        // It must still be at work.
        while self.lines.try_recv().is_ok() {}
        let deadline = Instant::now() + patience();
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
            "{last} rounds; descriptors {} then {}, vCPUs {} then {}, threads {} then {}, mappings \
             {} then {}, resident {} then {} KiB",
            self.warm.descriptors,
            now.descriptors,
            self.warm.vcpus,
            now.vcpus,
            self.warm.threads,
            now.threads,
            self.warm.mappings,
            now.mappings,
            self.warm.resident_kib,
            now.resident_kib
        );
        if now.has_more_than(&self.warm, self.stay.threads) {
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

    /// What the sandbox says that the program held at its end.
    fn look_at_the_end(self, summary: String) -> Result<String, String> {
        let name = self.stay.name;
        let said = self.stderr.join().unwrap_or_default();
        let (vcpus, slots) = holdings(&said)
            .ok_or_else(|| format!("{name}: no line of statistics at its end, but {said:?}"))?;
        let summary =
            format!("{name}: {summary}; {vcpus} vCPUs and {slots} memory slots at its end");
        if vcpus > self.stay.threads || slots > MOST_SLOTS {
            return Err(format!("it leaks: {summary}"));
        }
        Ok(summary)
    }

    /// Ends the program; the trouble with its last words.
    fn give_up(mut self, trouble: &str) -> String {
        end_group(&mut self.child);
        let said = self.stderr.join().unwrap_or_default();
        format!("{}: {trouble}; it said {said:?}", self.stay.name)
    }
}

/// Virtual CPUs and memory slots, of the line that `dune run --stats` prints.
fn holdings(text: &str) -> Option<(u64, u64)> {
    let number = |what: &str| {
        let mut parts = text.lines().flat_map(|line| line.split(", "));
        parts.find_map(|part| {
            let (count, unit) = part.split_once(' ')?;
            unit.starts_with(what).then(|| count.parse().ok())?
        })
    };
    Some((number("vCPU")?, number("memory slot")?))
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
        let is_vcpu = |entry: &std::fs::DirEntry| {
            std::fs::read_link(entry.path())
                .is_ok_and(|target| target.to_string_lossy().contains("kvm-vcpu"))
        };
        let vcpus = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .map_or(0, |list| list.flatten().filter(is_vcpu).count() as u64);
        // A thread's vCPU is one of its descriptors, and is counted by itself.
        Self {
            descriptors: count("fd").saturating_sub(vcpus),
            vcpus,
            threads: count("task"),
            mappings: text("maps").lines().count() as u64,
            resident_kib: resident
                .and_then(|value| value.split_whitespace().next()?.parse().ok())
                .unwrap_or(0),
        }
    }

    /// Threads come and go, and each was one of `threads` at most.
    fn has_more_than(&self, before: &Self, threads: u64) -> bool {
        self.descriptors > before.descriptors + MORE_DESCRIPTORS
            || self.vcpus > threads
            || self.threads > before.threads + MORE_THREADS
            || self.mappings > before.mappings + MORE_MAPPINGS
            || self.resident_kib > before.resident_kib + MORE_KIB
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_statistics_are_understood() {
        let line =
            "dune: placement host, 9 system calls, 1 page fault, 1 vCPU, 12 memory slots, 6.4 ms\n";
        assert_eq!(holdings(line), Some((1, 12)));
        assert_eq!(holdings("dune: something else\n"), None);
    }
}
