//! Which pages were written: the CPU keeps account of it, in the dirty bits of the process's
//! own page tables.
//!
//! A [`Tracker`] watches a range. [`Tracker::collect`] returns the pages written since the
//! last time as a [`PageSet`], and a new period begins. A write costs nothing: no fault, no
//! exit; the CPU sets the bit while it translates the address anyway.
//! [`Tracker::collect_accessed`] does the same for pages that were used at all: the working
//! set.
//!
//! ```no_run
//! use dune::dirty::Tracker;
//! use dune::memory::Pages;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! dune::enter()?;
//! let pages = Pages::new(1024)?;
//! let tracker = Tracker::start(pages.range())?;
//! assert!(pages.write(5 * 4096, b"hello"));
//! for run in tracker.collect()?.runs() {
//!     println!("written: {run}"); // one page
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # What it costs
//!
//! | call | work | leaves the guest |
//! |---|---|---|
//! | [`Tracker::start`] | a page table of 512 entries for each 2 MiB that was not split yet, a look at `/proc/self/maps`, a scan | yes, some ten times and for the first touch of new tables |
//! | a write, the first or not | nothing | no |
//! | [`Tracker::collect`], [`Tracker::reset`], [`Tracker::collect_accessed`] | 4 to 10 instructions for each page of the range (of 4 KiB, or of 2 MiB where those are the unit), the more the more are found; linear in the range | once for the flush, and only if something was found and a second thread has, or had, a virtual CPU |
//! | [`Tracker::peek`] | the same without the flush | no |
//! | dropping a tracker | linear in the number of trackers | no |
//!
//! All of them take one lock that the process has for its trackers, and hold it for as long
//! as they work.
//!
//! # Why no write is missed
//!
//! A page is *written* at the moment its bytes change. `collect` promises that every page
//! written since the tracker started, or since the last `collect` of it, and before this one
//! was called, is in the set that this one returns; a page written while it works is in this
//! set or in the next; and if it is in this one alone, then its new bytes are there to be
//! read when `collect` returns. So a copy of the range that takes over the pages in the set,
//! each time after `collect` has returned, misses nothing.
//!
//! 1. The CPU sets D in the entry before it writes through it, in one atomic step with its
//!    check of the entry (SDM vol. 3A, 4.8; APM vol. 2, 5.4.2). `collect` clears bits by a
//!    locked AND of the entry. So each bit is either seen and cleared, or still there for the
//!    next scan.
//! 2. A virtual CPU whose TLB holds the translation with D set does not set it again. Such a
//!    translation was made while D was set in memory. So when a scan clears the bit, the page
//!    is among those found. Writes through the stale translation go on until the flush.
//! 3. When the scan is done and if it cleared anything, *one* flush reaches every virtual CPU
//!    ([`Tlb`]): KVM makes those that run leave the guest, which completes
//!    their writes, and drops all translations before it returns. Only then does `collect`
//!    return. A write through a stale translation is thus one to a page in the set, made
//!    before the set was handed out; a later one finds D clear and sets it.
//! 4. The bit is one, the trackers are many: whoever clears a bit, by `collect`, `reset` or
//!    `start`, puts the page into the findings of every tracker whose range holds it. The lock
//!    is held over scan *and flush*; otherwise another tracker could hand the page out while
//!    stale translations still exist.
//! 5. Splitting a page passes its bits on to the parts, by an exchange that fails when the CPU
//!    set a bit meanwhile. `start` flushes after it has split and cleared, so that no
//!    translation of the large page, with its D set, outlives it.
//! 6. A window that is taken back (its memory is unmapped, or without any right) takes its
//!    bits along. That is counted before the entries go; a scan that finds entries missing
//!    after the count has changed reports their pages as written, and scans again if it
//!    changed meanwhile. A window that comes back starts with all bits set. So such a page is
//!    reported once more than needed, never once too few.
//! 7. The kernel's writes on behalf of a system call forwarded from Dune mode (`read`,
//!    `recvmsg`, `fstat`, ...) do not pass through the page tables. After each such call the
//!    host side sets the bits of what the kernel wrote, as its result and the table in
//!    `host/outputs.rs` say; before the call returns to the guest. The same goes for calls
//!    that change what an address holds: `mmap`, `munmap`, `mremap`, `brk`, `madvise`. Of a
//!    call that the table does not know, 16 KiB behind each argument that is an address count
//!    as written.
//! 8. The child of a `fork` has the parent's trackers, with what they had found. Where other
//!    threads of the parent had virtual CPUs, the copy of a page may be younger than the copy
//!    of its entry: then the child's first `collect` returns every page. The child of a
//!    process with one thread in Dune mode gets exactly what its parent would have got.
//!
//! # What is not seen
//!
//! Whoever writes without the process's page tables must say so by [`Tracker::note_written`]:
//!
//! * threads of the process that are outside Dune mode (also the same thread, after
//!   [`leave`](crate::leave)), and system calls that they make;
//! * ring 3 in an [`AddressSpace`](crate::memory::AddressSpace) that maps the memory by
//!   entries of its own ([`map`](crate::memory::AddressSpace::map)): these have bits of their
//!   own;
//! * other processes: shared mappings, `process_vm_writev`, `ptrace`; shared file mappings
//!   whose file is changed by `write`;
//! * the kernel at times other than the end of a system call: `io_uring`, `aio`, rings of
//!   `perf`; and the word that it clears when a thread ends;
//! * structures that lie behind a pointer inside an argument of `ioctl` and its like
//!   (`userfaultfd`'s copies among them);
//! * whoever clears the bits without this module, by
//!   [`ProcessTables::clear_dirty`](crate::memory::ProcessTables::clear_dirty), or unmaps
//!   pages in the process's page tables.
//!
//! # Outside Dune mode
//!
//! Before the first [`enter`](crate::enter) there are no page tables of the process's own, and
//! [`Tracker::start`] says [`TrackError::NotEntered`]. Afterwards every call works inside and
//! outside, on what threads inside have written; a flush made outside is dear (KVM drops all
//! that it has mapped for the guest).
//!
//! # Handlers and `fork`
//!
//! A signal or exception handler that interrupts one of these calls and makes one itself is
//! told [`TrackError::Interrupted`]. `fork` of libc waits until no thread is in such a call; a
//! bare `clone` beside a thread that is leaves the child with a lock that nobody holds.

