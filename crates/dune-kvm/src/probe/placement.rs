//! Which placement to use: the probe's choice, held against what was asked.

use std::fmt;
use std::str::FromStr;

use super::probe;

/// The name of the environment variable that overrides the choice of
/// placement: `guest`, `host`, `lab` or `auto`.
pub const PLACEMENT_VARIABLE: &str = "DUNE_PLACEMENT";

/// Where the code that guards ring 3 runs (or, in the lab, both run).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Placement {
    /// At ring 0 of the guest: KVM on VT-x or SVM.
    InGuest,
    /// On the host side, after an exit: any KVM that runs ring 3 natively.
    OnHost,
    /// In the bundled virtual machine.
    Lab,
}

impl Placement {
    /// The word for it on the command line and in [`PLACEMENT_VARIABLE`].
    pub const fn name(self) -> &'static str {
        match self {
            Self::InGuest => "guest",
            Self::OnHost => "host",
            Self::Lab => "lab",
        }
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What was asked for: a placement, or the probe's own choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PlacementRequest {
    /// The best one that this machine has.
    #[default]
    Auto,
    /// This one, or an error.
    Only(Placement),
}

/// A word that names no placement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no placement: use auto, guest, host or lab")]
pub struct UnknownPlacement(pub String);

impl FromStr for PlacementRequest {
    type Err = UnknownPlacement;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        match word {
            "auto" | "" => Ok(Self::Auto),
            "guest" => Ok(Self::Only(Placement::InGuest)),
            "host" => Ok(Self::Only(Placement::OnHost)),
            "lab" => Ok(Self::Only(Placement::Lab)),
            other => Err(UnknownPlacement(other.to_owned())),
        }
    }
}

/// A placement that was asked for and that this machine does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// The variable holds something else.
    #[error("{PLACEMENT_VARIABLE}: {0}")]
    Variable(#[from] UnknownPlacement),
    /// Ring 0 does not run natively here.
    #[error("placement \"guest\" needs a KVM that runs ring 0 natively; here {found}; use auto")]
    NoRing0 {
        /// What the probe found, in one line.
        found: String,
    },
    /// There is no usable KVM at all.
    #[error("placement \"host\" needs a KVM; here {found}; use auto or lab")]
    NoKvm {
        /// What the probe found, in one line.
        found: String,
    },
}

/// The placement for this process: [`PLACEMENT_VARIABLE`] where it is set, the
/// probe's own choice otherwise.
///
/// # Errors
///
/// [`PlacementError`] when the variable names no placement, or one that this
/// machine lacks.
pub fn placement() -> Result<Placement, PlacementError> {
    let request = request_from_environment()?;
    if request == PlacementRequest::Only(Placement::Lab) {
        return Ok(Placement::Lab);
    }
    probe().choose(request)
}

/// What [`PLACEMENT_VARIABLE`] asks for; `Auto` when it is not set.
///
/// # Errors
///
/// [`UnknownPlacement`] when it holds no placement's name.
pub fn request_from_environment() -> Result<PlacementRequest, UnknownPlacement> {
    match std::env::var_os(PLACEMENT_VARIABLE) {
        None => Ok(PlacementRequest::Auto),
        Some(word) => word.to_string_lossy().parse(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placements_have_names() {
        for placement in [Placement::InGuest, Placement::OnHost, Placement::Lab] {
            assert_eq!(
                placement.name().parse(),
                Ok(PlacementRequest::Only(placement))
            );
        }
        assert_eq!("auto".parse(), Ok(PlacementRequest::Auto));
        let error = "moon".parse::<PlacementRequest>().unwrap_err().to_string();
        assert!(error.contains("moon") && error.contains("lab"), "{error}");
    }
}
