//! Where every trap taken in ring 0 arrives, with all registers saved.
#![expect(unsafe_code, reason = "called by the entry stub")]

use core::sync::atomic::Ordering;

use dune_x86::descriptors::RFLAGS_IF;
use dune_x86::trap::{PageFaultError, TrapFrame, vector};

use crate::arch::{self, RESTART, STACK_USED_UP, VECTOR_NOTIFY, VECTOR_SIGRETURN, VECTOR_SYSCALL};
use crate::exceptions::{self, Outcome};
use crate::guest::{call, fatal, signals};
use crate::machine::Machine;
use crate::thread::ThreadArea;

/// How deep traps may nest in handlers before the process is ended with a report.
pub(crate) const MAX_DEPTH: u64 = 16;
/// Length of the `SYSCALL` instruction.
const SYSCALL_LENGTH: u64 = 2;

/// # Safety
/// Called by the entry stub with the frame that it built.
pub(crate) unsafe extern "C" fn trap(frame: *mut TrapFrame) {
    // SAFETY: the frame is this trap's own, on the trap stack.
    let frame = unsafe { &mut *frame };
    match frame.vector {
        number @ 0..32 => exception(number as u8, frame),
        VECTOR_SYSCALL => {
            check_depth(frame);
            if frame.rax as isize == RESTART {
                // Made again after the handler: `error` holds the number of the call.
                frame.rip -= SYSCALL_LENGTH;
                frame.rax = frame.error;
            }
        }
        VECTOR_SIGRETURN => signals::sigreturn(frame),
        number if number == u64::from(VECTOR_NOTIFY) => check_depth(frame),
        _ => exception(frame.vector as u8, frame),
    }
}

fn exception(number: u8, frame: &mut TrapFrame) {
    if number == vector::PAGE_FAULT {
        // SAFETY: the area is this thread's.
        let refused = unsafe { (*ThreadArea::current()).injected.swap(0, Ordering::Relaxed) };
        if refused == 0
            && !frame.fault_cause().contains(PageFaultError::PRESENT)
            && first_touch(frame.cr2, frame.fault_cause())
        {
            return;
        }
    }
    check_depth(frame);
    match number {
        vector::DOUBLE_FAULT => fatal::report(frame, "double fault"),
        vector::MACHINE_CHECK => fatal::report(frame, "machine check"),
        // A step of the entry stub itself, on the way back from a system call of code that
        // is being single-stepped.
        vector::DEBUG if frame.rip >> 63 == 1 => return,
        _ => {}
    }
    call::interrupts_as(frame.rflags);
    if exceptions::call_handler(number, frame) == Outcome::Resume {
        return;
    }
    if number == vector::PAGE_FAULT {
        if crate::memory::is_spurious(frame.cr2, frame.fault_cause()) {
            return;
        }
        let copy = arch::address(arch::dune_copy_start)..arch::address(arch::dune_copy_end);
        if copy.contains(&frame.rip) || copy.contains(&(frame.rip & !(1 << 63))) {
            frame.rip = arch::address(arch::dune_copy_failed);
            return;
        }
    }
    if frame.rflags & RFLAGS_IF == 0 {
        fatal::report(frame, "an exception inside the runtime");
    }
    call::interrupts_off();
    signals::raise_exception(number, frame);
}

/// Ends the process where handlers have no room left, or call themselves by trapping.
fn check_depth(frame: &TrapFrame) {
    if frame.depth == u64::from(STACK_USED_UP) {
        fatal::report(
            frame,
            "the trap stack is used up: a handler needs too much of it, or handlers trap in \
             handlers",
        );
    }
    if frame.depth > MAX_DEPTH {
        fatal::report(
            frame,
            "traps are nested too deeply: a handler faults in itself",
        );
    }
}

/// Whether the address lies in memory that the process has and that no window showed at the
/// moment of the fault: a window is made when its memory is first touched. Another thread
/// may have made it meanwhile.
fn first_touch(address: u64, cause: PageFaultError) -> bool {
    let Some(machine) = Machine::get() else {
        return false;
    };
    if address >> 47 != 0 {
        return false;
    }
    if machine.vm().windows().to_guest(address).is_some() {
        return !crate::memory::forbids(address, cause);
    }
    dune_kvm::sys::is_mapped(address) && crate::memory::cover(machine, address)
}
