//! The tables of the paper (Belay et al., "Dune: Safe User-level Access to
//! Privileged CPU Features", OSDI 2012), and the rows of ours that measure the
//! same things. The paper's own figures are of other machines and not repeated.

use super::{Row, Section};

/// A table of the paper.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) number: u32,
    pub(super) title: &'static str,
    /// How its rows correspond to ours.
    pub(super) about: &'static str,
    /// The benchmark that measures them.
    pub(super) suite: &'static str,
    /// What the ids of its rows begin with; all rows if there is none.
    ids: &'static [&'static str],
}

/// Those with measurements, in the paper's order.
pub(super) const TABLES: &[Table] = &[
    Table {
        number: 3,
        title: "what Dune costs",
        about: "The paper's system call is forwarded-call here, its page fault first-touch; \
                entering and leaving, and a whole command, are added. Page walks (its third row) \
                are the hardware's and are contained in the CPU-bound program.",
        suite: "core",
        ids: &[
            "forwarded-call",
            "first-touch",
            "enter-leave",
            "compute",
            "fork",
            "run-ls",
        ],
    },
    Table {
        number: 4,
        title: "what Dune makes faster",
        about: "The paper's ptrace is ring3-round-trip here (a system call of untrusted code that \
                is taken and answered), its trap is exception, and its two of Appel and Li's \
                (protect, fault, unprotect) are protect-fault, without and beside a second thread.",
        suite: "core",
        ids: &[
            "ring3-round-trip",
            "exception",
            "protect-fault",
            "answered-call",
            "address-space-switch",
        ],
    },
    Table {
        number: 5,
        title: "a web server in the sandbox",
        about: "The paper runs lighttpd; here nginx and redis answer clients on loopback. Time for \
                each request, which is the throughput upside down, and percentiles of the latency.",
        suite: "sandbox",
        ids: &["nginx", "redis"],
    },
    Table {
        number: 6,
        title: "privilege separation",
        about: "The paper's sthreads are compartments here: making one, a switch, work done in \
                one, and a web server's request read in one.",
        suite: "wedge",
        ids: &[],
    },
    Table {
        number: 7,
        title: "garbage collection",
        about: "The paper changes the Boehm collector; here dune-gc runs the same kinds of programs \
                beside libgc.",
        suite: "memory",
        ids: &["gc-"],
    },
];

impl Table {
    /// Its rows in a benchmark's figures.
    pub(super) fn rows<'a>(&self, section: &'a Section) -> Vec<&'a Row> {
        if section.name != self.suite {
            return Vec::new();
        }
        let rows = section.found.rows.iter();
        rows.filter(|row| self.ids.is_empty() || self.ids.iter().any(|id| row.id.starts_with(id)))
            .collect()
    }

    pub(super) fn anchor(&self) -> String {
        format!("table-{}", self.number)
    }

    pub(super) fn heading(&self) -> String {
        format!("Table {} of the paper: {}", self.number, self.title)
    }
}
