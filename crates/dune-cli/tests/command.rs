//! The `dune` command as a shell sees it: output, exit codes, messages.

use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::{Command, ExitCode, Output, Stdio};
use std::time::{Duration, Instant};

use dune_kvm::probe::{self, Placement};
use libtest_mimic::{Arguments, Failed, Trial};

type Outcome = Result<(), Failed>;
type Test = (&'static str, fn() -> Outcome);

/// Tests of `dune run` in this machine's own placement.
const RUN: &[Test] = &[
    (
        "output_and_status_are_the_programs",
        output_and_status_are_the_programs,
    ),
    (
        "a_fatal_signal_is_seen_by_the_parent",
        a_fatal_signal_is_seen_by_the_parent,
    ),
    (
        "the_environment_is_what_was_asked_for",
        the_environment_is_what_was_asked_for,
    ),
    (
        "the_directory_is_what_was_asked_for",
        the_directory_is_what_was_asked_for,
    ),
    (
        "a_time_limit_ends_the_program",
        a_time_limit_ends_the_program,
    ),
    (
        "statistics_survive_a_program_that_closes_stderr",
        statistics_survive_a_closed_stderr,
    ),
    (
        "standard_input_reaches_the_program",
        standard_input_reaches_the_program,
    ),
    ("a_kill_leaves_nothing_behind", a_kill_leaves_nothing_behind),
    ("missing_programs_are_127", missing_programs_are_127),
    (
        "files_that_are_no_programs_are_126",
        files_that_are_no_programs_are_126,
    ),
    (
        "a_program_waits_for_gdb_where_it_says",
        a_program_waits_for_gdb_where_it_says,
    ),
];

/// Tests that need no KVM.
const ANYWHERE: &[Test] = &[
    (
        "a_placement_that_is_none_is_refused",
        a_placement_that_is_none_is_refused,
    ),
    (
        "a_placement_that_is_not_here_is_refused",
        a_placement_that_is_not_here_is_refused,
    ),
    (
        "check_has_a_line_for_each_thing",
        check_has_a_line_for_each_thing,
    ),
    ("check_speaks_json", check_speaks_json),
    ("syscalls_are_listed", syscalls_are_listed),
    (
        "a_reader_who_goes_away_is_no_failure",
        a_reader_who_goes_away_is_no_failure,
    ),
    ("help_has_examples", help_has_examples),
    (
        "gdb_is_not_waited_for_where_it_cannot_come",
        gdb_is_not_waited_for_where_it_cannot_come,
    ),
];

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let report = probe::probe();
    let in_lab = report.natural_placement() == Placement::Lab;
    let reason = if in_lab {
        report.kvm.to_string()
    } else {
        String::new()
    };
    let trial = |&(name, test): &Test| Trial::test(name, test);
    let run = RUN.iter().map(|test| {
        // Where there is no KVM, programs run in the lab, which has tests of
        // its own.
        trial(test)
            .with_kind(reason.clone())
            .with_ignored_flag(in_lab)
    });
    libtest_mimic::run(&arguments, run.chain(ANYWHERE.iter().map(trial)).collect()).exit_code()
}

fn dune(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dune"));
    command
        .args(words)
        .stdin(Stdio::null())
        .env_remove(probe::PLACEMENT_VARIABLE);
    command
}

