//! Snapshots of programs that do everything to spoil them. A test binary that
//! uses this is the harness, the sandbox, and the program in it.
#![allow(dead_code, reason = "each test target uses a part of it")]

mod program;
mod service;

use std::process::{Command, ExitCode, Output, Stdio};

use dune_sandbox::engine::Engine;
use dune_sandbox::engine::in_guest::InGuest;
use dune_sandbox::engine::on_host::OnHost;
use dune_sandbox::snapshot::Marker;

const ROLE: &str = "DUNE_TEST_SNAPSHOT";

/// What this process was started for, if it is not the harness.
pub(crate) fn role() -> Option<ExitCode> {
    let role = std::env::var(ROLE).ok()?;
    let words: Vec<String> = std::env::args().skip(1).collect();
    if role == "program" {
        program::run(&words[0]);
    }
    Some(sandbox(&role, &words))
}

/// The arguments: the service, its number of runs, the program, its arguments.
fn sandbox(placement: &str, words: &[String]) -> ExitCode {
    let run = || -> Result<dune_sandbox::Outcome, Box<dyn std::error::Error>> {
        let engine: Box<dyn Engine> = if placement == "guest" {
            Box::new(InGuest::new()?)
        } else {
            Box::new(OnHost::new()?)
        };
        let runs = words[1].parse()?;
        let service = service::of(&words[0], runs);
        let command = dune_sandbox::Command::new(std::env::current_exe()?)
            .args(&words[2..])
            .env(ROLE, "program");
        Ok(command.serve(Marker::Call, service).run(engine)?)
    };
    match run() {
        Ok(outcome) => outcome.end.leave(),
        Err(error) => {
            println!("the sandbox failed: {error}");
            ExitCode::from(125)
        }
    }
}

/// Runs a program under a service.
pub(crate) fn run(placement: &str, words: &[&str]) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .env(ROLE, placement)
        .args(words)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[track_caller]
fn expect(placement: &str, words: &[&str], expected: &str) {
    let output = run(placement, words);
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(text, expected, "{errors}");
    assert!(output.status.success(), "{:?} {errors}", output.status);
}

pub(crate) fn every_byte_and_register_comes_back(placement: &str, runs: &str) {
    expect(placement, &["compare", runs, "random"], "all the same\n");
}

pub(crate) fn a_run_sees_nothing_of_the_one_before(placement: &str) {
    let expected = "before the marker\n1: RUN 0\n".to_owned()
        + "before the marker\n1: RUN 1\n"
        + "before the marker\n1: RUN 2\n";
    expect(placement, &["numbered", "3", "echo"], &expected);
}

pub(crate) fn nothing_is_left_behind_by_many_returns(placement: &str, runs: &str) {
    expect(placement, &["leaks", runs, "short", "more"], "no leak\n");
}

pub(crate) fn snapshots_nest(placement: &str) {
    let expected = "1 [1, 1, 0, 0] first\n\
                    2 [2, 1, 2, 0] deep\n\
                    3 [3, 1, 2, 3] end\n\
                    3 [3, 1, 2, 3] again\n\
                    2 [2, 1, 2, 0] back\n\
                    3 [3, 1, 2, 3] on\n\
                    1 [1, 1, 0, 0] bottom\n\
                    2 [2, 1, 2, 0] bottom\n\
                    3 [3, 1, 2, 3] bottom\n\
                    1 [1, 1, 0, 0] merged\n\
                    2 [2, 1, 2, 0] merged\n\
                    3 [3, 1, 2, 3] merged\n\
                    ";
    expect(placement, &["nested", "0", "nested"], expected);
}

pub(crate) fn threads_of_a_run_end_with_it(placement: &str) {
    expect(
        placement,
        &["endings", "6", "threads"],
        "Exit(30)\nKilled(6)\nKilled(11)\nExit(30)\nKilled(6)\nKilled(11)\n",
    );
}

pub(crate) fn a_snapshot_of_several_threads_is_refused(placement: &str) {
    let output = run(placement, &["endings", "1", "threads_before"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains("the program has 2 threads; a snapshot"),
        "{text}"
    );
}

pub(crate) fn every_ending_is_told(placement: &str) {
    expect(
        placement,
        &["endings", "9", "endings"],
        "Exit(7)\nKilled(6)\nKilled(15)\nKilled(9)\nKilled(14)\nKilled(4)\nExit(9)\nExit(11)\n\
         Exit(99)\n",
    );
}

pub(crate) fn a_run_without_end_is_interrupted(placement: &str) {
    expect(
        placement,
        &["interrupt", "5", "endless"],
        "Interrupted\nInterrupted\nEnd(Exit(0))\nInterrupted\nInterrupted\n",
    );
}

pub(crate) fn a_run_whose_first_thread_has_ended_is_interrupted(placement: &str) {
    expect(
        placement,
        &["interrupt", "5", "left_behind"],
        "Interrupted\nInterrupted\nEnd(Exit(0))\nInterrupted\nInterrupted\n",
    );
}

pub(crate) fn memory_that_cannot_be_written_comes_back(placement: &str) {
    let expected = "Exit(0)\n".repeat(6);
    expect(placement, &["endings", "6", "closed"], &expected);
}

pub(crate) fn a_return_from_the_marker_ends_the_other_threads(placement: &str) {
    expect(placement, &["rewind", "0", "elsewhere"], "End(Exit(3))\n");
}

pub(crate) fn a_run_that_ends_while_it_is_replaced_is_over(placement: &str, runs: &str) {
    let output = run(placement, &["endings", runs, "execve_race"]);
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    for (number, line) in text.lines().enumerate() {
        let expected: &[&str] = if number.is_multiple_of(10) {
            &["Killed(14)", "Exit(1)"]
        } else {
            &["Exit(7)", "Exit(0)"]
        };
        assert!(expected.contains(&line), "run {number}: {text} {errors}");
    }
    assert_eq!(text.lines().count().to_string(), runs, "{text} {errors}");
    assert!(output.status.success(), "{:?} {errors}", output.status);
}

pub(crate) fn the_guard_keeps_half_of_its_address_space(placement: &str) {
    let expected = "Exit(0)\nKilled(9)\nExit(0)\nKilled(9)\nExit(0)\n";
    expect(placement, &["endings", "5", "vast"], expected);
}

pub(crate) fn numbers_of_descriptors_stay_the_programs(placement: &str) {
    let expected = "Exit(0)\n".repeat(5);
    expect(placement, &["endings", "5", "numbers"], &expected);
}

pub(crate) fn limits_and_late_signals_do_not_outlive_a_run(placement: &str) {
    let expected = "Exit(0)\n".repeat(4);
    expect(placement, &["endings", "4", "limits"], &expected);
}
