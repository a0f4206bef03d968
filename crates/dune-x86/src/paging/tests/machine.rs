//! A machine for the tests: memory for tables, and a CPU that caches.

use core::cell::{Cell, RefCell};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::collections::{BTreeMap, BTreeSet};
use std::vec::Vec;

use crate::addr::{GuestPhys, GuestVirt, PageSize, VirtRange};
use crate::frame::{FramePool, PooledTables};
use crate::paging::{
    ENTRIES, Entry, EntryKind, FlushTlb, FrameAllocator, Level, PageTable, PteFlags, TableMemory,
};

/// Where the tables are. Not 0, so that a forgotten address is noticed.
pub(super) const TABLES: GuestPhys = GuestPhys::new(0x10_0000);

/// What a freed table is filled with: every entry is one that the CPU must
/// never read.
const POISON: u64 = 0xdead_dead_dead_dead;

pub(super) fn va(address: u64) -> GuestVirt {
    GuestVirt::new(address)
}

pub(super) fn pa(address: u64) -> GuestPhys {
    GuestPhys::new(address)
}

pub(super) fn range(start: u64, bytes: u64) -> VirtRange {
    VirtRange::try_new(va(start), bytes).unwrap()
}

/// Memory that holds tables, and the words of their pool.
pub(super) struct TestMemory {
    entries: Vec<AtomicU64>,
    words: Vec<AtomicU32>,
}

impl TestMemory {
    pub(super) fn new(tables: usize) -> Self {
        Self {
            entries: (0..tables * ENTRIES)
                .map(|_| AtomicU64::new(POISON))
                .collect(),
            words: (0..tables).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    pub(super) fn pool(&self) -> FramePool<'_> {
        FramePool::new(TABLES, PageSize::Size4KiB, &self.words).unwrap()
    }

    fn entry(&self, table: GuestPhys, index: usize) -> &AtomicU64 {
        assert!(index < ENTRIES && table.is_aligned(PageSize::Size4KiB));
        let number = table.distance_from(TABLES).unwrap() as usize / 4096;
        &self.entries[number * ENTRIES + index]
    }
}

impl TableMemory for TestMemory {
    fn read(&self, table: GuestPhys, index: usize) -> u64 {
        let value = self.entry(table, index).load(Ordering::Acquire);
        assert_ne!(value, POISON, "read of a table that is free");
        value
    }

    fn write(&self, table: GuestPhys, index: usize, value: u64) {
        self.entry(table, index).store(value, Ordering::Relaxed);
    }

    fn compare_exchange(
        &self,
        table: GuestPhys,
        index: usize,
        old: u64,
        new: u64,
    ) -> Result<u64, u64> {
        let entry = self.entry(table, index);
        let result = entry.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire);
        assert_ne!(result, Err(POISON), "edit of a table that is free");
        result
    }
}

/// Tables from the pool; freed ones are poisoned.
#[derive(Clone, Copy)]
pub(super) struct TestTables<'a> {
    memory: &'a TestMemory,
    tables: PooledTables<'a, &'a TestMemory>,
}

impl<'a> TestTables<'a> {
    pub(super) fn new(memory: &'a TestMemory, pool: &'a FramePool<'a>) -> Self {
        Self {
            memory,
            tables: PooledTables::new(pool, memory).unwrap(),
        }
    }
}

impl FrameAllocator for TestTables<'_> {
    fn allocate_table(&self) -> Option<GuestPhys> {
        self.tables.allocate_table()
    }

    fn free_table(&self, table: GuestPhys) {
        for index in 0..ENTRIES {
            self.memory.write(table, index, POISON);
        }
        self.tables.free_table(table);
    }
}

/// Tables that a CPU walks: checks that it has forgotten a table that is freed.
#[derive(Clone, Copy)]
pub(super) struct Watched<'a> {
    pub(super) tables: TestTables<'a>,
    pub(super) cpu: &'a Cpu<'a>,
}

impl FrameAllocator for Watched<'_> {
    fn allocate_table(&self) -> Option<GuestPhys> {
        self.tables.allocate_table()
    }

    fn free_table(&self, table: GuestPhys) {
        let links = self.cpu.links.borrow();
        assert!(
            links.values().all(|&link| link != table),
            "{table} is still in use"
        );
        self.tables.free_table(table);
    }
}

/// A translation in the TLB.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cached {
    pub(super) size: PageSize,
    pub(super) page: GuestPhys,
    pub(super) writable: bool,
    pub(super) dirty: bool,
}

