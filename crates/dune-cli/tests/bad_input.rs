//! What goes wrong with `dune run` and `dune check`: one line that names cause
//! and remedy, the exit code of a shell, and nothing left behind.
//!
//! All of it is about this machine's own placement, so that without a KVM to
//! use the tests say so and do nothing; what must be root to take something
//! away from itself does the same without being root.
#![expect(
    unsafe_code,
    reason = "limits, capabilities, mounts and terminals are taken away between fork and exec"
)]

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use dune_kvm::probe::{PLACEMENT_VARIABLE, Placement, probe};
use tempfile::TempDir;

/// A command that is still running then hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Dune's own exit code, when it is Dune that failed.
const DUNE_FAILED: i32 = 125;

// ---------------------------------------------------------------- what is not

#[test]
fn what_does_not_exist_is_127() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    place
        .run(["no-such-command"])
        .fails(127, &["command not found", "check its spelling"]);
    place
        .run(["./absent"])
        .fails(127, &["./absent", "no such file"]);
    place.run([""]).fails(127, &["\"\""]);
    place.file("script", "#!/no/such/interpreter\n", 0o755);
    place
        .run(["./script"])
        .fails(127, &["./script", "/no/such/interpreter", "no such file"]);
    place.elf(
        "linker",
        &Elf {
            linker: Some("/no/such/linker"),
            ..Elf::default()
        },
    );
    place
        .run(["./linker"])
        .fails(127, &["dynamic linker", "/no/such/linker", "install"]);
}

#[test]
fn what_cannot_be_executed_is_126() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    place.run(["/"]).fails(126, &["is a folder"]);
    place.run(["/dev/null"]).fails(126, &["device"]);
    place.file("plain", "#!/bin/sh\n", 0o644);
    place
        .run(["./plain"])
        .fails(126, &["not executable", "chmod +x ./plain"]);
    place.run(["./plain/below"]).fails(126, &["not a folder"]);
    place.file("text", "echo hello\n", 0o755);
    place
        .run(["./text"])
        .fails(126, &["without a `#!` line", "#!/bin/sh"]);
    place.file("empty", "", 0o755);
    place.run(["./empty"]).fails(126, &["is empty"]);
    place.file("two\nlines", "", 0o755);
    place.run(["./two\nlines"]).fails(126, &["two\\nlines"]);
    let name = "x".repeat(300);
    place.run([format!("./{name}")]).fails(126, &["too long"]);
}

#[test]
fn other_machines_programs_are_126() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    let fails = |elf: Elf, words: &[&str]| {
        place.elf("program", &elf);
        place.run(["./program"]).fails(126, words);
    };
    fails(
        Elf {
            class: 1,
            ..Elf::default()
        },
        &["x32"],
    );
    fails(
        Elf {
            class: 1,
            machine: 3,
            ..Elf::default()
        },
        &["32-bit"],
    );
    fails(
        Elf {
            machine: 183,
            ..Elf::default()
        },
        &["AArch64"],
    );
    fails(
        Elf {
            machine: 243,
            ..Elf::default()
        },
        &["RISC-V"],
    );
    let big_endian = |machine: u16| Elf {
        data: 2,
        machine: machine.swap_bytes(),
        ..Elf::default()
    };
    fails(big_endian(22), &["S/390"]);
    fails(big_endian(62), &["byte order"]);
    fails(
        Elf {
            kind: 1,
            ..Elf::default()
        },
        &["./program"],
    );
}

#[test]
fn the_hand_made_program_itself_runs() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    place.elf("program", &Elf::default());
    let end = place.run(["./program"]);
    assert_eq!(
        (end.code(), end.stderr.as_str()),
        (Elf::STATUS, ""),
        "{end:?}"
    );
}

#[test]
fn truncated_programs_are_126_at_any_length() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    let whole = Elf::default().bytes();
    for len in [1, 3, 4, 5, 16, 17, 18, 20, 24, 40, 63, 64, 65, 119] {
        place.file("program", &whole[..len], 0o755);
        place.run(["./program"]).fails(126, &["./program"]);
    }
    let real = fs::read("/bin/sh").unwrap();
    for len in [120, 1000, 4096, real.len() / 2] {
        place.file("program", &real[..len], 0o755);
        place.run(["./program"]).fails(126, &["truncated"]);
    }
}

