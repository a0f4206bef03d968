//! The beginning of a collection of everything beside the running program: *mostly concurrent*
//! marking (Boehm, Demers and Shenker, PLDI 1991), where there is a CPU for it.
//!
//! ```text
//! program    ======|  |=================================|==|  |==|  |==|   |=====
//!                  roots                                     pieces
//! marker           |  |----- mark ----- | clean | clean |
//!                  first round
//! ```
//!
//! What the program writes meanwhile, the tracker knows: after the marker has followed all that
//! the roots led to, it looks again at the marked objects of written pages (*cleaning*), which
//! may be written again. What is left then is done in pieces, by the program, as all of it is
//! where there is one CPU alone: see [`collect`](crate::collect), which says why nothing is lost.
//!
//! The marker holds the collector's lock, so no other collection changes marks or frees blocks
//! meanwhile. A thread waits for it that has allocated as much beside it as was live before, or
//! some 32 MiB.

use core::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::collect::{Collector, Of};
use crate::heap::Core;
use crate::mark::Marker;

/// How often the marker looks at written pages, at most.
const CLEANINGS: usize = 3;
/// Written pages that are left for the program rather than cleaned once more.
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

    pub(crate) fn done(&self) {
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

/// Whether marking beside the program takes nothing from it: this process has several CPUs.
pub(crate) fn is_worth_a_thread() -> bool {
    std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() > 1)
}

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
        let mut collector = self.collector();
        // Another thread was faster.
        while collector.collection.is_some() {
            self.go_on(&mut collector);
        }
        self.begin(&mut collector, Of::Everything);
        let Collector { stack, collection } = &mut *collector;
        let Some(collection) = collection else { return };
        self.before_stop();
        let begin = Instant::now();
        let mut marker = Marker::new(&self.space, stack, collection.set);
        let stopped = self.world.stop(self.parameters.stop_signal);
        self.begin_round(&stopped, collection, &mut marker);
        self.allocated.store(0, Ordering::Relaxed);
        drop(stopped);
        self.counters.paused(begin.elapsed());
        marker.work();
        for _ in 0..CLEANINGS {
            let before = marker.written.pages;
            self.tracker.collect(&self.space);
            marker.work();
            if marker.written.pages - before <= FEW_PAGES {
                break;
            }
        }
        collection.written = marker.written;
        // The program does the rest.
        self.wait_for_more();
    }
}
