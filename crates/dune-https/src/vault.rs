//! All keys of a server, in a tag that one compartment can use.
//!
//! ```text
//!   tag:  private key | slot 1 | slot 2 | ...     each slot a secret, and what it is for
//! ```
//!
//! The process knows where they are, and names them by number.

mod inside;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dune_wedge::{BytesIn, Calls, Compartment, Grant, In, StartError, Tag, TagError};
use zerocopy::{FromZeros, IntoBytes};

use self::inside::{Operation, Order, Slot, work};

/// Secrets that one connection may have at a time. A handshake takes some twenty.
const SLOTS: usize = 64;
/// The most that comes out: a record.
const LARGEST_RECORD: usize = (16 << 10) + 256;

/// A compartment with the keys, used by one operation at a time, for one connection at a time.
#[derive(Debug)]
pub(crate) struct Vault {
    keeper: Mutex<Compartment<'static>>,
    tag: &'static Tag,
    private: BytesIn,
    slots: Vec<In<Slot>>,
    current: Mutex<Current>,
}

/// What there is of the connection that is served now.
#[derive(Debug, Default)]
struct Current {
    /// Its number; handles of others lead nowhere.
    connection: u32,
    /// Slots that are in use.
    used: Vec<u32>,
    /// A record could not be encrypted, so the connection is at its end.
    failed: bool,
}

/// The number of a secret: what the process has instead of the secret itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Handle {
    connection: u32,
    slot: u32,
}

impl Handle {
    const MARK: [u8; 4] = *b"slot";
    const NOWHERE: Self = Self {
        connection: 0,
        slot: u32::MAX,
    };

    /// The handle in as many bytes as rustls wants a secret to have.
    pub(crate) fn bytes<const N: usize>(self) -> [u8; N] {
        const { assert!(N >= 12) };
        let mut bytes = [0; N];
        let [connection, slot] = [self.connection, self.slot].map(u32::to_le_bytes);
        let all = [Self::MARK, connection, slot];
        for (to, from) in bytes.iter_mut().zip(all.as_flattened()) {
            *to = *from;
        }
        bytes
    }

    /// The handle that [`bytes`](Self::bytes) has made; of other bytes one that leads nowhere.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let word = |at| bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
        match (word(0), word(4), word(8)) {
            (Some(Self::MARK), Some(connection), Some(slot)) => Self {
                connection: u32::from_le_bytes(connection),
                slot: u32::from_le_bytes(slot),
            },
            _ => Self::NOWHERE,
        }
    }
}

