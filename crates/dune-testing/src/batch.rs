//! The harness inside the lab: runs tests one after the other and reports each
//! at once, because the next one may end the guest.

use std::io::{self, Write};
use std::process::ExitCode;

use crate::child;
use crate::event::{Event, Verdict};
use crate::test::Test;

/// Runs tests: the arguments are the factor for time limits, then names.
pub(crate) fn run(tests: &[Test], arguments: &[String]) -> ExitCode {
    let Some((factor, names)) = arguments.split_first() else {
        return ExitCode::FAILURE;
    };
    let factor = factor.parse().unwrap_or(1);
    for name in names {
        let Some(test) = tests.iter().find(|test| test.name() == name) else {
            let missing = Verdict::failed("this test target has no such test", String::new());
            report(&Event::Finished(name.clone(), missing));
            continue;
        };
        report(&Event::Started(name.clone()));
        let verdict = child::run(test, test.timeout() * factor);
        report(&Event::Finished(name.clone(), verdict));
    }
    ExitCode::SUCCESS
}

fn report(event: &Event) {
    let line = serde_json::to_string(event).expect("events have no maps with odd keys");
    let mut stdout = io::stdout().lock();
    // Nobody listens any more: there is nobody to tell.
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}
