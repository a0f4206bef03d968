//! `dune snap`: runs from a marker on, asked for by lines and by a fuzzer.
#![expect(unsafe_code, reason = "a target that crashes, and its fork server")]

#[path = "snap/fuzzer.rs"]
mod fuzzer;
#[path = "snap/target.rs"]
mod target;

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Output, Stdio};
use std::time::Duration;

use fuzzer::Fuzzer;

const HOST: &str = "host";
const GUEST: &str = "guest";

fn dune(placement: &str, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dune"));
    command.args(["snap", "--placement", placement]).args(words);
    command
}

fn with_input(command: &mut Command, input: &str) -> Output {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let text = input.to_owned();
    let writer = std::thread::spawn(move || {
        // It may end before it has read everything.
        let _ = stdin.write_all(text.as_bytes());
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// A shell that keeps count in a variable, and leaves something behind.
const COUNTING: &str = "n=0; f() { n=$((n+1)); cd /tmp; exec 3</dev/null; umask 77; }; \
                        read line; f; echo \"$n $line $(umask)\"";

fn each_line_is_a_run_of_its_own_in(placement: &str) {
    let lines: String = (0..20).map(|n| format!("line {n}\n")).collect();
    let mut command = dune(placement, &["--each-line", "--", "sh", "-c", COUNTING]);
    let output = with_input(&mut command, &lines);
    let expected: String = (0..20).map(|n| format!("1 line {n} 0077\n")).collect();
    assert_eq!(text(&output.stdout), expected, "{}", text(&output.stderr));
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stderr), "");
}

const TROUBLED: &str = "read line; case $line in crash) kill -SEGV $$;; \
                        hang) while :; do :; done;; sleep) sleep 100;; bad) exit 3;; esac; \
                        echo \"got $line\"";

fn one_bad_run_does_not_stop_the_next_in(placement: &str) {
    let mut command = dune(
        placement,
        &["--each-line", "--timeout", "2s", "--", "sh", "-c", TROUBLED],
    );
    let output = with_input(&mut command, "a\ncrash\nb\nhang\nsleep\nc\nbad\nlast");
    assert_eq!(text(&output.stdout), "got a\ngot b\ngot c\ngot last\n");
    let expected = "dune: line 2: died of SIGSEGV\n\
                    dune: line 4: did not end within 2 s; raise --timeout\n\
                    dune: line 5: did not end within 2 s; raise --timeout\n\
                    dune: line 7: ended with status 3\n";
    assert_eq!(text(&output.stderr), expected);
    assert_eq!(output.status.code(), Some(123));
}

fn every_run_is_reported_as_json_in(placement: &str) {
    let mut command = dune(
        placement,
        &["--each-line", "--json", "--", "sh", "-c", TROUBLED],
    );
    let output = with_input(&mut command, "a\ncrash\nbad\n");
    let lines: Vec<serde_json::Value> = text(&output.stderr)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let told = |index: usize, key: &str| lines[index][key].clone();
    assert_eq!(lines.len(), 3);
    assert_eq!(told(0, "status"), 0);
    assert_eq!(told(1, "outcome"), "signal");
    assert_eq!(told(1, "signal"), "SIGSEGV");
    assert_eq!((told(2, "line"), told(2, "status")), (3.into(), 3.into()));
}

fn every_marker_is_a_beginning_in(placement: &str) {
    for marker in ["call", "stdin", "symbol:snap_test_marker"] {
        let mut command = dune(placement, &["--each-line", "--at", marker, "--"]);
        command.arg(std::env::current_exe().unwrap()).arg(marker);
        command.env(target::ROLE, "marked");
        let output = with_input(&mut command, "one\ntwo\n");
        assert_eq!(
            text(&output.stdout),
            "1 one\n1 two\n",
            "{marker}: {}",
            text(&output.stderr)
        );
    }
}

fn a_marker_that_is_not_reached_is_said_in(placement: &str) {
    let mut command = dune(placement, &["--each-line", "--", "true"]);
    let output = with_input(&mut command, "a\n");
    assert_eq!(output.status.code(), Some(125));
    let said = text(&output.stderr);
    assert!(said.contains("before it reached the marker"), "{said}");
    let mut command = dune(
        placement,
        &["--each-line", "--at", "symbol:nowhere", "--", "true"],
    );
    let output = with_input(&mut command, "a\n");
    assert_eq!(output.status.code(), Some(125));
    let said = text(&output.stderr);
    assert!(said.contains("no symbol \"nowhere\""), "{said}");
}

fn the_same_input_has_the_same_coverage_in(placement: &str) {
    let mut fuzzer = Fuzzer::start(placement, &[]);
    assert_eq!(fuzzer.hello, target::HELLO);
    let inputs: [&[u8]; 4] = [b"hello", b"a", b"bcd", b"counter"];
    let first: Vec<Vec<u8>> = inputs.iter().map(|input| fuzzer.run(input).map).collect();
    for (index, map) in first.iter().enumerate() {
        assert!(map.iter().any(|&count| count > 0));
        assert!(first[..index].iter().all(|other| other != map));
    }
    for round in 0..25 {
        for (input, map) in inputs.iter().zip(&first) {
            let run = fuzzer.run(input);
            assert_eq!(run.status, 0);
            assert!(run.map == *map, "round {round}, {input:?}");
        }
    }
    fuzzer.leave();
}

fn crashes_and_hangs_are_told_and_survived_in(placement: &str) {
    let mut fuzzer = Fuzzer::start(placement, &[]);
    let calm = fuzzer.run(b"hello");
    for _ in 0..3 {
        let crash = fuzzer.run(b"crash").status;
        assert!(libc::WIFSIGNALED(crash) && libc::WTERMSIG(crash) == libc::SIGSEGV);
        let abort = fuzzer.run(b"abort").status;
        assert!(libc::WIFSIGNALED(abort) && libc::WTERMSIG(abort) == libc::SIGABRT);
        let exit = fuzzer.run(b"exit").status;
        assert!(libc::WIFEXITED(exit) && libc::WEXITSTATUS(exit) == 42);
        for hang in [b"spin", b"wait"] {
            let run = fuzzer.run_and_kill(hang);
            assert!(libc::WIFSIGNALED(run.status) && libc::WTERMSIG(run.status) == libc::SIGKILL);
            let next = fuzzer.run(b"hello");
            assert!(next.map == calm.map && next.status == 0);
            assert_ne!(next.pid, run.pid, "the process was killed");
        }
    }
    fuzzer.leave();
}

fn a_marker_takes_the_fork_server_s_place_in(placement: &str) {
    let mut fuzzer = Fuzzer::start(placement, &["--at", "symbol:snap_test_marker"]);
    // The size that the target's own variable says.
    assert_eq!(fuzzer.hello & 0xc000_0001, 0xc000_0001);
    let size = ((fuzzer.hello & 0x00ff_fffe) >> 1) + 1;
    assert_eq!(size as usize, fuzzer::MAP_BYTES);
    let calm = fuzzer.run(b"hello");
    assert!(libc::WIFSIGNALED(fuzzer.run(b"crash").status));
    assert!(fuzzer.run(b"hello").map == calm.map);
    fuzzer.leave();
}

/// A program in a file, with a file that it has open.
struct SavedProgram {
    _folder: tempfile::TempDir,
    snapshot: String,
    data: String,
}

impl SavedProgram {
    fn make(placement: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (snapshot, data) = (path("program.snap"), path("data"));
        std::fs::write(&data, "beforeafter").unwrap();
        let mut command = dune(placement, &["--save", &snapshot, "--at", "call", "--"]);
        command.arg(std::env::current_exe().unwrap()).arg(&data);
        let output = with_input(command.env(target::ROLE, "saved"), "");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{said}");
        assert!(said.contains("dune snap --resume"), "{said}");
        Self {
            _folder: folder,
            snapshot,
            data,
        }
    }

    fn resume(&self, placement: &str, words: &[&str], input: &str) -> Output {
        let mut command = dune(placement, &["--resume", &self.snapshot]);
        with_input(command.args(words), input)
    }
}

const RESUMED: &str = "before after hello 4999950000 /usr 3\n";

fn a_saved_program_goes_on_in_another_process_in(placement: &str) {
    let saved = SavedProgram::make(placement);
    for _ in 0..2 {
        let output = saved.resume(placement, &[], "hello\n");
        let said = text(&output.stderr);
        assert_eq!(text(&output.stdout), RESUMED, "{said}");
        assert_eq!(output.status.code(), Some(7), "{said}");
    }
    let output = saved.resume(placement, &["--each-line", "--quiet"], "hello\nhello\n");
    assert_eq!(
        text(&output.stdout),
        RESUMED.repeat(2),
        "{}",
        text(&output.stderr)
    );
    // Zeros are not in it.
    assert!(std::fs::metadata(&saved.snapshot).unwrap().len() < 64 << 20);
}

/// What is saved is the program's, not the placement's.
fn a_saved_program_goes_on_in_the_other_placement() {
    for (saved_in, resumed_in) in [(GUEST, HOST), (HOST, GUEST)] {
        let saved = SavedProgram::make(saved_in);
        let output = saved.resume(resumed_in, &[], "hello\n");
        let said = text(&output.stderr);
        assert_eq!(text(&output.stdout), RESUMED, "from {saved_in}: {said}");
        assert_eq!(output.status.code(), Some(7), "from {saved_in}: {said}");
    }
}

fn a_file_that_has_changed_is_refused_in(placement: &str) {
    let saved = SavedProgram::make(placement);
    let refused = |words: &[&str], expected: &str| {
        let output = saved.resume(placement, words, "hello\n");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{said}");
        assert!(
            said.contains(expected) && said.lines().count() == 1,
            "{said}"
        );
        assert_eq!(text(&output.stdout), "");
    };
    refused(&["--quiet", "--ro", "/usr"], "the policy restricts files");
    std::fs::write(&saved.data, "beforeAFTER").unwrap();
    refused(&[], "has changed");
    std::fs::remove_file(&saved.data).unwrap();
    refused(&[], "is gone");
    std::fs::write(&saved.snapshot, "something else").unwrap();
    refused(&[], "no program that `dune snap --save` has saved");
}

/// Bits are changed and ends cut off: it is refused, or the program goes on or
/// dies; never anything else.
fn a_damaged_file_does_no_harm_in(placement: &str) {
    let saved = SavedProgram::make(placement);
    let whole = std::fs::read(&saved.snapshot).unwrap();
    let header = u64::from_le_bytes(whole[16..24].try_into().unwrap()) as usize + 24;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |end: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % end as u64) as usize
    };
    let rounds = if placement == HOST { 60 } else { 15 };
    let (mut refused, mut ran) = (0, 0);
    for round in 0..rounds {
        let mut bytes = whole.clone();
        if round % 10 == 9 {
            bytes.truncate(next(whole.len()));
        } else {
            for _ in 0..=round % 3 {
                // Past the names of kernel and CPU, which end most of it.
                let from = header / 2;
                bytes[from + next(header - from)] ^= 1 << next(8);
            }
        }
        std::fs::write(&saved.snapshot, &bytes).unwrap();
        let output = saved.resume(placement, &["--json", "--timeout", "20s"], "hello\n");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let last = said.lines().last().unwrap_or_default();
        // The program's own abort ends this process with it, without a word.
        let is_programs = said.contains("snap/target.rs") && !said.contains("dune-sandbox/src");
        if output.status.code() == Some(125) && last.starts_with("dune: ") {
            refused += 1;
        } else if output.status.signal() == Some(libc::SIGABRT) && is_programs {
            ran += 1;
        } else {
            let told: serde_json::Value = serde_json::from_str(last)
                .unwrap_or_else(|_| panic!("round {round}: {} {said}", output.status));
            assert!(told["outcome"].is_string(), "{said}");
            ran += 1;
        }
    }
    assert!(refused > 0 && ran > 0, "{refused} {ran}");
}

