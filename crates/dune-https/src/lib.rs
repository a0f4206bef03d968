//! A small web server in parts: TLS 1.3 with rustls, HTTP/1.1 with keep-alive, static files.
//!
//! ```text
//!   the process                               compartments (crate dune-wedge)
//!   server    connections, files              http::encode   reads a request: one each
//!   provider  rustls's cryptography, by   ->  vault::inside  has the tag with all keys; signs,
//!   vault     handles of keys                                derives, encrypts, decrypts
//! ```
//!
//! **No key is in the process's memory**: neither the private key nor what a connection
//! derives (shared secret, traffic secrets, record keys). They are in a [`Tag`] that one
//! compartment has. rustls, which runs in the process, has a provider of cryptography whose
//! secrets are handles: numbers of places in the tag. The compartment hands out signatures,
//! public keys, checksums of the handshake and records, and no key: it decides by the labels of
//! the key schedule (RFC 8446, section 7.1) what a derived secret may be used for.
//!
//! **Each request is read in a compartment** that has nothing but the request, and is as new
//! each time.
//!
//! The same server can be had in one piece ([`Server::whole`]), and with a process for
//! each request ([`Parsing::Processes`]), to compare. `planted` puts a bug into the parser: it
//! believes the length that a request says its body has, as one that the world remembers did.
//!
//! Call [`start`] first in `main`.
//!
//! [`Tag`]: dune_wedge::Tag

mod client;
mod http;
mod process;
mod provider;
mod server;
mod vault;

pub use client::Client;
pub use http::LONGEST_ECHO;
pub use server::{Parsing, Planted, Server, ServerError};
pub use vault::VaultError;

/// A certificate for localhost, and its private key ([`localhost_key`]): no secret, because
/// they are in this repository.
pub const LOCALHOST: &[u8] = include_bytes!("../localhost.der");

/// The private key of [`LOCALHOST`], read from the repository: what is in constants of the
/// program is no secret from its compartments.
///
/// # Errors
/// Those of reading a file.
pub fn localhost_key() -> std::io::Result<Vec<u8>> {
    std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/localhost-key.der"))
}

/// Starts the runtime of compartments. First in `main`: global variables as they are now are
/// what compartments see.
///
/// # Errors
/// [`dune_wedge::StartError`]
pub fn start() -> Result<(), dune_wedge::StartError> {
    // What ring finds out of the CPU once: each compartment would do it again.
    let _ = ring::digest::digest(&ring::digest::SHA256, b"");
    dune_wedge::start()
}
