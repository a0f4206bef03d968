//! The harness itself: what it says of tests that pass, fail, hang and die.

use std::path::PathBuf;
use std::process::{Command, Output};

/// The test target `fixture`, built beside this one.
fn fixture() -> PathBuf {
    target("fixture")
}

fn target(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let mut found: Vec<_> = own
        .parent()
        .unwrap()
        .read_dir()
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let file = path.file_name().unwrap().to_string_lossy().into_owned();
            file.strip_prefix(&format!("{name}-"))
                .is_some_and(|hash| !hash.contains('.'))
        })
        .collect();
    found.sort_by_key(|path| path.metadata().unwrap().modified().unwrap());
    found
        .pop()
        .expect("cargo builds all targets of a package together; run `cargo test -p dune-testing`")
}

fn run(arguments: &[&str]) -> (Output, String) {
    let output = Command::new(fixture())
        .args(arguments)
        .env("DUNE_TESTING_FIXTURE", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output, text)
}

#[track_caller]
fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "`{word}` is missing in:\n{text}");
    }
}

#[test]
fn a_passing_test_passes_and_is_quiet() {
    let (output, text) = run(&["--exact", "passes"]);
    assert!(output.status.success());
    assert_says(&text, &["1 passed; 0 failed"]);
    assert!(!text.contains("a word on standard output"));
}

#[test]
fn nocapture_shows_the_output() {
    let (_, text) = run(&["--exact", "passes", "--nocapture"]);
    assert_says(&text, &["a word on standard output"]);
}

#[test]
fn a_panic_is_shown_with_the_output() {
    let (output, text) = run(&["--exact", "fails"]);
    assert_eq!(output.status.code(), Some(101));
    assert_says(
        &text,
        &["panicked", "a word before the end", "one is not two"],
    );
}

#[test]
fn an_error_is_a_failure() {
    let (output, text) = run(&["--exact", "fails_with_a_result"]);
    assert!(!output.status.success());
    assert_says(&text, &["the test returned an error: \"no\""]);
}

#[test]
fn a_hang_ends_and_says_where() {
    let (output, text) = run(&["--exact", "hangs"]);
    assert!(!output.status.success());
    assert_says(
        &text,
        &[
            "still running after 2.0 s and killed",
            "sleeping",
            "about to hang",
        ],
    );
}

#[test]
fn a_death_by_signal_has_its_name() {
    let (output, text) = run(&["--exact", "aborts"]);
    assert!(!output.status.success());
    assert_says(&text, &["died of signal 6 (SIGABRT"]);
}

#[test]
fn an_exit_is_no_success() {
    let (_, text) = run(&["--exact", "exits"]);
    assert_says(&text, &["ended with exit code 3"]);
}

#[test]
fn what_a_test_starts_ends_with_it() {
    let started = std::time::Instant::now();
    let (output, _) = run(&["--exact", "leaves_a_process_behind"]);
    assert!(output.status.success());
    assert!(started.elapsed().as_secs() < 60);
}

#[test]
fn an_ignored_test_says_why() {
    let (output, text) = run(&["--exact", "is_ignored"]);
    assert!(output.status.success());
    assert_says(&text, &["1 ignored", "the moon is full"]);
}

#[test]
fn a_list_runs_nothing() {
    let (output, text) = run(&["--list"]);
    assert!(output.status.success());
    assert_says(&text, &["hangs: test", "passes_under_another_name: test"]);
}

#[test]
fn a_crash_of_the_guest_is_one_failure() {
    let output = Command::new(fixture())
        .arg("lab_")
        .env("DUNE_TESTING_FIXTURE", "1")
        .env("DUNE_TEST_RING0", "lab")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let complaints = String::from_utf8_lossy(&output.stderr);
    if complaints.contains("are IGNORED") {
        assert!(std::env::var_os("DUNE_REQUIRE_RING0").is_none_or(|value| value != "1"));
        eprintln!("{complaints}");
        return;
    }
    assert_says(
        &text,
        &[
            "2 passed; 1 failed",
            "it took the lab down",
            "last lines of the guest's kernel",
            "sysrq",
        ],
    );
}

#[test]
fn without_a_lab_ring0_tests_are_ignored_or_fail() {
    // A kernel and an emulator that cannot be had: an empty cache and PATH.
    let empty = tempfile::tempdir().unwrap();
    let run = |required: &str| {
        Command::new(target("ring0"))
            .args(["--exact", "passes_at_ring0"])
            .env("DUNE_TEST_RING0", "lab")
            .env("DUNE_REQUIRE_RING0", required)
            // Not a number of CPUs that any lab has.
            .env("DUNE_TEST_CPUS", "1000")
            .env("XDG_CACHE_HOME", empty.path())
            .output()
            .unwrap()
    };
    let ignored = run("0");
    assert!(ignored.status.success());
    let said = String::from_utf8_lossy(&ignored.stderr).into_owned();
    assert_says(&said, &["*** 1 ring 0 tests are IGNORED", "--cpus 1000"]);
    let failed = run("1");
    assert_eq!(failed.status.code(), Some(101));
    let said = String::from_utf8_lossy(&failed.stdout).into_owned();
    assert_says(&said, &["needs ring 0, and the lab cannot run"]);
}
