//! Whole commands: start-up and memory, and work of a fixed size.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Matrix;
use super::contender::Contender;
use super::launch::{self, Limits};
use super::{Bench, announce, text};
use crate::clock::Unit;
use crate::crossings::compute;
use crate::matrix::RowUnit;
use crate::meter::Figure;

/// Python's own loops, each of a fixed size; prints a line for each.
const LOOPS: &str = include_str!("loops.py");
/// The loops, and what each one does.
const LOOP_ROWS: &[(&str, &str)] = &[
    ("python-calls", "python: recursive calls"),
    ("python-floats", "python: floating point"),
    ("python-dicts", "python: dictionaries and strings"),
    ("python-lists", "python: lists, sorting"),
];
/// A C project: makes its sources, compiles, links and runs it.
const PROJECT: &str = include_str!("project.sh");

/// For a command of any kind.
const TIME: Duration = Duration::from_secs(60);
/// Between two looks at the memory of a command.
const WATCH: Duration = Duration::from_micros(300);

struct Start {
    time: (&'static str, &'static str),
    memory: (&'static str, &'static str),
    program: &'static str,
    arguments: &'static [&'static str],
}

const STARTS: &[Start] = &[
    Start {
        time: ("start-true", "/bin/true, from start to end"),
        memory: ("memory-true", "/bin/true, peak memory of all processes"),
        program: "/bin/true",
        arguments: &[],
    },
    Start {
        time: ("start-python", "python3 -c pass, from start to end"),
        memory: (
            "memory-python",
            "python3 -c pass, peak memory of all processes",
        ),
        program: "/usr/bin/python3",
        arguments: &["-c", "pass"],
    },
];

pub(super) fn measure_starts(bench: &Bench, matrix: &mut Matrix) {
    for start in STARTS {
        start_up(bench, matrix, start);
    }
}

pub(super) fn measure_work(bench: &Bench, matrix: &mut Matrix) {
    cpu_bound(bench, matrix);
    loops(bench, matrix);
    project(bench, matrix);
}

/// Start-up and memory. A launcher that is small itself takes the time.
fn start_up(bench: &Bench, matrix: &mut Matrix, start: &Start) {
    let rows = [
        (start.time, RowUnit::Clock, None),
        (start.memory, RowUnit::Kib, Some(WATCH)),
    ];
    for ((id, label), unit, watch) in rows {
        if !bench.is_wanted(id) {
            continue;
        }
        matrix.add_row(id, label, unit);
        for contender in matrix.able() {
            announce(&contender, id);
            let outcome = samples(bench.samples.min(11), || {
                let launched = contender.command(Path::new(start.program), start.arguments);
                let mut command = std::process::Command::new(&bench.operations);
                command
                    .arg("run")
                    .arg(launched.get_program())
                    .args(launched.get_args());
                let ended = launch::run(command, Limits { time: TIME, watch })?.success()?;
                let (ticks, largest_kib) = run_line(&ended.stdout)?;
                Ok(match unit {
                    // The launcher's own memory is not the command's; what the watch missed
                    // of a short command the kernel's account of the largest has.
                    RowUnit::Kib => {
                        let all = ended.peak_kib.saturating_sub(LAUNCHER_KIB);
                        all.max(largest_kib) as f64
                    }
                    _ => bench.clock.per_operation(ticks, 1),
                })
            });
            matrix.put(id, contender.id, outcome);
        }
    }
}

/// What the launcher has resident itself, about: it is one of the processes that are seen.
const LAUNCHER_KIB: u64 = 1024;

/// `run TICKS PEAK_KIB`, the last line of the launcher.
fn run_line(stdout: &str) -> Result<(u64, u64), String> {
    stdout
        .lines()
        .last()
        .and_then(|line| line.strip_prefix("run "))
        .and_then(|numbers| numbers.split_once(' '))
        .and_then(|(ticks, kib)| Some((ticks.parse().ok()?, kib.parse().ok()?)))
        .ok_or_else(|| format!("the launcher printed something else: {stdout}"))
}

/// Several samples after one that warms up; the first failure ends them.
fn samples(
    count: usize,
    mut sample: impl FnMut() -> Result<f64, String>,
) -> Result<Figure, String> {
    sample()?;
    (0..count.max(1))
        .map(|_| sample())
        .collect::<Result<Vec<_>, _>>()
        .map(Figure::of)
}

/// The CPU-bound program of the core suite, timed inside.
fn cpu_bound(bench: &Bench, matrix: &mut Matrix) {
    let id = "cpu-bound";
    if !bench.is_wanted(id) {
        return;
    }
    matrix.add_row(
        id,
        "a CPU-bound program: sieve, floats, hashes",
        RowUnit::Clock,
    );
    for contender in matrix.able() {
        announce(&contender, id);
        let outcome = samples(bench.few(), || {
            let output = finished(&contender, &bench.own, &["compute-kernel"])?;
            let ticks = compute::parse(&output)
                .ok_or_else(|| format!("the program computed something else: {output}"))?;
            Ok(bench.clock.per_operation(ticks, 1))
        });
        matrix.put(id, contender.id, outcome);
    }
}

