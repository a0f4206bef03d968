//! A collection.
#![expect(unsafe_code, reason = "scans the roots")]

use core::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

use crate::block::{Kind, NONE};
use crate::heap::Core;
use crate::layout::BLOCK;
use crate::mark::{MarkStack, Marker};
use crate::thread::Thread;
use crate::world::Stopped;

impl Core {
    /// Collects if it is still due once nobody else collects.
    pub(crate) fn collect_when_due(&self, thread: &Thread) {
        self.world.while_safe(thread, || {
            let mut stack = self.collector();
            if self.is_collection_due() {
                self.full_collection(&mut stack);
            }
        });
        self.run_finalizers(thread);
    }

    /// Finds everything that is unreachable now.
    pub(crate) fn collect_fully(&self, thread: &Thread) {
        self.world.while_safe(thread, || {
            let mut stack = self.collector();
            self.full_collection(&mut stack);
        });
        self.run_finalizers(thread);
    }

    fn collector(&self) -> MutexGuard<'_, MarkStack> {
        self.collector
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs what waits, outside of every lock, in the thread that noticed.
    fn run_finalizers(&self, thread: &Thread) {
        if !self.has_ready.swap(false, Ordering::Acquire) {
            return;
        }
        let ready = self.critically(thread, || self.roots().take_ready());
        for finalizer in ready {
            (finalizer.run)(finalizer.object);
        }
    }

    /// Stops the world, marks everything that the roots lead to, and frees the rest.
    fn full_collection(&self, stack: &mut MarkStack) {
        self.before_stop();
        self.space.clear_other_bitmaps();
        let begin = Instant::now();
        let stopped = self.world.stop(self.parameters.stop_signal);
        let other = self.space.current() ^ 1;
        let mut marker = Marker::new(&self.space, stack, other);
        self.keep_buffers(&stopped, other);
        self.mark_roots(&stopped, &mut marker);
        marker.drain();
        self.finalize_unreachable(&mut marker);
        self.space.exchange_bitmaps();
        self.reclaim();
        drop(stopped);
        self.counters.paused(begin.elapsed());
        self.counters.collections.fetch_add(1, Ordering::Relaxed);
    }

    /// What must not be done while threads may be stopped within the allocator of libc.
    fn before_stop(&self) {
        if self.parameters.stop_signal.is_some() {
            self.roots().find_images();
        }
    }

    /// The free cells of every thread's runs count as live: see [`Buffer`](crate::thread::Buffer).
    fn keep_buffers(&self, stopped: &Stopped<'_>, set: usize) {
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

    fn mark_roots(&self, stopped: &Stopped<'_>, marker: &mut Marker<'_>) {
        if self.parameters.stop_signal.is_some() {
            for thread in stopped.threads() {
                let start = thread.stack_pointer.load(Ordering::Relaxed);
                let end = thread.stack_end.load(Ordering::Relaxed);
                // SAFETY: the part of a stopped thread's stack that is in use.
                unsafe { marker.scan(start, end) };
                let [start, end] = [0, 1].map(|end| thread.tls[end].load(Ordering::Relaxed));
                // SAFETY: the thread's variables, which live as long as it does.
                unsafe { marker.scan(start, end) };
            }
        }
        let roots = self.roots();
        for (start, end) in roots.ranges.iter().chain(&roots.images) {
            // SAFETY: by the word of whoever added the range.
            unsafe { marker.scan(*start, *end) };
        }
    }

    fn finalize_unreachable(&self, marker: &mut Marker<'_>) {
        if self.roots().find_ready(self, marker) {
            self.has_ready.store(true, Ordering::Release);
        }
    }

    /// Makes lists of what the current bitmaps leave free, and decides when to collect next.
    fn reclaim(&self) {
        let mut lists = self.space.lists();
        self.space.forget_room(&mut lists);
        let mut live = 0;
        let mut number = 0;
        let end = self.space.used_blocks();
        while number < end {
            let block = self.space.block(number);
            if block.kind() == Kind::Free {
                number += 1;
                continue;
            }
            let extent = if block.is_large() { block.extent() } else { 1 };
            let bitmap = self.space.bitmap(self.space.current(), number);
            let cells = block.cells.load(Ordering::Relaxed);
            let marked = bitmap.count(cells);
            live += if block.is_large() {
                marked as usize * extent as usize * BLOCK
            } else {
                (marked * block.cell_bytes.load(Ordering::Relaxed)) as usize
            };
            if block.is_owned() {
                // Cells below the cursor wait for the collection after the block is given up.
                self.space.touch(&mut lists, number);
            } else if marked == 0 {
                self.space.free(&mut lists, number);
            } else if !block.is_large() {
                block.pristine.store(0, Ordering::Relaxed);
                if marked < cells {
                    block.cursor.store(0, Ordering::Release);
                    self.space.give_room(&mut lists, number);
                }
            } else {
                // Its one cell is found by its mark from here on.
                block.cursor.store(0, Ordering::Release);
            }
            number += extent;
        }
        let in_use = (lists.committed - lists.free_blocks) as usize * BLOCK;
        (self.counters.heap_bytes).store(in_use as u64, Ordering::Relaxed);
        (self.counters.live_bytes).store(live as u64, Ordering::Relaxed);
        self.allocated.store(0, Ordering::Relaxed);
        let allowance = (live / 4 * 3).max(self.parameters.least_allowance);
        self.allowance.store(allowance, Ordering::Relaxed);
    }
}
