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
#![expect(
    unsafe_code,
    reason = "KVM's ioctls and the memory of the probe guest are raw system interfaces"
)]

use std::arch::asm;
use std::fmt;
use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::str::FromStr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_API_VERSION, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_SHUTDOWN,
    kvm_cpuid_entry2, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_run, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region,
};

/// The name of the environment variable that overrides the choice of
/// placement: `guest`, `host`, `lab` or `auto`.
pub const PLACEMENT_VARIABLE: &str = "DUNE_PLACEMENT";

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
pub const LOOP_ATTEMPTS: u32 = 3;

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

/// Why there is no `/dev/kvm`, each with its own remedy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Absence {
    /// A container that was not given the device.
    #[error(
        "{DEVICE} is not in this container: start it with `--device /dev/kvm` (Docker, Podman), or \
         add the device to its configuration"
    )]
    Container,
    /// The extension is there and the module is not.
    #[error("the module {0} is not loaded: run `modprobe {0}` as root")]
    ModuleNotLoaded(&'static str),
    /// The module is there and has no hardware to use, on a machine of metal.
    #[error(
        "the processor's virtualisation extension is off: turn on \"{0}\" in the firmware's set-up \
         (BIOS, UEFI)"
    )]
    FirmwareOff(&'static str),
    /// This machine is itself virtual and does not hand the extension on.
    #[error(
        "this machine is virtual and its host does not offer nested virtualisation: turn it on at \
         the host (KVM: module option `nested=1` and CPU model `host`; clouds: an instance type \
         with nested virtualisation or of bare metal)"
    )]
    NestedOff,
    /// The kernel and the processor have it, yet the device node is missing.
    #[error(
        "{DEVICE} is missing though KVM is loaded: create it with `mknod {DEVICE} c 10 232` as root"
    )]
    NodeMissing,
    /// The node is there and nothing answers behind it.
    #[error("{DEVICE} exists and no driver answers it: load `kvm_intel` or `kvm_amd` as root")]
    NoDriver,
}

/// A step of the probe that failed where a working KVM does not.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// `/dev/kvm` could not be opened, for a reason other than being absent or
    /// forbidden.
    #[error("cannot open {DEVICE}: {0}: {remedy}", remedy = remedy_for(.0))]
    Open(std::io::Error),
    /// The API is not the one that has been stable since Linux 2.6.22.
    #[error("{DEVICE} speaks API version {0} and Dune {KVM_API_VERSION}: use a stock kernel's KVM")]
    ApiVersion(i32),
    /// An ioctl failed.
    #[error("{call} failed on {DEVICE}: {error}: {remedy}", remedy = remedy_for(.error))]
    Call {
        /// The ioctl or system call.
        call: &'static str,
        /// What the kernel answered.
        error: std::io::Error,
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

fn remedy_for(error: &std::io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(EBUSY) => {
            "another hypervisor holds the processor's extension; stop it (VirtualBox, VMware)"
        }
        Some(ENOMEM) => "memory is short; free some or raise the limit of this control group",
        Some(EMFILE) => "this process has too many open files; raise `ulimit -n`",
        Some(ENFILE) => "the system has too many open files; raise `fs.file-max`",
        _ => "reload the kernel's KVM modules, or use the lab (`dune lab`)",
    }
}

/// Where the code that guards ring 3 runs (or, in the lab, both run).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Placement {
    /// At ring 0 of the guest: KVM on VT-x or SVM.
    InGuest,
    /// On the host side, after an exit: any KVM that runs ring 3 natively.
    OnHost,
    /// In the bundled virtual machine.
    Lab,
}

impl Placement {
    /// The word for it on the command line and in [`PLACEMENT_VARIABLE`].
    pub const fn name(self) -> &'static str {
        match self {
            Self::InGuest => "guest",
            Self::OnHost => "host",
            Self::Lab => "lab",
        }
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What was asked for: a placement, or the probe's own choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PlacementRequest {
    /// The best one that this machine has.
    #[default]
    Auto,
    /// This one, or an error.
    Only(Placement),
}

/// A word that names no placement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no placement: use auto, guest, host or lab")]
pub struct UnknownPlacement(pub String);

impl FromStr for PlacementRequest {
    type Err = UnknownPlacement;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        match word {
            "auto" | "" => Ok(Self::Auto),
            "guest" => Ok(Self::Only(Placement::InGuest)),
            "host" => Ok(Self::Only(Placement::OnHost)),
            "lab" => Ok(Self::Only(Placement::Lab)),
            other => Err(UnknownPlacement(other.to_owned())),
        }
    }
}

