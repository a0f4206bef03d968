//! Saying what takes long: a spinner on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// A step under way, shown until dropped.
#[derive(Debug)]
pub struct Step {
    what: String,
    started: Instant,
    spinner: Option<ProgressBar>,
}

impl Step {
    /// Announces a step on standard error.
    #[must_use]
    pub fn begin(what: impl Into<String>) -> Step {
        let what = what.into();
        let spinner = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})")
                .unwrap_or_else(|_| ProgressStyle::default_spinner());
            let spinner = ProgressBar::new_spinner().with_style(style);
            spinner.set_message(what.clone());
            spinner.enable_steady_tick(Duration::from_millis(100));
            spinner
        });
        if spinner.is_none() {
            eprintln!("{what} ...");
        }
        Step {
            what,
            started: Instant::now(),
            spinner,
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
            let seconds = self.started.elapsed().as_secs_f64();
            eprintln!("{} ({seconds:.1} s)", self.what);
        }
    }
}
