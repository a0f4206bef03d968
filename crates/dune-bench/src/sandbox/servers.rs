//! Servers under load: time for each request, and percentiles of the latency.
//!
//! Server and client run under the same contender, on its own loopback: some contenders do not
//! let their programs be reached from outside. So the client's share is in every figure.

use std::path::Path;
use std::time::Duration;

use super::Matrix;
use super::commands::Folder;
use super::contender::Contender;
use super::launch::{self, Limits};
use super::{Bench, announce, text};
use crate::clock::Unit;
use crate::matrix::RowUnit;
use crate::meter::Figure;

const SCRIPT: &str = include_str!("servers.sh");
const CLIENTS: u32 = 10;

/// A row: its id, what it is, and what it is called in the load generator's output.
type Value = (&'static str, &'static str, fn(&str) -> Option<f64>);

/// What `redis-benchmark` says of both of its loads, and `ab` of its one.
const SERVERS: &[(&str, &[Value])] = &[
    (
        "redis",
        &[
            (
                "redis-set",
                "redis: SET, time for each of 10 clients' requests",
                |text| Some(1e9 / redis(text, "SET", 1)?),
            ),
            (
                "redis-get",
                "redis: GET, time for each of 10 clients' requests",
                |text| Some(1e9 / redis(text, "GET", 1)?),
            ),
            ("redis-get-p50", "redis: GET, median latency", |text| {
                Some(1e6 * redis(text, "GET", 4)?)
            }),
            (
                "redis-get-p99",
                "redis: GET, 99th percentile of the latency",
                |text| Some(1e6 * redis(text, "GET", 6)?),
            ),
        ],
    ),
    (
        "nginx",
        &[
            (
                "nginx-request",
                "nginx: 1 KiB by keep-alive, time for each of 10 clients' requests",
                |text| Some(1e9 / labelled(text, "Requests per second:")?),
            ),
            ("nginx-p50", "nginx: median latency", |text| {
                Some(1e6 * percentile(text, "50")?)
            }),
            (
                "nginx-p99",
                "nginx: 99th percentile of the latency",
                |text| Some(1e6 * percentile(text, "99")?),
            ),
        ],
    ),
];

pub(super) fn measure(bench: &Bench, matrix: &mut Matrix) {
    for (server, values) in SERVERS {
        if !values.iter().any(|(id, ..)| bench.is_wanted(id)) {
            continue;
        }
        for (id, label, _) in *values {
            matrix.add_row(id, label, RowUnit::Clock);
        }
        for contender in matrix.able() {
            announce(&contender, server);
            let outputs = load(bench, &contender, server);
            for (id, _, value) in *values {
                let outcome = outputs.as_ref().map_err(Clone::clone).and_then(|outputs| {
                    let samples: Option<Vec<f64>> =
                        outputs.iter().map(|text| value(text)).collect();
                    samples
                        .map(Figure::of)
                        .ok_or_else(|| "the load generator printed no figure".to_owned())
                });
                matrix.put(id, contender.id, outcome);
            }
        }
    }
}

/// What the load generator printed, each time.
fn load(bench: &Bench, contender: &Contender, server: &str) -> Result<Vec<String>, String> {
    // An emulated second is long: the load takes gVisor half of one.
    let (requests, seconds) = match bench.clock.unit() {
        Unit::Instructions => (300, 20),
        Unit::Nanoseconds => (3000, 120),
    };
    (0..bench.few().min(3))
        .map(|_| {
            let folder = Folder::new()?;
            let command = contender.command(
                Path::new("/bin/sh"),
                &[
                    "-c",
                    SCRIPT,
                    "servers",
                    server,
                    &requests.to_string(),
                    &CLIENTS.to_string(),
                    &text(&folder.0),
                ],
            );
            let limits = Limits {
                time: Duration::from_secs(seconds),
                ..Limits::default()
            };
            Ok(launch::run(command, limits)?.success()?.stdout)
        })
        .collect()
}

/// A column of `redis-benchmark --csv`: requests a second, then milliseconds.
fn redis(text: &str, test: &str, column: usize) -> Option<f64> {
    let row = text
        .lines()
        .find_map(|line| line.strip_prefix(&format!("\"{test}\",")))?;
    positive(
        row.split(',')
            .nth(column.checked_sub(1)?)?
            .trim_matches('"'),
    )
}

/// A line of `ab` that begins with its name.
fn labelled(text: &str, label: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(label))?;
    positive(rest.split_whitespace().next()?)
}

/// Of `ab -e`: milliseconds.
fn percentile(text: &str, which: &str) -> Option<f64> {
    let row = text
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{which},")))?;
    positive(row)
}

fn positive(text: &str) -> Option<f64> {
    text.trim().parse().ok().filter(|value| *value > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_generators_are_understood() {
        let csv = "\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\",\"p50_latency_ms\",\
                   \"p95_latency_ms\",\"p99_latency_ms\",\"max_latency_ms\"\n\
                   \"SET\",\"2000.00\",\"0.379\",\"0.024\",\"0.159\",\"0.319\",\"6.991\",\"12.031\"\n\
                   \"GET\",\"4000.00\",\"0.165\",\"0.040\",\"0.150\",\"0.247\",\"0.327\",\"2.743\"\n";
        let figures: Vec<_> = SERVERS[0].1.iter().map(|(.., value)| value(csv)).collect();
        let expected = [500_000.0, 250_000.0, 150_000.0, 327_000.0];
        for (figure, expected) in figures.into_iter().zip(expected) {
            assert!(
                (figure.unwrap() - expected).abs() < 1e-3,
                "{figure:?} is not {expected}"
            );
        }
        let ab = "Requests per second:    1000.00 [#/sec] (mean)\n\
                  Percentage served,Time in ms\n50,0.500\n99,2.000\n100,9.000\n";
        let figures: Vec<_> = SERVERS[1].1.iter().map(|(.., value)| value(ab)).collect();
        let expected = [1_000_000.0, 500_000.0, 2_000_000.0];
        for (figure, expected) in figures.into_iter().zip(expected) {
            assert!(
                (figure.unwrap() - expected).abs() < 1e-3,
                "{figure:?} is not {expected}"
            );
        }
        assert_eq!(SERVERS[1].1[0].2(""), None);
        assert_eq!(SERVERS[0].1[0].2("\"SET\",\"0.00\"\n"), None);
    }
}