#[test]
fn corrupt_programs_never_harm_dune() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    let whole = Elf::default().bytes();
    let mut random = Random(0x5eed);
    for n in 0..250 {
        let mut bytes = whole.clone();
        for _ in 0..=random.below(3) {
            let at = random.below(Elf::CODE_AT as u64) as usize;
            bytes[at] = match random.below(4) {
                0 => 0xff,
                1 => 0,
                2 => bytes[at] ^ (1 << random.below(8)),
                _ => random.next() as u8,
            };
        }
        place.file("program", &bytes, 0o755);
        let end = place.run(["./program"]);
        // It may run all the same, or die as it would under Linux.
        if end.status.signal().is_none() && end.code() != Elf::STATUS {
            assert!(matches!(end.code(), 126 | 127), "program {n}: {end:?}");
            end.is_one_line();
        } else {
            assert_eq!(end.stderr, "", "program {n}");
        }
    }
}

#[test]
fn a_program_that_cannot_be_read_is_126() {
    let Some(place) = Place::with_kvm_as_root() else {
        return;
    };
    place.file("secret", Elf::default().bytes(), 0o111);
    let mut command = place.command(["./secret"]);
    before_exec(&mut command, forget_file_capabilities);
    End::of(command).fails(126, &["not readable", "chmod +r ./secret"]);

    fs::create_dir(place.path("closed")).unwrap();
    place.file("closed/program", Elf::default().bytes(), 0o755);
    fs::set_permissions(place.path("closed"), fs::Permissions::from_mode(0o000)).unwrap();
    let mut command = place.command(["./closed/program"]);
    before_exec(&mut command, forget_file_capabilities);
    End::of(command).fails(126, &["may not be entered"]);
}

// ------------------------------------------------------------ what is too much

#[test]
fn arguments_may_be_as_long_as_linux_allows() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    let long = "a".repeat(128 * 1024 - 1);
    let mut words = vec!["/bin/sh", "-c", "echo $# ${#1}", "sh"];
    words.resize(words.len() + 14, &long);
    let end = place.run(words);
    assert_eq!(
        (end.code(), end.stdout.as_str()),
        (0, "14 131071\n"),
        "{:?}",
        end.status
    );

    // One more byte in a string, or one string too many, is the error of
    // `execve` inside, too.
    let script = r#"exec "/bin/true", ("a" x $ARGV[0]) x $ARGV[1]; print 0 + $!; exit 3"#;
    for (len, count) in [("131072", "1"), ("131071", "20")] {
        let end = place.run(["perl", "-e", script, len, count]);
        assert_eq!((end.code(), end.stdout.as_str()), (3, "7"), "{end:?}");
    }
    let end = place.run(["perl", "-e", script, "131071", "1"]);
    assert_eq!(end.code(), 0, "{end:?}");
}

#[test]
fn too_little_memory_is_said() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    let program = ["/bin/sh", "-c", "echo ran"];
    for (limit, mib) in [
        (libc::RLIMIT_AS, [12, 16, 24, 32, 64]),
        (libc::RLIMIT_DATA, [1, 2, 4, 8, 16]),
    ] {
        for mib in mib {
            let mut command = place.command(program);
            before_exec(&mut command, move || set_limit(limit, mib << 20));
            let end = match End::try_of(command) {
                Ok(end) => end,
                // The kernel itself could not start `dune`.
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::ENOMEM), "{mib} MiB");
                    continue;
                }
            };
            let said_by_dune = end.stderr.starts_with("dune: ");
            match end.status.code() {
                Some(0) => assert_eq!(end.stdout, "ran\n", "{mib} MiB: {end:?}"),
                Some(125 | 126) if said_by_dune => end.fails(end.code(), &["memory", "limit"]),
                // Too little for the dynamic linker, of `dune` or of the
                // program: its own message.
                Some(127) => assert!(end.stderr.contains("shared"), "{mib} MiB: {end:?}"),
                // The kernel has mapped a part of `dune` and no more.
                None if end.stderr.is_empty() => {
                    assert_eq!(
                        end.status.signal(),
                        Some(libc::SIGSEGV),
                        "{mib} MiB: {end:?}"
                    );
                }
                _ => panic!("{mib} MiB: {end:?}"),
            }
        }
    }
}

