//! What the heap has done so far.

use core::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counts since the heap was made. See [`Heap::stats`](crate::Heap::stats).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Collections that are complete, of both kinds.
    pub collections: u64,
    /// Those of them that looked at young objects only.
    pub minor_collections: u64,
    /// How often the world was stopped.
    pub pauses: u64,
    /// For how long altogether, from the request to stop to the permission to go on.
    pub pause_total: Duration,
    /// For how long at most.
    pub pause_longest: Duration,
    /// Bytes of blocks that are in use.
    pub heap_bytes: u64,
    /// Bytes that were live at the end of the last collection.
    pub live_bytes: u64,
    /// Pages that were looked at because they had been written.
    pub pages_scanned: u64,
    /// First writes to a page that cost a trap.
    pub first_write_traps: u64,
}

/// The counters behind [`Stats`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) collections: AtomicU64,
    pub(crate) minor_collections: AtomicU64,
    pauses: AtomicU64,
    pause_total_ns: AtomicU64,
    pause_longest_ns: AtomicU64,
    pub(crate) heap_bytes: AtomicU64,
    pub(crate) live_bytes: AtomicU64,
    pub(crate) pages_scanned: AtomicU64,
}

impl Counters {
    pub(crate) fn paused(&self, pause: Duration) {
        let nanoseconds = u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX);
        self.pauses.fetch_add(1, Ordering::Relaxed);
        (self.pause_total_ns).fetch_add(nanoseconds, Ordering::Relaxed);
        (self.pause_longest_ns).fetch_max(nanoseconds, Ordering::Relaxed);
    }

    pub(crate) fn read(&self, first_write_traps: u64) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            collections: get(&self.collections),
            minor_collections: get(&self.minor_collections),
            pauses: get(&self.pauses),
            pause_total: Duration::from_nanos(get(&self.pause_total_ns)),
            pause_longest: Duration::from_nanos(get(&self.pause_longest_ns)),
            heap_bytes: get(&self.heap_bytes),
            live_bytes: get(&self.live_bytes),
            pages_scanned: get(&self.pages_scanned),
            first_write_traps,
        }
    }
}
