//! Looking at the accessed and dirty bits of a stretch of page tables, as arrays.
//!
//! One entry is 8 bytes, so a page table is 64 cache lines. Eight entries are or-ed together
//! at a time; only where that shows the bit are they told apart, and only those that have it
//! are written to. A clean page costs some two instructions, a dirty one some ten.

use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use dune_x86::addr::{GuestPhys, GuestVirt};
use dune_x86::paging::{ENTRIES, Entry, EntryKind, Level};

use super::set::{Bits, WORD, valid_bits};

/// A bit for each of eight entries.
const EIGHT: u64 = 0xff;

/// Where tables are found.
pub(super) trait TableSource {
    /// The entries of the table at a guest physical address; `None` where it is out of reach.
    fn table(&self, at: GuestPhys) -> Option<&[AtomicU64; ENTRIES]>;
}

/// Which bit a scan looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// D: the page was written.
    Dirty,
    /// A: the page was used.
    Accessed,
}

impl Mark {
    pub(super) const fn bit(self) -> u64 {
        match self {
            Self::Accessed => 1 << 5,
            Self::Dirty => 1 << 6,
        }
    }
}

/// What becomes of the bits that are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// They are cleared; the TLBs must be flushed.
    Cleared,
    /// They stay.
    Kept,
}

/// What is said of memory that no entry maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Absent {
    /// Nobody can have used it.
    Unmarked,
    /// It counts as marked: the entry that told is gone.
    Marked,
}

/// What is told of a scan, piece by piece, in ascending order.
pub(super) trait Sink {
    /// Pages of 4 KiB: bit `n` of `mask` is page `first + n`; `first` is a multiple of 64.
    fn word(&mut self, first: u64, mask: u64);
    /// A larger page, as pages of 4 KiB.
    fn large(&mut self, pages: Range<u64>);
    /// Memory without an entry, if that counts as marked.
    fn absent(&mut self, pages: Range<u64>);
}

/// What a scan does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scan {
    pub(super) mark: Mark,
    pub(super) found: Found,
    pub(super) absent: Absent,
}

/// The entry that decides about a page.
enum Place<'a> {
    /// One of a page table.
    Small(&'a [AtomicU64; ENTRIES]),
    /// A leaf that maps so many pages of 4 KiB.
    Large(&'a AtomicU64, u64),
    /// Nothing maps it, nor any of so many pages.
    Nothing(u64),
}

fn locate<S: TableSource>(source: &S, root: GuestPhys, page: u64) -> Place<'_> {
    let address = GuestVirt::new_truncate(page << 12);
    let (mut at, mut level) = (root, Level::Pml4);
    loop {
        let pages = level.entry_bytes() >> 12;
        let Some(table) = source.table(at) else {
            return Place::Nothing(pages);
        };
        if level == Level::Pt {
            return Place::Small(table);
        }
        let Some(entry) = table.get(level.index(address)) else {
            return Place::Nothing(pages);
        };
        let value = Entry(entry.load(Ordering::Acquire));
        match (value.kind(level), level.below()) {
            (EntryKind::Link, Some(below)) => (at, level) = (value.table(), below),
            (EntryKind::Leaf(_), _) => return Place::Large(entry, pages),
            _ => return Place::Nothing(pages),
        }
    }
}

impl Scan {
    /// Looks at the entries of `pages` (numbers of pages of 4 KiB, below 2^35). A larger page
    /// partly among them is treated whole.
    pub(super) fn run<S: TableSource>(
        self,
        source: &S,
        root: GuestPhys,
        pages: Range<u64>,
        sink: &mut impl Sink,
    ) {
        let mut page = pages.start;
        while page < pages.end {
            let last_of = |count: u64| (page | (count - 1)) + 1;
            match locate(source, root, page) {
                Place::Small(table) => {
                    let until = last_of(ENTRIES as u64).min(pages.end);
                    self.small(table, page..until, sink);
                    page = until;
                }
                Place::Large(entry, count) => {
                    if entry.load(Ordering::Relaxed) & self.mark.bit() != 0 {
                        if self.found == Found::Cleared {
                            // Should another thread have split the page since: bits 5 and 6 of
                            // a link decide nothing, and the parts inherited the mark.
                            entry.fetch_and(!self.mark.bit(), Ordering::AcqRel);
                        }
                        sink.large(page & !(count - 1)..last_of(count));
                    }
                    page = last_of(count);
                }
                Place::Nothing(count) => {
                    let until = last_of(count).min(pages.end);
                    if self.absent == Absent::Marked {
                        sink.absent(page..until);
                    }
                    page = until;
                }
            }
        }
    }

