//! `dune snap --each-line`: a run for each line of standard input.
//!
//! The program's standard input is a file in memory from the start, which each
//! run finds filled with its line.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use dune_kvm::probe::Placement;
use dune_sandbox::snapshot::{Ending, Event, Next, Service, Stopped};
use dune_sandbox::trace::signal_name;
use dune_sandbox::{Command, End};
use serde::Serialize;

use super::in_hand::{self, InHand};
use super::{SnapArgs, descriptors, finish, marker_text};
use crate::{DUNE_FAILED, output};

/// What `xargs` ends with, too, if a command failed.
const A_RUN_FAILED: u8 = 123;

/// What came of the runs.
#[derive(Debug, Default)]
struct Tally {
    /// The marker was reached.
    began: bool,
    runs: u64,
    failed: u64,
    pages: u64,
    took: Duration,
    /// What stopped it all.
    broken: Option<String>,
}

struct Lines {
    input: BufReader<File>,
    /// The program's standard input.
    line: File,
    report: File,
    text: Vec<u8>,
    tally: Arc<Mutex<Tally>>,
    run: Arc<InHand>,
    limit: Option<Duration>,
    quiet: bool,
    json: bool,
}

/// A run, as JSON.
#[derive(Debug, Serialize)]
struct Line {
    line: u64,
    /// `exit`, `signal` or `timeout`.
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    signal: Option<String>,
    seconds: f64,
}

/// Serves the program until there is no line any more.
///
/// # Errors
///
/// What keeps Dune from running it, with the remedy.
pub(super) fn serve(
    args: &SnapArgs,
    command: Command,
    placement: Placement,
    limit: Option<Duration>,
) -> anyhow::Result<ExitCode> {
    let kept = "cannot keep a descriptor; raise `ulimit -n`";
    let input = BufReader::new(descriptors::aside(io::stdin()).context(kept)?);
    let line = descriptors::memory_file()?;
    descriptors::become_stdin(&line)?;
    let tally = Arc::<Mutex<Tally>>::default();
    let run = Arc::<InHand>::default();
    if let Some(limit) = limit {
        in_hand::limit(&run, limit)?;
    }
    let service = Lines {
        input,
        line,
        report: descriptors::aside(io::stderr()).context(kept)?,
        text: Vec::new(),
        tally: Arc::clone(&tally),
        run,
        limit,
        quiet: args.is_quiet(),
        json: args.json,
    };
    let marker = args.marker();
    let place = marker_text(&marker);
    let (mut observer, outcome) = finish(command.serve(marker, Box::new(service)), placement)?;
    let tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = outcome {
        observer.say(&output::one_line(&output::with_remedy(&error)));
        return Ok(ExitCode::from(error.exit_code()));
    }
    if let Some(problem) = &tally.broken {
        observer.say(&output::one_line(problem));
        return Ok(ExitCode::from(DUNE_FAILED));
    }
    if !tally.began {
        observer.say(&super::not_reached(&place));
        return Ok(ExitCode::from(DUNE_FAILED));
    }
    if args.stats {
        observer.say(&tally.summary(placement));
    }
    Ok(ExitCode::from(if tally.failed == 0 {
        0
    } else {
        A_RUN_FAILED
    }))
}

impl Tally {
    fn summary(&self, placement: Placement) -> String {
        let each = |total: f64| total / self.runs.max(1) as f64;
        format!(
            "placement {}, {} runs, {} of them failed; on average {:.1} pages put back, {:.1} us \
             to the end",
            placement.name(),
            self.runs,
            self.failed,
            each(self.pages as f64),
            each(self.took.as_secs_f64()) * 1e6,
        )
    }
}

impl Service for Lines {
    fn event(&mut self, event: Event, program: &mut Stopped<'_>) -> Next {
        let is_first = program.depth() == 0;
        let ending = match event {
            Event::Marker if !is_first => return Next::Continue,
            Event::Marker => None,
            Event::Ended(Ending::End(end)) if is_first => return Next::Finish(end),
            Event::Ended(Ending::Interrupted) if is_first => return Next::Finish(End::Exit(0)),
            Event::Ended(ending) => Some(ending),
        };
        match self.step(ending, program) {
            Ok(true) => Next::Continue,
            Ok(false) => Next::Finish(End::Exit(0)),
            Err(error) => {
                let chain: Vec<String> = error.chain().map(ToString::to_string).collect();
                let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
                tally.broken = Some(chain.join(": "));
                Next::Finish(End::Exit(DUNE_FAILED))
            }
        }
    }

    fn descriptors(&self) -> Vec<RawFd> {
        vec![
            self.input.get_ref().as_raw_fd(),
            self.line.as_raw_fd(),
            self.report.as_raw_fd(),
        ]
    }
}

impl Lines {
    /// Ends a run, if one has ended, and begins the next. Whether there is one.
    fn step(&mut self, ended: Option<Ending>, program: &mut Stopped<'_>) -> anyhow::Result<bool> {
        match ended {
            Some(ending) => self.note(ending),
            None => {
                program.push()?;
                let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
                tally.began = true;
            }
        }
        self.text.clear();
        let read = self.input.read_until(b'\n', &mut self.text);
        if read.context("cannot read standard input")? == 0 {
            return Ok(false);
        }
        if ended.is_some() {
            let restored = program.restore()?;
            let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
            tally.pages += restored.pages;
        }
        let filled = self
            .line
            .write_all_at(&self.text, 0)
            .and_then(|()| self.line.set_len(self.text.len() as u64));
        filled.context("cannot hand over a line")?;
        self.run.begin(program.interrupter());
        Ok(true)
    }

    fn note(&mut self, ending: Ending) {
        let took = self.run.end();
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.runs += 1;
        tally.took += took;
        let number = tally.runs;
        let (outcome, status, signal, text) = match ending {
            Ending::End(End::Exit(0)) => ("exit", Some(0), None, None),
            Ending::End(End::Exit(status)) => {
                let text = format!("ended with status {status}");
                ("exit", Some(status), None, Some(text))
            }
            Ending::End(End::Killed(signal)) => {
                let name = signal_name(signal);
                let text = format!("died of {name}");
                ("signal", None, Some(name), Some(text))
            }
            Ending::Interrupted => {
                let seconds = self.limit.unwrap_or_default().as_secs_f64();
                let text = format!("did not end within {seconds} s; raise --timeout");
                ("timeout", None, None, Some(text))
            }
        };
        tally.failed += u64::from(text.is_some());
        let message = if self.json {
            let line = Line {
                line: number,
                outcome,
                status,
                signal,
                seconds: took.as_secs_f64(),
            };
            serde_json::to_string(&line).ok()
        } else {
            text.filter(|_| !self.quiet)
                .map(|text| format!("dune: line {number}: {text}"))
        };
        if let Some(message) = message {
            // There is nobody to tell that it cannot be written.
            let _ = self.report.write_all(format!("{message}\n").as_bytes());
        }
    }
}
