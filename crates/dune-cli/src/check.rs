//! `dune check`: what this machine offers, and what to do about the rest.

use std::fmt::Write;
use std::process::{Command, ExitCode};

use clap::Args;
use dune_kvm::probe::{self, Features, Kvm, Measurements, Placement, Report};
use dune_lab::tools::{self, Tool};
use dune_sandbox::Policy;
use dune_sandbox::confine::{self, kernel::Kernel};
use serde::Serialize;

use crate::output;

/// Say what this machine offers: KVM, CPU features, the lab.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CheckArgs {
    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
The exit code is 0 if programs can be run here in some way, 1 otherwise.

Examples:
  dune check
  dune check --json | jq -r .placement.run";

/// Everything that is reported.
#[derive(Debug, Serialize)]
struct Check {
    machine: Machine,
    kvm: KvmPart,
    placement: PlacementPart,
    second_wall: WallPart,
    key_wall: KeyWallPart,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu: Option<CpuPart>,
    lab: LabPart,
}

#[derive(Debug, Serialize)]
struct Machine {
    kernel: String,
    processor: String,
    dune: &'static str,
}

#[derive(Debug, Serialize)]
struct KvmPart {
    /// `absent`, `no-permission`, `weak`, `hardware` or `broken`.
    state: &'static str,
    explanation: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    measurements: Option<MeasuredPart>,
}

#[derive(Debug, Serialize)]
struct MeasuredPart {
    syscall_cpl: Option<u8>,
    ring0_loop_us: Option<u64>,
    ring0_sse: Option<bool>,
}

#[derive(Debug, Serialize)]
struct PlacementPart {
    /// What `dune run` uses: `guest`, `host` or `lab`.
    run: Option<&'static str>,
    /// Where trusted code gets Dune mode: `native` or `lab`.
    dune_mode: &'static str,
    explanation: String,
}

/// What stands under the guard's own checks.
#[derive(Debug, Serialize)]
struct WallPart {
    /// Landlock's ABI, 0 for none.
    landlock: u32,
    seccomp: bool,
    explanation: String,
}

/// The wall around the guard's memory.
#[derive(Debug, Serialize)]
struct KeyWallPart {
    protection_keys: bool,
    explanation: &'static str,
}

#[derive(Debug, Serialize)]
struct CpuPart {
    features: Vec<FeaturePart>,
    physical_bits: u8,
    virtual_bits: u8,
    /// In hexadecimal.
    xcr0: String,
}

#[derive(Debug, Serialize)]
struct FeaturePart {
    name: &'static str,
    present: bool,
    purpose: &'static str,
}

#[derive(Debug, Serialize)]
struct LabPart {
    ready: bool,
    tools: Vec<ToolPart>,
}

