//! Tests that pass, fail, hang and die, for `harness.rs` to look at. They are
//! only there when it asks for them.

use std::fs;
use std::process::{Command, ExitCode};
use std::time::Duration;

use dune_testing::Test;

fn passes() {
    println!("a word on standard output");
}

fn passes_with_a_result() -> Result<(), String> {
    Ok(())
}

fn fails() {
    eprintln!("a word before the end");
    assert_eq!(1, 2, "one is not two");
}

fn fails_with_a_result() -> Result<(), String> {
    Err("no".to_owned())
}

fn hangs() {
    println!("about to hang");
    std::thread::sleep(Duration::from_secs(1000));
}

fn aborts() {
    std::process::abort();
}

fn exits() {
    std::process::exit(3);
}

#[expect(clippy::zombie_processes, reason = "what it tests")]
fn leaves_a_process_behind() {
    Command::new("sleep").arg("1000").spawn().unwrap();
}

fn is_ignored() {
    dune_testing::ignore("the moon is full");
}

/// Says whether this process runs in the lab, whose kernel may be crashed.
fn in_lab() -> bool {
    fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("QEMU TCG CPU"))
}

fn crashes_the_guest() {
    assert!(in_lab());
    fs::write("/proc/sysrq-trigger", "c").unwrap();
}

fn runs_in_the_lab() {
    assert!(in_lab());
}

const TESTS: &[Test] = dune_testing::list! {
    plain passes,
    plain passes_with_a_result,
    plain fails,
    plain fails_with_a_result,
    plain hangs, timeout 2,
    plain aborts,
    plain exits,
    plain leaves_a_process_behind,
    plain is_ignored,
    plain passes as "passes_under_another_name",
    ring0 runs_in_the_lab as "lab_before_the_crash",
    ring0 crashes_the_guest as "lab_crash",
    ring0 runs_in_the_lab as "lab_after_the_crash",
};

fn main() -> ExitCode {
    let on_demand = std::env::var_os("DUNE_TESTING_FIXTURE").is_some();
    dune_testing::main(if on_demand { TESTS } else { &[] })
}
