//! Adding mappings.

#![forbid(unsafe_code)]

use super::{Entry, EntryKind, FrameAllocator, Leaf, Level, PageTable, PteFlags, TableMemory};
use crate::addr::{GuestPhys, GuestVirt, PageSize, VirtRange};

/// Why a mapping was not made. Where the mapping is of a range, the pages
/// below the address in the error have been mapped; unmap them to undo it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The range has addresses that the page table cannot translate.
    #[error("{range} is not canonical: it has more bits than the page table translates")]
    NonCanonical {
        /// The range that was asked for.
        range: VirtRange,
    },
    /// An address or the length is no multiple of the page size.
    #[error("mapping {va} to {pa} needs both to be multiples of {size}, and the length too")]
    Unaligned {
        /// The virtual address.
        va: GuestVirt,
        /// The physical address.
        pa: GuestPhys,
        /// The page size asked for; of a range, 4 KiB.
        size: PageSize,
    },
    /// The physical side of the range runs beyond 52 bits.
    #[error("{bytes:#x} bytes from physical address {pa} on run beyond 52 bits")]
    BeyondPhysical {
        /// The first physical address.
        pa: GuestPhys,
        /// The length that was asked for.
        bytes: u64,
    },
    /// A page is mapped there already, present or parked; unmap it first.
    #[error("{va} is mapped already, to {} ({} page); unmap it first", leaf.page(), leaf.size)]
    AlreadyMapped {
        /// The address that was to be mapped.
        va: GuestVirt,
        /// What maps it.
        leaf: Leaf,
    },
    /// A large page was asked for where a table of smaller pages is; it may be
    /// empty.
    #[error("a table of smaller pages is where the {size} page at {va} should go; unmap and prune")]
    TableInTheWay {
        /// The address that was to be mapped.
        va: GuestVirt,
        /// The page size asked for.
        size: PageSize,
    },
    /// The allocator had no frame for a table of this level.
    #[error("no frame is left for a page table (to map {va}); free some or enlarge their pool")]
    OutOfTables {
        /// The address that was to be mapped.
        va: GuestVirt,
    },
    /// The address is in a table that belongs to another page table; edit that
    /// one.
    #[error("{va} is in tables borrowed from another page table; map it there")]
    Borrowed {
        /// The address that was to be mapped.
        va: GuestVirt,
    },
    /// There is an entry on the way that makes no sense.
    #[error("the {level:?} entry {entry:?} on the way to {va} is malformed")]
    Malformed {
        /// The address that was to be mapped.
        va: GuestVirt,
        /// The level of the entry.
        level: Level,
        /// The entry.
        entry: Entry,
    },
}

/// The table that the last page went into, so that its neighbours need no walk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    table: GuestPhys,
    level: Level,
    /// The addresses that the table covers, shifted right to an ordinal.
    ordinal: u64,
}

impl Place {
    fn ordinal(level: Level, va: GuestVirt) -> u64 {
        va.as_u64() >> (level.shift() + 9)
    }

    fn covers(self, level: Level, va: GuestVirt) -> bool {
        self.level == level && self.ordinal == Self::ordinal(level, va)
    }
}

impl<M: TableMemory, A: FrameAllocator, const LEVELS: u8> PageTable<M, A, LEVELS> {
    /// Maps one page of `size` at `va` to `pa`. Give [`PteFlags::PRESENT`]
    /// unless the page is to be parked. Tables that are missing are made.
    ///
    /// No flush is needed.
    ///
    /// # Errors
    ///
    /// [`MapError`]; then nothing is mapped.
    pub fn map(
        &self,
        va: GuestVirt,
        pa: GuestPhys,
        size: PageSize,
        flags: PteFlags,
    ) -> Result<(), MapError> {
        if !va.is_canonical(Self::WIDTH) {
            return Err(MapError::NonCanonical {
                range: VirtRange::page(va, size),
            });
        }
        if !va.is_aligned(size) || !pa.is_aligned(size) {
            return Err(MapError::Unaligned { va, pa, size });
        }
        self.place(&mut None, va, size, Entry::leaf(pa, size, flags))
    }

