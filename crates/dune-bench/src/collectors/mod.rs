//! Garbage collectors beside each other: the programs of `programs/gc`, each compiled from one
//! source for Debian's libgc and for `dune-gc`, and run under every mode of the one and every
//! provider of the other.
//!
//! ```text
//!   contender  a collector and its mode
//!   program    what is run, and what it says of itself
//!   aims       what dune-gc is held against
//! ```
//!
//! The programs time themselves, from before the collector is set up until their work is done;
//! in the lab that is every instruction that the machine executed meanwhile, the kernel's and
//! another thread's included. A program whose checksum differs from the first contender's has
//! no figure.

mod aims;
mod contender;
mod program;

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::clock::{Clock, Unit};
use crate::host::Machine;
use crate::matrix::RowUnit;
use crate::meter::Figure;

use contender::Contender;
use program::{Outcome, PROGRAMS, Program};

/// A row for each program and figure, a column for each collector.
pub(crate) type Matrix = crate::matrix::Matrix<Contender>;

/// What the command line chose.
#[derive(Clone, Debug)]
pub(crate) struct Choices {
    /// Where the compiled programs are; beside this one if not given.
    pub(crate) programs: Option<PathBuf>,
    /// Only programs whose name contains this.
    pub(crate) only: Option<String>,
    /// Only contenders whose id contains one of these.
    pub(crate) contenders: Vec<String>,
    /// How much work, in percent.
    pub(crate) percent: u32,
    pub(crate) samples: usize,
}

/// What is taken from a program's outcome.
struct Measure {
    name: &'static str,
    label: &'static str,
    unit: RowUnit,
    get: fn(&Outcome, &Clock) -> Option<f64>,
}

const TOTAL: &str = "total";
const PAUSE: &str = "longest-pause";

const MEASURES: &[Measure] = &[
    Measure {
        name: TOTAL,
        label: "the whole program",
        unit: RowUnit::Clock,
        get: |outcome, clock| Some(clock.per_operation(outcome.ticks, 1)),
    },
    Measure {
        name: PAUSE,
        label: "the longest time for which the world was stopped",
        unit: RowUnit::Clock,
        get: |outcome, _| Some(outcome.longest_pause_ns as f64),
    },
    Measure {
        name: "pauses",
        label: "the time for which the world was stopped, in all",
        unit: RowUnit::Clock,
        get: |outcome, _| Some(outcome.total_pause_ns as f64),
    },
    Measure {
        name: "collections",
        label: "collections",
        unit: RowUnit::Count,
        get: |outcome, _| Some(outcome.collections as f64),
    },
    Measure {
        name: "heap",
        label: "the heap at the end",
        unit: RowUnit::Kib,
        get: |outcome, _| Some((outcome.heap_bytes / 1024) as f64),
    },
    Measure {
        name: "p50",
        label: "a request, median",
        unit: RowUnit::Clock,
        get: |outcome, clock| Some(clock.per_operation(outcome.p50?, 1)),
    },
    Measure {
        name: "p99",
        label: "a request, 99th percentile",
        unit: RowUnit::Clock,
        get: |outcome, clock| Some(clock.per_operation(outcome.p99?, 1)),
    },
    Measure {
        name: "p99.9",
        label: "a request, 99.9th percentile",
        unit: RowUnit::Clock,
        get: |outcome, clock| Some(clock.per_operation(outcome.p999?, 1)),
    },
    Measure {
        name: "max",
        label: "a request, the slowest",
        unit: RowUnit::Clock,
        get: |outcome, clock| Some(clock.per_operation(outcome.max?, 1)),
    },
];

/// What a program saw of its collector: of the builds that time each allocation.
const SEEN: Measure = Measure {
    name: "longest-allocation",
    label: "the slowest allocation, as the program saw it",
    unit: RowUnit::Clock,
    get: |outcome, clock| Some(clock.per_operation(outcome.longest_allocation, 1)),
};

fn id(program: &Program, measure: &str) -> String {
    format!("gc-{}-{measure}", program.name)
}