#[test]
fn too_few_descriptors_are_said() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    let mut has_run = false;
    for count in 4..=20 {
        let mut command = place.command(["/bin/sh", "-c", "echo ran"]);
        before_exec(&mut command, move || set_limit(libc::RLIMIT_NOFILE, count));
        let end = End::of(command);
        if end.code() == 0 {
            assert_eq!(end.stdout, "ran\n", "{count} descriptors: {end:?}");
            has_run = true;
        } else {
            assert!(!has_run, "{count} descriptors: fewer were enough: {end:?}");
            // By then it was the program's files that could not be opened.
            let code = if end.code() == 126 { 126 } else { DUNE_FAILED };
            end.fails(code, &["oo many open files", "raise `ulimit -n`"]);
        }
    }
    assert!(has_run, "20 descriptors are not enough");
}

// ------------------------------------------------------------------- /dev/kvm

#[test]
fn a_forbidden_kvm_names_the_group() {
    let Some(place) = Place::with_kvm_as_root() else {
        return;
    };
    if fs::metadata("/dev/kvm").is_ok_and(|device| device.permissions().mode() & 0o006 != 0) {
        return ignore("/dev/kvm is open to everybody on this machine");
    }
    let mut run = place.dune(["run", "--placement", "host", "--", "/bin/true"]);
    before_exec(&mut run, become_nobody);
    End::of(run).fails(DUNE_FAILED, &["not permitted", "usermod -aG"]);

    let mut check = place.dune(["check", "--json"]);
    before_exec(&mut check, become_nobody);
    let end = End::of(check);
    assert!(end.stdout.contains("\"no-permission\""), "{end:?}");
}

#[test]
fn a_kvm_that_is_absent_or_broken_is_explained() {
    let Some(place) = Place::with_kvm_as_root() else {
        return;
    };
    type Take = fn() -> io::Result<()>;
    let ways: [(Take, &str, &str); 2] = [
        (hide_devices, "absent", "\"absent\""),
        (put_null_over_kvm, "broken", "\"broken\""),
    ];
    for (take, word, state) in ways {
        if !can(take) {
            return ignore("this process may not mount");
        }
        let mut run = place.dune(["run", "--placement", "host", "--", "/bin/true"]);
        before_exec(&mut run, take);
        End::of(run).fails(DUNE_FAILED, &[word, "use auto or lab"]);
        let mut check = place.dune(["check", "--json"]);
        before_exec(&mut check, take);
        let end = End::of(check);
        assert!(end.stdout.contains(state), "{end:?}");
        assert_eq!(end.stderr, "");
    }
}

/// A program cannot take the machine away from under itself: it has no
/// descriptor of Dune's, by any number.
#[test]
fn a_program_cannot_close_what_is_dunes() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    let script = r"
        my $close_range = 436;
        die qq(close_range: $!) if syscall($close_range, 3, 0xffffffff, 0) < 0;
        my $close = 3;
        syscall($close, $_) for 3..70000, 0x7fffffff, 0xffffffff;
        my $kvm_run = 0xae80;
        for my $fd (3..1100) {
            my $ioctl = 16;
            print qq(descriptor $fd answers\n) if syscall($ioctl, $fd, $kvm_run, 0) != -1;
        }
        opendir my $dir, '/proc/self/fd' or die qq(opendir: $!);
        my @left = sort grep { !/^\./ } readdir $dir;
        my @touched = (1) x 1_000_000;
        print qq(@left goes on\n);
    ";
    let mut command = place.command(["perl", "-e", script]);
    before_exec(&mut command, only_standard_streams);
    let end = End::of(command);
    assert_eq!(
        (end.code(), end.stdout.as_str()),
        (0, "0 1 2 3 goes on\n"),
        "{end:?}"
    );
}

