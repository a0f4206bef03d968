//! A running lab: boot or wake it, run commands in it one after the other.

use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::config::{Command, Config, Outcome};
use crate::error::{GuestState, LabError, io_error};
use crate::initramfs;
use crate::kernel::Kernel;
use crate::machine::{Machine, Memory, share_tag};
use crate::state;
use crate::stdio::{Feeder, Input};
use crate::terminal;
use crate::tools;
use crate::wire::{self, Kind, Request, Root, Share};

/// How long a boot may take before it is reported as a hang. It is ten times
/// what the slowest boot took on an otherwise idle machine.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);

/// How long a guest whose command ran out of time is given to send its log.
const LOG_PATIENCE: Duration = Duration::from_secs(3);

/// What the reading thread hands on: a frame, or why there are no more.
pub(crate) type Frame = Result<(Kind, Vec<u8>), String>;

/// The writing half of the stream to the agent.
#[derive(Clone, Debug)]
pub(crate) struct Link(Arc<Mutex<UnixStream>>);

impl Link {
    pub(crate) fn send(&self, kind: Kind, payload: &[u8]) -> std::io::Result<()> {
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        wire::send(&mut *port, kind, payload)
    }
}

/// Where the command's output goes.
pub struct Output<'a> {
    /// Its standard output.
    pub stdout: &'a mut dyn Write,
    /// Its standard error.
    pub stderr: &'a mut dyn Write,
}

impl std::fmt::Debug for Output<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output").finish_non_exhaustive()
    }
}

/// A lab that is up.
///
/// It ends when it is dropped, or when the thread that started it ends,
/// whichever comes first. Writes of one command to files that are not shared
/// are seen by the next command of the same session, and gone with it.
#[derive(Debug)]
pub struct Session {
    machine: Machine,
    link: Link,
    frames: Receiver<Frame>,
    config: Config,
    started: Instant,
}

impl Session {
    /// Brings a lab up: from a saved state, which is made first when there is
    /// none, or by a boot when `config.cold` says so. Installs and fetches
    /// what is missing.
    ///
    /// # Errors
    ///
    /// See [`LabError`].
    pub fn start(config: &Config) -> Result<Session, LabError> {
        let config = config.checked()?;
        let started = Instant::now();
        let qemu = tools::QEMU.require()?;
        let kernel = Kernel::get(config.kernel.as_deref())?;
        let session = if config.cold {
            let folder = tempfile::tempdir().map_err(io_error("create a temporary folder"))?;
            let initramfs = folder.path().join("initramfs");
            initramfs::write(&kernel.modules, &initramfs)?;
            Session::boot(&qemu, &config, &kernel, &initramfs, Memory::Fresh)?
        } else {
            state::wake(&qemu, &config, &kernel)?
        };
        session.note(&format!("up after {} ms", started.elapsed().as_millis()));
        Ok(Session { started, ..session })
    }

    /// Starts a machine and waits until the agent says hello.
    pub(crate) fn boot(
        qemu: &Path,
        config: &Config,
        kernel: &Kernel,
        initramfs: &Path,
        memory: Memory<'_>,
    ) -> Result<Session, LabError> {
        let machine = Machine::start(qemu, config, &kernel.image, initramfs, memory)?;
        let session = Session::around(machine, config)?;
        let deadline = Instant::now() + BOOT_PATIENCE;
        match session.next_frame(Some(deadline), "while it booted")? {
            Some((Kind::Hello, version)) if version == wire::VERSION.to_le_bytes() => Ok(session),
            Some((kind, _)) => Err(LabError::Protocol(format!("{kind:?} instead of a hello"))),
            None => Err(LabError::NoBoot {
                patience: BOOT_PATIENCE,
                emulator: session.machine.messages(),
                console: session.machine.console(),
            }),
        }
    }

    /// Takes over a machine whose agent is, or will be, waiting for a command.
    pub(crate) fn around(machine: Machine, config: &Config) -> Result<Session, LabError> {
        let mut port = machine.port()?;
        let link = Link(Arc::new(Mutex::new(machine.port()?)));
        let (sender, frames) = mpsc::channel();
        thread::spawn(move || {
            loop {
                let frame = match wire::receive(&mut port) {
                    Ok(Some(frame)) => Ok(frame),
                    Ok(None) => Err("the stream ended".to_owned()),
                    Err(error) => Err(error.to_string()),
                };
                let last = frame.is_err();
                if sender.send(frame).is_err() || last {
                    break;
                }
            }
        });
        Ok(Session {
            machine,
            link,
            frames,
            config: config.clone(),
            started: Instant::now(),
        })
    }

    pub(crate) fn link(&self) -> Link {
        self.link.clone()
    }

    pub(crate) fn machine(&mut self) -> &mut Machine {
        &mut self.machine
    }

    fn note(&self, message: &str) {
        if self.config.verbose {
            eprintln!("dune lab: {message}");
        }
    }