    /// `pages` lie in one table.
    fn small(self, table: &[AtomicU64; ENTRIES], pages: Range<u64>, sink: &mut impl Sink) {
        let bit = self.mark.bit();
        for first in (pages.start & !(WORD - 1)..pages.end).step_by(WORD as usize) {
            let index = (first % ENTRIES as u64) as usize;
            let Some(entries) = table.get(index..index + WORD as usize) else {
                return;
            };
            let valid = valid_bits(first, &pages);
            let mut mask = 0;
            // The next eight neighbours are likely as the last: none, all, or some.
            let mut some = 0;
            for (group, eight) in entries.chunks_exact(8).enumerate() {
                let load = |entry: &AtomicU64| entry.load(Ordering::Relaxed);
                if some == 0 {
                    if eight.iter().fold(0, |any, entry| any | load(entry)) & bit == 0 {
                        continue;
                    }
                    some = marked(eight, bit);
                } else if some != EIGHT
                    || eight.iter().fold(bit, |all, entry| all & load(entry)) == 0
                {
                    some = marked(eight, bit);
                }
                mask |= some << (group * 8);
            }
            mask &= valid;
            if mask != 0 {
                if self.found == Found::Cleared {
                    clear(entries, mask, bit);
                }
                sink.word(first, mask);
            }
            if self.absent == Absent::Marked {
                for bit in Bits(empty(entries) & valid) {
                    let page = first + u64::from(bit);
                    sink.absent(page..page + 1);
                }
            }
        }
    }
}

/// Which entries have the bit.
#[inline]
fn marked(eight: &[AtomicU64], bit: u64) -> u64 {
    let gathered = eight.iter().enumerate().fold(0, |mask, (index, entry)| {
        mask | (entry.load(Ordering::Relaxed) & bit) << index
    });
    gathered >> bit.trailing_zeros()
}

/// Which entries map nothing.
#[cold]
fn empty(entries: &[AtomicU64]) -> u64 {
    entries.iter().enumerate().fold(0, |mask, (index, entry)| {
        mask | u64::from(entry.load(Ordering::Relaxed) == 0) << index
    })
}

/// Takes the bit out of the entries that had it: a locked AND each, so that no bit that the
/// CPU sets in the same entry is lost. A bit that it sets between the look and this is
/// cleared with the others: the page is among those found anyway.
#[inline]
fn clear(entries: &[AtomicU64], mask: u64, bit: u64) {
    if mask == u64::MAX {
        for entry in entries {
            entry.fetch_and(!bit, Ordering::Relaxed);
        }
        return;
    }
    for index in Bits(mask) {
        if let Some(entry) = entries.get(index as usize) {
            entry.fetch_and(!bit, Ordering::Relaxed);
        }
    }
}

/// Sets bits in every leaf that maps one of `pages`, present or parked. No lock, no
/// allocation.
pub(super) fn set<S: TableSource>(source: &S, root: GuestPhys, pages: Range<u64>, bits: u64) {
    let mut page = pages.start;
    while page < pages.end {
        let last_of = |count: u64| (page | (count - 1)) + 1;
        page = match locate(source, root, page) {
            Place::Small(table) => {
                let until = last_of(ENTRIES as u64).min(pages.end);
                for page in page..until {
                    if let Some(entry) = table.get((page % ENTRIES as u64) as usize) {
                        set_entry(entry, Level::Pt, bits);
                    }
                }
                until
            }
            Place::Large(entry, count) => {
                let level = if count == ENTRIES as u64 {
                    Level::Pd
                } else {
                    Level::Pdpt
                };
                if !set_entry(entry, level, bits) {
                    // It was split meanwhile: its parts are looked at instead.
                    continue;
                }
                last_of(count)
            }
            Place::Nothing(count) => last_of(count),
        };
    }
}

