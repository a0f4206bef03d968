//! The platform: KVM probe, VM, windows of memory, virtual CPUs.
//!
//! Host side only. Nothing here knows what runs in the guest: crate `dune` fills a vCPU with
//! the process itself, crate `dune-sandbox` with an untrusted program.
//!
//! * [`probe`] tells what `/dev/kvm` on this machine is good for.
//! * [`vm`] is a VM over this process's memory, with [`windows`] as its memory map.
//! * [`vcpu`] creates vCPUs, gives them their first state and runs them.
//! * [`wall`] keeps the host kernel away from memory, by protection keys.
//! * [`sys`] and [`ioctl`] are the raw layer: what runs between an exit and the next entry
//!   may not allocate, lock, call libc or panic, so the usual wrappers are of no use here.

pub mod ioctl;
pub mod probe;
pub mod sys;
pub mod vcpu;
pub mod vm;
pub mod wall;
pub mod windows;
