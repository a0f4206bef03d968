use super::*;
use crate::auxv::{AuxEntry, AuxKey, Ids, Machine, parse_auxv};
use crate::plan::{Layout, LoadPlan};
use crate::test_elf::TestElf;

fn at(addr: u64) -> UserAddr {
    UserAddr::new(addr).unwrap()
}

fn plan() -> LoadPlan {
    let layout = Layout {
        exe_base: at(0x10_0000_0000),
        interp_base: at(0x20_0000_0000),
        user_range: UserRange::new(at(0x1_0000), at(0x40_0000_0000)).unwrap(),
    };
    LoadPlan::new(
        &crate::Elf::parse(&TestElf::new().bytes()[..]).unwrap(),
        None,
        &layout,
    )
    .unwrap()
}

fn auxv(plan: &LoadPlan) -> AuxvInputs<'_> {
    AuxvInputs {
        plan,
        ids: Ids {
            uid: 1000,
            euid: 1000,
            gid: 100,
            egid: 100,
        },
        machine: Machine {
            hwcap: 0xbfeb,
            hwcap2: 2,
            clock_ticks: 100,
            min_signal_stack: 3376,
        },
        random: *b"sixteen random b",
        vdso: None,
    }
}

fn strings(count: usize, len: usize) -> Vec<CString> {
    vec![CString::new(vec![b'x'; len]).unwrap(); count]
}

/// Reads an image as libc does.
struct Decoded<'a> {
    image: &'a StackImage,
    argv: Vec<Vec<u8>>,
    envp: Vec<Vec<u8>>,
    auxv: Vec<AuxEntry>,
}

impl<'a> Decoded<'a> {
    fn new(image: &'a StackImage) -> Self {
        let word =
            |index: usize| u64::from_le_bytes(image.bytes[8 * index..][..8].try_into().unwrap());
        let mut index = 1;
        let mut list = || {
            let mut found = Vec::new();
            while word(index) != 0 {
                found.push(string_at(image, word(index)).to_vec());
                index += 1;
            }
            index += 1;
            found
        };
        let (argv, envp) = (list(), list());
        assert_eq!(word(0), argv.len() as u64);
        Self {
            image,
            argv,
            envp,
            auxv: parse_auxv(&image.bytes[8 * index..]).collect(),
        }
    }

    fn value(&self, key: AuxKey) -> Option<u64> {
        self.auxv
            .iter()
            .find(|entry| entry.key == key)
            .map(|entry| entry.value)
    }
}

fn string_at(image: &StackImage, addr: u64) -> &[u8] {
    let from = (addr - image.sp.get()) as usize;
    CStr::from_bytes_until_nul(&image.bytes[from..])
        .unwrap()
        .to_bytes()
}

#[test]
fn libc_finds_everything_in_its_place() {
    let plan = plan();
    for (argc, envc) in [(0, 0), (1, 0), (1, 1), (2, 1), (3, 5), (200, 99)] {
        for top in [0x30_0000_0000, 0x30_0000_0fff, 0x30_0000_0008] {
            let image = InitialStack {
                top: at(top),
                len: 8 << 20,
                filename: c"/bin/program",
                argv: &strings(argc, argc),
                envp: &strings(envc, 3),
                auxv: auxv(&plan),
            }
            .build()
            .unwrap();
            assert_eq!(image.sp.get() % 16, 0);
            assert_eq!(image.sp.get() + image.bytes.len() as u64, top);
            assert_eq!(
                image.arguments.end(),
                image.environment.start(),
                "one after the other"
            );

            let decoded = Decoded::new(&image);
            assert_eq!(decoded.argv, vec![vec![b'x'; argc]; argc]);
            assert_eq!(decoded.envp, vec![b"xxx"; envc]);
            let string = |key| string_at(decoded.image, decoded.value(key).unwrap());
            assert_eq!(string(AuxKey::EXECFN), b"/bin/program");
            assert_eq!(string(AuxKey::PLATFORM), b"x86_64");
            assert!(string(AuxKey::RANDOM).starts_with(b"sixteen random b"));
        }
    }
}

