//! Which memory a program uses, over time.
//!
//! The CPU sets the accessed bit of a page table entry when it uses the page.
//! A [`Sampler`] looks at the program's entries at an interval, says which pages
//! have the bit, and clears it:
//!
//! ```no_run
//! use std::time::Duration;
//! use dune_sandbox::Command;
//! use dune_sandbox::working_set::Sampler;
//!
//! // Before the engine: its thread is none of the program's.
//! let sampler = Sampler::start(Duration::from_millis(100), |sample| {
//!     println!("{:?}: {} KiB", sample.at, sample.used.total() / 1024);
//! })?;
//! let engine = dune_sandbox::engine::on_host::OnHost::new()?;
//! Command::new("sort").sample(sampler).run(Box::new(engine))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it costs
//!
//! A look at the program's page tables (some instructions for a page that was
//! used, a fraction of one for any other) and a flush of the TLBs for each sample;
//! while it lasts, no thread of the program can have its mappings changed. On a
//! KVM that shadows page tables, every page that is used again costs a fault too.
//!
//! # What is not seen
//!
//! What the host kernel reads and writes for the program's calls, and child
//! processes: the sampler looks at the threads of the first process.

use std::collections::BTreeSet;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use linux_raw_sys::general::{__NR_mprotect, PROT_NONE};

use crate::calls::forward_always;
use crate::calls::memory::host_prot;
use crate::engine::{Access, EngineError, Usage};
use crate::program::{Memory, Program};
use crate::range::{PAGE_SIZE, PageRange};
use crate::signal::host;
use crate::vma::{Area, Backing, Sharing};

/// Bytes of each kind of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes {
    /// What can be executed.
    pub code: u64,
    /// Other mappings of files.
    pub file: u64,
    /// The `brk` heap.
    pub heap: u64,
    /// The main stack.
    pub stack: u64,
    /// Other memory without a file, that of other threads' stacks included.
    pub anonymous: u64,
    /// Memory that is shared with others.
    pub shared: u64,
}

impl Bytes {
    /// Of all kinds.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.code + self.file + self.heap + self.stack + self.anonymous + self.shared
    }

    fn of(&mut self, area: &Area) -> &mut u64 {
        let attributes = &area.attributes;
        if attributes.access.contains(Access::EXEC) {
            return &mut self.code;
        }
        match (attributes.sharing, attributes.backing) {
            (Sharing::Shared, _) => &mut self.shared,
            (_, Backing::File | Backing::Clock) => &mut self.file,
            (_, Backing::Heap) => &mut self.heap,
            (_, Backing::Stack) => &mut self.stack,
            (_, Backing::Anonymous) => &mut self.anonymous,
        }
    }
}

/// What was used in an interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The end of the interval, from the program's start.
    pub at: Duration,
    /// Pages that were used in it.
    pub used: Bytes,
    /// Of these, bytes that were never used before.
    pub first_used: u64,
    /// All that was used since the start.
    pub ever_used: u64,
    /// What is mapped at its end.
    pub mapped: u64,
}

/// Why a program cannot be sampled.
#[derive(Debug, thiserror::Error)]
pub enum SamplerError {
    /// The thread could not be made.
    #[error("cannot make a thread: {0}; lower the load")]
    Thread(std::io::Error),
}

/// See the module documentation.
#[derive(Debug)]
pub struct Sampler {
    thread: JoinHandle<Option<EngineError>>,
    messages: SyncSender<Begin>,
    hidden: Vec<RawFd>,
}

/// What the sampler begins with.
struct Begin {
    program: Arc<Program>,
    usage: Box<dyn Usage>,
}

/// A sampler at work.
#[derive(Debug)]
pub(crate) struct Running {
    thread: JoinHandle<Option<EngineError>>,
    /// Its being dropped is the end.
    messages: SyncSender<Begin>,
}

