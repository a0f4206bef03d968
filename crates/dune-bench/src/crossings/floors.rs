//! What nothing can be cheaper than: the measuring itself, a `KVM_RUN` that runs nothing,
//! and a page of zeros.
#![expect(
    unsafe_code,
    reason = "an empty statement that is not optimised away; KVM_RUN"
)]

use core::arch::asm;

use dune_kvm::vm::Vm;

use super::Bench;
use crate::meter::Figure;
use crate::report::{DUNE, LINUX, Row};

const NOTHING_BATCH: u32 = 256;
const KVM_BATCH: u32 = 64;
const CLEAR_BATCH: u32 = 16;

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
    unsafe { (*run).immediate_exit = 1 };
    let figure = bench.meter.measure(KVM_BATCH, || {
        // SAFETY: the flag keeps the guest from running.
        let _ = unsafe { vcpu.run() };
    });
    row.add(LINUX, figure);
    vcpu.close();
}

/// A page filled with zeros the way Linux does it on CPUs with fast string operations.
///
/// Part of every first touch. Where instructions are counted, each byte counts as one: the
/// emulator repeats the instruction. A CPU stores whole cache lines.
pub(crate) fn clear_page(bench: &Bench, row: &mut Row) {
    const PAGE: usize = 4096;
    let mut page = vec![1_u8; PAGE];
    let figure = bench.meter.measure(CLEAR_BATCH, || {
        // SAFETY: fills exactly the vector.
        unsafe {
            asm!(
                "rep stosb",
                inout("rdi") page.as_mut_ptr() => _,
                inout("rcx") PAGE => _,
                in("al") 0_u8,
                options(nostack, preserves_flags)
            );
        }
    });
    row.add(LINUX, figure);
}
