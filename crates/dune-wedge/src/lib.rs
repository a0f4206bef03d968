//! Compartments: parts of a process that hold only what they were given.
//!
//! A compartment runs a function of the same program in ring 3 of a virtual CPU, in an address
//! space of its own. It has a stack, a heap and its own copy of the program's variables, and
//! beyond that what it was granted: tagged memory ([`Tag`]), file descriptors with rights
//! ([`FileRights`]), a few system calls ([`Calls`]), and calls into its parent ([`Gate`]).
//! Whatever else it tries ends it, and the parent is told what it was. The idea is that of
//! Wedge ("Wedge: Splitting Applications into Reduced-Privilege Compartments", NSDI 2008), on
//! Dune as in section 4.3 of the Dune paper.
//!
//! ```no_run
//! use dune_wedge::Compartment;
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     dune_wedge::start()?; // first: variables as they are now are what compartments see
//!     dune::enter()?; // otherwise each run enters and leaves
//!     let mut compartment = Compartment::builder().memory(1 << 20).build()?;
//!     let sorted = compartment.run(
//!         |mut numbers: [u32; 4]| {
//!             numbers.sort(); // in ring 3
//!             numbers
//!         },
//!         [3, 1, 4, 1],
//!     )?;
//!     assert_eq!(sorted, [1, 1, 3, 4]);
//!     Ok(())
//! }
//! ```
//!
//! # What a compartment sees
//!
//! | memory | how |
//! |---|---|
//! | code and constants of the program and its libraries | the process's own pages, read-only |
//! | global variables | a copy of what they were when [`start`] was called, shared until written |
//! | thread-local variables | as in a thread that has just begun |
//! | stack, heap | its own, zero at the start |
//! | environment | empty |
//! | heap, stacks and threads of the process | not at all |
//! | another compartment's memory | not at all |
//! | a tag | as granted: to read, to write, or to write to a copy |
//!
//! **Code and constants are not secret**, and neither is where things are. Decided so because
//! the function that runs needs its code, nobody can say which of it, and sharing all of it
//! costs nothing for each compartment.
//!
//! **Global variables are a snapshot.** Code is not aware of being in a compartment: libc and
//! Rust's library use their variables, and must find them in order. What the parent writes
//! after [`start`] no compartment sees; what was there before it sees, which is why [`start`]
//! belongs first in `main`. Libraries that are loaded later are not there.
//!
//! **The heap is the compartment's own allocator.** libc's state at the start speaks of the
//! process's heap, so calls of `malloc` and its relatives, from Rust, C and libc itself, go to
//! another allocator inside (in the copy of the tables by which the dynamic linker connects
//! calls). It needs no system call: pages come when they are touched, up to
//! [`Builder::memory`].
//!
//! After each run a compartment is put back as it was. Only the pages that were written are
//! touched for that, by the compartment or by the guard for it; dirty bits say which. The
//! registers are wiped.
//!
//! What the program finds out once and keeps in a variable (what the CPU can do, say) each run
//! of a compartment finds out again, unless it was found out before [`start`].
//!
//! # What goes in and out
//!
//! Functions capture nothing (checked when they are compiled). In goes plain data, copied; out
//! comes plain data of a type for which any bytes will do, or bytes. A grant is a value that
//! the compartment borrows, so it cannot outlive what it grants:
//!
//! ```compile_fail
//! use dune_wedge::{Compartment, Grant, Tag};
//!
//! let compartment = {
//!     let tag = Tag::new(4096).unwrap();
//!     Compartment::builder().tag(&tag, Grant::Read).build().unwrap()
//! };
//! # drop(compartment);
//! ```
//!
//! ```compile_fail
//! # let mut compartment = dune_wedge::Compartment::builder().build().unwrap();
//! let secret = 7_u64;
//! compartment.run(|n: u64| n + secret, 1); // captures
//! ```
//!
//! # How a run can end
//!
//! With the result, or with a [`CompartmentError`]: a fault (address, what it was going to do,
//! the instruction), a panic (message and place), `abort`, `exit`, an exception, the stack or
//! the memory used up, the time used up, a refused call. None of it harms the process or the
//! next run.
//!
//! [`Builder::learn`] runs a function with everything allowed, and says what it used beyond
//! its grants: a draft of the policy.
//!
//! # What it costs
//!
//! Instructions, in the lab (`cargo xtask bench wedge`), no exit in any of them:
//!
//! | operation | instructions | beside it |
//! |---|---|---|
//! | run an empty function, and back to pristine | 1,048 | |
//! | make, run, end | 1,782 | `fork` and wait 354,000, `posix_spawn` 810,000, a thread 58,300 |
//! | the same, 128 at a time, with nothing left of earlier ones | 15,200 | `fork` 495,000, a thread 118,000 |
//! | through a gate and back | 296 | two writes of the protection key register 10 |
//! | a request to a web server (crate `dune-https`), each read in a compartment | 71,400 | without Dune 61,500, a process for each 699,000 |
//! | the same over TLS | 88,500 | without Dune 78,400, a process for each 738,000 |
//!
//! The server's thread is outside Dune mode there, and enters it for each request, which is two
//! thirds of what a request costs more. In a thread that is in Dune mode anyway compartments add
//! 4.4% to a request, over TLS 3.4%.
//!
//! An idle compartment has 21 KiB: four page tables, a page of stack, and its records. What
//! exits: memory that the process uses for the first time, system calls that the guard passes
//! on, and a signal for the thread.
//!
//! # Threads
//!
//! Threads run compartments at the same time, each its own; a compartment may move to another
//! thread between runs. A thread outside Dune mode enters and leaves it for each run. A
//! compartment itself has one thread and can make none.
//!
//! # What it does not do
//!
//! * A panic ends the compartment where it happens: `catch_unwind` does not catch it inside,
//!   and destructors do not run.
//! * Inside, `std::env::args` and what a library keeps on the process's heap since before
//!   [`start`] (a `stdout` that was printed to, a locale that was set) end the compartment
//!   when they are used.
//! * An allocator other than libc's, linked into the program, keeps its state in variables
//!   that speak of the process's heap: such a program cannot allocate inside.
//! * Signals, threads, mappings, opening files and sockets: not inside. Open outside, and
//!   grant the descriptor.
//! * Against transient execution there is what crate `dune` has, which is not yet anything:
//!   see "What is not done yet" in docs/ARCHITECTURE.md.
//! * A child that the process forks starts the runtime with the parent's image; its time
//!   limits are not kept, because the thread that keeps them is the parent's.
//! * glibc on x86-64 only.
//!
//! # How it is made
//!
//! ```text
//!   runtime      once in a process: image, watchdog, memory, what is left of old compartments
//!   image/       the program as compartments see it: modules, variables, thread-locals
//!   shell        an address space with the image in it, and pages of its own
//!   compartment  what is granted, and a run from start to end
//!   guard        what happens at a trap; access: the compartment's memory; policy: what it asks
//!   gate, tag    calls and memory that are shared
//!   learn        what a run used that was not granted
//!   inside/      what runs in ring 3 and is not trusted: entry, heap, panics
//!   watchdog     time limits
//! ```

mod access;
mod compartment;
mod error;
mod frames;
mod gate;
mod guard;
mod image;
mod inside;
mod layout;
mod learn;
mod policy;
mod pool;
mod runtime;
mod shell;
mod tag;
mod watchdog;

pub use compartment::{Builder, Compartment};
pub use error::{Access, CompartmentError, StartError};
pub use gate::{BytesGate, Gate};
pub use inside::is_inside;
pub use learn::{Learned, Touched};
pub use policy::{Calls, FileRights, OnRefusal};
pub use pool::{Pool, Pooled};
pub use runtime::{Usage, start, trim, usage};
pub use tag::{BytesIn, Grant, In, Tag, TagError, allocate_inside, free_inside};
