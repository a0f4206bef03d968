//! rustls's cryptography with keys that are elsewhere: what rustls takes for secrets are
//! handles of the vault's.
//!
//! A failure of the vault becomes a handle that leads nowhere, and with it a connection that
//! fails.

use std::sync::Arc;

use rustls::crypto::cipher::{
    AeadKey, InboundOpaqueMessage, InboundPlainMessage, Iv, MessageDecrypter, MessageEncrypter,
    OutboundOpaqueMessage, OutboundPlainMessage, PrefixedPayload, Tls13AeadAlgorithm,
    UnsupportedOperationError,
};
use rustls::crypto::tls13::{Hkdf, HkdfExpander, OkmBlock, OutputLengthError};
use rustls::crypto::{
    ActiveKeyExchange, CompletedKeyExchange, CryptoProvider, SharedSecret, SupportedKxGroup, hmac,
    ring as by_ring,
};
use rustls::sign::{Signer, SigningKey};
use rustls::{
    ConnectionTrafficSecrets, ContentType, Error, NamedGroup, ProtocolVersion, SignatureAlgorithm,
    SignatureScheme, SupportedCipherSuite, Tls13CipherSuite,
};

use crate::vault::{Handle, Vault};

/// Length of the secrets of the key schedule: of SHA-256.
const HASH: usize = 32;

/// The cipher suites and the key exchange that the server offers, done by rustls's own
/// provider.
pub(crate) fn in_process() -> CryptoProvider {
    use by_ring::cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_CHACHA20_POLY1305_SHA256};
    CryptoProvider {
        cipher_suites: vec![TLS13_AES_128_GCM_SHA256, TLS13_CHACHA20_POLY1305_SHA256],
        kx_groups: vec![by_ring::kx_group::X25519],
        ..by_ring::default_provider()
    }
}

/// The same, done by a vault. Kept for good, as rustls wants it.
pub(crate) fn locked(vault: &Arc<Vault>) -> CryptoProvider {
    let keeper: &'static Keeper = Box::leak(Box::new(Keeper(Arc::clone(vault))));
    let mut provider = in_process();
    for suite in &mut provider.cipher_suites {
        let SupportedCipherSuite::Tls13(known) = *suite;
        let aead = Box::leak(Box::new(Aead {
            vault: Arc::clone(vault),
            key_length: known.aead_alg.key_len(),
        }));
        *suite = SupportedCipherSuite::Tls13(Box::leak(Box::new(Tls13CipherSuite {
            common: rustls::crypto::CipherSuiteCommon {
                suite: known.common.suite,
                hash_provider: known.common.hash_provider,
                confidentiality_limit: known.common.confidentiality_limit,
            },
            hkdf_provider: keeper,
            aead_alg: aead,
            quic: None,
        })));
    }
    provider.kx_groups = vec![keeper];
    provider
}

#[derive(Debug)]
struct Keeper(Arc<Vault>);

/// In place of a checksum that could not be made: one that nobody can send.
fn unforeseeable() -> Vec<u8> {
    let mut bytes = vec![0; HASH];
    if by_ring::default_provider()
        .secure_random
        .fill(&mut bytes)
        .is_err()
    {
        std::process::abort();
    }
    bytes
}

/// The bytes that stand for a secret, or for one that could not be had.
fn stand_in<const N: usize>(handle: Option<Handle>) -> [u8; N] {
    handle.map_or([0; N], Handle::bytes)
}

impl Keeper {
    /// With a secret that is the expander's own.
    fn expander(&self, own: Option<Handle>) -> Box<dyn HkdfExpander> {
        Box::new(Expander {
            vault: Arc::clone(&self.0),
            secret: own,
            own,
        })
    }
}

impl Hkdf for Keeper {
    fn extract_from_zero_ikm(&self, salt: Option<&[u8]>) -> Box<dyn HkdfExpander> {
        self.expander(self.0.extract(salt.map(Handle::of), None))
    }

    fn extract_from_secret(&self, salt: Option<&[u8]>, secret: &[u8]) -> Box<dyn HkdfExpander> {
        let secret = Some(Handle::of(secret));
        self.expander(self.0.extract(salt.map(Handle::of), secret))
    }

    fn expander_for_okm(&self, okm: &OkmBlock) -> Box<dyn HkdfExpander> {
        Box::new(Expander {
            vault: Arc::clone(&self.0),
            secret: Some(Handle::of(okm.as_ref())),
            own: None,
        })
    }

    fn hmac_sign(&self, key: &OkmBlock, message: &[u8]) -> hmac::Tag {
        let tag = self.0.finish(Handle::of(key.as_ref()), message);
        hmac::Tag::new(&tag.unwrap_or_else(unforeseeable))
    }
}

struct Expander {
    vault: Arc<Vault>,
    secret: Option<Handle>,
    own: Option<Handle>,
}

impl Drop for Expander {
    fn drop(&mut self) {
        if let Some(own) = self.own {
            self.vault.release(own);
        }
    }
}

