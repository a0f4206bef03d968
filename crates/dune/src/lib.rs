//! Dune mode: an ordinary process that uses the privileged CPU.
