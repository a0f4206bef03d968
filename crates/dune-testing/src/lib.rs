//! The test harness: each test a process of its own, in the lab where it must be.
