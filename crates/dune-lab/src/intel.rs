//! The lab on an emulated Intel CPU: Bochs with VMX, EPT and VPID.
//!
//! Slower than QEMU's SVM, and there so that the Intel side of everything that
//! touches the platform is tested too. Bochs cannot show the host's files to
//! the guest, so the command travels with the files it needs:
//!
//! ```text
//!   payload   the command's program, libraries, and what `--with` names
//!   disk      boot sector, kernel, initial RAM file system with the payload
//!   bochs     the emulator's process
//!   agent     (as under QEMU) runs the command, sends frames back
//! ```
//!
//! The command gets its arguments, environment and working directory, an empty
//! standard input, and root's rights in the guest; its output and exit code
//! come back. What it writes to files is gone with the guest.

mod bochs;
mod disk;
mod module;
mod payload;

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use self::bochs::{Bochs, INSTRUCTIONS_PER_SECOND, Machine};
use self::payload::{Payload, find_program};
use crate::config::{Command, Config, Outcome};
use crate::error::{GuestState, LabError};
use crate::initramfs;
use crate::kernel::Kernel;
use crate::progress::Step;
use crate::session::Output;
use crate::tools::last_lines;
use crate::wire::{self, GIVEN_FRAMES, Kind, PARALLEL_PORT_OPTION, Request, Root};

/// How long the guest may take to come up: twenty times what it takes on an
/// otherwise idle machine.
const BOOT_PATIENCE: Duration = Duration::from_secs(300);

/// What Bochs can emulate without changes to the configuration of its APICs.
const MAX_CPUS: u32 = 8;

/// A guest that is well says so every second of its time, which passes about
/// as fast as the host's.
const SILENCE_OF_THE_DEAD: Duration = Duration::from_secs(15);

/// How much of the kernel's messages is kept for a report.
const KERNEL_LOG_LINES: usize = 25;

/// What the kernel is told, besides the port and the clock.
///
/// - the console is the log that is shown when the guest dies;
/// - Bochs 2.7 reports a wrong size for the compacted format of the extended
///   state, upon which the kernel would give up AVX altogether: without XSAVES
///   and XSAVEC it takes the standard format;
/// - the rest saves time at boot.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 oops=panic nokaslr mitigations=off \
                            noxsaves clearcpuid=xsavec cryptomgr.notests tsc=reliable \
                            no_timer_check nowatchdog audit=0 random.trust_cpu=on rodata=off \
                            8250.nr_uarts=1 rcupdate.rcu_expedited=1";

/// Boots the lab on an emulated Intel CPU, runs `command` there with the files
/// it needs and those of `with`, and ends it.
///
/// Counting instructions and shared folders are refused. Bochs emulates several
/// CPUs by turns, so each further one slows all of them down.
///
/// # Errors
///
/// [`LabError::Options`] for what Bochs cannot do, otherwise as for
/// [`Session`](crate::Session). A program that is not found is no error but
/// exit code 127, as in a shell.
pub fn run_on_intel(
    config: &Config,
    command: &Command,
    with: &[PathBuf],
    output: &mut Output<'_>,
) -> Result<Outcome, LabError> {
    let config = config.checked()?;
    if config.icount || !config.shares.is_empty() {
        return Err(LabError::Options(
            "--intel goes with neither --icount nor --share: Bochs counts no instructions \
             for the guest's clocks and sees no folders; give files with --with"
                .to_owned(),
        ));
    }
    if config.cpus > MAX_CPUS {
        return Err(LabError::Options(format!(
            "--cpus {}: with --intel the lab has 1 to {MAX_CPUS} CPUs",
            config.cpus
        )));
    }
    let name = &command.argv[0];
    let Some(program) = find_program(name, &command.cwd) else {
        let line = format!(
            "dune lab: {}: command not found\n",
            Path::new(name).display()
        );
        let _ = output.stderr.write_all(line.as_bytes());
        return Ok(Outcome { code: 127 });
    };
    let bochs = Bochs::require()?;
    let kernel = Kernel::get(config.kernel.as_deref())?;
    let initramfs = initramfs_with(&kernel, command, &program, with)?;
    let ticks = INSTRUCTIONS_PER_SECOND / 1000;
    let command_line = format!("{COMMAND_LINE} tsc_early_khz={ticks} {PARALLEL_PORT_OPTION}");
    let disk = disk::build(&kernel.image, &command_line, config.memory_mib, &initramfs)?;
    drop(initramfs);

    let wants_report = config.verbose || std::io::stderr().is_terminal();
    let step = wants_report.then(|| Step::begin("Booting the lab on an emulated Intel CPU"));
    let started = Instant::now();
    let (machine, frames) = Machine::start(&bochs, &disk, config.memory_mib, config.cpus)?;
    let mut guest = Guest {
        machine,
        frames: spawn_reader(frames),
        kernel_log: Vec::new(),
        last_sign: Instant::now(),
    };
    guest.wait_for_hello()?;
    drop(step);
    if config.verbose {
        let seconds = started.elapsed().as_secs_f64();
        eprintln!("dune lab: the emulated Intel CPU was ready after {seconds:.1} s");
    }
    guest.carry(command.timeout, output)
}

