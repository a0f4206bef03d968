//! Flushing translations, on this vCPU and on the process's others.
//!
//! There is no interrupt controller in the guest by which one vCPU could interrupt another,
//! and none is needed: KVM keeps every vCPU's TLB in step with the host process's mappings.
//! When a page that a guest has used is unmapped on the host side, KVM flushes the whole TLB
//! of every vCPU of the VM, waits for those that run, and does so before `madvise` returns.
//! So a flush on all vCPUs is: write to a page that nobody else uses, and give it back
//! (`MADV_DONTNEED`). It flushes every PCID, and vCPUs that wait outside Dune mode too.
//!
//! PCIDs: the process's own tables have 0; each [`AddressSpace`](super::AddressSpace) gets one of the other
//! 4,095 while there are any. A vCPU may load an address space without a flush if its
//! *valid* bit for that PCID is set; flushing an address space that no vCPU is running at
//! the moment is clearing that bit for every vCPU. The protocol, sequentially consistent:
//!
//! ```text
//!   who runs ring 3:  running = pcid;  was = valid[pcid]; valid[pcid] = 1;  load CR3 (NO_FLUSH if was)
//!   who flushes:      edit the entry;  valid[pcid] = 0 for every vCPU;      running == pcid? -> flush all
//! ```
#![expect(
    unsafe_code,
    reason = "flush instructions, and the areas of other threads"
)]

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use dune_kvm::sys::{self, nr};
use dune_x86::addr::{GuestVirt, PageSize, VirtRange};
use dune_x86::paging::FlushTlb;

use crate::arch;
use crate::machine::Machine;
use crate::thread::ThreadArea;

/// Number of process-context identifiers (SDM vol. 3, 4.10.1).
pub(crate) const PCIDS: usize = 4096;
const MADV_DONTNEED: usize = 4;
/// More pages than this are flushed all at once.
const MOST_SINGLE_PAGES: u64 = 32;

/// How many address spaces there are.
pub(crate) static SPACES: AtomicU32 = AtomicU32::new(0);

/// The highest PCID that was ever given out: above it no bit is ever set.
pub(crate) static HIGHEST_PCID: AtomicU32 = AtomicU32::new(0);

/// The PCIDs that a vCPU's TLB may keep entries of, as a bit set.
#[derive(Debug)]
pub(crate) struct ValidPcids([AtomicU64; PCIDS / 64]);

impl ValidPcids {
    pub(crate) const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; PCIDS / 64])
    }

    /// Sets a PCID's bit; whether it was set.
    #[inline(always)]
    pub(crate) fn set(&self, pcid: u16) -> bool {
        let bit = 1 << (pcid % 64);
        self.0.get(usize::from(pcid / 64)).is_some_and(|word| {
            word.load(Ordering::SeqCst) & bit != 0
                || word.fetch_or(bit, Ordering::SeqCst) & bit != 0
        })
    }

    fn clear(&self, pcid: u16) {
        if let Some(word) = self.0.get(usize::from(pcid / 64)) {
            word.fetch_and(!(1 << (pcid % 64)), Ordering::SeqCst);
        }
    }

    fn clear_all(&self) {
        let words = HIGHEST_PCID.load(Ordering::SeqCst) as usize / 64 + 1;
        for word in self.0.iter().take(words) {
            word.store(0, Ordering::SeqCst);
        }
    }
}

/// A vCPU that starts afresh, or in another process, keeps nothing.
pub(crate) fn forget_all(area: &ThreadArea) {
    area.valid_pcids.clear_all();
}

/// Flushes translations of the process's own page tables, and of address spaces that borrow
/// from them, on every vCPU of the process.
///
/// While one thread alone has a vCPU this is a few instructions. Otherwise each flush is one
/// forwarded system call and an exit of every vCPU that runs (some 10,000 instructions):
/// gather the [`Flush`](super::Flush)es of several edits with [`Flush::and`](super::Flush::and).
///
/// Outside Dune mode every flush makes KVM forget all that its vCPUs know: correct, and dear.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tlb(());

impl Tlb {
    /// The process's TLBs.
    #[must_use]
    pub const fn of_process() -> Self {
        Self(())
    }
}

impl FlushTlb for Tlb {
    #[inline(always)]
    fn flush_page(&self, va: GuestVirt) {
        if flush_everywhere_if_shared() {
            return;
        }
        arch::invalidate_page(va.as_u64());
    }

    fn flush_range(&self, range: VirtRange, stride: PageSize) {
        if flush_everywhere_if_shared() {
            return;
        }
        if range.bytes() >> stride.shift() > MOST_SINGLE_PAGES {
            arch::invalidate_all();
            return;
        }
        for page in range.pages(stride) {
            arch::invalidate_page(page.as_u64());
        }
    }

    fn flush_all(&self) {
        if !flush_everywhere_if_shared() {
            arch::invalidate_all();
        }
    }
}

/// Flushes all vCPUs if there is more than this one, and what this one keeps of address
/// spaces; `true` if nothing is left to do.
#[inline(always)]
fn flush_everywhere_if_shared() -> bool {
    if !crate::is_inside() {
        // There is no guest to touch the flush page; parked vCPUs keep translations too.
        if let Some(machine) = Machine::get() {
            machine.vm().flush_every_vcpu();
        }
        return true;
    }
    if ThreadArea::only_one() {
        if SPACES.load(Ordering::Relaxed) != 0 {
            // SAFETY: in Dune mode the current area is this thread's.
            let area = unsafe { &*ThreadArea::current() };
            forget_all(area);
            if area.running_pcid.load(Ordering::Relaxed) != 0 {
                // Under another identifier, from which the process's own is out of reach.
                flush_every_vcpu();
                return true;
            }
        }
        return false;
    }
    flush_every_vcpu();
    true
}

/// See the module documentation.
fn flush_every_vcpu() {
    // SAFETY: in Dune mode the current area is this thread's.
    let page = unsafe { (*ThreadArea::current()).flush_page };
    // Signals may interrupt between the two: then the page is touched and given back once
    // more in between, and this call still finds a page that was touched after the edit, or
    // one that was given back after it.
    // SAFETY: the page is this thread's and holds nothing.
    unsafe { page.write_volatile(1) };
    // SAFETY: as above.
    let result = unsafe { sys::raw(nr::MADVISE, [page as usize, 4096, MADV_DONTNEED, 0, 0, 0]) };
    if result < 0 {
        crate::report::die_with_number(b"madvise of the flush page failed: ", result as u64);
    }
}

/// Flushes an address space's own translations on every vCPU that keeps or uses some.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SpaceTlb {
    pub(crate) pcid: u16,
}

impl SpaceTlb {
    fn flush(self) {
        let mut running = false;
        for area in ThreadArea::all() {
            // SAFETY: areas are never freed; the fields are atomic.
            let valid = unsafe { &(*area.as_ptr()).valid_pcids };
            // SAFETY: as above.
            let runs = unsafe { &(*area.as_ptr()).running_pcid };
            valid.clear(self.pcid);
            running |= runs.load(Ordering::SeqCst) == u32::from(self.pcid) + 1;
        }
        if running {
            if crate::is_inside() {
                flush_every_vcpu();
            } else if let Some(machine) = Machine::get() {
                machine.vm().flush_every_vcpu();
            }
        }
    }
}

impl FlushTlb for SpaceTlb {
    fn flush_page(&self, _va: GuestVirt) {
        self.flush();
    }

    fn flush_range(&self, _range: VirtRange, _stride: PageSize) {
        self.flush();
    }

    fn flush_all(&self) {
        self.flush();
    }
}
