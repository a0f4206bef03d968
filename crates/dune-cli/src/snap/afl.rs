//! `dune snap --afl`: a run whenever a fuzzer asks for one, by AFL's fork server
//! protocol.
//!
//! ```text
//!   fuzzer                       descriptor          here
//!     |  <------------ hello, options --- 199 ---    the target's own fork server, at its start
//!     |  -- 198 --- run (was it killed?) ------->    restore
//!     |  <------------------ process id --- 199 ---  the stand-in's
//!     |                                              the target runs, and counts its branches
//!     |                                              in the fuzzer's shared memory
//!     |  <---------------- how it ended --- 199 ---
//! ```
//!
//! A target that afl-cc has compiled has a fork server of its own: it says
//! hello, settles options with the fuzzer, waits for the first request, and
//! calls `fork`. All that it does here as well, with the fuzzer's own
//! descriptors; the snapshot is taken where `fork` would have made the child, and
//! from there on this module answers. With another marker the target is not
//! given the descriptors, so that it finds no fuzzer, and hello is said here.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use dune_kvm::probe::Placement;
use dune_sandbox::snapshot::{Ending, Event, Marker, Next, Service, Stopped};
use dune_sandbox::{Command, End};

use super::in_hand::InHand;
use super::stand_in::{StandIn, StandIns};
use super::{SnapArgs, descriptors, finish, marker_text};
use crate::{DUNE_FAILED, output};

/// Where requests come from, and where answers go: `FORKSRV_FD` and the next.
const REQUESTS: RawFd = 198;
const ANSWERS: RawFd = 199;

/// Variables in which the fuzzer says which shared memory is whose.
const SEGMENTS: [&str; 3] = ["__AFL_SHM_ID", "__AFL_SHM_FUZZ_ID", "__AFL_CMPLOG_SHM_ID"];

/// By this string, with its zero, a fuzzer knows a file that it can work with:
/// this one.
#[used]
static INSTRUMENTED: [u8; 13] = *b"__AFL_SHM_ID\0";

/// Set by the fuzzer for targets that want their fork server started late,
/// which it finds out from the target's file. The file that it sees is Dune's.
const DEFERRED: &str = "__AFL_DEFER_FORKSRV";
const DEFERRED_SIGNATURE: &[u8] = b"##SIG_AFL_DEFER_FORKSRV##";
/// Set for targets that shall do many runs in a process: a run is one here.
const PERSISTENT: &str = "__AFL_PERSISTENT";

struct Fuzzed {
    requests: File,
    answers: File,
    run: Arc<InHand>,
    stand_ins: StandIns,
    /// That of the run in hand.
    stand_in: StandIn,
    /// Whether the target has said hello, and taken the first request.
    begun_by_target: bool,
}

