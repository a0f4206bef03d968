//! A garbage-collected heap whose write barrier is the dirty bit of the page.

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
