//! `dune::dirty`: no write is missed, whoever makes it, and where none was made none is
//! reported.
#![expect(unsafe_code, reason = "system calls on memory that is being tracked")]
#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "the module that the tests share is written so"
)]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use common::{Ended, child, enter, protect};
use dune::dirty::{Granularity, PageSet, TrackError, Tracker};
use dune::memory::{PageSize, Pages, ProcessTables, VirtRange};
use dune_x86::addr::GuestVirt;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const PAGE: usize = 4096;

fn part(pages: &Pages, first: usize, count: usize) -> VirtRange {
    let start = pages.range().start().as_u64() + (first * PAGE) as u64;
    VirtRange::try_new(GuestVirt::new(start), (count * PAGE) as u64).unwrap()
}

/// Numbers of the pages of a set, counted from the start of `pages`.
fn numbers(set: &PageSet, pages: &Pages) -> BTreeSet<usize> {
    let start = pages.range().start().as_u64();
    set.runs()
        .flat_map(|run| run.pages(PageSize::Size4KiB))
        .filter(|page| pages.range().contains(*page))
        .map(|page| ((page.as_u64() - start) / PAGE as u64) as usize)
        .collect()
}

fn write(pages: &Pages, page: usize) {
    assert!(pages.write(page * PAGE + 100, &[1]));
}

/// A small generator of numbers that every thread may have one of.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

fn what_is_written_is_collected_once_and_exactly() {
    enter();
    let pages = Pages::new(700).unwrap();
    let tracker = Tracker::start(pages.range()).unwrap();
    assert!(tracker.collect().unwrap().is_empty());
    let mut runner = TestRunner::new(Config {
        cases: 40,
        ..Config::default()
    });
    let sets = proptest::collection::btree_set(0..700_usize, 0..500);
    let mut set = PageSet::new(pages.range(), Granularity::Page4KiB);
    runner
        .run(&sets, |written| {
            for page in &written {
                write(&pages, *page);
            }
            prop_assert_eq!(numbers(&tracker.peek().unwrap(), &pages), written.clone());
            prop_assert_eq!(
                numbers(&tracker.collect().unwrap(), &pages),
                written.clone()
            );
            prop_assert!(tracker.peek().unwrap().is_empty());
            for page in &written {
                assert!(pages.read(page * PAGE, &mut [0]));
            }
            tracker.reset().unwrap();
            for page in &written {
                write(&pages, *page);
            }
            // Neither allocates nor forgets.
            let mut again = set.clone();
            tracker.collect_into(&mut again).unwrap();
            prop_assert_eq!(numbers(&again, &pages), written);
            Ok(())
        })
        .unwrap();
    tracker.collect_into(&mut set).unwrap();
    assert!(set.is_empty());
}

fn the_working_set_is_what_was_used() {
    enter();
    let pages = Pages::new(300).unwrap();
    let tracker = Tracker::start(pages.range()).unwrap();
    assert!(tracker.collect_accessed().unwrap().is_empty());
    for page in [3, 77, 299] {
        assert!(pages.read(page * PAGE, &mut [0]));
    }
    write(&pages, 5);
    let used = numbers(&tracker.collect_accessed().unwrap(), &pages);
    assert_eq!(used, BTreeSet::from([3, 5, 77, 299]));
    assert!(tracker.collect_accessed().unwrap().is_empty());
    // That it was asked for does not make the write forgotten.
    assert_eq!(
        numbers(&tracker.collect().unwrap(), &pages),
        BTreeSet::from([5])
    );
}

