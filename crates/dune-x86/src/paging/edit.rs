//! Changing and removing mappings.

#![forbid(unsafe_code)]

use super::entry::needs_flush;
use super::flush::Gather;
use super::{
    Change, ENTRIES, Entry, EntryKind, Flush, FlushTlb, FrameAllocator, Leaf, Level, PageTable,
    PteFlags, Slot, TableMemory,
};
use crate::addr::{GuestPhys, GuestVirt, PageSize, VirtRange};

/// Why an edit of a range stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EditError {
    /// The range has addresses that the page table cannot translate.
    #[error("{range} is not canonical: it has more bits than the page table translates")]
    NonCanonical {
        /// The range that was asked for.
        range: VirtRange,
    },
    /// The range is not one of whole 4 KiB pages.
    #[error("{range} does not consist of whole 4 KiB pages")]
    Unaligned {
        /// The range that was asked for.
        range: VirtRange,
    },
    /// A large page had to be split, and there was no frame for the table.
    #[error("no frame is left to split the {size} page at {va}; free some or enlarge their pool")]
    OutOfTables {
        /// An address in the page.
        va: GuestVirt,
        /// The page's size.
        size: PageSize,
    },
    /// The page is in a table that belongs to another page table; edit that
    /// one.
    #[error("{va} is in tables borrowed from another page table; edit it there")]
    Borrowed {
        /// The first address in the page that is in the range.
        va: GuestVirt,
    },
    /// There is an entry on the way that makes no sense.
    #[error("the {level:?} entry {entry:?} on the way to {va} is malformed")]
    Malformed {
        /// The address.
        va: GuestVirt,
        /// The level of the entry.
        level: Level,
        /// The entry.
        entry: Entry,
    },
}

/// An edit of a range that stopped before its end, and the flush that the part
/// of it that was done still needs.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{cause}")]
#[must_use = "the part of the edit that was done must be flushed"]
pub struct EditFailure {
    /// Why, and where, it stopped. Pages below are edited, from there on they
    /// are not.
    pub cause: EditError,
    /// What was edited until then.
    pub flush: Flush,
}

impl EditFailure {
    /// Flushes what was edited; returns the cause.
    pub fn apply(self, tlb: &(impl FlushTlb + ?Sized)) -> EditError {
        self.flush.apply(tlb);
        self.cause
    }

    fn before_any_edit(cause: EditError) -> Self {
        Self {
            cause,
            flush: Flush::nothing(),
        }
    }
}

/// Why a page was not split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SplitError {
    /// Nothing is mapped at the address.
    #[error("nothing is mapped at {va}")]
    NotMapped {
        /// The address.
        va: GuestVirt,
    },
    /// There was no frame for the table.
    #[error("no frame is left to split the {size} page at {va}; free some or enlarge their pool")]
    OutOfTables {
        /// The address.
        va: GuestVirt,
        /// The page's size.
        size: PageSize,
    },
    /// The page is in a table that belongs to another page table; split it
    /// there.
    #[error("{va} is in tables borrowed from another page table; split it there")]
    Borrowed {
        /// The address.
        va: GuestVirt,
    },
}

/// Why a leaf could not be replaced by a table.
#[derive(Clone, Copy)]
enum NoSplit {
    OutOfTables { va: GuestVirt, size: PageSize },
    Borrowed { va: GuestVirt },
}

impl From<NoSplit> for SplitError {
    fn from(error: NoSplit) -> Self {
        match error {
            NoSplit::OutOfTables { va, size } => Self::OutOfTables { va, size },
            NoSplit::Borrowed { va } => Self::Borrowed { va },
        }
    }
}

impl From<NoSplit> for EditError {
    fn from(error: NoSplit) -> Self {
        match error {
            NoSplit::OutOfTables { va, size } => Self::OutOfTables { va, size },
            NoSplit::Borrowed { va } => Self::Borrowed { va },
        }
    }
}

/// There is no page that can be changed at an address: nothing is mapped, or
/// the tables are borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no page that this page table owns is mapped at {va}")]
pub struct NoPage {
    /// The address.
    pub va: GuestVirt,
}

/// What an edit does with pages that lie only partly in its range.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Straddling {
    /// Split them first, and edit the parts that are inside.
    Split,
    /// Edit them whole.
    Whole,
}

