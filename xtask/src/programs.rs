//! `cargo xtask programs`: real programs, natively and under `dune run`. What they
//! print and how they end must be the same; of Python's own regression tests,
//! every single result.
//!
//! ```text
//!   programs          the chore: here, or again inside of the lab; the table, the JSON
//!   programs/list     the programs: a script for each, and what they need
//!   programs/run      one script, natively or in the sandbox, to its end or its limit
//!   programs/python   one module of Python's regression tests, result by result
//! ```

mod list;
mod python;
mod run;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use dune_lab::{Config, Input, Output, Session, tools};
use serde::Serialize;

use crate::process::{cargo, succeed, target_folder};
use list::{PYTHON_TESTS, SCRIPTS, Script};
use run::{Runner, Seen};

/// Options of `cargo xtask programs`.
#[derive(Debug, clap::Args)]
pub(crate) struct ProgramsArgs {
    /// Only those whose name contains one of these words.
    names: Vec<String>,

    /// Where to run them [default: on this machine].
    #[arg(long, value_enum, default_value_t = Place::Native)]
    place: Place,

    /// The placement that `dune run` is told [default: the machine's best].
    #[arg(long, value_name = "WHERE", default_value = "auto")]
    placement: String,

    /// Say which there are, and run none.
    #[arg(long)]
    list: bool,

    /// For one program, in minutes.
    #[arg(long, value_name = "MINUTES", default_value_t = 30)]
    limit: u64,

    /// The `dune` command, not built anew; for the part that runs in the lab.
    #[arg(long, hide = true)]
    dune: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Place {
    /// On this machine.
    Native,
    /// In the lab.
    Lab,
}

/// One line of the table, and one object of the JSON.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    equal: bool,
    native_seconds: f64,
    sandbox_seconds: f64,
    /// Of Python's regression tests.
    #[serde(skip_serializing_if = "Option::is_none")]
    tests: Option<python::Counts>,
    /// What differs, or what went wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    differences: Vec<String>,
    /// Tests that differed once, and not when they were run again, natively and in the sandbox.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unsteady: Vec<String>,
}

/// What the lab's machine has.
const LAB_MEMORY_MIB: u32 = 4096;

