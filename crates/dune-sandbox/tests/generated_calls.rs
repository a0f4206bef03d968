//! Generated system calls with generated structures against the guard.
//!
//! This binary plays three parts. Without a role it is the test harness, which starts
//! one sandbox after the other; with the role `sandbox` it runs itself in the sandbox,
//! under the strictest policy and beside a secret; with the role `program` it is the hostile
//! program ([`program`]).
//!
//! ```text
//!   harness --seed--> sandbox (guard) --seed, secret's address--> program
//!      ^                  |  report: shared memory of the guard
//!      +------------------+  progress: a file of the program
//! ```
//!
//! Nothing may be found: the secret changed or seen, an address of the guard seen, the
//! guard dead, a call without end that is none that waits.
//!
//! | variable | meaning |
//! |---|---|
//! | `DUNE_FUZZ_SECONDS` | how long (default 8) |
//! | `DUNE_FUZZ_SEED` | the first seed (default 1); the next programs have the next ones |
//! | `DUNE_FUZZ_PLACEMENT` | `host` (default) or `guest` |

#![expect(
    unsafe_code,
    reason = "hostile calls, and memory shared between the parts"
)]

#[path = "generated/program.rs"]
mod program;
#[path = "generated/random.rs"]
mod random;

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dune_sandbox::End;
use dune_sandbox::engine::{Engine, in_guest::InGuest, on_host::OnHost};
use dune_sandbox::host::{SysResult, syscall};
use dune_sandbox::policy::{Net, Policy};
use dune_sandbox::range::USER_HI;
use dune_sandbox::table;
use libtest_mimic::{Arguments, Failed, Trial};

use program::{ADDRESS_SEEN, Program, SECRET_SEEN};
use random::Random;

const ROLE: &str = "DUNE_TEST_ROLE";
const SEED: &str = "DUNE_TEST_SEED";
const SECRET: &str = "DUNE_TEST_SECRET";
const KEY: &str = "DUNE_TEST_KEY";
const HALVES: &str = "DUNE_TEST_HALVES";
const REPORT: &str = "DUNE_TEST_REPORT";

/// Calls of one program.
const CALLS: u64 = 400;
/// How long a program may be without progress.
const PATIENCE: Duration = Duration::from_secs(4);

fn main() -> ExitCode {
    match std::env::var(ROLE).as_deref() {
        Ok("sandbox") => sandbox(),
        Ok("program") => ExitCode::from(play()),
        _ => harness(),
    }
}

/// A system call of the hostile program.
fn call(nr: u32, args: [u64; 6]) -> SysResult {
    // SAFETY: the program cares for nothing; what works out is the guard's affair.
    unsafe { syscall(nr, args) }
}

/// Memory of the guard, full of one word.
#[derive(Clone, Copy, Debug)]
struct Secret {
    start: u64,
    /// The word, turned round: the program itself must not hold it.
    inverse: u64,
    /// The upper halves of the guard's addresses: its image and heap, its libraries and
    /// stacks. Other numbers of that size are sizes, modes and the like.
    halves: [u64; 4],
}

impl Secret {
    const BYTES: u64 = 64 << 10;

    fn holds(self, value: u64) -> bool {
        !value == self.inverse
    }

    /// Whether it is an address of what the guard has.
    fn is_nearby(self, value: u64) -> bool {
        value >= USER_HI && self.halves.contains(&(value >> 32))
    }

    /// An address in it.
    fn address(self, random: &mut Random) -> u64 {
        match random.below(4) {
            0 => self.start,
            1 => self.start + random.below(Self::BYTES),
            _ => self.start + random.below(Self::BYTES / 8) * 8,
        }
    }
}

/// How far a program has come; in a file that it maps.
#[repr(C)]
#[derive(Debug)]
struct Progress {
    turn: AtomicU64,
    nr: AtomicU64,
    args: [AtomicU64; 6],
}

impl Progress {
    fn note(&self, turn: u64, nr: u32, args: &[u64; 6]) {
        self.turn.store(turn, Ordering::Relaxed);
        self.nr.store(nr.into(), Ordering::Relaxed);
        for (place, value) in self.args.iter().zip(args) {
            place.store(*value, Ordering::Relaxed);
        }
    }

