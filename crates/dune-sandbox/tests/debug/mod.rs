//! Programs in the sandbox under gdb. A test binary that uses this is the
//! harness and the sandbox; the programs are C, compiled where the test runs.
#![allow(dead_code, reason = "each test target uses a part of it")]

pub(crate) mod scenarios;

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Output, Stdio};

use dune_sandbox::debug::{Address, Debugger};
use dune_sandbox::engine::Engine;
use dune_sandbox::engine::in_guest::InGuest;
use dune_sandbox::engine::on_host::OnHost;

const ROLE: &str = "DUNE_TEST_DEBUG";
/// What the sandbox prints before its program.
const READY: &str = "ready for gdb";

/// What this process was started for, if it is not the harness: to run a
/// program (the second argument) that waits for gdb at a path (the first).
pub(crate) fn role() -> Option<ExitCode> {
    let role = std::env::var(ROLE).ok()?;
    let words: Vec<String> = std::env::args().skip(1).collect();
    let run = || -> Result<dune_sandbox::Outcome, Box<dyn std::error::Error>> {
        let debugger = Debugger::listen(&Address::Unix(words[0].clone().into()))?;
        println!("{READY}");
        let engine: Box<dyn Engine> = if role == "guest" {
            Box::new(InGuest::new()?)
        } else {
            Box::new(OnHost::new()?)
        };
        let command = dune_sandbox::Command::new(&words[1])
            .args(&words[2..])
            .env_remove(ROLE);
        Ok(command.debugger(debugger).run(engine)?)
    };
    Some(match run() {
        Ok(outcome) => outcome.end.leave(),
        Err(error) => {
            println!("the sandbox failed: {error}");
            ExitCode::from(125)
        }
    })
}

/// A program in the sandbox, waiting for gdb.
pub(crate) struct Debugged {
    program: PathBuf,
    socket: PathBuf,
    child: Option<Child>,
    stdout: Option<BufReader<std::process::ChildStdout>>,
    folder: tempfile::TempDir,
}

/// What became of a program and of its gdb.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) gdb: String,
    pub(crate) output: String,
    pub(crate) status: ExitStatus,
}

impl Debugged {
    /// Compiles `source` and starts it.
    pub(crate) fn start(placement: &str, source: &str) -> Self {
        for tool in ["gdb", "gcc"] {
            if Command::new(tool).arg("--version").output().is_err() {
                dune_testing::ignore(format!("{tool} is not installed"));
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("program.c"), source).unwrap();
        let compiled = Command::new("gcc")
            .args(["-g", "-O0", "-pthread", "-fcf-protection=none", "-w"])
            .args(["-o", "program", "program.c"])
            .current_dir(folder.path())
            .status()
            .unwrap();
        assert!(compiled.success());
        let (program, socket) = (path("program"), path("socket"));
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(ROLE, placement)
            .args([&socket, &program])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().map(BufReader::new);
        let mut debugged = Self {
            program,
            socket,
            child: Some(child),
            stdout,
            folder,
        };
        assert_eq!(debugged.line().trim_end(), READY);
        debugged
    }

    /// gdb, attached and about to execute these commands.
    pub(crate) fn gdb(&self, commands: &[&str]) -> Command {
        let mut gdb = self.gdb_at_its_prompt(commands);
        gdb.arg("-batch").stdin(Stdio::null());
        gdb
    }

    /// The same, and it waits for more afterwards.
    pub(crate) fn gdb_at_its_prompt(&self, commands: &[&str]) -> Command {
        let mut gdb = Command::new("gdb");
        gdb.args(["-nx", "-quiet"]);
        let attach = format!("target remote {}", self.socket.display());
        let settings = [
            "set sysroot /",
            "set debuginfod enabled off",
            "set width 0",
            "set confirm off",
            "set breakpoint pending on",
            // The first answer may take its time under load.
            "set remotetimeout 60",
            "set tcp connect-timeout 60",
        ];
        for command in settings.iter().chain([&attach.as_str()]).chain(commands) {
            gdb.args(["-ex", command]);
        }
        gdb.arg(&self.program).current_dir(self.folder.path());
        gdb.stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        gdb
    }

    /// Puts a file where gdb finds it.
    pub(crate) fn put(&self, name: &str, text: &str) {
        std::fs::write(self.folder.path().join(name), text).unwrap();
    }

    /// A connection without gdb.
    pub(crate) fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).unwrap()
    }

    /// Where gdb connects to.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The next line that the program prints.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        let stdout = self.stdout.as_mut().unwrap();
        stdout.read_line(&mut line).unwrap();
        line
    }

    /// Waits for the program.
    pub(crate) fn end(mut self, gdb: &Output) -> Ended {
        let mut output = String::new();
        let mut stdout = self.stdout.take().unwrap();
        stdout.read_to_string(&mut output).unwrap();
        let status = self.child.take().unwrap().wait().unwrap();
        let gdb = [gdb.stdout.as_slice(), &gdb.stderr].concat();
        let ended = Ended {
            gdb: String::from_utf8_lossy(&gdb).into_owned(),
            output,
            status,
        };
        // For whoever looks at a failure.
        println!("{}", ended.gdb);
        println!("the program: {:?}, {}", ended.output, ended.status);
        ended
    }
}

impl Drop for Debugged {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs `source` in the sandbox under gdb with these commands.
pub(crate) fn debug(placement: &str, source: &str, commands: &[&str]) -> Ended {
    let debugged = Debugged::start(placement, source);
    let output = debugged.gdb(commands).output().unwrap();
    debugged.end(&output)
}

impl Ended {
    /// Panics unless gdb's output has `texts` in this order.
    pub(crate) fn says(&self, texts: &[&str]) {
        let mut rest = self.gdb.as_str();
        for text in texts {
            let Some(at) = rest.find(text) else {
                panic!("gdb does not say {text:?} (in this place)");
            };
            rest = &rest[at + text.len()..];
        }
    }

    /// Panics unless the program has ended with this output, and status 0.
    pub(crate) fn printed(&self, output: &str) {
        assert_eq!(
            (self.output.as_str(), self.status.code()),
            (output, Some(0))
        );
    }
}

/// The line of `source` that holds `mark`, counted from 1.
pub(crate) fn line_of(source: &str, mark: &str) -> usize {
    let lines = source.lines().position(|line| line.contains(mark));
    lines.unwrap() + 1
}

/// Whether the CPU has this feature.
pub(crate) fn cpu_has(feature: &str) -> bool {
    let text = std::fs::read_to_string(Path::new("/proc/cpuinfo")).unwrap();
    let flags = text.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|line| line.split_whitespace().any(|word| word == feature))
}
