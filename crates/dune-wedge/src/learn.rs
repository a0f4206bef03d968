//! Learning what a function needs: a run in which everything is allowed and noted (what the
//! Crowbar tool is to Wedge).

use core::fmt;
use std::collections::{BTreeMap, BTreeSet};

use crate::error::Access;
use crate::policy::{Calls, FileRights};
use crate::tag;

/// What a run used beyond what it was granted. Prints as the grants that it would need.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Learned {
    /// Rights to descriptors, by number.
    pub files: BTreeMap<i32, FileRights>,
    /// System calls that can be granted.
    pub calls: Calls,
    /// System calls that cannot: their numbers. The run ended at the first of them, unless
    /// refusals are errors inside.
    pub refused: BTreeSet<u64>,
    /// Gates that were called, by address. What is behind them nobody but the parent can say,
    /// so the run ended at the first of them.
    pub gates: BTreeSet<u64>,
    /// Tags that were used, by their first address, and whether they were written to.
    pub tags: BTreeMap<u64, bool>,
    /// Other memory of the process, by what it is, with what was done to it and how many
    /// pages of it: belongs into a tag, or into the input.
    pub memory: BTreeMap<String, Touched>,
}

/// Memory that was used without a grant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Pages of 4 KiB.
    pub pages: usize,
    /// Whether any was written to.
    pub written: bool,
    /// The first instruction that used one.
    pub at: u64,
}

impl Learned {
    /// Notes a use of memory, and says which right the page is to be given: `None` where the
    /// process has nothing to give.
    pub(crate) fn memory(&mut self, address: u64, access: Access, at: u64) -> Option<bool> {
        let is_write = access == Access::Write;
        if access == Access::Execute {
            return None;
        }
        if let Some(start) = tag::start_of(address) {
            *self.tags.entry(start).or_default() |= is_write;
            return Some(is_write);
        }
        let name = name_of(address, is_write)?;
        let touched = self.memory.entry(name).or_default();
        touched.pages += 1;
        touched.written |= is_write;
        if touched.at == 0 {
            touched.at = at;
        }
        Some(is_write)
    }

    /// Whether nothing was missing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What the process has at an address, if it may be used so.
fn name_of(address: u64, is_write: bool) -> Option<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let rights = words.next()?;
        let range = u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?;
        let allowed = rights.starts_with(if is_write { "rw" } else { "r" });
        (range.contains(&address) && allowed).then(|| match words.nth(3) {
            Some(name) => name.to_owned(),
            None => "memory that was mapped without a name".to_owned(),
        })
    })
}

impl fmt::Display for Learned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return writeln!(f, "nothing was missing");
        }
        for (fd, rights) in &self.files {
            writeln!(f, ".file(descriptor {fd}, {rights:?})")?;
        }
        if !self.calls.is_empty() {
            writeln!(f, ".calls({:?})", self.calls)?;
        }
        for (start, written) in &self.tags {
            let grant = if *written { "ReadWrite" } else { "Read" };
            writeln!(f, ".tag(the tag at {start:#x}, Grant::{grant})")?;
        }
        for gate in &self.gates {
            writeln!(f, ".gate(the gate at {gate:#x}, what is behind it)")?;
        }
        for (name, touched) in &self.memory {
            let Touched { pages, written, at } = *touched;
            let how = if written { "read and wrote" } else { "read" };
            writeln!(
                f,
                "{how} {pages} pages of {name}, first at {at:#x}: pass it, or put it into a tag"
            )?;
        }
        for number in &self.refused {
            writeln!(f, "made system call {number}, which cannot be granted")?;
        }
        Ok(())
    }
}
