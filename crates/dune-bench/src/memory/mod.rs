//! Which pages of a range were written: the ways of finding out, side by side.
//!
//! ```text
//!   region        the memory, and how much of it is written
//!   protect       mprotect and SIGSEGV
//!   uffd          userfaultfd's write protection, resolved by a second thread
//!   soft_dirty    the kernel's soft-dirty bits
//!   pagemap_scan  the kernel's PAGEMAP_SCAN, where it has it
//!   kvm_log       KVM's dirty log, of a small virtual machine
//!   dirty_bits    dune::dirty
//! ```
//!
//! Every way goes through the same periods: it is *armed*, some pages are *written*, one byte
//! each, evenly spread, and what was written is *collected* as a list or bitmap, whose length
//! is checked. Ways whose collection begins the next period by itself have nothing to arm.
//!
//! As with the crossings, Linux goes first, and Dune mode is entered afterwards. All memory is
//! in pages of 4 KiB and was touched before.

mod dirty_bits;
mod kvm_log;
mod pagemap_scan;
mod protect;
mod region;
mod soft_dirty;
mod uffd;

use crate::clock::{self, Clock, Unit};
use crate::host::{self, Machine};
use crate::meter::Figure;
use crate::report::{DUNE, Report, Row};

use region::Region;

/// What Dune is held against.
const MPROTECT: &str = "mprotect";

/// What the command line chose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choices {
    pub(crate) mib: usize,
    pub(crate) samples: usize,
}

/// A way of finding out which pages were written.
trait Way {
    /// Begins a period.
    fn arm(&mut self);
    /// Writes to every `step`-th page of the region.
    fn write(&mut self, region: &Region, step: usize) {
        region.write(step);
    }
    /// Ends the period; how many pages were found to be written.
    fn collect(&mut self) -> usize;
}

/// How much is written in a period.
struct Density {
    /// One page in so many.
    step: usize,
    ids: [&'static str; 4],
    labels: [&'static str; 4],
}

macro_rules! density {
    ($step:literal, $percent:literal) => {
        Density {
            step: $step,
            ids: [
                concat!("arm-", $percent),
                concat!("write-", $percent),
                concat!("collect-", $percent),
                concat!("total-", $percent),
            ],
            labels: [
                concat!(
                    "begin a period, for each page of the range; ",
                    $percent,
                    "% were written"
                ),
                concat!("first write to a page, for each; ", $percent, "% of them"),
                concat!(
                    "collect, for each page of the range; ",
                    $percent,
                    "% were written"
                ),
                concat!("all of it, for the range; ", $percent, "% were written"),
            ],
        }
    };
}

const DENSITIES: [Density; 4] = [
    density!(1000, "0.1"),
    density!(100, "1"),
    density!(10, "10"),
    density!(1, "100"),
];

/// Collecting: at most so many instructions for each page of the range.
const COLLECT_AIM: f64 = 10.0;
/// At 1%, Dune is to be so many times cheaper than `mprotect`.
const TOTAL_AIM: f64 = 20.0;

struct Suite {
    clock: Clock,
    samples: usize,
    region: Region,
    start: Row,
    rows: Vec<[Row; 4]>,
}

impl Suite {
    /// Measures a way under its name, from its making on; or says why it cannot be.
    fn measure<W: Way>(
        &mut self,
        name: &'static str,
        make: impl FnOnce(&Region) -> Result<W, String>,
    ) {
        let pages = self.region.pages();
        // Under emulation each takes its time.
        eprintln!("measuring {name}");
        let begin = clock::ticks();
        let made = make(&self.region);
        let ticks = clock::ticks() - begin;
        let mut way = match made {
            Ok(way) => way,
            Err(reason) => return self.missing(name, &reason),
        };
        let figure = Figure::of(vec![self.clock.per_operation(ticks, pages as u32)]);
        self.start.add(name, figure);
        // Caches, and what is allocated once.
        self.period(&mut way, DENSITIES[0].step);
        for (index, density) in DENSITIES.iter().enumerate() {
            // What takes long repeats well enough.
            let samples = if density.step > 10 { self.samples } else { 1 };
            let mut figures: [Vec<f64>; 4] = Default::default();
            for _ in 0..samples {
                let (ticks, found) = self.period(&mut way, density.step);
                let written = pages.div_ceil(density.step);
                if found != written {
                    let reason = format!("found {found} pages of {written} that were written");
                    return self.missing(name, &reason);
                }
                let [arm, write, collect] = ticks;
                let operations = [pages, written, pages, 1];
                let all = [arm, write, collect, arm + write + collect];
                for ((list, ticks), operations) in figures.iter_mut().zip(all).zip(operations) {
                    list.push(self.clock.per_operation(ticks, operations as u32));
                }
            }
            for (row, samples) in self.rows[index].iter_mut().zip(figures) {
                row.add(name, Figure::of(samples));
            }
        }
    }

    /// The ticks of arming, writing and collecting, and how many pages were found.
    fn period(&self, way: &mut impl Way, step: usize) -> ([u64; 3], usize) {
        let begin = clock::ticks();
        way.arm();
        let armed = clock::ticks();
        way.write(&self.region, step);
        let written = clock::ticks();
        let found = way.collect();
        let end = clock::ticks();
        ([armed - begin, written - armed, end - written], found)
    }

    fn missing(&mut self, name: &'static str, reason: &str) {
        if name == DUNE {
            for row in self.rows.iter_mut().flatten().chain([&mut self.start]) {
                row.set_missing(reason);
            }
        } else {
            self.start.note(format!("no figures of {name}: {reason}"));
        }
    }
}

/// Measures all ways.
pub(crate) fn run(choices: Choices) -> Report {
    let clock = Clock::calibrate();
    let machine = Machine::describe(&clock, choices.samples);
    let row = |id, label| {
        let mut row = Row::new(id, label);
        row.set_base(MPROTECT);
        row
    };
    let mut suite = Suite {
        clock: clock.clone(),
        samples: choices.samples,
        region: Region::new(choices.mib << 20),
        start: row("start", "set up once, for each page of the range"),
        rows: DENSITIES
            .iter()
            .map(|d| core::array::from_fn(|n| row(d.ids[n], d.labels[n])))
            .collect(),
    };
    suite
        .start
        .note(format!("the range has {} MiB", choices.mib));
    suite.measure(MPROTECT, protect::Protect::new);
    suite.measure("uffd-wp", uffd::Uffd::new);
    suite.measure("soft-dirty", soft_dirty::SoftDirty::new);
    suite.measure("pagemap-scan", pagemap_scan::PagemapScan::new);
    suite.measure("kvm-dirty-log", kvm_log::KvmLog::new);
    match host::without_ring0() {
        Some(reason) => suite.missing(DUNE, &reason),
        None => {
            let measured = dune::run(|| {
                // The guest's first touch of each page is a matter of its own.
                suite.region.write(1);
                suite.measure(DUNE, dirty_bits::DirtyBits::new);
            });
            if let Err(error) = measured {
                suite.missing(DUNE, &error.to_string());
            }
        }
    }
    if clock.unit() == Unit::Instructions {
        for [_, _, collect, _] in &mut suite.rows {
            collect.set_aim(COLLECT_AIM);
        }
        let [_, _, _, total] = &mut suite.rows[1];
        if let Some(base) = total.median(MPROTECT) {
            total.set_aim(base / TOTAL_AIM);
        }
    }
    let rows = suite.rows.into_iter().flatten();
    Report {
        machine,
        placement: host::placement().name(),
        clock,
        rows: core::iter::once(suite.start).chain(rows).collect(),
    }
}
