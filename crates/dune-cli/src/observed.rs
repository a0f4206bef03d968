//! What is reported at the end of `dune run`: standard error, kept for it, and an
//! engine that counts what passes through it.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use dune_sandbox::Command;
use dune_sandbox::engine::{
    Access, Engine, EngineError, Holdings, Passage, Seed, Trap, Usage, UserState,
};
use dune_sandbox::host::move_fd_high;
use dune_sandbox::range::PageRange;

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) calls: u64,
    pub(crate) page_faults: u64,
    pub(crate) host_faults: u64,
    pub(crate) exceptions: u64,
    pub(crate) interruptions: u64,
    /// As of the last thread's end.
    pub(crate) holdings: Holdings,
}

impl Counts {
    fn count(&mut self, trap: &Trap) {
        let counter = match trap {
            Trap::Syscall => &mut self.calls,
            Trap::PageFault { .. } => &mut self.page_faults,
            Trap::HostFault { .. } => &mut self.host_faults,
            Trap::Exception { .. } => &mut self.exceptions,
            Trap::Interrupted => &mut self.interruptions,
        };
        *counter += 1;
    }

    /// One line for a person.
    pub(crate) fn summary(self, placement: impl fmt::Display, elapsed: Duration) -> String {
        let mut parts = vec![
            format!("placement {placement}"),
            plural(self.calls, "system call"),
            plural(self.page_faults, "page fault"),
            plural(self.holdings.vcpus as u64, "vCPU"),
            plural(self.holdings.slots as u64, "memory slot"),
        ];
        // What most programs do not have is named only where it was.
        for (count, what) in [
            (self.host_faults, "host fault"),
            (self.exceptions, "exception"),
            (self.interruptions, "interruption"),
        ] {
            if count > 0 {
                parts.push(plural(count, what));
            }
        }
        parts.push(format!("{:.1} ms", elapsed.as_secs_f64() * 1e3));
        parts.join(", ")
    }
}

fn plural(count: u64, what: &str) -> String {
    let s = if count == 1 { "" } else { "s" };
    format!("{count} {what}{s}")
}

/// An engine that counts. All else of it is another engine.
struct Observed {
    inner: Box<dyn Engine>,
    counts: Arc<Mutex<Counts>>,
}

/// What is left when the engine and the program are gone.
pub(crate) struct Observer {
    counts: Arc<Mutex<Counts>>,
    stderr: File,
}

/// Makes ready that `command`, run by `engine`, can be reported on afterwards.
/// Without `counting` the counts stay zero and the engine is as it was: no trap
/// is slowed down.
///
/// Standard error is duplicated, because programs close theirs at their end
/// (to see whether all has been written), and it is the same descriptor. The
/// duplicate is hidden from the program.
///
/// # Errors
///
/// If there is no descriptor left.
pub(crate) fn observe(
    command: Command,
    engine: Box<dyn Engine>,
    counting: bool,
) -> anyhow::Result<(Command, Box<dyn Engine>, Observer)> {
    let stderr = io::stderr()
        .as_fd()
        .try_clone_to_owned()
        .and_then(move_fd_high)
        .context("cannot duplicate standard error; raise `ulimit -n`")?;
    let counts = Arc::new(Mutex::new(Counts::default()));
    let engine = if counting {
        Box::new(Observed {
            inner: engine,
            counts: Arc::clone(&counts),
        })
    } else {
        engine
    };
    Ok((
        command.hide(stderr.as_raw_fd()),
        engine,
        Observer {
            counts,
            stderr: stderr.into(),
        },
    ))
}

impl Observer {
    pub(crate) fn counts(&self) -> Counts {
        *locked(&self.counts)
    }

    /// Another descriptor for the same, out of the program's way.
    ///
    /// # Errors
    ///
    /// If there is no descriptor left.
    pub(crate) fn another(&self) -> anyhow::Result<File> {
        self.stderr
            .try_clone()
            .and_then(|file| move_fd_high(file.into()))
            .map(File::from)
            .context("cannot duplicate standard error; raise `ulimit -n`")
    }

