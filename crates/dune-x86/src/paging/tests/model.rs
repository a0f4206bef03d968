//! Random edits, compared with a model that knows nothing of tables, while the
//! simulated CPU reads and writes in between and in the middle of edits.

use std::collections::{BTreeMap, BTreeSet};
use std::vec;
use std::vec::Vec;

use proptest::prelude::*;

use super::machine::{Cpu, Racing, TestMemory, TestTables, Watched, pa, range, va};
use crate::addr::{PageSize, VirtRange};
use crate::paging::{
    Change, EditError, EditFailure, FlushTlb, Leaf, MapError, NoFlush, PageTable, PteFlags,
    SplitError,
};

const PAGE: u64 = 0x1000;

/// Attributes that the CPU does not change by itself.
fn lasting(flags: PteFlags) -> PteFlags {
    flags - PteFlags::ACCESSED - PteFlags::DIRTY
}

/// A run of pages that are mapped alike to consecutive physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    bytes: u64,
    pa: u64,
    flags: PteFlags,
}

/// What should be mapped: runs by their start.
#[derive(Default, Debug)]
struct Model(BTreeMap<u64, Run>);

impl Model {
    fn at(&self, page: u64) -> Option<(u64, PteFlags)> {
        let (&start, run) = self.0.range(..=page).next_back()?;
        let offset = page - start;
        (offset < run.bytes).then_some((run.pa + offset, run.flags))
    }

    /// Makes `at` a boundary between runs.
    fn cut(&mut self, at: u64) {
        if let Some((&start, &run)) = self.0.range(..at).next_back()
            && at - start < run.bytes
        {
            let offset = at - start;
            self.0.insert(
                start,
                Run {
                    bytes: offset,
                    ..run
                },
            );
            self.0.insert(
                at,
                Run {
                    bytes: run.bytes - offset,
                    pa: run.pa + offset,
                    ..run
                },
            );
        }
    }

    fn is_free(&self, start: u64, bytes: u64) -> bool {
        self.at(start).is_none() && self.0.range(start..=start + (bytes - 1)).next().is_none()
    }

    fn map(&mut self, start: u64, bytes: u64, pa: u64, flags: PteFlags) {
        if bytes > 0 {
            assert!(self.is_free(start, bytes));
            self.0.insert(
                start,
                Run {
                    bytes,
                    pa,
                    flags: lasting(flags),
                },
            );
        }
    }

    fn edit(&mut self, start: u64, bytes: u64, edit: impl Fn(Run) -> Option<Run>) {
        self.cut(start);
        if let Some(end) = start.checked_add(bytes) {
            self.cut(end);
        }
        let inside: Vec<u64> = self
            .0
            .range(start..=start + (bytes - 1))
            .map(|(&key, _)| key)
            .collect();
        for key in inside {
            let run = self.0.remove(&key).unwrap();
            if let Some(run) = edit(run) {
                self.0.insert(key, run);
            }
        }
    }

    /// Pages worth looking at: at every boundary, and beside it.
    fn samples(&self) -> BTreeSet<u64> {
        let mut samples = BTreeSet::new();
        for (&start, run) in &self.0 {
            let last = start + (run.bytes - PAGE);
            samples.extend([start, last, start + ((run.bytes / 2) & !(PAGE - 1))]);
            samples.extend(start.checked_sub(PAGE));
            samples.extend(last.checked_add(PAGE));
        }
        samples.retain(|&page| crate::addr::VirtWidth::Bits48.is_canonical(page));
        samples
    }
}

#[derive(Clone, Debug)]
enum Op {
    Map {
        at: u64,
        to: u64,
        size: PageSize,
        flags: PteFlags,
    },
    MapRange {
        at: u64,
        bytes: u64,
        to: u64,
        largest: PageSize,
        flags: PteFlags,
    },
    Unmap {
        at: u64,
        bytes: u64,
    },
    Protect {
        at: u64,
        bytes: u64,
        flags: PteFlags,
    },
    Key {
        at: u64,
        bytes: u64,
        key: u8,
    },
    UpdateLeaf {
        at: u64,
        flags: PteFlags,
    },
    UpdatePage {
        at: u64,
        flags: PteFlags,
    },
    Split {
        at: u64,
        to: PageSize,
        flush: bool,
    },
    Collapse {
        at: u64,
        into: PageSize,
    },
    ClearDirty {
        at: u64,
        bytes: u64,
    },
    ClearAccessed {
        at: u64,
        bytes: u64,
    },
    Prune {
        at: u64,
        bytes: u64,
    },
    Access {
        at: u64,
        write: bool,
    },
}