fn output(words: &[&str]) -> Output {
    dune(words).output().unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// One line, from Dune, that has all of `words` in it.
fn is_one_line_with(output: &Output, words: &[&str]) -> Outcome {
    let text = stderr(output);
    let one_line = text.lines().count() == 1 && text.starts_with("dune: ");
    if one_line && words.iter().all(|word| text.contains(word)) {
        Ok(())
    } else {
        Err(format!("not one line with {words:?}: {text:?}").into())
    }
}

fn output_and_status_are_the_programs() -> Outcome {
    let seen = output(&["run", "--", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((stdout(&seen), stderr(&seen)), ("out\n", "err\n"));
    assert_eq!(seen.status.code(), Some(7));
    let native = Command::new("ls").args(["-l", "/usr"]).output().unwrap();
    let seen = output(&["run", "ls", "-l", "/usr"]);
    assert_eq!(stdout(&seen), stdout(&native));
    assert_eq!(seen.status.code(), Some(0));
    Ok(())
}

fn a_fatal_signal_is_seen_by_the_parent() -> Outcome {
    use std::os::unix::process::ExitStatusExt;
    for (name, number) in [("SEGV", 11), ("TERM", 15), ("KILL", 9)] {
        let script = format!("kill -{name} $$");
        let seen = output(&["run", "--", "sh", "-c", &script]);
        assert_eq!(seen.status.signal(), Some(number), "{seen:?}");
    }
    Ok(())
}

fn the_environment_is_what_was_asked_for() -> Outcome {
    let run = |words: &[&str]| {
        dune(words)
            .env("GIVEN", "outside")
            .env(probe::PLACEMENT_VARIABLE, "auto")
            .output()
            .unwrap()
    };
    let seen = run(&["run", "--env", "A=b=c", "--", "/usr/bin/env"]);
    assert!(stdout(&seen).contains("A=b=c\n") && stdout(&seen).contains("GIVEN=outside\n"));
    assert!(
        !stdout(&seen).contains(probe::PLACEMENT_VARIABLE),
        "{}",
        stdout(&seen)
    );
    let seen = run(&[
        "run",
        "--clear-env",
        "--env",
        "A=1",
        "--env",
        "B=",
        "--",
        "/usr/bin/env",
    ]);
    assert_eq!(stdout(&seen), "A=1\nB=\n");
    let seen = output(&["run", "--env", "nothing", "--", "true"]);
    assert_eq!(seen.status.code(), Some(125));
    Ok(())
}

fn the_directory_is_what_was_asked_for() -> Outcome {
    let seen = output(&["run", "--cwd", "/usr/bin", "--", "/bin/sh", "-c", "pwd -P"]);
    assert_eq!(stdout(&seen), "/usr/bin\n");
    let seen = output(&["run", "--cwd", "/nonexistent", "--", "true"]);
    assert_eq!(seen.status.code(), Some(125));
    is_one_line_with(&seen, &["/nonexistent"])
}

fn a_time_limit_ends_the_program() -> Outcome {
    let started = Instant::now();
    for program in [&["sleep", "60"][..], &["sh", "-c", "while :; do :; done"]] {
        let words = [&["run", "--timeout", "0.3", "--"], program].concat();
        let seen = output(&words);
        assert_eq!(seen.status.code(), Some(124), "{program:?}");
        is_one_line_with(&seen, &[program[0], "--timeout"])?;
    }
    assert!(started.elapsed() < Duration::from_secs(30));
    let seen = output(&["run", "--timeout", "60", "--", "true"]);
    assert_eq!(seen.status.code(), Some(0));
    Ok(())
}

fn statistics_survive_a_closed_stderr() -> Outcome {
    let seen = output(&["run", "--stats", "--", "sh", "-c", "exec 2>&-; exit 3"]);
    assert_eq!(seen.status.code(), Some(3));
    is_one_line_with(&seen, &["placement", "system calls", "page faults", "ms"])
}

fn standard_input_reaches_the_program() -> Outcome {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), "one\ntwo\n")?;
    let seen = dune(&["run", "--", "cat"]).stdin(file.reopen()?).output()?;
    assert_eq!(stdout(&seen), "one\ntwo\n");
    Ok(())
}

fn a_kill_leaves_nothing_behind() -> Outcome {
    let mut child = dune(&["run", "--", "sh", "-c", "echo ready; while :; do :; done"])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut ready = [0; 6];
    child.stdout.take().unwrap().read_exact(&mut ready)?;
    child.kill()?;
    child.wait()?;
    let remains = Path::new("/proc").join(child.id().to_string());
    assert!(!remains.exists(), "the process is there still");
    Ok(())
}

fn missing_programs_are_127() -> Outcome {
    for name in ["no-such-program-anywhere", "/no/such/path"] {
        let seen = output(&["run", "--", name]);
        assert_eq!(seen.status.code(), Some(127), "{name}");
        is_one_line_with(&seen, &[name])?;
    }
    Ok(())
}

fn files_that_are_no_programs_are_126() -> Outcome {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir()?;
    let with_mode = |name: &str, contents: &[u8], mode: u32| {
        let path = folder.path().join(name);
        std::fs::write(&path, contents).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    for path in [
        with_mode("plain", b"text", 0o644),
        with_mode("truncated", b"\x7fELF\x02\x01\x01", 0o755),
        with_mode(
            "elf32",
            b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0\x01\0\0\0",
            0o755,
        ),
        folder.path().to_str().unwrap().to_owned(),
    ] {
        let seen = output(&["run", "--", &path]);
        assert_eq!(seen.status.code(), Some(126), "{path}: {seen:?}");
        is_one_line_with(&seen, &[&path])?;
    }
    Ok(())
}

fn a_placement_that_is_none_is_refused() -> Outcome {
    let seen = output(&["run", "--placement", "moon", "--", "true"]);
    assert_eq!(seen.status.code(), Some(125));
    let seen = dune(&["run", "--", "true"])
        .env(probe::PLACEMENT_VARIABLE, "moon")
        .output()
        .unwrap();
    assert_eq!(seen.status.code(), Some(125));
    is_one_line_with(
        &seen,
        &[
            probe::PLACEMENT_VARIABLE,
            "moon",
            "auto, guest, host or lab",
        ],
    )
}

fn a_placement_that_is_not_here_is_refused() -> Outcome {
    let lacking = match probe::probe().natural_placement() {
        Placement::InGuest => return Ok(()),
        Placement::OnHost => "guest",
        Placement::Lab => "host",
    };
    let seen = output(&["run", "--placement", lacking, "--", "true"]);
    assert_eq!(seen.status.code(), Some(125));
    is_one_line_with(&seen, &[lacking, "use auto"])
}

fn check_has_a_line_for_each_thing() -> Outcome {
    let seen = output(&["check"]);
    for word in [
        "machine",
        "/dev/kvm",
        "dune run",
        "dune mode",
        "lab",
        "qemu",
    ] {
        assert!(
            stdout(&seen).contains(word),
            "{word} is not in\n{}",
            stdout(&seen)
        );
    }
    assert_eq!(stderr(&seen), "");
    Ok(())
}

fn check_speaks_json() -> Outcome {
    let seen = output(&["check", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&seen.stdout)?;
    let state = json["kvm"]["state"].as_str().unwrap_or_default();
    assert!(["absent", "no-permission", "weak", "hardware", "broken"].contains(&state));
    let run = json["placement"]["run"].as_str().unwrap_or_default();
    assert_eq!(run, probe::probe().natural_placement().name());
    assert_eq!(json["cpu"].is_object(), probe::probe().cpuid.is_some());
    Ok(())
}

fn syscalls_are_listed() -> Outcome {
    let seen = output(&["syscalls", "openat"]);
    assert!(stdout(&seen).contains("257  openat"), "{}", stdout(&seen));
    let seen = output(&["syscalls", "--handling", "forwarded", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&seen.stdout)?;
    let rows = json.as_array().unwrap();
    assert!(rows.len() > 20 && rows.iter().all(|row| row["handling"] == "forwarded"));
    Ok(())
}

fn a_reader_who_goes_away_is_no_failure() -> Outcome {
    let mut child = dune(&["syscalls"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    drop(child.stdout.take());
    let seen = child.wait_with_output()?;
    assert_eq!((seen.status.code(), stderr(&seen)), (Some(0), ""));
    Ok(())
}

fn help_has_examples() -> Outcome {
    for words in [
        &["--help"][..],
        &["run", "--help"],
        &["check", "--help"],
        &["lab", "--help"],
    ] {
        let seen = output(words);
        assert_eq!(seen.status.code(), Some(0));
        assert!(stdout(&seen).contains("Examples:"), "{words:?}");
    }
    Ok(())
}

fn a_program_waits_for_gdb_where_it_says() -> Outcome {
    let mut child = dune(&["run", "--gdb", "0", "--", "echo", "began"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    let (_, rest) = line.split_once("'target remote :").unwrap();
    let (port, program) = rest.split_once("' ").unwrap();
    assert_eq!(program.trim_end(), "echo", "{line}");
    let port: u16 = port.parse().unwrap();
    // Nobody but this machine is listened to, and nothing runs before gdb came.
    let gdb = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(child.try_wait().unwrap().is_none());
    // Who goes away lets the program run, and nobody else is served.
    drop(gdb);
    let output = child.wait_with_output().unwrap();
    assert_eq!(stdout(&output), "began\n");
    assert!(output.status.success());
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err());
    Ok(())
}

fn gdb_is_not_waited_for_where_it_cannot_come() -> Outcome {
    let refused = output(&["run", "--gdb", "nowhere", "--", "true"]);
    assert_eq!(refused.status.code(), Some(125));
    assert!(stderr(&refused).contains("unix:PATH"));
    let refused = output(&["run", "--placement=lab", "--gdb", "0", "--", "true"]);
    assert_eq!(refused.status.code(), Some(125));
    assert!(stderr(&refused).contains("lab"), "{}", stderr(&refused));
    Ok(())
}
