//! All trackers of the process. The CPU has one bit for each page, so whoever clears it tells
//! everybody else who wanted to know.

use core::ops::Range;

use dune_x86::addr::{GuestPhys, VirtRange};

use super::scan::{Absent, Found, Mark, Scan, Sink, TableSource};
use super::set::{Bits, Granularity, PageSet, pages_of};

/// Entries that are flushed one by one; more are flushed with all others.
const MOST_SINGLE: usize = 32;

/// The leaves whose bits were cleared, for the flush that this owes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cleared {
    count: usize,
    /// Numbers of pages of 4 KiB, one in each leaf.
    first: [u64; MOST_SINGLE],
}

impl Cleared {
    fn add(&mut self, page: u64) {
        if let Some(place) = self.first.get_mut(self.count) {
            *place = page;
        }
        self.count += 1;
    }

    fn add_word(&mut self, first: u64, mask: u64) {
        if self.count < MOST_SINGLE {
            Bits(mask).for_each(|bit| self.add(first + u64::from(bit)));
        } else {
            self.count += mask.count_ones() as usize;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// A page of each leaf, where there are few.
    pub(super) fn few(&self) -> Option<&[u64]> {
        self.first.get(..self.count)
    }
}

/// What is kept for one tracker.
#[derive(Debug)]
struct Track {
    id: u64,
    written: Findings,
    accessed: Findings,
}

/// What was found for a tracker and not yet collected by it.
#[derive(Debug)]
struct Findings {
    pages: PageSet,
    /// How many windows had been taken back when this tracker last looked itself.
    lost: u64,
}

impl Track {
    fn findings(&mut self, mark: Mark) -> &mut Findings {
        match mark {
            Mark::Dirty => &mut self.written,
            Mark::Accessed => &mut self.accessed,
        }
    }
}

/// See the module documentation.
#[derive(Debug)]
pub(super) struct Registry {
    tracks: Vec<Track>,
    next: u64,
    /// The process that the findings are about; 0 before there is any.
    process: i32,
}

impl Registry {
    pub(super) const fn new() -> Self {
        Self {
            tracks: Vec::new(),
            next: 0,
            process: 0,
        }
    }

    /// Adds a tracker for a range of whole pages. `lost`: how many windows were taken back
    /// until now.
    pub(super) fn add(&mut self, range: VirtRange, granularity: Granularity, lost: u64) -> u64 {
        self.next += 1;
        let findings = || Findings {
            pages: PageSet::new(range, granularity),
            lost,
        };
        self.tracks.push(Track {
            id: self.next,
            written: findings(),
            accessed: findings(),
        });
        self.next
    }

    pub(super) fn remove(&mut self, id: u64) {
        self.tracks.retain(|track| track.id != id);
    }

    /// In the child of a `fork`, whichever call comes first: where the copy of the page tables
    /// may be older than that of the memory (`torn`), every page counts as marked.
    pub(super) fn in_process(&mut self, process: i32, torn: bool) {
        if self.process != process && self.process != 0 && torn {
            for track in &mut self.tracks {
                track.written.pages.mark_all();
                track.accessed.pages.mark_all();
            }
        }
        self.process = process;
    }

    fn track(&mut self, id: u64) -> Option<&mut Track> {
        self.tracks.iter_mut().find(|track| track.id == id)
    }

    /// Moves the marks of a tracker's range from the tables into the findings of every
    /// tracker that covers them. The flush that is owed comes before anything is handed out.
    pub(super) fn sweep<S: TableSource>(
        &mut self,
        id: u64,
        mark: Mark,
        source: &S,
        root: GuestPhys,
        lost: impl Fn() -> u64,
    ) -> Cleared {
        let mut cleared = Cleared::default();
        let Some(track) = self.track(id) else {
            return cleared;
        };
        let pages = pages_of(track.written.pages.range());
        let mut seen = track.findings(mark).lost;
        loop {
            let now = lost();
            let scan = Scan {
                mark,
                found: Found::Cleared,
                absent: absent(seen, now),
            };
            let mut delivery = Delivery {
                tracks: &mut self.tracks,
                id,
                mark,
                cleared: &mut cleared,
            };
            scan.run(source, root, pages.clone(), &mut delivery);
            // A window that was taken back under this scan took its marks along.
            if lost() == now {
                seen = now;
                break;
            }
        }
        if let Some(track) = self.track(id) {
            track.findings(mark).lost = seen;
        }
        cleared
    }

    /// What a tracker would collect now, left as it is.
    pub(super) fn peek<S: TableSource>(
        &mut self,
        id: u64,
        source: &S,
        root: GuestPhys,
        lost: impl Fn() -> u64,
    ) -> Option<PageSet> {
        let findings = self.track(id)?.findings(Mark::Dirty);
        let mut copy = findings.pages.clone();
        let pages = pages_of(copy.range());
        loop {
            let now = lost();
            let scan = Scan {
                mark: Mark::Dirty,
                found: Found::Kept,
                absent: absent(findings.lost, now),
            };
            scan.run(source, root, pages.clone(), &mut copy);
            if lost() == now {
                return Some(copy);
            }
        }
    }

    /// Hands out what was found for a tracker, in exchange for an empty set.
    pub(super) fn take(&mut self, id: u64, mark: Mark, into: &mut PageSet) {
        if let Some(track) = self.track(id) {
            core::mem::swap(&mut track.findings(mark).pages, into);
        }
    }
}

fn absent(seen: u64, now: u64) -> Absent {
    if seen == now {
        Absent::Unmarked
    } else {
        Absent::Marked
    }
}

/// Where a scan's findings go: to every tracker that covers them.
struct Delivery<'a> {
    tracks: &'a mut [Track],
    /// Whose scan it is.
    id: u64,
    mark: Mark,
    cleared: &'a mut Cleared,
}

impl Sink for Delivery<'_> {
    #[inline]
    fn word(&mut self, first: u64, mask: u64) {
        self.cleared.add_word(first, mask);
        for track in &mut *self.tracks {
            track.findings(self.mark).pages.mark_word(first, mask);
        }
    }

