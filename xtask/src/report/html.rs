//! The report's page.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use anyhow::Result;

use super::paper::{TABLES, Table};
use super::{Row, Section, Versions, figure, number};

const STYLE: &str = "body{font:15px/1.45 sans-serif;margin:2em auto;max-width:80em;color:#222}\
table{border-collapse:collapse;margin:1em 0;font-size:13px}th,td{padding:.25em .6em;\
border-bottom:1px solid #ddd;text-align:right}th:first-child,td:first-child,td.what{text-align:left}\
code{background:#f3f3f3;padding:.1em .3em}.met{color:#2a7a2a}.missed{color:#b02020;font-weight:bold}\
.none{color:#999}figure{margin:1em 0}figcaption{font-size:13px}section{margin-bottom:3em}";

/// The whole page.
pub(super) fn page(versions: &Versions, sections: &[Section]) -> Result<String> {
    let mut text = String::new();
    let _ = write!(
        text,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Dune: benchmarks\
         </title><style>{STYLE}</style></head><body>\n<h1>Dune: benchmarks</h1>\n<p>Dune {} \
         ({}), {}; written {}. Everything again: <code>cargo xtask bench all</code>; this page \
         from the figures that are there: <code>cargo xtask bench report</code>. Figures are \
         medians; bars are logarithmic.</p>\n<ul>\n",
        escape(versions.project),
        escape(&versions.commit),
        escape(&versions.rustc),
        escape(&versions.date),
    );
    for table in TABLES {
        let _ = writeln!(
            text,
            "<li><a href=\"#{}\">{}</a></li>",
            table.anchor(),
            escape(&table.heading())
        );
    }
    for section in sections {
        let anchor = anchor(section);
        let _ = writeln!(
            text,
            "<li><a href=\"#{anchor}\">{}</a></li>",
            title(section)
        );
    }
    text.push_str("</ul>\n");
    for table in TABLES {
        write_paper(&mut text, table, sections)?;
    }
    for section in sections {
        write_section(&mut text, section)?;
    }
    text.push_str("</body></html>\n");
    Ok(text)
}

fn anchor(section: &Section) -> String {
    escape(&format!("{}-{}", section.name, section.place))
}

fn title(section: &Section) -> String {
    let place = match section.place {
        "lab" => "in the lab",
        _ => "on the machine itself",
    };
    escape(&format!("{}, {place}", section.name))
}

/// A table of the paper, from each place that has figures for it.
fn write_paper(text: &mut String, table: &Table, sections: &[Section]) -> Result<()> {
    let _ = write!(
        text,
        "<section id=\"{}\">\n<h2>{}</h2>\n<p>{}</p>\n",
        table.anchor(),
        escape(&table.heading()),
        escape(table.about),
    );
    let mut is_empty = true;
    for section in sections {
        let rows = table.rows(section);
        if rows.is_empty() {
            continue;
        }
        is_empty = false;
        let _ = writeln!(text, "<h3>{}</h3>", title(section));
        write_origin(text, section);
        write_rows(text, section, rows)?;
    }
    if is_empty {
        let _ = writeln!(
            text,
            "<p class=\"none\">No figures yet: <code>cargo xtask bench {}</code></p>",
            escape(table.suite)
        );
    }
    text.push_str("</section>\n");
    Ok(())
}

fn write_section(text: &mut String, section: &Section) -> Result<()> {
    let _ = writeln!(
        text,
        "<section id=\"{}\">\n<h2>{}</h2>",
        anchor(section),
        title(section),
    );
    write_origin(text, section);
    write_contenders(text, section);
    for rows in groups(&section.found.rows) {
        write_rows(text, section, rows)?;
    }
    text.push_str("</section>\n");
    Ok(())
}

/// What the figures are of, and how to have them again.
fn write_origin(text: &mut String, section: &Section) {
    let found = &section.found;
    let machine = &found.machine;
    let _ = writeln!(
        text,
        "<p>{}, {} CPU, {} MiB; Linux {}; KVM {}; load {}; placement {}; {} samples; {}. Unit: \
         {}. Again: <code>{}</code></p>",
        escape(&machine.cpu),
        machine.cpus,
        machine.memory_mib,
        escape(&machine.kernel),
        escape(&machine.kvm),
        machine.load,
        escape(&found.placement),
        machine.samples,
        escape(&section.date),
        escape(&found.unit),
        escape(&section.command()),
    );
}

