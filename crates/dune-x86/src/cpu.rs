//! What a CPU can do, from its `CPUID` leaves, and the bits of its control
//! registers.

#![forbid(unsafe_code)]

use core::fmt;

use bitflags::bitflags;

use crate::addr::GuestPhys;
use crate::pcid::Pcid;

/// The four registers that `CPUID` returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidResult {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

impl From<(u32, u32, u32, u32)> for CpuidResult {
    fn from((eax, ebx, ecx, edx): (u32, u32, u32, u32)) -> Self {
        Self { eax, ebx, ecx, edx }
    }
}

/// Who made the CPU.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Vendor {
    /// "GenuineIntel".
    Intel,
    /// "AuthenticAMD".
    Amd,
    /// "HygonGenuine": AMD's architecture under another name.
    Hygon,
    /// Someone else, with the name that the CPU gives.
    Other([u8; 12]),
}

impl Vendor {
    fn from_name(name: [u8; 12]) -> Self {
        match &name {
            b"GenuineIntel" => Self::Intel,
            b"AuthenticAMD" => Self::Amd,
            b"HygonGenuine" => Self::Hygon,
            _ => Self::Other(name),
        }
    }
}

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Intel => f.write_str("Intel"),
            Self::Amd => f.write_str("AMD"),
            Self::Hygon => f.write_str("Hygon"),
            Self::Other(name) => write!(f, "{}", name.escape_ascii()),
        }
    }
}

impl fmt::Debug for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

bitflags! {
    /// Features that Dune uses or reports. The leaf and bit that each comes
    /// from are in SDM vol. 2A, `CPUID`, and APM vol. 3, appendix E.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// Supervisor-mode execution prevention (7.0 EBX 7).
        const SMEP = 1 << 0;
        /// Supervisor-mode access prevention (7.0 EBX 20).
        const SMAP = 1 << 1;
        /// Protection keys for user pages (7.0 ECX 3).
        const PKU = 1 << 2;
        /// Process-context identifiers (1 ECX 17).
        const PCID = 1 << 3;
        /// The `INVPCID` instruction (7.0 EBX 10).
        const INVPCID = 1 << 4;
        /// `RDFSBASE` and its kin (7.0 EBX 0).
        const FSGSBASE = 1 << 5;
        /// User-mode instruction prevention (7.0 ECX 2).
        const UMIP = 1 << 6;
        /// `XSAVE`, `XRSTOR`, `XSETBV` and `XGETBV` (1 ECX 26).
        const XSAVE = 1 << 7;
        /// `XSAVEOPT` (D.1 EAX 0).
        const XSAVEOPT = 1 << 8;
        /// `XSAVEC` and the compacted `XRSTOR` (D.1 EAX 1).
        const XSAVEC = 1 << 9;
        /// `XGETBV` with ECX = 1 (D.1 EAX 2).
        const XGETBV1 = 1 << 10;
        /// 1 GiB pages (8000_0001 EDX 26).
        const GIB_PAGES = 1 << 11;
        /// 57-bit virtual addresses (7.0 ECX 16).
        const LA57 = 1 << 12;
        /// Execute-disable (8000_0001 EDX 20).
        const NX = 1 << 13;
        /// `RDPID` (7.0 ECX 22).
        const RDPID = 1 << 14;
        /// `RDTSCP` (8000_0001 EDX 27).
        const RDTSCP = 1 << 15;
        /// `SYSCALL` and `SYSRET` in 64-bit mode (8000_0001 EDX 11).
        const SYSCALL = 1 << 16;
        /// Global pages (1 EDX 13).
        const PGE = 1 << 17;
        /// The page attribute table (1 EDX 16).
        const PAT = 1 << 18;
        /// The TSC ticks at one rate in all power states (8000_0007 EDX 8).
        const INVARIANT_TSC = 1 << 19;
        /// Intel's virtualisation, VT-x (1 ECX 5).
        const VMX = 1 << 20;
        /// AMD's virtualisation (8000_0001 ECX 2).
        const SVM = 1 << 21;
        /// This CPU is a virtual one (1 ECX 31).
        const HYPERVISOR = 1 << 22;
        /// AVX (1 ECX 28).
        const AVX = 1 << 23;
        /// AVX2 (7.0 EBX 5).
        const AVX2 = 1 << 24;
        /// AVX-512 foundation (7.0 EBX 16).
        const AVX512F = 1 << 25;
        /// `REP MOVSB` and `REP STOSB` are fast (7.0 EBX 9).
        const ERMS = 1 << 26;
    }
}

