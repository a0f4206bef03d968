//! What a run was made on.

use std::fs;

use dune_kvm::probe::{self, Kvm, Placement};

use crate::clock::{Calibration, Clock};

/// The machine of a run.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct Machine {
    /// The CPU's own name.
    cpu: String,
    /// CPUs that this process may use.
    cpus: usize,
    memory_mib: u64,
    kernel: String,
    /// What `/dev/kvm` is, in one line.
    kvm: String,
    /// Whether the CPU is an emulated one: the lab.
    emulated: bool,
    /// Load of the machine over the last minute when the run began; above the number of
    /// CPUs, times are not to be trusted.
    load: f64,
    clock: Calibration,
    samples: usize,
}

impl Machine {
    pub(crate) fn describe(clock: &Clock, samples: usize) -> Self {
        let cpu = field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".to_owned());
        let memory_kib = field("/proc/meminfo", "MemTotal")
            .and_then(|value| value.split(' ').next()?.parse::<u64>().ok())
            .unwrap_or(0);
        Self {
            emulated: cpu.contains("TCG"),
            cpu,
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory_kib / 1024,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned()),
            kvm: probe::probe().kvm.to_string(),
            load: fs::read_to_string("/proc/loadavg")
                .ok()
                .and_then(|text| text.split(' ').next()?.parse().ok())
                .unwrap_or(0.0),
            clock: clock.calibration(),
            samples,
        }
    }

    /// One line for people.
    pub(crate) fn line(&self) -> String {
        let Self {
            cpu,
            cpus,
            memory_mib,
            kernel,
            kvm,
            load,
            ..
        } = self;
        format!("{cpu}, {cpus} CPU, {memory_mib} MiB; Linux {kernel}; KVM {kvm}; load {load}")
    }
}

/// The first value of a `name : value` file.
fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

/// Where the guard runs here, as the probe says; the variable that overrides it is for
/// `dune run` and honoured too.
pub(crate) fn placement() -> Placement {
    probe::placement().unwrap_or_else(|_| probe::probe().natural_placement())
}

/// Why trusted Dune mode cannot be entered here; `None` where it can.
pub(crate) fn without_ring0() -> Option<String> {
    match &probe::probe().kvm {
        Kvm::Hardware { .. } => None,
        other => Some(format!("no ring 0 here (KVM {other})")),
    }
}