mod fork;
mod registry;
mod scan;
mod set;

use core::cell::Cell;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use dune_kvm::sys;
use dune_x86::addr::{GuestPhys, GuestVirt, PageSize, VirtRange};
use dune_x86::paging::{ENTRIES, FlushTlb, NoFlush, SplitError};

use crate::error::EnterError;
use crate::host::outputs;
use crate::machine::Machine;
use crate::maps;
use crate::memory::{Frames, ProcessTables, Tables, Tlb};
use crate::thread::ThreadArea;

use registry::{Cleared, Registry};
use scan::{Mark, TableSource};
pub use set::{Granularity, PageSet, Runs};

/// The first address that is not the process's.
const USER_END: u64 = 1 << 47;

static REGISTRY: Mutex<Registry> = Mutex::new(Registry::new());

/// How many trackers there are: the host side notes what the kernel writes only for them.
static TRACKERS: AtomicU32 = AtomicU32::new(0);

/// How many windows were taken out of the page tables, with their bits.
static WINDOWS_LOST: AtomicU64 = AtomicU64::new(0);

/// Whether anybody wants to know. Either side; one load.
#[inline]
pub(crate) fn is_tracking() -> bool {
    TRACKERS.load(Ordering::Relaxed) != 0
}

/// A window is about to be taken out of the page tables. Either side.
pub(crate) fn window_is_lost() {
    WINDOWS_LOST.fetch_add(1, Ordering::SeqCst);
}