    fn shown(&self) -> String {
        let nr = self.nr.load(Ordering::Relaxed);
        let args = self.args.each_ref().map(|arg| arg.load(Ordering::Relaxed));
        format!(
            "call {}: {}{args:x?}",
            self.turn.load(Ordering::Relaxed),
            name(nr)
        )
    }
}

fn name(nr: u64) -> &'static str {
    let row = u32::try_from(nr).ok().and_then(table::find);
    row.map_or("none", |row| row.name)
}

/// What each process of the sandbox says at its end; in memory that only the
/// guard has.
#[repr(C)]
#[derive(Debug)]
struct Report {
    entries: AtomicU64,
    findings: [AtomicU64; 64],
}

/// Findings of the guard's part, beside the program's own.
const FINE: u64 = 1;
const SECRET_CHANGED: u64 = 2;
const FAILED: u64 = 3;
const FROM_PROGRAM: u64 = 0x100;

impl Report {
    fn add(&self, finding: u64) {
        let entry = self.entries.fetch_add(1, Ordering::Relaxed) as usize;
        if let Some(place) = self.findings.get(entry) {
            place.store(finding, Ordering::Relaxed);
        }
    }

    /// What the processes said; the first one's is the whole's.
    fn finding(&self) -> Result<(), String> {
        for place in &self.findings {
            match place.load(Ordering::Relaxed) {
                0 | FINE => {}
                SECRET_CHANGED => return Err("the guard's memory was changed".into()),
                FAILED => return Err("the sandbox failed".into()),
                status if status == FROM_PROGRAM | u64::from(SECRET_SEEN) => {
                    return Err("the program has seen the guard's secret".into());
                }
                status if status == FROM_PROGRAM | u64::from(ADDRESS_SEEN) => {
                    return Err("the program has seen an address of the guard".into());
                }
                other => return Err(format!("the report itself is broken: {other:#x}")),
            }
        }
        Ok(())
    }
}

/// A file's beginning as a `T` that others change too.
fn share<T>(fd: RawFd) -> std::io::Result<&'static T> {
    let len = size_of::<T>();
    // SAFETY: a new mapping, at an address that the kernel chooses.
    let start = unsafe {
        libc::mmap(
            core::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: page-aligned, long enough, never unmapped; `T` is of atomics, for which
    // all bytes are values.
    Ok(unsafe { &*start.cast::<T>() })
}

/// The hostile program.
fn play() -> u8 {
    let number = |variable: &str| {
        let text = std::env::var(variable).ok()?;
        text.parse().ok()
    };
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open("progress");
    let progress = file.and_then(|file| share::<Progress>(file.as_raw_fd()));
    let halves: Vec<u64> = std::env::var(HALVES)
        .unwrap_or_default()
        .split(',')
        .filter_map(|text| text.parse().ok())
        .collect();
    let (Some(seed), Some(start), Some(key), Ok(halves), Ok(progress)) = (
        number(SEED),
        number(SECRET),
        number(KEY),
        halves.try_into(),
        progress,
    ) else {
        return 80;
    };
    let secret = Secret {
        start,
        inverse: inverse_of(key),
        halves,
    };
    Program::new(seed, secret, progress).run(CALLS)
}

/// The word that the secret is full of, turned round; no number that programs use otherwise.
fn inverse_of(key: u64) -> u64 {
    Random::new(key).next() & !(0xb << 60)
}

/// The guard's part.
fn sandbox() -> ExitCode {
    let seed: u64 = std::env::var(SEED).unwrap_or_default().parse().unwrap_or(0);
    let report: RawFd = std::env::var(REPORT)
        .unwrap_or_default()
        .parse()
        .unwrap_or(-1);
    // SAFETY: the harness made it for this part and nobody else uses it here.
    let report = unsafe { OwnedFd::from_raw_fd(report) };
    let Ok(shared) = share::<Report>(report.as_raw_fd()) else {
        return ExitCode::from(81);
    };
    drop(report);
    OWN_REPORT.store((&raw const *shared).cast_mut(), Ordering::Relaxed);
    let key = seed ^ 0x5ec2_e755;
    let value = !inverse_of(key);
    let memory: &'static [AtomicU64] = Box::leak(
        (0..Secret::BYTES / 8)
            .map(|_| AtomicU64::new(value))
            .collect(),
    );
    let start = memory.as_ptr().expose_provenance();
    let outcome = hold(seed, start as u64, key);
    let is_whole = memory
        .iter()
        .all(|word| word.load(Ordering::Relaxed) == value);
    shared.add(match outcome {
        _ if !is_whole => SECRET_CHANGED,
        Ok(End::Exit(status @ (SECRET_SEEN | ADDRESS_SEEN))) => FROM_PROGRAM | u64::from(status),
        Ok(_) => FINE,
        Err(error) => {
            eprintln!("the sandbox failed: {error}");
            FAILED
        }
    });
    ExitCode::SUCCESS
}

