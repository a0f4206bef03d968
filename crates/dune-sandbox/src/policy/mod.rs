//! What a program may do: the policy.
//!
//! A [`Policy`] is said by a person (options, or a file: [`text`]) and holds
//! nothing but that. Before a program starts it becomes [`Rules`]: paths
//! resolved, and what the program needs to be loaded at all added
//! ([`needed`]). Rules are pure data and decide by pure functions:
//!
//! | file | decides |
//! |---|---|
//! | [`path`], [`files`] | may this path be looked at, read, written, made |
//! | [`net`] | may this socket be made, this address be reached |
//! | [`limits`] | how much is too much |
//! | [`refusal`] | what is said of a refusal, and which rule would allow it |
//!
//! They are enforced twice: by the guard, when the program asks (`enforced`,
//! [`uses`] and the calls' own functions), and by the host kernel, which the process
//! has told to refuse everything else ([`crate::confine`]).
//!
//! # Defaults
//!
//! | | no option | `--ro`, `--rw` | `--strict` |
//! |---|---|---|---|
//! | files | the user's own rights | those paths, and what loading needs | likewise |
//! | network | full | full | none |
//! | environment | the caller's | the caller's | [`STRICT_VARIABLES`] |
//! | devices | the user's own rights | `/dev/null`, `zero`, `full`, `random`, `urandom`, `tty` | likewise |
//!
//! An option that gives more adds to any of them.

pub(crate) mod enforced;
pub mod files;
pub mod limits;
pub mod needed;
pub mod net;
pub mod path;
pub mod refusal;
pub(crate) mod tasks;
pub mod text;
pub mod uses;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use files::{FileAccess, FileRules, Need};
pub use limits::Limits;
pub use net::Net;
pub use path::NormalPath;
pub use refusal::{Refusal, Remedy};

/// Variables that a strict policy leaves of the caller's environment: where
/// programs are, and how text is shown.
pub const STRICT_VARIABLES: [&str; 5] = ["PATH", "TERM", "LANG", "LC_ALL", "TZ"];

/// Devices that a program may use whatever its file rules are.
const DEVICES: [&str; 6] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
];

/// What a person said. See the module documentation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    strict: bool,
    files: Vec<(PathBuf, FileAccess)>,
    net: Option<Net>,
    clear_environment: bool,
    kept: Vec<OsString>,
    set: Vec<(OsString, OsString)>,
    limits: Limits,
}

/// A policy that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A path with a zero byte in it, or an empty one.
    #[error("{0:?} is not a path")]
    NoPath(PathBuf),
    /// A name that no variable can have.
    #[error("{0:?} cannot be the name of a variable: it must not be empty or hold `=` or a zero")]
    NoName(OsString),
}

/// Rules cannot be made of a policy on this machine.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    /// A rule's path cannot be resolved.
    #[error(
        "the policy allows {path:?}, which cannot be found: {source}; create it or drop the rule"
    )]
    Path {
        /// The path as given.
        path: PathBuf,
        /// What the host kernel said.
        source: std::io::Error,
    },
    /// A variable that shall be kept is not there.
    #[error("{0:?} is not set; give NAME=VALUE or drop it")]
    Variable(OsString),
}

impl Policy {
    /// The user's own rights: nothing is restricted.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Nothing is allowed but what other calls add and what the program needs
    /// to be loaded.
    #[must_use]
    pub fn strict(mut self) -> Self {
        self.strict = true;
        self
    }

    /// Allows reading `path` and everything below it, and no file that no rule
    /// allows.
    ///
    /// # Errors
    ///
    /// If it is no path.
    pub fn read_only(self, path: impl Into<PathBuf>) -> Result<Self, PolicyError> {
        self.allow(path.into(), FileAccess::ReadOnly)
    }

