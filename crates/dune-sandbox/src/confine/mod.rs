//! The second wall: the process confines itself before the first untrusted
//! instruction, so that the host kernel refuses what the policy does not
//! allow even if the guard were deceived.
//!
//! | wall | holds | cannot hold |
//! |---|---|---|
//! | Landlock ([`files`]) | reading, writing, making, removing, executing files by path; TCP; signals and abstract sockets to processes outside | looking at names and attributes, changing attributes |
//! | seccomp ([`calls`]) | system calls that no row of the table and no work of the guard needs; sockets of families that the policy does not have; memory that can be executed | anything that depends on memory: paths, addresses |
//! | capabilities | `--strict`: root's rights beyond files | |
//!
//! The walls bind the thread that builds them and every thread and process
//! that it makes; they cannot be taken down again. So they are built when the
//! engine is there and the program is not. Landlock resolves a rule's path
//! once, to the file itself, and the kernel applies it to the file that an
//! operation reaches in the end, under its own locks: no symbolic link and no
//! rename can be raced against it.
//!
//! What this kernel cannot enforce is a [`Gap`] and is said aloud; a strict
//! policy does not run without the walls at all.

pub mod calls;
mod capabilities;
pub mod files;
pub mod kernel;

use core::fmt;
use std::time::Duration;

use linux_raw_sys::general::{__NR_prlimit64, RLIMIT_CPU};

use crate::calls::{forward_always, own, own_mut};
use crate::host::Errno;
use crate::policy::{Net, Policy, Rules};
use kernel::Kernel;

/// Something of a policy that this kernel cannot enforce; the guard alone does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gap {
    /// No Landlock.
    Files,
    /// No seccomp filters.
    Calls,
    /// Landlock before ABI 3.
    Truncation,
    /// Landlock before ABI 6.
    Signals,
    /// Landlock before ABI 6.
    AbstractSockets,
    /// No kernel can tell loopback addresses from others by a filter.
    LoopbackOnly,
}

impl Gap {
    /// Whether a whole wall is missing.
    #[must_use]
    pub fn is_a_wall(self) -> bool {
        matches!(self, Self::Files | Self::Calls)
    }
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Files => {
                "file rules (no Landlock: use a kernel with CONFIG_SECURITY_LANDLOCK and \
                 `landlock` among its lsm=)"
            }
            Self::Calls => {
                "the list of system calls (no seccomp filters: use a kernel with \
                 CONFIG_SECCOMP_FILTER)"
            }
            Self::Truncation => "truncate(2) of files that may be read (needs Linux 6.2)",
            Self::Signals => "signals to other processes (needs Linux 6.12)",
            Self::AbstractSockets => "abstract sockets of other processes (needs Linux 6.12)",
            Self::LoopbackOnly => "which addresses --net loopback reaches (no kernel can)",
        })
    }
}

/// Whether the second wall must stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SecondWall {
    /// A strict policy does not run where a wall is missing.
    #[default]
    Required,
    /// As far as the kernel can.
    IfPossible,
    /// None is built.
    Off,
}

