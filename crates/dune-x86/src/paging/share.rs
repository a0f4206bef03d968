//! Page tables made from others: sharing tables, and copying them.

#![forbid(unsafe_code)]

use super::map::Place;
use super::{
    ENTRIES, Entry, EntryKind, FrameAllocator, Leaf, MapError, OutOfTables, PageTable, TableMemory,
};
use crate::addr::{GuestPhys, GuestVirt, VirtRange};

/// Why tables were not shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShareError {
    /// The range has addresses that the page table cannot translate.
    #[error("{range} is not canonical: it has more bits than the page table translates")]
    NonCanonical {
        /// The range that was asked for.
        range: VirtRange,
    },
    /// The borrower has mappings of its own, or borrowed from elsewhere, under
    /// the top-level entry; unmap and prune them first.
    #[error("the top-level entry for {va} is in use by the borrower ({entry:?})")]
    Occupied {
        /// The first address that the entry covers.
        va: GuestVirt,
        /// The borrower's entry.
        entry: Entry,
    },
}

/// Why a page table was not copied. Nothing is left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloneError {
    /// There was no frame for a table.
    #[error(transparent)]
    OutOfTables(#[from] OutOfTables),
    /// A page could not be mapped in the copy.
    #[error("cannot map a page in the copy: {0}")]
    Map(#[from] MapError),
    /// A top-level entry could not be shared.
    #[error(transparent)]
    Share(#[from] ShareError),
}

impl<M: TableMemory, A: FrameAllocator, const LEVELS: u8> PageTable<M, A, LEVELS> {
    /// Borrows from `lender` the tables under every top-level entry (512 GiB
    /// with four levels) that `range` touches and the lender has in use.
    /// From then on, what the lender maps, changes and removes under these
    /// entries is so here too. What it maps under entries it did not use yet
    /// does not show until this is called again, which is cheap, and may be
    /// done when a fault asks for it.
    ///
    /// The lender must outlive this page table, and its flushes must reach the
    /// CPUs that run this one (see the module documentation). No flush is
    /// needed here.
    ///
    /// # Errors
    ///
    /// [`ShareError`]; top-level entries below the address in the error are
    /// shared.
    pub fn share_from<A2: FrameAllocator>(
        &self,
        lender: &PageTable<M, A2, LEVELS>,
        range: VirtRange,
    ) -> Result<(), ShareError> {
        if !Self::is_canonical(range) {
            return Err(ShareError::NonCanonical { range });
        }
        let (Some(last), level) = (range.last(), Self::ROOT_LEVEL) else {
            return Ok(());
        };
        for index in level.index(range.start())..=level.index(last) {
            let Some(lent) = lender.lend(index) else {
                continue;
            };
            let borrowed = Entry::link(lent).0 | Entry::BORROWED;
            let Err(found) = self.memory.compare_exchange(self.root, index, 0, borrowed) else {
                continue;
            };
            let found = Entry(found);
            if !(found.kind(level) == EntryKind::Link
                && found.is_borrowed()
                && found.table() == lent)
            {
                let va = Self::WIDTH.sign_extend((index as u64) << level.shift());
                return Err(ShareError::Occupied {
                    va: GuestVirt::new_truncate(va),
                    entry: found,
                });
            }
        }
        Ok(())
    }

    /// Marks the table under a top-level entry as lent, so that it stays.
    fn lend(&self, index: usize) -> Option<GuestPhys> {
        let mut entry = Entry(self.memory.read(self.root, index));
        loop {
            if entry.kind(Self::ROOT_LEVEL) != EntryKind::Link {
                return None;
            }
            // What is borrowed itself is the first lender's to keep.
            let lent = Entry(entry.0 | Entry::LENT);
            if entry.is_borrowed() || entry == lent {
                return Some(entry.table());
            }
            match self
                .memory
                .compare_exchange(self.root, index, entry.0, lent.0)
            {
                Ok(_) => return Some(entry.table()),
                Err(found) => entry = Entry(found),
            }
        }
    }
}

impl<M, A, const LEVELS: u8> PageTable<M, A, LEVELS>
where
    M: TableMemory + Clone,
    A: FrameAllocator + Clone,
{
    /// A page table with a root of its own that borrows everything under it:
    /// [`PageTable::share_from`] of the whole address space.
    ///
    /// # Errors
    ///
    /// [`CloneError::OutOfTables`], when there is no frame for the root.
    pub fn clone_shallow(&self) -> Result<Self, CloneError> {
        let clone = Self::new(self.memory.clone(), self.tables.clone())?;
        for index in 0..ENTRIES {
            if let Some(lent) = self.lend(index) {
                // Nobody else knows the new root yet.
                let borrowed = Entry::link(lent).0 | Entry::BORROWED;
                clone.memory.write(clone.root, index, borrowed);
            }
        }
        Ok(clone)
    }

    /// A page table with tables of its own that maps what this one maps in
    /// `range`: the same pages, not copies of them. Pages partly in the range
    /// are cut to it.
    ///
    /// `copy` is shown every leaf, present or parked, cut leaves whole, and
    /// returns the entry for the copy (with the size and the physical address
    /// as they are, other attributes as it likes) or `None` to leave it out.
    /// That is where pages get their second reference, and where writing is
    /// forbidden for copy-on-write.
    ///
    /// # Errors
    ///
    /// [`CloneError`]; no table is left behind, but `copy` has seen pages.
    pub fn clone_deep(
        &self,
        range: VirtRange,
        mut copy: impl FnMut(&Leaf) -> Option<Entry>,
    ) -> Result<Self, CloneError> {
        let clone = Self::new(self.memory.clone(), self.tables.clone())?;
        let mut place = None;
        let mut result = Ok(());
        self.for_each_leaf(range, |leaf| {
            if result.is_ok()
                && let Some(entry) = copy(&leaf)
            {
                result = clone.place_cut(&mut place, Leaf { entry, ..leaf }, range);
            }
        });
        match result {
            Ok(()) => Ok(clone),
            Err(error) => {
                clone.free();
                Err(error.into())
            }
        }
    }

    /// Maps the part of a leaf that lies in `range`.
    fn place_cut(
        &self,
        place: &mut Option<Place>,
        leaf: Leaf,
        range: VirtRange,
    ) -> Result<(), MapError> {
        let whole = leaf.range();
        match (range.intersection(whole), leaf.size.smaller()) {
            (Some(part), Some(smaller)) if part != whole => {
                let offset = part.start().page_offset(leaf.size);
                let pa = GuestPhys::new_truncate(leaf.page().as_u64() + offset);
                self.map_range(part, pa, smaller, leaf.flags())
            }
            (Some(_), _) => self.place(place, leaf.va, leaf.size, leaf.entry),
            (None, _) => Ok(()),
        }
    }
}
