//! The programs of `programs/gc`, compiled by `cargo xtask bench memory`.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use super::contender::{Collector, Contender};

/// See the module documentation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) label: &'static str,
    /// It reads the document instead of being told how much to do.
    reads_document: bool,
    /// There is a build of it that times each allocation.
    pub(crate) is_timed: bool,
}

pub(crate) const GCBENCH: &str = "gcbench";
pub(crate) const HASHMAP: &str = "hashmap";

pub(crate) const PROGRAMS: &[Program] = &[
    Program {
        name: GCBENCH,
        label: "GCBench",
        reads_document: false,
        is_timed: true,
    },
    Program {
        name: "list",
        label: "linked list",
        reads_document: false,
        is_timed: false,
    },
    Program {
        name: HASHMAP,
        label: "hash map",
        reads_document: false,
        is_timed: true,
    },
    Program {
        name: "xml",
        label: "XML parser",
        reads_document: true,
        is_timed: false,
    },
    Program {
        name: "webcache",
        label: "web cache",
        reads_document: false,
        is_timed: false,
    },
];

/// What a program says at its end; times in ticks of the time-stamp counter where nothing else
/// is said.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) checksum: String,
    pub(crate) ticks: u64,
    pub(crate) collections: u64,
    pub(crate) longest_pause_ns: u64,
    pub(crate) total_pause_ns: u64,
    pub(crate) longest_allocation: u64,
    pub(crate) heap_bytes: u64,
    pub(crate) p50: Option<u64>,
    pub(crate) p99: Option<u64>,
    pub(crate) p999: Option<u64>,
    pub(crate) max: Option<u64>,
}

/// No program takes so many seconds, emulated or not.
const PATIENCE_SECONDS: &str = "600";

/// The folder of the compiled programs beside this program.
pub(crate) fn folder() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    own.with_file_name("gc-programs")
}

/// Why the programs of a collector are not in the folder; `None` where they are.
pub(crate) fn not_built(folder: &Path, collector: Collector) -> Option<String> {
    let absent = PROGRAMS
        .iter()
        .map(|program| program.file(folder, collector, false))
        .find(|file| !file.is_file())?;
    Some(format!(
        "there is no {}: `cargo xtask bench memory` compiles the programs, where it finds {}",
        absent.display(),
        match collector {
            Collector::Libgc => "libgc and a C compiler",
            Collector::DuneGc => "a C compiler",
        }
    ))
}

/// Reads everything that the program will: its file, its document, and the libraries that this
/// program has too. In the lab files come from outside, and while it waits for one its clock
/// runs as fast as it likes.
fn read_ahead(program: &Path, document: &Path) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let libraries = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5));
    let libraries: BTreeSet<&Path> = libraries.map(Path::new).collect();
    for file in libraries.into_iter().chain([program, document]) {
        if file.is_file() {
            let _ = std::fs::read(file);
        }
    }
}

impl Program {
    fn file(&self, folder: &Path, collector: Collector, is_timed: bool) -> PathBuf {
        let timed = if is_timed { "-timed" } else { "" };
        folder.join(format!("{}-{}{timed}", self.name, collector.name()))
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// Its last words.
    pub(crate) fn run(
        &self,
        folder: &Path,
        contender: &Contender,
        percent: u32,
        is_timed: bool,
    ) -> Result<Outcome, String> {
        let size: OsString = if self.reads_document {
            let document = folder.join("document.xml");
            if !document.is_file() {
                return Err(format!("there is no {}", document.display()));
            }
            document.into()
        } else {
            percent.to_string().into()
        };
        let file = self.file(folder, contender.collector, is_timed);
        read_ahead(&file, Path::new(&size));
        let output = Command::new("timeout")
            .args(["--kill-after=10", PATIENCE_SECONDS])
            .arg(&file)
            .arg(contender.id)
            .arg(size)
            .env("DUNE_GC_VERBOSE", "1")
            .output()
            .map_err(|error| format!("cannot start {}: {error}", file.display()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().rfind(|line| !line.trim().is_empty());
            return Err(match (output.status.code(), last) {
                (Some(124), _) => format!("not done after {PATIENCE_SECONDS} s"),
                (_, Some(last)) => last.trim().to_owned(),
                (_, None) => output.status.to_string(),
            });
        }
        serde_json::from_slice(&output.stdout).map_err(|error| format!("what it says: {error}"))
    }
}
