//! The program's virtual memory areas: what it has mapped, and with which
//! rights.
//!
//! This is bookkeeping alone, pure and without any effect on the process; the
//! memory calls keep it equal to what they ask of the host
//! kernel. It is the only record of what the program may reach: page faults,
//! copies by the guard and the choice of free addresses are answered from it.
//!
//! Areas never overlap, never leave the user's part of the address space (by
//! the type of [`PageRange`]), and neighbours with equal attributes are one
//! area.

use std::collections::BTreeMap;

use crate::engine::Access;
use crate::range::{PAGE_SIZE, PageRange, USER_LO, USER_TOP, UserRange};

/// What lies behind an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Anonymous memory: once mapped, only the guard can take it away.
    Anonymous,
    /// The `brk` heap; anonymous.
    Heap,
    /// The initial stack; anonymous.
    Stack,
    /// A file, which anybody may truncate at any time.
    File,
    /// The kernel's data for clocks (`clock`).
    Clock,
}

/// Whether stores are seen by others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Copy on write.
    Private,
    /// Shared.
    Shared,
}

/// What an area is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// The rights the program asked for.
    pub access: Access,
    /// Private or shared.
    pub sharing: Sharing,
    /// What lies behind it.
    pub backing: Backing,
}

impl Attributes {
    /// Private anonymous memory.
    #[must_use]
    pub const fn anonymous(access: Access) -> Self {
        Self {
            access,
            sharing: Sharing::Private,
            backing: Backing::Anonymous,
        }
    }

    /// The rights that x86 page tables can express: whatever can be written or
    /// executed can be read.
    #[must_use]
    pub fn effective_access(self) -> Access {
        effective(self.access)
    }
}

/// See [`Attributes::effective_access`].
#[must_use]
pub fn effective(access: Access) -> Access {
    if access.is_empty() {
        access
    } else {
        access | Access::READ
    }
}

/// One area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Its pages.
    pub range: PageRange,
    /// What it is.
    pub attributes: Attributes,
}

/// Some page of a range is not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not all of the range is mapped")]
pub struct Hole;

/// All areas of the program.
#[derive(Clone, Debug, Default)]
pub struct Areas {
    /// By first address.
    map: BTreeMap<u64, (u64, Attributes)>,
    /// Sum of the areas' lengths.
    bytes: u64,
    /// How often anything was changed.
    changes: u64,
}

impl Areas {
    /// No areas.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes mapped in all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How often anything was changed: equal counts of one table mean equal
    /// areas.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Puts `earlier`, an earlier state of this table, back in its place.
    pub(crate) fn return_to(&mut self, earlier: &Self) {
        let changes = self.changes + 1;
        self.clone_from(earlier);
        self.changes = changes;
    }

