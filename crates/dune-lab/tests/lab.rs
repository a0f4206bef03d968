//! What the lab promises about the commands it runs.
//!
//! All of them run `dune-lab`, the program, as a person would.

use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The program with a time limit, or the end of this test where no lab can be.
fn lab(options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dune-lab"));
    command.args(["--timeout", "120"]).args(options).arg("--");
    command
}

fn run(options: &[&str], program: &[&str]) -> Output {
    run_with(lab(options).args(program), b"")
}

fn run_with(command: &mut Command, input: &[u8]) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        // The command may end without reading.
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output().unwrap()
    });
    if output.status.code() == Some(125) && stderr(&output).contains("the lab needs") {
        let required = std::env::var_os("DUNE_REQUIRE_RING0").is_some_and(|value| value == "1");
        assert!(!required, "{}", stderr(&output));
        dune_testing::ignore(stderr(&output));
    }
    output
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The interesting streams and the code of a small script.
fn shell(options: &[&str], script: &str) -> (i32, String, String) {
    let output = run(options, &["sh", "-c", script]);
    (
        output.status.code().unwrap(),
        stdout(&output),
        stderr(&output),
    )
}

/// Bytes without a pattern, among them every value and all line ends.
fn bytes(count: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..count).map(|_| next()).collect()
}

fn streams_are_separate_and_binary_safe() {
    let input = bytes(3_000_000);
    // The first lab of all says that it saves its state.
    run(&[], &["true"]);
    let script = "echo to stderr >&2; cat";
    let output = run_with(lab(&[]).args(["sh", "-c", script]), &input);
    assert_eq!(stderr(&output), "to stderr\n");
    assert_eq!(output.stdout.len(), input.len());
    assert!(output.stdout == input, "the bytes differ");
}

fn exit_codes_are_those_of_a_shell() {
    for (program, code) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "kill -SEGV $$"], 139),
        (&["no-such-program"], 127),
        (&["/etc/passwd"], 126),
    ] {
        assert_eq!(run(&[], program).status.code(), Some(code), "{program:?}");
    }
}

fn arguments_environment_and_folder_arrive() {
    let mut command = lab(&[]);
    command
        .args([
            "sh",
            "-c",
            "pwd; echo \"$ODD\"; for a; do echo \"<$a>\"; done",
            "sh",
        ])
        .args(["", "a b", "\"'$\\", "ü"])
        .env("ODD", "x = 'y'\n")
        .current_dir("/usr/share");
    let output = run_with(&mut command, b"");
    assert_eq!(
        stdout(&output),
        "/usr/share\nx = 'y'\n\n<>\n<a b>\n<\"'$\\>\n<ü>\n"
    );
}

fn a_reader_that_stops_ends_the_command() {
    let mut child = lab(&[])
        .arg("yes")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    std::io::Read::read_exact(&mut stdout, &mut [0; 10]).unwrap();
    drop(stdout);
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(141));
}

fn input_that_nobody_reads_does_no_harm() {
    let output = run_with(lab(&[]).arg("true"), &bytes(2_000_000));
    assert_eq!(output.status.code(), Some(0));
}

fn writes_are_discarded_unless_shared() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display();
    let script = format!("echo seen > '{path}/file' && cat '{path}/file'");
    let (code, out, _) = shell(&[], &script);
    assert_eq!((code, out.as_str()), (0, "seen\n"));
    assert!(!folder.path().join("file").exists());
    let (code, ..) = shell(&["--share", &path.to_string()], &script);
    assert_eq!(code, 0);
    assert_eq!(fs::read(folder.path().join("file")).unwrap(), b"seen\n");
}

fn the_guest_is_a_whole_system() {
    let script = "set -e; test -w /dev/kvm; test -c /dev/null; test -d /proc/self; \
                  test -d /sys/class; test -r /dev/fd/0; echo x > /dev/shm/x; \
                  echo x > /tmp/x; grep -q svm /proc/cpuinfo; grep -q 0100007F /proc/net/fib_trie \
                  || grep -q 127.0.0.1 /proc/net/fib_trie; unshare -U true 2>/dev/null || true; id -u";
    let (code, out, complaints) = shell(&[], script);
    assert_eq!(code, 0, "{complaints}");
    let own = rustix::process::geteuid().as_raw();
    assert_eq!(out.trim(), own.to_string());
}

