//! What the program may do, as options of `dune run`.
//!
//! The options make a [`Policy`], on top of the one in `--policy FILE`; what
//! the kernel cannot enforce of it is said before the program starts.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use dune_sandbox::confine::{self, Gap, kernel::Kernel};
use dune_sandbox::policy::limits::{parse_duration, parse_size};
use dune_sandbox::policy::{Net, text};
use dune_sandbox::{Policy, SecondWall};

/// Options that say what the program may do.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Policy")]
pub(crate) struct PolicyArgs {
    /// Allow nothing but what other options give and what the program needs to
    /// be loaded: no files, no network, a small environment.
    #[arg(long)]
    strict: bool,

    /// Let the program read this path and what is below it; with this or --rw,
    /// it has no file that no rule gives (can be repeated).
    #[arg(long, value_name = "PATH")]
    ro: Vec<PathBuf>,

    /// Let the program read and write this path and what is below it (can be
    /// repeated).
    #[arg(long, value_name = "PATH")]
    rw: Vec<PathBuf>,

    /// How much network the program has [default: full, with --strict: none].
    #[arg(long, value_name = "HOW-MUCH")]
    net: Option<NetArg>,

    /// Set a variable of the program's environment, or keep the caller's (can
    /// be repeated).
    #[arg(long, value_name = "NAME[=VALUE]", value_parser = parse_variable)]
    env: Vec<Variable>,

    /// Start with an empty environment; --env still adds to it.
    #[arg(long)]
    clear_env: bool,

    /// Writable memory of each process: 64M, 1.5G.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    mem: Option<u64>,

    /// CPU time of each process (SIGXCPU, then SIGKILL): 10, 1.5s, 2m.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    cpu_time: Option<Duration>,

    /// Processes and threads at a time.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    nproc: Option<u32>,

    /// End the program, with all its processes, after this time (exit code
    /// 124): 10, 500ms, 2m.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    timeout: Option<Duration>,

    /// Read a policy from this TOML file; options add to it.
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,

    /// Say of each refusal which rule would allow it.
    #[arg(long)]
    pub(crate) explain: bool,

    /// Run even if Landlock or seccomp are not there to stand under the
    /// guard's own checks.
    #[arg(long)]
    no_second_wall: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum NetArg {
    /// Sockets between the program's own processes only.
    None,
    /// TCP and UDP with this machine.
    Loopback,
    /// Everything that the user may.
    Full,
}

impl From<NetArg> for Net {
    fn from(net: NetArg) -> Self {
        match net {
            NetArg::None => Self::None,
            NetArg::Loopback => Self::Loopback,
            NetArg::Full => Self::Full,
        }
    }
}

/// `NAME`, or `NAME=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Variable {
    name: OsString,
    value: Option<OsString>,
}

fn parse_variable(text: &str) -> Result<Variable, String> {
    let bytes = OsStr::new(text).as_bytes();
    let owned = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
    match bytes.iter().position(|&byte| byte == b'=') {
        Some(0) => Err("give NAME=VALUE, or NAME to keep the caller's".to_owned()),
        _ if bytes.is_empty() => Err("give NAME=VALUE, or NAME to keep the caller's".to_owned()),
        None => Ok(Variable {
            name: owned(bytes),
            value: None,
        }),
        Some(at) => Ok(Variable {
            name: owned(&bytes[..at]),
            value: Some(owned(&bytes[at + 1..])),
        }),
    }
}

impl PolicyArgs {
    /// The policy that they and the file make.
    ///
    /// # Errors
    ///
    /// If the file cannot be read or understood.
    pub(crate) fn policy(&self) -> anyhow::Result<Policy> {
        let base = match &self.policy {
            Some(path) => read(path)?,
            None => Policy::new(),
        };
        Ok(base.with(self.options()?).from_here())
    }

    fn options(&self) -> anyhow::Result<Policy> {
        let mut policy = Policy::new();
        if self.strict {
            policy = policy.strict();
        }
        for path in &self.ro {
            policy = policy.read_only(path)?;
        }
        for path in &self.rw {
            policy = policy.read_write(path)?;
        }
        if let Some(net) = self.net {
            policy = policy.net(net.into());
        }
        if self.clear_env {
            policy = policy.clear_environment();
        }
        for Variable { name, value } in &self.env {
            policy = match value {
                Some(value) => policy.set_variable(name, value)?,
                None => policy.keep_variable(name)?,
            };
        }
        if let Some(bytes) = self.mem {
            policy = policy.memory(bytes);
        }
        if let Some(time) = self.cpu_time {
            policy = policy.cpu_time(time);
        }
        if let Some(count) = self.nproc {
            policy = policy.processes(count);
        }
        if let Some(time) = self.timeout {
            policy = policy.timeout(time);
        }
        Ok(policy)
    }

    /// Whether the second wall must stand.
    pub(crate) fn second_wall(&self) -> SecondWall {
        if self.no_second_wall {
            SecondWall::IfPossible
        } else {
            SecondWall::Required
        }
    }

