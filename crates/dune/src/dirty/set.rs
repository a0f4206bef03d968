//! A set of pages, as a bitmap.

use core::fmt;
use core::ops::Range;

use dune_x86::addr::{GuestVirt, PageSize, VirtRange};

/// Pages in one word of a bitmap.
pub(super) const WORD: u64 = 64;
const PAGE_SHIFT: u32 = 12;

/// The unit in which writes are told apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Granularity {
    /// Pages of 4 KiB. What is mapped by larger pages is split: one page table (4 KiB) for
    /// each 2 MiB of the range, and as many more TLB entries to cover it.
    #[default]
    Page4KiB,
    /// Pages of 2 MiB, which stay unsplit: 512 times fewer entries to look at.
    Page2MiB,
}

impl Granularity {
    /// The size of a page of the set.
    #[must_use]
    pub const fn page_size(self) -> PageSize {
        match self {
            Self::Page4KiB => PageSize::Size4KiB,
            Self::Page2MiB => PageSize::Size2MiB,
        }
    }

    /// Binary logarithm of how many pages of 4 KiB are one of the set's.
    const fn shift(self) -> u32 {
        self.page_size().shift() - PAGE_SHIFT
    }
}

/// The pages of 4 KiB of a range that is aligned to them.
pub(super) fn pages_of(range: VirtRange) -> Range<u64> {
    let first = range.start().as_u64() >> PAGE_SHIFT;
    first..first + (range.bytes() >> PAGE_SHIFT)
}

/// A set of pages of one range, one bit each.
///
/// Memory: a bit for each page, 32 KiB for a GiB of 4 KiB pages.
#[derive(Clone, PartialEq, Eq)]
pub struct PageSet {
    range: VirtRange,
    granularity: Granularity,
    /// Number of the unit of the first bit; a multiple of [`WORD`], so that a word here and
    /// 64 neighbours in a page table begin at the same page.
    base: u64,
    words: Vec<u64>,
}

impl PageSet {
    /// No page of `range`, which is widened to whole pages.
    #[must_use]
    pub fn new(range: VirtRange, granularity: Granularity) -> Self {
        let range = range.align_out(granularity.page_size());
        let pages = pages_of(range);
        let shift = granularity.shift();
        let base = (pages.start >> shift) & !(WORD - 1);
        let words = ((pages.end >> shift) - base).div_ceil(WORD);
        Self {
            range,
            granularity,
            base,
            words: vec![0; words as usize],
        }
    }

    /// The range that the set is about.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        self.range
    }

    /// The unit of the set.
    #[must_use]
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Whether the page that holds `address` is in the set. Constant time.
    #[must_use]
    pub fn contains(&self, address: GuestVirt) -> bool {
        self.range.contains(address) && {
            let unit = address.as_u64() >> self.granularity.page_size().shift();
            let bit = unit - self.base;
            self.words
                .get((bit / WORD) as usize)
                .is_some_and(|word| word >> (bit % WORD) & 1 == 1)
        }
    }

    /// How many pages are in the set. Linear in the range, 64 pages a step, as are all
    /// methods without another word.
    #[must_use]
    pub fn len(&self) -> usize {
        self.words
            .iter()
            .map(|word| word.count_ones() as usize)
            .sum()
    }

    /// Whether no page is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// How many bytes the pages have together.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.len() as u64 * self.granularity.page_size().bytes()
    }

    /// The first address of every page in the set, in ascending order. Linear in the words
    /// and the pages found.
    pub fn pages(&self) -> impl Iterator<Item = GuestVirt> + '_ {
        let shift = self.granularity.page_size().shift();
        self.words
            .iter()
            .enumerate()
            .flat_map(move |(index, word)| {
                let first = self.base + index as u64 * WORD;
                Bits(*word)
                    .map(move |bit| GuestVirt::new_truncate((first + u64::from(bit)) << shift))
            })
    }

    /// The set as runs of pages next to each other, in ascending order, no two of which
    /// touch. Linear in the words and the runs found.
    #[must_use]
    pub fn runs(&self) -> Runs<'_> {
        Runs { set: self, next: 0 }
    }

    /// Adds the pages of another set that lie in this one's range; those of a finer unit add
    /// the page that holds them.
    pub fn insert_all(&mut self, other: &Self) {
        for run in other.runs() {
            self.mark_span(pages_of(run));
        }
    }

    /// Takes all pages out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds pages of 4 KiB: those whose bit is set in `mask`, counted from `first`, which is
    /// a multiple of 64. What lies outside the range is passed over.
    #[inline]
    pub(super) fn mark_word(&mut self, first: u64, mask: u64) {
        match self.granularity {
            Granularity::Page4KiB => {
                let within = mask & self.valid_bits(first);
                if within != 0
                    && let Some(word) = self.words.get_mut(((first - self.base) / WORD) as usize)
                {
                    *word |= within;
                }
            }
            Granularity::Page2MiB if mask != 0 => self.mark_span(first..first + 1),
            Granularity::Page2MiB => {}
        }
    }

    /// Which of the 64 pages from `first` on are in the range.
    #[inline]
    fn valid_bits(&self, first: u64) -> u64 {
        valid_bits(first, &pages_of(self.range))
    }

    /// Adds every page that holds one of these pages of 4 KiB and is in the range.
    pub(super) fn mark_span(&mut self, pages: Range<u64>) {
        let all = pages_of(self.range);
        let (start, end) = (pages.start.max(all.start), pages.end.min(all.end));
        if start >= end {
            return;
        }
        let shift = self.granularity.shift();
        let first = (start >> shift) - self.base;
        let last = ((end - 1) >> shift) - self.base;
        for index in first / WORD..=last / WORD {
            let units = first..last + 1;
            if let Some(word) = self.words.get_mut(index as usize) {
                *word |= valid_bits(index * WORD, &units);
            }
        }
    }

    /// Adds every page of the range.
    pub(super) fn mark_all(&mut self) {
        self.mark_span(pages_of(self.range));
    }

    fn unit(&self, unit: u64) -> GuestVirt {
        GuestVirt::new_truncate((self.base + unit) << self.granularity.page_size().shift())
    }

    /// The first bit from `from` on that is `wanted`, or the number of bits.
    fn find(&self, from: u64, wanted: bool) -> u64 {
        let end = self.words.len() as u64 * WORD;
        let mut at = from;
        while let Some(word) = self.words.get((at / WORD) as usize) {
            let word = if wanted { *word } else { !*word };
            let rest = word >> (at % WORD);
            if rest != 0 {
                return at + u64::from(rest.trailing_zeros());
            }
            at = (at / WORD + 1) * WORD;
        }
        end
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageSet")
            .field("range", &self.range)
            .field("granularity", &self.granularity)
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

/// Which of the 64 numbers from `first` on are in `all`, as bits.
#[inline]
pub(super) fn valid_bits(first: u64, all: &Range<u64>) -> u64 {
    let from = all.start.saturating_sub(first).min(WORD);
    let until = all.end.saturating_sub(first).min(WORD);
    if from >= until {
        return 0;
    }
    (u64::MAX >> (WORD - (until - from))) << from
}

/// The numbers of the bits that are set in a word, in ascending order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bits(pub(super) u64);

impl Iterator for Bits {
    type Item = u32;

    #[inline]
    fn next(&mut self) -> Option<u32> {
        let bit = self.0.trailing_zeros();
        if bit == u64::BITS {
            return None;
        }
        self.0 &= self.0 - 1;
        Some(bit)
    }
}

/// The runs of a [`PageSet`]: see [`PageSet::runs`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    set: &'a PageSet,
    next: u64,
}