/// A placement that was asked for and that this machine does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// The variable holds something else.
    #[error("{PLACEMENT_VARIABLE}: {0}")]
    Variable(#[from] UnknownPlacement),
    /// Ring 0 does not run natively here.
    #[error("placement \"guest\" needs a KVM that runs ring 0 natively; here {found}; use auto")]
    NoRing0 {
        /// What the probe found, in one line.
        found: String,
    },
    /// There is no usable KVM at all.
    #[error("placement \"host\" needs a KVM; here {found}; use auto or lab")]
    NoKvm {
        /// What the probe found, in one line.
        found: String,
    },
}

/// The probe's answer for this process.
#[derive(Debug)]
pub struct Report {
    /// What `/dev/kvm` is.
    pub kvm: Kvm,
    /// CPU features that a guest of this KVM has; `None` without a KVM.
    pub features: Option<Features>,
}

impl Report {
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

/// The processor's features as a guest of this KVM sees them, from
/// `KVM_GET_SUPPORTED_CPUID`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features {
    /// Supervisor-mode execution prevention.
    pub smep: bool,
    /// Supervisor-mode access prevention.
    pub smap: bool,
    /// Protection keys for user pages.
    pub pku: bool,
    /// Process-context identifiers.
    pub pcid: bool,
    /// `INVPCID`.
    pub invpcid: bool,
    /// 1 GiB pages.
    pub gib_pages: bool,
    /// Five-level paging.
    pub la57: bool,
    /// `RDFSBASE` and its kin.
    pub fsgsbase: bool,
    /// User-mode instruction prevention.
    pub umip: bool,
    /// The no-execute bit.
    pub nx: bool,
    /// Bits of a guest physical address.
    pub physical_bits: u8,
    /// Bits of a guest virtual address.
    pub virtual_bits: u8,
    /// State components that XCR0 may name; 0 without XSAVE.
    pub xcr0_mask: u64,
}

