//! What can go wrong with the lab, each with its remedy.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why the lab could not run a command.
///
/// A command that ran and failed is not an error of the lab: see
/// [`Outcome`](crate::Outcome).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// A program the lab needs is not there and could not be installed.
    #[error("the lab needs {what}, which is not installed; {remedy}")]
    Missing {
        /// The program or file.
        what: String,
        /// What the user should do.
        remedy: String,
    },

    /// A tool that prepares the lab failed.
    #[error("{command} failed{}", indented(.output))]
    Tool {
        /// The command line.
        command: String,
        /// What it said.
        output: String,
    },

    /// The kernel image given or fetched cannot be used.
    #[error("{} cannot be used as the lab's kernel: {reason}", .path.display())]
    Kernel {
        /// The image.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },

    /// The options contradict each other or the lab's limits.
    #[error("{0}")]
    Options(String),

    /// The emulator ended although nobody asked it to.
    #[error("the lab's virtual machine died {during}{}{}", indented(.emulator), last_words(.console))]
    Died {
        /// What it was doing.
        during: &'static str,
        /// The emulator's own messages.
        emulator: String,
        /// The last lines of the guest kernel's console.
        console: String,
    },

    /// The guest did not come up.
    #[error(
        "the lab's virtual machine did not come up within {} s; \
         try again, or with --cold{}{}", .patience.as_secs(), indented(.emulator), last_words(.console)
    )]
    NoBoot {
        /// How long it was given.
        patience: Duration,
        /// The emulator's own messages.
        emulator: String,
        /// The last lines of the guest kernel's console.
        console: String,
    },

    /// The command was still running when its time was over.
    #[error(
        "the command was still running in the lab after {} s and was ended; \
         raise --timeout if it needs longer ({state}){}", .limit.as_secs_f64(), last_words(.console)
    )]
    Timeout {
        /// The limit.
        limit: Duration,
        /// Whether the guest's kernel still answered.
        state: GuestState,
        /// The last lines of the guest kernel's log.
        console: String,
    },

    /// The agent inside the guest could not do its part.
    #[error("the lab's guest could not start the command: {0}")]
    Agent(String),

    /// The stream between host and guest carried nonsense.
    #[error("the lab's guest broke the protocol: {0}")]
    Protocol(String),

    /// A system call on the host failed.
    #[error("{step}: {source}")]
    Io {
        /// What was being done, and to what.
        step: String,
        /// The cause.
        source: io::Error,
    },
}

impl LabError {
    /// The exit code for a program that ends with this error: 124 when time
    /// ran out, else 125, which commands that run commands use for their own
    /// failures.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            LabError::Timeout { .. } => 124,
            _ => 125,
        }
    }
}

/// What the guest's kernel was doing when the time was over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestState {
    /// It answered: the command hung or was slow.
    Alive,
    /// It did not answer: the guest as a whole hung.
    Hung,
}

impl fmt::Display for GuestState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GuestState::Alive => "the guest's kernel still answers",
            GuestState::Hung => "the guest's kernel does not answer either",
        })
    }
}

/// Names the step of an [`io::Error`].
pub(crate) fn io_error(step: impl Into<String>) -> impl FnOnce(io::Error) -> LabError {
    move |source| LabError::Io {
        step: step.into(),
        source,
    }
}

fn indented(text: &str) -> String {
    if text.trim().is_empty() {
        return String::new();
    }
    format!(":\n    {}", text.trim_end().replace('\n', "\n    "))
}

fn last_words(text: &str) -> String {
    if text.trim().is_empty() {
        return String::new();
    }
    format!(
        "\n  last lines of the guest's kernel:\n    {}",
        text.trim_end().replace('\n', "\n    ")
    )
}