/// A CPU with a TLB and a cache of links to page tables, which keeps what it
/// cached until it is told to flush, as it may (SDM vol. 3A section 4.10).
pub(super) struct Cpu<'a> {
    memory: &'a TestMemory,
    root: Cell<GuestPhys>,
    tlb: RefCell<BTreeMap<u64, Cached>>,
    links: RefCell<BTreeMap<u64, GuestPhys>>,
    /// The 4 KiB pages written to and not yet reported dirty by the code under
    /// test.
    pub(super) written: RefCell<BTreeSet<u64>>,
    /// What it may touch on its own while tables are edited.
    pub(super) targets: RefCell<Vec<u64>>,
    running: Cell<bool>,
    random: Cell<u64>,
    pub(super) flushes: Cell<u32>,
}

impl<'a> Cpu<'a> {
    pub(super) fn new(memory: &'a TestMemory, seed: u64) -> Self {
        Self {
            memory,
            root: Cell::new(GuestPhys::ZERO),
            tlb: RefCell::default(),
            links: RefCell::default(),
            written: RefCell::default(),
            targets: RefCell::default(),
            running: Cell::new(false),
            random: Cell::new(seed | 1),
            flushes: Cell::new(0),
        }
    }

    pub(super) fn load(&self, root: GuestPhys) {
        self.flush_all();
        self.root.set(root);
    }

    /// xorshift64.
    pub(super) fn random(&self) -> u64 {
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random.set(x);
        x
    }

    /// Runs an edit while the CPU touches its targets.
    pub(super) fn racing<R>(&self, edit: impl FnOnce() -> R) -> R {
        self.running.set(true);
        let result = edit();
        self.running.set(false);
        result
    }

    /// Touches one of its targets, in one of `odds` cases (a power of two).
    fn run_ahead(&self, odds: u64) {
        let targets = self.targets.borrow();
        let random = self.random();
        if !self.running.get() || targets.is_empty() || (random >> 3) & (odds - 1) != 0 {
            return;
        }
        let target = targets[(random >> 16) as usize % targets.len()];
        self.access(va(target), random & 4 == 0);
    }

    /// Reads or writes at an address; returns the physical one, or `None` for a
    /// page fault.
    pub(super) fn access(&self, at: GuestVirt, write: bool) -> Option<GuestPhys> {
        let hit = self.cached(at);
        let cached = match hit {
            Some(cached) if !write || (cached.writable && cached.dirty) => cached,
            _ => match self.fill(at, write) {
                Some(cached) => cached,
                None => {
                    // A fault drops what was cached for the address.
                    self.tlb
                        .borrow_mut()
                        .retain(|&base, cached| !covers(base, *cached, at));
                    return None;
                }
            },
        };
        if write {
            self.written
                .borrow_mut()
                .insert(at.align_down(PageSize::Size4KiB).as_u64());
        }
        cached.page.checked_add(at.page_offset(cached.size))
    }

    fn cached(&self, at: GuestVirt) -> Option<Cached> {
        let tlb = self.tlb.borrow();
        let mut hits = tlb
            .iter()
            .filter(|&(&base, &cached)| covers(base, cached, at));
        // Which of several it uses is up to the CPU.
        let first = hits.next()?;
        let second = hits.next().filter(|_| self.random() & 1 == 0);
        Some(*second.unwrap_or(first).1)
    }

    /// Walks the tables, sets A and D, caches the translation.
    fn fill(&self, at: GuestVirt, write: bool) -> Option<Cached> {
        let link = at.as_u64() >> 21;
        let known = self
            .links
            .borrow()
            .get(&link)
            .copied()
            .filter(|_| self.random() & 1 == 0);
        let (mut table, mut level) = match known {
            Some(table) => (table, Level::Pt),
            None => (self.root.get(), Level::Pml4),
        };
        let mut writable = true;
        loop {
            let index = level.index(at);
            let entry = Entry(self.memory.read(table, index));
            if !entry.is_present() {
                return None;
            }
            writable &= entry.0 & PteFlags::WRITABLE.bits() != 0;
            if write && !writable {
                return None;
            }
            match entry.kind(level) {
                EntryKind::Link => {
                    self.set(table, index, entry, PteFlags::ACCESSED)?;
                    table = entry.table();
                    level = level.below().unwrap();
                    if level == Level::Pt {
                        self.links.borrow_mut().insert(link, table);
                    }
                }
                EntryKind::Leaf(size) => {
                    let dirty = if write {
                        PteFlags::DIRTY
                    } else {
                        PteFlags::empty()
                    };
                    self.set(table, index, entry, PteFlags::ACCESSED | dirty)?;
                    let dirty = write || entry.0 & PteFlags::DIRTY.bits() != 0;
                    let cached = Cached {
                        size,
                        page: entry.page(size),
                        writable,
                        dirty,
                    };
                    // At most one per page size, as keys differ by size.
                    let key = at.align_down(size).as_u64() | size.shift() as u64;
                    self.tlb.borrow_mut().insert(key, cached);
                    return Some(cached);
                }
                kind => panic!("the CPU met a {kind:?} entry {entry:?} at {level:?} for {at}"),
            }
        }
    }

