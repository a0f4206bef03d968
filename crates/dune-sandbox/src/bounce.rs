//! The guard's copies of what a forwarded call points at.
//!
//! A forwarded call is made behind the wall of protection keys, where there is
//! one ([`dune_kvm::wall`]): the host kernel then reaches user memory and
//! nothing of the guard. What the guard copied and checked (strings, vectors,
//! headers) must be within the kernel's reach all the same, and out of ring
//! 3's. So it is lent to the kernel here: a few pages above user memory, never
//! mapped for ring 3, under the same key as user memory.
//!
//! ```text
//!  user memory ---copy---> the guard's copy: checked, decided on
//!                               | lend
//!                               v
//!                          a Lent: what the kernel gets, and may write
//!                               | read back, as hostile as user memory
//!                               v
//!                          the guard
//! ```
//!
//! Should a check of a pointer be missing somewhere, a call can reach what is
//! lent for another one. So the guard decides by its own copy, never by what is
//! lent, and believes nothing that comes back.

#![expect(unsafe_code, reason = "copies to and from memory lent to the kernel")]

use core::cell::{Cell, RefCell};
use core::fmt;
use core::ptr::NonNull;
use std::rc::Rc;

use dune_kvm::wall::{Region, Wall};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::host::Errno;
use crate::range::PAGE_SIZE;

/// Bytes that are kept for a thread: more than nearly every call needs.
const KEPT: usize = 32 << 10;
/// Every piece begins at a multiple of this.
const ALIGN: usize = 16;

/// What one thread lends.
#[derive(Clone, Default)]
pub(crate) struct Bounce(Rc<Kept>);

#[derive(Default)]
struct Kept {
    /// Mapped when it is first needed.
    region: RefCell<Option<Region>>,
    /// Bytes of it that are lent: all of them are free again when nothing is.
    used: Cell<usize>,
    lent: Cell<usize>,
}

impl fmt::Debug for Bounce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bounce")
    }
}

impl Bounce {
    /// Lends a copy of `value` to the host kernel.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn lend<T: IntoBytes + Immutable + ?Sized>(&self, value: &T) -> Result<Lent, Errno> {
        let bytes = value.as_bytes();
        let lent = self.place(bytes.len())?;
        // SAFETY: `place` gave as many bytes, which nobody else has.
        unsafe {
            lent.at
                .copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len());
        }
        Ok(lent)
    }

    /// Room for `len` bytes.
    fn place(&self, len: usize) -> Result<Lent, Errno> {
        let used = self.0.used.get();
        let end = used.checked_add(len.next_multiple_of(ALIGN));
        let Some(end) = end.filter(|&end| end <= KEPT) else {
            let region = map(len.next_multiple_of(PAGE_SIZE as usize))?;
            return Ok(Lent {
                at: pointer(&region, 0)?,
                len,
                home: Home::Own(region),
            });
        };
        let mut kept = self.0.region.borrow_mut();
        let region = match &mut *kept {
            Some(region) => region,
            none => none.insert(map(KEPT)?),
        };
        let at = pointer(region, used)?;
        self.0.used.set(end);
        self.0.lent.set(self.0.lent.get() + 1);
        Ok(Lent {
            at,
            len,
            home: Home::Kept(self.clone()),
        })
    }
}

fn map(len: usize) -> Result<Region, Errno> {
    Region::map(len.max(PAGE_SIZE as usize), Wall::get()).map_err(|_| Errno::ENOMEM)
}

fn pointer(region: &Region, offset: usize) -> Result<NonNull<u8>, Errno> {
    NonNull::new(region.as_ptr().wrapping_add(offset)).ok_or(Errno::ENOMEM)
}

/// A copy that the host kernel may read and write, until it is dropped.
pub(crate) struct Lent {
    at: NonNull<u8>,
    len: usize,
    home: Home,
}

enum Home {
    /// Among what is kept for the thread.
    Kept(Bounce),
    /// A mapping of its own.
    #[expect(dead_code, reason = "kept until it is unmapped")]
    Own(Region),
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Home::Kept(Bounce(kept)) = &self.home {
            kept.lent.set(kept.lent.get() - 1);
            if kept.lent.get() == 0 {
                kept.used.set(0);
            }
        }
    }
}

impl Lent {
    /// Its address, as an argument.
    pub(crate) fn pointer(&self) -> u64 {
        self.at.as_ptr().expose_provenance() as u64
    }

    /// Copies what is there now.
    ///
    /// # Panics
    ///
    /// If something of another length was lent.
    pub(crate) fn read_into<T: FromBytes + IntoBytes + ?Sized>(&self, value: &mut T) {
        let bytes = value.as_mut_bytes();
        assert_eq!(bytes.len(), self.len, "what was lent has another length");
        // SAFETY: as many bytes were lent, and no reference into them exists.
        unsafe {
            self.at
                .copy_to_nonoverlapping(NonNull::from(bytes).cast(), self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::range::USER_HI;

    #[test]
    fn what_is_lent_lies_above_user_memory_and_apart() {
        let bounce = Bounce::default();
        let first = bounce.lend(&[1_u64; 3]).unwrap();
        let second = bounce.lend(&[2_u8; 5][..]).unwrap();
        assert!(first.pointer() >= USER_HI);
        assert!(second.pointer() >= first.pointer() + 24);
        let (mut words, mut bytes) = ([0_u64; 3], [0_u8; 5]);
        first.read_into(&mut words);
        second.read_into(&mut bytes[..]);
        assert_eq!((words, bytes), ([1; 3], [2; 5]));
    }

    #[test]
    fn room_is_used_again_and_much_has_room_of_its_own() {
        let bounce = Bounce::default();
        let first = bounce.lend(&0_u64).unwrap().pointer();
        assert_eq!(bounce.lend(&0_u64).unwrap().pointer(), first);
        let much = vec![7_u8; 10 * KEPT];
        let lent = bounce.lend(&much[..]).unwrap();
        let mut back = vec![0; much.len()];
        lent.read_into(&mut back[..]);
        assert_eq!(back, much);
        assert_eq!(bounce.lend(&0_u64).unwrap().pointer(), first);
    }

    #[test]
    fn nothing_can_be_lent_too() {
        assert!(Bounce::default().lend(&[0_u8; 0]).is_ok());
    }
}
