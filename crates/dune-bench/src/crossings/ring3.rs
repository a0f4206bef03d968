//! Untrusted code makes a system call, whoever guards it answers, and it goes on.
//!
//! Linux's own calls are the measure of what a ring costs; what guards untrusted code
//! without a virtual CPU is ptrace. In Dune mode the guard is the code around
//! `UserContext::run`.

use std::sync::Arc;

use dune::memory::{AddressSpace, Pages, PteFlags, SpaceError};
use dune::{Trap, UserContext};
use dune_x86::addr::GuestVirt;

use super::Bench;
use super::tracer::Tracee;
use crate::meter::Figure;
use crate::report::{DUNE, PTRACE, Row};

const BATCH: u32 = 64;
/// `again: syscall; jmp again`.
const PROGRAM: [u8; 4] = [0x0f, 0x05, 0xeb, 0xfc];
const PROGRAM_ADDRESS: u64 = 0x1_0000;

pub(crate) fn linux(bench: &Bench, row: &mut Row) {
    row.set_base(PTRACE);
    super::forwarded_call::native(bench, row);
    match Tracee::start() {
        Ok(mut tracee) => row.add(PTRACE, bench.meter.measure(BATCH, || tracee.answer_call())),
        Err(error) => row.note(format!("no figure for ptrace: {error}")),
    }
}

pub(crate) fn dune(bench: &Bench, row: &mut Row) {
    match measure(bench) {
        Ok(Some(figure)) => row.add(DUNE, figure),
        Ok(None) => row.set_missing("ring 3 came back with something else than a system call"),
        Err(error) => row.set_missing(error.to_string()),
    }
}

fn measure(bench: &Bench) -> Result<Option<Figure>, SpaceError> {
    let mut space = AddressSpace::empty()?;
    let pages = Arc::new(Pages::new(1)?);
    if !pages.write(0, &PROGRAM) {
        return Ok(None);
    }
    // Readable and executable; not writable.
    space.map(
        GuestVirt::new_truncate(PROGRAM_ADDRESS),
        &pages,
        PteFlags::PRESENT,
    )?;
    let mut context = UserContext::new(PROGRAM_ADDRESS, 0)?;
    context.registers_mut().rax = libc::SYS_getppid as u64;
    let mut calls = 0_u64;
    let mut others = 0_u64;
    let figure = bench.meter.measure(BATCH, || match context.run(&space) {
        Ok(Trap::Syscall) => {
            calls += 1;
            let registers = context.registers_mut();
            // The answer is the question again, so that the next call asks it too.
            registers.rax = answer(registers.rax);
        }
        _ => others += 1,
    });
    // A signal may have interrupted ring 3 once in a while.
    Ok((calls > 100 * others).then_some(figure))
}

/// A guard that knows one call.
fn answer(number: u64) -> u64 {
    const ENOSYS: u64 = 38;
    if number == libc::SYS_getppid as u64 {
        number
    } else {
        ENOSYS.wrapping_neg()
    }
}
