//! Who says which pages were written: the heap's write barrier.
//!
//! ```text
//! Untracked     nobody knows
//! Protected<M>  a page without the right to write stands for "not written"
//!   Mprotect      the right comes back in a SIGSEGV handler
//!   Userfault     the right comes back from another thread
//! DirtyBits     the CPU notes it, in Dune mode
//! ```
//!
//! # Why no write is missed
//!
//! What a collector needs is [`WriteTracker::collect`]'s promise: a page whose bytes changed
//! before the call is in the set when it returns, and a change during the call is in this set, in
//! time to be read, or in the next.
//!
//! ```text
//!   program    write A ......... write B ......... write C
//!   collector            |-- collect --|                  |-- collect --|
//!                         A: in this set; B: in this or the next; C: in the next
//! ```
//!
//! **Protected.** Each page is open or closed, and *an open page counts as written whether it was
//! or not*. So only the moment of closing matters. A page that `collect` finds open goes into the
//! set first and is closed afterwards, by a system call that returns when no CPU can write to it
//! any more: writes before that are in this set, and their bytes are there when it returns. A
//! write after that traps; the handler (or the thread) says *open* first and gives the right
//! after, under one lock with whoever closes (`Pages::while_changing`), so that bit and right
//! never come apart. A page is closed only if something marked lies in it, so an open page with
//! young objects alone costs no trap. New cells are never in a closed page: `will_write` opens it
//! before they are cleared. Where the kernel refuses to close (it has no room for another mapping),
//! the page stays open and is looked at each time.
//!
//! Of `userfaultfd` in addition: a page without memory behind it must be protected, too. Kernels
//! from 6.4 on do so if asked; for others the page is read first. The thread that gives the right
//! back belongs to the heap, never stops with the world, and takes no lock but that of bit and
//! right.
//!
//! *Not seen*: system calls that write to a closed page do not trap, they fail with `EFAULT`: no
//! write, so none is missed.
//!
//! **Dirty bits.** `dune::dirty` gives the same promise and argues for it: the CPU sets the bit in
//! the entry before the bytes change, `collect` clears it by one atomic instruction, and flushes
//! every virtual CPU before it returns; system calls' writes are noted by the host side. What it
//! does not see are threads outside Dune mode. A thread is let in ([`WriteTracker::admit_thread`])
//! by entering; the Rust interface asks at each write of a pointer whether the thread is still
//! inside (two instructions), and notes the write by itself if not
//! ([`WriteTracker::note_written`]): after the write, and before the thread's next safepoint, so
//! before any collection that could free what was written. The interface for C has no way out of
//! Dune mode. The marker's own thread writes no pointers.
//!
//! **After `fork`** the child's pages are all open (protected), or carry the parent's bits (dirty
//! bits): too many rather than too few.

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
