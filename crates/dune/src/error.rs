//! Why Dune mode could not be entered.

use std::fmt;

use dune_kvm::sys::Errno;
use dune_kvm::vm::VmError;

/// Why Dune mode could not be entered.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum EnterError {
    /// KVM is there, but cannot run ring 0 natively; or it is not there.
    #[error(
        "Dune mode needs a KVM that runs ring 0 natively, and /dev/kvm here is {found}; \
         `dune lab -- PROGRAM` runs a program where there is one"
    )]
    Unusable {
        /// What the probe found, with the remedy where there is one.
        found: String,
    },
    /// KVM refused something.
    #[error(transparent)]
    Platform(#[from] VmError),
    /// No memory for the runtime's own structures.
    #[error(
        "no memory for a thread's stacks or for page tables ({0}); is a limit set (ulimit -v)?"
    )]
    Memory(Errno),
    /// The process's own memory map could not be read.
    #[error("cannot read /proc/self/maps ({0}); is /proc mounted?")]
    Maps(std::io::Error),
    /// The thread runs a signal handler on its alternate stack.
    #[error(
        "Dune mode cannot be entered on an alternate signal stack; enter before, or from a \
         handler installed without SA_ONSTACK"
    )]
    OnAlternateStack,
    /// As many threads are in Dune mode as there can be.
    #[error("{limit} threads are in Dune mode already, and there can be no more")]
    TooManyThreads {
        /// The limit.
        limit: usize,
    },
}

/// The message itself: it is what a `main` that returns the error prints.
impl fmt::Debug for EnterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
