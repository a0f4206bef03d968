//! Policies, on real programs in the sandbox: what they refuse, that each of
//! the two walls refuses it alone, and that what an explanation names makes
//! the program succeed. With the engine on host where this machine has a KVM,
//! and with the engine in guest where its KVM runs ring 0, or in the lab.
//!
//! Started with `DUNE_TEST_POLICY` set, this binary is what runs a program: it
//! does what `dune run` does, by the same library.

#[path = "policy_parts/tricks.rs"]
mod tricks;

use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode, Output, Stdio};

use dune_sandbox::SecondWall;
use dune_sandbox::confine::kernel::Kernel;
use dune_sandbox::engine::Engine;
use dune_sandbox::engine::in_guest::InGuest;
use dune_sandbox::engine::on_host::OnHost;
use dune_sandbox::host::move_fd_high;
use dune_sandbox::policy::text;

/// `ENGINE WALLS`, and the policy as text.
const ROLE: &str = "DUNE_TEST_POLICY";
const POLICY: &str = "DUNE_TEST_POLICY_TEXT";

/// Which walls stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Walls {
    Both,
    /// The guard's own checks alone.
    Guard,
    /// Landlock and seccomp alone.
    Second,
}

const WALLS: [(Walls, &str); 3] = [
    (Walls::Both, "both"),
    (Walls::Guard, "guard"),
    (Walls::Second, "second"),
];

/// What `dune run` does, if this process was started for that.
fn sandbox() -> Option<ExitCode> {
    let role = std::env::var(ROLE).ok()?;
    let (engine, walls) = role.split_once(' ')?;
    let mut words = std::env::args_os().skip(1);
    let program = words.next().unwrap_or_default();
    let run = || -> Result<dune_sandbox::Outcome, Box<dyn std::error::Error>> {
        let policy = text::parse(&std::env::var(POLICY)?, Path::new("/"))?;
        let stderr = std::io::stderr().as_fd().try_clone_to_owned()?;
        let explain = std::fs::File::from(move_fd_high(stderr)?);
        let engine: Box<dyn Engine> = if engine == "guest" {
            Box::new(InGuest::new()?)
        } else {
            Box::new(OnHost::new()?)
        };
        let mut command = dune_sandbox::Command::new(program)
            .args(words)
            .env_remove(ROLE)
            .env_remove(POLICY)
            .policy(policy)
            .explain_to(explain);
        match walls {
            "guard" => command = command.second_wall(SecondWall::Off),
            "second" => command = command.without_own_policy_checks(),
            _ => {}
        }
        Ok(command.run(engine)?)
    };
    Some(match run() {
        Ok(outcome) => outcome.end.leave(),
        Err(error) => {
            eprintln!("dune: {error}");
            ExitCode::from(125)
        }
    })
}

/// Runs a program under a policy.
fn run(walls: Walls, policy: &str, argv: &[&str]) -> Output {
    let engine = if IN_GUEST.load(std::sync::atomic::Ordering::Relaxed) {
        "guest"
    } else {
        "host"
    };
    let walls = WALLS.iter().find(|(other, _)| *other == walls).unwrap().1;
    Command::new(std::env::current_exe().unwrap())
        .args(argv)
        .env(ROLE, format!("{engine} {walls}"))
        .env(POLICY, policy)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

static IN_GUEST: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

fn succeeds(output: &Output) -> bool {
    output.status.success()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A folder with a secret in it.
struct Fixture {
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("secret"), "the secret\n").unwrap();
        std::fs::create_dir(folder.path().join("work")).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> String {
        let path = std::fs::canonicalize(self.folder.path())
            .unwrap()
            .join(name);
        path.to_str().unwrap().to_owned()
    }
}

fn python() -> Option<&'static str> {
    let python = "/usr/bin/python3";
    Path::new(python).exists().then_some(python)
}

/// What python needs beside its libraries.
const PYTHON: &str = r#"ro = ["/usr/lib/python3", "/usr/lib/python3.11", "/usr/lib/python3.13"]"#;

