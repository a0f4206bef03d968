//! A collection, in pieces: the world is stopped for so much work at a time, and goes on for a
//! while in between.
//!
//! ```text
//! program    ====|  |==|  |==|  |==|  |==|  |==|    |=====
//! collector      round |  |  |  round |  |  round   |
//!                look ... look  look ... look  look  free the rest
//! ```
//!
//! A *round* marks what the roots lead to and asks which pages were written (the tracker's set).
//! What it found is looked through, and the marked objects of written pages are once more, stop
//! by stop. When nothing is left, another round finds what the program did meanwhile. Each
//! round leaves less, because the program is given little time in between: until it allocated
//! some KiB. The collection is complete when *within one stop* a round found everything and all
//! of it was looked through. Should a program write faster than it is followed, the stops get
//! longer, from the fifth round on. Where pages are not tracked, one stop is all.
//!
//! The work is done by the thread whose allocation made it due: there is no change of threads, and
//! with one thread no stop. Where there is more than one CPU, a thread of the heap does the first round of a
//! collection of everything beside the program ([`cycle`](crate::cycle)).
//!
//! # Why nothing live is lost
//!
//! It is an *incremental update* scheme: not what the program overwrote is kept (as by a
//! snapshot at the beginning), but what it wrote is looked at. Suppose a live object is unmarked
//! at the end. Follow a path to it from a root of the last stop; some marked object (or root) on
//! it points to an unmarked one. (Marked without being looked through are only free cells that a
//! thread holds, which are zero when they are marked, after the last round; and objects that wait
//! to be dropped, which nobody reaches.)
//!
//! ```text
//!   root --> ... --> marked M --> unmarked U       U is U's first on the path
//! ```
//!
//! Roots are looked at in the last stop, so it is an object M. M was looked through at least
//! once after it was marked; an old one of a collection of young objects when it was marked, in
//! an earlier collection, after which U would be old. Had the pointer to U been there then, U
//! would be marked. So it was written later, and the page was in the tracker's set at some later
//! round (see [`track`](crate::track)), at the last one at the latest; and M, being marked, was
//! looked through again with the pointer in it, unless that was overwritten since, which is the
//! same argument from the start. It holds for a U that is new as for any other.
//!
//! What a marker beside the program sees of a new cell or block: a block says its kind after its
//! bitmaps are clear, and its cursor moves after the cells are zero, both by release and acquire;
//! an object of a type is looked through once its description is there, which is written last.
#![expect(unsafe_code, reason = "scans the roots")]

use core::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

use crate::block::{Kind, NONE};
use crate::heap::Core;
use crate::layout::{BLOCK, PAGE_SHIFT};
use crate::mark::{MarkStack, Marker, Written};
use crate::roots::{Droppable, Run};
use crate::space::Lists;
use crate::thread::Thread;
use crate::world::Stopped;

/// After so many rounds of one collection, twice as much is looked at in each stop after each
/// further one, and so many times twice at most.
const CALM_ROUNDS: u32 = 4;
const MOST_DOUBLINGS: u32 = 20;
/// So little is looked at in a stop that the program does much in between.
const WORDS_UNDER_STRESS: usize = 1024;
/// For each word that was allocated since the last stop, at least so many are looked at.
const WORDS_FOR_A_NEW_ONE: usize = 2;
/// A collection of everything takes about so many stops at most, once its size is known.
const STOPS: usize = 32;
/// Asking for so many pages costs about what looking at a word does.
const PAGES_ASKED_FOR_A_WORD: usize = 4;

/// What is kept between two stops of the world. Held by whoever collects.
#[derive(Debug)]
pub(crate) struct Collector {
    pub(crate) stack: MarkStack,
    /// The collection that is under way.
    pub(crate) collection: Option<Collection>,
}

/// What a collection is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Of {
    /// Young objects: those that are not marked. What survives is marked, and old thereby.
    Young,
    Everything,
}

/// A collection that is under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Collection {
    of: Of,
    /// The set of bitmaps that it marks in.
    pub(crate) set: usize,
    /// How often it looked at the roots, and which pages were written.
    rounds: u32,
    pub(crate) written: Written,
}

impl Core {
    /// Goes on with the collection that is under way, or begins one, if that is still due once
    /// nobody else collects.
    pub(crate) fn collect_when_due(&self, thread: &Thread) {
        self.world.while_safe(thread, || {
            let mut collector = self.collector();
            if !self.is_collection_due() {
                return;
            }
            if collector.collection.is_none() {
                self.begin(&mut collector, self.next());
            }
            self.go_on(&mut collector);
        });
    }

