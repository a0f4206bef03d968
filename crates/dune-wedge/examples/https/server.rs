//! The server: TLS, requests one after the other on a connection, files.

use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use dune_wedge::{Compartment, Pool};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::sign::{CertifiedKey, SigningKey, SingleCertAndKey};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::http::{self, LONGEST_REQUEST, Request};
use crate::signer::{LockedKey, Vault};

/// The most of a request that is read.
const BUFFER: usize = 16 << 10;
const LONGEST_KEY: usize = 128;
/// Compartments that are kept for requests.
const POOLED: usize = 8;

type Parse = fn(&[u8]) -> Vec<u8>;

/// Where requests are read.
pub(crate) enum Parsing {
    /// In the process, as servers do.
    InProcess(Parse),
    /// In a compartment each.
    Compartments(Pool<'static>, Planted),
}

/// Whether the bug is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Planted {
    Yes,
    No,
}

impl Parsing {
    pub(crate) fn in_process(planted: Planted) -> Self {
        Self::InProcess(match planted {
            Planted::Yes => http::encode::<true>,
            Planted::No => http::encode::<false>,
        })
    }

    pub(crate) fn in_compartments(planted: Planted) -> Self {
        let make = || Compartment::builder().memory(1 << 20).build();
        Self::Compartments(Pool::new(POOLED, make), planted)
    }

    fn parse(&self, input: &[u8]) -> Option<Request> {
        let encoded = match self {
            Self::InProcess(parse) => parse(input),
            Self::Compartments(pool, planted) => {
                let mut compartment = pool.take().ok()?;
                let result = match planted {
                    Planted::Yes => {
                        compartment.run_bytes(http::encode::<true>, input, LONGEST_REQUEST)
                    }
                    Planted::No => {
                        compartment.run_bytes(http::encode::<false>, input, LONGEST_REQUEST)
                    }
                };
                result
                    .inspect_err(|error| eprintln!("a request was refused: {error}"))
                    .ok()?
            }
        };
        http::decode(&encoded)
    }
}

/// The private key, and who may use it.
pub(crate) enum Key {
    /// In the process's memory, as servers have it.
    InProcess(Vec<u8>),
    /// In a tag of the signing compartment.
    Locked(Arc<Vault>),
}

/// What the server keeps in one piece. Where allocations lie is luck, and attackers have time
/// to wait for it; here the key of a server in one piece lies behind the buffer every time.
#[repr(C)]
struct Memory {
    buffer: [u8; BUFFER],
    key: [u8; LONGEST_KEY],
}

pub(crate) struct Server {
    memory: Box<Memory>,
    config: Arc<ServerConfig>,
    parsing: Parsing,
    folder: PathBuf,
}

/// Whether the client has gone without a word.
fn hung_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | BrokenPipe | ConnectionReset)
}

impl Server {
    pub(crate) fn new(
        parsing: Parsing,
        key: Key,
        certificate: &[u8],
        folder: &Path,
    ) -> Result<Self, rustls::Error> {
        let mut memory = Box::new(Memory {
            buffer: [0; BUFFER],
            key: [0; LONGEST_KEY],
        });
        let signing: Arc<dyn SigningKey> = match &key {
            Key::InProcess(bytes) => {
                let kept = memory.key.get_mut(..bytes.len());
                kept.ok_or(rustls::Error::General("the key is too long".to_owned()))?
                    .copy_from_slice(bytes);
                let bytes = PrivatePkcs8KeyDer::from(bytes.as_slice());
                rustls::crypto::ring::sign::any_eddsa_type(&bytes)?
            }
            Key::Locked(vault) => Arc::new(LockedKey(Arc::clone(vault))),
        };
        let chain = vec![CertificateDer::from(certificate.to_vec())];
        let certified = CertifiedKey::new(chain, signing);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
        Ok(Self {
            memory,
            config: Arc::new(config),
            parsing,
            folder: folder.to_owned(),
        })
    }

    /// Serves a connection until the client has had enough; returns the number of requests.
    pub(crate) fn serve(&mut self, stream: impl Read + Write) -> io::Result<u32> {
        let connection =
            ServerConnection::new(Arc::clone(&self.config)).map_err(io::Error::other)?;
        let mut tls = StreamOwned::new(connection, stream);
        let mut served = 0;
        loop {
            let length = match tls.read(&mut self.memory.buffer) {
                Ok(0) => return Ok(served),
                Ok(length) => length,
                Err(error) if hung_up(&error) => return Ok(served),
                Err(error) => return Err(error),
            };
            let input = self.memory.buffer.get(..length).unwrap_or_default();
            let request = self.parsing.parse(input);
            served += 1;
            let goes_on = request.as_ref().is_some_and(|request| request.keep_alive);
            let (status, body) = self.answer(request);
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            tls.write_all(head.as_bytes())?;
            tls.write_all(&body)?;
            tls.flush()?;
            if !goes_on {
                tls.conn.send_close_notify();
                // The client may be gone by now.
                let _ = tls.flush();
                return Ok(served);
            }
        }
    }

    fn answer(&self, request: Option<Request>) -> (&'static str, Vec<u8>) {
        let Some(request) = request else {
            return ("400 Bad Request", Vec::new());
        };
        if let Some(echo) = request.echo {
            return ("200 OK", echo);
        }
        // Checked here, whatever the parser made of it.
        let path = Path::new(request.path.trim_start_matches('/'));
        let is_plain = path
            .components()
            .all(|component| matches!(component, Component::Normal(_)));
        match std::fs::read(self.folder.join(path)) {
            Ok(contents) if is_plain => ("200 OK", contents),
            _ => ("404 Not Found", Vec::new()),
        }
    }
}