    /// All areas from the lowest to the highest.
    pub fn iter(&self) -> impl Iterator<Item = Area> + '_ {
        self.map
            .iter()
            .filter_map(|(&start, &(end, attributes))| area(start, end, attributes))
    }

    /// The area that holds `addr`.
    #[must_use]
    pub fn find(&self, addr: u64) -> Option<Area> {
        let (&start, &(end, attributes)) = self.map.range(..=addr).next_back()?;
        if addr < end {
            area(start, end, attributes)
        } else {
            None
        }
    }

    /// The areas that share a page with `range`, whole.
    pub fn overlapping(&self, range: PageRange) -> impl Iterator<Item = Area> + '_ {
        let first = self
            .find(range.start())
            .map_or_else(|| range.start(), |found| found.range.start());
        self.map
            .range(first..range.end())
            .filter_map(|(&start, &(end, attributes))| area(start, end, attributes))
    }

    /// Whether nothing is mapped in `range`.
    #[must_use]
    pub fn is_free(&self, range: PageRange) -> bool {
        self.overlapping(range).next().is_none()
    }

    /// Whether every page of `range` is mapped.
    #[must_use]
    pub fn is_mapped(&self, range: PageRange) -> bool {
        self.all(range, |_| true)
    }

    /// Whether every page of `range` is mapped in areas for which `test`
    /// holds.
    pub fn all(&self, range: PageRange, mut test: impl FnMut(&Attributes) -> bool) -> bool {
        let mut reached = range.start();
        for found in self.overlapping(range) {
            if found.range.start() > reached || !test(&found.attributes) {
                return false;
            }
            reached = found.range.end();
        }
        reached >= range.end()
    }

    /// Whether the program may access every byte of `range` with `access`.
    #[must_use]
    pub fn allows(&self, range: UserRange, access: Access) -> bool {
        if range.is_empty() {
            return true;
        }
        PageRange::covering(range).is_some_and(|pages| {
            self.all(pages, |attributes| {
                attributes.effective_access().contains(access)
            })
        })
    }

    /// Maps `range`, replacing whatever was there.
    pub fn map(&mut self, range: PageRange, attributes: Attributes) {
        self.changes += 1;
        self.unmap(range);
        self.insert(range.start(), range.end(), attributes);
        self.bytes += range.len();
        self.merge_around(range);
    }

    /// Unmaps `range`; what is not mapped there stays so.
    pub fn unmap(&mut self, range: PageRange) {
        self.changes += 1;
        self.split(range.start());
        self.split(range.end());
        let starts: Vec<u64> = self
            .map
            .range(range.start()..range.end())
            .map(|(&start, _)| start)
            .collect();
        for start in starts {
            if let Some((end, _)) = self.map.remove(&start) {
                self.bytes -= end - start;
            }
        }
    }

    /// Changes the rights of `range`.
    ///
    /// # Errors
    ///
    /// If not all of it is mapped; then nothing has changed.
    pub fn protect(&mut self, range: PageRange, access: Access) -> Result<(), Hole> {
        if !self.is_mapped(range) {
            return Err(Hole);
        }
        self.changes += 1;
        self.split(range.start());
        self.split(range.end());
        for (_, (_, attributes)) in self.map.range_mut(range.start()..range.end()) {
            attributes.access = access;
        }
        self.merge_around(range);
        Ok(())
    }

    /// The highest free `len` bytes (a multiple of the page size) that end at
    /// or below `below` and start at or above `above`.
    #[must_use]
    pub fn find_free(&self, len: u64, above: u64, below: u64) -> Option<PageRange> {
        let above = above.max(USER_LO);
        let mut end = below.min(USER_TOP) & !(PAGE_SIZE - 1);
        loop {
            let start = end.checked_sub(len).filter(|&start| start >= above)?;
            let candidate = PageRange::new(start, len)?;
            // The highest area in the way, if any: go on below it.
            match self.map.range(..candidate.end()).next_back() {
                Some((&low, &(high, _))) if high > candidate.start() => end = low,
                _ => return Some(candidate),
            }
        }
    }

    fn insert(&mut self, start: u64, end: u64, attributes: Attributes) {
        self.map.insert(start, (end, attributes));
    }

    /// Makes `at` a border between areas, if it lies inside one.
    fn split(&mut self, at: u64) {
        let Some((&start, &(end, attributes))) = self.map.range(..at).next_back() else {
            return;
        };
        if at < end {
            self.insert(start, at, attributes);
            self.insert(at, end, attributes);
        }
    }

    /// Joins equal neighbours from just below `range` to just above it.
    fn merge_around(&mut self, range: PageRange) {
        let first = self
            .map
            .range(..range.start())
            .next_back()
            .map_or_else(|| range.start(), |(&start, _)| start);
        let near: Vec<(u64, u64, Attributes)> = self
            .map
            .range(first..=range.end())
            .map(|(&start, &(end, attributes))| (start, end, attributes))
            .collect();
        let mut current: Option<(u64, u64, Attributes)> = None;
        for (start, end, attributes) in near {
            match &mut current {
                Some(run) if run.1 == start && run.2 == attributes => {
                    run.1 = end;
                    self.map.remove(&start);
                    self.insert(run.0, end, attributes);
                }
                _ => current = Some((start, end, attributes)),
            }
        }
    }
}

