//! KVM's requests, encoded as `<linux/kvm.h>` and `<asm-generic/ioctl.h>` define them, for
//! use with [`sys::ioctl`](crate::sys::ioctl).

use core::mem::size_of;

use kvm_bindings as kvm;

const KVMIO: u64 = 0xae;
const WRITE: u64 = 1;
const READ: u64 = 2;

const fn encode(direction: u64, number: u64, size: usize) -> u64 {
    (direction << 30) | ((size as u64) << 16) | (KVMIO << 8) | number
}
const fn io(number: u64) -> u64 {
    encode(0, number, 0)
}
const fn iow<T>(number: u64) -> u64 {
    encode(WRITE, number, size_of::<T>())
}
const fn ior<T>(number: u64) -> u64 {
    encode(READ, number, size_of::<T>())
}
const fn iowr<T>(number: u64) -> u64 {
    encode(READ | WRITE, number, size_of::<T>())
}

/// The header of variable-length lists (`kvm_cpuid2`, `kvm_msrs`): its size is what counts
/// in the request's number.
type ListHeader = u64;

#[allow(missing_docs, reason = "the kernel's own names")]
mod numbers {
    use super::*;
    pub const KVM_GET_API_VERSION: u64 = io(0x00);
    pub const KVM_CREATE_VM: u64 = io(0x01);
    pub const KVM_CHECK_EXTENSION: u64 = io(0x03);
    pub const KVM_GET_VCPU_MMAP_SIZE: u64 = io(0x04);
    pub const KVM_GET_SUPPORTED_CPUID: u64 = iowr::<ListHeader>(0x05);
    pub const KVM_CREATE_VCPU: u64 = io(0x41);
    pub const KVM_SET_USER_MEMORY_REGION: u64 = iow::<kvm::kvm_userspace_memory_region>(0x46);
    pub const KVM_SET_TSS_ADDR: u64 = io(0x47);
    pub const KVM_RUN: u64 = io(0x80);
    pub const KVM_GET_REGS: u64 = ior::<kvm::kvm_regs>(0x81);
    pub const KVM_SET_REGS: u64 = iow::<kvm::kvm_regs>(0x82);
    pub const KVM_GET_SREGS: u64 = ior::<kvm::kvm_sregs>(0x83);
    pub const KVM_SET_SREGS: u64 = iow::<kvm::kvm_sregs>(0x84);
    pub const KVM_INTERRUPT: u64 = iow::<u32>(0x86);
    pub const KVM_GET_MSRS: u64 = iowr::<ListHeader>(0x88);
    pub const KVM_SET_MSRS: u64 = iow::<ListHeader>(0x89);
    pub const KVM_SET_CPUID2: u64 = iow::<ListHeader>(0x90);
    pub const KVM_GET_VCPU_EVENTS: u64 = ior::<kvm::kvm_vcpu_events>(0x9f);
    pub const KVM_SET_VCPU_EVENTS: u64 = iow::<kvm::kvm_vcpu_events>(0xa0);
    pub const KVM_GET_XSAVE: u64 = encode(READ, 0xa4, 4096);
    pub const KVM_SET_XSAVE: u64 = encode(WRITE, 0xa5, 4096);
    pub const KVM_SET_XCRS: u64 = iow::<kvm::kvm_xcrs>(0xa7);
    pub const KVM_SET_DEVICE_ATTR: u64 = iow::<kvm::kvm_device_attr>(0xe1);
}
pub use numbers::*;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_the_kernel_headers() {
        assert_eq!(KVM_SET_USER_MEMORY_REGION, 0x4020_ae46);
        assert_eq!(KVM_GET_REGS, 0x8090_ae81);
        assert_eq!(KVM_GET_SREGS, 0x8138_ae83);
        assert_eq!(KVM_GET_SUPPORTED_CPUID, 0xc008_ae05);
        assert_eq!(KVM_SET_XCRS, 0x4188_aea7);
        assert_eq!(KVM_SET_XSAVE, 0x5000_aea5);
        assert_eq!(KVM_GET_VCPU_EVENTS, 0x8040_ae9f);
        assert_eq!(KVM_SET_DEVICE_ATTR, 0x4018_aee1);
    }
}
