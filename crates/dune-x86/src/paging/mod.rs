//! Page tables: reading and editing them, live or not.
//!
//! ```text
//!   CR3 -> PML4 --link--> PDPT --link--> PD --link--> PT
//!          512 x 512 GiB  512 x 1 GiB    512 x 2 MiB  512 x 4 KiB
//!                           | leaf         | leaf       | leaf
//!                           v              v            v
//!                         1 GiB page     2 MiB page   4 KiB page
//! ```
//!
//! The module reaches the tables through [`TableMemory`] and gets and returns
//! the memory for them through [`FrameAllocator`], so the same code edits the
//! tables under the running CPU's feet and tables in a test's vector. It
//! allocates nothing from the heap, does not recurse, does not panic and takes
//! no lock, so that it can run in a trap handler.
//!
//! # Who may do what at the same time
//!
//! * **The CPU** sets accessed and dirty bits at any time. Every edit of an
//!   entry that is or was visible to it is a compare-and-exchange which is
//!   tried again when it lost, so no such bit is ever lost. What an edit
//!   reports as the old entry is what was in memory at the very moment it was
//!   replaced.
//! * **Methods that take `&self`** may run on any number of threads together.
//!   Two that work on overlapping ranges both happen, in an order that is not
//!   defined page by page.
//! * **Methods that take `&mut self`, and [`PageTable::free`],** unlink tables
//!   and give them back, so nothing else may walk the page table meanwhile
//!   (the CPU may: they flush before they free). This also goes for a page
//!   table that borrows from it, and for a `(table, index)` kept from
//!   [`PageTable::leaf_entry_4k`].
//!
//! `&self` methods only ever add tables; [`PageTable::prune`] and
//! [`PageTable::collapse`] remove them again.
//!
//! # Who owns a table
//!
//! A page table owns its root and every table that can be reached from it
//! without crossing a link marked [`Entry::BORROWED`]. It alone edits and
//! frees those. [`PageTable::share_from`] makes borrowed links at the top
//! level; the lender's links are marked [`Entry::LENT`], and the tables right
//! below those stay until the lender is freed. **The lender must outlive its
//! borrowers**, and a flush of the lender's translations must reach the CPUs
//! that run a borrower.
//!
//! # Flushing
//!
//! Edits that take a right away or change a translation return a [`Flush`];
//! adding a mapping or a right needs none on x86, where an entry that is not
//! present is never cached and a stale one that is too strict is dropped by the
//! fault it causes.
//!
//! # Example
//!
//! ```
//! use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
//! use dune_x86::addr::{GuestPhys, GuestVirt, PageSize, VirtRange};
//! use dune_x86::frame::{FramePool, PooledTables};
//! use dune_x86::paging::{NoFlush, PageTable, PteFlags, TableMemory};
//!
//! /// Tables in a vector; physical address 0 is its beginning.
//! struct Memory(Vec<AtomicU64>);
//!
//! impl Memory {
//!     fn entry(&self, table: GuestPhys, index: usize) -> &AtomicU64 {
//!         &self.0[table.as_u64() as usize / 8 + index]
//!     }
//! }
//!
//! impl TableMemory for Memory {
//!     fn read(&self, table: GuestPhys, index: usize) -> u64 {
//!         self.entry(table, index).load(Ordering::Relaxed)
//!     }
//!     fn write(&self, table: GuestPhys, index: usize, value: u64) {
//!         self.entry(table, index).store(value, Ordering::Relaxed);
//!     }
//!     fn compare_exchange(
//!         &self, table: GuestPhys, index: usize, old: u64, new: u64,
//!     ) -> Result<u64, u64> {
//!         self.entry(table, index).compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let memory = Memory((0..8 * 512).map(|_| AtomicU64::new(0)).collect());
//! let words: Vec<_> = (0..8).map(|_| AtomicU32::new(0)).collect();
//! let pool = FramePool::new(GuestPhys::ZERO, PageSize::Size4KiB, &words)?;
//! let tables = PooledTables::new(&pool, &memory).expect("the pool's frames are of 4 KiB");
//! let table: PageTable<_, _> = PageTable::new(&memory, tables)?;
//!
//! // Four MiB in two large pages; then one small page becomes read-only, for
//! // which its large page is split.
//! let range = VirtRange::try_new(GuestVirt::new(0x4000_0000), 4 << 20)?;
//! table.map_range(range, GuestPhys::new(0x20_0000), PageSize::Size2MiB, PteFlags::RW)?;
//! let page = VirtRange::page(GuestVirt::new(0x4000_5000), PageSize::Size4KiB);
//! let flush = table.protect(page, PteFlags::R)?;
//! flush.ignore(NoFlush::NotLoaded);
//!
//! assert_eq!(table.translate(GuestVirt::new(0x4000_5123)), Some(GuestPhys::new(0x20_5123)));
//! assert!(!table.walk(page.start()).permissions().unwrap().writable);
//! table.free();
//! assert_eq!(pool.in_use(), 0);
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod edit;
mod entry;
mod flush;
mod map;
mod own;
mod reclaim;
mod share;
#[cfg(test)]
mod tests;
mod walk;

