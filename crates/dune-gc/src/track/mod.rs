//! Who says which pages were written: the heap's write barrier.
//!
//! ```text
//! Untracked     nobody knows
//! Protected<M>  a page without the right to write stands for "not written"
//!   Mprotect      the right comes back in a SIGSEGV handler
//!   Userfault     the right comes back from another thread
//! DirtyBits     the CPU notes it, in Dune mode
//! ```

mod dirty_bits;
mod mprotect;
mod none;
mod protected;
mod userfault;

pub(crate) use dirty_bits::DirtyBits;
pub(crate) use mprotect::Mprotect;
pub(crate) use none::Untracked;
pub(crate) use protected::Protected;
pub(crate) use userfault::Userfault;

use crate::space::Space;

/// A way of finding out which pages of the heap were written.
///
/// A page counts as written at the moment its bytes change. Whatever was written before
/// [`collect`](Self::collect) is called is in the heap's set of dirty pages when it returns;
/// what is written while it works is in this set or the next, and if it is in this one alone
/// then the new bytes are there to be read when it returns.
pub(crate) trait WriteTracker: Send + Sync + core::fmt::Debug {
    /// Whether written pages are known at all. If not, every collection is a full one that
    /// stops the world.
    fn is_tracking(&self) -> bool {
        true
    }

    /// A segment of the heap (addresses from and to) became usable: follows it from here on.
    ///
    /// # Errors
    /// Says what was refused.
    fn cover(&self, start: usize, end: usize) -> Result<(), String>;

    /// A thread is about to fill `bytes` from `address` on, all in one block.
    fn will_write(&self, _address: usize, _bytes: usize) {}

    /// Adds the pages written since the last time to the heap's dirty ones, and begins anew.
    /// Neither allocates nor frees: threads may be stopped anywhere.
    fn collect(&self, space: &Space);

    /// Whether a thread may lose the property that [`admit_thread`](Self::admit_thread) gave it,
    /// so that its writes of pointers must be noted.
    fn wants_notes(&self) -> bool {
        false
    }

    /// A thread whose writes are not seen has written here.
    fn note_written(&self, _address: usize, _bytes: usize) {}

    /// This is the child of a `fork` that happened while nobody collected and the heap's lists
    /// were held. All pages may count as written.
    ///
    /// # Errors
    /// Says why writes cannot be followed here.
    fn after_fork(&self, _space: &Space) -> Result<(), String> {
        Ok(())
    }

    /// First writes that cost a trap so far.
    fn traps(&self) -> u64 {
        0
    }

    /// The calling thread is about to use the heap.
    ///
    /// # Errors
    /// Says why its writes cannot be followed.
    fn admit_thread(&self) -> Result<(), String> {
        Ok(())
    }
}
