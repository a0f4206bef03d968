//! The platform: KVM probe, VM, windows of memory, virtual CPUs.

pub mod probe;
