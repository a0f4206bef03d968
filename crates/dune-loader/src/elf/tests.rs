use super::*;
use crate::test_elf::{CODE, DATA, Header, TestElf};

fn parse(file: &TestElf) -> Result<Elf, ElfError> {
    Elf::parse(&file.bytes()[..])
}

/// A header of the given type over part of the file.
fn over(p_type: u32, offset: u64, len: u64) -> Header {
    Header {
        p_type,
        flags: elf::PF_R,
        offset,
        vaddr: 0,
        file_len: len,
        mem_len: len,
        align: 1,
    }
}

fn with_interpreter(path: &[u8]) -> Vec<u8> {
    let mut bytes = TestElf::new()
        .and(over(elf::PT_INTERP, 0x800, path.len() as u64))
        .bytes();
    bytes[0x800..][..path.len()].copy_from_slice(path);
    bytes
}

/// Asserts that parsing fails with an error of the given form, on one line.
macro_rules! assert_rejected {
    ($file:expr, $pattern:pat $(if $guard:expr)?) => {
        let error = parse(&$file).unwrap_err();
        assert!(matches!(error, $pattern $(if $guard)?), "{error:?}");
        assert!(!error.to_string().contains('\n'), "{error}");
    };
}

#[test]
fn a_plain_program_is_accepted() {
    let elf = parse(&TestElf::new()).unwrap();
    assert_eq!(elf.kind(), ElfKind::Fixed);
    assert_eq!(elf.entry(), 0x40_0800);
    assert_eq!(elf.align(), PAGE_SIZE);
    assert_eq!(elf.header_count(), 2);
    assert_eq!(elf.headers_vaddr(), Some(0x40_0040));
    assert_eq!(elf.interpreter(), None);
    assert_eq!(elf.stack_prot(), Prot::READ | Prot::WRITE);
    assert_eq!(elf.span_len(), 0x6000);
    let [code, data] = elf.segments() else {
        panic!("{:?}", elf.segments())
    };
    assert_eq!(code.prot, Prot::READ | Prot::EXEC);
    assert_eq!((data.vaddr, data.file_offset), (0x40_2100, 0x1100));
    assert_eq!((data.file_len, data.mem_len), (0x300, 0x3000));
}

#[test]
fn every_cut_of_a_file_is_rejected() {
    let bytes = TestElf::new().bytes();
    // The last segment ends at 0x1400; what follows is of no concern.
    for len in 0..0x1400 {
        match Elf::parse(&bytes[..len]).unwrap_err() {
            ElfError::BadMagic => assert!(len < 4),
            ElfError::Truncated {
                needed, len: has, ..
            } => {
                assert!(needed > has && has == len as u64);
            }
            other => panic!("{len}: {other:?}"),
        }
    }
    assert!(Elf::parse(&bytes[..0x1400]).is_ok());
}

