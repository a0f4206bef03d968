//! A system call that is answered without Linux: `getpid`.

use core::hint::black_box;

use super::Bench;
use super::syscall::ask;
use crate::report::{DUNE, LINUX, Row};

const BATCH: u32 = 256;

pub(crate) fn measure(bench: &Bench, row: &mut Row) {
    row.add(LINUX, get_pid(bench));
}

pub(crate) fn measure_dune(bench: &Bench, row: &mut Row) {
    row.add(DUNE, get_pid(bench));
}

fn get_pid(bench: &Bench) -> crate::meter::Figure {
    bench.meter.measure(BATCH, || {
        black_box(ask(libc::SYS_getpid));
    })
}
