//! `dune run`: a program in the sandbox, by the engine that fits the machine.
//!
//! ```text
//!   hardware KVM   in guest   engine::in_guest
//!   weak KVM       on host    engine::on_host
//!   no KVM         in lab     this same command again, inside of the lab
//! ```

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, Parser, ValueEnum};
use dune_kvm::probe::{self, Kvm, Placement, PlacementRequest, ProbeError};
use dune_sandbox::debug::{Address, Debugger};
use dune_sandbox::engine::Engine;
use dune_sandbox::engine::in_guest::InGuest;
use dune_sandbox::engine::on_host::OnHost;
use dune_sandbox::{Command, End, MissingCall, Outcome, Policy};

use crate::policy::{self, PolicyArgs};
use crate::trace::{Trace, TraceOptions};
use crate::{observed, output, report, streams, watchdog};

/// Run a program in the sandbox: unmodified, in ring 3 of a virtual CPU.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct RunArgs {
    /// Where the code that guards the program runs [default: $DUNE_PLACEMENT,
    /// or the best that this machine has].
    #[arg(long, value_name = "WHERE")]
    placement: Option<Where>,

    #[command(flatten)]
    policy: PolicyArgs,

    /// Start the program in this folder.
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,

    /// Say nothing but errors: no warning about missing system calls.
    #[arg(long, short)]
    quiet: bool,

    /// At the end, print on standard error how the program ended, as one line
    /// of JSON; implies --quiet.
    #[arg(long)]
    json: bool,

    /// If the program dies of a signal, say where: the address, the registers
    /// and the functions that were being executed.
    #[arg(long)]
    backtrace: bool,

    /// Stop the program at its first instruction until gdb attaches, at a PORT
    /// of this machine (0: any), an ADDRESS:PORT or unix:PATH. Watchpoints need
    /// `set can-use-hw-watchpoints 0` in gdb.
    #[arg(long, value_name = "WHERE")]
    gdb: Option<Address>,

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
  dune run --strict --ro /etc/hostname -- cat /etc/hostname
  dune run --strict --explain -- ls /etc            # what would it take?
  dune run --rw . --net none --mem 1G --timeout 5m -- make
  dune run --policy build.toml -- make
  dune run --clear-env --env PATH=/bin -- env
  dune run --placement lab -- uname -r
  dune run --gdb 1234 -- ./program                  # and in another terminal:
    gdb -ex 'set sysroot /' -ex 'target remote :1234' ./program";

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Where {
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

impl RunArgs {
    fn is_quiet(&self) -> bool {
        self.quiet || self.json
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
    match choose(args.placement)? {
        Placement::Lab => in_lab(args, trace),
        placement @ (Placement::InGuest | Placement::OnHost) => here(args, placement, trace),
    }
}

/// Where the program is to run.
///
/// # Errors
///
/// If this machine has no such place, or it could not be found out.
pub(crate) fn choose(asked: Option<Where>) -> anyhow::Result<Placement> {
    let placement = match asked {
        None => probe::placement()?,
        Some(Where::Lab) => Placement::Lab,
        Some(place) => probe::probe().choose(place.into())?,
    };
    if placement == Placement::Lab && !is_asked_for_the_lab(asked) {
        check_limits()?;
    }
    Ok(placement)
}

fn is_asked_for_the_lab(asked: Option<Where>) -> bool {
    let lab = PlacementRequest::Only(Placement::Lab);
    match asked {
        Some(place) => PlacementRequest::from(place) == lab,
        None => probe::request_from_environment() == Ok(lab),
    }
}

/// The engine of a placement that is here.
///
/// # Errors
///
/// If KVM refuses it.
pub(crate) fn engine(placement: Placement) -> anyhow::Result<Box<dyn Engine>> {
    Ok(match placement {
        Placement::OnHost => Box::new(OnHost::new()?),
        Placement::InGuest | Placement::Lab => Box::new(InGuest::new()?),
    })
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
    let policy = args.policy.policy()?;
    if let Some(warning) = policy::warning(&policy).filter(|_| !args.is_quiet()) {
        output::complain(&warning);
    }
    if let Some(limit) = policy.limits().timeout {
        watchdog::start(limit, program_name(args), args.json)?;
    }
    let mut command = command(&args.command, &args.policy, policy, args.cwd.as_deref());
    if let Some(address) = &args.gdb {
        // Before the engine, so that its thread stays outside.
        command = command.debugger(wait_for_gdb(args, address)?);
    }
    let trace = trace.map(Trace::start).transpose()?;
    if let Some(trace) = &trace {
        command = command.tracer(trace.tracer());
    }
    let engine = engine(placement)?;
    let counting = args.stats || args.json;
    let (mut command, engine, mut observer) = observed::observe(command, engine, counting)?;
    if args.policy.explain {
        command = command.explain_to(observer.another()?);
    }
    if args.backtrace {
        command = command.crash_report_to(observer.another()?);
    }
    streams::close_again();
    let ended = command.run(engine);
    watchdog::let_end();
    match ended {
        Ok(outcome) => {
            if !args.is_quiet() && trace.is_none() {
                let warnings = [missing_calls(&outcome.missing), refusals(args, &outcome)];
                for warning in warnings.into_iter().flatten() {
                    observer.say(&warning);
                }
            }
            let elapsed = started.elapsed();
            if args.stats {
                let summary = observer.counts().summary(placement, elapsed);
                observer.say(&summary);
            }
            if args.json {
                let line = report::line(&outcome, observer.counts(), placement, elapsed)?;
                observer.say_plainly(&line);
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

/// Waits for gdb, and says how to attach.
fn wait_for_gdb(args: &RunArgs, address: &Address) -> anyhow::Result<Debugger> {
    let debugger = Debugger::listen(address)?;
    if !args.is_quiet() {
        let address = debugger.address();
        if let Address::Tcp(socket) = address
            && !socket.ip().is_loopback()
        {
            output::complain(&format!(
                "whoever reaches {socket} can do with the program what you can; \
                 choose a loopback address or unix:PATH"
            ));
        }
        output::complain(&format!(
            "waiting for gdb; attach by: gdb -ex 'set sysroot /' -ex 'target remote {address}' {}",
            program_name(args)
        ));
    }
    Ok(debugger)
}

/// How many refusals there were, for those who did not ask to see each and may
/// want to know why the program failed.
fn refusals(args: &RunArgs, outcome: &Outcome) -> Option<String> {
    let times = match outcome.refusals {
        0 => return None,
        1 => "once".to_owned(),
        count => format!("{count} times"),
    };
    // A program that got where it wanted had no use for what it was refused.
    let matters = !args.policy.explain && outcome.end != End::Exit(0);
    matters.then(|| {
        format!("the policy refused what the program asked for {times}; --explain says what")
    })
}

/// The program that `words` name, held by `policy`.
pub(crate) fn command(
    words: &[OsString],
    options: &PolicyArgs,
    policy: Policy,
    directory: Option<&Path>,
) -> Command {
    // Clap has made sure that there is at least one word.
    let (program, arguments) = words.split_first().map_or_else(
        || (OsStr::new(""), [].as_slice()),
        |(program, rest)| (program.as_os_str(), rest),
    );
    let mut command = Command::new(program)
        .args(arguments)
        // For Dune itself, not for the program.
        .env_remove(probe::PLACEMENT_VARIABLE)
        .policy(policy)
        .second_wall(options.second_wall());
    if let Some(directory) = directory {
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
    if args.gdb.is_some() {
        bail!(
            "--gdb cannot reach into the lab, which has no network; it needs a KVM on this \
             machine (`dune check` says what there is)"
        );
    }
    // Starting the lab takes time, too, which is not the program's.
    let timeout = args.policy.policy()?.limits().timeout;
    again_in_lab(
        arguments_in_lab(args, trace),
        timeout,
        args.is_quiet(),
        Vec::new(),
    )
}

/// This command with these arguments, inside of the lab, where files that are
/// written in `folders` stay.
///
/// # Errors
///
/// If it cannot be found.
pub(crate) fn again_in_lab(
    arguments: Vec<OsString>,
    timeout: Option<Duration>,
    is_quiet: bool,
    folders: Vec<PathBuf>,
) -> anyhow::Result<ExitCode> {
    /// The lab's options as its own command line has them.
    #[derive(Parser)]
    struct Lab {
        #[command(flatten)]
        lab: dune_lab::LabArgs,
    }
    let dune = std::env::current_exe().context("cannot find this program's own file")?;
    let mut words: Vec<OsString> = vec!["dune".into(), "--".into(), dune.into_os_string()];
    words.extend(arguments);
    let mut lab = Lab::try_parse_from(words)
        .context("the lab's own command line")?
        .lab;
    lab.timeout = timeout;
    lab.share = folders;
    if !is_quiet {
        eprintln!(
            "dune: running in the lab (`dune check` says why); files that the program writes are \
             discarded"
        );
    }
    Ok(crate::lab(&lab))
}

/// The folder that a file is in.
pub(crate) fn folder_of(file: &Path) -> PathBuf {
    let folder = file.parent().unwrap_or(Path::new("."));
    if folder.as_os_str().is_empty() {
        PathBuf::from(".")
    } else {
        folder.to_owned()
    }
}

/// The arguments of `dune` in the lab for what was asked for here.
fn arguments_in_lab(args: &RunArgs, trace: Option<&TraceOptions>) -> Vec<OsString> {
    let mut words = match trace {
        None => vec!["run".into()],
        Some(trace) => trace.words(),
    };
    words.push("--placement=auto".into());
    words.extend(args.policy.words());
    if let Some(directory) = &args.cwd {
        words.extend(["--cwd".into(), directory.clone().into_os_string()]);
    }
    if args.quiet {
        words.push("--quiet".into());
    }
    if args.stats {
        words.push("--stats".into());
    }
    if args.json {
        words.push("--json".into());
    }
    if args.backtrace {
        words.push("--backtrace".into());
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
}
