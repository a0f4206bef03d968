//! A debugger's view of the program: gdb's remote protocol.
//!
//! ```text
//!   gdb <--socket--> the debugger's thread        the program's threads
//!                    server -> wire, target       Guard::run_thread
//!                          \                        |  kicked, or a breakpoint,
//!                           +--> control <----------+  a step, a signal: hook
//!                                memory, registers
//! ```
//!
//! gdb's side is a thread of its own, which never runs ring 3 and has every
//! signal blocked (`server`). The protocol is the crate `gdbstub`'s;
//! `wire` adds what that does not have. The program's threads stop between
//! two runs of ring 3 (`hook`), in `control`, all of them or those that gdb
//! does not let run. What gdb reads and writes goes through the guard's checked
//! copies (`memory`), so that it reaches the program and nothing else of this
//! process.
//!
//! Without a debugger nothing of this is on the way of a trap: threads get here
//! by kicks, exceptions and signals only.
//!
//! # What it does
//!
//! Registers with the vector state that the CPU has, memory, breakpoints
//! (`int3`), single steps (the trap flag, in ring 3), steps over a range,
//! threads with names and orders for each, signals (also those without a
//! handler, except `SIGKILL` and those that stop a process), interruption,
//! `execve`, the auxiliary vector and the program's file, what is known of a
//! signal, detaching and killing. All threads stop when one does.
//!
//! # What it does not
//!
//! - Watchpoints and breakpoints by hardware: gdb watches by single steps (`set
//!   can-use-hw-watchpoints 0`).
//! - Children: they run without breakpoints.
//! - Files: gdb reads them by itself (`set sysroot /`).
//! - A second client: who comes later is refused.
//! - Remaining times: a call with a relative time limit that a stop interrupts
//!   begins again with the whole of it.
//! - Threads in the kernel for good (an unreachable network file system) stop
//!   when they are back.

pub(crate) mod control;
pub(crate) mod hook;
pub(crate) mod memory;
mod registers;
mod server;
mod signals;
mod target;
mod wire;

use core::fmt;
use core::str::FromStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use dune_kvm::wall::Wall;
use linux_raw_sys::general::__NR_umask;

use self::control::Control;
use self::server::{Begun, Listener};
use crate::calls::forward_always;
use crate::guard::End;
use crate::host::move_fd_high;
use crate::program::Program;
use crate::signal::host;

/// Where gdb can reach the debugger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// By TCP. Who can connect to it can do with the program what its user
    /// can: other than for a loopback address that is the whole network, and
    /// for one every user of this machine.
    Tcp(SocketAddr),
    /// By a socket in the file system, made with permissions for its owner
    /// alone.
    Unix(PathBuf),
}

/// This is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither a PORT, nor an ADDRESS:PORT, nor unix:PATH")]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    /// `PORT` (on loopback, 0 for any), `ADDRESS:PORT`, `:PORT`,
    /// `localhost:PORT` or `unix:PATH`.
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let wrong = || AddressError(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err(wrong())
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        let port = ["localhost:", ":", ""]
            .iter()
            .find_map(|prefix| text.strip_prefix(prefix)?.parse::<u16>().ok());
        if let Some(port) = port {
            let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
            return Ok(Self::Tcp(SocketAddr::new(loopback, port)));
        }
        text.parse().map(Self::Tcp).map_err(|_| wrong())
    }
}

impl fmt::Display for Address {
    /// As gdb's `target remote` takes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) if address.ip() == IpAddr::V4(Ipv4Addr::LOCALHOST) => {
                write!(f, ":{}", address.port())
            }
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// gdb cannot be waited for there.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address is not to be had.
    #[error(
        "cannot wait for gdb at {address}: {source}; choose another address, or port 0 for any"
    )]
    Address {
        /// What was asked for.
        address: Address,
        /// What the host kernel said.
        source: io::Error,
    },
    /// There is no descriptor or thread left.
    #[error("cannot make ready for gdb: {0}; raise `ulimit -n` or lower the load")]
    Host(#[from] io::Error),
}

/// Waits for gdb, and serves it. See the module documentation.
///
/// Make it before the engine: then its thread is a plain one of the host in
/// both placements.
#[derive(Debug)]
pub struct Debugger {
    address: Address,
    control: Arc<Control>,
    listener: RawFd,
    /// To its thread, until the program begins.
    begin: Mutex<Option<Sender<Begun>>>,
}

