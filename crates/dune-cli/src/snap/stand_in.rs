//! A process that stands in for the run in hand.
//!
//! A fuzzer is told the id of the process that runs, and kills that process if
//! it takes too long. Here runs are no processes. So it is told the id of one
//! that only waits, and its death is taken for the wish that the run shall end:
//!
//! ```text
//!   dune ----- makes ---> helper ---- makes ---> stand-in <--- SIGKILL, the fuzzer
//!     ^                      |  waits for its death,
//!     +------- a pipe -------+  makes the next, says its id
//! ```
//!
//! The helper is no child of this process, which is the program's, too: the
//! program would see it when it waits for its children. It ends when the other
//! end of the pipe is closed.
#![expect(unsafe_code, reason = "fork")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;

use super::descriptors::aside;
use super::in_hand::InHand;
use crate::watchdog;

/// The stand-ins, one after the other.
#[derive(Clone, Debug)]
pub(super) struct StandIns {
    /// Id of the living one, and above it how many there were before.
    current: Arc<AtomicU64>,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StandIn(u64);

impl StandIn {
    /// The process's id.
    pub(super) fn pid(self) -> u32 {
        self.0 as u32
    }
}

impl StandIns {
    /// Makes the first, and a thread that interrupts `run` when one dies. To be
    /// called while this process has one thread.
    ///
    /// # Errors
    ///
    /// If there is no process, thread or descriptor left.
    pub(super) fn begin(run: &Arc<InHand>) -> anyhow::Result<Self> {
        let mut ids = helper().context("cannot make a process; raise `ulimit -u`")?;
        let first = next(&mut ids).context("the process that stands in for runs is gone")?;
        let this = Self {
            current: Arc::new(AtomicU64::new(first.into())),
        };
        let (run, current) = (Arc::clone(run), Arc::clone(&this.current));
        watchdog::spawn_beside("stand-ins", move || {
            let mut count = 0_u64;
            while let Ok(pid) = next(&mut ids) {
                count += 1;
                current.store(count << 32 | u64::from(pid), Ordering::SeqCst);
                run.interrupt();
            }
        })?;
        Ok(this)
    }

    /// The one that stands in for the run that begins.
    pub(super) fn current(&self) -> StandIn {
        StandIn(self.current.load(Ordering::SeqCst))
    }

    /// Waits for the successor of `old`, which was killed.
    pub(super) fn after(&self, old: StandIn) {
        /// 10 s in all: more than any machine needs for it.
        const MOST: u32 = 10_000;
        for _ in 0..MOST {
            if self.current() != old {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

fn next(ids: &mut File) -> io::Result<u32> {
    let mut id = [0; 4];
    ids.read_exact(&mut id)?;
    Ok(u32::from_ne_bytes(id))
}

/// Starts the helper. The pipe by which it tells.
fn helper() -> io::Result<File> {
    let (reader, writer) = io::pipe()?;
    // SAFETY: one thread; the child does nothing but make system calls.
    match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        0 => {
            // Its parent ends at once, so that it is nobody's child here.
            // SAFETY: as above.
            if unsafe { libc::fork() } == 0 {
                help(writer.as_raw_fd());
            }
            leave();
        }
        child => {
            let mut status = 0;
            // SAFETY: the kernel writes the status.
            unsafe { libc::waitpid(child, &raw mut status, 0) };
        }
    }
    drop(writer);
    aside(reader)
}

fn leave() -> ! {
    // SAFETY: ends the process without running anything of its parent's.
    unsafe { libc::_exit(0) }
}

/// The helper's life. Nothing but system calls: its memory is a copy of another
/// process's.
fn help(pipe: i32) -> ! {
    const PIPE: i32 = 0;
    // SAFETY: descriptors of this process alone; nothing here owns them.
    unsafe { libc::dup2(pipe, PIPE) };
    // SAFETY: as above. The fuzzer must see its pipes closed when Dune is gone.
    unsafe { libc::syscall(libc::SYS_close_range, 1, u32::MAX, 0) };
    // SAFETY: a writer whose reader is gone shall find out by the call.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    loop {
        // SAFETY: one thread; the child only waits.
        let child = unsafe { libc::fork() };
        match child {
            -1 => leave(),
            0 => stand_in(),
            _ => {}
        }
        // SAFETY: four bytes of `child`.
        let told = unsafe { libc::write(PIPE, (&raw const child).cast(), 4) };
        if told != 4 || !outlives(child, PIPE) {
            // SAFETY: a child that was not waited for.
            unsafe { libc::kill(child, libc::SIGKILL) };
            leave();
        }
    }
}

/// Waits for the death of `child`. False if Dune goes first.
fn outlives(child: i32, pipe: i32) -> bool {
    // SAFETY: makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child, 0) } as i32;
    let entry = |fd, events| libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    // A pipe's writer has no event but its reader's going.
    let mut entries = [entry(fd, libc::POLLIN), entry(pipe, 0)];
    // SAFETY: two entries, which the kernel updates.
    let polled = unsafe { libc::poll(entries.as_mut_ptr(), 2, -1) };
    // SAFETY: the descriptor made above.
    unsafe { libc::close(fd) };
    if polled < 1 || entries[1].revents != 0 {
        return false;
    }
    let mut status = 0;
    // SAFETY: the kernel writes the status.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    true
}

fn stand_in() -> ! {
    // SAFETY: has this process end with its parent.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    loop {
        // SAFETY: waits for a signal.
        unsafe { libc::pause() };
    }
}