// -------------------------------------------------------------------- signals

#[test]
fn a_kill_at_any_moment_leaves_nothing() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    const PROGRAMS: [&[&str]; 3] = [
        &["/bin/sh", "-c", "while :; do :; done"],
        &["perl", "-e", "sleep 100"],
        &[
            "perl",
            "-e",
            "my @a; push @a, 'x' x 4096 while @a < 30000; sleep 100",
        ],
    ];
    const SIGNALS: [i32; 4] = [libc::SIGTERM, libc::SIGKILL, libc::SIGINT, libc::SIGHUP];
    let mounts = mounts();
    let mut random = Random(0xdead);
    for n in 0..50 {
        let signal = SIGNALS[n % SIGNALS.len()];
        let mut command = place.command(PROGRAMS[n % PROGRAMS.len()]);
        before_exec(&mut command, own_session);
        let mut child = command.spawn().unwrap();
        thread::sleep(Duration::from_micros(random.below(80_000)));
        kill(&child, signal);
        let status = wait(&mut child);
        assert_eq!(status.signal(), Some(signal), "run {n}: {status:?}");
        assert_eq!(
            session_members(child.id()),
            [0_u32; 0],
            "run {n}: processes are left"
        );
        assert_eq!(place.files(), [""; 0], "run {n}: files are left");
    }
    assert_eq!(self::mounts(), mounts, "mounts are left");
}

#[test]
fn a_shell_sees_the_signal() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    for (name, code) in [
        ("TERM", 143),
        ("KILL", 137),
        ("SEGV", 139),
        ("INT", 130),
        ("PIPE", 141),
        ("ABRT", 134),
    ] {
        let script = format!(
            "{dune} run -- /bin/sh -c 'kill -{name} $$' 2>/dev/null; echo $?",
            dune = DUNE
        );
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", &script]).stdout(Stdio::piped());
        place.set_up(&mut shell);
        let end = End::of(shell);
        assert_eq!(end.stdout.trim(), code.to_string(), "{name}: {end:?}");
    }
}

#[test]
fn a_terminal_is_as_it_was() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    let terminal = Terminal::new();
    let before = terminal.modes();
    let mut random = Random(0x7e57);
    for n in 0..12 {
        let mut command = place.command(["/bin/sh", "-c", "echo ready; while :; do :; done"]);
        terminal.give_to(&mut command);
        let mut child = command.spawn().unwrap();
        thread::sleep(Duration::from_micros(random.below(80_000)));
        let signal = if n % 2 == 0 {
            kill(&child, libc::SIGKILL);
            libc::SIGKILL
        } else {
            terminal.wait_for(b"ready");
            terminal.press(0x03);
            libc::SIGINT
        };
        let status = wait(&mut child);
        assert_eq!(status.signal(), Some(signal), "run {n}: {status:?}");
        assert!(
            terminal.modes() == before,
            "run {n}: the terminal's modes have changed"
        );
        terminal.drain();
    }
}

// -------------------------------------------------------------------- streams

#[test]
fn closed_streams_stay_closed() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    // What the program says about its streams, natively and in the sandbox.
    let script = r#"
        open my $out, '>', $ARGV[0] or die; my $report = '';
        for my $fd (0..2) {
            my $flags = syscall(72, $fd, 1, 0);
            $report .= "$fd:$flags ";
        }
        syswrite $out, $report;
    "#;
    for closed in [&[0][..], &[1], &[2], &[0, 1, 2]] {
        let report = |sandbox: bool| {
            let file = place.path("report");
            let words: [&OsStr; 4] = [
                "perl".as_ref(),
                "-e".as_ref(),
                script.as_ref(),
                file.as_ref(),
            ];
            let mut command = if sandbox {
                place.command(words)
            } else {
                let mut command = Command::new(words[0]);
                command.args(&words[1..]);
                place.set_up(&mut command);
                command
            };
            before_exec(&mut command, move || {
                for &fd in closed {
                    // SAFETY: closes a descriptor between fork and exec.
                    unsafe { libc::close(fd) };
                }
                Ok(())
            });
            let end = End::of(command);
            assert_eq!(end.code(), 0, "{closed:?} closed: {end:?}");
            let text = fs::read_to_string(&file).unwrap();
            fs::remove_file(&file).unwrap();
            text
        };
        assert_eq!(report(true), report(false), "{closed:?} closed");
    }
}

