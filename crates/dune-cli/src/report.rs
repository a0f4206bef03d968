//! `dune run --json`: how the program ended, as one line.

use std::time::Duration;

use dune_kvm::probe::Placement;
use dune_sandbox::{End, Outcome};
use serde::Serialize;

use crate::observed::Counts;

#[derive(Debug, Serialize)]
struct Line<'a> {
    /// `exit`, `signal` or `timeout`.
    outcome: &'static str,
    /// What a shell says of it.
    code: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    signal: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    placement: Option<&'static str>,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_calls: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    page_faults: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    missing: Vec<Missing<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    refused: Vec<Refused<'a>>,
}

#[derive(Debug, Serialize)]
struct Missing<'a> {
    number: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    count: u64,
}

#[derive(Debug, Serialize)]
struct Refused<'a> {
    request: &'a str,
    remedy: String,
}

/// The line for a program that ended.
///
/// # Errors
///
/// None that is known: all of it can be JSON.
pub(crate) fn line(
    outcome: &Outcome,
    counts: Counts,
    placement: Placement,
    elapsed: Duration,
) -> anyhow::Result<String> {
    let (name, code, signal) = match outcome.end {
        End::Exit(status) => ("exit", status.into(), None),
        End::Killed(signal) => ("signal", 128 + signal, Some(signal)),
    };
    let missing = outcome.missing.iter().map(|call| Missing {
        number: call.nr,
        name: call.name,
        count: call.count,
    });
    let refused = outcome.refused.iter().map(|refusal| Refused {
        request: &refusal.request,
        remedy: refusal.remedy.to_string(),
    });
    let line = Line {
        outcome: name,
        code,
        signal,
        placement: Some(placement.name()),
        seconds: elapsed.as_secs_f64(),
        system_calls: Some(counts.calls),
        page_faults: Some(counts.page_faults),
        missing: missing.collect(),
        refused: refused.collect(),
    };
    Ok(serde_json::to_string(&line)?)
}

/// The line for a program that was ended by its time limit.
pub(crate) fn timeout(limit: Duration) -> String {
    let seconds = limit.as_secs_f64();
    format!(r#"{{"outcome":"timeout","code":124,"seconds":{seconds}}}"#)
}

#[cfg(test)]
mod tests {
    use dune_sandbox::Refusal;
    use dune_sandbox::policy::{Net, Remedy};

    use super::*;

    #[test]
    fn a_line_says_how_it_ended() {
        let outcome = Outcome {
            end: End::Killed(11),
            missing: Vec::new(),
            refused: vec![Refusal {
                request: "socket(AF_INET)".to_owned(),
                remedy: Remedy::Net(Net::Full),
            }],
            refusals: 1,
        };
        let line = line(
            &outcome,
            Counts::default(),
            Placement::OnHost,
            Duration::ZERO,
        )
        .unwrap();
        let json: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            (json["code"].as_u64(), json["signal"].as_u64()),
            (Some(139), Some(11))
        );
        assert_eq!(json["refused"][0]["remedy"], "--net full");
        let json: serde_json::Value =
            serde_json::from_str(&timeout(Duration::from_millis(300))).unwrap();
        assert_eq!(json["outcome"], "timeout");
    }
}
