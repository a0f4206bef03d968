//! Standard streams that were closed when this process began.
//!
//! The Rust runtime opens `/dev/null` in their place before `main`. A program
//! in the sandbox would not see what it sees under a shell: a write to a
//! closed standard output that fails.
#![expect(
    unsafe_code,
    reason = "runs before the Rust runtime; closes descriptors"
)]

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether descriptor 0, 1 and 2 were closed.
static CLOSED: [AtomicBool; 3] = [const { AtomicBool::new(false) }; 3];

// The C library calls what this section names before the Rust runtime starts.
#[used]
// SAFETY: a pointer to a function that takes its arguments from registers and
// ignores them, which is what the section holds.
#[unsafe(link_section = ".init_array")]
static BEFORE_THE_RUNTIME: extern "C" fn() = note_closed;

extern "C" fn note_closed() {
    for (fd, closed) in (0..).zip(&CLOSED) {
        // SAFETY: asks for a flag of a descriptor, which may be closed.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
        closed.store(flags == -1, Ordering::Relaxed);
    }
}

/// Closes what was closed at the start, for the program that runs from here
/// on. Dune's own messages must go to a duplicate of standard error.
pub(crate) fn close_again() {
    for (fd, closed) in (0..).zip(&CLOSED) {
        if closed.load(Ordering::Relaxed) {
            // SAFETY: the descriptor is the runtime's `/dev/null`; nothing of
            // this process has it as its own.
            unsafe { libc::close(fd) };
        }
    }
}
