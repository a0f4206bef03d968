//! What nothing can be cheaper than: the measuring itself, and a `KVM_RUN` that runs
//! nothing.
#![expect(
    unsafe_code,
    reason = "an empty statement that is not optimised away; KVM_RUN"
)]

use core::arch::asm;
use core::ptr::addr_of_mut;

use dune_kvm::vm::Vm;

use super::Bench;
use crate::meter::Figure;
use crate::report::{DUNE, LINUX, Row};

const NOTHING_BATCH: u32 = 256;
const KVM_BATCH: u32 = 64;

pub(crate) fn nothing(bench: &Bench, row: &mut Row) {
    row.add(LINUX, nothing_at_all(bench));
    row.note(format!(
        "in each operation of a batch of {NOTHING_BATCH}: the loop, and its part of the two readings"
    ));
}

pub(crate) fn nothing_dune(bench: &Bench, row: &mut Row) {
    row.add(DUNE, nothing_at_all(bench));
}

fn nothing_at_all(bench: &Bench) -> Figure {
    bench.meter.measure(NOTHING_BATCH, || {
        // SAFETY: no instruction; keeps the loop.
        unsafe { asm!("", options(nostack)) };
    })
}

/// `KVM_RUN` with `immediate_exit` set: into the kernel, through KVM's preparations, and
/// back, without the guest.
pub(crate) fn kvm_run(bench: &Bench, row: &mut Row) {
    let vcpu = match Vm::new().and_then(|vm| vm.create_vcpu().map(|vcpu| (vm, vcpu))) {
        Ok(pair) => pair,
        Err(error) => return row.set_missing(error.to_string()),
    };
    let (_vm, vcpu) = vcpu;
    let run = vcpu.run_area();
    // SAFETY: shared with KVM, which is not running.
    unsafe { addr_of_mut!((*run).immediate_exit).write_volatile(1) };
    let figure = bench.meter.measure(KVM_BATCH, || {
        // SAFETY: the flag keeps the guest from running.
        let _ = unsafe { vcpu.run() };
    });
    row.add(LINUX, figure);
    vcpu.close();
}