/// Sets the bits of every page that holds one of these bytes. Either side; no lock, no
/// allocation. Linear in the pages of the range.
pub(crate) fn mark_written(address: u64, bytes: u64) {
    let Some(machine) = Machine::get() else {
        return;
    };
    let end = address.saturating_add(bytes).min(USER_END);
    if address >= end {
        return;
    }
    let root = GuestPhys::new_truncate(machine.tables().root());
    let bits = Mark::Dirty.bit() | Mark::Accessed.bit();
    scan::set(
        &Tables::new(),
        root,
        address >> 12..end.div_ceil(4096),
        bits,
    );
}

/// Why a range cannot be tracked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackError {
    /// There are no page tables of the process's own yet.
    #[error(
        "writes are tracked in page tables that the process gets when it first enters Dune \
         mode: call dune::enter() before"
    )]
    NotEntered,
    /// The range has no byte.
    #[error("the range at {start} is empty: give it a length")]
    Empty {
        /// Where it starts.
        start: GuestVirt,
    },
    /// The range is not the process's memory.
    #[error("{range} is not memory of the process, which ends below {USER_END:#x}")]
    OutOfReach {
        /// The range that was asked for.
        range: VirtRange,
    },
    /// A part of the range is not mapped.
    #[error(
        "nothing is mapped at {at}: map all of the range first (without rights is enough), or \
         track its parts"
    )]
    NotMapped {
        /// The first such address.
        at: GuestVirt,
    },
    /// There are not enough frames for the page tables.
    #[error(
        "{range} needs {needed} page tables and {left} are left: track it by pages of 2 MiB, \
         or a smaller range"
    )]
    TooLarge {
        /// The range that was asked for.
        range: VirtRange,
        /// Page tables that it needs.
        needed: u64,
        /// Page tables that can still be made.
        left: u64,
    },
    /// The memory cannot be shown to the guest.
    #[error(transparent)]
    Window(#[from] EnterError),
    /// A handler interrupted a call of this module in the same thread.
    #[error(
        "a signal or exception handler interrupted a tracker's work in this thread and cannot \
         use trackers itself: do it after the handler"
    )]
    Interrupted,
}

/// Watches a range for writes, from [`start`](Self::start) until it is dropped. Any number of
/// trackers may overlap; each sees every write.
#[derive(Debug)]
#[must_use = "a tracker that is dropped tracks nothing"]
pub struct Tracker {
    id: u64,
    range: VirtRange,
    granularity: Granularity,
}

impl Tracker {
    /// Tracks a range, widened to whole pages, by pages of 4 KiB.
    ///
    /// # Errors
    /// [`TrackError`].
    pub fn start(range: VirtRange) -> Result<Self, TrackError> {
        Self::start_with(range, Granularity::Page4KiB)
    }

    /// Tracks a range, widened to whole pages of a unit. Everything larger than the unit that
    /// maps the range is split, and stays so.
    ///
    /// # Errors
    /// [`TrackError`].
    pub fn start_with(range: VirtRange, granularity: Granularity) -> Result<Self, TrackError> {
        let machine = Machine::get().ok_or(TrackError::NotEntered)?;
        let tables = ProcessTables::get().ok_or(TrackError::NotEntered)?;
        if range.is_empty() {
            let start = range.start();
            return Err(TrackError::Empty { start });
        }
        if range.last().is_none_or(|last| last.as_u64() >= USER_END) {
            return Err(TrackError::OutOfReach { range });
        }
        if let Some(at) = first_hole(range.align_out(PageSize::Size4KiB)) {
            return Err(TrackError::NotMapped { at });
        }
        let range = range.align_out(granularity.page_size());
        fork::prepare();
        let mut held = Held::new()?;
        // From here on the host side notes what the kernel writes.
        TRACKERS.fetch_add(1, Ordering::SeqCst);
        outputs::remember_break();
        let prepared = machine
            .cover(range.start().as_u64(), range.bytes())
            .map_err(TrackError::Window)
            .and_then(|()| split(&tables, range, granularity));
        if let Err(error) = prepared {
            TRACKERS.fetch_sub(1, Ordering::SeqCst);
            return Err(error);
        }
        let id = held
            .registry
            .add(range, granularity, WINDOWS_LOST.load(Ordering::SeqCst));
        let tracker = Self {
            id,
            range,
            granularity,
        };
        tracker.sweep(&mut held, Mark::Accessed);
        tracker.sweep(&mut held, Mark::Dirty);
        // Also for what was split.
        Tlb::of_process().flush_all();
        for mark in [Mark::Dirty, Mark::Accessed] {
            held.registry.take(id, mark, &mut tracker.empty());
        }
        Ok(tracker)
    }