/// How `XSAVE` lays out the components (SDM vol. 1 sections 13.4.2 and
/// 13.4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XsaveFormat {
    /// Each at its own fixed offset (`XSAVE`, `XSAVEOPT`).
    Standard,
    /// One after the other, without those that are not asked for (`XSAVEC`).
    Compacted,
}

/// Where a component of the extended state is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Component {
    bytes: u32,
    offset: u32,
    aligned: bool,
}

/// The bytes of the legacy region and the header, which every XSAVE area has
/// (SDM vol. 1 section 13.4).
pub const XSAVE_HEADER_END: u32 = 512 + 64;

/// What a CPU can do.
#[derive(Clone, Copy, Debug)]
pub struct CpuFeatures {
    /// Who made it.
    pub vendor: Vendor,
    /// What it has.
    pub features: Features,
    /// Physical address bits (MAXPHYADDR).
    pub physical_bits: u8,
    /// Virtual address bits.
    pub virtual_bits: u8,
    /// The bits that may be set in XCR0, 0 without XSAVE.
    pub xcr0_supported: u64,
    components: [Component; 63],
}

impl CpuFeatures {
    /// Reads the features from what `cpuid(leaf, subleaf)` returns: EAX, EBX,
    /// ECX and EDX, as the instruction does or a table of `KVM_GET_SUPPORTED_CPUID`
    /// (0 for what it has no entry for).
    pub fn from_cpuid(cpuid: impl Fn(u32, u32) -> (u32, u32, u32, u32)) -> Self {
        let basic = CpuidResult::from(cpuid(0, 0));
        let extended_leaves = CpuidResult::from(cpuid(0x8000_0000, 0)).eax;
        // Leaves beyond the last are answered with those of another leaf (SDM
        // vol. 2A, CPUID), so they must not be asked for.
        let leaf = |leaf: u32, subleaf: u32| {
            let last = if leaf >= 0x8000_0000 {
                extended_leaves
            } else {
                basic.eax
            };
            if leaf <= last {
                cpuid(leaf, subleaf).into()
            } else {
                CpuidResult::default()
            }
        };
        let one = leaf(1, 0);
        let seven = leaf(7, 0);
        let extended = leaf(0x8000_0001, 0);
        let power = leaf(0x8000_0007, 0);
        let sizes = leaf(0x8000_0008, 0);

        let mut features = Features::empty();
        let mut note = |register: u32, bits: &[(u32, Features)]| {
            for &(bit, feature) in bits {
                features.set(feature, register & (1 << bit) != 0);
            }
        };
        note(
            one.ecx,
            &[
                (5, Features::VMX),
                (17, Features::PCID),
                (26, Features::XSAVE),
                (28, Features::AVX),
                (31, Features::HYPERVISOR),
            ],
        );
        note(one.edx, &[(13, Features::PGE), (16, Features::PAT)]);
        note(
            seven.ebx,
            &[
                (0, Features::FSGSBASE),
                (5, Features::AVX2),
                (7, Features::SMEP),
                (9, Features::ERMS),
                (10, Features::INVPCID),
                (16, Features::AVX512F),
                (20, Features::SMAP),
            ],
        );
        note(
            seven.ecx,
            &[
                (2, Features::UMIP),
                (3, Features::PKU),
                (16, Features::LA57),
                (22, Features::RDPID),
            ],
        );
        note(extended.ecx, &[(2, Features::SVM)]);
        note(
            extended.edx,
            &[
                (11, Features::SYSCALL),
                (20, Features::NX),
                (26, Features::GIB_PAGES),
                (27, Features::RDTSCP),
            ],
        );
        note(power.edx, &[(8, Features::INVARIANT_TSC)]);

        let mut xcr0_supported = 0;
        let mut components = [Component::default(); 63];
        if one.ecx & (1 << 26) != 0 {
            let zero = leaf(0xd, 0);
            xcr0_supported = u64::from(zero.eax) | u64::from(zero.edx) << 32;
            note(
                leaf(0xd, 1).eax,
                &[
                    (0, Features::XSAVEOPT),
                    (1, Features::XSAVEC),
                    (2, Features::XGETBV1),
                ],
            );
            for (number, component) in (0_u32..).zip(&mut components).skip(2) {
                if xcr0_supported & (1 << number) != 0 {
                    let result = leaf(0xd, number);
                    *component = Component {
                        bytes: result.eax,
                        offset: result.ebx,
                        aligned: result.ecx & 0b10 != 0,
                    };
                }
            }
        }

        let mut name = [0; 12];
        for (bytes, register) in name
            .chunks_exact_mut(4)
            .zip([basic.ebx, basic.edx, basic.ecx])
        {
            bytes.copy_from_slice(&register.to_le_bytes());
        }
        // A CPU without leaf 8000_0008 has 36 physical and 32 virtual bits, 48
        // of them when it has long mode (SDM vol. 3A section 4.1.4).
        let or = |bits: u32, default: u8| match bits & 0xff {
            0 => default,
            bits => bits as u8,
        };
        Self {
            vendor: Vendor::from_name(name),
            features,
            physical_bits: or(sizes.eax, 36),
            virtual_bits: or(sizes.eax >> 8, 48),
            xcr0_supported,
            components,
        }
    }

