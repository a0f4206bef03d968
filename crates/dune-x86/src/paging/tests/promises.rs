//! The promises that the documentation makes, one by one.

use core::cell::Cell;
use std::vec;
use std::vec::Vec;

use super::machine::{Cpu, Interrupted, TABLES, TestMemory, TestTables, pa, range, va};
use crate::addr::{GuestPhys, GuestVirt, PageSize, VirtRange};
use crate::frame::FramePool;
use crate::paging::{
    Change, CloneError, CollapseError, EditError, Entry, Flush, FlushScope, FlushTlb, Leaf, Level,
    MapError, NoFlush, NoPage, PageTable, Permissions, PteFlags, ShareError, SplitError,
    TableMemory, WalkEnd,
};

type Tables<'a, const LEVELS: u8 = 4> = PageTable<&'a TestMemory, TestTables<'a>, LEVELS>;

const BASE: u64 = 0x7f00_4000_0000;
const GIB: u64 = 1 << 30;
const MIB2: u64 = 2 << 20;

fn tables<'a, const LEVELS: u8>(
    memory: &'a TestMemory,
    pool: &'a FramePool<'a>,
) -> Tables<'a, LEVELS> {
    PageTable::new(memory, TestTables::new(memory, pool)).unwrap()
}

fn leaves(tables: &Tables<'_>, range: VirtRange) -> Vec<Leaf> {
    let mut leaves = vec![];
    tables.for_each_leaf(range, |leaf| leaves.push(leaf));
    leaves
}

fn done(flush: Flush) {
    flush.ignore(NoFlush::NotLoaded);
}

#[test]
fn a_walk_shows_the_way_and_what_is_allowed() {
    let memory = TestMemory::new(8);
    let pool = memory.pool();
    let tables: Tables<'_> = tables(&memory, &pool);
    let flags = (PteFlags::RWX | PteFlags::USER).with_pkey(5);
    tables
        .map(va(BASE), pa(0x1234_5000), PageSize::Size4KiB, flags)
        .unwrap();

    let walk = tables.walk(va(BASE + 0x678));
    assert_eq!(walk.translation(), Some(pa(0x1234_5678)));
    let levels: Vec<_> = walk.steps().iter().map(|step| step.level).collect();
    assert_eq!(levels, [Level::Pml4, Level::Pdpt, Level::Pd, Level::Pt]);
    let all = Permissions {
        writable: true,
        user: true,
        executable: true,
        pkey: 5,
    };
    assert_eq!(walk.permissions(), Some(all));

    // A link that forbids, forbids for all that is below.
    let pd = walk.steps()[2];
    let restricted = (pd.entry.0 | PteFlags::NO_EXECUTE.bits())
        & !PteFlags::WRITABLE.bits()
        & !PteFlags::USER.bits();
    memory.write(pd.table, pd.index, restricted);
    let none = Permissions {
        writable: false,
        user: false,
        executable: false,
        pkey: 5,
    };
    assert_eq!(tables.walk(va(BASE)).permissions(), Some(none));

    assert_eq!(
        tables.walk(va(BASE + 0x1000)).end(),
        WalkEnd::Empty(Level::Pt)
    );
    assert_eq!(
        tables.walk(va(BASE + GIB)).end(),
        WalkEnd::Empty(Level::Pdpt)
    );
    assert_eq!(tables.walk(va(0)).steps().len(), 1);
}

#[test]
fn addresses_beyond_48_bits_are_refused() {
    let memory = TestMemory::new(8);
    let pool = memory.pool();
    let mut tables: Tables<'_> = tables(&memory, &pool);
    let at = va(0x8000_0000_0000);
    let page = VirtRange::page(at, PageSize::Size4KiB);
    assert_eq!(tables.walk(at).end(), WalkEnd::NonCanonical);
    assert_eq!(tables.translate(at), None);
    assert_eq!(tables.leaf_entry_4k(at), None);
    assert_eq!(
        tables.map(at, pa(0), PageSize::Size4KiB, PteFlags::RW),
        Err(MapError::NonCanonical { range: page })
    );
    // The last byte counts, too.
    let across = range(0x7fff_ffff_f000, 0x2000);
    assert_eq!(
        tables.map_range(across, pa(0), PageSize::Size4KiB, PteFlags::RW),
        Err(MapError::NonCanonical { range: across })
    );
    let failure = tables.protect(across, PteFlags::R).unwrap_err();
    assert_eq!(failure.cause, EditError::NonCanonical { range: across });
    assert_eq!(
        tables.update_page_4k(at, Change::set(PteFlags::AVL0)),
        Err(NoPage { va: at })
    );
    assert_eq!(
        tables.split(at, PageSize::Size4KiB),
        Err(SplitError::NotMapped { va: at })
    );
    let cpu = Cpu::new(&memory, 1);
    assert_eq!(
        tables.collapse(at, PageSize::Size2MiB, &cpu),
        Err(CollapseError::NoTable { va: at })
    );
}

