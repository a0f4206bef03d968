//! Why `/dev/kvm` does not open, and what to do about it.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{DEVICE, Kvm, ProbeError};
use crate::sys::Errno;

const EPERM: Errno = Errno(1);
const ENOENT: Errno = Errno(2);
const ENXIO: Errno = Errno(6);
const ENODEV: Errno = Errno(19);
const ENOTDIR: Errno = Errno(20);

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

/// The verdict for what `open` answered.
pub(super) fn why_not_open(errno: Errno) -> Kvm {
    match errno {
        ENOENT | ENOTDIR => Kvm::Absent(why_absent()),
        ENODEV | ENXIO => Kvm::Absent(match why_absent() {
            Absence::NodeMissing | Absence::Container => Absence::NoDriver,
            other => other,
        }),
        // Device control groups of containers answer EPERM, file modes EACCES.
        EPERM if in_container() => Kvm::Absent(Absence::Container),
        Errno::EACCES | EPERM => Kvm::NoPermission {
            group: device_group(),
        },
        _ => Kvm::Broken(ProbeError::Open(errno)),
    }
}

fn why_absent() -> Absence {
    // The kernel's own list of drivers, which containers see as well.
    let driver = Path::new("/sys/class/misc/kvm").exists();
    let flags = CpuFlags::read();
    match () {
        () if driver && in_container() => Absence::Container,
        () if driver => Absence::NodeMissing,
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

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn every_refusal_has_a_verdict() {
        assert!(matches!(why_not_open(ENOENT), Kvm::Absent(_)));
        assert!(matches!(why_not_open(ENODEV), Kvm::Absent(_)));
        assert!(matches!(
            why_not_open(Errno::EACCES),
            Kvm::NoPermission { .. }
        ));
        let Kvm::Broken(error) = why_not_open(Errno(24)) else {
            panic!("EMFILE is no absence");
        };
        assert!(error.to_string().contains("ulimit"), "{error}");
    }
}
