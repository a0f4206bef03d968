//! A full collection beside the running program: *mostly concurrent* marking (Boehm, Demers
//! and Shenker, PLDI 1991).
//!
//! ```text
//! program    ======|  |=================================|    |=====
//!                  roots                              what was written
//! marker           |  |----- mark ----- | clean | clean |    |
//!                  first pause                        last pause
//! ```
//!
//! What the program writes meanwhile, the tracker knows: after the marker has followed all
//! that the roots led to, it looks again at the marked objects of written pages, first beside
//! the program (*cleaning*), then once more with the world stopped. Cells that were allocated
//! before the last cleaning are live at the cycle's end, whatever happens to them; they are told
//! by the cursors of their blocks, so allocating costs no more than at other times.
//!
//! # Why nothing live is lost
//!
//! It is an *incremental update* scheme: not what the program overwrote is kept (as by a
//! snapshot at the beginning), but what it wrote is looked at. Suppose a live object is unmarked
//! at the end. Follow a path to it from a root of the last pause; some marked object (or root) on
//! it points to an unmarked one.
//!
//! ```text
//!   root --> ... --> marked M --> unmarked U       U is U's first on the path
//! ```
//!
//! Roots are looked at in the last pause, so it is an object M. M was looked through at least
//! once after it was marked. Had the pointer to U been there then, U would be marked. So it was
//! written later: after the first pause, which all writes before it precede. The page was in the
//! tracker's set at some later time (see [`track`](crate::track)), at the last pause at the latest,
//! and M, being marked, was looked through again with the pointer in it, unless that was
//! overwritten since, which is the same argument from the start. It holds for a U that is new as
//! for any other. (The cells that are new at a cleaning are marked then, all of them: what they
//! lead to need not wait for the last pause.)
//!
//! What the marker sees of a new cell or block beside the program: a block says its kind after its
//! bitmaps are clear, and its cursor moves after the cells are zero, both by release and acquire;
//! an object of a type is looked through once its description is there, which is written last.
//!
//! The cycle holds the collector's lock from its first pause to its last, so no other collection
//! changes marks or frees blocks meanwhile. A thread that has allocated as much beside the cycle
//! as was live before waits for its end.

use core::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::block::Kind;
use crate::heap::Core;
use crate::mark::{MarkStack, Marker};

/// How often the marker looks at written pages beside the program, at most.
const CLEANINGS: usize = 3;
/// Written pages that are left for the last pause rather than cleaned once more.
const FEW_PAGES: u64 = 64;

/// Whether a cycle runs, and the wish for one.
#[derive(Debug, Default)]
pub(crate) struct Cycle {
    is_running: AtomicBool,
    wish: Mutex<Wish>,
    changed: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Wish {
    #[default]
    Nothing,
    Cycle,
    End,
}

impl Cycle {
    /// Whether objects are being marked beside the program.
    pub(crate) fn is_running(&self) -> bool {
        self.is_running.load(Ordering::Relaxed)
    }

    /// Asks for a cycle, unless one is asked for or the thread is to end.
    pub(crate) fn ask(&self) {
        let mut wish = self.wish.lock().unwrap_or_else(PoisonError::into_inner);
        if *wish == Wish::Nothing {
            *wish = Wish::Cycle;
            self.is_running.store(true, Ordering::Relaxed);
            self.changed.notify_all();
        }
    }

    /// Holds the wish, so that a `fork` finds it whole.
    pub(crate) fn hold(&self) -> CycleGuard<'_> {
        let wish = self.wish.lock().unwrap_or_else(PoisonError::into_inner);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        CycleGuard(wish, thread)
    }

    fn end(&self) {
        *self.wish.lock().unwrap_or_else(PoisonError::into_inner) = Wish::End;
        self.changed.notify_all();
    }

    fn replace_thread(&self, thread: Option<JoinHandle<()>>) -> Option<JoinHandle<()>> {
        let mut place = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        core::mem::replace(&mut place, thread)
    }

    fn wait(&self) -> Wish {
        let wish = self.wish.lock().unwrap_or_else(PoisonError::into_inner);
        let wish = self
            .changed
            .wait_while(wish, |wish| *wish == Wish::Nothing)
            .unwrap_or_else(PoisonError::into_inner);
        *wish
    }

    fn done(&self) {
        let mut wish = self.wish.lock().unwrap_or_else(PoisonError::into_inner);
        if *wish == Wish::Cycle {
            *wish = Wish::Nothing;
        }
        self.is_running.store(false, Ordering::Relaxed);
    }
}

/// See [`Cycle::hold`].
#[derive(Debug)]
#[expect(dead_code, reason = "they are held")]
pub(crate) struct CycleGuard<'a>(MutexGuard<'a, Wish>, MutexGuard<'a, Option<JoinHandle<()>>>);

