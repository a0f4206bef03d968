//! A policy at work in the guard: the rules, and a record of what they
//! refused.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use super::tasks::{Slot, Tasks};
use super::{Refusal, Remedy, Rules};
use crate::host::Errno;

/// How many refusals are remembered: what a program asks for is its own
/// choice and must not fill memory.
const MOST: usize = 256;

/// See the module documentation. Shared by all threads of a program.
#[derive(Debug)]
pub(crate) struct Enforced {
    rules: Rules,
    /// Whether the guard asks the rules itself. Without, the second wall
    /// stands alone, which is what its tests want.
    checks: bool,
    /// Where each refusal is explained as it occurs.
    explain: Option<Arc<File>>,
    tasks: Option<Tasks>,
    first_process: u32,
    refused: Mutex<Refused>,
}

#[derive(Debug, Default)]
struct Refused {
    seen: BTreeSet<String>,
    list: Vec<Refusal>,
    count: u64,
}

impl Enforced {
    pub(crate) fn new(rules: Rules, explain: Option<Arc<File>>, checks: bool) -> Self {
        Self {
            rules,
            checks,
            explain,
            tasks: None,
            first_process: std::process::id(),
            refused: Mutex::default(),
        }
    }

    /// Limits the number of tasks as the rules say; this process is the first.
    ///
    /// # Errors
    ///
    /// If there is no memory to count them in.
    pub(crate) fn count_tasks(mut self) -> Result<Self, Errno> {
        if let Some(limit) = self.rules.limits.processes {
            self.tasks = Some(Tasks::new(limit, std::process::id())?);
        }
        Ok(self)
    }

    /// Room for one more thread or process.
    ///
    /// # Errors
    ///
    /// `EAGAIN`.
    pub(crate) fn take_task(&self) -> Result<Option<Slot>, Errno> {
        let Some(tasks) = &self.tasks else {
            return Ok(None);
        };
        match tasks.take() {
            Some(slot) => Ok(Some(slot)),
            None => Err(self.refuse(
                "one more thread or process".to_owned(),
                Remedy::Processes,
                Errno::EAGAIN,
            )),
        }
    }

    /// The task was made, or not.
    pub(crate) fn settle_task(&self, slot: Option<Slot>, made: Result<u32, Errno>) {
        if let (Some(tasks), Some(slot)) = (&self.tasks, slot) {
            tasks.settle(slot, made.ok());
        }
    }

    /// Nothing is restricted.
    pub(crate) fn unrestricted() -> Self {
        Self::new(Rules::unrestricted(), None, true)
    }

    /// The rules that the guard enforces.
    pub(crate) fn rules(&self) -> &Rules {
        &self.rules
    }

    /// The rules over files, if there are any to ask.
    pub(crate) fn files(&self) -> Option<&super::FileRules> {
        self.rules.files.as_ref().filter(|_| self.checks)
    }

    /// The process that began the program, if it may send signals to nobody
    /// but its descendants.
    pub(crate) fn first_process(&self) -> Option<u32> {
        (self.rules.strict && self.checks).then_some(self.first_process)
    }

    /// The network that the guard enforces.
    pub(crate) fn net(&self) -> super::Net {
        if self.checks {
            self.rules.net
        } else {
            super::Net::Full
        }
    }

    /// The descriptor of the explanations, which is the guard's.
    pub(crate) fn fd(&self) -> Option<RawFd> {
        self.explain.as_deref().map(AsRawFd::as_raw_fd)
    }

    /// Records a refusal, and explains it if that was asked for, each once.
    /// Returns what the program is told.
    pub(crate) fn refuse(&self, request: String, remedy: Remedy, errno: Errno) -> Errno {
        let refusal = Refusal { request, remedy };
        let line = refusal.to_string();
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.count += 1;
        if refused.list.len() < MOST && refused.seen.insert(line.clone()) {
            refused.list.push(refusal);
            if let Some(mut file) = self.explain.as_deref() {
                // One write, so that lines of several processes do not mix;
                // there is nobody to tell that it cannot be written.
                let _ = file.write_all(format!("dune: {line}\n").as_bytes());
            }
        }
        errno
    }

    /// What was refused, each once, and how often in all.
    pub(crate) fn refusals(&self) -> (Vec<Refusal>, u64) {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        (refused.list.clone(), refused.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Net;

    #[test]
    fn refusals_are_remembered_once_and_not_without_end() {
        let enforced = Enforced::unrestricted();
        for number in 0..10_000 {
            let request = format!("open({})", number % 1000);
            let errno = enforced.refuse(request, Remedy::Net(Net::Full), Errno::EACCES);
            assert_eq!(errno, Errno::EACCES);
        }
        let (list, count) = enforced.refusals();
        assert_eq!((list.len(), count), (MOST, 10_000));
    }
}
