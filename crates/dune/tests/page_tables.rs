//! The process's own page tables: looking, splitting, protecting, dirty bits, and that every
//! vCPU of the process sees an edit once its flush is paid.
#![expect(
    unsafe_code,
    reason = "edits the tables that the test itself stands on"
)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use dune::exceptions::{self, Outcome};
use dune::memory::{
    Change, Frames, NoFlush, PageSize, Pages, ProcessTables, PteFlags, Tlb, VirtRange,
};
use dune::{PageFaultError, TrapFrame, vector};
use dune_x86::addr::GuestVirt;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const PAGE: u64 = 4096;

fn tables() -> ProcessTables {
    dune::enter().unwrap();
    ProcessTables::get().unwrap()
}

fn tlb() -> Tlb {
    Tlb::of_process()
}

fn page_of(pages: &Pages, index: u64) -> VirtRange {
    let start = GuestVirt::new(pages.range().start().as_u64() + index * PAGE);
    VirtRange::page(start, PageSize::Size4KiB)
}

fn every_address_of_the_process_maps_to_itself() {
    let tables = tables();
    let heap = vec![1_u8; 10 << 20];
    let local = 0_u64;
    for address in [
        heap.as_ptr() as u64,
        &raw const local as u64,
        every_address_of_the_process_maps_to_itself as *const () as u64,
        libc::printf as *const () as u64,
    ] {
        let walk = tables.walk(GuestVirt::new(address));
        let leaf = walk.present_leaf().unwrap();
        let rights = walk.permissions().unwrap();
        assert!(rights.writable && !rights.user && rights.executable);
        assert!(leaf.size >= PageSize::Size2MiB, "not split without need");
        let physical = walk.translation().unwrap().as_u64();
        assert_eq!(physical & (PAGE - 1), address & (PAGE - 1));
    }
    assert!(tables.leaf(GuestVirt::new(0xdead_0000_0000)).is_none());
}

fn splitting_changes_no_translation() {
    let tables = tables();
    let pages = Pages::new(1024).unwrap();
    assert!(pages.write(5, b"still here"));
    let before: Vec<_> = pages
        .range()
        .pages(PageSize::Size4KiB)
        .map(|p| tables.translate(p))
        .collect();
    let frames = Frames::in_use();
    for size in [PageSize::Size2MiB, PageSize::Size4KiB] {
        tables.split(pages.range(), size).unwrap().apply(&tlb());
        assert!(tables.leaf(pages.range().start()).unwrap().size <= size);
        let after: Vec<_> = pages
            .range()
            .pages(PageSize::Size4KiB)
            .map(|p| tables.translate(p))
            .collect();
        assert_eq!(before, after);
        let mut bytes = [0; 10];
        assert!(pages.read(5, &mut bytes));
        assert_eq!(&bytes, b"still here");
    }
    assert!(Frames::in_use() > frames);
    // Once split, there is nothing more to do.
    let frames = Frames::in_use();
    tables
        .split(pages.range(), PageSize::Size4KiB)
        .unwrap()
        .apply(&tlb());
    assert_eq!(Frames::in_use(), frames);
}

static FAULTS: AtomicU64 = AtomicU64::new(0);
static LAST: AtomicU64 = AtomicU64::new(0);

/// Gives the right to write back, as a collector or a checkpointer does.
fn unprotect(frame: &mut TrapFrame) -> Outcome {
    if !frame
        .fault_cause()
        .contains(PageFaultError::PRESENT | PageFaultError::WRITE)
    {
        return Outcome::Decline;
    }
    FAULTS.fetch_add(1, Ordering::SeqCst);
    LAST.store(frame.fault_address(), Ordering::SeqCst);
    let Some(tables) = ProcessTables::get() else {
        return Outcome::Decline;
    };
    let address = GuestVirt::new_truncate(frame.fault_address());
    // SAFETY: gives a right.
    match unsafe { tables.update_page(address, Change::set(PteFlags::WRITABLE)) } {
        Ok((_, flush)) => {
            flush.ignore(NoFlush::StaleIsHarmless);
            Outcome::Resume
        }
        Err(_) => Outcome::Decline,
    }
}

fn a_protected_page_faults_once_into_the_handler() {
    let tables = tables();
    exceptions::set_handler(vector::PAGE_FAULT, unprotect);
    let pages = Pages::new(64).unwrap();
    tables
        .split(pages.range(), PageSize::Size4KiB)
        .unwrap()
        .apply(&tlb());
    for round in 1..=3 {
        // SAFETY: the handler gives the right back.
        unsafe { tables.protect(pages.range(), PteFlags::R) }
            .unwrap()
            .apply(&tlb());
        let mut byte = [0];
        assert!(pages.read(7, &mut byte), "reading is still allowed");
        for index in 0..64 {
            assert!(pages.write(index * PAGE as usize + 9, &[round as u8]));
            assert!(pages.write(index * PAGE as usize + 10, &[round as u8]));
            assert_eq!(
                LAST.load(Ordering::SeqCst),
                page_of(&pages, index as u64).start().as_u64() + 9
            );
        }
        assert_eq!(FAULTS.load(Ordering::SeqCst), round * 64);
    }
}