/// Why there is no vault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VaultError {
    /// There was no memory for the keys.
    #[error(transparent)]
    Tag(#[from] TagError),
    /// There was no compartment.
    #[error(transparent)]
    Start(#[from] StartError),
}

impl Vault {
    /// Moves a private key (PKCS #8, Ed25519) into a tag of its own; what was passed is
    /// overwritten.
    pub(crate) fn lock(mut key: Vec<u8>) -> Result<Arc<Self>, VaultError> {
        // For as long as the server runs.
        let size = key.len() + (SLOTS + 1) * size_of::<Slot>();
        let tag: &'static Tag = Box::leak(Box::new(Tag::new(size)?));
        let private = tag.put_bytes(&key)?;
        key.fill(0);
        std::hint::black_box(&mut key);
        let slots = (0..SLOTS).map(|_| tag.put(Slot::new_zeroed()));
        let slots = slots.collect::<Result<_, _>>()?;
        let keeper = Compartment::builder()
            .tag(tag, Grant::ReadWrite)
            .calls(Calls::RANDOM)
            .memory(1 << 20)
            .build()?;
        Ok(Arc::new(Self {
            keeper: Mutex::new(keeper),
            tag,
            private,
            slots,
            current: Mutex::default(),
        }))
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a connection: forgets the secrets of the one before.
    pub(crate) fn begin(&self) {
        let mut current = self.current();
        for slot in core::mem::take(&mut current.used) {
            self.clear(slot);
        }
        current.connection = current.connection.wrapping_add(1);
        current.failed = false;
    }

    /// Forgets a secret.
    pub(crate) fn release(&self, handle: Handle) {
        let mut current = self.current();
        if handle.connection == current.connection
            && let Some(index) = current.used.iter().position(|slot| *slot == handle.slot)
        {
            current.used.swap_remove(index);
            self.clear(handle.slot);
        }
    }

    fn clear(&self, slot: u32) {
        if let Some(place) = self.slots.get(slot as usize) {
            // The place is in the tag.
            let _ = self.tag.set(*place, Slot::new_zeroed());
        }
    }

    /// Notes that the connection cannot go on.
    pub(crate) fn fail(&self) {
        self.current().failed = true;
    }

    /// Whether it cannot.
    pub(crate) fn has_failed(&self) -> bool {
        self.current().failed
    }

    /// Signs a message with the private key.
    pub(crate) fn sign(&self, message: &[u8]) -> Option<Vec<u8>> {
        self.ask(&self.order(Operation::Sign), message)
    }

    /// Makes a key pair of X25519 and a secret of it and somebody's public key: the own
    /// public key, and the secret.
    pub(crate) fn exchange(&self, public: &[u8]) -> Option<(Vec<u8>, Handle)> {
        let (handle, out) = self.free_slot()?;
        let order = self.order(Operation::Exchange);
        Some((self.ask(&Order { out, ..order }, public)?, handle))
    }

    /// HKDF-Extract (RFC 5869) of salt and secret; zeros for what is missing.
    pub(crate) fn extract(&self, salt: Option<Handle>, secret: Option<Handle>) -> Option<Handle> {
        let (handle, out) = self.free_slot()?;
        let mut order = self.order(Operation::Extract);
        order.out = out;
        if let Some(salt) = salt {
            order.one = self.slot(salt)?;
            order.number |= inside::HAS_SALT;
        }
        if let Some(secret) = secret {
            order.two = self.slot(secret)?;
            order.number |= inside::HAS_SECRET;
        }
        self.ask(&order, &[]).map(|_| handle)
    }

    /// HKDF-Expand-Label (RFC 8446, 7.1), as the label in `info` says.
    pub(crate) fn expand(&self, secret: Handle, info: &[u8]) -> Option<Handle> {
        let one = self.slot(secret)?;
        let order = self.order(Operation::Expand);
        if inside::replaces(info) {
            // The old one is not used any more.
            let out = one;
            return self.ask(&Order { one, out, ..order }, info).map(|_| secret);
        }
        let (handle, out) = self.free_slot()?;
        self.ask(&Order { one, out, ..order }, info).map(|_| handle)
    }

    /// HMAC of a message, by a key whose label says that it is for finishing a handshake.
    pub(crate) fn finish(&self, key: Handle, message: &[u8]) -> Option<Vec<u8>> {
        let one = self.slot(key)?;
        let order = self.order(Operation::Finish);
        self.ask(&Order { one, ..order }, message)
    }

    /// Encrypts or decrypts a record.
    pub(crate) fn record(
        &self,
        encrypts: bool,
        key: Handle,
        iv: Handle,
        sequence: u64,
        record: &[u8],
    ) -> Option<Vec<u8>> {
        let order = Order {
            one: self.slot(key)?,
            two: self.slot(iv)?,
            number: sequence,
            ..self.order(if encrypts {
                Operation::Seal
            } else {
                Operation::Open
            })
        };
        self.ask(&order, record)
    }

    fn slot(&self, handle: Handle) -> Option<In<Slot>> {
        let is_current = handle.connection == self.current().connection;
        let slot = self.slots.get(handle.slot as usize).copied();
        slot.filter(|_| is_current)
    }

    fn free_slot(&self) -> Option<(Handle, In<Slot>)> {
        let mut current = self.current();
        let is_free = |(number, _): &(u32, &In<Slot>)| !current.used.contains(number);
        let (slot, place) = (0..).zip(&self.slots).find(is_free)?;
        current.used.push(slot);
        let connection = current.connection;
        Some((Handle { connection, slot }, *place))
    }

    fn order(&self, operation: Operation) -> Order {
        // Places that an operation does not use are those of the first slot.
        let nowhere = self.slots.first().copied();
        let nowhere = nowhere.unwrap_or_else(In::new_zeroed);
        Order {
            operation: operation as u64,
            number: 0,
            private: self.private,
            one: nowhere,
            two: nowhere,
            out: nowhere,
        }
    }

    /// Has the compartment do something; `None` if it did not.
    fn ask(&self, order: &Order, payload: &[u8]) -> Option<Vec<u8>> {
        let input = [order.as_bytes(), payload].concat();
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        let output = keeper
            .run_bytes(work, &input, LARGEST_RECORD)
            .inspect_err(|error| eprintln!("the compartment with the keys: {error}"))
            .ok()?;
        (!output.is_empty()).then_some(output)
    }

    /// Where the private key and the secrets are: no secret. (The addresses are good for
    /// nothing without the tag.)
    pub(crate) fn places(&self) -> core::ops::Range<u64> {
        self.tag.start()..self.tag.start() + self.tag.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_survive_as_bytes_and_other_bytes_are_none() {
        let handle = Handle {
            connection: 3,
            slot: 7,
        };
        assert_eq!(Handle::of(&handle.bytes::<12>()), handle);
        assert_eq!(Handle::of(&handle.bytes::<32>()), handle);
        assert_eq!(Handle::of(&[0; 32]), Handle::NOWHERE);
        assert_eq!(Handle::of(b"slot"), Handle::NOWHERE);
    }
}