#[test]
fn other_files_are_told_apart() {
    assert!(matches!(
        Elf::parse(&b"#!/bin/sh\n"[..]),
        Err(ElfError::BadMagic)
    ));
    let file = |machine, class, data| TestElf {
        machine,
        class,
        data,
        ..TestElf::new()
    };
    let (c32, c64) = (elf::ELFCLASS32, elf::ELFCLASS64);
    let (lsb, msb) = (elf::ELFDATA2LSB, elf::ELFDATA2MSB);
    assert_rejected!(file(elf::EM_386, c32, lsb), ElfError::X86Bits32);
    assert_rejected!(file(elf::EM_X86_64, c32, lsb), ElfError::X32);
    assert_rejected!(
        file(elf::EM_X86_64, 9, lsb),
        ElfError::BadClass { class: 9 }
    );
    assert_rejected!(
        file(elf::EM_X86_64, c64, 0),
        ElfError::BadByteOrder { data: 0 }
    );
    assert_rejected!(
        file(elf::EM_X86_64.swap_bytes(), c64, msb),
        ElfError::BadByteOrder { data: 2 }
    );
    let foreign = [
        (elf::EM_AARCH64, c64, lsb, "AArch64"),
        (elf::EM_ARM, c32, lsb, "ARM"),
        (elf::EM_RISCV, c64, lsb, "RISC-V"),
        (elf::EM_S390.swap_bytes(), c64, msb, "S/390"),
        (elf::EM_PPC64.swap_bytes(), c64, msb, "PowerPC"),
        (0x7777, c64, lsb, "machine 30583"),
    ];
    for (machine, class, data, name) in foreign {
        assert_rejected!(file(machine, class, data), ElfError::OtherMachine { .. });
        let error = parse(&file(machine, class, data)).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn types_that_are_no_programs_are_rejected() {
    for e_type in [0, elf::ET_REL, elf::ET_CORE, 0xffff] {
        assert_rejected!(
            TestElf { e_type, ..TestElf::new() },
            ElfError::NotAProgram { e_type: t } if t == e_type
        );
    }
}

#[test]
fn bad_header_tables_are_rejected() {
    assert_rejected!(
        TestElf {
            phentsize: 32,
            ..TestElf::new()
        },
        ElfError::BadHeaderSize { size: 32 }
    );
    assert_rejected!(
        TestElf {
            phnum: Some(0),
            ..TestElf::new()
        },
        ElfError::NoProgramHeaders
    );
    // PN_XNUM, the marker for more headers than 16 bits count, included.
    for count in [1171, 0xffff] {
        let file = TestElf {
            phnum: Some(count),
            len: 1 << 22,
            ..TestElf::new()
        };
        assert_rejected!(file, ElfError::TooManyHeaders { .. });
    }
    for phoff in [0x2000, u64::MAX, u64::MAX - 100] {
        assert_rejected!(
            TestElf {
                phoff,
                ..TestElf::new()
            },
            ElfError::Truncated { .. }
        );
    }
    let many = TestElf {
        phnum: Some(1170),
        len: 0x20000,
        ..TestElf::new()
    };
    assert_eq!(parse(&many).unwrap().header_count(), 1170);
}

#[test]
fn a_program_must_have_something_to_load() {
    let empty = Header {
        file_len: 0,
        mem_len: 0,
        ..CODE
    };
    for headers in [vec![over(elf::PT_NOTE, 0, 0)], vec![empty]] {
        assert_rejected!(TestElf::with_headers(&headers), ElfError::NoLoadableSegment);
    }
}

#[test]
fn corrupt_segments_are_rejected() {
    let with = |data| TestElf::with_headers(&[CODE, data]);
    assert_rejected!(
        with(Header {
            file_len: 0x3001,
            ..DATA
        }),
        ElfError::FileLargerThanMemory { index: 1, .. }
    );
    assert_rejected!(
        with(Header {
            offset: 0x1101,
            ..DATA
        }),
        ElfError::Misaligned { index: 1, .. }
    );
    assert_rejected!(
        with(Header {
            align: 0x1001,
            ..DATA
        }),
        ElfError::BadAlignment { index: 1, .. }
    );
    assert_rejected!(
        with(Header {
            offset: u64::MAX - 0xeff,
            ..DATA
        }),
        ElfError::Truncated {
            what: "a segment",
            ..
        }
    );
    for (vaddr, mem_len) in [
        (USER_END - 0xf00, 0x3000),
        (u64::MAX - 0xeff, 0x3000),
        (0xffff_8000_0000_0100, 0x3000),
        (0x40_2100, u64::MAX),
        (0x40_2100, USER_END),
    ] {
        assert_rejected!(
            with(Header {
                vaddr,
                mem_len,
                ..DATA
            }),
            ElfError::OutsideUserMemory { index: 1, .. }
        );
    }
}

#[test]
fn segments_ascend_and_share_no_page() {
    let with = |vaddr| TestElf::with_headers(&[CODE, Header { vaddr, ..DATA }]);
    assert_rejected!(with(0x3f_0100), ElfError::Unsorted { index: 1, .. });
    assert_rejected!(with(0x40_0100), ElfError::Overlapping { index: 1, .. });
    assert!(parse(&with(0x40_1100)).is_ok(), "the very next page");

    let tail = Header {
        vaddr: 0x40_5200,
        offset: 0x1200,
        ..DATA
    };
    let one_page = TestElf::with_headers(&[CODE, DATA, tail]);
    assert_rejected!(
        one_page,
        ElfError::Overlapping {
            index: 2,
            vaddr: 0x40_5200
        }
    );
}

#[test]
fn zeros_need_no_place_in_the_file() {
    let bss = Header {
        offset: u64::MAX,
        file_len: 0,
        ..DATA
    };
    assert!(parse(&TestElf::with_headers(&[CODE, bss])).is_ok());
}

#[test]
fn the_entry_point_is_code() {
    for entry in [0, 0x3f_ffff, 0x40_1000, 0x40_2200, u64::MAX] {
        assert_rejected!(
            TestElf { entry, ..TestElf::new() },
            ElfError::EntryNotExecutable { entry: e } if e == entry
        );
    }
    assert!(
        parse(&TestElf {
            entry: 0x40_0fff,
            ..TestElf::new()
        })
        .is_ok()
    );
}

#[test]
fn the_interpreter_is_a_terminated_path() {
    let named = |path: &[u8]| Elf::parse(&with_interpreter(path)[..]);
    let elf = named(b"/lib64/ld.so\0").unwrap();
    assert_eq!(elf.interpreter().unwrap().as_c_str(), c"/lib64/ld.so");
    let cut = named(b"/lib\0/ld.so\0").unwrap();
    assert_eq!(
        cut.interpreter().unwrap().as_c_str(),
        c"/lib",
        "as Linux reads it"
    );

    assert!(matches!(
        named(b"/lib64/ld.so"),
        Err(ElfError::InterpreterNotTerminated)
    ));
    for len in [0, 1, 4097, u64::MAX] {
        assert_rejected!(
            TestElf::new().and(over(elf::PT_INTERP, 0x800, len)),
            ElfError::BadInterpreterLength { .. }
        );
    }
    assert_rejected!(
        TestElf::new().and(over(elf::PT_INTERP, 0x1fff, 2)),
        ElfError::Truncated {
            what: "the interpreter path (PT_INTERP)",
            ..
        }
    );
}

#[test]
fn corrupt_thread_local_storage_is_rejected() {
    let tls = Header {
        align: 64,
        ..over(elf::PT_TLS, 0x100, 8)
    };
    assert!(parse(&TestElf::new().and(tls)).is_ok());
    assert_rejected!(
        TestElf::new().and(Header { align: 24, ..tls }),
        ElfError::BadAlignment {
            index: 0,
            align: 24
        }
    );
    assert_rejected!(
        TestElf::new().and(Header { mem_len: 7, ..tls }),
        ElfError::TlsFileLargerThanMemory { index: 0, .. }
    );
}

#[test]
fn only_the_stack_header_makes_the_stack_executable() {
    let stack = over(elf::PT_GNU_STACK, 0, 0);
    let prot = |header| parse(&TestElf::new().and(header)).unwrap().stack_prot();
    assert_eq!(prot(stack), Prot::READ | Prot::WRITE);
    assert_eq!(prot(Header { flags: 7, ..stack }), Prot::all());
}

#[test]
fn headers_outside_all_segments_have_no_address() {
    let late = Header {
        offset: 0x1000,
        ..CODE
    };
    let elf = parse(&TestElf::with_headers(&[late])).unwrap();
    assert_eq!(elf.headers_vaddr(), None);
}

#[test]
fn the_largest_alignment_counts() {
    let huge = Header {
        align: 1 << 46,
        ..CODE
    };
    assert_eq!(
        parse(&TestElf::with_headers(&[huge, DATA]))
            .unwrap()
            .align(),
        1 << 46
    );
    let none = Header { align: 0, ..CODE };
    assert_eq!(
        parse(&TestElf::with_headers(&[none])).unwrap().align(),
        PAGE_SIZE
    );
}

#[test]
fn a_failing_read_is_told_from_a_short_file() {
    struct Broken(io::ErrorKind);
    impl ReadAt for Broken {
        fn byte_len(&self) -> io::Result<u64> {
            Ok(1 << 20)
        }
        fn read_exact_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
            Err(self.0.into())
        }
    }
    let error = |kind| Elf::parse(&Broken(kind)).unwrap_err();
    assert!(matches!(error(io::ErrorKind::Other), ElfError::Io(_)));
    assert!(matches!(
        error(io::ErrorKind::UnexpectedEof),
        ElfError::Truncated { .. }
    ));
}
