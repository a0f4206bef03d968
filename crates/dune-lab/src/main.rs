//! `dune-lab`: the lab as a small program of its own.

use std::process::ExitCode;

use clap::Parser;
use dune_lab::LabArgs;

#[derive(Debug, Parser)]
#[command(name = "dune-lab", version, about)]
struct Cli {
    #[command(flatten)]
    lab: LabArgs,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match dune_lab::run(&cli.lab) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("dune lab: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
