//! Dune mode: an ordinary process that uses the privileged CPU.
//!
//! After [`enter`] the calling thread runs at ring 0 of a virtual CPU, in the process's own
//! address space: it has its own exception handlers ([`exceptions`]), its own page tables
//! ([`memory`]) and rings ([`UserContext`]), and it is still a process, with the same memory,
//! files, threads, signals and system calls. [`leave`] goes back. The idea is from "Dune:
//! Safe User-level Access to Privileged CPU Features" (OSDI 2012); here it stands on stock
//! KVM, on Intel and AMD, and needs no privilege but access to `/dev/kvm`.
//!
//! ```no_run
//! use dune::exceptions::{self, Outcome};
//!
//! # fn main() -> Result<(), dune::EnterError> {
//! dune::enter()?; // ring 0 from here on
//! exceptions::set_handler(dune::vector::BREAKPOINT, |frame| {
//!     println!("int3 at {:#x}", frame.rip); // no signal, no kernel
//!     Outcome::Resume
//! });
//! std::thread::spawn(|| assert!(dune::is_inside())).join().unwrap();
//! dune::leave();
//! # Ok(())
//! # }
//! ```
//!
//! # Three ways through the house
//!
//! **A system call of the process itself** (ring 0): `SYSCALL` lands in `dune_syscall_entry`
//! (`arch/entry.S`). It is answered there (`getpid`, `gettid`), or put into the thread's call
//! page (the first fields of `ThreadArea`, `thread.rs`) and taken out of the guest by an
//! `OUT`; `host_loop` (`host/run.rs`) sees the port, `system_call` (`host/forward.rs`) makes
//! the call (`dune_safe_syscall`), the result goes into the call page, and the stub returns.
//! Calls that make tasks go through `host/clone.rs`.
//!
//! **A system call of ring 3** ([`UserContext::run`], `user.rs`): the same stub sees in the
//! caller's flags that it came from ring 3 (IOPL, which ring 3 cannot change), stores the
//! registers in the context, loads the process's page tables, and `run` returns
//! [`Trap::Syscall`].
//!
//! **A page fault** (or another exception): `dune_vectors` (`arch/entry.S`) on the interrupt
//! stack, a full frame on the trap stack, `trap` (`guest/dispatch.rs`), the handler that the
//! program registered ([`exceptions`]), an edit of a page table entry ([`memory`]), `IRETQ`.
//! What nobody handles becomes a signal (`guest/signals.rs`). Memory that the host side
//! refuses arrives in the same place by way of `host/fault.rs`.
//!
//! # What is different in Dune mode
//!
//! * GS belongs to the runtime; `arch_prctl(ARCH_SET_GS)` is refused.
//! * Restartable sequences are not registered; `getcpu` through the vDSO says CPU 0.
//! * A debugger on the host sees the host side of a thread, not its guest side.
//! * `sigaction` called natively, by a thread outside Dune mode, after the first entry is not
//!   seen by threads inside until [`signals::adopt_handlers`] is called.
//! * A panic in an exception handler ends the process.
//!
//! # Safety
//!
//! Ring 0 and the host side trust each other: code in Dune mode can do whatever the process
//! could do before, to itself and to nobody else. What is protected is the process from ring 3.

mod answers;
mod arch;
pub mod dirty;
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
mod vdso;

pub use answers::Answers;
pub use dune_x86::trap::{PageFaultError, TrapFrame, vector};
pub use error::EnterError;
pub use host::WALLED;
pub use machine::{descriptors, extended_features, own_tables, vcpus, windows};
pub use mode::{enter, enter_with, is_inside, leave, run};
pub use options::Options;
pub use rseq::forgo_restartable_sequences;
pub use user::{Trap, UserContext};
pub use vdso::shows_clock_data;