#[test]
fn what_is_not_aligned_is_refused() {
    let memory = TestMemory::new(8);
    let pool = memory.pool();
    let tables: Tables<'_> = tables(&memory, &pool);
    let map = |at, to, size| tables.map(va(at), pa(to), size, PteFlags::RW);
    assert!(matches!(
        map(BASE + 1, 0, PageSize::Size4KiB),
        Err(MapError::Unaligned { .. })
    ));
    assert!(matches!(
        map(BASE, 0x1000, PageSize::Size2MiB),
        Err(MapError::Unaligned { .. })
    ));
    assert!(matches!(
        map(BASE + MIB2, 0, PageSize::Size1GiB),
        Err(MapError::Unaligned { .. })
    ));
    let odd = range(BASE, 0x1800);
    assert_eq!(
        tables.unmap(odd, |_| ()).unwrap_err().cause,
        EditError::Unaligned { range: odd }
    );
    let far = pa((1 << 52) - 0x1000);
    assert!(matches!(
        tables.map_range(range(BASE, 0x2000), far, PageSize::Size4KiB, PteFlags::RW),
        Err(MapError::BeyondPhysical { .. })
    ));
    assert_eq!(pool.in_use(), 1);
}

#[test]
fn ranges_get_the_largest_pages_that_fit() {
    let memory = TestMemory::new(16);
    let pool = memory.pool();
    let tables: Tables<'_> = tables(&memory, &pool);
    let start = BASE - MIB2 - 0x1000;
    let bytes = 0x1000 + MIB2 + GIB + MIB2 + 0x1000;
    let whole = range(start, bytes);
    let to = pa(4 * GIB - MIB2 - 0x1000);
    tables
        .map_range(whole, to, PageSize::Size1GiB, PteFlags::RW)
        .unwrap();
    let [small, large, giant] = PageSize::ALL;
    let sizes: Vec<_> = leaves(&tables, whole)
        .iter()
        .map(|leaf| leaf.size)
        .collect();
    assert_eq!(sizes, [small, large, giant, large, small]);
    assert_eq!(
        tables.translate(va(BASE + 0x1234)),
        Some(pa(4 * GIB + 0x1234))
    );
    assert_eq!(tables.translate(va(start)), Some(to));

    // Addresses that do not fit together allow only small pages.
    let other = range(BASE + 4 * GIB, MIB2);
    tables
        .map_range(other, pa(0x1000), PageSize::Size1GiB, PteFlags::RW)
        .unwrap();
    assert_eq!(leaves(&tables, other).len(), 512);
}

#[test]
fn the_end_of_the_address_space_can_be_mapped() {
    let memory = TestMemory::new(8);
    let pool = memory.pool();
    let tables: Tables<'_> = tables(&memory, &pool);
    let end = range(0xffff_ffff_ffc0_0000, 4 << 20);
    tables
        .map_range(end, pa(0), PageSize::Size2MiB, PteFlags::RW)
        .unwrap();
    assert_eq!(tables.translate(va(u64::MAX)), Some(pa((4 << 20) - 1)));
    let last = VirtRange::page(va(u64::MAX), PageSize::Size4KiB);
    done(tables.protect(last, PteFlags::R).unwrap());
    assert_eq!(leaves(&tables, end).len(), 1 + 512);
    done(tables.unmap(end, |_| ()).unwrap());
    assert_eq!(leaves(&tables, end), []);

    let lower = range(0x7fff_ffff_f000, 0x1000);
    tables
        .map_range(lower, pa(0), PageSize::Size4KiB, PteFlags::RW)
        .unwrap();
    done(tables.unmap(lower, |_| ()).unwrap());
}

#[test]
fn splits_keep_attributes_and_translations() {
    let memory = TestMemory::new(8);
    let pool = memory.pool();
    let tables: Tables<'_> = tables(&memory, &pool);
    let flags = (PteFlags::RW | PteFlags::PAT | PteFlags::DIRTY | PteFlags::AVL2).with_pkey(11);
    tables
        .map(va(BASE), pa(3 * GIB), PageSize::Size1GiB, flags)
        .unwrap();
    let at = va(BASE + 5 * MIB2 + 0x3000);
    assert_eq!(
        tables.split(at, PageSize::Size4KiB).unwrap().scope(),
        FlushScope::Page(at)
    );
    let all = leaves(&tables, range(BASE, GIB));
    assert_eq!(all.len(), 511 + 512);
    for leaf in all {
        assert_eq!(leaf.flags(), flags);
        assert_eq!(leaf.page().as_u64() - 3 * GIB, leaf.va.as_u64() - BASE);
    }
    let small = tables.leaf(at).unwrap();
    assert_eq!(
        small.entry.0 & (1 << 7),
        1 << 7,
        "PAT of a 4 KiB page is bit 7"
    );
    let large = tables.leaf(va(BASE)).unwrap();
    assert_eq!(
        large.entry.0 & (1 << 12),
        1 << 12,
        "PAT of a 2 MiB page is bit 12"
    );
    assert!(tables.split(at, PageSize::Size2MiB).unwrap().is_nothing());
}

