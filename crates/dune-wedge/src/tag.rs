//! Tagged memory: what compartments and their parent, or compartments among themselves, have
//! in common, because it was granted.
//!
//! A tag has the same address everywhere, so that pointers into it mean the same everywhere.
//! Rust holds no reference into it: any compartment that may write to it can change it at any
//! moment. Values are copied in and out, and are of types for which any bytes will do.
#![expect(unsafe_code, reason = "memory that several rings share")]

use core::marker::PhantomData;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use dune::EnterError;
use dune::memory::copy_shared;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::inside;
use crate::layout::{PAGE, TAGS_END, TAGS_START, page_up};

/// Blocks begin at multiples of this.
const GRAIN: u64 = 16;

/// What a compartment may do with a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Read what is in it, now and later.
    Read,
    /// Read and write what is in it, and allocate and free in it.
    ReadWrite,
    /// Read what is in it and write to a copy of its own, page by page; the copy is gone when
    /// the compartment is reset.
    CopyOnWrite,
}

/// Memory that is granted to compartments as one.
///
/// The parent always has it; a compartment has it if it was granted
/// ([`Builder::tag`](crate::Builder::tag)).
#[derive(Debug)]
pub struct Tag {
    start: u64,
    bytes: u64,
    blocks: Mutex<Blocks>,
}

/// Which parts are in use. Not in the tag itself, where compartments could change it.
#[derive(Debug, Default)]
struct Blocks {
    /// Free parts by address, with their lengths; no two touch.
    free: BTreeMap<u64, u64>,
    used: BTreeMap<u64, u64>,
}

/// Why a tag could not be made, or gave no memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TagError {
    /// The process gave no memory for it.
    #[error(transparent)]
    Memory(#[from] EnterError),
    /// No address was free.
    #[error("no room for a tag of {bytes} bytes is left between {TAGS_START:#x} and {TAGS_END:#x}")]
    NoAddress {
        /// The size.
        bytes: u64,
    },
    /// The tag is full.
    #[error("no {bytes} bytes in one piece are free in the tag; make it larger, or free some")]
    Full {
        /// What was asked for.
        bytes: u64,
    },
    /// Not a block of this tag.
    #[error("{address:#x} and {bytes} bytes from there are not in the tag")]
    Outside {
        /// The address.
        address: u64,
        /// The size.
        bytes: u64,
    },
}

/// Addresses for tags: the next that was never used, and what was given back.
static ADDRESSES: Mutex<Addresses> = Mutex::new(Addresses {
    next: TAGS_START,
    free: Vec::new(),
    live: BTreeMap::new(),
});

struct Addresses {
    next: u64,
    free: Vec<(u64, u64)>,
    /// Tags that there are, and where they end.
    live: BTreeMap<u64, u64>,
}

/// The first address of the tag that an address is in.
pub(crate) fn start_of(address: u64) -> Option<u64> {
    let addresses = ADDRESSES.lock().unwrap_or_else(PoisonError::into_inner);
    let (start, end) = addresses.live.range(..=address).next_back()?;
    (address < *end).then_some(*start)
}

impl Addresses {
    fn take(&mut self, bytes: u64) -> Option<u64> {
        if let Some(index) = self.free.iter().position(|(_, length)| *length == bytes) {
            return Some(self.free.swap_remove(index).0);
        }
        let end = self
            .next
            .checked_add(bytes)
            .filter(|end| *end <= TAGS_END)?;
        Some(core::mem::replace(&mut self.next, end))
    }
}

