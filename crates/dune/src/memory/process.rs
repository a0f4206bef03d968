//! The process's own page table.
#![expect(unsafe_code, reason = "changing it changes what the process stands on")]

use dune_x86::addr::{GuestPhys, GuestVirt, PageSize, VirtRange};
use dune_x86::paging::{
    Change, EditFailure, Entry, Flush, Leaf, MapError, NoPage, PteFlags, SplitError, Walk,
};

use super::{Frames, PageTable, Tables};
use crate::machine::Machine;

/// The process's own page table: every address of the process maps to itself, in windows of
/// 1 GiB that are split where something smaller is wanted.
///
/// The host side has the last word: a page that `mprotect` forbids is forbidden whatever is
/// written here, and what is written here says nothing of whether the host has memory there.
/// Memory mapped after the first entry shows up when it is first touched.
#[derive(Debug)]
pub struct ProcessTables {
    table: PageTable,
}

impl ProcessTables {
    /// The process's page table; `None` before the first entry into Dune mode.
    #[inline(always)]
    #[must_use]
    pub fn get() -> Option<Self> {
        let root = GuestPhys::new_truncate(Machine::get()?.tables().root());
        Some(Self {
            table: PageTable::from_root(root, Tables::new(), Frames::new()),
        })
    }

    pub(crate) fn table(&self) -> &PageTable {
        &self.table
    }

    /// Every entry on the way to an address.
    #[must_use]
    pub fn walk(&self, address: GuestVirt) -> Walk {
        self.table.walk(address)
    }

    /// The entry that maps an address, of whatever size.
    #[must_use]
    pub fn leaf(&self, address: GuestVirt) -> Option<Leaf> {
        self.table.leaf(address)
    }

    /// Guest physical address of an address.
    #[must_use]
    pub fn translate(&self, address: GuestVirt) -> Option<GuestPhys> {
        self.table.translate(address)
    }

    /// Splits every larger page in the range into pages of `size`. Nothing translates
    /// differently afterwards.
    ///
    /// # Errors
    /// [`SplitError`], which carries the address; pages below it are split.
    pub fn split(&self, range: VirtRange, size: PageSize) -> Result<Flush, SplitError> {
        let mut flush = Flush::nothing();
        for page in range.align_out(size).pages(size) {
            flush = flush.and(self.table.split(page, size)?);
        }
        Ok(flush)
    }

    /// Shows every leaf in the range that was accessed or written since its bits were last
    /// cleared.
    pub fn accessed_dirty(&self, range: VirtRange, visit: impl FnMut(Leaf)) {
        self.table.accessed_dirty(range, visit);
    }

    /// Clears the accessed bit of all pages in the range and shows those that had it.
    ///
    /// # Errors
    /// [`EditFailure`].
    pub fn clear_accessed(
        &self,
        range: VirtRange,
        visit: impl FnMut(Leaf),
    ) -> Result<Flush, EditFailure> {
        self.table.clear_accessed(range, visit)
    }

    /// Clears the dirty bit of all pages in the range and shows those that had it. Only
    /// after the flush is every later write seen.
    ///
    /// # Errors
    /// [`EditFailure`].
    pub fn clear_dirty(
        &self,
        range: VirtRange,
        visit: impl FnMut(Leaf),
    ) -> Result<Flush, EditFailure> {
        self.table.clear_dirty(range, visit)
    }

    /// Replaces the rights of all pages in the range; larger pages are split at its ends.
    ///
    /// # Errors
    /// [`EditFailure`], with the flush of what was done.
    ///
    /// # Safety
    /// Where rights are taken away, all code that uses the range must expect the page fault
    /// and a handler must resolve it. What the runtime uses under a trap (thread areas, trap
    /// stacks, the entry stubs, the handler itself and its data) must not be in the range.
    pub unsafe fn protect(&self, range: VirtRange, rights: PteFlags) -> Result<Flush, EditFailure> {
        self.table.protect(range, rights)
    }

    /// Changes the 4 KiB page at `address`: the same for the case that matters most, in some
    /// fifty instructions. Split the range beforehand.
    ///
    /// # Errors
    /// [`NoPage`] where no 4 KiB page is mapped.
    ///
    /// # Safety
    /// As for [`protect`](Self::protect).
    #[inline(always)]
    pub unsafe fn update_page(
        &self,
        address: GuestVirt,
        change: Change,
    ) -> Result<(Entry, Flush), NoPage> {
        self.table.update_page_4k(address, change)
    }

    /// Maps pages of guest physical memory.
    ///
    /// # Errors
    /// [`MapError`]; pages below the address that it carries are mapped.
    ///
    /// # Safety
    /// Nothing may rely on the range being unmapped, and whoever owns the memory at
    /// `physical` must expect it to be reached through the range too.
    pub unsafe fn map(
        &self,
        range: VirtRange,
        physical: GuestPhys,
        largest: PageSize,
        flags: PteFlags,
    ) -> Result<(), MapError> {
        self.table.map_range(range, physical, largest, flags)
    }

    /// Unmaps all pages in the range and shows what they were.
    ///
    /// # Errors
    /// [`EditFailure`].
    ///
    /// # Safety
    /// As for [`protect`](Self::protect).
    pub unsafe fn unmap(
        &self,
        range: VirtRange,
        removed: impl FnMut(Leaf),
    ) -> Result<Flush, EditFailure> {
        self.table.unmap(range, removed)
    }
}