impl Debugger {
    /// Listens at `address` and starts the thread that serves one client, the
    /// first.
    ///
    /// # Errors
    ///
    /// If that address, a descriptor or a thread is not to be had.
    ///
    /// For a path, the process's umask is another one for a moment: no other
    /// thread should be making files.
    pub fn listen(address: &Address) -> Result<Self, ListenError> {
        let (listener, address) = bound(address)?;
        let control = Arc::new(Control::new()?);
        let (begin, begun) = channel();
        let debugger = Self {
            address,
            control: Arc::clone(&control),
            listener: listener.descriptor(),
            begin: Mutex::new(Some(begin)),
        };
        start(control, listener, begun)?;
        Ok(debugger)
    }

    /// Where it can be reached, with the port that was chosen.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The descriptors that the program must not have, and its children not
    /// keep.
    pub(crate) fn descriptors(&self) -> Vec<RawFd> {
        let mut all = self.control.descriptors().to_vec();
        all.push(self.listener);
        all
    }

    pub(crate) fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// The program, which stops at its first instruction, is about to begin.
    pub(crate) fn begin(&self, program: &Arc<Program>, xcr0: u64) {
        let mut begin = self.begin.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(begin) = begin.take() else { return };
        self.control.begin(program.pid());
        let begun = Begun {
            program: Arc::clone(program),
            xcr0,
        };
        if begin.send(begun).is_err() {
            // Its thread is gone: nobody would ever let the program run.
            self.control.detach();
        }
    }

    /// The program has ended; returns when gdb has been told.
    pub(crate) fn end(&self, end: Option<End>) {
        self.control.end(end);
    }
}

/// The listener, out of the program's way, and its address.
fn bound(address: &Address) -> Result<(Listener, Address), ListenError> {
    let failed = |source| ListenError::Address {
        address: address.clone(),
        source,
    };
    match address {
        Address::Tcp(socket) => {
            let listener = TcpListener::bind(socket).map_err(failed)?;
            // Who is gone when it is accepted must not be waited for.
            listener.set_nonblocking(true).map_err(failed)?;
            let chosen = listener.local_addr().map_err(failed)?;
            let listener = move_fd_high(OwnedFd::from(listener))?.into();
            Ok((Listener::Tcp(listener), Address::Tcp(chosen)))
        }
        Address::Unix(path) => {
            // The program may be started in another folder.
            let path = std::path::absolute(path).map_err(failed)?;
            let listener = private_socket(&path).map_err(failed)?;
            let listener = move_fd_high(OwnedFd::from(listener))?.into();
            let chosen = Address::Unix(path.clone());
            Ok((Listener::Unix(listener, path), chosen))
        }
    }
}

/// A socket at `path` that nobody but the owner of this process can connect to,
/// not even before its permissions could be changed.
fn private_socket(path: &Path) -> io::Result<UnixListener> {
    const ALL_BUT_THE_OWNERS: u64 = 0o177;
    let mask = |new: u64| forward_always(__NR_umask, [new, 0, 0, 0, 0, 0]);
    // It cannot fail.
    let before = mask(ALL_BUT_THE_OWNERS).unwrap_or(ALL_BUT_THE_OWNERS);
    let listener = UnixListener::bind(path);
    let _ = mask(before);
    let listener = listener?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn start(control: Arc<Control>, listener: Listener, begun: Receiver<Begun>) -> io::Result<()> {
    let mask = host::mask();
    // The new thread takes no signal of the program's.
    host::block_all();
    let thread = std::thread::Builder::new()
        .name("debugger".to_owned())
        .spawn(move || {
            if let Ok(begun) = begun.recv() {
                // This thread may be older than the engine.
                Wall::open_for_this_thread();
                server::serve(&control, begun, listener);
            }
        });
    host::set_mask(mask);
    thread.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_on_loopback_unless_told_otherwise() {
        for (text, shown) in [
            ("1234", ":1234"),
            (":1234", ":1234"),
            ("localhost:1", ":1"),
            ("127.0.0.1:7", ":7"),
            ("10.0.0.1:7", "10.0.0.1:7"),
            ("[::1]:7", "[::1]:7"),
            ("unix:/tmp/x", "/tmp/x"),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), shown, "{text}");
        }
        for wrong in ["", "unix:", "gdb", "1.2.3.4", "host:1234", "70000", "-1"] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }
}
