//! System calls behind the wall of protection keys: those with arguments of ring 3.
#![expect(unsafe_code, reason = "system calls on behalf of ring 3")]

use dune_kvm::sys::{self, Errno, nr};
use dune_kvm::wall::{self, Wall};

use crate::arch;
use crate::thread::ThreadArea;

const _: () = assert!(wall::GIVEN_UP == arch::RESTART);

/// Executes the call in the call page, whose number is `number`, with the rights of ring 3.
///
/// # Safety
/// On the host side of the thread that owns `area`.
#[inline]
pub(crate) unsafe fn system_call(area: *mut ThreadArea, wall: &Wall, number: usize) -> isize {
    // SAFETY: the area is this thread's.
    let this = unsafe { &*area };
    match &this.wall_stack {
        _ if number == nr::MMAP => map(this, wall),
        Some(stack) => {
            let pending = (&raw const this.pending).cast();
            // SAFETY: the call that the guard of ring 3 decided on; in Dune mode no thread is
            // registered for restartable sequences, the stack is the area's, and the one
            // handler is made for it (`signals::install`).
            unsafe { wall::call(number, &this.arguments, pending, stack.slot()) }
        }
        // A thread enters with a stack where there is a wall. Without one: no way around it.
        None => -(Errno::ENOSYS.0 as isize),
    }
}

/// `mmap` for ring 3: memory that calls behind the wall reach.
fn map(this: &ThreadArea, wall: &Wall) -> isize {
    let arguments = this.arguments;
    // SAFETY: the process's own call.
    let at = unsafe { sys::raw(nr::MMAP, arguments) };
    if sys::check(at).is_err() {
        return at;
    }
    let [_, length, protection, ..] = arguments;
    let (start, length) = (at as usize, length.next_multiple_of(4096));
    // SAFETY: mapped just now, for ring 3.
    match unsafe { wall.give(start as u64, length as u64, protection as u32) } {
        Ok(()) => at,
        Err(errno) => {
            // SAFETY: as above.
            let _ = unsafe { sys::unmap(start as *mut u8, length) };
            -(errno.0 as isize)
        }
    }
}
