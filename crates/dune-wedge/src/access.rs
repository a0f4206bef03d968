//! A compartment's memory, as the guard uses it for what the compartment asks: by what the
//! compartment may do with it, and with the pages that it would get if it used the memory
//! itself.

use crate::error::Access;
use crate::learn::Learned;
use crate::shell::{Denied, Limits, Shell};

#[derive(Debug)]
pub(crate) struct Memory<'r> {
    pub(crate) shell: &'r mut Shell,
    pub(crate) limits: Limits,
    /// In a run in which everything is allowed: what it used.
    pub(crate) learned: Option<&'r mut Learned>,
    /// The instruction that uses the memory, or has it used.
    pub(crate) at: u64,
}

impl Memory<'_> {
    /// Gives the page at an address that the compartment could not use so, if it has a claim
    /// to it.
    #[cold]
    pub(crate) fn resolve(&mut self, address: u64, access: Access) -> Result<(), Denied> {
        let result = if access == Access::Execute {
            Err(Denied::NotGranted)
        } else {
            let is_write = access == Access::Write;
            self.shell.resolve(address, is_write, self.limits)
        };
        if let (Err(Denied::NotGranted), Some(learned)) = (&result, &mut self.learned)
            && let Some(writable) = learned.memory(address, access, self.at)
        {
            self.shell.show_process(address, writable)?;
            return Ok(());
        }
        result
    }

    /// Copies bytes out of the compartment.
    #[inline]
    pub(crate) fn read(&mut self, address: u64, into: &mut [u8]) -> Result<(), Denied> {
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..) {
            let at = address.wrapping_add(done as u64);
            let Err(fault) = self.shell.space.read(at, rest) else {
                break;
            };
            self.resolve(fault.address, Access::Read)?;
            done = fault.address.wrapping_sub(address) as usize;
        }
        Ok(())
    }

    /// Copies bytes into the compartment.
    #[inline]
    pub(crate) fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Denied> {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..) {
            let at = address.wrapping_add(done as u64);
            let Err(fault) = self.shell.space.write(at, rest) else {
                break;
            };
            self.resolve(fault.address, Access::Write)?;
            done = fault.address.wrapping_sub(address) as usize;
        }
        Ok(())
    }
}