fn large_pages_stay_whole_where_they_are_enough() {
    enter();
    const LARGE: usize = 512;
    // Three whole ones are in it, wherever it lies; before and behind is other memory.
    let pages = Pages::new(4 * LARGE).unwrap();
    let start = pages.range().start();
    let aligned = start.align_up(PageSize::Size2MiB).unwrap();
    let first = ((aligned.as_u64() - start.as_u64()) / PAGE as u64) as usize;
    let address = |page: usize| GuestVirt::new(start.as_u64() + (page * PAGE) as u64);
    let before = dune::memory::Frames::in_use();
    let coarse = Tracker::start_with(pages.range(), Granularity::Page2MiB).unwrap();
    // A directory for each window at most, and no page table.
    assert!(dune::memory::Frames::in_use() <= before + 2);
    let collected = || {
        let found = coarse.collect().unwrap();
        (0..3)
            .filter(|n| found.contains(address(first + n * LARGE)))
            .collect::<Vec<_>>()
    };
    let tables = ProcessTables::get().unwrap();
    let size = |page| tables.leaf(address(page)).unwrap().size;
    collected();
    assert_eq!(size(first + LARGE), PageSize::Size2MiB);
    write(&pages, first + LARGE + 5);
    assert_eq!(collected(), [1]);
    // A finer tracker splits the page where it looks; both still see everything.
    let fine = Tracker::start(part(&pages, first + LARGE, 10)).unwrap();
    assert_eq!(size(first + LARGE), PageSize::Size4KiB);
    assert_eq!(size(first), PageSize::Size2MiB);
    write(&pages, first + LARGE + 3);
    write(&pages, first + 2 * LARGE + 100);
    let found = numbers(&fine.collect().unwrap(), &pages);
    assert_eq!(found, BTreeSet::from([first + LARGE + 3]));
    assert_eq!(collected(), [1, 2]);
    assert!(collected().is_empty());
}

fn what_one_tracker_clears_the_others_find() {
    enter();
    let pages = Pages::new(600).unwrap();
    let whole = Tracker::start(pages.range()).unwrap();
    let left = Tracker::start(part(&pages, 0, 300)).unwrap();
    write(&pages, 10);
    write(&pages, 299);
    write(&pages, 300);
    assert_eq!(
        numbers(&left.collect().unwrap(), &pages),
        BTreeSet::from([10, 299])
    );
    // A tracker that starts later has nothing of the past, and takes nothing away.
    let late = Tracker::start(part(&pages, 290, 20)).unwrap();
    assert!(late.collect().unwrap().is_empty());
    let all = BTreeSet::from([10, 299, 300]);
    assert_eq!(numbers(&whole.peek().unwrap(), &pages), all);
    assert_eq!(numbers(&whole.collect().unwrap(), &pages), all);
    write(&pages, 295);
    whole.reset().unwrap();
    drop(left);
    assert_eq!(
        numbers(&late.collect().unwrap(), &pages),
        BTreeSet::from([295])
    );
}

/// What all threads of the soak share.
struct Shared {
    pages: Pages,
    stop: AtomicBool,
    /// Threads that stand still wait for this to change.
    pause: AtomicBool,
    standing: AtomicUsize,
    writes: AtomicU64,
}

const WRITERS: usize = 3;
/// Of 2 MiB and something, so that all kinds of boundaries are crossed.
const SOAK_PAGES: usize = 1100;

/// Writes without pause: mostly to a few pages again and again, which are in the TLB then;
/// sometimes by the kernel; sometimes gives a page of its own back.
fn writer(shared: &Shared, number: usize) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (number as u64 + 1));
    let zeros = std::fs::File::open("/dev/urandom").unwrap();
    let base = shared.pages.range().start().as_u64();
    let mut hot = 0;
    let mut value = 0_u64;
    while !shared.stop.load(Ordering::SeqCst) {
        if shared.pause.load(Ordering::SeqCst) {
            shared.standing.fetch_add(1, Ordering::SeqCst);
            while shared.pause.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            shared.standing.fetch_sub(1, Ordering::SeqCst);
        }
        value += 1;
        if value.is_multiple_of(64) {
            hot = random.below(SOAK_PAGES - 4);
        }
        let page = hot + random.below(4);
        let slot = page * PAGE + number * 64;
        assert!(shared.pages.write(slot, &value.to_le_bytes()));
        shared.writes.fetch_add(1, Ordering::Relaxed);
        if value.is_multiple_of(512) {
            let address =
                (base as usize + random.below(SOAK_PAGES) * PAGE + number * 64 + 8) as *mut _;
            use std::os::fd::AsRawFd as _;
            // SAFETY: eight bytes of the thread's own slot.
            assert_eq!(unsafe { libc::read(zeros.as_raw_fd(), address, 8) }, 8);
        }
        if value.is_multiple_of(4096) {
            let address = base as usize + random.below(SOAK_PAGES) * PAGE;
            // SAFETY: whoever else writes there loses or keeps a number.
            assert_eq!(
                unsafe { libc::madvise(address as *mut _, PAGE, libc::MADV_DONTNEED) },
                0
            );
        }
    }
}

