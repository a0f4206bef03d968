//! The memory whose writes are to be found.
#![expect(unsafe_code, reason = "maps memory and writes to it")]

use core::ptr;

pub(super) const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;

/// Anonymous memory in pages of 4 KiB, aligned to 2 MiB, all of it touched. Unmapped when
/// dropped.
#[derive(Debug)]
pub(super) struct Region {
    mapping: *mut u8,
    mapped: usize,
    start: *mut u8,
    bytes: usize,
}

impl Region {
    pub(super) fn new(bytes: usize) -> Self {
        let mapped = bytes + HUGE_PAGE;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping where the kernel likes.
        let mapping = unsafe { libc::mmap(ptr::null_mut(), mapped, rights, flags, -1, 0) };
        assert!(mapping != libc::MAP_FAILED, "no memory for the benchmark");
        let mapping = mapping.cast::<u8>();
        let region = Self {
            mapping,
            mapped,
            start: mapping.wrapping_add(mapping.align_offset(HUGE_PAGE)),
            bytes,
        };
        // SAFETY: our own memory; a kernel that does not know the advice uses what it likes.
        unsafe { libc::madvise(mapping.cast(), mapped, libc::MADV_NOHUGEPAGE) };
        region.write(1);
        region
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.start
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn pages(&self) -> usize {
        self.bytes / PAGE
    }

    /// Writes one byte to every `step`-th page.
    #[inline(never)]
    pub(super) fn write(&self, step: usize) {
        for offset in (0..self.bytes).step_by(step * PAGE) {
            // SAFETY: within the mapping; where it is protected, somebody sees to it.
            unsafe { self.start.wrapping_add(offset).write_volatile(1) };
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing refers to any more.
        unsafe { libc::munmap(self.mapping.cast(), self.mapped) };
    }
}
