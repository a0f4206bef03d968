//! Who says which pages were written: the heap's write barrier.

mod none;

pub(crate) use none::Untracked;

use crate::space::Space;

/// A way of finding out which pages of the heap were written.
///
/// A page counts as written at the moment its bytes change. Whatever was written before
/// [`collect`](Self::collect) is called is in the heap's set of dirty pages when it returns;
/// what is written while it works is in this set or the next.
pub(crate) trait WriteTracker: Send + Sync + core::fmt::Debug {
    /// Whether written pages are known at all. If not, every collection is a full one that
    /// stops the world.
    fn is_tracking(&self) -> bool;

    /// A segment of the heap (addresses from and to) became usable: follows it from here on.
    ///
    /// # Errors
    /// Says what was refused.
    fn cover(&self, start: usize, end: usize) -> Result<(), String>;

    /// A thread is about to fill `bytes` from `address` on, all in one block.
    fn will_write(&self, address: usize, bytes: usize);

    /// Adds the pages written since the last time to the heap's dirty ones, and begins anew.
    /// Neither allocates nor frees: threads may be stopped anywhere.
    fn collect(&self, space: &Space);

    /// First writes that cost a trap so far.
    fn traps(&self) -> u64;

    /// The calling thread is about to use the heap.
    ///
    /// # Errors
    /// Says why its writes cannot be followed.
    fn admit_thread(&self) -> Result<(), String> {
        Ok(())
    }
}
