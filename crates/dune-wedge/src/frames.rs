//! Pages of memory for compartments: taken from the process once, used again and again.
#![expect(unsafe_code, reason = "raw memory that ring 3 writes to")]

use core::arch::asm;
use std::sync::{Mutex, PoisonError};

use dune::EnterError;
use dune::memory::Pages;

use crate::layout::PAGE;

/// Pages that are taken from the process at once.
const CHUNK: usize = 256;

/// A page of 4 KiB that belongs to nobody else. Its contents are whatever the last owner
/// left: zero or fill it before ring 3 sees it.
#[derive(Debug)]
pub(crate) struct Frame(u64);

impl Frame {
    /// The address of the page in the process.
    pub(crate) fn address(&self) -> u64 {
        self.0
    }

    pub(crate) fn zero(&self) {
        zero(self.0);
    }

    /// Makes the page a copy of another page of this process, which others may change
    /// meanwhile.
    ///
    /// # Safety
    /// `from` is the address of a readable page, and no Rust reference claims that it does not
    /// change.
    pub(crate) unsafe fn copy_from(&self, from: u64) {
        // SAFETY: the frame is this one's; the source is the caller's word.
        unsafe { dune::memory::copy_shared(from as *const u8, self.0 as *mut u8, PAGE as usize) };
    }

    /// Writes bytes; `false` where they do not fit.
    #[must_use]
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) -> bool {
        if offset > PAGE as usize || bytes.len() > PAGE as usize - offset {
            return false;
        }
        let to = (self.0 as *mut u8).wrapping_add(offset);
        // SAFETY: within the page, to which no reference exists.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        true
    }

    /// Reads bytes; `false` where there are not so many.
    #[must_use]
    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) -> bool {
        if offset > PAGE as usize || into.len() > PAGE as usize - offset {
            return false;
        }
        let from = (self.0 as *const u8).wrapping_add(offset);
        // SAFETY: as above.
        unsafe { core::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        true
    }
}

/// All pages that compartments have, had or will have.
#[derive(Debug)]
pub(crate) struct FramePool {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    free: Vec<Frame>,
    /// Where they are from. Kept for good: address spaces may still be told of them.
    chunks: Vec<Pages>,
}

impl FramePool {
    pub(crate) const fn new() -> Self {
        Self {
            inner: Mutex::new(Inner {
                free: Vec::new(),
                chunks: Vec::new(),
            }),
        }
    }

    pub(crate) fn take(&self) -> Result<Frame, EnterError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.free.is_empty() {
            let pages = Pages::new(CHUNK)?;
            let start = pages.range().start().as_u64();
            let frames = (0..CHUNK as u64).rev().map(|n| Frame(start + n * PAGE));
            inner.free.extend(frames);
            inner.chunks.push(pages);
        }
        inner
            .free
            .pop()
            .ok_or_else(|| EnterError::Maps(std::io::ErrorKind::OutOfMemory.into()))
    }

    pub(crate) fn give(&self, frame: Frame) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.free.push(frame);
    }

    /// Pages in use, and pages taken from the process.
    pub(crate) fn usage(&self) -> (usize, usize) {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let all = inner.chunks.len() * CHUNK;
        (all - inner.free.len(), all)
    }
}

/// Zeroes a page, in as few instructions as can be. By hand, because the compiler would make it
/// a call of `memset`, which may use an instruction that counts every byte where instructions
/// are counted.
fn zero(page: u64) {
    if is_x86_feature_detected!("avx") {
        // SAFETY: the CPU has AVX; the page is a frame's, and aligned.
        unsafe {
            asm!(
                "vpxor xmm0, xmm0, xmm0",
                "2:",
                "vmovdqa [{at}], ymm0",
                "vmovdqa [{at} + 32], ymm0",
                "vmovdqa [{at} + 64], ymm0",
                "vmovdqa [{at} + 96], ymm0",
                "vmovdqa [{at} + 128], ymm0",
                "vmovdqa [{at} + 160], ymm0",
                "vmovdqa [{at} + 192], ymm0",
                "vmovdqa [{at} + 224], ymm0",
                "add {at}, 256",
                "cmp {at}, {end}",
                "jne 2b",
                at = inout(reg) page => _,
                end = in(reg) page + PAGE,
                out("xmm0") _,
                options(nostack),
            );
        }
    } else {
        // SAFETY: SSE2 is part of x86-64; the page is a frame's, and aligned.
        unsafe {
            asm!(
                "pxor {zero}, {zero}",
                "2:",
                "movdqa [{at}], {zero}",
                "movdqa [{at} + 16], {zero}",
                "add {at}, 32",
                "cmp {at}, {end}",
                "jne 2b",
                zero = out(xmm_reg) _,
                at = inout(reg) page => _,
                end = in(reg) page + PAGE,
                options(nostack),
            );
        }
    }
}
