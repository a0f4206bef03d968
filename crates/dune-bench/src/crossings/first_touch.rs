//! The first touch of memory: Linux supplies a page of zeros, and in Dune mode KVM shows it
//! to the guest.
#![expect(unsafe_code, reason = "maps, touches and unmaps memory")]

use core::ptr;

use super::Bench;
use crate::clock;
use crate::meter::Figure;
use crate::report::{DUNE, LINUX, Row};

const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;
/// Pages of 4 KiB that a sample touches.
const SINGLE_PAGES: usize = 256;
/// Bytes that a sample of the batched kind touches.
const BATCHED_BYTES: usize = 2 * HUGE_PAGE;

pub(crate) fn single_linux(bench: &Bench, row: &mut Row) {
    row.add(LINUX, single(bench));
}

pub(crate) fn single_dune(bench: &Bench, row: &mut Row) {
    row.add(DUNE, single(bench));
    note_difference(row);
}

/// What is left when Linux's own work is taken away.
fn note_difference(row: &mut Row) {
    if let (Some(linux), Some(dune)) = (row.median(LINUX), row.median(DUNE)) {
        row.note(format!("Dune adds {:.0} to what Linux needs", dune - linux));
    }
}

pub(crate) fn batched_linux(bench: &Bench, row: &mut Row) {
    row.add(LINUX, huge(bench));
    row.add("linux-populate", populated(bench));
    row.note("populate: MADV_POPULATE_WRITE over pages of 4 KiB, then the touches");
}

pub(crate) fn batched_dune(bench: &Bench, row: &mut Row) {
    row.add(DUNE, huge(bench));
    row.add("dune-populate", populated(bench));
    note_difference(row);
    row.note(
        "a kernel that is set to zero what it allocates (init_on_alloc) zeroes a page of 2 MiB twice",
    );
}

/// Pages of 4 KiB, one after the other.
fn single(bench: &Bench) -> Figure {
    bench.meter.measure_batches(SINGLE_PAGES as u32, || {
        let memory = Fresh::new(SINGLE_PAGES * PAGE, libc::MADV_NOHUGEPAGE);
        timed(|| memory.touch())
    })
}

/// Memory that Linux may supply by 2 MiB, for each 4 KiB.
fn huge(bench: &Bench) -> Figure {
    let meter = bench.meter.with_at_most(21);
    meter.measure_batches((BATCHED_BYTES / PAGE) as u32, || {
        let memory = Fresh::new(BATCHED_BYTES, libc::MADV_HUGEPAGE);
        timed(|| memory.touch())
    })
}

/// Pages of 4 KiB that are asked for by one call, for each page.
fn populated(bench: &Bench) -> Figure {
    bench.meter.measure_batches(SINGLE_PAGES as u32, || {
        let memory = Fresh::new(SINGLE_PAGES * PAGE, libc::MADV_NOHUGEPAGE);
        timed(|| {
            memory.advise(libc::MADV_POPULATE_WRITE);
            memory.touch();
        })
    })
}

#[inline(always)]
fn timed(work: impl FnOnce()) -> u64 {
    let start = clock::ticks();
    work();
    clock::ticks() - start
}

/// Memory that nobody has touched, aligned to a huge page. Unmapped when dropped.
struct Fresh {
    mapping: *mut u8,
    mapped: usize,
    start: *mut u8,
    length: usize,
}

impl Fresh {
    fn new(length: usize, advice: libc::c_int) -> Self {
        let mapped = length + HUGE_PAGE;
        // SAFETY: a new mapping where the kernel likes.
        let mapping = unsafe {
            libc::mmap(
                ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert!(mapping != libc::MAP_FAILED, "no memory for the benchmark");
        let mapping = mapping.cast::<u8>();
        let start = mapping.wrapping_add(mapping.align_offset(HUGE_PAGE));
        let fresh = Self {
            mapping,
            mapped,
            start,
            length,
        };
        fresh.advise(advice);
        fresh
    }

    fn advise(&self, advice: libc::c_int) {
        // A kernel that does not know the advice touches as it pleases.
        // SAFETY: our own memory, whose content nobody relies on.
        unsafe { libc::madvise(self.start.cast(), self.length, advice) };
    }

    #[inline(always)]
    fn touch(&self) {
        for offset in (0..self.length).step_by(PAGE) {
            // SAFETY: within the mapping.
            unsafe { self.start.wrapping_add(offset).write_volatile(1) };
        }
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing refers to any more.
        unsafe { libc::munmap(self.mapping.cast(), self.mapped) };
    }
}
