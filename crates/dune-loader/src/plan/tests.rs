use super::*;
use crate::test_elf::{CODE, DATA, Header, TestElf};

fn at(addr: u64) -> UserAddr {
    UserAddr::new(addr).unwrap()
}

fn range(start: u64, end: u64) -> UserRange {
    UserRange::new(at(start), at(end)).unwrap()
}

fn layout() -> Layout {
    Layout {
        exe_base: at(0x10_0000_0000),
        interp_base: at(0x20_0000_0000),
        user_range: range(0x1_0000, 0x40_0000_0000),
    }
}

fn parse(file: &TestElf) -> Elf {
    Elf::parse(&file.bytes()[..]).unwrap()
}

/// A movable program whose addresses begin at `first`.
fn movable(first: u64, align: u64) -> Elf {
    let moved = |header: Header| Header {
        vaddr: header.vaddr - CODE.vaddr + first,
        ..header
    };
    parse(&TestElf {
        e_type: object::elf::ET_DYN,
        entry: first + 0x800,
        ..TestElf::with_headers(&[
            Header {
                align,
                ..moved(CODE)
            },
            moved(DATA),
        ])
    })
}

#[test]
fn a_fixed_program_stays_where_it_is() {
    let plan = LoadPlan::new(&parse(&TestElf::new()), None, &layout()).unwrap();
    assert_eq!(plan.load_bias, 0);
    assert_eq!(plan.entry, at(0x40_0800));
    assert_eq!(plan.start(), plan.entry);
    assert_eq!(plan.headers, Some(at(0x40_0040)));
    assert_eq!(plan.span, range(0x40_0000, 0x40_6000));
    assert_eq!(plan.brk_start, at(0x40_6000));
}

#[test]
fn a_segment_is_file_pages_zero_tail_and_fresh_pages() {
    let plan = LoadPlan::new(&parse(&TestElf::new()), None, &layout()).unwrap();
    let [code, data] = plan.segments[..] else {
        panic!("{:?}", plan.segments)
    };
    assert_eq!(code.file_pages(), Some(range(0x40_0000, 0x40_1000)));
    assert_eq!(code.zero_tail(), None);
    assert_eq!(code.anonymous_pages(), None);

    assert_eq!(data.vaddr, at(0x40_2000));
    assert_eq!((data.file_offset, data.file_len), (0x1000, 0x400));
    assert_eq!(data.mem_len, 0x3100);
    assert_eq!(data.pages(), range(0x40_2000, 0x40_6000));
    assert_eq!(data.file_pages(), Some(range(0x40_2000, 0x40_3000)));
    assert_eq!(data.zero_tail(), Some(range(0x40_2400, 0x40_3000)));
    assert_eq!(data.anonymous_pages(), Some(range(0x40_3000, 0x40_6000)));
}

#[test]
fn zeros_that_end_in_the_last_file_page_need_no_fresh_page() {
    let short = Header {
        mem_len: 0x301,
        ..DATA
    };
    let plan = LoadPlan::new(
        &parse(&TestElf::with_headers(&[CODE, short])),
        None,
        &layout(),
    )
    .unwrap();
    assert_eq!(
        plan.segments[1].zero_tail(),
        Some(range(0x40_2400, 0x40_3000))
    );
    assert_eq!(plan.segments[1].anonymous_pages(), None);
}

#[test]
fn a_segment_of_zeros_is_fresh_from_its_first_page() {
    let bss = Header {
        file_len: 0,
        ..DATA
    };
    let plan = LoadPlan::new(
        &parse(&TestElf::with_headers(&[CODE, bss])),
        None,
        &layout(),
    )
    .unwrap();
    let bss = plan.segments[1];
    assert_eq!((bss.file_pages(), bss.zero_tail()), (None, None));
    assert_eq!(bss.anonymous_pages(), Some(range(0x40_2000, 0x40_6000)));
}

