//! Dune mode: an ordinary process that uses the privileged CPU.

mod arch;
mod error;
pub mod exceptions;
mod guest;
mod host;
mod machine;
mod maps;
pub mod memory;
mod mode;
mod options;
mod report;
mod rseq;
pub mod signals;
mod thread;
mod user;

pub use dune_x86::trap::{PageFaultError, TrapFrame, vector};
pub use error::EnterError;
pub use machine::{descriptors, extended_features};
pub use mode::{enter, enter_with, is_inside, leave, run};
pub use options::Options;
pub use user::{Trap, UserContext};
