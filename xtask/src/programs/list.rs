//! The programs, and what they need.

use dune_lab::tools::Tool;

/// A program of which everything that it prints is the same at each run.
#[derive(Debug)]
pub(super) struct Script {
    pub(super) name: &'static str,
    /// For `sh`, in an empty folder.
    pub(super) text: &'static str,
    pub(super) needs: &'static [Tool],
}

macro_rules! scripts {
    ($($name:literal: [$($program:literal in $package:literal),* $(,)?],)*) => {
        &[$(Script {
            name: $name,
            text: include_str!(concat!("scripts/", $name, ".sh")),
            needs: &[$(Tool { program: $program, package: $package }),*],
        }),*]
    };
}

pub(super) const SCRIPTS: &[Script] = scripts! {
    "bash": ["bash" in "bash", "python3" in "python3"],
    "perl": ["perl" in "perl"],
    "git": ["git" in "git"],
    "make": ["make" in "make", "gcc" in "gcc"],
    "cargo": ["cargo" in "cargo"],
    "sqlite": ["sqlite3" in "sqlite3"],
    "redis": ["redis-server" in "redis-server", "redis-benchmark" in "redis-tools"],
    "nginx": ["nginx" in "nginx-light", "ab" in "apache2-utils", "python3" in "python3"],
    "node": ["node" in "nodejs"],
    "java": ["javac" in "openjdk-17-jdk-headless"],
    "python": ["python3" in "python3"],
};

/// Modules of Python's own regression tests.
pub(super) const PYTHON_TESTS: &[&str] = &[
    "test_threading",
    "test_subprocess",
    "test_signal",
    "test_socket",
    "test_asyncio",
    "test_mmap",
    "test_os",
    "test_io",
    "test_select",
    "test_epoll",
    "test_selectors",
    "test_fork1",
    "test_pty",
];
