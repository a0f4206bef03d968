//! The auxiliary vector: what the kernel tells a program beside its arguments.
//!
//! Keys and values are those of x86-64 Linux (psABI, section 3.4.3). What a
//! program under Dune must not have is left out: `AT_RSEQ_FEATURE_SIZE` and
//! `AT_RSEQ_ALIGN` (the kernel never sees the program's instruction pointer, so
//! restartable sequences cannot work), and `AT_SYSINFO_EHDR` unless the caller
//! has put a vDSO into user memory (without one, libc uses system calls).

use std::io;

use crate::addr::{PAGE_SIZE, UserAddr};
use crate::elf::PROGRAM_HEADER_LEN;
use crate::plan::LoadPlan;

/// What kind of value an entry holds (`AT_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AuxKey(pub u64);

impl AuxKey {
    /// End of the vector.
    pub const NULL: Self = Self(0);
    /// Address of the program headers.
    pub const PHDR: Self = Self(3);
    /// Size of a program header, in bytes.
    pub const PHENT: Self = Self(4);
    /// Number of program headers.
    pub const PHNUM: Self = Self(5);
    /// Page size, in bytes.
    pub const PAGESZ: Self = Self(6);
    /// Load bias of the ELF interpreter; 0 without one.
    pub const BASE: Self = Self(7);
    /// Flags; none are defined.
    pub const FLAGS: Self = Self(8);
    /// The program's own entry point.
    pub const ENTRY: Self = Self(9);
    /// Real user id.
    pub const UID: Self = Self(11);
    /// Effective user id.
    pub const EUID: Self = Self(12);
    /// Real group id.
    pub const GID: Self = Self(13);
    /// Effective group id.
    pub const EGID: Self = Self(14);
    /// Address of the string `x86_64`.
    pub const PLATFORM: Self = Self(15);
    /// CPU features: EDX of CPUID leaf 1.
    pub const HWCAP: Self = Self(16);
    /// Clock ticks a second, of `times`.
    pub const CLKTCK: Self = Self(17);
    /// 1 when the program runs with more rights than its caller.
    pub const SECURE: Self = Self(23);
    /// Address of 16 random bytes.
    pub const RANDOM: Self = Self(25);
    /// More CPU features, those that the kernel must have enabled.
    pub const HWCAP2: Self = Self(26);
    /// Address of the path given to `execve`.
    pub const EXECFN: Self = Self(31);
    /// Address of the vDSO.
    pub const SYSINFO_EHDR: Self = Self(33);
    /// Smallest stack for a signal handler, in bytes.
    pub const MINSIGSTKSZ: Self = Self(51);
}

/// One entry of the vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuxEntry {
    /// The kind of value.
    pub key: AuxKey,
    /// The value.
    pub value: u64,
}

/// Reads a vector in its memory form, as in `/proc/PID/auxv`, up to its end.
pub fn parse_auxv(bytes: &[u8]) -> impl Iterator<Item = AuxEntry> + '_ {
    bytes
        .as_chunks::<16>()
        .0
        .iter()
        .map(|chunk| {
            let pair = u128::from_le_bytes(*chunk);
            AuxEntry {
                key: AuxKey(pair as u64),
                value: (pair >> 64) as u64,
            }
        })
        .take_while(|entry| entry.key != AuxKey::NULL)
}

/// The identity that a program sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// Real user id.
    pub uid: u32,
    /// Effective user id.
    pub euid: u32,
    /// Real group id.
    pub gid: u32,
    /// Effective group id.
    pub egid: u32,
}

impl Ids {
    /// Those of this process.
    #[must_use]
    pub fn of_this_process() -> Self {
        Self {
            uid: rustix::process::getuid().as_raw(),
            euid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            egid: rustix::process::getegid().as_raw(),
        }
    }

    /// Whether libc must distrust the environment (`AT_SECURE`).
    #[must_use]
    pub fn is_secure(&self) -> bool {
        self.uid != self.euid || self.gid != self.egid
    }
}

/// Properties of the machine and kernel that a program sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// `AT_HWCAP`.
    pub hwcap: u64,
    /// `AT_HWCAP2`.
    pub hwcap2: u64,
    /// `AT_CLKTCK`, a second.
    pub clock_ticks: u64,
    /// `AT_MINSIGSTKSZ`, in bytes; it depends on the extended state.
    pub min_signal_stack: u64,
}

impl Machine {
    /// `HWCAP2` bit: MWAIT in ring 3, a setting of the host thread that no
    /// virtual CPU inherits.
    const RING3_MWAIT: u64 = 1 << 0;
    /// Size of a signal frame with the largest extended state without AMX, for
    /// kernels before 5.14, which do not tell.
    const DEFAULT_MIN_SIGNAL_STACK: u64 = 3632;

    /// Those the host kernel told this process, less what does not hold in a
    /// virtual CPU.
    ///
    /// # Errors
    ///
    /// Those of reading `/proc/self/auxv`.
    pub fn of_host() -> io::Result<Self> {
        Ok(Self::from_auxv(&std::fs::read("/proc/self/auxv")?))
    }