#[test]
fn only_taking_away_costs_a_flush() {
    let memory = TestMemory::new(8);
    let pool = memory.pool();
    let tables: Tables<'_> = tables(&memory, &pool);
    let page = range(BASE, 0x1000);
    let two = range(BASE, 0x2000);
    tables
        .map_range(two, pa(0), PageSize::Size4KiB, PteFlags::RW)
        .unwrap();
    let scope = |flush: Result<Flush, _>| {
        let flush: Flush = flush.unwrap();
        flush.scope()
    };
    assert_eq!(
        scope(tables.protect(page, PteFlags::R)),
        FlushScope::Page(va(BASE))
    );
    assert_eq!(
        scope(tables.protect(page, PteFlags::R)),
        FlushScope::Nothing
    );
    assert_eq!(
        scope(tables.protect(two, PteFlags::RW)),
        FlushScope::Nothing
    );
    assert_eq!(
        scope(tables.protect(two, PteFlags::empty())),
        FlushScope::Range(two, PageSize::Size4KiB)
    );
    // Parked pages are in no TLB.
    assert_eq!(scope(tables.unmap(two, |_| ())), FlushScope::Nothing);

    tables
        .map(va(BASE), pa(0), PageSize::Size4KiB, PteFlags::RW)
        .unwrap();
    let (old, flush) = tables
        .update_page_4k(va(BASE), Change::clear(PteFlags::WRITABLE))
        .unwrap();
    assert!(old.flags(PageSize::Size4KiB).contains(PteFlags::RW));
    assert_eq!(flush.scope(), FlushScope::Page(va(BASE)));
    let (_, flush) = tables
        .update_page_4k(va(BASE), Change::set(PteFlags::WRITABLE))
        .unwrap();
    assert!(flush.is_nothing());
}

#[test]
fn parked_pages_keep_their_translation_even_to_zero() {
    let memory = TestMemory::new(8);
    let pool = memory.pool();
    let tables: Tables<'_> = tables(&memory, &pool);
    tables
        .map(va(BASE), pa(0), PageSize::Size2MiB, PteFlags::RX)
        .unwrap();
    let page = range(BASE, 0x1000);
    done(tables.protect(page, PteFlags::empty()).unwrap());
    assert_eq!(tables.translate(va(BASE)), None);
    assert!(!tables.leaf(va(BASE)).unwrap().is_present());
    assert!(matches!(
        tables.map(va(BASE), pa(0), PageSize::Size4KiB, PteFlags::RW),
        Err(MapError::AlreadyMapped { .. })
    ));
    done(tables.protect(page, PteFlags::RW).unwrap());
    assert_eq!(tables.translate(va(BASE)), Some(pa(0)));
    let (table, index) = tables.leaf_entry_4k(va(BASE)).unwrap();
    assert!(
        tables
            .update_entry_4k(table, index, va(BASE), Change::set(PteFlags::AVL0))
            .is_ok()
    );
}

#[test]
fn without_memory_to_split_nothing_is_removed() {
    // Root, PDPT, PD, and one table: one of the two splits cannot be done.
    let memory = TestMemory::new(4);
    let pool = memory.pool();
    let tables: Tables<'_> = tables(&memory, &pool);
    let whole = range(BASE, 2 * MIB2);
    tables
        .map_range(whole, pa(0), PageSize::Size2MiB, PteFlags::RW)
        .unwrap();
    let middle = range(BASE + 0x1000, 2 * MIB2 - 0x2000);
    let failure = tables.unmap(middle, |_| panic!("removed")).unwrap_err();
    let at = va(BASE + 2 * MIB2 - 0x1000);
    assert_eq!(
        failure.cause,
        EditError::OutOfTables {
            va: at,
            size: PageSize::Size2MiB
        }
    );
    assert!(failure.flush.is_nothing());
    assert!(tables.translate(va(BASE + MIB2)).is_some());

    assert_eq!(
        tables.map(va(0), pa(0), PageSize::Size4KiB, PteFlags::RW),
        Err(MapError::OutOfTables { va: va(0) })
    );
}