impl Expander {
    fn expand(&self, info: &[&[u8]]) -> Option<Handle> {
        self.vault.expand(self.secret?, &info.concat())
    }
}

impl HkdfExpander for Expander {
    fn expand_slice(&self, info: &[&[u8]], output: &mut [u8]) -> Result<(), OutputLengthError> {
        // A key or an IV: for both a handle has room.
        let handle = stand_in::<HASH>(self.expand(info));
        let part = handle.get(..output.len()).ok_or(OutputLengthError)?;
        output.copy_from_slice(part);
        Ok(())
    }

    fn expand_block(&self, info: &[&[u8]]) -> OkmBlock {
        OkmBlock::new(&stand_in::<HASH>(self.expand(info)))
    }

    fn hash_len(&self) -> usize {
        HASH
    }
}

impl SupportedKxGroup for Keeper {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        // What clients do. A secret half of a key pair would have to be kept meanwhile.
        Err(Error::General(
            "a server completes the exchange at once".to_owned(),
        ))
    }

    fn start_and_complete(&self, peer: &[u8]) -> Result<CompletedKeyExchange, Error> {
        let exchanged = self.0.exchange(peer);
        let (public, secret) = exchanged.ok_or(Error::General("no key exchange".to_owned()))?;
        Ok(CompletedKeyExchange {
            group: NamedGroup::X25519,
            pub_key: public,
            secret: SharedSecret::from(secret.bytes::<HASH>().as_slice()),
        })
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::X25519
    }
}

struct Aead {
    vault: Arc<Vault>,
    key_length: usize,
}

impl Aead {
    fn records(&self, key: &AeadKey, iv: &Iv) -> Box<Records> {
        Box::new(Records {
            vault: Arc::clone(&self.vault),
            key: Handle::of(key.as_ref()),
            iv: Handle::of(iv.as_ref()),
        })
    }
}

impl Tls13AeadAlgorithm for Aead {
    fn encrypter(&self, key: AeadKey, iv: Iv) -> Box<dyn MessageEncrypter> {
        self.records(&key, &iv)
    }

    fn decrypter(&self, key: AeadKey, iv: Iv) -> Box<dyn MessageDecrypter> {
        self.records(&key, &iv)
    }

    fn key_len(&self) -> usize {
        self.key_length
    }

    fn extract_keys(
        &self,
        _: AeadKey,
        _: Iv,
    ) -> Result<ConnectionTrafficSecrets, UnsupportedOperationError> {
        Err(UnsupportedOperationError)
    }
}

/// One direction of a connection.
struct Records {
    vault: Arc<Vault>,
    key: Handle,
    iv: Handle,
}

impl Drop for Records {
    fn drop(&mut self) {
        self.vault.release(self.key);
        self.vault.release(self.iv);
    }
}

/// The checksum of a record, and its inner type.
const OVERHEAD: usize = 16 + 1;

impl MessageEncrypter for Records {
    fn encrypt(
        &mut self,
        message: OutboundPlainMessage<'_>,
        sequence: u64,
    ) -> Result<OutboundOpaqueMessage, Error> {
        let mut plain = Vec::with_capacity(message.payload.len() + 1);
        message.payload.copy_to_vec(&mut plain);
        plain.push(u8::from(message.typ));
        let record = self.vault.record(true, self.key, self.iv, sequence, &plain);
        // rustls takes it that encryption does not fail. A record that is none ends the
        // connection, and the server looks whether one was made.
        let record = record.unwrap_or_else(|| {
            self.vault.fail();
            Vec::new()
        });
        Ok(OutboundOpaqueMessage::new(
            ContentType::ApplicationData,
            ProtocolVersion::TLSv1_2,
            PrefixedPayload::from(record.as_slice()),
        ))
    }

    fn encrypted_payload_len(&self, length: usize) -> usize {
        length + OVERHEAD
    }
}

impl MessageDecrypter for Records {
    fn decrypt<'a>(
        &mut self,
        mut message: InboundOpaqueMessage<'a>,
        sequence: u64,
    ) -> Result<InboundPlainMessage<'a>, Error> {
        let (key, iv) = (self.key, self.iv);
        let plain = self
            .vault
            .record(false, key, iv, sequence, &message.payload);
        let plain = plain.ok_or(Error::DecryptError)?;
        let place = message.payload.get_mut(..plain.len());
        place.ok_or(Error::DecryptError)?.copy_from_slice(&plain);
        message.payload.truncate(plain.len());
        message.into_tls13_unpadded_message()
    }
}

/// The private key.
#[derive(Debug)]
pub(crate) struct LockedKey(pub(crate) Arc<Vault>);

impl SigningKey for LockedKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        offered
            .contains(&SignatureScheme::ED25519)
            .then(|| Box::new(Self(Arc::clone(&self.0))) as Box<dyn Signer>)
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ED25519
    }
}

impl Signer for LockedKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let signature = self.0.sign(message);
        signature.ok_or(Error::General("the key is not one of Ed25519".to_owned()))
    }

    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::ED25519
    }
}
