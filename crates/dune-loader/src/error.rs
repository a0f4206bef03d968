//! Why a program cannot be started: one line with the cause and the remedy,
//! the exit code a shell would use, and the errno `execve` would give.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use thiserror::Error;

use crate::elf::ElfError;
use crate::plan::PlanError;
use crate::shebang::{SCRIPT_DEPTH_LIMIT, ShebangError};
use crate::stack::StackError;

/// A shell's exit code for a command that was not found.
pub const EXIT_NOT_FOUND: u8 = 127;

/// A shell's exit code for a command that was found and cannot be run.
pub const EXIT_CANNOT_RUN: u8 = 126;

/// Why a program cannot be started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A command without a slash is in no folder of `PATH`.
    #[error("{}: command not found; check its spelling, or give its path", shown(.command))]
    CommandNotFound {
        /// The command as given.
        command: OsString,
    },
    /// The file does not exist.
    #[error("{}: no such file", shown(.path))]
    NotFound {
        /// The file.
        path: PathBuf,
    },
    /// A part of the path that should be a folder is none.
    #[error("{}: a part of this path is not a folder", shown(.path))]
    NotAFolder {
        /// The file.
        path: PathBuf,
    },
    /// A folder on the way to the file may not be searched.
    #[error("{}: permission denied: a folder on the way to it may not be entered", shown(.path))]
    FolderDenied {
        /// The file.
        path: PathBuf,
    },
    /// The path cannot be followed for another reason.
    #[error("{}: cannot be looked up: {errno}{}", shown(.path), remedy_for(*.errno))]
    Lookup {
        /// The file.
        path: PathBuf,
        /// What the host kernel said.
        errno: Errno,
    },
    /// A folder where a program should be.
    #[error("{}: is a folder; name a program in it", shown(.path))]
    IsFolder {
        /// The folder.
        path: PathBuf,
    },
    /// A device, pipe or socket where a program should be.
    #[error("{}: is a device, pipe or socket, not a program", shown(.path))]
    NotRegular {
        /// The file.
        path: PathBuf,
    },
    /// The file may not be executed.
    #[error(
        "{path}: permission denied: not executable; run `chmod +x {path}` (or its file system is \
         mounted noexec)",
        path = shown(.path)
    )]
    NotExecutable {
        /// The file.
        path: PathBuf,
    },
    /// The file may be executed but not read, and it must be read to be loaded.
    #[error(
        "{path}: permission denied: executable but not readable, and a program must be read to be \
         loaded; run `chmod +r {path}`",
        path = shown(.path)
    )]
    NotReadable {
        /// The file.
        path: PathBuf,
    },
    /// Reading the file failed.
    #[error("{}: cannot be read: {errno}{}", shown(.path), remedy_for(*.errno))]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host kernel said.
        errno: Errno,
    },
    /// The file is empty.
    #[error("{}: is empty; it was perhaps not copied or built completely", shown(.path))]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Text that does not begin with `#!`.
    #[error(
        "{path}: is text without a `#!` line; add one, such as `#!/bin/sh`, or run `sh {path}`",
        path = shown(.path)
    )]
    NoShebang {
        /// The file.
        path: PathBuf,
    },
    /// Neither a script nor an ELF file.
    #[error("{}: is {looks_like}, not a Linux program", shown(.path))]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        looks_like: &'static str,
    },
    /// A `#!` line that cannot be used.
    #[error("{}: {reason}", shown(.script))]
    Shebang {
        /// The script.
        script: PathBuf,
        /// What is wrong with its first line.
        reason: ShebangError,
    },
    /// Scripts that are each other's interpreter, too deep or in a circle.
    #[error(
        "{}: more than {SCRIPT_DEPTH_LIMIT} scripts in a row are each other's interpreter; name a \
         program in the `#!` line",
        shown(.script)
    )]
    TooManyScripts {
        /// The last script that was looked at.
        script: PathBuf,
    },
    /// The interpreter that a `#!` line names cannot be run.
    #[error("{}: its `#!` line names an interpreter that cannot be run: {error}", shown(.script))]
    ScriptInterpreter {
        /// The script.
        script: PathBuf,
        /// What is wrong with the interpreter.
        error: Box<ImageError>,
    },
    /// A program that cannot be run.
    #[error("{}: {reason}", shown(.path))]
    Elf {
        /// The program.
        path: PathBuf,
        /// What is wrong with it.
        reason: ElfError,
    },
    /// The dynamic linker that a program names cannot be used.
    #[error(
        "{}: its dynamic linker cannot be used: {error}{}",
        shown(.program),
        linker_remedy_for(error.errno())
    )]
    DynamicLinker {
        /// The program.
        program: PathBuf,
        /// What is wrong with its dynamic linker.
        error: Box<ImageError>,
    },
    /// The program has no place in memory.
    #[error("{}: {reason}", shown(.path))]
    Plan {
        /// The program.
        path: PathBuf,
        /// Why not.
        reason: PlanError,
    },
    /// Arguments and environment do not fit on the stack.
    #[error(transparent)]
    Stack(#[from] StackError),
}

