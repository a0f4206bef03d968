//! A set of pages as ranges: which mappings of a snapshot are still the ones
//! it saw.

use std::collections::BTreeMap;

use crate::range::{PAGE_SIZE, PageRange, USER_LO, USER_TOP};

/// Pages, as the fewest ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges {
    /// End of each range, by its start.
    map: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Adds `range`.
    pub(crate) fn insert(&mut self, range: PageRange) {
        let (mut start, mut end) = (range.start(), range.end());
        let touching: Vec<(u64, u64)> = self
            .map
            .range(..=end)
            .rev()
            .take_while(|&(_, &other)| other >= start)
            .map(|(&from, &to)| (from, to))
            .collect();
        for (from, to) in touching {
            self.map.remove(&from);
            start = start.min(from);
            end = end.max(to);
        }
        self.map.insert(start, end);
    }

    /// Removes `range`.
    pub(crate) fn remove(&mut self, range: PageRange) {
        for piece in self.parts_of(range) {
            let (start, end) = self.around(piece.start());
            self.map.remove(&start);
            if start < piece.start() {
                self.map.insert(start, piece.start());
            }
            if piece.end() < end {
                self.map.insert(piece.end(), end);
            }
        }
    }

    /// How many ranges there are.
    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    /// Makes one range of all, with what lies between them.
    pub(crate) fn fill_gaps(&mut self) {
        let ends = (self.map.first_key_value(), self.map.last_key_value());
        if let (Some((&start, _)), Some((_, &end))) = ends {
            self.map = BTreeMap::from([(start, end)]);
        }
    }

    /// Whether the page of `addr` is in the set.
    pub(crate) fn contains(&self, addr: u64) -> bool {
        self.map
            .range(..=addr)
            .next_back()
            .is_some_and(|(_, &end)| addr < end)
    }

    /// The parts of `range` that are in the set.
    pub(crate) fn parts_of(&self, range: PageRange) -> Vec<PageRange> {
        let first = match self.map.range(..=range.start()).next_back() {
            Some((&start, &end)) if end > range.start() => start,
            _ => range.start(),
        };
        self.map
            .range(first..range.end())
            .filter_map(|(&start, &end)| PageRange::new(start, end - start)?.intersect(range))
            .collect()
    }

    /// The parts of `range` that are not in the set.
    pub(crate) fn gaps_of(&self, range: PageRange) -> Vec<PageRange> {
        let mut gaps = Vec::new();
        let mut reached = range.start();
        for part in self.parts_of(range) {
            gaps.extend(PageRange::new(reached, part.start() - reached));
            reached = part.end();
        }
        gaps.extend(PageRange::new(reached, range.end() - reached));
        gaps
    }

    /// The largest range around `addr` that is all in the set, or all outside.
    pub(crate) fn run_around(&self, addr: u64) -> Option<PageRange> {
        let (start, end) = self.around(addr);
        PageRange::new(start, end - start)
    }

    fn around(&self, addr: u64) -> (u64, u64) {
        let page = addr & !(PAGE_SIZE - 1);
        let before = self.map.range(..=page).next_back();
        match before {
            Some((&start, &end)) if page < end => (start, end),
            _ => {
                let start = before.map_or(USER_LO, |(_, &end)| end);
                let next = self.map.range(page..).next();
                (start, next.map_or(USER_TOP, |(&start, _)| start))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BASE: u64 = 0x20_0000;
    const PAGES: u64 = 40;

    fn pages(first: u64, count: u64) -> PageRange {
        PageRange::new(BASE + first * PAGE_SIZE, count * PAGE_SIZE).unwrap()
    }

    #[test]
    fn gaps_are_filled() {
        let mut ranges = Ranges::default();
        for first in [3, 9, 20] {
            ranges.insert(pages(first, 2));
        }
        assert_eq!(ranges.len(), 3);
        ranges.fill_gaps();
        assert_eq!(ranges.parts_of(pages(0, PAGES)), [pages(3, 19)]);
    }

    proptest! {
        #[test]
        fn behaves_as_an_array_of_flags(
            steps in prop::collection::vec((any::<bool>(), 0..PAGES, 1..12_u64), 1..40)
        ) {
            let mut ranges = Ranges::default();
            let mut model = vec![false; PAGES as usize];
            for (add, first, count) in steps {
                let count = count.min(PAGES - first);
                if add {
                    ranges.insert(pages(first, count));
                } else {
                    ranges.remove(pages(first, count));
                }
                model[first as usize..(first + count) as usize].fill(add);
                for (page, &expected) in model.iter().enumerate() {
                    prop_assert_eq!(ranges.contains(BASE + page as u64 * PAGE_SIZE + 7), expected);
                }
                let all = pages(0, PAGES);
                let parts: u64 = ranges.parts_of(all).iter().map(|part| part.len()).sum();
                let gaps: u64 = ranges.gaps_of(all).iter().map(|gap| gap.len()).sum();
                prop_assert_eq!(parts + gaps, PAGES * PAGE_SIZE);
                prop_assert_eq!(parts / PAGE_SIZE, model.iter().filter(|&&page| page).count() as u64);
                // The fewest ranges: no two of them touch.
                for pair in ranges.parts_of(all).windows(2) {
                    prop_assert!(pair[0].end() < pair[1].start());
                }
                let run = ranges.run_around(BASE + first * PAGE_SIZE).unwrap();
                for page in 0..PAGES {
                    let inside = run.contains(BASE + page * PAGE_SIZE);
                    prop_assert!(!inside || model[page as usize] == model[first as usize]);
                }
            }
        }
    }
}
