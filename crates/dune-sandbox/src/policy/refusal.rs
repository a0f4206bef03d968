//! What was refused, and what would have allowed it.

use core::fmt;

use super::net::Net;
use super::path::NormalPath;

/// The rule that would allow what was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// `--ro PATH`.
    ReadOnly(NormalPath),
    /// `--rw PATH`.
    ReadWrite(NormalPath),
    /// `--net KIND`.
    Net(Net),
    /// A larger `--mem`.
    Memory,
    /// A larger `--cpu-time`.
    CpuTime,
    /// A larger `--nproc`.
    Processes,
    /// No rule: only a run without restrictions would.
    Unrestricted,
}

impl Remedy {
    /// The option and its value, as the command line takes them, if it is one
    /// that can be added as it is.
    #[must_use]
    pub fn option(&self) -> Option<(&'static str, String)> {
        Some(match self {
            Self::ReadOnly(path) => ("--ro", path.as_path().to_string_lossy().into_owned()),
            Self::ReadWrite(path) => ("--rw", path.as_path().to_string_lossy().into_owned()),
            Self::Net(net) => ("--net", net.name().to_owned()),
            Self::Memory | Self::CpuTime | Self::Processes | Self::Unrestricted => return None,
        })
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReadOnly(path) => write!(f, "--ro {path}"),
            Self::ReadWrite(path) => write!(f, "--rw {path}"),
            Self::Net(net) => write!(f, "--net {}", net.name()),
            Self::Memory => f.write_str("a larger --mem"),
            Self::CpuTime => f.write_str("a larger --cpu-time"),
            Self::Processes => f.write_str("a larger --nproc"),
            Self::Unrestricted => f.write_str("a run without --strict, --ro and --rw"),
        }
    }
}

/// One refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the program asked for, as a call: `openat(/etc/shadow, O_RDONLY)`.
    pub request: String,
    /// What would allow it.
    pub remedy: Remedy,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} refused: {} would allow it",
            self.request, self.remedy
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_explanation_names_the_rule() {
        let refusal = Refusal {
            request: "open(/etc/shadow, O_RDONLY)".to_owned(),
            remedy: Remedy::ReadOnly(NormalPath::new(b"/etc/shadow").unwrap()),
        };
        assert_eq!(
            refusal.to_string(),
            "open(/etc/shadow, O_RDONLY) refused: --ro /etc/shadow would allow it"
        );
    }
}
