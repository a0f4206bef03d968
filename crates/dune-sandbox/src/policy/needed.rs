//! Which files a program needs to be loaded at all.
//!
//! The program itself (a script: and its interpreters), its dynamic linker,
//! and the libraries that the two name, found where the linker would find
//! them: `LD_LIBRARY_PATH`, the images' run paths, the linker's cache, the
//! default folders. Every place is taken, not only the first, so that what
//! the linker chooses is among them. What a program opens by name later
//! (plugins, locales, `dlopen`) is not.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use dune_loader::{ImageError, Program};
use object::elf::{
    DT_NEEDED, DT_NULL, DT_RPATH, DT_RUNPATH, DT_STRSZ, DT_STRTAB, FileHeader64, PT_LOAD,
};
use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use object::{Endianness, ReadCache, ReadRef};

/// The dynamic linker's cache, which it reads first.
const CACHE: &str = "/etc/ld.so.cache";
/// Libraries that the dynamic linker loads into every program.
const PRELOAD: &str = "/etc/ld.so.preload";
/// Where the linkers of glibc and musl look last.
const DEFAULT_FOLDERS: [&str; 7] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
    "/usr/local/lib",
];

/// The files that loading `path` with `environment` needs.
///
/// # Errors
///
/// If it is no program that can be run.
pub fn to_load(
    path: &Path,
    environment: &[(OsString, OsString)],
) -> Result<Vec<PathBuf>, ImageError> {
    // What the `#!` lines put before this are interpreters and scripts.
    let mark = CString::default();
    let program = Program::open(path, vec![mark.clone(), mark.clone()])?;
    let mut found = vec![path.to_owned(), program.image.path.clone()];
    found.extend(program.argv.iter().map(|arg| of_bytes(arg.to_bytes())));
    found.retain(|path| !path.as_os_str().is_empty());
    let Some(linker) = &program.linker else {
        return Ok(found);
    };
    found.push(linker.path.clone());
    found.extend([CACHE, PRELOAD].map(PathBuf::from));

    let variable = |name: &str| {
        let value = environment.iter().find(|(other, _)| other == name);
        value.map_or(OsStr::new(""), |(_, value)| value)
    };
    let mut search = Search {
        folders: split(variable("LD_LIBRARY_PATH").as_bytes(), b":;")
            .chain(DEFAULT_FOLDERS.map(PathBuf::from))
            .collect(),
        cache: std::fs::read(CACHE).unwrap_or_default(),
        seen: BTreeSet::new(),
        found,
    };
    let preload = std::fs::read(PRELOAD).unwrap_or_default();
    for name in split(variable("LD_PRELOAD").as_bytes(), b": ").chain(split(&preload, b": \n")) {
        search.library(name.as_os_str().as_bytes(), &[]);
    }
    search.image(&program.image.path);
    Ok(search.found)
}

struct Search {
    folders: Vec<PathBuf>,
    cache: Vec<u8>,
    /// Names and paths that were looked for already.
    seen: BTreeSet<Vec<u8>>,
    found: Vec<PathBuf>,
}

impl Search {
    /// Adds what the image at `path` needs.
    fn image(&mut self, path: &Path) {
        let Some(dynamic) = dynamic(path) else { return };
        // The linker takes `$ORIGIN` from the resolved path.
        let resolved = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let origin = resolved.parent().unwrap_or(Path::new("/"));
        let folders: Vec<PathBuf> = dynamic
            .run_paths
            .iter()
            .flat_map(|list| split(list, b":"))
            .map(|folder| expand(&folder, origin))
            .collect();
        for name in dynamic.needed {
            self.library(&name, &folders);
        }
    }

    fn library(&mut self, name: &[u8], run_paths: &[PathBuf]) {
        if name.is_empty() || !self.seen.insert(name.to_vec()) {
            return;
        }
        let named = of_bytes(name);
        let candidates: Vec<PathBuf> = if name.contains(&b'/') {
            vec![named]
        } else {
            let folders = run_paths.iter().chain(&self.folders);
            folders
                .map(|folder| folder.join(&named))
                .chain(cached(&self.cache, name))
                .collect()
        };
        for path in candidates {
            if path.is_file() && self.seen.insert(path.as_os_str().as_bytes().to_vec()) {
                self.image(&path);
                self.found.push(path);
            }
        }
    }
}

/// What an image says to the dynamic linker.
#[derive(Debug, Default)]
struct Dynamic {
    needed: Vec<Vec<u8>>,
    run_paths: Vec<Vec<u8>>,
}