/// Serves the program until the fuzzer has gone.
///
/// # Errors
///
/// What keeps Dune from it, with the remedy.
pub(super) fn serve(
    args: &SnapArgs,
    mut command: Command,
    placement: Placement,
) -> anyhow::Result<ExitCode> {
    let marker = args.marker();
    let contents = target(&args.command).and_then(|path| std::fs::read(path).ok());
    // What the fuzzer has found in Dune's own file says nothing of the target.
    command = command.env_remove(PERSISTENT).env_remove(DEFERRED);
    if let Some(contents) = &contents {
        if args.at.is_none() && !contains(contents, SEGMENTS[0].as_bytes()) {
            bail!(
                "the target is not instrumented; compile it with afl-cc, or choose where a run \
                 begins with --at"
            );
        }
        if contains(contents, DEFERRED_SIGNATURE) {
            command = command.env(DEFERRED, "1");
        }
    }
    for name in SEGMENTS {
        // Elsewhere shared memory is a file, and this its name.
        if let Some(id) = std::env::var_os(name).and_then(|id| id.to_str()?.parse().ok()) {
            command = command.segment(id);
        }
    }
    // The helper first: it must not hold anything of what follows.
    let run = Arc::<InHand>::default();
    let (requests, answers) = fuzzer()?;
    let stand_ins = StandIns::begin(&run)?;
    let begun_by_target = marker == Marker::Fork;
    let stop_at = if begun_by_target {
        Marker::ForkedClosing(ANSWERS)
    } else {
        marker.clone()
    };
    if !begun_by_target {
        descriptors::close(REQUESTS);
        descriptors::close(ANSWERS);
    }
    let service = Fuzzed {
        requests,
        answers,
        run,
        stand_in: stand_ins.current(),
        stand_ins,
        begun_by_target,
    };
    let place = marker_text(&marker);
    let (mut observer, outcome) = finish(command.serve(stop_at, Box::new(service)), placement)?;
    match outcome {
        Ok(outcome) if outcome.end == End::Exit(0) => Ok(ExitCode::SUCCESS),
        Ok(outcome) => {
            let how = match outcome.end {
                End::Exit(status) => format!("with status {status}"),
                End::Killed(signal) => format!("by signal {signal}"),
            };
            observer.say(&format!(
                "the target ended {how} before it reached the marker ({place})"
            ));
            Ok(ExitCode::from(DUNE_FAILED))
        }
        Err(error) => {
            observer.say(&output::one_line(&output::with_remedy(&error)));
            Ok(ExitCode::from(error.exit_code()))
        }
    }
}

/// Duplicates of the descriptors by which the fuzzer is reached.
fn fuzzer() -> anyhow::Result<(File, File)> {
    let requests = descriptors::aside_of(REQUESTS);
    let answers = descriptors::aside_of(ANSWERS);
    match (requests, answers) {
        (Ok(requests), Ok(answers)) => Ok((requests, answers)),
        (Err(error), _) | (_, Err(error)) if error.raw_os_error() != Some(libc::EBADF) => {
            Err(error).context("cannot keep a descriptor; raise `ulimit -n`")
        }
        _ => bail!(
            "no fuzzer: descriptors {REQUESTS} and {ANSWERS} are not open; start this by one: \
             afl-fuzz -i in -o out -- dune snap --afl -- ./target @@"
        ),
    }
}

/// The target's file.
fn target(command: &[OsString]) -> Option<PathBuf> {
    let name = Path::new(command.first()?);
    if name.as_os_str().as_bytes().contains(&b'/') {
        return Some(name.to_owned());
    }
    let search = std::env::var_os("PATH")?;
    std::env::split_paths(&search)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

fn contains(contents: &[u8], text: &[u8]) -> bool {
    contents.windows(text.len()).any(|window| window == text)
}

impl Service for Fuzzed {
    fn event(&mut self, event: Event, program: &mut Stopped<'_>) -> Next {
        let is_first = program.depth() == 0;
        let done = match event {
            Event::Marker if is_first => self.begin(program),
            Event::Marker => Ok(true),
            Event::Ended(Ending::End(end)) if is_first => {
                // Success would be the fuzzer's going.
                return Next::Finish(if end == End::Exit(0) {
                    End::Exit(DUNE_FAILED)
                } else {
                    end
                });
            }
            Event::Ended(ending) => self.go_on(ending, program),
        };
        match done {
            Ok(true) => Next::Continue,
            Ok(false) => Next::Finish(End::Exit(0)),
            Err(error) => {
                output::complain_of(&error);
                Next::Finish(End::Exit(DUNE_FAILED))
            }
        }
    }

    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.requests.as_raw_fd(), self.answers.as_raw_fd()]
    }
}

impl Fuzzed {
    /// At the marker: whether there is a run to be made.
    fn begin(&mut self, program: &mut Stopped<'_>) -> anyhow::Result<bool> {
        if self.begun_by_target {
            // Its own are the child's to close, which it need not each time.
            let _ = program.close_descriptor(REQUESTS);
            let _ = program.close_descriptor(ANSWERS);
            program.push()?;
        } else {
            program.push()?;
            if !self.answer(hello(map_size(program)))? || self.request()?.is_none() {
                return Ok(false);
            }
        }
        self.run_on(program)
    }

