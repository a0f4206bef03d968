//! Giving tables back: emptied ones, merged ones, and all of them.
//!
//! A CPU may hold a link to a table in its paging-structure caches after the
//! link is gone from memory, so a table is freed only after a flush. Until then
//! the unlinked tables form a list through their own first entries, with P clear
//! so that a CPU that still gets there finds nothing:
//!
//! ```text
//!   dead -> [next | NEXT, 0, 0, ...] -> [next | NEXT, 0, ...] -> [0, 0, ...]
//! ```

#![forbid(unsafe_code)]

use super::{
    ENTRIES, Entry, EntryKind, FlushTlb, FrameAllocator, Level, PageTable, PteFlags, TableMemory,
};
use crate::addr::{GuestPhys, GuestVirt, PageSize, VirtRange};

/// Why pages were not merged into a larger one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollapseError {
    /// There is no larger page than 1 GiB and none smaller than 4 KiB to merge
    /// into.
    #[error("pages can be merged into 2 MiB or 1 GiB, not into {size}")]
    NoSuchMerge {
        /// The size asked for.
        size: PageSize,
    },
    /// There is no table of pages of the next smaller size at the address: a
    /// page as large is there already, or nothing.
    #[error("no table of smaller pages is at {va}")]
    NoTable {
        /// The address.
        va: GuestVirt,
    },
    /// The table belongs to another page table; merge its pages there.
    #[error("{va} is in tables borrowed from another page table; merge it there")]
    Borrowed {
        /// The address.
        va: GuestVirt,
    },
    /// The pages do not make up one large page: there is a gap, a physical
    /// address out of order, a page split further, or different attributes.
    #[error("the page at {va} does not continue the large page that would start at {base}")]
    NotUniform {
        /// Where the large page would start.
        base: GuestVirt,
        /// The first page that does not fit in.
        va: GuestVirt,
    },
}

/// Marks an entry that holds the address of the next dead table, which may be
/// 0. Any bit but P will do.
const NEXT: u64 = 1 << 1;

/// The A and D bits: they may differ between pages that are merged.
const ACCESSED_DIRTY: u64 = PteFlags::ACCESSED.bits() | PteFlags::DIRTY.bits();

impl<M: TableMemory, A: FrameAllocator, const LEVELS: u8> PageTable<M, A, LEVELS> {
    /// Frees the tables in and around `range` that map nothing, after a flush
    /// of everything where there are any. Returns the number of tables freed.
    ///
    /// Tables lent to another page table at the top level stay.
    pub fn prune(&mut self, range: VirtRange, tlb: &(impl FlushTlb + ?Sized)) -> u64 {
        let Some(last) = range.last() else { return 0 };
        if !Self::is_canonical(range) {
            return 0;
        }
        // Bottom up: a directory may be empty once its tables are gone.
        let mut dead = None;
        let mut parent = Level::Pt;
        while let Some(level) = above(parent, Self::ROOT_LEVEL) {
            parent = level;
            self.unlink_empty_tables(range.start(), last, parent, &mut dead);
        }
        if dead.is_none() {
            return 0;
        }
        tlb.flush_all();
        self.free_list(dead)
    }

    /// Unlinks the empty tables that entries of level `parent` link to.
    fn unlink_empty_tables(
        &self,
        first: GuestVirt,
        last: GuestVirt,
        parent: Level,
        dead: &mut Option<GuestPhys>,
    ) {
        let mut at = first;
        loop {
            // Down to the parent's level, or to where the way ends.
            let mut table = self.root;
            let mut level = Self::ROOT_LEVEL;
            let mut index = level.index(at);
            let mut entry = Entry(self.memory.read(table, index));
            while level > parent && entry.kind(level) == EntryKind::Link && !entry.is_borrowed() {
                let Some(below) = level.below() else { break };
                table = entry.table();
                level = below;
                index = level.index(at);
                entry = Entry(self.memory.read(table, index));
            }
            let kept = entry.0 & (Entry::BORROWED | Entry::LENT) != 0;
            if level == parent
                && entry.kind(level) == EntryKind::Link
                && !kept
                && self.is_table_empty(entry.table())
                && self.replace_link(table, index, entry, Entry::EMPTY)
            {
                self.bury(entry.table(), dead);
            }
            let next = (at.as_u64() | (level.entry_bytes() - 1)).wrapping_add(1);
            if next == 0 || next > last.as_u64() {
                return;
            }
            at = GuestVirt::new_truncate(next);
        }
    }

