//! `dune run` under a policy, and what the command says of it: as a shell sees
//! it. Without a KVM to use here the tests that run programs do nothing and
//! say so.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use dune_kvm::probe::{PLACEMENT_VARIABLE, Placement, probe};

const DUNE_FAILED: i32 = 125;

fn dune(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dune"))
        .args(words)
        .stdin(Stdio::null())
        .env_remove(PLACEMENT_VARIABLE)
        .output()
        .unwrap()
}

/// Whether programs can be run here.
fn has_kvm() -> bool {
    let here = probe().natural_placement() != Placement::Lab;
    if !here {
        eprintln!("ignored: {}", probe().kvm);
    }
    here
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

#[test]
fn deny_by_default_is_one_flag() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = std::fs::canonicalize(folder.path()).unwrap().join("file");
    std::fs::write(&file, "contents\n").unwrap();
    let file = file.to_str().unwrap();
    let seen = dune(&["run", "--strict", "--", "cat", file]);
    assert_eq!(seen.status.code(), Some(1), "{seen:?}");
    assert!(stderr(&seen).contains("--explain says what"), "{seen:?}");
    let seen = dune(&["run", "--strict", "--explain", "--", "cat", file]);
    let line = format!("dune: open({file}, O_RDONLY) refused: --ro {file} would allow it\n");
    assert!(stderr(&seen).contains(&line), "{seen:?}");
    let seen = dune(&["run", "--strict", "--ro", file, "--", "cat", file]);
    assert_eq!(
        (stdout(&seen), stderr(&seen)),
        ("contents\n", ""),
        "{seen:?}"
    );
    let seen = dune(&["run", "--strict", "--", "env"]);
    assert!(!stdout(&seen).contains("CARGO"), "{seen:?}");
}

#[test]
fn a_policy_comes_from_a_file_and_its_mistakes_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("policy.toml");
    let policy = path.to_str().unwrap();
    std::fs::write(&path, "strict = true\n[limit]\nmem = 1\n").unwrap();
    let seen = dune(&["run", "--policy", policy, "--", "true"]);
    assert_eq!(seen.status.code(), Some(DUNE_FAILED));
    let words = ["policy.toml", "line 2", "`limit`", "`limits`"];
    assert!(
        words.iter().all(|word| stderr(&seen).contains(word)),
        "{seen:?}"
    );
    assert_eq!(stderr(&seen).lines().count(), 1);
    for wrong in [
        &["--mem", "lots"][..],
        &["--nproc", "0"],
        &["--net", "lo"],
        &["--ro", "/nowhere"],
    ] {
        let words = [&["run"], wrong, &["--", "true"]].concat();
        let seen = dune(&words);
        assert_eq!(seen.status.code(), Some(DUNE_FAILED), "{wrong:?} {seen:?}");
    }
    if !has_kvm() {
        return;
    }
    std::fs::write(&path, "strict = true\n[files]\nro = [\"data\"]\n").unwrap();
    let data = folder.path().join("data");
    std::fs::write(&data, "data\n").unwrap();
    let seen = dune(&[
        "run",
        "--policy",
        policy,
        "--",
        "cat",
        data.to_str().unwrap(),
    ]);
    assert_eq!(stdout(&seen), "data\n", "{seen:?}");
}

#[test]
fn a_time_limit_ends_the_whole_family() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mark = folder.path().join("mark");
    let mark = mark.to_str().unwrap();
    // A child in a session of its own, whose parent has ended.
    let script = format!("(setsid sh -c 'sleep 4; echo late > {mark}' &) ; sleep 60");
    let started = Instant::now();
    let seen = dune(&["run", "--timeout", "1500ms", "--", "sh", "-c", &script]);
    assert_eq!(seen.status.code(), Some(124), "{seen:?}");
    assert!(stderr(&seen).contains("raise --timeout"), "{seen:?}");
    assert!(started.elapsed() < Duration::from_secs(30));
    std::thread::sleep(Duration::from_secs(5));
    assert!(!Path::new(mark).exists(), "somebody has survived");
}

