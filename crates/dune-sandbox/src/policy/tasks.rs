//! How many processes and threads a program has: counted in memory that all of
//! its processes share.
//!
//! ```text
//!   slot:  0 (free) --take--> TAKEN --settle--> id of a thread or process
//!            ^                  |                 |
//!            +-----cancel-------+                 | found dead, when none is free
//!            +------------------------------------+
//! ```
//!
//! Nobody has to say that a thread ended, and a process may be killed at any
//! moment: the dead are looked for when there is no free slot. An id that was
//! given out again meanwhile, to whomever, counts until it is dead as well: the
//! count errs on the side of the limit.

#![expect(unsafe_code, reason = "memory shared between processes")]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, Ordering};

use linux_raw_sys::general::{
    __NR_kill, __NR_mmap, MAP_ANONYMOUS, MAP_NORESERVE, MAP_SHARED, PROT_READ, PROT_WRITE,
};

use crate::calls::forward_always;
use crate::host::Errno;

const FREE: u32 = 0;
const TAKEN: u32 = u32::MAX;

/// The slots; see the module documentation. The memory is never given back:
/// other processes have it too.
#[derive(Debug)]
pub(crate) struct Tasks {
    slots: NonNull<AtomicU32>,
    limit: usize,
}

// SAFETY: the slots are atomic and stay mapped for good.
unsafe impl Send for Tasks {}
// SAFETY: as above.
unsafe impl Sync for Tasks {}

/// A slot that was taken for a task that is being made.
#[derive(Debug)]
#[must_use = "the slot stays taken"]
pub(crate) struct Slot(usize);

impl Tasks {
    /// Slots for `limit` tasks, of which `first` is one.
    ///
    /// # Errors
    ///
    /// If there is no memory.
    pub(crate) fn new(limit: u32, first: u32) -> Result<Self, Errno> {
        let limit = limit as usize;
        let len = (limit * size_of::<AtomicU32>()) as u64;
        let prot = u64::from(PROT_READ | PROT_WRITE);
        let flags = u64::from(MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE);
        let at = forward_always(__NR_mmap, [0, len, prot, flags, u64::MAX, 0])?;
        let slots: *mut AtomicU32 = core::ptr::with_exposed_provenance_mut(at as usize);
        let tasks = Self {
            slots: NonNull::new(slots).ok_or(Errno::ENOMEM)?,
            limit,
        };
        if let Some(slot) = tasks.slots().first() {
            slot.store(first, Ordering::Relaxed);
        }
        Ok(tasks)
    }

    fn slots(&self) -> &[AtomicU32] {
        // SAFETY: so many zeroed words were mapped in `new`, at a page's
        // address, and stay; they are only ever used as atomic numbers.
        unsafe { core::slice::from_raw_parts(self.slots.as_ptr(), self.limit) }
    }

    /// A slot for one more task, if the limit has room.
    pub(crate) fn take(&self) -> Option<Slot> {
        self.take_free().or_else(|| {
            self.free_the_dead();
            self.take_free()
        })
    }

    fn take_free(&self) -> Option<Slot> {
        let take = |slot: &AtomicU32| {
            slot.compare_exchange(FREE, TAKEN, Ordering::AcqRel, Ordering::Relaxed)
        };
        self.slots()
            .iter()
            .position(|slot| take(slot).is_ok())
            .map(Slot)
    }

    fn free_the_dead(&self) {
        for slot in self.slots() {
            let id = slot.load(Ordering::Acquire);
            if id != FREE && id != TAKEN && is_dead(id) {
                // Unless somebody else has found it dead, and used it again.
                let _ = slot.compare_exchange(id, FREE, Ordering::AcqRel, Ordering::Relaxed);
            }
        }
    }

    /// The task was made and has this id; `None` if it was not.
    pub(crate) fn settle(&self, slot: Slot, id: Option<u32>) {
        if let Some(place) = self.slots().get(slot.0) {
            place.store(id.unwrap_or(FREE), Ordering::Release);
        }
    }
}

fn is_dead(id: u32) -> bool {
    const NO_SIGNAL: u64 = 0;
    forward_always(__NR_kill, [id.into(), NO_SIGNAL, 0, 0, 0, 0]) == Err(Errno::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_slots_as_the_limit_says() {
        let own = std::process::id();
        let tasks = Tasks::new(3, own).unwrap();
        let first = tasks.take().unwrap();
        let second = tasks.take().unwrap();
        assert!(tasks.take().is_none());
        tasks.settle(first, None);
        let again = tasks.take().unwrap();
        tasks.settle(again, Some(own));
        tasks.settle(second, Some(own));
        assert!(tasks.take().is_none(), "they live");
    }

    #[test]
    fn the_dead_make_room() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let tasks = Tasks::new(2, std::process::id()).unwrap();
        let slot = tasks.take().unwrap();
        tasks.settle(slot, Some(child.id()));
        child.wait().unwrap();
        assert!(tasks.take().is_some());
        assert!(tasks.take().is_none());
    }
}