/// The policy text with the rules that exist on this machine.
fn python_rules(more: &str) -> String {
    let paths: Vec<String> = PYTHON
        .split('"')
        .filter(|text| text.starts_with('/') && Path::new(text).exists())
        .map(|path| format!("\"{path}\""))
        .collect();
    format!(
        "strict = true\n{more}\n[files]\nro = [{}]\n",
        paths.join(", ")
    )
}

// ------------------------------------------------------------------ promises

fn a_strict_program_reads_nothing_else() {
    let fixture = Fixture::new();
    let secret = fixture.path("secret");
    for walls in [Walls::Both, Walls::Guard, Walls::Second] {
        let seen = run(walls, "strict = true", &["/bin/cat", &secret]);
        assert_eq!(seen.status.code(), Some(1), "{walls:?}: {seen:?}");
        assert!(seen.stdout.is_empty(), "{walls:?}: {seen:?}");
        assert!(
            stderr(&seen).contains("Permission denied"),
            "{walls:?}: {seen:?}"
        );
    }
    let seen = run(Walls::Both, "strict = true", &["/bin/cat", "/dev/null"]);
    assert!(succeeds(&seen), "{seen:?}");
}

/// Every way of changing something that a coreutils program has.
fn a_strict_program_writes_nowhere() {
    let fixture = Fixture::new();
    let at = |name: &str| fixture.path(name);
    let (secret, new, work) = (at("secret"), at("new"), at("work"));
    let before = std::fs::metadata(&secret).unwrap();
    let requests: [(&[&str], bool); 11] = [
        (&["/bin/cp", "/dev/null", &new], true),
        (&["/bin/cp", "/dev/null", &secret], true),
        (&["/bin/rm", "-f", &secret], true),
        (&["/bin/mkdir", &new], true),
        (&["/bin/rmdir", &work], true),
        (&["/bin/mv", &secret, &new], true),
        (&["/bin/ln", "-s", "x", &new], true),
        (&["/usr/bin/truncate", "-s", "0", &secret], true),
        // Landlock does not hold attributes: see docs/security.md.
        (&["/bin/chmod", "777", &secret], false),
        (&["/usr/bin/touch", "-c", "-d", "@0", &secret], false),
        // A device that everybody writes to.
        (&["/bin/chmod", "666", "/dev/null"], false),
    ];
    for (argv, by_second) in requests {
        for walls in [Walls::Both, Walls::Guard, Walls::Second] {
            if walls == Walls::Second && !by_second {
                continue;
            }
            let seen = run(walls, "strict = true", argv);
            assert!(!succeeds(&seen), "{walls:?}: {argv:?}");
            assert_ne!(
                seen.status.code(),
                Some(125),
                "{walls:?}: {argv:?} {seen:?}"
            );
            assert!(!Path::new(&new).exists(), "{walls:?}: {argv:?}");
            assert!(Path::new(&work).is_dir(), "{walls:?}: {argv:?}");
            let after = std::fs::metadata(&secret).unwrap();
            assert_eq!(after.len(), before.len(), "{walls:?}: {argv:?}");
            assert_eq!(
                after.permissions(),
                before.permissions(),
                "{walls:?}: {argv:?}"
            );
            assert_eq!(after.modified().unwrap(), before.modified().unwrap());
        }
    }
}

fn a_strict_program_connects_nowhere() {
    let Some(python) = python() else { return };
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let code = format!(
        "import socket\n\
         for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK):\n\
         \x20   try:\n\
         \x20       s = socket.socket(family, socket.SOCK_STREAM)\n\
         \x20       s.connect(('127.0.0.1', {port}))\n\
         \x20       print('connected')\n\
         \x20   except OSError as error:\n\
         \x20       print(type(error).__name__)\n"
    );
    for walls in [Walls::Both, Walls::Guard, Walls::Second] {
        let seen = run(walls, &python_rules(""), &[python, "-I", "-S", "-c", &code]);
        let text = String::from_utf8_lossy(&seen.stdout).into_owned();
        assert!(
            text.starts_with("PermissionError\nPermissionError\n"),
            "{walls:?}: {seen:?}"
        );
        assert!(!text.contains("connected"), "{walls:?}: {seen:?}");
    }
    server.set_nonblocking(true).unwrap();
    assert!(server.accept().is_err(), "somebody came through");
}

