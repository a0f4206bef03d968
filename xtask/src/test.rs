//! `cargo xtask test`: every test there is.
//!
//! The ring 0 tests find their own way: each test target that has some brings
//! up one lab for all of them, out of a saved state, in a third of a second.
//! What this chore adds is that everything they need is there before, and the
//! sum at the end.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dune_lab::tools::{self, Tool};
use dune_lab::{Config, Session, Step};

use crate::process::cargo;
use crate::tally::Tally;

/// Options of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub(crate) struct TestArgs {
    /// Run the ring 0 smoke tests on an emulated Intel CPU too.
    #[arg(long)]
    all: bool,

    /// More arguments for `cargo test`: a package, a filter.
    #[arg(last = true)]
    cargo: Vec<String>,
}

/// Programs that the tests run; each is compared with itself under Dune.
const PROGRAMS: &[Tool] = &[
    tools::QEMU,
    tools::XZ,
    tool("busybox", "busybox-static"),
    tool("bzip2", "bzip2"),
    tool("awk", "mawk"),
    tool("perl", "perl-base"),
    tool("python3", "python3"),
    tool("make", "make"),
    // For its library, which is read in a compartment.
    tool("xmlwf", "expat"),
    tool("sqlite3", "sqlite3"),
    tool("afl-fuzz", "afl++"),
    tool("strace", "strace"),
    tool("gdb", "gdb"),
    tool("gcc", "gcc"),
];

const fn tool(program: &'static str, package: &'static str) -> Tool {
    Tool { program, package }
}

/// Runs the chore.
pub(crate) fn run(args: &TestArgs) -> Result<ExitCode> {
    let started = Instant::now();
    prepare();
    let mut tally = Tally::default();
    let mut arguments = args.cargo.clone();
    if !arguments
        .iter()
        .any(|word| matches!(word.as_str(), "-p" | "--package"))
    {
        arguments.insert(0, "--workspace".to_owned());
    }
    cargo_test(&arguments, "test", &mut tally, &[])?;
    if args.all {
        // The harness leaves all but the smoke tests out; targets without it
        // have nothing for another CPU.
        let targets = harness_targets()?;
        cargo_test(
            &targets,
            "the smoke tests on Intel",
            &mut tally,
            &[("DUNE_TEST_RING0", "intel")],
        )?;
        let lab = ["-p", "dune-lab", "--test", "intel", "--", "--ignored"];
        cargo_test(
            &lab.map(str::to_owned),
            "the Intel lab's own tests",
            &mut tally,
            &[],
        )?;
    }
    report(&tally, started);
    Ok(if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Installs what is missing and brings the lab up once, so that its state is
/// there. Neither must succeed: a test that cannot run says so itself.
fn prepare() {
    let missing: Vec<&str> = PROGRAMS
        .iter()
        .filter(|tool| tool.find().is_none())
        .map(|tool| tool.package)
        .collect();
    if !missing.is_empty()
        && let Err(error) = tools::install(&missing)
    {
        eprintln!("cargo xtask: {error}");
    }
    let _step = Step::begin("Bringing the lab up");
    // What the harness asks for by default.
    let config = Config {
        cpus: 2,
        memory_mib: 2048,
        ..Config::default()
    };
    if let Err(error) = Session::start(&config) {
        eprintln!("cargo xtask: the lab cannot run here: {error}");
    }
}

/// Runs `cargo test`, lets a person follow it, and counts.
fn cargo_test(
    arguments: &[String],
    what: &str,
    tally: &mut Tally,
    variables: &[(&str, &str)],
) -> Result<()> {
    let mut build = cargo();
    let for_cargo = arguments.iter().take_while(|word| *word != "--");
    build.args(["test", "--no-run"]).args(for_cargo);
    if !crate::process::try_run(&mut build)? {
        tally.fail(format!("{what}: it does not build"));
        return Ok(());
    }
    let mut test = cargo();
    test.args(["test", "--no-fail-fast"])
        .args(arguments)
        .envs(variables.iter().copied());
    let before = tally.failed;
    let succeeded = follow(&mut test, tally, silence())?;
    if !succeeded && tally.failed == before {
        tally.fail(format!("{what}: cargo test failed; see above"));
    }
    Ok(())
}

/// How long a target may say nothing: longer than any test may take (400 s), whose harness ends it
/// itself. `DUNE_TEST_TIMEOUT_SCALE` stretches this as it does those.
fn silence() -> Duration {
    let scale = std::env::var("DUNE_TEST_TIMEOUT_SCALE")
        .ok()
        .and_then(|text| text.parse::<f64>().ok())
        .filter(|scale| (1.0..1000.0).contains(scale));
    Duration::from_secs(600).mul_f64(scale.unwrap_or(1.0))
}

fn follow(command: &mut Command, tally: &mut Tally, silence: Duration) -> Result<bool> {
    // One pipe for both streams: cargo names the targets on standard error,
    // their results come on standard output, and their order matters.
    let (reader, writer) = std::io::pipe().context("make a pipe")?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone().context("duplicate a pipe")?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("start `{}`", crate::process::line(command)))?;
    // The command holds the other ends of the pipe.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        loop {
            let outcome = reader.read_until(b'\n', &mut line);
            let is_last = !matches!(outcome, Ok(1..));
            // Nobody listens any more once cargo has ended.
            if sender
                .send(outcome.map(|_| std::mem::take(&mut line)))
                .is_err()
                || is_last
            {
                return;
            }
        }
    });
    loop {
        match lines.recv_timeout(silence) {
            Ok(line) => {
                let line = line.context("read a pipe")?;
                let text = String::from_utf8_lossy(&line);
                print!("{text}");
                tally.read(&text);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            // Something that cargo has left behind holds the pipe.
            Err(RecvTimeoutError::Timeout)
                if child.try_wait().context("wait for cargo")?.is_some() =>
            {
                break;
            }
            // A test that hangs is a failure of that target, not of the whole
            // run: cargo goes on with the next.
            Err(RecvTimeoutError::Timeout) => {
                println!(
                    "cargo xtask: nothing said for {} s: this target is ended",
                    silence.as_secs()
                );
                crate::process::kill_descendants(child.id());
            }
        }
    }
    tally.close();
    Ok(child.wait().context("wait for cargo")?.success())
}

