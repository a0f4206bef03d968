//! One program of the soak: its time limit, its end, what it leaves behind.

use std::io::Read;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use super::load::{End, Load};
use crate::process;

/// Runs programs in the sandbox.
#[derive(Debug)]
pub(super) struct Runner {
    dune: PathBuf,
    /// Marks every process of this soak, by a variable of its environment.
    mark: String,
    /// Where the server of this soak listens.
    port: OnceLock<String>,
    count: AtomicU64,
}

/// A variable of the environment of every process of a soak.
const MARK: &str = "DUNE_SOAK";
const PORT: &str = "DUNE_SOAK_PORT";
/// For any program; they take a second on an idle machine, and this may be a busy one.
const PATIENCE: Duration = Duration::from_secs(150);
/// How much slower an emulated machine is: a program that takes a second on a real one
/// takes ten there.
const EMULATED: u32 = 6;
/// In which what was killed must be gone.
const GONE: Duration = Duration::from_secs(20);
const STEP: Duration = Duration::from_millis(10);

/// In which any program must end.
pub(super) fn patience() -> Duration {
    if super::is_lab() {
        PATIENCE * EMULATED
    } else {
        PATIENCE
    }
}

impl Runner {
    pub(super) fn new(dune: PathBuf) -> Self {
        Self {
            dune,
            mark: format!("{MARK}={}", std::process::id()),
            port: OnceLock::new(),
            count: AtomicU64::new(0),
        }
    }

    /// From now on programs are told of a server at `port`.
    pub(super) fn serve_at(&self, port: &str) {
        // There is one server in a soak.
        let _ = self.port.set(port.to_owned());
    }

    /// Programs that ended as they must.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// A program in the sandbox, in a process group of its own.
    pub(super) fn start(
        &self,
        options: &[&str],
        program: &str,
        arguments: &[&str],
    ) -> Result<Child, String> {
        let mut command = Command::new(&self.dune);
        command
            .args(["run", "--quiet"])
            .args(options)
            .args(["--", program])
            .args(arguments)
            .env(MARK, std::process::id().to_string())
            .env(PORT, self.port.get().map_or("", String::as_str))
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let started = command.spawn();
        started.map_err(|error| format!("start {}: {error}", self.dune.display()))
    }

    /// Runs a program to the end that it must have.
    pub(super) fn run(&self, load: &Load, round: u64) -> Result<(), String> {
        let mut child = self.start(&[], load.program, load.arguments)?;
        let outcome = match load.end {
            End::Prints(expected) => finish(&mut child, expected),
            End::Killed => {
                // From before the first instruction to well into its work.
                thread::sleep(Duration::from_millis(
                    round % 16 * if super::is_lab() { 400 } else { 25 },
                ));
                end_group(&mut child);
                Ok(())
            }
        };
        if outcome.is_err() {
            end_group(&mut child);
        }
        outcome?;
        wait_until_gone(&child)?;
        self.count.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Processes of this soak that are still there, whatever group they are in.
    /// They are ended.
    pub(super) fn leftovers(&self) -> Option<String> {
        let own = std::process::id();
        let mut found = process::processes();
        found.retain(|&id| id != own && is_marked(id, &self.mark));
        found.iter().copied().for_each(process::kill);
        (!found.is_empty()).then(|| format!("processes were left behind: {found:?}"))
    }
}

fn is_marked(id: u32, mark: &str) -> bool {
    std::fs::read(format!("/proc/{id}/environ")).is_ok_and(|environment| {
        environment
            .split(|byte| *byte == 0)
            .any(|one| one == mark.as_bytes())
    })
}

/// Waits for a program's end and looks at what it printed.
fn finish(child: &mut Child, expected: &str) -> Result<(), String> {
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let deadline = Instant::now() + patience();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => thread::sleep(STEP),
            Ok(None) => {
                end_group(child);
                return Err(format!(
                    "it hangs: not done after {} s; it printed {:?} and {:?}",
                    patience().as_secs(),
                    stdout.join().unwrap_or_default(),
                    stderr.join().unwrap_or_default()
                ));
            }
            Err(error) => return Err(format!("wait: {error}")),
        }
    };
    let printed = stdout.join().unwrap_or_default();
    if status.success() && printed == expected {
        return Ok(());
    }
    Err(format!(
        "{status}; it printed {printed:?}, not {expected:?}, and {:?}",
        stderr.join().unwrap_or_default()
    ))
}

pub(super) fn collect(stream: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            // What was read before an error counts.
            let _ = stream.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Ends a program and all of its process group.
pub(super) fn end_group(child: &mut Child) {
    if let Some(group) = group(child) {
        // It may have ended by itself.
        let _ = kill_process_group(group, Signal::KILL);
    }
    // Killed: it ends.
    let _ = child.wait();
}

fn group(child: &Child) -> Option<Pid> {
    Pid::from_raw(i32::try_from(child.id()).ok()?)
}

/// A program that has ended must not have left processes in its group.
fn wait_until_gone(child: &Child) -> Result<(), String> {
    let Some(group) = group(child) else {
        return Ok(());
    };
    let deadline = Instant::now() + GONE;
    while rustix::process::test_kill_process_group(group).is_ok() {
        if Instant::now() >= deadline {
            let _ = kill_process_group(group, Signal::KILL);
            return Err(format!(
                "processes of it are left {} s after its end",
                GONE.as_secs()
            ));
        }
        thread::sleep(STEP);
    }
    Ok(())
}
