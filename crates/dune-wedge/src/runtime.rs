//! What all compartments of the process share: the image of the program, memory, the watch
//! over time limits, and compartments' shells that wait to be used again.

use std::sync::{Mutex, OnceLock, PoisonError};

use dune::memory::SpaceError;

use crate::error::StartError;
use crate::frames::FramePool;
use crate::image::{Image, Thread};
use crate::inside;
use crate::shell::Shell;
use crate::watchdog::Watchdog;

/// Shells that are kept for new compartments.
const KEPT_SHELLS: usize = 64;

#[derive(Debug)]
pub(crate) struct Runtime {
    image: Image,
    watchdog: Watchdog,
    shells: Mutex<Vec<Shell>>,
}

static FRAMES: FramePool = FramePool::new();
static RUNTIME: OnceLock<Runtime> = OnceLock::new();
static STARTING: Mutex<()> = Mutex::new(());

/// Takes the image of the program that compartments start from, once in a process; from then
/// on compartments can be made.
///
/// **Call it first in `main`**, before there are secrets: what global variables (of the
/// program and its libraries) hold at this moment is what every compartment can read. Memory
/// that is allocated (the heap, stacks) is not in the image. A program that never calls it has
/// the image taken with its first compartment.
///
/// May be called in Dune mode or outside. Costs one entry into Dune mode, two short-lived
/// threads, and a copy of all global variables (some milliseconds). A thread stays to keep
/// the time limits; it sleeps while no compartment runs.
///
/// # Errors
/// [`StartError`].
pub fn start() -> Result<(), StartError> {
    runtime().map(drop)
}

pub(crate) fn runtime() -> Result<&'static Runtime, StartError> {
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    let _guard = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    // Threads that are made outside Dune mode have no virtual CPU.
    let was_inside = dune::is_inside();
    dune::leave();
    let prepared = prepare();
    let runtime = dune::run(|| {
        let (thread, watchdog) = prepared?;
        Ok::<Runtime, StartError>(Runtime {
            image: Image::take(thread)?,
            watchdog,
            shells: Mutex::new(Vec::new()),
        })
    });
    if was_inside {
        dune::enter()?;
    }
    let runtime = runtime??;
    Ok(RUNTIME.get_or_init(|| runtime))
}

fn prepare() -> Result<(Thread, Watchdog), StartError> {
    inside::panic::install_hook();
    inside::auxiliary::remember();
    let watchdog = Watchdog::start().map_err(StartError::Watchdog)?;
    Ok((Thread::take()?, watchdog))
}

impl Runtime {
    #[inline]
    pub(crate) fn image(&self) -> &Image {
        &self.image
    }

    #[inline]
    pub(crate) fn frames(&self) -> &FramePool {
        &FRAMES
    }

    #[inline]
    pub(crate) fn watchdog(&self) -> &Watchdog {
        &self.watchdog
    }

    /// A pristine shell.
    pub(crate) fn take_shell(&'static self) -> Result<Shell, SpaceError> {
        let kept = self.shells().pop();
        match kept {
            Some(shell) => Ok(shell),
            None => Shell::new(self),
        }
    }

    /// Keeps a shell that is pristine again, for the next compartment.
    pub(crate) fn keep_shell(&self, mut shell: Shell) {
        shell.trim();
        let mut shells = self.shells();
        if shells.len() < KEPT_SHELLS {
            shells.push(shell);
        }
    }

    fn shells(&self) -> std::sync::MutexGuard<'_, Vec<Shell>> {
        self.shells.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives back what is kept of compartments that ended, which is page tables and a page of each
/// of the last 64, so that new ones need not be made from nothing.
pub fn trim() {
    if let Some(runtime) = RUNTIME.get() {
        let kept = core::mem::take(&mut *runtime.shells());
        drop(kept);
    }
}

/// Memory that all compartments of the process use together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Pages of 4 KiB that compartments have as their own.
    pub pages_in_use: usize,
    /// Pages that were taken from the process for them, in use or not.
    pub pages_taken: usize,
    /// Frames of 4 KiB in use for page tables, of compartments and of everything else.
    pub tables: usize,
}

/// The memory that compartments use now.
#[must_use]
pub fn usage() -> Usage {
    let (pages_in_use, pages_taken) = FRAMES.usage();
    Usage {
        pages_in_use,
        pages_taken,
        tables: dune::memory::Frames::in_use() as usize,
    }
}