pub use edit::{EditError, EditFailure, NoPage, SplitError};
pub use entry::{Change, Entry, EntryKind, Leaf, Level, PteFlags};
pub use flush::{Flush, FlushScope, FlushTlb, NoFlush};
pub use map::MapError;
pub use reclaim::CollapseError;
pub use share::{CloneError, ShareError};
pub use walk::{Permissions, Step, Walk, WalkEnd};

use crate::addr::{GuestPhys, GuestVirt, VirtRange, VirtWidth};

/// The number of entries of a table, at every level.
pub const ENTRIES: usize = 512;

/// The memory that holds page tables.
///
/// `table` is always the root, a table from the [`FrameAllocator`], or what a
/// present link points to; `index` is below [`ENTRIES`]. Entries may be changed
/// by the CPU and by other threads at any time, so implementations over real
/// memory use atomic accesses. What an implementation cannot reach, it reads as
/// 0 and refuses to exchange with `Err(0)`: then the walk ends there.
///
/// A walk reads one entry per level, so the way from `table` to memory is what
/// a page fault's cost depends on: best it is a single addition.
pub trait TableMemory {
    /// The entry `index` of `table`, read at once (a relaxed atomic load or
    /// stronger).
    fn read(&self, table: GuestPhys, index: usize) -> u64;

    /// Stores an entry. Called only for tables that are not linked to, or no
    /// longer: nobody else sees them.
    fn write(&self, table: GuestPhys, index: usize, value: u64);

    /// Stores `new` if the entry is `old`, as one locked operation that orders
    /// earlier [`TableMemory::write`]s before it.
    ///
    /// # Errors
    ///
    /// The entry's value, when that is not `old`.
    fn compare_exchange(
        &self,
        table: GuestPhys,
        index: usize,
        old: u64,
        new: u64,
    ) -> Result<u64, u64>;

    /// The index of the first entry of `table`, from `from` on, that is neither empty nor
    /// [borrowed](Entry::BORROWED). Most entries of most tables are: whoever can look at
    /// several at a time does.
    fn next_owned(&self, table: GuestPhys, from: usize) -> Option<usize> {
        (from..ENTRIES).find(|index| {
            let entry = Entry(self.read(table, *index));
            !entry.is_empty() && !entry.is_borrowed()
        })
    }
}

impl<T: TableMemory + ?Sized> TableMemory for &T {
    #[inline]
    fn read(&self, table: GuestPhys, index: usize) -> u64 {
        (**self).read(table, index)
    }

    #[inline]
    fn write(&self, table: GuestPhys, index: usize, value: u64) {
        (**self).write(table, index, value);
    }

    #[inline]
    fn next_owned(&self, table: GuestPhys, from: usize) -> Option<usize> {
        (**self).next_owned(table, from)
    }

    #[inline]
    fn compare_exchange(
        &self,
        table: GuestPhys,
        index: usize,
        old: u64,
        new: u64,
    ) -> Result<u64, u64> {
        (**self).compare_exchange(table, index, old, new)
    }
}

