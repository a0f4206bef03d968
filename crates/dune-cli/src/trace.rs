//! `dune trace -- CMD`: what a program asks the kernel for.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context;
use clap::Args;
use dune_sandbox::End;
use dune_sandbox::host::move_fd_high;
use dune_sandbox::trace::{
    CallEvent, Counting, Filter, Options, Outcome, SignalEvent, Sink, Tracer, line_of, table_of,
};
use serde::Serialize;

use crate::run::{self, RunArgs};

/// Run a program in the sandbox and print every system call it makes.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TraceArgs {
    #[command(flatten)]
    trace: TraceOptions,

    #[command(flatten)]
    run: RunArgs,
}

/// What is printed, and where.
#[derive(Debug, Args)]
#[command(next_help_heading = "Trace")]
pub(crate) struct TraceOptions {
    /// Only these calls: names and classes between commas (%file, %desc,
    /// %memory, %network, %process, %signal), all but these after a '!'. Can
    /// be repeated.
    #[arg(short = 'e', long = "calls", value_name = "WHICH", value_parser = Filter::parse,
          allow_hyphen_values = true)]
    calls: Vec<Filter>,

    /// Print no calls, but at the end how often each was made, how long it
    /// took and how often it failed.
    #[arg(short = 'c', long)]
    summary: bool,

    /// Print the calls, and the summary too.
    #[arg(short = 'C', long, conflicts_with = "summary")]
    summary_too: bool,

    /// Say how long each call took, in seconds.
    #[arg(short = 'T', long)]
    times: bool,

    /// Say which thread made each call, even while there is only one. (Threads
    /// and children are always followed.)
    #[arg(short = 'f', long)]
    threads: bool,

    /// Print at most so many bytes of a string.
    #[arg(short = 's', long, value_name = "BYTES", default_value_t = 32)]
    string_limit: usize,

    /// Print each call as one line of JSON.
    #[arg(long = "json-lines", alias = "jsonl")]
    json_lines: bool,

    /// Write to this file, not to standard error.
    #[arg(short = 'o', long, value_name = "FILE")]
    output: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  dune trace -- ls /
  dune trace -e %file -- python3 -c pass      # only calls with paths
  dune trace -e '!mmap,mprotect' -T -- true   # all but these, with times
  dune trace -c -- make                       # a summary
  dune trace --json-lines -o calls.jsonl -- CMD";

/// Runs the program and ends as it did.
///
/// # Errors
///
/// What keeps Dune from running it, with the remedy.
pub(crate) fn trace(args: &TraceArgs) -> anyhow::Result<ExitCode> {
    run::run_traced(&args.run, Some(&args.trace))
}

impl TraceOptions {
    /// The same options as words, after the name of the task: for the lab.
    pub(crate) fn words(&self) -> Vec<OsString> {
        // The expressions are read into sets, so they are taken as they came.
        let mut words: Vec<OsString> = vec!["trace".into()];
        let mut given = std::env::args_os().skip(2);
        while let Some(word) = given.next() {
            let text = word.to_string_lossy();
            if text == "--" {
                break;
            }
            if text == "-e" || text == "--calls" {
                words.extend([word, given.next().unwrap_or_default()]);
            } else if text.starts_with("-e") || text.starts_with("--calls=") {
                words.push(word);
            }
        }
        for (is_given, word) in [
            (self.summary, "-c"),
            (self.summary_too, "-C"),
            (self.times, "-T"),
            (self.threads, "-f"),
            (self.json_lines, "--json-lines"),
        ] {
            if is_given {
                words.push(word.into());
            }
        }
        words.push(format!("--string-limit={}", self.string_limit).into());
        if let Some(file) = &self.output {
            words.extend(["-o".into(), file.clone().into_os_string()]);
        }
        words
    }

    fn filter(&self) -> Filter {
        let mut filters = self.calls.iter();
        match filters.next() {
            None => Filter::all(),
            Some(first) => filters.fold(first.clone(), Filter::or),
        }
    }
}

/// A trace that is being written.
pub(crate) struct Trace {
    tracer: Arc<Tracer>,
    output: Arc<Output>,
    is_summarized: bool,
    prints_end: bool,
}

impl Trace {
    /// Opens the output.
    ///
    /// # Errors
    ///
    /// If it cannot be opened, or there is no memory for the counters.
    pub(crate) fn start(options: &TraceOptions) -> anyhow::Result<Self> {
        let output = Arc::new(Output::open(options)?);
        let sink = (!options.summary).then(|| -> Arc<dyn Sink> { Arc::clone(&output) as _ });
        let is_summarized = options.summary || options.summary_too;
        let counting = if is_summarized {
            Counting::On
        } else {
            Counting::Off
        };
        let tracer = Tracer::new(Options {
            filter: options.filter(),
            text_limit: options.string_limit,
            sink,
            counting,
        })
        .context("no memory for the summary")?;
        Ok(Self {
            tracer: Arc::new(tracer),
            output,
            is_summarized,
            prints_end: !options.summary && !options.json_lines,
        })
    }

    /// What the program is to be run with.
    pub(crate) fn tracer(&self) -> Arc<Tracer> {
        Arc::clone(&self.tracer)
    }

