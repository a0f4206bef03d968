//! The sandbox: unmodified Linux programs held in ring 3.
