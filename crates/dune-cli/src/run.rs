//! `dune run`: a program in the sandbox, by the engine that fits the machine.
//!
//! ```text
//!   hardware KVM   in guest   engine::in_guest
//!   weak KVM       on host    engine::on_host
//!   no KVM         in lab     this same command again, inside of the lab
//! ```

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, Parser, ValueEnum};
use dune_kvm::probe::{self, Kvm, Placement, PlacementRequest, ProbeError};
use dune_sandbox::engine::Engine;
use dune_sandbox::engine::in_guest::InGuest;
use dune_sandbox::engine::on_host::OnHost;
use dune_sandbox::{Command, MissingCall};

use crate::trace::{Trace, TraceOptions};
use crate::{observed, output, streams, watchdog};

/// Run a program in the sandbox: unmodified, in ring 3 of a virtual CPU.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct RunArgs {
    /// Where the code that guards the program runs [default: $DUNE_PLACEMENT,
    /// or the best that this machine has].
    #[arg(long, value_name = "WHERE")]
    placement: Option<Where>,

    /// Set a variable of the program's environment (can be repeated).
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<(OsString, OsString)>,

    /// Start with an empty environment; --env still adds to it.
    #[arg(long)]
    clear_env: bool,

    /// Start the program in this folder.
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,

    /// Say nothing but errors: no warning about missing system calls.
    #[arg(long, short)]
    quiet: bool,

    /// End the program after so many seconds (exit code 124).
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    timeout: Option<Duration>,

    /// At the end, say how many system calls and faults there were.
    #[arg(long)]
    stats: bool,

    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

const EXAMPLES: &str = "\
Examples:
  dune run -- ls -l /
  dune run --stats -- busybox sha256sum /bin/ls
  dune run --clear-env --env PATH=/bin -- env
  dune run --placement lab -- uname -r";

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Where {
    /// The best that this machine has.
    Auto,
    /// At ring 0 of the guest: needs a KVM on VT-x or SVM.
    Guest,
    /// On the host side: any KVM.
    Host,
    /// In the lab: no KVM needed; files that the program writes are discarded.
    Lab,
}

impl From<Where> for PlacementRequest {
    fn from(place: Where) -> Self {
        match place {
            Where::Auto => Self::Auto,
            Where::Guest => Self::Only(Placement::InGuest),
            Where::Host => Self::Only(Placement::OnHost),
            Where::Lab => Self::Only(Placement::Lab),
        }
    }
}

/// Runs the program and ends as it did.
///
/// # Errors
///
/// What keeps Dune from running it, with the remedy.
pub(crate) fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    run_traced(args, None)
}

/// As [`run`], with every system call traced.
///
/// # Errors
///
/// As [`run`], and if the trace cannot be written.
pub(crate) fn run_traced(args: &RunArgs, trace: Option<&TraceOptions>) -> anyhow::Result<ExitCode> {
    let placement = match args.placement {
        None => probe::placement()?,
        Some(Where::Lab) => Placement::Lab,
        Some(place) => probe::probe().choose(place.into())?,
    };
    match placement {
        Placement::Lab => {
            if !is_asked_for_the_lab(args) {
                check_limits()?;
            }
            in_lab(args, trace)
        }
        Placement::InGuest | Placement::OnHost => here(args, placement, trace),
    }
}

fn is_asked_for_the_lab(args: &RunArgs) -> bool {
    let lab = PlacementRequest::Only(Placement::Lab);
    match args.placement {
        Some(place) => PlacementRequest::from(place) == lab,
        None => probe::request_from_environment() == Ok(lab),
    }
}

/// A KVM that could not be tried for want of descriptors or memory is no
/// reason to go to the lab, which needs more of both.
fn check_limits() -> anyhow::Result<()> {
    let Kvm::Broken(error) = &probe::probe().kvm else {
        return Ok(());
    };
    let (ProbeError::Open(errno) | ProbeError::Call { error: errno, .. }) = error else {
        return Ok(());
    };
    match errno.0 {
        libc::EMFILE | libc::ENFILE | libc::ENOMEM => bail!("{error}"),
        _ => Ok(()),
    }
}

fn here(
    args: &RunArgs,
    placement: Placement,
    trace: Option<&TraceOptions>,
) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let mut command = command(args);
    let trace = trace.map(Trace::start).transpose()?;
    if let Some(trace) = &trace {
        command = command.tracer(trace.tracer());
    }
    if let Some(limit) = args.timeout {
        watchdog::start(limit, program_name(args))?;
    }
    let engine: Box<dyn Engine> = match placement {
        Placement::OnHost => Box::new(OnHost::new()?),
        Placement::InGuest | Placement::Lab => Box::new(InGuest::new()?),
    };
    let (engine, mut observer) = observed::observe(engine)?;
    streams::close_again();
    match command.run(Box::new(engine)) {
        Ok(outcome) => {
            if let Some(warning) =
                missing_calls(&outcome.missing).filter(|_| !args.quiet && trace.is_none())
            {
                observer.say(&warning);
            }
            if args.stats {
                let summary = observer.counts().summary(placement, started.elapsed());
                observer.say(&summary);
            }
            if let Some(trace) = trace {
                trace.finish(outcome.end);
            }
            outcome.end.leave()
        }
        Err(error) => {
            observer.say(&output::one_line(&output::with_remedy(&error)));
            Ok(ExitCode::from(error.exit_code()))
        }
    }
}