impl<M: TableMemory, A: FrameAllocator, const LEVELS: u8> PageTable<M, A, LEVELS> {
    /// Removes every mapping in `range`, parked pages included, and shows
    /// `removed` each leaf with the bits it had at that moment. Addresses in
    /// the range that are not mapped are passed over; large pages partly in
    /// the range are split. Tables that become empty stay, see
    /// [`PageTable::prune`].
    ///
    /// Do not reuse the pages before the flush has been applied.
    ///
    /// # Errors
    ///
    /// [`EditFailure`], with a flush for what was done until then. When it is
    /// for want of memory, nothing was removed.
    pub fn unmap(&self, range: VirtRange, removed: impl FnMut(Leaf)) -> Result<Flush, EditFailure> {
        self.edit(range, Straddling::Split, |_| Entry::EMPTY, removed)
    }

    /// Replaces the protection (P, R/W, U/S and NX, as in
    /// [`PteFlags::PROTECTION`]) of all that is mapped in `range`. Without
    /// [`PteFlags::PRESENT`] the pages are parked: they fault until they are
    /// protected again. Other bits in `flags` do not count, addresses that are
    /// not mapped are passed over, large pages partly in the range are split.
    ///
    /// # Errors
    ///
    /// [`EditFailure`], with a flush for what was done until then. When it is
    /// for want of memory, nothing was changed.
    #[inline]
    pub fn protect(&self, range: VirtRange, flags: PteFlags) -> Result<Flush, EditFailure> {
        self.change(range, Change::protection(flags))
    }

    /// Makes a change to all that is mapped in `range`, as
    /// [`PageTable::protect`] does.
    ///
    /// # Errors
    ///
    /// As of [`PageTable::protect`].
    #[inline]
    pub fn change(&self, range: VirtRange, change: Change) -> Result<Flush, EditFailure> {
        // One small page with its tables in place, which is what handlers of
        // page faults protect, needs none of the rest.
        if range == VirtRange::page(range.start(), PageSize::Size4KiB)
            && let Ok((_, flush)) = self.update_page_4k(range.start(), change)
        {
            return Ok(flush);
        }
        self.change_any(range, change)
    }

    fn change_any(&self, range: VirtRange, change: Change) -> Result<Flush, EditFailure> {
        self.edit(
            range,
            Straddling::Split,
            |entry| change.apply(entry),
            |_| (),
        )
    }

    /// Changes the leaf that maps `va`, all of it whatever its size, and
    /// returns it as it was before.
    ///
    /// # Errors
    ///
    /// [`NoPage`], when nothing is mapped there or the table is borrowed.
    pub fn update_leaf(&self, va: GuestVirt, change: Change) -> Result<(Leaf, Flush), NoPage> {
        if !va.is_canonical(Self::WIDTH) {
            return Err(NoPage { va });
        }
        let mut slot = self.slot(va);
        loop {
            let EntryKind::Leaf(size) = slot.kind() else {
                return Err(NoPage { va });
            };
            if slot.borrowed {
                return Err(NoPage { va });
            }
            let new = change.apply(slot.entry);
            match self.exchange(slot, new) {
                Ok(()) => {
                    let leaf = Leaf {
                        va: va.align_down(size),
                        size,
                        entry: slot.entry,
                    };
                    return Ok((leaf, flush_of_one(leaf, new)));
                }
                Err(_) => slot = self.slot(va),
            }
        }
    }

    /// Changes the 4 KiB page at `va` and returns the entry as it was before:
    /// [`PageTable::update_leaf`] for the case that matters most, in as few
    /// instructions as can be.
    ///
    /// # Errors
    ///
    /// [`NoPage`], when no 4 KiB page is mapped there (a larger one may be) or
    /// the table is borrowed.
    #[inline(always)]
    pub fn update_page_4k(&self, va: GuestVirt, change: Change) -> Result<(Entry, Flush), NoPage> {
        match self.leaf_entry_4k(va) {
            Some((table, index)) => self.update_entry_4k(table, index, va, change),
            None => Err(NoPage { va }),
        }
    }

