//! What a child of `fork` finds.
//!
//! ```text
//!                 parent                                child
//!  before()       takes every lock of the C heap
//!                 ------------------ fork -------------------------------------
//!  in_parent()    gives them back     in_child()  the other threads are gone: their
//!                                                 buffers are given up; pages are tracked
//!                                                 anew, from "all written" on; the
//!                                                 marker's thread is started again
//! ```
//!
//! The C heap goes on in both. A heap of the Rust interface is the parent's alone: its mutators
//! cannot be stopped wherever `fork` is called, so its locks may be held by threads that the
//! child does not have. The child is told so when it uses such a heap (see [`REFUSAL`]); it may
//! make one of its own, and it may call `exec`.
#![cfg_attr(not(miri), expect(unsafe_code, reason = "pthread_atfork"))]

use core::sync::atomic::{AtomicU32, Ordering};
use std::sync::Once;

/// What a child is told that uses a heap of its parent.
pub(crate) const REFUSAL: &str = "this heap belongs to the process that forked this one: use \
     heaps only in the process that made them, or make a new one after fork()";

/// How many times this process and its ancestors forked, as far as they had a heap.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// A heap that was made at another generation is the parent's.
#[inline]
pub(crate) fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

/// Before the first heap is made.
pub(crate) fn prepare() {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        // For want of memory it is not registered: then a child that uses a heap may wait for a
        // lock for ever.
        #[cfg(not(miri))]
        // SAFETY: the functions are there for as long as the process.
        let _ = unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
    });
}

#[cfg(not(miri))]
extern "C" fn before() {
    crate::conservative::before_fork();
}

#[cfg(not(miri))]
extern "C" fn in_parent() {
    crate::conservative::after_fork(false);
}

#[cfg(not(miri))]
extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    crate::conservative::after_fork(true);
}