/// `-p PACKAGE --test TARGET ...` of every test target with a harness of its
/// own, which in this workspace is `dune-testing`.
fn harness_targets() -> Result<Vec<String>> {
    let mut arguments = Vec::new();
    let crates = crate::process::workspace().join("crates");
    let entries = std::fs::read_dir(&crates).context("read the folder of crates")?;
    for entry in entries.flatten() {
        let manifest = entry.path().join("Cargo.toml");
        let Ok(text) = std::fs::read_to_string(&manifest) else {
            continue;
        };
        let package = entry.file_name().to_string_lossy().into_owned();
        for target in targets_without_libtest(&text) {
            if !arguments.contains(&package) {
                arguments.extend(["-p".to_owned(), package.clone()]);
            }
            arguments.extend(["--test".to_owned(), target]);
        }
    }
    Ok(arguments)
}

/// The names of the `[[test]]` sections with `harness = false`.
fn targets_without_libtest(manifest: &str) -> Vec<String> {
    let mut names = Vec::new();
    for section in manifest
        .split("\n[")
        .filter_map(|section| section.strip_prefix("[test]]"))
    {
        let value = |key: &str| {
            section.lines().find_map(|line| {
                let (name, value) = line.split_once('=')?;
                (name.trim() == key).then(|| value.trim().trim_matches('"').to_owned())
            })
        };
        if value("harness").as_deref() == Some("false") {
            names.extend(value("name"));
        }
    }
    names
}

fn report(tally: &Tally, started: Instant) {
    for (title, names) in [("failed", &tally.failures), ("skipped", &tally.skips)] {
        if !names.is_empty() {
            println!("\n{title}:");
            for name in names {
                println!("    {name}");
            }
        }
    }
    println!("\nall tests took {} s", started.elapsed().as_secs());
    println!("{tally}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn follow_shell(script: &str) -> (Tally, bool, Duration) {
        let mut tally = Tally::default();
        let started = Instant::now();
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let succeeded = follow(&mut command, &mut tally, Duration::from_secs(1)).unwrap();
        (tally, succeeded, started.elapsed())
    }

    #[test]
    fn a_target_that_says_nothing_is_ended_and_the_next_one_runs() {
        let (tally, succeeded, took) = follow_shell(
            "echo '     Running a (a)'; echo 'running 1 test'; sh -c 'sleep 50; :'; \
             echo '     Running b (b)'; echo 'running 1 test'; echo 'test one ... ok'; \
             echo 'test result: ok. 1 passed; 0 failed'; exit 1",
        );
        assert_eq!((tally.passed, tally.failed), (1, 1));
        assert_eq!(tally.failures, ["a: it died before its end"]);
        assert!(!succeeded && took < Duration::from_secs(30), "{took:?}");
    }

    #[test]
    fn what_cargo_leaves_behind_is_not_waited_for() {
        let (_, succeeded, took) = follow_shell("sleep 20 & exit 0");
        assert!(succeeded && took < Duration::from_secs(10), "{took:?}");
    }

    #[test]
    fn targets_with_a_harness_of_their_own_are_found() {
        let manifest = "[package]\nname = \"x\"\n\n[[test]]\nname = \"a\"\nharness = false\n\n\
                        [[test]]\nname = \"b\"\n\n[[bin]]\nname = \"c\"\n";
        assert_eq!(targets_without_libtest(manifest), ["a"]);
    }
}
