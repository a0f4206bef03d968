//! The harness inside the lab: runs tests one after the other and reports each
//! at once, because the next one may end the guest.

use std::io::{self, Write};
use std::process::ExitCode;

use crate::child;
use crate::event::{Event, Verdict};
use crate::test::Test;

/// The lab is slower than a machine of today, most of all beside other work.
pub(crate) const LAB_TIMEOUT_FACTOR: u32 = 3;

/// Runs the tests of these names.
pub(crate) fn run(tests: &[Test], names: &[String]) -> ExitCode {
    for name in names {
        let Some(test) = tests.iter().find(|test| test.name() == name) else {
            let missing = Verdict::failed("this test target has no such test", String::new());
            report(&Event::Finished(name.clone(), missing));
            continue;
        };
        report(&Event::Started(name.clone()));
        let verdict = child::run(test, test.timeout() * LAB_TIMEOUT_FACTOR);
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