#[test]
fn a_reader_who_leaves_ends_the_program_by_sigpipe() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    let mut command = place.command(["/bin/sh", "-c", "while echo y; do :; done"]);
    let mut child = command.spawn().unwrap();
    let mut byte = [0; 1];
    child.stdout.take().unwrap().read_exact(&mut byte).unwrap();
    assert_eq!(wait(&mut child).signal(), Some(libc::SIGPIPE));

    let mut check = place.dune(["check"]).spawn().unwrap();
    drop(check.stdout.take());
    let status = wait(&mut check);
    assert_eq!(status.code(), Some(0), "{status:?}");
}

#[test]
fn a_full_disk_is_the_programs_error() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    let script = "echo lost || { echo $? >&2; exit 9; }";
    let mut command = place.command(["/bin/sh", "-c", script]);
    command.stdout(full());
    let end = End::of(command);
    assert_eq!(end.code(), 9, "{end:?}");
    assert!(!end.stderr.contains("dune:"), "{end:?}");

    let mut command = place.dune(["check"]);
    command.stdout(full());
    End::of(command).fails(DUNE_FAILED, &["No space left"]);
}

#[test]
fn a_wrong_command_line_is_no_status_of_a_program() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    for (words, help) in [
        (&["run"][..], "<COMMAND>"),
        (&["run", "--env", "A", "true"], "NAME=VALUE"),
        (&["run", "--timeout", "soon", "true"], "seconds"),
        (&["lab", "--memory", "little", "true"], "MiB"),
        (&["fly"], "fly"),
        (&[], "Usage"),
    ] {
        let end = End::of(place.dune(words));
        assert_eq!(end.code(), DUNE_FAILED, "{words:?}: {end:?}");
        assert!(end.stderr.contains(help), "{words:?}: {end:?}");
    }
    assert_eq!(End::of(place.dune(["--help"])).code(), 0);
}

#[test]
fn nobody_to_complain_to_is_no_trouble() {
    let Some(place) = Place::with_kvm() else {
        return;
    };
    let mut command = place.command(["./absent"]);
    before_exec(&mut command, || {
        // SAFETY: closes a descriptor between fork and exec.
        unsafe { libc::close(libc::STDERR_FILENO) };
        Ok(())
    });
    assert_eq!(End::of(command).code(), 127);
}

// -------------------------------------------------------------- what they use

const DUNE: &str = env!("CARGO_BIN_EXE_dune");

/// A folder of its own in which everything of a test happens.
struct Place {
    root: TempDir,
}

impl Place {
    /// `None`, loudly, where programs would go to the lab.
    fn with_kvm() -> Option<Self> {
        static REASON: OnceLock<Option<String>> = OnceLock::new();
        let reason = REASON.get_or_init(|| {
            let report = probe();
            (report.natural_placement() == Placement::Lab).then(|| report.kvm.to_string())
        });
        if let Some(reason) = reason {
            ignore(&format!("/dev/kvm is {reason}"));
            return None;
        }
        let root = tempfile::Builder::new()
            .prefix("dune-bad-input-")
            .tempdir()
            .unwrap();
        // Readable by whom a test turns into.
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Some(Self { root })
    }

    fn with_kvm_as_root() -> Option<Self> {
        // SAFETY: asks for a number.
        if unsafe { libc::geteuid() } != 0 {
            ignore("only root can take rights away in this way");
            return None;
        }
        Self::with_kvm()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>, mode: u32) {
        let path = self.path(name);
        // Made anew: what has run a moment ago may still be busy.
        let _ = fs::remove_file(&path);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn elf(&self, name: &str, elf: &Elf) {
        self.file(name, elf.bytes(), 0o755);
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root.path()).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect()
    }

