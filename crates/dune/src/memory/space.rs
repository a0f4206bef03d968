//! Address spaces for ring 3.
#![expect(unsafe_code, reason = "maps the process's own memory on request")]

use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use dune_x86::addr::{GuestPhys, GuestVirt, PageSize, VirtRange};
use dune_x86::paging::{
    ENTRIES, EditFailure, Entry, Flush, Leaf, MapError, PteFlags, ShareError, Walk,
};

use super::tlb::{HIGHEST_PCID, PCIDS, SPACES, SpaceTlb};
use super::{Frames, PageTable, Pages, ProcessTables, Tables};
use crate::error::EnterError;
use crate::machine::Machine;

/// Why an address space could not be made or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpaceError {
    /// There is no machine yet.
    #[error("address spaces exist in Dune mode only: call dune::enter() first")]
    NotEntered,
    /// No frame was left for a page table.
    #[error(transparent)]
    OutOfTables(#[from] dune_x86::paging::OutOfTables),
    /// The process's tables could not be shared.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// A page could not be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// An edit stopped half-way. The flush of what was done has been applied.
    #[error(transparent)]
    Edit(dune_x86::paging::EditError),
    /// The memory has no window.
    #[error(transparent)]
    Window(#[from] EnterError),
    /// Ring 3 lives in the lower half.
    #[error("{0} is not in the lower half of the address space")]
    UpperHalf(VirtRange),
}

/// An address space in which ring 3 can run.
///
/// The upper half is the runtime's and never visible to ring 3. The lower half is what is
/// mapped here, and in a space made by [`around_process`](Self::around_process) also the
/// whole process, for ring 0 alone.
#[derive(Debug)]
pub struct AddressSpace {
    table: Option<PageTable>,
    pcid: u16,
    /// What keeps the mapped memory from being freed.
    held: Vec<(VirtRange, Arc<Pages>)>,
    /// Whose tables are borrowed.
    pub(super) lenders: Vec<Arc<AddressSpace>>,
}

/// PCIDs in use, as a bit set; bit 0 is the process's.
static IN_USE: [AtomicU64; PCIDS / 64] = [const { AtomicU64::new(0) }; PCIDS / 64];

fn take_pcid() -> u16 {
    let available = Machine::get().is_some_and(Machine::has_pcid);
    for (index, word) in IN_USE.iter().enumerate().filter(|_| available) {
        let reserved = u64::from(index == 0);
        let mut bits = word.load(Ordering::Relaxed);
        while bits | reserved != u64::MAX {
            let bit = (bits | reserved).trailing_ones();
            match word.compare_exchange(bits, bits | 1 << bit, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) => {
                    let pcid = index as u32 * 64 + bit;
                    HIGHEST_PCID.fetch_max(pcid, Ordering::SeqCst);
                    return pcid as u16;
                }
                Err(found) => bits = found,
            }
        }
    }
    0
}

fn give_pcid_back(pcid: u16) {
    if let Some(word) = IN_USE.get(usize::from(pcid / 64)).filter(|_| pcid != 0) {
        word.fetch_and(!(1 << (pcid % 64)), Ordering::AcqRel);
    }
}

impl AddressSpace {
    /// An address space in which nothing is mapped.
    ///
    /// # Errors
    /// [`SpaceError`].
    pub fn empty() -> Result<Self, SpaceError> {
        let process = ProcessTables::get().ok_or(SpaceError::NotEntered)?;
        let table = PageTable::new(Tables::new(), Frames::new())?;
        // Exactly as the process has them: without the right of ring 3.
        Tables::new().copy_entries(
            process.table().root(),
            table.root(),
            ENTRIES / 2..ENTRIES,
            Entry::BORROWED,
        );
        SPACES.fetch_add(1, Ordering::SeqCst);
        let space = Self {
            table: Some(table),
            pcid: take_pcid(),
            held: Vec::new(),
            lenders: Vec::new(),
        };
        // Whatever a vCPU remembers of the identifier's last owner.
        Flush::everything().apply(&space.tlb());
        Ok(space)
    }