#[derive(Debug, Serialize)]
struct ToolPart {
    name: &'static str,
    needed_for: &'static str,
    required: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

/// Prints the report.
///
/// # Errors
///
/// If standard output cannot be written.
pub(crate) fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let report = probe::measure();
    let check = Check::of(&report);
    if args.json {
        output::print(&(serde_json::to_string_pretty(&check)? + "\n"))?;
    } else {
        output::print(&check.text())?;
    }
    let usable = match report.natural_placement() {
        Placement::InGuest | Placement::OnHost => true,
        Placement::Lab => check.lab.ready,
    };
    Ok(if usable {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl Check {
    fn of(report: &Report) -> Self {
        Self {
            machine: Machine::this(),
            kvm: KvmPart::of(&report.kvm),
            placement: PlacementPart::of(report),
            second_wall: WallPart::of(&Kernel::this()),
            key_wall: KeyWallPart::of(dune_kvm::wall::has_protection_keys()),
            cpu: report.features().as_ref().map(CpuPart::of),
            lab: LabPart::of_this_machine(),
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(text, "{name:<11} {value}");
        };
        line(
            "machine",
            &format!("{}, {}", self.machine.kernel, self.machine.processor),
        );
        line("/dev/kvm", &self.kvm.explanation);
        if let Some(measured) = &self.kvm.measurements {
            line("", &measured.text());
        }
        line("dune run", &self.placement.explanation);
        line(
            "dune mode",
            match self.placement.dune_mode {
                "native" => "on this machine's own KVM",
                _ => "in the lab",
            },
        );
        line("second wall", &self.second_wall.explanation);
        line("key wall", self.key_wall.explanation);
        if let Some(cpu) = &self.cpu {
            let names = |present: bool| {
                let names: Vec<&str> = cpu
                    .features
                    .iter()
                    .filter(|feature| feature.present == present)
                    .map(|feature| feature.name)
                    .collect();
                if names.is_empty() {
                    "none".to_owned()
                } else {
                    names.join(", ")
                }
            };
            line("cpu has", &names(true));
            line("cpu lacks", &names(false));
            line(
                "addresses",
                &format!(
                    "{} bits physical, {} virtual",
                    cpu.physical_bits, cpu.virtual_bits
                ),
            );
            line("xcr0", &cpu.xcr0);
        }
        for (n, tool) in self.lab.tools.iter().enumerate() {
            let state = match (&tool.version, &tool.remedy) {
                (Some(version), _) => version.clone(),
                (None, Some(remedy)) => format!("not installed; {remedy}"),
                (None, None) => "not installed".to_owned(),
            };
            let name = if n == 0 { "lab" } else { "" };
            line(
                name,
                &format!("{} ({}): {state}", tool.name, tool.needed_for),
            );
        }
        text
    }
}

impl Machine {
    fn this() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let kernel = format!(
            "{} {}",
            read("/proc/sys/kernel/ostype").trim(),
            read("/proc/sys/kernel/osrelease").trim()
        );
        let cpuinfo = read("/proc/cpuinfo");
        let processor = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name"))
            .and_then(|rest| rest.split_once(':'))
            .map_or("unknown processor", |(_, name)| name.trim());
        Self {
            kernel,
            processor: processor.to_owned(),
            dune: env!("CARGO_PKG_VERSION"),
        }
    }
}

impl KvmPart {
    fn of(kvm: &Kvm) -> Self {
        let state = match kvm {
            Kvm::Absent(_) => "absent",
            Kvm::NoPermission { .. } => "no-permission",
            Kvm::Weak { .. } => "weak",
            Kvm::Hardware { .. } => "hardware",
            Kvm::Broken(_) => "broken",
        };
        let measurements = match kvm {
            Kvm::Weak { measurements, .. } | Kvm::Hardware { measurements, .. } => {
                Some(MeasuredPart::of(measurements))
            }
            Kvm::Absent(_) | Kvm::NoPermission { .. } | Kvm::Broken(_) => None,
        };
        Self {
            state,
            explanation: kvm.to_string(),
            measurements,
        }
    }
}

impl MeasuredPart {
    fn of(measurements: &Measurements) -> Self {
        Self {
            syscall_cpl: measurements.syscall_cpl,
            ring0_loop_us: measurements.ring0_loop.map(|time| time.as_micros() as u64),
            ring0_sse: measurements.ring0_sse,
        }
    }

    fn text(&self) -> String {
        let mut parts = Vec::new();
        if let Some(cpl) = self.syscall_cpl {
            parts.push(format!("SYSCALL arrives at CPL {cpl}"));
        }
        if let Some(us) = self.ring0_loop_us {
            parts.push(format!(
                "{} iterations at ring 0: {us} us",
                probe::LOOP_ITERATIONS
            ));
        }
        if let Some(runs) = self.ring0_sse {
            parts.push(format!(
                "SSE at ring 0: {}",
                if runs { "runs" } else { "does not run" }
            ));
        }
        parts.join("; ")
    }
}

impl PlacementPart {
    fn of(report: &Report) -> Self {
        let natural = report.natural_placement();
        let why = match natural {
            Placement::InGuest => "in guest: the guard runs at ring 0, without exits",
            Placement::OnHost => "on host: this KVM runs ring 3 natively, and ring 0 it does not",
            Placement::Lab => "in the lab: no KVM to use here",
        };
        let dune_mode = if natural == Placement::InGuest {
            "native"
        } else {
            "lab"
        };
        let chosen = probe::request_from_environment()
            .map_err(|error| format!("{}: {error}", probe::PLACEMENT_VARIABLE))
            .and_then(|request| report.choose(request).map_err(|error| error.to_string()));
        let (run, explanation) = match chosen {
            Ok(placement) if placement == natural => (Some(placement), why.to_owned()),
            Ok(placement) => {
                let asked = format!(
                    "{placement}, as {} says; by itself {why}",
                    probe::PLACEMENT_VARIABLE
                );
                (Some(placement), asked)
            }
            Err(error) => (None, error),
        };
        Self {
            run: run.map(Placement::name),
            dune_mode,
            explanation,
        }
    }
}

impl WallPart {
    fn of(kernel: &Kernel) -> Self {
        let landlock = match kernel.landlock {
            0 => "no Landlock".to_owned(),
            abi => format!("Landlock ABI {abi}"),
        };
        let seccomp = if kernel.seccomp {
            "seccomp filters"
        } else {
            "no seccomp filters"
        };
        let gaps = confine::gaps(&Policy::new().strict(), kernel);
        let verdict = if gaps.iter().any(|gap| gap.is_a_wall()) {
            "--strict needs --no-second-wall here".to_owned()
        } else if gaps.is_empty() {
            "--strict is enforced twice".to_owned()
        } else {
            let list: Vec<String> = gaps.iter().map(ToString::to_string).collect();
            format!("of --strict, the guard alone holds: {}", list.join("; "))
        };
        Self {
            landlock: kernel.landlock,
            seccomp: kernel.seccomp,
            explanation: format!("{landlock}, {seccomp}: {verdict}"),
        }
    }
}

impl KeyWallPart {
    fn of(protection_keys: bool) -> Self {
        Self {
            protection_keys,
            explanation: if protection_keys {
                "protection keys: yes; the host kernel itself refuses addresses of the guard"
            } else {
                "protection keys: no; the guard's checks alone keep the host kernel from its memory"
            },
        }
    }
}

impl CpuPart {
    fn of(features: &Features) -> Self {
        let feature = |name, present, purpose| FeaturePart {
            name,
            present,
            purpose,
        };
        Self {
            features: vec![
                feature(
                    "SMEP",
                    features.smep,
                    "ring 0 never runs the program's pages",
                ),
                feature("SMAP", features.smap, "ring 0 never reads them by mistake"),
                feature(
                    "UMIP",
                    features.umip,
                    "ring 3 cannot read descriptor tables",
                ),
                feature("NX", features.nx, "data is not code"),
                feature("PKU", features.pku, "protection keys for guests"),
                feature(
                    "PCID",
                    features.pcid,
                    "address space switches keep translations",
                ),
                feature(
                    "INVPCID",
                    features.invpcid,
                    "single translations are dropped cheaply",
                ),
                feature(
                    "FSGSBASE",
                    features.fsgsbase,
                    "thread-local storage without a call",
                ),
                feature("1 GiB pages", features.gib_pages, "small page tables"),
                feature("LA57", features.la57, "addresses of 57 bits"),
                feature(
                    "XSAVE",
                    features.xcr0_mask != 0,
                    "vector registers beyond SSE",
                ),
            ],
            physical_bits: features.physical_bits,
            virtual_bits: features.virtual_bits,
            xcr0: format!("{:#x}", features.xcr0_mask),
        }
    }
}

impl LabPart {
    fn of_this_machine() -> Self {
        const BOCHS: Tool = Tool {
            program: "bochs-bin",
            package: "bochs",
        };
        let tools = vec![
            ToolPart::of(tools::QEMU, "the lab", true, Some("--version")),
            ToolPart::of(tools::XZ, "the lab's kernel", true, Some("--version")),
            ToolPart::of(BOCHS, "dune lab --intel", false, None),
        ];
        let ready = tools
            .iter()
            .all(|tool| tool.version.is_some() || !tool.required);
        Self { ready, tools }
    }
}

impl ToolPart {
    /// `version` is the option that makes the program print its version;
    /// without one, being there is enough.
    fn of(
        tool: Tool,
        needed_for: &'static str,
        required: bool,
        version: Option<&'static str>,
    ) -> Self {
        let found = tool.find().map(|path| {
            version
                .and_then(|option| Command::new(&path).arg(option).output().ok())
                .and_then(|output| first_line(&output.stdout))
                .unwrap_or_else(|| path.display().to_string())
        });
        let remedy = found.is_none().then(|| {
            format!(
                "`apt-get install --no-install-recommends {}` as root installs it",
                tool.package
            )
        });
        Self {
            name: tool.program,
            needed_for,
            required,
            version: found,
            remedy,
        }
    }
}

fn first_line(output: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(output);
    let line = text.lines().next()?.trim();
    (!line.is_empty()).then(|| line.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weak() -> Report {
        Report {
            kvm: Kvm::Weak {
                reason: probe::Weakness::SyscallKeepsRing(3),
                measurements: Measurements {
                    syscall_cpl: Some(3),
                    ..Measurements::default()
                },
            },
            cpuid: None,
        }
    }

    #[test]
    fn a_report_reads_as_lines() {
        let text = Check::of(&weak()).text();
        assert!(text.contains("/dev/kvm    weak: SYSCALL"), "{text}");
        assert!(text.lines().all(|line| !line.trim().is_empty()), "{text}");
    }

    #[test]
    fn json_has_the_state_by_name() {
        let json = serde_json::to_value(Check::of(&weak())).unwrap();
        assert_eq!(json["kvm"]["state"], "weak");
        assert_eq!(json["kvm"]["measurements"]["syscall_cpl"], 3);
        assert_eq!(json["placement"]["dune_mode"], "lab");
        assert!(json["key_wall"]["protection_keys"].is_boolean());
        assert!(json["lab"]["tools"].is_array());
    }

    #[test]
    fn only_the_first_line_of_a_version_counts() {
        assert_eq!(
            first_line(b"QEMU 7.2\nCopyright\n").as_deref(),
            Some("QEMU 7.2")
        );
        assert_eq!(first_line(b""), None);
    }
}