    /// Allows reading and writing `path` and everything below it, and no file
    /// that no rule allows.
    ///
    /// # Errors
    ///
    /// If it is no path.
    pub fn read_write(self, path: impl Into<PathBuf>) -> Result<Self, PolicyError> {
        self.allow(path.into(), FileAccess::ReadWrite)
    }

    fn allow(mut self, path: PathBuf, access: FileAccess) -> Result<Self, PolicyError> {
        let bytes = path.as_os_str().as_bytes();
        if bytes.is_empty() || bytes.contains(&0) {
            return Err(PolicyError::NoPath(path));
        }
        self.files.push((path, access));
        Ok(self)
    }

    /// Sets how much network there is.
    #[must_use]
    pub fn net(mut self, net: Net) -> Self {
        self.net = Some(net);
        self
    }

    /// Starts with an empty environment.
    #[must_use]
    pub fn clear_environment(mut self) -> Self {
        self.clear_environment = true;
        self
    }

    /// Keeps a variable of the caller's environment.
    ///
    /// # Errors
    ///
    /// If it is no name.
    pub fn keep_variable(mut self, name: impl Into<OsString>) -> Result<Self, PolicyError> {
        self.kept.push(variable_name(name.into())?);
        Ok(self)
    }

    /// Sets a variable.
    ///
    /// # Errors
    ///
    /// If it is no name.
    pub fn set_variable(
        mut self,
        name: impl Into<OsString>,
        value: impl Into<OsString>,
    ) -> Result<Self, PolicyError> {
        self.set.push((variable_name(name.into())?, value.into()));
        Ok(self)
    }

    /// Limits the memory of each process, in bytes.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.limits.memory = Some(bytes);
        self
    }

    /// Limits the CPU time of each process.
    #[must_use]
    pub fn cpu_time(mut self, time: Duration) -> Self {
        self.limits.cpu_time = Some(time);
        self
    }

    /// Limits how many processes and threads there are at a time.
    #[must_use]
    pub fn processes(mut self, count: u32) -> Self {
        self.limits.processes = Some(count);
        self
    }

    /// Limits the time by the clock. Who runs the program has to see to it:
    /// `dune run` does.
    #[must_use]
    pub fn timeout(mut self, time: Duration) -> Self {
        self.limits.timeout = Some(time);
        self
    }

    /// Adds what `other` says; where both say something, `other` does.
    #[must_use]
    pub fn with(mut self, other: Self) -> Self {
        self.strict |= other.strict;
        self.files.extend(other.files);
        self.net = other.net.or(self.net);
        self.clear_environment |= other.clear_environment;
        self.kept.extend(other.kept);
        self.set.extend(other.set);
        let (mine, theirs) = (&mut self.limits, other.limits);
        mine.memory = theirs.memory.or(mine.memory);
        mine.cpu_time = theirs.cpu_time.or(mine.cpu_time);
        mine.processes = theirs.processes.or(mine.processes);
        mine.timeout = theirs.timeout.or(mine.timeout);
        self
    }

    /// With relative paths taken from the present working directory.
    #[must_use]
    pub fn from_here(mut self) -> Self {
        for (path, _) in &mut self.files {
            // Fails for an empty path only, and there is none.
            if let Ok(absolute) = std::path::absolute(&*path) {
                *path = absolute;
            }
        }
        self
    }

    /// Whether nothing is allowed by default.
    #[must_use]
    pub fn is_strict(&self) -> bool {
        self.strict
    }

    /// The limits.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// How much network there is.
    #[must_use]
    pub fn network(&self) -> Net {
        let default = if self.strict { Net::None } else { Net::Full };
        self.net.unwrap_or(default)
    }

    /// Whether files are restricted at all.
    #[must_use]
    pub fn restricts_files(&self) -> bool {
        self.strict || !self.files.is_empty()
    }

    /// Whether it leaves the program fewer rights than the user has. (Limits
    /// are not rights.)
    #[must_use]
    pub fn restricts(&self) -> bool {
        self.restricts_files() || self.network() != Net::Full
    }

    /// The program's environment, made of the caller's.
    ///
    /// # Errors
    ///
    /// If a variable that shall be kept is not set.
    pub fn environment(
        &self,
        caller: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Vec<(OsString, OsString)>, RulesError> {
        let caller: Vec<_> = caller.into_iter().collect();
        let mut environment: Vec<(OsString, OsString)> = if self.clear_environment {
            Vec::new()
        } else if self.strict {
            let kept = |name: &OsStr| STRICT_VARIABLES.iter().any(|kept| *kept == name);
            caller
                .iter()
                .filter(|(name, _)| kept(name))
                .cloned()
                .collect()
        } else {
            caller.clone()
        };
        for name in &self.kept {
            let variable = caller
                .iter()
                .find(|(other, _)| other == name)
                .ok_or_else(|| RulesError::Variable(name.clone()))?;
            environment.retain(|(other, _)| other != name);
            environment.push(variable.clone());
        }
        for (name, value) in &self.set {
            environment.retain(|(other, _)| other != name);
            environment.push((name.clone(), value.clone()));
        }
        Ok(environment)
    }

    /// The rules for a program that consists of `program` files: all paths
    /// resolved as they are now.
    ///
    /// # Errors
    ///
    /// If a rule's path is not there.
    pub fn rules(&self, program: &[PathBuf]) -> Result<Rules, RulesError> {
        let files = if self.restricts_files() {
            Some(self.file_rules(program)?)
        } else {
            None
        };
        Ok(Rules {
            files,
            net: self.network(),
            limits: self.limits,
            strict: self.strict,
        })
    }

    fn file_rules(&self, program: &[PathBuf]) -> Result<FileRules, RulesError> {
        let mut rules = FileRules::new();
        for (path, access) in &self.files {
            let resolved = resolve(path).map_err(|source| RulesError::Path {
                path: path.clone(),
                source,
            })?;
            rules.allow(resolved, *access);
        }
        for path in program {
            // What is not there is not needed after all.
            if let Ok(path) = resolve(path) {
                rules.allow(path, FileAccess::ReadOnly);
            }
        }
        for path in DEVICES {
            if let Ok(path) = resolve(Path::new(path)) {
                rules.allow(path, FileAccess::Contents);
            }
        }
        Ok(rules)
    }
}

