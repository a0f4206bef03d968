//! Stopping every registered thread, and letting them go on.
//!
//! ```text
//!            enter_safe                    leave_safe, no stop asked for
//!  RUNNING -------------> SAFE ----------------------------------------> RUNNING
//!     |                    ^  ^ waits on `stops` while a stop is asked for
//!     +---- the signal ----+
//! ```
//!
//! A thread whose state is SAFE does not touch the heap, and its registers are on its stack.
//! It becomes RUNNING only after it has seen, having said RUNNING, that no stop is asked for;
//! the collector asks first and looks at the states afterwards. Both are sequentially
//! consistent, so one of the two sees the other.
#![expect(unsafe_code, reason = "futexes, signals, spilling registers")]

use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::thread::{RUNNING, SAFE, Thread};

/// After so long without an arrival, threads that run are asked to stop once more.
const AGAIN: Duration = Duration::from_millis(5);
/// After so long, it is said for whom the world waits.
const LONG: Duration = Duration::from_secs(10);

/// The threads of a heap. See the module documentation.
#[derive(Debug, Default)]
pub(crate) struct World {
    /// Held while the world is stopped; so nobody comes or goes then.
    threads: Mutex<Vec<Arc<Thread>>>,
    /// Odd while a stop is asked for.
    stops: AtomicU32,
    /// Counts threads that became safe: the collector waits on it.
    arrivals: AtomicU32,
}

/// The stopped world. Dropped, it goes on.
#[derive(Debug)]
pub(crate) struct Stopped<'a> {
    world: &'a World,
    threads: MutexGuard<'a, Vec<Arc<Thread>>>,
}

impl World {
    /// Adds a thread, which must be the calling one, and RUNNING afterwards.
    pub(crate) fn register(&self, thread: &Arc<Thread>) {
        self.lock().push(Arc::clone(thread));
    }

    /// Removes a thread. Its state is SAFE: a collection may be waited for.
    pub(crate) fn unregister(&self, thread: &Arc<Thread>) {
        self.lock().retain(|other| !Arc::ptr_eq(other, thread));
    }

    /// The registered thread at this address. The calling thread is RUNNING and critical, or
    /// stops by itself.
    pub(crate) fn find(&self, thread: &Thread) -> Option<Arc<Thread>> {
        let threads = self.lock();
        threads
            .iter()
            .find(|other| ptr::eq(Arc::as_ptr(other), thread))
            .cloned()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Thread>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether threads are to stop.
    #[inline]
    pub(crate) fn is_stop_asked_for(&self) -> bool {
        self.stops.load(Ordering::SeqCst) & 1 != 0
    }

    /// The calling thread does not use the heap while `body` runs. All registers that a
    /// caller may hold a pointer in are on the stack meanwhile.
    pub(crate) fn while_safe<R>(&self, thread: &Thread, body: impl FnOnce() -> R) -> R {
        let mut result = None;
        let mut body = Some(body);
        with_registers_on_stack(&mut |stack_pointer| {
            self.enter_safe(thread, stack_pointer);
            result = body.take().map(|body| body());
            self.leave_safe(thread);
        });
        match result {
            Some(result) => result,
            None => unreachable!("the closure above runs exactly once"),
        }
    }

    /// Stops here if a stop is asked for.
    #[inline]
    pub(crate) fn poll(&self, thread: &Thread) {
        if self.is_stop_asked_for() {
            self.while_safe(thread, || ());
        }
    }

    pub(crate) fn enter_safe(&self, thread: &Thread, stack_pointer: usize) {
        let depth = thread.safe_depth.load(Ordering::Relaxed);
        thread.safe_depth.store(depth + 1, Ordering::Relaxed);
        if depth > 0 {
            return;
        }
        thread.stack_pointer.store(stack_pointer, Ordering::Relaxed);
        thread.state.store(SAFE, Ordering::SeqCst);
        if self.is_stop_asked_for() {
            self.arrivals.fetch_add(1, Ordering::SeqCst);
            wake(&self.arrivals);
        }
    }

    pub(crate) fn leave_safe(&self, thread: &Thread) {
        let depth = thread.safe_depth.load(Ordering::Relaxed);
        if depth > 1 {
            thread.safe_depth.store(depth - 1, Ordering::Relaxed);
            return;
        }
        let stack_pointer = thread.stack_pointer.load(Ordering::Relaxed);
        loop {
            // In this order: a signal that arrives as soon as the thread is RUNNING must stop
            // it, and it does only if the depth is 0 by then.
            thread.safe_depth.store(0, Ordering::SeqCst);
            thread.state.store(RUNNING, Ordering::SeqCst);
            let stops = self.stops.load(Ordering::SeqCst);
            if stops & 1 == 0 {
                break;
            }
            thread.safe_depth.store(1, Ordering::SeqCst);
            // A stop by a signal meanwhile has left its own here.
            thread.stack_pointer.store(stack_pointer, Ordering::SeqCst);
            thread.state.store(SAFE, Ordering::SeqCst);
            self.arrivals.fetch_add(1, Ordering::SeqCst);
            wake(&self.arrivals);
            wait(&self.stops, stops, None);
        }
    }

    /// Stops every thread. The caller is none of them, or SAFE. `signal` is sent to threads
    /// that do not stop by themselves.
    pub(crate) fn stop(&self, signal: Option<i32>) -> Stopped<'_> {
        let threads = self.lock();
        self.stops.fetch_add(1, Ordering::SeqCst);
        for thread in threads.iter() {
            interrupt(thread, signal);
        }
        let begin = Instant::now();
        let mut has_complained = false;
        for thread in threads.iter() {
            loop {
                let arrivals = self.arrivals.load(Ordering::SeqCst);
                if thread.state.load(Ordering::SeqCst) == SAFE {
                    break;
                }
                if wait(&self.arrivals, arrivals, Some(AGAIN)) {
                    continue;
                }
                // Where the signal found the thread unable to stop: once more.
                interrupt(thread, signal);
                if !has_complained && begin.elapsed() > LONG {
                    has_complained = true;
                    complain(thread, signal);
                }
            }
        }
        Stopped {
            world: self,
            threads,
        }
    }

