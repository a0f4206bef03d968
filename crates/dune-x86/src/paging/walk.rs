//! Reading page tables.

#![forbid(unsafe_code)]

use super::{
    ENTRIES, Entry, EntryKind, FrameAllocator, Leaf, Level, PageTable, PteFlags, Slot, TableMemory,
};
use crate::addr::{GuestPhys, GuestVirt, VirtRange};

/// One entry that a walk read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The level of the table.
    pub level: Level,
    /// The table.
    pub table: GuestPhys,
    /// The index of the entry in the table.
    pub index: usize,
    /// The entry.
    pub entry: Entry,
}

/// How a walk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkEnd {
    /// At a leaf; look at [`Leaf::is_present`] before believing it.
    Leaf(Leaf),
    /// At an empty entry of this level.
    Empty(Level),
    /// At an entry of this level that the CPU would fault on (see
    /// [`EntryKind::Malformed`]).
    Malformed(Level),
    /// Before it began: the address has more bits than the page table
    /// translates.
    NonCanonical,
}

/// What the CPU allows at an address: the sum of all levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// R/W is set at every level.
    pub writable: bool,
    /// U/S is set at every level.
    pub user: bool,
    /// NX is clear at every level.
    pub executable: bool,
    /// The protection key, which the leaf alone has.
    pub pkey: u8,
}

/// The entries on the way to an address.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    va: GuestVirt,
    steps: [Step; 5],
    taken: usize,
    end: WalkEnd,
}

impl Walk {
    /// The entries read, the root's first.
    pub fn steps(&self) -> &[Step] {
        self.steps.get(..self.taken).unwrap_or(&self.steps)
    }

    /// How the walk ended.
    pub const fn end(&self) -> WalkEnd {
        self.end
    }

    /// The leaf, present or parked.
    pub const fn leaf(&self) -> Option<Leaf> {
        match self.end {
            WalkEnd::Leaf(leaf) => Some(leaf),
            _ => None,
        }
    }

    /// The leaf, if it is present.
    pub fn present_leaf(&self) -> Option<Leaf> {
        self.leaf().filter(Leaf::is_present)
    }

    /// The physical address that the virtual address translates to, if its
    /// page is present.
    pub fn translation(&self) -> Option<GuestPhys> {
        let leaf = self.present_leaf()?;
        leaf.page().checked_add(self.va.page_offset(leaf.size))
    }

    /// What the CPU allows, if the page is present (SDM vol. 3A section 4.6,
    /// APM vol. 2 section 5.6).
    pub fn permissions(&self) -> Option<Permissions> {
        let leaf = self.present_leaf()?;
        let both = |a: u64, step: &Step| a & step.entry.0;
        let either = |a: u64, step: &Step| a | step.entry.0;
        let all = self.steps().iter().fold(u64::MAX, both);
        let any = self.steps().iter().fold(0, either);
        Some(Permissions {
            writable: all & PteFlags::WRITABLE.bits() != 0,
            user: all & PteFlags::USER.bits() != 0,
            executable: any & PteFlags::NO_EXECUTE.bits() == 0,
            pkey: leaf.flags().pkey(),
        })
    }
}

impl<M: TableMemory, A: FrameAllocator, const LEVELS: u8> PageTable<M, A, LEVELS> {
    /// Reads the entries on the way to `va`.
    pub fn walk(&self, va: GuestVirt) -> Walk {
        let nowhere = Step {
            level: Self::ROOT_LEVEL,
            table: self.root,
            index: 0,
            entry: Entry::EMPTY,
        };
        let mut walk = Walk {
            va,
            steps: [nowhere; 5],
            taken: 0,
            end: WalkEnd::NonCanonical,
        };
        if !va.is_canonical(Self::WIDTH) {
            return walk;
        }
        let mut table = self.root;
        let mut level = Self::ROOT_LEVEL;
        for step in &mut walk.steps {
            let index = level.index(va);
            let entry = Entry(self.memory.read(table, index));
            *step = Step {
                level,
                table,
                index,
                entry,
            };
            walk.taken += 1;
            walk.end = match (entry.kind(level), level.below()) {
                (EntryKind::Link, Some(below)) => {
                    table = entry.table();
                    level = below;
                    continue;
                }
                (EntryKind::Leaf(size), _) => WalkEnd::Leaf(Leaf {
                    va: va.align_down(size),
                    size,
                    entry,
                }),
                (EntryKind::Empty, _) => WalkEnd::Empty(level),
                (EntryKind::Link | EntryKind::Malformed, _) => WalkEnd::Malformed(level),
            };
            break;
        }
        walk
    }

