//! An exception, its handler, and back.
//!
//! Linux makes a signal of it: `SIGILL` for an invalid instruction. Dune mode calls a
//! registered handler, with all registers and the extended state saved.
#![expect(unsafe_code, reason = "raises exceptions")]

use core::arch::asm;
use core::hint::black_box;

use dune::exceptions::{self, Outcome};
use dune::{TrapFrame, vector};

use super::Bench;
use super::signal::{self, Installed};
use crate::report::{DUNE, LINUX, Row};

const BATCH: u32 = 64;
/// Length of `ud2` and of `div ecx`.
const LENGTH: i64 = 2;

unsafe extern "C" fn on_signal(
    _: libc::c_int,
    _: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel's context; both instructions that raise this are LENGTH long.
    unsafe { signal::skip(context, LENGTH) };
}

/// An instruction that no CPU has. Two bytes; the handler continues after it.
#[inline(always)]
fn invalid() {
    // SAFETY: a handler that steps over it is installed.
    unsafe { asm!("ud2", options(nostack)) };
}

/// A breakpoint. The CPU itself continues after it.
#[inline(always)]
fn breakpoint() {
    // SAFETY: a handler is installed.
    unsafe { asm!("int3", options(nostack)) };
}

/// A division by zero. Two bytes; the handler continues after it.
#[inline(always)]
fn division() {
    // SAFETY: a handler that steps over it is installed; registers only.
    unsafe {
        asm!("div ecx", in("ecx") 0, inout("eax") 1 => _, inout("edx") 0 => _, options(nostack));
    }
}

pub(crate) fn linux(bench: &Bench, row: &mut Row) {
    let handler = Installed::new(libc::SIGILL, on_signal);
    row.add(LINUX, bench.meter.measure(BATCH, invalid));
    drop(handler);
    let handler = Installed::new(libc::SIGFPE, on_signal);
    row.add("linux-de", bench.meter.measure(BATCH, division));
    drop(handler);
}

fn go_on(frame: &mut TrapFrame) -> Outcome {
    black_box(frame);
    Outcome::Resume
}

fn step_over(frame: &mut TrapFrame) -> Outcome {
    frame.rip = frame.rip.wrapping_add_signed(LENGTH);
    Outcome::Resume
}

pub(crate) fn dune(bench: &Bench, row: &mut Row) {
    exceptions::set_handler(vector::BREAKPOINT, go_on);
    let bp = bench.meter.measure(BATCH, breakpoint);
    exceptions::clear_handler(vector::BREAKPOINT);

    exceptions::set_handler(vector::DIVIDE, step_over);
    let de = bench.meter.measure(BATCH, division);
    exceptions::clear_handler(vector::DIVIDE);

    exceptions::set_handler(vector::INVALID_OPCODE, step_over);
    let ud = bench.meter.measure(BATCH, invalid);
    exceptions::clear_handler(vector::INVALID_OPCODE);

    row.add(DUNE, if bp.median > de.median { bp } else { de });
    row.add("dune-bp", bp);
    row.add("dune-de", de);
    row.add("dune-ud", ud);
    row.note("dune-ud is the way round by KVM, which looks at every #UD first");
}