    /// The folder is where a program would leave something.
    fn set_up(&self, command: &mut Command) {
        let root = self.root.path();
        command.current_dir(root).env_remove(PLACEMENT_VARIABLE);
        for variable in ["TMPDIR", "HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"] {
            command.env(variable, root);
        }
        command.stdin(Stdio::null());
        before_exec(command, usual_signals);
    }

    fn dune<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(DUNE);
        command
            .args(words)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        self.set_up(&mut command);
        command
    }

    /// `dune run -- WORDS`
    fn command<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.dune(["run", "--"]);
        command.args(words);
        command
    }

    fn run<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> End {
        End::of(self.command(words))
    }
}

/// How a command ended, and what it said.
#[derive(Debug)]
struct End {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

impl End {
    fn of(command: Command) -> Self {
        Self::try_of(command).unwrap()
    }

    /// # Errors
    ///
    /// If the kernel cannot start it.
    fn try_of(mut command: Command) -> io::Result<Self> {
        // A command keeps the descriptors that it gives to its child.
        let mut child = command.stderr(Stdio::piped()).spawn()?;
        drop(command);
        let out = child
            .stdout
            .take()
            .map(|pipe| thread::spawn(|| text_of(pipe)));
        let err = child
            .stderr
            .take()
            .map(|pipe| thread::spawn(|| text_of(pipe)));
        let status = wait(&mut child);
        let text = |reader: Option<thread::JoinHandle<String>>| {
            reader.map_or_else(String::new, |reader| reader.join().unwrap())
        };
        Ok(Self {
            status,
            stdout: text(out),
            stderr: text(err),
        })
    }

    fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| panic!("it died: {self:?}"))
    }

    /// Asserts that Dune ended with this code, and said why in one line that
    /// has the words in it.
    #[track_caller]
    fn fails(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code(), code, "{self:?}");
        self.is_one_line();
        for word in words {
            assert!(self.stderr.contains(word), "no {word:?} in {self:?}");
        }
    }

    #[track_caller]
    fn is_one_line(&self) {
        assert!(self.stderr.starts_with("dune: "), "{self:?}");
        assert_eq!(self.stderr.matches('\n').count(), 1, "{self:?}");
        assert!(self.stderr.ends_with('\n'), "{self:?}");
        assert_eq!(self.stdout, "", "{self:?}");
    }
}

fn text_of(mut pipe: impl Read) -> String {
    let mut bytes = Vec::new();
    pipe.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn wait(child: &mut Child) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("it was still running after {PATIENCE:?}");
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn kill(child: &Child, signal: i32) {
    // SAFETY: a signal to a child that nobody has waited for.
    let result = unsafe { libc::kill(child.id() as i32, signal) };
    assert_eq!(result, 0, "kill: {}", io::Error::last_os_error());
}

/// Says why a test does nothing, past the capture of its output.
fn ignore(reason: &str) {
    let test = thread::current().name().unwrap_or("a test").to_owned();
    let _ = writeln!(io::stderr(), "\n*** {test} is ignored: {reason}\n");
}

/// Numbers that are the same in each run (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }
}

/// A program of one page that ends with [`Elf::STATUS`].
struct Elf {
    class: u8,
    data: u8,
    kind: u16,
    machine: u16,
    linker: Option<&'static str>,
}

impl Default for Elf {
    fn default() -> Self {
        Self {
            class: 2,
            data: 1,
            kind: 2,
            machine: 62,
            linker: None,
        }
    }
}