fn hold(seed: u64, secret: u64, key: u64) -> Result<End, Box<dyn std::error::Error>> {
    let own = std::env::current_exe()?;
    let folder = std::env::current_dir()?;
    let policy = Policy::new()
        .strict()
        .read_only(&own)?
        .read_write(&folder)?
        .net(Net::None)
        .memory(256 << 20)
        .processes(8)
        .cpu_time(Duration::from_secs(20));
    let engine: Box<dyn Engine> = match std::env::var("DUNE_FUZZ_PLACEMENT").as_deref() {
        Ok("guest") => Box::new(InGuest::new()?),
        _ => Box::new(OnHost::new()?),
    };
    let policy = [
        (ROLE, "program".to_owned()),
        (SEED, seed.to_string()),
        (SECRET, secret.to_string()),
        (KEY, key.to_string()),
        (HALVES, halves()?),
    ]
    .into_iter()
    .try_fold(policy, |policy, (name, value)| {
        policy.set_variable(name, value)
    })?;
    let command = dune_sandbox::Command::new(own).policy(policy);
    Ok(command.run(engine)?.end)
}

/// The upper halves of the addresses of this process, in text: the four that most
/// mappings have.
fn halves() -> std::io::Result<String> {
    let mut count = BTreeMap::<u64, usize>::new();
    for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
        let start = line.split('-').next().unwrap_or_default();
        let start = u64::from_str_radix(start, 16).unwrap_or(0);
        if (USER_HI..1 << 47).contains(&start) {
            *count.entry(start >> 32).or_default() += 1;
        }
    }
    let mut halves: Vec<_> = count.into_iter().collect();
    halves.sort_by_key(|half| std::cmp::Reverse(half.1));
    let mut text: Vec<_> = halves.iter().map(|half| half.0.to_string()).collect();
    text.resize(4, "0".to_owned());
    Ok(text.join(","))
}

fn harness() -> ExitCode {
    let report = dune_kvm::probe::probe();
    let no_kvm = report.natural_placement() == dune_kvm::probe::Placement::Lab;
    if no_kvm && std::env::var_os("DUNE_REQUIRE_RING0").is_some_and(|value| value == "1") {
        eprintln!("this machine has no usable KVM: {}", report.kvm);
        return ExitCode::FAILURE;
    }
    let trial = Trial::test("generated_calls_find_nothing", generated_calls_find_nothing)
        .with_ignored_flag(no_kvm);
    libtest_mimic::run(&Arguments::from_args(), vec![trial]).exit_code()
}

fn generated_calls_find_nothing() -> Result<(), Failed> {
    let number = |variable: &str, default: u64| -> u64 {
        let text = std::env::var(variable).ok();
        text.and_then(|text| text.parse().ok()).unwrap_or(default)
    };
    let first = number("DUNE_FUZZ_SEED", 1);
    let begin = Instant::now();
    let end = begin + Duration::from_secs(number("DUNE_FUZZ_SECONDS", 8));
    // What a program leaves behind comes to us.
    // SAFETY: plain numbers.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    let mut sum = Sum::default();
    let mut log = KernelLog::open();
    let mut seed = first;
    let mut told = begin;
    while Instant::now() < end {
        round(seed, &mut sum, &mut log).map_err(|finding| {
            format!(
                "seed {seed}: {finding}\nagain: DUNE_FUZZ_SEED={seed} cargo test -p dune-sandbox --test \
                 generated_calls"
            )
        })?;
        seed += 1;
        if told.elapsed() > Duration::from_secs(60) {
            told = Instant::now();
            eprintln!("{} s: {sum}", begin.elapsed().as_secs());
        }
    }
    eprintln!("seeds {first} to {}: {sum}", seed - 1);
    if sum.calls < sum.programs * CALLS / 20 {
        return Err("the programs die too early to find anything".into());
    }
    Ok(())
}