#[test]
fn a_fast_place_is_only_given_for_own_small_tables() {
    let memory = TestMemory::new(16);
    let pool = memory.pool();
    let tables: Tables<'_> = tables(&memory, &pool);
    assert_eq!(tables.leaf_entry_4k(va(BASE)), None);
    tables
        .map(va(BASE), pa(0), PageSize::Size2MiB, PteFlags::RW)
        .unwrap();
    assert_eq!(tables.leaf_entry_4k(va(BASE)), None);
    done(tables.split(va(BASE), PageSize::Size4KiB).unwrap());
    let (table, index) = tables.leaf_entry_4k(va(BASE + 0x7000)).unwrap();
    assert_eq!(index, 7);
    assert_eq!(
        Entry(memory.read(table, index)).page(PageSize::Size4KiB),
        pa(0x7000)
    );
    let borrower = tables.clone_shallow().unwrap();
    assert_eq!(borrower.leaf_entry_4k(va(BASE)), None);
}

#[test]
fn a_shallow_clone_follows_its_lender_and_edits_nothing() {
    let memory = TestMemory::new(32);
    let pool = memory.pool();
    let cpu = Cpu::new(&memory, 1);
    let mut lender: Tables<'_> = tables(&memory, &pool);
    lender
        .map(va(BASE), pa(0x5000), PageSize::Size4KiB, PteFlags::RW)
        .unwrap();
    let mut clone = lender.clone_shallow().unwrap();
    assert_eq!(clone.translate(va(BASE)), Some(pa(0x5000)));

    // What the lender does under the same top-level entry shows.
    lender
        .map(va(BASE + GIB), pa(GIB), PageSize::Size1GiB, PteFlags::RW)
        .unwrap();
    assert_eq!(clone.translate(va(BASE + GIB)), Some(pa(GIB)));

    // No edit goes through a borrowed link.
    let at = va(BASE);
    let page = range(BASE, 0x1000);
    assert_eq!(
        clone.map(va(BASE + 0x1000), pa(0), PageSize::Size4KiB, PteFlags::RW),
        Err(MapError::Borrowed {
            va: va(BASE + 0x1000)
        })
    );
    assert_eq!(
        clone.unmap(page, |_| ()).unwrap_err().cause,
        EditError::Borrowed { va: at }
    );
    assert_eq!(
        clone.protect(page, PteFlags::R).unwrap_err().cause,
        EditError::Borrowed { va: at }
    );
    assert_eq!(
        clone.update_leaf(at, Change::set(PteFlags::AVL0)),
        Err(NoPage { va: at })
    );
    assert_eq!(
        clone.update_page_4k(at, Change::set(PteFlags::AVL0)),
        Err(NoPage { va: at })
    );
    assert_eq!(
        clone.split(va(BASE + GIB), PageSize::Size2MiB),
        Err(SplitError::Borrowed { va: va(BASE + GIB) })
    );
    assert_eq!(
        clone.collapse(at, PageSize::Size2MiB, &cpu),
        Err(CollapseError::Borrowed { va: at })
    );

    // What it maps elsewhere is its own; a new entry of the lender's is shared
    // when asked for.
    clone
        .map(va(0), pa(0), PageSize::Size4KiB, PteFlags::RW)
        .unwrap();
    let upper = va(0xffff_8000_0000_0000);
    lender
        .map(upper, pa(0), PageSize::Size1GiB, PteFlags::RW)
        .unwrap();
    assert_eq!(clone.translate(upper), None);
    clone
        .share_from(&lender, VirtRange::page(upper, PageSize::Size4KiB))
        .unwrap();
    assert_eq!(clone.translate(upper), Some(pa(0)));
    lender
        .map(va(0), pa(0), PageSize::Size4KiB, PteFlags::RW)
        .unwrap();
    assert!(matches!(
        clone.share_from(&lender, range(0, 0x1000)),
        Err(ShareError::Occupied { .. })
    ));

    // Pruning frees neither what is lent nor what is borrowed.
    done(lender.unmap(range(BASE, 2 * GIB), |_| ()).unwrap());
    let everything = range(0, 1 << 47);
    assert_eq!(clone.prune(everything, &cpu), 0);
    assert_eq!(
        lender.prune(everything, &cpu),
        2,
        "the page table and the directory"
    );
    assert_eq!(clone.translate(va(BASE)), None);
    lender
        .map(va(BASE), pa(0x6000), PageSize::Size4KiB, PteFlags::RW)
        .unwrap();
    assert_eq!(clone.translate(va(BASE)), Some(pa(0x6000)));

    assert_eq!(clone.free(), 4);
    assert_eq!(lender.translate(va(BASE)), Some(pa(0x6000)));
    lender.free();
    assert_eq!(pool.in_use(), 0);
}

