//! The process's own page tables: guest virtual = host virtual, window by window.
//!
//! ```text
//!   PML4[0..256]    -> PDPT[0..256]   the process, supervisor pages
//!   PML4[256..512]  -> the same PDPTs: the high alias, never user
//! ```
//!
//! Every PDPT exists from the start (as an untouched page of zeros), so the top level never
//! changes and other address spaces may share it. A window is one 1 GiB leaf in a PDPT, or,
//! on a CPU without such leaves, a page directory of 2 MiB leaves.
//!
//! The *high alias* shows the process a second time in the upper half of the address space.
//! What the CPU needs at the moment of a trap (entry stubs, interrupt table, stacks, thread
//! areas) is used by its alias, so it is in place whichever address space ring 3 runs in,
//! even one that has nothing of the process in its lower half.
#![expect(unsafe_code, reason = "page tables are raw memory shared with the CPU")]

use core::sync::atomic::{AtomicU64, Ordering};

use dune_kvm::sys;
use dune_kvm::vm::{Fresh, Vm};
use dune_kvm::windows::{WINDOW_SHIFT, WINDOW_SIZE};

use crate::error::EnterError;

const ENTRIES: usize = 512;
const HALF: usize = ENTRIES / 2;
const PAGE: usize = 4096;
const TWO_MIB: u64 = 2 << 20;
const HIGH_HALF: u64 = 0xffff_8000_0000_0000;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LEAF: u64 = 1 << 7;
/// An upper-level entry that restricts nothing but, in the upper half, ring 3.
const TABLE: u64 = PRESENT | WRITABLE | ACCESSED;
/// The leaf of a window. Dirty from the start: whoever wants to see writes clears it.
const WINDOW_LEAF: u64 = PRESENT | WRITABLE | ACCESSED | DIRTY | LEAF;

/// The alias of a lower-half address in the upper half.
#[inline]
pub(crate) const fn high(address: u64) -> u64 {
    address | HIGH_HALF
}

/// The process's own tables.
#[derive(Debug)]
pub(crate) struct IdentityTables {
    /// PML4, followed by 256 PDPTs.
    base: *mut [AtomicU64; ENTRIES],
    root: u64,
    giant_pages: bool,
}

// SAFETY: the tables are atomics, edited by stores that each leave a valid tree.
unsafe impl Send for IdentityTables {}
// SAFETY: as above.
unsafe impl Sync for IdentityTables {}

impl IdentityTables {
    pub(crate) fn new(vm: &Vm) -> Result<Self, EnterError> {
        let length = (1 + HALF) * PAGE;
        // One piece that lies within a GiB, so that it is one piece of guest physical too.
        let mapped = sys::map_anonymous(length + PAGE).map_err(EnterError::Memory)? as u64;
        let mut base = mapped;
        if base >> WINDOW_SHIFT != (base + length as u64) >> WINDOW_SHIFT {
            let again = sys::map_anonymous(WINDOW_SIZE as usize).map_err(EnterError::Memory)?;
            base = (again as u64).next_multiple_of(WINDOW_SIZE);
            if base + length as u64 > again as u64 + WINDOW_SIZE {
                base = again as u64;
            }
        }
        vm.ensure_window(base).map_err(EnterError::Platform)?;
        let physical = |address: u64| vm.windows().to_guest(address).unwrap_or(0);
        let (_, _, _, edx) = vm.host().leaf(0x8000_0001, 0);
        let tables = Self {
            base: base as *mut [AtomicU64; ENTRIES],
            root: physical(base),
            giant_pages: edx & (1 << 26) != 0,
        };
        for index in 0..HALF {
            let table = physical(base + ((1 + index) * PAGE) as u64);
            tables.top()[index].store(table | TABLE | USER, Ordering::Relaxed);
            tables.top()[HALF + index].store(table | TABLE, Ordering::Relaxed);
        }
        crate::memory::set_identity_run(tables.root, length as u64, base);
        tables.cover(vm, base, length as u64)?;
        // The first window was made before there were tables to show it in.
        tables.show(vm, base, physical(base & !(WINDOW_SIZE - 1)))?;
        Ok(tables)
    }

    fn top(&self) -> &[AtomicU64; ENTRIES] {
        // SAFETY: mapped by `new`, never unmapped.
        unsafe { &*self.base }
    }

    fn pdpt(&self, index: usize) -> &[AtomicU64; ENTRIES] {
        // SAFETY: HALF tables follow the top; the index is masked to them.
        unsafe { &*self.base.add(1 + (index & (HALF - 1))) }
    }

    /// Guest physical address of the PML4.
    pub(crate) fn root(&self) -> u64 {
        self.root
    }

    /// Makes sure that windows cover a range and that the tables show them.
    pub(crate) fn cover(&self, vm: &Vm, start: u64, length: u64) -> Result<(), EnterError> {
        let mut chunk = start & !(WINDOW_SIZE - 1);
        while chunk < start + length {
            let (guest, fresh) = vm.ensure_window(chunk).map_err(EnterError::Platform)?;
            if fresh == Fresh::Yes {
                self.show(vm, chunk, guest)?;
            }
            chunk += WINDOW_SIZE;
        }
        Ok(())
    }

    fn show(&self, vm: &Vm, host: u64, guest: u64) -> Result<(), EnterError> {
        let entry = &self.pdpt((host >> 39) as usize)[(host >> WINDOW_SHIFT) as usize % ENTRIES];
        if self.giant_pages {
            entry.store(guest | WINDOW_LEAF, Ordering::Release);
            return Ok(());
        }
        let directory = sys::map_anonymous(PAGE).map_err(EnterError::Memory)? as u64;
        for index in 0..ENTRIES as u64 {
            let leaf = (guest + index * TWO_MIB) | WINDOW_LEAF;
            // SAFETY: a fresh page of 512 entries.
            unsafe { (directory as *mut u64).add(index as usize).write(leaf) };
        }
        self.cover(vm, directory, PAGE as u64)?;
        let table = vm.windows().to_guest(directory).unwrap_or(0);
        entry.store(table | TABLE | USER, Ordering::Release);
        Ok(())
    }
}
