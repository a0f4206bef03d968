//! Choosing a write tracker.

use core::fmt;
use core::str::FromStr;

use crate::error::GcError;
use crate::space::Space;
use crate::track::{DirtyBits, Mprotect, Protected, Untracked, Userfault, WriteTracker};

/// Who says which pages were written since the last collection.
///
/// | provider | the first write to a page costs | needs |
/// |---|---|---|
/// | `None` | nothing; but every collection is a full one that stops the world | nothing |
/// | `Mprotect` | a signal and a system call | the signal `SIGSEGV` |
/// | `Userfaultfd` | a message to another thread and back | userfaultfd's write protection |
/// | `Dune` | nothing | Dune mode, for every thread that uses the heap |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Provider {
    /// No barrier.
    None,
    /// Page protection.
    Mprotect,
    /// Write protection by `userfaultfd`.
    Userfaultfd,
    /// The dirty bits of the process's own page tables.
    Dune,
    /// `Dune` in Dune mode or where it can be entered, otherwise `Mprotect`.
    #[default]
    Auto,
}

impl Provider {
    /// The tracker for the writes to a space.
    pub(crate) fn tracker(self, space: &Space) -> Result<Box<dyn WriteTracker>, GcError> {
        let result = match self {
            Self::None => Ok(Box::new(Untracked) as Box<dyn WriteTracker>),
            Self::Mprotect => Mprotect::new(space).map(|rights| Box::new(Protected(rights)) as _),
            Self::Userfaultfd => {
                Userfault::new(space).map(|rights| Box::new(Protected(rights)) as _)
            }
            Self::Dune => DirtyBits::new().map(|bits| Box::new(bits) as _),
            Self::Auto => {
                return Self::Dune
                    .tracker(space)
                    .or_else(|_| Self::Mprotect.tracker(space));
            }
        };
        result.map_err(|reason| GcError::Provider {
            provider: self,
            reason,
        })
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Mprotect => "mprotect",
            Self::Userfaultfd => "userfaultfd",
            Self::Dune => "dune",
            Self::Auto => "auto",
        })
    }
}

/// No provider has this name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such provider: it is one of none, mprotect, userfaultfd, dune, auto")]
pub struct UnknownProvider;

impl FromStr for Provider {
    type Err = UnknownProvider;

    fn from_str(name: &str) -> Result<Self, UnknownProvider> {
        [
            Self::None,
            Self::Mprotect,
            Self::Userfaultfd,
            Self::Dune,
            Self::Auto,
        ]
        .into_iter()
        .find(|provider| provider.to_string() == name)
        .ok_or(UnknownProvider)
    }
}
