#![no_main]

#[allow(dead_code, reason = "each target uses its own part")]
#[path = "../../crates/dune-sandbox/tests/invariants/mod.rs"]
mod invariants;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| invariants::check_policy(bytes));
