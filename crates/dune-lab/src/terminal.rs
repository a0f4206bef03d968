//! The terminal this process runs on: its size, raw mode, and output to it.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// A set of standard streams, those that are a terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Streams(u8);

impl Streams {
    /// Which of this process's standard streams are a terminal.
    #[must_use]
    pub fn of_process() -> Streams {
        let streams = [
            io::stdin().is_terminal(),
            io::stdout().is_terminal(),
            io::stderr().is_terminal(),
        ];
        let bits = streams
            .iter()
            .enumerate()
            .map(|(index, terminal)| u8::from(*terminal) << index)
            .sum();
        Streams(bits)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn bits(self) -> u8 {
        self.0
    }

    fn has_input(self) -> bool {
        self.0 & 1 != 0
    }

    /// A descriptor of the terminal.
    fn with_terminal<T>(self, action: impl FnOnce(BorrowedFd<'_>) -> T) -> Option<T> {
        match self.0.trailing_zeros() {
            0 => Some(action(io::stdin().as_fd())),
            1 => Some(action(io::stdout().as_fd())),
            2 => Some(action(io::stderr().as_fd())),
            _ => None,
        }
    }
}

/// Rows and columns of the terminal; 24 by 80 when it does not say.
pub(crate) fn size(streams: Streams) -> (u16, u16) {
    streams
        .with_terminal(|fd| tcgetwinsize(fd))
        .and_then(Result::ok)
        .filter(|size| size.ws_row != 0 && size.ws_col != 0)
        .map_or((24, 80), |size| (size.ws_row, size.ws_col))
}

/// Writes to the terminal, through whichever output stream it is.
pub(crate) fn write(bytes: &[u8]) -> io::Result<()> {
    if io::stdout().is_terminal() {
        let mut stdout = io::stdout();
        stdout.write_all(bytes)?;
        return stdout.flush();
    }
    if io::stderr().is_terminal() {
        return io::stderr().write_all(bytes);
    }
    // Only the input is the terminal: what is written here is its echo.
    File::options()
        .write(true)
        .open("/dev/tty")
        .and_then(|mut terminal| terminal.write_all(bytes))
}

/// Raw mode of the terminal: every key goes to the guest's terminal, which
/// gives it its meaning. Dropping it restores the former mode.
#[derive(Debug)]
pub(crate) struct RawMode {
    streams: Streams,
    former: Termios,
}

impl RawMode {
    /// `None` when standard input is no terminal.
    pub(crate) fn enter(streams: Streams) -> Option<RawMode> {
        if !streams.has_input() {
            return None;
        }
        let former = streams.with_terminal(|fd| tcgetattr(fd))?.ok()?;
        let mut raw = former.clone();
        raw.make_raw();
        streams
            .with_terminal(|fd| tcsetattr(fd, OptionalActions::Drain, &raw))?
            .ok()?;
        Some(RawMode { streams, former })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        self.streams
            .with_terminal(|fd| tcsetattr(fd, OptionalActions::Drain, &self.former));
    }
}

/// This process's file mode creation mask.
///
/// Read from /proc: the system call that returns it changes it for a moment,
/// under the feet of other threads.
pub(crate) fn umask() -> u32 {
    const USUAL: u32 = 0o022;
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("Umask:"))?;
            u32::from_str_radix(line.trim(), 8).ok()
        })
        .unwrap_or(USUAL)
}
