//! No memory left: one line and an exit code instead of an abort.
#![expect(unsafe_code, reason = "a global allocator, and ending the process")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write;

use crate::DUNE_FAILED;

/// The system's allocator. When it has nothing to give the process ends, with
/// a message: nothing of `dune` can go on without the memory it asks for, and
/// what it holds (KVM, the lab's machine) goes with the process.
pub(crate) struct OrEnd;

// SAFETY: every call is the system allocator's own, with the same arguments,
// and what it returns is handed on unless it is null, where nothing returns.
unsafe impl GlobalAlloc for OrEnd {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise, handed on.
        given(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise, handed on.
        given(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise, handed on.
        given(unsafe { System.realloc(memory, layout, size) }, size)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, handed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

fn given(memory: *mut u8, bytes: usize) -> *mut u8 {
    if memory.is_null() {
        end(bytes)
    }
    memory
}

/// Uses no heap.
#[cold]
fn end(bytes: usize) -> ! {
    let mut line = [0_u8; 160];
    let mut rest = line.as_mut_slice();
    // The line is shorter than the buffer.
    let _ = writeln!(
        rest,
        "dune: no memory left ({bytes} bytes asked for); free some, or raise the limit \
         (`ulimit -v`, `ulimit -d`, the control group's)"
    );
    let unused = rest.len();
    let text = &line[..line.len() - unused];
    // SAFETY: reads `text`, which lives.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
    // SAFETY: ends the process at once: nothing of it is used any more.
    unsafe { libc::_exit(DUNE_FAILED.into()) }
}