/// Two areas: some GiB in the middle of the lower half, and the very end of
/// the address space.
fn address() -> impl Strategy<Value = u64> {
    let low = (
        0..3_u64,
        prop::sample::select(&[0_u64, 1, 2, 511][..]),
        page_in_table(),
    );
    prop_oneof![
        6 => low.prop_map(|(gib, mib2, page)| {
            0x7f00_0000_0000 + (gib << 30) + (mib2 << 21) + (page << 12)
        }),
        1 => prop::sample::select(&[0_u64, 1, 512, 513, 0x3_ffff][..])
            .prop_map(|pages| 0xffff_ffff_ffff_f000 - pages * PAGE),
    ]
}

fn page_in_table() -> impl Strategy<Value = u64> {
    prop_oneof![2 => Just(0_u64), 1 => Just(1), 1 => Just(2), 1 => Just(511)]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => (1..4_u64).prop_map(|pages| pages * PAGE),
        2 => Just(0x20_0000_u64),
        1 => Just(0x20_1000_u64),
        1 => Just(0x40_0000_u64 + 5 * PAGE),
        1 => Just(0x4000_0000_u64),
        1 => Just(0x4020_1000_u64),
    ]
}

fn physical() -> impl Strategy<Value = u64> {
    (0..4_u64, 0..3_u64, page_in_table())
        .prop_map(|(gib, mib2, page)| (gib << 30) + (mib2 << 21) + (page << 12))
}

fn size() -> impl Strategy<Value = PageSize> {
    prop::sample::select(&PageSize::ALL[..])
}

const PROTECTIONS: [PteFlags; 7] = [
    PteFlags::RW,
    PteFlags::RW,
    PteFlags::R,
    PteFlags::RX,
    PteFlags::RWX.union(PteFlags::USER),
    PteFlags::empty(),
    PteFlags::NO_EXECUTE,
];

const EXTRAS: [PteFlags; 5] = [
    PteFlags::empty(),
    PteFlags::PAT,
    PteFlags::AVL1,
    PteFlags::GLOBAL,
    PteFlags::CACHE_DISABLE.union(PteFlags::PAT),
];

fn protection() -> impl Strategy<Value = PteFlags> {
    prop::sample::select(&PROTECTIONS[..])
}

fn attributes() -> impl Strategy<Value = PteFlags> {
    (protection(), prop::sample::select(&EXTRAS[..]), 0..16_u8)
        .prop_map(|(protection, extra, key)| (protection | extra).with_pkey(key))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (address(), physical(), size(), attributes()).prop_map(|(at, to, size, flags)| {
            let align = !size.offset_mask();
            Op::Map { at: at & align, to: to & align, size, flags }
        }),
        5 => (address(), length(), physical(), any::<bool>(), size(), attributes()).prop_map(
            |(at, bytes, to, alike, largest, flags)| {
                // Only ranges that large pages fit are long: tables are few.
                let to = if alike { (to & !0x3fff_ffff) | (at & 0x3fff_ffff) } else { to };
                let alike = alike && largest > PageSize::Size4KiB;
                let bytes = if alike { bytes } else { bytes & 0x7f_ffff };
                Op::MapRange { at, bytes: bytes.max(PAGE), to, largest, flags }
            }
        ),
        4 => (address(), length()).prop_map(|(at, bytes)| Op::Unmap { at, bytes }),
        4 => (address(), length(), protection())
            .prop_map(|(at, bytes, flags)| Op::Protect { at, bytes, flags }),
        1 => (address(), length(), 0..16_u8)
            .prop_map(|(at, bytes, key)| Op::Key { at, bytes, key }),
        2 => (address(), protection()).prop_map(|(at, flags)| Op::UpdateLeaf { at, flags }),
        2 => (address(), protection()).prop_map(|(at, flags)| Op::UpdatePage { at, flags }),
        2 => (address(), size(), any::<bool>())
            .prop_map(|(at, to, flush)| Op::Split { at, to, flush }),
        3 => (address(), size()).prop_map(|(at, into)| Op::Collapse { at, into }),
        3 => (address(), length()).prop_map(|(at, bytes)| Op::ClearDirty { at, bytes }),
        1 => (address(), length()).prop_map(|(at, bytes)| Op::ClearAccessed { at, bytes }),
        2 => (address(), length()).prop_map(|(at, bytes)| Op::Prune { at, bytes }),
        6 => (address(), any::<bool>()).prop_map(|(at, write)| Op::Access { at, write }),
    ]
}

