//! `dune snap`: a program is run to a marker once, and from there on again and
//! again.
//!
//! ```text
//!   start ---- marker ---- a run ---- end
//!                 ^                    |
//!                 +---- restore -------+
//! ```
//!
//! | file | what asks for the runs |
//! |---|---|
//! | [`lines`] | a line of standard input for each |
//! | [`afl`] | a fuzzer, by AFL's fork server protocol |
//! | [`saved`] | nobody: the program goes to a file, or comes from one |
//!
//! What a snapshot is, and what it does not hold: [`dune_sandbox::snapshot`].

mod afl;
mod descriptors;
mod in_hand;
mod lines;
mod saved;
mod stand_in;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::Args;
use dune_kvm::probe::Placement;
use dune_sandbox::snapshot::Marker;

use crate::policy::{self, PolicyArgs};
use crate::run::{self, Where};
use crate::{observed, output, streams, watchdog};

/// Run a program to a marker once, and from there again and again.
///
/// What the program does before the marker, it does once. At the marker its
/// state is kept: memory, registers, descriptors. Each run goes on from there
/// and ends with the program's end; then all of it is put back. That costs a
/// copy of each page that the run wrote, and no new process.
#[derive(Debug, Args)]
#[command(
    after_help = EXAMPLES,
    mut_arg("timeout", |arg| arg.help(
        "End a run after this time, and go on with the next: 10, 500ms, 2m"
    )),
)]
pub(crate) struct SnapArgs {
    /// Where the program is when it is kept: `stdin`, just before it first
    /// reads standard input; `symbol:NAME`, at a function of its own file;
    /// `fork`, at its first fork, in the child's place; `call`, at
    /// prctl(0x64756e65) [default: stdin; with --afl: fork].
    #[arg(long, value_name = "WHERE", value_parser = parse_marker)]
    at: Option<Marker>,

    /// One run for each line of standard input, which is the run's whole
    /// standard input.
    #[arg(long, required_unless_present_any = ["afl", "save", "resume"],
          conflicts_with_all = ["afl", "save"])]
    each_line: bool,

    /// Serve a fuzzer: AFL's fork server protocol on descriptors 198 and 199.
    #[arg(long, conflicts_with_all = ["timeout", "save", "resume"])]
    afl: bool,

    /// Run the program to the marker, save it there in this file, and end it.
    /// It is started with standard input, output and error alone.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["timeout", "resume"])]
    save: Option<PathBuf>,

    /// Go on with a program that was saved, on the same kind of CPU and under
    /// the same kernel; with --each-line, again and again.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["at", "cwd"])]
    resume: Option<PathBuf>,

    /// Where the code that guards the program runs [default: $DUNE_PLACEMENT,
    /// or the best that this machine has].
    #[arg(long, value_name = "WHERE")]
    placement: Option<Where>,

    #[command(flatten)]
    policy: PolicyArgs,

    /// Start the program in this folder.
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,

    /// Say nothing of runs that failed.
    #[arg(long, short)]
    quiet: bool,

    /// Print on standard error how each run ended, as a line of JSON (with
    /// --resume alone: how the program ended); implies --quiet.
    #[arg(long, conflicts_with = "afl")]
    json: bool,

    /// At the end, say how many runs there were and what they took.
    #[arg(long)]
    stats: bool,

    /// The program and its arguments.
    #[arg(
        required_unless_present = "resume",
        conflicts_with = "resume",
        trailing_var_arg = true,
        value_name = "COMMAND"
    )]
    command: Vec<OsString>,
}

const EXAMPLES: &str = "\
Exit code: 0 if every run ended with 0, 123 if any did not (as xargs does), 125
if Dune failed or the program ended before it reached the marker, 126 and 127 as
in a shell. With --afl: 0 when the fuzzer has gone. With --resume alone: the
program's own.

What was printed before the marker and still waits in the program's own buffer
is printed by each run.

Examples:
  printf '%s\\n' 1+1 2^10 | dune snap --each-line -- bc
  dune snap --each-line --timeout 1s --json -- python3 -c 'import sys, json
  print(json.loads(sys.stdin.read()))' <lines
  dune snap --each-line --at symbol:parse -- ./parser <lines
  dune snap --save ready.snap -- ./server-with-a-long-start
  dune snap --resume ready.snap
  dune snap --resume ready.snap --each-line <lines
  afl-fuzz -i in -o out -- dune snap --afl -- ./target @@

A target for --afl is compiled with afl-cc, and served from its fork server on;
__AFL_INIT() says where that is. With --at, another marker takes its place.";

fn parse_marker(text: &str) -> Result<Marker, String> {
    match text.split_once(':') {
        Some(("symbol", name)) if !name.is_empty() => Ok(Marker::Symbol(name.to_owned())),
        None if text == "stdin" => Ok(Marker::ReadStdin),
        None if text == "call" => Ok(Marker::Call),
        None if text == "fork" => Ok(Marker::Fork),
        _ => Err("give stdin, call, fork or symbol:NAME".to_owned()),
    }
}

fn marker_text(marker: &Marker) -> String {
    match marker {
        Marker::ReadStdin => "stdin".to_owned(),
        Marker::Call => "call".to_owned(),
        Marker::Fork | Marker::ForkedClosing(_) => "fork".to_owned(),
        Marker::Symbol(name) => format!("symbol:{name}"),
    }
}

impl SnapArgs {
    fn marker(&self) -> Marker {
        let default = if self.afl {
            Marker::Fork
        } else {
            Marker::ReadStdin
        };
        self.at.clone().unwrap_or(default)
    }

