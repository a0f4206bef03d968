//! `cargo xtask bench NAME`: a benchmark of `dune-bench`, in the lab with
//! instructions counted, and on this machine.
//!
//! `cargo xtask bench all` runs every one and writes the report; `cargo xtask
//! bench report` writes it from the figures that are there.

mod gc_programs;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use dune_lab::tools::{self, Tool};
use dune_lab::{Config, Input, Output, Session};

use crate::process::{cargo, line, succeed, target_folder, workspace};
use crate::report;

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    /// The benchmark, such as `core` or `sandbox`; `all` for each one and the
    /// report; `report` for the report alone, from the figures that are there.
    name: String,

    /// Where to run it [default: both, the lab first].
    #[arg(long, value_enum)]
    place: Option<Place>,

    /// Memory of the lab.
    #[arg(long, value_name = "MIB", default_value_t = 2048)]
    memory: u32,

    /// A kernel's image for the lab, for what Debian's own has not.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

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

/// The peers of the sandbox, and what its programs need.
const PEERS: &[Tool] = &[
    tool("runsc", "runsc"),
    tool("strace", "strace"),
    tool("proot", "proot"),
    tool("bwrap", "bubblewrap"),
    tool("python3", "python3-minimal"),
    tool("cc", "gcc"),
    tool("redis-benchmark", "redis-tools"),
    tool("redis-server", "redis-server"),
    tool("nginx", "nginx-light"),
    tool("ab", "apache2-utils"),
];

const fn tool(program: &'static str, package: &'static str) -> Tool {
    Tool { program, package }
}

/// What a whole benchmark may take in the lab.
const LAB_PATIENCE: Duration = Duration::from_secs(3600);

/// Runs the chore. The lab's figures go to `target/bench/NAME.json`, this
/// machine's to `target/bench/NAME-native.json`.
pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode> {
    if !workspace().join("crates/dune-bench").is_dir() {
        bail!("there is no crate dune-bench in this checkout");
    }
    let results = target_folder().join("bench");
    fs::create_dir_all(&results).with_context(|| format!("create {}", results.display()))?;
    if args.name == "report" {
        return report::write(&results).map(|()| ExitCode::SUCCESS);
    }
    let mut build = cargo();
    build.args(["build", "--release", "-p", "dune-bench", "-p", "dune-cli"]);
    succeed(&mut build)?;
    let program = target_folder().join("release/dune-bench");
    let names = match args.name.as_str() {
        "all" => suites(&program)?,
        name => vec![name.to_owned()],
    };
    let mut code = ExitCode::SUCCESS;
    for name in &names {
        if name == "sandbox" {
            install_peers();
        }
        if name == "snapshots"
            && let Err(error) = snapshot_target()
        {
            // Named in the table: no reason to stop.
            eprintln!("cargo xtask: {error:#}");
        }
        if name == "memory" {
            gc_programs::prepare()?;
        }
        if !suite(&program, name, args, &results)? {
            code = ExitCode::FAILURE;
        }
    }
    if args.name == "all" {
        report::write(&results)?;
    }
    Ok(code)
}

/// The benchmarks that `dune-bench` says it has.
fn suites(program: &Path) -> Result<Vec<String>> {
    let mut help = Command::new(program);
    help.arg("--help");
    let output = help
        .output()
        .with_context(|| format!("start `{}`", line(&help)))?;
    let names = commands(&String::from_utf8_lossy(&output.stdout));
    if names.is_empty() {
        bail!("`{}` names no benchmark", line(&help));
    }
    Ok(names)
}

/// The names in the section `Commands:` of a help text.
fn commands(help: &str) -> Vec<String> {
    help.lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.trim().is_empty())
        // What is further in goes on with the line before.
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

/// A peer that cannot be installed is named in the table: no reason to stop.
fn install_peers() {
    let missing = PEERS.iter().filter(|tool| tool.find().is_none());
    for tool in missing {
        if let Err(error) = tools::install(&[tool.package]) {
            eprintln!("cargo xtask: {error}");
        }
    }
}

/// Compiles the target that fuzzers run, with a fuzzer's fork server in it.
fn snapshot_target() -> Result<()> {
    let source = workspace().join("crates/dune-bench/programs/snapshots/target.c");
    let compiler = tool("afl-cc", "afl++").require()?;
    let mut compile = Command::new(compiler);
    compile.env("AFL_QUIET", "1").arg("-O2").arg("-o");
    compile.arg(target_folder().join("release/snapshot-target"));
    succeed(compile.arg(source))
}

fn suite(program: &Path, name: &str, args: &BenchArgs, results: &Path) -> Result<bool> {
    let mut all = true;
    for (place, file) in [
        (Place::Lab, format!("{name}.json")),
        (Place::Native, format!("{name}-native.json")),
    ] {
        if args.place.is_some_and(|chosen| chosen != place) {
            continue;
        }
        let json = results.join(file);
        let succeeded = match place {
            Place::Lab => in_lab(program, name, args, &json)?,
            Place::Native => native(program, name, &args.more, &json)?,
        };
        if !succeeded {
            eprintln!("cargo xtask: the benchmark {name} failed ({place:?})");
        }
        all &= succeeded;
    }
    Ok(all)
}

fn in_lab(program: &Path, name: &str, args: &BenchArgs, json: &Path) -> Result<bool> {
    println!("\n== {name} in the lab, instructions counted ==");
    let mut session = Session::start(&Config {
        icount: true,
        memory_mib: args.memory,
        kernel: args.kernel.clone(),
        shares: json.parent().map(PathBuf::from).into_iter().collect(),
        ..Config::default()
    })?;
    let command = dune_lab::Command::new(program)
        .arg(name)
        .arg("--json")
        .arg(json)
        .args(&args.more)
        .timeout(Some(LAB_PATIENCE));
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

fn native(program: &Path, name: &str, more: &[String], json: &Path) -> Result<bool> {
    println!("\n== {name} on this machine ==");
    let mut command = Command::new(program);
    command.arg(name).arg("--json").arg(json).args(more);
    crate::process::try_run(&mut command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_benchmarks_are_those_that_the_help_lists() {
        let help = "What\n\nUsage: x\n\nCommands:\n  core     The crossings\n  sandbox  Programs,\n           \
                    and more\n  help     Print this message\n\nOptions:\n  -h  help\n";
        assert_eq!(commands(help), ["core", "sandbox"]);
    }
}
