//! Any text as a policy, by what the fuzz target checks too.

#[path = "invariants/policy.rs"]
mod invariants;

use proptest::prelude::*;

/// Every seed of the fuzz target, and each of its beginnings.
#[test]
fn seeds_and_their_beginnings_are_understood_or_refused() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/policy");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let seed = std::fs::read(entry.unwrap().path()).unwrap();
        for end in 0..=seed.len() {
            invariants::check_policy(&seed[..end]);
        }
        seen += 1;
    }
    assert!(seen > 2);
}

proptest! {
    #[test]
    fn nothing_is_too_strange(
        lines in proptest::collection::vec(
            prop_oneof![
                "\\PC{0,30}",
                "(strict|net|mem|timeout|nproc|cpu-time|ro|rw|set|keep|clear) ?= ?(true|false|[0-9.]{1,9}|\"[a-zA-Z0-9/. ]{0,9}\"|\\[.{0,9}\\])",
                "\\[(files|env|limits|other)\\]",
            ],
            0..8,
        )
    ) {
        invariants::check_policy(lines.join("\n").as_bytes());
    }
}