/// Measures everything that was chosen.
pub(crate) fn run(choices: &Choices, clock: &Clock) -> Matrix {
    let machine = Machine::describe(clock, choices.samples);
    let folder = choices.programs.clone().unwrap_or_else(program::folder);
    let mut contenders = contender::all(&folder);
    contenders.retain(|contender| {
        let named = |text: &String| contender.id.contains(text.as_str());
        choices.contenders.is_empty() || choices.contenders.iter().any(named)
    });
    let mut matrix = Matrix::new(machine, clock.clone(), contenders);
    // Counted instructions repeat, and emulated seconds are long.
    let samples = match clock.unit() {
        Unit::Instructions => 1,
        Unit::Nanoseconds => choices.samples,
    };
    let wanted = |program: &&Program| {
        let only = choices.only.as_ref();
        only.is_none_or(|text| program.name.contains(text.as_str()))
    };
    for program in PROGRAMS.iter().filter(wanted) {
        let bench = Bench {
            program,
            folder: folder.clone(),
            percent: choices.percent,
            samples,
        };
        bench.measure(&mut matrix, clock);
    }
    aims::set(&mut matrix);
    matrix
}

/// One program under everybody.
struct Bench<'a> {
    program: &'a Program,
    folder: PathBuf,
    percent: u32,
    samples: usize,
}

impl Bench<'_> {
    fn measure(&self, matrix: &mut Matrix, clock: &Clock) {
        let mut found: BTreeMap<&'static str, Result<Vec<Outcome>, String>> = BTreeMap::new();
        let mut seen = BTreeMap::new();
        let mut checksum = None;
        for contender in matrix.able() {
            eprintln!("{}: {} ...", contender.id, self.program.name);
            let outcome = self.sampled(&contender, false);
            found.insert(contender.id, agreeing(outcome, &mut checksum));
            if self.program.is_timed {
                let outcome = self.sampled(&contender, true);
                seen.insert(contender.id, agreeing(outcome, &mut checksum));
            }
        }
        for measure in MEASURES {
            self.row(matrix, clock, measure, &found);
        }
        if self.program.is_timed {
            self.row(matrix, clock, &SEEN, &seen);
        }
    }

    fn sampled(&self, contender: &Contender, is_timed: bool) -> Result<Vec<Outcome>, String> {
        let run = |_| (self.program).run(&self.folder, contender, self.percent, is_timed);
        (0..self.samples).map(run).collect()
    }

    fn row(
        &self,
        matrix: &mut Matrix,
        clock: &Clock,
        measure: &Measure,
        found: &BTreeMap<&'static str, Result<Vec<Outcome>, String>>,
    ) {
        let figure = |outcomes: &Vec<Outcome>| -> Option<Figure> {
            let samples: Option<Vec<f64>> = outcomes
                .iter()
                .map(|outcome| (measure.get)(outcome, clock))
                .collect();
            samples
                .filter(|samples| !samples.is_empty())
                .map(Figure::of)
        };
        let has_figure = found.values().flatten().any(|one| figure(one).is_some());
        // A program that has no such figure has no such row; where nobody could run it, the
        // first row says so.
        if !has_figure && measure.name != TOTAL {
            return;
        }
        let id = id(self.program, measure.name);
        let label = format!("{}: {}", self.program.label, measure.label);
        matrix.add_row(&id, &label, measure.unit);
        for (contender, outcome) in found {
            let outcome = match outcome {
                Ok(outcomes) => figure(outcomes).ok_or_else(|| "it said nothing".to_owned()),
                Err(reason) => Err(reason.clone()),
            };
            matrix.put(&id, contender, outcome);
        }
    }
}

/// The outcomes, unless they contradict what was found first.
fn agreeing(
    outcomes: Result<Vec<Outcome>, String>,
    checksum: &mut Option<String>,
) -> Result<Vec<Outcome>, String> {
    let outcomes = outcomes?;
    for outcome in &outcomes {
        let first = checksum.get_or_insert_with(|| outcome.checksum.clone());
        if *first != outcome.checksum {
            return Err(format!(
                "its checksum is {}, not {first}: objects were lost or mixed up",
                outcome.checksum
            ));
        }
    }
    Ok(outcomes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_with_another_checksum_is_no_figure() {
        let outcome = |checksum: &str| -> Result<Vec<Outcome>, String> {
            let text = format!(
                r#"{{"checksum":"{checksum}","ticks":1,"collections":0,"longest_pause_ns":0,
                "total_pause_ns":0,"longest_allocation":0,"heap_bytes":0}}"#
            );
            Ok(vec![serde_json::from_str(&text).unwrap()])
        };
        let mut checksum = None;
        assert!(agreeing(outcome("a"), &mut checksum).is_ok());
        assert!(agreeing(outcome("a"), &mut checksum).is_ok());
        let reason = agreeing(outcome("b"), &mut checksum).unwrap_err();
        assert!(reason.contains("is b, not a"), "{reason}");
    }
}