    /// A line for programs, without Dune's name before it.
    pub(crate) fn say_plainly(&mut self, line: &str) {
        // There is nobody to tell that it cannot be written.
        let _ = self.stderr.write_all(format!("{line}\n").as_bytes());
    }

    /// One line on what standard error was at the start.
    pub(crate) fn say(&mut self, message: &str) {
        // There is nobody to tell that it cannot be written.
        let _ = writeln!(self.stderr, "dune: {message}");
    }
}

impl Engine for Observed {
    fn run(&mut self, user: &mut UserState) -> Result<Trap, EngineError> {
        let trap = self.inner.run(user)?;
        locked(&self.counts).count(&trap);
        Ok(trap)
    }

    fn answer_by_itself(&mut self, _may: bool) -> Result<(), EngineError> {
        // What the engine answers passes by the counts.
        self.inner.answer_by_itself(false)
    }

    fn admit(&mut self, addr: u64, area: PageRange, access: Access) -> Result<(), EngineError> {
        self.inner.admit(addr, area, access)
    }

    fn admit_ahead(&mut self, range: PageRange, access: Access) -> Result<(), EngineError> {
        self.inner.admit_ahead(range, access)
    }

    fn shows_clock(&mut self, data: u64, len: u64) -> bool {
        self.inner.shows_clock(data, len)
    }

    fn admit_clock(&mut self, range: PageRange, data: u64) -> Result<(), EngineError> {
        self.inner.admit_clock(range, data)
    }

    fn revoke(&mut self, range: PageRange) -> Result<(), EngineError> {
        self.inner.revoke(range)
    }

    fn needs_host_change(&self) -> bool {
        self.inner.needs_host_change()
    }

    fn note_use(&mut self) -> Option<Box<dyn Usage>> {
        self.inner.note_use()
    }

    fn seed(&mut self) -> Result<Box<dyn Seed>, EngineError> {
        Ok(Box::new(ObservedSeed {
            inner: self.inner.seed()?,
            counts: Arc::clone(&self.counts),
        }))
    }

    fn renew(&mut self) -> Result<(), EngineError> {
        self.inner.renew()
    }

    fn xcr0(&self) -> u64 {
        self.inner.xcr0()
    }

    fn xstate_len(&self) -> usize {
        self.inner.xstate_len()
    }

    fn save_xstate(&mut self, area: &mut [u8]) -> Result<(), EngineError> {
        self.inner.save_xstate(area)
    }

    fn load_xstate(&mut self, area: &[u8]) -> Result<(), EngineError> {
        self.inner.load_xstate(area)
    }

    fn reset_xstate(&mut self) -> Result<(), EngineError> {
        self.inner.reset_xstate()
    }

    fn passage(&self) -> Passage {
        self.inner.passage()
    }

    fn kick_byte(&self) -> NonNull<AtomicU8> {
        self.inner.kick_byte()
    }

    fn holdings(&self) -> Holdings {
        self.inner.holdings()
    }

    fn fds(&self) -> Vec<RawFd> {
        self.inner.fds()
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        let holdings = self.inner.holdings();
        locked(&self.counts).holdings = holdings;
    }
}

/// An engine to be, of another thread.
struct ObservedSeed {
    inner: Box<dyn Seed>,
    counts: Arc<Mutex<Counts>>,
}

impl Seed for ObservedSeed {
    fn grow(self: Box<Self>) -> Result<Box<dyn Engine>, EngineError> {
        Ok(Box::new(Observed {
            inner: self.inner.grow()?,
            counts: self.counts,
        }))
    }
}

fn locked(counts: &Mutex<Counts>) -> MutexGuard<'_, Counts> {
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_names_what_there_was() {
        let counts = Counts {
            calls: 94,
            page_faults: 1,
            holdings: Holdings { vcpus: 1, slots: 5 },
            ..Counts::default()
        };
        let line = counts.summary("host", Duration::from_micros(6_400));
        assert_eq!(
            line,
            "placement host, 94 system calls, 1 page fault, 1 vCPU, 5 memory slots, 6.4 ms"
        );
        let counts = Counts {
            exceptions: 2,
            ..Counts::default()
        };
        let line = counts.summary("guest", Duration::ZERO);
        assert!(line.contains("2 exceptions"), "{line}");
    }
}