fn loopback_is_this_machine_only() {
    let Some(python) = python() else { return };
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let code = format!(
        "import socket\n\
         def attempt(name, f):\n\
         \x20   try:\n\
         \x20       f(); print(name, 'yes')\n\
         \x20   except OSError as error:\n\
         \x20       print(name, type(error).__name__)\n\
         tcp = lambda: socket.socket()\n\
         udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         attempt('near', lambda: tcp().connect(('127.0.0.1', {port})))\n\
         attempt('far', lambda: tcp().connect(('192.0.2.1', 80)))\n\
         attempt('any', lambda: tcp().bind(('0.0.0.0', 0)))\n\
         attempt('own', lambda: tcp().bind(('127.0.0.1', 0)))\n\
         attempt('listen', lambda: tcp().listen())\n\
         attempt('send', lambda: udp.sendto(b'x', ('192.0.2.1', 9)))\n\
         attempt('sendmsg', lambda: udp.sendmsg([b'x'], [], 0, ('192.0.2.1', 9)))\n\
         attempt('home', lambda: udp.sendto(b'x', ('127.0.0.1', 9)))\n\
         print(udp.getsockname()[0])\n"
    );
    let policy = python_rules("net = \"loopback\"");
    let seen = run(Walls::Both, &policy, &[python, "-I", "-S", "-c", &code]);
    let no = "PermissionError";
    let expected = format!(
        "near yes\nfar {no}\nany {no}\nown yes\nlisten {no}\nsend {no}\nsendmsg {no}\nhome yes\n\
         127.0.0.1\n"
    );
    assert_eq!(String::from_utf8_lossy(&seen.stdout), expected, "{seen:?}");
    assert!(
        stderr(&seen).contains("--net full would allow it"),
        "{seen:?}"
    );
}

/// A policy under which this binary runs, and `more`.
fn own_rules(more: &str) -> String {
    let own = std::env::current_exe().unwrap();
    format!("strict = true\n{more}\n[files]\nro = [{own:?}]\n")
}

/// Addresses without a family, routes in packets, sockets of two families, sockets that
/// another thread replaces.
fn loopback_holds_against_tricks() {
    let own = std::env::current_exe().unwrap();
    let policy = own_rules("net = \"loopback\"");
    let argv = [own.to_str().unwrap(), "tricks-of-net"];
    let seen = run(Walls::Both, &policy, &argv);
    let expected = "no-family-send 13\nno-family-bind 13\nroute-option 13\ndevice-option 13\n\
                    route-message 13\nsource-message 13\nplain-message ok\nsegments 13\n\
                    after-connect loopback\nother-family ok\nafter-send loopback\nreplaced 0\n";
    assert_eq!(String::from_utf8_lossy(&seen.stdout), expected, "{seen:?}");
}

/// What is opened is what the rules were asked about, whatever another thread puts in its place.
fn files_hold_against_tricks() {
    let fixture = Fixture::new();
    let (secret, work) = (fixture.path("secret"), fixture.path("work"));
    let mine = fixture.path("work/mine");
    std::fs::write(&mine, "mine\n").unwrap();
    let own = std::env::current_exe().unwrap();
    let policy = format!("strict = true\n[files]\nro = [{own:?}, {secret:?}]\nrw = [{work:?}]\n");
    let argv = [own.to_str().unwrap(), "tricks-of-files", &secret, &mine];
    let seen = run(Walls::Guard, &policy, &argv);
    assert_eq!(seen.stdout, b"wins 0, some opened true\n", "{seen:?}");
}