#[test]
fn a_deep_clone_is_cut_to_its_range_and_on_its_own() {
    let memory = TestMemory::new(64);
    let pool = memory.pool();
    let tables: Tables<'_> = tables(&memory, &pool);
    let flags = PteFlags::RW | PteFlags::DIRTY;
    tables
        .map(va(BASE), pa(GIB), PageSize::Size1GiB, flags | PteFlags::PAT)
        .unwrap();
    tables
        .map(va(BASE + GIB), pa(0), PageSize::Size4KiB, flags)
        .unwrap();
    tables
        .map(
            va(BASE + GIB + 0x1000),
            pa(0x9000),
            PageSize::Size4KiB,
            flags,
        )
        .unwrap();
    let wanted = range(BASE + MIB2 + 0x1000, GIB - MIB2);
    let clone = tables
        .clone_deep(wanted, |leaf| {
            Some(Change::clear(PteFlags::WRITABLE).apply(leaf.entry))
        })
        .unwrap();
    assert_eq!(clone.translate(va(BASE + MIB2)), None);
    assert_eq!(
        clone.translate(wanted.start()),
        Some(pa(GIB + MIB2 + 0x1000))
    );
    assert_eq!(clone.translate(va(BASE + GIB)), Some(pa(0)));
    assert_eq!(clone.translate(va(BASE + GIB + 0x1000)), None);
    let cut = clone.leaf(va(BASE + GIB / 2)).unwrap();
    assert_eq!(cut.size, PageSize::Size2MiB);
    assert_eq!(cut.flags(), (flags - PteFlags::WRITABLE) | PteFlags::PAT);
    assert_eq!(
        tables.leaf(va(BASE)).unwrap().flags(),
        flags | PteFlags::PAT
    );

    done(clone.unmap(wanted, |_| ()).unwrap());
    assert_eq!(tables.translate(va(BASE + GIB)), Some(pa(0)));
    clone.free();
    tables.free();
    assert_eq!(pool.in_use(), 0);
}

#[test]
fn a_deep_clone_that_fails_leaves_nothing_behind() {
    let memory = TestMemory::new(7);
    let pool = memory.pool();
    let tables: Tables<'_> = tables(&memory, &pool);
    tables
        .map(va(BASE), pa(0), PageSize::Size4KiB, PteFlags::RW)
        .unwrap();
    let result = tables.clone_deep(range(BASE, GIB), |leaf| Some(leaf.entry));
    assert!(matches!(
        result,
        Err(CloneError::Map(MapError::OutOfTables { .. }))
    ));
    assert_eq!(pool.in_use(), 4);
    let nothing = tables.clone_deep(range(BASE, GIB), |_| None).unwrap();
    assert_eq!(nothing.free(), 1);
}

#[test]
fn merging_wants_512_pages_that_are_alike() {
    let memory = TestMemory::new(8);
    let pool = memory.pool();
    let cpu = Cpu::new(&memory, 1);
    let mut tables: Tables<'_> = tables(&memory, &pool);
    let large = range(BASE, MIB2);
    tables
        .map_range(
            large,
            pa(MIB2),
            PageSize::Size4KiB,
            PteFlags::RW | PteFlags::PAT,
        )
        .unwrap();
    let odd = va(BASE + 0x9000);
    tables
        .update_page_4k(odd, Change::set(PteFlags::AVL0))
        .unwrap()
        .1
        .ignore(NoFlush::NotLoaded);
    assert_eq!(
        tables.collapse(va(BASE), PageSize::Size2MiB, &cpu),
        Err(CollapseError::NotUniform {
            base: va(BASE),
            va: odd
        })
    );
    let undo = Change::new(PteFlags::AVL0, PteFlags::DIRTY);
    tables
        .update_page_4k(odd, undo)
        .unwrap()
        .1
        .ignore(NoFlush::NotLoaded);
    let before = pool.in_use();
    tables
        .collapse(va(BASE + 0x1_2345), PageSize::Size2MiB, &cpu)
        .unwrap();
    let leaf = tables.leaf(va(BASE)).unwrap();
    assert_eq!((leaf.size, leaf.page()), (PageSize::Size2MiB, pa(MIB2)));
    assert_eq!(leaf.flags(), PteFlags::RW | PteFlags::PAT | PteFlags::DIRTY);
    assert_eq!(pool.in_use(), before - 1);
    assert_eq!(
        tables.collapse(va(BASE), PageSize::Size2MiB, &cpu),
        Err(CollapseError::NoTable { va: va(BASE) })
    );
    assert_eq!(
        tables.collapse(va(BASE), PageSize::Size4KiB, &cpu),
        Err(CollapseError::NoSuchMerge {
            size: PageSize::Size4KiB
        })
    );
}

/// A CPU that still has the link to a table of small pages when it is asked to
/// forget it, and writes to one of them before it does.
struct LastMomentWriter<'a> {
    memory: &'a TestMemory,
    place: (GuestPhys, usize),
}

