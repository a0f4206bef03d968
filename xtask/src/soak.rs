//! `cargo xtask soak`: programs of every kind in the sandbox, for a while,
//! two at a time beside two that stay; nothing may hang, go wrong or be left
//! behind.
//!
//! ```text
//!   soak           the chore: here, or again inside of the lab
//!   soak/load      the programs: what they do, what they must print
//!   soak/run       one program: its time limit, its end, what it leaves behind
//!   soak/resident  the programs that stay: descriptors, vCPUs, slots, threads, memory
//! ```

mod load;
mod resident;
mod run;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dune_lab::{Config, Input, Output, Session};

use crate::process::{cargo, succeed, target_folder};
use load::{CHURN, LOADS, Load, SERVER};
use resident::Resident;
use run::Runner;

/// Options of `cargo xtask soak`.
#[derive(Debug, clap::Args)]
pub(crate) struct SoakArgs {
    /// How long.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=600))]
    minutes: u64,

    /// In the lab, not on this machine.
    #[arg(long)]
    lab: bool,

    /// The `dune` command, not built anew; for the part that runs in the lab.
    #[arg(long, hide = true)]
    dune: Option<PathBuf>,
}

/// Programs at a time, beside those that stay.
const WORKERS: usize = 2;

/// Runs the chore.
pub(crate) fn run(args: &SoakArgs) -> Result<ExitCode> {
    let dune = match &args.dune {
        Some(dune) => dune.clone(),
        None => {
            succeed(cargo().args(["build", "--release", "-p", "dune-cli"]))?;
            target_folder().join("release/dune")
        }
    };
    if args.lab {
        return in_lab(args, &dune);
    }
    let before = Machine::look();
    let started = Instant::now();
    let deadline = started + Duration::from_secs(args.minutes * 60);
    let runner = Runner::new(dune);
    let mut troubles = soak(&runner, deadline);
    if let Some(trouble) = before.compare(&Machine::look()) {
        troubles.push(trouble);
    }
    for trouble in &troubles {
        println!("TROUBLE: {trouble}");
    }
    println!(
        "soak: {} programs in {} s, {} troubles",
        runner.count(),
        started.elapsed().as_secs(),
        troubles.len()
    );
    Ok(if troubles.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// This same chore, inside.
fn in_lab(args: &SoakArgs, dune: &PathBuf) -> Result<ExitCode> {
    let own = std::env::current_exe().context("find this program's own file")?;
    let mut session = Session::start(&Config {
        cpus: 2,
        memory_mib: 2048,
        ..Config::default()
    })?;
    let command = dune_lab::Command::new(own)
        .args(["soak", "--minutes", &args.minutes.to_string()])
        .arg("--dune")
        .arg(dune)
        // The last programs may take their whole limit.
        .timeout(Some(Duration::from_secs(args.minutes * 60 + 2000)));
    let mut output = Output {
        stdout: &mut std::io::stdout(),
        stderr: &mut std::io::stderr(),
    };
    let outcome = session.run(&command, Input::Nothing, &mut output)?;
    Ok(ExitCode::from(outcome.code))
}

/// The load itself; what went wrong. The first trouble ends it: what follows
/// would be the same again.
fn soak(runner: &Runner, deadline: Instant) -> Vec<String> {
    let stop = AtomicBool::new(false);
    // The server first: the others' clients are told its port.
    let residents = [&SERVER, &CHURN].map(|stay| Resident::start(runner, stay));
    if residents.iter().any(Result::is_err) {
        // Clients without a server would only say so again.
        stop.store(true, Ordering::Relaxed);
    }
    let mut troubles = thread::scope(|scope| {
        scope.spawn(|| report_progress(runner, deadline, &stop));
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                let stop = &stop;
                scope.spawn(move || work(runner, worker, deadline, stop))
            })
            .collect();
        let ends = workers.into_iter().map(|worker| {
            worker
                .join()
                .unwrap_or_else(|_| Err("a worker of the soak itself panicked".to_owned()))
        });
        ends.filter_map(Result::err).collect::<Vec<_>>()
    });
    for resident in residents {
        match resident.and_then(Resident::end) {
            Ok(summary) => println!("{summary}"),
            Err(trouble) => troubles.push(trouble),
        }
    }
    if let Some(trouble) = runner.leftovers() {
        troubles.push(trouble);
    }
    troubles
}

/// A line each minute, until the end.
fn report_progress(runner: &Runner, deadline: Instant, stop: &AtomicBool) {
    const STEP: Duration = Duration::from_millis(200);
    const MINUTE: Duration = Duration::from_secs(60);
    let started = Instant::now();
    let mut next = MINUTE;
    while Instant::now() < deadline && !stop.load(Ordering::Relaxed) {
        thread::sleep(STEP);
        if started.elapsed() >= next {
            println!(
                "soak: {} programs after {} min",
                runner.count(),
                next.as_secs() / 60
            );
            next += MINUTE;
        }
    }
}

/// One program after the other; workers begin at different ones.
fn work(
    runner: &Runner,
    worker: usize,
    deadline: Instant,
    stop: &AtomicBool,
) -> Result<(), String> {
    let offset = worker * LOADS.len() / WORKERS;
    for round in 0_u64.. {
        for index in 0..LOADS.len() {
            if Instant::now() >= deadline || stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let load: &Load = &LOADS[(index + offset) % LOADS.len()];
            if let Err(trouble) = runner.run(load, round) {
                stop.store(true, Ordering::Relaxed);
                return Err(format!("{}: {trouble}", load.name));
            }
        }
    }
    Ok(())
}

/// What a whole machine has that nobody else uses: the lab. Elsewhere others
/// use it too.
#[derive(Debug)]
struct Machine {
    /// Users of the KVM module, and memory in KiB.
    lab: Option<(u64, u64)>,
}

/// Memory that a kernel may keep for itself after a soak, in KiB.
const KEPT_KIB: u64 = 192 << 10;

/// Whether this is the lab's machine.
fn is_lab() -> bool {
    static IS_LAB: LazyLock<bool> = LazyLock::new(|| {
        std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("QEMU TCG"))
    });
    *IS_LAB
}

impl Machine {
    fn look() -> Self {
        let number = |path: &str| {
            let text = std::fs::read_to_string(path).ok()?;
            text.trim().parse::<u64>().ok()
        };
        let available = || {
            let text = std::fs::read_to_string("/proc/meminfo").ok()?;
            let line = text
                .lines()
                .find(|line| line.starts_with("MemAvailable:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        };
        let look = || Some((number("/sys/module/kvm_amd/refcnt")?, available()?));
        Self {
            lab: is_lab().then(look).flatten(),
        }
    }

    fn compare(&self, after: &Self) -> Option<String> {
        let ((users, memory), (users_after, memory_after)) = (self.lab?, after.lab?);
        println!(
            "the machine: {users} users of KVM before, {users_after} after; {} MiB available \
             before, {} after",
            memory >> 10,
            memory_after >> 10
        );
        if users_after > users {
            return Some(format!("{} users of KVM too many", users_after - users));
        }
        let lost = memory.saturating_sub(memory_after);
        (lost > KEPT_KIB).then(|| format!("the machine lost {lost} KiB of memory"))
    }
}