fn a_page_that_nobody_handles_is_a_segmentation_fault() {
    let tables = tables();
    // SAFETY: the child does nothing but fault.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let pages = Pages::new(1).unwrap();
        tables
            .split(pages.range(), PageSize::Size4KiB)
            .unwrap()
            .apply(&tlb());
        // SAFETY: the fault is what is wanted.
        unsafe { tables.protect(pages.range(), PteFlags::R) }
            .unwrap()
            .apply(&tlb());
        let _ = pages.write(0, &[1]);
        std::process::exit(1);
    }
    let mut status = 0;
    // SAFETY: writes the status.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert!(
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV,
        "{status:#x}"
    );
}

fn unmapped_and_mapped_again_elsewhere() {
    let tables = tables();
    let pages = Pages::new(2).unwrap();
    assert!(pages.write(0, b"first") && pages.write(PAGE as usize, b"second"));
    tables
        .split(pages.range(), PageSize::Size4KiB)
        .unwrap()
        .apply(&tlb());
    let physical = |index| tables.translate(page_of(&pages, index).start()).unwrap();
    let (first, second) = (physical(0), physical(1));
    // Swap the two pages.
    let mut removed = 0;
    // SAFETY: nothing holds a reference into the pages.
    unsafe { tables.unmap(pages.range(), |_| removed += 1) }
        .unwrap()
        .apply(&tlb());
    assert_eq!(removed, 2);
    assert_eq!(tables.translate(pages.range().start()), None);
    for (index, target) in [(0, second), (1, first)] {
        let range = page_of(&pages, index);
        // SAFETY: as above.
        unsafe { tables.map(range, target, PageSize::Size4KiB, PteFlags::RW) }.unwrap();
    }
    let mut bytes = [0; 6];
    assert!(pages.read(0, &mut bytes));
    assert_eq!(&bytes, b"second");
}

fn dirty_bits_show_exactly_the_pages_written() {
    let tables = tables();
    let pages = Pages::new(256).unwrap();
    tables
        .split(pages.range(), PageSize::Size4KiB)
        .unwrap()
        .apply(&tlb());
    let start = pages.range().start().as_u64();
    let collect = || {
        let mut dirty = BTreeSet::new();
        tables
            .clear_dirty(pages.range(), |leaf| {
                dirty.insert((leaf.va.as_u64() - start) / PAGE);
            })
            .unwrap()
            .apply(&tlb());
        dirty
    };
    collect();
    let mut runner = TestRunner::new(Config {
        cases: 40,
        ..Config::default()
    });
    let sets = proptest::collection::btree_set(0..256_u64, 0..200);
    runner
        .run(&sets, |written| {
            for page in &written {
                assert!(pages.write((page * PAGE) as usize + 17, &[*page as u8]));
            }
            prop_assert_eq!(collect(), written);
            Ok(())
        })
        .unwrap();
    // Reading leaves no mark but the accessed bit.
    tables
        .clear_accessed(pages.range(), |_| ())
        .unwrap()
        .apply(&tlb());
    assert!(pages.read(3 * PAGE as usize, &mut [0]));
    assert!(collect().is_empty());
    let mut accessed = Vec::new();
    tables
        .clear_accessed(pages.range(), |leaf| {
            accessed.push((leaf.va.as_u64() - start) / PAGE)
        })
        .unwrap()
        .apply(&tlb());
    assert_eq!(accessed, [3]);
}

/// A thread that writes to a page without pause, and says how often.
struct Writer {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<()>,
}

impl Writer {
    fn start(pages: &Arc<Pages>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let writes = Arc::new(AtomicU64::new(0));
        let thread = {
            let (pages, stop, writes) = (Arc::clone(pages), Arc::clone(&stop), Arc::clone(&writes));
            std::thread::spawn(move || {
                assert!(dune::is_inside());
                let mut count = 0_u64;
                while !stop.load(Ordering::SeqCst) {
                    count += 1;
                    assert!(pages.write(0, &count.to_le_bytes()));
                    writes.store(count, Ordering::SeqCst);
                }
            })
        };
        Self {
            stop,
            writes,
            thread,
        }
    }

    /// Waits until the thread has begun and finished a write after this call.
    fn writes_again(&self) {
        let before = self.writes.load(Ordering::SeqCst);
        while self.writes.load(Ordering::SeqCst) < before + 2 {
            std::thread::yield_now();
        }
    }

    fn finish(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap();
    }
}

fn no_write_of_another_thread_is_missed_after_a_flush() {
    let tables = tables();
    let pages = Arc::new(Pages::new(1).unwrap());
    tables
        .split(pages.range(), PageSize::Size4KiB)
        .unwrap()
        .apply(&tlb());
    let writers = [Writer::start(&pages), Writer::start(&pages)];
    for round in 0..300 {
        tables
            .clear_dirty(pages.range(), |_| ())
            .unwrap()
            .apply(&tlb());
        // A write that began after the flush must mark the page again, although the
        // thread's TLB knew the page as dirty.
        for writer in &writers {
            writer.writes_again();
        }
        let mut dirty = false;
        tables
            .clear_dirty(pages.range(), |_| dirty = true)
            .unwrap()
            .apply(&tlb());
        assert!(dirty, "round {round}");
    }
    for writer in writers {
        writer.finish();
    }
}

