//! The files a command needs, for a guest that cannot see the host's.
//!
//! A program brings its interpreter and its shared libraries along: its own
//! dynamic loader is asked for them, so that search paths, `LD_LIBRARY_PATH`
//! and run paths count as they do when it runs. What a program opens while it
//! runs nobody can know: that is named by the user (`--with`).

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{LabError, io_error};
use crate::initramfs::Archive;
use crate::kernel::{u16_at, u32_at, u64_at};
use crate::tools;

/// Scripts that name scripts as their interpreter are followed so far.
const MAX_SCRIPTS: usize = 4;

/// The first bytes of a file, which tell what it is.
const HEAD: usize = 4096;

/// Files by their absolute path in the guest, which is that on the host.
#[derive(Debug, Default)]
pub(crate) struct Payload {
    files: BTreeSet<PathBuf>,
    folders: BTreeSet<PathBuf>,
}

impl Payload {
    /// Adds an empty folder.
    pub(crate) fn folder(&mut self, path: &Path) {
        self.folders.insert(path.to_owned());
    }

    /// Adds a file or a folder with everything in it. Symbolic links to files
    /// become files, those to folders are left out.
    ///
    /// # Errors
    ///
    /// As for [`program`](Self::program).
    pub(crate) fn path(&mut self, path: &Path) -> Result<(), LabError> {
        let path =
            std::path::absolute(path).map_err(io_error(format!("find {}", path.display())))?;
        let metadata =
            fs::metadata(&path).map_err(io_error(format!("--with {}", path.display())))?;
        if !metadata.is_dir() {
            return self.program(&path);
        }
        self.folder(&path);
        let step = || format!("read the folder {}", path.display());
        for entry in fs::read_dir(&path).map_err(io_error(step()))? {
            let entry = entry.map_err(io_error(step()))?;
            let kind = entry.file_type().map_err(io_error(step()))?;
            let target = fs::metadata(entry.path());
            let to_folder = target.as_ref().is_ok_and(fs::Metadata::is_dir);
            let to_file = target.as_ref().is_ok_and(fs::Metadata::is_file);
            if to_file || (to_folder && !kind.is_symlink()) {
                self.path(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Adds a file and, when it is a program or a script, what it needs to start.
    ///
    /// # Errors
    ///
    /// [`LabError::Io`] when a file cannot be read, [`LabError::Missing`] when
    /// a library is not there.
    pub(crate) fn program(&mut self, path: &Path) -> Result<(), LabError> {
        self.with_needs(path, MAX_SCRIPTS)
    }

    fn with_needs(&mut self, path: &Path, scripts: usize) -> Result<(), LabError> {
        if !self.files.insert(path.to_owned()) {
            return Ok(());
        }
        let head = head(path)?;
        if let Some(interpreter) = elf_interpreter(&head) {
            self.files.insert(interpreter.clone());
            for library in libraries(&interpreter, path)? {
                self.files.insert(library);
            }
        } else if let Some(words) = shebang(&head)
            && scripts > 0
        {
            for word in words {
                // `#!/usr/bin/env NAME`: both are needed; options are not found.
                if let Some(program) = find_program(&word, Path::new("/")) {
                    self.with_needs(&program, scripts - 1)?;
                }
            }
        }
        Ok(())
    }

    /// Writes everything into the archive.
    ///
    /// # Errors
    ///
    /// [`LabError::Io`] when a file cannot be read, [`LabError::Options`] when
    /// it would replace a file of the lab.
    pub(crate) fn pack(&self, archive: &mut Archive, taken: &[&str]) -> Result<(), LabError> {
        let mut folders = BTreeSet::new();
        for path in &self.folders {
            folders.extend(path.ancestors());
        }
        for path in &self.files {
            folders.extend(path.ancestors().skip(1));
        }
        // A folder sorts before what is in it.
        let relative = |path: &Path| path.strip_prefix("/").map(Path::to_owned).ok();
        for path in folders.into_iter().filter_map(relative) {
            if !path.as_os_str().is_empty() {
                archive.folder(archive_name(&path)?);
            }
        }
        for path in &self.files {
            let Some(inside) = relative(path) else {
                continue;
            };
            let name = archive_name(&inside)?;
            if taken.contains(&name) {
                return Err(LabError::Options(format!(
                    "{} cannot be taken along: the lab has a file of that name",
                    path.display()
                )));
            }
            let step = || format!("read {}", path.display());
            let contents = fs::read(path).map_err(io_error(step()))?;
            let mode = fs::metadata(path)
                .map_err(io_error(step()))?
                .permissions()
                .mode();
            archive.file(name, mode & 0o7777, &contents);
        }
        Ok(())
    }
}

fn archive_name(path: &Path) -> Result<&str, LabError> {
    path.to_str().ok_or_else(|| {
        LabError::Options(format!(
            "{}: the lab takes only names in UTF-8",
            path.display()
        ))
    })
}

/// Finds a program as `execvp` would: by PATH unless it has a slash.
pub(crate) fn find_program(name: &OsString, cwd: &Path) -> Option<PathBuf> {
    let executable = |path: &PathBuf| {
        fs::metadata(path)
            .is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    if name.as_bytes().contains(&b'/') {
        return Some(cwd.join(name)).filter(executable);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| cwd.join(folder).join(name))
        .find(executable)
}

fn head(path: &Path) -> Result<Vec<u8>, LabError> {
    use std::io::Read;
    let mut head = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(HEAD as u64).read_to_end(&mut head))
        .map_err(io_error(format!("read {}", path.display())))?;
    Ok(head)
}

/// The dynamic loader that a 64-bit ELF program asks for.
fn elf_interpreter(head: &[u8]) -> Option<PathBuf> {
    const INTERP: u32 = 3;
    if head.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let table = usize::try_from(u64_at(head, 32)?).ok()?;
    let size = usize::from(u16_at(head, 54)?);
    let count = usize::from(u16_at(head, 56)?);
    let header = (0..count)
        .filter_map(|index| head.get(table.checked_add(index * size)?..))
        .find(|header| u32_at(header, 0) == Some(INTERP))?;
    let offset = usize::try_from(u64_at(header, 8)?).ok()?;
    let length = usize::try_from(u64_at(header, 32)?).ok()?;
    let name = head.get(offset..offset.checked_add(length)?)?;
    let name = name.strip_suffix(b"\0").unwrap_or(name);
    Some(PathBuf::from(OsString::from_vec(name.to_vec())))
}

/// The words after `#!`.
fn shebang(head: &[u8]) -> Option<Vec<OsString>> {
    let line = head
        .strip_prefix(b"#!")?
        .split(|byte| *byte == b'\n')
        .next()?;
    Some(
        line.split(u8::is_ascii_whitespace)
            .filter(|word| !word.is_empty())
            .map(|word| OsString::from_vec(word.to_vec()))
            .collect(),
    )
}

/// Asks a program's dynamic loader which libraries it would load.
fn libraries(loader: &Path, program: &Path) -> Result<Vec<PathBuf>, LabError> {
    let listing = tools::output_of(Command::new(loader).arg("--list").arg(program))?;
    let mut found = Vec::new();
    for line in String::from_utf8_lossy(&listing).lines() {
        match library_in(line) {
            Listed::At(path) => found.push(path),
            Listed::Nowhere(name) => {
                return Err(LabError::Missing {
                    what: format!("the library {name} of {}", program.display()),
                    remedy: "install it, or set LD_LIBRARY_PATH".to_owned(),
                });
            }
            Listed::Nothing => {}
        }
    }
    Ok(found)
}

#[derive(Debug, PartialEq, Eq)]
enum Listed {
    At(PathBuf),
    Nowhere(String),
    Nothing,
}

/// One line of a loader's list: `name => path (address)` or `path (address)`.
fn library_in(line: &str) -> Listed {
    let line = line.trim();
    if let Some((name, "not found")) = line.split_once(" => ") {
        return Listed::Nowhere(name.to_owned());
    }
    let place = line.split_once(" => ").map_or(line, |(_, place)| place);
    let path = place.rsplit_once(" (0x").map_or(place, |(path, _)| path);
    if path.starts_with('/') {
        Listed::At(PathBuf::from(path))
    } else {
        // The kernel's own (linux-vdso) has no path.
        Listed::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_loaders_are_understood() {
        let at = |path: &str| Listed::At(PathBuf::from(path));
        assert_eq!(
            library_in("\tlinux-vdso.so.1 (0x00007ffd0)"),
            Listed::Nothing
        );
        assert_eq!(
            library_in("\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)"),
            at("/lib/x86_64-linux-gnu/libc.so.6")
        );
        assert_eq!(
            library_in("\t/lib64/ld-linux-x86-64.so.2 (0x00007f12)"),
            at("/lib64/ld-linux-x86-64.so.2")
        );
        assert_eq!(
            library_in("\tliba.so => /opt/with (space)/liba.so (0x0000)"),
            at("/opt/with (space)/liba.so")
        );
        assert_eq!(
            library_in("\tlibgone.so => not found"),
            Listed::Nowhere("libgone.so".to_owned())
        );
        assert_eq!(library_in("\tstatically linked"), Listed::Nothing);
    }

    #[test]
    fn this_program_brings_its_libraries() {
        let this = std::env::current_exe().unwrap();
        let mut payload = Payload::default();
        payload.program(&this).unwrap();
        assert!(payload.files.contains(&this));
        let has = |part: &str| {
            payload
                .files
                .iter()
                .any(|path| path.to_string_lossy().contains(part))
        };
        assert!(has("libc.so"), "{payload:?}");
        assert!(has("ld-linux"), "{payload:?}");
    }

    #[test]
    fn scripts_bring_their_interpreter() {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("script");
        fs::write(&script, "#!/usr/bin/env sh\necho\n").unwrap();
        fs::create_dir(folder.path().join("inside")).unwrap();
        let mut payload = Payload::default();
        payload.path(folder.path()).unwrap();
        assert!(payload.files.contains(&script));
        assert!(payload.files.contains(Path::new("/usr/bin/env")));
        assert!(payload.files.iter().any(|path| path.ends_with("bin/sh")));
        assert!(payload.folders.contains(&folder.path().join("inside")));
        let mut archive = Archive::default();
        payload.pack(&mut archive, &["init"]).unwrap();
        assert!(
            payload
                .pack(&mut Archive::default(), &["usr/bin/env"])
                .is_err()
        );
    }

    #[test]
    fn broken_headers_are_no_programs() {
        let this = head(&std::env::current_exe().unwrap()).unwrap();
        for length in 0..256 {
            let _ = elf_interpreter(&this[..length]);
        }
        for at in 0..256 {
            let mut broken = this.clone();
            broken[at] = 0xff;
            let _ = elf_interpreter(&broken);
        }
        assert_eq!(elf_interpreter(b"#!/bin/sh"), None);
        assert_eq!(shebang(b"plain text"), None);
    }
}
