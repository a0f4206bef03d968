//! A breakpoint at a function of the program's file.

use std::path::{Path, PathBuf};

use object::{Object, ObjectKind, ObjectSymbol};

use super::page_of;
use crate::calls::memory::set_access;
use crate::engine::Access;
use crate::guard::Guard;
use crate::host::Errno;

/// The instruction `int3`.
const INT3: u8 = 0xcc;
/// No program has a symbol table larger than this.
const MOST_FILE: u64 = 4 << 30;

/// Why the program cannot be stopped at a function.
#[derive(Debug, thiserror::Error)]
pub enum SymbolError {
    /// The file could not be read.
    #[error("cannot read the symbols of {}: {reason}", path.display())]
    File {
        /// The program's file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// There is none of that name.
    #[error(
        "{} has no symbol {name:?}; link it without -s, or choose another marker",
        path.display()
    )]
    Unknown {
        /// The program's file.
        path: PathBuf,
        /// The name asked for.
        name: String,
    },
    /// The breakpoint could not be set.
    #[error("cannot set a breakpoint at {name:?}: {errno}")]
    Set {
        /// The name asked for.
        name: String,
        /// What went wrong.
        errno: Errno,
    },
}

/// See the module documentation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Breakpoint {
    at: u64,
    /// What was there.
    byte: u8,
}

impl Breakpoint {
    /// Sets one at the function `name` of `path`, whose entry point is at
    /// `entry`.
    pub(crate) fn set(
        guard: &mut Guard,
        path: &Path,
        entry: u64,
        name: &str,
    ) -> Result<Self, SymbolError> {
        let at = address_of(path, entry, name)?;
        let failed = |errno| SymbolError::Set {
            name: name.to_owned(),
            errno,
        };
        let byte = exchange(guard, at, INT3).map_err(failed)?;
        Ok(Self { at, byte })
    }

    /// Where the program stops.
    pub(crate) fn at(self) -> u64 {
        self.at
    }

    /// Whether the program, at `rip`, has just executed it.
    pub(crate) fn is_behind(self, rip: u64) -> bool {
        rip.checked_sub(1) == Some(self.at)
    }

    /// Puts back what was there.
    ///
    /// # Errors
    ///
    /// What the host kernel said.
    pub(crate) fn remove(self, guard: &mut Guard) -> Result<(), Errno> {
        exchange(guard, self.at, self.byte).map(drop)
    }
}

/// Where the symbol `name` of `path`, whose entry point is at `entry`, is.
///
/// # Errors
///
/// [`SymbolError`].
pub(super) fn address_of(path: &Path, entry: u64, name: &str) -> Result<u64, SymbolError> {
    let failed = |reason: String| SymbolError::File {
        path: path.to_owned(),
        reason,
    };
    let len = std::fs::metadata(path).map_err(|error| failed(error.to_string()))?;
    if len.len() > MOST_FILE {
        return Err(failed("it is too large".to_owned()));
    }
    let bytes = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
    let file = object::File::parse(&*bytes).map_err(|error| failed(error.to_string()))?;
    let symbol = file
        .symbols()
        .chain(file.dynamic_symbols())
        .find(|symbol| symbol.is_definition() && symbol.name() == Ok(name))
        .ok_or_else(|| SymbolError::Unknown {
            path: path.to_owned(),
            name: name.to_owned(),
        })?;
    let bias = match file.kind() {
        ObjectKind::Dynamic => entry.wrapping_sub(file.entry()),
        _ => 0,
    };
    Ok(symbol.address().wrapping_add(bias))
}

/// Puts `byte` into the program's code, and returns what was there.
fn exchange(guard: &mut Guard, at: u64, byte: u8) -> Result<u8, Errno> {
    let page = page_of(at).ok_or(Errno::EFAULT)?;
    let area = guard.program.memory().areas.find(at).ok_or(Errno::EFAULT)?;
    let access = area.attributes.access;
    set_access(guard, page, Access::READ | Access::WRITE)?;
    let mut old = [0];
    let exchanged = guard
        .memory()
        .read(at, &mut old)
        .and_then(|()| guard.memory().write(at, &[byte]));
    set_access(guard, page, access)?;
    exchanged.map(|()| old[0])
}
