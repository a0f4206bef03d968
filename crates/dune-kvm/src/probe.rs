//! What this machine's `/dev/kvm` is worth, found out by trying it.
//!
//! A KVM that opens and answers its API may still be unable to run ring 0
//! natively: software KVMs inside virtual machines run guest ring 3 on the
//! processor and *interpret* guest ring 0. Dune in guest is useless there (a
//! microsecond an instruction, no vector instructions), so it is never assumed
//! that a KVM that opens can be used: a probe guest of a few instructions is
//! run once per process, and the answer is kept.
//!
//! The probe guest is tried in this order, and the first failure ends it:
//!
//! | test | native | weak |
//! |---|---|---|
//! | `SYSCALL` from ring 3 | arrives at CPL 0 | arrives at CPL 3 |
//! | 10,000 iterations of a loop at CPL 0 | 10 us, 100 us in the lab | 13,000 us and more |
//! | an SSE instruction at CPL 0 | runs | the interpreter gives up |
//!
//! Every part of the guest is bounded (it has no loop but the counted one), so
//! the probe ends without a timer. [`probe`] stops at the first sign of
//! weakness and so costs a few hundred microseconds on either kind of machine;
//! [`measure`] goes through all three for a report a person reads.

mod absence;
mod features;
mod guest;
mod placement;

use std::fmt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_SHUTDOWN,
};

use self::guest::{Device, ProbeGuest};
use crate::sys::Errno;

pub use self::absence::Absence;
pub use self::features::Features;
pub use self::placement::{
    PLACEMENT_VARIABLE, Placement, PlacementError, PlacementRequest, UnknownPlacement, placement,
    request_from_environment,
};

/// The device that the probe opens.
pub const DEVICE: &str = "/dev/kvm";

/// The time under which the loop of [`LOOP_ITERATIONS`] iterations must finish
/// at ring 0 to count as native, best of [`LOOP_ATTEMPTS`].
///
/// Hardware takes 10 us and the lab's emulated processor 100 us; interpreters
/// take 13,000 us and more. The limit lies a factor of 30 above the slowest of
/// the good and a factor of 4 below the fastest of the bad, so that a loaded
/// machine falls on the right side both ways.
pub const LOOP_LIMIT: Duration = Duration::from_micros(3_000);

/// Iterations of the ring 0 loop, two instructions each.
pub const LOOP_ITERATIONS: u32 = 10_000;

/// How many times the loop may be tried before it counts as slow.
pub const LOOP_ATTEMPTS: u32 = 5;

/// The hardware extension under a KVM that runs ring 0 natively.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vendor {
    /// Intel VT-x.
    Vmx,
    /// AMD-V.
    Svm,
    /// The processor's vendor is neither Intel nor AMD (nor Hygon).
    Unknown,
}

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vmx => "Intel VT-x",
            Self::Svm => "AMD-V (SVM)",
            Self::Unknown => "an unknown extension",
        })
    }
}

/// What the probe guest showed. `None` means not measured, because an earlier
/// test had decided already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Measurements {
    /// The privilege level at which `SYSCALL` from ring 3 arrived.
    pub syscall_cpl: Option<u8>,
    /// The best time of [`LOOP_ITERATIONS`] iterations at ring 0.
    pub ring0_loop: Option<Duration>,
    /// Whether an SSE instruction ran at ring 0.
    pub ring0_sse: Option<bool>,
    /// How long the whole probe took, the VM's creation included.
    pub total: Duration,
}

/// Why a KVM counts as weak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Weakness {
    /// `SYSCALL` from ring 3 does not raise the privilege level.
    #[error("SYSCALL from ring 3 arrives at CPL {0} instead of CPL 0")]
    SyscallKeepsRing(u8),
    /// Ring 0 is interpreted.
    #[error(
        "{LOOP_ITERATIONS} iterations at ring 0 take {} us (native: under 100): ring 0 is interpreted",
        .0.as_micros()
    )]
    Ring0Interpreted(Duration),
    /// Vector instructions do not run at ring 0.
    #[error("an SSE instruction at ring 0 ends in an emulation failure")]
    NoVectorsAtRing0,
}

/// What `/dev/kvm` turned out to be.
#[derive(Debug)]
pub enum Kvm {
    /// There is no such device, or nothing behind it.
    Absent(Absence),
    /// It is there and may not be opened by this user.
    NoPermission {
        /// The group that owns the device, by name where it has one.
        group: String,
    },
    /// It opens, and does not run ring 0 natively.
    Weak {
        /// What gave it away.
        reason: Weakness,
        /// What was measured.
        measurements: Measurements,
    },
    /// It runs ring 0 natively.
    Hardware {
        /// The extension that it uses.
        vendor: Vendor,
        /// What was measured.
        measurements: Measurements,
    },
    /// It opens, and does not work.
    Broken(ProbeError),
}

