//! What a child of `vfork` writes, on its way back to its parent.
//!
//! A child of `vfork` shares its parent's memory until it calls `execve` or
//! ends, and the parent waits for that. Here the child is a process with a copy
//! of the memory, as after `fork`, for the host cannot give one process a new
//! memory map under its old id without starting another host program. What the
//! child writes is found out, and written to the parent's memory before the
//! parent goes on:
//!
//! ```text
//!  parent   fork -- waits on a pipe ----------------- applies -- goes on
//!             \                                       ^
//!  child       ring 3: close, dup2, ... errno = 2 ----+-- execve, or the end
//!                      (pages are noted before their first write)
//! ```
//!
//! The parent cannot tell the difference, for the thread that called `vfork`
//! does not run in between. What is written is told byte by byte, so that other
//! threads of the parent, which run on, keep what they write beside it in the
//! same page. Only those could notice anything: they see what the child wrote
//! when it is done, not at once; and a byte that the child and such a thread
//! both write at the same time gets the child's value.
//!
//! The child can write at most [`MOST_BYTES`] of what it shares: it is killed at
//! the page after, and calls that may write more fail with `ENOMEM`.
//!
//! Memory that the child maps anonymously is mapped in the parent as well, and
//! the heap ends where the child left its end: the allocator of the parent's
//! libc may have used it. Nothing else of the child's address space comes back.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

use linux_raw_sys::general::{__NR_poll, __NR_read, __NR_write};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::calls::memory::{Space, check_limit, map_anonymous};
use crate::calls::{forward_always, own, own_mut};
use crate::engine::Access;
use crate::host::Errno;
use crate::program::{Memory, Program};
use crate::range::{PAGE_SIZE, PageRange, USER_TOP, UserRange};
use crate::user::UserMemory;
use crate::vma::{Areas, Attributes, Backing, Sharing, effective};

/// A page as it was before the child's first write to it.
type Before = Box<[u8; PAGE_SIZE as usize]>;

/// Bytes of pages that are noted at most: what the program cannot be charged for
/// must not fill the host's memory. A child of `vfork` writes to a few pages.
const MOST_BYTES: u64 = 256 << 20;

/// What the child notes.
#[derive(Debug)]
pub(crate) struct Journal {
    before: BTreeMap<u64, Before>,
    /// What the parent has mapped.
    areas: Areas,
    space: Space,
    /// To the parent.
    pipe: OwnedFd,
}

/// What goes through the pipe: a header, and for [`WRITE`] so many bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
struct Header {
    kind: u64,
    start: u64,
    /// Bytes.
    len: u64,
    /// Rights of a new mapping.
    access: u64,
}

const WRITE: u64 = 1;
const MAP: u64 = 2;
/// `start` is the new end of the heap.
const HEAP: u64 = 3;
const END: u64 = 4;

impl Journal {
    /// For a child with this memory.
    pub(crate) fn new(memory: &Memory, pipe: OwnedFd) -> Self {
        Self {
            before: BTreeMap::new(),
            areas: memory.areas.clone(),
            space: memory.space,
            pipe,
        }
    }

    /// The way to the parent, to be closed.
    pub(crate) fn into_pipe(self) -> OwnedFd {
        self.pipe
    }

    /// Notes the pages of `range` that are the child's own copies, before
    /// somebody writes to them. Where the child cannot write, nobody does: it has
    /// one thread, which gains no rights while it is in a call.
    ///
    /// # Errors
    ///
    /// `ENOMEM` for more than [`MOST_BYTES`] in all.
    pub(crate) fn note(&mut self, areas: &Areas, pid: u32, range: UserRange) -> Result<(), Errno> {
        let Some(pages) = PageRange::covering(range) else {
            return Ok(());
        };
        let writable = areas.overlapping(pages).filter(|area| {
            area.attributes.sharing == Sharing::Private
                && effective(area.attributes.access).contains(Access::WRITE)
        });
        for part in writable.filter_map(|area| area.range.intersect(pages)) {
            for page in (part.start()..part.end()).step_by(PAGE_SIZE as usize) {
                if self.before.contains_key(&page) {
                    continue;
                }
                if self.before.len() as u64 >= MOST_BYTES / PAGE_SIZE {
                    return Err(Errno::ENOMEM);
                }
                let mut bytes = Box::new([0; PAGE_SIZE as usize]);
                // What cannot be read (past the end of a file) cannot be written.
                if crate::user::copy_by_kernel(pid, page, &mut bytes[..]).is_ok() {
                    self.before.insert(page, bytes);
                }
            }
        }
        Ok(())
    }

