//! Any bytes, and real files with damaged headers, never break a promise.

mod invariants;

use dune_loader::Elf;
use proptest::prelude::*;

/// A program's bytes. One of three: two small ones, and a real one of which
/// only the headers are kept and the rest is zero, for speed.
fn program() -> impl Strategy<Value = Vec<u8>> {
    let mut real = std::fs::read("/proc/self/exe").expect("/proc is mounted");
    real[4096..].fill(0);
    assert!(
        Elf::parse(&real[..]).is_ok(),
        "the headers are in the first page"
    );
    prop_oneof![
        30 => Just(include_bytes!("../../../fuzz/seeds/elf/fixed").to_vec()),
        30 => Just(include_bytes!("../../../fuzz/seeds/elf/movable").to_vec()),
        1 => Just(real),
    ]
}

/// Values at which checks have their edges.
fn edge_value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0u32..64, -2i64..=2).prop_map(|(bit, off)| (1u64 << bit).wrapping_add_signed(off)),
        (0u64..0x100).prop_map(|pages| pages << 12),
        Just(0),
        Just(u64::MAX),
        Just((1 << 47) - 4096),
    ]
}

/// Overwrites the 1, 2, 4 or 8 bytes at an offset.
fn damage() -> impl Strategy<Value = (usize, usize, u64)> {
    (0usize..64 + 16 * 56, 0u32..4, edge_value()).prop_map(|(offset, log, value)| {
        let width = 1 << log;
        // Fields are aligned to their size in both headers.
        (offset & !(width - 1), width, value)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_headers_are_rejected_or_harmless(
        mut bytes in program(),
        damages in prop::collection::vec(damage(), 1..6),
        cut in prop::option::weighted(0.2, 0usize..8192),
    ) {
        let len = bytes.len();
        for (offset, width, value) in damages {
            let offset = offset % (len & !7);
            bytes[offset..offset + width].copy_from_slice(&value.to_le_bytes()[..width]);
        }
        bytes.truncate(cut.unwrap_or(bytes.len()));
        invariants::check_elf(&bytes);
    }

    #[test]
    fn random_bytes_after_the_magic_are_rejected_or_harmless(
        mut bytes in prop::collection::vec(any::<u8>(), 20..1000),
    ) {
        bytes[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
        invariants::check_elf(&bytes);
    }

    #[test]
    fn random_bytes_are_rejected(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        invariants::check_elf(&bytes);
        invariants::check_shebang(&bytes);
    }

    #[test]
    fn first_lines_keep_their_promises(
        line in r"#![ \t\n\x00/ab]{0,20}([ \t/abc\x00]|é){0,270}[\n\x00]?.{0,20}",
    ) {
        invariants::check_shebang(line.as_bytes());
    }
}
