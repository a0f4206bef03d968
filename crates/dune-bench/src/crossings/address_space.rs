//! Another address space is loaded at ring 0, and the first one again. Ordinary processes
//! have no such thing.
#![expect(unsafe_code, reason = "loads another page table under its own feet")]

use core::hint::black_box;

use dune::memory::AddressSpace;

use super::Bench;
use crate::report::{DUNE, Row};

const BATCH: u32 = 256;

pub(crate) fn dune(bench: &Bench, row: &mut Row) {
    let space = match AddressSpace::around_process() {
        Ok(space) => space,
        Err(error) => return row.set_missing(error.to_string()),
    };
    let mut switches = 0_u32;
    let mut failures = 0_u32;
    let figure = bench.meter.measure(BATCH, || {
        // SAFETY: the space has the whole process in it; the closure does not enter ring 3.
        match unsafe { space.with_loaded(|| black_box(&mut switches)) } {
            Ok(switches) => *switches += 1,
            Err(_) => failures += 1,
        }
    });
    if failures == 0 {
        row.add(DUNE, figure);
    } else {
        row.set_missing("the address space could not be loaded");
    }
}
