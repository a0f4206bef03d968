//! What can be chosen before the first entry.

/// Choices for the process's machine; they hold from the first entry on.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub(crate) physical_bits: Option<u32>,
    pub(crate) skip_probe: bool,
    pub(crate) system_call_clocks: bool,
}

impl Options {
    /// The defaults: what the CPU offers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Uses at most this many bits of guest physical address (36 to 52), as on a smaller
    /// CPU. Meant for tests: 39 is what client processors of Intel have.
    #[must_use]
    pub fn physical_bits(mut self, bits: u32) -> Self {
        self.physical_bits = Some(bits);
        self
    }

    /// Reads clocks by system calls instead of the vDSO's code, as is done by itself where
    /// the kernel does not let the guest see the pages that the vDSO reads.
    #[must_use]
    pub fn system_call_clocks(mut self) -> Self {
        self.system_call_clocks = true;
        self
    }

    /// Enters without asking the probe whether this KVM can run ring 0. On a weak KVM the
    /// process will hang or die.
    #[must_use]
    pub fn skip_probe(mut self) -> Self {
        self.skip_probe = true;
        self
    }
}
