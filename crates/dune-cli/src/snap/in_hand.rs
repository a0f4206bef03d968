//! The run in hand, as other threads see it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use dune_sandbox::snapshot::Interrupter;

use crate::watchdog;

/// See the module documentation. Beginning and ending a run costs no system
/// call.
#[derive(Debug, Default)]
pub(super) struct InHand(Mutex<Option<(Interrupter, Instant)>>);

impl InHand {
    /// A run begins.
    pub(super) fn begin(&self, interrupter: Interrupter) {
        *self.locked() = Some((interrupter, Instant::now()));
    }

    /// The run has ended. How long it took.
    pub(super) fn end(&self) -> Duration {
        let run = self.locked().take();
        run.map_or(Duration::ZERO, |(_, began)| began.elapsed())
    }

    /// Ends the run, if there is one.
    pub(super) fn interrupt(&self) {
        if let Some((interrupter, _)) = &*self.locked() {
            interrupter.interrupt();
        }
    }

    /// Ends the run if it has taken `limit`. How long to wait before looking
    /// again.
    fn interrupt_after(&self, limit: Duration) -> Duration {
        /// A run that begins in between must not be noticed much too late.
        const LOOKS: u32 = 8;
        const SHORTEST: Duration = Duration::from_millis(1);
        let mut left = limit / LOOKS;
        if let Some((interrupter, began)) = &*self.locked() {
            let over = limit.saturating_sub(began.elapsed());
            if over.is_zero() {
                interrupter.interrupt();
            } else {
                left = left.min(over);
            }
        }
        left.max(SHORTEST)
    }

    fn locked(&self) -> MutexGuard<'_, Option<(Interrupter, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends every run that takes longer than `limit`, from another thread.
///
/// # Errors
///
/// If there is no thread to be had.
pub(super) fn limit(run: &Arc<InHand>, limit: Duration) -> anyhow::Result<()> {
    let run = Arc::clone(run);
    watchdog::spawn_beside("time limit", move || {
        loop {
            thread::sleep(run.interrupt_after(limit));
        }
    })
}
