//! The crossings, a file each: the Linux way and the Dune way of doing the same thing.
//!
//! First every Linux way is measured, then Dune mode is entered for the first time, then
//! every Dune way: a process that has a VM is a little dearer for Linux to manage (each
//! change of a mapping is told to KVM), and Linux should not have to pay for that.

mod address_space;
mod answered_call;
pub(crate) mod compute;
mod enter_leave;
mod exception;
mod first_touch;
mod floors;
pub(crate) mod fork;
mod forwarded_call;
mod http;
mod program;
mod protect_fault;
mod ring3;
mod run_ls;
pub(crate) mod signal;
mod syscall;
mod tracer;
mod wedge;

use std::path::{Path, PathBuf};

use crate::clock::{Clock, Unit};
use crate::host::{self, Machine};
use crate::meter::Meter;
use crate::report::{Report, Row};

/// What the command line chose.
#[derive(Clone, Debug)]
pub(crate) struct Choices {
    pub(crate) samples: usize,
    pub(crate) only: Option<String>,
    pub(crate) dune: Option<PathBuf>,
}

/// What every crossing is given.
#[derive(Clone, Debug)]
pub(crate) struct Bench {
    pub(crate) meter: Meter,
    dune_command: Option<PathBuf>,
}

impl Bench {
    /// The `dune` command, or why there is none.
    fn dune_command(&self) -> Result<&Path, String> {
        self.dune_command.as_deref().ok_or_else(|| {
            "there is no `dune` beside this program; build it (cargo build --release -p \
             dune-cli), or pass --dune"
                .to_owned()
        })
    }
}

/// One crossing.
struct Crossing {
    id: &'static str,
    label: &'static str,
    /// The most that Dune may cost, in instructions.
    aim: Option<f64>,
    linux: Option<fn(&Bench, &mut Row)>,
    dune: Way,
}

/// How Dune's side of a crossing is measured.
enum Way {
    /// Called in Dune mode.
    Inside(fn(&Bench, &mut Row)),
    /// Called outside, on machines where Dune mode can be entered.
    AtRing0(fn(&Bench, &mut Row)),
    /// Called outside, in every placement.
    Outside(fn(&Bench, &mut Row)),
    /// Linux only.
    None,
}

const CROSSINGS: &[Crossing] = &[
    Crossing {
        id: "protect-fault",
        label: "protect a page, fault, unprotect it in a handler",
        aim: Some(400.0),
        linux: Some(protect_fault::linux),
        dune: Way::Inside(protect_fault::dune),
    },
    Crossing {
        id: "exception",
        label: "exception to a registered handler and back (Linux: SIGILL; Dune: the dearer of #BP and #DE)",
        aim: Some(200.0),
        linux: Some(exception::linux),
        dune: Way::Inside(exception::dune),
    },
    Crossing {
        id: "answered-call",
        label: "system call answered in the guest (getpid)",
        aim: Some(60.0),
        linux: Some(answered_call::measure),
        dune: Way::Inside(answered_call::measure_dune),
    },
    Crossing {
        id: "forwarded-call",
        label: "system call forwarded to Linux (getppid)",
        aim: Some(3_800.0),
        linux: Some(forwarded_call::linux),
        dune: Way::Inside(forwarded_call::dune),
    },
    Crossing {
        id: "ring3-round-trip",
        label: "system call of ring 3 to its guard and back (base: PTRACE_SYSEMU)",
        aim: Some(250.0),
        linux: Some(ring3::linux),
        dune: Way::Inside(ring3::dune),
    },
    Crossing {
        id: "address-space-switch",
        label: "load another address space at ring 0, and the first again",
        aim: Some(100.0),
        linux: None,
        dune: Way::Inside(address_space::dune),
    },
    Crossing {
        id: "first-touch",
        label: "first touch of an anonymous page of 4 KiB",
        aim: Some(10_500.0),
        linux: Some(first_touch::single_linux),
        dune: Way::Inside(first_touch::single_dune),
    },
    Crossing {
        id: "first-touch-batched",
        label: "first touch of many pages, for each 4 KiB (2 MiB pages)",
        aim: Some(7_000.0),
        linux: Some(first_touch::batched_linux),
        dune: Way::Inside(first_touch::batched_dune),
    },
    Crossing {
        id: "enter-leave",
        label: "enter Dune mode and leave it, warm",
        aim: Some(15_000.0),
        linux: None,
        dune: Way::AtRing0(enter_leave::dune),
    },
    Crossing {
        id: "compute",
        label: "a CPU-bound program: sieve, floats, hashes",
        aim: None,
        linux: Some(compute::linux),
        dune: Way::Outside(compute::dune),
    },
    Crossing {
        id: "run-ls",
        label: "busybox ls -l /, the whole command",
        aim: None,
        linux: Some(run_ls::linux),
        dune: Way::Outside(run_ls::dune),
    },
    Crossing {
        id: "fork",
        label: "fork, exit, wait (time in which the CPU idles included)",
        aim: None,
        linux: Some(fork::linux),
        dune: Way::Inside(fork::dune),
    },
    Crossing {
        id: "kvm-floor",
        label: "KVM_RUN that returns at once: no exit can cost less",
        aim: None,
        linux: Some(floors::kvm_run),
        dune: Way::None,
    },
    Crossing {
        id: "clear-page",
        label: "REP STOSB over 4 KiB: contained in every first touch",
        aim: None,
        linux: Some(floors::clear_page),
        dune: Way::None,
    },
    Crossing {
        id: "meter",
        label: "an operation that does nothing: contained in every figure",
        aim: None,
        linux: Some(floors::nothing),
        dune: Way::Inside(floors::nothing_dune),
    },
    // Last: from its second thread on, a process has more than one virtual CPU.
    Crossing {
        id: "protect-fault-threads",
        label: "as protect-fault, beside another thread (in Dune mode, waiting)",
        aim: None,
        linux: Some(protect_fault::linux_beside_thread),
        dune: Way::Inside(protect_fault::dune_beside_thread),
    },
];

