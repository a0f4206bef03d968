//! A collection.
#![expect(unsafe_code, reason = "scans the roots")]

use core::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

use crate::block::{Kind, NONE};
use crate::heap::Core;
use crate::layout::BLOCK;
use crate::mark::{MarkStack, Marker};
use crate::roots::{Droppable, Run};
use crate::space::Lists;
use crate::thread::Thread;
use crate::world::Stopped;

impl Core {
    /// Collects if it is still due once nobody else collects.
    pub(crate) fn collect_when_due(&self, thread: &Thread) {
        self.world.while_safe(thread, || {
            let mut stack = self.collector();
            if !self.is_collection_due() {
            } else if self.tracker.is_tracking() && !self.is_full_due() {
                self.minor_collection(&mut stack);
            } else if self.tracker.is_tracking() && self.has_marker.load(Ordering::Relaxed) {
                self.minor_collection(&mut stack);
                self.cycle.ask();
            } else {
                self.full_collection(&mut stack);
            }
        });
    }

    /// Finds everything that is unreachable now.
    pub(crate) fn collect_fully(&self, thread: &Thread) {
        self.world.while_safe(thread, || {
            let mut stack = self.collector();
            self.full_collection(&mut stack);
        });
    }

    pub(crate) fn collector(&self) -> MutexGuard<'_, MarkStack> {
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

    /// Stops the world, marks everything that the roots lead to, and frees the rest.
    fn full_collection(&self, stack: &mut MarkStack) {
        self.before_stop();
        self.space.clear_other_bitmaps();
        let begin = Instant::now();
        let stopped = self.world.stop(self.parameters.stop_signal);
        // What was written until now is of no interest: everything is looked at.
        self.tracker.collect(&self.space);
        self.space.clear_dirty();
        let other = self.space.current() ^ 1;
        let mut marker = Marker::new(&self.space, stack, other);
        self.keep_buffers(&stopped, other);
        self.mark_roots(&stopped, &mut marker);
        marker.drain();
        self.finalize_unreachable(&mut marker, false);
        self.space.exchange_bitmaps();
        self.reclaim_all();
        drop(stopped);
        self.counters.paused(begin.elapsed());
        self.counters.collections.fetch_add(1, Ordering::Relaxed);
    }

    /// Stops the world, marks the young objects that the roots and the old objects in written
    /// pages lead to, and frees the other young ones. Old is what is marked; so what survives
    /// is old thereby.
    fn minor_collection(&self, stack: &mut MarkStack) {
        self.before_stop();
        let begin = Instant::now();
        let stopped = self.world.stop(self.parameters.stop_signal);
        self.tracker.collect(&self.space);
        let mut marker = Marker::new(&self.space, stack, self.space.current());
        marker.scan_dirty();
        self.keep_buffers(&stopped, self.space.current());
        self.mark_roots(&stopped, &mut marker);
        marker.drain();
        self.finalize_unreachable(&mut marker, true);
        let pages = marker.pages_scanned;
        self.counters
            .pages_scanned
            .fetch_add(pages, Ordering::Relaxed);
        (self.looked_at).store(marker.bytes_scanned, Ordering::Relaxed);
        self.reclaim_touched();
        drop(stopped);
        self.counters.paused(begin.elapsed());
        self.counters.collections.fetch_add(1, Ordering::Relaxed);
        self.counters
            .minor_collections
            .fetch_add(1, Ordering::Relaxed);
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