impl Iterator for Runs<'_> {
    type Item = VirtRange;

    fn next(&mut self) -> Option<VirtRange> {
        let start = self.set.find(self.next, true);
        if start == self.set.words.len() as u64 * WORD {
            self.next = start;
            return None;
        }
        let end = self.set.find(start, false);
        self.next = end;
        let bytes = (end - start) << self.set.granularity.page_size().shift();
        VirtRange::try_new(self.set.unit(start), bytes).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn range(first: u64, count: u64) -> VirtRange {
        VirtRange::try_new(GuestVirt::new(first << PAGE_SHIFT), count << PAGE_SHIFT).unwrap()
    }

    fn numbers(set: &PageSet) -> BTreeSet<u64> {
        set.pages().map(|page| page.as_u64() >> 12).collect()
    }

    proptest! {
        #[test]
        fn a_set_holds_what_was_marked_in_its_range_and_nothing_else(
            first in 0_u64..300,
            count in 1_u64..400,
            words in prop::collection::vec((0_u64..12, any::<u64>()), 0..8),
            spans in prop::collection::vec((0_u64..800, 0_u64..200), 0..4),
        ) {
            let mut set = PageSet::new(range(first, count), Granularity::Page4KiB);
            let mut model = BTreeSet::new();
            for (word, mask) in words {
                set.mark_word(word * 64, mask);
                model.extend(Bits(mask).map(|bit| word * 64 + u64::from(bit)));
            }
            for (start, length) in spans {
                set.mark_span(start..start + length);
                model.extend(start..start + length);
            }
            model.retain(|page| (first..first + count).contains(page));
            prop_assert_eq!(&numbers(&set), &model);
            prop_assert_eq!(set.len(), model.len());
            prop_assert_eq!(set.is_empty(), model.is_empty());
            for page in 0..800 {
                let address = GuestVirt::new((page << 12) + 7);
                prop_assert_eq!(set.contains(address), model.contains(&page));
            }
            let mut before = 0;
            let mut from_runs = BTreeSet::new();
            for run in set.runs() {
                let pages = pages_of(run);
                prop_assert!(from_runs.is_empty() || pages.start > before, "runs touch");
                before = pages.end;
                from_runs.extend(pages);
            }
            prop_assert_eq!(from_runs, model);
        }

        #[test]
        fn a_coarse_set_holds_the_large_page_of_every_small_one(
            first in 0_u64..2000,
            count in 1_u64..3000,
            marked in prop::collection::vec(0_u64..6000, 0..6),
        ) {
            let mut set = PageSet::new(range(first, count), Granularity::Page2MiB);
            let mut model = BTreeSet::new();
            let whole = first / 512..(first + count).div_ceil(512);
            for page in marked {
                set.mark_word(page & !63, 1 << (page % 64));
                if whole.contains(&(page / 512)) {
                    model.insert(page / 512);
                }
            }
            let found: BTreeSet<_> = set.pages().map(|page| page.as_u64() >> 21).collect();
            prop_assert_eq!(&found, &model);
            prop_assert_eq!(set.bytes(), model.len() as u64 * (2 << 20));
            // Its pages, as the small ones of another set, are all that it stands for.
            let mut fine = PageSet::new(range(0, 6144), Granularity::Page4KiB);
            fine.insert_all(&set);
            prop_assert_eq!(fine.bytes(), set.bytes());
        }

        #[test]
        fn the_whole_is_one_run(first in 0_u64..300, count in 1_u64..400) {
            let mut set = PageSet::new(range(first, count), Granularity::Page4KiB);
            set.mark_all();
            prop_assert_eq!(set.runs().collect::<Vec<_>>(), [range(first, count)]);
            set.clear();
            prop_assert_eq!(set.runs().next(), None);
        }
    }
}
