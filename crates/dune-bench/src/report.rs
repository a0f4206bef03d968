//! The table a person reads and the JSON a program reads.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde::{Serialize, Serializer};

use crate::clock::{Clock, Unit};
use crate::host::Machine;
use crate::matrix::{Column, Matrix};
use crate::meter::Figure;

/// One way of doing what a row measures, and what it costs.
#[derive(Clone, Debug)]
struct Entry {
    contender: &'static str,
    figure: Figure,
}

/// One measured thing.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    id: &'static str,
    label: &'static str,
    /// Where it is not the clock's.
    unit: Option<&'static str>,
    /// What the ratio is taken against.
    base: &'static str,
    entries: Vec<Entry>,
    aim: Option<f64>,
    /// Why there is no figure.
    missing: Option<String>,
    notes: Vec<String>,
}

/// The two contenders that nearly every row has.
pub(crate) const LINUX: &str = "linux";
/// See [`LINUX`].
pub(crate) const DUNE: &str = "dune";
/// A tracer that takes every system call of a child.
pub(crate) const PTRACE: &str = "ptrace";

impl Row {
    pub(crate) fn new(id: &'static str, label: &'static str) -> Self {
        Self {
            id,
            label,
            unit: None,
            base: LINUX,
            entries: Vec::new(),
            aim: None,
            missing: None,
            notes: Vec::new(),
        }
    }

    /// The most that Dune may cost, in the report's unit.
    pub(crate) fn set_aim(&mut self, aim: f64) {
        self.aim = Some(aim.round());
    }

    /// What the row counts, if not the clock's unit.
    pub(crate) fn set_unit(&mut self, unit: &'static str) {
        self.unit = Some(unit);
    }

    /// What Dune is held against, if not Linux.
    pub(crate) fn set_base(&mut self, contender: &'static str) {
        self.base = contender;
    }

    pub(crate) fn add(&mut self, contender: &'static str, figure: Figure) {
        self.entries.push(Entry { contender, figure });
    }

    /// There is no figure for Dune, because of this.
    pub(crate) fn set_missing(&mut self, reason: impl Into<String>) {
        self.missing = Some(reason.into());
    }

    pub(crate) fn is_missing(&self) -> bool {
        self.missing.is_some()
    }

    pub(crate) fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    pub(crate) fn median(&self, contender: &str) -> Option<f64> {
        let entry = self.entries.iter().find(|e| e.contender == contender)?;
        Some(entry.figure.median)
    }

    /// What the table has no column for, and samples that differ by more than 2%.
    fn details(&self, text: &mut String) {
        for entry in &self.entries {
            let Figure {
                median,
                least,
                most,
            } = entry.figure;
            let in_table = entry.contender == self.base || entry.contender == DUNE;
            let spread = most - least > median * 0.02;
            if in_table && !spread {
                continue;
            }
            let _ = write!(
                text,
                "  {}: {} {}",
                self.id,
                entry.contender,
                number(median)
            );
            if spread {
                let _ = write!(text, " ({} to {})", number(least), number(most));
            }
            text.push('\n');
        }
        for note in &self.notes {
            let _ = writeln!(text, "  {}: {note}", self.id);
        }
    }

    fn verdict(&self) -> &'static str {
        match (self.aim, self.median(DUNE)) {
            (Some(aim), Some(value)) if value <= aim => "met",
            (Some(_), Some(_)) => "MISSED",
            _ => "",
        }
    }

    /// How many times dearer the base is than Dune.
    fn ratio(&self) -> String {
        match (self.median(self.base), self.median(DUNE)) {
            (Some(base), Some(dune)) if dune > 0.0 => format!("{:.2}x", base / dune),
            _ => String::new(),
        }
    }
}

/// A number in JSON: whole where it is whole.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Number(pub(crate) f64);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Whole numbers below 2^53 are exact.
        if self.0.fract() == 0.0 && (0.0..9e15).contains(&self.0) {
            serializer.serialize_u64(self.0 as u64)
        } else {
            serializer.serialize_f64(self.0)
        }
    }
}

#[derive(Debug, Serialize)]
struct JsonRow<'a> {
    id: &'a str,
    label: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<&'a str>,
    values: BTreeMap<&'a str, Number>,
    /// Why Dune has no value.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    missing: BTreeMap<&'a str, &'a str>,
    aim: Option<Number>,
}

#[derive(Debug, Serialize)]
struct JsonReport<'a> {
    machine: &'a Machine,
    placement: &'a str,
    unit: String,
    rows: Vec<JsonRow<'a>>,
}

/// Everything that a run found.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) placement: &'static str,
    pub(crate) clock: Clock,
    pub(crate) rows: Vec<Row>,
}