/// So much of each page is used: a slot of 64 bytes for each writer, and one for the thread
/// that collects. That one writes too: the emulated machine lets a virtual CPU that was
/// interrupted by another start with a fresh TLB, so there its own is where a flush that is
/// missing shows.
const USED: usize = 64 * (WRITERS + 1);

/// A copy of a range, as far as it is used, that is kept up to date by what a tracker reports.
struct Copy {
    tracker: Tracker,
    first: usize,
    bytes: Vec<u8>,
}

impl Copy {
    fn start(pages: &Pages, random: &mut Random) -> Self {
        let first = random.below(SOAK_PAGES - 1);
        let count = 1 + random.below(SOAK_PAGES - first);
        let granularity = if random.below(4) == 0 {
            Granularity::Page2MiB
        } else {
            Granularity::Page4KiB
        };
        let tracker = Tracker::start_with(part(pages, first, count), granularity).unwrap();
        let mut copy = Self {
            tracker,
            first,
            bytes: vec![0; count * USED],
        };
        copy.read_all(pages);
        copy
    }

    fn count(&self) -> usize {
        self.bytes.len() / USED
    }

    fn read(&mut self, pages: &Pages, page: usize) {
        let at = (page - self.first) * USED;
        assert!(pages.read(page * PAGE, &mut self.bytes[at..at + USED]));
    }

    fn read_all(&mut self, pages: &Pages) {
        for page in self.first..self.first + self.count() {
            self.read(pages, page);
        }
    }

    fn update(&mut self, pages: &Pages) -> usize {
        let found = numbers(&self.tracker.collect().unwrap(), pages);
        for page in &found {
            if (self.first..self.first + self.count()).contains(page) {
                self.read(pages, *page);
            }
        }
        found.len()
    }

    fn check(&self, pages: &Pages, round: usize) {
        let mut now = [0; USED];
        for (index, then) in self.bytes.chunks_exact(USED).enumerate() {
            assert!(pages.read((self.first + index) * PAGE, &mut now));
            assert!(
                now == then,
                "a write to page {} was missed, round {round}",
                self.first + index
            );
        }
    }
}

fn no_write_of_any_thread_is_missed_by_any_tracker() {
    enter();
    let shared = Arc::new(Shared {
        pages: Pages::new(SOAK_PAGES).unwrap(),
        stop: AtomicBool::new(false),
        pause: AtomicBool::new(false),
        standing: AtomicUsize::new(0),
        writes: AtomicU64::new(0),
    });
    let threads: Vec<_> = (0..WRITERS)
        .map(|number| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || writer(&shared, number))
        })
        .collect();
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let mut copies = Vec::new();
    let (mut reported, mut checks) = (0, 0);
    let mut own = 0_u64;
    for round in 0..25 {
        let hot = random.below(SOAK_PAGES - 4);
        for _ in 0..10 {
            for _ in 0..3 {
                own += 1;
                let slot = (hot + random.below(4)) * PAGE + WRITERS * 64;
                assert!(shared.pages.write(slot, &own.to_le_bytes()));
            }
            match random.below(10) {
                0 if copies.len() < 6 => copies.push(Copy::start(&shared.pages, &mut random)),
                1 if copies.len() > 2 => drop(copies.swap_remove(random.below(copies.len()))),
                2 if !copies.is_empty() => {
                    let index = random.below(copies.len());
                    copies[index].tracker.reset().unwrap();
                    copies[index].read_all(&shared.pages);
                }
                3 if !copies.is_empty() => {
                    let index = random.below(copies.len());
                    copies[index].tracker.collect_accessed().unwrap();
                }
                _ if !copies.is_empty() => {
                    let index = random.below(copies.len());
                    reported += copies[index].update(&shared.pages);
                }
                _ => copies.push(Copy::start(&shared.pages, &mut random)),
            }
            // Not each time: an exit refreshes the emulated TLB.
            if random.below(4) == 0 {
                std::thread::yield_now();
            }
        }
        // Everybody stands still: now every copy must be made equal by one more look.
        shared.pause.store(true, Ordering::SeqCst);
        while shared.standing.load(Ordering::SeqCst) < WRITERS {
            std::thread::yield_now();
        }
        for copy in &mut copies {
            copy.update(&shared.pages);
            copy.check(&shared.pages, round);
            checks += 1;
        }
        shared.pause.store(false, Ordering::SeqCst);
        while shared.standing.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
    }
    shared.stop.store(true, Ordering::SeqCst);
    for thread in threads {
        thread.join().unwrap();
    }
    let writes = shared.writes.load(Ordering::Relaxed);
    println!("{writes} writes, {reported} pages reported, {checks} copies compared");
    assert!(writes > 1000 && reported > 100 && checks > 25);
}

