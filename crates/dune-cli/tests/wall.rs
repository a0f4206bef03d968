//! The wall of protection keys stands around what the commands run: seen from outside, by gdb,
//! in the key register of a thread whose call waits.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use dune_kvm::wall::has_protection_keys;

/// `read`, as a call that waits.
const READ: u64 = 0;
/// Access and write, of key 0 (SDM vol. 3, 4.6.2).
const KEY_0_DENIED: u64 = 3;

/// The registers `orig_rax` (the call that the thread is in) and `pkru` of a process's first
/// thread.
fn call_and_rights(pid: u32) -> (u64, u64) {
    // Another file than the process's own, which has symbols that take long to read.
    let output = Command::new("gdb")
        .args(["-nx", "-batch", "-iex", "set exec-file-mismatch off"])
        .args(["-iex", "set sysroot /nonexistent", "/bin/true"])
        .args(["-p", &pid.to_string()])
        .args(["-ex", r#"printf "seen %llu %llu\n", $orig_rax, $pkru"#])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix("seen "));
    let numbers = line.and_then(|line| line.split_once(' '));
    let (call, rights) = numbers.unwrap_or_else(|| panic!("gdb: {output:?}"));
    (call.parse().unwrap(), rights.parse().unwrap())
}

/// Starts `cat` by `dune` with these words before it, and looks at it while it waits for
/// input.
fn key_0_is_denied_under(words: &[&str]) {
    if !has_protection_keys() {
        eprintln!("ignored: this processor has no protection keys");
        return;
    }
    let mut child = Command::new(env!("CARGO_BIN_EXE_dune"))
        .args(words)
        .args(["--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"x").unwrap();
    let mut back = [0];
    let mut output = child.stdout.take().unwrap();
    output.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"x");
    // It has written, and may be on its way to the next call still.
    let mut tries = 0;
    let rights = loop {
        match call_and_rights(child.id()) {
            (READ, rights) => break rights,
            (call, _) if tries == 10 => panic!("{words:?}: cat is in call {call}"),
            _ => std::thread::sleep(Duration::from_millis(200)),
        }
        tries += 1;
    };
    drop(input);
    assert!(child.wait().unwrap().success());
    assert_eq!(
        rights & KEY_0_DENIED,
        KEY_0_DENIED,
        "{words:?}: {rights:#x}"
    );
}

fn commands_in(placement: &str) {
    for words in [
        &["run"][..],
        &["run", "--stats"],
        &["trace", "-o", "/dev/null"],
        &["wss", "-o", "/dev/null"],
    ] {
        let (command, options) = words.split_first().unwrap();
        key_0_is_denied_under(&[&[*command, "--placement", placement], options].concat());
    }
}

fn waiting_calls_have_no_right_to_the_guard_in_guest() {
    commands_in("guest");
}

fn waiting_calls_have_no_right_to_the_guard_on_host() {
    commands_in("host");
}

dune_testing::tests! {
    ring0 waiting_calls_have_no_right_to_the_guard_in_guest, timeout 240,
    ring0 waiting_calls_have_no_right_to_the_guard_on_host, timeout 240,
}
