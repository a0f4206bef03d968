//! One program, natively or in the sandbox, to its end or its limit.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process_group};

/// Runs programs, one after the other, in a folder that is made anew for each.
#[derive(Debug)]
pub(super) struct Runner {
    dune: PathBuf,
    placement: String,
    limit: Duration,
    /// The same for both runs: its name is in what programs print.
    folder: PathBuf,
    path: std::ffi::OsString,
}

/// A run.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) seconds: f64,
    pub(super) seen: Result<Seen, String>,
}

/// What a program left.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) status: ExitStatus,
    /// Standard output and standard error, as they came.
    pub(super) output: String,
}

impl Runner {
    pub(super) fn new(dune: PathBuf, placement: &str, limit: Duration) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("dune-programs-{}", std::process::id()));
        // Debian's programs; and the cargo that runs this chore where Debian's is not there.
        let mut path: Vec<PathBuf> = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
            .map(PathBuf::from)
            .into();
        let own_cargo = std::env::var_os("CARGO").map(PathBuf::from).or_else(|| {
            let path = std::env::var_os("PATH")?;
            std::env::split_paths(&path)
                .map(|folder| folder.join("cargo"))
                .find(|cargo| cargo.exists())
        });
        path.extend(own_cargo.and_then(|cargo| cargo.parent().map(Path::to_owned)));
        Ok(Self {
            dune,
            placement: placement.to_owned(),
            limit,
            folder,
            path: std::env::join_paths(path).context("the folders of programs")?,
        })
    }

    /// A shell's script on this machine.
    pub(super) fn natively(&self, script: &str) -> Ended {
        self.run(
            self.command("/bin/sh"),
            &[OsStr::new("-c"), script.as_ref()],
        )
    }

    /// A shell's script under `dune run`, all of it.
    pub(super) fn in_sandbox(&self, script: &str) -> Ended {
        let shell = self.sandboxed("/bin/sh");
        self.run(shell, &[OsStr::new("-c"), script.as_ref()])
    }

    fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let cargo_home = std::env::var_os("RUSTUP_HOME");
        let home = std::env::var_os("HOME").unwrap_or_default();
        // What a toolchain that was installed by rustup is found by.
        let rustup = cargo_home.unwrap_or_else(|| Path::new(&home).join(".rustup").into());
        command
            .env_clear()
            .env("PATH", &self.path)
            .env("HOME", &self.folder)
            .env("RUSTUP_HOME", rustup)
            .env("LC_ALL", "C.UTF-8")
            .env("TZ", "UTC")
            .current_dir(&self.folder);
        command
    }

    fn sandboxed(&self, program: &str) -> Command {
        let mut command = self.command(&self.dune);
        let placement = format!("--placement={}", self.placement);
        command.args(["run", "--quiet", &placement, "--", program]);
        command
    }

    /// Runs a command to its end; after its limit, and at its end, what is left of its
    /// process group is ended too.
    fn run(&self, mut command: Command, arguments: &[&OsStr]) -> Ended {
        let started = Instant::now();
        let seen = self.try_run(command.args(arguments));
        Ended {
            seconds: started.elapsed().as_secs_f64(),
            seen: seen.map_err(|error| format!("{error:#}")),
        }
    }

    fn try_run(&self, command: &mut Command) -> Result<Seen> {
        const STEP: Duration = Duration::from_millis(10);
        // What an earlier run left in it is of no interest.
        let _ = fs::remove_dir_all(&self.folder);
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("create {}", self.folder.display()))?;
        let (mut reader, writer) = std::io::pipe().context("make a pipe")?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(writer.try_clone().context("duplicate a pipe")?)
            .stderr(writer)
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {}", command.get_program().display()))?;
        // The command holds the other ends of the pipe.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let output = thread::spawn(move || {
            let mut bytes = Vec::new();
            // What was read before an error counts.
            let _ = reader.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        });
        let deadline = Instant::now() + self.limit;
        let mut ended = child.try_wait().context("wait")?;
        while ended.is_none() && Instant::now() < deadline {
            thread::sleep(STEP);
            ended = child.try_wait().context("wait")?;
        }
        if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
            // There may be nobody left in it.
            let _ = kill_process_group(group, Signal::KILL);
        }
        let status = child.wait().context("wait")?;
        let output = output.join().unwrap_or_default();
        if ended.is_none() {
            let last: Vec<&str> = output.lines().rev().take(5).collect();
            anyhow::bail!(
                "not done after {} s; its last lines, backwards: {last:?}",
                self.limit.as_secs()
            );
        }
        Ok(Seen { status, output })
    }

    /// Runs Python natively, or in the sandbox. `file` is a file that it writes; its text.
    pub(super) fn python(
        &self,
        place: Where,
        arguments: &[&str],
        file: &str,
    ) -> (Ended, Option<String>) {
        let python = "/usr/bin/python3";
        let command = match place {
            Where::Native => self.command(python),
            Where::Sandbox => self.sandboxed(python),
        };
        let arguments: Vec<&OsStr> = arguments.iter().map(OsStr::new).collect();
        let ended = self.run(command, &arguments);
        let text = fs::read_to_string(self.folder.join(file)).ok();
        (ended, text)
    }
}

/// Where Python is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Where {
    Native,
    Sandbox,
}

impl Drop for Runner {
    fn drop(&mut self) {
        // What is left lies in the folder for temporary files.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl Seen {
    /// In what the sandbox's run differs from this one.
    pub(super) fn differences(&self, sandboxed: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        if self.status != sandboxed.status {
            differences.push(format!(
                "it ended by {} natively, by {} in the sandbox",
                ending(self.status),
                ending(sandboxed.status)
            ));
        }
        if self.output != sandboxed.output {
            differences.push(format!(
                "natively:\n{}in the sandbox:\n{}",
                excerpt(&self.output, &sandboxed.output),
                excerpt(&sandboxed.output, &self.output)
            ));
        }
        differences
    }
}

fn ending(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("signal {signal}"),
        None => format!("code {}", status.code().unwrap_or_default()),
    }
}

/// The text from the line in which it differs from `other`.
fn excerpt(text: &str, other: &str) -> String {
    const LINES: usize = 8;
    let same = text
        .lines()
        .zip(other.lines())
        .take_while(|(line, other)| line == other)
        .count();
    let lines = text.lines().skip(same).take(LINES);
    lines.map(|line| format!("  {line:.300}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(code: i32, output: &str) -> Seen {
        Seen {
            status: ExitStatus::from_raw(code << 8),
            output: output.to_owned(),
        }
    }

    #[test]
    fn every_difference_is_told() {
        let native = seen(0, "a\nb\nc\n");
        assert!(native.differences(&seen(0, "a\nb\nc\n")).is_empty());
        let told = native.differences(&seen(1, "a\nx\nc\n")).join("\n");
        assert_eq!(
            told,
            "it ended by code 0 natively, by code 1 in the sandbox\n\
             natively:\n  b\n  c\nin the sandbox:\n  x\n  c\n"
        );
    }
}
