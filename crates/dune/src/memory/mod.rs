//! Memory as ring 0 sees it: the process's own page tables, and address spaces for ring 3.
//!
//! * [`ProcessTables`] is the process's own page table. Looking is safe; changing what the
//!   process itself stands on is `unsafe`.
//! * [`AddressSpace`] is another one, built from nothing or around the process, for
//!   [`UserContext`](crate::UserContext) to run in. Safe: what it maps for ring 3 is
//!   [`Pages`], memory that Rust never holds a reference to.
//! * [`Tlb`] pays the [`Flush`] that an edit owes, on every vCPU of the process.
//!
//! None of it exits, but for a flush while other threads have vCPUs (see [`Tlb`]) and for the
//! first touch of memory.

use dune_x86::addr::GuestVirt;
use dune_x86::trap::PageFaultError;

use crate::machine::Machine;

mod borrow;
mod copy;
mod frames;
pub(crate) mod identity;
mod pages;
mod process;
mod space;
pub(crate) mod stack;
mod tlb;

pub use borrow::PageEntry;
pub use copy::{UserFault, copy_shared};
pub use dune_x86::addr::{PageSize, VirtRange};
pub use dune_x86::paging::{Change, Entry, Flush, Leaf, NoFlush, PteFlags, Walk};
pub use frames::{Frames, Tables};
pub use pages::Pages;
pub use process::ProcessTables;
pub use space::{AddressSpace, SpaceError};
pub use tlb::Tlb;

pub(crate) use frames::{FrameArena, set_run};
pub(crate) use tlb::{ValidPcids, forget_all};

/// A page table in the memory of this process.
pub type PageTable = dune_x86::paging::PageTable<Tables, Frames>;

/// Makes sure that the guest reaches the GiB around an address. `false` where it cannot.
pub(crate) fn cover(machine: &Machine, address: u64) -> bool {
    machine.cover(address & !0xfff, 4096).is_ok()
}

/// Whether the page tables in use allow by now what a page fault says they did not: another
/// thread was faster, or the TLB remembered less.
pub(crate) fn is_spurious(address: u64, cause: PageFaultError) -> bool {
    cause.contains(PageFaultError::PRESENT) && !forbids(address, cause) && {
        // Only the tables' word counts here, not the host side's.
        crate::maps::rights(address).is_some_and(|rights| {
            let needed = if cause.contains(PageFaultError::WRITE) {
                crate::maps::Rights::WRITE
            } else {
                crate::maps::Rights::READ
            };
            rights.contains(needed) && dune_kvm::sys::read_memory(address, &mut [0]).is_ok()
        })
    }
}

/// Whether it is the page tables, and not the host side, that forbid an access.
pub(crate) fn forbids(address: u64, cause: PageFaultError) -> bool {
    let Ok(address) = GuestVirt::try_new(address) else {
        return true;
    };
    let Some(tables) = ProcessTables::get() else {
        return true;
    };
    match tables.walk(address).permissions() {
        None => true,
        Some(rights) => {
            (cause.contains(PageFaultError::WRITE) && !rights.writable)
                || (cause.contains(PageFaultError::INSTRUCTION) && !rights.executable)
        }
    }
}