fn a_write_by_the_kernel_for_a_system_call_is_seen() {
    enter();
    let pages = Pages::new(64).unwrap();
    let tracker = Tracker::start(pages.range()).unwrap();
    let at = |page: usize, offset: usize| {
        (pages.range().start().as_u64() as usize + page * PAGE + offset) as *mut libc::c_void
    };
    let collected = || numbers(&tracker.collect().unwrap(), &pages);
    let file = std::fs::File::open("/dev/zero").unwrap();
    use std::os::fd::AsRawFd as _;
    let fd = file.as_raw_fd();
    // SAFETY: memory of the test, here and below.
    assert_eq!(unsafe { libc::read(fd, at(3, 4000), 200) }, 200);
    assert_eq!(collected(), BTreeSet::from([3, 4]));
    // As much as was read, not as much as there was room for.
    let (reader, writer) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut &writer, b"ten bytes.").unwrap();
    // SAFETY: as above.
    assert_eq!(
        unsafe { libc::read(reader.as_raw_fd(), at(7, 0), 5 * PAGE) },
        10
    );
    assert_eq!(collected(), BTreeSet::from([7]));
    let vectors = [(9, 10_usize), (11, 5000)].map(|(page, length)| libc::iovec {
        iov_base: at(page, 0),
        iov_len: length,
    });
    // SAFETY: as above.
    assert_eq!(unsafe { libc::readv(fd, vectors.as_ptr(), 2) }, 5010);
    assert_eq!(collected(), BTreeSet::from([9, 11, 12]));
    // SAFETY: as above.
    assert_eq!(unsafe { libc::fstat(fd, at(20, 0).cast()) }, 0);
    assert_eq!(collected(), BTreeSet::from([20]));
    // SAFETY: as above; a terminal's window is asked of what is none.
    unsafe { libc::ioctl(fd, libc::TIOCGWINSZ, at(30, 0)) };
    assert!(collected().contains(&30), "of an ioctl nothing is known");
    // What only goes out is not a write.
    // SAFETY: as above.
    assert_eq!(
        unsafe { libc::write(writer.as_raw_fd(), at(40, 0), 10) },
        10
    );
    assert!(collected().is_empty());
    // Memory that is given back changes too, and so does what is mapped over.
    // SAFETY: as above.
    assert_eq!(
        unsafe { libc::madvise(at(50, 0), PAGE, libc::MADV_DONTNEED) },
        0
    );
    assert_eq!(collected(), BTreeSet::from([50]));
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: as above.
    let mapped = unsafe { libc::mmap(at(52, 0), 2 * PAGE, rights, flags, -1, 0) };
    assert_eq!(mapped, at(52, 0));
    assert_eq!(collected(), BTreeSet::from([52, 53]));
    write(&pages, 53);
    assert_eq!(collected(), BTreeSet::from([53]));
}

