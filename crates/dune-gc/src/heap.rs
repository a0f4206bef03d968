//! The heap: allocation, and when to collect.
#![expect(unsafe_code, reason = "clears memory that is about to be handed out")]

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::block::{Block, Kind, NONE};
use crate::collect::Collector;
use crate::cycle::Cycle;
use crate::error::GcError;
use crate::fork;
use crate::layout::{BLOCK, CELL_BYTES, PAGE, class_of};
use crate::mark::MarkStack;
use crate::provider::Provider;
use crate::roots::Roots;
use crate::space::{Lists, Space};
use crate::stats::{Counters, Stats};
use crate::thread::{Buffer, Thread};
use crate::track::WriteTracker;
use crate::world::World;

/// Addresses that a heap reserves where nothing else is said.
const RESERVATION: usize = 64 << 30;
/// Objects that can wait to be looked at; what does not fit is found again by a search.
const MARK_STACK_ENTRIES: usize = 16 << 20;
/// Words looked at in one stop of the world, if the heap is small: some 0.5 ms.
const WORDS_AT_ONCE: usize = 32 << 10;
/// Bytes that a program allocates between two stops of a collection. One that writes at random
/// makes in that time what takes a stop to follow.
const BYTES_BETWEEN: usize = 2 << 10;
/// Bytes that are cleared at once: below the length from which libc's `memset` uses
/// `REP STOSB`, whose start costs more than so short a run.
const CLEAR_PIECE: usize = 1024;

/// What a heap is made of, apart from the write tracker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parameters {
    pub(crate) reservation: usize,
    pub(crate) mark_stack_entries: usize,
    /// Bytes allocated between collections, at least.
    pub(crate) least_allowance: usize,
    /// Collects at every allocation that needs the heap's lock: young objects in one stop, then
    /// everything in very many.
    pub(crate) is_stressed: bool,
    /// So much is looked at in one stop of the world, in words; `None` to look at everything.
    pub(crate) words_at_once: Option<usize>,
    /// Bytes allocated between two stops of one collection.
    pub(crate) bytes_between: usize,
    /// Sent to threads that are to stop.
    pub(crate) stop_signal: Option<i32>,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            reservation: RESERVATION,
            mark_stack_entries: MARK_STACK_ENTRIES,
            least_allowance: 8 << 20,
            is_stressed: false,
            words_at_once: Some(WORDS_AT_ONCE),
            bytes_between: BYTES_BETWEEN,
            stop_signal: None,
        }
    }
}

/// The heap below both interfaces.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) space: Space,
    pub(crate) world: World,
    pub(crate) tracker: Box<dyn WriteTracker>,
    pub(crate) roots: Mutex<Roots>,
    pub(crate) parameters: Parameters,
    pub(crate) counters: Counters,
    /// Held by whoever collects.
    pub(crate) collector: Mutex<Collector>,
    /// Bytes handed out to threads since the last collection, or the last stop for the one that is
    /// under way.
    pub(crate) allocated: AtomicUsize,
    /// How many of them make a collection due.
    pub(crate) allowance: AtomicUsize,
    /// Bytes of old objects that the last minor collection looked at.
    pub(crate) looked_at: AtomicUsize,
    /// Bytes that the last full collection looked at.
    pub(crate) looked_at_when_full: AtomicUsize,
    /// Bytes that were live after the last full collection.
    pub(crate) live_when_full: AtomicUsize,
    pub(crate) cycle: Cycle,
    /// Somebody runs cycles.
    pub(crate) has_marker: AtomicBool,
    /// Finalizers wait to be run.
    pub(crate) has_ready: AtomicBool,
    /// The process that it belongs to.
    pub(crate) generation: AtomicU32,
}

impl Core {
    pub(crate) fn new(parameters: Parameters, provider: Provider) -> Result<Self, GcError> {
        fork::prepare();
        let space = Space::new(parameters.reservation).map_err(GcError::Reserve)?;
        let tracker = provider.tracker(&space)?;
        let stack = MarkStack::new(parameters.mark_stack_entries).map_err(GcError::Reserve)?;
        Ok(Self {
            space,
            world: World::default(),
            tracker,
            roots: Mutex::new(Roots::default()),
            parameters,
            counters: Counters::default(),
            collector: Mutex::new(Collector {
                stack,
                collection: None,
            }),
            allocated: AtomicUsize::new(0),
            allowance: AtomicUsize::new(parameters.least_allowance),
            looked_at: AtomicUsize::new(0),
            looked_at_when_full: AtomicUsize::new(0),
            live_when_full: AtomicUsize::new(0),
            cycle: Cycle::default(),
            has_marker: AtomicBool::new(false),
            has_ready: AtomicBool::new(false),
            generation: AtomicU32::new(fork::generation()),
        })
    }

