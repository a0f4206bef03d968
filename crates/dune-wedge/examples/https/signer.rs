//! The server's private key, in a tag that one compartment can read: what it does is sign.

use std::sync::{Arc, Mutex, PoisonError};

use dune_wedge::{BytesIn, Compartment, Grant, StartError, Tag, TagError};
use ring::signature::Ed25519KeyPair;
use rustls::sign::{Signer, SigningKey};
use rustls::{Error, SignatureAlgorithm, SignatureScheme};
use zerocopy::{FromBytes, IntoBytes};

/// What signs: a compartment with the key, used by one handshake at a time.
#[derive(Debug)]
pub(crate) struct Vault {
    signer: Mutex<Compartment<'static>>,
    key: BytesIn,
}

/// Why there is no vault.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VaultError {
    #[error(transparent)]
    Tag(#[from] TagError),
    #[error(transparent)]
    Start(#[from] StartError),
}

impl Vault {
    /// Moves a key (PKCS #8, Ed25519) into a tag of its own; what was passed is overwritten.
    pub(crate) fn lock(mut key: Vec<u8>) -> Result<Arc<Self>, VaultError> {
        // For as long as the server runs.
        let tag: &'static Tag = Box::leak(Box::new(Tag::new(key.len())?));
        let place = tag.put_bytes(&key)?;
        key.fill(0);
        std::hint::black_box(&mut key);
        let signer = Compartment::builder().tag(tag, Grant::Read).build()?;
        Ok(Arc::new(Self {
            signer: Mutex::new(signer),
            key: place,
        }))
    }

    /// Where the key is: no secret.
    pub(crate) fn place(&self) -> BytesIn {
        self.key
    }
}

/// Runs in the compartment: the key's place, then the message.
fn sign(input: &[u8]) -> Vec<u8> {
    let Ok((place, message)) = BytesIn::read_from_prefix(input) else {
        return Vec::new();
    };
    Ed25519KeyPair::from_pkcs8_maybe_unchecked(&place.read())
        .map(|pair| pair.sign(message).as_ref().to_vec())
        .unwrap_or_default()
}

/// The vault as rustls wants it.
#[derive(Debug)]
pub(crate) struct LockedKey(pub(crate) Arc<Vault>);

impl SigningKey for LockedKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        offered
            .contains(&SignatureScheme::ED25519)
            .then(|| Box::new(LockedKey(Arc::clone(&self.0))) as Box<dyn Signer>)
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ED25519
    }
}

impl Signer for LockedKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        const SIGNATURE: usize = 64;
        let input = [self.0.key.as_bytes(), message].concat();
        let mut signer = self.0.signer.lock().unwrap_or_else(PoisonError::into_inner);
        let signature = signer
            .run_bytes(sign, &input, SIGNATURE)
            .map_err(|error| Error::General(error.to_string()))?;
        if signature.len() != SIGNATURE {
            return Err(Error::General("the key is not one of Ed25519".to_owned()));
        }
        Ok(signature)
    }

    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::ED25519
    }
}
