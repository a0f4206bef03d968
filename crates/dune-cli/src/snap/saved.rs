//! `dune snap --save`, and `--resume`: a program in a file.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::Context;
use dune_kvm::probe::Placement;
use dune_sandbox::host::move_fd_high;
use dune_sandbox::snapshot::{Event, Next, Saved, Service, Stopped};
use dune_sandbox::{Command, End};

use super::{SnapArgs, descriptors, finish, marker_text};
use crate::{DUNE_FAILED, output, report};

/// What became of it.
type Told = Arc<Mutex<Option<Result<Saved, String>>>>;

struct Saver {
    file: File,
    told: Told,
}

impl Service for Saver {
    fn event(&mut self, event: Event, program: &mut Stopped<'_>) -> Next {
        if let Event::Ended(_) = event {
            return Next::Finish(End::Exit(0));
        }
        let saved = program.save(&self.file).map_err(|error| error.to_string());
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        Next::Finish(End::Exit(0))
    }

    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.file.as_raw_fd()]
    }
}

/// Runs the program to the marker and saves it there.
///
/// # Errors
///
/// What keeps Dune from it, with the remedy.
pub(super) fn save(
    args: &SnapArgs,
    path: &Path,
    command: Command,
    placement: Placement,
) -> anyhow::Result<ExitCode> {
    descriptors::close_inherited()?;
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    let file = move_fd_high(file.into()).context("cannot keep a descriptor; raise `ulimit -n`")?;
    let told = Told::default();
    let saver = Saver {
        file: file.into(),
        told: Arc::clone(&told),
    };
    let marker = args.marker();
    let place = marker_text(&marker);
    let (mut observer, outcome) = finish(command.serve(marker, Box::new(saver)), placement)?;
    let told = told.lock().unwrap_or_else(PoisonError::into_inner);
    let (problem, code) = match (outcome, &*told) {
        (Err(error), _) => (output::with_remedy(&error), error.exit_code()),
        (Ok(_), Some(Ok(saved))) => {
            if !args.is_quiet() {
                observer.say(&format!(
                    "saved at {place}, with {} KiB of memory; go on with: dune snap --resume {}",
                    saved.memory / 1024,
                    path.display()
                ));
            }
            return Ok(ExitCode::SUCCESS);
        }
        (Ok(_), Some(Err(error))) => (error.clone(), DUNE_FAILED),
        (Ok(_), None) => (super::not_reached(&place), DUNE_FAILED),
    };
    // Half of it is of no use. That it cannot be removed is no news.
    let _ = std::fs::remove_file(path);
    observer.say(&output::one_line(&problem));
    Ok(ExitCode::from(code))
}

/// The program that is saved in a file.
///
/// # Errors
///
/// If it cannot be resumed here.
pub(super) fn saved(path: &Path) -> anyhow::Result<Command> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file = move_fd_high(file.into()).context("cannot keep a descriptor; raise `ulimit -n`")?;
    Ok(Command::resume(file.into())?)
}

/// Runs a program that was saved to its end, and ends as it did.
///
/// # Errors
///
/// What keeps Dune from it, with the remedy.
pub(super) fn go_on(
    command: Command,
    placement: Placement,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let (mut observer, outcome) = finish(command, placement)?;
    match outcome {
        Ok(outcome) => {
            if json {
                let counts = observer.counts();
                let line = report::line(&outcome, counts, placement, started.elapsed())?;
                observer.say_plainly(&line);
            }
            outcome.end.leave()
        }
        Err(error) => {
            observer.say(&output::one_line(&output::with_remedy(&error)));
            Ok(ExitCode::from(error.exit_code()))
        }
    }
}
