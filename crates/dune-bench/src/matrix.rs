//! A row for each thing that was measured, a column for each contender.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use crate::clock::{Clock, Unit};
use crate::host::{self, Machine};
use crate::meter::Figure;
use crate::report::{Number, number};

/// Who has a column.
pub(crate) trait Column {
    /// Its name, and the column's.
    fn id(&self) -> &'static str;
    /// What a program is put behind; may be empty.
    fn command(&self) -> String;
    fn version(&self) -> Option<&str>;
    /// Why it has no figures here.
    fn missing(&self) -> Option<&str>;
}

/// What a row is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowUnit {
    /// As the run's clock counts.
    Clock,
    /// Memory.
    Kib,
    /// Things that happened.
    Count,
}

/// What a contender must not exceed.
#[derive(Clone, Debug)]
pub(crate) struct Aim {
    pub(crate) contender: &'static str,
    pub(crate) at_most: f64,
    /// Where the bound comes from.
    pub(crate) because: String,
}

/// One measured thing.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) id: String,
    label: String,
    unit: RowUnit,
    outcomes: BTreeMap<&'static str, Result<Figure, String>>,
    aims: Vec<Aim>,
}

impl Row {
    pub(crate) fn median(&self, contender: &str) -> Option<f64> {
        let outcome = self.outcomes.get(contender)?;
        outcome.as_ref().ok().map(|figure| figure.median)
    }

    pub(crate) fn is_time(&self) -> bool {
        self.unit == RowUnit::Clock
    }

    pub(crate) fn clear_aims(&mut self) {
        self.aims.clear();
    }

    pub(crate) fn add_aim(&mut self, aim: Aim) {
        self.aims.push(aim);
    }

    /// Whether an aim is met, where there is a figure for it.
    fn verdict(&self, aim: &Aim) -> Option<bool> {
        self.median(aim.contender).map(|value| value <= aim.at_most)
    }
}

/// Everything that a run found.
#[derive(Clone, Debug)]
pub(crate) struct Matrix<C> {
    machine: Machine,
    clock: Clock,
    contenders: Vec<C>,
    rows: Vec<Row>,
}

impl<C: Column + Clone> Matrix<C> {
    pub(crate) fn new(machine: Machine, clock: Clock, contenders: Vec<C>) -> Self {
        Self {
            machine,
            clock,
            contenders,
            rows: Vec::new(),
        }
    }

    /// The contenders that can run something here.
    pub(crate) fn able(&self) -> Vec<C> {
        let able = self.contenders.iter().filter(|one| one.missing().is_none());
        able.cloned().collect()
    }

    pub(crate) fn unit(&self) -> Unit {
        self.clock.unit()
    }

    pub(crate) fn add_row(&mut self, id: &str, label: &str, unit: RowUnit) {
        self.rows.push(Row {
            id: id.to_owned(),
            label: label.to_owned(),
            unit,
            outcomes: BTreeMap::new(),
            aims: Vec::new(),
        });
    }

    /// What a contender's figure is, or why it has none.
    pub(crate) fn put(
        &mut self,
        id: &str,
        contender: &'static str,
        outcome: Result<Figure, String>,
    ) {
        if let Some(row) = self.rows.iter_mut().find(|row| row.id == id) {
            row.outcomes.insert(contender, outcome);
        }
    }

    pub(crate) fn rows_mut(&mut self) -> &mut [Row] {
        &mut self.rows
    }

    fn row_unit(&self, row: &Row) -> String {
        match row.unit {
            RowUnit::Clock => self.clock.unit().to_string(),
            RowUnit::Kib => "KiB".to_owned(),
            RowUnit::Count => "count".to_owned(),
        }
    }

