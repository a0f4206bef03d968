//! Thread-local variables of a thread that has just begun: what every compartment starts
//! with.
//!
//! ```text
//!   lowest block ... TLS of the program | thread pointer: struct pthread | vector of blocks
//!                                         (self pointers, stack canary)    (for __tls_get_addr)
//! ```
//!
//! They are copied from a thread that does nothing else, so they hold no secret of the
//! process but addresses. Stack canary and pointer guard are replaced.
#![expect(unsafe_code, reason = "reads the thread block of a fresh thread")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "thread creation and its raw argument"
)]

use core::ffi::c_void;

use super::modules;
use crate::layout::{PAGE, THREAD_POINTER, TLS_END, TLS_START, page_of, page_up};

/// glibc's thread block (`tcbhead_t`): offsets from the thread pointer.
const VECTOR: usize = 8;
const CANARY: usize = 0x28;
const POINTER_GUARD: usize = 0x30;
/// Used where libc does not say (`_thread_db_sizeof_pthread`).
const LIKELY_BLOCK: u64 = 2304;
/// A module's block that is not allocated yet.
const UNALLOCATED: u64 = u64::MAX;

/// The initial contents of pages at fixed addresses in a compartment.
#[derive(Debug, Default)]
pub(super) struct ThreadImage {
    /// Page-aligned.
    pub(super) start: u64,
    pub(super) bytes: Vec<u8>,
}

/// The image, or `None` where the thread-local variables do not fit.
pub(super) fn take() -> Option<ThreadImage> {
    let mut image: Option<ThreadImage> = None;
    let mut thread: libc::pthread_t = 0;
    // SAFETY: the thread gets the option, and is waited for.
    unsafe {
        let argument = (&raw mut image).cast::<c_void>();
        if libc::pthread_create(&raw mut thread, core::ptr::null(), copy_own, argument) != 0 {
            return None;
        }
        libc::pthread_join(thread, core::ptr::null_mut());
    }
    image
}

extern "C" fn copy_own(into: *mut c_void) -> *mut c_void {
    // SAFETY: what `take` passed; it waits.
    let into = unsafe { &mut *into.cast::<Option<ThreadImage>>() };
    *into = own();
    core::ptr::null_mut()
}

fn own() -> Option<ThreadImage> {
    let pointer: u64;
    // SAFETY: the thread block's first word is its own address (psABI, variant II).
    unsafe { core::arch::asm!("mov {}, fs:[0]", out(reg) pointer, options(nostack, readonly)) };
    // SAFETY: a question.
    let size = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"_thread_db_sizeof_pthread".as_ptr()) };
    let block = if size.is_null() {
        LIKELY_BLOCK
    } else {
        // SAFETY: libc's own constant.
        u64::from(unsafe { size.cast::<u32>().read() })
    };
    let lowest = modules::loaded()
        .iter()
        .filter_map(|module| module.thread_locals)
        .filter(|block| *block < pointer && pointer - block < THREAD_POINTER - TLS_START)
        .min()
        .unwrap_or(pointer)
        & !15;
    let end = pointer + block;
    // SAFETY: the thread's own block and what lies directly below it.
    let mut bytes = unsafe {
        core::slice::from_raw_parts(lowest as *const u8, (end - lowest) as usize).to_vec()
    };
    let moved = |address: u64| {
        (lowest..end)
            .contains(&address)
            .then(|| address + THREAD_POINTER - pointer)
    };
    for word in bytes.chunks_exact_mut(8) {
        let value = u64::from_le_bytes(word.try_into().ok()?);
        if let Some(value) = moved(value) {
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    let at_pointer = (pointer - lowest) as usize;
    let mut set = |offset: usize, value: u64| {
        if let Some(word) = bytes.get_mut(at_pointer + offset..at_pointer + offset + 8) {
            word.copy_from_slice(&value.to_le_bytes());
        }
    };
    let mut random = [0_u64; 2];
    // SAFETY: 16 bytes of our own.
    unsafe { libc::getrandom((&raw mut random).cast(), size_of_val(&random), 0) };
    // As libc does, so that a string cannot hold it.
    set(CANARY, random[0] & !0xff);
    set(POINTER_GUARD, random[1]);
    let vector = vector_of(pointer, moved);
    let vector_at = (THREAD_POINTER + block).next_multiple_of(64);
    // The vector's first entry, its length, lies before where the pointer points.
    set(VECTOR, vector_at + 16);
    bytes.resize((vector_at - THREAD_POINTER) as usize + at_pointer, 0);
    for word in vector {
        bytes.extend_from_slice(&word.to_le_bytes());
    }

    // Whole pages.
    let start = THREAD_POINTER - at_pointer as u64;
    let padding = (start - page_of(start)) as usize;
    let mut pages = vec![0; padding];
    pages.extend_from_slice(&bytes);
    pages.resize(page_up(pages.len() as u64) as usize, 0);
    let start = page_of(start);
    (start >= TLS_START && start + pages.len() as u64 <= TLS_END - PAGE).then_some(ThreadImage {
        start,
        bytes: pages,
    })
}

/// The dynamic thread vector: length, generation, and two words for each module.
fn vector_of(pointer: u64, moved: impl Fn(u64) -> Option<u64>) -> Vec<u64> {
    // SAFETY: glibc's thread block has the vector's address there.
    let vector = unsafe { ((pointer as usize + VECTOR) as *const *const u64).read() };
    // SAFETY: the length lies before it.
    let length = unsafe { vector.wrapping_sub(2).read() }.min(1024);
    let mut words = vec![length, 0];
    for index in 0..2 * (length as usize + 1) {
        // SAFETY: so many entries as the length says, after that of the generation.
        let word = unsafe { vector.wrapping_add(index).read() };
        words.push(match index {
            0 => word,
            _ if index % 2 == 1 => 0,
            _ => moved(word).unwrap_or(UNALLOCATED),
        });
    }
    words
}