fn what_cannot_be_saved_is_said_in(placement: &str) {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = folder.path().join("program.snap");
    let save = ["--save", snapshot.to_str().unwrap(), "--", "sh", "-c"];
    let mut command = dune(placement, &save);
    let output = with_input(command.arg("exec 3<>/dev/null; sleep 9 & read line"), "");
    let said = text(&output.stderr);
    assert!(
        said.contains("child processes, which cannot be saved"),
        "{said}"
    );
    assert_eq!(output.status.code(), Some(125));
    assert!(!snapshot.exists(), "half a file stayed");
}

fn without_a_fuzzer_it_says_how() {
    let output = dune(HOST, &["--afl", "--at", "fork", "--", "true"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    let said = text(&output.stderr);
    assert!(said.contains("afl-fuzz -i in -o out --"), "{said}");
    let output = dune(HOST, &["--afl", "--", "true"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = text(&output.stderr);
    assert!(said.contains("compile it with afl-cc"), "{said}");
}

/// A real fuzzer finds a crash and a hang that are two bytes away.
fn afl_fuzz_finds_a_crash_and_a_hang() {
    const SOURCE: &str = "#include <stdlib.h>\n#include <unistd.h>\n\
        int main(void) { char b[8]; if (read(0, b, 8) < 4) return 0;\n\
        if (b[0] == 'c') { if (b[1] == 'r') abort(); }\n\
        if (b[0] == 'h') { if (b[1] == 'a') for (;;) ; } return 0; }\n";
    for program in ["afl-fuzz", "afl-cc"] {
        let found = Command::new("sh")
            .args(["-c", &format!("command -v {program}")])
            .stdout(Stdio::null())
            .status();
        if !found.unwrap().success() {
            dune_testing::ignore(format!("no {program} here: apt-get install afl++"));
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("target.c"), SOURCE).unwrap();
    std::fs::create_dir(path("in")).unwrap();
    // A bit or two from what is to be found.
    for (name, seed) in [("1", "cs__"), ("2", "hc__"), ("3", "____")] {
        std::fs::write(path("in").join(name), seed).unwrap();
    }
    let run = |command: &mut Command| {
        let output = command.current_dir(folder.path()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{said} {}", text(&output.stderr));
    };
    run(Command::new("afl-cc").args(["-o", "target", "target.c"]));
    let mut fuzz = Command::new("timeout")
        .args(["--signal=INT", "150", "afl-fuzz", "-D", "-t", "500"])
        .args(["-i", "in", "-o", "out", "--"])
        .arg(env!("CARGO_BIN_EXE_dune"))
        .args(["snap", "--afl", "--placement", HOST, "--", "./target"])
        .envs([
            ("AFL_NO_UI", "1"),
            ("AFL_NO_AFFINITY", "1"),
            ("AFL_SKIP_CPUFREQ", "1"),
            ("AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES", "1"),
        ])
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let found = |name: &str| {
        let Ok(entries) = std::fs::read_dir(path("out/default").join(name)) else {
            return false;
        };
        entries
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().starts_with("id:"))
    };
    let mut ended = None;
    while !(found("crashes") && found("hangs")) && ended.is_none() {
        std::thread::sleep(Duration::from_millis(200));
        ended = fuzz.try_wait().unwrap();
    }
    assert_eq!(ended, None, "it ended before it had found both");
    // Its `timeout` passes that on; it writes its statistics at its end.
    // SAFETY: a child that was not waited for.
    unsafe { libc::kill(fuzz.id() as i32, libc::SIGINT) };
    fuzz.wait().unwrap();
    let statistics = std::fs::read_to_string(path("out/default/fuzzer_stats")).unwrap();
    let value = |name: &str| {
        let line = statistics.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.split(':').nth(1));
        value
            .unwrap_or_else(|| panic!("no {name} in {statistics}"))
            .trim()
            .to_owned()
    };
    assert_eq!(value("stability"), "100.00%");
}

macro_rules! in_both {
    ($($test:ident: $host:ident, $guest:ident;)*) => {
        $(
            fn $host() { $test(HOST); }
            fn $guest() { $test(GUEST); }
        )*
    };
}

in_both! {
    a_saved_program_goes_on_in_another_process_in: a_saved_program_goes_on_in_another_process,
        resume_in_guest;
    a_file_that_has_changed_is_refused_in: a_file_that_has_changed_is_refused, changed_in_guest;
    a_damaged_file_does_no_harm_in: a_damaged_file_does_no_harm, damage_in_guest;
    what_cannot_be_saved_is_said_in: what_cannot_be_saved_is_said, unsaved_in_guest;
    each_line_is_a_run_of_its_own_in: each_line_is_a_run_of_its_own, each_line_in_guest;
    one_bad_run_does_not_stop_the_next_in: one_bad_run_does_not_stop_the_next, bad_runs_in_guest;
    every_run_is_reported_as_json_in: every_run_is_reported_as_json, json_in_guest;
    every_marker_is_a_beginning_in: every_marker_is_a_beginning, markers_in_guest;
    a_marker_that_is_not_reached_is_said_in: a_marker_that_is_not_reached_is_said, no_marker_in_guest;
    the_same_input_has_the_same_coverage_in: the_same_input_has_the_same_coverage, coverage_in_guest;
    crashes_and_hangs_are_told_and_survived_in: crashes_and_hangs_are_told_and_survived,
        crashes_in_guest;
    a_marker_takes_the_fork_server_s_place_in: a_marker_takes_the_fork_server_s_place,
        marker_for_a_fuzzer_in_guest;
}

fn main() -> ExitCode {
    const TESTS: &[dune_testing::Test] = dune_testing::list! {
        plain each_line_is_a_run_of_its_own,
        plain one_bad_run_does_not_stop_the_next,
        plain every_run_is_reported_as_json,
        plain every_marker_is_a_beginning,
        plain a_marker_that_is_not_reached_is_said,
        plain the_same_input_has_the_same_coverage,
        plain crashes_and_hangs_are_told_and_survived,
        plain a_marker_takes_the_fork_server_s_place,
        plain without_a_fuzzer_it_says_how,
        plain a_saved_program_goes_on_in_another_process,
        plain a_file_that_has_changed_is_refused,
        plain a_damaged_file_does_no_harm, timeout 200,
        plain what_cannot_be_saved_is_said,
        ring0 resume_in_guest, timeout 120,
        ring0 a_saved_program_goes_on_in_the_other_placement, timeout 200,
        ring0 changed_in_guest, timeout 120,
        ring0 damage_in_guest, timeout 200,
        ring0 unsaved_in_guest, timeout 120,
        plain afl_fuzz_finds_a_crash_and_a_hang, timeout 200,
        ring0 each_line_in_guest, timeout 120,
        ring0 bad_runs_in_guest, timeout 120,
        ring0 json_in_guest, timeout 120,
        ring0 markers_in_guest, timeout 120,
        ring0 no_marker_in_guest, timeout 120,
        ring0 coverage_in_guest, timeout 120,
        ring0 crashes_in_guest, timeout 120,
        ring0 marker_for_a_fuzzer_in_guest, timeout 120,
    };
    match target::role() {
        Some(status) => status,
        None => dune_testing::main(TESTS),
    }
}