/// `false` where the entry is a link by now.
fn set_entry(entry: &AtomicU64, level: Level, bits: u64) -> bool {
    let mut value = entry.load(Ordering::Relaxed);
    loop {
        match Entry(value).kind(level) {
            EntryKind::Leaf(_) if value & bits == bits => return true,
            EntryKind::Leaf(_) => {}
            kind => return kind != EntryKind::Link,
        }
        match entry.compare_exchange(value, value | bits, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => return true,
            Err(found) => value = found,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const PRESENT: u64 = 0b11;
    const LEAF: u64 = 1 << 7;

    /// Tables in a vector; the root is the first.
    struct Tables(Vec<Box<[AtomicU64; ENTRIES]>>);

    impl TableSource for Tables {
        fn table(&self, at: GuestPhys) -> Option<&[AtomicU64; ENTRIES]> {
            self.0
                .get((at.as_u64() >> 12) as usize)
                .map(|table| &**table)
        }
    }

    /// Three directories' worth of 2 MiB: two page tables, a large page, a hole; all in the
    /// first GiB.
    ///
    /// ```text
    ///   pages 0..512 small   512..1024 small   1024..1536 large   from 1536 nothing
    /// ```
    fn tables(small: &BTreeSet<u64>, large: bool, bit: u64) -> Tables {
        let table = || Box::new([const { AtomicU64::new(0) }; ENTRIES]);
        let tables = Tables((0..5).map(|_| table()).collect());
        let store = |table: usize, index: usize, value| {
            tables.0[table][index].store(value, Ordering::Relaxed);
        };
        for (from, to) in [(0, 1), (1, 2)] {
            store(from, 0, (to << 12) | PRESENT);
        }
        store(2, 0, (3 << 12) | PRESENT);
        store(2, 1, (4 << 12) | PRESENT);
        store(
            2,
            2,
            (2 << 21) | PRESENT | LEAF | if large { bit } else { 0 },
        );
        for page in 0..1024_u64 {
            let mark = if small.contains(&page) { bit } else { 0 };
            // The other marks are there to be left alone.
            let other = (Mark::Dirty.bit() | Mark::Accessed.bit()) & !bit;
            let (table, index) = (3 + page / 512, page % 512);
            store(
                table as usize,
                index as usize,
                (page << 12) | PRESENT | other | mark,
            );
        }
        tables
    }

    #[derive(Default)]
    struct Seen {
        marked: BTreeSet<u64>,
        absent: BTreeSet<u64>,
    }

    impl Sink for Seen {
        fn word(&mut self, first: u64, mask: u64) {
            self.marked
                .extend(Bits(mask).map(|bit| first + u64::from(bit)));
        }
        fn large(&mut self, pages: Range<u64>) {
            self.marked.extend(pages);
        }
        fn absent(&mut self, pages: Range<u64>) {
            self.absent.extend(pages);
        }
    }

    fn scan(tables: &Tables, pages: &Range<u64>, mark: Mark, found: Found, absent: Absent) -> Seen {
        let mut seen = Seen::default();
        Scan {
            mark,
            found,
            absent,
        }
        .run(tables, GuestPhys::ZERO, pages.clone(), &mut seen);
        seen
    }

    proptest! {
        #[test]
        fn a_scan_finds_and_clears_exactly_the_marked_entries_of_its_range(
            small in prop::collection::btree_set(0_u64..1024, 0..900),
            large: bool,
            start in 0_u64..1600,
            length in 0_u64..1600,
            dirty: bool,
        ) {
            let mark = if dirty { Mark::Dirty } else { Mark::Accessed };
            let tables = tables(&small, large, mark.bit());
            let pages = start..start + length;
            let mut expected: BTreeSet<_> = small.iter().copied().filter(|p| pages.contains(p)).collect();
            if large && pages.start < 1536 && pages.end > 1024 && length > 0 {
                expected.extend(1024..1536);
            }
            let kept = scan(&tables, &pages, mark, Found::Kept, Absent::Unmarked);
            prop_assert_eq!(&kept.marked, &expected);
            let seen = scan(&tables, &pages, mark, Found::Cleared, Absent::Marked);
            prop_assert_eq!(&seen.marked, &expected);
            prop_assert!(kept.absent.is_empty());
            prop_assert_eq!(seen.absent, (pages.start.max(1536)..pages.end.max(1536)).collect::<BTreeSet<_>>());
            prop_assert!(scan(&tables, &pages, mark, Found::Kept, Absent::Unmarked).marked.is_empty());
            // Outside the range all is as it was, and so is the other mark everywhere.
            let rest = scan(&tables, &(0..2000), mark, Found::Kept, Absent::Unmarked);
            let mut left: BTreeSet<u64> = small.clone();
            if large { left.extend(1024..1536); }
            prop_assert_eq!(rest.marked, left.difference(&expected).copied().collect::<BTreeSet<_>>());
            let other = if dirty { Mark::Accessed } else { Mark::Dirty };
            prop_assert_eq!(scan(&tables, &(0..1024), other, Found::Kept, Absent::Unmarked).marked.len(), 1024);
        }

        #[test]
        fn what_is_set_is_found(start in 0_u64..1600, length in 1_u64..1600) {
            let tables = tables(&BTreeSet::new(), false, Mark::Dirty.bit());
            set(&tables, GuestPhys::ZERO, start..start + length, Mark::Dirty.bit());
            let found = scan(&tables, &(0..2000), Mark::Dirty, Found::Kept, Absent::Unmarked);
            let mut expected: BTreeSet<_> = (start..(start + length).min(1024)).collect();
            if start < 1536 && start + length > 1024 {
                expected.extend(1024..1536);
            }
            prop_assert_eq!(found.marked, expected);
            // Nothing came to be where nothing was.
            prop_assert_eq!(tables.0[2][3].load(Ordering::Relaxed), 0);
        }
    }
}
