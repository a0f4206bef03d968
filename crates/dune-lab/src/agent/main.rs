//! The agent: the first process of the lab's guest.
//!
//! It brings the devices up, says hello to the host over a port, and waits.
//! A state of the guest may be saved at this point. When a command arrives it
//! moves into the host's root file system and runs the command, then the next.
//!
//! ```text
//!   boot::devices -> boot::open_port -> Hello .. (saved state) .. Exec
//!        -> boot::adopt -> exec::start -> Stdout, Stderr, ... -> Exit -> Exec ...
//! ```

mod boot;
mod exec;
mod sys;
#[path = "../wire.rs"]
mod wire;

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use exec::Running;
use wire::{Kind, Request};

/// The host's end of the stream, shared by the threads that write to it.
#[derive(Clone, Debug)]
struct Link(Arc<Mutex<File>>);

impl Link {
    /// Sends a frame; when the host is gone the guest has no purpose left.
    fn send(&self, kind: Kind, payload: &[u8]) {
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if wire::send(&mut *port, kind, payload).is_err() {
            host_gone();
        }
    }

    fn fail(&self, message: &str) {
        self.send(Kind::Failure, message.as_bytes());
    }
}

fn host_gone() -> ! {
    sys::power_off()
}

fn main() {
    if let Err(error) = serve() {
        // The console is the kernel's log, which the host shows.
        eprintln!("agent: {error}");
    }
    host_gone();
}

fn serve() -> io::Result<()> {
    if std::process::id() != 1 {
        return Err(io::Error::other("the agent is the first process of the lab's guest"));
    }
    boot::devices()?;
    let mut port = boot::open_port()?;
    let link = Link(Arc::new(Mutex::new(port.try_clone()?)));
    link.send(Kind::Hello, &wire::VERSION.to_le_bytes());
    let mut adopted = false;
    let mut running: Option<Running> = None;
    while let Some((kind, payload)) = wire::receive(&mut port)? {
        match (kind, &running) {
            (Kind::Exec, _) => {
                let Some(request) = Request::decode(&payload) else {
                    link.fail("a request of another version");
                    continue;
                };
                if !adopted {
                    if let Err(error) = boot::adopt(&request) {
                        link.fail(&error.to_string());
                        continue;
                    }
                    adopted = true;
                }
                running = match exec::start(&request, &link) {
                    Ok(command) => Some(command),
                    Err(reason) => {
                        let line = format!("dune lab: {}\n", reason.message);
                        link.send(Kind::Stderr, line.as_bytes());
                        link.send(Kind::Exit, &reason.code.to_le_bytes());
                        None
                    }
                };
            }
            (Kind::Stdin, Some(command)) => command.feed(payload),
            (Kind::Resize, Some(command)) => {
                if let [a, b, c, d] = payload[..] {
                    command.resize(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
                }
            }
            (Kind::Signal, Some(command)) => {
                if let Ok(signal) = payload[..].try_into().map(i32::from_le_bytes) {
                    sys::signal_group(command.leader, signal);
                }
            }
            (Kind::KernelLog, _) => {
                link.send(Kind::KernelLogText, kernel_log().as_bytes());
            }
            _ => {}
        }
    }
    Ok(())
}

/// The kernel's messages so far, one to a line.
fn kernel_log() -> String {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;

    const O_NONBLOCK: i32 = 0o4000;
    let opened = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open("/dev/kmsg");
    let Ok(mut log) = opened else {
        return String::new();
    };
    let mut text = String::new();
    let mut record = vec![0; 8192];
    // Each read gives one record: "priority,sequence,time,flags;message".
    while let Ok(count) = log.read(&mut record) {
        let line = String::from_utf8_lossy(&record[..count]);
        let (head, message) = line.split_once(';').unwrap_or(("", &line));
        let microseconds: u64 = head
            .split(',')
            .nth(2)
            .and_then(|field| field.parse().ok())
            .unwrap_or(0);
        let message = message.lines().next().unwrap_or("");
        let (seconds, rest) = (microseconds / 1_000_000, microseconds % 1_000_000);
        text.push_str(&format!("[{seconds:5}.{rest:06}] {message}\n"));
    }
    text
}