/// The thread that marks beside the program. Dropped, it ends.
#[derive(Debug)]
pub(crate) struct MarkerThread {
    core: Arc<Core>,
}

impl MarkerThread {
    pub(crate) fn start(core: &Arc<Core>) -> std::io::Result<Self> {
        let shared = Arc::clone(core);
        let thread = crate::signals::with_all_blocked(|| {
            std::thread::Builder::new()
                .name("dune-gc-marker".to_owned())
                .spawn(move || mark_when_asked(&shared))
        })?;
        let core = Arc::clone(core);
        // A handle that is there already is of the parent of a `fork`, whose thread this process
        // does not have.
        core::mem::forget(core.cycle.replace_thread(Some(thread)));
        core.has_marker.store(true, Ordering::Relaxed);
        Ok(Self { core })
    }
}

impl Drop for MarkerThread {
    fn drop(&mut self) {
        if self.core.is_foreign() {
            return;
        }
        self.core.has_marker.store(false, Ordering::Relaxed);
        self.core.cycle.end();
        if let Some(thread) = self.core.cycle.replace_thread(None) {
            let _ = thread.join();
        }
    }
}

fn mark_when_asked(core: &Core) {
    /// Whoever waits for the cycle would wait for ever.
    struct NeverPanics;
    impl Drop for NeverPanics {
        fn drop(&mut self) {
            if std::thread::panicking() {
                crate::heap::fatal("an implementation of Trace panicked");
            }
        }
    }
    let _guard = NeverPanics;
    while core.cycle.wait() == Wish::Cycle {
        core.run_cycle();
        core.cycle.done();
    }
}

impl Core {
    fn run_cycle(&self) {
        let mut stack = self.collector();
        self.before_stop();
        self.space.clear_other_bitmaps();
        let mut marker = self.first_pause(&mut stack);
        marker.drain();
        for _ in 0..CLEANINGS {
            let before = marker.pages_scanned;
            self.tracker.collect(&self.space);
            self.mark_new_cells(&marker);
            marker.scan_dirty();
            marker.drain();
            if marker.pages_scanned - before <= FEW_PAGES {
                break;
            }
        }
        self.last_pause(marker);
    }

    /// From here on, every write is known, and every cell that is allocated.
    fn first_pause<'a>(&'a self, stack: &'a mut MarkStack) -> Marker<'a> {
        let begin = Instant::now();
        let stopped = self.world.stop(self.parameters.stop_signal);
        self.tracker.collect(&self.space);
        self.space.clear_dirty();
        for number in 0..self.space.used_blocks() {
            let block = self.space.block(number);
            let cursor = block.cursor.load(Ordering::Relaxed);
            block.cycle_cursor.store(cursor, Ordering::Relaxed);
        }
        let other = self.space.current() ^ 1;
        self.keep_buffers(&stopped, other);
        let mut marker = Marker::new(&self.space, stack, other);
        self.mark_roots(&stopped, &mut marker);
        self.allocated.store(0, Ordering::Relaxed);
        drop(stopped);
        self.counters.paused(begin.elapsed());
        marker
    }

    fn last_pause(&self, mut marker: Marker<'_>) {
        self.before_stop();
        let begin = Instant::now();
        let stopped = self.world.stop(self.parameters.stop_signal);
        self.tracker.collect(&self.space);
        marker.scan_dirty();
        self.mark_roots(&stopped, &mut marker);
        marker.drain();
        self.finalize_unreachable(&mut marker, false);
        let pages = marker.pages_scanned;
        self.counters
            .pages_scanned
            .fetch_add(pages, Ordering::Relaxed);
        self.space.exchange_bitmaps();
        self.reclaim_all();
        self.cycle.is_running.store(false, Ordering::Relaxed);
        drop(stopped);
        self.counters.paused(begin.elapsed());
        self.counters.collections.fetch_add(1, Ordering::Relaxed);
    }

    /// Marks the cells that were allocated since the cycle began or since the last time, so that
    /// what they lead to is marked beside the program. Their words are looked at when their
    /// pages are, which are written ones.
    fn mark_new_cells(&self, marker: &Marker<'_>) {
        for number in 0..self.space.used_blocks() {
            let block = self.space.block(number);
            if matches!(block.kind(), Kind::Free | Kind::Tail) {
                continue;
            }
            let from = block.cycle_cursor.load(Ordering::Relaxed);
            let to = block.cursor.load(Ordering::Acquire);
            if from >= to {
                continue;
            }
            block.cycle_cursor.store(to, Ordering::Relaxed);
            let old = self.space.bitmap(self.space.current(), number);
            let new = marker.bitmap(number);
            let mut cell = old.next_clear(from, to);
            while cell < to {
                new.set(cell);
                cell = old.next_clear(cell + 1, to);
            }
        }
    }
}