#[test]
fn a_movable_program_goes_to_its_base() {
    let plan = LoadPlan::new(&movable(0, 0x1000), None, &layout()).unwrap();
    assert_eq!(plan.span.start(), at(0x10_0000_0000));
    assert_eq!(plan.load_bias, 0x10_0000_0000);
    assert_eq!(plan.entry, at(0x10_0000_0800));
    assert_eq!(plan.headers, Some(at(0x10_0000_0040)));
}

#[test]
fn a_movable_program_with_high_addresses_is_moved_down() {
    let plan = LoadPlan::new(&movable(0x7000_0000_0000, 0x1000), None, &layout()).unwrap();
    assert_eq!(plan.span.start(), at(0x10_0000_0000));
    assert_eq!(
        plan.load_bias.wrapping_add(0x7000_0000_0000),
        0x10_0000_0000
    );
    assert_eq!(plan.entry, at(0x10_0000_0800));
}

#[test]
fn the_load_bias_is_a_multiple_of_the_alignment() {
    let align = 0x20_0000;
    let mut unaligned = layout();
    unaligned.exe_base = at(0x10_0000_1234);
    for first in [0, 0x3000, align, align + 0x3000] {
        let plan = LoadPlan::new(&movable(first, align), None, &unaligned).unwrap();
        assert_eq!(plan.load_bias % align, 0);
        let start = plan.span.start();
        assert!(
            start >= unaligned.exe_base && start.get() < unaligned.exe_base.get() + align + 0x1000
        );
    }
    let huge = LoadPlan::new(&movable(0, 1 << 46), None, &layout());
    assert!(
        matches!(huge, Err(PlanError::NoRoom { align, .. }) if align == 1 << 46),
        "{huge:?}"
    );
    let overflow = LoadPlan::new(&movable(0, 1 << 63), None, &layout());
    assert!(
        matches!(overflow, Err(PlanError::NoRoom { .. })),
        "{overflow:?}"
    );
}

#[test]
fn nothing_is_planned_outside_the_user_range() {
    let mut high = layout();
    high.user_range = range(0x8000_0000, 0x40_0000_0000);
    let fixed = LoadPlan::new(&parse(&TestElf::new()), None, &high).unwrap_err();
    assert!(
        matches!(
            fixed,
            PlanError::FixedOutsideRange {
                start: 0x40_0000,
                ..
            }
        ),
        "{fixed}"
    );

    let mut tight = layout();
    tight.user_range = range(0x10_0000_0000, 0x10_0000_6000);
    assert!(LoadPlan::new(&movable(0, 0x1000), None, &tight).is_ok());
    tight.user_range = range(0x10_0000_0000, 0x10_0000_5fff);
    let movable = LoadPlan::new(&movable(0, 0x1000), None, &tight).unwrap_err();
    assert!(
        matches!(
            movable,
            PlanError::NoRoom {
                part: ImagePart::Program,
                ..
            }
        ),
        "{movable}"
    );
}

#[test]
fn the_interpreter_starts_the_program() {
    let plan = LoadPlan::new(
        &parse(&TestElf::new()),
        Some(&movable(0, 0x1000)),
        &layout(),
    )
    .unwrap();
    let interpreter = plan.interpreter.as_ref().unwrap();
    assert_eq!(interpreter.load_bias, 0x20_0000_0000);
    assert_eq!(plan.start(), at(0x20_0000_0800));
    assert_eq!(plan.entry, at(0x40_0800));
}

#[test]
fn program_and_interpreter_do_not_overlap() {
    let mut one_base = layout();
    one_base.interp_base = at(one_base.exe_base.get() + 0x5000);
    let (exe, interpreter) = (movable(0, 0x1000), movable(0, 0x1000));
    let error = LoadPlan::new(&exe, Some(&interpreter), &one_base).unwrap_err();
    assert!(matches!(error, PlanError::Overlap { .. }), "{error}");
    one_base.interp_base = at(one_base.exe_base.get() + 0x6000);
    assert!(LoadPlan::new(&exe, Some(&interpreter), &one_base).is_ok());
}