/// The part of a range that stays within its half.
fn clip(at: u64, bytes: u64) -> VirtRange {
    let bytes = if at >> 63 == 1 {
        bytes.min((u64::MAX - at) + 1)
    } else {
        bytes
    };
    range(at, bytes)
}

fn is_out_of_tables(failure: &EditFailure) -> bool {
    matches!(failure.cause, EditError::OutOfTables { .. }) && failure.flush.is_nothing()
}

type Tables<'a> = PageTable<Racing<'a>, Watched<'a>>;

struct Trial<'a> {
    tables: Tables<'a>,
    cpu: &'a Cpu<'a>,
    model: Model,
    /// Whether the pool is so large that it never runs out.
    plenty: bool,
}

impl Trial<'_> {
    fn run(&mut self, op: &Op) {
        match *op {
            Op::Map {
                at,
                to,
                size,
                flags,
            } => {
                let result = self
                    .cpu
                    .racing(|| self.tables.map(va(at), pa(to), size, flags));
                match (result, self.model.is_free(at, size.bytes())) {
                    (Ok(()), true) => self.model.map(at, size.bytes(), to, flags),
                    (Err(MapError::AlreadyMapped { leaf, .. }), false) => {
                        assert!(leaf.range().contains(va(at)));
                    }
                    (Err(MapError::TableInTheWay { .. }), _) if size > PageSize::Size4KiB => {}
                    (Err(MapError::OutOfTables { .. }), _) if !self.plenty => {}
                    unexpected => panic!("{op:?}: {unexpected:?}"),
                }
            }
            Op::MapRange {
                at,
                bytes,
                to,
                largest,
                flags,
            } => {
                let range = clip(at, bytes);
                let result = self
                    .cpu
                    .racing(|| self.tables.map_range(range, pa(to), largest, flags));
                let mapped = match result {
                    Ok(()) => range.bytes(),
                    Err(MapError::AlreadyMapped { va: stop, .. }) => {
                        assert!(self.model.at(stop.as_u64()).is_some());
                        stop.as_u64() - at
                    }
                    Err(MapError::OutOfTables { va: stop }) if !self.plenty => stop.as_u64() - at,
                    unexpected => panic!("{op:?}: {unexpected:?}"),
                };
                self.model.map(at, mapped, to, flags);
            }
            Op::Unmap { at, bytes } => {
                let range = clip(at, bytes);
                let mut removed = Vec::new();
                match self
                    .cpu
                    .racing(|| self.tables.unmap(range, |leaf| removed.push(leaf)))
                {
                    Ok(flush) => {
                        flush.apply(self.cpu);
                        self.model.edit(at, range.bytes(), |_| None);
                        self.assert_reported(range, &removed);
                        self.cpu
                            .written
                            .borrow_mut()
                            .retain(|&page| !range.contains(va(page)));
                    }
                    Err(failure) => {
                        assert!(
                            !self.plenty && is_out_of_tables(&failure),
                            "{op:?}: {failure}"
                        );
                        assert!(removed.is_empty());
                    }
                }
            }
            Op::Protect { at, bytes, flags } => {
                let change = Change::protection(flags);
                self.change(clip(at, bytes), change, |old| {
                    (old - PteFlags::PROTECTION) | flags
                });
            }
            Op::Key { at, bytes, key } => {
                self.change(clip(at, bytes), Change::pkey(key), |old| old.with_pkey(key));
            }
            Op::UpdateLeaf { at, flags } => {
                let change = Change::protection(flags);
                match self.cpu.racing(|| self.tables.update_leaf(va(at), change)) {
                    Ok((leaf, flush)) => {
                        flush.apply(self.cpu);
                        assert_eq!(self.model.at(at).unwrap().1, lasting(leaf.flags()));
                        self.model.edit(leaf.va.as_u64(), leaf.size.bytes(), |run| {
                            Some(Run {
                                flags: (run.flags - PteFlags::PROTECTION) | flags,
                                ..run
                            })
                        });
                    }
                    Err(_) => assert_eq!(self.model.at(at), None),
                }
            }
            Op::UpdatePage { at, flags } => {
                let size = self.tables.leaf(va(at)).map(|leaf| leaf.size);
                let change = Change::protection(flags);
                match self
                    .cpu
                    .racing(|| self.tables.update_page_4k(va(at), change))
                {
                    Ok((old, flush)) => {
                        flush.apply(self.cpu);
                        assert_eq!(size, Some(PageSize::Size4KiB));
                        let old = lasting(old.flags(PageSize::Size4KiB));
                        assert_eq!(self.model.at(at).unwrap().1, old);
                        self.model.edit(at, PAGE, |run| {
                            Some(Run {
                                flags: (run.flags - PteFlags::PROTECTION) | flags,
                                ..run
                            })
                        });
                    }
                    Err(_) => assert_ne!(size, Some(PageSize::Size4KiB)),
                }
            }
            Op::Split { at, to, flush } => {
                match self.cpu.racing(|| self.tables.split(va(at), to)) {
                    Ok(debt) if flush => debt.apply(self.cpu),
                    // Whatever changes the pages later flushes them.
                    Ok(debt) => debt.ignore(NoFlush::CoveredByLargerFlush),
                    Err(SplitError::NotMapped { .. }) => assert_eq!(self.model.at(at), None),
                    Err(SplitError::OutOfTables { .. }) if !self.plenty => {}
                    Err(error) => panic!("{op:?}: {error}"),
                }
            }
            Op::Collapse { at, into } => {
                if self
                    .cpu
                    .racing(|| self.tables.collapse(va(at), into, self.cpu))
                    .is_ok()
                {
                    assert_eq!(self.tables.leaf(va(at)).unwrap().size, into);
                }
            }
            Op::ClearDirty { at, bytes } => {
                let range = clip(at, bytes);
                let mut visited = Vec::new();
                let edit = || self.tables.clear_dirty(range, |leaf| visited.push(leaf));
                let flush = self.cpu.racing(edit).unwrap();
                flush.apply(self.cpu);
                assert!(
                    visited
                        .iter()
                        .all(|leaf| leaf.flags().contains(PteFlags::DIRTY))
                );
                self.assert_reported(range, &visited);
                let tables = &self.tables;
                self.cpu.written.borrow_mut().retain(|&page| {
                    let leaf = tables.leaf(va(page)).unwrap();
                    let reported = visited.iter().any(|leaf| leaf.range().contains(va(page)));
                    !reported || leaf.flags().contains(PteFlags::DIRTY)
                });
            }
            Op::ClearAccessed { at, bytes } => {
                let mut visited = Vec::new();
                let edit = || {
                    self.tables
                        .clear_accessed(clip(at, bytes), |leaf| visited.push(leaf))
                };
                let flush = self.cpu.racing(edit).unwrap();
                flush.apply(self.cpu);
                assert!(
                    visited
                        .iter()
                        .all(|leaf| leaf.flags().contains(PteFlags::ACCESSED))
                );
            }
            Op::Prune { at, bytes } => {
                self.cpu
                    .racing(|| self.tables.prune(clip(at, bytes), self.cpu));
            }
            Op::Access { at, write } => {
                self.cpu.targets.borrow_mut().push(at);
                let allowed = self.model.at(at).filter(|(_, flags)| {
                    flags.contains(PteFlags::PRESENT)
                        && (!write || flags.contains(PteFlags::WRITABLE))
                });
                let seen = self.cpu.access(va(at), write);
                assert_eq!(seen, allowed.map(|(to, _)| pa(to)), "access to {at:#x}");
            }
        }
    }

    fn change(
        &mut self,
        range: VirtRange,
        change: Change,
        expected: impl Fn(PteFlags) -> PteFlags,
    ) {
        match self.cpu.racing(|| self.tables.change(range, change)) {
            Ok(flush) => {
                flush.apply(self.cpu);
                self.model
                    .edit(range.start().as_u64(), range.bytes(), |run| {
                        Some(Run {
                            flags: expected(run.flags),
                            ..run
                        })
                    });
            }
            Err(failure) => assert!(!self.plenty && is_out_of_tables(&failure), "{failure}"),
        }
    }

    /// Every page in the range that the CPU wrote to has been shown dirty, or
    /// still is.
    fn assert_reported(&self, range: VirtRange, leaves: &[Leaf]) {
        for &page in self
            .cpu
            .written
            .borrow()
            .iter()
            .filter(|&&page| range.contains(va(page)))
        {
            let reported = leaves.iter().any(|leaf| {
                leaf.range().contains(va(page)) && leaf.flags().contains(PteFlags::DIRTY)
            });
            let leaf = self.tables.leaf(va(page));
            let still = leaf.is_some_and(|leaf| leaf.flags().contains(PteFlags::DIRTY));
            assert!(reported || still, "the dirty bit of {page:#x} was lost");
        }
    }

    fn check(&self) {
        let samples = self.model.samples();
        for &page in &samples {
            let expected = self.model.at(page);
            let leaf = self.tables.leaf(va(page));
            let flags = leaf.map(|leaf| lasting(leaf.flags()));
            assert_eq!(
                flags,
                expected.map(|(_, flags)| flags),
                "attributes of {page:#x}"
            );
            let present = expected.filter(|(_, flags)| flags.contains(PteFlags::PRESENT));
            let to = present.map(|(to, _)| pa(to + 0x123));
            assert_eq!(
                self.tables.translate(va(page + 0x123)),
                to,
                "translation of {page:#x}"
            );
            assert_eq!(self.tables.walk(va(page + 0x123)).translation(), to);
        }
        for &page in &*self.cpu.written.borrow() {
            let leaf = self.tables.leaf(va(page)).unwrap();
            assert!(
                leaf.flags().contains(PteFlags::DIRTY),
                "the dirty bit of {page:#x} was lost"
            );
        }
        self.cpu.assert_nothing_stale(&self.tables, &samples);

        // The leaves, in order, are all there is.
        let mut bytes = 0;
        let mut next = 0;
        for half in [range(0, 1 << 47), range(0xffff_8000_0000_0000, 1 << 47)] {
            self.tables.for_each_leaf(half, |leaf| {
                assert!(leaf.va.as_u64() >= next);
                next = leaf.va.as_u64().saturating_add(leaf.size.bytes());
                bytes += leaf.size.bytes();
            });
        }
        assert_eq!(
            bytes,
            self.model.0.values().map(|run| run.bytes).sum::<u64>()
        );
    }
}

