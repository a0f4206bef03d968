//! What the batch in the guest reports to the harness on the host: one JSON
//! object a line.

use serde::{Deserialize, Serialize};

use crate::test::Outcome;

/// How a test ended, with what there is to say about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Verdict {
    pub(crate) outcome: Outcome,
    /// Why it failed or was ignored.
    pub(crate) message: String,
    /// Its standard output and standard error.
    pub(crate) output: String,
}

impl Verdict {
    pub(crate) fn passed(output: String) -> Verdict {
        Verdict {
            outcome: Outcome::Passed,
            message: String::new(),
            output,
        }
    }

    pub(crate) fn failed(message: impl Into<String>, output: String) -> Verdict {
        Verdict {
            outcome: Outcome::Failed,
            message: message.into(),
            output,
        }
    }

    pub(crate) fn ignored(message: impl Into<String>) -> Verdict {
        Verdict {
            outcome: Outcome::Ignored,
            message: message.into(),
            output: String::new(),
        }
    }
}

/// A line of the batch's standard output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Event {
    /// This test begins: if nothing more comes, it took the guest with it.
    Started(String),
    /// This test ended.
    Finished(String, Verdict),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_the_line() {
        for event in [
            Event::Started("a::b".to_owned()),
            Event::Finished(
                "c".to_owned(),
                Verdict::failed("it \"hung\"", "line\nline\u{0}".to_owned()),
            ),
        ] {
            let line = serde_json::to_string(&event).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
        }
    }
}
