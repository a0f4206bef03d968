//! The first line of a script: `#! INTERPRETER [ARGUMENT]`.
//!
//! The rules are those of Linux 5.x and later (`fs/binfmt_script.c` decides
//! there), odd corners included: they are checked against the running kernel
//! in this crate's tests.
//!
//! ```text
//!  0  2                                                    255 256
//!  #! ␣ /usr/bin/env ␣ -S python3 -u ␣ \n ...                │
//!       ╰ interpreter  ╰ one argument, inner blanks kept     ╰ the kernel looks no further
//! ```

use std::ffi::CString;

use rustix::io::Errno;
use thiserror::Error;

/// How many bytes of a script are looked at (`BINPRM_BUF_SIZE`).
pub const SHEBANG_LIMIT: usize = 256;

/// How many scripts may be each other's interpreter before `ELOOP`.
///
/// A fifth script, run by a fourth, and so on down to a program, still works.
pub const SCRIPT_DEPTH_LIMIT: usize = 5;

/// What the first line of a script asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shebang {
    /// The interpreter's path, absolute or relative to the working directory.
    /// Never empty.
    pub interpreter: CString,
    /// All that follows the interpreter, as one argument.
    pub argument: Option<CString>,
}

/// Why a line that begins with `#!` cannot be used.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ShebangError {
    /// Nothing but blanks follows `#!`.
    #[error("the `#!` line names no interpreter; write its path there, such as `#!/bin/sh`")]
    NoInterpreter,
    /// The file ends, or a NUL stands, where the path should begin. Linux takes
    /// the empty path for the working directory, and says `EACCES`.
    #[error("the file ends where its `#!` line should name an interpreter, such as `#!/bin/sh`")]
    EmptyName,
    /// The interpreter's path is cut at [`SHEBANG_LIMIT`].
    #[error(
        "the interpreter's path in the `#!` line reaches past byte {SHEBANG_LIMIT}, where Linux \
         stops reading; use a shorter path, or `#!/usr/bin/env NAME`"
    )]
    PathTooLong,
}

impl ShebangError {
    /// The errno that `execve` gives.
    #[must_use]
    pub fn errno(self) -> Errno {
        match self {
            Self::NoInterpreter | Self::PathTooLong => Errno::NOEXEC,
            Self::EmptyName => Errno::ACCESS,
        }
    }
}

impl Shebang {
    /// Parses the start of a file; `None` when it is not a script.
    ///
    /// `start` is the file's first [`SHEBANG_LIMIT`] bytes, or all of it when
    /// it is shorter; bytes beyond the limit are ignored. A line longer than
    /// the limit loses the end of its *argument* without a word, as on Linux.
    ///
    /// # Errors
    ///
    /// [`ShebangError`] when the line names no whole interpreter path.
    ///
    /// # Examples
    ///
    /// ```
    /// use dune_loader::Shebang;
    ///
    /// let line = Shebang::parse(b"#! /usr/bin/awk -f \nBEGIN { print 1 }").unwrap()?;
    /// assert_eq!(line.interpreter.as_c_str(), c"/usr/bin/awk");
    /// assert_eq!(line.argument.as_deref(), Some(c"-f"));
    /// assert_eq!(Shebang::parse(b"BEGIN { print 1 }"), None);
    /// # Ok::<(), dune_loader::ShebangError>(())
    /// ```
    #[must_use]
    pub fn parse(start: &[u8]) -> Option<Result<Self, ShebangError>> {
        if !start.starts_with(b"#!") {
            return None;
        }
        // As in the kernel, the end of a short file is a NUL.
        let mut line = [0; SHEBANG_LIMIT];
        let len = start.len().min(SHEBANG_LIMIT);
        line[..len].copy_from_slice(&start[..len]);
        Some(Self::parse_line(&line))
    }

