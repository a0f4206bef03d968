//! Runs a command to its end, or until its time is over; looks at its processes meanwhile.
#![expect(unsafe_code, reason = "ends a process group")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// What a command may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) time: Duration,
    /// Between two looks at the memory of its processes; none at all if not given.
    pub(crate) watch: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(60),
            watch: None,
        }
    }
}

/// How a command ended.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    /// None: its time was over.
    pub(crate) status: Option<ExitStatus>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    /// Most memory that all its processes together were seen to have had, in KiB.
    pub(crate) peak_kib: u64,
    limit: Duration,
}

impl Ended {
    /// Its output, if it ended well.
    ///
    /// # Errors
    /// How it ended, and its last words.
    pub(crate) fn success(self) -> Result<Self, String> {
        match self.status {
            Some(status) if status.success() => Ok(self),
            _ => Err(self.reason()),
        }
    }

    /// How it ended, and its last words.
    pub(crate) fn reason(&self) -> String {
        let how = match self.status {
            Some(status) => status.to_string(),
            None => format!("not done after {} s", self.limit.as_secs()),
        };
        match self.stderr.lines().rfind(|line| !line.trim().is_empty()) {
            Some(said) => format!("{how}: {}", said.trim()),
            None => how,
        }
    }
}

/// Time between two looks at a command whose end is awaited: short beside what it takes.
const STEP: Duration = Duration::from_millis(5);

/// How long processes that a command leaves behind may keep its output open.
const LEFT_BEHIND: Duration = Duration::from_secs(2);

/// Runs a command. What is left of its process group at the end, and still has its output, is
/// ended.
///
/// # Errors
/// It does not start.
pub(crate) fn run(mut command: Command, limits: Limits) -> Result<Ended, String> {
    use std::os::unix::process::CommandExt as _;
    let name = command.get_program().to_string_lossy().into_owned();
    // Not /dev/null: gVisor gives what its standard input is to its own user.
    let (ended, _) = std::io::pipe().map_err(|error| format!("make a pipe: {error}"))?;
    command
        .process_group(0)
        .stdin(ended)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => format!("{name} is not installed"),
        _ => format!("{name} does not start: {error}"),
    })?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let mut watched = Watched::default();
    let deadline = Instant::now() + limits.time;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) => {}
            Err(error) => return Err(format!("{name}: {error}")),
        }
        if Instant::now() >= deadline {
            watched.look(child.id());
            end(&mut child, &watched);
            break None;
        }
        match limits.watch {
            Some(step) => {
                watched.look(child.id());
                thread::sleep(step);
            }
            None => thread::sleep(STEP),
        }
    };
    // What a command leaves behind keeps its output open.
    let patience = Instant::now() + LEFT_BEHIND;
    while !(stdout.is_finished() && stderr.is_finished()) && Instant::now() < patience {
        thread::sleep(STEP);
    }
    if !(stdout.is_finished() && stderr.is_finished()) {
        end_group(child.id());
    }
    Ok(Ended {
        status,
        stdout: stdout.join().unwrap_or_default(),
        stderr: stderr.join().unwrap_or_default(),
        peak_kib: watched.peak_kib,
        limit: limits.time,
    })
}

fn collect(stream: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            // What was read before an error counts.
            let _ = stream.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn kill(pid: i32) {
    // SAFETY: ends processes of a command, which are ours.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// Ends the process group of a command.
fn end_group(leader: u32) {
    if let Ok(group) = i32::try_from(leader) {
        kill(-group);
    }
}

/// Ends a command and every process of it that was seen.
fn end(child: &mut Child, watched: &Watched) {
    end_group(child.id());
    for (&pid, process) in &watched.seen {
        // The number may be another process's by now.
        if start_time(pid) == Some(process.started)
            && let Ok(pid) = i32::try_from(pid)
        {
            kill(pid);
        }
    }
    // Killed: it ends.
    let _ = child.wait();
}

/// The processes of a command, as they were seen.
#[derive(Debug, Default)]
struct Watched {
    seen: BTreeMap<u32, Process>,
    peak_kib: u64,
}

#[derive(Debug)]
struct Process {
    started: u64,
}

impl Watched {
    /// Looks at a process and all that descend from it.
    fn look(&mut self, root: u32) {
        let mut sum = 0;
        let mut pending = vec![root];
        while let Some(pid) = pending.pop() {
            pending.extend(children(pid));
            sum += peak_kib(pid).unwrap_or(0);
            if let Some(started) = start_time(pid) {
                self.seen.insert(pid, Process { started });
            }
        }
        self.peak_kib = self.peak_kib.max(sum);
    }
}

/// Children of all of a process's threads.
fn children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| {
            list.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .collect::<Vec<u32>>()
        })
        .collect()
}

/// The most memory that a process has had resident.
fn peak_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// When a process started, in the kernel's ticks.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name, which may contain anything, the third field comes first.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_input_ends_at_once_and_is_nobody_elses() {
        let mut command = Command::new("sh");
        command.args(["-c", "cat && ! test /dev/stdin -ef /dev/null"]);
        let ended = run(command, Limits::default()).unwrap().success();
        assert_eq!(ended.unwrap().stdout, "");
    }

    #[test]
    fn a_command_that_takes_too_long_is_ended_with_its_children() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 50 & echo $!; sleep 60"]);
        let limits = Limits {
            time: Duration::from_millis(500),
            watch: None,
        };
        let ended = run(command, limits).unwrap();
        assert!(ended.status.is_none());
        let sleeper: u32 = ended.stdout.trim().parse().unwrap();
        // Killed; somebody else reaps it.
        let gone = || {
            fs::read_to_string(format!("/proc/{sleeper}/stat"))
                .map_or(true, |stat| stat.contains(") Z "))
        };
        assert!((0..100).any(|_| {
            thread::sleep(Duration::from_millis(10));
            gone()
        }));
        assert!(ended.success().unwrap_err().contains("not done after"));
    }

    #[test]
    fn what_a_command_leaves_behind_does_not_hold_it_up() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 50 & echo $!"]);
        let started = Instant::now();
        let ended = run(command, Limits::default()).unwrap().success().unwrap();
        assert!(started.elapsed() < Duration::from_secs(30));
        assert!(ended.stdout.trim().parse::<u32>().is_ok());
    }

    #[test]
    fn a_process_has_memory_and_a_start() {
        let own = std::process::id();
        assert!(peak_kib(own).unwrap() > 100);
        assert!(start_time(own).unwrap() > 0);
    }
}