    fn large(&mut self, pages: Range<u64>) {
        self.cleared.add(pages.start);
        for track in &mut *self.tracks {
            track.findings(self.mark).pages.mark_span(pages.clone());
        }
    }

    /// The others notice it themselves.
    fn absent(&mut self, pages: Range<u64>) {
        for track in self.tracks.iter_mut().filter(|track| track.id == self.id) {
            track.findings(self.mark).pages.mark_span(pages.clone());
        }
    }
}

impl Sink for PageSet {
    fn word(&mut self, first: u64, mask: u64) {
        self.mark_word(first, mask);
    }

    fn large(&mut self, pages: Range<u64>) {
        self.mark_span(pages);
    }

    fn absent(&mut self, pages: Range<u64>) {
        self.mark_span(pages);
    }
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;
    use core::sync::atomic::{AtomicU64, Ordering};
    use std::collections::BTreeSet;

    use dune_x86::addr::GuestVirt;
    use dune_x86::paging::ENTRIES;
    use proptest::prelude::*;

    use super::*;

    /// Four page tables: the first 2,048 pages.
    struct Tables(Vec<Box<[AtomicU64; ENTRIES]>>);

    const PAGES: u64 = 2048;
    const DIRTY: u64 = 1 << 6;

    impl TableSource for Tables {
        fn table(&self, at: GuestPhys) -> Option<&[AtomicU64; ENTRIES]> {
            self.0
                .get((at.as_u64() >> 12) as usize)
                .map(|table| &**table)
        }
    }

    impl Tables {
        fn new() -> Self {
            let table = || Box::new([const { AtomicU64::new(0) }; ENTRIES]);
            let tables = Self((0..7).map(|_| table()).collect());
            let link = |table: usize, index: usize, to: u64| {
                tables.0[table][index].store((to << 12) | 3, Ordering::Relaxed);
            };
            link(0, 0, 1);
            link(1, 0, 2);
            for n in 0..4 {
                link(2, n, 3 + n as u64);
            }
            for page in 0..PAGES {
                tables
                    .entry(page)
                    .store((page << 12) | 3, Ordering::Relaxed);
            }
            tables
        }

