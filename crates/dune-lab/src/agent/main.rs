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
mod kernel_log;
mod port;
mod sys;
#[path = "../wire.rs"]
mod wire;

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use exec::Running;
use port::Port;
use wire::{Kind, Request};

/// The host's end of the stream, shared by the threads that write to it.
#[derive(Clone)]
struct Link(Arc<Mutex<Box<dyn Write + Send>>>);

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
        return Err(io::Error::other(
            "the agent is the first process of the lab's guest",
        ));
    }
    boot::devices()?;
    let Port {
        mut input,
        output,
        reports_unasked,
    } = port::open()?;
    let link = Link(Arc::new(Mutex::new(output)));
    link.send(Kind::Hello, &wire::VERSION.to_le_bytes());
    if reports_unasked {
        kernel_log::follow(&link)?;
    }
    let mut adopted = false;
    let mut running: Option<Running> = None;
    while let Some((kind, payload)) = wire::receive(&mut input)? {
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
                link.send(Kind::KernelLogText, kernel_log::so_far().as_bytes());
            }
            _ => {}
        }
    }
    Ok(())
}
