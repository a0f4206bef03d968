//! A fuzzer that fuzzes nothing: asks a fork server for the same run again and again.
#![expect(unsafe_code, reason = "shared memory and descriptors of a child")]

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use super::Choices;
use crate::meter::{Figure, Meter};

/// `FORKSRV_FD`, and the next.
const REQUESTS: RawFd = 198;
const ANSWERS: RawFd = 199;
/// Of the map of branches: as AFL's unless told otherwise.
const MAP_BYTES: usize = 1 << 16;
/// Runs in a sample.
const BATCH: u32 = 20;

/// A run of the target, natively by the fork server that afl-cc gave it, or under `dune snap` in
/// that placement.
///
/// # Errors
///
/// What went wrong, in words.
pub(super) fn measure(
    choices: &Choices,
    placement: Option<&str>,
    meter: &Meter,
) -> Result<Figure, String> {
    let failed = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    let command = match placement {
        None => Command::new(&choices.target),
        Some(placement) => {
            let mut command = Command::new(&choices.dune);
            command.args(["snap", "--afl", "--placement", placement, "--"]);
            command.arg(&choices.target);
            command
        }
    };
    Server::start(command)
        .map_err(failed("the fork server"))
        .and_then(|mut server| {
            let mut result = Ok(());
            let figure = meter.with_at_most(11).measure(BATCH, || {
                if result.is_ok() {
                    result = server.run();
                }
            });
            result.map_err(failed("a run"))?;
            Ok(figure)
        })
}

struct Server {
    child: Child,
    requests: File,
    answers: File,
    map: i32,
    input: File,
}

impl Server {
    fn start(mut command: Command) -> io::Result<Self> {
        // SAFETY: makes a segment.
        let map = unsafe { libc::shmget(libc::IPC_PRIVATE, MAP_BYTES, libc::IPC_CREAT | 0o600) };
        if map < 0 {
            return Err(io::Error::last_os_error());
        }
        // As a fuzzer's: one open file, which both sides move in.
        let path = std::env::temp_dir().join(format!("dune-bench-input-{}", std::process::id()));
        std::fs::write(&path, "hello")?;
        let input = File::options().read(true).write(true).open(&path)?;
        std::fs::remove_file(&path)?;
        let (theirs, requests) = io::pipe()?;
        let (answers, ours) = io::pipe()?;
        let ends: [OwnedFd; 2] = [theirs.into(), ours.into()];
        command
            .env("__AFL_SHM_ID", map.to_string())
            .stdin(input.try_clone()?)
            .stdout(Stdio::null());
        let [theirs, ours] = ends;
        let give = move || {
            for (from, to) in [(theirs.as_raw_fd(), REQUESTS), (ours.as_raw_fd(), ANSWERS)] {
                // SAFETY: in the child, whose descriptors nobody holds.
                if unsafe { libc::dup2(from, to) } < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: two system calls between fork and exec.
        unsafe { command.pre_exec(give) };
        let child = command.spawn()?;
        // The child's ends are the child's alone.
        drop(command);
        let mut this = Self {
            child,
            requests: OwnedFd::from(requests).into(),
            answers: OwnedFd::from(answers).into(),
            map,
            input,
        };
        // Hello.
        this.answer()?;
        this.run()?;
        Ok(this)
    }

    fn run(&mut self) -> io::Result<()> {
        self.input.rewind()?;
        self.requests.write_all(&[0; 4])?;
        self.answer()?;
        let status = self.answer()?;
        if status == 0 {
            Ok(())
        } else {
            Err(io::Error::other(format!("it ended with {status:#x}")))
        }
    }

    fn answer(&mut self) -> io::Result<u32> {
        let mut answer = [0; 4];
        self.answers.read_exact(&mut answer)?;
        Ok(u32::from_ne_bytes(answer))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // SAFETY: the segment made above; the kernel looks at no memory.
        unsafe { libc::shmctl(self.map, libc::IPC_RMID, std::ptr::null_mut()) };
    }
}