impl Features {
    fn from_cpuid(entries: &[kvm_cpuid_entry2]) -> Self {
        let leaf = |function: u32, index: u32| {
            entries
                .iter()
                .find(|e| e.function == function && e.index == index)
        };
        let bit = |word: u32, bit: u32| word >> bit & 1 == 1;
        let mut features = Self {
            physical_bits: 36,
            virtual_bits: 48,
            ..Self::default()
        };
        let mut has_xsave = false;
        if let Some(e) = leaf(1, 0) {
            features.pcid = bit(e.ecx, 17);
            has_xsave = bit(e.ecx, 26);
        }
        if let Some(e) = leaf(7, 0) {
            features.fsgsbase = bit(e.ebx, 0);
            features.smep = bit(e.ebx, 7);
            features.invpcid = bit(e.ebx, 10);
            features.smap = bit(e.ebx, 20);
            features.umip = bit(e.ecx, 2);
            features.pku = bit(e.ecx, 3);
            features.la57 = bit(e.ecx, 16);
        }
        if let Some(e) = leaf(0xd, 0).filter(|_| has_xsave) {
            features.xcr0_mask = u64::from(e.edx) << 32 | u64::from(e.eax);
        }
        if let Some(e) = leaf(0x8000_0001, 0) {
            features.nx = bit(e.edx, 20);
            features.gib_pages = bit(e.edx, 26);
        }
        if let Some(e) = leaf(0x8000_0008, 0) {
            features.physical_bits = (e.eax & 0xff) as u8;
            features.virtual_bits = (e.eax >> 8 & 0xff) as u8;
        }
        features
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

/// The placement for this process: [`PLACEMENT_VARIABLE`] where it is set, the
/// probe's own choice otherwise.
///
/// # Errors
///
/// [`PlacementError`] when the variable names no placement, or one that this
/// machine lacks.
pub fn placement() -> Result<Placement, PlacementError> {
    let request = request_from_environment()?;
    if request == PlacementRequest::Only(Placement::Lab) {
        return Ok(Placement::Lab);
    }
    probe().choose(request)
}

/// What [`PLACEMENT_VARIABLE`] asks for; `Auto` when it is not set.
///
/// # Errors
///
/// [`UnknownPlacement`] when it holds no placement's name.
pub fn request_from_environment() -> Result<PlacementRequest, UnknownPlacement> {
    match std::env::var_os(PLACEMENT_VARIABLE) {
        None => Ok(PlacementRequest::Auto),
        Some(word) => word.to_string_lossy().parse(),
    }
}

/// How far to go when the answer is known already.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Depth {
    UntilDecided,
    Everything,
}

fn examine(depth: Depth) -> Report {
    let started = Instant::now();
    let without_features = |kvm| Report {
        kvm,
        features: None,
    };
    let device = match File::options().read(true).write(true).open(DEVICE) {
        Ok(file) => file,
        Err(error) => return without_features(why_not_open(error)),
    };
    match examine_device(&device, depth, started) {
        Ok(report) => report,
        Err(error) => without_features(Kvm::Broken(error)),
    }
}

fn examine_device(device: &File, depth: Depth, started: Instant) -> Result<Report, ProbeError> {
    let kvm = Fd(device.as_raw_fd());
    let version = kvm.ioctl("KVM_GET_API_VERSION", KVM_GET_API_VERSION, 0)?;
    if version != KVM_API_VERSION as i32 {
        return Err(ProbeError::ApiVersion(version));
    }
    let cpuid = CpuidTable::supported(kvm)?;
    let features = Features::from_cpuid(cpuid.entries());
    let mut guest = ProbeGuest::new(kvm, &cpuid)?;
    let (weakness, mut measurements) = guest.tests(depth)?;
    drop(guest);
    measurements.total = started.elapsed();
    let kvm = match weakness {
        Some(reason) => Kvm::Weak {
            reason,
            measurements,
        },
        None => Kvm::Hardware {
            vendor: vendor(&cpuid),
            measurements,
        },
    };
    Ok(Report {
        kvm,
        features: Some(features),
    })
}

fn vendor(cpuid: &CpuidTable) -> Vendor {
    let Some(leaf) = cpuid.entries().iter().find(|e| e.function == 0) else {
        return Vendor::Unknown;
    };
    let mut name = [0; 12];
    name[..4].copy_from_slice(&leaf.ebx.to_le_bytes());
    name[4..8].copy_from_slice(&leaf.edx.to_le_bytes());
    name[8..].copy_from_slice(&leaf.ecx.to_le_bytes());
    match &name {
        b"GenuineIntel" => Vendor::Vmx,
        b"AuthenticAMD" | b"HygonGenuine" => Vendor::Svm,
        _ => Vendor::Unknown,
    }
}

// --- Why it does not open --------------------------------------------------

fn why_not_open(error: std::io::Error) -> Kvm {
    match error.raw_os_error() {
        Some(ENOENT | ENOTDIR) => Kvm::Absent(why_absent()),
        Some(ENODEV | ENXIO) => Kvm::Absent(match why_absent() {
            Absence::NodeMissing | Absence::Container => Absence::NoDriver,
            other => other,
        }),
        // Device control groups of containers answer EPERM, file modes EACCES.
        Some(EPERM) if in_container() => Kvm::Absent(Absence::Container),
        Some(EACCES | EPERM) => Kvm::NoPermission {
            group: device_group(),
        },
        _ => Kvm::Broken(ProbeError::Open(error)),
    }
}

fn why_absent() -> Absence {
    let loaded = |module: &str| Path::new("/sys/module").join(module).exists();
    let any_loaded = loaded("kvm_intel") || loaded("kvm_amd");
    let flags = CpuFlags::read();
    match () {
        () if any_loaded && in_container() => Absence::Container,
        () if any_loaded => Absence::NodeMissing,
        () if flags.vmx => Absence::ModuleNotLoaded("kvm_intel"),
        () if flags.svm => Absence::ModuleNotLoaded("kvm_amd"),
        () if flags.hypervisor => Absence::NestedOff,
        () if flags.intel => Absence::FirmwareOff("Intel Virtualization Technology"),
        () => Absence::FirmwareOff("SVM Mode"),
    }
}

fn in_container() -> bool {
    Path::new("/.dockerenv").exists()
        || Path::new("/run/.containerenv").exists()
        || std::env::var_os("container").is_some()
}

fn device_group() -> String {
    let Ok(metadata) = std::fs::metadata(DEVICE) else {
        return "kvm".to_owned();
    };
    let gid = metadata.gid();
    // A device that only root may use belongs to group root; the group to
    // join is then the one that distributions give it.
    if gid == 0 {
        return "kvm".to_owned();
    }
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    group_name(&groups, gid).map_or_else(|| gid.to_string(), str::to_owned)
}

/// The name of group `gid` in the text of `/etc/group`.
fn group_name(groups: &str, gid: u32) -> Option<&str> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let id = fields.nth(1)?.parse::<u32>().ok()?;
        (id == gid).then_some(name)
    })
}