/// Runs the chore. The results go to `target/programs.json`, the lab's to
/// `target/programs-lab.json`.
pub(crate) fn run(args: &ProgramsArgs) -> Result<ExitCode> {
    let scripts: Vec<&Script> = SCRIPTS.iter().filter(|s| args.wants(s.name)).collect();
    let modules: Vec<&str> = PYTHON_TESTS
        .iter()
        .copied()
        .filter(|module| args.wants(module))
        .collect();
    if scripts.is_empty() && modules.is_empty() {
        bail!("no program has such a name; --list says which there are");
    }
    if args.list {
        for name in scripts.iter().map(|script| script.name).chain(modules) {
            println!("{name}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let dune = match &args.dune {
        Some(dune) => dune.clone(),
        None => {
            install(&scripts, &modules);
            succeed(cargo().args(["build", "--release", "-p", "dune-cli"]))?;
            target_folder().join("release/dune")
        }
    };
    if args.place == Place::Lab {
        return in_lab(args, &dune);
    }
    let runner = Runner::new(
        dune,
        &args.placement,
        Duration::from_secs(args.limit.max(1) * 60),
    )?;
    let mut rows = Vec::new();
    for script in scripts {
        eprintln!("programs: {} ...", script.name);
        rows.push(compare(&runner, script));
    }
    for module in modules {
        eprintln!("programs: {module} ...");
        rows.push(python::compare(&runner, module));
    }
    report(&rows)
}

impl ProgramsArgs {
    fn wants(&self, name: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|word| name.contains(word.as_str()))
    }
}

/// Installs what is missing. It need not succeed: a program that is not there says so itself.
fn install(scripts: &[&Script], modules: &[&str]) {
    let mut packages: Vec<String> = scripts
        .iter()
        .flat_map(|script| script.needs)
        .filter(|tool| tool.find().is_none())
        .map(|tool| tool.package.to_owned())
        .collect();
    if !modules.is_empty() {
        packages.extend(python::missing_package());
    }
    packages.sort_unstable();
    packages.dedup();
    let packages: Vec<&str> = packages.iter().map(String::as_str).collect();
    if !packages.is_empty()
        && let Err(error) = tools::install(&packages)
    {
        eprintln!("cargo xtask: {error}");
    }
}

/// This same chore, inside. Its JSON comes back by a folder that is shared.
fn in_lab(args: &ProgramsArgs, dune: &Path) -> Result<ExitCode> {
    let own = std::env::current_exe().context("find this program's own file")?;
    let shared = target_folder().join("programs-lab");
    fs::create_dir_all(&shared).with_context(|| format!("create {}", shared.display()))?;
    let mut session = Session::start(&Config {
        memory_mib: LAB_MEMORY_MIB,
        shares: vec![shared.clone()],
        ..Config::default()
    })?;
    let mut command = dune_lab::Command::new(own)
        .arg("programs")
        .args(&args.names)
        .args(["--placement", &args.placement])
        .args(["--limit", &args.limit.to_string()])
        .arg("--dune")
        .arg(dune);
    command = command.env(RESULTS, shared.join("programs.json"));
    let mut output = Output {
        stdout: &mut std::io::stdout(),
        stderr: &mut std::io::stderr(),
    };
    let outcome = session.run(&command, Input::Nothing, &mut output)?;
    let results = target_folder().join("programs-lab.json");
    if fs::copy(shared.join("programs.json"), &results).is_ok() {
        println!("in {}", results.display());
    }
    Ok(ExitCode::from(outcome.code))
}

/// Where the results go, if not to the folder that cargo builds into.
const RESULTS: &str = "DUNE_PROGRAMS_RESULTS";

/// Runs a script natively and in the sandbox.
fn compare(runner: &Runner, script: &Script) -> Row {
    let native = runner.natively(script.text);
    let sandboxed = runner.in_sandbox(script.text);
    let mut differences = Vec::new();
    match (&native.seen, &sandboxed.seen) {
        (Ok(native), Ok(sandboxed)) => {
            if native.output.is_empty() {
                differences.push("it prints nothing natively".to_owned());
            }
            differences.extend(native.differences(sandboxed));
        }
        (native, sandboxed) => {
            let trouble = |place: &str, seen: &Result<Seen, String>| {
                let error = seen.as_ref().err()?;
                Some(format!("{place}: {error}"))
            };
            differences.extend(trouble("natively", native));
            differences.extend(trouble("in the sandbox", sandboxed));
        }
    }
    Row {
        name: script.name.to_owned(),
        equal: differences.is_empty(),
        native_seconds: native.seconds,
        sandbox_seconds: sandboxed.seconds,
        tests: None,
        differences,
        unsteady: Vec::new(),
    }
}

fn report(rows: &[Row]) -> Result<ExitCode> {
    println!(
        "\n{:<18} {:>9} {:>9}  {:<26} result",
        "program", "native", "sandbox", "passed: native, sandbox"
    );
    for row in rows {
        let passed = row.tests.as_ref().map_or_else(String::new, |tests| {
            format!("{} and {} of {}", tests.native, tests.sandbox, tests.all)
        });
        println!(
            "{:<18} {:>7.1} s {:>7.1} s  {passed:<26} {}",
            row.name,
            row.native_seconds,
            row.sandbox_seconds,
            if row.equal { "equal" } else { "DIFFERENT" }
        );
        for line in row.differences.iter().flat_map(|text| text.lines()) {
            println!("    {line}");
        }
        for test in &row.unsteady {
            println!("    once different, then equal: {test}");
        }
    }
    let different = rows.iter().filter(|row| !row.equal).count();
    println!(
        "\n{} programs, {} equal, {different} different",
        rows.len(),
        rows.len() - different
    );
    let results =
        std::env::var_os(RESULTS).map_or_else(|| target_folder().join("programs.json"), Into::into);
    let json = serde_json::to_string_pretty(rows).context("write the results as JSON")?;
    fs::write(&results, json).with_context(|| format!("write {}", results.display()))?;
    println!("in {}", results.display());
    Ok(if different == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