    /// The table: medians, then what could not be measured, then the aims.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        let unit = self.clock.unit();
        let _ = writeln!(text, "machine    {}", self.machine.line());
        let _ = writeln!(text, "clock      {}", self.clock);
        let _ = writeln!(text, "unit       {unit} (memory: KiB), medians\n");
        text.push_str(&self.body());
        text
    }

    /// The table without what it says of the machine.
    pub(crate) fn body(&self) -> String {
        let mut text = String::new();
        let able = self.able();
        let width = self.rows.iter().map(|row| row.id.len()).max();
        let width = width.unwrap_or(0).max(16);
        let _ = write!(text, "{:<width$}", "id");
        for contender in &able {
            let _ = write!(
                text,
                " {:>1$}",
                contender.id(),
                contender.id().len().max(13)
            );
        }
        text.push_str("  what\n");
        for row in &self.rows {
            let _ = write!(text, "{:<width$}", row.id);
            for contender in &able {
                let cell = match row.outcomes.get(contender.id()) {
                    Some(Ok(figure)) => number(figure.median),
                    Some(Err(_)) => "cannot".to_owned(),
                    None => String::new(),
                };
                let _ = write!(text, " {cell:>0$}", contender.id().len().max(13));
            }
            let _ = writeln!(text, "  {}", row.label);
        }
        self.reasons(&mut text);
        self.verdicts(&mut text);
        text
    }

    /// Why there is no figure: of contenders, and of single rows.
    fn reasons(&self, text: &mut String) {
        text.push('\n');
        for contender in &self.contenders {
            if let Some(reason) = contender.missing() {
                let _ = writeln!(text, "  not here: {}: {reason}", contender.id());
            }
        }
        // One line for each reason, however many rows it concerns.
        let mut reasons: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
        for row in &self.rows {
            for (contender, outcome) in &row.outcomes {
                if let Err(reason) = outcome {
                    reasons
                        .entry((contender, reason))
                        .or_default()
                        .push(&row.id);
                }
            }
        }
        for ((contender, reason), rows) in reasons {
            let _ = writeln!(text, "  cannot: {contender}: {}: {reason}", rows.join(", "));
        }
    }

    fn verdicts(&self, text: &mut String) {
        for row in &self.rows {
            for aim in &row.aims {
                let (verdict, value) = match (row.verdict(aim), row.median(aim.contender)) {
                    (Some(true), Some(value)) => ("met", number(value)),
                    (_, Some(value)) => ("MISSED", number(value)),
                    (_, None) => ("no figure", String::new()),
                };
                let _ = writeln!(
                    text,
                    "  aim {verdict}: {}: {} {value}, at most {} ({})",
                    row.id,
                    aim.contender,
                    number(aim.at_most),
                    aim.because
                );
            }
        }
    }

    /// The same for programs.
    ///
    /// # Errors
    /// None that can happen: the structure is plain.
    pub(crate) fn json(&self) -> anyhow::Result<String> {
        let report = JsonReport {
            machine: &self.machine,
            placement: host::placement().name(),
            unit: self.clock.unit().to_string(),
            contenders: self.json_contenders(),
            rows: self.json_rows(),
        };
        Ok(serde_json::to_string_pretty(&report)?)
    }

    pub(crate) fn json_contenders(&self) -> Vec<JsonContender<'_>> {
        self.contenders.iter().map(JsonContender::of).collect()
    }

    pub(crate) fn json_rows(&self) -> Vec<JsonRow<'_>> {
        self.rows.iter().map(|row| self.json_row(row)).collect()
    }

    fn json_row<'a>(&self, row: &'a Row) -> JsonRow<'a> {
        let figures = row.outcomes.iter();
        let mut values = BTreeMap::new();
        let mut missing = BTreeMap::new();
        for (contender, outcome) in figures {
            match outcome {
                Ok(figure) => {
                    values.insert(*contender, Number(figure.median));
                }
                Err(reason) => {
                    missing.insert(*contender, reason.as_str());
                }
            }
        }
        JsonRow {
            id: &row.id,
            label: &row.label,
            unit: self.row_unit(row),
            values,
            missing,
            aim: row.aims.first().map(|aim| Number(aim.at_most)),
            aims: row
                .aims
                .iter()
                .map(|aim| JsonAim {
                    contender: aim.contender,
                    at_most: Number(aim.at_most),
                    because: &aim.because,
                    met: row.verdict(aim),
                })
                .collect(),
        }
    }
}

#[derive(Debug, Serialize)]
struct JsonReport<'a> {
    machine: &'a Machine,
    placement: &'a str,
    unit: String,
    contenders: Vec<JsonContender<'a>>,
    rows: Vec<JsonRow<'a>>,
}

#[derive(Debug, Serialize)]
pub(crate) struct JsonContender<'a> {
    id: &'a str,
    command: String,
    version: Option<&'a str>,
    missing: Option<&'a str>,
}

impl<'a> JsonContender<'a> {
    fn of(contender: &'a impl Column) -> Self {
        Self {
            id: contender.id(),
            command: contender.command(),
            version: contender.version(),
            missing: contender.missing(),
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct JsonRow<'a> {
    id: &'a str,
    label: &'a str,
    unit: String,
    values: BTreeMap<&'a str, Number>,
    /// Why a contender has no value.
    missing: BTreeMap<&'a str, &'a str>,
    aim: Option<Number>,
    aims: Vec<JsonAim<'a>>,
}

#[derive(Debug, Serialize)]
struct JsonAim<'a> {
    contender: &'a str,
    at_most: Number,
    because: &'a str,
    met: Option<bool>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_aim_without_a_figure_is_neither_met_nor_missed() {
        let aim = |contender| Aim {
            contender,
            at_most: 10.0,
            because: String::new(),
        };
        let row = Row {
            id: "a".to_owned(),
            label: "b".to_owned(),
            unit: RowUnit::Clock,
            outcomes: BTreeMap::from([
                ("met", Ok(Figure::of(vec![10.0]))),
                ("missed", Ok(Figure::of(vec![10.2]))),
                ("cannot", Err("no".to_owned())),
            ]),
            aims: Vec::new(),
        };
        assert_eq!(row.verdict(&aim("met")), Some(true));
        assert_eq!(row.verdict(&aim("missed")), Some(false));
        assert_eq!(row.verdict(&aim("cannot")), None);
        assert_eq!(row.verdict(&aim("absent")), None);
    }
}
