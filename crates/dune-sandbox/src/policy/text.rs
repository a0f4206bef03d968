//! A policy as text: TOML.
//!
//! ```toml
//! strict = true                # nothing but what is given below
//! net = "loopback"             # none, loopback or full
//!
//! [files]
//! ro = ["/usr/lib/python3"]    # relative paths are from the file's folder
//! rw = ["out"]
//!
//! [env]
//! clear = true
//! keep = ["HOME"]              # from the caller's environment
//! set = { LANG = "C.UTF-8" }
//!
//! [limits]
//! mem = "512M"
//! cpu-time = "10s"
//! nproc = 16
//! timeout = "1m"
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use toml::de::{DeTable, DeValue};

use super::limits::{AmountError, parse_duration, parse_size};
use super::net::Net;
use super::{Policy, PolicyError};

/// Every key there is, with the keys of its table; a table without any may
/// hold names of the user's own.
const KEYS: &[(&str, Option<&[&str]>)] = &[
    ("strict", None),
    ("net", None),
    ("files", Some(&["ro", "rw"])),
    ("env", Some(&["clear", "keep", "set"])),
    ("limits", Some(&["mem", "cpu-time", "nproc", "timeout"])),
];

/// A policy file cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// It is not TOML, or a value has the wrong type.
    #[error("line {line}: {message}")]
    Syntax {
        /// Counted from 1.
        line: usize,
        /// What the parser says, on one line.
        message: String,
    },
    /// There is no such key.
    #[error("line {line}: there is no key `{key}`; {hint}")]
    UnknownKey {
        /// Counted from 1.
        line: usize,
        /// With the table it is in: `limits.memory`.
        key: String,
        /// The nearest key, or all of them.
        hint: String,
    },
    /// A size or time cannot be read.
    #[error("`{key}`: {source}")]
    Amount {
        /// With the table it is in.
        key: &'static str,
        /// What is wrong with it.
        source: AmountError,
    },
    /// `net` is none of the three.
    #[error("`net`: {0:?} is none of none, loopback and full")]
    Net(String),
    /// `nproc` is zero.
    #[error("`limits.nproc`: 0 leaves no room for the program itself; give 1 or more")]
    NoProcess,
    /// What the rules say cannot be.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct File {
    strict: bool,
    net: Option<String>,
    files: Files,
    env: Env,
    limits: LimitsPart,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Files {
    ro: Vec<PathBuf>,
    rw: Vec<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Env {
    clear: bool,
    keep: Vec<String>,
    set: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct LimitsPart {
    mem: Option<Amount>,
    cpu_time: Option<Amount>,
    nproc: Option<u32>,
    timeout: Option<Amount>,
}

/// `"512M"`, or a plain number.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Amount {
    Text(String),
    Whole(u64),
    Fraction(f64),
}

impl Amount {
    fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Whole(number) => number.to_string(),
            Self::Fraction(number) => number.to_string(),
        }
    }
}

/// Reads a policy; relative paths are from `folder`.
///
/// # Errors
///
/// With the line or the key that is wrong, and what it could be.
pub fn parse(text: &str, folder: &std::path::Path) -> Result<Policy, TextError> {
    let table = DeTable::parse(text).map_err(|error| syntax(text, &error))?;
    check_keys(text, table.get_ref())?;
    let file: File = toml::from_str(text).map_err(|error| syntax(text, &error))?;
    build(file, folder)
}

fn build(file: File, folder: &std::path::Path) -> Result<Policy, TextError> {
    let mut policy = Policy::new();
    if file.strict {
        policy = policy.strict();
    }
    if let Some(name) = file.net {
        policy = policy.net(Net::from_name(&name).ok_or(TextError::Net(name))?);
    }
    for path in file.files.ro {
        policy = policy.read_only(folder.join(path))?;
    }
    for path in file.files.rw {
        policy = policy.read_write(folder.join(path))?;
    }
    if file.env.clear {
        policy = policy.clear_environment();
    }
    for name in file.env.keep {
        policy = policy.keep_variable(name)?;
    }
    for (name, value) in file.env.set {
        policy = policy.set_variable(name, value)?;
    }
    let amount = |key: &'static str| move |source| TextError::Amount { key, source };
    let limits = file.limits;
    if let Some(size) = limits.mem {
        policy = policy.memory(parse_size(&size.text()).map_err(amount("limits.mem"))?);
    }
    if let Some(time) = limits.cpu_time {
        let time = parse_duration(&time.text()).map_err(amount("limits.cpu-time"))?;
        policy = policy.cpu_time(time);
    }
    if let Some(count) = limits.nproc {
        if count == 0 {
            return Err(TextError::NoProcess);
        }
        policy = policy.processes(count);
    }
    if let Some(time) = limits.timeout {
        let time = parse_duration(&time.text()).map_err(amount("limits.timeout"))?;
        policy = policy.timeout(time);
    }
    Ok(policy)
}

