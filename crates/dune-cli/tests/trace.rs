//! `dune trace` as a person reads it: known calls, known lines.
//!
//! This binary is also the program that is traced: with the role `calls` it
//! makes calls that are known, between two marks.

#![expect(unsafe_code, reason = "the traced program makes plain system calls")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a sequence of calls on this process's own descriptors has one reason"
)]

use std::process::{Command, ExitCode, Output, Stdio};

use dune_kvm::probe::{self, Placement};
use libtest_mimic::{Arguments, Failed, Trial};

const ROLE: &str = "DUNE_TEST_ROLE";

type Outcome = Result<(), Failed>;
type Test = (&'static str, fn() -> Outcome);

const TESTS: &[Test] = &[
    ("calls_are_printed_as_known", calls_are_printed_as_known),
    ("signals_and_ends_are_printed", signals_and_ends_are_printed),
    ("filters_choose", filters_choose),
    ("the_summary_adds_up", the_summary_adds_up),
    ("json_lines_are_json", json_lines_are_json),
    ("a_file_gets_the_trace", a_file_gets_the_trace),
    (
        "the_program_cannot_reach_the_trace",
        the_program_cannot_reach_the_trace,
    ),
    ("children_are_followed", children_are_followed),
    ("unknown_calls_are_told", unknown_calls_are_told),
];

fn main() -> ExitCode {
    if std::env::var_os(ROLE).is_some_and(|role| role == "calls") {
        make_calls();
        return ExitCode::from(3);
    }
    let report = probe::probe();
    let in_lab = report.natural_placement() == Placement::Lab;
    let reason = if in_lab {
        report.kvm.to_string()
    } else {
        String::new()
    };
    let trials = TESTS.iter().map(|&(name, test)| {
        Trial::test(name, test)
            .with_kind(reason.clone())
            .with_ignored_flag(in_lab)
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}

extern "C" fn nothing(_signal: libc::c_int) {}

/// What is traced. The results are the trace's affair.
fn make_calls() {
    let text = c"/dev/null".as_ptr();
    // SAFETY: plain calls on this process's own descriptors and memory.
    unsafe {
        libc::access(c"/begin".as_ptr(), libc::R_OK | libc::W_OK);
        let fd = libc::open(text, libc::O_RDWR | libc::O_CLOEXEC);
        libc::open(c"/no/such".as_ptr(), libc::O_WRONLY | libc::O_CREAT, 0o640);
        libc::write(fd, c"a\"b\n\x01".as_ptr().cast(), 5);
        let long = [b'x'; 100];
        libc::write(fd, long.as_ptr().cast(), 100);
        let mut buffer = [0_u8; 16];
        libc::read(fd, buffer.as_mut_ptr().cast(), 16);
        libc::lseek(fd, -5, libc::SEEK_SET);
        libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK | libc::O_APPEND);
        let vectors = [libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: 2,
        }; 2];
        libc::writev(fd, vectors.as_ptr(), 2);

        let socket = libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 6);
        let mut inet: libc::sockaddr_in = core::mem::zeroed();
        inet.sin_family = libc::AF_INET as u16;
        inet.sin_port = 1_u16.to_be();
        inet.sin_addr.s_addr = u32::from_be_bytes([127, 0, 0, 1]).to_be();
        let inet = (&raw const inet).cast();
        libc::bind(socket, inet, 1);
        let one = 1_i32;
        libc::setsockopt(
            socket,
            libc::SOL_SOCKET,
            libc::SO_REUSEADDR,
            (&raw const one).cast(),
            4,
        );
        libc::sendto(
            socket,
            buffer.as_ptr().cast(),
            3,
            libc::MSG_NOSIGNAL,
            inet,
            16,
        );

        let mut poll = libc::pollfd {
            fd,
            events: libc::POLLIN | libc::POLLOUT,
            revents: 0,
        };
        libc::poll(&raw mut poll, 1, 100);
        let mut set: libc::sigset_t = core::mem::zeroed();
        libc::sigaddset(&raw mut set, libc::SIGUSR1);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, core::ptr::null_mut());
        let time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 5,
        };
        libc::nanosleep(&raw const time, core::ptr::null_mut());
        libc::mprotect(
            core::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_EXEC,
        );
        libc::syscall(libc::SYS_io_uring_setup, 8, 0);
        libc::syscall(1000, 7);
        libc::access(c"/end".as_ptr(), libc::F_OK);

        libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, core::ptr::null_mut());
        let handler: extern "C" fn(libc::c_int) = nothing;
        libc::signal(libc::SIGUSR1, handler as usize);
        libc::kill(libc::getpid(), libc::SIGUSR1);
    }
}

