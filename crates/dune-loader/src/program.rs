//! From a command to an opened program: found, permitted, identified.
//!
//! ```text
//!  command ── find_command ──> path ── open ──> file ── first bytes ──┬─> ELF ──> its interpreter
//!              (PATH)           ^                                     │            (PT_INTERP)
//!                               ╰────────── interpreter <── `#!` line ┴─> neither: an error
//! ```
//!
//! A file is opened once, and what was checked is what is mapped later.
//! Permission is asked of the host kernel under the process's effective ids.
//! Set-user-ID and set-group-ID bits have no effect, as under
//! `no_new_privs`.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::elf::{Elf, ElfError};
use crate::error::{ImageError, lookup_error};
use crate::plan::{Layout, LoadPlan};
use crate::shebang::{SCRIPT_DEPTH_LIMIT, SHEBANG_LIMIT, Shebang};

/// Where commands are looked for when `PATH` is not set, as `execvp` does.
pub const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// An opened ELF file with its checked headers.
#[derive(Debug)]
pub struct Image {
    /// The path it was opened by.
    pub path: PathBuf,
    /// The file, open for reading and closed on `execve`.
    pub file: File,
    /// Its headers.
    pub elf: Elf,
}

/// Everything that `execve` needs to know of the files involved.
#[derive(Debug)]
pub struct Program {
    /// The path given to [`Program::open`], a script's included
    /// (`AT_EXECFN`; its last component is the process's name).
    pub filename: CString,
    /// The arguments, those that `#!` lines added included; never empty.
    pub argv: Vec<CString>,
    /// The program: for a script, its interpreter.
    pub image: Image,
    /// The program's ELF interpreter (the dynamic linker), if it names one.
    /// What this one names as its own interpreter is ignored, as on Linux.
    pub linker: Option<Image>,
}

/// Finds a command as a shell does.
///
/// A command with a slash is its own path, unchecked. Otherwise each folder of
/// `path_variable` (the program's `PATH`; [`DEFAULT_PATH`] when unset) is tried
/// in order; an empty entry is the working directory. The first regular file
/// with execute permission is taken.
///
/// # Errors
///
/// [`ImageError::CommandNotFound`], or [`ImageError::NotExecutable`] for the
/// first match when all matches lack the permission.
///
/// # Examples
///
/// ```
/// use std::ffi::OsStr;
/// use dune_loader::{ImageError, find_command};
///
/// let path = Some(OsStr::new("/usr/bin:/bin"));
/// assert!(find_command(OsStr::new("sh"), path)?.ends_with("sh"));
/// let error = find_command(OsStr::new("no-such-command"), path).unwrap_err();
/// assert_eq!(error.exit_code(), 127);
/// # Ok::<(), ImageError>(())
/// ```
pub fn find_command(command: &OsStr, path_variable: Option<&OsStr>) -> Result<PathBuf, ImageError> {
    if command.as_bytes().contains(&b'/') {
        return Ok(command.into());
    }
    let mut denied = None;
    if !command.is_empty() {
        let folders = path_variable.unwrap_or(OsStr::new(DEFAULT_PATH));
        for folder in folders.as_bytes().split(|&byte| byte == b':') {
            let folder = if folder.is_empty() { b"." } else { folder };
            let candidate = Path::new(OsStr::from_bytes(folder)).join(command);
            match check_executable(&candidate) {
                Ok(()) => return Ok(candidate),
                Err(error @ ImageError::NotExecutable { .. }) => {
                    denied.get_or_insert(error);
                }
                Err(_) => {}
            }
        }
    }
    Err(denied.unwrap_or_else(|| ImageError::CommandNotFound {
        command: command.to_owned(),
    }))
}

impl Program {
    /// Opens the program at `path`, following `#!` lines and naming the
    /// dynamic linker.
    ///
    /// `path` is used as it is (see [`find_command`] for `PATH`); a relative
    /// one, here or in a `#!` line, starts at the working directory. An empty
    /// `argv` becomes one empty argument, as on Linux since 5.18.
    ///
    /// # Errors
    ///
    /// [`ImageError`], which knows its errno and a shell's exit code.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::path::Path;
    /// use dune_loader::Program;
    ///
    /// let program = Program::open(Path::new("/bin/sh"), vec![c"sh".into(), c"-e".into()])?;
    /// assert_eq!(program.filename.as_c_str(), c"/bin/sh");
    /// assert_eq!(program.argv.len(), 2);
    /// # Ok::<(), dune_loader::ImageError>(())
    /// ```
    pub fn open(path: &Path, argv: Vec<CString>) -> Result<Self, ImageError> {
        Self::open_with(path, argv, &open_file)
    }

    /// As [`Program::open`], with every file opened by `open`: for callers that
    /// have to look at what they open.
    ///
    /// `open` gets the path of a file that was regular and executable a moment
    /// ago, and opens it for reading. It may refuse; a regular file is insisted
    /// on afterwards.
    ///
    /// # Errors
    ///
    /// As [`Program::open`], and what `open` returns.
    pub fn open_with(
        path: &Path,
        mut argv: Vec<CString>,
        open: &dyn Fn(&Path) -> io::Result<File>,
    ) -> Result<Self, ImageError> {
        let filename = c_path(path)?;
        if argv.is_empty() {
            argv.push(CString::default());
        }
        let mut current = path.to_owned();
        let mut file = open_executable(&current, open)?;
        for _ in 0..=SCRIPT_DEPTH_LIMIT {
            let start = read_start(&file, &current)?;
            let Some(line) = Shebang::parse(&start) else {
                let image = identify(current, file, &start)?;
                let linker = open_linker(&image, open)?;
                return Ok(Self {
                    filename,
                    argv,
                    image,
                    linker,
                });
            };
            let line = line.map_err(|reason| ImageError::Shebang {
                script: current.clone(),
                reason,
            })?;
            let interpreter = path_of(&line.interpreter);
            file = open_executable(&interpreter, open).map_err(|error| {
                ImageError::ScriptInterpreter {
                    script: current.clone(),
                    error: Box::new(error),
                }
            })?;
            let added = [
                Some(line.interpreter),
                line.argument,
                Some(c_path(&current)?),
            ];
            argv.splice(..1, added.into_iter().flatten());
            current = interpreter;
        }
        Err(ImageError::TooManyScripts { script: current })
    }

