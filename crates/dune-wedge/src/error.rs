//! Why a compartment did not start, or did not end well.

use core::fmt;
use std::time::Duration;

use dune::memory::SpaceError;
use dune::{EnterError, vector};

/// Why the runtime did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// Dune mode could not be entered.
    #[error(transparent)]
    Enter(#[from] EnterError),
    /// The program could not be mapped for compartments.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// The thread-local variables of the program are too many, or no thread could be made.
    #[error("the program's thread-local variables could not be copied (at most 252 KiB fit)")]
    ThreadLocals,
    /// The thread that keeps time could not be made.
    #[error("no thread could be made to keep the time limits: {0}")]
    Watchdog(std::io::Error),
}

/// What an access was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Executing.
    Execute,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write to",
            Self::Execute => "execute",
        })
    }
}

/// Why a compartment was ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompartmentError {
    /// It used memory that it was not given.
    #[error(
        "the compartment tried to {access} {address:#x} ({what}), which it was not given; at {at:#x}"
    )]
    Fault {
        /// The address.
        address: u64,
        /// What it was going to do there.
        access: Access,
        /// The instruction.
        at: u64,
        /// What is at the address in the process, as far as is known without looking.
        what: String,
    },
    /// Its stack was used up.
    #[error("the compartment's stack of {limit} bytes was used up; Builder::stack sets the limit")]
    StackOverflow {
        /// The limit in bytes.
        limit: u64,
    },
    /// An exception of the CPU.
    #[error("the compartment was ended by {} at {at:#x}", name_of_vector(*vector))]
    Exception {
        /// The vector.
        vector: u8,
        /// The instruction.
        at: u64,
    },
    /// It panicked.
    #[error("the compartment panicked: {message}")]
    Panicked {
        /// The message and its place in the source, cut to 512 bytes. Written by untrusted
        /// code.
        message: String,
    },
    /// It called `abort`.
    #[error("the compartment aborted")]
    Aborted,
    /// It called `exit`.
    #[error("the compartment called exit({status}) instead of returning")]
    Exited {
        /// The status.
        status: i32,
    },
    /// It made a system call that it was not given.
    #[error("the compartment made system call {number}({}, {:#x}, {:#x}): {reason}", arguments[0] as i64, arguments[1], arguments[2])]
    Refused {
        /// The number.
        number: u64,
        /// The first three arguments.
        arguments: [u64; 3],
        /// Why it was refused, and what grants it.
        reason: &'static str,
    },
    /// It went through a gate that it was not given, or not as the gate is made.
    #[error("the compartment called a gate at {gate:#x}: {reason}")]
    RefusedGate {
        /// What it named as the gate.
        gate: u64,
        /// What was wrong.
        reason: &'static str,
    },
    /// It ran for too long.
    #[error("the compartment ran for longer than {limit:?}; Builder::time_limit sets the limit")]
    TimeLimit {
        /// The limit.
        limit: Duration,
    },
    /// It used too much memory.
    #[error("the compartment used up its {limit} bytes of memory; Builder::memory sets the limit")]
    OutOfMemory {
        /// The limit in bytes.
        limit: u64,
    },
    /// More input than fits.
    #[error("{bytes} bytes of input are more than the {limit} that fit; pass them in a Tag")]
    InputTooLarge {
        /// How much it was.
        bytes: u64,
        /// How much fits.
        limit: u64,
    },
    /// It returned more than was asked for, or from memory that is not its own.
    #[error(
        "the compartment returned {bytes} bytes at {address:#x}, which are too many or not its own"
    )]
    BadResult {
        /// Where it said that they are.
        address: u64,
        /// How many.
        bytes: u64,
    },
    /// Dune mode could not be entered for the run.
    #[error(transparent)]
    Enter(#[from] EnterError),
    /// Memory or page tables could not be had for it.
    #[error(transparent)]
    Space(#[from] SpaceError),
}

fn name_of_vector(number: u8) -> String {
    let name = match number {
        vector::DIVIDE => "a division by zero",
        vector::DEBUG => "a debug exception",
        vector::BREAKPOINT => "a breakpoint",
        vector::INVALID_OPCODE => "an instruction that does not exist",
        vector::GENERAL_PROTECTION => {
            "a general protection fault (a privileged instruction, or an address that is none)"
        }
        _ => return format!("exception {number}"),
    };
    name.to_owned()
}