impl Tag {
    /// A tag of so many bytes, rounded up to whole pages, all zero. Memory is used when it is
    /// touched. One system call.
    ///
    /// # Errors
    /// [`TagError`].
    pub fn new(bytes: usize) -> Result<Self, TagError> {
        let bytes = page_up((bytes as u64).clamp(1, TAGS_END - TAGS_START));
        let mut addresses = ADDRESSES.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let start = addresses.take(bytes).ok_or(TagError::NoAddress { bytes })?;
            // SAFETY: new memory, nowhere that there was some.
            let mapped = unsafe {
                libc::mmap(
                    start as *mut _,
                    bytes as usize,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE
                        | libc::MAP_ANONYMOUS
                        | libc::MAP_NORESERVE
                        | libc::MAP_FIXED_NOREPLACE,
                    -1,
                    0,
                )
            };
            if mapped as u64 == start {
                addresses.live.insert(start, start + bytes);
                let free = BTreeMap::from([(start, bytes)]);
                return Ok(Self {
                    start,
                    bytes,
                    blocks: Mutex::new(Blocks {
                        free,
                        used: BTreeMap::new(),
                    }),
                });
            }
            let error = std::io::Error::last_os_error();
            if error.kind() != std::io::ErrorKind::AlreadyExists {
                return Err(TagError::Memory(EnterError::Maps(error)));
            }
            // Somebody else's memory is there: look further on.
        }
    }

    /// The first address.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes as usize
    }

    /// Never: a tag has at least a page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    pub(crate) fn end(&self) -> u64 {
        self.start + self.bytes
    }

    fn check(&self, address: u64, bytes: u64) -> Result<(), TagError> {
        let offset = address.wrapping_sub(self.start);
        if offset <= self.bytes && bytes <= self.bytes - offset {
            return Ok(());
        }
        Err(TagError::Outside { address, bytes })
    }

    /// Allocates memory in the tag: the address of so many bytes, which hold what was there.
    ///
    /// # Errors
    /// [`TagError::Full`].
    pub fn allocate(&self, bytes: usize, alignment: usize) -> Result<u64, TagError> {
        let full = TagError::Full {
            bytes: bytes as u64,
        };
        let bytes = (bytes as u64).max(1);
        if bytes > self.bytes || !alignment.is_power_of_two() || alignment as u64 > PAGE {
            return Err(full);
        }
        let (bytes, alignment) = (bytes.next_multiple_of(GRAIN), (alignment as u64).max(GRAIN));
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let found = blocks.free.iter().find_map(|(start, length)| {
            let at = start.next_multiple_of(alignment);
            (at - start + bytes <= *length).then_some((*start, *length, at))
        });
        let Some((start, length, at)) = found else {
            return Err(full);
        };
        blocks.free.remove(&start);
        if at > start {
            blocks.free.insert(start, at - start);
        }
        if at + bytes < start + length {
            blocks.free.insert(at + bytes, start + length - at - bytes);
        }
        blocks.used.insert(at, bytes);
        Ok(at)
    }

    /// Frees what [`allocate`](Self::allocate) returned.
    ///
    /// # Errors
    /// [`TagError::Outside`] for any other address.
    pub fn free(&self, address: u64) -> Result<(), TagError> {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut length) = blocks.used.remove(&address) else {
            return Err(TagError::Outside { address, bytes: 0 });
        };
        let mut start = address;
        if let Some(after) = blocks.free.remove(&(start + length)) {
            length += after;
        }
        let before = blocks.free.range(..start).next_back();
        if let Some((&before, &bytes)) = before
            && before + bytes == start
        {
            blocks.free.remove(&before);
            start = before;
            length += bytes;
        }
        blocks.free.insert(start, length);
        Ok(())
    }

    /// Puts a value into the tag, and returns where it is.
    ///
    /// # Errors
    /// [`TagError::Full`].
    pub fn put<T: IntoBytes + Immutable>(&self, value: T) -> Result<In<T>, TagError> {
        let address = self.allocate(size_of::<T>(), align_of::<T>())?;
        self.write_bytes(address, value.as_bytes())?;
        Ok(In::at(address))
    }

    /// Puts bytes into the tag.
    ///
    /// # Errors
    /// [`TagError::Full`].
    pub fn put_bytes(&self, bytes: &[u8]) -> Result<BytesIn, TagError> {
        let address = self.allocate(bytes.len(), 1)?;
        self.write_bytes(address, bytes)?;
        Ok(BytesIn {
            address,
            length: bytes.len() as u64,
        })
    }

    /// Copies a value out.
    ///
    /// # Errors
    /// [`TagError::Outside`] if it is not in this tag.
    pub fn get<T: FromBytes + IntoBytes>(&self, place: In<T>) -> Result<T, TagError> {
        let mut value = T::new_zeroed();
        self.read_bytes(place.address, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Replaces a value.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn set<T: IntoBytes + Immutable>(&self, place: In<T>, value: T) -> Result<(), TagError> {
        self.write_bytes(place.address, value.as_bytes())
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn get_bytes(&self, place: BytesIn) -> Result<Vec<u8>, TagError> {
        self.check(place.address, place.length)?;
        let mut bytes = vec![0; place.length as usize];
        self.read_bytes(place.address, &mut bytes)?;
        Ok(bytes)
    }

    fn read_bytes(&self, address: u64, into: &mut [u8]) -> Result<(), TagError> {
        self.check(address, into.len() as u64)?;
        // SAFETY: within the tag, to which there is no reference; compartments may write
        // meanwhile, and any bytes will do.
        unsafe { copy_shared(address as *const u8, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    fn write_bytes(&self, address: u64, bytes: &[u8]) -> Result<(), TagError> {
        self.check(address, bytes.len() as u64)?;
        // SAFETY: as above.
        unsafe { copy_shared(bytes.as_ptr(), address as *mut u8, bytes.len()) };
        Ok(())
    }
}

impl Drop for Tag {
    fn drop(&mut self) {
        // Compartments that have the tag borrow it, so none has it any more.
        // SAFETY: the tag's own memory.
        let result = unsafe { libc::munmap(self.start as *mut _, self.bytes as usize) };
        if result == 0 {
            let mut addresses = ADDRESSES.lock().unwrap_or_else(PoisonError::into_inner);
            addresses.live.remove(&self.start);
            addresses.free.push((self.start, self.bytes));
        }
    }
}

/// Where a value is in a tag: plain data, which can be passed to a compartment.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct In<T> {
    address: u64,
    of: PhantomData<T>,
}

impl<T> Clone for In<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for In<T> {}

impl<T> In<T> {
    fn at(address: u64) -> Self {
        Self {
            address,
            of: PhantomData,
        }
    }

    /// The address, for C.
    #[must_use]
    pub fn address(self) -> u64 {
        self.address
    }
}

/// Whether a compartment may use an address as one in a tag. What it has no grant for faults.
fn is_in_tags(address: u64, bytes: u64) -> bool {
    inside::is_inside()
        && address >= TAGS_START
        && address
            .checked_add(bytes)
            .is_some_and(|end| end <= TAGS_END)
}

impl<T: FromBytes + IntoBytes + Immutable> In<T> {
    /// Reads the value, inside a compartment that has the tag.
    ///
    /// # Panics
    /// Outside a compartment, where [`Tag::get`] does it, and for what is no address of a
    /// tag. Without the grant the compartment ends with a fault.
    #[must_use]
    pub fn read(self) -> T {
        assert!(is_in_tags(self.address, size_of::<T>() as u64));
        let mut value = T::new_zeroed();
        let into = value.as_mut_bytes();
        // SAFETY: the addresses of tags hold nothing else; others may write meanwhile, and
        // any bytes will do.
        unsafe { copy_shared(self.address as *const u8, into.as_mut_ptr(), into.len()) };
        value
    }

    /// Writes the value, inside a compartment that may write to the tag.
    ///
    /// # Panics
    /// As [`read`](Self::read).
    pub fn write(self, value: T) {
        assert!(is_in_tags(self.address, size_of::<T>() as u64));
        let from = value.as_bytes();
        // SAFETY: as above.
        unsafe { copy_shared(from.as_ptr(), self.address as *mut u8, from.len()) };
    }
}

/// Where bytes are in a tag: plain data, which can be passed to a compartment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BytesIn {
    address: u64,
    length: u64,
}

impl BytesIn {
    /// The first address, for C.
    #[must_use]
    pub fn address(self) -> u64 {
        self.address
    }

    /// How many.
    #[must_use]
    pub fn len(self) -> usize {
        self.length as usize
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.length == 0
    }

    /// Copies the bytes, inside a compartment that has the tag.
    ///
    /// # Panics
    /// As [`In::read`].
    #[must_use]
    pub fn read(self) -> Vec<u8> {
        assert!(is_in_tags(self.address, self.length));
        let mut bytes = vec![0; self.len()];
        // SAFETY: as for `In`.
        unsafe { copy_shared(self.address as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        bytes
    }

    /// Replaces the first bytes, inside a compartment that may write to the tag.
    ///
    /// # Panics
    /// As [`In::read`], and when there are more than fit.
    pub fn write(self, bytes: &[u8]) {
        assert!(is_in_tags(self.address, self.length) && bytes.len() <= self.len());
        // SAFETY: as for `In`.
        unsafe { copy_shared(bytes.as_ptr(), self.address as *mut u8, bytes.len()) };
    }
}

/// Inside a compartment: allocates in the tag whose first address is `tag`, which it must
/// have with [`Grant::ReadWrite`]. `None` if the tag is full. One request to the guard.
#[must_use]
pub fn allocate_inside(tag: u64, bytes: usize) -> Option<BytesIn> {
    let address = inside::ask(
        inside::request::TAG_ALLOCATE,
        [tag, bytes as u64, GRAIN, 0, 0],
    );
    is_in_tags(address, bytes as u64).then_some(BytesIn {
        address,
        length: bytes as u64,
    })
}

/// Inside a compartment: frees what [`allocate_inside`] returned.
pub fn free_inside(tag: u64, place: BytesIn) {
    inside::ask(inside::request::TAG_FREE, [tag, place.address, 0, 0, 0]);
}
