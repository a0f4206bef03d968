//! One test in a process of its own.

use std::fs;
use std::io::{self, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::event::Verdict;
use crate::test::Test;
use crate::{IGNORED_CODE, role};

/// How long the output of a test may stay open after its end, held by
/// processes that it left behind, before they are killed.
const LINGER: Duration = Duration::from_secs(1);

/// Output beyond this is cut in the middle.
const MAX_OUTPUT: usize = 64 << 10;

/// Is the child: runs the test of this name.
pub(crate) fn be(tests: &[Test], name: &str) -> ExitCode {
    let Some(test) = tests.iter().find(|test| test.name() == name) else {
        eprintln!("this test target has no test {name}");
        return ExitCode::FAILURE;
    };
    (test.body())();
    ExitCode::SUCCESS
}

/// Runs a test in a child process and waits for its end, or for the end of its
/// time.
pub(crate) fn run(test: &Test, limit: Duration) -> Verdict {
    match try_run(test, limit) {
        Ok(verdict) => verdict,
        Err(error) => Verdict::failed(
            format!("the harness could not run it in a process of its own: {error}"),
            String::new(),
        ),
    }
}

fn try_run(test: &Test, limit: Duration) -> io::Result<Verdict> {
    let (mut output, writer) = io::pipe()?;
    let mut child = Command::new(std::env::current_exe()?)
        .args([role::RUN, test.name()])
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        // A group of its own: what it starts ends with it.
        .process_group(0)
        .spawn()?;
    let (sender, chunks) = mpsc::channel();
    thread::spawn(move || {
        let mut chunk = vec![0; 8 << 10];
        while let Ok(count) = output.read(&mut chunk) {
            if count == 0 || sender.send(chunk[..count].to_vec()).is_err() {
                break;
            }
        }
    });
    let started = Instant::now();
    let (status, threads) = wait(&mut child, started + limit)?;
    let mut bytes = Vec::new();
    let closed = loop {
        match chunks.recv_timeout(LINGER) {
            Ok(chunk) => bytes.extend_from_slice(&chunk),
            Err(RecvTimeoutError::Disconnected) => break true,
            Err(RecvTimeoutError::Timeout) => break false,
        }
    };
    kill_group(&child);
    let mut text = shorten(&String::from_utf8_lossy(&bytes));
    if !closed {
        text.push_str("\n(processes that the test left behind were killed)");
    }
    Ok(match status {
        None => Verdict::failed(
            format!(
                "still running after {:.1} s and killed; its threads were:\n{threads}",
                limit.as_secs_f64()
            ),
            text,
        ),
        Some(status) => judge(status, text),
    })
}

/// Waits; at the deadline describes the threads, kills, and returns no status.
fn wait(child: &mut Child, deadline: Instant) -> io::Result<(Option<ExitStatus>, String)> {
    let mut pause = Duration::from_micros(500);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok((Some(status), String::new()));
        }
        if Instant::now() >= deadline {
            let threads = describe_threads(child.id());
            kill_group(child);
            child.wait()?;
            return Ok((None, threads));
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

fn kill_group(child: &Child) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // No such group: nothing was left.
        let _ = kill_process_group(group, Signal::KILL);
    }
}

fn judge(status: ExitStatus, output: String) -> Verdict {
    if status.success() {
        return Verdict::passed(output);
    }
    if status.code() == Some(i32::from(IGNORED_CODE)) {
        let reason = output.trim_end().lines().last().unwrap_or_default();
        return Verdict::ignored(reason);
    }
    let message = match (status.signal(), status.code()) {
        (Some(signal), _) => format!(
            "died of signal {signal} ({})",
            Signal::from_named_raw(signal).map_or("not a named signal", signal_name)
        ),
        // Rust's exit code after a panic of the main thread.
        (None, Some(101)) => "panicked".to_owned(),
        (None, code) => format!("ended with exit code {}", code.unwrap_or(-1)),
    };
    Verdict::failed(message, output)
}

fn signal_name(signal: Signal) -> &'static str {
    match signal {
        Signal::ILL => "SIGILL: an instruction that the CPU refused",
        Signal::TRAP => "SIGTRAP",
        Signal::ABORT => "SIGABRT: abort, or a panic that could not unwind",
        Signal::BUS => "SIGBUS",
        Signal::FPE => "SIGFPE",
        Signal::KILL => "SIGKILL: from outside, or out of memory",
        Signal::SEGV => "SIGSEGV: a bad address",
        Signal::PIPE => "SIGPIPE",
        Signal::ALARM => "SIGALRM",
        Signal::TERM => "SIGTERM",
        Signal::SYS => "SIGSYS",
        Signal::INT => "SIGINT",
        Signal::HUP => "SIGHUP",
        Signal::USR1 => "SIGUSR1",
        Signal::USR2 => "SIGUSR2",
        _ => "see signal(7)",
    }
}

/// One line for each thread: where a hanging test hangs.
fn describe_threads(pid: u32) -> String {
    let mut lines = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let read = |name: &str| {
            fs::read_to_string(entry.path().join(name))
                .map(|text| text.trim().to_owned())
                .unwrap_or_default()
        };
        let status = read("status");
        let state = status
            .lines()
            .find_map(|line| line.strip_prefix("State:"))
            .unwrap_or_default()
            .trim()
            .to_owned();
        lines.push(format!(
            "  {} {:<15} {state}, in {}, system call {}",
            entry.file_name().display(),
            read("comm"),
            Some(read("wchan"))
                .filter(|wchan| !wchan.is_empty() && wchan != "0")
                .unwrap_or_else(|| "user code".to_owned()),
            read("syscall"),
        ));
    }
    lines.sort();
    lines.join("\n")
}

fn shorten(text: &str) -> String {
    if text.len() <= MAX_OUTPUT {
        return text.to_owned();
    }
    let half = MAX_OUTPUT / 2;
    let head = text.floor_char_boundary(half);
    let tail = text.ceil_char_boundary(text.len() - half);
    format!(
        "{}\n... {} bytes left out ...\n{}",
        &text[..head],
        tail - head,
        &text[tail..]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_output_keeps_both_ends() {
        let text = format!("begin{}end", "é".repeat(MAX_OUTPUT));
        let short = shorten(&text);
        assert!(short.starts_with("begin"));
        assert!(short.ends_with("end"));
        assert!(short.len() < MAX_OUTPUT + 100);
        assert_eq!(shorten("short"), "short");
    }
}