static GATE: AtomicBool = AtomicBool::new(false);
static WAITING: AtomicU64 = AtomicU64::new(0);

/// Holds whoever writes until the gate is open.
fn wait_at_the_gate(frame: &mut TrapFrame) -> Outcome {
    if !frame.fault_cause().contains(PageFaultError::WRITE) {
        return Outcome::Decline;
    }
    WAITING.fetch_add(1, Ordering::SeqCst);
    while !GATE.load(Ordering::SeqCst) {
        std::hint::spin_loop();
    }
    WAITING.fetch_sub(1, Ordering::SeqCst);
    Outcome::Resume
}

fn a_right_taken_away_holds_on_every_vcpu_once_flushed() {
    let tables = tables();
    exceptions::set_handler(vector::PAGE_FAULT, wait_at_the_gate);
    let pages = Arc::new(Pages::new(1).unwrap());
    tables
        .split(pages.range(), PageSize::Size4KiB)
        .unwrap()
        .apply(&tlb());
    let writer = Writer::start(&pages);
    for round in 0..100 {
        writer.writes_again();
        GATE.store(false, Ordering::SeqCst);
        // SAFETY: the handler holds the writer until the right is back.
        unsafe { tables.protect(pages.range(), PteFlags::R) }
            .unwrap()
            .apply(&tlb());
        let value = || {
            let mut bytes = [0; 8];
            assert!(pages.read(0, &mut bytes));
            bytes
        };
        let frozen = value();
        for _ in 0..2000 {
            assert_eq!(value(), frozen, "round {round}");
        }
        // SAFETY: gives the right back.
        unsafe { tables.protect(pages.range(), PteFlags::RW) }
            .unwrap()
            .ignore(NoFlush::StaleIsHarmless);
        GATE.store(true, Ordering::SeqCst);
    }
    writer.finish();
    assert_eq!(WAITING.load(Ordering::SeqCst), 0);
}

fn threads_that_left_hold_no_stale_translations() {
    let tables = tables();
    exceptions::set_handler(vector::PAGE_FAULT, unprotect);
    let pages = Arc::new(Pages::new(1).unwrap());
    tables
        .split(pages.range(), PageSize::Size4KiB)
        .unwrap()
        .apply(&tlb());
    let (to_thread, commands) = std::sync::mpsc::channel::<()>();
    let (done, from_thread) = std::sync::mpsc::channel();
    let thread = {
        let pages = Arc::clone(&pages);
        std::thread::spawn(move || {
            for () in commands {
                dune::enter().unwrap();
                assert!(pages.write(0, &[1]));
                dune::leave();
                done.send(()).unwrap();
            }
        })
    };
    for round in 1..=50 {
        to_thread.send(()).unwrap();
        from_thread.recv().unwrap();
        // SAFETY: the handler gives the right back.
        unsafe { tables.protect(pages.range(), PteFlags::R) }
            .unwrap()
            .apply(&tlb());
        to_thread.send(()).unwrap();
        from_thread.recv().unwrap();
        assert_eq!(
            FAULTS.load(Ordering::SeqCst),
            round,
            "the parked vCPU kept a translation"
        );
    }
    drop(to_thread);
    thread.join().unwrap();
}

fn an_edit_made_outside_dune_mode_holds_inside() {
    let tables = tables();
    exceptions::set_handler(vector::PAGE_FAULT, unprotect);
    let pages = Pages::new(1).unwrap();
    tables
        .split(pages.range(), PageSize::Size4KiB)
        .unwrap()
        .apply(&tlb());
    for round in 1..=10 {
        assert!(pages.write(0, &[1]), "the vCPU knows the page as writable");
        dune::leave();
        // SAFETY: the handler gives the right back.
        unsafe { tables.protect(pages.range(), PteFlags::R) }
            .unwrap()
            .apply(&tlb());
        dune::enter().unwrap();
        assert!(pages.write(0, &[1]));
        assert_eq!(FAULTS.load(Ordering::SeqCst), round);
    }
}

dune_testing::tests! {
    ring0 an_edit_made_outside_dune_mode_holds_inside,
    smoke every_address_of_the_process_maps_to_itself,
    smoke splitting_changes_no_translation,
    smoke a_protected_page_faults_once_into_the_handler,
    ring0 a_page_that_nobody_handles_is_a_segmentation_fault,
    ring0 unmapped_and_mapped_again_elsewhere,
    ring0 dirty_bits_show_exactly_the_pages_written,
    smoke no_write_of_another_thread_is_missed_after_a_flush,
    ring0 a_right_taken_away_holds_on_every_vcpu_once_flushed,
    ring0 threads_that_left_hold_no_stale_translations,
}