/// Whom a descriptor stands for is asked, and who cannot be asked about is no relative.
fn signals_stay_in_the_family_against_tricks() {
    let mut outside = Command::new("sleep").arg("60").spawn().unwrap();
    let descriptor = tricks::descriptor_of(outside.id());
    let own = std::env::current_exe().unwrap();
    let (victim, number) = (outside.id().to_string(), descriptor.to_string());
    let argv = [own.to_str().unwrap(), "tricks-of-signals", &victim, &number];
    let seen = run(Walls::Guard, &own_rules(""), &argv);
    assert_eq!(seen.stdout, b"by-descriptor 1\nblind 1\n", "{seen:?}");
    assert!(outside.try_wait().unwrap().is_none(), "it is gone");
    outside.kill().unwrap();
    outside.wait().unwrap();
}

/// Runs, applies what the explanations name, and runs again, until it works.
fn explanations_lead_to_success() {
    let fixture = Fixture::new();
    let (secret, copy) = (fixture.path("secret"), fixture.path("work/copy"));
    let mut programs: Vec<Vec<&str>> = vec![
        vec!["/bin/cat", &secret],
        vec!["/bin/cp", &secret, &copy],
        vec!["/bin/ls", "-l", "/etc/apt"],
        vec!["/bin/rm", &copy],
        vec!["/bin/sh", "-c", "exec /bin/true"],
    ];
    let code = "import socket, json, os; \
                s = socket.socket(); s.bind(('127.0.0.1', 0)); print(len(os.listdir('/etc')))";
    if let Some(python) = python() {
        programs.push(vec![python, "-c", code]);
    }
    for argv in programs {
        let (mut ro, mut rw) = (Vec::<String>::new(), Vec::<String>::new());
        let mut net = "none".to_owned();
        let mut rounds = 0;
        loop {
            let quoted = |list: &[String]| {
                let list: Vec<String> = list.iter().map(|path| format!("{path:?}")).collect();
                list.join(", ")
            };
            let policy = format!(
                "strict = true\nnet = {net:?}\n[files]\nro = [{}]\nrw = [{}]\n",
                quoted(&ro),
                quoted(&rw)
            );
            let seen = run(Walls::Both, &policy, &argv);
            let text = stderr(&seen);
            let before = (ro.len(), rw.len(), net.clone());
            for line in text.lines().filter(|line| line.starts_with("dune: ")) {
                let Some((_, rest)) = line.split_once(" refused: ") else {
                    panic!("{argv:?}: {line}");
                };
                let rule = rest.strip_suffix(" would allow it").unwrap();
                let (option, value) = rule.split_once(' ').unwrap();
                let list = match option {
                    "--ro" => &mut ro,
                    "--rw" => &mut rw,
                    "--net" => {
                        net = value.to_owned();
                        continue;
                    }
                    other => panic!("{argv:?}: {other}: {line}"),
                };
                if !list.iter().any(|path| path == value) {
                    list.push(value.to_owned());
                }
            }
            let after = (ro.len(), rw.len(), net.clone());
            if succeeds(&seen) {
                break;
            }
            assert_ne!(before, after, "{argv:?}: no further explanation: {seen:?}");
            rounds += 1;
            assert!(rounds < 60, "{argv:?}: {policy}");
        }
        assert!(rounds > 0, "{argv:?}: nothing was refused");
    }
}

