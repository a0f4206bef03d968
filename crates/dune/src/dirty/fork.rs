//! `fork` waits until no thread is at work on the trackers, so that the child finds them whole
//! and their lock free.
#![expect(unsafe_code, reason = "pthread_atfork")]

use core::cell::Cell;
use core::mem::ManuallyDrop;
use std::sync::{MutexGuard, Once, PoisonError};

use super::registry::Registry;
use super::{Busy, REGISTRY};

type Guard = (MutexGuard<'static, Registry>, Busy);

thread_local! {
    /// The lock, from before a `fork` until after it, in the thread that forks.
    static FORKING: Cell<Option<ManuallyDrop<Guard>>> = const { Cell::new(None) };
}

/// Once, before there is a tracker.
pub(super) fn prepare() {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        // For want of memory it is not registered; then a `fork` beside another thread's call
        // is as if made by a bare `clone`.
        // SAFETY: the functions are there for as long as the process.
        let _ = unsafe { libc::pthread_atfork(Some(before), Some(after), Some(after)) };
    });
}

extern "C" fn before() {
    // A handler that interrupted a call of this thread and forks: the lock is this thread's in
    // both processes.
    if let Some(busy) = Busy::new() {
        let registry = REGISTRY.lock().unwrap_or_else(PoisonError::into_inner);
        FORKING.set(Some(ManuallyDrop::new((registry, busy))));
    }
}

extern "C" fn after() {
    if let Some(guard) = FORKING.take() {
        drop(ManuallyDrop::into_inner(guard));
    }
}