    /// The physical address that `va` translates to, if its page is present.
    #[inline]
    pub fn translate(&self, va: GuestVirt) -> Option<GuestPhys> {
        let leaf = self.leaf(va).filter(Leaf::is_present)?;
        leaf.page().checked_add(va.page_offset(leaf.size))
    }

    /// The leaf that maps `va`, present or parked.
    #[inline]
    pub fn leaf(&self, va: GuestVirt) -> Option<Leaf> {
        if !va.is_canonical(Self::WIDTH) {
            return None;
        }
        let slot = self.slot(va);
        match slot.kind() {
            EntryKind::Leaf(size) => Some(Leaf {
                va: va.align_down(size),
                size,
                entry: slot.entry,
            }),
            _ => None,
        }
    }

    /// Where the entry for the 4 KiB page at `va` is, if a table for it exists
    /// that this page table owns: the fast way to edit one page (see
    /// [`PageTable::update_entry_4k`]). The entry itself may be empty.
    ///
    /// The place stays valid until the next [`PageTable::prune`],
    /// [`PageTable::collapse`] or [`PageTable::free`].
    #[inline(always)]
    pub fn leaf_entry_4k(&self, va: GuestVirt) -> Option<(GuestPhys, usize)> {
        // One mask tells a link that may be followed from everything else.
        const TESTED: u64 = PteFlags::PRESENT.bits() | Entry::PAGE_SIZE | Entry::BORROWED;
        if !va.is_canonical(Self::WIDTH) {
            return None;
        }
        let mut table = self.root;
        let mut shift = Self::ROOT_LEVEL.shift();
        while shift > Level::Pt.shift() {
            let index = ((va.as_u64() >> shift) & 0x1ff) as usize;
            let entry = self.memory.read(table, index);
            if entry & TESTED != PteFlags::PRESENT.bits() {
                return None;
            }
            table = Entry(entry).table();
            shift -= 9;
        }
        Some((table, Level::Pt.index(va)))
    }

    /// Shows `visit` every leaf, present or parked, that maps part of `range`,
    /// in ascending order; a page that reaches beyond the range is shown once,
    /// whole. Leaves in borrowed tables are shown too. Addresses that the page
    /// table cannot translate have none.
    pub fn for_each_leaf(&self, range: VirtRange, mut visit: impl FnMut(Leaf)) {
        if !Self::is_canonical(range) {
            return;
        }
        let Some(last) = range.last() else { return };
        let mut at = range.start();
        let mut slot = self.slot(at);
        loop {
            if let EntryKind::Leaf(size) = slot.kind() {
                visit(Leaf {
                    va: slot.base(at),
                    size,
                    entry: slot.entry,
                });
            }
            match self.next_slot(slot, at, last) {
                Some((next, va)) => (slot, at) = (next, va),
                None => return,
            }
        }
    }

    /// Shows `visit` every present leaf in `range` with its accessed and dirty
    /// bits ([`Leaf::flags`]), without changing them.
    pub fn accessed_dirty(&self, range: VirtRange, mut visit: impl FnMut(Leaf)) {
        self.for_each_leaf(range, |leaf| {
            if leaf.is_present() {
                visit(leaf);
            }
        });
    }

    /// The entry that decides about `va`, which is canonical.
    #[inline]
    pub(super) fn slot(&self, va: GuestVirt) -> Slot {
        let mut slot = self.entry_of(self.root, Self::ROOT_LEVEL, va, false);
        while let (EntryKind::Link, Some(below)) = (slot.kind(), slot.level.below()) {
            let borrowed = slot.borrowed || slot.entry.is_borrowed();
            slot = self.entry_of(slot.entry.table(), below, va, borrowed);
        }
        slot
    }

    #[inline]
    fn entry_of(&self, table: GuestPhys, level: Level, va: GuestVirt, borrowed: bool) -> Slot {
        let index = level.index(va);
        Slot {
            table,
            index,
            level,
            entry: Entry(self.memory.read(table, index)),
            borrowed,
        }
    }

    /// The slot after `slot`, and its first address, if that is not beyond
    /// `last`.
    #[inline]
    pub(super) fn next_slot(
        &self,
        slot: Slot,
        at: GuestVirt,
        last: GuestVirt,
    ) -> Option<(Slot, GuestVirt)> {
        let next = slot.next_base(at);
        // Zero: the end of the address space was reached.
        if next == 0 || next > last.as_u64() {
            return None;
        }
        let va = GuestVirt::new_truncate(next);
        let index = slot.index + 1;
        if index < ENTRIES {
            // A neighbour in the same table, as a rule: no walk from the root.
            let entry = Entry(self.memory.read(slot.table, index));
            let neighbour = Slot {
                index,
                entry,
                ..slot
            };
            if neighbour.kind() != EntryKind::Link {
                return Some((neighbour, va));
            }
        }
        Some((self.slot(va), va))
    }
}
