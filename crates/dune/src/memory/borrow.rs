//! Address spaces that have most of what they map in common: tables borrowed from a
//! template, and single pages of their own.

use std::sync::Arc;

use dune_x86::addr::{GuestPhys, GuestVirt, VirtRange};
use dune_x86::paging::{Change, Flush, NoPage, PteFlags, TableMemory};

use super::{AddressSpace, SpaceError, Tables};

/// Where the entry of a page of 4 KiB is in the tables of an address space: found once, so
/// that looking at its bits costs a few instructions.
#[derive(Clone, Copy, Debug)]
pub struct PageEntry {
    page: GuestVirt,
    table: GuestPhys,
    index: usize,
}

impl AddressSpace {
    /// Borrows what `lender` maps under the top-level entries (512 GiB each) that `range`
    /// touches, as far as it uses them now. No page table is made; the lender is kept.
    ///
    /// Meant for a lender that is not changed any more: a flush of the lender's translations
    /// does not reach those that CPUs hold of this space.
    ///
    /// # Errors
    /// [`SpaceError::Share`] where this space maps something of its own.
    pub fn borrow_from(&mut self, lender: &Arc<Self>, range: VirtRange) -> Result<(), SpaceError> {
        self.table()?.share_from(lender.table()?, range)?;
        if !self.lenders.iter().any(|known| Arc::ptr_eq(known, lender)) {
            self.lenders.push(Arc::clone(lender));
        }
        Ok(())
    }

    /// Makes the tables on the way to a page this space's own, so that the page can be
    /// mapped, unmapped and protected here although it was borrowed. Changes no translation.
    ///
    /// # Errors
    /// [`SpaceError::OutOfTables`].
    pub fn own_tables(&self, page: GuestVirt) -> Result<(), SpaceError> {
        let flush = self.table()?.own_way(page)?;
        flush.apply(&self.tlb());
        Ok(())
    }

    /// The entry of a page of 4 KiB that this space maps in tables of its own.
    #[must_use]
    pub fn page_entry(&self, page: GuestVirt) -> Option<PageEntry> {
        let (table, index) = self.table().ok()?.leaf_entry_4k(page)?;
        Some(PageEntry { page, table, index })
    }

    /// Whether the page was written since its dirty bit was last cleared. A few
    /// instructions.
    #[inline]
    #[must_use]
    pub fn is_dirty(&self, entry: PageEntry) -> bool {
        Tables::new().read(entry.table, entry.index) & PteFlags::DIRTY.bits() != 0
    }

    /// Clears the dirty bit of a page. The flush may be gathered with others', and is
    /// [paid](Self::pay) before ring 3 runs again.
    ///
    /// # Errors
    /// [`NoPage`] if nothing is mapped there any more.
    #[inline]
    pub fn clear_dirty_bit(&self, entry: PageEntry) -> Result<Flush, NoPage> {
        let no_page = NoPage { va: entry.page };
        self.table()
            .map_err(|_| no_page)?
            .update_entry_4k(
                entry.table,
                entry.index,
                entry.page,
                Change::clear(PteFlags::DIRTY),
            )
            .map(|(_, flush)| flush)
    }

    /// Applies a flush of this address space. No exit unless a vCPU runs it at this moment.
    pub fn pay(&self, flush: Flush) {
        flush.apply(&self.tlb());
    }
}
