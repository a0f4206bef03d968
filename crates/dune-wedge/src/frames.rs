//! Pages of memory for compartments: taken from the process once, used again and again.
#![expect(unsafe_code, reason = "raw memory that ring 3 writes to")]

use core::arch::x86_64::{
    __m128i, __m256i, _mm_load_si128, _mm_setzero_si128, _mm_store_si128, _mm256_load_si256,
    _mm256_setzero_si256, _mm256_store_si256,
};
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

    /// Makes the page a copy of another page of this process.
    ///
    /// # Safety
    /// `from` is the address of a readable page, aligned to it.
    pub(crate) unsafe fn copy_from(&self, from: u64) {
        // SAFETY: the frame is this one's; the source is the caller's word.
        unsafe { copy(self.0, from) };
    }

    /// As [`copy_from`](Self::copy_from), from a page that others may change meanwhile.
    ///
    /// # Safety
    /// As there, and no Rust reference claims that the page does not change.
    pub(crate) unsafe fn copy_from_shared(&self, from: u64) {
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

// One page in as few instructions as can be: `rep movsb` is quick on most CPUs and dear on
// emulated ones, where every byte counts, and libc would choose it.

fn zero(page: u64) {
    if is_x86_feature_detected!("avx") {
        // SAFETY: the CPU has AVX; the page is a frame's.
        unsafe { zero_avx(page as *mut __m256i) };
    } else {
        // SAFETY: the page is a frame's.
        unsafe { zero_sse(page as *mut __m128i) };
    }
}

/// # Safety
/// Both are pages, aligned; nobody else uses `to`.
unsafe fn copy(to: u64, from: u64) {
    if is_x86_feature_detected!("avx") {
        // SAFETY: the CPU has AVX; the rest is the caller's word.
        unsafe { copy_avx(to as *mut __m256i, from as *const __m256i) };
    } else {
        // SAFETY: the caller's word.
        unsafe { copy_sse(to as *mut __m128i, from as *const __m128i) };
    }
}

#[target_feature(enable = "avx")]
unsafe fn zero_avx(to: *mut __m256i) {
    let nothing = _mm256_setzero_si256();
    for line in 0..PAGE as usize / (8 * 32) {
        for word in 0..8 {
            // SAFETY: within the page.
            unsafe { to.wrapping_add(line * 8 + word).write(nothing) };
        }
    }
}

#[target_feature(enable = "avx")]
#[expect(clippy::multiple_unsafe_ops_per_block, reason = "a load and its store")]
unsafe fn copy_avx(to: *mut __m256i, from: *const __m256i) {
    for line in 0..PAGE as usize / (8 * 32) {
        for word in 0..8 {
            let index = line * 8 + word;
            // SAFETY: within both pages.
            unsafe {
                let value = _mm256_load_si256(from.wrapping_add(index));
                _mm256_store_si256(to.wrapping_add(index), value);
            }
        }
    }
}

unsafe fn zero_sse(to: *mut __m128i) {
    // SAFETY: SSE2 is part of x86-64.
    let nothing = unsafe { _mm_setzero_si128() };
    for index in 0..PAGE as usize / 16 {
        // SAFETY: within the page.
        unsafe { to.wrapping_add(index).write(nothing) };
    }
}

#[expect(clippy::multiple_unsafe_ops_per_block, reason = "a load and its store")]
unsafe fn copy_sse(to: *mut __m128i, from: *const __m128i) {
    for index in 0..PAGE as usize / 16 {
        // SAFETY: within both pages; SSE2 is part of x86-64.
        unsafe {
            let value = _mm_load_si128(from.wrapping_add(index));
            _mm_store_si128(to.wrapping_add(index), value);
        }
    }
}