/// A step of the probe that failed where a working KVM does not.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// `/dev/kvm` could not be opened, for a reason other than being absent or
    /// forbidden.
    #[error("cannot open {DEVICE}: {0}: {remedy}", remedy = remedy_for(*.0))]
    Open(Errno),
    /// The API is not the one that has been stable since Linux 2.6.22.
    #[error("{DEVICE} speaks API version {0} and Dune {KVM_API_VERSION}: use a stock kernel's KVM")]
    ApiVersion(u32),
    /// An ioctl failed.
    #[error("{call} failed on {DEVICE}: {error}: {remedy}", remedy = remedy_for(*.error))]
    Call {
        /// The ioctl or system call.
        call: &'static str,
        /// What the kernel answered.
        error: Errno,
    },
    /// The probe guest ended in a way that no test expects.
    #[error(
        "the probe guest ended {step} with {exit}: the kernel's log (`dmesg`) says why; use the lab \
         (`dune lab`) until it is solved"
    )]
    Exit {
        /// What was being tried.
        step: &'static str,
        /// How `KVM_RUN` came back.
        exit: ExitName,
    },
}

/// The name of an exit reason, for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitName(u32);

impl fmt::Display for ExitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            KVM_EXIT_SHUTDOWN => f.write_str("a shutdown (triple fault)"),
            KVM_EXIT_FAIL_ENTRY => f.write_str("a failed entry"),
            KVM_EXIT_INTERNAL_ERROR => f.write_str("an internal error of KVM"),
            other => write!(f, "exit reason {other}"),
        }
    }
}

const fn remedy_for(error: Errno) -> &'static str {
    const ENFILE: Errno = Errno(23);
    const EMFILE: Errno = Errno(24);
    const EBUSY: Errno = Errno(16);
    const ENOTTY: Errno = Errno(25);
    match error {
        ENOTTY => "it is no KVM device; as root, remove it and `mknod /dev/kvm c 10 232`",
        EBUSY => "another hypervisor holds the processor's extension; stop it (VirtualBox, VMware)",
        Errno::ENOMEM => "memory is short; free some or raise the limit of this control group",
        EMFILE => "this process has too many open files; raise `ulimit -n`",
        ENFILE => "the system has too many open files; raise `fs.file-max`",
        _ => "reload the kernel's KVM modules, or use the lab (`dune lab`)",
    }
}

/// The probe's answer for this process.
pub struct Report {
    /// What `/dev/kvm` is.
    pub kvm: Kvm,
    /// `KVM_GET_SUPPORTED_CPUID`, for whoever sets up a vCPU; `None` without a
    /// KVM that works.
    pub cpuid: Option<CpuId>,
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Report")
            .field("kvm", &self.kvm)
            .field("features", &self.features())
            .finish_non_exhaustive()
    }
}

impl Report {
    /// CPU features that a guest of this KVM has; `None` without a KVM that
    /// works.
    pub fn features(&self) -> Option<Features> {
        self.cpuid
            .as_ref()
            .map(|cpuid| Features::from_cpuid(cpuid.as_slice()))
    }

    /// The placement that this machine offers by itself, best first.
    pub fn natural_placement(&self) -> Placement {
        match self.kvm {
            Kvm::Hardware { .. } => Placement::InGuest,
            Kvm::Weak { .. } => Placement::OnHost,
            Kvm::Absent(_) | Kvm::NoPermission { .. } | Kvm::Broken(_) => Placement::Lab,
        }
    }

    /// The placement for a request.
    ///
    /// # Errors
    ///
    /// [`PlacementError`] when the request names one that this machine lacks.
    pub fn choose(&self, request: PlacementRequest) -> Result<Placement, PlacementError> {
        let natural = self.natural_placement();
        match request {
            PlacementRequest::Auto => Ok(natural),
            PlacementRequest::Only(Placement::InGuest) if natural != Placement::InGuest => {
                Err(PlacementError::NoRing0 {
                    found: self.kvm.to_string(),
                })
            }
            PlacementRequest::Only(Placement::OnHost) if natural == Placement::Lab => {
                Err(PlacementError::NoKvm {
                    found: self.kvm.to_string(),
                })
            }
            PlacementRequest::Only(placement) => Ok(placement),
        }
    }
}