    /// Whether all of these features are there.
    #[inline]
    pub const fn has(&self, features: Features) -> bool {
        self.features.contains(features)
    }

    /// The bytes of an XSAVE area for the components in `mask` (bits as in
    /// XCR0), or `None` when one of them is not supported. The area must be
    /// aligned to 64 bytes.
    pub fn xsave_bytes(&self, mask: u64, format: XsaveFormat) -> Option<u32> {
        if mask & !self.xcr0_supported != 0 {
            return None;
        }
        let mut end = XSAVE_HEADER_END;
        for (number, component) in self.components.iter().enumerate().skip(2) {
            if mask & (1 << number) == 0 {
                continue;
            }
            end = match format {
                XsaveFormat::Standard => end.max(component.offset.checked_add(component.bytes)?),
                XsaveFormat::Compacted => {
                    let start = if component.aligned {
                        end.checked_next_multiple_of(64)?
                    } else {
                        end
                    };
                    start.checked_add(component.bytes)?
                }
            };
        }
        Some(end)
    }
}

bitflags! {
    /// CR0 (SDM vol. 3A section 2.5, APM vol. 2 section 3.1.1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Cr0: u64 {
        /// PE: protected mode.
        const PROTECTED_MODE = 1 << 0;
        /// MP: `WAIT` minds TS.
        const MONITOR_COPROCESSOR = 1 << 1;
        /// EM: no x87, every such instruction is a #UD.
        const EMULATION = 1 << 2;
        /// TS: vector and x87 instructions raise #NM.
        const TASK_SWITCHED = 1 << 3;
        /// ET: always set.
        const EXTENSION_TYPE = 1 << 4;
        /// NE: x87 errors raise #MF.
        const NUMERIC_ERROR = 1 << 5;
        /// WP: ring 0 obeys R/W, too. Copy-on-write depends on it.
        const WRITE_PROTECT = 1 << 16;
        /// AM: EFLAGS.AC checks alignment in ring 3.
        const ALIGNMENT_MASK = 1 << 18;
        /// NW: not write-through.
        const NOT_WRITE_THROUGH = 1 << 29;
        /// CD: caches off.
        const CACHE_DISABLE = 1 << 30;
        /// PG: paging.
        const PAGING = 1 << 31;
    }

    /// CR4 (SDM vol. 3A section 2.5, APM vol. 2 section 3.1.3).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Cr4: u64 {
        /// TSD: `RDTSC` is for ring 0 only.
        const TIME_STAMP_DISABLE = 1 << 2;
        /// PSE: 4 MiB pages in 32-bit paging; ignored in long mode.
        const PAGE_SIZE_EXTENSION = 1 << 4;
        /// PAE: needed for long mode.
        const PHYSICAL_ADDRESS_EXTENSION = 1 << 5;
        /// MCE: machine checks.
        const MACHINE_CHECK = 1 << 6;
        /// PGE: global pages.
        const GLOBAL_PAGES = 1 << 7;
        /// PCE: `RDPMC` in ring 3.
        const PERFORMANCE_COUNTERS = 1 << 8;
        /// OSFXSR: SSE and `FXSAVE`.
        const OS_FXSR = 1 << 9;
        /// OSXMMEXCPT: #XM for SSE errors.
        const OS_XMM_EXCEPTIONS = 1 << 10;
        /// UMIP: `SGDT` and its kin are for ring 0 only.
        const UMIP = 1 << 11;
        /// LA57: five-level paging.
        const LA57 = 1 << 12;
        /// FSGSBASE: `WRFSBASE` and its kin in every ring.
        const FSGSBASE = 1 << 16;
        /// PCIDE: process-context identifiers in CR3.
        const PCID = 1 << 17;
        /// OSXSAVE: `XSAVE` and XCR0.
        const OS_XSAVE = 1 << 18;
        /// SMEP: ring 0 does not run user pages.
        const SMEP = 1 << 20;
        /// SMAP: ring 0 does not touch user pages unless EFLAGS.AC is set.
        const SMAP = 1 << 21;
        /// PKE: protection keys of user pages.
        const PROTECTION_KEYS = 1 << 22;
        /// CET: control-flow enforcement.
        const CET = 1 << 23;
        /// PKS: protection keys of supervisor pages (Intel).
        const SUPERVISOR_KEYS = 1 << 24;
    }

    /// EFER, MSR C000_0080 (SDM vol. 3A section 2.2.1, APM vol. 2 section
    /// 3.1.7).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Efer: u64 {
        /// SCE: `SYSCALL` and `SYSRET`.
        const SYSCALL = 1 << 0;
        /// LME: long mode once paging is on.
        const LONG_MODE_ENABLE = 1 << 8;
        /// LMA: long mode is on.
        const LONG_MODE_ACTIVE = 1 << 10;
        /// NXE: the NX bit of page table entries.
        const NO_EXECUTE = 1 << 11;
        /// SVME: AMD's virtualisation.
        const SVM = 1 << 12;
        /// FFXSR: `FXSAVE` without the XMM registers in ring 0 (AMD).
        const FAST_FXSAVE = 1 << 14;
        /// TCE: `INVLPG` spares upper-level translations of other addresses
        /// (AMD).
        const TRANSLATION_CACHE_EXTENSION = 1 << 15;
    }

    /// XCR0: which extended state there is (SDM vol. 1 section 13.3, APM vol. 2
    /// section 11.5.2).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Xcr0: u64 {
        /// x87; always set.
        const X87 = 1 << 0;
        /// XMM registers and MXCSR.
        const SSE = 1 << 1;
        /// The upper halves of the YMM registers.
        const AVX = 1 << 2;
        /// MPX bound registers.
        const BNDREGS = 1 << 3;
        /// MPX configuration and status.
        const BNDCSR = 1 << 4;
        /// AVX-512 mask registers.
        const OPMASK = 1 << 5;
        /// The upper halves of ZMM0 to ZMM15.
        const ZMM_HI256 = 1 << 6;
        /// ZMM16 to ZMM31.
        const HI16_ZMM = 1 << 7;
        /// PKRU.
        const PKRU = 1 << 9;
        /// AMX tile configuration.
        const TILECFG = 1 << 17;
        /// AMX tile data.
        const TILEDATA = 1 << 18;
    }
}