/// Rows with the same contenders: a table, and a figure for each.
fn write_rows(text: &mut String, section: &Section, rows: Vec<&Row>) -> Result<()> {
    let columns = section.columns(&rows);
    write_table(text, section, &rows, &columns);
    for row in rows {
        if let Some(svg) = figure::bars(row, &columns)? {
            let _ = writeln!(
                text,
                "<figure>{svg}<figcaption>{}: {} ({})</figcaption></figure>",
                escape(&row.id),
                escape(&row.label),
                escape(section.unit_of(row)),
            );
        }
    }
    Ok(())
}

/// The rows in tables: two rows whose contenders have nothing to do with each other are in
/// different ones.
fn groups(rows: &[Row]) -> Vec<Vec<&Row>> {
    let names = |row: &Row| -> BTreeSet<String> {
        row.values
            .keys()
            .chain(row.missing.keys())
            .cloned()
            .collect()
    };
    let mut groups: Vec<(BTreeSet<String>, Vec<usize>)> = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let mut all = names(row);
        let mut members = vec![index];
        // What this row connects is one group from here on.
        let mut apart = Vec::new();
        for (others, indexes) in groups {
            if others.is_disjoint(&all) {
                apart.push((others, indexes));
            } else {
                all.extend(others);
                members.extend(indexes);
            }
        }
        members.sort_unstable();
        apart.push((all, members));
        groups = apart;
    }
    groups.sort_by_key(|(_, members)| members.first().copied());
    let rows_of = |(_, members): (_, Vec<usize>)| {
        members
            .into_iter()
            .filter_map(|index| rows.get(index))
            .collect()
    };
    groups.into_iter().map(rows_of).collect()
}

fn write_contenders(text: &mut String, section: &Section) {
    if section.found.contenders.is_empty() {
        return;
    }
    text.push_str("<ul>\n");
    for contender in &section.found.contenders {
        let _ = write!(text, "<li>{}", escape(&contender.id));
        if !contender.command.is_empty() {
            let _ = write!(text, ": <code>{}</code>", escape(&contender.command));
        }
        if let Some(version) = &contender.version {
            let _ = write!(text, ", {}", escape(version));
        }
        if let Some(missing) = &contender.missing {
            let _ = write!(text, " <b>not here</b>: {}", escape(missing));
        }
        text.push_str("</li>\n");
    }
    text.push_str("</ul>\n");
}

fn write_table(text: &mut String, section: &Section, rows: &[&Row], columns: &[&str]) {
    text.push_str("<table><tr><th>id</th>");
    for column in columns {
        let _ = write!(text, "<th>{}</th>", escape(column));
    }
    text.push_str("<th>aim</th><th>what</th></tr>\n");
    for row in rows {
        let _ = write!(text, "<tr><td>{}</td>", escape(&row.id));
        for column in columns {
            write_cell(text, row, column);
        }
        let _ = writeln!(
            text,
            "<td>{}</td><td class=\"what\">{} ({})</td></tr>",
            aims(row),
            escape(&row.label),
            escape(section.unit_of(row))
        );
    }
    text.push_str("</table>\n");
}

fn write_cell(text: &mut String, row: &Row, column: &str) {
    let _ = match (row.values.get(column), row.missing.get(column)) {
        (Some(value), _) => write!(text, "<td>{}</td>", number(*value)),
        (None, Some(reason)) => write!(
            text,
            "<td class=\"none\" title=\"{0}\">cannot: {0}</td>",
            escape(reason)
        ),
        (None, None) => write!(text, "<td></td>"),
    };
}

fn aims(row: &Row) -> String {
    if row.aims.is_empty() {
        // The plain form: what Dune may cost.
        let Some(aim) = row.aim else {
            return String::new();
        };
        let met = row.values.get("dune").map(|value| *value <= aim);
        return verdict(met, &number(aim));
    }
    let lines = row.aims.iter().map(|aim| {
        let bound = format!(
            "{} at most {} ({})",
            aim.contender,
            number(aim.at_most),
            aim.because
        );
        verdict(aim.met, &bound)
    });
    lines.collect::<Vec<_>>().join("<br>")
}

fn verdict(met: Option<bool>, bound: &str) -> String {
    let (class, word) = match met {
        Some(true) => ("met", "met"),
        Some(false) => ("missed", "MISSED"),
        None => ("none", "no figure"),
    };
    format!("<span class=\"{class}\">{word}</span>: {}", escape(bound))
}

/// Text as HTML shows it.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