    /// What to collect now.
    fn next(&self) -> Of {
        let after_young = self.counters.collections.load(Ordering::Relaxed) % 2 == 1;
        let is_full_due = self.is_full_due() && (after_young || !self.parameters.is_stressed);
        if !self.tracker.is_tracking() || is_full_due && !self.has_marker.load(Ordering::Relaxed) {
            Of::Everything
        } else {
            Of::Young
        }
    }

    /// Finds everything that is unreachable now, with the world stopped.
    pub(crate) fn collect_fully(&self, thread: &Thread) {
        self.world.while_safe(thread, || {
            let mut collector = self.collector();
            // One that is under way is given up: this one looks at all that it would have.
            collector.stack.clear();
            self.begin(&mut collector, Of::Everything);
            self.look(&mut collector, usize::MAX);
        });
    }

    pub(crate) fn collector(&self) -> MutexGuard<'_, Collector> {
        self.check_process();
        self.collector
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The next finalizer to run, outside of every lock.
    pub(crate) fn take_ready(&self) -> Option<(usize, Run)> {
        self.roots().take_ready()
    }

    /// The next value to drop, outside of every lock; and the one before was.
    pub(crate) fn take_dead(&self, dropped: Option<usize>) -> Option<Droppable> {
        self.roots().take_dead(dropped)
    }

    /// Begins a collection, beside the program.
    pub(crate) fn begin(&self, collector: &mut Collector, of: Of) {
        let mut set = self.space.current();
        if of == Of::Everything {
            self.space.clear_other_bitmaps();
            set ^= 1;
        }
        collector.collection = Some(Collection {
            of,
            set,
            rounds: 0,
            written: Written::default(),
        });
    }

    /// Goes on with the collection that is under way, for one stop of the world.
    pub(crate) fn go_on(&self, collector: &mut Collector) {
        let words = match (self.parameters.words_at_once, collector.collection) {
            (Some(words), Some(collection)) if self.tracker.is_tracking() => {
                self.words_of_a_stop(words, &collection)
            }
            _ => usize::MAX,
        };
        self.look(collector, words);
    }

    /// How many words to look at in the next stop, where `least` are in a small heap.
    fn words_of_a_stop(&self, least: usize, collection: &Collection) -> usize {
        let words = if !self.parameters.is_stressed {
            let words = |bytes: &AtomicUsize| bytes.load(Ordering::Relaxed) / size_of::<usize>();
            // What was allocated since the last stop must not grow faster than it is followed.
            let new = if collection.rounds > 0 {
                words(&self.allocated) * WORDS_FOR_A_NEW_ONE
            } else {
                0
            };
            let all = words(&self.looked_at_when_full);
            least
                .max(all / STOPS)
                .max(new)
                .max(2 * self.words_of_a_round())
        } else if collection.of == Of::Everything {
            WORDS_UNDER_STRESS
        } else {
            return usize::MAX;
        };
        words << (collection.rounds.saturating_sub(CALM_ROUNDS)).min(MOST_DOUBLINGS)
    }

    /// What asking for written pages costs, in words to look at.
    fn words_of_a_round(&self) -> usize {
        (self.space.used() >> PAGE_SHIFT) / PAGES_ASKED_FOR_A_WORD
    }

    /// Stops the world and looks at so many words for the collection that is under way; ends
    /// it if nothing is left then.
    fn look(&self, collector: &mut Collector, words: usize) {
        let Some(mut collection) = collector.collection.take() else {
            return;
        };
        self.before_stop();
        let begin = Instant::now();
        let stopped = self.world.stop(self.parameters.stop_signal);
        let mut marker = Marker::new(&self.space, &mut collector.stack, collection.set);
        marker.written = collection.written;
        marker.allow(words);
        // Whether all that the program did before it stopped was looked at.
        let mut is_up_to_date = false;
        let is_complete = loop {
            if !marker.work() {
                break false;
            }
            if is_up_to_date {
                break true;
            }
            self.begin_round(&stopped, &mut collection, &mut marker);
            marker.spend(self.words_of_a_round());
            is_up_to_date = true;
        };
        collection.written = marker.written;
        if is_complete {
            self.complete(&stopped, &collection, marker);
        } else {
            collector.collection = Some(collection);
            self.wait_for_more();
        }
        drop(stopped);
        self.counters.paused(begin.elapsed());
    }

    /// The program goes on for a while.
    pub(crate) fn wait_for_more(&self) {
        self.allocated.store(0, Ordering::Relaxed);
        (self.allowance).store(self.parameters.bytes_between, Ordering::Relaxed);
    }

