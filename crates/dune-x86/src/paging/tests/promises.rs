//! The promises that the documentation makes, one by one.