impl fmt::Display for Kvm {
    /// One line, with the remedy where there is one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent(absence) => write!(f, "absent: {absence}"),
            Self::NoPermission { group } => write!(
                f,
                "not permitted: join group {group} (`usermod -aG {group} $USER` as root, then log \
                 in again)"
            ),
            Self::Weak { reason, .. } => write!(f, "weak: {reason}"),
            Self::Hardware { vendor, .. } => write!(f, "hardware: {vendor}"),
            Self::Broken(error) => write!(f, "broken: {error}"),
        }
    }
}

/// The answer for this process: made on the first call, kept from then on.
///
/// Costs the creation of one VM and a few exits on the first call (well under
/// 2 ms on hardware) and nothing after that. Never blocks.
pub fn probe() -> &'static Report {
    static REPORT: OnceLock<Report> = OnceLock::new();
    REPORT.get_or_init(|| examine(Depth::UntilDecided))
}

/// All the tests, whatever the first ones say, for a report that a person
/// reads. Costs up to 50 ms on a weak KVM. Not kept.
pub fn measure() -> Report {
    examine(Depth::Everything)
}

/// How far to go when the answer is known already.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Depth {
    UntilDecided,
    Everything,
}

fn examine(depth: Depth) -> Report {
    let started = Instant::now();
    let device = match Device::open() {
        Ok(device) => device,
        Err(errno) => {
            return Report {
                kvm: absence::why_not_open(errno),
                cpuid: None,
            };
        }
    };
    match examine_device(&device, depth, started) {
        Ok(report) => report,
        Err(error) => Report {
            kvm: Kvm::Broken(error),
            cpuid: None,
        },
    }
}

fn examine_device(device: &Device, depth: Depth, started: Instant) -> Result<Report, ProbeError> {
    let version = device.api_version()?;
    if version != KVM_API_VERSION {
        return Err(ProbeError::ApiVersion(version));
    }
    let cpuid = device.supported_cpuid()?;
    let mut guest = ProbeGuest::new(device, &cpuid)?;
    let (weakness, mut measurements) = guest.tests(depth)?;
    drop(guest);
    measurements.total = started.elapsed();
    let kvm = match weakness {
        Some(reason) => Kvm::Weak {
            reason,
            measurements,
        },
        None => Kvm::Hardware {
            vendor: features::vendor(cpuid.as_slice()),
            measurements,
        },
    };
    Ok(Report {
        kvm,
        cpuid: Some(cpuid),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_decides_and_remembers() {
        let first = probe();
        assert!(std::ptr::eq(first, probe()));
        eprintln!("{:#?}", first);
        if matches!(first.kvm, Kvm::Hardware { .. } | Kvm::Weak { .. }) {
            assert!(first.features().is_some());
        }
    }

    #[test]
    fn a_full_measurement_agrees_with_the_probe() {
        let report = measure();
        eprintln!("{report:#?}");
        assert_eq!(report.natural_placement(), probe().natural_placement());
        if let Kvm::Weak { measurements, .. } | Kvm::Hardware { measurements, .. } = report.kvm {
            assert!(measurements.syscall_cpl.is_some());
            assert!(measurements.ring0_loop.is_some());
            assert!(measurements.ring0_sse.is_some());
        }
    }

    fn report(kvm: Kvm) -> Report {
        Report { kvm, cpuid: None }
    }

    #[test]
    fn requests_are_held_against_the_machine() {
        let weak = || {
            report(Kvm::Weak {
                reason: Weakness::SyscallKeepsRing(3),
                measurements: Measurements::default(),
            })
        };
        let hardware = || {
            report(Kvm::Hardware {
                vendor: Vendor::Svm,
                measurements: Measurements::default(),
            })
        };
        let absent = || report(Kvm::Absent(Absence::NestedOff));
        let only = PlacementRequest::Only;
        assert_eq!(weak().choose(PlacementRequest::Auto), Ok(Placement::OnHost));
        assert_eq!(
            hardware().choose(PlacementRequest::Auto),
            Ok(Placement::InGuest)
        );
        assert_eq!(absent().choose(PlacementRequest::Auto), Ok(Placement::Lab));
        assert_eq!(
            hardware().choose(only(Placement::OnHost)),
            Ok(Placement::OnHost)
        );
        assert_eq!(weak().choose(only(Placement::Lab)), Ok(Placement::Lab));
        assert!(weak().choose(only(Placement::InGuest)).is_err());
        let refusal = absent()
            .choose(only(Placement::OnHost))
            .unwrap_err()
            .to_string();
        assert!(refusal.contains("nested"), "{refusal}");
    }
}
