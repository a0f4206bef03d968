//! What runs at ring 0, under a trap.

pub(crate) mod call;
pub(crate) mod dispatch;
pub(crate) mod fatal;
pub(crate) mod signals;