    /// Places the program and its dynamic linker.
    ///
    /// # Errors
    ///
    /// [`ImageError::Plan`] when they do not fit the layout.
    pub fn plan(&self, layout: &Layout) -> Result<LoadPlan, ImageError> {
        LoadPlan::new(
            &self.image.elf,
            self.linker.as_ref().map(|linker| &linker.elf),
            layout,
        )
        .map_err(|reason| ImageError::Plan {
            path: self.image.path.clone(),
            reason,
        })
    }
}

fn open_linker(
    program: &Image,
    open: &dyn Fn(&Path) -> io::Result<File>,
) -> Result<Option<Image>, ImageError> {
    let Some(name) = program.elf.interpreter() else {
        return Ok(None);
    };
    let path = path_of(name);
    let open = || {
        let file = open_executable(&path, open)?;
        match Elf::parse(&file) {
            Ok(elf) => Ok(Image {
                path: path.clone(),
                file,
                elf,
            }),
            Err(reason) => Err(ImageError::Elf {
                path: path.clone(),
                reason,
            }),
        }
    };
    open().map(Some).map_err(|error| ImageError::DynamicLinker {
        program: program.path.clone(),
        error: Box::new(error),
    })
}

/// Opens a regular file that may be executed.
fn open_executable(
    path: &Path,
    open: &dyn Fn(&Path) -> io::Result<File>,
) -> Result<File, ImageError> {
    check_executable(path)?;
    let file =
        open(path).map_err(
            |error| match Errno::from_io_error(&error).unwrap_or(Errno::IO) {
                Errno::ACCESS => ImageError::NotReadable {
                    path: path.to_owned(),
                },
                errno => lookup_error(path, errno),
            },
        )?;
    let stat = rustix::fs::fstat(&file).map_err(|errno| lookup_error(path, errno))?;
    check_regular(path, FileType::from_raw_mode(stat.st_mode))?;
    Ok(file)
}

fn open_file(path: &Path) -> io::Result<File> {
    // Should a pipe or a terminal have taken the file's place meanwhile,
    // opening it must neither block nor make it the controlling terminal.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

fn check_executable(path: &Path) -> Result<(), ImageError> {
    let stat = rustix::fs::stat(path).map_err(|errno| lookup_error(path, errno))?;
    check_regular(path, FileType::from_raw_mode(stat.st_mode))?;
    rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS).map_err(
        |errno| match errno {
            Errno::ACCESS => ImageError::NotExecutable {
                path: path.to_owned(),
            },
            errno => lookup_error(path, errno),
        },
    )
}

fn check_regular(path: &Path, file_type: FileType) -> Result<(), ImageError> {
    match file_type {
        FileType::RegularFile => Ok(()),
        FileType::Directory => Err(ImageError::IsFolder {
            path: path.to_owned(),
        }),
        _ => Err(ImageError::NotRegular {
            path: path.to_owned(),
        }),
    }
}

/// The file's first [`SHEBANG_LIMIT`] bytes, or all of a shorter one.
fn read_start(file: &File, path: &Path) -> Result<Vec<u8>, ImageError> {
    let mut start = vec![0; SHEBANG_LIMIT];
    let mut len = 0;
    while len < start.len() {
        match file.read_at(&mut start[len..], len as u64) {
            Ok(0) => break,
            Ok(count) => len += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(read_error(path, &error)),
        }
    }
    start.truncate(len);
    Ok(start)
}

/// Says what a file that is not a script is.
fn identify(path: PathBuf, file: File, start: &[u8]) -> Result<Image, ImageError> {
    match Elf::parse(&file) {
        Ok(elf) => Ok(Image { path, file, elf }),
        Err(ElfError::BadMagic) => Err(unknown_format(path, start)),
        Err(reason) => Err(ImageError::Elf { path, reason }),
    }
}

fn unknown_format(path: PathBuf, start: &[u8]) -> ImageError {
    let looks_like = match start {
        [] => return ImageError::Empty { path },
        [b'M', b'Z', ..] => "a Windows or DOS program",
        [0xcf | 0xce, 0xfa, 0xed, 0xfe, ..] | [0xca, 0xfe, 0xba, 0xbe, ..] => {
            "a macOS program or a Java class"
        }
        [0x1f, 0x8b, ..] => "a gzip archive",
        // What a shell takes for text: no NUL in the first line.
        _ if !first_line(start).contains(&0) => return ImageError::NoShebang { path },
        _ => "data of an unknown format",
    };
    ImageError::UnknownFormat { path, looks_like }
}

fn first_line(start: &[u8]) -> &[u8] {
    start
        .split(|&byte| byte == b'\n')
        .next()
        .unwrap_or_default()
}

fn c_path(path: &Path) -> Result<CString, ImageError> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| lookup_error(path, Errno::INVAL))
}

fn path_of(name: &CString) -> PathBuf {
    std::ffi::OsString::from_vec(name.as_bytes().to_vec()).into()
}

fn read_error(path: &Path, error: &io::Error) -> ImageError {
    let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
    ImageError::Read {
        path: path.to_owned(),
        errno,
    }
}
