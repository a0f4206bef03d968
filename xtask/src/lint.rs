//! `cargo xtask lint`: what must hold of the source.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::process::{cargo, line, try_run, workspace};

/// Options of `cargo xtask lint`.
#[derive(Debug, clap::Args)]
pub(crate) struct LintArgs {
    /// Write the list of files with unsafe code anew, for a person to review.
    #[arg(long)]
    update_unsafe_list: bool,
}

/// The files that may opt in to unsafe code: what an audit has to read.
const UNSAFE_LIST: &str = ".config/unsafe-files.txt";

/// Runs the chore; all checks run, whatever the first of them says.
pub(crate) fn run(args: &LintArgs) -> Result<ExitCode> {
    if args.update_unsafe_list {
        return update_unsafe_list().map(|()| ExitCode::SUCCESS);
    }
    let mut failed = Vec::new();
    for (arguments, variable) in [
        (&["fmt", "--all", "--check"][..], None),
        (
            &[
                "clippy",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ][..],
            None,
        ),
        (
            &[
                "doc",
                "--workspace",
                "--no-deps",
                "--document-private-items",
                "--quiet",
            ][..],
            Some(("RUSTDOCFLAGS", "-D warnings")),
        ),
    ] {
        let mut command = cargo();
        command.args(arguments).envs(variable);
        println!("{}", line(&command));
        if !try_run(&mut command)? {
            failed.push(line(&command));
        }
    }
    println!("unsafe code only in the files of {UNSAFE_LIST}");
    if !check_unsafe_list()? {
        failed.push(format!(
            "the list of files with unsafe code ({UNSAFE_LIST})"
        ));
    }
    if !check_licences()? {
        failed.push("cargo deny check".to_owned());
    }
    if failed.is_empty() {
        println!("lint: all well");
        return Ok(ExitCode::SUCCESS);
    }
    println!("lint: failed: {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}

/// `cargo deny`, where it is installed; its rules are in `deny.toml`.
fn check_licences() -> Result<bool> {
    let installed = cargo()
        .args(["deny", "--version"])
        .output()
        .is_ok_and(|output| output.status.success());
    if !installed {
        println!("cargo deny is not installed: licences and sources are not checked");
        return Ok(true);
    }
    let mut command = cargo();
    // Advisories need the network; these do not.
    command.args(["deny", "check", "bans", "licenses", "sources"]);
    println!("{}", line(&command));
    try_run(&mut command)
}

fn check_unsafe_list() -> Result<bool> {
    let found = files_with_unsafe()?;
    let path = workspace().join(UNSAFE_LIST);
    let listed: BTreeSet<String> = fs::read_to_string(&path)
        .with_context(|| format!("read {}", path.display()))?
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect();
    for file in found.difference(&listed) {
        println!("  {file} has unsafe code and is not listed");
    }
    for file in listed.difference(&found) {
        println!("  {file} is listed and has no unsafe code, or is gone");
    }
    let same = found == listed;
    if !same {
        println!("  review them, then: cargo xtask lint --update-unsafe-list");
    }
    Ok(same)
}

fn update_unsafe_list() -> Result<()> {
    let mut text = String::from(
        "# Files that opt in to unsafe code: what an audit has to read.\n\
         # Written by `cargo xtask lint --update-unsafe-list`, checked by `cargo xtask lint`.\n",
    );
    for file in files_with_unsafe()? {
        text.push_str(&file);
        text.push('\n');
    }
    let path = workspace().join(UNSAFE_LIST);
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))
}

/// Source files that lift the workspace's ban on unsafe code.
fn files_with_unsafe() -> Result<BTreeSet<String>> {
    let root = workspace();
    let mut found = BTreeSet::new();
    let mut folders = vec![root.join("crates"), root.join("xtask"), root.join("fuzz")];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            if path.is_dir() {
                if !path.ends_with("target") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") && opts_in(&path)?
            {
                let relative = path.strip_prefix(&root).unwrap_or(&path);
                found.insert(relative.display().to_string());
            }
        }
    }
    Ok(found)
}

fn opts_in(path: &PathBuf) -> Result<bool> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    Ok(mentions_opt_in(path, &text))
}

/// Whether an attribute lifts `unsafe_code`; this file only speaks of it.
fn mentions_opt_in(path: &Path, text: &str) -> bool {
    let compact: String = text.split_whitespace().collect();
    !path.ends_with("xtask/src/lint.rs")
        && [
            "expect(unsafe_code",
            "allow(unsafe_code",
            "warn(unsafe_code",
        ]
        .iter()
        .any(|attribute| compact.contains(attribute))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opting_in_is_seen_however_it_is_written() {
        let path = Path::new("crates/x/src/lib.rs");
        assert!(mentions_opt_in(
            path,
            "#![expect(unsafe_code, reason = \"x\")]"
        ));
        assert!(mentions_opt_in(path, "#[expect(\n    unsafe_code,\n)]"));
        assert!(!mentions_opt_in(path, "// the unsafe_code lint"));
    }
}
