//! The programs that the garbage collectors run, compiled for each collector, and the document
//! that one of them reads.
//!
//! ```text
//!   crates/dune-bench/programs/gc/NAME.c
//!     -> target/release/gc-programs/NAME-libgc, NAME-dune-gc, and NAME-...-timed
//!   Debian's package ssg-debderived, two of its files
//!     -> target/release/gc-programs/document.xml
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use dune_lab::Step;
use dune_lab::tools::{self, Tool};

use crate::process::{cargo, line, succeed, target_folder, workspace};

const PROGRAMS: &[&str] = &["gcbench", "list", "hashmap", "xml", "webcache"];
/// Those that are compiled a second time, to time each allocation.
const TIMED: &[&str] = &["gcbench", "hashmap"];

const COMPILER: Tool = Tool {
    program: "cc",
    package: "gcc",
};
const LIBGC_HEADER: &str = "/usr/include/gc/gc.h";
const LIBGC_PACKAGE: &str = "libgc-dev";

/// Security guides of a kind that tools read, as one XML file for each release. No document of
/// 20 MB comes alone in a package of a few megabytes: these two are put under one root.
const DOCUMENT_PACKAGE: &str = "ssg-debderived";
const DOCUMENT_FILES: [&str; 2] = [
    "usr/share/xml/scap/ssg/content/ssg-ubuntu2004-ds.xml",
    "usr/share/xml/scap/ssg/content/ssg-ubuntu2204-ds.xml",
];
const LEAST_DOCUMENT_BYTES: u64 = 20_000_000;

/// Makes everything that is missing. What cannot be made is named in the benchmark's table: no
/// reason to stop.
pub(super) fn prepare() -> Result<()> {
    let folder = target_folder().join("release/gc-programs");
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    let complain = |result: Result<()>| {
        if let Err(error) = result {
            eprintln!("cargo xtask: {error:#}");
        }
    };
    complain(document(&folder));
    complain(dune_gc(&folder));
    complain(libgc(&folder));
    Ok(())
}

fn dune_gc(folder: &Path) -> Result<()> {
    let mut build = cargo();
    build.args(["build", "--release", "-p", "dune-gc-c"]);
    succeed(&mut build)?;
    let header = workspace().join("crates/dune-gc/include");
    let library = target_folder().join("release/libdune_gc.a");
    compile(folder, "dune-gc", |command| {
        command
            .arg("-DWITH_DUNE_GC")
            .arg("-I")
            .arg(&header)
            .arg("-x")
            .arg("none")
            .arg(&library)
            .args(["-lpthread", "-ldl", "-lm"]);
    })
}

fn libgc(folder: &Path) -> Result<()> {
    if !Path::new(LIBGC_HEADER).is_file() {
        tools::install(&[LIBGC_PACKAGE])?;
    }
    // Without the indirections of a shared library, as dune-gc is linked.
    compile(folder, "libgc", |command| {
        command.args(["-DWITH_LIBGC", "-l:libgc.a", "-lpthread", "-ldl"]);
    })
}

fn compile(folder: &Path, collector: &str, arguments: impl Fn(&mut Command)) -> Result<()> {
    let compiler = COMPILER.require()?;
    let sources = workspace().join("crates/dune-bench/programs/gc");
    for program in PROGRAMS {
        let timings: &[bool] = if TIMED.contains(program) {
            &[false, true]
        } else {
            &[false]
        };
        for &is_timed in timings {
            let suffix = if is_timed { "-timed" } else { "" };
            let output = folder.join(format!("{program}-{collector}{suffix}"));
            let mut command = Command::new(&compiler);
            command
                .args(["-std=c11", "-O2", "-Wall", "-Wextra", "-o"])
                .arg(&output)
                .arg(sources.join(format!("{program}.c")));
            if is_timed {
                command.arg("-DTIMED");
            }
            arguments(&mut command);
            succeed(&mut command)?;
        }
    }
    Ok(())
}

/// Downloads the package without installing it, once.
fn document(folder: &Path) -> Result<()> {
    let path = folder.join("document.xml");
    if path.is_file() {
        return Ok(());
    }
    let _step = Step::begin(format!("Fetching the Debian package {DOCUMENT_PACKAGE}"));
    let draft = folder.join("document.new");
    if draft.exists() {
        fs::remove_dir_all(&draft).context("remove an unfinished download")?;
    }
    fs::create_dir(&draft).with_context(|| format!("create {}", draft.display()))?;
    let result = fetch(&draft).and_then(|text| {
        let unfinished = draft.join("document.xml");
        fs::write(&unfinished, text).context("write the document")?;
        fs::rename(&unfinished, &path).context("write the document")
    });
    let _ = fs::remove_dir_all(&draft);
    result.with_context(|| {
        format!(
            "no document for the XML parser: it is made of Debian's package {DOCUMENT_PACKAGE}; \
             or put one of your own, of 20 MB or more, at {}",
            path.display()
        )
    })
}

fn fetch(draft: &Path) -> Result<String> {
    let mut download = Command::new("apt-get");
    download
        .args(["-q", "download", DOCUMENT_PACKAGE])
        .current_dir(draft);
    quietly(&mut download)?;
    let mut unpack = Command::new("dpkg");
    unpack.arg("-x").arg(package_in(draft)?).arg(draft);
    quietly(&mut unpack)?;
    let mut text = String::from("<documents>\n");
    for file in DOCUMENT_FILES {
        let path = draft.join(file);
        let part = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        text.push_str(without_declaration(&part));
        text.push('\n');
    }
    text.push_str("</documents>\n");
    if (text.len() as u64) < LEAST_DOCUMENT_BYTES {
        bail!(
            "the documents of this release have {} bytes together",
            text.len()
        );
    }
    Ok(text)
}

fn package_in(folder: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get downloaded no package")
}

/// A document that can stand within another.
fn without_declaration(text: &str) -> &str {
    match text.strip_prefix("<?xml") {
        Some(rest) => rest.split_once("?>").map_or(text, |(_, rest)| rest),
        None => text,
    }
}

/// Runs a command whose output nobody needs unless it fails.
fn quietly(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("start `{}`", line(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed: {}", line(command), said.trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_declaration_is_cut_off() {
        assert_eq!(
            without_declaration("<?xml version=\"1.0\"?>\n<a/>"),
            "\n<a/>"
        );
        assert_eq!(without_declaration("<a/>"), "<a/>");
    }
}