/// Everything the guest will ever see of the host.
fn initramfs_with(
    kernel: &Kernel,
    command: &Command,
    program: &Path,
    with: &[PathBuf],
) -> Result<Vec<u8>, LabError> {
    let mut payload = Payload::default();
    payload.folder(&command.cwd);
    payload.program(program)?;
    for path in with {
        payload.path(&command.cwd.join(path))?;
    }
    let mut archive = initramfs::base(&kernel.intel_modules, module::lighten)?;
    payload.pack(&mut archive, &["init", GIVEN_FRAMES, "modules/list"])?;
    let mut frames = Vec::new();
    let request = request(command, program).encode();
    for (kind, bytes) in [(Kind::Exec, request.as_slice()), (Kind::Stdin, b"")] {
        wire::send(&mut frames, kind, bytes)
            .map_err(|error| LabError::Options(format!("the command is too long: {error}")))?;
    }
    archive.file(GIVEN_FRAMES, 0o600, &frames);
    Ok(archive.finish())
}

fn request(command: &Command, program: &Path) -> Request {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let mut argv: Vec<_> = command
        .argv
        .iter()
        .map(|arg| arg.as_bytes().to_vec())
        .collect();
    argv[0] = program.as_os_str().as_bytes().to_vec();
    let bytes = |text: &std::ffi::OsString| text.as_bytes().to_vec();
    Request {
        argv,
        env: command
            .env
            .iter()
            .map(|(name, value)| (bytes(name), bytes(value)))
            .collect(),
        cwd: command.cwd.as_os_str().as_bytes().to_vec(),
        nofile: (1024, 1 << 20),
        umask: 0o022,
        root: Root::Initramfs,
        hostname: b"dune-lab".to_vec(),
        clock_seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        clock_nanoseconds: now.subsec_nanos(),
        ..Request::default()
    }
}

/// What the reading thread hands on: a frame, or why there are no more.
type Frame = Result<(Kind, Vec<u8>), String>;

fn spawn_reader(mut stream: File) -> Receiver<Frame> {
    let (sender, frames) = mpsc::channel();
    thread::spawn(move || {
        loop {
            let frame = match wire::receive(&mut stream) {
                Ok(Some(frame)) => Ok(frame),
                // The emulator ended; the receiver finds out by the hang-up.
                Ok(None) => return,
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return,
                Err(error) => Err(error.to_string()),
            };
            let last = frame.is_err();
            if sender.send(frame).is_err() || last {
                return;
            }
        }
    });
    frames
}

/// A guest that was started, seen from this side.
#[derive(Debug)]
struct Guest {
    machine: Machine,
    frames: Receiver<Frame>,
    kernel_log: Vec<String>,
    last_sign: Instant,
}

impl Guest {
    fn wait_for_hello(&mut self) -> Result<(), LabError> {
        let deadline = Instant::now() + BOOT_PATIENCE;
        match self.next(Some(deadline), "while it booted")? {
            Some((Kind::Hello, version)) if version == wire::VERSION.to_le_bytes() => Ok(()),
            Some((kind, payload)) => Err(LabError::Protocol(format!(
                "{kind:?} {payload:02x?} instead of a hello"
            ))),
            None => Err(LabError::NoBoot {
                patience: BOOT_PATIENCE,
                emulator: self.machine.log(),
                console: self.kernel_lines(),
            }),
        }
    }