#[derive(Debug, Default, PartialEq, Eq)]
struct CpuFlags {
    intel: bool,
    vmx: bool,
    svm: bool,
    hypervisor: bool,
}

impl CpuFlags {
    fn read() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
    }

    fn parse(cpuinfo: &str) -> Self {
        let field = |name: &str| {
            cpuinfo
                .lines()
                .find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == name))
                .map_or("", |(_, value)| value)
        };
        let flags = field("flags");
        let has = |flag: &str| flags.split_ascii_whitespace().any(|f| f == flag);
        Self {
            intel: field("vendor_id").trim() == "GenuineIntel",
            vmx: has("vmx"),
            svm: has("svm"),
            hypervisor: has("hypervisor"),
        }
    }
}

// --- The probe guest -------------------------------------------------------

/// The guest's memory, one page each, at guest physical = guest virtual:
///
/// ```text
/// 0x0000 PML4   0x1000 PDPT   0x2000 PD   0x3000 PT   0x4000 code   0x5000 data
/// ```
///
/// All of it is mapped for both rings, read, write and execute: it holds
/// nothing to protect.
const GUEST_PAGES: usize = 6;
const PAGE: usize = 4096;
const CODE: u64 = 0x4000;
const DATA: u64 = 0x5000;

/// The port that each test writes to when it is done.
const PORT: u8 = 0xd5;

/// `syscall; hlt`
const SYSCALL_AT: u64 = CODE;
/// `mov eax, cs; out PORT, eax`
const LANDING_AT: u64 = CODE + 0x10;
/// `mov ecx, LOOP_ITERATIONS; 1: dec ecx; jnz 1b; out PORT, eax`
const LOOP_AT: u64 = CODE + 0x20;
/// `xorps xmm0, xmm0; movups [rdi], xmm0; out PORT, eax`
const SSE_AT: u64 = CODE + 0x40;

const CODE_PARTS: [(u64, &[u8]); 4] = [
    (SYSCALL_AT, &[0x0f, 0x05, 0xf4]),
    (LANDING_AT, &[0x8c, 0xc8, 0xe7, PORT]),
    (LOOP_AT, &{
        let n = LOOP_ITERATIONS.to_le_bytes();
        [
            0xb9, n[0], n[1], n[2], n[3], 0xff, 0xc9, 0x75, 0xfc, 0xe7, PORT,
        ]
    }),
    (SSE_AT, &[0x0f, 0x57, 0xc0, 0x0f, 0x11, 0x07, 0xe7, PORT]),
];

/// Selectors as `STAR` wants them: kernel code, kernel data, (user code 32),
/// user data, user code. There is no table behind them: the hidden parts are
/// loaded by `KVM_SET_SREGS`, and `SYSCALL` loads fixed ones.
const KERNEL_CODE: u16 = 0x08;
const USER_BASE: u16 = 0x10;
const USER_DATA: u16 = (USER_BASE + 8) | 3;
const USER_CODE: u16 = (USER_BASE + 16) | 3;

const CR0_PE_MP_ET_NE_WP_PG: u64 = 1 << 0 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
const CR4_PAE_OSFXSR_OSXMMEXCPT: u64 = 1 << 5 | 1 << 9 | 1 << 10;
const EFER_SCE_LME_LMA: u64 = 1 << 0 | 1 << 8 | 1 << 10;
const RFLAGS_FIXED: u64 = 1 << 1;
/// Lets ring 3 use `out` without a TSS.
const RFLAGS_IOPL_3: u64 = 3 << 12;

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_FMASK: u32 = 0xc000_0084;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ring {
    Kernel,
    User,
}

/// Fields are dropped in order: the vCPU before the VM before the memory that
/// both refer to.
struct ProbeGuest {
    run: Mapping,
    vcpu: OwnedFd,
    _vm: OwnedFd,
    _memory: Mapping,
}

