//! Copying between the process and an address space of ring 3, by what its tables allow.
#![expect(unsafe_code, reason = "raw memory that two rings share")]

use dune_x86::addr::{GuestVirt, PageSize};

use super::AddressSpace;
use crate::machine::Machine;

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
            // meanwhile, which is why nothing but a copy is made.
            unsafe { core::ptr::copy(host, part.as_mut_ptr(), length) };
            done += length;
        }
        Ok(())
    }

    /// Copies bytes into the address space, if ring 3 may write to all of it.
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
            unsafe { core::ptr::copy(part.as_ptr(), host, length) };
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