    /// The range, in whole pages.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        self.range
    }

    /// The unit in which writes are told apart.
    #[must_use]
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// The pages written since the start or the last `collect` or [`reset`](Self::reset), and
    /// begins anew.
    ///
    /// # Errors
    /// [`TrackError::Interrupted`].
    pub fn collect(&self) -> Result<PageSet, TrackError> {
        let mut set = self.empty();
        self.move_into(Mark::Dirty, &mut set)?;
        Ok(set)
    }

    /// As [`collect`](Self::collect), into a set that came from this tracker earlier: nothing
    /// is allocated. What was in the set is lost.
    ///
    /// # Errors
    /// [`TrackError::Interrupted`]; the set is empty then.
    pub fn collect_into(&self, set: &mut PageSet) -> Result<(), TrackError> {
        if set.range() == self.range && set.granularity() == self.granularity {
            set.clear();
        } else {
            *set = self.empty();
        }
        self.move_into(Mark::Dirty, set)
    }

    /// The pages that [`collect`](Self::collect) would return now, left to be collected.
    ///
    /// # Errors
    /// [`TrackError::Interrupted`].
    pub fn peek(&self) -> Result<PageSet, TrackError> {
        let mut held = Held::new()?;
        let found = tables_root().and_then(|root| {
            let lost = || WINDOWS_LOST.load(Ordering::SeqCst);
            held.registry.peek(self.id, &Tables::new(), root, lost)
        });
        Ok(found.unwrap_or_else(|| self.empty()))
    }

    /// Forgets what was written until now.
    ///
    /// # Errors
    /// [`TrackError::Interrupted`].
    pub fn reset(&self) -> Result<(), TrackError> {
        self.collect().map(drop)
    }

    /// The pages read, written or executed since the start or the last `collect_accessed`, and
    /// begins anew. Writes are seen by [`collect`](Self::collect) all the same. What the
    /// kernel only reads in a system call is not seen.
    ///
    /// # Errors
    /// [`TrackError::Interrupted`].
    pub fn collect_accessed(&self) -> Result<PageSet, TrackError> {
        let mut set = self.empty();
        self.move_into(Mark::Accessed, &mut set)?;
        Ok(set)
    }

    /// Says that memory was written by somebody whom the page tables do not show (see the
    /// module documentation): every tracker of it will report the pages. Say it after the
    /// write. No lock, so it may be called anywhere; linear in the pages of the range. What
    /// the process has not mapped is passed over; does nothing before the first entry.
    pub fn note_written(range: VirtRange) {
        mark_written(range.start().as_u64(), range.bytes());
    }

    fn empty(&self) -> PageSet {
        PageSet::new(self.range, self.granularity)
    }

    /// `set` is empty and of this tracker's shape.
    fn move_into(&self, mark: Mark, set: &mut PageSet) -> Result<(), TrackError> {
        let mut held = Held::new()?;
        let cleared = self.sweep(&mut held, mark);
        flush(&cleared);
        held.registry.take(self.id, mark, set);
        Ok(())
    }

    fn sweep(&self, held: &mut Held, mark: Mark) -> Cleared {
        let Some(root) = tables_root() else {
            return Cleared::default();
        };
        let lost = || WINDOWS_LOST.load(Ordering::SeqCst);
        held.registry
            .sweep(self.id, mark, &Tables::new(), root, lost)
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        // In a handler that interrupted another call it stays, and costs a little.
        if let Ok(mut held) = Held::new() {
            held.registry.remove(self.id);
            TRACKERS.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl TableSource for Tables {
    #[inline]
    fn table(&self, at: GuestPhys) -> Option<&[AtomicU64; ENTRIES]> {
        self.whole(at)
    }
}

fn tables_root() -> Option<GuestPhys> {
    Some(GuestPhys::new_truncate(Machine::get()?.tables().root()))
}

/// Makes every vCPU forget the translations whose bits were cleared.
fn flush(cleared: &Cleared) {
    if cleared.is_empty() {
        return;
    }
    let tlb = Tlb::of_process();
    match cleared.few() {
        Some(pages) if crate::is_inside() && ThreadArea::only_one() => {
            for page in pages {
                tlb.flush_page(GuestVirt::new_truncate(page << 12));
            }
        }
        _ => tlb.flush_all(),
    }
}

/// The first address of a range, in whole pages, that is not mapped.
fn first_hole(range: VirtRange) -> Option<GuestVirt> {
    let mut at = range.start().as_u64();
    let end = at + range.bytes();
    maps::read(|mapping| {
        if mapping.start <= at && mapping.end > at {
            at = mapping.end;
        }
        at < end && mapping.start <= at
    });
    (at < end).then(|| GuestVirt::new_truncate(at))
}

/// Splits what is larger than the unit. The flush is the caller's.
fn split(
    tables: &ProcessTables,
    range: VirtRange,
    granularity: Granularity,
) -> Result<(), TrackError> {
    let size = granularity.page_size();
    let needed = tables_needed(tables, range, size);
    let left = u64::from(Frames::left());
    let too_large = TrackError::TooLarge {
        range,
        needed,
        left,
    };
    if needed > left {
        return Err(too_large);
    }
    for address in range.pages(PageSize::Size2MiB) {
        match tables.table().split(address, size) {
            Ok(flush) => flush.ignore(NoFlush::CoveredByLargerFlush),
            Err(SplitError::OutOfTables { .. } | SplitError::Borrowed { .. }) => {
                return Err(too_large);
            }
            // Its window was taken back since: there is nothing to split.
            Err(SplitError::NotMapped { .. }) => {}
        }
    }
    Ok(())
}

fn tables_needed(tables: &ProcessTables, range: VirtRange, size: PageSize) -> u64 {
    let mut needed = 0;
    let mut last_split = None;
    for address in range.pages(PageSize::Size2MiB) {
        let Some(leaf) = tables.leaf(address).filter(|leaf| leaf.size > size) else {
            continue;
        };
        if leaf.size == PageSize::Size1GiB && last_split != Some(leaf.va) {
            last_split = Some(leaf.va);
            needed += 1;
        }
        needed += u64::from(size == PageSize::Size4KiB);
    }
    needed
}

/// The lock, held by this thread. The fields go in this order: a handler that comes between
/// the two must still be told that it interrupted.
struct Held {
    registry: MutexGuard<'static, Registry>,
    _busy: Busy,
}

impl Held {
    fn new() -> Result<Self, TrackError> {
        let busy = Busy::new().ok_or(TrackError::Interrupted)?;
        let mut registry = REGISTRY.lock().unwrap_or_else(PoisonError::into_inner);
        registry.in_process(sys::getpid(), !ThreadArea::only_one());
        Ok(Self {
            registry,
            _busy: busy,
        })
    }
}

thread_local! {
    /// This thread holds the lock, or waits for it.
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

struct Busy(());

impl Busy {
    /// `None` where this thread is busy already.
    fn new() -> Option<Self> {
        (!BUSY.replace(true)).then_some(Self(()))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        BUSY.set(false);
    }
}