    /// Carries the command's output until it ends.
    fn carry(
        &mut self,
        limit: Option<Duration>,
        output: &mut Output<'_>,
    ) -> Result<Outcome, LabError> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            let Some((kind, payload)) = self.next(deadline, "while the command ran")? else {
                return Err(self.overdue(limit.unwrap_or_default()));
            };
            let written = match kind {
                Kind::Stdout => write_all(output.stdout, &payload),
                Kind::Stderr => write_all(output.stderr, &payload),
                Kind::Exit => return exit_code(&payload),
                Kind::Failure => {
                    return Err(LabError::Agent(
                        String::from_utf8_lossy(&payload).into_owned(),
                    ));
                }
                _ => Ok(()),
            };
            if written.is_err() {
                // Nobody reads any more: the command would end by SIGPIPE.
                return Ok(Outcome { code: 128 + 13 });
            }
        }
    }

    /// The next frame that is not about the kernel's messages; `None` when the
    /// time is over.
    fn next(
        &mut self,
        deadline: Option<Instant>,
        during: &'static str,
    ) -> Result<Option<(Kind, Vec<u8>)>, LabError> {
        loop {
            let received = match deadline {
                None => self
                    .frames
                    .recv()
                    .map_err(|_| RecvTimeoutError::Disconnected),
                Some(deadline) => self
                    .frames
                    .recv_timeout(deadline.saturating_duration_since(Instant::now())),
            };
            match received {
                Ok(Ok((Kind::KernelLogText, line))) => self.keep(&line),
                Ok(Ok(frame)) => {
                    self.last_sign = Instant::now();
                    return Ok(Some(frame));
                }
                Ok(Err(reason)) => return Err(LabError::Protocol(reason)),
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(LabError::Died {
                        during,
                        emulator: self.machine.log(),
                        console: self.kernel_lines(),
                    });
                }
            }
        }
    }

    fn keep(&mut self, line: &[u8]) {
        self.last_sign = Instant::now();
        if !line.is_empty() {
            let excess = (self.kernel_log.len() + 1).saturating_sub(KERNEL_LOG_LINES);
            self.kernel_log.drain(..excess);
            self.kernel_log
                .push(String::from_utf8_lossy(line).into_owned());
        }
    }

    /// The kernel's last messages: those the agent sent, and what the kernel
    /// itself found worth the console, a panic for one.
    fn kernel_lines(&self) -> String {
        let console = self.machine.console();
        match trouble_in(&console, KERNEL_LOG_LINES) {
            Some(report) => report,
            None => last_lines(&(self.kernel_log.concat() + &console), KERNEL_LOG_LINES),
        }
    }

    fn overdue(&self, limit: Duration) -> LabError {
        let silent = self.last_sign.elapsed() > SILENCE_OF_THE_DEAD.min(limit);
        LabError::Timeout {
            limit,
            state: if silent {
                GuestState::Hung
            } else {
                GuestState::Alive
            },
            console: self.kernel_lines(),
        }
    }
}

/// Where a kernel in trouble begins to say so, and up to `count` lines from there:
/// the cause comes first, and pages of registers follow.
fn trouble_in(console: &str, count: usize) -> Option<String> {
    const SIGNS: [&str; 4] = [
        "Kernel panic",
        "BUG: ",
        "Oops: ",
        "general protection fault",
    ];
    let lines: Vec<&str> = console.lines().collect();
    let first = lines
        .iter()
        .position(|line| SIGNS.iter().any(|sign| line.contains(sign)))?;
    let end = lines.len().min(first + count);
    Some(lines[first..end].join("\n"))
}

fn write_all(stream: &mut dyn Write, bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(bytes)?;
    stream.flush()
}

fn exit_code(payload: &[u8]) -> Result<Outcome, LabError> {
    payload
        .try_into()
        .ok()
        .and_then(|bytes| u8::try_from(u32::from_le_bytes(bytes)).ok())
        .map(|code| Outcome { code })
        .ok_or_else(|| LabError::Protocol(format!("{payload:02x?} is not an exit code")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_is_reported_from_its_beginning() {
        let console = "warning\n[1.0] Kernel panic - not syncing: why\n[1.1] RIP\n[1.2] RAX\n";
        let report = trouble_in(console, 2).unwrap();
        assert_eq!(report, "[1.0] Kernel panic - not syncing: why\n[1.1] RIP");
        assert_eq!(trouble_in("all is well\n", 2), None);
    }

    #[test]
    fn exit_codes_have_four_bytes() {
        assert_eq!(exit_code(&[7, 0, 0, 0]).unwrap().code, 7);
        assert!(exit_code(&[7]).is_err());
        assert!(exit_code(&[0, 1, 0, 0]).is_err());
    }
}
