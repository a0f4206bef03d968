//! A system call that Linux must answer: `getppid`.
//!
//! Its peers: the same call made natively, and one that a tracer takes (`PTRACE_SYSEMU`,
//! the registers read and the result written), which is how system calls are virtualised
//! without a virtual CPU.

use core::hint::black_box;

use super::Bench;
use super::syscall::ask;
use super::tracer::Tracee;
use crate::meter::Figure;
use crate::report::{DUNE, LINUX, PTRACE, Row};

const BATCH: u32 = 64;

/// The call as Linux itself answers it.
pub(crate) fn native(bench: &Bench, row: &mut Row) {
    row.add(LINUX, get_parent(bench));
}

pub(crate) fn linux(bench: &Bench, row: &mut Row) {
    native(bench, row);
    match Tracee::start() {
        Ok(mut tracee) => {
            row.add(PTRACE, bench.meter.measure(BATCH, || tracee.answer_call()));
            row.add(
                "ptrace-bare",
                bench.meter.measure(BATCH, || tracee.pass_call()),
            );
            row.note("ptrace-bare only stops at the call and neither reads nor answers it");
        }
        Err(error) => row.note(format!("no figure for ptrace: {error}")),
    }
}

pub(crate) fn dune(bench: &Bench, row: &mut Row) {
    row.add(DUNE, get_parent(bench));
}

fn get_parent(bench: &Bench) -> Figure {
    bench.meter.measure(BATCH, || {
        black_box(ask(libc::SYS_getppid));
    })
}
