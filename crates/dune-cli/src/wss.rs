//! `dune wss -- CMD`: which memory a program uses, over time.

mod figure;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use dune_kvm::probe::Placement;
use dune_sandbox::host::move_fd_high;
use dune_sandbox::policy::limits::parse_duration;
use dune_sandbox::working_set::{Sample, Sampler};
use serde::Serialize;

use crate::policy::PolicyArgs;
use crate::run::{self, Where};
use crate::{observed, output, streams};

/// Run a program in the sandbox and say which memory it uses, over time.
///
/// At an interval, the accessed bits of the program's page table entries are
/// read and cleared: a page counts if the program has used it since the last
/// time. What the kernel does for the program's calls does not count, nor do
/// child processes.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct WssArgs {
    /// How often to look: 50ms, 1s.
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = parse_interval)]
    interval: Duration,

    /// Print each sample as a line of JSON, in bytes.
    #[arg(long)]
    json: bool,

    /// Draw the samples as an SVG figure.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// Write to this file, not to standard error.
    #[arg(short = 'o', long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Where the code that guards the program runs [default: $DUNE_PLACEMENT,
    /// or the best that this machine has].
    #[arg(long, value_name = "WHERE")]
    placement: Option<Where>,

    #[command(flatten)]
    policy: PolicyArgs,

    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

const EXAMPLES: &str = "\
Columns, in KiB: all that was used in the interval; of it code, other pages of
files, heap, stack, other memory, shared memory; of it for the first time; all
that was ever used.

Exit code: the program's own, as for `dune run`.

Examples:
  dune wss -- sort -R /usr/share/dict/words
  dune wss --interval 20ms --svg wss.svg -- python3 -c 'print(sum(range(10**7)))'
  dune wss --json -o wss.jsonl -- make";

fn parse_interval(text: &str) -> Result<Duration, String> {
    const LEAST: Duration = Duration::from_millis(1);
    let interval = parse_duration(text).map_err(|error| error.to_string())?;
    if interval < LEAST {
        return Err("at least 1ms".to_owned());
    }
    Ok(interval)
}

/// A sample, as JSON.
#[derive(Debug, Serialize)]
struct Line {
    seconds: f64,
    used: u64,
    code: u64,
    file: u64,
    heap: u64,
    stack: u64,
    anonymous: u64,
    shared: u64,
    first_used: u64,
    ever_used: u64,
    mapped: u64,
}

fn json(sample: &Sample) -> String {
    let used = &sample.used;
    let line = Line {
        seconds: sample.at.as_secs_f64(),
        used: used.total(),
        code: used.code,
        file: used.file,
        heap: used.heap,
        stack: used.stack,
        anonymous: used.anonymous,
        shared: used.shared,
        first_used: sample.first_used,
        ever_used: sample.ever_used,
        mapped: sample.mapped,
    };
    // Numbers: nothing that could not be written.
    serde_json::to_string(&line).unwrap_or_default()
}

const COLUMNS: [&str; 9] = [
    "used", "code", "file", "heap", "stack", "other", "shared", "first", "ever",
];

fn header() -> String {
    let columns = COLUMNS.map(|column| format!("{column:>9}"));
    format!("{:>9}{}", "seconds", columns.concat())
}

fn row(sample: &Sample) -> String {
    let used = &sample.used;
    let columns = [
        used.total(),
        used.code,
        used.file,
        used.heap,
        used.stack,
        used.anonymous,
        used.shared,
        sample.first_used,
        sample.ever_used,
    ]
    .map(|bytes| format!("{:>9}", bytes / 1024));
    format!("{:>9.3}{}", sample.at.as_secs_f64(), columns.concat())
}