impl Sampler {
    /// Starts the thread that samples, every `interval` and at the program's
    /// end. To be called before the engine is made, so that the thread is an
    /// ordinary one.
    ///
    /// # Errors
    ///
    /// [`SamplerError::Thread`].
    pub fn start(
        interval: Duration,
        mut each: impl FnMut(&Sample) + Send + 'static,
    ) -> Result<Self, SamplerError> {
        let (messages, received) = sync_channel::<Begin>(1);
        // Signals are for the program's threads.
        let before = host::mask();
        host::block_all();
        let thread = std::thread::Builder::new()
            .name("sampler".to_owned())
            .spawn(move || sample_all(interval, &received, &mut each));
        host::set_mask(before);
        Ok(Self {
            thread: thread.map_err(SamplerError::Thread)?,
            messages,
            hidden: Vec::new(),
        })
    }

    /// Hides descriptors, such as those that the samples are written to, from
    /// the program. See [`crate::host::move_fd_high`].
    #[must_use]
    pub fn hiding(mut self, descriptors: impl IntoIterator<Item = RawFd>) -> Self {
        self.hidden.extend(descriptors);
        self
    }

    pub(crate) fn begin(self, program: Arc<Program>, usage: Box<dyn Usage>) -> Running {
        program.hide(&self.hidden);
        // It waits for this.
        let _ = self.messages.send(Begin { program, usage });
        Running {
            thread: self.thread,
            messages: self.messages,
        }
    }
}

impl Running {
    /// After the program's end: the last sample, and what went wrong, if
    /// anything did.
    pub(crate) fn end(self) -> Option<EngineError> {
        drop(self.messages);
        self.thread.join().ok().flatten()
    }
}

fn sample_all(
    interval: Duration,
    received: &Receiver<Begin>,
    each: &mut dyn FnMut(&Sample),
) -> Option<EngineError> {
    let Ok(Begin { program, usage }) = received.recv() else {
        return None;
    };
    let started = Instant::now();
    let mut ever = BTreeSet::new();
    let mut next = interval;
    loop {
        let wait = next.saturating_sub(started.elapsed());
        let message = received.recv_timeout(wait);
        let is_over = matches!(message, Err(RecvTimeoutError::Disconnected));
        let mut memory = program.memory_mut();
        let seen = match collect(&mut memory, usage.as_ref()) {
            Ok(seen) => seen,
            Err(error) => return Some(error),
        };
        let at = started.elapsed();
        let mapped = memory.areas.bytes();
        let mut used = Bytes::default();
        let mut first_used = 0;
        for range in seen {
            for area in memory.areas.overlapping(range) {
                if let Some(part) = area.range.intersect(range) {
                    *used.of(&area) += part.len();
                }
            }
            for page in (range.start()..range.end()).step_by(PAGE_SIZE as usize) {
                if ever.insert(page) {
                    first_used += PAGE_SIZE;
                }
            }
        }
        drop(memory);
        each(&Sample {
            at,
            used,
            first_used,
            ever_used: ever.len() as u64 * PAGE_SIZE,
            mapped,
        });
        if is_over {
            return None;
        }
        // What was missed is not made up for.
        while next <= started.elapsed() {
            next += interval;
        }
    }
}

/// What was used since the last time.
fn collect(memory: &mut Memory, usage: &dyn Usage) -> Result<Vec<PageRange>, EngineError> {
    let mut seen: Vec<PageRange> = Vec::new();
    usage.collect(&mut |range| match seen.last_mut() {
        Some(last) if last.end() == range.start() => {
            if let Some(longer) = PageRange::new(last.start(), last.len() + range.len()) {
                *last = longer;
            }
        }
        _ => seen.push(range),
    })?;
    if usage.needs_host_change() {
        for range in &seen {
            for area in memory.areas.overlapping(*range) {
                let Some(part) = area.range.intersect(*range) else {
                    continue;
                };
                let set =
                    |prot| forward_always(__NR_mprotect, [part.start(), part.len(), prot, 0, 0, 0]);
                // Both succeed: the rights are those that it has.
                let _ = set(u64::from(PROT_NONE));
                let _ = set(host_prot(area.attributes.access));
            }
        }
    }
    Ok(seen)
}