impl ProbeGuest {
    fn new(kvm: Fd, cpuid: &CpuidTable) -> Result<Self, ProbeError> {
        let vm = kvm.ioctl_fd("KVM_CREATE_VM", KVM_CREATE_VM, 0)?;
        let vm_fd = Fd(vm.as_raw_fd());
        let memory = Mapping::new("mmap of the probe guest", GUEST_PAGES * PAGE, None)?;
        memory.fill_guest();
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: (GUEST_PAGES * PAGE) as u64,
            userspace_addr: memory.address as u64,
        };
        vm_fd.ioctl_ref(KVM_SET_USER_MEMORY_REGION, &region)?;
        let vcpu = vm_fd.ioctl_fd("KVM_CREATE_VCPU", KVM_CREATE_VCPU, 0)?;
        let vcpu_fd = Fd(vcpu.as_raw_fd());
        let run_size = kvm
            .ioctl("KVM_GET_VCPU_MMAP_SIZE", KVM_GET_VCPU_MMAP_SIZE, 0)?
            .max(PAGE as i32);
        let run = Mapping::new("mmap of kvm_run", run_size as usize, Some(vcpu_fd))?;
        vcpu_fd.ioctl_ref(KVM_SET_CPUID2, cpuid)?;
        let guest = Self {
            run,
            vcpu,
            _vm: vm,
            _memory: memory,
        };
        guest.set_syscall_msrs()?;
        Ok(guest)
    }

    fn set_syscall_msrs(&self) -> Result<(), ProbeError> {
        let entry = |index, data| kvm_msr_entry {
            index,
            data,
            ..kvm_msr_entry::default()
        };
        let msrs = MsrTable {
            nmsrs: 3,
            pad: 0,
            entries: [
                entry(
                    MSR_STAR,
                    u64::from(USER_BASE) << 48 | u64::from(KERNEL_CODE) << 32,
                ),
                entry(MSR_LSTAR, LANDING_AT),
                entry(MSR_FMASK, 0),
            ],
        };
        let set = self.vcpu_fd().ioctl_ref(KVM_SET_MSRS, &msrs)?;
        if set == 3 {
            Ok(())
        } else {
            Err(ProbeError::Call {
                call: "KVM_SET_MSRS",
                error: std::io::Error::from_raw_os_error(EINVAL),
            })
        }
    }

    /// The three tests, in the order that decides soonest.
    fn tests(&mut self, depth: Depth) -> Result<(Option<Weakness>, Measurements), ProbeError> {
        let mut found = Measurements::default();
        let mut weakness = None;
        let enough =
            |weakness: &Option<Weakness>| weakness.is_some() && depth == Depth::UntilDecided;

        let cpl = self.syscall_cpl()?;
        found.syscall_cpl = Some(cpl);
        if cpl != 0 {
            weakness = Some(Weakness::SyscallKeepsRing(cpl));
        }
        if enough(&weakness) {
            return Ok((weakness, found));
        }

        let best = self.ring0_loop()?;
        found.ring0_loop = Some(best);
        if best >= LOOP_LIMIT {
            weakness = weakness.or(Some(Weakness::Ring0Interpreted(best)));
        }
        if enough(&weakness) {
            return Ok((weakness, found));
        }

        // Last, because a vCPU may be of no more use after an internal error.
        let sse = self.ring0_sse()?;
        found.ring0_sse = Some(sse);
        if !sse {
            weakness = weakness.or(Some(Weakness::NoVectorsAtRing0));
        }
        Ok((weakness, found))
    }

    fn syscall_cpl(&mut self) -> Result<u8, ProbeError> {
        const STEP: &str = "at a SYSCALL from ring 3";
        self.place(Ring::User, SYSCALL_AT)?;
        match self.run()? {
            KVM_EXIT_IO => {
                let mut regs = kvm_regs::default();
                self.vcpu_fd().ioctl_mut(KVM_GET_REGS, &mut regs)?;
                Ok((regs.rax & 3) as u8)
            }
            exit => Err(ProbeError::Exit {
                step: STEP,
                exit: ExitName(exit),
            }),
        }
    }

    fn ring0_loop(&mut self) -> Result<Duration, ProbeError> {
        const STEP: &str = "in a loop at ring 0";
        let mut best = Duration::MAX;
        for _ in 0..LOOP_ATTEMPTS {
            self.place(Ring::Kernel, LOOP_AT)?;
            let started = Instant::now();
            let exit = self.run()?;
            best = best.min(started.elapsed());
            if exit != KVM_EXIT_IO {
                return Err(ProbeError::Exit {
                    step: STEP,
                    exit: ExitName(exit),
                });
            }
            if best < LOOP_LIMIT {
                break;
            }
        }
        Ok(best)
    }

    fn ring0_sse(&mut self) -> Result<bool, ProbeError> {
        self.place(Ring::Kernel, SSE_AT)?;
        Ok(self.run()? == KVM_EXIT_IO)
    }

    /// Puts the vCPU into long mode at `rip` in `ring`.
    fn place(&mut self, ring: Ring, rip: u64) -> Result<(), ProbeError> {
        let dpl = if ring == Ring::User { 3 } else { 0 };
        let (code, data) = match ring {
            Ring::Kernel => (KERNEL_CODE, KERNEL_CODE + 8),
            Ring::User => (USER_CODE, USER_DATA),
        };
        let segment = |selector, type_, l| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            dpl,
            db: 1 - l,
            s: 1,
            l,
            g: 1,
            ..kvm_segment::default()
        };
        let mut sregs = kvm_sregs::default();
        self.vcpu_fd().ioctl_mut(KVM_GET_SREGS, &mut sregs)?;
        sregs.cs = segment(code, 0xb, 1);
        let data = segment(data, 0x3, 0);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment {
            type_: 0xb,
            present: 1,
            limit: 0x67,
            ..kvm_segment::default()
        };
        sregs.ldt = kvm_segment {
            unusable: 1,
            ..kvm_segment::default()
        };
        sregs.gdt = kvm_dtable::default();
        sregs.idt = kvm_dtable::default();
        sregs.cr0 = CR0_PE_MP_ET_NE_WP_PG;
        sregs.cr3 = 0;
        sregs.cr4 = CR4_PAE_OSFXSR_OSXMMEXCPT;
        sregs.efer = EFER_SCE_LME_LMA;
        self.vcpu_fd().ioctl_ref(KVM_SET_SREGS, &sregs)?;
        let regs = kvm_regs {
            rip,
            rsp: DATA + PAGE as u64 / 2,
            rdi: DATA,
            rflags: RFLAGS_FIXED | if ring == Ring::User { RFLAGS_IOPL_3 } else { 0 },
            ..kvm_regs::default()
        };
        self.vcpu_fd().ioctl_ref(KVM_SET_REGS, &regs)?;
        Ok(())
    }

    /// Runs until an exit that is not a signal's and returns its reason.
    fn run(&mut self) -> Result<u32, ProbeError> {
        loop {
            match self.vcpu_fd().ioctl("KVM_RUN", KVM_RUN, 0) {
                Ok(_) => break,
                Err(ProbeError::Call { error, .. })
                    if matches!(error.raw_os_error(), Some(EINTR | EAGAIN)) => {}
                Err(error) => return Err(error),
            }
        }
        let run = self.run.address.cast::<kvm_run>();
        // SAFETY: `run` maps a whole `kvm_run`, which KVM filled before
        // `KVM_RUN` came back and does not touch now.
        Ok(unsafe { (*run).exit_reason })
    }

    fn vcpu_fd(&self) -> Fd {
        Fd(self.vcpu.as_raw_fd())
    }
}

