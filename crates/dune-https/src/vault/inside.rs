//! What runs in the compartment that has the keys: the only code that ever sees one.

use dune_wedge::{BytesIn, In};
use ring::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::agreement::{self, EphemeralPrivateKey, UnparsedPublicKey, X25519};
use ring::hmac;
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What the compartment is asked to do. In front of each input.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Order {
    pub(super) operation: u64,
    /// What is there of an extraction, or the number of a record.
    pub(super) number: u64,
    pub(super) private: BytesIn,
    pub(super) one: In<Slot>,
    pub(super) two: In<Slot>,
    pub(super) out: In<Slot>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Operation {
    Sign,
    Exchange,
    Extract,
    Expand,
    Finish,
    Seal,
    Open,
}

impl Operation {
    const ALL: [Self; 7] = [
        Self::Sign,
        Self::Exchange,
        Self::Extract,
        Self::Expand,
        Self::Finish,
        Self::Seal,
        Self::Open,
    ];
}

pub(super) const HAS_SALT: u64 = 1;
pub(super) const HAS_SECRET: u64 = 2;

/// The output of SHA-256, which both cipher suites use.
const HASH: usize = 32;

/// A secret, and what it may be used for.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Slot {
    purpose: u32,
    length: u32,
    bytes: [u8; HASH],
}

/// For deriving others.
const SECRET: u32 = 1;
/// For the checksum that ends a handshake.
const FINISHED: u32 = 2;
/// For records.
const KEY: u32 = 3;
const IV: u32 = 4;

impl core::fmt::Debug for Slot {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_tuple("Slot").field(&self.purpose).finish()
    }
}

impl Slot {
    fn new(purpose: u32, secret: &[u8]) -> Option<Self> {
        let mut bytes = [0; HASH];
        bytes.get_mut(..secret.len())?.copy_from_slice(secret);
        let length = secret.len() as u32;
        Some(Self {
            purpose,
            length,
            bytes,
        })
    }

    /// The secret, if it is for that.
    fn of(&self, purpose: u32) -> Option<&[u8]> {
        let bytes = self.bytes.get(..self.length as usize)?;
        (self.purpose == purpose).then_some(bytes)
    }
}

/// Does what the input says. Nothing comes back if it cannot be done.
pub(super) fn work(input: &[u8]) -> Vec<u8> {
    let Ok((order, payload)) = Order::read_from_prefix(input) else {
        return Vec::new();
    };
    perform(&order, payload).unwrap_or_default()
}

fn perform(order: &Order, payload: &[u8]) -> Option<Vec<u8>> {
    let done = || Some(vec![1]);
    let operation = Operation::ALL
        .into_iter()
        .find(|operation| *operation as u64 == order.operation)?;
    match operation {
        Operation::Sign => {
            let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&order.private.read()).ok()?;
            Some(pair.sign(payload).as_ref().to_vec())
        }
        Operation::Exchange => {
            let random = SystemRandom::new();
            let own = EphemeralPrivateKey::generate(&X25519, &random).ok()?;
            let public = own.compute_public_key().ok()?;
            let theirs = UnparsedPublicKey::new(&X25519, payload);
            let secret =
                agreement::agree_ephemeral(own, &theirs, |secret| Slot::new(SECRET, secret));
            order.out.write(secret.ok()??);
            Some(public.as_ref().to_vec())
        }
        Operation::Extract => {
            let given = |flag, place: In<Slot>| match order.number & flag {
                0 => Slot::new(SECRET, &[0; HASH]),
                _ => Some(place.read()),
            };
            let (salt, secret) = (given(HAS_SALT, order.one)?, given(HAS_SECRET, order.two)?);
            let tag = checksum(salt.of(SECRET)?, &[secret.of(SECRET)?]);
            order.out.write(Slot::new(SECRET, tag.as_ref())?);
            done()
        }
        Operation::Expand => {
            let (purpose, length) = label(payload)?;
            let secret = order.one.read();
            // One block is enough for every length that there is.
            let tag = checksum(secret.of(SECRET)?, &[payload, &[1]]);
            order
                .out
                .write(Slot::new(purpose, tag.as_ref().get(..length)?)?);
            done()
        }
        Operation::Finish => {
            let key = order.one.read();
            Some(checksum(key.of(FINISHED)?, &[payload]).as_ref().to_vec())
        }
        Operation::Seal => {
            let (key, nonce) = opened(order)?;
            let mut record = Vec::with_capacity(payload.len() + TAG);
            record.extend_from_slice(payload);
            let head = Aad::from(head(payload.len() + TAG));
            key.seal_in_place_append_tag(nonce, head, &mut record)
                .ok()?;
            Some(record)
        }
        Operation::Open => {
            let (key, nonce) = opened(order)?;
            let mut record = payload.to_vec();
            let head = Aad::from(head(payload.len()));
            let length = key.open_in_place(nonce, head, &mut record).ok()?.len();
            record.truncate(length);
            Some(record)
        }
    }
}

