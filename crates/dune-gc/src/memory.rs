//! Address space from the kernel: the heap itself and the tables beside it. Miri, which has no
//! such kernel, takes both from its allocator.
#![expect(unsafe_code, reason = "maps memory, and shows it as atomics")]

use core::marker::PhantomData;
use core::ops::Deref;
#[cfg(not(miri))]
use core::ptr;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};
use std::io;

use crate::block::Block;
use crate::layout::BLOCK;

/// A range of addresses that is the heap's alone. Nothing of it is usable at first.
#[derive(Debug)]
pub(crate) struct Reservation {
    mapping: NonNull<u8>,
    mapped_bytes: usize,
    /// Aligned to a block.
    start: usize,
    bytes: usize,
}

// SAFETY: addresses; whoever uses the memory behind them says why he may.
unsafe impl Send for Reservation {}
// SAFETY: as above.
unsafe impl Sync for Reservation {}

impl Reservation {
    /// Reserves `bytes`, a multiple of a block.
    pub(crate) fn new(bytes: usize) -> io::Result<Self> {
        let mapped_bytes = bytes + BLOCK;
        let mapping = map(mapped_bytes, libc::PROT_NONE)?;
        let start = (mapping.as_ptr() as usize).next_multiple_of(BLOCK);
        Ok(Self {
            mapping,
            mapped_bytes,
            start,
            bytes,
        })
    }

    /// The first address, aligned to a block.
    pub(crate) fn start(&self) -> usize {
        self.start
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes a part readable and writable; it is zero.
    pub(crate) fn commit(&self, offset: usize, bytes: usize) -> io::Result<()> {
        assert!(offset + bytes <= self.bytes, "beyond the reservation");
        if cfg!(miri) {
            return Ok(());
        }
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: addresses of this mapping.
        let result = unsafe { libc::mprotect(self.at(offset), bytes, rights) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Gives the memory of a part back to the kernel; it is zero afterwards. Where the kernel
    /// refuses, the memory stays, and `false` says so.
    pub(crate) fn discard(&self, offset: usize, bytes: usize) -> bool {
        assert!(offset + bytes <= self.bytes, "beyond the reservation");
        if cfg!(miri) {
            return false;
        }
        // SAFETY: addresses of this mapping, whose contents the caller gives up.
        unsafe { libc::madvise(self.at(offset), bytes, libc::MADV_DONTNEED) == 0 }
    }

    fn at(&self, offset: usize) -> *mut libc::c_void {
        (self.mapping.as_ptr())
            .wrapping_add(self.start - self.mapping.as_ptr() as usize + offset)
            .cast()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: made by `new`; with the heap its users are gone.
        unsafe { unmap(self.mapping, self.mapped_bytes) };
    }
}

/// What may appear out of zeroed memory and be shared between threads.
///
/// # Safety
/// All zeroes is a value of the type, which has no `Drop`.
pub(crate) unsafe trait Zeroed: Sync {}
// SAFETY: zero is a value of every integer.
unsafe impl Zeroed for AtomicU8 {}
// SAFETY: as above.
unsafe impl Zeroed for AtomicU32 {}
// SAFETY: as above.
unsafe impl Zeroed for AtomicU64 {}
// SAFETY: zero is a value of each element.
unsafe impl<T: Zeroed, const N: usize> Zeroed for [T; N] {}
// SAFETY: it has nothing but integers; zero is a free block.
unsafe impl Zeroed for Block {}

/// A table that takes memory only where it was written to; made without the process's
/// allocator, so that it can be used while threads are stopped anywhere.
#[derive(Debug)]
pub(crate) struct Table<T: Zeroed> {
    mapping: NonNull<T>,
    len: usize,
    _values: PhantomData<T>,
}

// SAFETY: a slice of `Sync` values, as `Deref` shows it.
unsafe impl<T: Zeroed> Send for Table<T> {}
// SAFETY: as above.
unsafe impl<T: Zeroed> Sync for Table<T> {}

impl<T: Zeroed> Table<T> {
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let bytes = (len * size_of::<T>()).max(1);
        let mapping = map(bytes, libc::PROT_READ | libc::PROT_WRITE)?.cast();
        Ok(Self {
            mapping,
            len,
            _values: PhantomData,
        })
    }
}

impl<T: Zeroed> Deref for Table<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: `len` values of zeroed memory, mapped for as long as the table exists.
        unsafe { core::slice::from_raw_parts(self.mapping.as_ptr(), self.len) }
    }
}

impl<T: Zeroed> Drop for Table<T> {
    fn drop(&mut self) {
        let bytes = (self.len * size_of::<T>()).max(1);
        // SAFETY: made by `new`, and borrowed by nobody any more.
        unsafe { unmap(self.mapping.cast(), bytes) };
    }
}

/// Gives it all back.
///
/// # Safety
/// From [`map`], and not used any more.
#[cfg(not(miri))]
unsafe fn unmap(mapping: NonNull<u8>, bytes: usize) {
    // SAFETY: as the caller says.
    unsafe { libc::munmap(mapping.as_ptr().cast(), bytes) };
}

#[cfg(miri)]
const PAGES: fn(usize) -> core::alloc::Layout =
    |bytes| core::alloc::Layout::from_size_align(bytes, 4096).unwrap();

#[cfg(miri)]
unsafe fn unmap(mapping: NonNull<u8>, bytes: usize) {
    // SAFETY: as the caller says.
    unsafe { std::alloc::dealloc(mapping.as_ptr(), PAGES(bytes)) };
}

#[cfg(miri)]
fn map(bytes: usize, _: libc::c_int) -> io::Result<NonNull<u8>> {
    // SAFETY: not without bytes.
    let memory = unsafe { std::alloc::alloc_zeroed(PAGES(bytes)) };
    NonNull::new(memory).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
}

/// Private anonymous memory, which counts against no limit before it is touched.
#[cfg(not(miri))]
fn map(bytes: usize, rights: libc::c_int) -> io::Result<NonNull<u8>> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: new memory, somewhere.
    let address = unsafe { libc::mmap(ptr::null_mut(), bytes, rights, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
}
