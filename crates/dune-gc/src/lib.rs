//! A garbage-collected heap whose write barrier is the dirty bit of the page.

mod block;
mod collect;
pub mod conservative;
mod error;
mod heap;
mod images;
mod layout;
mod mark;
mod memory;
mod provider;
mod roots;
mod space;
mod stats;
mod thread;
mod track;
mod typed;
mod world;

pub use error::GcError;
pub use provider::{Provider, UnknownProvider};
pub use stats::Stats;