impl FlushTlb for LastMomentWriter<'_> {
    fn flush_page(&self, _: GuestVirt) {
        self.flush_all();
    }

    fn flush_range(&self, _: VirtRange, _: PageSize) {
        self.flush_all();
    }

    fn flush_all(&self) {
        let (table, index) = self.place;
        let old = self.memory.read(table, index);
        let new = old | PteFlags::DIRTY.bits();
        self.memory
            .compare_exchange(table, index, old, new)
            .unwrap();
    }
}

#[test]
fn merging_keeps_a_dirty_bit_set_at_the_last_moment() {
    let memory = TestMemory::new(8);
    let pool = memory.pool();
    let mut tables: Tables<'_> = tables(&memory, &pool);
    tables
        .map_range(range(BASE, MIB2), pa(0), PageSize::Size4KiB, PteFlags::RW)
        .unwrap();
    let place = tables.leaf_entry_4k(va(BASE + 0x8000)).unwrap();
    let cpu = LastMomentWriter {
        memory: &memory,
        place,
    };
    tables.collapse(va(BASE), PageSize::Size2MiB, &cpu).unwrap();
    assert_eq!(
        tables.leaf(va(BASE)).unwrap().flags(),
        PteFlags::RW | PteFlags::DIRTY
    );
}

#[test]
fn malformed_entries_are_reported_where_they_are() {
    let memory = TestMemory::new(8);
    let pool = memory.pool();
    let tables: Tables<'_> = tables(&memory, &pool);
    let bad = Entry(PteFlags::PRESENT.bits() | Entry::PAGE_SIZE);
    let index = Level::Pml4.index(va(BASE));
    memory.write(tables.root(), index, bad.0);
    let malformed = MapError::Malformed {
        va: va(BASE),
        level: Level::Pml4,
        entry: bad,
    };
    assert_eq!(
        tables.map(va(BASE), pa(0), PageSize::Size4KiB, PteFlags::RW),
        Err(malformed)
    );
    let failure = tables.unmap(range(BASE, 0x1000), |_| ()).unwrap_err();
    assert!(matches!(
        failure.cause,
        EditError::Malformed {
            level: Level::Pml4,
            ..
        }
    ));
    assert_eq!(tables.walk(va(BASE)).end(), WalkEnd::Malformed(Level::Pml4));
    assert_eq!(tables.translate(va(BASE)), None);
}

#[test]
fn five_levels_reach_57_bits() {
    let memory = TestMemory::new(16);
    let pool = memory.pool();
    let tables: Tables<'_, 5> = tables(&memory, &pool);
    let high = va(0x00ab_cdef_1234_5000);
    tables
        .map(high, pa(0x5000), PageSize::Size4KiB, PteFlags::RW)
        .unwrap();
    assert_eq!(tables.translate(high), Some(pa(0x5000)));
    assert_eq!(tables.walk(high).steps().len(), 5);
    assert!(
        tables
            .update_page_4k(high, Change::clear(PteFlags::WRITABLE))
            .is_ok()
    );
    let top = VirtRange::page(GuestVirt::new(u64::MAX), PageSize::Size2MiB);
    tables
        .map_range(top, pa(0), PageSize::Size2MiB, PteFlags::RW)
        .unwrap();
    assert_eq!(tables.free(), 8);
    assert_eq!(pool.in_use(), 0);
}

#[test]
fn an_error_half_way_still_owes_a_flush() {
    let memory = TestMemory::new(16);
    let pool = memory.pool();
    let lender: Tables<'_> = tables(&memory, &pool);
    let tables: Tables<'_> = tables(&memory, &pool);
    // Own memory right below a borrowed top-level entry.
    let border = 0x7f80_0000_0000;
    lender
        .map(va(border), pa(0), PageSize::Size4KiB, PteFlags::RW)
        .unwrap();
    tables.share_from(&lender, range(border, 0x1000)).unwrap();
    tables
        .map(va(border - 0x1000), pa(0), PageSize::Size4KiB, PteFlags::RW)
        .unwrap();
    let failure = tables
        .unmap(range(border - 0x1000, 0x2000), |_| ())
        .unwrap_err();
    assert_eq!(failure.cause, EditError::Borrowed { va: va(border) });
    let cpu = Cpu::new(&memory, 1);
    assert_eq!(failure.flush.scope(), FlushScope::Page(va(border - 0x1000)));
    assert_eq!(failure.apply(&cpu), EditError::Borrowed { va: va(border) });
    assert_eq!(cpu.flushes.get(), 1);
}