/// Runs the program and ends as it did.
///
/// # Errors
///
/// What keeps Dune from running it, with the remedy; or the figure from being
/// drawn.
pub(crate) fn wss(args: &WssArgs) -> anyhow::Result<ExitCode> {
    let placement = run::choose(args.placement)?;
    if placement == Placement::Lab {
        let files = args.svg.iter().chain(&args.output);
        let folders = files.map(|file| run::folder_of(file)).collect();
        return run::again_in_lab(args.words()?, None, false, folders);
    }
    let policy = args.policy.policy()?;
    let command = run::command(&args.command, &args.policy, policy, None);
    let high = |file: File| {
        let moved =
            move_fd_high(file.into()).context("cannot keep a descriptor; raise `ulimit -n`");
        moved.map(File::from)
    };
    let create = |path: &PathBuf| {
        let created = File::create(path);
        high(created.with_context(|| format!("cannot write {}", path.display()))?)
    };
    let mut file = match &args.output {
        Some(path) => create(path)?,
        None => high(io::stderr().as_fd().try_clone_to_owned()?.into())?,
    };
    // Now: the program's policy may hold this process too.
    let svg = args.svg.as_ref().map(create).transpose()?;
    let hidden: Vec<RawFd> = [Some(&file), svg.as_ref()]
        .into_iter()
        .flatten()
        .map(AsRawFd::as_raw_fd)
        .collect();
    let samples = Arc::<Mutex<Vec<Sample>>>::default();
    let sampler = Sampler::start(args.interval, {
        let (samples, is_json) = (Arc::clone(&samples), args.json);
        move |sample| {
            let mut samples = samples.lock().unwrap_or_else(PoisonError::into_inner);
            let text = match (is_json, samples.is_empty()) {
                (true, _) => format!("{}\n", json(sample)),
                (false, true) => format!("{}\n{}\n", header(), row(sample)),
                (false, false) => format!("{}\n", row(sample)),
            };
            samples.push(*sample);
            // There is nobody to tell that it cannot be written.
            let _ = file.write_all(text.as_bytes());
        }
    })?
    .hiding(hidden);
    let engine = run::engine(placement)?;
    let (command, engine, mut observer) = observed::observe(command, engine, false)?;
    streams::close_again();
    let outcome = command.sample(sampler).run(engine);
    match outcome {
        Ok(outcome) => {
            let samples = samples.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(svg) = svg
                && let Err(error) = figure::draw(&samples, svg)
            {
                observer.say(&output::one_line(&format!("{error:#}")));
            }
            outcome.end.leave()
        }
        Err(error) => {
            observer.say(&output::one_line(&output::with_remedy(&error)));
            Ok(ExitCode::from(error.exit_code()))
        }
    }
}

impl WssArgs {
    /// The arguments of `dune` in the lab for what was asked for here.
    fn words(&self) -> anyhow::Result<Vec<OsString>> {
        let mut words: Vec<OsString> = vec!["wss".into(), "--placement=auto".into()];
        let seconds = self.interval.as_secs_f64().to_string();
        words.extend(["--interval".into(), seconds.into()]);
        if self.json {
            words.push("--json".into());
        }
        for (option, file) in [("--svg", &self.svg), ("--output", &self.output)] {
            if let Some(file) = file {
                words.extend([option.into(), std::path::absolute(file)?.into_os_string()]);
            }
        }
        words.extend(self.policy.words());
        words.push("--".into());
        words.extend(self.command.iter().cloned());
        Ok(words)
    }
}

#[cfg(test)]
mod tests {
    use dune_sandbox::working_set::Bytes;

    use super::*;

    #[test]
    fn columns_stand_under_their_names() {
        let sample = Sample {
            at: Duration::from_millis(1500),
            used: Bytes {
                code: 4096,
                heap: 8192,
                ..Bytes::default()
            },
            first_used: 4096,
            ever_used: 1 << 20,
            mapped: 1 << 30,
        };
        let (header, row) = (header(), row(&sample));
        assert_eq!(header.len(), row.len());
        let words: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(
            words,
            ["1.500", "12", "4", "0", "8", "0", "0", "0", "4", "1024"]
        );
        let value: serde_json::Value = serde_json::from_str(&json(&sample)).unwrap();
        assert_eq!(
            (&value["used"], &value["mapped"]),
            (&12288.into(), &(1 << 30).into())
        );
    }

    #[test]
    fn an_interval_is_no_shorter_than_it_can_be() {
        assert!(parse_interval("1ms").is_ok());
        assert!(parse_interval("0").is_err() && parse_interval("10us").is_err());
    }
}
