//! What Dune costs, beside Linux and beside its peers, side by side in one run.
//!
//! ```text
//!   main     the command line
//!   memory/  the ways of finding out which pages were written, a file each
//!   collectors/  garbage collectors: whole programs under dune-gc and libgc
//!   snapshots/   returns to a snapshot, and runs of a fuzzer's target
//!   crossings/  a file each: the Linux way and the Dune way of the same thing
//!   sandbox/    whole programs under `dune run` and under other sandboxes
//!   operations/ the program of its own that all of those run
//!   meter    repeats an operation and takes the median
//!   clock    what a tick is: an instruction (found out, not assumed) or a part of a second
//!   host     what the run was made on
//!   matrix   a row for each thing, a column for each contender
//!   report   the table a person reads and the JSON a program reads
//! ```
//!
//! Nothing is subtracted from a figure: what the measuring itself adds is a row of its own.

mod clock;
mod collectors;
mod crossings;
mod host;
mod matrix;
mod memory;
mod meter;
mod report;
mod sandbox;
mod snapshots;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::crossings::Suite;

/// Measures Dune against Linux.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// The crossings: traps, system calls, rings, address spaces, memory.
    Core(SuiteArguments),
    /// Compartments beside processes, threads and protection keys.
    Wedge(SuiteArguments),
    /// Which pages were written: page protection, the kernel's ways, KVM's log, Dune; and
    /// garbage collectors that use it.
    Memory(MemoryArguments),
    /// Snapshots of programs: what a return costs, and a run beside fork servers.
    Snapshots(SnapshotsArguments),
    /// Programs in the sandbox, natively, and under its peers.
    Sandbox(SandboxArguments),
    /// The ptrace-based tracer of `sandbox`.
    #[command(hide = true)]
    TraceCalls {
        /// The program and its arguments.
        #[arg(required = true, trailing_var_arg = true)]
        command: Vec<OsString>,
    },
    /// The sandbox whose returns `snapshots` measures.
    #[command(hide = true)]
    SnapshotSandbox {
        /// `guest` or `host`.
        placement: String,
        /// How many pages the program writes.
        pages: u32,
        /// How many returns are measured.
        samples: usize,
    },
    /// The program in it.
    #[command(hide = true)]
    SnapshotProgram {
        /// How many pages it writes.
        pages: u32,
    },
    /// The CPU-bound program that `core` runs natively and under `dune run`.
    #[command(hide = true)]
    ComputeKernel,
}

#[derive(Debug, clap::Args)]
struct SuiteArguments {
    /// Where the JSON goes; `-` for standard output (the table then goes to standard error)
    /// [default: target/bench/NAME.json].
    #[arg(long, value_name = "PATH")]
    json: Option<PathBuf>,
    /// Samples of each row, of which the median is reported.
    #[arg(long, value_name = "N", default_value_t = 51, value_parser = clap::value_parser!(u32).range(3..))]
    samples: u32,
    /// Only the rows whose id contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// The `dune` command for the rows that need it; by default the one beside this program.
    #[arg(long, value_name = "PATH")]
    dune: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct MemoryArguments {
    /// Where the JSON goes; `-` for standard output (the table then goes to standard error).
    #[arg(long, value_name = "PATH", default_value = "target/bench/memory.json")]
    json: PathBuf,
    /// Samples where at most 1% of the pages are written; elsewhere there is one.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,
    /// Size of the range in MiB. Counted instruction by instruction, a GiB takes an emulated
    /// machine a quarter of an hour.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(4..=4096))]
    mib: u32,
    /// Only this half of the benchmark.
    #[arg(long, value_enum)]
    part: Option<MemoryPart>,
    /// The compiled programs of the collectors [default: the folder gc-programs beside this
    /// program].
    #[arg(long, value_name = "PATH")]
    programs: Option<PathBuf>,
    /// Only the collectors' programs whose name contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Only the collectors whose id contains this (can be repeated).
    #[arg(long, value_name = "TEXT")]
    contender: Vec<String>,
    /// How much the collectors' programs do.
    #[arg(long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    percent: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum MemoryPart {
    /// The ways of finding out which pages were written.
    Dirty,
    /// The garbage collectors.
    Collectors,
}

#[derive(Debug, clap::Args)]
struct SnapshotsArguments {
    /// Where the JSON goes; `-` for standard output (the table then goes to standard error).
    #[arg(
        long,
        value_name = "PATH",
        default_value = "target/bench/snapshots.json"
    )]
    json: PathBuf,
    /// Samples of each row, of which the median is reported.
    #[arg(long, value_name = "N", default_value_t = 51, value_parser = clap::value_parser!(u32).range(3..))]
    samples: u32,
    /// The `dune` command; by default the one beside this program.
    #[arg(long, value_name = "PATH")]
    dune: Option<PathBuf>,
    /// The target, compiled by afl-cc [default: the file snapshot-target beside this program].
    #[arg(long, value_name = "PATH")]
    target: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct SandboxArguments {
    /// Where the JSON goes; `-` for standard output (the table then goes to standard error).
    #[arg(long, value_name = "PATH", default_value = "target/bench/sandbox.json")]
    json: PathBuf,
    /// Samples of each row, of which the median is reported; slow rows have fewer.
    #[arg(long, value_name = "N", default_value_t = 11, value_parser = clap::value_parser!(u32).range(3..))]
    samples: u32,
    /// Only the rows whose id contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Only the contenders whose id contains this (can be repeated).
    #[arg(long, value_name = "TEXT")]
    contender: Vec<String>,
    /// The `dune` command; by default the one beside this program.
    #[arg(long, value_name = "PATH")]
    dune: Option<PathBuf>,
}

