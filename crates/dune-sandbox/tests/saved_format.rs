//! Any bytes as a saved program, by what the fuzz target checks too.

#[path = "invariants/saved.rs"]
mod invariants;

use proptest::prelude::*;

fn seed() -> Vec<u8> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/saved/small");
    std::fs::read(path).unwrap()
}

#[test]
fn the_seed_is_understood_and_its_beginnings_are_refused() {
    let seed = seed();
    let header = dune_sandbox::snapshot::Header::read(&seed, u64::MAX).unwrap();
    assert!(!header.areas().is_empty() && !header.stored().is_empty());
    for end in 0..=seed.len() {
        invariants::check_saved(&seed[..end]);
    }
}

/// Among them: an area's address as another's, a count as an address.
#[test]
fn any_number_may_stand_in_any_others_place() {
    let seed = seed();
    let used = seed.iter().rposition(|&byte| byte != 0).unwrap() + 1;
    let numbers = used.div_ceil(8);
    for from in 0..numbers {
        for to in 0..numbers {
            let mut bytes = seed.clone();
            bytes.copy_within(from * 8..from * 8 + 8, to * 8);
            invariants::check_saved(&bytes);
        }
    }
}

proptest! {
    /// Whole numbers are changed: those of lengths, addresses and rights among them.
    #[test]
    fn no_number_is_too_strange(
        changes in prop::collection::vec(
            (
                0_usize..600,
                prop_oneof![any::<u64>(), 0_u64..9, (0_u64..48).prop_map(|shift| 1 << shift)],
            ),
            1..6,
        ),
    ) {
        let mut bytes = seed();
        let numbers = bytes.len() / 8;
        for (at, value) in changes {
            let at = at % numbers * 8;
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        invariants::check_saved(&bytes);
    }
}