    /// Tells the parent everything, and that this was all.
    pub(crate) fn tell(&self, memory: &Memory, pid: u32) -> Result<(), Errno> {
        for area in memory.areas.iter() {
            let private = area.attributes.sharing == Sharing::Private
                && area.attributes.backing != Backing::File;
            if !private {
                continue;
            }
            for range in without(area.range, &self.areas) {
                self.send(MAP, range.start(), range.len(), area.attributes)?;
                self.tell_contents(pid, range)?;
            }
        }
        if memory.space.heap_end != self.space.heap_end {
            let none = Attributes::anonymous(Access::empty());
            self.send(HEAP, memory.space.heap_end, 0, none)?;
        }
        for (&page, before) in &self.before {
            self.tell_page(pid, page, before)?;
        }
        let none = Attributes::anonymous(Access::empty());
        self.send(END, 0, 0, none)
    }

    fn tell_contents(&self, pid: u32, range: PageRange) -> Result<(), Errno> {
        let zero = [0; PAGE_SIZE as usize];
        for page in (range.start()..range.end()).step_by(PAGE_SIZE as usize) {
            self.tell_page(pid, page, &zero)?;
        }
        Ok(())
    }

    /// Sends the runs of bytes that differ.
    fn tell_page(
        &self,
        pid: u32,
        page: u64,
        before: &[u8; PAGE_SIZE as usize],
    ) -> Result<(), Errno> {
        let mut now = [0; PAGE_SIZE as usize];
        if crate::user::copy_by_kernel(pid, page, &mut now).is_err() {
            // The child has unmapped it since.
            return Ok(());
        }
        let none = Attributes::anonymous(Access::empty());
        let mut at = 0;
        while let Some(first) = (at..now.len()).find(|&byte| now[byte] != before[byte]) {
            let end = (first..now.len())
                .find(|&byte| now[byte] == before[byte])
                .unwrap_or(now.len());
            self.send(WRITE, page + first as u64, (end - first) as u64, none)?;
            self.write_all(&now[first..end])?;
            at = end;
        }
        Ok(())
    }

    fn send(&self, kind: u64, start: u64, len: u64, attributes: Attributes) -> Result<(), Errno> {
        let header = Header {
            kind,
            start,
            len,
            access: u64::from(attributes.access.bits()),
        };
        self.write_all(header.as_bytes())
    }