impl Cr4 {
    /// The bits that a guest of ours turns on, as far as the CPU has them.
    /// OSXSAVE goes together with loading XCR0.
    pub const fn for_features(cpu: &CpuFeatures) -> Self {
        let mut bits = Self::PHYSICAL_ADDRESS_EXTENSION
            .union(Self::OS_FXSR)
            .union(Self::OS_XMM_EXCEPTIONS)
            .bits();
        let optional = [
            (Features::PGE, Self::GLOBAL_PAGES),
            (Features::UMIP, Self::UMIP),
            (Features::FSGSBASE, Self::FSGSBASE),
            (Features::PCID, Self::PCID),
            (Features::XSAVE, Self::OS_XSAVE),
            (Features::SMEP, Self::SMEP),
            (Features::SMAP, Self::SMAP),
            (Features::PKU, Self::PROTECTION_KEYS),
        ];
        let mut index = 0;
        while index < optional.len() {
            if cpu.has(optional[index].0) {
                bits |= optional[index].1.bits();
            }
            index += 1;
        }
        Self::from_bits_retain(bits)
    }
}

/// A value for CR3: a root, and with CR4.PCIDE an identifier (SDM vol. 3A
/// section 4.5.2, APM vol. 2 section 3.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cr3(u64);

impl Cr3 {
    /// Bit 63 of the operand of `MOV` to CR3: keep the identifier's
    /// translations (SDM vol. 3A section 4.10.4.1).
    pub const NO_FLUSH: u64 = 1 << 63;

    /// The value that loads `root` under `pcid` and flushes the
    /// non-global translations of `pcid`.
    #[inline]
    pub const fn new(root: GuestPhys, pcid: Pcid) -> Self {
        Self((root.as_u64() & 0x000f_ffff_ffff_f000) | pcid.number() as u64)
    }

    /// The same without the flush.
    #[inline]
    pub const fn without_flush(self) -> Self {
        Self(self.0 | Self::NO_FLUSH)
    }

