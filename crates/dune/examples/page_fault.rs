//! A page fault handler: pages are made read-only in the process's own page tables, and the
//! handler gives the right back at the first write, as a collector's write barrier does. No
//! system call is made and nothing leaves the guest.
#![expect(
    unsafe_code,
    reason = "takes rights away from the process's own memory"
)]

use std::sync::atomic::{AtomicUsize, Ordering};

use dune::exceptions::{self, Outcome};
use dune::memory::{Change, NoFlush, PageSize, Pages, ProcessTables, PteFlags, Tlb};
use dune::{PageFaultError, TrapFrame, vector};
use dune_x86::addr::GuestVirt;

static FAULTS: AtomicUsize = AtomicUsize::new(0);

fn give_back_the_right_to_write(frame: &mut TrapFrame) -> Outcome {
    if !frame
        .fault_cause()
        .contains(PageFaultError::PRESENT | PageFaultError::WRITE)
    {
        return Outcome::Decline; // becomes SIGSEGV
    }
    let (Some(tables), Ok(address)) = (
        ProcessTables::get(),
        GuestVirt::try_new(frame.fault_address()),
    ) else {
        return Outcome::Decline;
    };
    // SAFETY: a right is given, none is taken.
    match unsafe { tables.update_page(address, Change::set(PteFlags::WRITABLE)) } {
        Ok((_, flush)) => flush.ignore(NoFlush::StaleIsHarmless),
        Err(_) => return Outcome::Decline,
    }
    FAULTS.fetch_add(1, Ordering::Relaxed);
    Outcome::Resume
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    dune::enter()?;
    exceptions::set_handler(vector::PAGE_FAULT, give_back_the_right_to_write);

    let tables = ProcessTables::get().ok_or("Dune mode was entered above")?;
    let pages = Pages::new(100)?;
    let tlb = Tlb::of_process();
    tables.split(pages.range(), PageSize::Size4KiB)?.apply(&tlb);
    // SAFETY: the handler gives the rights back, and does not live in these pages.
    match unsafe { tables.protect(pages.range(), PteFlags::R) } {
        Ok(flush) => flush.apply(&tlb),
        Err(failure) => return Err(failure.apply(&tlb).into()),
    }

    for page in (0..100).step_by(3) {
        assert!(pages.write(page * 4096, b"written"));
    }
    println!(
        "34 of 100 pages written, {} page faults handled",
        FAULTS.load(Ordering::Relaxed)
    );
    Ok(())
}
