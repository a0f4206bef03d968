//! Counting tests from what `cargo test` says.

use std::fmt;

/// Tests that passed, failed and were skipped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
    /// The names of those that failed, with their target.
    pub(crate) failures: Vec<String>,
    /// Those that were skipped, with the reason where there is one.
    pub(crate) skips: Vec<String>,
    target: String,
    /// A target began and has not said yet how it ended.
    open: bool,
}

impl Tally {
    /// Takes in one line of `cargo test`.
    pub(crate) fn read(&mut self, line: &str) {
        let line = line.trim_end();
        let words = line.trim_start();
        if let Some(target) = words
            .strip_prefix("Running ")
            .or_else(|| words.strip_prefix("Doc-tests "))
        {
            self.close();
            // "tests/x.rs (target/debug/deps/x-0123)": the first part says it.
            target
                .split(" (")
                .next()
                .unwrap_or(target)
                .clone_into(&mut self.target);
        } else if is_beginning(line) {
            self.open = true;
        } else if let Some(result) = line.strip_prefix("test result: ") {
            self.open = false;
            for part in result.split([';', '.']) {
                let mut words = part.split_whitespace();
                let (Some(count), Some(what)) = (words.next(), words.next()) else {
                    continue;
                };
                let Ok(count) = count.parse::<u64>() else {
                    continue;
                };
                match what {
                    "passed" => self.passed += count,
                    "failed" => self.failed += count,
                    "ignored" => self.skipped += count,
                    _ => {}
                }
            }
        } else if let Some((name, outcome)) = line
            .strip_prefix("test ")
            .and_then(|test| test.split_once(" ... "))
        {
            let entry = format!("{}: {}", self.target, name.trim_end());
            self.forget_skip(&entry);
            if outcome.starts_with("FAILED") {
                self.failures.push(entry);
            } else if let Some(reason) = outcome.strip_prefix("ignored") {
                let reason = reason.trim_start_matches([',', ' ']);
                self.skips.push(format!("{entry} {reason}"));
            }
        }
    }

    /// A target that began and never said how it ended died: one failure.
    pub(crate) fn close(&mut self) {
        if std::mem::take(&mut self.open) {
            self.failed += 1;
            self.failures
                .push(format!("{}: it died before its end", self.target));
        }
    }

    /// A test that was skipped before and runs now was not skipped.
    fn forget_skip(&mut self, entry: &str) {
        let is_it = |skip: &String| {
            skip.strip_prefix(entry)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
        };
        if let Some(index) = self.skips.iter().position(is_it) {
            self.skips.remove(index);
            self.skipped = self.skipped.saturating_sub(1);
        }
    }

    /// Adds a failure that no test reported.
    pub(crate) fn fail(&mut self, what: impl Into<String>) {
        self.failed += 1;
        self.failures.push(what.into());
    }
}

/// "running 7 tests".
fn is_beginning(line: &str) -> bool {
    line.strip_prefix("running ")
        .and_then(|rest| rest.split_once(' '))
        .is_some_and(|(count, rest)| count.parse::<u64>().is_ok() && rest.starts_with("test"))
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(text: &str) -> Tally {
        let mut tally = Tally::default();
        for line in text.lines() {
            tally.read(line);
        }
        tally.close();
        tally
    }

    #[test]
    fn results_add_up() {
        let tally = tally(
            "     Running tests/a.rs (target/debug/deps/a-01)\n\
             running 3 tests\n\
             test one ... ok\n\
             test two ... FAILED\n\
             test three ... ignored, not today\n\
             test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
             \x20  Doc-tests dune\n\
             running 1 test\n\
             test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n",
        );
        assert_eq!(tally.to_string(), "2 passed, 1 failed, 1 skipped");
        assert_eq!(tally.failures, ["tests/a.rs: two"]);
        assert_eq!(tally.skips, ["tests/a.rs: three not today"]);
    }

    #[test]
    fn what_runs_later_was_not_skipped() {
        let result = |ignored, passed| {
            format!(
                "test result: ok. {passed} passed; 0 failed; {ignored} ignored; 0 measured; \
                 0 filtered out; finished in 0.00s\n"
            )
        };
        let text = format!(
            "     Running tests/a.rs (deps/a-01)\nrunning 1 test\ntest one ... ignored, slow\n{}\
                  Running tests/a.rs (deps/a-01)\nrunning 1 test\ntest one ... ok\n{}",
            result(1, 0),
            result(0, 1)
        );
        let tally = tally(&text);
        assert_eq!(tally.to_string(), "1 passed, 0 failed, 0 skipped");
        assert!(tally.skips.is_empty());
    }

    #[test]
    fn a_target_that_dies_is_a_failure() {
        let text = "     Running tests/a.rs (target/debug/deps/a-01)\n\
                    running 3 tests\n\
                    test one ... ok\n\
                    error: test failed, to rerun pass `--test a`\n\
                         Running tests/b.rs (target/debug/deps/b-01)\n\
                    running 0 tests\n\
                    test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        let tally = tally(text);
        assert_eq!(tally.failed, 1);
        assert_eq!(tally.failures, ["tests/a.rs: it died before its end"]);
    }
}
