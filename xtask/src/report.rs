//! `cargo xtask bench report`: one HTML file with everything that the
//! benchmarks found, which needs no other file and no network.
//!
//! A benchmark leaves a JSON file in `target/bench`; each becomes a section
//! with its table and a figure for each row. Before them is a section for each
//! table of the paper, of the rows that measure the same.

mod figure;
mod html;
mod paper;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// What a benchmark found, as its JSON file says.
#[derive(Debug, Deserialize)]
struct Found {
    machine: Machine,
    placement: String,
    unit: String,
    #[serde(default)]
    contenders: Vec<Contender>,
    rows: Vec<Row>,
}

#[derive(Debug, Deserialize)]
struct Machine {
    cpu: String,
    cpus: u64,
    memory_mib: u64,
    kernel: String,
    kvm: String,
    load: f64,
    samples: u64,
}

/// Who was measured; benchmarks whose contenders are plain name none.
#[derive(Debug, Deserialize)]
struct Contender {
    id: String,
    command: String,
    version: Option<String>,
    missing: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Row {
    id: String,
    label: String,
    /// Where it is not the section's.
    unit: Option<String>,
    values: BTreeMap<String, f64>,
    #[serde(default)]
    missing: BTreeMap<String, String>,
    aim: Option<f64>,
    #[serde(default)]
    aims: Vec<Aim>,
}

#[derive(Debug, Deserialize)]
struct Aim {
    contender: String,
    at_most: f64,
    because: String,
    met: Option<bool>,
}

/// A benchmark in a place.
#[derive(Debug)]
struct Section {
    /// The benchmark's name.
    name: String,
    /// `lab` or `native`.
    place: &'static str,
    date: String,
    found: Found,
}

impl Section {
    /// The command that measures it again.
    fn command(&self) -> String {
        format!("cargo xtask bench {} --place {}", self.name, self.place)
    }

    /// Who was to be measured in some of these rows: as the benchmark lists them, or by name.
    fn columns<'a>(&'a self, rows: &[&'a Row]) -> Vec<&'a str> {
        let tried: BTreeSet<&str> = rows
            .iter()
            .flat_map(|row| row.values.keys().chain(row.missing.keys()))
            .map(String::as_str)
            .collect();
        let listed = self.found.contenders.iter().map(|one| one.id.as_str());
        let mut columns: Vec<&str> = listed.filter(|id| tried.contains(id)).collect();
        let others: Vec<&str> = tried
            .into_iter()
            .filter(|id| !columns.contains(id))
            .collect();
        columns.extend(others);
        columns
    }

    fn unit_of<'a>(&'a self, row: &'a Row) -> &'a str {
        row.unit.as_deref().unwrap_or(&self.found.unit)
    }
}

/// What the report as a whole says of itself.
#[derive(Debug)]
struct Versions {
    project: &'static str,
    commit: String,
    rustc: String,
    date: String,
}

/// Writes `report.html` into the folder with the figures.
pub(crate) fn write(results: &Path) -> Result<()> {
    let sections = sections(results)?;
    if sections.is_empty() {
        bail!(
            "there are no figures in {}: run `cargo xtask bench all` first",
            results.display()
        );
    }
    let versions = Versions {
        project: env!("CARGO_PKG_VERSION"),
        commit: said("git", &["describe", "--always", "--dirty"]),
        rustc: said("rustc", &["--version"]),
        date: date(SystemTime::now()),
    };
    let path = results.join("report.html");
    let text = html::page(&versions, &sections)?;
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    println!("report written to {}", path.display());
    Ok(())
}

/// Every file of figures, by name, the lab's before this machine's.
fn sections(results: &Path) -> Result<Vec<Section>> {
    let mut sections = Vec::new();
    let entries = fs::read_dir(results).with_context(|| format!("read {}", results.display()))?;
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let is_json = path
            .extension()
            .is_some_and(|extension| extension == "json");
        let Some(stem) = path.file_stem().and_then(|stem| stem.to_str()) else {
            continue;
        };
        if !is_json {
            continue;
        }
        let (name, place) = match stem.strip_suffix("-native") {
            Some(name) => (name, "native"),
            None => (stem, "lab"),
        };
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        match serde_json::from_str(&text) {
            Ok(found) => sections.push(Section {
                name: name.to_owned(),
                place,
                date: path
                    .metadata()
                    .and_then(|metadata| metadata.modified())
                    .map_or_else(|_| "unknown".to_owned(), date),
                found,
            }),
            // One benchmark's file does not spoil the others' report.
            Err(error) => eprintln!("cargo xtask: {} is left out: {error}", path.display()),
        }
    }
    Ok(sections)
}

/// What a program prints, in one line.
fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(crate::process::workspace())
        .output();
    output
        .ok()
        .filter(|output| output.status.success())
        .map_or_else(
            || "unknown".to_owned(),
            |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        )
}