    /// Maps `range` to the physical addresses from `pa` on, with the largest
    /// pages that fit and are not larger than `largest`. Where a table of
    /// smaller pages exists already, its pages are used.
    ///
    /// No flush is needed.
    ///
    /// # Errors
    ///
    /// [`MapError`]; the pages below the address in the error are mapped. Of
    /// the errors that concern the whole range, nothing is mapped.
    pub fn map_range(
        &self,
        range: VirtRange,
        pa: GuestPhys,
        largest: PageSize,
        flags: PteFlags,
    ) -> Result<(), MapError> {
        if !Self::is_canonical(range) {
            return Err(MapError::NonCanonical { range });
        }
        let va = range.start();
        if !range.is_aligned(PageSize::Size4KiB) || !pa.is_aligned(PageSize::Size4KiB) {
            return Err(MapError::Unaligned {
                va,
                pa,
                size: PageSize::Size4KiB,
            });
        }
        let beyond = MapError::BeyondPhysical {
            pa,
            bytes: range.bytes(),
        };
        if range.last().is_some_and(|last| {
            last.distance_from(va)
                .and_then(|distance| pa.checked_add(distance))
                .is_none()
        }) {
            return Err(beyond);
        }

        let mut place = None;
        let mut done = 0;
        while done < range.bytes() {
            let left = range.bytes() - done;
            let at = GuestVirt::new_truncate(va.as_u64() + done);
            let to = GuestPhys::new_truncate(pa.as_u64() + done);
            let mut size = largest;
            loop {
                let fits = size.bytes() <= left && at.is_aligned(size) && to.is_aligned(size);
                let result = if fits {
                    self.place(&mut place, at, size, Entry::leaf(to, size, flags))
                } else {
                    Err(MapError::TableInTheWay { va: at, size })
                };
                match (result, size.smaller()) {
                    (Ok(()), _) => break,
                    (Err(MapError::TableInTheWay { .. }), Some(smaller)) => size = smaller,
                    (Err(error), _) => return Err(error),
                }
            }
            done += size.bytes();
        }
        Ok(())
    }

    /// Writes a leaf where nothing is mapped, making the tables on the way.
    pub(super) fn place(
        &self,
        last: &mut Option<Place>,
        va: GuestVirt,
        size: PageSize,
        leaf: Entry,
    ) -> Result<(), MapError> {
        let level = Level::of(size);
        let table = match *last {
            Some(place) if place.covers(level, va) => place.table,
            _ => {
                let table = self.make_way(va, level)?;
                *last = Some(Place {
                    table,
                    level,
                    ordinal: Place::ordinal(level, va),
                });
                table
            }
        };
        match self
            .memory
            .compare_exchange(table, level.index(va), 0, leaf.0)
        {
            Ok(_) => Ok(()),
            Err(found) => Err(Self::occupied(va, level, Entry(found))),
        }
    }

    /// The error for an entry that is not empty at the level where a leaf
    /// should go.
    fn occupied(va: GuestVirt, level: Level, entry: Entry) -> MapError {
        match (entry.kind(level), level.page_size()) {
            (EntryKind::Leaf(size), _) => MapError::AlreadyMapped {
                va,
                leaf: Leaf {
                    va: va.align_down(size),
                    size,
                    entry,
                },
            },
            (EntryKind::Link, Some(size)) => MapError::TableInTheWay { va, size },
            _ => MapError::Malformed { va, level, entry },
        }
    }

    /// The table of `level` for `va`; made, with those above it, if missing.
    fn make_way(&self, va: GuestVirt, target: Level) -> Result<GuestPhys, MapError> {
        let mut table = self.root;
        let mut level = Self::ROOT_LEVEL;
        while level > target {
            let index = level.index(va);
            let mut entry = Entry(self.memory.read(table, index));
            if entry.is_empty() {
                entry = self.link_new_table(va, table, index)?;
            }
            match (entry.kind(level), level.below()) {
                (EntryKind::Link, _) if entry.is_borrowed() => {
                    return Err(MapError::Borrowed { va });
                }
                (EntryKind::Link, Some(below)) => {
                    table = entry.table();
                    level = below;
                }
                _ => return Err(Self::occupied(va, level, entry)),
            }
        }
        Ok(table)
    }

    /// Links an empty table at an empty entry; returns what the entry then is,
    /// which another thread may have had a hand in.
    fn link_new_table(
        &self,
        va: GuestVirt,
        table: GuestPhys,
        index: usize,
    ) -> Result<Entry, MapError> {
        let new = self
            .tables
            .allocate_table()
            .ok_or(MapError::OutOfTables { va })?;
        match self
            .memory
            .compare_exchange(table, index, 0, Entry::link(new).0)
        {
            Ok(_) => Ok(Entry::link(new)),
            Err(winner) => {
                // Never linked, so no CPU can have seen it.
                self.tables.free_table(new);
                Ok(Entry(winner))
            }
        }
    }
}