    pub(crate) fn roots(&self) -> MutexGuard<'_, Roots> {
        self.check_process();
        self.roots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the process if it is a child that has no use of this heap (see [`fork`]).
    #[inline]
    pub(crate) fn check_process(&self) {
        if self.is_foreign() {
            fatal(fork::REFUSAL);
        }
    }

    /// Whether this is a child of the process that made the heap, and cannot use it.
    #[inline]
    pub(crate) fn is_foreign(&self) -> bool {
        self.generation.load(Ordering::Relaxed) != fork::generation()
    }

    pub(crate) fn stats(&self) -> Stats {
        self.counters.read(self.tracker.traps())
    }

    /// Memory for an object, zero. The calling thread is `thread`, RUNNING. `None` where
    /// there is no more memory.
    #[inline]
    pub(crate) fn allocate(&self, thread: &Thread, kind: Kind, bytes: usize) -> Option<usize> {
        if let Some(class) = class_of(bytes)
            && let Some(address) = thread.buffers[kind.index()][class].take()
        {
            return Some(address);
        }
        self.allocate_slowly(thread, kind, bytes)
    }

    /// As [`allocate`](Self::allocate), without ever collecting.
    #[inline]
    pub(crate) fn allocate_beside(
        &self,
        thread: &Thread,
        kind: Kind,
        bytes: usize,
    ) -> Option<usize> {
        if let Some(class) = class_of(bytes)
            && let Some(address) = thread.buffers[kind.index()][class].take()
        {
            return Some(address);
        }
        self.critically(thread, || self.try_allocate(thread, kind, bytes))
    }

    /// The thread allocates no more.
    pub(crate) fn give_back_buffers(&self, thread: &Thread) {
        self.critically(thread, || self.forget_buffers(thread));
    }

    /// As [`give_back_buffers`](Self::give_back_buffers), for a thread that is there no more.
    pub(crate) fn forget_buffers(&self, thread: &Thread) {
        for buffer in thread.buffers() {
            let number = buffer.block.swap(NONE, Ordering::Relaxed);
            if number != NONE {
                (self.space.block(number).owned).store(0, Ordering::Release);
            }
            buffer.end.store(0, Ordering::Relaxed);
        }
    }

    #[cold]
    #[inline(never)]
    fn allocate_slowly(&self, thread: &Thread, kind: Kind, bytes: usize) -> Option<usize> {
        if self.is_collection_due() {
            self.collect_when_due(thread);
        }
        let first = self.critically(thread, || self.try_allocate(thread, kind, bytes));
        if first.is_some() {
            return first;
        }
        self.collect_fully(thread);
        self.critically(thread, || self.try_allocate(thread, kind, bytes))
    }

    /// Whether a thread should collect, or wait for the marker beside the program: so much may be
    /// allocated beside it as was live when it began, or a little more.
    pub(crate) fn is_collection_due(&self) -> bool {
        if self.cycle.is_running() {
            let live = self.counters.live_bytes.load(Ordering::Relaxed) as usize;
            let most = live.max(self.parameters.least_allowance * 4);
            return self.allocated.load(Ordering::Relaxed) >= most;
        }
        self.parameters.is_stressed
            || self.allocated.load(Ordering::Relaxed) >= self.allowance.load(Ordering::Relaxed)
    }

    /// The thread is not stopped by a signal while `body` runs, which does not wait for a
    /// collection.
    pub(crate) fn critically<R>(&self, thread: &Thread, body: impl FnOnce() -> R) -> R {
        let outermost = !thread.is_critical.swap(true, Ordering::SeqCst);
        let result = body();
        if outermost {
            thread.is_critical.store(false, Ordering::SeqCst);
            if self.parameters.stop_signal.is_some() {
                self.world.poll(thread);
            }
        }
        result
    }

    fn try_allocate(&self, thread: &Thread, kind: Kind, bytes: usize) -> Option<usize> {
        self.check_process();
        let Some(class) = class_of(bytes) else {
            return self.allocate_large(kind, bytes);
        };
        let buffer = thread.buffers.get(kind.index())?.get(class)?;
        loop {
            if let Some(address) = self.next_run(buffer, class) {
                return Some(address);
            }
            let number = self.with_growth(1, |lists| self.space.take_small(lists, kind, class))?;
            buffer.block.store(number, Ordering::Relaxed);
        }
    }

