//! The sandbox: unmodified Linux programs held in ring 3.

pub mod engine;
pub mod host;
pub mod range;
