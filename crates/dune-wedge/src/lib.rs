//! Compartments: parts of a process that hold only what they were given.

#![doc = ""]

mod compartment;
mod error;
mod frames;
mod gate;
mod guard;
mod image;
mod inside;
mod layout;
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
pub use policy::{Calls, FileRights, OnRefusal};
pub use pool::{Pool, Pooled};
pub use runtime::{Usage, start, usage};
pub use tag::{BytesIn, Grant, In, Tag, TagError, allocate_inside, free_inside};
