//! What each crossing costs, on Linux and in Dune mode, side by side in one run.
//!
//! ```text
//!   main     the command line
//!   memory/  the ways of finding out which pages were written, a file each
//!   crossings/  a file each: the Linux way and the Dune way of the same thing
//!   meter    repeats an operation and takes the median
//!   clock    what a tick is: an instruction (found out, not assumed) or a part of a second
//!   host     what the run was made on
//!   report   the table a person reads and the JSON a program reads
//! ```
//!
//! Nothing is subtracted from a figure: what the measuring itself adds is a row of its own.

mod clock;
mod crossings;
mod host;
mod memory;
mod meter;
mod report;

use std::path::PathBuf;

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
    /// Which pages were written: page protection, the kernel's ways, KVM's log, Dune.
    Memory(MemoryArguments),
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
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().bench {
        Bench::Core(arguments) => run(Suite::Core, "core", arguments),
        Bench::Wedge(arguments) => run(Suite::Wedge, "wedge", arguments),
        Bench::Memory(arguments) => {
            let report = memory::run(memory::Choices {
                mib: arguments.mib as usize,
                samples: arguments.samples as usize,
            });
            deliver(&report, &arguments.json)
        }
        Bench::ComputeKernel => {
            crossings::compute::main();
            Ok(())
        }
    }
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
    deliver(&crossings::run(suite, &choices), &path)
}

fn deliver(report: &report::Report, path: &std::path::Path) -> anyhow::Result<()> {
    let json = report.json()?;
    if path.as_os_str() == "-" {
        eprint!("{}", report.table());
        println!("{json}");
    } else {
        print!("{}", report.table());
        report::write(path, &json)?;
        println!("written to {}", path.display());
    }
    Ok(())
}
