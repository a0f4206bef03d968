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
use dune_kvm::vm::Vm;
use dune_kvm::windows::{WINDOW_SHIFT, WINDOW_SIZE};

use dune_x86::addr::{GuestPhys, GuestVirt, PageSize, VirtRange};
use dune_x86::paging::{NoFlush, PteFlags};

use super::{Frames, PageTable, Tables};
use crate::error::EnterError;

const ENTRIES: usize = 512;
const HALF: usize = ENTRIES / 2;
const PAGE: usize = 4096;
const TWO_MIB: u64 = 2 << 20;
const ARENA_OFFSET: u64 = TWO_MIB;
const WITH_ARENA: u64 = ARENA_OFFSET + super::frames::ARENA_BYTES;
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
        // At the start of a GiB, so that it is one piece of guest physical memory together
        // with the arena of frames behind it: a walk reaches every table by one addition.
        let mapped =
            sys::map_anonymous(2 * WINDOW_SIZE as usize).map_err(EnterError::Memory)? as u64;
        let base = mapped.next_multiple_of(WINDOW_SIZE);
        let tail = base + WITH_ARENA;
        // SAFETY: nothing uses the parts before and behind.
        let _ = unsafe { sys::unmap(mapped as *mut u8, (base - mapped) as usize) };
        // SAFETY: as above.
        let _ = unsafe { sys::unmap(tail as *mut u8, (mapped + 2 * WINDOW_SIZE - tail) as usize) };
        sys::avoid_huge_pages(base as *mut u8, WITH_ARENA as usize);
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
        crate::memory::set_run(tables.root, WITH_ARENA, base);
        // The first window was made before there were tables to show it in; a directory, if
        // one is needed, lies behind them.
        let directory = base + length as u64;
        let first = physical(base & !(WINDOW_SIZE - 1));
        tables.show(base, first, directory, physical(directory))?;
        Ok(tables)
    }

    fn top(&self) -> &[AtomicU64; ENTRIES] {
        // SAFETY: mapped by `new`, never unmapped.
        unsafe { &*self.base }
    }

    fn pdpt(&self, index: usize) -> &[AtomicU64; ENTRIES] {
        // SAFETY: HALF tables follow the top; the index is masked to them.
        unsafe { &*self.base.wrapping_add(1 + (index & (HALF - 1))) }
    }

    /// Where the arena of frames lies, behind these tables.
    pub(crate) fn arena(&self) -> u64 {
        self.base as u64 + ARENA_OFFSET
    }

    /// Guest physical address of the PML4.
    pub(crate) fn root(&self) -> u64 {
        self.root
    }

    /// Makes sure that windows cover a range and that the tables show them.
    pub(crate) fn cover(&self, vm: &Vm, start: u64, length: u64) -> Result<(), EnterError> {
        let mut chunk = start & !(WINDOW_SIZE - 1);
        while chunk < start + length {
            if vm.windows().to_guest(chunk).is_none() {
                self.add_window(vm, chunk)?;
            }
            chunk += WINDOW_SIZE;
        }
        Ok(())
    }

    /// Whoever finds the window finds it in the tables too: they are filled in before it is
    /// published.
    fn add_window(&self, vm: &Vm, chunk: u64) -> Result<(), EnterError> {
        let directory = if self.giant_pages {
            0
        } else {
            // With its own window, for nobody may want one while making another.
            let page = sys::map_anonymous(PAGE).map_err(EnterError::Memory)? as u64;
            if page >> WINDOW_SHIFT != chunk >> WINDOW_SHIFT {
                self.cover(vm, page, PAGE as u64)?;
            }
            page
        };
        vm.ensure_window_with(chunk, |guest| {
            let table = if directory >> WINDOW_SHIFT == chunk >> WINDOW_SHIFT {
                guest | (directory & (WINDOW_SIZE - 1))
            } else {
                vm.windows().to_guest(directory).unwrap_or(0)
            };
            self.show(chunk, guest, directory, table)
        })
        .map(drop)
    }

    fn entry(&self, host: u64) -> &AtomicU64 {
        &self.pdpt((host >> 39) as usize)[(host >> WINDOW_SHIFT) as usize % ENTRIES]
    }

    /// `directory` is a fresh page at the guest physical address `table`, for CPUs that have
    /// no pages of 1 GiB.
    fn show(&self, host: u64, guest: u64, directory: u64, table: u64) -> Result<(), EnterError> {
        let entry = self.entry(host);
        let before = entry.load(Ordering::Acquire);
        if before & PRESENT != 0 && before & LEAF == 0 {
            return self.fill_tables(host, guest);
        }
        if self.giant_pages {
            entry.store(guest | WINDOW_LEAF, Ordering::Release);
            return Ok(());
        }
        for index in 0..ENTRIES as u64 {
            let leaf = (guest + index * TWO_MIB) | WINDOW_LEAF;
            // SAFETY: a fresh page of 512 entries.
            unsafe {
                (directory as *mut u64)
                    .wrapping_add(index as usize)
                    .write(leaf)
            };
        }
        entry.store(table | TABLE | USER, Ordering::Release);
        Ok(())
    }

    /// Shows a window where an earlier one was split: its tables are still there.
    fn fill_tables(&self, host: u64, guest: u64) -> Result<(), EnterError> {
        let used = PteFlags::ACCESSED | PteFlags::DIRTY;
        let range = VirtRange::page(GuestVirt::new_truncate(host), PageSize::Size1GiB);
        self.table()
            .map_range(
                range,
                GuestPhys::new_truncate(guest),
                PageSize::Size2MiB,
                PteFlags::RWX | used,
            )
            .map_err(|_| EnterError::Memory(sys::Errno::ENOMEM))
    }

    /// Takes a window out of the tables. What it was split into stays, empty.
    pub(crate) fn hide(&self, host: u64) {
        // Before its dirty bits are out of sight.
        crate::dirty::window_is_lost();
        let entry = self.entry(host);
        let before = entry.load(Ordering::Acquire);
        if before & PRESENT != 0 && before & LEAF == 0 {
            let range = VirtRange::page(GuestVirt::new_truncate(host), PageSize::Size1GiB);
            match self.table().unmap(range, |_| ()) {
                // KVM flushes every vCPU when the slot goes, which is next.
                Ok(flush) => flush.ignore(NoFlush::CoveredByLargerFlush),
                Err(failure) => failure.flush.ignore(NoFlush::CoveredByLargerFlush),
            }
        } else {
            entry.store(0, Ordering::Release);
        }
    }

    fn table(&self) -> PageTable {
        let root = GuestPhys::new_truncate(self.root);
        PageTable::from_root(root, Tables::new(), Frames::new())
    }
}
