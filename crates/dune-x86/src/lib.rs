//! The x86-64 CPU as data: addresses, page tables, descriptors and trap frames.

pub mod descriptors;
pub mod regs;
pub mod trap;
