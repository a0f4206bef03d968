//! What kind of virtual machine the lab is, and what runs in it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{LabError, io_error};

/// How many folders can be shared writable. Each is a device of the guest, and
/// each number of devices has a saved state of its own.
pub const MAX_SHARES: usize = 8;

/// The virtual machine.
#[derive(Clone, Debug)]
pub struct Config {
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Count instructions: one instruction is one nanosecond of every clock of
    /// the guest, so that measures repeat exactly. One CPU only, and slower.
    pub icount: bool,
    /// Folders of the host that the guest may write, as absolute paths.
    pub shares: Vec<PathBuf>,
    /// The kernel's image; the newest of this Debian release if not given.
    pub kernel: Option<PathBuf>,
    /// Boot instead of waking a saved state.
    pub cold: bool,
    /// Say on standard error what happens, and how long it took.
    pub verbose: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            cpus: 1,
            memory_mib: 1024,
            icount: false,
            shares: Vec::new(),
            kernel: None,
            cold: false,
            verbose: false,
        }
    }
}

impl Config {
    /// Checks that the options go together; makes the shared folders absolute.
    pub(crate) fn checked(&self) -> Result<Config, LabError> {
        let refuse = |message: String| Err(LabError::Options(message));
        if !(1..=64).contains(&self.cpus) {
            return refuse(format!("--cpus {}: the lab has 1 to 64 CPUs", self.cpus));
        }
        if self.icount && self.cpus != 1 {
            return refuse(format!(
                "--icount needs --cpus 1, not {}: instructions are counted on one CPU",
                self.cpus
            ));
        }
        if !(256..=1 << 20).contains(&self.memory_mib) {
            return refuse(format!(
                "--memory {}: give 256 to 1048576 MiB",
                self.memory_mib
            ));
        }
        if self.shares.len() > MAX_SHARES {
            return refuse(format!(
                "{} shared folders: the lab can share {MAX_SHARES}; share a common parent",
                self.shares.len()
            ));
        }
        let mut checked = self.clone();
        for share in &mut checked.shares {
            let real = std::fs::canonicalize(&*share)
                .map_err(io_error(format!("shared folder {}", share.display())))?;
            if !real.is_dir() {
                return refuse(format!("--share {}: not a folder", share.display()));
            }
            if real == Path::new("/") {
                return refuse("--share /: share the folders that are needed".to_owned());
            }
            *share = real;
        }
        Ok(checked)
    }
}

/// A command to run in the guest.
#[derive(Clone, Debug)]
pub struct Command {
    pub(crate) argv: Vec<OsString>,
    pub(crate) env: Vec<(OsString, OsString)>,
    pub(crate) cwd: PathBuf,
    pub(crate) timeout: Option<Duration>,
    pub(crate) idle_timeout: Option<Duration>,
}

impl Command {
    /// A command with this process's environment and working directory.
    pub fn new(program: impl AsRef<OsStr>) -> Command {
        Command {
            argv: vec![program.as_ref().to_owned()],
            env: std::env::vars_os().collect(),
            cwd: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
            timeout: None,
            idle_timeout: None,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(self, arg: impl AsRef<OsStr>) -> Command {
        self.args([arg])
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        self.argv
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets a variable of the environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Command {
        let name = name.as_ref();
        self.env.retain(|(existing, _)| existing != name);
        self.env.push((name.to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn current_dir(mut self, folder: impl Into<PathBuf>) -> Command {
        self.cwd = folder.into();
        self
    }

    /// Ends the command when it runs longer than this.
    #[must_use]
    pub fn timeout(mut self, limit: Option<Duration>) -> Command {
        self.timeout = limit;
        self
    }

    /// Ends the command when it writes nothing for so long.
    #[must_use]
    pub fn idle_timeout(mut self, limit: Option<Duration>) -> Command {
        self.idle_timeout = limit;
        self
    }
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The exit code as a shell shows it: 128 + n after signal n, 127 when the
    /// program was not found, 126 when it could not be started.
    pub code: u8,
}

impl Outcome {
    /// Whether the command ended with exit code 0.
    #[must_use]
    pub fn success(self) -> bool {
        self.code == 0
    }
}