/// A private mapping, unmapped when dropped.
struct Mapping {
    address: *mut u8,
    len: usize,
}

impl Mapping {
    /// Anonymous memory, or `file`'s first `len` bytes, shared.
    fn new(call: &'static str, len: usize, file: Option<Fd>) -> Result<Self, ProbeError> {
        let flags = if file.is_some() {
            MAP_SHARED
        } else {
            MAP_PRIVATE | MAP_ANONYMOUS
        };
        let fd = file.map_or(-1, |fd| fd.0);
        // SAFETY: no address is given, so that nothing mapped can be replaced.
        let address = unsafe {
            syscall6(
                SYS_MMAP,
                0,
                len,
                PROT_READ | PROT_WRITE,
                flags,
                fd as usize,
                0,
            )
        };
        match check(call, address) {
            Ok(_) => Ok(Self {
                address: address as *mut u8,
                len,
            }),
            Err(error) => Err(error),
        }
    }

    /// Writes page tables and code.
    fn fill_guest(&self) {
        const PRESENT_WRITE_USER: u64 = 7;
        let entry = |index: usize, value: u64| {
            assert!(
                index < GUEST_PAGES * PAGE / 8,
                "entry {index} lies outside the guest"
            );
            // SAFETY: just checked.
            let slot = unsafe { self.address.cast::<u64>().add(index) };
            // SAFETY: the slot lies in memory that this object owns.
            unsafe { slot.write(value | PRESENT_WRITE_USER) };
        };
        let table = |number: usize| number * PAGE / 8;
        entry(table(0), 0x1000);
        entry(table(1), 0x2000);
        entry(table(2), 0x3000);
        for page in 0..GUEST_PAGES {
            entry(table(3) + page, (page * PAGE) as u64);
        }
        for (at, bytes) in CODE_PARTS {
            // SAFETY: the parts are short and lie within the code page.
            let to = unsafe { self.address.add(at as usize) };
            // SAFETY: as above, and a slice of constants overlaps no mapping.
            unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this object mapped the range, and nothing borrows from it.
        unsafe { syscall6(SYS_MUNMAP, self.address as usize, self.len, 0, 0, 0, 0) };
    }
}

// --- KVM's interface, as far as the probe needs it -------------------------

const MAX_CPUID_ENTRIES: usize = 256;

#[repr(C)]
struct CpuidTable {
    nent: u32,
    padding: u32,
    entries: [kvm_cpuid_entry2; MAX_CPUID_ENTRIES],
}

impl CpuidTable {
    fn supported(kvm: Fd) -> Result<Box<Self>, ProbeError> {
        let mut table = Box::new(Self {
            nent: MAX_CPUID_ENTRIES as u32,
            padding: 0,
            entries: [kvm_cpuid_entry2::default(); MAX_CPUID_ENTRIES],
        });
        kvm.ioctl_mut(KVM_GET_SUPPORTED_CPUID, &mut *table)?;
        Ok(table)
    }