fn trace(words: &[&str]) -> Output {
    let own = std::env::current_exe().unwrap();
    Command::new(env!("CARGO_BIN_EXE_dune"))
        .arg("trace")
        .args(words)
        .arg("--")
        .arg(own)
        .env(ROLE, "calls")
        .env_remove(probe::PLACEMENT_VARIABLE)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The lines between the marks, without their alignment.
fn marked(text: &str) -> Vec<String> {
    let lines = text
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    let mut lines = lines.skip_while(|line| !line.contains("/begin"));
    let first = lines.next();
    first
        .into_iter()
        .chain(lines.take_while(|line| !line.contains("/end")))
        .collect()
}

fn calls_are_printed_as_known() -> Outcome {
    let seen = trace(&[]);
    assert_eq!(seen.status.code(), Some(3), "{}", stderr(&seen));
    let lines = marked(&stderr(&seen));
    // Descriptors are what the program gets, memory is anywhere.
    let expected = "\
access(\"/begin\", R_OK|W_OK) = -1 ENOENT (No such file or directory)
open#(AT_FDCWD, \"/dev/null\", O_RDWR|O_CLOEXEC) = 3
open#(AT_FDCWD, \"/no/such\", O_WRONLY|O_CREAT, 0640) = -1 ENOENT (No such file or directory)
write(3, \"a\\\"b\\n\\1\", 5) = 5
write(3, \"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\"..., 100) = 100
read(3, \"\", 16) = 0
lseek(3, -5, SEEK_SET) = #
fcntl(3, F_SETFL, O_RDONLY|O_APPEND|O_NONBLOCK) = 0
writev(3, [{iov_base=\"\\0\\0\", iov_len=2}, {iov_base=\"\\0\\0\", iov_len=2}], 2) = 4
socket(AF_INET, SOCK_STREAM|SOCK_NONBLOCK, IPPROTO_TCP) = 4
bind(4, \"\\2\", 1) = -1 EINVAL (Invalid argument)
setsockopt(4, SOL_SOCKET, SO_REUSEADDR, [1], 4) = 0
sendto(4, \"\\0\\0\\0\", 3, MSG_NOSIGNAL, {sa_family=AF_INET, sin_port=htons(1), sin_addr=inet_addr(\"127.0.0.1\")}, 16) = -1 EPIPE (Broken pipe)
poll([{fd=3, events=POLLIN|POLLOUT, revents=POLLIN|POLLOUT}], 1, 100) = 1
rt_sigprocmask(SIG_BLOCK, [USR1], NULL, 8) = 0
#nanosleep(#{tv_sec=0, tv_nsec=5}, NULL) = 0
mprotect(NULL, 4096, PROT_READ|PROT_EXEC) = -1 ENOMEM (Cannot allocate memory)
io_uring_setup(8, NULL) = -1 ENOSYS (Function not implemented)
syscall_0x3e8(0x7, #) = -1 ENOSYS (Function not implemented)";
    let expected: Vec<&str> = expected.lines().collect();
    for (line, expected) in lines.iter().zip(&expected) {
        if !fits(line, expected) {
            return Err(format!("expected {expected}\nseen     {line}").into());
        }
    }
    if lines.len() == expected.len() {
        Ok(())
    } else {
        Err(format!("{} lines:\n{}", lines.len(), lines.join("\n")).into())
    }
}

/// Whether the line is the expected one, in which `#` stands for anything.
fn fits(line: &str, expected: &str) -> bool {
    let mut parts = expected.split('#');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = line.strip_prefix(first) else {
        return false;
    };
    let mut is_last_open = false;
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
        is_last_open = part.is_empty();
    }
    rest.is_empty() || is_last_open
}

fn signals_and_ends_are_printed() -> Outcome {
    let text = stderr(&trace(&["-e", "kill,%signal"]));
    let signal = text.lines().position(|line| {
        line.starts_with("--- SIGUSR1 {si_signo=SIGUSR1, si_code=SI_USER, si_pid=")
    });
    let kill = text.lines().position(|line| line.starts_with("kill("));
    assert!(kill.is_some() && signal > kill, "{text}");
    assert!(text.contains("\nrt_sigreturn("), "{text}");
    assert!(text.ends_with("+++ exited with 3 +++\n"), "{text}");
    Ok(())
}

fn filters_choose() -> Outcome {
    let names = |which: &str| -> Vec<String> {
        marked(&stderr(&trace(&["-e", which])))
            .iter()
            .filter_map(|line| Some(line.split_once('(')?.0.to_owned()))
            .collect()
    };
    let files = names("%file");
    assert_eq!(files.len(), 3, "{files:?}");
    let network = names("access,%network");
    assert_eq!(network[1..], ["socket", "bind", "setsockopt", "sendto"]);
    let rest = names("!write,read");
    assert!(!rest.contains(&"write".to_owned()) && rest.contains(&"writev".to_owned()));
    let wrong = trace(&["-e", "raed"]);
    assert_eq!(wrong.status.code(), Some(125));
    assert!(
        stderr(&wrong).contains("dune syscalls"),
        "{}",
        stderr(&wrong)
    );
    Ok(())
}

fn the_summary_adds_up() -> Outcome {
    let lines = stderr(&trace(&[]));
    let calls = lines.lines().filter(|line| line.contains(" = ")).count();
    let errors = lines
        .lines()
        .filter(|line| line.contains(" = -1 E"))
        .count();
    let summary = stderr(&trace(&["-c"]));
    let rows: Vec<Vec<&str>> = summary
        .lines()
        .filter(|line| {
            line.trim_start()
                .starts_with(|first: char| first.is_ascii_digit())
        })
        .map(|line| line.split_whitespace().collect())
        .collect();
    let (total, rows) = rows.split_last().ok_or("no rows")?;
    let number = |row: &[&str], at: usize| row[at].parse::<usize>().unwrap_or(0);
    // Without errors the column is empty.
    let errors_of = |row: &[&str]| if row.len() == 6 { number(row, 4) } else { 0 };
    assert_eq!(total.last(), Some(&"total"), "{summary}");
    let sum: usize = rows.iter().map(|row| number(row, 3)).sum();
    assert_eq!(sum, number(total, 3), "{summary}");
    assert_eq!(sum, calls, "{summary}{lines}");
    let failed: usize = rows.iter().map(|row| errors_of(row)).sum();
    assert_eq!((failed, errors), (errors_of(total), failed), "{summary}");
    Ok(())
}

fn json_lines_are_json() -> Outcome {
    let text = stderr(&trace(&["--json-lines"]));
    let mut opened = 0;
    for line in text.lines() {
        let value: serde_json::Value = serde_json::from_str(line)?;
        if value["call"] == "access" && value["arguments"][0] == "\"/begin\"" {
            assert_eq!(
                (&value["errno"], &value["result"]),
                (&"ENOENT".into(), &(-1).into())
            );
            assert_eq!(value["number"], libc::SYS_access);
            opened += 1;
        }
        assert!(value["thread"].as_u64().is_some(), "{line}");
    }
    assert_eq!(opened, 1, "{text}");
    Ok(())
}

fn a_file_gets_the_trace() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("calls");
    std::fs::write(&path, "what was there before\n")?;
    let name = path.to_str().ok_or("a name")?;
    let seen = trace(&["-T", "-f", "-s", "4", "-o", name]);
    assert_eq!((seen.status.code(), stderr(&seen).as_str()), (Some(3), ""));
    let text = std::fs::read_to_string(&path)?;
    assert!(
        !text.contains("before") && text.contains("\"xxxx\"..., 100)"),
        "{text}"
    );
    let timed = text
        .lines()
        .filter(|line| line.starts_with("[pid ") && line.ends_with('>'));
    assert!(timed.count() > 20, "{text}");
    Ok(())
}

/// The descriptor of the trace is none of the program's.
fn the_program_cannot_reach_the_trace() -> Outcome {
    let code = "import os,resource\nsoft,hard=resource.getrlimit(resource.RLIMIT_NOFILE)\n\
                fds=[]\nfor f in list(range(3,64))+list(range(soft-64,min(hard,soft+256))):\n  \
                try: os.fstat(f); fds.append(f)\n  except OSError: pass\nprint(fds)";
    let fds = |program: &str, words: &[&str]| -> Result<String, Failed> {
        let seen = Command::new(program)
            .args(words)
            .args(["-c", code])
            .env_remove(probe::PLACEMENT_VARIABLE)
            .stdin(Stdio::null())
            .output()?;
        Ok(String::from_utf8_lossy(&seen.stdout).into_owned())
    };
    let python = "/usr/bin/python3";
    let traced = ["trace", "-e", "none", "--", python];
    assert_eq!(fds(env!("CARGO_BIN_EXE_dune"), &traced)?, fds(python, &[])?);
    Ok(())
}

/// Children write to the same trace, and count in the same summary.
fn children_are_followed() -> Outcome {
    let code = "/bin/echo one >/dev/null; (exit 3); exit $?";
    let traced = |words: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_dune"))
            .arg("trace")
            .args(words)
            .args(["--", "sh", "-c", code])
            .env_remove(probe::PLACEMENT_VARIABLE)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let seen = traced(&["-e", "%process"]);
    let text = stderr(&seen);
    assert_eq!(seen.status.code(), Some(3), "{text}");
    let child = |what: &str| {
        text.lines()
            .any(|line| line.starts_with("[pid ") && line.contains(what))
    };
    assert!(
        child("execve(\"/bin/echo\", [\"/bin/echo\", \"one\"], "),
        "{text}"
    );
    assert!(child("exit_group(3)"), "{text}");
    assert!(text.contains("WEXITSTATUS(s) == 3"), "{text}");
    let summary = stderr(&traced(&["-c", "-e", "exit_group"]));
    let calls = summary.lines().find(|line| line.ends_with(" exit_group"));
    let calls = calls.and_then(|line| line.split_whitespace().nth(3));
    assert_eq!(calls, Some("3"), "{summary}");
    Ok(())
}

fn unknown_calls_are_told() -> Outcome {
    let text = stderr(&trace(&[
        "-e",
        "!%file,%desc,%memory,%network,%process,%signal",
    ]));
    assert!(text.contains("syscall_0x3e8("), "{text}");
    Ok(())
}
