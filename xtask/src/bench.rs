//! `cargo xtask bench NAME`: a benchmark of `dune-bench`, in the lab with
//! instructions counted, and on this machine.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use dune_lab::{Config, Input, Output, Session};

use crate::process::{cargo, succeed, target_folder, workspace};

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    /// The benchmark, such as `core`.
    name: String,

    /// Where to run it [default: both, the lab first].
    #[arg(long, value_enum)]
    place: Option<Place>,

    /// More arguments for the benchmark.
    #[arg(last = true)]
    more: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Place {
    /// In the lab: one instruction is one nanosecond, figures repeat.
    Lab,
    /// On this machine, by its own clock.
    Native,
}

/// Runs the chore. The lab's figures go to `target/bench/NAME.json`, this
/// machine's to `target/bench/NAME-native.json`.
pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode> {
    if !workspace().join("crates/dune-bench").is_dir() {
        bail!("there is no crate dune-bench in this checkout");
    }
    let mut build = cargo();
    build.args(["build", "--release", "-p", "dune-bench", "-p", "dune-cli"]);
    succeed(&mut build)?;
    let program = target_folder().join("release/dune-bench");
    let results = target_folder().join("bench");
    fs::create_dir_all(&results).with_context(|| format!("create {}", results.display()))?;
    let mut code = ExitCode::SUCCESS;
    for (place, file) in [
        (Place::Lab, format!("{}.json", args.name)),
        (Place::Native, format!("{}-native.json", args.name)),
    ] {
        if args.place.is_some_and(|chosen| chosen != place) {
            continue;
        }
        let json = results.join(file);
        let succeeded = match place {
            Place::Lab => in_lab(&program, args, &json)?,
            Place::Native => native(&program, args, &json)?,
        };
        if !succeeded {
            eprintln!("cargo xtask: the benchmark failed ({place:?})");
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}

fn in_lab(program: &PathBuf, args: &BenchArgs, json: &PathBuf) -> Result<bool> {
    println!("\n== {} in the lab, instructions counted ==", args.name);
    let mut session = Session::start(&Config {
        icount: true,
        memory_mib: 2048,
        shares: json.parent().map(PathBuf::from).into_iter().collect(),
        ..Config::default()
    })?;
    let command = dune_lab::Command::new(program)
        .arg(&args.name)
        .arg("--json")
        .arg(json)
        .args(&args.more);
    let outcome = session.run(
        &command,
        Input::Nothing,
        &mut Output {
            stdout: &mut std::io::stdout(),
            stderr: &mut std::io::stderr(),
        },
    )?;
    Ok(outcome.success())
}

fn native(program: &PathBuf, args: &BenchArgs, json: &PathBuf) -> Result<bool> {
    println!("\n== {} on this machine ==", args.name);
    let mut command = Command::new(program);
    command
        .arg(&args.name)
        .arg("--json")
        .arg(json)
        .args(&args.more);
    crate::process::try_run(&mut command)
}