    /// The options again, for another `dune run`, but for the time limit.
    pub(crate) fn words(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = Vec::new();
        let flags = [
            (self.strict, "--strict"),
            (self.clear_env, "--clear-env"),
            (self.explain, "--explain"),
            (self.no_second_wall, "--no-second-wall"),
        ];
        words.extend(
            flags
                .iter()
                .filter(|(set, _)| *set)
                .map(|(_, flag)| OsString::from(flag)),
        );
        let paths = self.ro.iter().map(|path| ("--ro", path));
        let paths = paths.chain(self.rw.iter().map(|path| ("--rw", path)));
        for (option, path) in paths.chain(self.policy.iter().map(|path| ("--policy", path))) {
            words.extend([option.into(), path.clone().into_os_string()]);
        }
        if let Some(net) = self.net {
            words.extend(["--net".into(), Net::from(net).name().into()]);
        }
        for Variable { name, value } in &self.env {
            let mut variable = name.clone();
            if let Some(value) = value {
                variable.push("=");
                variable.push(value);
            }
            words.extend(["--env".into(), variable]);
        }
        if let Some(bytes) = self.mem {
            words.extend(["--mem".into(), bytes.to_string().into()]);
        }
        if let Some(time) = self.cpu_time {
            words.extend(["--cpu-time".into(), time.as_secs_f64().to_string().into()]);
        }
        if let Some(count) = self.nproc {
            words.extend(["--nproc".into(), count.to_string().into()]);
        }
        words
    }
}

/// The warning of what this kernel cannot enforce, if there is any.
pub(crate) fn warning(policy: &Policy) -> Option<String> {
    let gaps = confine::gaps(policy, &Kernel::this());
    if gaps.is_empty() {
        return None;
    }
    let list: Vec<String> = gaps.iter().map(Gap::to_string).collect();
    Some(format!(
        "the guard alone enforces, for the kernel cannot: {}",
        list.join("; ")
    ))
}

fn read(path: &Path) -> anyhow::Result<Policy> {
    /// Longer ones are not policies.
    const LONGEST: u64 = 1 << 20;
    let failed = || format!("cannot read the policy {}", path.display());
    let len = std::fs::metadata(path).with_context(failed)?.len();
    if len > LONGEST {
        bail!(
            "the policy {} has {len} bytes; that is no policy",
            path.display()
        );
    }
    let contents = std::fs::read_to_string(path).with_context(failed)?;
    let absolute = std::path::absolute(path).with_context(failed)?;
    let folder = absolute.parent().unwrap_or(Path::new("/"));
    text::parse(&contents, folder).with_context(|| format!("the policy {}", path.display()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        policy: PolicyArgs,
    }

    fn parse(words: &[&str]) -> PolicyArgs {
        Cli::try_parse_from(std::iter::once("run").chain(words.iter().copied()))
            .unwrap()
            .policy
    }

    #[test]
    fn variables_are_split_at_the_first_sign() {
        let variable = |name: &str, value: Option<&str>| {
            Ok(Variable {
                name: name.into(),
                value: value.map(Into::into),
            })
        };
        assert_eq!(parse_variable("A=b=c"), variable("A", Some("b=c")));
        assert_eq!(parse_variable("A="), variable("A", Some("")));
        assert_eq!(parse_variable("A"), variable("A", None));
        assert!(parse_variable("=b").is_err());
        assert!(parse_variable("").is_err());
    }

    #[test]
    fn the_same_words_make_the_same_policy() {
        let args = parse(&[
            "--strict",
            "--ro",
            "/usr",
            "--rw",
            "/tmp",
            "--net",
            "loopback",
            "--env",
            "A=b c",
            "--env",
            "HOME",
            "--clear-env",
            "--mem",
            "1.5G",
            "--cpu-time",
            "2m",
            "--nproc",
            "7",
            "--explain",
            "--no-second-wall",
        ]);
        let words: Vec<String> = args
            .words()
            .into_iter()
            .map(|word| word.into_string().unwrap())
            .collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let again = parse(&words);
        assert_eq!(again.policy().unwrap(), args.policy().unwrap());
        assert_eq!(again.second_wall(), args.second_wall());
        assert!(again.explain);
    }

    #[test]
    fn a_file_is_the_base_and_its_mistakes_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy.toml");
        std::fs::write(&path, "strict = true\n[limits]\nmem = \"1M\"\n").unwrap();
        let path = path.to_str().unwrap();
        let policy = parse(&["--policy", path, "--mem", "2M"]).policy().unwrap();
        assert!(policy.is_strict());
        assert_eq!(policy.limits().memory, Some(2 << 20));
        std::fs::write(path, "stritc = true\n").unwrap();
        let error = parse(&["--policy", path]).policy().unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("policy.toml") && text.contains("did you mean `strict`"),
            "{text}"
        );
    }
}