    /// Takes the next run of free cells of the buffer's block, and the first cell of it.
    fn next_run(&self, buffer: &Buffer, class: usize) -> Option<usize> {
        let number = buffer.block.load(Ordering::Relaxed);
        if number == NONE {
            return None;
        }
        let block = self.space.block(number);
        let cells = block.cells.load(Ordering::Relaxed);
        let bytes = CELL_BYTES[class];
        let bitmap = self.space.bitmap(self.space.current(), number);
        let first = bitmap.next_clear(block.cursor.load(Ordering::Relaxed), cells);
        if first == cells {
            // It is full; the next collection says whether it stays so.
            block.cursor.store(cells, Ordering::Release);
            block.owned.store(0, Ordering::Relaxed);
            buffer.block.store(NONE, Ordering::Relaxed);
            return None;
        }
        let most = (PAGE as u32 / bytes).max(1);
        let end = bitmap.next_set(first, cells.min(first + most));
        let address = self.space.address_of(number) + (first * bytes) as usize;
        let length = ((end - first) * bytes) as usize;
        self.tracker.will_write(address, length);
        if !block.is_pristine() {
            // SAFETY: free cells of a block that is this thread's to allocate from.
            unsafe { clear(address, length) };
        }
        block.cursor.store(end, Ordering::Release);
        self.allocated.fetch_add(length, Ordering::Relaxed);
        buffer.end.store(address + length, Ordering::Relaxed);
        buffer.at.store(address + bytes as usize, Ordering::Relaxed);
        Some(address)
    }

    fn allocate_large(&self, kind: Kind, bytes: usize) -> Option<usize> {
        let blocks = u32::try_from(bytes.checked_add(BLOCK - 1)? / BLOCK).ok()?;
        let number = self.with_growth(blocks, |lists| self.space.take_large(lists, kind, bytes))?;
        let address = self.space.address_of(number);
        for part in number..number + blocks {
            let block = self.space.block(part);
            self.tracker.will_write(self.space.address_of(part), BLOCK);
            if !block.is_pristine() {
                // SAFETY: the blocks are the new object's, of which nobody knows yet.
                unsafe { clear(self.space.address_of(part), BLOCK) };
            }
        }
        self.space.block(number).allocate_large();
        (self.allocated).fetch_add(blocks as usize * BLOCK, Ordering::Relaxed);
        Some(address)
    }

    /// Takes something out of the lists; where it is not there, the heap grows.
    fn with_growth(&self, blocks: u32, take: impl Fn(&mut Lists) -> Option<u32>) -> Option<u32> {
        let mut lists = self.space.lists();
        if let Some(number) = take(&mut lists) {
            return Some(number);
        }
        let segment = self.space.grow(&mut lists, blocks)?.ok()?;
        let start = self.space.start();
        // What cannot be followed must not be used; the blocks stay free and this fails again.
        if let Err(reason) = (self.tracker).cover(start + segment.start, start + segment.end) {
            fatal(&reason);
        }
        take(&mut lists)
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if self.is_foreign() {
            // Other threads of the parent may have been at work on the values.
            return;
        }
        let values = self.roots().close();
        for (object, drop) in values {
            // SAFETY: nobody can reach the object any more, and each is in the lists once.
            unsafe { drop(object) };
        }
    }
}

impl Block {
    pub(crate) fn is_pristine(&self) -> bool {
        self.pristine.load(Ordering::Relaxed) != 0
    }
}

/// Clears memory.
///
/// # Safety
/// It is the caller's to write to.
unsafe fn clear(address: usize, bytes: usize) {
    let mut done = 0;
    while done < bytes {
        let piece = (bytes - done).min(CLEAR_PIECE);
        // SAFETY: within the caller's range.
        unsafe { core::ptr::write_bytes((address + done) as *mut u8, 0, piece) };
        done += piece;
    }
}

/// Ends the process where going on would lose objects.
pub(crate) fn fatal(reason: &str) -> ! {
    say(format_args!("{reason}"));
    std::process::abort()
}

/// A line on standard error, without a lock or an allocation: a stopped thread may be in the
/// middle of either.
pub(crate) fn say(text: core::fmt::Arguments<'_>) {
    use std::io::Write as _;
    // SAFETY: the descriptor is used for as long as the line takes, and not closed.
    let file = unsafe { <std::fs::File as std::os::fd::FromRawFd>::from_raw_fd(2) };
    let _ = core::mem::ManuallyDrop::new(file).write_fmt(format_args!("dune-gc: {text}\n"));
}