impl Elf {
    const STATUS: i32 = 42;
    const BASE: u64 = 0x40_0000;
    const CODE_AT: usize = 64 + 2 * 56;
    const LINKER_AT: usize = 0x200;
    const LEN: usize = 0x1000;

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0x7f, b'E', b'L', b'F', self.class, self.data, 1];
        bytes.resize(16, 0);
        let headers: u16 = if self.linker.is_some() { 2 } else { 1 };
        for half in [self.kind, self.machine, 1, 0] {
            bytes.extend(half.to_le_bytes());
        }
        let entry = Self::BASE + Self::CODE_AT as u64;
        for word in [entry, 64, 0] {
            bytes.extend(word.to_le_bytes());
        }
        for half in [0, 0, 64, 56, headers, 0, 0, 0] {
            bytes.extend(half.to_le_bytes());
        }
        let mut header = |kind: u32, flags: u32, offset: usize, len: usize| {
            bytes.extend(kind.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            let at = Self::BASE + offset as u64;
            for word in [offset as u64, at, at, len as u64, len as u64, 0x1000] {
                bytes.extend(word.to_le_bytes());
            }
        };
        if let Some(linker) = self.linker {
            header(3, 4, Self::LINKER_AT, linker.len() + 1);
        }
        header(1, 5, 0, Self::LEN);
        bytes.resize(Self::CODE_AT, 0);
        // mov edi, STATUS; mov eax, 60 (exit); syscall
        bytes.extend([
            0xbf,
            Self::STATUS as u8,
            0,
            0,
            0,
            0xb8,
            60,
            0,
            0,
            0,
            0x0f,
            0x05,
        ]);
        if let Some(linker) = self.linker {
            bytes.resize(Self::LINKER_AT, 0);
            bytes.extend(linker.as_bytes());
            bytes.push(0);
        }
        // What lies behind ends whoever jumps there (int3).
        bytes.resize(Self::LEN, 0xcc);
        bytes
    }
}

// ------------------------------------------------- between `fork` and `execve`

fn before_exec(
    command: &mut Command,
    action: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    // SAFETY: the actions of this file make system calls and nothing else:
    // they take no lock and no memory.
    unsafe { command.pre_exec(action) };
}

fn checked(result: i32) -> io::Result<()> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn set_limit(limit: libc::__rlimit_resource_t, value: u64) -> io::Result<()> {
    let value = libc::rlimit {
        rlim_cur: value,
        rlim_max: value,
    };
    // SAFETY: reads the structure.
    checked(unsafe { libc::setrlimit(limit, &raw const value) })
}

fn own_session() -> io::Result<()> {
    // SAFETY: changes this process's session only.
    checked(unsafe { libc::setsid() })
}

/// Tests that run in the background or under `nohup` ignore these, and so would what they start.
fn usual_signals() -> io::Result<()> {
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
        // SAFETY: no handler is installed.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    Ok(())
}

fn only_standard_streams() -> io::Result<()> {
    let close_on_exec = libc::CLOSE_RANGE_CLOEXEC as i32;
    // SAFETY: what this process still needs before `execve` stays open.
    checked(unsafe { libc::close_range(3, u32::MAX, close_on_exec) })
}

/// Root without the right to read everything; who executes a program as root
/// has what is in the bounding set.
fn forget_file_capabilities() -> io::Result<()> {
    const CAP_DAC_OVERRIDE: u64 = 1;
    const CAP_DAC_READ_SEARCH: u64 = 2;
    for capability in [CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH] {
        // SAFETY: takes a right away from this process.
        checked(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) })?;
    }
    Ok(())
}

fn become_nobody() -> io::Result<()> {
    const NOBODY: u32 = 65534;
    // SAFETY: no groups are read.
    checked(unsafe { libc::setgroups(0, std::ptr::null()) })?;
    // SAFETY: changes this process only.
    checked(unsafe { libc::setgid(NOBODY) })?;
    // SAFETY: changes this process only.
    checked(unsafe { libc::setuid(NOBODY) })
}

