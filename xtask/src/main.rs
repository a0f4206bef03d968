//! The project's own chores.
//!
//! ```text
//!   test    every test, the machine's tools installed first
//!   lint    formatting, clippy, documentation, the list of unsafe files, licences
//!   bench   a benchmark in the lab, with instructions counted, and on this machine;
//!           all of them, and one report
//!   fuzz    a fuzz target for a while
//!   soak    programs of every kind in the sandbox for a while
//!   programs  real programs, natively and in the sandbox, compared
//! ```

mod bench;
mod fuzz;
mod lint;
mod process;
mod programs;
mod report;
mod soak;
mod tally;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "The project's own chores")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Run every test: unit, property, documentation and ring 0.
    Test(test::TestArgs),
    /// Check formatting, lints, documentation, unsafe code and licences.
    Lint(lint::LintArgs),
    /// Run a benchmark in the lab and on this machine.
    Bench(bench::BenchArgs),
    /// Fuzz a target, or each target in turn.
    Fuzz(fuzz::FuzzArgs),
    /// Run programs of every kind in the sandbox for a while; nothing may hang, go wrong or
    /// be left behind.
    Soak(soak::SoakArgs),
    /// Compare real programs, natively and in the sandbox; Python's own regression tests too.
    Programs(programs::ProgramsArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().chore {
        Chore::Test(args) => test::run(&args),
        Chore::Lint(args) => lint::run(&args),
        Chore::Bench(args) => bench::run(&args),
        Chore::Fuzz(args) => fuzz::run(&args),
        Chore::Soak(args) => soak::run(&args),
        Chore::Programs(args) => programs::run(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cargo xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
