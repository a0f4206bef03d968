//! The rows of `dune-operations`: what programs do all day.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Matrix;
use super::contender::Contender;
use super::launch::{self, Limits};
use super::{Bench, announce};
use crate::matrix::RowUnit;
use crate::meter::Figure;

/// Each operation, in the order in which they are tried: what may fail comes last.
pub(super) const OPERATIONS: &[(&str, &str)] = &[
    (
        "null-call",
        "a call with nothing to do (rseq without an area), which every guard answers",
    ),
    ("getppid", "getppid"),
    ("getpid", "getpid"),
    ("clock", "clock_gettime of libc (CLOCK_MONOTONIC)"),
    ("read-1", "pread of 1 byte of a file"),
    ("write-1", "pwrite of 1 byte to a file"),
    ("read-64k", "pread of 64 KiB of a file"),
    ("write-64k", "pwrite of 64 KiB to a file"),
    ("open-close", "open a file and close it"),
    ("map-touch-unmap", "mmap a page, write to it, munmap"),
    ("page-fault", "first touch of an anonymous page"),
    ("signal", "a signal to itself, its handler, and back"),
    ("thread", "make a thread and join it"),
    (
        "context-switch",
        "hand over to another thread by futex, and back",
    ),
    ("fork-wait", "fork, exit, wait"),
    ("fork-exec-wait", "fork, exec /bin/true, wait"),
    (
        "pipe-ping-pong",
        "a byte through a pipe to another process, and one back",
    ),
];

/// For all operations together.
const TIME: Duration = Duration::from_secs(100);

pub(super) fn measure(bench: &Bench, matrix: &mut Matrix) {
    let wanted: Vec<_> = OPERATIONS
        .iter()
        .filter(|(id, _)| bench.is_wanted(id))
        .collect();
    if wanted.is_empty() {
        return;
    }
    for (id, label) in &wanted {
        matrix.add_row(id, label, RowUnit::Clock);
    }
    for contender in matrix.able() {
        announce(&contender, "operations");
        let mut names: Vec<&str> = wanted.iter().map(|(id, _)| *id).collect();
        // A contender that dies at an operation goes on with the next.
        while !names.is_empty() {
            let found = run(bench, &contender, &names);
            let done = found.len();
            for (id, outcome) in found {
                matrix.put(&id, contender.id, outcome);
            }
            names.drain(..done.clamp(1, names.len()));
        }
    }
}

/// The outcome of each operation, in order, up to one at which the program died.
fn run(
    bench: &Bench,
    contender: &Contender,
    names: &[&str],
) -> Vec<(String, Result<Figure, String>)> {
    let samples = bench.samples.to_string();
    let mut arguments = vec!["measure", &samples];
    arguments.extend(names);
    let limits = Limits {
        time: TIME,
        ..Limits::default()
    };
    let command = contender.command(&bench.operations, &arguments);
    let ended = match launch::run(command, limits) {
        Ok(ended) => ended,
        Err(reason) => return vec![(names[0].to_owned(), Err(reason))],
    };
    let mut said = said(&ended.stdout, names, |ticks, operations| {
        bench.clock.per_operation(ticks, operations)
    });
    if said.len() < names.len() {
        said.push((names[said.len()].to_owned(), Err(ended.reason())));
    }
    said
}

/// Reads what the program said of the operations that it came to the end of.
fn said(
    text: &str,
    names: &[&str],
    figure: impl Fn(u64, u32) -> f64,
) -> Vec<(String, Result<Figure, String>)> {
    let mut samples: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut outcomes = Vec::new();
    for line in text.lines() {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let (name, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        // The program speaks of what it was asked for, in order.
        if names.get(outcomes.len()) != Some(&name) {
            continue;
        }
        match word {
            "sample" => {
                let mut numbers = rest.split(' ');
                let operations = numbers.next().and_then(|number| number.parse().ok());
                let ticks = numbers.next().and_then(|number| number.parse().ok());
                if let (Some(operations @ 1..), Some(ticks)) = (operations, ticks) {
                    samples
                        .entry(name)
                        .or_default()
                        .push(figure(ticks, operations));
                }
            }
            "end" => outcomes.push((
                name.to_owned(),
                match samples.remove(name) {
                    Some(samples) => Ok(Figure::of(samples)),
                    None => Err("the program printed no sample".to_owned()),
                },
            )),
            "fail" => outcomes.push((name.to_owned(), Err(rest.to_owned()))),
            _ => {}
        }
    }
    outcomes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_failures_and_a_sudden_end() {
        let text = "begin a\nsample a 2 10\nsample a 2 30\nsample a 2 20\nend a\n\
                    begin b\nfail b it did not\nbegin c\nsample c 1 1\n";
        let said = said(text, &["a", "b", "c"], |ticks, operations| {
            ticks as f64 / f64::from(operations)
        });
        assert_eq!(said.len(), 2);
        assert_eq!(said[0].1.as_ref().unwrap().median, 10.0);
        assert_eq!(said[1].1.as_ref().unwrap_err(), "it did not");
    }

    #[test]
    fn a_program_cannot_speak_of_what_it_was_not_asked() {
        let said = said("sample x 1 1\nend x\n", &["a"], |_, _| 1.0);
        assert!(said.is_empty());
    }
}
