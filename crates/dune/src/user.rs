//! Ring 3: running code that is not trusted.
#![expect(unsafe_code, reason = "the context is shared with the entry stub")]

use dune_x86::trap::TrapFrame;

/// The registers of code in ring 3.
#[derive(Debug)]
#[repr(C)]
pub struct UserContext {
    pub(crate) frame: TrapFrame,
    pub(crate) fs_base: u64,
    pub(crate) gs_base: u64,
    pub(crate) cr3: u64,
}