        fn entry(&self, page: u64) -> &AtomicU64 {
            &self.0[3 + (page / 512) as usize][(page % 512) as usize]
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(Vec<u64>),
        Start(u64, u64, bool),
        Collect(usize),
        Peek(usize),
        Drop(usize),
        /// A window goes, with all marks, and comes back later.
        Hide(u64),
        Show(u64),
        Fork(bool),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => prop::collection::vec(0..PAGES, 1..30).prop_map(Step::Write),
            2 => (0..PAGES - 1, 1..PAGES, any::<bool>()).prop_map(|(a, b, c)| Step::Start(a, b, c)),
            5 => (0_usize..8).prop_map(Step::Collect),
            2 => (0_usize..8).prop_map(Step::Peek),
            1 => (0_usize..8).prop_map(Step::Drop),
            1 => (0_u64..4).prop_map(Step::Hide),
            1 => (0_u64..4).prop_map(Step::Show),
            1 => any::<bool>().prop_map(Step::Fork),
        ]
    }

    /// A tracker: its number, its range in pages, whether it is coarse, the pages written and
    /// not collected by it, and those that it may report although nobody wrote them.
    type Watched = (u64, Range<u64>, bool, BTreeSet<u64>, BTreeSet<u64>);

    struct Model {
        tables: Tables,
        registry: Registry,
        lost: Cell<u64>,
        hidden: BTreeSet<u64>,
        process: i32,
        trackers: Vec<Watched>,
    }

    impl Model {
        fn new() -> Self {
            Self {
                tables: Tables::new(),
                registry: Registry::new(),
                lost: Cell::new(0),
                hidden: BTreeSet::new(),
                process: 1,
                trackers: Vec::new(),
            }
        }

        fn sweep(&mut self, id: u64) {
            let lost = &self.lost;
            self.registry.in_process(self.process, false);
            self.registry
                .sweep(id, Mark::Dirty, &self.tables, GuestPhys::ZERO, || {
                    lost.get()
                });
        }

        fn check(found: &PageSet, written: &BTreeSet<u64>, excused: &BTreeSet<u64>) {
            let found: BTreeSet<_> = found.runs().flat_map(pages_of).collect();
            let missed: Vec<_> = written.difference(&found).collect();
            assert!(missed.is_empty(), "missed {missed:?}");
            let invented: Vec<_> = found
                .iter()
                .filter(|page| !written.contains(page) && !excused.contains(page))
                .collect();
            assert!(invented.is_empty(), "never written {invented:?}");
        }

        /// With their neighbours of the same large page, for a coarse tracker.
        fn widened(pages: &BTreeSet<u64>, coarse: bool) -> BTreeSet<u64> {
            if coarse {
                let large = pages.iter().map(|page| page & !511);
                large.flat_map(|first| first..first + 512).collect()
            } else {
                pages.clone()
            }
        }

