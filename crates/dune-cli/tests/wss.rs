//! `dune wss`: which memory a program uses, over time.

use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

const ROLE: &str = "DUNE_TEST_WSS";
const BIG: usize = 32 << 20;
const SMALL: usize = 1 << 20;
const PAGE: usize = 4096;

/// Uses much memory for a while, and then little.
fn program() -> ! {
    let mut memory = vec![1_u8; BIG];
    let mut touch = |bytes: usize, rounds: u32| {
        let began = Instant::now();
        let mut done = 0;
        while done < rounds || began.elapsed() < Duration::from_millis(800) {
            for byte in memory[..bytes].iter_mut().step_by(PAGE) {
                *byte = std::hint::black_box(byte.wrapping_add(1));
            }
            done += 1;
        }
    };
    touch(BIG, 3);
    touch(SMALL, 100);
    std::process::exit(5);
}

fn what_is_used_no_more_does_not_count_in(placement: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let output = Command::new(env!("CARGO_BIN_EXE_dune"))
        .args([
            "wss",
            "--interval",
            "100ms",
            "--json",
            "--placement",
            placement,
        ])
        .arg("--svg")
        .arg(path("figure.svg"))
        .arg("-o")
        .arg(path("samples"))
        .arg("--")
        .arg(std::env::current_exe().unwrap())
        .env(ROLE, "program")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    let text = std::fs::read_to_string(path("samples")).unwrap();
    let samples: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let value = |sample: &serde_json::Value, key: &str| sample[key].as_u64().unwrap() as usize;
    let (at, most) = samples
        .iter()
        .map(|sample| value(sample, "anonymous"))
        .enumerate()
        .max_by_key(|(_, used)| *used)
        .unwrap();
    assert!(most >= BIG / 2, "{text}");
    let later = &samples[at + 1..];
    let is_small = |used: usize| (SMALL..BIG / 4).contains(&used);
    assert!(
        later
            .iter()
            .any(|sample| is_small(value(sample, "anonymous"))),
        "{text}"
    );
    let last = samples.last().unwrap();
    assert!(
        value(last, "ever_used") >= BIG && value(last, "mapped") >= BIG,
        "{text}"
    );
    for sample in &samples {
        let kinds = ["code", "file", "heap", "stack", "anonymous", "shared"];
        let sum: usize = kinds.iter().map(|kind| value(sample, kind)).sum();
        assert_eq!(sum, value(sample, "used"));
        assert!(value(sample, "first_used") <= sum && sum <= value(sample, "ever_used"));
    }
    // The program itself has always to be somewhere.
    assert!(
        samples
            .iter()
            .any(|sample| value(sample, "code") > 0 && value(sample, "stack") > 0)
    );
    let figure = std::fs::read_to_string(path("figure.svg")).unwrap();
    assert!(figure.starts_with("<svg"));
}

fn what_is_used_no_more_does_not_count() {
    what_is_used_no_more_does_not_count_in("host");
}

fn in_guest() {
    what_is_used_no_more_does_not_count_in("guest");
}

fn the_table_has_a_line_for_each_sample() {
    let output = Command::new(env!("CARGO_BIN_EXE_dune"))
        .args([
            "wss",
            "--placement",
            "host",
            "--",
            "sh",
            "-c",
            "echo out; exit 3",
        ])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(3), b"out\n".as_slice())
    );
    let table = String::from_utf8(output.stderr).unwrap();
    let mut lines = table.lines();
    let header: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!(header[..2], ["seconds", "used"]);
    let last: Vec<&str> = lines.last().unwrap().split_whitespace().collect();
    assert_eq!(last.len(), header.len());
    assert!(last.last().unwrap().parse::<u64>().unwrap() > 0, "{table}");
}

fn main() -> ExitCode {
    const TESTS: &[dune_testing::Test] = dune_testing::list! {
        plain what_is_used_no_more_does_not_count, timeout 120,
        plain the_table_has_a_line_for_each_sample,
        ring0 in_guest, timeout 120,
    };
    if std::env::var_os(ROLE).is_some() {
        program();
    }
    dune_testing::main(TESTS)
}