/// The process could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// A strict policy, and a wall that this kernel does not have.
    #[error(
        "--strict needs a second wall under the guard, and this kernel cannot hold {0}; \
         --no-second-wall runs without it"
    )]
    Missing(Gap),
    /// Landlock refused.
    #[error("Landlock refused the policy: {0}; --no-second-wall runs without it")]
    Landlock(#[from] landlock::RulesetError),
    /// A rule's path went away.
    #[error("Landlock cannot have a rule for {path}: {source}; --no-second-wall runs without it")]
    Path {
        /// The path of the rule.
        path: String,
        /// What the kernel said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Seccomp refused.
    #[error("seccomp refused the filter: {0}; --no-second-wall runs without it")]
    Seccomp(String),
    /// CPU time could not be limited.
    #[error("cannot limit the CPU time: {0}")]
    CpuTime(std::io::Error),
    /// Capabilities could not be given up.
    #[error("cannot give up capabilities: {0}; --no-second-wall runs without it")]
    Capabilities(std::io::Error),
}

/// What of `policy` the kernel cannot enforce.
#[must_use]
pub fn gaps(policy: &Policy, kernel: &Kernel) -> Vec<Gap> {
    if !policy.restricts() {
        return Vec::new();
    }
    let (abi, net) = (kernel.landlock, policy.network());
    let needs_landlock = policy.restricts_files();
    [
        (needs_landlock && abi == 0, Gap::Files),
        (!kernel.seccomp, Gap::Calls),
        (needs_landlock && (1..3).contains(&abi), Gap::Truncation),
        (policy.is_strict() && (1..6).contains(&abi), Gap::Signals),
        (
            net == Net::None && (1..6).contains(&abi),
            Gap::AbstractSockets,
        ),
        (net == Net::Loopback, Gap::LoopbackOnly),
    ]
    .into_iter()
    .filter_map(|(missing, gap)| missing.then_some(gap))
    .collect()
}

/// Builds the walls around this thread and all that it will make. There is no
/// way back. `rules` are those of `policy`; what the walls cannot hold is told
/// by [`gaps`].
///
/// # Errors
///
/// If a wall that must stand cannot be built; then some may stand.
pub fn confine(policy: &Policy, rules: &Rules, wall: SecondWall) -> Result<(), ConfineError> {
    if wall == SecondWall::Off || !policy.restricts() {
        return Ok(());
    }
    let kernel = Kernel::this();
    let missing = gaps(policy, &kernel)
        .into_iter()
        .find(|gap| gap.is_a_wall());
    if let Some(gap) = missing.filter(|_| rules.strict && wall == SecondWall::Required) {
        return Err(ConfineError::Missing(gap));
    }
    if rules.strict {
        capabilities::give_up().map_err(ConfineError::Capabilities)?;
    }
    if kernel.landlock > 0 {
        files::restrict(rules)?;
    }
    // Last: the filter does not have the calls that the others needed.
    if kernel.seccomp {
        calls::restrict(rules)?;
    }
    Ok(())
}

/// Limits the CPU time of this process, to be inherited: `SIGXCPU` after
/// `time`, `SIGKILL` a second later.
///
/// # Errors
///
/// What the kernel says.
pub(crate) fn limit_cpu_time(time: Duration) -> Result<(), ConfineError> {
    let failed = |errno: Errno| ConfineError::CpuTime(errno.into());
    let mut limit = [0_u64; 2];
    let resource = u64::from(RLIMIT_CPU);
    forward_always(__NR_prlimit64, [0, resource, 0, own_mut(&mut limit), 0, 0]).map_err(failed)?;
    let seconds = time.as_secs() + u64::from(time.subsec_nanos() > 0);
    // A lower limit of whoever runs this stays.
    let limit = [seconds.min(limit[1]), (seconds + 1).min(limit[1])];
    forward_always(__NR_prlimit64, [0, resource, own(&limit), 0, 0, 0])
        .map(drop)
        .map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_what_a_kernel_lacks_for_a_policy() {
        let kernel = |landlock, seccomp| Kernel { landlock, seccomp };
        let strict = Policy::new().strict();
        assert_eq!(gaps(&strict, &kernel(6, true)), []);
        assert_eq!(gaps(&strict, &kernel(0, false)), [Gap::Files, Gap::Calls]);
        let old = [Gap::Truncation, Gap::Signals, Gap::AbstractSockets];
        assert_eq!(gaps(&strict, &kernel(2, true)), old);
        let lo = Policy::new().net(Net::Loopback);
        assert_eq!(gaps(&lo, &kernel(7, true)), [Gap::LoopbackOnly]);
        assert_eq!(gaps(&Policy::new(), &kernel(0, false)), []);
    }
}
