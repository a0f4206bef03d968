//! What comes back from a command on the emulated Intel CPU.
//!
//! Each test boots Bochs, which takes ten seconds of a processor, so they run
//! only when asked for: `cargo test -p dune-lab --test intel -- --ignored`.

use std::path::PathBuf;
use std::time::Duration;

use dune_lab::{Command, Config, LabError, Outcome, Output, run_on_intel};

struct Ran {
    outcome: Result<Outcome, LabError>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

fn run(command: &Command, with: &[PathBuf]) -> Ran {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let mut output = Output {
        stdout: &mut stdout,
        stderr: &mut stderr,
    };
    let outcome = run_on_intel(&Config::default(), command, with, &mut output);
    Ran {
        outcome,
        stdout,
        stderr,
    }
}

fn shell(script: &str) -> Command {
    Command::new("sh").args(["-c", script])
}

#[test]
#[ignore = "boots Bochs: cargo xtask test --all"]
fn streams_exit_code_arguments_environment_and_files_travel() {
    let folder = tempfile::tempdir().unwrap();
    let every_byte: Vec<u8> = (0..=255).cycle().take(200_000).collect();
    let data = folder.path().join("data");
    std::fs::write(&data, &every_byte).unwrap();
    let command = shell(
        "read ept < /sys/module/kvm_intel/parameters/ept; read end; \
         echo \"$ept|$PWD|$VAR|$1|$end\" >&2; cat data; exit 7",
    )
    .args(["sh", "two words\n"])
    .env("VAR", "a=b")
    .current_dir(folder.path());
    let ran = run(
        &command,
        &[PathBuf::from("data"), PathBuf::from("/bin/cat")],
    );
    let stderr = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.outcome.unwrap().code, 7, "{stderr}");
    let expected = format!("Y|{}|a=b|two words\n|\n", folder.path().display());
    assert_eq!(stderr, expected);
    assert!(ran.stdout == every_byte, "{} bytes came", ran.stdout.len());
}

#[test]
#[ignore = "boots Bochs: cargo xtask test --all"]
fn a_command_that_takes_too_long_is_ended() {
    let limit = Duration::from_secs(3);
    let command = shell("echo begun; while :; do :; done").timeout(Some(limit));
    let ran = run(&command, &[]);
    assert_eq!(ran.stdout, b"begun\n");
    match ran.outcome {
        Err(LabError::Timeout { console, .. }) => assert!(!console.is_empty()),
        other => panic!("{other:?}"),
    }
}

#[test]
#[ignore = "boots Bochs: cargo xtask test --all"]
fn a_dying_kernel_is_reported_with_its_last_words() {
    let ran = run(&shell("echo c > /proc/sysrq-trigger"), &[]);
    match ran.outcome {
        Err(LabError::Died { console, .. }) => {
            assert!(console.contains("sysrq triggered crash"), "{console}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
#[ignore = "boots Bochs: cargo xtask test --all"]
fn a_signal_shows_as_a_shell_shows_it() {
    let ran = run(&shell("kill -SEGV $$"), &[]);
    assert_eq!(ran.outcome.unwrap().code, 128 + 11);
}
