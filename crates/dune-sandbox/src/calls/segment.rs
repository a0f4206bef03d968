//! System V shared memory: the segments that the embedding program gives, and
//! no others.
//!
//! Segments are named by numbers that anybody can guess, and who may attach one
//! is decided by user ids alone: a program could reach the memory of any other
//! one of its user. So `shmat` knows those that
//! [`Command::segment`](crate::Command::segment) names; for every other, as for
//! `shmget` and `shmctl`, this is a kernel without System V shared memory. A
//! segment stays attached until the program ends.

use linux_raw_sys::general::{__NR_shmat, __NR_shmctl};
use std::sync::Arc;

use super::{forward_always, own_mut};
use crate::engine::Access;
use crate::guard::Guard;
use crate::host::{Errno, SysResult};
use crate::range::{PAGE_SIZE, PageRange, USER_LO};
use crate::table::Args;
use crate::vma::{Attributes, Backing, Sharing};

/// `SHM_RDONLY`.
const READ_ONLY: u64 = 0o10000;

/// A segment that the program may attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    id: i32,
    /// In bytes, whole pages.
    len: u64,
}

impl Segment {
    pub(crate) const fn id(self) -> i32 {
        self.id
    }

    /// The segment of this id, which must exist.
    ///
    /// # Errors
    ///
    /// `EINVAL` or `EIDRM` if there is none, `EACCES` if it cannot be read.
    pub(crate) fn of(id: i32) -> Result<Self, Errno> {
        const IPC_STAT: u64 = 2;
        /// Words of `struct shmid64_ds`; the size follows on `struct
        /// ipc64_perm`, which has six.
        const WORDS: usize = 14;
        const SIZE: usize = 6;
        let mut status = [0_u64; WORDS];
        let args = [id as u64, IPC_STAT, own_mut(&mut status), 0, 0, 0];
        forward_always(__NR_shmctl, args)?;
        let len = status[SIZE]
            .checked_next_multiple_of(PAGE_SIZE)
            .ok_or(Errno::EINVAL)?;
        Ok(Self { id, len })
    }
}

/// `shmat`.
pub(crate) fn attach(guard: &mut Guard, args: Args) -> SysResult {
    let [id, addr, flags, ..] = args;
    let program = Arc::clone(&guard.program);
    let Some(segment) = program.segment(id as i32) else {
        return Err(Errno::ENOSYS);
    };
    // Where, is the guard's choice: nobody has asked for more yet.
    if addr != 0 || flags & !READ_ONLY != 0 {
        return Err(Errno::EINVAL);
    }
    let mut memory = program.memory_mut();
    let limits = program.process().limits;
    limits.check_address_space(memory.areas.bytes(), segment.len)?;
    let range = memory
        .areas
        .find_free(segment.len, USER_LO, memory.space.mmap_top)
        .and_then(|range| PageRange::new(range.start(), segment.len))
        .ok_or(Errno::ENOMEM)?;
    // Fails if anything is there; what the kernel maps is the segment's size.
    let args = [segment.id as u64, range.start(), flags, 0, 0, 0];
    forward_always(__NR_shmat, args)?;
    let write = if flags & READ_ONLY == 0 {
        Access::WRITE
    } else {
        Access::empty()
    };
    let attributes = Attributes {
        access: Access::READ | write,
        sharing: Sharing::Shared,
        // As a file: others have it too.
        backing: Backing::File,
    };
    memory.areas.map(range, attributes);
    Ok(range.start())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::guard;

    #[test]
    fn segments_that_were_not_given_are_not_there() {
        for id in [0, 1, u64::MAX] {
            assert_eq!(
                attach(&mut guard(), [id, 0, 0, 0, 0, 0]),
                Err(Errno::ENOSYS)
            );
        }
        assert!(Segment::of(-1).is_err());
    }
}