impl Report {
    /// The same for programs; a row without a figure for Dune says why.
    pub(crate) fn json(&self) -> anyhow::Result<String> {
        let report = JsonReport {
            machine: &self.machine,
            placement: self.placement,
            unit: self.clock.unit().to_string(),
            rows: self
                .rows
                .iter()
                .map(|row| JsonRow {
                    id: row.id,
                    label: row.label,
                    unit: row.unit,
                    values: row
                        .entries
                        .iter()
                        .map(|entry| (entry.contender, Number(entry.figure.median)))
                        .collect(),
                    missing: row
                        .missing
                        .iter()
                        .map(|reason| (DUNE, reason.as_str()))
                        .collect(),
                    aim: row.aim.map(Number),
                })
                .collect(),
        };
        Ok(serde_json::to_string_pretty(&report)?)
    }

    /// The same, and a matrix of the same run.
    ///
    /// # Errors
    /// None that can happen: the structures are plain.
    pub(crate) fn json_with<C: Column + Clone>(
        &self,
        matrix: &Matrix<C>,
    ) -> anyhow::Result<String> {
        let mut report: serde_json::Value = serde_json::from_str(&self.json()?)?;
        report["contenders"] = serde_json::to_value(matrix.json_contenders())?;
        if let Some(rows) = report["rows"].as_array_mut() {
            for row in matrix.json_rows() {
                rows.push(serde_json::to_value(row)?);
            }
        }
        Ok(serde_json::to_string_pretty(&report)?)
    }

    /// The table: medians, and the notes below it.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        let unit = self.clock.unit();
        let _ = writeln!(text, "machine    {}", self.machine.line());
        let _ = writeln!(text, "placement  {}", self.placement);
        let _ = writeln!(text, "clock      {}", self.clock);
        let what = match unit {
            Unit::Instructions => "everything that the machine executed, kernel included",
            Unit::Nanoseconds => "wall clock; aims in instructions do not apply",
        };
        let _ = writeln!(text, "unit       {unit} ({what}), medians\n");
        let _ = writeln!(
            text,
            "{:<22} {:>14} {:>14} {:>9} {:>12} {:>7}  what",
            "id", "base", "dune", "ratio", "aim", ""
        );
        for row in &self.rows {
            let base = match row.median(row.base) {
                Some(value) if row.base == LINUX => number(value),
                Some(value) => format!("{} {}", row.base, number(value)),
                None => String::new(),
            };
            let (dune, label) = match (&row.missing, row.median(DUNE)) {
                (Some(_), _) => ("not measured".to_owned(), row.label),
                (None, value) => (value.map(number).unwrap_or_default(), row.label),
            };
            let _ = writeln!(
                text,
                "{:<22} {:>14} {:>14} {:>9} {:>12} {:>7}  {}",
                row.id,
                base,
                dune,
                row.ratio(),
                row.aim.map(number).unwrap_or_default(),
                row.verdict(),
                match row.unit {
                    Some(unit) => format!("{label} ({unit})"),
                    None => label.to_owned(),
                }
            );
        }
        text.push('\n');
        for row in &self.rows {
            row.details(&mut text);
        }
        // One line for each reason, however many rows it concerns.
        let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for row in &self.rows {
            if let Some(reason) = &row.missing {
                reasons.entry(reason).or_default().push(row.id);
            }
        }
        for (reason, ids) in reasons {
            let _ = writeln!(text, "  not measured: {}: {reason}", ids.join(", "));
        }
        text
    }
}

/// A number with its thousands apart: `10,056` or `12.5`.
pub(crate) fn number(value: f64) -> String {
    let tenths = (value * 10.0).round() as u64;
    let whole = (tenths / 10).to_string();
    let mut text = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if !tenths.is_multiple_of(10) && tenths < 10_000 {
        let _ = write!(text, ".{}", tenths % 10);
    }
    text
}

/// Writes a report whole, or not at all.
pub(crate) fn write(path: &Path, json: &str) -> anyhow::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot create the folder {}", folder.display()))?;
    }
    let unfinished = path.with_extension("json.part");
    std::fs::write(&unfinished, format!("{json}\n"))
        .and_then(|()| std::fs::rename(&unfinished, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(value: f64) -> Figure {
        Figure::of(vec![value])
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(number(10_056.0), "10,056");
        assert_eq!(number(12.5), "12.5");
        assert_eq!(number(338.0), "338");
        assert_eq!(number(1_234.5), "1,234");
        assert_eq!(number(26_700_000.0), "26,700,000");
    }

    #[test]
    fn verdicts_and_ratios() {
        let mut row = Row::new("a", "b");
        assert_eq!((row.verdict(), row.ratio().as_str()), ("", ""));
        row.add(LINUX, figure(100.0));
        row.add(DUNE, figure(50.0));
        row.set_aim(50.0);
        assert_eq!((row.verdict(), row.ratio().as_str()), ("met", "2.00x"));
        row.set_aim(49.0);
        assert_eq!(row.verdict(), "MISSED");
    }

    #[test]
    fn whole_numbers_are_whole_in_json() {
        let text = serde_json::to_string(&[Number(338.0), Number(12.5)]).unwrap();
        assert_eq!(text, "[338,12.5]");
    }
}
