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
    /// Empty when the line is a bare `#!` at the end of the file.
    pub interpreter: CString,
    /// All that follows the interpreter, as one argument.
    pub argument: Option<CString>,
}

/// Why a line that begins with `#!` cannot be used; Linux says `ENOEXEC`.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ShebangError {
    /// Nothing but blanks follows `#!`.
    #[error("the `#!` line names no interpreter; write its path there, such as `#!/bin/sh`")]
    NoInterpreter,
    /// The interpreter's path is cut at [`SHEBANG_LIMIT`].
    #[error(
        "the interpreter's path in the `#!` line reaches past byte {SHEBANG_LIMIT}, where Linux \
         stops reading; use a shorter path, or `#!/usr/bin/env NAME`"
    )]
    PathTooLong,
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