fn area(start: u64, end: u64, attributes: Attributes) -> Option<Area> {
    PageRange::new(start, end - start).map(|range| Area { range, attributes })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BASE: u64 = 0x10_0000;
    const PAGES: u64 = 64;

    fn pages(first: u64, count: u64) -> PageRange {
        PageRange::new(BASE + first * PAGE_SIZE, count * PAGE_SIZE).unwrap()
    }

    fn attributes(access: u8) -> Attributes {
        Attributes::anonymous(Access::from_bits_truncate(access))
    }

    #[derive(Clone, Debug)]
    enum Op {
        Map(u64, u64, u8),
        Unmap(u64, u64),
        Protect(u64, u64, u8),
    }

    fn op() -> impl Strategy<Value = Op> {
        let span =
            (0..PAGES, 1..=16_u64).prop_map(|(first, count)| (first, count.min(PAGES - first)));
        prop_oneof![
            (span.clone(), 0..4_u8)
                .prop_map(|((first, count), access)| Op::Map(first, count, access)),
            span.clone()
                .prop_map(|(first, count)| Op::Unmap(first, count)),
            (span, 0..4_u8).prop_map(|((first, count), access)| Op::Protect(first, count, access)),
        ]
    }

    proptest! {
        #[test]
        fn behaves_as_an_array_of_pages(ops in prop::collection::vec(op(), 1..60)) {
            let mut areas = Areas::new();
            let mut model: Vec<Option<u8>> = vec![None; PAGES as usize];
            for op in ops {
                match op {
                    Op::Map(first, count, access) => {
                        areas.map(pages(first, count), attributes(access));
                        model[first as usize..(first + count) as usize].fill(Some(access));
                    }
                    Op::Unmap(first, count) => {
                        areas.unmap(pages(first, count));
                        model[first as usize..(first + count) as usize].fill(None);
                    }
                    Op::Protect(first, count, access) => {
                        let slice = &mut model[first as usize..(first + count) as usize];
                        let whole = slice.iter().all(Option::is_some);
                        prop_assert_eq!(
                            areas.protect(pages(first, count), Access::from_bits_truncate(access)).is_ok(),
                            whole
                        );
                        if whole {
                            slice.fill(Some(access));
                        }
                    }
                }
                for (page, expected) in model.iter().enumerate() {
                    let found = areas.find(BASE + page as u64 * PAGE_SIZE + 5);
                    prop_assert_eq!(found.map(|area| area.attributes.access.bits()), *expected);
                }
                let mapped = model.iter().filter(|page| page.is_some()).count() as u64;
                prop_assert_eq!(areas.bytes(), mapped * PAGE_SIZE);
                // Equal neighbours are one area, and nothing overlaps.
                let all: Vec<Area> = areas.iter().collect();
                for pair in all.windows(2) {
                    prop_assert!(pair[0].range.end() <= pair[1].range.start());
                    prop_assert!(
                        pair[0].range.end() < pair[1].range.start()
                            || pair[0].attributes != pair[1].attributes
                    );
                }
                for count in [1, 3, 9] {
                    let top = BASE + PAGES * PAGE_SIZE;
                    let free = areas.find_free(count * PAGE_SIZE, BASE, top);
                    let expected = (0..=PAGES - count).rev().find(|&first| {
                        model[first as usize..(first + count) as usize].iter().all(Option::is_none)
                    });
                    prop_assert_eq!(free, expected.map(|first| pages(first, count)));
                }
            }
        }
    }

    #[test]
    fn rights_are_checked_over_borders_and_holes() {
        let mut areas = Areas::new();
        areas.map(pages(0, 2), attributes(1));
        areas.map(pages(2, 1), attributes(3));
        areas.map(pages(4, 1), attributes(3));
        let bytes = |first: u64, len| UserRange::new(BASE + first, len).unwrap();
        assert!(areas.allows(bytes(10, 2 * PAGE_SIZE), Access::READ));
        assert!(!areas.allows(bytes(10, 2 * PAGE_SIZE), Access::WRITE));
        assert!(areas.allows(bytes(2 * PAGE_SIZE, PAGE_SIZE), Access::WRITE));
        assert!(!areas.allows(bytes(2 * PAGE_SIZE, PAGE_SIZE + 1), Access::READ));
        assert!(!areas.allows(bytes(3 * PAGE_SIZE, 1), Access::READ));
    }
}
