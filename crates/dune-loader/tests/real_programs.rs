//! Programs of this machine are accepted and planned as its kernel loads them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use dune_loader::{
    AuxKey, Elf, ElfKind, Layout, LoadPlan, Program, UserAddr, UserRange, find_command, parse_auxv,
};

fn at(addr: u64) -> UserAddr {
    UserAddr::new(addr).unwrap()
}

fn layout() -> Layout {
    Layout {
        exe_base: at(0x5500_0000_0000),
        interp_base: at(0x7f00_0000_0000),
        user_range: UserRange::new(at(0x1_0000), at(0x7fff_ffff_f000)).unwrap(),
    }
}

/// Opens a program, or says that it is not there to be tested.
fn open(path: &str) -> Option<Program> {
    if !Path::new(path).exists() {
        eprintln!("ignored: {path} is not installed, so it was not tested");
        return None;
    }
    Some(Program::open(Path::new(path), vec![c"test".into()]).unwrap())
}

#[test]
fn dynamic_programs_come_with_their_linker() {
    for path in [
        "/bin/ls",
        "/bin/cat",
        "/usr/bin/python3",
        "/usr/bin/perl",
        "/usr/bin/git",
    ] {
        let Some(program) = open(path) else { continue };
        assert!(program.linker.is_some(), "{path}");
        let plan = program.plan(&layout()).unwrap();
        let linker = plan.interpreter.as_ref().unwrap();
        assert_eq!(linker.load_bias, 0x7f00_0000_0000, "{path}");
        assert_eq!(plan.start(), linker.entry, "{path}");
        assert!(plan.headers.is_some(), "{path}");
    }
}

#[test]
fn static_and_fixed_programs_are_planned() {
    let mut kinds = Vec::new();
    for path in ["/bin/busybox", "/sbin/ldconfig", "/usr/bin/bash-static"] {
        let Some(program) = open(path) else { continue };
        if program.linker.is_none() {
            assert_eq!(
                program.plan(&layout()).unwrap().start(),
                program.plan(&layout()).unwrap().entry
            );
        }
        kinds.push(program.image.elf.kind());
    }
    if !kinds.contains(&ElfKind::Fixed) {
        eprintln!("ignored: no program at fixed addresses is installed, so none was tested");
    }
}

/// Every ELF file of the machine's program folders is taken, or refused for a
/// reason that is true of it.
#[test]
fn all_programs_of_the_machine_are_accepted() {
    let mut accepted = 0;
    let mut seen = HashMap::new();
    for folder in [
        "/bin",
        "/sbin",
        "/usr/bin",
        "/usr/sbin",
        "/usr/lib/git-core",
    ] {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let Ok(path) = fs::canonicalize(entry.path()) else {
                continue;
            };
            if !path.is_file() || seen.insert(path.clone(), ()).is_some() {
                continue;
            }
            match Program::open(&path, vec![]) {
                Ok(program) => {
                    accepted += 1;
                    if let Err(error) = program.plan(&layout()) {
                        panic!("{error}");
                    }
                }
                Err(error) => {
                    let starts_as_elf = fs::read(&path)
                        .is_ok_and(|bytes| bytes.starts_with(b"\x7fELF\x02\x01\x01"));
                    assert!(!starts_as_elf, "{error}");
                    eprintln!("refused: {error}");
                }
            }
        }
    }
    eprintln!("{accepted} programs accepted");
    assert!(accepted > 20, "only {accepted} programs on this machine?");
}

/// A line of `/proc/self/maps`.
struct Mapping {
    range: UserRange,
    executable: bool,
    file_offset: u64,
    path: PathBuf,
}

fn own_mappings() -> Vec<Mapping> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
    maps.lines()
        .filter(|line| !line.contains("[vsyscall]"))
        .map(|line| {
            let mut fields = line.split_whitespace();
            let (start, end) = fields.next().unwrap().split_once('-').unwrap();
            let rights = fields.next().unwrap();
            let file_offset = hex(fields.next().unwrap());
            Mapping {
                range: UserRange::new(at(hex(start)), at(hex(end))).unwrap(),
                executable: rights.contains('x'),
                file_offset,
                path: fields.nth(2).unwrap_or_default().into(),
            }
        })
        .collect()
}

