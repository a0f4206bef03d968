//! What must hold for any input whatever: shared by the property tests and
//! the fuzz targets.

use dune_loader::{
    Elf, Layout, LoadPlan, PAGE_SIZE, Prot, SHEBANG_LIMIT, SegmentMap, Shebang, UserAddr, UserRange,
};

/// Layouts from roomy to hardly any room, the last ones with both images at
/// the same place.
pub(crate) fn layouts() -> impl Iterator<Item = Layout> {
    let at = |addr| UserAddr::new(addr).expect("a user address");
    [
        (
            0x5500_0000_0000,
            0x7f00_0000_0000,
            0x1_0000,
            0x7fff_ffff_f000,
        ),
        (0x40_0000, 0x4000_0000, 0x1000, 0x8000_0000),
        (0x7fff_ffff_0000, 0x1_0000, 0, 0x7fff_ffff_f000),
        (0x1234, 0x1234, 0x1234, 0x7fff_ffff_efff),
        (0, 0x7fff_ffff_f000, 0, 0x7fff_ffff_f000),
    ]
    .into_iter()
    .map(move |(exe_base, interp_base, start, end)| Layout {
        exe_base: at(exe_base),
        interp_base: at(interp_base),
        user_range: UserRange::new(at(start), at(end)).expect("start below end"),
    })
}

/// Parses a file and plans it as a program and as its own interpreter.
///
/// # Panics
///
/// When a promise of the loader is broken.
pub(crate) fn check_elf(bytes: &[u8]) {
    match Elf::parse(bytes) {
        Ok(elf) => {
            for layout in layouts() {
                check_layout(&elf, &layout, bytes.len() as u64);
            }
        }
        Err(error) => check_message(&error.to_string()),
    }
}

fn check_layout(elf: &Elf, layout: &Layout, file_len: u64) {
    for interpreter in [None, Some(elf)] {
        match LoadPlan::new(elf, interpreter, layout) {
            Ok(plan) => check_plan(elf, &plan, layout, file_len),
            Err(error) => check_message(&error.to_string()),
        }
    }
}

fn check_plan(elf: &Elf, plan: &LoadPlan, layout: &Layout, file_len: u64) {
    let interpreter = plan.interpreter.iter();
    let spans = [plan.span]
        .into_iter()
        .chain(interpreter.clone().map(|part| part.span));
    assert!(
        spans
            .clone()
            .all(|span| layout.user_range.contains_range(span))
    );

    let all: Vec<&SegmentMap> = plan
        .segments
        .iter()
        .chain(interpreter.flat_map(|part| &part.segments))
        .collect();
    for (index, segment) in all.iter().enumerate() {
        check_segment(segment, file_len);
        assert!(
            spans
                .clone()
                .any(|span| span.contains_range(segment.pages()))
        );
        for other in &all[..index] {
            assert!(
                !segment.pages().overlaps(other.pages()),
                "{segment:?} {other:?}"
            );
        }
    }
    let executable = |addr: UserAddr| {
        all.iter()
            .any(|s| s.prot.contains(Prot::EXEC) && s.pages().contains(addr))
    };
    assert!(executable(plan.entry) && executable(plan.start()));
    assert!(
        plan.headers
            .is_none_or(|headers| plan.span.contains(headers))
    );
    assert!(plan.brk_start.is_page_aligned() && plan.brk_start == plan.span.end());
    assert_eq!(plan.load_bias % elf.align(), 0);
}

fn check_segment(segment: &SegmentMap, file_len: u64) {
    let pages = segment.pages();
    assert!(segment.vaddr.is_page_aligned() && segment.file_offset.is_multiple_of(PAGE_SIZE));
    assert!(!pages.is_empty() && segment.file_len <= segment.mem_len);
    assert!(segment.file_offset + segment.file_len <= file_len);
    // File pages and fresh pages make up the segment, zeros only end the file's.
    let file = segment.file_pages().map_or(0, UserRange::len);
    let fresh = segment.anonymous_pages().map_or(0, UserRange::len);
    assert_eq!(file + fresh, pages.len());
    if let Some(zeros) = segment.zero_tail() {
        let file = segment
            .file_pages()
            .expect("zeros follow bytes of the file");
        assert!(file.contains_range(zeros) && zeros.end() == file.end());
        assert_eq!(zeros.start().get() - segment.vaddr.get(), segment.file_len);
    }
}

/// Parses a script's first line.
///
/// # Panics
///
/// When a promise of the loader is broken.
pub(crate) fn check_shebang(bytes: &[u8]) {
    let seen = &bytes[..bytes.len().min(SHEBANG_LIMIT)];
    let parsed = Shebang::parse(bytes);
    assert_eq!(
        parsed,
        Shebang::parse(seen),
        "bytes past the limit do not count"
    );
    assert_eq!(parsed.is_some(), bytes.starts_with(b"#!"));
    match parsed {
        Some(Ok(line)) => {
            let name = line.interpreter.as_bytes();
            assert!(
                !name.is_empty() && !name.iter().any(|byte| b" \t\n".contains(byte)),
                "{line:?}"
            );
            let argument = line.argument.iter().map(|text| text.as_bytes());
            for part in argument.chain([name]) {
                assert!(!part.contains(&b'\n'));
                assert!(part.is_empty() || seen.windows(part.len()).any(|window| window == part));
            }
        }
        Some(Err(error)) => check_message(&error.to_string()),
        None => {}
    }
}

fn check_message(message: &str) {
    assert!(
        !message.is_empty() && !message.contains('\n'),
        "{message:?}"
    );
}