    /// The value as it goes into the register.
    #[inline]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The root.
    #[inline]
    pub const fn root(self) -> GuestPhys {
        GuestPhys::new_truncate(self.0 & 0x000f_ffff_ffff_f000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;

    /// A CPU like the lab's: AMD, 40 physical bits, AVX2, PKU.
    fn lab(leaf: u32, subleaf: u32) -> (u32, u32, u32, u32) {
        match (leaf, subleaf) {
            (0, 0) => (0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65),
            (1, 0) => (
                0,
                0,
                1 << 17 | 1 << 26 | 1 << 28 | 1 << 31,
                1 << 13 | 1 << 16,
            ),
            (7, 0) => (
                0,
                1 | 1 << 5 | 1 << 7 | 1 << 20,
                1 << 2 | 1 << 3 | 1 << 16 | 1 << 22,
                0,
            ),
            (0xd, 0) => (0x207, 0, 0, 0),
            (0xd, 1) => (0b0011, 0, 0, 0),
            (0xd, 2) => (256, 576, 0, 0),
            (0xd, 9) => (8, 2688, 0b10, 0),
            (0x8000_0000, 0) => (0x8000_0008, 0, 0, 0),
            (0x8000_0001, 0) => (0, 0, 1 << 2, 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27),
            (0x8000_0008, 0) => (0x3028, 0, 0, 0),
            _ => (0, 0, 0, 0),
        }
    }

    #[test]
    fn the_lab_is_understood() {
        let cpu = CpuFeatures::from_cpuid(lab);
        assert_eq!(cpu.vendor, Vendor::Amd);
        assert_eq!((cpu.physical_bits, cpu.virtual_bits), (40, 48));
        assert!(cpu.has(
            Features::SMEP
                | Features::SMAP
                | Features::PKU
                | Features::PCID
                | Features::FSGSBASE
                | Features::LA57
                | Features::GIB_PAGES
                | Features::RDPID
                | Features::SVM
                | Features::XSAVEC
        ));
        assert!(!cpu.has(Features::INVPCID));
        assert!(!cpu.has(Features::SMEP | Features::VMX));
        assert!(Cr4::for_features(&cpu).contains(Cr4::SMAP | Cr4::PCID | Cr4::OS_XSAVE));
        assert!(!Cr4::for_features(&cpu).contains(Cr4::LA57));
    }

    #[test]
    fn xsave_areas_have_the_size_of_their_format() {
        let cpu = CpuFeatures::from_cpuid(lab);
        assert_eq!(cpu.xsave_bytes(0b11, XsaveFormat::Standard), Some(576));
        assert_eq!(cpu.xsave_bytes(0b111, XsaveFormat::Standard), Some(832));
        assert_eq!(cpu.xsave_bytes(0x207, XsaveFormat::Standard), Some(2696));
        assert_eq!(cpu.xsave_bytes(0x207, XsaveFormat::Compacted), Some(840));
        assert_eq!(cpu.xsave_bytes(0x203, XsaveFormat::Compacted), Some(584));
        assert_eq!(cpu.xsave_bytes(1 << 17, XsaveFormat::Compacted), None);
    }

    #[test]
    fn leaves_beyond_the_last_are_not_asked_for() {
        // Intel answers them with the last basic leaf: here, all ones.
        let old = |leaf: u32, _| match leaf {
            0 => (1, 0x756e_6547, 0x6c65_746e, 0x4965_6e69),
            1 => (0, 0, 0, 0),
            _ => (u32::MAX, u32::MAX, u32::MAX, u32::MAX),
        };
        let old = |leaf, subleaf| {
            if leaf == 0x8000_0000 {
                (0, 0, 0, 0)
            } else {
                old(leaf, subleaf)
            }
        };
        let cpu = CpuFeatures::from_cpuid(old);
        assert_eq!(cpu.vendor, Vendor::Intel);
        assert!(cpu.features.is_empty());
        assert_eq!((cpu.physical_bits, cpu.virtual_bits), (36, 48));
        assert_eq!(cpu.xcr0_supported, 0);
    }

    #[test]
    fn unknown_vendors_are_named() {
        let cpu = CpuFeatures::from_cpuid(|leaf, _| match leaf {
            0 => (0, 0x746e_6543, 0x736c_7561, 0x4872_7561),
            _ => (0, 0, 0, 0),
        });
        assert_eq!(format!("{}", cpu.vendor), "CentaurHauls");
    }

    #[test]
    fn cr3_holds_root_and_identifier() {
        let cr3 = Cr3::new(GuestPhys::new(0x12_3456_7000), Pcid::new(0xabc).unwrap());
        assert_eq!(cr3.bits(), 0x12_3456_7abc);
        assert_eq!(cr3.without_flush().bits() >> 63, 1);
        assert_eq!(cr3.without_flush().root(), GuestPhys::new(0x12_3456_7000));
    }
}
