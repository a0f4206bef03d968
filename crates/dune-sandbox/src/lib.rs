//! The sandbox: unmodified Linux programs held in ring 3.
//!
//! A program runs in this process, at its own addresses, in ring 3 of a
//! virtual CPU whose page tables show it nothing but its own memory
//! ([`range`]). Everything else it wants, it has to ask for, and the guard
//! answers ([`Guard`]):
//!
//! 1. an [`engine`] runs ring 3 until the next trap;
//! 2. [`Guard::on_trap`] looks up a system call in the one [`table`] of all
//!    calls, checks its arguments by its row, and forwards, emulates or
//!    refuses it (`calls`), or admits a page from the table of areas
//!    ([`vma`]), or delivers a signal;
//! 3. what goes to the kernel goes by a raw system call ([`host`]), what is
//!    copied from or to the program by [`user`].
//!
//! [`Command`] starts all that; [`trace`] prints every call, decoded; by
//! [`debug`] gdb sees the program.
//!
//! # What holds a hostile program
//!
//! - The host kernel is never handed an address outside user memory: pointers
//!   are checked by [`range::UserRange`], nested ones after copying.
//! - Unknown calls, unknown `ioctl` and `fcntl` requests and unknown flags of
//!   memory calls are refused, never passed on.
//! - The guard's descriptors do not exist for the program; `/proc` does not
//!   show it the guard.
//!
//! - A [`Policy`] says which files, network and amounts the program may have.
//!   The guard decides ([`policy`]), and the host kernel, by Landlock and
//!   seccomp, refuses the rest again ([`confine`]). Without one, a program has
//!   the rights of whoever runs it over files and processes.
//!
//! `docs/security.md` has the threat model and an argument for each surface.
//!
//! # What is not here yet
//!
//! - System V shared memory (but what [`Command::segment`] gives), semaphores and queues, POSIX queues, `io_uring`,
//!   `vmsplice`, and sockets of other families than unix, inet and (for
//!   questions about interfaces and routes) netlink.
//! - 32-bit system calls (`int 0x80`) raise SIGSEGV.

mod bounce;
mod calls;
mod clock;
pub mod command;
pub mod confine;
pub mod crash;
pub mod debug;
pub mod engine;
pub mod guard;
pub mod handler;
pub mod host;
pub mod launch;
mod peel;
pub mod policy;
pub mod program;
pub mod range;
mod signal;
pub mod snapshot;
pub mod table;
#[cfg(test)]
mod testing;
mod threads;
pub mod trace;
pub mod user;
mod vfork;
pub mod vma;
pub mod working_set;

pub use command::{Command, Outcome, RunError};
pub use confine::SecondWall;
pub use guard::{End, Guard, MissingCall, Resume};
pub use handler::{HandleError, Request};
pub use launch::LaunchError;
pub use policy::{Policy, Refusal};
