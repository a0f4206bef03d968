//! Scenarios of threads and processes: each prints what it sees, and must print
//! the same and end in the same way natively and in the sandbox.
//!
//! A test binary that uses this is also the program and what runs it: started
//! with `DUNE_TEST_ROLE` it is one of them.
#![allow(dead_code, reason = "each test target uses a part of it")]

pub(crate) mod features;
pub(crate) mod processes;
pub(crate) mod threads;

use std::process::{Command, ExitCode, Output, Stdio};

use dune_sandbox::engine::Engine;
use dune_sandbox::engine::in_guest::InGuest;
use dune_sandbox::engine::on_host::OnHost;
use libtest_mimic::{Arguments, Failed, Trial};

const ROLE: &str = "DUNE_TEST_ROLE";
/// Set for a program in the sandbox.
const SANDBOXED: &str = "DUNE_TEST_SANDBOXED";

/// Whether this is the program in the sandbox, for what is to differ from its native run.
pub(crate) fn is_sandboxed() -> bool {
    std::env::var_os(SANDBOXED).is_some()
}

/// What a role does.
pub(crate) type Scenario = (&'static str, fn());

fn all() -> impl Iterator<Item = &'static Scenario> {
    threads::SCENARIOS
        .iter()
        .chain(processes::SCENARIOS)
        .chain(features::SCENARIOS)
}

/// What this process was started for, if it is not the harness.
pub(crate) fn role() -> Option<ExitCode> {
    let role = std::env::var(ROLE).ok()?;
    Some(match role.as_str() {
        "program" => program(),
        role => sandbox(role),
    })
}

fn program() -> ExitCode {
    let name = std::env::args().nth(1).unwrap_or_default();
    match all().find(|(other, _)| *other == name) {
        Some((_, scenario)) => {
            scenario();
            println!("end");
            ExitCode::SUCCESS
        }
        None => ExitCode::FAILURE,
    }
}

fn sandbox(placement: &str) -> ExitCode {
    let run = || -> Result<dune_sandbox::Outcome, Box<dyn std::error::Error>> {
        let command = dune_sandbox::Command::new(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .env(SANDBOXED, "1")
            .env(ROLE, "program");
        let engine: Box<dyn Engine> = if placement == "guest" {
            Box::new(InGuest::new()?)
        } else {
            Box::new(OnHost::new()?)
        };
        Ok(command.run(engine)?)
    };
    match run() {
        Ok(outcome) => outcome.end.leave(),
        Err(error) => {
            println!("the sandbox failed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Each scenario as a test, with the engine on host.
pub(crate) fn on_host(scenarios: &'static [Scenario]) -> ExitCode {
    let report = dune_kvm::probe::probe();
    let no_kvm = report.natural_placement() == dune_kvm::probe::Placement::Lab;
    if no_kvm && std::env::var_os("DUNE_REQUIRE_RING0").is_some_and(|value| value == "1") {
        eprintln!("this machine has no usable KVM: {}", report.kvm);
        return ExitCode::FAILURE;
    }
    let kind = if no_kvm {
        report.kvm.to_string()
    } else {
        String::new()
    };
    let trials = scenarios
        .iter()
        .map(|&(name, _)| {
            Trial::test(name, move || compare(name, "host").map_err(Failed::from))
                .with_kind(kind.clone())
                .with_ignored_flag(no_kvm)
        })
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// Compares the scenarios with the engine in guest.
///
/// # Panics
///
/// If any of them differs.
pub(crate) fn in_guest(names: &[&str]) {
    let failures: Vec<String> = names
        .iter()
        .filter_map(|name| {
            let failed = compare(name, "guest").err()?;
            Some(format!("{name}: {failed}"))
        })
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn compare(name: &str, placement: &str) -> Result<(), String> {
    let run = |role: &str| {
        Command::new(std::env::current_exe()?)
            .env(ROLE, role)
            .arg(name)
            .stdin(Stdio::null())
            .output()
    };
    let native = run("program").map_err(|error| error.to_string())?;
    let sandboxed = run(placement).map_err(|error| error.to_string())?;
    if native.status == sandboxed.status && native.stdout == sandboxed.stdout {
        return Ok(());
    }
    let text = |output: &Output| {
        format!(
            "{}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    };
    Err(format!(
        "natively: {}in the sandbox: {}",
        text(&native),
        text(&sandboxed)
    ))
}