    /// Marks what the roots lead to, and finds out which pages were written.
    pub(crate) fn begin_round(
        &self,
        stopped: &Stopped<'_>,
        collection: &mut Collection,
        marker: &mut Marker<'_>,
    ) {
        self.tracker.collect(&self.space);
        if collection.of == Of::Everything && collection.rounds == 0 {
            // What was written until now is of no interest: everything is looked at.
            self.space.clear_dirty();
        }
        // Before young objects are marked, of which most are in written pages too. What is not
        // allowed is left in the set.
        let _ = marker.scan_dirty();
        self.mark_roots(stopped, marker);
        collection.rounds += 1;
    }

    /// Everything that can be reached is marked: the rest is free.
    fn complete(&self, stopped: &Stopped<'_>, collection: &Collection, mut marker: Marker<'_>) {
        self.keep_buffers(stopped, collection.set);
        self.finalize_unreachable(&mut marker, collection.of == Of::Young);
        let counters = &self.counters;
        let pages = marker.written.pages;
        counters.pages_scanned.fetch_add(pages, Ordering::Relaxed);
        counters.collections.fetch_add(1, Ordering::Relaxed);
        match collection.of {
            Of::Young => {
                counters.minor_collections.fetch_add(1, Ordering::Relaxed);
                (self.looked_at).store(marker.written.bytes, Ordering::Relaxed);
                self.reclaim_touched();
                if self.is_full_due() && self.has_marker.load(Ordering::Relaxed) {
                    self.cycle.ask();
                }
            }
            Of::Everything => {
                self.space.exchange_bitmaps();
                self.reclaim_all();
            }
        }
    }

    /// What must not be done while threads may be stopped within the allocator of libc.
    pub(crate) fn before_stop(&self) {
        if self.parameters.stop_signal.is_some() {
            self.roots().find_images();
        }
    }

    /// The free cells of every thread's runs count as live: see [`Buffer`](crate::thread::Buffer).
    pub(crate) fn keep_buffers(&self, stopped: &Stopped<'_>, set: usize) {
        for buffer in stopped.threads().flat_map(Thread::buffers) {
            let number = buffer.block.load(Ordering::Relaxed);
            let at = buffer.at.load(Ordering::Relaxed);
            if number == NONE || at >= buffer.end.load(Ordering::Relaxed) {
                continue;
            }
            let bytes = self.space.block(number).cell_bytes.load(Ordering::Relaxed);
            let first = (at - self.space.address_of(number)) as u32 / bytes;
            let cells = (buffer.end.load(Ordering::Relaxed) - at) as u32 / bytes;
            let bitmap = self.space.bitmap(set, number);
            for cell in first..first + cells {
                bitmap.set(cell);
            }
        }
    }

    pub(crate) fn mark_roots(&self, stopped: &Stopped<'_>, marker: &mut Marker<'_>) {
        if self.parameters.stop_signal.is_some() {
            for thread in stopped.threads() {
                let start = thread.stack_pointer.load(Ordering::Relaxed);
                let end = thread.stack_end();
                // SAFETY: the part of a stopped thread's stack that is in use.
                unsafe { marker.scan(start, end) };
                let [start, end] = [0, 1].map(|end| thread.tls[end].load(Ordering::Relaxed));
                // SAFETY: the thread's variables, which live as long as it does.
                unsafe { marker.scan(start, end) };
            }
        }
        let roots = self.roots();
        roots.mark(marker);
        for (start, end) in roots.ranges.iter().chain(&roots.images) {
            // SAFETY: by the word of whoever added the range.
            unsafe { marker.scan(*start, *end) };
        }
    }

    pub(crate) fn finalize_unreachable(&self, marker: &mut Marker<'_>, only_young: bool) {
        if self.roots().find_unreachable(self, marker, only_young) {
            self.has_ready.store(true, Ordering::Release);
        }
    }

    /// From here on the object is not looked through: its value is about to be dropped.
    pub(crate) fn forget_description(&self, object: usize) {
        let Some(at) = self.space.cell_of(object) else {
            return;
        };
        if self.space.block(at.block).kind() == Kind::Typed {
            let cell = self.space.cell_address(at);
            // Not by way of a trap: the marker's thread has its signals blocked.
            self.tracker.will_write(cell, size_of::<usize>());
            // SAFETY: an allocated cell of a block of typed objects, with the world stopped.
            unsafe { crate::typed::forget(cell) };
        }
    }

    /// Makes lists of what the current bitmaps leave free in all blocks.
    pub(crate) fn reclaim_all(&self) {
        let mut lists = self.space.lists();
        self.take_back_dropped(&mut lists);
        lists.forget();
        let mut live = 0;
        let mut with_pointers = 0;
        let mut number = 0;
        let end = self.space.used_blocks();
        while number < end {
            let block = self.space.block(number);
            let mut extent = 1;
            if block.kind() != Kind::Free {
                if block.is_large() {
                    extent = block.extent();
                }
                self.reclaim(&mut lists, number);
                let bytes = self.live_bytes_of(number);
                live += bytes;
                if block.kind() != Kind::Atomic {
                    with_pointers += bytes;
                }
            }
            number += extent;
        }
        self.looked_at_when_full
            .store(with_pointers, Ordering::Relaxed);
        self.live_when_full.store(live, Ordering::Relaxed);
        self.set_pace(&lists, live);
    }

