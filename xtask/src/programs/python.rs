//! One module of Python's regression tests, natively and in the sandbox: the result
//! of every test must be the same.

use std::collections::BTreeMap;
use std::process::Command;

use serde::Serialize;

use super::Row;
use super::run::{Runner, Where};

/// How many tests passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Counts {
    pub(super) native: usize,
    pub(super) sandbox: usize,
    pub(super) all: usize,
}

/// What Python says of one test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Passed,
    Skipped,
    Failed,
}

type Outcomes = BTreeMap<String, Outcome>;

/// The Debian package that has the tests of this Python, if they are not there.
pub(super) fn missing_package() -> Option<String> {
    let ask = |code: &str| {
        let output = Command::new("/usr/bin/python3").args(["-c", code]).output();
        output.ok().filter(|output| output.status.success())
    };
    if ask("import test.test_threading").is_some() {
        return None;
    }
    let version = ask("import sys; print('%d.%d' % sys.version_info[:2])")?;
    let version = String::from_utf8_lossy(&version.stdout).trim().to_owned();
    Some(format!("libpython{version}-testsuite"))
}

/// Tests that differ are run again, by themselves, this often: some depend on how busy the
/// machine is, natively as well.
const AGAIN: usize = 2;

pub(super) fn compare(runner: &Runner, module: &str) -> Row {
    let (native, native_seconds) = results(runner, Where::Native, module, &[]);
    let (sandboxed, sandbox_seconds) = results(runner, Where::Sandbox, module, &[]);
    let mut row = Row {
        name: module.to_owned(),
        equal: false,
        native_seconds,
        sandbox_seconds,
        tests: None,
        differences: Vec::new(),
        unsteady: Vec::new(),
    };
    let (mut native, mut sandboxed) = match (native, sandboxed) {
        (Ok(native), Ok(sandboxed)) => (native, sandboxed),
        (native, sandboxed) => {
            let native = native.err().map(|error| format!("natively: {error}"));
            let sandboxed = sandboxed
                .err()
                .map(|error| format!("in the sandbox: {error}"));
            row.differences.extend(native);
            row.differences.extend(sandboxed);
            return row;
        }
    };
    let once = different(&native, &sandboxed);
    for _ in 0..AGAIN {
        let still = different(&native, &sandboxed);
        if still.is_empty() {
            break;
        }
        for (place, outcomes) in [
            (Where::Native, &mut native),
            (Where::Sandbox, &mut sandboxed),
        ] {
            // Without a result they count as they did.
            if let (Ok(again), _) = results(runner, place, module, &still) {
                outcomes.extend(again);
            }
        }
    }
    let still = different(&native, &sandboxed);
    let word = |outcome: Option<&Outcome>| match outcome {
        Some(Outcome::Passed) => "passed",
        Some(Outcome::Skipped) => "skipped",
        Some(Outcome::Failed) => "failed",
        None => "not run",
    };
    row.differences = still
        .iter()
        .map(|test| {
            let (native, sandboxed) = (word(native.get(test)), word(sandboxed.get(test)));
            format!("{test}: {native} natively, {sandboxed} in the sandbox")
        })
        .collect();
    row.unsteady = once
        .into_iter()
        .filter(|test| !still.contains(test))
        .collect();
    let passed = |outcomes: &Outcomes| {
        let passed = outcomes.values().filter(|o| **o == Outcome::Passed);
        passed.count()
    };
    row.tests = Some(Counts {
        native: passed(&native),
        sandbox: passed(&sandboxed),
        all: native.len(),
    });
    row.equal = row.differences.is_empty() && passed(&native) > 0;
    row
}

/// The tests whose results are not the same.
fn different(native: &Outcomes, sandboxed: &Outcomes) -> Vec<String> {
    let mut names: Vec<&String> = native.keys().chain(sandboxed.keys()).collect();
    names.sort_unstable();
    names.dedup();
    names
        .into_iter()
        .filter(|name| native.get(*name) != sandboxed.get(*name))
        .cloned()
        .collect()
}

/// Runs `module`, or those `tests` of it; and how many seconds it took.
fn results(
    runner: &Runner,
    place: Where,
    module: &str,
    tests: &[String],
) -> (Result<Outcomes, String>, f64) {
    const FILE: &str = "results.xml";
    // Where there is such a device, these wait for a partner outside of the machine, natively
    // as well; and one renames the machine, which no sandboxed program may.
    const IGNORED: [&str; 2] = ["*VSOCK*", "test_sethostname"];
    let mut arguments = vec!["-m", "test", "--junit-xml", FILE];
    for pattern in IGNORED {
        arguments.extend(["--ignore", pattern]);
    }
    for test in tests {
        arguments.extend(["-m", test]);
    }
    arguments.push(module);
    let (ended, text) = runner.python(place, &arguments, FILE);
    let outcomes = match (ended.seen, text) {
        (Err(error), _) => Err(error),
        (Ok(_), Some(text)) => Ok(outcomes(&text)),
        (Ok(seen), None) => {
            let last: Vec<&str> = seen.output.lines().rev().take(5).collect();
            Err(format!(
                "{} and no results; its last lines, backwards: {last:?}",
                seen.status
            ))
        }
    };
    (outcomes, ended.seconds)
}

/// Reads JUnit's XML as Python's regression tests write it: one `testcase` for each test,
/// with an element in it for what did not pass.
fn outcomes(xml: &str) -> Outcomes {
    let mut outcomes = Outcomes::new();
    for case in xml.split("<testcase ").skip(1) {
        let Some(name) = case
            .split_once("name=\"")
            .and_then(|(_, rest)| rest.split_once('"'))
            .map(|(name, _)| name.to_owned())
        else {
            continue;
        };
        let body = case.split("</testcase>").next().unwrap_or(case);
        let has = |element: &str| body.contains(&format!("<{element}"));
        let outcome = if has("failure") || has("error") {
            Outcome::Failed
        } else if has("skipped") {
            Outcome::Skipped
        } else {
            Outcome::Passed
        };
        // The parts of a test ("subtests") have its name; the worst counts.
        let worst = outcomes.entry(name).or_insert(outcome);
        if outcome == Outcome::Failed {
            *worst = outcome;
        }
    }
    outcomes
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<testsuites tests=\"3\"><testsuite><testcase name=\"test.a.One.test_x\" \
        status=\"run\" result=\"completed\" time=\"0.1\" /><testcase name=\"test.a.One.test_y\" \
        status=\"run\" result=\"completed\"><skipped>not here</skipped></testcase><testcase \
        name=\"test.a.One.test_z\" status=\"run\" result=\"completed\"><failure \
        message=\"no\">why</failure></testcase></testsuite></testsuites>";

    #[test]
    fn results_are_read_one_by_one() {
        let outcomes = outcomes(XML);
        let expected = [Outcome::Passed, Outcome::Skipped, Outcome::Failed];
        assert!(outcomes.values().eq(&expected), "{outcomes:?}");
    }

    #[test]
    fn a_test_that_is_missing_is_a_difference() {
        let all = outcomes(XML);
        let mut fewer = all.clone();
        assert!(different(&all, &fewer).is_empty());
        fewer.remove("test.a.One.test_x");
        assert_eq!(different(&all, &fewer), ["test.a.One.test_x"]);
        assert_eq!(different(&fewer, &all), ["test.a.One.test_x"]);
    }
}