    fn write_all(&self, mut bytes: &[u8]) -> Result<(), Errno> {
        while !bytes.is_empty() {
            let fd = self.pipe.as_raw_fd() as u64;
            let args = [fd, own(bytes), bytes.len() as u64, 0, 0, 0];
            match forward_always(__NR_write, args) {
                Ok(written) => bytes = bytes.get(written as usize..).unwrap_or_default(),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }
}

/// The parts of `range` where `areas` has nothing.
fn without(range: PageRange, areas: &Areas) -> Vec<PageRange> {
    let mut parts = Vec::new();
    let mut reached = range.start();
    for known in areas.overlapping(range) {
        let gap = known.range.start().saturating_sub(reached);
        parts.extend(PageRange::new(reached, gap));
        reached = reached.max(known.range.end());
    }
    parts.extend(PageRange::new(reached, range.end().saturating_sub(reached)));
    parts
}

/// Waits, in the parent, until the child is done, and takes over what it tells.
/// `must_leave` is asked when a signal comes, and now and then.
pub(crate) fn take_over(program: &Program, pipe: &OwnedFd, must_leave: impl Fn() -> bool) {
    loop {
        let mut header = Header {
            kind: 0,
            start: 0,
            len: 0,
            access: 0,
        };
        if read_all(pipe, header.as_mut_bytes(), &must_leave).is_err() {
            // The child was killed.
            return;
        }
        match header.kind {
            WRITE => {
                let mut bytes = vec![0; header.len.min(PAGE_SIZE) as usize];
                if read_all(pipe, &mut bytes, &must_leave).is_err() {
                    return;
                }
                // Another thread may have unmapped it meanwhile.
                let memory = UserMemory::new(program.memory_lock(), program.pid());
                let _ = memory.write(header.start, &bytes);
            }
            MAP => {
                let access = Access::from_bits_truncate(header.access as u8);
                let mut memory = program.memory_mut();
                if let Some(range) = PageRange::new(header.start, header.len)
                    && memory.areas.is_free(range)
                    && check_limit(program, &memory, range.len(), access).is_ok()
                {
                    // Without it the program's next access says so.
                    let _ = map_anonymous(&mut memory, range, Attributes::anonymous(access));
                }
            }
            HEAP => {
                // Another thread may have moved it meanwhile.
                let mut memory = program.memory_mut();
                let end = &mut memory.space.heap_end;
                if header.start < USER_TOP {
                    *end = header.start.max(*end);
                }
            }
            _ => return,
        }
    }
}

/// Waits until there is something to read, or the other end is closed. Returns
/// now and then without: a thread that has blocked every signal, since one was
/// noted, cannot be told that it must leave.
fn is_readable(pipe: &OwnedFd) -> bool {
    const POLLIN: u64 = 1;
    const MILLISECONDS: u64 = 100;
    // `struct pollfd`: the descriptor, what is asked, what holds.
    let mut asked = pipe.as_raw_fd() as u64 | POLLIN << 32;
    let args = [own_mut(&mut asked), 1, MILLISECONDS, 0, 0, 0];
    forward_always(__NR_poll, args).is_ok_and(|count| count != 0)
}

fn read_all(
    pipe: &OwnedFd,
    mut bytes: &mut [u8],
    must_leave: &impl Fn() -> bool,
) -> Result<(), Errno> {
    while !bytes.is_empty() {
        if !is_readable(pipe) {
            if must_leave() {
                return Err(Errno::EINTR);
            }
            continue;
        }
        let len = bytes.len() as u64;
        let args = [pipe.as_raw_fd() as u64, own_mut(bytes), len, 0, 0, 0];
        match forward_always(__NR_read, args) {
            Ok(0) => return Err(Errno::EPIPE),
            Ok(count) => bytes = bytes.get_mut(count as usize..).unwrap_or_default(),
            Err(Errno::EINTR) if !must_leave() => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::UserPages;

    #[test]
    fn a_journal_notes_what_can_be_written_and_has_an_end() {
        let pages = UserPages::anonymous(1 + MOST_BYTES / PAGE_SIZE);
        let mut memory = pages.memory.write().unwrap();
        let (_, pipe) = std::io::pipe().unwrap();
        let mut journal = Journal::new(&memory, pipe.into());
        let pid = std::process::id();
        let range = |len| UserRange::new(pages.start(), len).unwrap();
        assert_eq!(journal.note(&memory.areas, pid, range(MOST_BYTES)), Ok(()));
        let more = journal.note(&memory.areas, pid, range(MOST_BYTES + 1));
        assert_eq!(more, Err(Errno::ENOMEM));
        let (_, pipe) = std::io::pipe().unwrap();
        let mut journal = Journal::new(&memory, pipe.into());
        let all = PageRange::covering(range(MOST_BYTES + 1)).unwrap();
        memory.areas.protect(all, Access::READ).unwrap();
        assert_eq!(
            journal.note(&memory.areas, pid, range(MOST_BYTES + 1)),
            Ok(())
        );
        assert!(journal.before.is_empty());
    }
}