/// Where the memory for tables comes from and goes to.
pub trait FrameAllocator {
    /// A 4 KiB frame, aligned and filled with zeroes, or `None` when there is
    /// none left.
    fn allocate_table(&self) -> Option<GuestPhys>;

    /// Takes a frame back. Its contents are arbitrary. No CPU walks it any
    /// more.
    fn free_table(&self, table: GuestPhys);
}

impl<T: FrameAllocator + ?Sized> FrameAllocator for &T {
    #[inline]
    fn allocate_table(&self) -> Option<GuestPhys> {
        (**self).allocate_table()
    }

    #[inline]
    fn free_table(&self, table: GuestPhys) {
        (**self).free_table(table);
    }
}

/// There was no frame left for a page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no frame is left for a page table; free page tables or enlarge their pool")]
pub struct OutOfTables;

/// A page table: a root, and the means to reach and to make tables.
///
/// `LEVELS` is 4 or 5 (CR4.LA57). Dropping a page table frees nothing, because
/// it may still be loaded: see [`PageTable::free`].
#[derive(Debug)]
pub struct PageTable<M, A, const LEVELS: u8 = 4> {
    root: GuestPhys,
    memory: M,
    tables: A,
}

impl<M: TableMemory, A: FrameAllocator, const LEVELS: u8> PageTable<M, A, LEVELS> {
    /// The level of the root.
    pub const ROOT_LEVEL: Level = Level::root(LEVELS);

    /// The width of the virtual addresses that the page table translates.
    pub const WIDTH: VirtWidth = match Self::ROOT_LEVEL {
        Level::Pml5 => VirtWidth::Bits57,
        _ => VirtWidth::Bits48,
    };

    /// A page table that maps nothing.
    ///
    /// # Errors
    ///
    /// [`OutOfTables`], when there is no frame for the root.
    pub fn new(memory: M, tables: A) -> Result<Self, OutOfTables> {
        let root = tables.allocate_table().ok_or(OutOfTables)?;
        Ok(Self {
            root,
            memory,
            tables,
        })
    }

    /// The page table whose root is at `root`: the owner from now on of all
    /// tables that it links to without [`Entry::BORROWED`].
    pub const fn from_root(root: GuestPhys, memory: M, tables: A) -> Self {
        Self {
            root,
            memory,
            tables,
        }
    }

    /// Where the root is: the address part of CR3.
    #[inline]
    pub const fn root(&self) -> GuestPhys {
        self.root
    }

    /// The memory that holds the tables.
    #[inline]
    pub const fn memory(&self) -> &M {
        &self.memory
    }

    /// Where tables come from.
    #[inline]
    pub const fn tables(&self) -> &A {
        &self.tables
    }

    /// Frees the root and every table the page table owns; not the pages that
    /// it maps. Returns the number of tables freed.
    ///
    /// It must not be loaded on any CPU, CPUs must hold no translations of it
    /// under a PCID that will be loaded again without a flush, and no page
    /// table that borrows from it may be left.
    pub fn free(self) -> u64 {
        self.free_owned_tables()
    }

    /// Whether all of the range is canonical at the page table's width.
    fn is_canonical(range: VirtRange) -> bool {
        range.start().is_canonical(Self::WIDTH)
            && range
                .last()
                .is_none_or(|last| last.is_canonical(Self::WIDTH))
    }
}

/// The entry at which the walk for an address ended: not a link.
#[derive(Clone, Copy, Debug)]
struct Slot {
    table: GuestPhys,
    index: usize,
    level: Level,
    entry: Entry,
    /// Whether a borrowed link leads here.
    borrowed: bool,
}

impl Slot {
    fn kind(&self) -> EntryKind {
        self.entry.kind(self.level)
    }

    /// The first address that the entry covers, given one of them.
    fn base(&self, va: GuestVirt) -> GuestVirt {
        GuestVirt::new_truncate(va.as_u64() & !(self.level.entry_bytes() - 1))
    }

    /// The first address after those that the entry covers; wraps to 0 at the
    /// end of the address space.
    fn next_base(&self, va: GuestVirt) -> u64 {
        (va.as_u64() | (self.level.entry_bytes() - 1)).wrapping_add(1)
    }
}
