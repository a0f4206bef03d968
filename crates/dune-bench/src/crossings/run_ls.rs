//! A short program from start to end: `busybox ls -l /`.

use std::path::Path;

use super::Bench;
use super::program::{Cost, Program, Under};
use crate::clock::Unit;
use crate::report::{DUNE, LINUX, Row};

/// 12 ms, natively.
const AIM_NANOSECONDS: f64 = 12e6;
const MOST_SAMPLES: usize = 21;
const BUSYBOX: [&str; 2] = ["/bin/busybox", "/usr/bin/busybox"];

pub(crate) fn linux(bench: &Bench, row: &mut Row) {
    if bench.meter.clock().unit() == Unit::Nanoseconds {
        row.set_aim(AIM_NANOSECONDS);
    }
    match measure(bench, Under::Nothing) {
        Ok(cost) => {
            row.add(LINUX, cost.total);
            if bench.meter.clock().unit() == Unit::Nanoseconds {
                row.add("linux-cpu", cost.cpu);
            }
        }
        Err(error) => row.set_missing(error),
    }
}

pub(crate) fn dune(bench: &Bench, row: &mut Row) {
    if row.is_missing() {
        return;
    }
    match bench
        .dune_command()
        .and_then(|dune| measure(bench, Under::Dune(dune)))
    {
        Ok(cost) => {
            row.add(DUNE, cost.total);
            if bench.meter.clock().unit() == Unit::Nanoseconds {
                row.add("dune-cpu", cost.cpu);
                row.note("cpu: the part that other programs on this machine disturb least");
            }
        }
        Err(error) => row.set_missing(error),
    }
}

fn measure(bench: &Bench, under: Under<'_>) -> Result<Cost, String> {
    let path = BUSYBOX
        .iter()
        .map(Path::new)
        .find(|path| path.is_file())
        .ok_or("there is no busybox here (Debian: apt-get install busybox-static)")?;
    let program = Program {
        path,
        arguments: &["ls", "-l", "/"],
        most_samples: MOST_SAMPLES,
    };
    program.measure(
        under,
        bench.meter.clock(),
        bench.meter.samples(),
        |output| {
            if output.is_empty() {
                Err("the program printed nothing".to_owned())
            } else {
                Ok(None)
            }
        },
    )
}