fn main() -> anyhow::Result<ExitCode> {
    match Arguments::parse().bench {
        Bench::Core(arguments) => run(Suite::Core, "core", arguments)?,
        Bench::Wedge(arguments) => run(Suite::Wedge, "wedge", arguments)?,
        Bench::Memory(arguments) => run_memory(arguments)?,
        Bench::Snapshots(arguments) => run_snapshots(arguments)?,
        Bench::SnapshotSandbox {
            placement,
            pages,
            samples,
        } => snapshots::restore::sandbox(&placement, pages, samples)?,
        Bench::SnapshotProgram { pages } => snapshots::restore::program(pages),
        Bench::Sandbox(arguments) => run_sandbox(arguments)?,
        Bench::TraceCalls { command } => return sandbox::tracer::main(command),
        Bench::ComputeKernel => crossings::compute::main(),
    }
    Ok(ExitCode::SUCCESS)
}

fn run(suite: Suite, name: &str, arguments: SuiteArguments) -> anyhow::Result<()> {
    let path = arguments
        .json
        .unwrap_or_else(|| format!("target/bench/{name}.json").into());
    let choices = crossings::Choices {
        samples: arguments.samples as usize,
        only: arguments.only,
        dune: arguments.dune,
    };
    let report = crossings::run(suite, &choices);
    publish(&path, &report.table(), &report.json()?)
}

fn run_memory(arguments: MemoryArguments) -> anyhow::Result<()> {
    let is_wanted = |part| arguments.part.is_none_or(|chosen| chosen == part);
    let samples = arguments.samples as usize;
    // The collectors first: their programs are children, and a process that was in Dune mode
    // makes a VM for each.
    let clock = clock::Clock::calibrate();
    let matrix = is_wanted(MemoryPart::Collectors).then(|| {
        let choices = collectors::Choices {
            programs: arguments.programs,
            only: arguments.only,
            contenders: arguments.contender,
            percent: arguments.percent,
            samples,
        };
        collectors::run(&choices, &clock)
    });
    let report = is_wanted(MemoryPart::Dirty).then(|| {
        memory::run(memory::Choices {
            mib: arguments.mib as usize,
            samples,
        })
    });
    let (table, json) = match (&report, &matrix) {
        (Some(report), None) => (report.table(), report.json()?),
        (None, Some(matrix)) => (matrix.table(), matrix.json()?),
        (Some(report), Some(matrix)) => (
            format!("{}\n{}", report.table(), matrix.body()),
            report.json_with(matrix)?,
        ),
        (None, None) => return Ok(()),
    };
    publish(&arguments.json, &table, &json)
}

fn run_snapshots(arguments: SnapshotsArguments) -> anyhow::Result<()> {
    let own = std::env::current_exe()?;
    let beside = |name| own.with_file_name(name);
    let choices = snapshots::Choices {
        samples: arguments.samples as usize,
        dune: arguments.dune.unwrap_or_else(|| beside("dune")),
        target: arguments
            .target
            .unwrap_or_else(|| beside("snapshot-target")),
    };
    let matrix = snapshots::run(&choices, &clock::Clock::calibrate());
    publish(&arguments.json, &matrix.table(), &matrix.json()?)
}

fn run_sandbox(arguments: SandboxArguments) -> anyhow::Result<()> {
    let choices = sandbox::Choices {
        samples: arguments.samples as usize,
        only: arguments.only,
        contenders: arguments.contender,
        dune: arguments.dune,
    };
    let matrix = sandbox::run(&choices, |matrix| {
        if arguments.json.as_os_str() == "-" {
            return Ok(());
        }
        report::write(&arguments.json, &matrix.json()?)
    })?;
    publish(&arguments.json, &matrix.table(), &matrix.json()?)
}

/// The table for the person at the terminal, the JSON for the file.
fn publish(path: &Path, table: &str, json: &str) -> anyhow::Result<()> {
    if path.as_os_str() == "-" {
        eprint!("{table}");
        println!("{json}");
    } else {
        print!("{table}");
        report::write(path, json)?;
        println!("written to {}", path.display());
    }
    Ok(())
}
