//! Who runs the programs: nobody, Dune in each placement, and its peers.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::launch::{self, Limits};
use crate::matrix::Column;

/// Way of running a program.
#[derive(Clone, Debug)]
pub(crate) struct Contender {
    pub(crate) id: &'static str,
    /// What a program's path and arguments are put behind.
    pub(crate) prefix: Vec<OsString>,
    /// Takes the program's system calls by ptrace.
    pub(crate) by_ptrace: bool,
    /// Why it has no figures here.
    pub(crate) missing: Option<String>,
    /// As it says itself.
    pub(crate) version: Option<String>,
}

pub(crate) const NATIVE: &str = "native";
pub(crate) const DUNE_GUEST: &str = "dune-guest";
pub(crate) const DUNE_HOST: &str = "dune-host";
pub(crate) const PTRACE: &str = "ptrace";

/// Everybody, and whether they can run anything here: each one runs `/bin/true` once.
pub(crate) fn all(dune: Option<&Path>, own: &Path, patience: Duration) -> Vec<Contender> {
    let dune = dune.map_or_else(|| PathBuf::from("dune"), Path::to_path_buf);
    let dune = dune.to_string_lossy().into_owned();
    let own = own.to_string_lossy().into_owned();
    let placed = |place| vec![&*dune, "run", "--quiet", "--placement", place, "--"];
    let contenders = [
        (NATIVE, vec![], false),
        (DUNE_GUEST, placed("guest"), false),
        (DUNE_HOST, placed("host"), false),
        (
            "dune-trace",
            vec![&*dune, "trace", "-o", "/dev/null", "--"],
            false,
        ),
        ("runsc-ptrace", runsc("--platform=ptrace"), true),
        ("runsc-systrap", runsc("--platform=systrap"), false),
        ("runsc-kvm", runsc("--platform=kvm"), false),
        (PTRACE, vec![&*own, "trace-calls", "--"], true),
        ("strace", vec!["strace", "-f", "-o", "/dev/null"], true),
        ("proot", vec!["proot"], true),
        ("bwrap", BWRAP.to_vec(), false),
    ];
    contenders
        .into_iter()
        .map(|(id, prefix, by_ptrace)| {
            let mut contender = Contender {
                id,
                version: prefix.first().and_then(|program| version(program)),
                prefix: prefix.into_iter().map(OsString::from).collect(),
                by_ptrace,
                missing: None,
            };
            contender.missing = contender.try_out(patience).err();
            contender
        })
        .collect()
}

/// Every namespace of its own, the host's files, devices of its own.
const BWRAP: [&str; 8] = [
    "bwrap",
    "--die-with-parent",
    "--bind",
    "/",
    "/",
    "--dev",
    "/dev",
    "--unshare-all",
];

fn runsc(platform: &str) -> Vec<&str> {
    vec![
        "runsc",
        "--network=none",
        "--ignore-cgroups",
        platform,
        "do",
    ]
}

fn version(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find(|line| !line.trim().is_empty())?;
    Some(line.trim().to_owned()).filter(|_| output.status.success())
}

impl Column for Contender {
    fn id(&self) -> &'static str {
        self.id
    }

    fn command(&self) -> String {
        let words = self.prefix.iter().map(|word| word.to_string_lossy());
        words.collect::<Vec<_>>().join(" ")
    }

    fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    fn missing(&self) -> Option<&str> {
        self.missing.as_deref()
    }
}

impl Contender {
    pub(crate) fn is_runsc(&self) -> bool {
        self.id.starts_with("runsc")
    }

    /// A program under this contender.
    pub(crate) fn command(&self, program: &Path, arguments: &[&str]) -> Command {
        let mut words = self.prefix.iter().map(OsString::as_os_str);
        let mut command = match words.next() {
            Some(first) => {
                let mut command = Command::new(first);
                command.args(words).arg(program);
                command
            }
            None => Command::new(program),
        };
        command.args(arguments);
        command
    }

    fn try_out(&self, patience: Duration) -> Result<(), String> {
        let limits = Limits {
            time: patience,
            ..Limits::default()
        };
        launch::run(self.command(Path::new("/bin/true"), &[]), limits)?
            .success()
            .map(drop)
    }
}
