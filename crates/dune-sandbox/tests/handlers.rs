//! System calls that the embedding program answers, end to end: the programs are Debian's own.

use std::process::{Command, ExitCode, Output};

use dune_sandbox::host::Errno;

/// Which handlers the sandbox in this process gives its program.
const ROLE: &str = "DUNE_HANDLERS";

fn main() -> ExitCode {
    match std::env::var(ROLE) {
        Ok(role) => sandbox(&role),
        Err(_) => run_tests(),
    }
}

fn run_tests() -> ExitCode {
    const TESTS: &[dune_testing::Test] = dune_testing::list! {
        plain a_file_that_does_not_exist_is_read,
        plain what_a_program_writes_can_be_limited,
        plain a_program_lives_in_another_time,
        plain a_child_has_the_handlers_of_its_parent,
    };
    dune_testing::main(TESTS)
}

fn sandbox(role: &str) -> ExitCode {
    let run = || -> Result<dune_sandbox::Outcome, Box<dyn std::error::Error>> {
        let mut words = std::env::args_os().skip(1);
        let program = words.next().ok_or("no program")?;
        let command = dune_sandbox::Command::new(program)
            .args(words)
            .env_remove(ROLE);
        let command = match role {
            "files" => command.handle("openat", |request| {
                let path = request.read_path(request.args()[1])?;
                match path.strip_prefix("/virtual") {
                    Ok(name) => request.give_file(name.as_os_str().as_encoded_bytes()),
                    Err(_) => request.proceed(),
                }
            })?,
            "limit" => command
                .handle("write", |request| {
                    if request.args()[2] > 100 {
                        return Err(Errno::ENOSPC);
                    }
                    request.proceed()
                })?
                .handle("writev", |_| Err(Errno::ENOSYS))?,
            "clock" => command.handle("clock_gettime", |request| {
                let mut time = [0; 16];
                time[..4].copy_from_slice(&86_400_u32.to_le_bytes());
                request.write(request.args()[1], &time)?;
                Ok(0)
            })?,
            _ => return Err(format!("no handlers {role}").into()),
        };
        let engine = dune_sandbox::engine::on_host::OnHost::new()?;
        Ok(command.run(Box::new(engine))?)
    };
    match run() {
        Ok(outcome) => outcome.end.leave(),
        Err(error) => {
            println!("the sandbox failed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a program with handlers, or ends the test where there is no KVM at all.
fn with(role: &str, words: &[&str]) -> Output {
    use dune_kvm::probe::{Kvm, probe};
    let kvm = &probe().kvm;
    if !matches!(kvm, Kvm::Hardware { .. } | Kvm::Weak { .. }) {
        dune_testing::ignore(format!("this machine has no usable KVM: {kvm}"));
    }
    let this = std::env::current_exe().unwrap();
    Command::new(this)
        .args(words)
        .env(ROLE, role)
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn a_file_that_does_not_exist_is_read() {
    let output = with("files", &["cat", "/virtual/name", "/virtual/other"]);
    assert_eq!(text(&output), "nameother", "{output:?}");
    let output = with("files", &["cat", "/no/such"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

fn what_a_program_writes_can_be_limited() {
    let output = with("limit", &["echo", "short"]);
    assert_eq!(text(&output), "short\n", "{output:?}");
    let output = with("limit", &["seq", "1", "1000"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(text(&output), "", "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("No space left"), "{said}");
}

fn a_program_lives_in_another_time() {
    let output = with("clock", &["date", "-u", "+%s %Y"]);
    assert_eq!(text(&output), "86400 1970\n", "{output:?}");
}

fn a_child_has_the_handlers_of_its_parent() {
    let output = with("files", &["sh", "-c", "cat /virtual/one; cat /virtual/two"]);
    assert_eq!(text(&output), "onetwo", "{output:?}");
}