/// Links, dots and `/proc` lead to what they lead to.
fn detours_are_seen_through() {
    let fixture = Fixture::new();
    let at = |name: &str| fixture.path(name);
    let work = at("work");
    let link = |name: &str, target: &str| {
        std::os::unix::fs::symlink(target, at(name)).unwrap();
    };
    link("work/direct", &at("secret"));
    link("work/relative", "../secret");
    link("work/up", "..");
    link("work/root", "/proc/self/root");
    link("work/dangling", &at("made"));
    let policy = format!("strict = true\n[files]\nrw = [{work:?}]\n");
    let through_root = format!("{work}/root{}", at("secret"));
    for detour in [
        at("work/direct"),
        at("work/relative"),
        at("work/up/secret"),
        at("work/../secret"),
        format!("/proc/self/cwd{}", at("secret")),
        through_root,
    ] {
        for walls in [Walls::Both, Walls::Guard, Walls::Second] {
            let seen = run(walls, &policy, &["/bin/cat", &detour]);
            assert!(
                !succeeds(&seen) && seen.stdout.is_empty(),
                "{walls:?} {detour}: {seen:?}"
            );
        }
    }
    for walls in [Walls::Both, Walls::Guard, Walls::Second] {
        let seen = run(
            walls,
            &policy,
            &["/bin/cp", "/dev/null", &at("work/dangling")],
        );
        assert!(
            !succeeds(&seen) && !Path::new(&at("made")).exists(),
            "{walls:?}: {seen:?}"
        );
        // A second name in a folder that may be written would be a way in.
        let seen = run(
            walls,
            &policy,
            &["/bin/ln", &at("secret"), &at("work/second")],
        );
        assert!(
            !succeeds(&seen) && !Path::new(&at("work/second")).exists(),
            "{walls:?}: {seen:?}"
        );
        let seen = run(walls, &policy, &["/bin/cp", "/dev/null", &at("work/fine")]);
        assert!(succeeds(&seen), "{walls:?}: {seen:?}");
        std::fs::remove_file(at("work/fine")).unwrap();
    }
}

fn read_only_is_not_written() {
    let fixture = Fixture::new();
    let folder = fixture.path("");
    let secret = fixture.path("secret");
    let policy = format!("strict = true\n[files]\nro = [{folder:?}]\n");
    for walls in [Walls::Both, Walls::Guard, Walls::Second] {
        let seen = run(walls, &policy, &["/bin/cat", &secret]);
        assert_eq!(seen.stdout, b"the secret\n", "{walls:?}: {seen:?}");
        for argv in [
            &["/bin/cp", "/dev/null", &secret][..],
            &["/bin/rm", &secret],
            &["/usr/bin/truncate", "-s", "0", &secret],
        ] {
            let seen = run(walls, &policy, argv);
            assert!(!succeeds(&seen), "{walls:?}: {argv:?}");
        }
        assert_eq!(std::fs::read(&secret).unwrap(), b"the secret\n");
    }
    // What Landlock does not hold, the guard does, by descriptor as well.
    let Some(python) = python() else { return };
    let rules = python_rules("").replace("ro = [", &format!("ro = [{folder:?}, "));
    let code = format!(
        "import os\n\
         fd = os.open({secret:?}, os.O_RDONLY)\n\
         for f in (lambda: os.fchmod(fd, 0o777), lambda: os.chmod({secret:?}, 0o777),\n\
         \x20         lambda: os.utime(fd, (0, 0)), lambda: os.utime({secret:?}, (0, 0)),\n\
         \x20         lambda: os.chmod('/proc/self/fd/%d' % fd, 0o777),\n\
         \x20         lambda: os.setxattr({secret:?}, 'user.x', b'y'),\n\
         \x20         lambda: os.fchown(fd, 1, 1), lambda: os.chown({secret:?}, 1, 1)):\n\
         \x20   try:\n\
         \x20       f(); print('done')\n\
         \x20   except PermissionError: print('refused')\n"
    );
    let seen = run(Walls::Both, &rules, &[python, "-I", "-S", "-c", &code]);
    assert_eq!(
        String::from_utf8_lossy(&seen.stdout),
        "refused\n".repeat(8),
        "{seen:?}"
    );
}

