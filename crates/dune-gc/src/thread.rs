//! What the heap knows of a thread: where it allocates, and whether it is stopped.

use core::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicUsize, Ordering};

use crate::block::{KINDS, NONE};
use crate::layout::CLASSES;

/// A run of free cells that a thread fills from the front; the memory is zero.
///
/// The collector takes all cells from `at` on for allocated. So a thread that a signal stopped
/// between taking a cell and saying so finds both as it left them.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Buffer {
    /// The next cell.
    pub(crate) at: AtomicUsize,
    /// Behind the last cell.
    pub(crate) end: AtomicUsize,
    /// The block that the run is in, and of which the thread takes the next run.
    pub(crate) block: AtomicU32,
    /// Bytes of a cell.
    cell_bytes: u32,
}

impl Buffer {
    const fn new(cell_bytes: u32) -> Self {
        Self {
            at: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            block: AtomicU32::new(NONE),
            cell_bytes,
        }
    }

    /// Takes a cell.
    #[inline]
    pub(crate) fn take(&self) -> Option<usize> {
        let at = self.at.load(Ordering::Relaxed);
        let next = at + self.cell_bytes as usize;
        if next > self.end.load(Ordering::Relaxed) {
            return None;
        }
        self.at.store(next, Ordering::Relaxed);
        Some(at)
    }
}

const fn row() -> [Buffer; CLASSES] {
    let mut row = [const { Buffer::new(0) }; CLASSES];
    let mut class = 0;
    while class < CLASSES {
        row[class].cell_bytes = crate::layout::CELL_BYTES[class];
        class += 1;
    }
    row
}

/// The thread runs, and may use the heap.
pub(crate) const RUNNING: u32 = 0;
/// The thread does not use the heap, and waits before it does so again while the world is
/// stopped. `stack_pointer` holds.
pub(crate) const SAFE: u32 = 1;

/// A registered thread.
#[derive(Debug)]
pub(crate) struct Thread {
    /// By kind and class.
    pub(crate) buffers: [[Buffer; CLASSES]; KINDS],
    /// [`RUNNING`] or [`SAFE`].
    pub(crate) state: AtomicU32,
    /// Whether a stop by a signal has to wait until the thread looks by itself.
    pub(crate) is_critical: AtomicBool,
    /// How often it asked to be safe; only the first and last time count.
    pub(crate) safe_depth: AtomicU32,
    /// Where the part of its stack begins that is in use, while it is safe.
    pub(crate) stack_pointer: AtomicUsize,
    /// The lowest address and the end of its stack.
    pub(crate) stack: [AtomicUsize; 2],
    /// Its thread-local variables, from and to.
    pub(crate) tls: [AtomicUsize; 2],
    /// Whom to signal, and to name.
    pub(crate) tid: AtomicI32,
}

impl Thread {
    pub(crate) const fn new() -> Self {
        Self {
            buffers: [row(), row(), row()],
            state: AtomicU32::new(RUNNING),
            is_critical: AtomicBool::new(false),
            safe_depth: AtomicU32::new(0),
            stack_pointer: AtomicUsize::new(0),
            stack: [const { AtomicUsize::new(0) }; 2],
            tls: [const { AtomicUsize::new(0) }; 2],
            tid: AtomicI32::new(0),
        }
    }

    /// The end of its stack.
    pub(crate) fn stack_end(&self) -> usize {
        self.stack[1].load(Ordering::Relaxed)
    }

    /// Whether an address is in its stack.
    pub(crate) fn is_on_stack(&self, address: usize) -> bool {
        (self.stack[0].load(Ordering::Relaxed)..self.stack_end()).contains(&address)
    }

    pub(crate) fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        self.buffers.iter().flatten()
    }
}