/// Reads it, or nothing where it cannot be read: then the linker cannot either.
fn dynamic(path: &Path) -> Option<Dynamic> {
    /// Longer names and lists than this are none.
    const LONGEST: u64 = 1 << 16;
    let cache = ReadCache::new(File::open(path).ok()?);
    let header = FileHeader64::<Endianness>::parse(&cache).ok()?;
    let endian = header.endian().ok()?;
    let segments = header.program_headers(endian, &cache).ok()?;
    let entries = segments
        .iter()
        .find_map(|segment| segment.dynamic(endian, &cache).ok().flatten())?;
    let entries: Vec<(i64, u64)> = entries
        .iter()
        .map(|entry| (entry.d_tag(endian), entry.d_val(endian)))
        .take_while(|(tag, _)| *tag != DT_NULL)
        .collect();
    let value = |wanted: i64| {
        let found = entries.iter().find(|(tag, _)| *tag == wanted);
        found.map(|(_, value)| *value)
    };
    let strings = value(DT_STRTAB)?;
    let size = value(DT_STRSZ)?;
    let file_offset = segments.iter().find_map(|segment| {
        let (start, len) = (segment.p_vaddr(endian), segment.p_filesz(endian));
        let inside = segment.p_type(endian) == PT_LOAD && start <= strings && strings - start < len;
        inside.then(|| segment.p_offset(endian).checked_add(strings - start))?
    })?;
    let string = |at: u64| -> Option<Vec<u8>> {
        let len = size.checked_sub(at)?.min(LONGEST);
        let bytes = (&cache)
            .read_bytes_at(file_offset.checked_add(at)?, len)
            .ok()?;
        CStr::from_bytes_until_nul(bytes)
            .ok()
            .map(|text| text.to_bytes().to_vec())
    };
    let all = |wanted: i64| {
        let of = entries.iter().filter(move |(tag, _)| *tag == wanted);
        of.filter_map(|(_, at)| string(*at))
    };
    Some(Dynamic {
        needed: all(DT_NEEDED).collect(),
        run_paths: all(DT_RPATH).chain(all(DT_RUNPATH)).collect(),
    })
}

/// Where glibc's cache has a library of that name. The format is that of
/// `ldconfig` (a header of 48 bytes, entries of 24, offsets from the header).
fn cached(cache: &[u8], name: &[u8]) -> Vec<PathBuf> {
    const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
    const HEADER: usize = 48;
    const ENTRY: usize = 24;
    /// `FLAG_X8664_LIB64 | FLAG_ELF_LIBC6`, without the bits for old systems.
    const X86_64: u32 = 0x0303;
    // An older table may stand before it.
    let Some(start) = cache.windows(MAGIC.len()).position(|bytes| bytes == MAGIC) else {
        return Vec::new();
    };
    let table = &cache[start..];
    let number = |at: usize| {
        let bytes = table.get(at..)?.first_chunk::<4>()?;
        Some(u32::from_le_bytes(*bytes))
    };
    let string = |at: u32| {
        let bytes = table.get(at as usize..)?;
        CStr::from_bytes_until_nul(bytes).ok().map(CStr::to_bytes)
    };
    let count = number(MAGIC.len()).unwrap_or(0) as usize;
    (0..count)
        .map_while(|index| {
            let at = HEADER.checked_add(index.checked_mul(ENTRY)?)?;
            Some((number(at)?, number(at + 4)?, number(at + 8)?))
        })
        .filter(|(flags, key, _)| *flags == X86_64 && string(*key) == Some(name))
        .filter_map(|(_, _, value)| string(value).map(of_bytes))
        .collect()
}

/// `$ORIGIN` and `$LIB` in a folder of a run path.
fn expand(folder: &Path, origin: &Path) -> PathBuf {
    let text = folder.to_string_lossy();
    let origin = origin.to_string_lossy();
    let text = text
        .replace("${ORIGIN}", &origin)
        .replace("$ORIGIN", &origin);
    let lib = "lib/x86_64-linux-gnu";
    PathBuf::from(text.replace("${LIB}", lib).replace("$LIB", lib))
}

fn split<'a>(list: &'a [u8], separators: &'a [u8]) -> impl Iterator<Item = PathBuf> + 'a {
    list.split(|byte| separators.contains(byte))
        .filter(|part| !part.is_empty())
        .map(of_bytes)
}

fn of_bytes(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_needs_itself_its_linker_and_its_libraries() {
        let found = to_load(Path::new("/bin/ls"), &[]).unwrap();
        let has = |name: &str| found.iter().any(|path| path.ends_with(name));
        assert!(has("ls") && has("libc.so.6"), "{found:?}");
        assert!(has("ld-linux-x86-64.so.2"), "{found:?}");
        assert!(found.iter().all(|path| !path.ends_with("passwd")));
    }

    #[test]
    fn a_script_needs_its_interpreter_too() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("script");
        std::fs::write(&script, "#!/bin/sh -e\n").unwrap();
        std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
        let found = to_load(&script, &[]).unwrap();
        let shell: PathBuf = "/bin/sh".into();
        assert!(
            found.contains(&script) && found.contains(&shell),
            "{found:?}"
        );
        assert!(
            found.iter().any(|path| path.ends_with("libc.so.6")),
            "{found:?}"
        );
    }

    #[test]
    fn the_cache_is_read_and_junk_is_not() {
        let cache = std::fs::read(CACHE).unwrap_or_default();
        if !cache.is_empty() {
            assert!(!cached(&cache, b"libc.so.6").is_empty());
            assert!(cached(&cache, b"no-such-library.so").is_empty());
            for end in 0..cache.len().min(400) {
                let _ = cached(&cache[..end], b"libc.so.6");
            }
        }
        assert!(cached(b"glibc-ld.so.cache1.1\xff\xff\xff\xff", b"x").is_empty());
    }
}