fn memory_is_limited() {
    let Some(python) = python() else { return };
    let code = "data = bytearray(200 << 20); print('had it')";
    let argv = [python, "-I", "-S", "-c", code];
    let seen = run(Walls::Both, "", &argv);
    assert_eq!(seen.stdout, b"had it\n", "{seen:?}");
    let seen = run(Walls::Both, "[limits]\nmem = \"100M\"", &argv);
    assert!(stderr(&seen).contains("MemoryError"), "{seen:?}");
    assert!(
        stderr(&seen).contains("a larger --mem would allow it"),
        "{seen:?}"
    );
    let code = "import mmap\n\
                m = mmap.mmap(-1, 200 << 20, prot=mmap.PROT_READ)\n\
                print('may be read')";
    let argv = [python, "-I", "-S", "-c", code];
    let seen = run(Walls::Both, "[limits]\nmem = \"100M\"", &argv);
    assert_eq!(seen.stdout, b"may be read\n", "{seen:?}");
}

fn cpu_time_is_limited() {
    const SIGXCPU: i32 = 24;
    let started = std::time::Instant::now();
    let policy = "[limits]\ncpu-time = \"1s\"";
    let seen = run(
        Walls::Both,
        policy,
        &["/bin/sh", "-c", "while :; do :; done"],
    );
    assert_eq!(seen.status.signal(), Some(SIGXCPU), "{seen:?}");
    assert!(started.elapsed() < std::time::Duration::from_secs(60));
}

/// Signals go to the program's own processes.
fn signals_stay_in_the_family() {
    let mut outside = Command::new("sleep").arg("60").spawn().unwrap();
    let policy = "strict = true\n[files]\nro = [\"/bin\", \"/usr/bin\", \"/lib\", \"/lib64\"]";
    let script = format!(
        "kill -0 {pid} && echo sent; kill -TERM {pid} && echo sent;\n\
         sleep 60 & kill -TERM $! && wait $!; echo $?; kill -0 $$ && echo self",
        pid = outside.id()
    );
    // Landlock has had a rule for signals since Linux 6.12.
    let second = (Kernel::this().landlock >= 6).then_some(Walls::Second);
    for walls in [Walls::Both, Walls::Guard].into_iter().chain(second) {
        let seen = run(walls, policy, &["/bin/sh", "-c", &script]);
        assert_eq!(seen.stdout, b"143\nself\n", "{walls:?}: {seen:?}");
        assert!(
            outside.try_wait().unwrap().is_none(),
            "{walls:?}: it is gone"
        );
    }
    outside.kill().unwrap();
    outside.wait().unwrap();
}

/// Children have no more than their parent.
fn children_are_held_as_well() {
    let fixture = Fixture::new();
    let (secret, copy) = (fixture.path("secret"), fixture.path("copy"));
    let policy = "strict = true\n[files]\nro = [\"/bin\", \"/usr/bin\", \"/lib\", \"/lib64\"]";
    let script = format!("cat {secret} | cat; echo x > {copy}; (cat {secret}); echo end");
    for walls in [Walls::Both, Walls::Guard, Walls::Second] {
        let seen = run(walls, policy, &["/bin/sh", "-c", &script]);
        assert_eq!(seen.stdout, b"end\n", "{walls:?}: {seen:?}");
        assert!(!Path::new(&copy).exists(), "{walls:?}: {seen:?}");
    }
}