    fn parse_line(line: &[u8; SHEBANG_LIMIT]) -> Result<Self, ShebangError> {
        const LAST: usize = SHEBANG_LIMIT - 1;
        let first_in = |from: usize, to: usize, wanted: fn(u8) -> bool| {
            (from..=to).find(|&index| wanted(line[index]))
        };

        let stop = first_in(2, LAST, |byte| byte == b'\n' || byte == 0);
        let mut end = match stop.filter(|&index| line[index] == b'\n') {
            Some(newline) => newline,
            None => {
                let name = first_in(2, LAST, is_not_blank).ok_or(ShebangError::NoInterpreter)?;
                first_in(name, LAST, is_terminator).ok_or(ShebangError::PathTooLong)?;
                LAST
            }
        };
        // Ends at the `!` at the latest. Blanks before a NUL are not at the
        // end: there they make an argument, if an empty one.
        while is_blank(line[end - 1]) {
            end -= 1;
        }

        let name = first_in(2, end, is_not_blank)
            .filter(|&name| name != end)
            .ok_or(ShebangError::NoInterpreter)?;
        if line[name] == 0 {
            return Err(ShebangError::EmptyName);
        }
        let name_end = first_in(name, end, is_terminator).unwrap_or(end);
        let argument = match line[name_end] {
            blank if is_blank(blank) => first_in(name_end, end, is_not_blank),
            _ => None,
        };
        Ok(Self {
            interpreter: c_string(&line[name..name_end]),
            argument: argument.map(|from| c_string(&line[from..end])),
        })
    }
}

fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

fn is_not_blank(byte: u8) -> bool {
    !is_blank(byte)
}

fn is_terminator(byte: u8) -> bool {
    is_blank(byte) || byte == 0
}

/// `bytes` up to its first NUL, as the kernel's string copies see it.
fn c_string(bytes: &[u8]) -> CString {
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    CString::new(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(start: &[u8]) -> Result<(String, Option<String>), ShebangError> {
        let text = |string: CString| string.into_string().unwrap();
        Shebang::parse(start)
            .expect("a script")
            .map(|line| (text(line.interpreter), line.argument.map(text)))
    }

    fn line(
        interpreter: &str,
        argument: Option<&str>,
    ) -> Result<(String, Option<String>), ShebangError> {
        Ok((interpreter.to_owned(), argument.map(str::to_owned)))
    }

    #[test]
    fn other_files_are_no_scripts() {
        for start in [&b""[..], b"#", b" #!/bin/sh\n", b"\x7fELF"] {
            assert_eq!(Shebang::parse(start), None);
        }
    }

    #[test]
    fn all_after_the_interpreter_is_one_argument() {
        assert_eq!(parse(b"#!/bin/sh\n"), line("/bin/sh", None));
        assert_eq!(parse(b"#! \t/bin/sh \t\n"), line("/bin/sh", None));
        assert_eq!(
            parse(b"#!/bin/sh -e -u \n-x"),
            line("/bin/sh", Some("-e -u"))
        );
        assert_eq!(
            parse(b"#!/bin/sh\r\n"),
            line("/bin/sh\r", None),
            "as Linux sees it"
        );
    }

    #[test]
    fn a_line_without_an_interpreter_is_an_error() {
        for start in [
            &b"#!\n"[..],
            b"#! \t \n/bin/sh",
            &[&b"#!"[..], &[b' '; 300]].concat(),
        ] {
            assert_eq!(parse(start), Err(ShebangError::NoInterpreter));
        }
    }

    #[test]
    fn the_end_of_the_file_ends_the_line() {
        assert_eq!(parse(b"#!/bin/sh"), line("/bin/sh", None));
        assert_eq!(
            parse(b"#!/bin/sh -e "),
            line("/bin/sh", Some("-e ")),
            "blanks stay"
        );
        assert_eq!(parse(b"#!/bin/sh "), line("/bin/sh", Some("")));
        assert_eq!(parse(b"#!"), Err(ShebangError::EmptyName));
        assert_eq!(parse(b"#! \0/bin/sh\n"), Err(ShebangError::EmptyName));
        assert_eq!(parse(b"#!/bin/sh\0 -e\n"), line("/bin/sh", None));
    }

    #[test]
    fn a_path_must_end_within_the_limit() {
        let script = |len: usize, rest: &[u8]| [&b"#!/"[..], &vec![b'x'; len - 3], rest].concat();
        for (len, rest) in [(254, &b"\n"[..]), (255, b"\n"), (255, b" -e\n")] {
            let expected = format!("/{}", "x".repeat(len - 3));
            assert_eq!(parse(&script(len, rest)), line(&expected, None), "{len}");
        }
        assert_eq!(parse(&script(256, b"\n")), Err(ShebangError::PathTooLong));
        assert_eq!(parse(&script(9999, b"")), Err(ShebangError::PathTooLong));
    }

    #[test]
    fn a_long_argument_is_cut() {
        let (interpreter, argument) = parse(&[b"#!/bin/sh ", &[b'x'; 300][..]].concat()).unwrap();
        assert_eq!(interpreter, "/bin/sh");
        assert_eq!(
            argument,
            Some("x".repeat(SHEBANG_LIMIT - 1 - "#!/bin/sh ".len()))
        );
    }
}
