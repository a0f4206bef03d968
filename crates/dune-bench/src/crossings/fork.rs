//! A process that is made, ends at once, and is waited for.
#![expect(unsafe_code, reason = "fork")]

use super::Bench;
use crate::meter::{Figure, Meter};
use crate::report::{DUNE, LINUX, Row};

pub(crate) fn linux(bench: &Bench, row: &mut Row) {
    row.add(LINUX, fork(bench));
}

pub(crate) fn dune(bench: &Bench, row: &mut Row) {
    row.add(DUNE, fork(bench));
    row.note("the child of a process in Dune mode gets a VM and is in Dune mode");
}

pub(super) fn fork(bench: &Bench) -> Figure {
    run(&bench.meter)
}

/// The figure of a process that is made, ends, and is waited for.
pub(crate) fn run(meter: &Meter) -> Figure {
    meter.with_at_most(11).measure(1, || {
        // SAFETY: the child ends at once.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: the kernel writes the status.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
    })
}