/// A program that puts a link in the way of its own path, as often as it can,
/// gets through neither wall.
fn races_are_lost() {
    let Some(python) = python() else { return };
    let fixture = Fixture::new();
    let (work, secret) = (fixture.path("work"), fixture.path("secret"));
    std::fs::create_dir(fixture.path("work/mine")).unwrap();
    std::fs::write(fixture.path("work/mine/secret"), "mine\n").unwrap();
    let folder = fixture.path("");
    let rules = python_rules("") + &format!("rw = [{work:?}]\n");
    let code = format!(
        "import os, threading, time\n\
         os.chdir({work:?})\n\
         os.symlink({folder:?}, 'theirs'); os.symlink('mine', 'way')\n\
         begin = time.monotonic(); tries = wins = 0\n\
         def on():\n\
         \x20   spent = time.monotonic() - begin\n\
         \x20   return spent < 1.5 or tries <= 10 and spent < 20\n\
         def swap():\n\
         \x20   n = 0\n\
         \x20   while on():\n\
         \x20       n += 1\n\
         \x20       os.symlink('theirs' if n & 1 else 'mine', 'next'); os.rename('next', 'way')\n\
         thread = threading.Thread(target=swap); thread.start()\n\
         while on():\n\
         \x20   tries += 1\n\
         \x20   for attack in (lambda: open('way/secret').read() != 'mine\\n',\n\
         \x20                  lambda: os.chmod('way/secret', 0o666),\n\
         \x20                  lambda: os.utime('way/secret', (0, 0)),\n\
         \x20                  lambda: os.truncate('way/secret', 5)):\n\
         \x20       try: wins += bool(attack())\n\
         \x20       except OSError: pass\n\
         thread.join()\n\
         print('wins', wins, 'tries', tries > 10)\n"
    );
    let before = std::fs::metadata(&secret).unwrap();
    for walls in [Walls::Both, Walls::Guard] {
        let seen = run(walls, &rules, &[python, "-I", "-S", "-c", &code]);
        assert_eq!(seen.stdout, b"wins 0 tries True\n", "{walls:?}: {seen:?}");
        let after = std::fs::metadata(&secret).unwrap();
        assert_eq!(after.len(), before.len(), "{walls:?}");
        assert_eq!(after.permissions(), before.permissions(), "{walls:?}");
        assert_eq!(after.modified().unwrap(), before.modified().unwrap());
        for name in ["work/theirs", "work/way"] {
            std::fs::remove_file(fixture.path(name)).unwrap();
        }
    }
}

fn threads_and_processes_are_counted() {
    let Some(python) = python() else { return };
    let code = "import threading, os, time\n\
                made = 0\n\
                gate = threading.Event()\n\
                threads = []\n\
                try:\n\
                \x20   for _ in range(9):\n\
                \x20       t = threading.Thread(target=gate.wait); t.start(); threads.append(t)\n\
                except RuntimeError: print('threads', len(threads))\n\
                gate.set()\n\
                for t in threads: t.join()\n\
                for _ in range(12):\n\
                \x20   pid = os.fork()\n\
                \x20   if pid == 0: os._exit(0)\n\
                \x20   os.waitpid(pid, 0)\n\
                print('then')";
    let policy = "[limits]\nnproc = 4";
    let seen = run(Walls::Both, policy, &[python, "-I", "-S", "-c", code]);
    assert_eq!(seen.stdout, b"threads 3\nthen\n", "{seen:?}");
    assert!(
        stderr(&seen).contains("a larger --nproc would allow it"),
        "{seen:?}"
    );
}

fn the_environment_is_small() {
    let seen = Command::new(std::env::current_exe().unwrap())
        .arg("/usr/bin/env")
        .env(ROLE, "host both")
        .env(POLICY, "strict = true\n[env]\nset = { A = \"1\" }")
        .env("TOKEN", "hidden")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&seen.stdout).into_owned();
    assert!(
        text.contains("A=1\n") && !text.contains("TOKEN"),
        "{seen:?}"
    );
}

fn without_options_nothing_changes() {
    let fixture = Fixture::new();
    let (secret, copy) = (fixture.path("secret"), fixture.path("copy"));
    let seen = run(Walls::Both, "", &["/bin/cp", &secret, &copy]);
    assert!(succeeds(&seen) && stderr(&seen).is_empty(), "{seen:?}");
    assert_eq!(std::fs::read(&copy).unwrap(), b"the secret\n");
}

// ------------------------------------------------------------------- the lab

/// The same promises with the engine in guest.
fn in_guest() {
    IN_GUEST.store(true, std::sync::atomic::Ordering::Relaxed);
    a_strict_program_reads_nothing_else();
    a_strict_program_writes_nowhere();
    detours_are_seen_through();
    read_only_is_not_written();
}

fn in_guest_net() {
    IN_GUEST.store(true, std::sync::atomic::Ordering::Relaxed);
    a_strict_program_connects_nowhere();
    memory_is_limited();
    cpu_time_is_limited();
}

