//! The lab: a bundled virtual machine in which ring 0 runs on any host.
//!
//! QEMU emulates a CPU with SVM, a stock Debian kernel runs on it with KVM,
//! and the command sees the host's files, its own arguments, environment,
//! streams and terminal. Where it goes, file by file:
//!
//! ```text
//!   args     the command line, signals, the terminal
//!   session  bring a lab up, run commands in it
//!     tools, kernel, initramfs   what is needed, installed and prepared
//!     machine                    the emulator's process
//!     state                      saved states: wake up instead of booting
//!     stdio, terminal, wire      streams, and the frames they travel in
//!   intel    the other lab: Bochs with an emulated Intel CPU
//!   agent/   the guest's first process (a program of its own)
//! ```
//!
//! # Example
//!
//! ```no_run
//! use dune_lab::{Command, Config, Input, Output, Session};
//!
//! let mut session = Session::start(&Config::default())?;
//! let mut output = Output { stdout: &mut std::io::stdout(), stderr: &mut std::io::stderr() };
//! let outcome = session.run(&Command::new("uname").args(["-r"]), Input::Nothing, &mut output)?;
//! assert!(outcome.success());
//! # Ok::<(), dune_lab::LabError>(())
//! ```

mod args;
mod cache;
mod config;
mod error;
mod initramfs;
mod intel;
mod kernel;
mod machine;
mod progress;
mod session;
mod state;
mod stdio;
mod terminal;
pub mod tools;
mod wire;

pub use args::{LabArgs, run};
pub use config::{Command, Config, MAX_SHARES, Outcome};
pub use error::{GuestState, LabError};
pub use intel::run_on_intel;
pub use kernel::Kernel;
pub use progress::Step;
pub use session::{Output, Session};
pub use stdio::Input;
pub use terminal::Streams;