    /// An address space with the process in it, for ring 0 alone: its page tables are shared,
    /// so what the process maps later is there too. The first half of the 256 top-level
    /// entries of the lower half (the addresses below 64 TiB, which Linux gives out last) is
    /// left to ring 3.
    ///
    /// # Errors
    /// [`SpaceError`].
    pub fn around_process() -> Result<Self, SpaceError> {
        const FIRST_OF_PROCESS: u64 = 1 << 46;
        let space = Self::empty()?;
        let process = ProcessTables::get().ok_or(SpaceError::NotEntered)?;
        let upper = VirtRange::try_new(GuestVirt::new(FIRST_OF_PROCESS), FIRST_OF_PROCESS)
            .unwrap_or(VirtRange::empty_at(GuestVirt::ZERO));
        if let Some(table) = &space.table {
            table.share_from(process.table(), upper)?;
        }
        Ok(space)
    }

    pub(crate) fn tlb(&self) -> SpaceTlb {
        SpaceTlb { pcid: self.pcid }
    }

    #[inline(always)]
    pub(crate) fn pcid(&self) -> u16 {
        self.pcid
    }

    #[inline(always)]
    pub(crate) fn root(&self) -> u64 {
        self.table.as_ref().map_or(0, |table| table.root().as_u64())
    }

    pub(super) fn table(&self) -> Result<&PageTable, SpaceError> {
        self.table.as_ref().ok_or(SpaceError::NotEntered)
    }

    /// Maps pages for ring 3 at `at`, with the rights in `rights` (of which
    /// [`PteFlags::USER`] is implied). The address space keeps the memory alive until the
    /// range is unmapped.
    ///
    /// # Errors
    /// [`SpaceError`], for one where something is mapped already.
    pub fn map(
        &mut self,
        at: GuestVirt,
        pages: &Arc<Pages>,
        rights: PteFlags,
    ) -> Result<VirtRange, SpaceError> {
        let range = VirtRange::try_new(at, pages.len() as u64)
            .map_err(|_| SpaceError::UpperHalf(VirtRange::empty_at(at)))?;
        // SAFETY: the memory is Pages, made for ring 3, and is held below.
        unsafe { self.map_memory(range, pages.range().start().as_u64(), rights) }?;
        self.held.push((range, Arc::clone(pages)));
        Ok(range)
    }

    /// Maps memory of the process for ring 3.
    ///
    /// # Errors
    /// As [`map`](Self::map).
    ///
    /// # Safety
    /// The memory must stay mapped and accessible (not `PROT_NONE`) in the process while it is
    /// mapped here, and Rust must expect ring 3 to read it, and to change it where `rights`
    /// say so.
    pub unsafe fn map_memory(
        &self,
        range: VirtRange,
        memory: u64,
        rights: PteFlags,
    ) -> Result<(), SpaceError> {
        const LOWER_HALF: u64 = 1 << 47;
        if range.last().is_none_or(|last| last.as_u64() >= LOWER_HALF) {
            return Err(SpaceError::UpperHalf(range));
        }
        let machine = Machine::get().ok_or(SpaceError::NotEntered)?;
        machine.cover(memory, range.bytes())?;
        let table = self.table()?;
        let mut done = 0;
        while done < range.bytes() {
            // Guest physical memory is one piece as far as a window reaches.
            let window = dune_kvm::windows::WINDOW_SIZE;
            let from = memory + done;
            let length = (window - from % window).min(range.bytes() - done);
            let at = GuestVirt::new_truncate(range.start().as_u64() + done);
            let part = VirtRange::try_new(at, length).map_err(|_| SpaceError::UpperHalf(range))?;
            let physical = machine.vm().windows().to_guest(from).unwrap_or(0);
            table.map_range(
                part,
                GuestPhys::new_truncate(physical),
                PageSize::Size2MiB,
                rights | PteFlags::USER,
            )?;
            done += length;
        }
        Ok(())
    }

    /// Maps memory of the process for ring 3 in place of whatever the range maps, and
    /// flushes if that was anything.
    ///
    /// # Errors
    /// As [`map`](Self::map), and [`SpaceError::Edit`].
    ///
    /// # Safety
    /// As for [`map_memory`](Self::map_memory).
    pub unsafe fn replace_memory(
        &self,
        range: VirtRange,
        memory: u64,
        rights: PteFlags,
    ) -> Result<(), SpaceError> {
        // SAFETY: forwarded to the caller.
        match unsafe { self.map_memory(range, memory, rights) } {
            Err(SpaceError::Map(MapError::AlreadyMapped { .. })) => {
                self.paid(self.table()?.unmap(range, |_| ()))?;
                // SAFETY: as above.
                unsafe { self.map_memory(range, memory, rights) }
            }
            result => result,
        }
    }