/// Promises that are tested natively with the engine on host.
const ON_HOST: &[(&str, fn())] = &[
    (
        "a_strict_program_reads_nothing_else",
        a_strict_program_reads_nothing_else,
    ),
    (
        "a_strict_program_writes_nowhere",
        a_strict_program_writes_nowhere,
    ),
    (
        "a_strict_program_connects_nowhere",
        a_strict_program_connects_nowhere,
    ),
    (
        "loopback_is_this_machine_only",
        loopback_is_this_machine_only,
    ),
    (
        "loopback_holds_against_tricks",
        loopback_holds_against_tricks,
    ),
    (
        "signals_stay_in_the_family_against_tricks",
        signals_stay_in_the_family_against_tricks,
    ),
    ("files_hold_against_tricks", files_hold_against_tricks),
    ("explanations_lead_to_success", explanations_lead_to_success),
    ("detours_are_seen_through", detours_are_seen_through),
    ("read_only_is_not_written", read_only_is_not_written),
    ("memory_is_limited", memory_is_limited),
    ("cpu_time_is_limited", cpu_time_is_limited),
    ("children_are_held_as_well", children_are_held_as_well),
    ("races_are_lost", races_are_lost),
    ("signals_stay_in_the_family", signals_stay_in_the_family),
    (
        "threads_and_processes_are_counted",
        threads_and_processes_are_counted,
    ),
    ("the_environment_is_small", the_environment_is_small),
    (
        "without_options_nothing_changes",
        without_options_nothing_changes,
    ),
];

fn on_host(name: &str) {
    let report = dune_kvm::probe::probe();
    if report.natural_placement() == dune_kvm::probe::Placement::Lab {
        dune_testing::ignore(report.kvm.to_string());
    }
    let kernel = Kernel::this();
    if kernel.landlock < 3 || !kernel.seccomp {
        dune_testing::ignore("this kernel has no Landlock of ABI 3, or no seccomp filters");
    }
    let (_, test) = ON_HOST.iter().find(|(other, _)| *other == name).unwrap();
    test();
}

macro_rules! on_host_tests {
    ($($name:ident)*) => { mod host { $(pub(super) fn $name() { super::on_host(stringify!($name)); })* } };
}

on_host_tests! {
    a_strict_program_reads_nothing_else a_strict_program_writes_nowhere
    a_strict_program_connects_nowhere loopback_is_this_machine_only
    explanations_lead_to_success detours_are_seen_through read_only_is_not_written
    memory_is_limited cpu_time_is_limited the_environment_is_small
    children_are_held_as_well signals_stay_in_the_family races_are_lost threads_and_processes_are_counted
    without_options_nothing_changes loopback_holds_against_tricks
    signals_stay_in_the_family_against_tricks files_hold_against_tricks
}

fn main() -> ExitCode {
    use host::*;
    const TESTS: &[dune_testing::Test] = dune_testing::list! {
        plain a_strict_program_reads_nothing_else,
        plain a_strict_program_writes_nowhere, timeout 100,
        plain a_strict_program_connects_nowhere,
        plain loopback_is_this_machine_only,
        plain loopback_holds_against_tricks,
        plain signals_stay_in_the_family_against_tricks,
        plain files_hold_against_tricks,
        plain explanations_lead_to_success, timeout 200,
        plain detours_are_seen_through, timeout 100,
        plain read_only_is_not_written, timeout 100,
        plain memory_is_limited,
        plain cpu_time_is_limited, timeout 100,
        plain children_are_held_as_well,
        plain signals_stay_in_the_family,
        plain races_are_lost, timeout 100,
        plain threads_and_processes_are_counted,
        plain the_environment_is_small,
        plain without_options_nothing_changes,
        ring0 in_guest, timeout 300,
        ring0 in_guest_net, timeout 200,
    };
    if let Some(code) = sandbox() {
        return code;
    }
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let Some((name, more)) = words.split_first()
        && tricks::play(name, more)
    {
        return ExitCode::SUCCESS;
    }
    dune_testing::main(TESTS)
}