    /// Holds the list of threads, so that a `fork` finds it whole.
    pub(crate) fn hold(&self) -> MutexGuard<'_, Vec<Arc<Thread>>> {
        self.lock()
    }
}

/// Asks a thread that runs to stop.
fn interrupt(thread: &Thread, signal: Option<i32>) {
    if thread.state.load(Ordering::SeqCst) == RUNNING
        && let Some(signal) = signal
    {
        let tid = thread.tid.load(Ordering::Relaxed);
        // SAFETY: has no conditions.
        let process = unsafe { libc::getpid() };
        // SAFETY: sends a signal for which a handler is installed.
        unsafe { libc::syscall(libc::SYS_tgkill, process, tid, signal) };
    }
}

#[cold]
fn complain(thread: &Thread, signal: Option<i32>) {
    let tid = thread.tid.load(Ordering::Relaxed);
    let remedy = match signal {
        Some(_) => "it must not block the signal that stops it, nor stay on another stack",
        None => "call `safepoint` more often, and wait for things within `blocking`",
    };
    crate::heap::say(format_args!(
        "all threads wait for a collection, and it waits for thread {tid}: {remedy}"
    ));
}

impl Stopped<'_> {
    pub(crate) fn threads(&self) -> impl Iterator<Item = &Thread> {
        self.threads.iter().map(|thread| &**thread)
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.world.stops.fetch_add(1, Ordering::SeqCst);
        wake(&self.world.stops);
    }
}

/// Waits while the word has this value. May return early; `false` if the time was over.
fn wait(word: &AtomicU32, value: u32, limit: Option<Duration>) -> bool {
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    let limit = limit.map(|limit| libc::timespec {
        tv_sec: limit.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(limit.subsec_nanos()),
    });
    let limit = limit.as_ref().map_or(ptr::null(), ptr::from_ref);
    // SAFETY: word and limit outlive the call. `errno` is put back by callers that run in
    // signal handlers.
    let result = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, limit) };
    // Another value at the start is a change too; this reads `errno` through the library.
    result == 0 || std::io::Error::last_os_error().raw_os_error() != Some(libc::ETIMEDOUT)
}

fn wake(word: &AtomicU32) {
    let operation = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word outlives the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, i32::MAX) };
}

/// Miri has no assembly, and reaches no heap that looks at stacks.
#[cfg(miri)]
fn with_registers_on_stack(body: &mut dyn FnMut(usize)) {
    body(0);
}

/// Calls a function with the stack pointer, after the registers that a function keeps for its
/// caller were pushed above it.
#[cfg(not(miri))]
fn with_registers_on_stack(body: &mut dyn FnMut(usize)) {
    extern "C" fn trampoline(body: *mut &mut dyn FnMut(usize), stack_pointer: usize) {
        // SAFETY: the pointer that is passed below, to a live local.
        let body = unsafe { &mut *body };
        body(stack_pointer);
    }
    let mut body = body;
    let body = &raw mut body;
    spill_and_call(body, trampoline);
}

/// Pushes the callee-saved registers and calls `function(body, rsp)`.
#[cfg(not(miri))]
#[unsafe(naked)]
extern "C" fn spill_and_call(
    body: *mut &mut dyn FnMut(usize),
    function: extern "C" fn(*mut &mut dyn FnMut(usize), usize),
) {
    core::arch::naked_asm!(
        ".cfi_startproc",
        "push rbp",
        ".cfi_adjust_cfa_offset 8",
        "push rbx",
        ".cfi_adjust_cfa_offset 8",
        "push r12",
        ".cfi_adjust_cfa_offset 8",
        "push r13",
        ".cfi_adjust_cfa_offset 8",
        "push r14",
        ".cfi_adjust_cfa_offset 8",
        "push r15",
        ".cfi_adjust_cfa_offset 8",
        "sub rsp, 8",
        ".cfi_adjust_cfa_offset 8",
        "mov rax, rsi",
        "mov rsi, rsp",
        "call rax",
        "add rsp, 8",
        ".cfi_adjust_cfa_offset -8",
        "pop r15",
        ".cfi_adjust_cfa_offset -8",
        "pop r14",
        ".cfi_adjust_cfa_offset -8",
        "pop r13",
        ".cfi_adjust_cfa_offset -8",
        "pop r12",
        ".cfi_adjust_cfa_offset -8",
        "pop rbx",
        ".cfi_adjust_cfa_offset -8",
        "pop rbp",
        ".cfi_adjust_cfa_offset -8",
        "ret",
        ".cfi_endproc",
    );
}