#[derive(Default)]
struct Sum {
    programs: u64,
    calls: u64,
    /// The seeds of those that were killed in a call that waits, by its name.
    waiting: BTreeMap<&'static str, Vec<u64>>,
    ends: BTreeMap<String, u64>,
}

impl core::fmt::Display for Sum {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "{} programs, {} calls; ends {:?}; waiting at their end in {:?}",
            self.programs, self.calls, self.ends, self.waiting
        )
    }
}

/// One program.
fn round(seed: u64, sum: &mut Sum, log: &mut KernelLog) -> Result<(), String> {
    let failed = |what: &str, error: std::io::Error| format!("harness: {what}: {error}");
    let folder = tempfile::tempdir().map_err(|error| failed("make a folder", error))?;
    let (report, shared) = report().map_err(|error| failed("make a report", error))?;
    let progress_path = folder.path().join("progress");
    let file = std::fs::File::create_new(&progress_path)
        .and_then(|file| file.set_len(4096))
        .and_then(|()| {
            std::fs::File::options()
                .read(true)
                .write(true)
                .open(&progress_path)
        });
    let progress = file
        .and_then(|file| share::<Progress>(file.as_raw_fd()))
        .map_err(|error| failed("share a file", error))?;
    // Not in the program's folder.
    let errors = tempfile::tempfile().map_err(|error| failed("make a file", error))?;
    let mut child = start(seed, folder.path(), &report, &errors)
        .map_err(|error| failed("start the sandbox", error))?;
    let status = wait(&mut child, progress).map_err(|error| failed("wait", error))?;
    sweep();
    sum.programs += 1;
    sum.calls += progress.turn.load(Ordering::Relaxed).min(CALLS);
    let last = progress.shown();
    let tell = |what: String| {
        let errors = text_of(&errors);
        let tail = errors.len().saturating_sub(2000);
        format!("{what}\n{last}\n{}", &errors[tail..])
    };
    shared.finding().map_err(&tell)?;
    if let Some(line) = log.new_fault() {
        return Err(tell(format!("the kernel says: {line}")));
    }
    let said = shared.entries.load(Ordering::Relaxed) > 0;
    let how = match status {
        None => {
            let nr = progress.nr.load(Ordering::Relaxed);
            if !may_wait(nr) {
                return Err(tell("no progress, in a call that does not wait".into()));
            }
            sum.waiting.entry(name(nr)).or_default().push(seed);
            "waiting".to_owned()
        }
        Some(status) if said && status.success() => "reported".to_owned(),
        Some(status) => {
            // A signal that the program sends to itself ends the guard with it, as the
            // kernel does where there is none. What a guard dies of by itself is told by
            // `abort` below and by the kernel's log.
            match status.signal() {
                Some(signal) if !said => format!("signal {signal}"),
                _ => return Err(tell(format!("the guard ended with {status}"))),
            }
        }
    };
    *sum.ends.entry(how).or_default() += 1;
    Ok(())
}

