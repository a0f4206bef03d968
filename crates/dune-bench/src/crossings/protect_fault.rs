//! A page is protected, written, and unprotected by whoever is told of the fault: the
//! pattern of garbage collectors, checkpoints and distributed shared memory.
//!
//! Linux: `mprotect`, `SIGSEGV`, `mprotect` in the handler. Dune mode: the page's own entry
//! in the process's page table, and a handler of the page fault; no exit.
#![expect(unsafe_code, reason = "protects its own memory and writes to it")]

use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;

use dune::exceptions::{self, Outcome};
use dune::memory::{AddressSpace, Change, PageSize, ProcessTables, PteFlags, Tlb, VirtRange};
use dune::{TrapFrame, vector};
use dune_x86::addr::GuestVirt;

use super::Bench;
use super::signal::Installed;
use crate::meter::Figure;
use crate::report::{DUNE, LINUX, Row};

const BATCH: u32 = 64;
const PAGE: usize = 4096;

/// The page, for the handlers.
static TARGET: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());
/// Faults that the handlers have seen, to be sure that there was one for each write.
static FAULTS: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    FAULTS.fetch_add(1, Ordering::Relaxed);
    protect(
        TARGET.load(Ordering::Relaxed),
        libc::PROT_READ | libc::PROT_WRITE,
    );
}

fn protect(page: *mut u8, rights: libc::c_int) {
    // SAFETY: the page is used by this file alone.
    unsafe { libc::mprotect(page.cast(), PAGE, rights) };
}

pub(crate) fn linux(bench: &Bench, row: &mut Row) {
    match measure_linux(bench) {
        Some(figure) => row.add(LINUX, figure),
        None => row.note("no figure for Linux: not every write faulted"),
    }
}

pub(crate) fn linux_beside_thread(bench: &Bench, row: &mut Row) {
    beside_thread(|| linux(bench, row));
}

pub(crate) fn dune(bench: &Bench, row: &mut Row) {
    match measure_dune(bench) {
        Ok(figure) => row.add(DUNE, figure),
        Err(reason) => return row.set_missing(reason),
    }
    // An address space is one more place that translations may be kept for.
    if let Ok(space) = AddressSpace::empty() {
        if let Ok(figure) = measure_dune(bench) {
            row.add("dune-beside-space", figure);
        }
        drop(space);
    }
}

pub(crate) fn dune_beside_thread(bench: &Bench, row: &mut Row) {
    beside_thread(|| match measure_dune(bench) {
        Ok(figure) => row.add(DUNE, figure),
        Err(reason) => row.set_missing(reason),
    });
}

/// Does something while another thread exists, and waits.
fn beside_thread(body: impl FnOnce()) {
    let (end, wait) = mpsc::channel::<()>();
    let (ready, started) = mpsc::channel();
    let thread = thread::spawn(move || {
        // Nobody is left to tell when these fail.
        let _ = ready.send(());
        let _ = wait.recv();
    });
    let _ = started.recv();
    body();
    drop(end);
    let _ = thread.join();
}

fn measure_linux(bench: &Bench) -> Option<Figure> {
    let page = Page::new();
    let handler = Installed::new(libc::SIGSEGV, on_signal);
    FAULTS.store(0, Ordering::Relaxed);
    let mut writes = 0;
    let figure = bench.meter.measure(BATCH, || {
        protect(page.0, libc::PROT_READ);
        page.write();
        writes += 1;
    });
    drop(handler);
    (FAULTS.load(Ordering::Relaxed) == writes).then_some(figure)
}

fn on_fault(frame: &mut TrapFrame) -> Outcome {
    let page = TARGET.load(Ordering::Relaxed) as u64;
    if frame.fault_address() & !(PAGE as u64 - 1) != page {
        return Outcome::Decline;
    }
    let Some(tables) = ProcessTables::get() else {
        return Outcome::Decline;
    };
    let change = Change::set(PteFlags::WRITABLE);
    // SAFETY: gives a right back.
    match unsafe { tables.update_page(GuestVirt::new_truncate(page), change) } {
        Ok((_, flush)) => {
            FAULTS.fetch_add(1, Ordering::Relaxed);
            // Nothing is owed for a right that was added, and the CPU has dropped the
            // translation that faulted.
            flush.apply(&Tlb::of_process());
            Outcome::Resume
        }
        Err(_) => Outcome::Decline,
    }
}

fn measure_dune(bench: &Bench) -> Result<Figure, String> {
    let page = Page::new();
    let address = GuestVirt::new_truncate(page.0 as u64);
    let tlb = Tlb::of_process();
    let Some(tables) = ProcessTables::get() else {
        return Err("the process has no page tables of its own".to_owned());
    };
    match tables.split(
        VirtRange::page(address, PageSize::Size4KiB),
        PageSize::Size4KiB,
    ) {
        Ok(flush) => flush.apply(&tlb),
        Err(error) => return Err(error.to_string()),
    }
    let before = exceptions::set_handler(vector::PAGE_FAULT, on_fault);
    FAULTS.store(0, Ordering::Relaxed);
    let mut writes = 0;
    let figure = bench.meter.measure(BATCH, || {
        // SAFETY: the handler resolves the fault of the write below; nothing else uses the
        // page.
        match unsafe { tables.update_page(address, Change::clear(PteFlags::WRITABLE)) } {
            Ok((_, flush)) => flush.apply(&tlb),
            Err(_) => return,
        }
        page.write();
        writes += 1;
    });
    match before {
        Some(handler) => exceptions::set_handler(vector::PAGE_FAULT, handler),
        None => exceptions::clear_handler(vector::PAGE_FAULT),
    };
    if writes > 0 && FAULTS.load(Ordering::Relaxed) == writes {
        Ok(figure)
    } else {
        Err("not every write faulted".to_owned())
    }
}

/// One page that the handlers know. Unmapped when dropped.
struct Page(*mut u8);

impl Page {
    fn new() -> Self {
        // SAFETY: a new mapping where the kernel likes.
        let page = unsafe {
            libc::mmap(
                ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert!(page != libc::MAP_FAILED, "no memory for the benchmark");
        let page = Self(page.cast());
        page.write();
        TARGET.store(page.0, Ordering::Relaxed);
        page
    }

    #[inline(always)]
    fn write(&self) {
        // SAFETY: mapped; where it is protected, a handler sees to it.
        unsafe { self.0.write_volatile(1) };
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        TARGET.store(ptr::null_mut(), Ordering::Relaxed);
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.0.cast(), PAGE) };
    }
}
