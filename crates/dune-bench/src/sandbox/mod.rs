//! The sandbox beside its peers: the same programs natively, under `dune run` in each
//! placement, and under other sandboxes and tracers, in one run on one machine.
//!
//! ```text
//!   contender    who runs the programs
//!   operations   system calls, memory, threads, processes: `dune-operations`
//!   commands     start-up, memory, and fixed work, as whole commands
//!   servers      redis and nginx under load
//!   aims         what Dune is held against
//!   launch       a command, its time limit, its processes
//!   tracer       the ptrace-based tracer
//! ```

mod aims;
mod commands;
mod contender;
mod launch;
mod operations;
mod servers;
pub(crate) mod tracer;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;

use crate::clock::{Clock, Unit};
use crate::host::Machine;
use contender::Contender;

/// A row for each thing, a column for each contender.
pub(crate) type Matrix = crate::matrix::Matrix<Contender>;

/// What the command line chose.
#[derive(Clone, Debug)]
pub(crate) struct Choices {
    pub(crate) samples: usize,
    /// Only rows whose id contains this.
    pub(crate) only: Option<String>,
    /// Only contenders whose id contains one of these.
    pub(crate) contenders: Vec<String>,
    pub(crate) dune: Option<PathBuf>,
}

/// What every group of rows is given.
#[derive(Clone, Debug)]
struct Bench {
    clock: Clock,
    samples: usize,
    only: Option<String>,
    /// This program, for the parts of it that are run as a command.
    own: PathBuf,
    operations: PathBuf,
}

impl Bench {
    fn is_wanted(&self, id: &str) -> bool {
        self.only.as_ref().is_none_or(|text| id.contains(text))
    }

    /// How often something is done that takes a good part of a second.
    fn few(&self) -> usize {
        self.samples.min(5)
    }
}

/// Measures everything that was chosen. What there is by then is handed to `save` after each group
/// of rows: a run takes long, and may be ended.
///
/// # Errors
/// The programs that it needs are not beside this one; those of `save`.
pub(crate) fn run(
    choices: &Choices,
    save: impl Fn(&Matrix) -> anyhow::Result<()>,
) -> anyhow::Result<Matrix> {
    let clock = Clock::calibrate();
    let machine = Machine::describe(&clock, choices.samples);
    let own = std::env::current_exe().context("find this program's own file")?;
    let beside = |name: &str| Some(own.with_file_name(name)).filter(|path| path.is_file());
    let operations = beside("dune-operations").context(
        "there is no dune-operations beside this program: build it (cargo build -p dune-bench)",
    )?;
    let dune = choices.dune.clone().or_else(|| beside("dune"));
    // Emulated seconds are long.
    let patience = match clock.unit() {
        Unit::Instructions => Duration::from_secs(60),
        Unit::Nanoseconds => Duration::from_secs(20),
    };
    let mut contenders = contender::all(dune.as_deref(), &own, patience);
    contenders.retain(|contender| {
        let named = |text: &String| contender.id.contains(text.as_str());
        choices.contenders.is_empty() || choices.contenders.iter().any(named)
    });
    let bench = Bench {
        clock: clock.clone(),
        samples: choices.samples,
        only: choices.only.clone(),
        own: own.clone(),
        operations,
    };
    let mut matrix = Matrix::new(machine, clock, contenders);
    for measure in [
        operations::measure,
        commands::measure_starts,
        commands::measure_work,
        servers::measure,
    ] {
        measure(&bench, &mut matrix);
        aims::set(&mut matrix);
        save(&matrix)?;
    }
    Ok(matrix)
}

/// Says on standard error what is being measured: a run takes minutes.
fn announce(contender: &Contender, what: &str) {
    eprintln!("{}: {what} ...", contender.id);
}

/// A path as an argument.
fn text(path: &Path) -> std::borrow::Cow<'_, str> {
    path.to_string_lossy()
}