    /// The locked update of A and D, which fails over to a new walk (here: a
    /// fault, as nobody else runs in between).
    fn set(&self, table: GuestPhys, index: usize, old: Entry, bits: PteFlags) -> Option<()> {
        self.memory
            .compare_exchange(table, index, old.0, old.0 | bits.bits())
            .ok()
            .map(|_| ())
    }

    /// Checks that the CPU holds no translation that the tables do not grant.
    pub(super) fn assert_nothing_stale<M: TableMemory, A: FrameAllocator>(
        &self,
        tables: &PageTable<M, A>,
        samples: &BTreeSet<u64>,
    ) {
        for (&key, cached) in &*self.tlb.borrow() {
            let first = key & !0xfff;
            let last = first + (cached.size.bytes() - 1);
            let within = samples
                .range(first..=last)
                .copied()
                .chain([first, last & !0xfff]);
            for at in within.map(va) {
                let walk = tables.walk(at);
                let expected = cached.page.checked_add(at.as_u64() - first);
                assert_eq!(walk.translation(), expected, "a stale translation of {at}");
                let allowed = walk.permissions().unwrap();
                assert!(
                    allowed.writable || !cached.writable,
                    "a stale right to write {at}"
                );
                let flags = walk.leaf().unwrap().flags();
                assert!(
                    flags.contains(PteFlags::DIRTY) || !(cached.dirty && cached.writable),
                    "writes to {at} would not set D"
                );
            }
        }
    }

    fn invalidate(&self, range: VirtRange) {
        self.flushes.set(self.flushes.get() + 1);
        self.links.borrow_mut().clear();
        self.tlb.borrow_mut().retain(|&key, cached| {
            let page = VirtRange::page(va(key & !0xfff), cached.size);
            page.intersection(range).is_none()
        });
    }
}

fn covers(key: u64, cached: Cached, at: GuestVirt) -> bool {
    VirtRange::page(va(key & !0xfff), cached.size).contains(at)
}

impl FlushTlb for Cpu<'_> {
    fn flush_page(&self, va: GuestVirt) {
        self.invalidate(VirtRange::try_new(va, 1).unwrap());
    }

    fn flush_range(&self, range: VirtRange, stride: PageSize) {
        // One INVLPG per stride, not the range as such: what the trait says.
        for page in range.pages(stride) {
            self.flush_page(page);
        }
    }

    fn flush_all(&self) {
        self.flushes.set(self.flushes.get() + 1);
        self.links.borrow_mut().clear();
        self.tlb.borrow_mut().clear();
    }
}

/// Memory in which the CPU gets ahead of the code under test: now and then
/// between a read and what follows, mostly around a compare-and-exchange.
pub(super) struct Racing<'a> {
    pub(super) memory: &'a TestMemory,
    pub(super) cpu: &'a Cpu<'a>,
}

impl TableMemory for Racing<'_> {
    fn read(&self, table: GuestPhys, index: usize) -> u64 {
        let value = self.memory.read(table, index);
        self.cpu.run_ahead(16);
        value
    }

    fn write(&self, table: GuestPhys, index: usize, value: u64) {
        self.memory.write(table, index, value);
    }

    fn compare_exchange(
        &self,
        table: GuestPhys,
        index: usize,
        old: u64,
        new: u64,
    ) -> Result<u64, u64> {
        self.cpu.run_ahead(2);
        let result = self.memory.compare_exchange(table, index, old, new);
        self.cpu.run_ahead(2);
        result
    }
}

/// Memory in which another thread gets in before one certain
/// compare-and-exchange.
pub(super) struct Interrupted<'a> {
    pub(super) memory: &'a TestMemory,
    /// How many go undisturbed.
    pub(super) countdown: Cell<u32>,
    pub(super) interruption: &'a dyn Fn(),
}

impl TableMemory for Interrupted<'_> {
    fn read(&self, table: GuestPhys, index: usize) -> u64 {
        self.memory.read(table, index)
    }

    fn write(&self, table: GuestPhys, index: usize, value: u64) {
        self.memory.write(table, index, value);
    }

    fn compare_exchange(
        &self,
        table: GuestPhys,
        index: usize,
        old: u64,
        new: u64,
    ) -> Result<u64, u64> {
        // It wraps, far from the next turn.
        if self.countdown.replace(self.countdown.get().wrapping_sub(1)) == 0 {
            (self.interruption)();
        }
        self.memory.compare_exchange(table, index, old, new)
    }
}