    fn entries(&self) -> &[kvm_cpuid_entry2] {
        &self.entries[..(self.nent as usize).min(MAX_CPUID_ENTRIES)]
    }
}

#[repr(C)]
struct MsrTable {
    nmsrs: u32,
    pad: u32,
    entries: [kvm_msr_entry; 3],
}

/// The number of an ioctl that takes a pointer to a `T`, so that no other type
/// can be handed to it.
struct Request<T> {
    name: &'static str,
    number: usize,
    argument: PhantomData<fn(T)>,
}

/// Directions as the number encodes them.
const WRITE: usize = 1;
const READ: usize = 2;

const fn plain(number: usize) -> usize {
    0xae << 8 | number
}

impl<T> Request<T> {
    const fn new(name: &'static str, direction: usize, number: usize, size: usize) -> Self {
        let number = direction << 30 | size << 16 | plain(number);
        Self {
            name,
            number,
            argument: PhantomData,
        }
    }
}

const KVM_GET_API_VERSION: usize = plain(0x00);
const KVM_CREATE_VM: usize = plain(0x01);
const KVM_GET_VCPU_MMAP_SIZE: usize = plain(0x04);
const KVM_CREATE_VCPU: usize = plain(0x41);
const KVM_RUN: usize = plain(0x80);
/// What the numbers of the two tables of variable length encode: their headers.
const TABLE_HEADER: usize = 8;
const KVM_GET_SUPPORTED_CPUID: Request<CpuidTable> =
    Request::new("KVM_GET_SUPPORTED_CPUID", READ | WRITE, 0x05, TABLE_HEADER);
const KVM_SET_USER_MEMORY_REGION: Request<kvm_userspace_memory_region> = Request::new(
    "KVM_SET_USER_MEMORY_REGION",
    WRITE,
    0x46,
    size_of::<kvm_userspace_memory_region>(),
);
const KVM_GET_REGS: Request<kvm_regs> =
    Request::new("KVM_GET_REGS", READ, 0x81, size_of::<kvm_regs>());
const KVM_SET_REGS: Request<kvm_regs> =
    Request::new("KVM_SET_REGS", WRITE, 0x82, size_of::<kvm_regs>());
const KVM_GET_SREGS: Request<kvm_sregs> =
    Request::new("KVM_GET_SREGS", READ, 0x83, size_of::<kvm_sregs>());
const KVM_SET_SREGS: Request<kvm_sregs> =
    Request::new("KVM_SET_SREGS", WRITE, 0x84, size_of::<kvm_sregs>());
const KVM_SET_MSRS: Request<MsrTable> = Request::new("KVM_SET_MSRS", WRITE, 0x89, TABLE_HEADER);
const KVM_SET_CPUID2: Request<CpuidTable> =
    Request::new("KVM_SET_CPUID2", WRITE, 0x90, TABLE_HEADER);

const SYS_MMAP: usize = 9;
const SYS_MUNMAP: usize = 11;
const SYS_IOCTL: usize = 16;

const PROT_READ: usize = 1;
const PROT_WRITE: usize = 2;
const MAP_SHARED: usize = 1;
const MAP_PRIVATE: usize = 2;
const MAP_ANONYMOUS: usize = 0x20;

const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const EINTR: i32 = 4;
const ENXIO: i32 = 6;
const EAGAIN: i32 = 11;
const ENOMEM: i32 = 12;
const EACCES: i32 = 13;
const EBUSY: i32 = 16;
const ENODEV: i32 = 19;
const ENOTDIR: i32 = 20;
const EINVAL: i32 = 22;
const ENFILE: i32 = 23;
const EMFILE: i32 = 24;

/// A borrowed descriptor of KVM.
#[derive(Clone, Copy)]
struct Fd(i32);

impl Fd {
    /// An ioctl whose argument is no pointer.
    fn ioctl(self, call: &'static str, number: usize, value: usize) -> Result<i32, ProbeError> {
        // SAFETY: the numbers passed here take no pointer; `KVM_RUN` writes
        // only to the guest's own memory and to `kvm_run`.
        let result = unsafe { syscall6(SYS_IOCTL, self.0 as usize, number, value, 0, 0, 0) };
        check(call, result).map(|value| value as i32)
    }