fn trial(tables: usize, seed: u64, ops: &[Op]) {
    let memory = TestMemory::new(tables);
    let pool = memory.pool();
    let cpu = Cpu::new(&memory, seed);
    let racing = Racing {
        memory: &memory,
        cpu: &cpu,
    };
    let watched = Watched {
        tables: TestTables::new(&memory, &pool),
        cpu: &cpu,
    };
    let page_table: Tables<'_> = PageTable::new(racing, watched).unwrap();
    cpu.load(page_table.root());
    let mut trial = Trial {
        tables: page_table,
        cpu: &cpu,
        model: Model::default(),
        plenty: tables > 100,
    };
    for op in ops {
        trial.run(op);
        trial.check();
    }
    // Nothing mapped needs nothing but the root, and the root's is the last
    // table to go.
    cpu.targets.borrow_mut().clear();
    for half in [range(0, 1 << 47), range(0xffff_8000_0000_0000, 1 << 47)] {
        trial.tables.unmap(half, |_| ()).unwrap().apply(&cpu);
        if ops.len().is_multiple_of(2) {
            trial.tables.prune(half, &cpu);
        }
    }
    if ops.len().is_multiple_of(2) {
        assert_eq!(pool.in_use(), 1);
    }
    let in_use = u64::from(pool.in_use());
    // It is freed when it is no longer loaded.
    cpu.flush_all();
    assert_eq!(trial.tables.free(), in_use);
    assert_eq!(pool.in_use(), 0);
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases: if cfg!(miri) { 2 } else { cases },
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

const LONGEST: usize = if cfg!(miri) { 8 } else { 60 };

proptest! {
    #![proptest_config(config(400))]

    #[test]
    #[cfg_attr(miri, ignore = "takes hours under Miri; there is no unsafe code in it")]
    fn edits_do_what_the_model_does(
        seed in any::<u64>(),
        ops in prop::collection::vec(op(), 1..LONGEST),
    ) {
        trial(if cfg!(miri) { 24 } else { 200 }, seed, &ops);
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes hours under Miri; there is no unsafe code in it")]
    fn edits_without_memory_for_tables_change_nothing(
        seed in any::<u64>(),
        ops in prop::collection::vec(op(), 1..LONGEST),
    ) {
        trial(9, seed, &ops);
    }

    /// Pages that are merged and split while the CPU writes to them. (Random
    /// edits seldom leave 512 pages that can be merged.)
    #[test]
    #[cfg_attr(miri, ignore = "takes hours under Miri; there is no unsafe code in it")]
    fn merging_under_a_writing_cpu_loses_no_dirty_bit(
        seed in any::<u64>(),
        pages in prop::collection::vec(0..512_u64, 1..20),
        rounds in 1..if cfg!(miri) { 2 } else { 6_usize },
    ) {
        const AT: u64 = 0x7f00_0000_0000;
        let memory = TestMemory::new(8);
        let pool = memory.pool();
        let cpu = Cpu::new(&memory, seed);
        let racing = Racing { memory: &memory, cpu: &cpu };
        let watched = Watched { tables: TestTables::new(&memory, &pool), cpu: &cpu };
        let mut tables: Tables<'_> = PageTable::new(racing, watched).unwrap();
        cpu.load(tables.root());
        let whole = range(AT, 0x20_0000);
        tables.map_range(whole, pa(0x60_0000), PageSize::Size4KiB, PteFlags::RW).unwrap();
        cpu.targets.borrow_mut().extend(pages.iter().map(|page| AT + page * PAGE));
        for round in 0..rounds {
            for page in pages.iter().skip(round % 2).step_by(2) {
                cpu.access(va(AT + page * PAGE), round % 3 == 0);
            }
            cpu.racing(|| tables.collapse(va(AT), PageSize::Size2MiB, &cpu)).unwrap();
            assert_eq!(tables.leaf(va(AT)).unwrap().size, PageSize::Size2MiB);
            let dirty = |page| tables.leaf(va(page)).unwrap().flags().contains(PteFlags::DIRTY);
            assert!(cpu.written.borrow().iter().all(|&page| dirty(page)));
            cpu.assert_nothing_stale(&tables, &BTreeSet::new());

            // One flush is enough for the large page, so no small one may be
            // cached any more.
            let read_only = Change::clear(PteFlags::WRITABLE);
            let writable = Change::set(PteFlags::WRITABLE);
            tables.update_leaf(va(AT), read_only).unwrap().1.apply(&cpu);
            for page in &pages {
                assert_eq!(cpu.access(va(AT + page * PAGE), true), None);
            }
            tables.update_leaf(va(AT), writable).unwrap().1.apply(&cpu);

            cpu.racing(|| tables.split(va(AT), PageSize::Size4KiB)).unwrap().apply(&cpu);
            assert!(cpu.written.borrow().iter().all(|&page| dirty(page)));
            cpu.racing(|| tables.clear_dirty(whole, |_| ())).unwrap().apply(&cpu);
            cpu.written.borrow_mut().retain(|&page| dirty(page));
        }
    }

    /// A CPU that looks at what was unmapped keeps links to empty tables.
    #[test]
    #[cfg_attr(miri, ignore = "takes hours under Miri; there is no unsafe code in it")]
    fn pruned_tables_are_freed_when_the_cpu_has_forgotten_them(
        seed in any::<u64>(),
        pages in prop::collection::vec(0..0x1000_u64, 1..20),
    ) {
        const AT: u64 = 0x7f00_0000_0000;
        let memory = TestMemory::new(16);
        let pool = memory.pool();
        let cpu = Cpu::new(&memory, seed);
        let racing = Racing { memory: &memory, cpu: &cpu };
        let watched = Watched { tables: TestTables::new(&memory, &pool), cpu: &cpu };
        let mut tables: Tables<'_> = PageTable::new(racing, watched).unwrap();
        cpu.load(tables.root());
        let whole = range(AT, 0x100_0000);
        for &page in &pages {
            // The same page may come twice.
            let _ = tables.map(va(AT + page * PAGE), pa(0), PageSize::Size4KiB, PteFlags::RW);
        }
        cpu.targets.borrow_mut().extend(pages.iter().map(|page| AT + page * PAGE));
        cpu.racing(|| tables.unmap(whole, |_| ())).unwrap().apply(&cpu);
        for page in &pages {
            assert_eq!(cpu.access(va(AT + page * PAGE), false), None);
        }
        let freed = cpu.racing(|| tables.prune(whole, &cpu));
        assert_eq!(pool.in_use(), 1);
        assert!(freed >= 3);
        assert_eq!(tables.prune(whole, &cpu), 0);
    }
}