#[test]
fn threads_may_edit_together() {
    const PAGES: u64 = if cfg!(miri) { 16 } else { 1024 };
    let memory = TestMemory::new(64);
    let pool = memory.pool();
    let tables: Tables<'_> = tables(&memory, &pool);
    let shared = range(BASE, 0x1000);
    tables
        .map(va(BASE), pa(0), PageSize::Size4KiB, PteFlags::RW)
        .unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let tables = &tables;
            let memory = &memory;
            scope.spawn(move || {
                // All make the same tables, and the pages between each other's.
                for page in 0..PAGES {
                    let at = BASE + GIB + (page * 4 + thread) * 0x1000;
                    tables
                        .map(
                            va(at),
                            pa(at & 0xffff_f000),
                            PageSize::Size4KiB,
                            PteFlags::RW,
                        )
                        .unwrap();
                    // One toggles a bit, one splits and protects, two do what
                    // the CPU does.
                    let (table, index) = tables.leaf_entry_4k(va(BASE)).unwrap();
                    match thread {
                        0 => drop(
                            tables
                                .update_page_4k(va(BASE), Change::set(PteFlags::AVL0))
                                .unwrap(),
                        ),
                        1 => done(tables.protect(shared, PteFlags::R).unwrap()),
                        _ => {
                            let old = memory.read(table, index);
                            let new = old | PteFlags::DIRTY.bits();
                            let _ = memory.compare_exchange(table, index, old, new);
                        }
                    }
                }
            });
        }
    });
    let leaf = tables.leaf(va(BASE)).unwrap();
    assert!(leaf.flags().contains(PteFlags::AVL0 | PteFlags::R));
    assert_eq!(
        leaves(&tables, range(BASE + GIB, PAGES * 4 * 0x1000)).len() as u64,
        PAGES * 4
    );
    let expected = 1 + 1 + 2 + 1 + (PAGES * 4).div_ceil(512) as u32;
    assert_eq!(
        pool.in_use(),
        expected,
        "tables that lost the race to be linked are freed"
    );
    tables.free();
    assert_eq!(pool.in_use(), 0);
}

#[test]
fn a_root_made_elsewhere_can_be_taken_over() {
    let memory = TestMemory::new(8);
    let pool = memory.pool();
    let first: Tables<'_> = tables(&memory, &pool);
    first
        .map(va(BASE), pa(0), PageSize::Size2MiB, PteFlags::RW)
        .unwrap();
    let root = first.root();
    assert_eq!(root, TABLES);
    let again: Tables<'_> = PageTable::from_root(root, &memory, TestTables::new(&memory, &pool));
    assert_eq!(again.translate(va(BASE)), Some(pa(0)));
    assert_eq!(again.free(), 3);
}

