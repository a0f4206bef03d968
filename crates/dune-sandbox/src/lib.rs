//! The sandbox: unmodified Linux programs held in ring 3.

pub mod engine;
pub mod host;
pub mod range;
#[cfg(test)]
mod testing;
pub mod user;
pub mod vma;