/// A policy as it is enforced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Rules over files, or `None` for the user's own rights.
    pub files: Option<FileRules>,
    /// How much network there is.
    pub net: Net,
    /// Limits.
    pub limits: Limits,
    /// Whether the policy denies by default.
    pub strict: bool,
}

impl Rules {
    /// The user's own rights, no limits.
    #[must_use]
    pub fn unrestricted() -> Self {
        Self {
            files: None,
            net: Net::Full,
            limits: Limits::default(),
            strict: false,
        }
    }

    /// Whether they leave the program fewer rights than the user has.
    #[must_use]
    pub fn restrict(&self) -> bool {
        self.files.is_some() || self.net != Net::Full
    }
}

/// The one spelling of an existing path, relative ones from the working
/// directory, without symbolic links. What lies below `/proc/self` stays so:
/// it is another folder for every process.
fn resolve(path: &Path) -> std::io::Result<NormalPath> {
    let no_path = || std::io::Error::from(std::io::ErrorKind::InvalidInput);
    let absolute = std::path::absolute(path)?;
    let spelt = NormalPath::new(absolute.as_os_str().as_bytes()).ok_or_else(no_path)?;
    let own = NormalPath::root().join(b"proc/self");
    let resolved = std::fs::canonicalize(path)?;
    if spelt.is_within(&own) {
        return Ok(spelt);
    }
    NormalPath::new(resolved.as_os_str().as_bytes()).ok_or_else(no_path)
}

