//! Copying between the process and an address space of ring 3, by what its tables allow.
#![expect(unsafe_code, reason = "raw memory that two rings share")]

use core::arch::asm;

use dune_x86::addr::{GuestVirt, PageSize};
use dune_x86::paging::{Change, PteFlags};

use super::AddressSpace;
use crate::machine::Machine;

/// Copies bytes between memory of which one or both sides may be changed by others meanwhile:
/// ring 3, or another thread. What arrives then is old bytes, new bytes, or some of both.
///
/// The compiler knows nothing of the copy, so it is no data race in Rust's terms, where a copy
/// by [`core::ptr::copy`] would be one. An instruction for each 8 bytes.
///
/// # Safety
/// `from` must be readable and `to` writable for so many bytes. The two do not overlap, and no
/// Rust reference claims that bytes at `to`, or a shared side of `from`, do not change.
#[inline]
pub unsafe fn copy_shared(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: the caller's word. The direction flag is clear by the ABI.
    unsafe {
        asm!(
            "rep movsq",
            "mov ecx, {rest:e}",
            "rep movsb",
            rest = in(reg) bytes % 8,
            inout("rcx") bytes / 8 => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Ring 3 could not have made the access itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ring 3 has no right to {address:#x}")]
pub struct UserFault {
    /// The first address that it may not access so.
    pub address: u64,
}

impl AddressSpace {
    /// Copies bytes out of the address space, if ring 3 may read all of them.
    ///
    /// # Errors
    /// [`UserFault`]; part of `into` may have been written.
    pub fn read(&self, address: u64, into: &mut [u8]) -> Result<(), UserFault> {
        let mut done = 0;
        while done < into.len() {
            let at = address.wrapping_add(done as u64);
            let (host, length) = self.reach(at, into.len() - done, Access::Read)?;
            let Some(part) = into.get_mut(done..done + length) else {
                break;
            };
            // SAFETY: memory of the process, as `reach` found; ring 3 may write to it
            // meanwhile, which is why nothing but such a copy is made.
            unsafe { copy_shared(host, part.as_mut_ptr(), length) };
            done += length;
        }
        Ok(())
    }

    /// Copies bytes into the address space, if ring 3 may write to all of it. The pages are
    /// dirty afterwards, as if ring 3 had written to them.
    ///
    /// # Errors
    /// [`UserFault`]; part of the bytes may have been written.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), UserFault> {
        let mut done = 0;
        while done < bytes.len() {
            let at = address.wrapping_add(done as u64);
            let (host, length) = self.reach(at, bytes.len() - done, Access::Write)?;
            let Some(part) = bytes.get(done..done + length) else {
                break;
            };
            // SAFETY: memory that was mapped for ring 3 to write, so Rust holds no reference
            // to it.
            unsafe { copy_shared(part.as_ptr(), host, length) };
            done += length;
        }
        Ok(())
    }

    /// Where the process has what ring 3 has at an address, and how much of `wanted` is in
    /// the same page.
    fn reach(
        &self,
        address: u64,
        wanted: usize,
        access: Access,
    ) -> Result<(*mut u8, usize), UserFault> {
        let fault = UserFault { address };
        let machine = Machine::get().ok_or(fault)?;
        let at = GuestVirt::try_new(address).map_err(|_| fault)?;
        let walk = self.walk(at).map_err(|_| fault)?;
        let rights = walk.permissions().ok_or(fault)?;
        if !rights.user || (access == Access::Write && !rights.writable) {
            return Err(fault);
        }
        if access == Access::Write
            && walk
                .leaf()
                .is_some_and(|leaf| !leaf.flags().contains(PteFlags::DIRTY))
        {
            let written = Change::set(PteFlags::DIRTY | PteFlags::ACCESSED);
            // A table that is borrowed is the lender's to look after. More bits that are set
            // owe no flush.
            let _ = self
                .table()
                .map_err(|_| fault)?
                .update_leaf(at, written)
                .map(|(_, flush)| flush.apply(&self.tlb()));
        }
        let guest = walk.translation().ok_or(fault)?.as_u64();
        let host = machine.vm().windows().to_host(guest).ok_or(fault)?;
        let left = PageSize::Size4KiB.bytes() - at.page_offset(PageSize::Size4KiB);
        Ok((host as *mut u8, wanted.min(left as usize)))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
}