fn outside_dune_mode_it_says_so_and_collects_what_was_written_inside() {
    let pages = Pages::new(8).unwrap();
    let error = Tracker::start(pages.range()).unwrap_err();
    assert!(matches!(error, TrackError::NotEntered), "{error}");
    assert!(error.to_string().contains("dune::enter()"));
    Tracker::note_written(pages.range());
    enter();
    let tracker = Tracker::start(pages.range()).unwrap();
    write(&pages, 1);
    dune::leave();
    // Natively, so no page table of Dune's is in use.
    write(&pages, 2);
    assert_eq!(
        numbers(&tracker.collect().unwrap(), &pages),
        BTreeSet::from([1])
    );
    Tracker::note_written(part(&pages, 2, 1));
    Tracker::note_written(VirtRange::empty_at(pages.range().start()));
    assert_eq!(
        numbers(&tracker.collect().unwrap(), &pages),
        BTreeSet::from([2])
    );
    let other = Tracker::start(part(&pages, 0, 4)).unwrap();
    enter();
    write(&pages, 3);
    dune::leave();
    // The vCPU waits with its TLB: what is cleared outside holds inside.
    assert_eq!(
        numbers(&other.collect().unwrap(), &pages),
        BTreeSet::from([3])
    );
    enter();
    write(&pages, 3);
    assert_eq!(
        numbers(&other.collect().unwrap(), &pages),
        BTreeSet::from([3])
    );
    assert_eq!(
        numbers(&tracker.collect().unwrap(), &pages),
        BTreeSet::from([3])
    );
}

fn ranges_that_cannot_be_tracked_are_refused_with_the_remedy() {
    enter();
    let pages = Pages::new(4).unwrap();
    let start = pages.range().start();
    let error = Tracker::start(VirtRange::empty_at(start)).unwrap_err();
    assert!(matches!(error, TrackError::Empty { .. }), "{error}");
    let upper = VirtRange::try_new(GuestVirt::new(0xffff_8000_0000_0000), 4096).unwrap();
    let error = Tracker::start(upper).unwrap_err();
    assert!(matches!(error, TrackError::OutOfReach { .. }), "{error}");
    common::unmap((start.as_u64() as usize + 2 * PAGE) as *mut u8, PAGE);
    let error = Tracker::start(pages.range()).unwrap_err();
    let TrackError::NotMapped { at } = error else {
        panic!("{error}");
    };
    assert_eq!(at.as_u64(), start.as_u64() + 2 * PAGE as u64);
    assert!(error.to_string().contains("map all of the range"));
    assert!(Tracker::start(part(&pages, 0, 2)).is_ok());
    // 300 GiB by pages of 4 KiB are more page tables than there is room for; by pages of
    // 2 MiB they are few.
    const LARGE: usize = 300 << 30;
    let reserved = common::map(LARGE, libc::PROT_NONE);
    let range = VirtRange::try_new(GuestVirt::new(reserved as u64), LARGE as u64).unwrap();
    let error = Tracker::start(range).unwrap_err();
    assert!(matches!(error, TrackError::TooLarge { .. }), "{error}");
    assert!(error.to_string().contains("2 MiB"));
    let coarse = Tracker::start_with(range, Granularity::Page2MiB).unwrap();
    protect(reserved.wrapping_add(LARGE / 2), PAGE, common::READ_WRITE);
    // SAFETY: mapped and writable.
    unsafe { reserved.wrapping_add(LARGE / 2).write_volatile(1) };
    let found = coarse.collect().unwrap();
    assert!(found.contains(GuestVirt::new(reserved as u64 + LARGE as u64 / 2)));
    assert_eq!(found.len(), 1);
}

fn a_child_of_fork_has_the_trackers_and_their_findings() {
    enter();
    let pages = Pages::new(32).unwrap();
    let tracker = Tracker::start(pages.range()).unwrap();
    write(&pages, 4);
    let ended = child(|| {
        write(&pages, 5);
        let found = numbers(&tracker.collect().unwrap(), &pages);
        assert_eq!(found, BTreeSet::from([4, 5]));
        write(&pages, 6);
        assert_eq!(
            numbers(&tracker.collect().unwrap(), &pages),
            BTreeSet::from([6])
        );
        0
    });
    assert_eq!(ended, Ended::Exited(0));
    assert_eq!(
        numbers(&tracker.collect().unwrap(), &pages),
        BTreeSet::from([4])
    );
    // Beside another thread the child is told of everything, once.
    std::thread::spawn(|| ()).join().unwrap();
    let ended = child(|| {
        assert_eq!(tracker.collect().unwrap().len(), 32);
        assert!(tracker.collect().unwrap().is_empty());
        0
    });
    assert_eq!(ended, Ended::Exited(0));
}

