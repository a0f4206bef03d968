//! A heap, and what can be chosen about it.

use std::sync::Arc;

use super::mutator::Mutator;
use crate::cycle::{self, MarkerThread};
use crate::error::GcError;
use crate::heap::{Core, Parameters};
use crate::provider::Provider;
use crate::stats::Stats;

/// Choices for a heap.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Config {
    provider: Provider,
    parameters: Parameters,
    marks_beside: bool,
}

impl Config {
    /// [`Provider::Auto`], 64 GiB of addresses, collections in pieces and beside the program,
    /// 8 MiB between collections at least.
    pub fn new() -> Self {
        Self {
            provider: Provider::Auto,
            parameters: Parameters::default(),
            marks_beside: cycle::is_worth_a_thread(),
        }
    }

    /// Who finds out which pages were written.
    pub fn provider(mut self, provider: Provider) -> Self {
        self.provider = provider;
        self
    }

    /// How many bytes of addresses are reserved: the heap never grows beyond. Fewer, where
    /// the process's limits do not allow so many; at least 64 MiB, at most 32 TiB.
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.parameters.reservation = bytes.min(32 << 40);
        self
    }

    /// How many bytes are allocated between two collections at least. More make collections
    /// rarer, and the heap larger.
    pub fn young_bytes(mut self, bytes: usize) -> Self {
        self.parameters.least_allowance = bytes.max(1);
        self
    }

    /// Each collection is done in one stop of the world: less work in all, and pauses as long
    /// as a collection.
    pub fn stop_the_world(mut self) -> Self {
        self.marks_beside = false;
        self.parameters.words_at_once = None;
        self
    }

    /// Each stop of a collection looks at so many words, and the program allocates so many bytes
    /// before the next. For tests.
    #[doc(hidden)]
    pub fn pieces(mut self, words_at_once: usize, bytes_between: usize) -> Self {
        self.parameters.words_at_once = Some(words_at_once);
        self.parameters.bytes_between = bytes_between;
        self
    }

    /// Whether a thread marks beside the program, however many CPUs there are. For tests.
    #[doc(hidden)]
    pub fn marks_beside(mut self, marks_beside: bool) -> Self {
        self.marks_beside = marks_beside;
        self
    }

    /// Collects at every safepoint: for tests.
    pub fn stress(mut self) -> Self {
        self.parameters.is_stressed = true;
        self
    }

    /// How many objects can wait to be looked at; what does not fit is found again by a
    /// search. For tests.
    #[doc(hidden)]
    pub fn mark_stack_entries(mut self, entries: usize) -> Self {
        self.parameters.mark_stack_entries = entries;
        self
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::new()
    }
}

/// A garbage-collected heap. Cloning gives another handle to the same one; it goes with the
/// last handle, mutator and root, and what it holds is dropped then. So a root that a
/// finalizer of the same heap holds keeps the heap for ever.
///
/// It belongs to the process that made it. A child of `fork` that allocates from it, collects
/// in it, or makes a root in it, is ended with a message; dropping it there does nothing.
#[derive(Clone, Debug)]
pub struct Heap(pub(super) Arc<Owner>);

/// Ends the marker's thread before the heap goes.
#[derive(Debug)]
pub(super) struct Owner {
    _marker: Option<MarkerThread>,
    pub(super) core: Arc<Core>,
}

impl Heap {
    /// Makes a heap. Some milliseconds with [`Provider::Dune`] the first time, otherwise some
    /// system calls and, where there are several CPUs, a thread. With [`Provider::Dune`], and with
    /// [`Provider::Auto`] where it is possible, the calling thread enters Dune mode and stays.
    ///
    /// # Errors
    /// [`GcError::Reserve`], [`GcError::Provider`].
    pub fn new(config: Config) -> Result<Self, GcError> {
        let core = Arc::new(Core::new(config.parameters, config.provider)?);
        // Without the thread, the program marks.
        let marker = (config.marks_beside && core.tracker.is_tracking())
            .then(|| MarkerThread::start(&core).ok())
            .flatten();
        Ok(Self(Arc::new(Owner {
            _marker: marker,
            core,
        })))
    }

    /// Registers the calling thread, until the mutator is dropped. Takes a lock; waits while a
    /// collection has the world stopped. Some 15 KiB. With Dune's dirty bits the thread enters
    /// Dune mode: one exit, the first time a virtual CPU.
    ///
    /// # Errors
    /// [`GcError::Provider`]: the thread's writes cannot be tracked;
    /// [`GcError::AlreadyAttached`].
    pub fn attach(&self) -> Result<Mutator, GcError> {
        Mutator::new(self.clone())
    }

    /// What the heap has done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.0.core.stats()
    }
}