impl ImageError {
    /// The exit code that a shell gives: [`EXIT_NOT_FOUND`] when the command,
    /// or what it needs to run, does not exist, otherwise [`EXIT_CANNOT_RUN`].
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        if self.errno() == Errno::NOENT {
            EXIT_NOT_FOUND
        } else {
            EXIT_CANNOT_RUN
        }
    }

    /// The errno that Linux's `execve` gives for the same cause.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::CommandNotFound { .. } | Self::NotFound { .. } => Errno::NOENT,
            Self::NotAFolder { .. } => Errno::NOTDIR,
            Self::FolderDenied { .. }
            | Self::IsFolder { .. }
            | Self::NotRegular { .. }
            | Self::NotExecutable { .. }
            | Self::NotReadable { .. } => Errno::ACCESS,
            Self::Lookup { errno, .. } | Self::Read { errno, .. } => *errno,
            Self::Empty { .. } | Self::NoShebang { .. } | Self::UnknownFormat { .. } => {
                Errno::NOEXEC
            }
            Self::Shebang { reason, .. } => reason.errno(),
            Self::TooManyScripts { .. } => Errno::LOOP,
            Self::ScriptInterpreter { error, .. } => error.errno(),
            Self::Elf { reason, .. } => match reason {
                ElfError::Io(error) => Errno::from_io_error(error).unwrap_or(Errno::IO),
                _ => Errno::NOEXEC,
            },
            Self::DynamicLinker { error, .. } => match error.errno() {
                Errno::NOEXEC => Errno::LIBBAD,
                other => other,
            },
            Self::Plan { .. } => Errno::NOMEM,
            Self::Stack(error) => error.errno(),
        }
    }
}

/// What to do about a limit of the machine; nothing for other causes.
fn remedy_for(errno: Errno) -> &'static str {
    match errno {
        Errno::MFILE => "; raise `ulimit -n`",
        Errno::NFILE => "; raise `fs.file-max` (sysctl)",
        Errno::NOMEM => "; free some memory",
        _ => "",
    }
}

/// The dynamic linker itself is the trouble unless a limit was met on the way.
fn linker_remedy_for(errno: Errno) -> &'static str {
    if remedy_for(errno).is_empty() {
        "; install the libc it was built for"
    } else {
        ""
    }
}

/// A path that keeps a message on one line whatever bytes it holds.
fn shown(path: impl AsRef<OsStr>) -> String {
    let path = path.as_ref();
    if path.is_empty() {
        return "\"\"".to_owned();
    }
    let mut text = String::new();
    for letter in path.to_string_lossy().chars() {
        if letter.is_control() {
            text.extend(letter.escape_default());
        } else {
            text.push(letter);
        }
    }
    text
}

/// Sorts the errors of looking a path up.
pub(crate) fn lookup_error(path: &Path, errno: Errno) -> ImageError {
    let path = path.to_owned();
    match errno {
        Errno::NOENT => ImageError::NotFound { path },
        Errno::NOTDIR => ImageError::NotAFolder { path },
        Errno::ACCESS => ImageError::FolderDenied { path },
        errno => ImageError::Lookup { path, errno },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Causes that tests running as root do not meet.
    #[test]
    fn every_cause_has_its_errno_and_exit_code() {
        let path = || PathBuf::from("/some/path");
        let boxed = |error| Box::new(error);
        let not_elf = || ImageError::Elf {
            path: path(),
            reason: ElfError::BadMagic,
        };
        let cases = [
            (lookup_error(&path(), Errno::ACCESS), Errno::ACCESS, 126),
            (lookup_error(&path(), Errno::MFILE), Errno::MFILE, 126),
            (ImageError::NotReadable { path: path() }, Errno::ACCESS, 126),
            (
                ImageError::Read {
                    path: path(),
                    errno: Errno::IO,
                },
                Errno::IO,
                126,
            ),
            (not_elf(), Errno::NOEXEC, 126),
            (
                ImageError::DynamicLinker {
                    program: path(),
                    error: boxed(not_elf()),
                },
                Errno::LIBBAD,
                126,
            ),
            (
                ImageError::ScriptInterpreter {
                    script: path(),
                    error: boxed(not_elf()),
                },
                Errno::NOEXEC,
                126,
            ),
            (
                ImageError::Elf {
                    path: path(),
                    reason: ElfError::Io(std::io::Error::from_raw_os_error(5)),
                },
                Errno::IO,
                126,
            ),
            (
                StackError::StringTooLong { len: 1 << 20 }.into(),
                Errno::TOOBIG,
                126,
            ),
        ];
        for (error, errno, exit_code) in cases {
            assert_eq!(
                (error.errno(), error.exit_code()),
                (errno, exit_code),
                "{error}"
            );
        }
    }

    #[test]
    fn a_limit_is_no_fault_of_the_dynamic_linker() {
        let message = |errno| {
            ImageError::DynamicLinker {
                program: "/program".into(),
                error: Box::new(lookup_error(Path::new("/linker"), errno)),
            }
            .to_string()
        };
        assert!(message(Errno::MFILE).ends_with("; raise `ulimit -n`"));
        assert!(message(Errno::NOENT).ends_with("; install the libc it was built for"));
    }

    #[test]
    fn a_message_is_one_line_whatever_the_path() {
        use std::os::unix::ffi::OsStrExt;
        assert_eq!(
            shown(OsStr::from_bytes(b"a\nb\x1b[31m\xff")),
            "a\\nb\\u{1b}[31m\u{fffd}"
        );
        assert_eq!(shown(""), "\"\"");
    }
}