#[test]
fn the_outcome_is_one_line_of_json() {
    if !has_kvm() {
        return;
    }
    let json = |words: &[&str]| -> serde_json::Value {
        let seen = dune(&[&["run", "--json"], words].concat());
        // Before it comes what the program itself had to say.
        serde_json::from_str(stderr(&seen).lines().last().unwrap()).unwrap()
    };
    let exit = json(&["--", "sh", "-c", "exit 7"]);
    assert_eq!(
        (exit["outcome"].as_str(), exit["code"].as_u64()),
        (Some("exit"), Some(7))
    );
    assert!(exit["system_calls"].as_u64() > Some(10));
    let strict = json(&["--strict", "--", "ls", "/etc"]);
    let refused = strict["refused"].as_array().unwrap();
    let of_etc = |item: &&serde_json::Value| item["remedy"] == "--ro /etc";
    assert!(refused.iter().any(|item| of_etc(&item)), "{strict}");
    let timeout = json(&["--timeout", "300ms", "--", "sleep", "9"]);
    assert_eq!(timeout["outcome"], "timeout");
}

#[test]
fn a_crash_says_where() {
    if !has_kvm() {
        return;
    }
    let script = "import ctypes; ctypes.string_at(16)";
    let python = "/usr/bin/python3";
    if !Path::new(python).exists() {
        return;
    }
    let seen = dune(&["run", "--backtrace", "--", python, "-I", "-c", script]);
    let text = stderr(&seen);
    assert!(
        text.contains("dune: the program died of SIGSEGV (signal 11) at address 0x1"),
        "{text}"
    );
    assert!(text.contains("rip 0000") && text.contains("#0 "), "{text}");
    assert!(text.contains("python3"), "{text}");
    assert!(
        text.lines().filter(|line| line.contains("  #")).count() > 5,
        "{text}"
    );
    let seen = dune(&[
        "run",
        "--backtrace",
        "--",
        python,
        "-I",
        "-c",
        "import os; os.abort()",
    ]);
    assert!(stderr(&seen).contains("died of SIGABRT"), "{seen:?}");
}

/// Its report opens files, which the program's other threads would meet: once, at the end.
#[test]
fn a_signal_that_is_blocked_is_no_crash() {
    if !has_kvm() {
        return;
    }
    let script = "use POSIX; \
                  sigprocmask(SIG_BLOCK, POSIX::SigSet->new(SIGTERM)); \
                  kill 'TERM', $$ for 1..3; print 'goes on'";
    let seen = dune(&["run", "--backtrace", "--", "perl", "-e", script]);
    assert_eq!((stdout(&seen), stderr(&seen)), ("goes on", ""), "{seen:?}");
}

#[test]
fn what_packages_need_is_made() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let seen = dune(&["completions", shell]);
        assert!(stdout(&seen).contains("--strict"), "{shell}");
    }
    let folder = tempfile::tempdir().unwrap();
    let seen = dune(&["man", folder.path().join("man1").to_str().unwrap()]);
    assert_eq!((seen.status.code(), stderr(&seen)), (Some(0), ""));
    let page = std::fs::read_to_string(folder.path().join("man1/dune-run.1")).unwrap();
    for word in [".TH dune-run 1", "strict", "cpu\\-time", "Examples"] {
        assert!(page.contains(word), "{word} is not in\n{page}");
    }
    assert!(folder.path().join("man1/dune.1").exists());
}

#[test]
fn check_speaks_of_the_second_wall() {
    let seen = dune(&["check"]);
    assert!(stdout(&seen).contains("second wall"), "{seen:?}");
    let seen = dune(&["check", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&seen.stdout).unwrap();
    assert!(json["second_wall"]["landlock"].is_u64());
    assert!(json["second_wall"]["seccomp"].is_boolean());
}
