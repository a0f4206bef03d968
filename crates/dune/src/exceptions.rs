//! Handlers for the CPU's exceptions, called at ring 0 with the registers of the code that
//! trapped.
//!
//! ```no_run
//! use dune::exceptions::{self, Outcome};
//! use dune::TrapFrame;
//!
//! fn skip_division(frame: &mut TrapFrame) -> Outcome {
//!     frame.rip += 2; // the length of `div ecx`
//!     Outcome::Resume
//! }
//!
//! exceptions::set_handler(dune::vector::DIVIDE, skip_division);
//! ```
#![expect(unsafe_code, reason = "function pointers in atomics")]

use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

use dune_x86::trap::TrapFrame;

/// What a handler says of a trap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Handled: continue with the registers in the frame.
    Resume,
    /// Not for this handler: the exception becomes the signal that Linux would have sent.
    Decline,
}

/// A handler of an exception.
///
/// It runs at ring 0 on the thread's trap stack (192 KiB), with the extended state of the
/// trapped code saved, so it may use all of Rust: but like a signal handler it has
/// interrupted the thread anywhere, perhaps in the middle of an allocation or with a lock
/// held. It may make system calls, and signals are delivered in it. It may itself trap, 16
/// deep at most; beyond that, or where the trap stack is used up, the process ends with a
/// report. A panic in a handler ends the process.
pub type Handler = fn(&mut TrapFrame) -> Outcome;

static HANDLERS: [AtomicPtr<()>; 256] = [const { AtomicPtr::new(ptr::null_mut()) }; 256];

/// Registers the handler of an exception for the whole process, and returns the one before.
///
/// A handler is called for exceptions in ring 0, that is, in the process's own code. What
/// ring 3 code does is returned by [`UserContext::run`](crate::UserContext::run). Costs no
/// exit, neither here nor when the exception is raised, but for `#UD` and `#DB`, which KVM
/// looks at first.
pub fn set_handler(vector: u8, handler: Handler) -> Option<Handler> {
    from_pointer(HANDLERS[usize::from(vector)].swap(handler as *mut (), Ordering::AcqRel))
}

/// Takes the handler of an exception away, and returns it.
pub fn clear_handler(vector: u8) -> Option<Handler> {
    from_pointer(HANDLERS[usize::from(vector)].swap(ptr::null_mut(), Ordering::AcqRel))
}

fn from_pointer(pointer: *mut ()) -> Option<Handler> {
    if pointer.is_null() {
        return None;
    }
    // SAFETY: only handlers and null are ever stored.
    Some(unsafe { core::mem::transmute::<*mut (), Handler>(pointer) })
}

/// What the last debug exception of this vCPU was about: DR6, which is cleared. 0 outside
/// Dune mode. May exit.
#[must_use]
pub fn take_debug_status() -> u64 {
    if crate::is_inside() {
        crate::arch::take_debug_status()
    } else {
        0
    }
}

/// Calls the handler of an exception, if there is one.
#[inline]
pub(crate) fn call_handler(vector: u8, frame: &mut TrapFrame) -> Outcome {
    match from_pointer(HANDLERS[usize::from(vector)].load(Ordering::Acquire)) {
        Some(handler) => handler(frame),
        None => Outcome::Decline,
    }
}
