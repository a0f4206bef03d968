//! Time limits: a thread looks at the clock, and interrupts whoever is late.
//!
//! A run costs a few stores. The thread ticks while compartments run, and goes to sleep when
//! none has for a while. It interrupts a late one by a signal, at every tick until it has
//! ended, so it does not matter when exactly a signal arrives. A run in whose gate another
//! compartment runs goes on ageing, and is ended when it is back.
//!
//! ```text
//!   slot of a thread:  run = 0 (no compartment runs) or the number of the run
//!                      outer = the number of the run in one of whose gates it is, or 0
//!                      late = the number of the run that has to end
//!                      version = odd while run, outer and limit change
//! ```
#![expect(unsafe_code, reason = "signals")]

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
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
    version: AtomicU64,
    run: AtomicU64,
    outer: AtomicU64,
    limit_ns: AtomicU64,
    late: AtomicU64,
}

/// What a slot says of the present.
#[derive(Clone, Copy, Debug, Default)]
struct Present {
    run: u64,
    outer: u64,
    limit_ns: u64,
}

impl Slot {
    /// What the slot's own thread wrote last.
    #[inline]
    fn own(&self) -> Present {
        Present {
            run: self.run.load(Ordering::Relaxed),
            outer: self.outer.load(Ordering::Relaxed),
            limit_ns: self.limit_ns.load(Ordering::Relaxed),
        }
    }

    /// Replaces it; for the slot's own thread.
    #[inline]
    fn set(&self, present: Present) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.outer.store(present.outer, Ordering::Relaxed);
        self.limit_ns.store(present.limit_ns, Ordering::Relaxed);
        self.run.store(present.run, Ordering::Relaxed);
        self.version.store(version + 2, Ordering::SeqCst);
    }

    /// What it says, for another thread; `None` while it changes.
    fn look(&self) -> Option<Present> {
        let version = self.version.load(Ordering::SeqCst);
        let present = self.own();
        fence(Ordering::Acquire);
        let is_whole = version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version;
        is_whole.then_some(present)
    }
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
        let outer = slot.own();
        let number = NEXT_RUN.with(|next| {
            let number = next.get();
            next.set(number + 1);
            number
        });
        slot.set(Present {
            run: number,
            outer: outer.run,
            limit_ns: u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX),
        });
        if self.shared.sleeps.load(Ordering::SeqCst) {
            self.thread.unpark();
        }
        Timed {
            slot: Arc::clone(slot),
            number,
            outer,
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
    /// The run in one of whose gates this one is.
    outer: Present,
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
        self.slot.set(self.outer);
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

/// Runs of a slot that were seen and have not ended, the outermost first.
#[derive(Clone, Debug, Default)]
struct Seen(Vec<Sighting>);

#[derive(Clone, Copy, Debug)]
struct Sighting {
    run: u64,
    since: Instant,
    limit: Duration,
}

impl Seen {
    /// Notes what runs at a moment, and says which run has to end: that one, or the innermost
    /// of those that wait for it in a gate.
    fn note(&mut self, present: Present, now: Instant) -> Option<u64> {
        let Present {
            run,
            outer,
            limit_ns,
        } = present;
        // Numbers grow: what lies between has ended.
        self.0.retain(|seen| seen.run == run || seen.run <= outer);
        if self.0.last().is_none_or(|seen| seen.run != run) {
            self.0.push(Sighting {
                run,
                since: now,
                limit: Duration::from_nanos(limit_ns),
            });
        }
        let is_late = |seen: &&Sighting| now.duration_since(seen.since) >= seen.limit;
        self.0.iter().rev().find(is_late).map(|seen| seen.run)
    }
}

fn watch(shared: &Shared) {
    let mut seen: Vec<Seen> = Vec::new();
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
            seen.resize_with(slots.len(), Seen::default);
            for (slot, seen) in slots.iter().zip(&mut seen) {
                let Some(present) = slot.look() else {
                    running = true;
                    continue;
                };
                if present.run == 0 {
                    seen.0.clear();
                    continue;
                }
                running = true;
                if let Some(late) = seen.note(present, Instant::now()) {
                    slot.late.store(late, Ordering::SeqCst);
                    if late == present.run {
                        interrupt(slot);
                    }
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
                .any(|slot| slot.look().is_none_or(|present| present.run != 0));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn at(run: u64, outer: u64, limit_ms: u64) -> Present {
        Present {
            run,
            outer,
            limit_ns: limit_ms * 1_000_000,
        }
    }

    #[test]
    fn a_run_ages_while_others_run_in_its_gates() {
        let mut seen = Seen::default();
        let begin = Instant::now();
        let after = |ms| begin + Duration::from_millis(ms);
        assert_eq!(seen.note(at(1, 0, 50), after(0)), None);
        // A new one at every tick, none of them late.
        for tick in 1..5 {
            assert_eq!(seen.note(at(1 + tick, 1, 50), after(tick * 10)), None);
        }
        assert_eq!(seen.note(at(1, 0, 50), after(49)), None);
        assert_eq!(seen.note(at(7, 1, 50), after(50)), Some(1));
        assert_eq!(seen.note(at(1, 0, 50), after(55)), Some(1));
        // The next run of the thread is a new one.
        assert_eq!(seen.note(at(8, 0, 50), after(60)), None);
        assert_eq!(seen.0.len(), 1);
    }

    #[test]
    fn the_innermost_late_run_ends_first() {
        let mut seen = Seen::default();
        let begin = Instant::now();
        let after = |ms| begin + Duration::from_millis(ms);
        assert_eq!(seen.note(at(1, 0, 30), after(0)), None);
        assert_eq!(seen.note(at(2, 1, 10), after(10)), None);
        assert_eq!(seen.note(at(2, 1, 10), after(40)), Some(2));
        assert_eq!(seen.note(at(1, 0, 30), after(50)), Some(1));
    }

    #[test]
    fn a_slot_that_changes_is_not_read() {
        let slot = Slot::default();
        slot.set(at(3, 1, 2));
        assert_eq!(slot.look().map(|present| present.run), Some(3));
        slot.version.fetch_add(1, Ordering::SeqCst);
        assert!(slot.look().is_none());
    }
}