fn a_fork_beside_a_thread_that_collects_leaves_the_child_a_free_lock() {
    enter();
    let pages = Arc::new(Pages::new(2000).unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let thread = {
        let (pages, stop) = (Arc::clone(&pages), Arc::clone(&stop));
        std::thread::spawn(move || {
            let tracker = Tracker::start(pages.range()).unwrap();
            while !stop.load(Ordering::SeqCst) {
                write(&pages, 7);
                tracker.collect().unwrap();
            }
        })
    };
    let tracker = Tracker::start(pages.range()).unwrap();
    for _ in 0..5 {
        let ended = child(|| {
            tracker.collect().unwrap();
            write(&pages, 9);
            let found = numbers(&tracker.collect().unwrap(), &pages);
            i32::from(found != BTreeSet::from([9]))
        });
        assert_eq!(ended, Ended::Exited(0));
    }
    stop.store(true, Ordering::SeqCst);
    thread.join().unwrap();
}

const GIB: u64 = 1 << 30;

/// Touches more memory than there are windows for, so that those without accessible memory
/// are taken back.
fn use_up_windows() {
    for n in 0..80 {
        let flags = libc::MAP_FIXED_NOREPLACE;
        let page = common::map_at(
            ((2000 + n) * GIB) as *mut u8,
            PAGE,
            common::READ_WRITE,
            flags,
        );
        // SAFETY: mapped.
        unsafe { page.write_volatile(1) };
        common::unmap(page, PAGE);
    }
}

fn a_window_that_is_taken_back_takes_no_write_along() {
    // 62 windows.
    dune::enter_with(&dune::Options::new().physical_bits(36)).unwrap();
    let at = common::map_at(
        (1000 * GIB) as *mut u8,
        16 * PAGE,
        common::READ_WRITE,
        libc::MAP_FIXED_NOREPLACE,
    );
    let range = VirtRange::try_new(GuestVirt::new(at as u64), 16 * PAGE as u64).unwrap();
    let tracker = Tracker::start(range).unwrap();
    let write = |page: usize| {
        // SAFETY: mapped.
        unsafe { at.wrapping_add(page * PAGE).write_volatile(1) };
    };
    let collected = || {
        let found = tracker.collect().unwrap();
        (0..16)
            .filter(|n| found.contains(GuestVirt::new(at as u64 + n * PAGE as u64)))
            .collect::<Vec<_>>()
    };
    for looked_meanwhile in [false, true] {
        collected();
        write(3);
        protect(at, 16 * PAGE, libc::PROT_NONE);
        use_up_windows();
        let physical = ProcessTables::get().unwrap().translate(range.start());
        assert_eq!(physical, None, "the window was not taken back");
        if looked_meanwhile {
            assert!(collected().contains(&3), "the bit went with the window");
            assert!(collected().is_empty(), "nothing happened since");
        }
        protect(at, 16 * PAGE, common::READ_WRITE);
        write(5);
        let found = collected();
        assert!(found.contains(&5));
        assert!(looked_meanwhile || found.contains(&3));
        write(6);
        assert_eq!(collected(), [6]);
    }
}

dune_testing::tests! {
    smoke what_is_written_is_collected_once_and_exactly,
    ring0 the_working_set_is_what_was_used,
    ring0 large_pages_stay_whole_where_they_are_enough,
    ring0 what_one_tracker_clears_the_others_find,
    ring0 no_write_of_any_thread_is_missed_by_any_tracker,
    ring0 a_write_by_the_kernel_for_a_system_call_is_seen,
    ring0 outside_dune_mode_it_says_so_and_collects_what_was_written_inside,
    ring0 ranges_that_cannot_be_tracked_are_refused_with_the_remedy,
    ring0 a_child_of_fork_has_the_trackers_and_their_findings,
    ring0 a_fork_beside_a_thread_that_collects_leaves_the_child_a_free_lock,
    ring0 a_window_that_is_taken_back_takes_no_write_along,
}