    /// An ioctl that makes a new descriptor.
    fn ioctl_fd(
        self,
        call: &'static str,
        number: usize,
        value: usize,
    ) -> Result<OwnedFd, ProbeError> {
        let fd = self.ioctl(call, number, value)?;
        // SAFETY: KVM has just made the descriptor for this caller alone.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// An ioctl that reads a `T`.
    fn ioctl_ref<T>(self, request: Request<T>, argument: &T) -> Result<i32, ProbeError> {
        let address = std::ptr::from_ref(argument) as usize;
        // SAFETY: the request takes a pointer to a `T` and only reads it (its
        // direction is WRITE, seen from this side).
        let result =
            unsafe { syscall6(SYS_IOCTL, self.0 as usize, request.number, address, 0, 0, 0) };
        check(request.name, result).map(|value| value as i32)
    }

    /// An ioctl that fills a `T`.
    fn ioctl_mut<T>(self, request: Request<T>, argument: &mut T) -> Result<i32, ProbeError> {
        let address = std::ptr::from_mut(argument) as usize;
        // SAFETY: the request takes a pointer to a `T`, all of whose bit
        // patterns are values, and writes no more than that.
        let result =
            unsafe { syscall6(SYS_IOCTL, self.0 as usize, request.number, address, 0, 0, 0) };
        check(request.name, result).map(|value| value as i32)
    }
}

/// A system call without libc, so that the probe may run at any time, `errno`
/// or not.
///
/// # Safety
///
/// The call must be sound with these arguments.
unsafe fn syscall6(
    number: usize,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
) -> isize {
    let result: isize;
    // SAFETY: the kernel changes rax, rcx and r11 and what the caller answers
    // for.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            in("r9") f,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

fn check(call: &'static str, result: isize) -> Result<usize, ProbeError> {
    match usize::try_from(result) {
        Ok(value) => Ok(value),
        Err(_) => Err(ProbeError::Call {
            call,
            error: std::io::Error::from_raw_os_error(-result as i32),
        }),
    }
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
            assert!(first.features.is_some());
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

    #[test]
    fn groups_are_named() {
        let groups = "root:x:0:\nkvm:x:105:alice\nbroken\nusers:x:100:\n";
        assert_eq!(group_name(groups, 105), Some("kvm"));
        assert_eq!(group_name(groups, 7), None);
    }

    #[test]
    fn cpu_flags_are_whole_words() {
        let flags =
            CpuFlags::parse("vendor_id\t: GenuineIntel\nflags\t\t: fpu vmxish hypervisor\n");
        assert_eq!(
            flags,
            CpuFlags {
                intel: true,
                vmx: false,
                svm: false,
                hypervisor: true
            }
        );
        assert!(CpuFlags::parse("flags : svm vmx").svm);
        assert_eq!(CpuFlags::parse(""), CpuFlags::default());
    }

    fn report(kvm: Kvm) -> Report {
        Report {
            kvm,
            features: None,
        }
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

    #[test]
    fn placements_have_names() {
        for placement in [Placement::InGuest, Placement::OnHost, Placement::Lab] {
            assert_eq!(
                placement.name().parse(),
                Ok(PlacementRequest::Only(placement))
            );
        }
        assert_eq!("auto".parse(), Ok(PlacementRequest::Auto));
        let error = "moon".parse::<PlacementRequest>().unwrap_err().to_string();
        assert!(error.contains("moon") && error.contains("lab"), "{error}");
    }
}
