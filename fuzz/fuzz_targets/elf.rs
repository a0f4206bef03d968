#![no_main]

#[allow(dead_code, unreachable_pub, reason = "shared with the other targets and tests")]
#[path = "../../crates/dune-loader/tests/invariants/mod.rs"]
mod invariants;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| invariants::check_elf(bytes));
