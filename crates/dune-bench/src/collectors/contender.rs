//! A collector and its mode.

use std::path::Path;

use crate::host;
use crate::matrix::Column;

use super::program;

/// See the module documentation.
#[derive(Clone, Debug)]
pub(crate) struct Contender {
    /// What the programs are told, too.
    pub(crate) id: &'static str,
    pub(crate) collector: Collector,
    /// Why it has no figures here.
    missing: Option<String>,
}

/// What the programs are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Collector {
    Libgc,
    DuneGc,
}

impl Collector {
    /// As in the names of the compiled programs.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Libgc => "libgc",
            Self::DuneGc => "dune-gc",
        }
    }
}

pub(crate) const LIBGC: [&str; 3] = ["libgc-plain", "libgc-generational", "libgc-incremental"];
pub(crate) const NONE: &str = "dune-gc-none";
pub(crate) const MPROTECT: &str = "dune-gc-mprotect";
pub(crate) const USERFAULTFD: &str = "dune-gc-userfaultfd";
pub(crate) const DUNE: &str = "dune-gc-dune";

/// Everybody, and whether they can run here.
pub(crate) fn all(folder: &Path) -> Vec<Contender> {
    let contender = |id, collector: Collector| Contender {
        id,
        collector,
        missing: program::not_built(folder, collector)
            .or_else(|| host::without_ring0().filter(|_| id == DUNE)),
    };
    let libgc = LIBGC.map(|id| contender(id, Collector::Libgc));
    let dune_gc = [NONE, MPROTECT, USERFAULTFD, DUNE].map(|id| contender(id, Collector::DuneGc));
    libgc.into_iter().chain(dune_gc).collect()
}

impl Column for Contender {
    fn id(&self) -> &'static str {
        self.id
    }

    fn command(&self) -> String {
        String::new()
    }

    fn version(&self) -> Option<&str> {
        None
    }

    fn missing(&self) -> Option<&str> {
        self.missing.as_deref()
    }
}