#[test]
fn the_auxiliary_vector_describes_the_program() {
    let plan = plan();
    let mut inputs = auxv(&plan);
    inputs.vdso = Some(at(0x50_0000));
    inputs.ids.egid = 0;
    let stack = InitialStack {
        top: at(0x30_0000_0000),
        len: 8 << 20,
        filename: c"x",
        argv: &[],
        envp: &[],
        auxv: inputs,
    };
    let image = stack.build().unwrap();
    let decoded = Decoded::new(&image);
    for (key, value) in [
        (AuxKey::SYSINFO_EHDR, 0x50_0000),
        (AuxKey::PHDR, 0x40_0040),
        (AuxKey::PHENT, 56),
        (AuxKey::PHNUM, 2),
        (AuxKey::PAGESZ, 4096),
        (AuxKey::BASE, 0),
        (AuxKey::FLAGS, 0),
        (AuxKey::ENTRY, 0x40_0800),
        (AuxKey::UID, 1000),
        (AuxKey::EGID, 0),
        (AuxKey::SECURE, 1),
        (AuxKey::HWCAP, 0xbfeb),
        (AuxKey::HWCAP2, 2),
        (AuxKey::CLKTCK, 100),
        (AuxKey::MINSIGSTKSZ, 3376),
    ] {
        assert_eq!(decoded.value(key), Some(value), "{key:?}");
    }
    let without = InitialStack {
        auxv: AuxvInputs {
            vdso: None,
            ..inputs
        },
        ..stack
    };
    assert_eq!(
        Decoded::new(&without.build().unwrap()).value(AuxKey::SYSINFO_EHDR),
        None
    );
}

#[test]
fn strings_are_limited_as_on_linux() {
    let plan = plan();
    let build = |len: u64, argv: &[CString]| {
        InitialStack {
            top: at(0x30_0000_0000),
            len,
            filename: c"x",
            argv,
            envp: &[],
            auxv: auxv(&plan),
        }
        .build()
        .map(|image| Decoded::new(&image).argv.len())
    };
    let longest = STRING_LIMIT as usize - 1;
    assert_eq!(build(8 << 20, &strings(1, longest)), Ok(1));
    assert_eq!(
        build(8 << 20, &strings(1, longest + 1)),
        Err(StackError::StringTooLong {
            len: STRING_LIMIT + 1
        })
    );
    // 1008 bytes each with their pointer, and two for the file's name.
    let string = strings(1, 999).remove(0);
    let count = |limit: usize| (limit - 2) / 1008;
    for (len, limit) in [
        (8 << 20, 2 << 20),
        (1 << 18, 128 << 10),
        (u64::MAX, 6 << 20),
    ] {
        let fits = vec![string.clone(); count(limit)];
        assert_eq!(build(len, &fits), Ok(fits.len()));
        let error = build(len, &vec![string.clone(); count(limit) + 1]).unwrap_err();
        assert!(
            matches!(error, StackError::TooLong { limit: l, .. } if l == limit as u64),
            "{error}"
        );
        assert_eq!(error.errno(), Errno::TOOBIG);
    }
}

#[test]
fn a_stack_too_small_for_its_first_bytes_is_an_error() {
    let plan = plan();
    for (top, len) in [
        (0, 8 << 20),
        (100, 8 << 20),
        (0x30_0000_0000, 100),
        (0x30_0000_0000, 0),
    ] {
        let stack = InitialStack {
            top: at(top),
            len,
            filename: c"x",
            argv: &[],
            envp: &[],
            auxv: auxv(&plan),
        };
        assert!(
            matches!(stack.build(), Err(StackError::TooLong { .. })),
            "{top:#x} {len}"
        );
    }
}
