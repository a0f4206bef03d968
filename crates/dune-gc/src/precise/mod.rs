//! The interface for Rust: every pointer is known.
//!
//! ```text
//! heap.rs     Heap, Config
//! mutator.rs  Mutator: a thread's way to the heap
//! cell.rs     Gc: a pointer on the stack; GcCell: a pointer in an object
//! root.rs     Root, Weak: pointers from anywhere
//! object.rs   how an object lies in its cell
//! trace.rs    the trait
//! ```

mod cell;
mod heap;
mod mutator;
mod object;
mod root;
mod trace;

pub use cell::{Gc, GcCell};
pub use heap::{Config, Heap};
pub use mutator::Mutator;
pub use object::GcArray;
pub use root::{Root, Weak};
pub use trace::{NoPointers, Trace, Tracer};

#[cfg(test)]
mod tests;
