//! Memory for ring 3.
#![expect(unsafe_code, reason = "raw memory that two rings share")]

use core::ptr::NonNull;

use dune_kvm::sys::{self, Errno};
use dune_x86::addr::{GuestVirt, PageSize, VirtRange};

use crate::error::EnterError;
use crate::machine::Machine;

const PAGE: usize = 4096;

/// Anonymous memory that may be mapped for ring 3. Rust holds no reference to its contents,
/// which may change at any moment: it is read and written by copying.
#[derive(Debug)]
pub struct Pages {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is only ever reached by volatile copies.
unsafe impl Send for Pages {}
// SAFETY: as above; torn values are what sharing with ring 3 means anyway.
unsafe impl Sync for Pages {}

impl Pages {
    /// `count` zeroed pages of 4 KiB. Memory is used when they are first touched.
    ///
    /// # Errors
    /// [`EnterError::Memory`], or that no window is left.
    pub fn new(count: usize) -> Result<Self, EnterError> {
        let bytes = count
            .checked_mul(PAGE)
            .filter(|bytes| *bytes > 0)
            .ok_or(EnterError::Memory(Errno::EINVAL))?;
        let start = sys::map_anonymous(bytes).map_err(EnterError::Memory)?;
        let start = NonNull::new(start).ok_or(EnterError::Memory(Errno::ENOMEM))?;
        let pages = Self { start, bytes };
        if let Some(machine) = Machine::get() {
            machine.cover(start.as_ptr() as u64, bytes as u64)?;
        }
        Ok(pages)
    }

    /// The addresses of the memory in the process.
    #[must_use]
    pub fn range(&self) -> VirtRange {
        let start = GuestVirt::new_truncate(self.start.as_ptr() as u64);
        VirtRange::try_new(start, self.bytes as u64).unwrap_or(VirtRange::empty_at(start))
    }

    /// Size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Never: there is at least one page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Number of pages of a size that are needed for some bytes.
    #[must_use]
    pub fn needed(bytes: usize) -> usize {
        bytes.div_ceil(PageSize::Size4KiB.bytes() as usize).max(1)
    }

    /// Copies bytes in. `false`, and nothing copied, where they do not fit.
    #[must_use]
    pub fn write(&self, offset: usize, bytes: &[u8]) -> bool {
        if offset
            .checked_add(bytes.len())
            .is_none_or(|end| end > self.bytes)
        {
            return false;
        }
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: within the mapping, as was checked.
            unsafe {
                self.start
                    .as_ptr()
                    .wrapping_add(offset + index)
                    .write_volatile(*byte)
            };
        }
        true
    }

    /// Copies bytes out. `false`, and nothing copied, where there are not so many.
    #[must_use]
    pub fn read(&self, offset: usize, into: &mut [u8]) -> bool {
        if offset
            .checked_add(into.len())
            .is_none_or(|end| end > self.bytes)
        {
            return false;
        }
        for (index, byte) in into.iter_mut().enumerate() {
            // SAFETY: within the mapping, as was checked.
            *byte = unsafe {
                self.start
                    .as_ptr()
                    .wrapping_add(offset + index)
                    .read_volatile()
            };
        }
        true
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: an address space that maps the memory holds a reference to it, so none
        // does any more.
        let _ = unsafe { sys::unmap(self.start.as_ptr(), self.bytes) };
    }
}