fn command(args: &RunArgs) -> Command {
    // Clap has made sure that there is at least one word.
    let (program, arguments) = args.command.split_first().map_or_else(
        || (OsStr::new(""), [].as_slice()),
        |(program, rest)| (program.as_os_str(), rest),
    );
    let mut command = Command::new(program).args(arguments);
    if args.clear_env {
        command = command.env_clear();
    } else {
        // For Dune itself, not for the program.
        command = command.env_remove(probe::PLACEMENT_VARIABLE);
    }
    for (name, value) in &args.env {
        command = command.env(name, value);
    }
    if let Some(directory) = &args.cwd {
        command = command.current_dir(directory);
    }
    command
}

/// The warning about system calls that the sandbox does not have.
fn missing_calls(missing: &[MissingCall]) -> Option<String> {
    if missing.is_empty() {
        return None;
    }
    let list: Vec<String> = missing
        .iter()
        .map(|call| {
            let name = call
                .name
                .map_or_else(|| format!("number {}", call.nr), str::to_owned);
            format!("{name} ({}x)", call.count)
        })
        .collect();
    Some(format!(
        "the program asked for system calls that the sandbox does not have: {}",
        list.join(", ")
    ))
}

/// The same command again, inside of the lab, where KVM runs ring 0.
fn in_lab(args: &RunArgs, trace: Option<&TraceOptions>) -> anyhow::Result<ExitCode> {
    /// The lab's options as its own command line has them.
    #[derive(Parser)]
    struct Lab {
        #[command(flatten)]
        lab: dune_lab::LabArgs,
    }
    let dune = std::env::current_exe().context("cannot find this program's own file")?;
    let mut words: Vec<OsString> = vec!["dune".into(), "--".into(), dune.into_os_string()];
    words.extend(arguments_in_lab(args, trace));
    let mut lab = Lab::try_parse_from(words)
        .context("the lab's own command line")?
        .lab;
    // Starting the lab takes time, too, which is not the program's.
    lab.timeout = args.timeout;
    if !args.quiet {
        eprintln!(
            "dune: running in the lab (`dune check` says why); files that the program writes are \
             discarded"
        );
    }
    Ok(crate::lab(&lab))
}

/// The arguments of `dune` in the lab for what was asked for here.
fn arguments_in_lab(args: &RunArgs, trace: Option<&TraceOptions>) -> Vec<OsString> {
    let mut words = match trace {
        None => vec!["run".into()],
        Some(trace) => trace.words(),
    };
    words.push("--placement=auto".into());
    for (name, value) in &args.env {
        let mut variable = name.clone();
        variable.push("=");
        variable.push(value);
        words.extend(["--env".into(), variable]);
    }
    if args.clear_env {
        words.push("--clear-env".into());
    }
    if let Some(directory) = &args.cwd {
        words.extend(["--cwd".into(), directory.clone().into_os_string()]);
    }
    if args.quiet {
        words.push("--quiet".into());
    }
    if args.stats {
        words.push("--stats".into());
    }
    words.push("--".into());
    words.extend(args.command.iter().cloned());
    words
}

fn program_name(args: &RunArgs) -> String {
    args.command
        .first()
        .map_or_else(String::new, |word| word.to_string_lossy().into_owned())
}

fn parse_variable(text: &str) -> Result<(OsString, OsString), String> {
    let bytes = OsStr::new(text).as_bytes();
    match bytes.iter().position(|&byte| byte == b'=') {
        None | Some(0) => Err("give NAME=VALUE".to_owned()),
        Some(at) => {
            let (name, value) = (&bytes[..at], &bytes[at + 1..]);
            Ok((
                OsStr::from_bytes(name).to_owned(),
                OsStr::from_bytes(value).to_owned(),
            ))
        }
    }
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    text.parse::<f64>()
        .ok()
        .filter(|seconds| *seconds > 0.0)
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "give a number of seconds above 0".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        run: RunArgs,
    }

    fn parse(words: &[&str]) -> RunArgs {
        Cli::try_parse_from(std::iter::once("run").chain(words.iter().copied()))
            .unwrap()
            .run
    }

    #[test]
    fn options_after_the_program_are_the_programs() {
        let args = parse(&["--stats", "ls", "--stats", "-l"]);
        assert_eq!(args.command, ["ls", "--stats", "-l"]);
        let args = parse(&["--", "ls", "--quiet"]);
        assert!(!args.quiet);
        assert_eq!(args.command, ["ls", "--quiet"]);
    }

    #[test]
    fn variables_are_split_at_the_first_sign() {
        assert_eq!(parse_variable("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(parse_variable("A="), Ok(("A".into(), "".into())));
        assert!(parse_variable("A").is_err());
        assert!(parse_variable("=b").is_err());
    }

    #[test]
    fn the_command_is_the_same_in_the_lab() {
        let args = parse(&[
            "--env", "A=b c", "--cwd", "/tmp", "--quiet", "--", "ls", "--env",
        ]);
        let words = arguments_in_lab(&args, None);
        let expected = [
            "run",
            "--placement=auto",
            "--env",
            "A=b c",
            "--cwd",
            "/tmp",
            "--quiet",
            "--",
            "ls",
            "--env",
        ];
        assert_eq!(words, expected);
    }

    #[test]
    fn missing_calls_are_named_and_counted() {
        assert_eq!(missing_calls(&[]), None);
        let calls = [
            MissingCall {
                nr: 56,
                name: Some("clone"),
                count: 2,
            },
            MissingCall {
                nr: 9999,
                name: None,
                count: 1,
            },
        ];
        let warning = missing_calls(&calls).unwrap_or_default();
        assert!(
            warning.ends_with("clone (2x), number 9999 (1x)"),
            "{warning}"
        );
    }

    #[test]
    fn a_time_limit_is_a_positive_number() {
        assert_eq!(parse_seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "-1", "x", "inf", "1e300"] {
            assert!(parse_seconds(text).is_err(), "{text}");
        }
    }
}