/// Before the values, so that a wrong key is reported as one.
fn check_keys(text: &str, table: &DeTable<'_>) -> Result<(), TextError> {
    let top: Vec<&str> = KEYS.iter().map(|(key, _)| *key).collect();
    for (key, value) in table {
        let name: &str = key.get_ref();
        let Some((_, inner)) = KEYS.iter().find(|(known, _)| *known == name) else {
            return Err(unknown(text, key.span().start, "", name, &top));
        };
        let (Some(inner), DeValue::Table(table)) = (inner, value.get_ref()) else {
            continue;
        };
        for (inner_key, _) in table {
            let inner_name: &str = inner_key.get_ref();
            if !inner.contains(&inner_name) {
                return Err(unknown(
                    text,
                    inner_key.span().start,
                    &format!("{name}."),
                    inner_name,
                    inner,
                ));
            }
        }
    }
    Ok(())
}

fn unknown(text: &str, at: usize, table: &str, name: &str, known: &[&str]) -> TextError {
    let everywhere = KEYS.iter().flat_map(|(key, inner)| {
        let inner = inner.unwrap_or_default().iter();
        inner
            .map(move |name| format!("{key}.{name}"))
            .chain([(*key).to_owned()])
    });
    // A key in the wrong table is the likeliest mistake, then a misspelt one.
    let moved = everywhere
        .clone()
        .find(|full| full.rsplit('.').next() == Some(name));
    let nearest = known
        .iter()
        .map(|known| format!("{table}{known}"))
        .chain(everywhere)
        .map(|full| {
            (
                strsim::jaro_winkler(full.rsplit('.').next().unwrap_or(""), name),
                full,
            )
        })
        .filter(|(likeness, _)| *likeness >= 0.75)
        // The first of those that are equally near: the same table's.
        .fold(None, |best: Option<(f64, String)>, next| match best {
            Some(best) if best.0 >= next.0 => Some(best),
            _ => Some(next),
        })
        .map(|(_, full)| full);
    let hint = match moved.or(nearest) {
        Some(full) => format!("did you mean `{full}`?"),
        None => format!("known here: {}", known.join(", ")),
    };
    TextError::UnknownKey {
        line: line_of(text, at),
        key: format!("{table}{}", name.escape_debug()),
        hint,
    }
}

fn syntax(text: &str, error: &toml::de::Error) -> TextError {
    let message: Vec<&str> = error.message().lines().map(str::trim).collect();
    TextError::Syntax {
        line: line_of(text, error.span().map_or(0, |span| span.start)),
        message: message.join("; "),
    }
}

fn line_of(text: &str, at: usize) -> usize {
    let before = text.as_bytes().get(..at).unwrap_or(text.as_bytes());
    1 + before.iter().filter(|&&byte| byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Result<Policy, TextError> {
        parse(text, Path::new("/policies"))
    }

    #[test]
    fn everything_can_be_said() {
        let policy = read(
            r#"
            strict = true
            net = "loopback"
            [files]
            ro = ["/usr/lib/python3"]
            rw = ["out"]
            [env]
            clear = true
            keep = ["HOME"]
            set = { LANG = "C" }
            [limits]
            mem = "512M"
            cpu-time = 10
            nproc = 16
            timeout = "1.5m"
            "#,
        );
        let expected = Policy::new()
            .strict()
            .net(Net::Loopback)
            .read_only("/usr/lib/python3")
            .and_then(|policy| policy.read_write("/policies/out"))
            .map(Policy::clear_environment)
            .and_then(|policy| policy.keep_variable("HOME"))
            .and_then(|policy| policy.set_variable("LANG", "C"))
            .map(|policy| {
                policy
                    .memory(512 << 20)
                    .cpu_time(Duration::from_secs(10))
                    .processes(16)
                    .timeout(Duration::from_secs(90))
            });
        assert_eq!(policy.unwrap(), expected.unwrap());
        assert_eq!(read("").unwrap(), Policy::new());
    }

    #[test]
    fn a_wrong_key_is_named_with_the_nearest_right_one() {
        for (text, line, key, hint) in [
            ("strikt = true", 1, "strikt", "`strict`"),
            ("\n[limits]\nmemo = 1", 3, "limits.memo", "`limits.mem`"),
            ("timeout = 5", 1, "timeout", "`limits.timeout`"),
            ("[file]\nro = []", 1, "file", "`files`"),
            ("[files]\nread = []", 2, "files.read", "known here: ro, rw"),
            (
                "[limits]\ncpu_time = 3",
                2,
                "limits.cpu_time",
                "`limits.cpu-time`",
            ),
        ] {
            let error = read(text).unwrap_err();
            let shown = error.to_string();
            assert!(
                shown.starts_with(&format!("line {line}: there is no key `{key}`;")),
                "{shown}"
            );
            assert!(shown.contains(hint), "{shown}");
        }
    }

    #[test]
    fn a_wrong_value_is_named() {
        for (text, words) in [
            ("net = \"lo\"", ["net", "loopback"]),
            ("[limits]\nmem = \"many\"", ["limits.mem", "512K"]),
            ("[limits]\nnproc = 0", ["limits.nproc", "1 or more"]),
            ("\nstrict = 3", ["line 2", "boolean"]),
            ("= 3", ["line 1", ""]),
            ("[env]\nset = { \"A=B\" = \"\" }", ["A=B", "name"]),
            ("[env]\nkeep = [\"\"]", ["\"\"", "name"]),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in "[a-z\\[\\]=\"{}.,\n 0-9]{0,60}") {
            if let Err(error) = read(&text) {
                prop_assert_eq!(error.to_string().lines().count(), 1);
            }
        }
    }
}
