//! The wall around files and TCP: Landlock.
//!
//! Besides the policy's own rules there is what the guard itself opens while
//! the program runs: `/proc`, for reading. The guard keeps the program away from it;
//! that a confined process cannot read another's memory, environment or descriptors
//! through `/proc` is Landlock's doing as well (it refuses `ptrace` access to
//! whatever is outside). `/dev/kvm` is open already: a forked process makes its VM on the
//! same descriptor.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, Scope, make_bitflags,
};

use super::ConfineError;
use crate::policy::{FileAccess, Net, NormalPath, Rules};

/// The newest rules of Landlock that this code knows; older kernels do what
/// they can, and [`super::gaps`] says what that leaves out.
const NEWEST: ABI = ABI::V6;

/// What the guard itself opens.
const GUARDS_OWN: [(&str, FileAccess); 1] = [("/proc", FileAccess::ReadOnly)];

/// Restricts this thread and what it will make.
///
/// # Errors
///
/// If the kernel refuses, or a path is gone.
pub fn restrict(rules: &Rules) -> Result<(), ConfineError> {
    let mut ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    let mut any = false;
    if rules.files.is_some() {
        ruleset = ruleset.handle_access(AccessFs::from_all(NEWEST))?;
        any = true;
    }
    if rules.net == Net::None {
        ruleset = ruleset
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::AbstractUnixSocket)?;
        any = true;
    }
    if rules.strict {
        ruleset = ruleset.scope(Scope::Signal)?;
        any = true;
    }
    if !any {
        return Ok(());
    }
    let mut created = ruleset.create()?;
    if let Some(files) = &rules.files {
        for rule in files.iter() {
            let path = rule.path.as_path();
            // Another process's `/proc/self` is another folder.
            if !is_in_proc(&rule.path) {
                created = add(created, path, rule.access)?;
            }
        }
        for (path, access) in GUARDS_OWN {
            if Path::new(path).exists() {
                created = add(created, Path::new(path), access)?;
            }
        }
    }
    created.restrict_self()?;
    Ok(())
}

fn is_in_proc(path: &NormalPath) -> bool {
    path.is_within(&NormalPath::root().join(b"proc/self"))
}

fn add(
    ruleset: landlock::RulesetCreated,
    path: &Path,
    access: FileAccess,
) -> Result<landlock::RulesetCreated, ConfineError> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| ConfineError::Path {
        path: path.display().to_string(),
        source,
    };
    let fd = PathFd::new(path).map_err(|error| failed(Box::new(error)))?;
    let metadata = std::fs::metadata(path).map_err(|error| failed(Box::new(error)))?;
    let mut rights = rights(access);
    if !metadata.is_dir() {
        rights &= AccessFs::from_file(NEWEST);
    }
    Ok(ruleset.add_rule(PathBeneath::new(fd, rights))?)
}

/// What a rule gives. Device nodes cannot be made under any rule.
fn rights(access: FileAccess) -> BitFlags<AccessFs> {
    let read = AccessFs::from_read(NEWEST);
    match access {
        FileAccess::ReadOnly => read,
        // Landlock knows no attributes.
        FileAccess::Contents | FileAccess::ReadWrite => {
            AccessFs::from_all(NEWEST) & !make_bitflags!(AccessFs::{MakeChar | MakeBlock})
        }
    }
}