    /// Writes what is to be said at the end.
    pub(crate) fn finish(&self, end: End) {
        if self.prints_end {
            self.output.say(&match end {
                End::Exit(status) => format!("+++ exited with {status} +++"),
                End::Killed(signal) => format!("+++ killed by signal {signal} +++"),
            });
        }
        if self.is_summarized {
            self.output.say(table_of(&self.tracer.counts()).trim_end());
        }
    }
}

/// How an event is written.
#[derive(Clone, Copy, Debug)]
enum Format {
    Text { times: bool, threads: bool },
    Json,
}

/// Where events go: one write for each.
struct Output {
    file: File,
    format: Format,
    /// The first thread that was seen.
    first: AtomicU32,
}

impl Output {
    fn open(options: &TraceOptions) -> anyhow::Result<Self> {
        let fd: OwnedFd = match &options.output {
            // Children write to it, too.
            Some(path) => OpenOptions::new()
                .append(true)
                .create(true)
                .custom_flags(libc::O_TRUNC)
                .open(path)
                .with_context(|| format!("cannot write the trace to {}", path.display()))?
                .into(),
            None => io::stderr()
                .as_fd()
                .try_clone_to_owned()
                .context("cannot duplicate standard error; raise `ulimit -n`")?,
        };
        let file = move_fd_high(fd).context("no descriptor for the trace; raise `ulimit -n`")?;
        let format = if options.json_lines {
            Format::Json
        } else {
            Format::Text {
                times: options.times,
                threads: options.threads,
            }
        };
        Ok(Self {
            file: file.into(),
            format,
            first: AtomicU32::new(0),
        })
    }

    fn say(&self, line: &str) {
        // There is nobody to tell that it cannot be written.
        let _ = (&self.file).write_all(format!("{line}\n").as_bytes());
    }

    /// `[pid 17] `, unless the first thread is the only one so far.
    fn prefix(&self, thread: u32, always: bool) -> String {
        let first = self
            .first
            .compare_exchange(0, thread, Ordering::Relaxed, Ordering::Relaxed)
            .unwrap_or_else(|first| first);
        if always || (first != 0 && first != thread) {
            format!("[pid {thread}] ")
        } else {
            String::new()
        }
    }
}

/// A call as programs read it.
#[derive(Serialize)]
struct JsonCall<'a> {
    thread: u32,
    /// Seconds since 1970.
    time: f64,
    call: &'a str,
    number: u32,
    arguments: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    errno: Option<String>,
    /// What came of it, for people.
    outcome: String,
    /// In nanoseconds.
    took_ns: u64,
}

#[derive(Serialize)]
struct JsonSignal<'a> {
    thread: u32,
    signal: &'a str,
    info: &'a str,
}

impl Sink for Output {
    fn call(&self, event: &CallEvent<'_>) {
        match self.format {
            Format::Text { times, threads } => {
                let mut line = self.prefix(event.thread, threads);
                line.push_str(&line_of(event));
                if times && event.outcome != Outcome::Gone {
                    line.push_str(&format!(" <{:.6}>", event.took.as_secs_f64()));
                }
                self.say(&line);
            }
            Format::Json => self.say_json(&JsonCall::of(event)),
        }
    }

    fn signal(&self, event: &SignalEvent<'_>) {
        match self.format {
            Format::Text { threads, .. } => {
                let prefix = self.prefix(event.thread, threads);
                self.say(&format!("{prefix}--- {} {} ---", event.name, event.info));
            }
            Format::Json => self.say_json(&JsonSignal {
                thread: event.thread,
                signal: event.name,
                info: event.info,
            }),
        }
    }

    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.file.as_raw_fd()]
    }
}

impl Output {
    fn say_json(&self, value: &impl Serialize) {
        // Strings and numbers: nothing that could not be written.
        if let Ok(line) = serde_json::to_string(value) {
            self.say(&line);
        }
    }
}

impl<'a> JsonCall<'a> {
    fn of(event: &CallEvent<'a>) -> Self {
        let (result, errno) = match event.outcome {
            Outcome::Value(value) | Outcome::Address(value) => (Some(value as i64), None),
            Outcome::Failed(errno) => (Some(-1), Some(format!("{errno:?}"))),
            Outcome::Interrupted | Outcome::Gone => (None, None),
        };
        let since = event.began.duration_since(UNIX_EPOCH);
        Self {
            thread: event.thread,
            time: since.unwrap_or(Duration::ZERO).as_secs_f64(),
            call: event.name,
            number: event.number,
            arguments: event.args,
            result,
            errno,
            outcome: event.outcome.to_string(),
            took_ns: u64::try_from(event.took.as_nanos()).unwrap_or(u64::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        trace: TraceArgs,
    }

    fn parse(words: &[&str]) -> Result<TraceOptions, clap::Error> {
        Cli::try_parse_from(std::iter::once("trace").chain(words.iter().copied()))
            .map(|cli| cli.trace.trace)
    }

    #[test]
    fn filters_add_up_and_errors_name_what_is_wrong() {
        let options = parse(&["-e", "read", "-e", "%network", "--", "ls", "-e"]).unwrap();
        let filter = options.filter();
        assert!(filter.wants(0) && filter.wants(41) && !filter.wants(1));
        assert!(parse(&["--", "ls"]).unwrap().filter().wants(1));
        let error = parse(&["-e", "raed", "--", "ls"]).unwrap_err().to_string();
        assert!(error.contains("raed"), "{error}");
    }
}