/// Mounts of its own, of which nothing gets out.
fn own_mounts() -> io::Result<()> {
    // SAFETY: changes this process only.
    checked(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    mount(
        c"none",
        c"/",
        libc::MS_REC | libc::MS_PRIVATE,
        std::ptr::null(),
    )
}

fn hide_devices() -> io::Result<()> {
    own_mounts()?;
    mount(c"none", c"/dev", 0, c"tmpfs".as_ptr())
}

fn put_null_over_kvm() -> io::Result<()> {
    own_mounts()?;
    mount(c"/dev/null", c"/dev/kvm", libc::MS_BIND, std::ptr::null())
}

fn mount(
    what: &std::ffi::CStr,
    place: &std::ffi::CStr,
    flags: u64,
    kind: *const libc::c_char,
) -> io::Result<()> {
    let nothing = std::ptr::null();
    // SAFETY: reads strings with a zero at their end.
    checked(unsafe { libc::mount(what.as_ptr(), place.as_ptr(), kind, flags, nothing) })
}

/// Whether this may be done here at all.
fn can(action: fn() -> io::Result<()>) -> bool {
    let mut command = Command::new("/bin/true");
    before_exec(&mut command, action);
    command.status().is_ok()
}

// ------------------------------------------------------------- what is left

fn session_members(session: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let session_of = |process: u32| -> Option<u32> {
        let stat = fs::read_to_string(Path::new("/proc").join(process.to_string()).join("stat"));
        // The name, in parentheses, may hold anything.
        stat.ok()?
            .rsplit_once(')')?
            .1
            .split_whitespace()
            .nth(3)?
            .parse()
            .ok()
    };
    processes
        .filter(|&process| session_of(process) == Some(session))
        .collect()
}

/// Mounts that could be of `dune`; others come and go.
fn mounts() -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts
        .lines()
        .filter(|line| line.contains("dune"))
        .map(str::to_owned)
        .collect()
}

/// A terminal, seen from its keyboard and screen.
struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

impl Terminal {
    fn new() -> Self {
        let (mut master, mut slave) = (-1, -1);
        let none = std::ptr::null_mut();
        // SAFETY: stores two descriptors; the rest is left out.
        let result = unsafe {
            libc::openpty(
                &raw mut master,
                &raw mut slave,
                none,
                none.cast(),
                none.cast(),
            )
        };
        assert_eq!(result, 0, "openpty: {}", io::Error::last_os_error());
        for fd in [master, slave] {
            // SAFETY: sets a flag of a descriptor made just now.
            unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
        // SAFETY: made just now, and nobody else's.
        let master = unsafe { OwnedFd::from_raw_fd(master) };
        // SAFETY: as above.
        let slave = unsafe { OwnedFd::from_raw_fd(slave) };
        Self { master, slave }
    }

    /// As the controlling terminal of a session of its own, as from a shell.
    fn give_to(&self, command: &mut Command) {
        for stream in [Command::stdin, Command::stdout, Command::stderr] {
            stream(command, self.slave.try_clone().unwrap());
        }
        before_exec(command, || {
            own_session()?;
            // SAFETY: takes the terminal at standard input for this session.
            checked(unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0) })
        });
    }

    /// All of `termios`, as bytes.
    fn modes(&self) -> Vec<u32> {
        let mut modes = std::mem::MaybeUninit::<libc::termios>::zeroed();
        // SAFETY: fills the structure.
        let result = unsafe { libc::tcgetattr(self.slave.as_raw_fd(), modes.as_mut_ptr()) };
        assert_eq!(result, 0, "tcgetattr: {}", io::Error::last_os_error());
        // SAFETY: filled by the call.
        let modes = unsafe { modes.assume_init() };
        let flags = [modes.c_iflag, modes.c_oflag, modes.c_cflag, modes.c_lflag];
        flags.into_iter().chain(modes.c_cc.map(u32::from)).collect()
    }

    fn wait_for(&self, text: &[u8]) {
        let mut seen: Vec<u8> = Vec::new();
        while !seen.windows(text.len()).any(|window| window == text) {
            let mut ready = libc::pollfd {
                fd: self.master.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one structure, which lives.
            let count = unsafe { libc::poll(&raw mut ready, 1, PATIENCE.as_millis() as i32) };
            assert_eq!(count, 1, "nothing on the terminal but {seen:?}");
            let mut buffer = [0; 256];
            let len = fs::File::from(self.master.try_clone().unwrap())
                .read(&mut buffer)
                .unwrap();
            seen.extend(&buffer[..len]);
        }
    }

    fn press(&self, key: u8) {
        fs::File::from(self.master.try_clone().unwrap())
            .write_all(&[key])
            .unwrap();
    }

    fn drain(&self) {
        // SAFETY: drops what nobody has read.
        unsafe { libc::tcflush(self.slave.as_raw_fd(), libc::TCIOFLUSH) };
    }
}
