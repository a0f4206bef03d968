//! What the processor offers to a guest of this KVM.

use kvm_bindings::kvm_cpuid_entry2;

use super::Vendor;

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
    pub(super) fn from_cpuid(entries: &[kvm_cpuid_entry2]) -> Self {
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

/// The extension that goes with the processor's vendor (CPUID leaf 0).
pub(super) fn vendor(cpuid: &[kvm_cpuid_entry2]) -> Vendor {
    let Some(leaf) = cpuid.iter().find(|e| e.function == 0) else {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..kvm_cpuid_entry2::default()
        }
    }

    #[test]
    fn features_are_read_from_their_leaves() {
        let cpuid = [
            leaf(1, [0, 0, 1 << 17 | 1 << 26, 0]),
            leaf(7, [0, 1 << 7 | 1 << 20 | 1, 1 << 16, 0]),
            leaf(0xd, [7, 0, 0, 1]),
            leaf(0x8000_0001, [0, 0, 0, 1 << 26]),
            leaf(0x8000_0008, [0x3927, 0, 0, 0]),
        ];
        let features = Features::from_cpuid(&cpuid);
        let expected = Features {
            smep: true,
            smap: true,
            pcid: true,
            gib_pages: true,
            la57: true,
            fsgsbase: true,
            physical_bits: 39,
            virtual_bits: 57,
            xcr0_mask: 0x1_0000_0007,
            ..Features::default()
        };
        assert_eq!(features, expected);
    }

    #[test]
    fn no_leaves_mean_the_least() {
        let features = Features::from_cpuid(&[]);
        assert_eq!((features.physical_bits, features.xcr0_mask), (36, 0));
        assert_eq!(vendor(&[]), Vendor::Unknown);
    }

    #[test]
    fn the_vendor_is_spelled_over_three_registers() {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let intel = leaf(0, [0, word(b"Genu"), word(b"ntel"), word(b"ineI")]);
        let amd = leaf(0, [0, word(b"Auth"), word(b"cAMD"), word(b"enti")]);
        assert_eq!(vendor(&[intel]), Vendor::Vmx);
        assert_eq!(vendor(&[amd]), Vendor::Svm);
    }
}