fn report() -> std::io::Result<(OwnedFd, &'static Report)> {
    // SAFETY: plain numbers and a string.
    let fd = unsafe { libc::memfd_create(c"report".as_ptr(), 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: just made.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let file = std::fs::File::from(fd);
    file.set_len(4096)?;
    let shared = share::<Report>(file.as_raw_fd())?;
    Ok((file.into(), shared))
}

fn start(
    seed: u64,
    folder: &Path,
    report: &OwnedFd,
    errors: &std::fs::File,
) -> std::io::Result<Child> {
    Command::new(std::env::current_exe()?)
        .env(ROLE, "sandbox")
        .env(SEED, seed.to_string())
        .env(REPORT, report.as_raw_fd().to_string())
        .current_dir(folder)
        // Not a device: should the program be let, it changes mode and owner of what it has.
        .stdin(tempfile::tempfile()?)
        .stdout(tempfile::tempfile()?)
        .stderr(errors.try_clone()?)
        // So that what it sends to its group does not come here.
        .process_group(0)
        .spawn()
}

/// The end; `None` if there was no progress for too long, and it was killed.
fn wait(child: &mut Child, progress: &Progress) -> std::io::Result<Option<ExitStatus>> {
    let mut seen = (u64::MAX, Instant::now());
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let turn = progress.turn.load(Ordering::Relaxed);
        if turn != seen.0 {
            seen = (turn, Instant::now());
        } else if seen.1.elapsed() > PATIENCE {
            if is_stopped(child.id()) {
                // By itself; whoever goes on is looked at again.
                // SAFETY: a child that was not waited for.
                unsafe { libc::kill(child.id() as i32, libc::SIGCONT) };
                seen.1 = Instant::now();
                continue;
            }
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether a process is stopped by a signal.
fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Behind the name, which may hold anything.
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| rest.starts_with('T'))
}

/// Kills and reaps what the program left: its children are ours now.
fn sweep() {
    let path = format!("/proc/self/task/{}/children", own_thread());
    loop {
        let children = std::fs::read_to_string(&path).unwrap_or_default();
        if children.trim().is_empty() {
            return;
        }
        for child in children.split_whitespace() {
            let Ok(pid) = child.parse::<i32>() else {
                continue;
            };
            // SAFETY: a child of this thread, not waited for yet: the number is its.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            // SAFETY: no status is asked for.
            unsafe { libc::waitpid(pid, core::ptr::null_mut(), 0) };
        }
    }
}

/// The thread that is asked for children: those that come to a subreaper go to any of
/// its threads, so all of this is done by one.
fn own_thread() -> i32 {
    // SAFETY: takes nothing.
    unsafe { libc::gettid() }
}

fn text_of(file: &std::fs::File) -> String {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; 1 << 16];
    let len = file.read_at(&mut bytes, 0).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}

/// The kernel's log from here on, in which it names processes that die of a fault; of
/// nothing where it may not be read.
struct KernelLog(Option<std::fs::File>);

impl KernelLog {
    fn open() -> Self {
        use std::io::{Seek, SeekFrom};
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = std::fs::File::options();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let file = options.open("/dev/kmsg").ok();
        Self(file.filter(|mut file| file.seek(SeekFrom::End(0)).is_ok()))
    }

    /// A line about this program.
    fn new_fault(&mut self) -> Option<String> {
        use std::io::{ErrorKind, Read};
        let file = self.0.as_mut()?;
        let mut line = [0; 8192];
        loop {
            match file.read(&mut line) {
                Ok(0) => return None,
                Ok(len) => {
                    let text = String::from_utf8_lossy(&line[..len]);
                    let is_fault = ["segfault", "traps:"]
                        .iter()
                        .any(|word| text.contains(word));
                    if is_fault && text.contains("generated_calls") {
                        return Some(text.trim().to_owned());
                    }
                }
                // Lines were lost.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                Err(_) => return None,
            }
        }
    }
}

/// The guard's report, for [`abort`].
static OWN_REPORT: AtomicPtr<Report> = AtomicPtr::new(core::ptr::null_mut());

/// In the place of the C library's, for all of this program: a guard that gives up says
/// so before.
#[unsafe(no_mangle)]
extern "C" fn abort() -> ! {
    // SAFETY: null, or mapped for ever.
    if let Some(report) = unsafe { OWN_REPORT.load(Ordering::Relaxed).as_ref() } {
        report.add(FAILED);
    }
    // SAFETY: ends the process.
    unsafe { libc::_exit(82) }
}

/// Whether a call may go on for as long as it likes, whatever the timer does: the mask
/// may be its own argument, and a time limit too.
fn may_wait(nr: u64) -> bool {
    const WAITING: [&str; 35] = [
        "accept",
        "accept4",
        "clock_nanosleep",
        "clone",
        "clone3",
        "connect",
        "epoll_pwait",
        "exit",
        "epoll_pwait2",
        "epoll_wait",
        "fcntl",
        "flock",
        "fork",
        "futex",
        "futex_wait",
        "futex_waitv",
        "msgrcv",
        "nanosleep",
        "pause",
        "poll",
        "ppoll",
        "pselect6",
        "read",
        "readv",
        "recvfrom",
        "recvmmsg",
        "recvmsg",
        "rt_sigsuspend",
        "rt_sigtimedwait",
        "select",
        "sendfile",
        "vfork",
        "wait4",
        "waitid",
        "write",
    ];
    WAITING.contains(&name(nr))
}