    fn from_auxv(bytes: &[u8]) -> Self {
        let value = |key| {
            parse_auxv(bytes)
                .find(|entry| entry.key == key)
                .map(|entry| entry.value)
        };
        Self {
            hwcap: value(AuxKey::HWCAP).unwrap_or(0),
            hwcap2: value(AuxKey::HWCAP2).unwrap_or(0) & !Self::RING3_MWAIT,
            clock_ticks: value(AuxKey::CLKTCK).unwrap_or(100),
            min_signal_stack: value(AuxKey::MINSIGSTKSZ).unwrap_or(Self::DEFAULT_MIN_SIGNAL_STACK),
        }
    }
}

/// What the vector is made from.
#[derive(Clone, Copy, Debug)]
pub struct AuxvInputs<'a> {
    /// The placed program.
    pub plan: &'a LoadPlan,
    /// The identity it sees.
    pub ids: Ids,
    /// The machine it sees.
    pub machine: Machine,
    /// 16 bytes from a good source, fresh for each program: libc takes its
    /// stack protector's and pointer guard's secrets from them.
    pub random: [u8; 16],
    /// Where a vDSO image has been put, if anywhere.
    pub vdso: Option<UserAddr>,
}

/// Where the stack holds what entries point at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AuxPointers {
    pub(crate) random: UserAddr,
    pub(crate) platform: UserAddr,
    pub(crate) filename: UserAddr,
}

impl AuxvInputs<'_> {
    /// The number of entries, the closing one included.
    pub(crate) fn entry_count(&self) -> usize {
        // The pointers' values do not change how many there are.
        let nowhere = self.plan.entry;
        let pointers = AuxPointers {
            random: nowhere,
            platform: nowhere,
            filename: nowhere,
        };
        self.entries(&pointers).count()
    }

    /// All entries in Linux's order, the closing one included.
    pub(crate) fn entries(&self, at: &AuxPointers) -> impl Iterator<Item = AuxEntry> {
        let plan = self.plan;
        let vdso = self.vdso.map(|vdso| (AuxKey::SYSINFO_EHDR, vdso.get()));
        let linker_bias = plan
            .interpreter
            .as_ref()
            .map_or(0, |linker| linker.load_bias);
        let rest = [
            (AuxKey::MINSIGSTKSZ, self.machine.min_signal_stack),
            (AuxKey::HWCAP, self.machine.hwcap),
            (AuxKey::PAGESZ, PAGE_SIZE),
            (AuxKey::CLKTCK, self.machine.clock_ticks),
            (AuxKey::PHDR, plan.headers.map_or(0, UserAddr::get)),
            (AuxKey::PHENT, PROGRAM_HEADER_LEN),
            (AuxKey::PHNUM, plan.header_count.into()),
            (AuxKey::BASE, linker_bias),
            (AuxKey::FLAGS, 0),
            (AuxKey::ENTRY, plan.entry.get()),
            (AuxKey::UID, self.ids.uid.into()),
            (AuxKey::EUID, self.ids.euid.into()),
            (AuxKey::GID, self.ids.gid.into()),
            (AuxKey::EGID, self.ids.egid.into()),
            (AuxKey::SECURE, self.ids.is_secure().into()),
            (AuxKey::RANDOM, at.random.get()),
            (AuxKey::HWCAP2, self.machine.hwcap2),
            (AuxKey::EXECFN, at.filename.get()),
            (AuxKey::PLATFORM, at.platform.get()),
            (AuxKey::NULL, 0),
        ];
        vdso.into_iter()
            .chain(rest)
            .map(|(key, value)| AuxEntry { key, value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(pairs: &[(AuxKey, u64)]) -> Vec<u8> {
        pairs
            .iter()
            .flat_map(|(key, value)| [key.0, *value])
            .flat_map(u64::to_le_bytes)
            .collect()
    }

    #[test]
    fn a_vector_is_read_up_to_its_end() {
        let uid = AuxEntry {
            key: AuxKey::UID,
            value: 7,
        };
        let whole = bytes_of(&[(AuxKey::UID, 7), (AuxKey::NULL, 0), (AuxKey::GID, 8)]);
        assert_eq!(parse_auxv(&whole).collect::<Vec<_>>(), [uid]);
        assert_eq!(
            parse_auxv(&whole[..16 + 15]).collect::<Vec<_>>(),
            [uid],
            "cut"
        );
        assert_eq!(parse_auxv(&[]).next(), None);
    }

    #[test]
    fn the_machine_is_the_host_s_less_what_a_virtual_cpu_lacks() {
        let told = bytes_of(&[(AuxKey::HWCAP, 0xbfeb), (AuxKey::HWCAP2, 3)]);
        let machine = Machine::from_auxv(&told);
        assert_eq!((machine.hwcap, machine.hwcap2), (0xbfeb, 2));
        assert_eq!((machine.clock_ticks, machine.min_signal_stack), (100, 3632));
        assert!(Machine::of_host().unwrap().hwcap != 0);
    }
}