fn the_clock_is_right_and_runs_at_the_right_speed() {
    let started = Instant::now();
    let (_, out, _) = shell(&[], "date +%s; date +%s%N; sleep 2; date +%s%N");
    let elapsed = started.elapsed();
    let numbers: Vec<u64> = out.lines().map(|line| line.parse().unwrap()).collect();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    assert!(now.as_secs().abs_diff(numbers[0]) < 60, "{out}");
    let slept = Duration::from_nanos(numbers[2] - numbers[1]);
    assert!(slept >= Duration::from_secs(2), "{slept:?}");
    assert!(slept < elapsed, "{slept:?} in the guest, {elapsed:?} here");
}

fn a_command_without_end_is_ended() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dune-lab"));
    command.args(["--timeout", "2", "--", "sleep", "1000"]);
    let output = run_with(&mut command, b"");
    assert_eq!(output.status.code(), Some(124));
    let said = stderr(&output);
    assert!(
        said.contains("still running in the lab after 2 s"),
        "{said}"
    );
    assert!(said.contains("last lines of the guest's kernel"), "{said}");
}

fn a_kernel_that_dies_says_its_last_words() {
    let (code, _, said) = shell(&[], "echo c > /proc/sysrq-trigger");
    assert_eq!(code, 125);
    assert!(said.contains("died while the command ran"), "{said}");
    assert!(said.contains("sysrq"), "{said}");
}

fn labs_run_side_by_side() {
    let outputs: Vec<Output> = std::thread::scope(|scope| {
        let labs: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| run(&[], &["od", "-An", "-N16", "-tx1", "/dev/urandom"])))
            .collect();
        labs.into_iter().map(|lab| lab.join().unwrap()).collect()
    });
    let mut drawn: Vec<String> = outputs.iter().map(stdout).collect();
    assert!(drawn.iter().all(|bytes| bytes.len() > 16), "{drawn:?}");
    drawn.sort();
    drawn.dedup();
    assert_eq!(
        drawn.len(),
        4,
        "guests of one state draw the same random numbers"
    );
}

fn a_cold_boot_works_too() {
    let (code, out, _) = shell(&["--cold", "--cpus", "2"], "nproc");
    assert_eq!((code, out.as_str()), (0, "2\n"));
}

fn signals_reach_the_command() {
    let mut child = lab(&[])
        .args([
            "sh",
            "-c",
            "trap 'echo got it; exit 9' TERM; echo ready; while :; do sleep 0.1; done",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut reader = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut reader, &mut line).unwrap();
    assert_eq!(line, "ready\n");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    line.clear();
    std::io::BufRead::read_line(&mut reader, &mut line).unwrap();
    assert_eq!(line, "got it\n");
    assert_eq!(child.wait().unwrap().code(), Some(9));
}

fn nothing_is_left_of_a_killed_lab() {
    let mut child = lab(&[])
        .args(["sh", "-c", "echo ready; sleep 1000"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0; 5]).unwrap();
    let own = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    let emulator = own.split_whitespace().next().expect("it runs an emulator");
    let emulator = format!("/proc/{emulator}");
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while fs::exists(&emulator).unwrap() {
        assert!(Instant::now() < deadline, "the emulator outlives its lab");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn wrong_options_are_explained() {
    for (options, words) in [
        (&["--cpus", "0"][..], "1 to 64"),
        (&["--icount", "--cpus", "2"], "--cpus 1"),
        (&["--memory", "1"], "MiB"),
        (&["--share", "/no/such/folder"], "/no/such/folder"),
        (&["--kernel", "/etc/passwd"], "bzImage"),
    ] {
        let output = run(options, &["true"]);
        assert_eq!(output.status.code(), Some(125), "{options:?}");
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
}

dune_testing::tests! {
    plain streams_are_separate_and_binary_safe,
    plain exit_codes_are_those_of_a_shell,
    plain arguments_environment_and_folder_arrive,
    plain a_reader_that_stops_ends_the_command,
    plain input_that_nobody_reads_does_no_harm,
    plain writes_are_discarded_unless_shared,
    plain the_guest_is_a_whole_system,
    plain the_clock_is_right_and_runs_at_the_right_speed,
    plain a_command_without_end_is_ended,
    plain a_kernel_that_dies_says_its_last_words,
    plain labs_run_side_by_side,
    plain a_cold_boot_works_too,
    plain signals_reach_the_command,
    plain nothing_is_left_of_a_killed_lab,
    plain wrong_options_are_explained,
}