    /// As [`reclaim_all`](Self::reclaim_all), for the blocks that were allocated from since
    /// the last collection: in all others nothing has changed.
    fn reclaim_touched(&self) {
        let mut lists = self.space.lists();
        self.take_back_dropped(&mut lists);
        let mut live = self.counters.live_bytes.load(Ordering::Relaxed) as usize;
        let mut number = lists.touched;
        lists.touched = NONE;
        while number != NONE {
            let next = self.space.block(number).next.load(Ordering::Relaxed);
            live -= self.live_bytes_of(number);
            self.reclaim(&mut lists, number);
            live += self.live_bytes_of(number);
            number = next;
        }
        self.set_pace(&lists, live);
    }

    /// The cells of values that were dropped since the last collection are free again: they
    /// were kept for the drop alone, which would make young objects old.
    fn take_back_dropped(&self, lists: &mut Lists) {
        for object in self.roots().take_dropped() {
            let Some(at) = self.space.cell_of(object) else {
                continue;
            };
            let set = self.space.current();
            self.space.bitmap(set, at.block).clear(at.cell);
            let block = self.space.block(at.block);
            if block.listed.load(Ordering::Relaxed) == 0 && !block.is_owned() {
                self.space.touch(lists, at.block);
            }
        }
    }

    /// Puts a block where it belongs now, and counts what is marked in it.
    fn reclaim(&self, lists: &mut Lists, number: u32) {
        let block = self.space.block(number);
        block.listed.store(0, Ordering::Relaxed);
        let bitmap = self.space.bitmap(self.space.current(), number);
        let cells = block.cells.load(Ordering::Relaxed);
        let marked = bitmap.count(cells);
        block.marked.store(marked, Ordering::Relaxed);
        if block.is_owned() {
            // Cells below the cursor wait for the collection after the block is given up.
            self.space.touch(lists, number);
        } else if marked == 0 {
            self.space.free(lists, number);
        } else if block.is_large() {
            // Its one cell is found by its mark from here on.
            block.cursor.store(0, Ordering::Release);
        } else {
            block.pristine.store(0, Ordering::Relaxed);
            if marked < cells {
                block.cursor.store(0, Ordering::Release);
                self.space.give_room(lists, number);
            }
        }
    }

    /// Bytes of what was marked in a block that is in use; 0 in one that is not.
    fn live_bytes_of(&self, number: u32) -> usize {
        let block = self.space.block(number);
        let marked = block.marked.load(Ordering::Relaxed) as usize;
        if block.kind() == Kind::Free {
            0
        } else if block.is_large() {
            marked * block.extent() as usize * BLOCK
        } else {
            marked * block.cell_bytes.load(Ordering::Relaxed) as usize
        }
    }

    /// Decides when to collect next: when as much was allocated as is worth it. That is three
    /// quarters of what is live for a full collection, which looks at all of it that may hold
    /// pointers. A minor one looks at the old objects of written pages, as many as the last time
    /// if the program goes on as before: it waits for such a part of that amount as its work is
    /// of a full one's, so that it never costs more for an allocated byte.
    fn set_pace(&self, lists: &Lists, live: usize) {
        let in_use = (lists.committed - lists.free_blocks) as usize * BLOCK;
        (self.counters.heap_bytes).store(in_use as u64, Ordering::Relaxed);
        (self.counters.live_bytes).store(live as u64, Ordering::Relaxed);
        self.allocated.store(0, Ordering::Relaxed);
        let least = self.parameters.least_allowance;
        let when_full = (live / 4 * 3).max(least * 2);
        let allowance = if self.tracker.is_tracking() {
            let looked_at = self.looked_at.load(Ordering::Relaxed) as f64;
            let of_all = self.looked_at_when_full.load(Ordering::Relaxed).max(1) as f64;
            ((when_full as f64 * looked_at / of_all) as usize).clamp(least, when_full)
        } else {
            when_full
        };
        self.allowance.store(allowance, Ordering::Relaxed);
    }

    /// Whether so much has grown old that a full collection is worth it.
    fn is_full_due(&self) -> bool {
        let live = self.counters.live_bytes.load(Ordering::Relaxed) as usize;
        let before = self.live_when_full.load(Ordering::Relaxed);
        self.parameters.is_stressed
            || live > before + (before / 4 * 3).max(self.parameters.least_allowance * 4)
    }
}
