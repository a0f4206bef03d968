//! Taking borrowed tables into ownership, so that a page behind them can be edited.

#![forbid(unsafe_code)]

use super::{
    ENTRIES, Entry, EntryKind, Flush, FrameAllocator, Level, OutOfTables, PageTable, TableMemory,
};
use crate::addr::{GuestPhys, GuestVirt};

impl<M: TableMemory, A: FrameAllocator, const LEVELS: u8> PageTable<M, A, LEVELS> {
    /// Replaces every borrowed table on the way to the 4 KiB page at `va` by a copy that
    /// this page table owns. Nothing translates differently, and what hangs off the way stays
    /// borrowed. Afterwards the neighbourhood (2 MiB) of `va` is edited like any other.
    ///
    /// One table is copied for each borrowed level, which is at most three.
    ///
    /// Unlike before, changes that the lender makes there are no longer seen here.
    ///
    /// # Errors
    ///
    /// [`OutOfTables`]; levels above the one that failed are owned then, and nothing
    /// translates differently.
    pub fn own_way(&self, va: GuestVirt) -> Result<Flush, OutOfTables> {
        let mut flush = Flush::nothing();
        if !va.is_canonical(Self::WIDTH) {
            return Ok(flush);
        }
        let mut table = self.root;
        let mut level = Self::ROOT_LEVEL;
        while let Some(below) = level.below() {
            let index = level.index(va);
            let entry = Entry(self.memory.read(table, index));
            if entry.kind(level) != EntryKind::Link {
                break;
            }
            if entry.is_borrowed() {
                let own = self.copy_of(entry.table(), below)?;
                match self
                    .memory
                    .compare_exchange(table, index, entry.0, Entry::link(own).0)
                {
                    // CPUs may remember the way through the borrowed table.
                    Ok(_) => flush = Flush::everything(),
                    Err(_) => {
                        // Never linked, so no CPU can have seen it. Look again.
                        self.tables.free_table(own);
                        continue;
                    }
                }
            }
            table = Entry(self.memory.read(table, index)).table();
            level = below;
        }
        Ok(flush)
    }

    /// A table with the same entries, whose links are marked as borrowed.
    fn copy_of(&self, table: GuestPhys, level: Level) -> Result<GuestPhys, OutOfTables> {
        let copy = self.tables.allocate_table().ok_or(OutOfTables)?;
        for index in 0..ENTRIES {
            let entry = Entry(self.memory.read(table, index));
            if entry.is_empty() {
                continue;
            }
            let entry = match entry.kind(level) {
                EntryKind::Link => Entry((entry.0 | Entry::BORROWED) & !Entry::LENT),
                _ => entry,
            };
            self.memory.write(copy, index, entry.0);
        }
        Ok(copy)
    }
}
