//! `dune run --timeout`: ends the process when the time is over.
#![expect(unsafe_code, reason = "signal masks")]

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context;

use crate::{family, output, report};

/// What `timeout` ends with as well.
const TIME_IS_OVER: u8 = 124;

/// The process whose time is over, as soon as it is; 0 before.
static OVER_IN: AtomicU32 = AtomicU32::new(0);

/// Starts a thread that ends the process, program and all, after `limit`: every
/// process that descends from this one is killed first. One whose parent has
/// ended counts, too: it becomes a child of this process, which is made the
/// reaper of orphans.
///
/// The thread blocks every signal, so that signals for the process reach the
/// thread that runs the program, and it only sleeps.
///
/// # Errors
///
/// If no thread can be made.
pub(crate) fn start(limit: Duration, program: String, json: bool) -> anyhow::Result<()> {
    family::adopt_orphans();
    spawn_beside("watchdog", move || {
        thread::sleep(limit);
        OVER_IN.store(std::process::id(), Ordering::Release);
        family::end_descendants();
        let seconds = limit.as_secs_f64();
        if json {
            output::complain_in_json(&report::timeout(limit));
        } else {
            output::complain(&format!(
                "{program} did not end within {seconds} s; raise --timeout"
            ));
        }
        // SAFETY: ends the process at once: nothing of it is used any more.
        unsafe { libc::_exit(TIME_IS_OVER.into()) }
    })
}

/// Starts a thread beside the one that runs the program: it takes no signals.
///
/// # Errors
///
/// If no thread can be made.
pub(crate) fn spawn_beside(name: &str, body: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let before = block_all_signals();
    let thread = thread::Builder::new().name(name.to_owned()).spawn(body);
    set_signal_mask(&before);
    thread
        .map(drop)
        .with_context(|| format!("cannot start the thread {name}; lower the load"))
}

/// To be called when the program has ended: if its time is over, it may have ended because
/// its children were killed, and what is said of its end is the watchdog's to say. Then this
/// does not return.
pub(crate) fn let_end() {
    // A child has the number, and no watchdog.
    while OVER_IN.load(Ordering::Acquire) == std::process::id() {
        thread::park();
    }
}

/// Returns the mask as it was.
fn block_all_signals() -> libc::sigset_t {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: fills the set.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `all` was filled above, and `before` is filled here; the call
    // cannot fail with a valid operation.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
    // SAFETY: filled by the call above.
    unsafe { before.assume_init() }
}

fn set_signal_mask(mask: &libc::sigset_t) {
    // SAFETY: the mask is a set that the kernel made.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, std::ptr::null_mut()) };
}
