//! A garbage-collected heap whose write barrier is the dirty bit of the page.
//!
//! Mark and sweep, generational, incremental and, where there are several CPUs, mostly
//! concurrent; objects do not move. There are two ways in:
//! the Rust interface below, where every pointer is known, and [`conservative`], where any word
//! may be one, for C programs (`include/dune_gc.h`, the package `dune-gc-c`).
//!
//! ```
//! use dune_gc::{Config, GcCell, Heap, Trace};
//!
//! #[derive(Trace)]
//! struct Node {
//!     name: String,
//!     next: GcCell<Node>,
//! }
//!
//! # fn main() -> Result<(), dune_gc::GcError> {
//! let heap = Heap::new(Config::new())?; // Dune's dirty bits where they work, else mprotect
//! let mut mutator = heap.attach()?; // each thread has one
//!
//! // A circle of two, of which one is kept.
//! let first = mutator.make(Node { name: "first".into(), next: GcCell::null() });
//! let second = mutator.alloc(Node { name: "second".into(), next: GcCell::null() });
//! second.next.set(&mutator, Some(first.get(&mutator)));
//! first.next.set(&mutator, Some(second)); // no barrier: the CPU notes the write
//!
//! let weak = mutator.downgrade(second);
//! mutator.collect();
//! assert_eq!(weak.get(&mutator).unwrap().name, "second");
//! drop(first);
//! mutator.collect();
//! assert!(weak.get(&mutator).is_none());
//! # Ok(())
//! # }
//! ```
//!
//! # Kinds of pointers
//!
//! | | where | keeps the object | good until |
//! |---|---|---|---|
//! | [`Gc`] | on the stack | until the thread's next safepoint | it borrows the [`Mutator`] |
//! | [`GcCell`] | in an object | while that object is reachable | |
//! | [`Root`] | anywhere, any thread | yes | it is dropped |
//! | [`Weak`] | anywhere, any thread | no | the object is unreachable |
//!
//! # Providers
//!
//! A collector that wants to look at less than everything must know what was written: objects
//! that are old may have got pointers to young ones, and marked ones to unmarked ones while the
//! marker works beside the program. Here nobody says so at each write; the page is asked. Who
//! answers is the [`Provider`]; heap and programs are the same with each.
//!
//! | provider | the first write to a page after a collection | asking | system calls that write into objects |
//! |---|---|---|---|
//! | [`None`](Provider::None) | nothing | cannot be asked: each collection is of everything and stops the world | work |
//! | [`Mprotect`](Provider::Mprotect) | a signal, two system calls | a call for each run of pages | fail with `EFAULT` where a page is closed |
//! | [`Userfaultfd`](Provider::Userfaultfd) | a message to a thread, two changes of threads | the same | fail likewise |
//! | [`Dune`](Provider::Dune) | nothing | some instructions a page; one exit if more than one thread has a vCPU | work, and are noted |
//!
//! Outside Dune mode all but [`Dune`](Provider::Dune) work; [`Auto`](Provider::Auto) takes
//! [`Dune`](Provider::Dune) if the thread is in Dune mode or can enter it, and
//! [`Mprotect`](Provider::Mprotect) otherwise. With [`Dune`](Provider::Dune), attaching a thread
//! makes it enter; one that leaves again may go on, and pays for each write of a pointer.
//!
//! # What it costs
//!
//! | call | work | leaves the guest (Dune mode) |
//! |---|---|---|
//! | [`Mutator::alloc`] | some 20 instructions; once in a page of objects a few hundred; for a type with `Drop` a lock | only where the heap grows |
//! | [`Mutator::alloc_array`] | linear in its length | only where the heap grows |
//! | [`Gc`]'s and [`Root`]'s deref | none | no |
//! | [`GcCell::get`], [`GcCell::set`] | some five instructions | no |
//! | [`Mutator::safepoint`] | three loads, if there is nothing to do | no |
//! | [`Mutator::root`], clone and drop of a [`Root`] | a lock | no |
//! | [`Mutator::downgrade`], [`Mutator::set_finalizer`] | a lock and an allocation | no |
//! | [`Mutator::blocking`] | two atomic exchanges | no |
//! | [`Heap::attach`] | a lock, 15 KiB | once, if the thread is outside |
//! | a minor collection | linear in the young live objects, the pages written, the roots; plus a few instructions for each page of the heap | a few times |
//! | a full one | linear in the live objects, once in so many that their number may have grown by three quarters; its first part beside the program where the process has several CPUs | a few times |
//! | a stop of the world for a part of either | some 32,000 words, or a 32nd of the words of a large heap, looked at; plus, at the beginning of a round and at the end, a few instructions for each page of the heap and for each root (with page protection a system call for each run of written pages); plus, at the end, what only finalizers keep, and each weak pointer, finalizer and value to drop | with several threads: twice for each |
//!
//! A collection is done in such parts by the threads that allocate, and little is allocated in
//! between (2 KiB, or one object), so that the program does not write faster than it is followed:
//! pauses are short, and while a collection is under way they follow each other closely. A
//! program that writes to most of its pages all the same is held up for longer from the fifth
//! round on, and one that allocates large objects in proportion to them. With [`Provider::None`],
//! in [`Mutator::collect`], when memory runs out and where more objects wait to be looked through
//! than there is room for, a collection is one stop.
//!
//! # Threads
//!
//! Any number, each with a [`Mutator`] of its own; [`Root`]s and [`Weak`]s go from one to the
//! other. A collection waits until every thread is at a [`Mutator::safepoint`] or within
//! [`Mutator::blocking`]: use the latter around everything that may wait.
//!
//! # What does not compile
//!
//! A pointer does not outlive a safepoint (see [`Gc`]), nor go to another thread:
//!
//! ```compile_fail
//! # let heap = dune_gc::Heap::new(dune_gc::Config::new()).unwrap();
//! let mutator = heap.attach().unwrap();
//! let number = mutator.alloc(5_u64);
//! std::thread::scope(|scope| {
//!     scope.spawn(|| println!("{}", *number)); // `Mutator` is not `Sync`
//! });
//! ```
//!
//! and the mutator stays in its thread:
//!
//! ```compile_fail
//! # let heap = dune_gc::Heap::new(dune_gc::Config::new()).unwrap();
//! let mutator = heap.attach().unwrap();
//! std::thread::spawn(move || drop(mutator));
//! ```
//!
//! Every field of a type that can be traced can be traced; what can hide pointers cannot:
//!
//! ```compile_fail
//! #[derive(dune_gc::Trace)]
//! struct Hidden(std::cell::RefCell<u64>);
//! ```
//!
//! ```compile_fail
//! # use dune_gc::GcCell;
//! #[derive(dune_gc::Trace)]
//! struct Hidden(Vec<GcCell<u64>>);
//! ```
//!
//! ```compile_fail
//! # use dune_gc::GcCell;
//! #[derive(dune_gc::Trace)]
//! struct Hidden(std::sync::Mutex<GcCell<u64>>);
//! ```
//!
//! ```compile_fail
//! # use dune_gc::Root;
//! #[derive(dune_gc::Trace)]
//! struct Circular(Root<u64>); // would keep itself for ever
//! ```
//!
//! ```compile_fail
//! #[derive(dune_gc::Trace)]
//! union Either {
//!     number: u64,
//!     float: f64,
//! }
//! ```
//!
//! A type whose trace is derived has no `Drop` of its own, which could look at objects that are
//! gone (its fields may have one):
//!
//! ```compile_fail
//! #[derive(dune_gc::Trace)]
//! struct Last(u64);
//! impl Drop for Last {
//!     fn drop(&mut self) {}
//! }
//! ```
//!
//! References to the stack stay out of the heap (and, where code is made for it, so do objects
//! that want more than 16 bytes of alignment):
//!
//! ```compile_fail
//! # let heap = dune_gc::Heap::new(dune_gc::Config::new()).unwrap();
//! # let mutator = heap.attach().unwrap();
//! let local = 5_u64;
//! #[derive(dune_gc::Trace)]
//! struct Borrows<'a>(&'a u64);
//! mutator.alloc(Borrows(&local));
//! ```
//!
//! A [`GcCell`] outside of the heap stays null, as the collector would not find it:
//!
//! ```should_panic
//! # use dune_gc::{Config, GcCell, Heap};
//! # let heap = Heap::new(Config::new()).unwrap();
//! # let mutator = heap.attach().unwrap();
//! let cell = GcCell::null();
//! cell.set(&mutator, Some(mutator.alloc(5_u64)));
//! ```
//!
//! # How it works
//!
//! ```text
//! precise/      the Rust interface            conservative.rs   the interface for C
//! heap.rs       allocation, and when to collect
//! space.rs      blocks and lists of them      block.rs, layout.rs, memory.rs
//! thread.rs     a thread's runs of free cells
//! world.rs      stopping the threads
//! collect.rs    collections in pieces; why nothing is lost
//! cycle.rs      the part of a full one that is done beside the program
//! mark.rs       from words to objects
//! roots.rs      roots, weak pointers, finalizers, values to drop
//! track/        who was written: the providers; why no write is missed
//! fork.rs       what a child finds
//! ```

mod block;
mod collect;
pub mod conservative;
mod cycle;
mod error;
mod fork;
mod heap;
mod images;
mod layout;
mod mark;
mod memory;
mod precise;
mod provider;
mod roots;
mod signals;
mod space;
mod stats;
mod thread;
mod track;
mod typed;
mod world;

// The derive macro names the crate by its name.
extern crate self as dune_gc;

pub use dune_gc_derive::Trace;
pub use error::GcError;
pub use precise::{
    Config, Gc, GcArray, GcCell, Heap, Mutator, NoPointers, Root, Trace, Tracer, Weak,
};
pub use provider::{Provider, UnknownProvider};
pub use stats::Stats;
