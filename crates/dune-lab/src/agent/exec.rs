//! One command: start it, carry its streams, report its end.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use crate::boot::during;
use crate::sys::{self, Identity};
use crate::wire::{Kind, Request};
use crate::{Link, host_gone};

/// How long output may be silent after the command's end while some process
/// that it left behind still holds the stream open.
const LINGER: Duration = Duration::from_millis(100);

/// Bytes of one output frame: half of what one virtio write takes.
const CHUNK: usize = 32 << 10;

/// A command under way, as the thread that reads frames sees it.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) leader: u32,
    stdin: Sender<Vec<u8>>,
    terminal: Option<File>,
}

impl Running {
    /// Hands bytes to the command's standard input; none means end of file.
    pub(crate) fn feed(&self, bytes: Vec<u8>) {
        // The feeder ends with the command; what comes later has no reader.
        let _ = self.stdin.send(bytes);
    }

    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        if let Some(terminal) = &self.terminal {
            let _ = sys::resize(terminal, rows, columns);
        }
    }
}

/// Why a command did not start: the exit code of a shell, and a sentence.
#[derive(Debug)]
pub(crate) struct NotStarted {
    pub(crate) code: u32,
    pub(crate) message: String,
}

impl From<io::Error> for NotStarted {
    fn from(error: io::Error) -> Self {
        NotStarted {
            code: 126,
            message: error.to_string(),
        }
    }
}

/// Starts the command and the threads that carry its streams; its end is
/// reported over `link` by a thread of its own.
pub(crate) fn start(request: &Request, link: &Link) -> Result<Running, NotStarted> {
    let Some((program, arguments)) = request.argv.split_first() else {
        return Err(io::Error::other("no command given").into());
    };
    let terminal = Terminal::open_if_wanted(request)?;
    let mut command = Command::new(OsStr::from_bytes(program));
    command
        .arg0(OsStr::from_bytes(program))
        .args(arguments.iter().map(|argument| OsStr::from_bytes(argument)))
        .env_clear()
        .envs(
            request
                .env
                .iter()
                .map(|(name, value)| (OsStr::from_bytes(name), OsStr::from_bytes(value))),
        )
        .current_dir(OsStr::from_bytes(&request.cwd));
    let stream = |number: u8| match &terminal {
        Some(terminal) if request.terminal_streams & (1 << number) != 0 => {
            sys::duplicate(terminal.slave.as_fd()).map(Stdio::from)
        }
        _ => Ok(Stdio::piped()),
    };
    command
        .stdin(stream(0)?)
        .stdout(stream(1)?)
        .stderr(stream(2)?);
    let identity = Identity {
        uid: request.uid,
        gid: request.gid,
        groups: request.groups.clone(),
        umask: request.umask,
        nofile: request.nofile,
    };
    let controlling = terminal
        .is_some()
        .then(|| request.terminal_streams.trailing_zeros().cast_signed());
    sys::prepare(&mut command, identity, controlling);
    let mut child = command.spawn().map_err(|error| explain(request, &error))?;
    drop(command);
    let master = terminal.map(|terminal| terminal.master);
    let (stdin, feed) = mpsc::channel();
    let output = carry_output(&mut child, master.as_ref(), link)?;
    carry_input(&mut child, master.as_ref(), feed, link)?;
    let leader = child.id();
    let link = link.clone();
    thread::spawn(move || report_end(leader, &output, &link));
    Ok(Running {
        leader,
        stdin,
        terminal: master,
    })
}

/// The shell's exit code and words for a program that could not be started.
fn explain(request: &Request, error: &io::Error) -> NotStarted {
    let program = String::from_utf8_lossy(&request.argv[0]);
    let cwd = OsStr::from_bytes(&request.cwd);
    if !std::path::Path::new(cwd).is_dir() {
        return NotStarted {
            code: 126,
            message: format!(
                "{}: no such working directory in the lab; share it or change to another",
                cwd.display()
            ),
        };
    }
    match error.kind() {
        io::ErrorKind::NotFound => NotStarted {
            code: 127,
            message: format!("{program}: command not found in the lab"),
        },
        _ => NotStarted {
            code: 126,
            message: format!("{program}: {error}"),
        },
    }
}

struct Terminal {
    master: File,
    slave: OwnedFd,
}

impl Terminal {
    fn open_if_wanted(request: &Request) -> io::Result<Option<Terminal>> {
        if request.terminal_streams == 0 {
            return Ok(None);
        }
        let open = |path: &str| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .map_err(during(path))
        };
        let master = open("/dev/pts/ptmx")?;
        let number = sys::unlock_pty(&master)?;
        sys::resize(&master, request.rows, request.columns)?;
        // Opening it does not make it the controlling terminal of the agent:
        // the first process of the system has no session to give it to.
        let slave = open(&format!("/dev/pts/{number}"))?.into();
        Ok(Some(Terminal { master, slave }))
    }
}

/// Starts a thread for each output stream. Each says so over the channel when
/// it carried something (`false`) and when its stream ended (`true`).
fn carry_output(
    child: &mut Child,
    master: Option<&File>,
    link: &Link,
) -> io::Result<Receiver<bool>> {
    let (progress, seen) = mpsc::channel();
    let spawn = |mut stream: Box<dyn Read + Send>, kind| {
        let link = link.clone();
        let progress = progress.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; CHUNK];
            loop {
                match stream.read(&mut buffer) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // A terminal's master says EIO when its last slave closed.
                    Ok(0) | Err(_) => break,
                    Ok(count) => {
                        link.send(kind, &buffer[..count]);
                        let _ = progress.send(false);
                    }
                }
            }
            let _ = progress.send(true);
        });
    };
    if let Some(stdout) = child.stdout.take() {
        spawn(Box::new(stdout), Kind::Stdout);
    }
    if let Some(stderr) = child.stderr.take() {
        spawn(Box::new(stderr), Kind::Stderr);
    }
    if let Some(master) = master {
        spawn(Box::new(master.try_clone()?), Kind::Terminal);
    }
    Ok(seen)
}

/// Starts the thread that writes standard input, or the terminal's keys.
fn carry_input(
    child: &mut Child,
    master: Option<&File>,
    feed: Receiver<Vec<u8>>,
    link: &Link,
) -> io::Result<()> {
    let mut sink: Box<dyn Write + Send> = match (child.stdin.take(), master) {
        (Some(pipe), _) => Box::new(pipe),
        (None, Some(master)) => Box::new(master.try_clone()?),
        (None, None) => return Ok(()),
    };
    let link = link.clone();
    thread::spawn(move || {
        let mut open = true;
        for bytes in feed {
            if bytes.is_empty() {
                break;
            }
            // A command that closed its input loses the rest, as in a pipe;
            // the host still gets its credit back.
            open = open && sink.write_all(&bytes).is_ok();
            link.send(
                Kind::StdinTaken,
                &u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes(),
            );
        }
    });
    Ok(())
}

/// Reaps children until the command itself ended, lets its output run out,
/// and reports. As the first process of the system the agent inherits every
/// orphan, so it must wait for any child.
fn report_end(leader: u32, output: &Receiver<bool>, link: &Link) {
    let status = loop {
        match sys::wait_any() {
            Ok((pid, status)) if pid == leader => break status,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => host_gone(),
        }
    };
    while output.recv_timeout(LINGER).is_ok() {}
    sys::sync();
    let signal = status & 0x7f;
    let code = if signal == 0 {
        (status >> 8) & 0xff
    } else {
        128 + signal
    };
    link.send(Kind::Exit, &code.to_le_bytes());
}