/// Runs `edit` on a page table with a 2 MiB page at `BASE`, once for every
/// compare-and-exchange that it does, with `interruption` by another thread
/// right before that one. Then everything is unmapped, pruned and freed: every
/// table must come back.
fn interrupt_everywhere(
    edit: impl Fn(&PageTable<Interrupted<'_>, TestTables<'_>>),
    interruption: impl Fn(&Tables<'_>),
    check: impl Fn(&Tables<'_>),
) {
    for undisturbed in 0.. {
        let memory = TestMemory::new(32);
        let pool = memory.pool();
        let mut plain: Tables<'_> = tables(&memory, &pool);
        plain
            .map(va(BASE), pa(0), PageSize::Size2MiB, PteFlags::RW)
            .unwrap();
        let interrupted = Cell::new(false);
        let interrupt = || {
            interrupted.set(true);
            interruption(&plain);
        };
        let memory_of_edit = Interrupted {
            memory: &memory,
            countdown: Cell::new(undisturbed),
            interruption: &interrupt,
        };
        let root = plain.root();
        edit(&PageTable::from_root(
            root,
            memory_of_edit,
            TestTables::new(&memory, &pool),
        ));
        if !interrupted.get() {
            assert!(undisturbed > 0, "the edit did nothing");
            return;
        }
        check(&plain);

        let lower_half = range(0, 1 << 47);
        done(plain.unmap(lower_half, |_| ()).unwrap());
        let cpu = Cpu::new(&memory, 1);
        plain.prune(lower_half, &cpu);
        assert_eq!(
            pool.in_use(),
            1,
            "a table was lost ({undisturbed} exchanges before)"
        );
        plain.free();
        assert_eq!(pool.in_use(), 0);
    }
}

#[test]
fn two_threads_make_the_same_tables() {
    const ELSEWHERE: u64 = BASE + 600 * GIB;
    interrupt_everywhere(
        |tables| {
            let page = VirtRange::page(va(ELSEWHERE), PageSize::Size4KiB);
            tables
                .map_range(page, pa(0x7000), PageSize::Size2MiB, PteFlags::R)
                .unwrap();
        },
        |other| {
            let at = va(ELSEWHERE + 0x1000);
            other
                .map(at, pa(0x8000), PageSize::Size4KiB, PteFlags::RW)
                .unwrap();
        },
        |tables| {
            assert_eq!(tables.translate(va(ELSEWHERE)), Some(pa(0x7000)));
            assert_eq!(tables.translate(va(ELSEWHERE + 0x1000)), Some(pa(0x8000)));
        },
    );
}

#[test]
fn two_threads_split_the_same_page() {
    let page = |number: u64| range(BASE + number * 0x1000, 0x1000);
    interrupt_everywhere(
        |tables| done(tables.protect(page(3), PteFlags::R).unwrap()),
        |other| done(other.protect(page(9), PteFlags::RX).unwrap()),
        |tables| {
            let flags = |number| tables.leaf(page(number).start()).unwrap().flags();
            assert_eq!(flags(3), PteFlags::R);
            assert_eq!(flags(9), PteFlags::RX);
            assert_eq!(flags(10), PteFlags::RW);
        },
    );
}

#[test]
fn a_page_changed_while_it_is_split_keeps_the_change() {
    interrupt_everywhere(
        |tables| done(tables.split(va(BASE), PageSize::Size4KiB).unwrap()),
        |other| {
            let change = Change::new(PteFlags::WRITABLE, PteFlags::DIRTY);
            done(other.update_leaf(va(BASE), change).unwrap().1);
        },
        |tables| {
            let expected = PteFlags::R | PteFlags::DIRTY;
            for leaf in leaves(tables, range(BASE, MIB2)) {
                assert_eq!(leaf.flags(), expected);
            }
        },
    );
}

#[test]
fn a_page_split_while_it_is_edited_is_edited_whole() {
    interrupt_everywhere(
        |tables| done(tables.protect(range(BASE, MIB2), PteFlags::RX).unwrap()),
        |other| done(other.split(va(BASE + 0x5000), PageSize::Size4KiB).unwrap()),
        |tables| {
            let all = leaves(tables, range(BASE, MIB2));
            assert!(all.iter().all(|leaf| leaf.flags() == PteFlags::RX));
        },
    );
}

#[test]
fn a_large_page_mapped_into_a_range_being_edited_is_cut() {
    // The edit begins with a small page; then a 1 GiB page appears that
    // reaches beyond the range's end.
    let range = range(BASE + MIB2 - 0x1000, GIB - MIB2 + 0x2000);
    interrupt_everywhere(
        |tables| done(tables.unmap(range, |_| ()).unwrap()),
        |other| {
            // Fails where the edit has not got that far, or is past it.
            let _ = other.map(va(BASE + GIB), pa(0), PageSize::Size1GiB, PteFlags::RW);
        },
        |tables| {
            assert_eq!(tables.translate(va(BASE)), Some(pa(0)));
            assert_eq!(tables.translate(range.start()), None);
            let beyond = tables.leaf(va(BASE + GIB + 0x1000)).unwrap();
            assert_eq!(beyond.page(), pa(0x1000));
        },
    );
}

#[test]
fn owning_the_way_changes_no_translation_and_frees_the_page_for_edits() {
    let memory = TestMemory::new(32);
    let pool = memory.pool();
    let lender: Tables<'_> = tables(&memory, &pool);
    let near = range(BASE, 4 * 0x1000);
    let far = range(BASE + GIB, MIB2);
    for pages in [near, far] {
        let to = pa(pages.start().as_u64() & 0xfff_ffff_f000);
        lender
            .map_range(pages, to, PageSize::Size4KiB, PteFlags::R)
            .unwrap();
    }
    let before = pool.in_use();
    let borrower: Tables<'_> = tables(&memory, &pool);
    borrower.share_from(&lender, near).unwrap();
    assert_eq!(pool.in_use(), before + 1, "borrowing takes no tables");

    let flush = borrower.own_way(va(BASE + 0x1000)).unwrap();
    assert_eq!(flush.scope(), FlushScope::Everything);
    done(flush);
    assert_eq!(pool.in_use(), before + 4, "one table a level");
    let whole = range(BASE, 2 * GIB);
    assert_eq!(leaves(&borrower, whole), leaves(&lender, whole));
    done(borrower.own_way(va(BASE + 0x2000)).unwrap());
    assert_eq!(pool.in_use(), before + 4, "owned already");

    // The page can be edited, and the lender does not see it.
    let page = range(BASE + 0x1000, 0x1000);
    done(borrower.unmap(page, |_| ()).unwrap());
    let (at, own) = (page.start(), pa(0x5000));
    borrower
        .map(at, own, PageSize::Size4KiB, PteFlags::RW)
        .unwrap();
    assert_eq!(borrower.translate(at), Some(own));
    assert_eq!(
        lender.translate(at),
        Some(pa(at.as_u64() & 0xfff_ffff_f000))
    );
    // What hangs off the way is still the lender's.
    assert!(matches!(
        borrower.unmap(far, |_| ()).unwrap_err().cause,
        EditError::Borrowed { .. }
    ));

    borrower.free();
    assert_eq!(pool.in_use(), before, "nothing of the lender's was freed");
    assert_eq!(leaves(&lender, whole).len(), 4 + 512);
}