    /// The next frame; `None` when the deadline passed.
    fn next_frame(
        &self,
        deadline: Option<Instant>,
        during: &'static str,
    ) -> Result<Option<(Kind, Vec<u8>)>, LabError> {
        let frame = match deadline {
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                match self.frames.recv_timeout(left) {
                    Err(RecvTimeoutError::Timeout) => return Ok(None),
                    Err(RecvTimeoutError::Disconnected) => Err("the reader ended".to_owned()),
                    Ok(frame) => frame,
                }
            }
            None => self
                .frames
                .recv()
                .unwrap_or_else(|_| Err("the reader ended".to_owned())),
        };
        // Whatever broke the stream, what a person needs is the guest's last words.
        frame.map(Some).map_err(|_| LabError::Died {
            during,
            emulator: self.machine.messages(),
            console: self.machine.console(),
        })
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    ///
    /// [`LabError::Timeout`] and [`LabError::Died`] leave the session useless;
    /// start another. A command that fails is not an error.
    pub fn run(
        &mut self,
        command: &Command,
        input: Input,
        output: &mut Output<'_>,
    ) -> Result<Outcome, LabError> {
        let request = self.request(command, &input);
        let deadline = command.timeout.map(|limit| Instant::now() + limit);
        let gone = |_| LabError::Died {
            during: "before the command",
            emulator: self.machine.messages(),
            console: self.machine.console(),
        };
        self.link
            .send(Kind::Exec, &request.encode())
            .map_err(gone)?;
        let feeder = Feeder::start(input, self.link.clone())?;
        let result = self.relay(command, deadline, &feeder, output);
        self.note(&format!(
            "done after {} ms",
            self.started.elapsed().as_millis()
        ));
        result
    }

    fn relay(
        &self,
        command: &Command,
        deadline: Option<Instant>,
        feeder: &Feeder,
        output: &mut Output<'_>,
    ) -> Result<Outcome, LabError> {
        loop {
            let silence = command.idle_timeout.map(|limit| Instant::now() + limit);
            let next = deadline.into_iter().chain(silence).min();
            let Some((kind, payload)) = self.next_frame(next, "while the command ran")? else {
                let limits = [command.timeout, command.idle_timeout];
                let limit = limits.into_iter().flatten().min();
                return Err(self.overdue(limit.unwrap_or_default()));
            };
            let written = match kind {
                Kind::Stdout => write_all(output.stdout, &payload),
                Kind::Stderr => write_all(output.stderr, &payload),
                Kind::Terminal => terminal::write(&payload),
                Kind::StdinTaken => {
                    feeder.credit(number(&payload)?);
                    Ok(())
                }
                Kind::Exit => {
                    let code = number(&payload)?;
                    let code = u8::try_from(code)
                        .map_err(|_| LabError::Protocol(format!("{code} is not an exit code")))?;
                    return Ok(Outcome { code });
                }
                Kind::Failure => {
                    return Err(LabError::Agent(
                        String::from_utf8_lossy(&payload).into_owned(),
                    ));
                }
                _ => Ok(()),
            };
            if written.is_err() {
                // Nobody reads: what the kernel does to a command in a pipe.
                const SIGPIPE: u32 = 13;
                let _ = self.link.send(Kind::Signal, &SIGPIPE.to_le_bytes());
            }
        }
    }

    /// Asks the guest for its log once its time is over.
    fn overdue(&self, limit: Duration) -> LabError {
        let deadline = Instant::now() + LOG_PATIENCE;
        let _ = self.link.send(Kind::KernelLog, b"");
        loop {
            match self.next_frame(Some(deadline), "after its time was over") {
                Ok(Some((Kind::KernelLogText, text))) => {
                    return LabError::Timeout {
                        limit,
                        state: GuestState::Alive,
                        console: tools::last_lines(&String::from_utf8_lossy(&text), 10),
                    };
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => {
                    return LabError::Timeout {
                        limit,
                        state: GuestState::Hung,
                        console: self.machine.console(),
                    };
                }
            }
        }
    }

    fn request(&self, command: &Command, input: &Input) -> Request {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let window = match input {
            Input::Terminal(streams) => Some(terminal::size(*streams)),
            Input::Nothing | Input::Inherited => None,
        };
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let bytes = |path: &PathBuf| path.as_os_str().as_bytes().to_vec();
        let uname = rustix::system::uname();
        Request {
            argv: command
                .argv
                .iter()
                .map(|arg| arg.as_bytes().to_vec())
                .collect(),
            env: command
                .env
                .iter()
                .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()))
                .collect(),
            cwd: bytes(&command.cwd),
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            groups: rustix::process::getgroups()
                .unwrap_or_default()
                .iter()
                .map(|gid| gid.as_raw())
                .collect(),
            nofile: (
                limit.current.unwrap_or(1 << 20).min(1 << 20),
                limit.maximum.unwrap_or(1 << 20).min(1 << 20),
            ),
            umask: terminal::umask(),
            terminal_streams: match input {
                Input::Terminal(streams) => streams.bits(),
                Input::Nothing | Input::Inherited => 0,
            },
            rows: window.map_or(0, |(rows, _)| rows),
            columns: window.map_or(0, |(_, columns)| columns),
            root: Root::Host,
            shares: self
                .config
                .shares
                .iter()
                .enumerate()
                .map(|(index, path)| Share {
                    tag: share_tag(index).into_bytes(),
                    path: bytes(path),
                })
                .collect(),
            hostname: uname.nodename().to_bytes().to_vec(),
            clock_seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
            clock_nanoseconds: now.subsec_nanos(),
            // Counting wants the same numbers every time, random ones included.
            entropy: if self.config.icount {
                Vec::new()
            } else {
                random_bytes()
            },
        }
    }
}

fn write_all(stream: &mut dyn Write, bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(bytes)?;
    stream.flush()
}

fn number(payload: &[u8]) -> Result<u32, LabError> {
    payload
        .try_into()
        .map(u32::from_le_bytes)
        .map_err(|_| LabError::Protocol(format!("{payload:?} is not a number")))
}

fn random_bytes() -> Vec<u8> {
    let mut bytes = vec![0; 64];
    let _ = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty());
    bytes
}