/// The length of the checksum of a record, in both cipher suites.
const TAG: usize = 16;

/// The additional data of a record (RFC 8446, 5.2): its header.
fn head(length: usize) -> [u8; 5] {
    const APPLICATION_DATA: u8 = 23;
    let [high, low] = (length as u16).to_be_bytes();
    [APPLICATION_DATA, 3, 3, high, low]
}

fn checksum(key: &[u8], parts: &[&[u8]]) -> hmac::Tag {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key));
    for part in parts {
        context.update(part);
    }
    context.sign()
}

/// What a secret that is derived by this description is for, and how long it is
/// (`HkdfLabel`, RFC 8446, 7.1).
fn label(info: &[u8]) -> Option<(u32, usize)> {
    let (&[high, low, length], rest) = info.split_first_chunk()?;
    let label = rest.get(..usize::from(length))?.strip_prefix(b"tls13 ")?;
    let purpose = match label {
        b"finished" => FINISHED,
        b"key" => KEY,
        b"iv" => IV,
        _ => SECRET,
    };
    Some((purpose, usize::from(u16::from_be_bytes([high, low]))))
}

/// Whether a secret that is derived by this description takes the place of the one that it is
/// derived from: the next secret of a direction (RFC 8446, 7.2).
pub(super) fn replaces(info: &[u8]) -> bool {
    const NEXT: &[u8] = b"\x11tls13 traffic upd";
    info.get(2..2 + NEXT.len()) == Some(NEXT)
}

/// The key of a record, and its nonce (RFC 8446, 5.3).
fn opened(order: &Order) -> Option<(LessSafeKey, Nonce)> {
    let (key, iv) = (order.one.read(), order.two.read());
    let key = key.of(KEY)?;
    // The suites' keys differ in length.
    let algorithm = match key.len() {
        16 => &aead::AES_128_GCM,
        32 => &aead::CHACHA20_POLY1305,
        _ => return None,
    };
    let mut nonce: [u8; aead::NONCE_LEN] = iv.of(IV)?.try_into().ok()?;
    let number = order.number.to_be_bytes();
    for (byte, more) in nonce.iter_mut().rev().zip(number.into_iter().rev()) {
        *byte ^= more;
    }
    let key = LessSafeKey::new(UnboundKey::new(algorithm, key).ok()?);
    Some((key, Nonce::assume_unique_for_key(nonce)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_say_what_a_secret_is_for() {
        let info = |length: u16, name: &str| {
            let mut info = length.to_be_bytes().to_vec();
            info.push(name.len() as u8);
            info.extend_from_slice(name.as_bytes());
            info.push(0);
            info
        };
        assert_eq!(label(&info(16, "tls13 key")), Some((KEY, 16)));
        assert_eq!(label(&info(12, "tls13 iv")), Some((IV, 12)));
        assert_eq!(label(&info(32, "tls13 finished")), Some((FINISHED, 32)));
        assert_eq!(label(&info(32, "tls13 traffic upd")), Some((SECRET, 32)));
        assert_eq!(label(&info(32, "key")), None);
        assert_eq!(label(b"\0"), None);
        assert!(replaces(&info(32, "tls13 traffic upd")));
        assert!(!replaces(&info(32, "tls13 finished")));
    }

    #[test]
    fn secrets_serve_their_purpose_alone() {
        let slot = Slot::new(KEY, &[7; 16]);
        let serves = |purpose| slot.is_some_and(|slot| slot.of(purpose).is_some());
        assert!(serves(KEY) && !serves(SECRET) && !serves(IV));
        assert!(Slot::new(SECRET, &[0; 33]).is_none());
    }
}