    /// Replaces the rights of ring 3 in a range, and flushes.
    ///
    /// # Errors
    /// [`SpaceError::Edit`].
    pub fn protect(&self, range: VirtRange, rights: PteFlags) -> Result<(), SpaceError> {
        self.paid(self.table()?.protect(range, rights | PteFlags::USER))
    }

    /// Unmaps a range of what [`map_memory`](Self::map_memory) mapped, and flushes, while
    /// other threads may run the space. Edits from several threads need a lock around them.
    ///
    /// # Errors
    /// [`SpaceError::Edit`].
    pub fn unmap_memory(&self, range: VirtRange) -> Result<(), SpaceError> {
        self.paid(self.table()?.unmap(range, |_| ()))
    }

    /// Unmaps a range, and flushes.
    ///
    /// # Errors
    /// [`SpaceError::Edit`].
    pub fn unmap(&mut self, range: VirtRange) -> Result<(), SpaceError> {
        self.paid(self.table()?.unmap(range, |_| ()))?;
        self.held.retain(|(held, _)| !range.contains_range(*held));
        Ok(())
    }

    /// Clears the dirty bits of a range, shows the pages that were written, and flushes.
    ///
    /// # Errors
    /// [`SpaceError::Edit`].
    pub fn clear_dirty(&self, range: VirtRange, visit: impl FnMut(Leaf)) -> Result<(), SpaceError> {
        self.paid(self.table()?.clear_dirty(range, visit))
    }

    /// Clears the accessed bits of a range, shows the pages that were used, and flushes. From
    /// any thread of the process, while others run the space; edits from several threads need a
    /// lock around them.
    ///
    /// # Errors
    /// [`SpaceError::Edit`].
    pub fn clear_accessed(
        &self,
        range: VirtRange,
        visit: impl FnMut(Leaf),
    ) -> Result<(), SpaceError> {
        self.paid(self.table()?.clear_accessed(range, visit))
    }

    pub(super) fn paid(&self, edit: Result<Flush, EditFailure>) -> Result<(), SpaceError> {
        match edit {
            Ok(flush) => {
                flush.apply(&self.tlb());
                Ok(())
            }
            Err(failure) => Err(SpaceError::Edit(failure.apply(&self.tlb()))),
        }
    }

    /// Every entry on the way to an address.
    ///
    /// # Errors
    /// [`SpaceError::NotEntered`].
    pub fn walk(&self, address: GuestVirt) -> Result<Walk, SpaceError> {
        Ok(self.table()?.walk(address))
    }

    /// Runs a closure with this address space loaded, at ring 0.
    ///
    /// A switch there and back is two loads of CR3.
    ///
    /// # Errors
    /// [`SpaceError::NotEntered`] outside Dune mode.
    ///
    /// # Safety
    /// Everything that the closure and the runtime use (code, stacks, heap) must be mapped as
    /// in the process: the space must be one [`around_process`](Self::around_process), and
    /// the closure must not enter ring 3.
    #[inline(always)]
    pub unsafe fn with_loaded<T>(&self, body: impl FnOnce() -> T) -> Result<T, SpaceError> {
        if !crate::is_inside() {
            return Err(SpaceError::NotEntered);
        }
        let loaded = crate::user::Loaded::new(self);
        let before = crate::arch::cr3();
        // SAFETY: forwarded to the caller.
        unsafe { crate::arch::set_cr3(loaded.cr3()) };
        let result = body();
        // SAFETY: what was loaded before.
        unsafe { crate::arch::set_cr3(before | loaded.keep()) };
        Ok(result)
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        // No vCPU runs it: whoever does borrows it.
        Flush::everything().apply(&self.tlb());
        if let Some(table) = self.table.take() {
            table.free();
        }
        give_pcid_back(self.pcid);
        SPACES.fetch_sub(1, Ordering::SeqCst);
    }
}