    /// Changes the entry at a place that [`PageTable::leaf_entry_4k`] returned
    /// for `va`, and returns it as it was before.
    ///
    /// # Errors
    ///
    /// [`NoPage`], when the entry is empty.
    #[inline(always)]
    pub fn update_entry_4k(
        &self,
        table: GuestPhys,
        index: usize,
        va: GuestVirt,
        change: Change,
    ) -> Result<(Entry, Flush), NoPage> {
        let mut old = self.memory.read(table, index);
        loop {
            if old == 0 {
                return Err(NoPage { va });
            }
            let new = change.apply(Entry(old));
            match self.memory.compare_exchange(table, index, old, new.0) {
                Ok(_) => {
                    let old = Entry(old);
                    let flush = if needs_flush(old, new) {
                        Flush::page(va)
                    } else {
                        Flush::nothing()
                    };
                    return Ok((old, flush));
                }
                Err(found) => old = found,
            }
        }
    }

    /// Clears the accessed bit of every leaf in `range` and shows `visit` those
    /// that had it, as they were. A large page partly in the range is treated
    /// whole; split it first where that is too coarse.
    ///
    /// Until the flush is applied, a CPU that holds the translation does not
    /// set the bit again. For statistics that may be good enough
    /// ([`super::NoFlush::StaleIsHarmless`]).
    ///
    /// # Errors
    ///
    /// [`EditFailure`], with a flush for what was done until then.
    pub fn clear_accessed(
        &self,
        range: VirtRange,
        visit: impl FnMut(Leaf),
    ) -> Result<Flush, EditFailure> {
        self.clear_and_report(range, PteFlags::ACCESSED, visit)
    }

    /// Clears the dirty bit of every leaf in `range` and shows `visit` those
    /// that had it, as they were. A large page partly in the range is treated
    /// whole; split it first where that is too coarse.
    ///
    /// **Apply the flush before reading the pages**: until then a CPU that
    /// holds the translation writes without setting the bit again.
    ///
    /// # Errors
    ///
    /// [`EditFailure`], with a flush for what was done until then; the leaves
    /// shown until then are clean now.
    pub fn clear_dirty(
        &self,
        range: VirtRange,
        visit: impl FnMut(Leaf),
    ) -> Result<Flush, EditFailure> {
        self.clear_and_report(range, PteFlags::DIRTY, visit)
    }

    fn clear_and_report(
        &self,
        range: VirtRange,
        bits: PteFlags,
        mut visit: impl FnMut(Leaf),
    ) -> Result<Flush, EditFailure> {
        let change = Change::clear(bits);
        let has_any = |entry: Entry| entry.0 & bits.bits() != 0;
        self.edit(
            range,
            Straddling::Whole,
            |entry| {
                if has_any(entry) {
                    change.apply(entry)
                } else {
                    entry
                }
            },
            |leaf| {
                if has_any(leaf.entry) {
                    visit(leaf);
                }
            },
        )
    }

    /// Splits the page that maps `va` until its size is `to` or smaller. The
    /// rest of a 1 GiB page stays in pages of 2 MiB. No translation and no
    /// attribute changes; parts of a dirty page are dirty.
    ///
    /// The flush rids CPUs of the translation of the large page. It may wait
    /// until the pages are changed, because what they cached stays right.
    ///
    /// # Errors
    ///
    /// [`SplitError`]. A page of 1 GiB may have been split to 2 MiB then.
    pub fn split(&self, va: GuestVirt, to: PageSize) -> Result<Flush, SplitError> {
        if !va.is_canonical(Self::WIDTH) {
            return Err(SplitError::NotMapped { va });
        }
        let mut flush = Flush::nothing();
        loop {
            let slot = self.slot(va);
            match slot.kind() {
                EntryKind::Leaf(size) if size <= to => return Ok(flush),
                EntryKind::Leaf(size) => {
                    self.split_slot(slot, va, size)?;
                    // A page that was not present is in no TLB.
                    if slot.entry.is_present() {
                        flush = Flush::page(va);
                    }
                }
                _ => return Err(SplitError::NotMapped { va }),
            }
        }
    }

    /// Replaces a leaf by a link to a table of its 512 parts. Returns without
    /// having done it when another thread changed what the slot is: look again.
    fn split_slot(&self, slot: Slot, va: GuestVirt, size: PageSize) -> Result<(), NoSplit> {
        if slot.borrowed {
            return Err(NoSplit::Borrowed { va });
        }
        let table = self
            .tables
            .allocate_table()
            .ok_or(NoSplit::OutOfTables { va, size })?;
        let link = Entry::link(table);
        let mut old = slot.entry;
        loop {
            for index in 0..ENTRIES {
                let part = old.part(size, index).unwrap_or(Entry::EMPTY);
                self.memory.write(table, index, part.0);
            }
            match self
                .memory
                .compare_exchange(slot.table, slot.index, old.0, link.0)
            {
                Ok(_) => return Ok(()),
                // The CPU set A or D, or another thread changed the flags:
                // the parts must have that too.
                Err(found) if Entry(found).kind(slot.level) == EntryKind::Leaf(size) => {
                    old = Entry(found);
                }
                Err(_) => {
                    // Never linked, so no CPU can have seen it.
                    self.tables.free_table(table);
                    return Ok(());
                }
            }
        }
    }

