//! `cargo xtask fuzz`: the fuzz targets, for a while each.
//!
//! The target `calls` is none of libFuzzer's: it is a test that plays hostile programs in the
//! sandbox (`crates/dune-sandbox/tests/generated_calls.rs`), and needs a KVM that runs ring 3.

use std::fs;
use std::process::{Command, ExitCode};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};

use crate::process::{succeed, try_run, workspace};

/// Options of `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub(crate) struct FuzzArgs {
    /// The target, such as `elf` or `calls` [default: each in turn].
    target: Option<String>,

    /// How long to fuzz each target.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// Runs the chore. The targets need a nightly compiler and cargo-fuzz; when
/// rustup can install them, they are installed.
pub(crate) fn run(args: &FuzzArgs) -> Result<ExitCode> {
    let targets = match &args.target {
        Some(target) => vec![target.clone()],
        None => all_targets()?,
    };
    let (calls, targets): (Vec<_>, Vec<_>) = targets.into_iter().partition(|name| name == CALLS);
    if !calls.is_empty() {
        generated_calls(args.seconds)?;
    }
    if !targets.is_empty() {
        prepare()?;
    }
    for target in targets {
        let corpus = format!("fuzz/corpus/{target}");
        fs::create_dir_all(workspace().join(&corpus)).context("create the corpus")?;
        let mut command = nightly();
        command.args(["fuzz", "run", &target, &corpus]);
        let seeds = format!("fuzz/seeds/{target}");
        if workspace().join(&seeds).is_dir() {
            command.arg(seeds);
        }
        command.args([
            "--".to_owned(),
            "-max_len=4096".to_owned(),
            format!("-max_total_time={}", args.seconds),
        ]);
        println!("fuzzing {target} for {} s", args.seconds);
        succeed(&mut command).with_context(|| {
            format!("{target} found something: its input is below fuzz/artifacts/{target}")
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The target that is a test.
const CALLS: &str = "calls";

/// Programs that nobody had before: the seeds go on from the time of day.
fn generated_calls(seconds: u64) -> Result<()> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seed = now.map_or(1, |now| now.as_secs() << 20);
    println!("fuzzing {CALLS} for {seconds} s, from seed {seed}");
    let mut command = crate::process::cargo();
    command
        .args(["test", "-p", "dune-sandbox", "--test", "generated_calls"])
        .args(["--", "--nocapture"])
        .env("DUNE_FUZZ_SECONDS", seconds.to_string())
        .env("DUNE_FUZZ_SEED", seed.to_string());
    succeed(&mut command).context("the generated calls found something: see above")
}

/// The names of the files in `fuzz/fuzz_targets`, and the one that is a test.
fn all_targets() -> Result<Vec<String>> {
    let folder = workspace().join("fuzz/fuzz_targets");
    let entries = fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
    let mut targets: Vec<String> = entries
        .flatten()
        .filter_map(|entry| Some(entry.path().file_stem()?.to_str()?.to_owned()))
        .collect();
    targets.push(CALLS.to_owned());
    targets.sort();
    Ok(targets)
}

/// The cargo of the nightly toolchain. Not the one that runs this program:
/// that is bound to the stable toolchain.
fn nightly() -> Command {
    let mut command = Command::new("cargo");
    command.arg("+nightly").current_dir(workspace());
    for name in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC", "CARGO_MANIFEST_DIR"] {
        command.env_remove(name);
    }
    command
}

fn prepare() -> Result<()> {
    let answers =
        |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
    if !answers(nightly().arg("--version")) {
        println!("installing the nightly toolchain");
        let mut install = Command::new("rustup");
        install.args(["toolchain", "install", "nightly", "--profile", "minimal"]);
        if !try_run(&mut install).unwrap_or(false) {
            bail!("fuzzing needs a nightly compiler: install rustup, then the nightly toolchain");
        }
    }
    if !answers(nightly().args(["fuzz", "--version"])) {
        println!("installing cargo-fuzz");
        let mut install = nightly();
        install.args(["install", "cargo-fuzz", "--locked"]);
        succeed(&mut install).context("fuzzing needs cargo-fuzz")?;
    }
    Ok(())
}
