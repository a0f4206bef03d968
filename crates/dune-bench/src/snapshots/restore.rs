//! What a return to a snapshot costs. The program and its sandbox are this file, in a process
//! of their own.
#![expect(unsafe_code, reason = "the program writes to its pages")]

use std::process::{Command, Stdio};

use anyhow::Context;
use dune_sandbox::End;
use dune_sandbox::engine::Engine;
use dune_sandbox::engine::in_guest::InGuest;
use dune_sandbox::engine::on_host::OnHost;
use dune_sandbox::snapshot::{Event, MARKER_OPTION, Marker, Next, Service, Stopped};
use serde::{Deserialize, Serialize};

use super::figure;
use crate::clock::{self, Clock};
use crate::meter::Figure;

/// What the sandbox says at its end, in ticks.
#[derive(Debug, Default, Deserialize, Serialize)]
struct Ticks {
    push: u64,
    restores: Vec<u64>,
    /// Pages that were put back at the end.
    pages: u64,
}

/// Returns before the first that counts: some pages are written by the first runs only.
const WARM_UP: usize = 40;

/// Taking a snapshot, and returning to it with `pages` pages written.
///
/// # Errors
///
/// What the process said.
pub(super) fn measure(
    placement: &str,
    pages: u32,
    samples: usize,
    clock: &Clock,
) -> Result<(Figure, Figure), String> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    // Without a time limit of its own: where instructions are counted, clocks run ahead while a
    // machine waits for its host.
    let output = Command::new(own)
        .args(["snapshot-sandbox", placement])
        .args([pages.to_string(), samples.to_string()])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| error.to_string())?;
    let ticks: Ticks = serde_json::from_slice(&output.stdout).map_err(|error| {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().last().map(str::to_owned);
        last.unwrap_or_else(|| format!("{}: {error}", output.status))
    })?;
    if ticks.pages < pages.into() {
        return Err(format!("{} pages were put back of {pages}", ticks.pages));
    }
    Ok((figure(&[ticks.push], clock), figure(&ticks.restores, clock)))
}

/// The process: sandbox and program.
///
/// # Errors
///
/// What keeps the sandbox from running the program.
pub(crate) fn sandbox(placement: &str, pages: u32, samples: usize) -> anyhow::Result<()> {
    let engine: Box<dyn Engine> = if placement == "guest" {
        Box::new(InGuest::new()?)
    } else {
        Box::new(OnHost::new()?)
    };
    let service = Returns {
        samples,
        returns: 0,
        ticks: Ticks::default(),
    };
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    let outcome = dune_sandbox::Command::new(own)
        .args(["snapshot-program", &pages.to_string()])
        .serve(Marker::Call, Box::new(service))
        .run(engine)?;
    outcome.end.leave()
}

/// The program: writes to so many pages, and ends.
pub(crate) fn program(pages: u32) -> ! {
    const PAGE: usize = 4096;
    let mut memory = vec![1_u8; (pages as usize + 1) * PAGE];
    // SAFETY: an option that no kernel knows.
    unsafe { libc::prctl(MARKER_OPTION as i32, 0, 0, 0, 0) };
    for page in 0..pages as usize {
        let byte = &raw mut memory[page * PAGE];
        // SAFETY: of the vector above.
        unsafe { byte.write_volatile(2) };
    }
    // SAFETY: ends the program.
    unsafe { libc::_exit(0) }
}

struct Returns {
    samples: usize,
    returns: usize,
    ticks: Ticks,
}

impl Service for Returns {
    fn event(&mut self, event: Event, program: &mut Stopped<'_>) -> Next {
        let start = clock::ticks();
        let done = match event {
            Event::Marker => program.push().map(|_| 0),
            Event::Ended(_) => program.restore().map(|restored| restored.pages),
        };
        let ticks = clock::ticks() - start;
        let pages = match done {
            Ok(pages) => pages,
            Err(error) => {
                eprintln!("{error}");
                return Next::Finish(End::Exit(1));
            }
        };
        if event == Event::Marker {
            self.ticks.push = ticks;
            return Next::Continue;
        }
        self.returns += 1;
        if self.returns > WARM_UP {
            self.ticks.restores.push(ticks);
            self.ticks.pages = pages;
        }
        if self.ticks.restores.len() < self.samples {
            return Next::Continue;
        }
        println!("{}", serde_json::to_string(&self.ticks).unwrap_or_default());
        Next::Finish(End::Exit(0))
    }
}