    /// Merges the pages of the next smaller size that make up the page of size
    /// `into` at `va` into one, and frees their table after flushing. They must
    /// be physically contiguous and alike in everything but A and D; the large
    /// page is accessed or dirty when any of them was.
    ///
    /// At no time is the memory not mapped, and no dirty bit is lost.
    ///
    /// # Errors
    ///
    /// [`CollapseError`]; then nothing has changed.
    pub fn collapse(
        &mut self,
        va: GuestVirt,
        into: PageSize,
        tlb: &(impl FlushTlb + ?Sized),
    ) -> Result<(), CollapseError> {
        let Some(part_size) = into.smaller() else {
            return Err(CollapseError::NoSuchMerge { size: into });
        };
        if !va.is_canonical(Self::WIDTH) {
            return Err(CollapseError::NoTable { va });
        }
        let target = Level::of(into);
        let mut table = self.root;
        let mut level = Self::ROOT_LEVEL;
        let link = loop {
            let entry = Entry(self.memory.read(table, level.index(va)));
            if entry.kind(level) != EntryKind::Link {
                return Err(CollapseError::NoTable { va });
            }
            if entry.is_borrowed() {
                return Err(CollapseError::Borrowed { va });
            }
            if level == target {
                break entry;
            }
            let Some(below) = level.below() else {
                return Err(CollapseError::NoTable { va });
            };
            table = entry.table();
            level = below;
        };
        let index = target.index(va);
        let base = va.align_down(into);
        let parts = link.table();
        let leaf = self.merged(parts, base, part_size, into)?;

        if !self.replace_link(table, index, link, leaf) {
            return Err(CollapseError::NoTable { va });
        }
        // The CPU may have gone on setting A and D in the parts, through the
        // link it had cached, until this flush is done. Then they are final.
        tlb.flush_range(VirtRange::page(base, into), part_size);
        let late = (0..ENTRIES).fold(0, |bits, part| bits | self.memory.read(parts, part));
        let mut old = leaf;
        while old.kind(target) == EntryKind::Leaf(into) && old.0 | (late & ACCESSED_DIRTY) != old.0
        {
            let new = Entry(old.0 | (late & ACCESSED_DIRTY));
            match self.memory.compare_exchange(table, index, old.0, new.0) {
                Ok(_) => break,
                Err(found) => old = Entry(found),
            }
        }
        self.tables.free_table(parts);
        Ok(())
    }

    /// The large leaf that the entries of a table amount to.
    fn merged(
        &self,
        parts: GuestPhys,
        base: GuestVirt,
        part_size: PageSize,
        into: PageSize,
    ) -> Result<Entry, CollapseError> {
        let wrong = |part: usize| CollapseError::NotUniform {
            base,
            va: GuestVirt::new_truncate(base.as_u64() + ((part as u64) << part_size.shift())),
        };
        let first = Entry(self.memory.read(parts, 0));
        if first.kind(Level::of(part_size)) != EntryKind::Leaf(part_size)
            || !first.page(part_size).is_aligned(into)
        {
            return Err(wrong(0));
        }
        // Bits outside of PteFlags are for the user of the page table to know;
        // they are taken over where all the parts agree on them.
        let other = first.0 & !Entry::ADDRESS & !PteFlags::all().bits();
        let flags = first.flags(part_size);
        let whole = Entry(Entry::leaf(first.page(part_size), into, flags).0 | other);
        let mut seen = 0;
        for index in 0..ENTRIES {
            let part = Entry(self.memory.read(parts, index));
            let expected = whole.part(into, index).unwrap_or(Entry::EMPTY);
            if (part.0 ^ expected.0) & !(ACCESSED_DIRTY | Entry::LEAF) != 0 {
                return Err(wrong(index));
            }
            seen |= part.0 & ACCESSED_DIRTY;
        }
        Ok(Entry(whole.0 | seen))
    }

    /// Frees all that the root reaches without crossing a borrowed link, and
    /// the root.
    pub(super) fn free_owned_tables(&self) -> u64 {
        // The way down to the table being emptied, and where to go on in each
        // table of it.
        let mut way = [(self.root, 0_usize); 5];
        let mut depth = 0_usize;
        let mut freed = 0;
        while let Some((table, index)) = way.get_mut(depth) {
            let level = below_root(Self::ROOT_LEVEL, depth);
            if level != Level::Pt
                && let Some(found) = self.memory.next_owned(*table, *index)
            {
                let entry = Entry(self.memory.read(*table, found));
                *index = found + 1;
                if entry.kind(level) == EntryKind::Link
                    && let Some(next) = way.get_mut(depth + 1)
                {
                    *next = (entry.table(), 0);
                    depth += 1;
                }
                continue;
            }
            self.tables.free_table(*table);
            freed += 1;
            match depth.checked_sub(1) {
                Some(up) => depth = up,
                None => break,
            }
        }
        freed
    }

    fn is_table_empty(&self, table: GuestPhys) -> bool {
        (0..ENTRIES).all(|index| self.memory.read(table, index) == 0)
    }

    /// Replaces a link that only the CPU changes meanwhile (it sets A). Returns
    /// whether that is how it was: if not, the entry is left alone.
    #[must_use]
    fn replace_link(&self, table: GuestPhys, index: usize, link: Entry, new: Entry) -> bool {
        const ACCESSED: u64 = PteFlags::ACCESSED.bits();
        let mut old = link;
        loop {
            match self.memory.compare_exchange(table, index, old.0, new.0) {
                Ok(_) => return true,
                Err(found) if (found ^ old.0) == ACCESSED => old = Entry(found),
                Err(_) => return false,
            }
        }
    }

    /// Puts an unlinked table on the list of those to be freed.
    fn bury(&self, table: GuestPhys, dead: &mut Option<GuestPhys>) {
        self.memory
            .write(table, 0, dead.map_or(0, |next| next.as_u64() | NEXT));
        *dead = Some(table);
    }

    /// Frees the tables on the list.
    fn free_list(&self, mut dead: Option<GuestPhys>) -> u64 {
        let mut freed = 0;
        while let Some(table) = dead {
            let next = self.memory.read(table, 0);
            dead = (next != 0).then_some(Entry(next).table());
            self.tables.free_table(table);
            freed += 1;
        }
        freed
    }
}

/// The level above `level`, up to the root's.
fn above(level: Level, root: Level) -> Option<Level> {
    [Level::Pd, Level::Pdpt, Level::Pml4, Level::Pml5]
        .into_iter()
        .find(|&upper| upper.below() == Some(level) && upper <= root)
}

/// The level `depth` below the root.
fn below_root(root: Level, depth: usize) -> Level {
    let mut level = root;
    for _ in 0..depth {
        level = level.below().unwrap_or(Level::Pt);
    }
    level
}