    /// After a run: the next one, if it is asked for.
    fn go_on(&mut self, ending: Ending, program: &mut Stopped<'_>) -> anyhow::Result<bool> {
        self.run.end();
        if !self.answer(wait_status(ending))? {
            return Ok(false);
        }
        match self.request()? {
            None => return Ok(false),
            Some(0) => {}
            // Its process was killed: the next has another.
            Some(_) => self.stand_ins.after(self.stand_in),
        }
        program.restore()?;
        self.run_on(program)
    }

    fn run_on(&mut self, program: &mut Stopped<'_>) -> anyhow::Result<bool> {
        self.stand_in = self.stand_ins.current();
        self.run.begin(program.interrupter());
        self.answer(self.stand_in.pid())
    }

    /// The next request; `None` if the fuzzer has gone.
    fn request(&mut self) -> anyhow::Result<Option<u32>> {
        let mut request = [0; 4];
        match self.requests.read_exact(&mut request) {
            Ok(()) => Ok(Some(u32::from_ne_bytes(request))),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error).context("cannot read what the fuzzer asks for"),
        }
    }

    /// Tells the fuzzer. False if it has gone.
    fn answer(&mut self, answer: u32) -> anyhow::Result<bool> {
        match self.answers.write_all(&answer.to_ne_bytes()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(error).context("cannot answer the fuzzer"),
        }
    }
}

/// How a run ended, as `waitpid` would say it.
fn wait_status(ending: Ending) -> u32 {
    match ending {
        Ending::End(End::Exit(status)) => u32::from(status) << 8,
        Ending::End(End::Killed(signal)) => signal,
        Ending::Interrupted => libc::SIGKILL as u32,
    }
}

/// Bytes of the map of branches that the target fills, if its file says it.
fn map_size(program: &Stopped<'_>) -> Option<u32> {
    let at = program.symbol("__afl_map_size").ok()?;
    let mut size = [0; 4];
    program.read(at, &mut size).ok()?;
    Some(u32::from_ne_bytes(size)).filter(|&size| size > 1)
}

/// What a fork server says first.
fn hello(map_size: Option<u32>) -> u32 {
    const ENABLED: u32 = 0x8000_0001;
    const MAP_SIZE: u32 = 0x4000_0000;
    const MOST: u32 = (0x00ff_fffe >> 1) + 1;
    match map_size {
        Some(size) if size <= MOST => ENABLED | MAP_SIZE | (size - 1) << 1,
        // An old one, whose map has the usual size.
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_s_size_is_in_the_greeting() {
        // As `FS_OPT_GET_MAPSIZE` reads it.
        let read = |hello: u32| ((hello & 0x00ff_fffe) >> 1) + 1;
        for size in [2, 64, 65_536, 65_537, 1 << 23] {
            let hello = hello(Some(size));
            assert_eq!(hello & 0xc000_0001, 0xc000_0001, "{size}");
            assert_eq!(read(hello), size);
        }
        assert_eq!(hello(None), 0);
        assert_eq!(hello(Some(u32::MAX)), 0);
    }

    #[test]
    fn endings_are_those_of_waitpid() {
        let status = wait_status(Ending::End(End::Exit(7))) as i32;
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7);
        let status = wait_status(Ending::End(End::Killed(11))) as i32;
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == 11);
        assert_eq!(wait_status(Ending::Interrupted) as i32, libc::SIGKILL);
    }

    #[test]
    fn signatures_are_found() {
        assert!(contains(b"xx##SIG_AFL_DEFER_FORKSRV##", DEFERRED_SIGNATURE));
        assert!(!contains(b"##SIG_AFL", DEFERRED_SIGNATURE));
    }
}