/// This test program was loaded by the kernel: planned at the same bases, it
/// must come out the same.
#[test]
fn a_plan_agrees_with_what_the_kernel_did() {
    let auxv = fs::read("/proc/self/auxv").unwrap();
    let told = |key| {
        parse_auxv(&auxv)
            .find(|entry| entry.key == key)
            .unwrap()
            .value
    };
    let path = fs::canonicalize("/proc/self/exe").unwrap();
    let program = Program::open(&path, vec![]).unwrap();
    let bias = told(AuxKey::ENTRY).wrapping_sub(program.image.elf.entry());
    let mut layout = layout();
    layout.exe_base = at(bias.wrapping_add(program.image.elf.segments()[0].page_start()));
    layout.interp_base = at(told(AuxKey::BASE));
    let plan = program.plan(&layout).unwrap();

    assert_eq!(plan.load_bias, bias);
    assert_eq!(plan.entry.get(), told(AuxKey::ENTRY));
    assert_eq!(plan.headers.map(UserAddr::get), Some(told(AuxKey::PHDR)));
    assert_eq!(u64::from(plan.header_count), told(AuxKey::PHNUM));
    let linker_bias = plan.interpreter.as_ref().map(|linker| linker.load_bias);
    assert_eq!(linker_bias.unwrap_or(0), told(AuxKey::BASE));

    let mappings = own_mappings();
    let linker_path = program
        .linker
        .as_ref()
        .map(|image| fs::canonicalize(&image.path).unwrap());
    let linker = plan.interpreter.iter().zip(&linker_path);
    let images = linker
        .map(|(plan, path)| (&plan.segments, path))
        .chain([(&plan.segments, &path)]);
    for (segments, path) in images {
        for segment in segments {
            let pages = segment.file_pages().unwrap();
            let mapping = mappings
                .iter()
                .find(|m| m.range.contains(pages.start()))
                .unwrap();
            assert_eq!(&mapping.path, path, "{segment:?}");
            let into = pages.start().get() - mapping.range.start().get();
            assert_eq!(
                mapping.file_offset + into,
                segment.file_offset,
                "{segment:?}"
            );
            assert_eq!(
                mapping.executable,
                segment.prot.contains(dune_loader::Prot::EXEC)
            );
            // The linker has since made a part of it read-only, which split it.
            let mut end = mapping.range.end();
            while end < segment.pages().end() {
                end = mappings
                    .iter()
                    .find(|m| m.range.contains(end))
                    .unwrap()
                    .range
                    .end();
            }
        }
    }
}

#[test]
fn the_dynamic_linker_runs_as_a_program() {
    let Some(ls) = open("/bin/ls") else { return };
    let Some(linker) = ls.linker else { return };
    let program = Program::open(&linker.path, vec![]).unwrap();
    assert!(program.linker.is_none());
    let plan = LoadPlan::new(&program.image.elf, None, &layout()).unwrap();
    assert_eq!(plan.start(), plan.entry);
}

#[test]
fn a_shared_library_is_told_from_a_program() {
    let Some(ls) = open("/bin/ls") else { return };
    let folder = fs::canonicalize(ls.linker.unwrap().path).unwrap();
    let Some(library) = ["libm.so.6", "libdl.so.2"]
        .iter()
        .map(|name| folder.with_file_name(name))
        .find(|path| path.exists())
    else {
        eprintln!("ignored: no shared library was found beside the dynamic linker");
        return;
    };
    let error = Elf::parse(&fs::File::open(library).unwrap()).unwrap_err();
    assert!(error.to_string().contains("shared library"), "{error}");
}

#[test]
fn commands_are_found_in_path() {
    let path = find_command("ls".as_ref(), Some("/no/such/folder:/bin".as_ref())).unwrap();
    assert_eq!(path, Path::new("/bin/ls"));
}
