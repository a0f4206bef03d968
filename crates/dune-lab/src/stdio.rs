//! This process's standard input, carried to the command in the guest.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::error::{LabError, io_error};
use crate::session::Link;
use crate::terminal::Streams;
use crate::wire::{Kind, STDIN_CREDIT};

/// Where the command's standard input comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Nowhere: end of file at once.
    Nothing,
    /// This process's standard input.
    Inherited,
    /// This process's terminal: the command gets a terminal of its own, of the
    /// same size, for these of its streams.
    Terminal(Streams),
}

impl Input {
    /// This process's standard streams as they are.
    #[must_use]
    pub fn from_process() -> Input {
        let streams = Streams::of_process();
        if streams.is_empty() {
            Input::Inherited
        } else {
            Input::Terminal(streams)
        }
    }
}

/// The thread that reads standard input. Dropping this stops it.
#[derive(Debug)]
pub(crate) struct Feeder {
    credit: Arc<(Mutex<usize>, Condvar)>,
    /// Closed on drop, which wakes the thread up.
    _stop: OwnedFd,
}

impl Feeder {
    pub(crate) fn start(input: Input, link: Link) -> Result<Feeder, LabError> {
        let (stopped, stop) =
            pipe_with(PipeFlags::CLOEXEC).map_err(|errno| io_error("make a pipe")(errno.into()))?;
        let credit = Arc::new((Mutex::new(STDIN_CREDIT), Condvar::new()));
        if input == Input::Nothing {
            // A guest that is gone is noticed by the side that reads.
            let _ = link.send(Kind::Stdin, b"");
        } else {
            let credit = Arc::clone(&credit);
            thread::spawn(move || feed(&stopped, &credit, &link));
        }
        Ok(Feeder {
            credit,
            _stop: stop,
        })
    }

    /// The command took so many bytes.
    pub(crate) fn credit(&self, bytes: u32) {
        let (available, changed) = &*self.credit;
        *available.lock().unwrap_or_else(PoisonError::into_inner) += bytes as usize;
        changed.notify_one();
    }
}

fn feed(stopped: &OwnedFd, credit: &(Mutex<usize>, Condvar), link: &Link) {
    const CHUNK: usize = 32 << 10;
    let mut stdin = std::io::stdin();
    let mut buffer = vec![0; CHUNK];
    loop {
        let (available, changed) = credit;
        let mut available = available.lock().unwrap_or_else(PoisonError::into_inner);
        while *available < CHUNK {
            available = changed
                .wait(available)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(available);
        let stdin_fd = std::io::stdin();
        let mut fds = [
            PollFd::from_borrowed_fd(stdin_fd.as_fd(), PollFlags::IN),
            PollFd::new(stopped, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => return,
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
        }
        let count = match stdin.read(&mut buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            // A closed or unreadable input is an empty one.
            Err(_) => 0,
            Ok(count) => count,
        };
        *credit.0.lock().unwrap_or_else(PoisonError::into_inner) -= count;
        if link.send(Kind::Stdin, &buffer[..count]).is_err() || count == 0 {
            return;
        }
    }
}
