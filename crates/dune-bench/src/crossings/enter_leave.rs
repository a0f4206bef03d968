//! Entering Dune mode and leaving it, when the process has its machine and the thread its
//! virtual CPU.

use super::Bench;
use crate::report::{DUNE, Row};

const BATCH: u32 = 16;

pub(crate) fn dune(bench: &Bench, row: &mut Row) {
    let mut failure = None;
    let figure = bench.meter.measure(BATCH, || {
        if let Err(error) = dune::enter() {
            failure = Some(error);
        }
        dune::leave();
    });
    match failure {
        None => row.add(DUNE, figure),
        Some(error) => row.set_missing(error.to_string()),
    }
}