/// What is measured in one run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Suite {
    /// The crossings.
    Core,
    /// Compartments.
    Wedge,
}

impl Suite {
    fn crossings(self) -> &'static [Crossing] {
        match self {
            Self::Core => CROSSINGS,
            Self::Wedge => wedge::CROSSINGS,
        }
    }
}

/// Measures everything that was chosen.
pub(crate) fn run(suite: Suite, choices: &Choices) -> Report {
    let clock = Clock::calibrate();
    let machine = Machine::describe(&clock, choices.samples);
    let bench = Bench {
        meter: Meter::new(clock.clone(), choices.samples),
        dune_command: choices.dune.clone().or_else(beside_this_program),
    };
    let wanted = |crossing: &&Crossing| {
        let only = choices.only.as_deref();
        only.is_none_or(|text| crossing.id.contains(text))
    };
    let mut rows: Vec<_> = suite
        .crossings()
        .iter()
        .filter(wanted)
        .map(|crossing| (crossing, Row::new(crossing.id, crossing.label)))
        .collect();
    for (crossing, row) in &mut rows {
        if clock.unit() == Unit::Instructions
            && let Some(aim) = crossing.aim
        {
            row.set_aim(aim);
        }
        if let Some(linux) = crossing.linux {
            linux(&bench, row);
        }
    }
    let without_ring0 = host::without_ring0();
    for (crossing, row) in &mut rows {
        match (&crossing.dune, &without_ring0) {
            (Way::Outside(dune), _) | (Way::AtRing0(dune), None) => dune(&bench, row),
            (Way::Inside(dune), None) => {
                if let Err(error) = dune::run(|| dune(&bench, row)) {
                    row.set_missing(error.to_string());
                }
            }
            (Way::Inside(_) | Way::AtRing0(_), Some(reason)) => row.set_missing(reason.clone()),
            (Way::None, _) => {}
        }
    }
    Report {
        machine,
        placement: host::placement().name(),
        clock,
        rows: rows.into_iter().map(|(_, row)| row).collect(),
    }
}

/// `dune` in the folder that this program was built into.
fn beside_this_program() -> Option<PathBuf> {
    let path = std::env::current_exe().ok()?.with_file_name("dune");
    path.is_file().then_some(path)
}
