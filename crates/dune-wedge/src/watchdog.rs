//! Time limits: a thread looks at the clock, and interrupts whoever is late.
//!
//! A run costs two stores. The thread ticks while compartments run, and goes to sleep when
//! none has for a while. It interrupts a late one by a signal, at every tick until it has
//! ended, so it does not matter when exactly a signal arrives.
//!
//! ```text
//!   slot of a thread:  run = 0 (no compartment runs) or the number of the run
//!                      late = the number of the run that has to end
//! ```
#![expect(unsafe_code, reason = "signals")]

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::cell::Cell;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How late a compartment can be ended.
const TICK: Duration = Duration::from_millis(10);
/// Ticks without a run after which the thread sleeps.
const IDLE_TICKS: u32 = 100;

/// What a thread that runs compartments shares with the watchdog.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    thread: AtomicU32,
    run: AtomicU64,
    limit_ns: AtomicU64,
    late: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    slots: Mutex<Vec<Arc<Slot>>>,
    sleeps: AtomicBool,
}

#[derive(Debug)]
pub(crate) struct Watchdog {
    shared: Arc<Shared>,
    thread: Thread,
}

thread_local! {
    static OWN: Own = const { Own(Cell::new(None)) };
}

/// The slot of a thread; given up when the thread ends.
struct Own(Cell<Option<Arc<Slot>>>);

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(slot) = self.0.take() {
            slot.thread.store(0, Ordering::SeqCst);
        }
    }
}

/// The signal that interrupts a late compartment.
fn signal() -> i32 {
    libc::SIGRTMAX() - 4
}

extern "C" fn nothing(_: i32) {}

impl Watchdog {
    /// Outside Dune mode.
    pub(crate) fn start() -> std::io::Result<Self> {
        install_handler()?;
        let shared = Arc::new(Shared {
            slots: Mutex::new(Vec::new()),
            sleeps: AtomicBool::new(false),
        });
        let watched = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("wedge-watchdog".to_owned())
            .spawn(move || watch(&watched))?;
        Ok(Self {
            shared,
            thread: thread.thread().clone(),
        })
    }

    /// The calling thread's slot.
    pub(crate) fn slot(&self) -> Arc<Slot> {
        OWN.with(|own| {
            let slot = own.0.take().unwrap_or_else(|| {
                let slot = Arc::new(Slot::default());
                slot.thread.store(dune_thread_id() as u32, Ordering::SeqCst);
                self.shared
                    .slots
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(Arc::clone(&slot));
                slot
            });
            own.0.set(Some(Arc::clone(&slot)));
            slot
        })
    }

    /// Begins to measure a run; ends with the value.
    #[inline]
    pub(crate) fn begin(&self, slot: &Arc<Slot>, limit: Duration) -> Timed {
        let outer = slot.run.load(Ordering::Relaxed);
        let number = NEXT_RUN.with(|next| {
            let number = next.get();
            next.set(number + 1);
            number
        });
        let outer_limit = slot.limit_ns.load(Ordering::Relaxed);
        let limit = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        slot.limit_ns.store(limit, Ordering::Relaxed);
        slot.run.store(number, Ordering::SeqCst);
        if self.shared.sleeps.load(Ordering::SeqCst) {
            self.thread.unpark();
        }
        Timed {
            slot: Arc::clone(slot),
            number,
            outer,
            outer_limit,
        }
    }
}

thread_local! {
    static NEXT_RUN: Cell<u64> = const { Cell::new(1) };
}

/// A run that is being measured.
#[derive(Debug)]
pub(crate) struct Timed {
    slot: Arc<Slot>,
    number: u64,
    /// The run in one of whose gates this one is; its time stands still meanwhile.
    outer: u64,
    outer_limit: u64,
}

impl Timed {
    #[inline]
    pub(crate) fn is_late(&self) -> bool {
        self.slot.late.load(Ordering::SeqCst) == self.number
    }
}

impl Drop for Timed {
    #[inline]
    fn drop(&mut self) {
        self.slot
            .limit_ns
            .store(self.outer_limit, Ordering::Relaxed);
        self.slot.run.store(self.outer, Ordering::SeqCst);
    }
}

fn dune_thread_id() -> i32 {
    // SAFETY: a question.
    unsafe { libc::gettid() }
}

fn install_handler() -> std::io::Result<()> {
    let handler: extern "C" fn(i32) = nothing;
    let action = libc::sigaction {
        sa_sigaction: handler as *const () as usize,
        // SAFETY: an empty set is all zeros.
        sa_mask: unsafe { core::mem::zeroed() },
        // Blocking calls that the guard makes for a compartment are to end.
        sa_flags: 0,
        sa_restorer: None,
    };
    // SAFETY: the handler does nothing.
    if unsafe { libc::sigaction(signal(), &raw const action, core::ptr::null_mut()) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    dune::signals::adopt_handlers();
    Ok(())
}

fn watch(shared: &Shared) {
    /// What was seen of a slot: a run, and since when.
    type Seen = (u64, Instant);
    let mut seen: Vec<Option<Seen>> = Vec::new();
    let mut idle = 0;
    loop {
        std::thread::sleep(TICK);
        let mut running = false;
        {
            let mut slots = shared.slots.lock().unwrap_or_else(PoisonError::into_inner);
            if slots
                .iter()
                .any(|slot| slot.thread.load(Ordering::SeqCst) == 0)
            {
                slots.retain(|slot| slot.thread.load(Ordering::SeqCst) != 0);
                seen.clear();
            }
            seen.resize(slots.len(), None);
            for (slot, seen) in slots.iter().zip(&mut seen) {
                let run = slot.run.load(Ordering::SeqCst);
                if run == 0 {
                    *seen = None;
                    continue;
                }
                running = true;
                let since = match *seen {
                    Some((number, since)) if number == run => since,
                    _ => {
                        *seen = Some((run, Instant::now()));
                        continue;
                    }
                };
                let limit = Duration::from_nanos(slot.limit_ns.load(Ordering::Relaxed));
                if since.elapsed() >= limit {
                    slot.late.store(run, Ordering::SeqCst);
                    interrupt(slot);
                }
            }
        }
        idle = if running { 0 } else { idle + 1 };
        if idle > IDLE_TICKS {
            shared.sleeps.store(true, Ordering::SeqCst);
            let slots = shared.slots.lock().unwrap_or_else(PoisonError::into_inner);
            // Whoever begins from here on sees that this thread sleeps.
            let begun = slots
                .iter()
                .any(|slot| slot.run.load(Ordering::SeqCst) != 0);
            drop(slots);
            if !begun {
                std::thread::park();
            }
            shared.sleeps.store(false, Ordering::SeqCst);
            idle = 0;
        }
    }
}

fn interrupt(slot: &Slot) {
    let thread = slot.thread.load(Ordering::SeqCst);
    if thread != 0 {
        let process = std::process::id();
        // SAFETY: a thread of this process, or none any more; the handler does nothing.
        let _ = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal()) };
    }
}
