//! The host side of a thread in Dune mode.
//!
//! Nothing here allocates, locks, panics or calls libc: it runs between an exit and the next
//! entry, on the thread's TLS, which belongs to the code in the guest.

pub(crate) mod base;
pub(crate) mod clone;
pub(crate) mod fault;
pub(crate) mod forward;
pub(crate) mod outputs;
pub(crate) mod run;
pub(crate) mod signals;
pub(crate) mod wall;

pub use forward::WALLED;