        fn apply(&mut self, step: Step) {
            match step {
                Step::Write(pages) => {
                    for page in pages {
                        if self.hidden.contains(&(page / 512)) {
                            continue;
                        }
                        self.tables.entry(page).fetch_or(DIRTY, Ordering::Relaxed);
                        for (_, range, _, written, _) in &mut self.trackers {
                            if range.contains(&page) {
                                written.insert(page);
                            }
                        }
                    }
                }
                Step::Start(first, count, coarse) => {
                    let end = (first + count).min(PAGES);
                    let start = GuestVirt::new(first << 12);
                    let range = VirtRange::try_new(start, (end - first) << 12).unwrap();
                    let granularity = if coarse {
                        Granularity::Page2MiB
                    } else {
                        Granularity::Page4KiB
                    };
                    let range = range.align_out(granularity.page_size());
                    let id = self.registry.add(range, granularity, self.lost.get());
                    self.sweep(id);
                    self.registry
                        .take(id, Mark::Dirty, &mut PageSet::new(range, granularity));
                    self.trackers.push((
                        id,
                        pages_of(range),
                        coarse,
                        BTreeSet::new(),
                        BTreeSet::new(),
                    ));
                }
                Step::Collect(n) if n < self.trackers.len() => {
                    let (id, range, coarse, ..) = self.trackers[n].clone();
                    let bytes = (range.end - range.start) << 12;
                    let start = GuestVirt::new(range.start << 12);
                    let granularity = if coarse {
                        Granularity::Page2MiB
                    } else {
                        Granularity::Page4KiB
                    };
                    let whole = VirtRange::try_new(start, bytes).unwrap();
                    let mut set = PageSet::new(whole, granularity);
                    self.sweep(id);
                    self.registry.take(id, Mark::Dirty, &mut set);
                    let (_, _, _, written, excused) = &mut self.trackers[n];
                    Self::check(
                        &set,
                        written,
                        &Self::widened(&(&*written | &*excused), coarse),
                    );
                    written.clear();
                    excused.clear();
                }
                Step::Peek(n) if n < self.trackers.len() => {
                    let (id, _, coarse, written, excused) = self.trackers[n].clone();
                    let lost = &self.lost;
                    self.registry.in_process(self.process, false);
                    let set = self
                        .registry
                        .peek(id, &self.tables, GuestPhys::ZERO, || lost.get())
                        .unwrap();
                    Self::check(
                        &set,
                        &written,
                        &Self::widened(&(&written | &excused), coarse),
                    );
                }
                Step::Drop(n) if n < self.trackers.len() => {
                    let (id, ..) = self.trackers.remove(n);
                    self.registry.remove(id);
                }
                Step::Hide(table) => {
                    // Every tracker is excused for whatever is absent at this moment.
                    self.lost.set(self.lost.get() + 1);
                    self.hidden.insert(table);
                    let pages = table * 512..(table + 1) * 512;
                    for page in pages {
                        self.tables.entry(page).store(0, Ordering::Relaxed);
                    }
                    self.excuse_hidden();
                }
                Step::Show(table) if self.hidden.remove(&table) => {
                    for page in table * 512..(table + 1) * 512 {
                        let entry = (page << 12) | 3 | DIRTY;
                        self.tables.entry(page).store(entry, Ordering::Relaxed);
                        for (_, range, _, _, excused) in &mut self.trackers {
                            if range.contains(&page) {
                                excused.insert(page);
                            }
                        }
                    }
                }
                Step::Fork(torn) => {
                    self.process += 1;
                    self.registry.in_process(self.process, torn);
                    if torn {
                        for (_, range, _, _, excused) in &mut self.trackers {
                            excused.extend(range.clone());
                        }
                    }
                }
                _ => {}
            }
        }

        fn excuse_hidden(&mut self) {
            for table in &self.hidden {
                for page in table * 512..(table + 1) * 512 {
                    for (_, range, _, _, excused) in &mut self.trackers {
                        if range.contains(&page) {
                            excused.insert(page);
                        }
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn no_tracker_misses_what_another_one_clears(steps in prop::collection::vec(step(), 1..60)) {
            let mut model = Model::new();
            for step in steps {
                model.apply(step);
            }
            for n in 0..model.trackers.len() {
                model.apply(Step::Collect(n));
            }
        }
    }

    #[test]
    fn few_entries_are_named_and_many_are_counted() {
        let mut cleared = Cleared::default();
        assert!(cleared.is_empty());
        cleared.add_word(64, 0b101);
        cleared.add(1024);
        assert_eq!(cleared.few(), Some(&[64, 66, 1024][..]));
        cleared.add_word(128, u64::MAX);
        assert_eq!(cleared.few(), None);
        let mut full = Cleared::default();
        full.add_word(0, u64::MAX >> 32);
        assert_eq!(full.few().map(<[u64]>::len), Some(32));
    }
}