fn variable_name(name: OsString) -> Result<OsString, PolicyError> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.contains(&b'=') || bytes.contains(&0) {
        Err(PolicyError::NoName(name))
    } else {
        Ok(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller() -> Vec<(OsString, OsString)> {
        [("PATH", "/bin"), ("SECRET", "s"), ("LANG", "C")]
            .map(|(name, value)| (name.into(), value.into()))
            .to_vec()
    }

    fn names(policy: &Policy) -> Vec<String> {
        policy
            .environment(caller())
            .unwrap()
            .into_iter()
            .map(|(name, value)| format!("{}={}", name.display(), value.display()))
            .collect()
    }

    #[test]
    fn without_options_nothing_is_restricted() {
        let policy = Policy::new();
        assert!(!policy.restricts());
        assert_eq!(policy.rules(&[]).unwrap(), Rules::unrestricted());
        assert_eq!(names(&policy), ["PATH=/bin", "SECRET=s", "LANG=C"]);
    }

    #[test]
    fn strict_is_deny_by_default() {
        let policy = Policy::new().strict();
        let rules = policy.rules(&["/bin/sh".into()]).unwrap();
        assert_eq!(rules.net, Net::None);
        let files = rules.files.unwrap();
        let path = |text: &str| NormalPath::new(text.as_bytes()).unwrap();
        assert!(files.decide(&path("/etc/passwd"), Need::Read).is_err());
        assert!(files.decide(&path("/tmp"), Need::Entries).is_err());
        assert_eq!(files.decide(&path("/dev/null"), Need::Write), Ok(()));
        assert!(files.decide(&path("/dev/null"), Need::Attributes).is_err());
        let shell = std::fs::canonicalize("/bin/sh").unwrap();
        let shell = path(shell.to_str().unwrap());
        assert_eq!(files.decide(&shell, Need::Read), Ok(()));
        assert!(files.decide(&shell, Need::Write).is_err());
        assert_eq!(names(&policy), ["PATH=/bin", "LANG=C"]);
    }

    #[test]
    fn a_path_rule_restricts_files_and_nothing_else() {
        let policy = Policy::new().read_only("/usr").unwrap();
        let rules = policy.rules(&[]).unwrap();
        assert_eq!(rules.net, Net::Full);
        let etc = NormalPath::new(b"/etc/passwd").unwrap();
        assert!(rules.files.unwrap().decide(&etc, Need::Read).is_err());
    }

    #[test]
    fn rules_are_about_what_paths_resolve_to() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/etc", &link).unwrap();
        let policy = Policy::new().read_only(&link).unwrap();
        let files = policy.rules(&[]).unwrap().files.unwrap();
        let etc = std::fs::canonicalize("/etc").unwrap();
        assert!(files.iter().any(|rule| rule.path.as_path() == etc));
        let gone = Policy::new().read_only(folder.path().join("gone")).unwrap();
        let error = gone.rules(&[]).unwrap_err().to_string();
        assert!(
            error.contains("gone") && error.contains("create it"),
            "{error}"
        );
    }

    #[test]
    fn the_environment_is_what_was_asked_for() {
        let policy = Policy::new()
            .strict()
            .keep_variable("SECRET")
            .and_then(|policy| policy.set_variable("LANG", "de"))
            .unwrap();
        assert_eq!(names(&policy), ["PATH=/bin", "SECRET=s", "LANG=de"]);
        let policy = policy.clear_environment();
        assert_eq!(names(&policy), ["SECRET=s", "LANG=de"]);
        let error = Policy::new()
            .keep_variable("NOWHERE")
            .unwrap()
            .environment(caller());
        assert!(error.unwrap_err().to_string().contains("NOWHERE"));
        assert!(Policy::new().keep_variable("A=B").is_err());
    }

    #[test]
    fn the_command_line_has_the_last_word() {
        let file = Policy::new().strict().memory(1).net(Net::Loopback);
        let options = Policy::new().memory(2);
        let both = file.with(options);
        assert_eq!(both.limits().memory, Some(2));
        assert_eq!(both.network(), Net::Loopback);
        assert!(both.is_strict());
    }
}
