//! The x86-64 CPU as data: addresses, page tables, descriptors and trap frames.
//!
//! Pure logic: no KVM, no assembly, no heap, no `std`. What the module
//! documentation calls SDM is Intel's *Software Developer's Manual*, what it
//! calls APM is AMD's *Architecture Programmer's Manual*.

#![no_std]

#[cfg(test)]
extern crate std;

pub mod addr;
pub mod cpu;
pub mod descriptors;
pub mod frame;
pub mod paging;
pub mod pcid;
pub mod regs;
pub mod trap;
