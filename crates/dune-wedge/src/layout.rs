//! Where things are in a compartment's address space.
//!
//! ```text
//!   0x1000_0000_0000  +0x00_0000  guard
//!                     +0x00_1000  thread-local variables (FS base at +0x04_0000)
//!                     +0x08_0000  input bytes
//!                     +0x10_0000  stack, down from +0x20_0000; below its limit it faults
//!                     +0x20_0000  heap, up to +0x4000_0000
//!   0x2000_0000_0000  tags, each where it is in the process too
//!   0x5555_....       the program and its libraries, where they are in the process:
//!   0x7f.._....       code and constants shared, variables as they were at the start
//! ```
//!
//! What is private takes one page table (of 4 KiB) for everything but the heap.

pub(crate) const PAGE: u64 = 4096;

const BASE: u64 = 0x1000_0000_0000;

pub(crate) const TLS_START: u64 = BASE + 0x1000;
/// The FS base, which static thread-local storage ends at and the thread's own block begins.
pub(crate) const THREAD_POINTER: u64 = BASE + 0x4_0000;
pub(crate) const TLS_END: u64 = INPUT_START;
pub(crate) const INPUT_START: u64 = BASE + 0x8_0000;
pub(crate) const INPUT_END: u64 = STACK_BOTTOM;
/// The lowest address that a stack could have; it starts above, as its limit says.
pub(crate) const STACK_BOTTOM: u64 = BASE + 0x10_0000;
pub(crate) const STACK_TOP: u64 = BASE + 0x20_0000;
pub(crate) const HEAP_START: u64 = STACK_TOP;
pub(crate) const HEAP_END: u64 = BASE + 0x4000_0000;

/// The largest stack: one page less than the room, which is the guard.
pub(crate) const LARGEST_STACK: u64 = STACK_TOP - STACK_BOTTOM - PAGE;
/// The most input bytes.
pub(crate) const LARGEST_INPUT: u64 = INPUT_END - INPUT_START;

pub(crate) const TAGS_START: u64 = 0x2000_0000_0000;
pub(crate) const TAGS_END: u64 = TAGS_START + (1 << 39);

pub(crate) const fn page_of(address: u64) -> u64 {
    address & !(PAGE - 1)
}

pub(crate) const fn page_up(address: u64) -> u64 {
    page_of(address + PAGE - 1)
}