/// Python's loops, timed inside, by Python's own clock.
fn loops(bench: &Bench, matrix: &mut Matrix) {
    let wanted: Vec<_> = LOOP_ROWS
        .iter()
        .filter(|(id, _)| bench.is_wanted(id))
        .collect();
    if wanted.is_empty() {
        return;
    }
    for (id, label) in &wanted {
        matrix.add_row(id, label, RowUnit::Clock);
    }
    let rounds = bench.few().to_string();
    for contender in matrix.able() {
        announce(&contender, "python's loops");
        let output = finished(
            &contender,
            Path::new("/usr/bin/python3"),
            &["-c", LOOPS, &rounds],
        );
        for (id, _) in &wanted {
            let outcome = output.clone().and_then(|output| loop_figure(&output, id));
            matrix.put(id, contender.id, outcome);
        }
    }
}

/// The samples of `NAME RESULT NANOSECONDS...`, where the result is the right one. Where
/// instructions are counted, a nanosecond is one.
fn loop_figure(output: &str, id: &str) -> Result<Figure, String> {
    let line = output
        .lines()
        .find_map(|line| line.strip_prefix(id)?.strip_prefix(' '))
        .ok_or_else(|| format!("no line of {id} in: {output}"))?;
    let (verdict, numbers) = line.split_once(' ').unwrap_or((line, ""));
    if verdict != "right" {
        return Err(format!("the loop computed something else: {line}"));
    }
    let samples: Vec<f64> = numbers
        .split(' ')
        .filter_map(|number| number.parse().ok())
        .collect();
    if samples.is_empty() {
        return Err("no sample".to_owned());
    }
    Ok(Figure::of(samples))
}

/// Compiles a small C project, from start to end.
fn project(bench: &Bench, matrix: &mut Matrix) {
    let id = "compile-c";
    if !bench.is_wanted(id) {
        return;
    }
    matrix.add_row(
        id,
        "compile, link and run a C project of six files (gcc -O2)",
        RowUnit::Clock,
    );
    // Hours under emulation, for nothing that the other rows do not show.
    let emulated = bench.clock.unit() == Unit::Instructions;
    for contender in matrix.able() {
        if emulated {
            let reason = "left out in the lab: an emulated compiler takes too long";
            matrix.put(id, contender.id, Err(reason.to_owned()));
            continue;
        }
        announce(&contender, id);
        let outcome = samples(bench.few().min(3), || {
            let folder = Folder::new()?;
            let launched = contender.command(
                Path::new("/bin/sh"),
                &["-c", PROJECT, "project", &text(&folder.0)],
            );
            let mut command = std::process::Command::new(&bench.operations);
            command
                .arg("run")
                .arg(launched.get_program())
                .args(launched.get_args());
            let limits = Limits {
                time: TIME,
                ..Limits::default()
            };
            let ended = launch::run(command, limits)?.success()?;
            if !ended.stdout.starts_with("sum 5050\n") {
                return Err(format!("the project printed: {}", ended.stdout));
            }
            Ok(bench.clock.per_operation(run_line(&ended.stdout)?.0, 1))
        });
        matrix.put(id, contender.id, outcome);
    }
}

fn finished(contender: &Contender, program: &Path, arguments: &[&str]) -> Result<String, String> {
    let limits = Limits {
        time: TIME,
        ..Limits::default()
    };
    let ended = launch::run(contender.command(program, arguments), limits)?.success()?;
    Ok(ended.stdout)
}

/// An empty folder, removed with what is in it when dropped.
pub(super) struct Folder(pub(super) PathBuf);

impl Folder {
    pub(super) fn new() -> Result<Self, String> {
        let path = std::env::temp_dir().join(format!("dune-bench-{}", std::process::id()));
        std::fs::create_dir(&path).map_err(|error| format!("make {}: {error}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left lies in the folder for temporary files.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_results_have_no_figure() {
        let output = "python-calls right 5 7 6\npython-lists wrong 1 1 1\n";
        assert_eq!(loop_figure(output, "python-calls").unwrap().median, 6.0);
        assert!(loop_figure(output, "python-lists").is_err());
        assert!(loop_figure(output, "python-dicts").is_err());
    }

    #[test]
    fn the_launcher_is_understood() {
        assert_eq!(run_line("sum 5050\nrun 12 34\n"), Ok((12, 34)));
        assert!(run_line("").is_err());
    }
}