    fn is_quiet(&self) -> bool {
        self.quiet || self.json
    }

    /// The arguments of `dune` in the lab for what was asked for here.
    fn words(&self) -> anyhow::Result<Vec<OsString>> {
        let mut words: Vec<OsString> = vec!["snap".into(), "--placement=auto".into()];
        if self.resume.is_none() {
            words.extend(["--at".into(), marker_text(&self.marker()).into()]);
        }
        words.extend(self.policy.words());
        if let Some(limit) = self.policy.policy()?.limits().timeout {
            words.extend(["--timeout".into(), limit.as_secs_f64().to_string().into()]);
        }
        if let Some(directory) = &self.cwd {
            words.extend(["--cwd".into(), directory.clone().into_os_string()]);
        }
        let flags = [
            (self.each_line, "--each-line"),
            (self.quiet, "--quiet"),
            (self.json, "--json"),
            (self.stats, "--stats"),
        ];
        for (option, file) in [("--save", &self.save), ("--resume", &self.resume)] {
            if let Some(file) = file {
                words.extend([option.into(), std::path::absolute(file)?.into_os_string()]);
            }
        }
        let set = flags.iter().filter(|(set, _)| *set);
        words.extend(set.map(|(_, flag)| OsString::from(flag)));
        if self.resume.is_none() {
            words.push("--".into());
            words.extend(self.command.iter().cloned());
        }
        Ok(words)
    }
}

/// Runs the program, and ends with what came of its runs.
///
/// # Errors
///
/// What keeps Dune from running it, with the remedy.
pub(crate) fn snap(args: &SnapArgs) -> anyhow::Result<ExitCode> {
    let placement = run::choose(args.placement)?;
    if placement == Placement::Lab {
        if args.afl {
            bail!(
                "a fuzzer out here cannot reach a target in the lab; run the fuzzer there: dune \
                 lab -- afl-fuzz ... (`dune check` says why it has to be the lab)"
            );
        }
        let folders = args.save.iter().map(|file| run::folder_of(file));
        let folders = folders.collect();
        return run::again_in_lab(args.words()?, None, args.is_quiet(), folders);
    }
    let policy = args.policy.policy()?;
    if let Some(warning) = policy::warning(&policy).filter(|_| !args.is_quiet()) {
        output::complain(&warning);
    }
    let limit = policy.limits().timeout;
    if let Some(path) = &args.resume {
        let command = saved::saved(path)?
            .policy(policy)
            .second_wall(args.policy.second_wall());
        return if args.each_line {
            lines::serve(args, command, placement, limit)
        } else {
            if let Some(limit) = limit {
                watchdog::start(limit, path.display().to_string(), args.json)?;
            }
            saved::go_on(command, placement, args.json)
        };
    }
    let command = run::command(&args.command, &args.policy, policy, args.cwd.as_deref());
    if args.afl {
        afl::serve(args, command, placement)
    } else if let Some(path) = &args.save {
        saved::save(args, path, command, placement)
    } else {
        lines::serve(args, command, placement, limit)
    }
}

/// What is said of a program that never got where it should be kept.
fn not_reached(place: &str) -> String {
    format!(
        "the program ended before it reached the marker; choose another one with --at (now: \
         {place})"
    )
}

/// Runs the program to the end of its last run.
fn finish(
    command: dune_sandbox::Command,
    placement: Placement,
) -> anyhow::Result<(
    observed::Observer,
    Result<dune_sandbox::Outcome, dune_sandbox::RunError>,
)> {
    let engine = run::engine(placement)?;
    let (command, engine, observer) = observed::observe(command, engine, false)?;
    streams::close_again();
    let outcome = command.run(engine);
    watchdog::let_end();
    Ok((observer, outcome))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        snap: SnapArgs,
    }

    fn parse(words: &[&str]) -> Result<SnapArgs, clap::Error> {
        Cli::try_parse_from(std::iter::once("snap").chain(words.iter().copied()))
            .map(|cli| cli.snap)
    }

    #[test]
    fn markers_are_read_and_written() {
        for text in ["stdin", "call", "fork", "symbol:main", "symbol:a:b"] {
            assert_eq!(marker_text(&parse_marker(text).unwrap()), text);
        }
        for text in ["", "symbol:", "symbol", "stdout", "stdin:0"] {
            assert!(parse_marker(text).is_err(), "{text}");
        }
    }

    #[test]
    fn somebody_must_ask_for_the_runs() {
        assert!(parse(&["--", "cat"]).is_err());
        assert!(parse(&["--afl", "--each-line", "--", "cat"]).is_err());
        assert!(parse(&["--afl", "--timeout", "1", "--", "cat"]).is_err());
        let default = |words| parse(words).unwrap().marker();
        assert_eq!(default(&["--afl", "--", "cat"]), Marker::Fork);
        assert_eq!(default(&["--each-line", "--", "cat"]), Marker::ReadStdin);
    }

    #[test]
    fn the_command_is_the_same_in_the_lab() {
        let args = parse(&[
            "--each-line",
            "--at",
            "symbol:f",
            "--timeout",
            "500ms",
            "--json",
            "--",
            "cat",
            "--json",
        ]);
        let words = args.unwrap().words().unwrap();
        let expected = [
            "snap",
            "--placement=auto",
            "--at",
            "symbol:f",
            "--timeout",
            "0.5",
            "--each-line",
            "--json",
            "--",
            "cat",
            "--json",
        ];
        assert_eq!(words, expected);
    }
}
