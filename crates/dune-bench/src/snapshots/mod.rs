//! Snapshots: what a return costs, and how many runs of a program there are in
//! a second, beside processes that are made anew.
//!
//! ```text
//!   restore      a program that is returned to its snapshot, with so many pages written
//!   fork_server  a target under AFL's fork server protocol: its own, and `dune snap --afl`
//! ```
//!
//! A run is measured where a fuzzer would: from the request to the answer how it ended, with
//! all that the machine does in between.

mod fork_server;
pub(crate) mod restore;

use std::path::{Path, PathBuf};

use crate::clock::{Clock, Unit};
use crate::host::{self, Machine};
use crate::matrix::{Aim, Column, RowUnit};
use crate::meter::{Figure, Meter};

/// What the command line chose.
#[derive(Clone, Debug)]
pub(crate) struct Choices {
    pub(crate) samples: usize,
    /// The `dune` command.
    pub(crate) dune: PathBuf,
    /// The compiled target.
    pub(crate) target: PathBuf,
}

/// Who goes back to the beginning, and how.
#[derive(Clone, Debug)]
pub(crate) struct Contender {
    id: &'static str,
    missing: Option<String>,
}

pub(crate) type Matrix = crate::matrix::Matrix<Contender>;

impl Column for Contender {
    fn id(&self) -> &'static str {
        self.id
    }

    fn command(&self) -> String {
        String::new()
    }

    fn version(&self) -> Option<&str> {
        None
    }

    fn missing(&self) -> Option<&str> {
        self.missing.as_deref()
    }
}

const FORK: &str = "fork";
const AFL: &str = "afl";
const DUNE_GUEST: &str = "dune-guest";
const DUNE_HOST: &str = "dune-host";
const PLACEMENTS: [(&str, &str); 2] = [(DUNE_GUEST, "guest"), (DUNE_HOST, "host")];

/// Pages that a run writes.
const PAGES: [u32; 5] = [0, 1, 10, 100, 1000];
const RUN: &str = "run";
const PUSH: &str = "take";

/// A return with so many pages written: at most so many instructions in guest. The first is what
/// was reached (5,698) and some room, so that a return that gets dearer is noticed.
const RESTORE_AIMS: [(u32, f64); 2] = [(0, 6_500.0), (10, 25_000.0)];
/// Runs in a second: so many times those of the others.
const RUN_AIM: f64 = 5.0;

/// Measures all of it.
pub(crate) fn run(choices: &Choices, clock: &Clock) -> Matrix {
    let machine = Machine::describe(clock, choices.samples);
    let no_target = missing(
        &choices.target,
        "cargo xtask bench snapshots compiles it, by afl-cc",
    );
    let no_dune = missing(&choices.dune, "cargo build --release -p dune-cli makes it");
    let contender = |id, missing| Contender { id, missing };
    let contenders = vec![
        contender(FORK, None),
        contender(AFL, no_target),
        contender(DUNE_GUEST, no_dune.clone().or_else(host::without_ring0)),
        contender(DUNE_HOST, no_dune),
    ];
    let mut matrix = Matrix::new(machine, clock.clone(), contenders);
    let is_able = |matrix: &Matrix, id| matrix.able().iter().any(|one| one.id == id);

    matrix.add_row(PUSH, "take a snapshot", RowUnit::Clock);
    for pages in PAGES {
        let label = format!("return to it, {pages} pages written");
        matrix.add_row(&restore_id(pages), &label, RowUnit::Clock);
        for (id, placement) in PLACEMENTS {
            if is_able(&matrix, id) {
                eprintln!("{id}: {pages} pages ...");
                let outcome = restore::measure(placement, pages, choices.samples, clock);
                let (push, restore) = match outcome {
                    Ok((push, restore)) => (Ok(push), Ok(restore)),
                    Err(reason) => (Err(reason.clone()), Err(reason)),
                };
                matrix.put(&restore_id(pages), id, restore);
                matrix.put(PUSH, id, push);
            }
        }
    }

    let label = "a run of a small target, from request to answer";
    matrix.add_row(RUN, label, RowUnit::Clock);
    let meter = Meter::new(clock.clone(), choices.samples);
    matrix.put(RUN, FORK, Ok(crate::crossings::fork::run(&meter)));
    for (id, placement) in [(AFL, None)]
        .into_iter()
        .chain(PLACEMENTS.map(|(id, placement)| (id, Some(placement))))
    {
        if is_able(&matrix, id) {
            eprintln!("{id}: runs ...");
            let outcome = fork_server::measure(choices, placement, &meter);
            matrix.put(RUN, id, outcome);
        }
    }
    set_aims(&mut matrix);
    matrix
}

fn restore_id(pages: u32) -> String {
    format!("restore-{pages}")
}

fn missing(file: &Path, remedy: &str) -> Option<String> {
    (!file.is_file()).then(|| format!("there is no {}: {remedy}", file.display()))
}

fn set_aims(matrix: &mut Matrix) {
    let counted = matrix.unit() == Unit::Instructions;
    for row in matrix.rows_mut() {
        for (pages, at_most) in RESTORE_AIMS {
            if row.id == restore_id(pages) && counted {
                row.add_aim(Aim {
                    contender: DUNE_GUEST,
                    at_most,
                    because: format!("{at_most} instructions"),
                });
            }
        }
        if row.id == RUN {
            for (other, what) in [
                (FORK, "fork, exit and wait"),
                (AFL, "the target's own fork server"),
            ] {
                if let Some(figure) = row.median(other) {
                    row.add_aim(Aim {
                        contender: DUNE_GUEST,
                        at_most: (figure / RUN_AIM).round(),
                        because: format!("a fifth of {what}"),
                    });
                }
            }
        }
    }
}

/// The figure of ticks that were read elsewhere.
fn figure(ticks: &[u64], clock: &Clock) -> Figure {
    Figure::of(
        ticks
            .iter()
            .map(|&ticks| clock.per_operation(ticks, 1))
            .collect(),
    )
}