/// A point in time as `2026-01-31 23:59 UTC`.
fn date(time: SystemTime) -> String {
    let seconds = time
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
    let (year, month, day) = civil(seconds / 86_400);
    format!("{year}-{month:02}-{day:02} {hours:02}:{minutes:02} UTC")
}

/// Year, month and day of a number of days since 1970-01-01.
fn civil(mut days: u64) -> (u64, usize, u64) {
    let is_leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    loop {
        let length = if is_leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let months = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    for (index, length) in months.into_iter().enumerate() {
        if days < length {
            return (year, index + 1, days + 1);
        }
        days -= length;
    }
    (year, 12, 31)
}

/// A number with its thousands apart: `10,056` or `12.5`.
fn number(value: f64) -> String {
    let tenths = (value.abs() * 10.0).round() as u64;
    let whole = (tenths / 10).to_string();
    let mut text = String::from(if value < 0.0 { "-" } else { "" });
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if !tenths.is_multiple_of(10) && tenths < 10_000 {
        text.push_str(&format!(".{}", tenths % 10));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_089), (2025, 1, 1));
    }

    /// A file as `dune-bench core` writes it, and one with all that `sandbox` adds.
    const PLAIN: &str = r#"{"machine":{"cpu":"a CPU","cpus":1,"memory_mib":2,"kernel":"6.1",
        "kvm":"hardware","emulated":true,"load":0.5,"samples":3},"placement":"in-guest",
        "unit":"instructions","rows":[{"id":"one","label":"<the> one",
        "values":{"linux":10056,"dune":389},"aim":400}]}"#;
    /// Two kinds of rows, as in `dune-bench memory`.
    const TWO: &str = r#"{"machine":{"cpu":"a CPU","cpus":1,"memory_mib":2,"kernel":"6.1",
        "kvm":"hardware","load":0.5,"samples":3},"placement":"in-guest",
        "unit":"instructions","rows":[{"id":"page","label":"a page","values":{"mprotect":2,
        "dune":1}},{"id":"tree","label":"a tree","values":{"libgc":3,"dune-gc":4}},
        {"id":"pages","label":"pages","values":{"uffd":2,"dune":1}}]}"#;
    const FULL: &str = r#"{"machine":{"cpu":"a CPU","cpus":1,"memory_mib":2,"kernel":"6.1",
        "kvm":"weak","load":0.5,"samples":3},"placement":"on-host","unit":"nanoseconds",
        "contenders":[{"id":"native","command":"","version":null,"missing":null},
        {"id":"gone","command":"gone do","version":null,"missing":"gone is not installed"}],
        "rows":[{"id":"two","label":"two","unit":"KiB","values":{"native":7},
        "missing":{"other":"it cannot"},"aim":6,"aims":[{"contender":"native","at_most":6,
        "because":"a rule","met":false}]}]}"#;

    #[test]
    fn a_report_has_every_figure_and_nothing_from_elsewhere() {
        let folder = std::env::temp_dir().join(format!("xtask-report-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("core.json"), PLAIN).unwrap();
        fs::write(folder.join("sandbox-native.json"), FULL).unwrap();
        fs::write(folder.join("memory.json"), TWO).unwrap();
        fs::write(folder.join("broken.json"), "{}").unwrap();
        write(&folder).unwrap();
        let text = fs::read_to_string(folder.join("report.html")).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        for part in [
            "10,056",
            "&lt;the&gt; one",
            "met",
            "MISSED",
            "gone is not installed",
            "it cannot",
            "cargo xtask bench sandbox --place native",
            "<svg",
            "<th>id</th><th>dune</th><th>mprotect</th><th>uffd</th><th>aim</th>",
            "<th>id</th><th>dune-gc</th><th>libgc</th><th>aim</th>",
            "Table 3 of the paper",
            "Table 7 of the paper",
            "<code>cargo xtask bench wedge</code>",
        ] {
            assert!(text.contains(part), "{part} is missing");
        }
        for reference in ["<link", "<script", "src=", "href=\"http"] {
            assert!(!text.contains(reference), "{reference} in the report");
        }
    }
}