    /// Makes `at` a boundary between pages.
    fn split_at(&self, at: GuestVirt) -> Result<(), EditError> {
        loop {
            let slot = self.slot(at);
            match slot.kind() {
                EntryKind::Leaf(size) if !at.is_aligned(size) => {
                    self.split_slot(slot, at, size)?;
                }
                _ => return Ok(()),
            }
        }
    }

    /// Applies `edit` to every leaf in `range`, atomically each; shows `edited`
    /// those that changed, as they were before.
    ///
    /// Splits come first: they are what may want memory, so that for want of
    /// memory the edit is not done at all (unless other threads make new large
    /// pages meanwhile).
    fn edit(
        &self,
        range: VirtRange,
        straddling: Straddling,
        edit: impl Fn(Entry) -> Entry,
        mut edited: impl FnMut(Leaf),
    ) -> Result<Flush, EditFailure> {
        if !Self::is_canonical(range) {
            return Err(EditFailure::before_any_edit(EditError::NonCanonical {
                range,
            }));
        }
        if !range.is_aligned(PageSize::Size4KiB) {
            return Err(EditFailure::before_any_edit(EditError::Unaligned { range }));
        }
        let Some(last) = range.last() else {
            return Ok(Flush::nothing());
        };
        if straddling == Straddling::Split {
            self.split_at(range.start())
                .map_err(EditFailure::before_any_edit)?;
            if let Some(end) = range.end().filter(|end| end.is_canonical(Self::WIDTH)) {
                self.split_at(end).map_err(EditFailure::before_any_edit)?;
            }
        }

        let mut gather = Gather::default();
        let mut at = range.start();
        let mut slot = self.slot(at);
        let cause = loop {
            match slot.kind() {
                EntryKind::Empty => {}
                EntryKind::Leaf(_) if slot.borrowed => break EditError::Borrowed { va: at },
                EntryKind::Leaf(size) => {
                    let leaf = Leaf {
                        va: slot.base(at),
                        size,
                        entry: slot.entry,
                    };
                    if straddling == Straddling::Split && !range.contains_range(leaf.range()) {
                        // Another thread mapped it since the splits above.
                        if let Err(error) = self.split_slot(slot, at, size) {
                            break error.into();
                        }
                        slot = self.slot(at);
                        continue;
                    }
                    let new = edit(slot.entry);
                    if new != slot.entry {
                        if self.exchange(slot, new).is_err() {
                            // Lost against the CPU or another thread: look
                            // again at what is there now.
                            slot = self.slot(at);
                            continue;
                        }
                        if needs_flush(slot.entry, new) {
                            gather.add(leaf.va, size);
                        }
                        edited(leaf);
                    }
                }
                EntryKind::Link => {
                    slot = self.slot(at);
                    continue;
                }
                EntryKind::Malformed => {
                    break EditError::Malformed {
                        va: at,
                        level: slot.level,
                        entry: slot.entry,
                    };
                }
            }
            match self.next_slot(slot, at, last) {
                Some((next, va)) => (slot, at) = (next, va),
                None => return Ok(gather.finish()),
            }
        };
        Err(EditFailure {
            cause,
            flush: gather.finish(),
        })
    }

    /// Replaces the entry of a slot, unless it has changed since it was read.
    fn exchange(&self, slot: Slot, new: Entry) -> Result<(), Entry> {
        match self
            .memory
            .compare_exchange(slot.table, slot.index, slot.entry.0, new.0)
        {
            Ok(_) => Ok(()),
            Err(found) => Err(Entry(found)),
        }
    }
}

/// The flush for one leaf that became `new`.
fn flush_of_one(leaf: Leaf, new: Entry) -> Flush {
    if needs_flush(leaf.entry, new) {
        Flush::page(leaf.va)
    } else {
        Flush::nothing()
    }
}
