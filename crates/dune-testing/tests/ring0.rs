//! Ring 0 tests of the harness: they reach a KVM that is backed by hardware.

use std::fs;

use dune_kvm::probe::{Kvm, probe};

/// Says whether this process runs in the lab.
fn in_lab() -> bool {
    fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("QEMU TCG CPU"))
}

fn passes_at_ring0() {
    assert!(matches!(probe().kvm, Kvm::Hardware { .. }), "{:?}", probe());
}

fn has_the_cpus_asked_for() {
    if !in_lab() {
        // Only the lab has a number of CPUs to choose.
        return;
    }
    let wanted = std::env::var("DUNE_TEST_CPUS").unwrap_or_else(|_| "2".to_owned());
    let cpus = std::thread::available_parallelism().unwrap();
    assert_eq!(cpus.to_string(), wanted);
}

dune_testing::tests! {
    smoke passes_at_ring0,
    ring0 has_the_cpus_asked_for,
}
