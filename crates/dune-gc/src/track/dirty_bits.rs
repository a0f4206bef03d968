//! The dirty bits of the process's own page tables, in Dune mode.

use std::sync::{Mutex, PoisonError};

use dune::dirty::{PageSet, Tracker};
use dune_x86::addr::{GuestVirt, VirtRange};

use super::WriteTracker;
use crate::layout::PAGE_SHIFT;
use crate::space::Space;

/// See the module documentation. One tracker for each segment of the heap.
#[derive(Debug)]
pub(crate) struct DirtyBits {
    /// Not locked by a thread that may be stopped.
    segments: Mutex<Vec<(Tracker, PageSet)>>,
}

impl DirtyBits {
    /// Enters Dune mode if the thread is outside.
    pub(crate) fn new() -> Result<Self, String> {
        dune::enter().map_err(|error| error.to_string())?;
        Ok(Self {
            segments: Mutex::new(Vec::new()),
        })
    }
}

impl WriteTracker for DirtyBits {
    fn cover(&self, start: usize, end: usize) -> Result<(), String> {
        let first = GuestVirt::new_truncate(start as u64);
        let range =
            VirtRange::try_new(first, (end - start) as u64).map_err(|error| error.to_string())?;
        let tracker = Tracker::start(range).map_err(|error| error.to_string())?;
        let set = PageSet::new(tracker.range(), tracker.granularity());
        let mut segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner);
        segments.push((tracker, set));
        Ok(())
    }

    fn collect(&self, space: &Space) {
        let mut segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner);
        let first = space.start() as u64 >> PAGE_SHIFT;
        let used = (space.used() as u64).next_multiple_of(1 << PAGE_SHIFT);
        for (tracker, set) in segments.iter_mut() {
            if tracker.range().start().as_u64() - space.start() as u64 >= used {
                continue;
            }
            if let Err(error) = tracker.collect_into(set) {
                // Only a handler that interrupted a tracker's work is refused; the collector
                // never runs in one.
                crate::heap::fatal(&error.to_string());
            }
            for run in set.runs() {
                let from = (run.start().as_u64() >> PAGE_SHIFT) - first;
                let end = from + (run.bytes() >> PAGE_SHIFT);
                space.mark_dirty(from as usize..end as usize);
            }
        }
    }

    /// A thread may leave Dune mode at any time.
    fn wants_notes(&self) -> bool {
        true
    }

    fn note_written(&self, address: usize, bytes: usize) {
        if dune::is_inside() {
            return;
        }
        let first = GuestVirt::new_truncate(address as u64);
        if let Ok(range) = VirtRange::try_new(first, bytes as u64) {
            Tracker::note_written(range);
        }
    }

    fn admit_thread(&self) -> Result<(), String> {
        dune::enter().map_err(|error| error.to_string())
    }
}
