//! A test and how it can end.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What a test needs of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing special.
    Nothing,
    /// A KVM that runs ring 0 on hardware (the lab's counts).
    Ring0,
}

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It did what it promised.
    Passed,
    /// It did not, or died, or hung.
    Failed,
    /// It could not run here.
    Ignored,
}

/// One test of a target; [`tests!`](crate::tests!) makes them.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    name: &'static str,
    body: fn(),
    needs: Needs,
    smoke: bool,
    timeout: Duration,
}

impl Test {
    /// A test that needs nothing special and may take a minute.
    #[must_use]
    pub const fn new(name: &'static str, body: fn()) -> Test {
        Test {
            name,
            body,
            needs: Needs::Nothing,
            smoke: false,
            timeout: Duration::from_secs(60),
        }
    }

    /// The same, but it needs ring 0.
    #[must_use]
    pub const fn ring0(mut self) -> Test {
        self.needs = Needs::Ring0;
        self
    }

    /// The same, but it runs in the Intel lab too.
    #[must_use]
    pub const fn smoke(mut self) -> Test {
        self.smoke = true;
        self
    }

    /// The same with a time limit of its own.
    #[must_use]
    pub const fn timeout_seconds(mut self, seconds: u64) -> Test {
        self.timeout = Duration::from_secs(seconds);
        self
    }

    /// Its name: the path of its function, or what was given.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What it needs.
    #[must_use]
    pub fn needs(&self) -> Needs {
        self.needs
    }

    /// Whether it is one of those that also run in the Intel lab.
    #[must_use]
    pub fn is_smoke(&self) -> bool {
        self.smoke
    }

    pub(crate) fn body(&self) -> fn() {
        self.body
    }

    /// Its time limit on this machine, `DUNE_TEST_TIMEOUT_SCALE` applied.
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout.mul_f64(timeout_scale())
    }
}

fn timeout_scale() -> f64 {
    std::env::var("DUNE_TEST_TIMEOUT_SCALE")
        .ok()
        .and_then(|text| text.parse().ok())
        .filter(|scale: &f64| scale.is_finite() && (0.001..=1000.0).contains(scale))
        .unwrap_or(1.0)
}
