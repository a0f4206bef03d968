//! Why a heap could not be made or used.

use std::io;

/// Why a heap could not be made, or a thread not be admitted to it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GcError {
    /// Not even a small range of addresses is free.
    #[error("cannot reserve addresses for the heap ({0}); is a limit set (ulimit -v)?")]
    Reserve(#[source] io::Error),
    /// The way of tracking writes does not work here.
    #[error("writes cannot be tracked by {provider}: {reason}")]
    Provider {
        /// The provider that was asked for.
        provider: crate::Provider,
        /// What was refused, and the remedy.
        reason: String,
    },
    /// The heap of the C interface exists already.
    #[error("the heap of this process exists already: initialise it once, before the first use")]
    AlreadyInitialised,
    /// The thread has a mutator for this heap.
    #[error("this thread is registered with the heap already: use the mutator it has")]
    AlreadyAttached,
    /// The heap is full.
    #[error(
        "the heap has no room for {bytes} bytes: collect, or raise Config::max_bytes ({capacity} \
         bytes now) or the process's limits (ulimit -v, -d)"
    )]
    Exhausted {
        /// Bytes of the object.
        bytes: usize,
        /// Bytes that the heap can ever have.
        capacity: usize,
    },
    /// A thread's stack is where nobody knows.
    #[error("the bounds of this thread's stack are not known (pthread_getattr_np failed)")]
    UnknownStack,
}
