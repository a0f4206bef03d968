//! The server: TLS, requests one after the other on a connection, files.

use std::fmt;
use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use dune_wedge::{Compartment, Pool};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::sign::{CertifiedKey, SigningKey, SingleCertAndKey};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::http::{self, LONGEST_REQUEST, Request};
use crate::process;
use crate::provider::{self, LockedKey};
use crate::vault::{Vault, VaultError};

/// The most of a request that is read.
const BUFFER: usize = 16 << 10;
const LONGEST_KEY: usize = 128;
/// Compartments that are kept for requests.
const POOLED: usize = 8;

type Parse = fn(&[u8]) -> Vec<u8>;

/// Where requests are read.
#[derive(Debug)]
pub enum Parsing {
    /// In the process, as servers do.
    InProcess,
    /// In a compartment each, from a pool.
    Compartments(Pool<'static>),
    /// In a process each, made for it by `fork`.
    Processes,
}

impl Parsing {
    /// A pool of compartments.
    #[must_use]
    pub fn in_compartments() -> Self {
        let make = || Compartment::builder().memory(1 << 20).build();
        Self::Compartments(Pool::new(POOLED, make))
    }
}

/// Whether the parser has its bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// It has.
    Yes,
    /// It has not.
    No,
}

impl Planted {
    fn parser(self) -> Parse {
        match self {
            Self::Yes => http::encode::<true>,
            Self::No => http::encode::<false>,
        }
    }
}

/// The keys, and who may use them.
#[derive(Debug)]
enum Keys {
    /// In the process's memory, as servers have them: the private key.
    InProcess(Vec<u8>),
    /// In a tag of one compartment.
    Locked(Arc<Vault>),
}

/// What the server keeps in one piece. Where allocations lie is luck, and attackers have time
/// to wait for it; here the private key of a server in one piece lies behind the buffer every
/// time. What the connection keeps is allocated afterwards, and lies behind both.
#[repr(C)]
struct Memory {
    buffer: [u8; BUFFER],
    key: [u8; LONGEST_KEY],
}

/// A server of a folder.
pub struct Server {
    keys: Keys,
    config: Arc<ServerConfig>,
    parsing: Parsing,
    planted: Planted,
    folder: PathBuf,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Server");
        debug.field("parsing", &self.parsing);
        debug.field("folder", &self.folder).finish_non_exhaustive()
    }
}

/// Why a server could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The certificate or the key is none that rustls takes.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    /// There is no compartment for the keys.
    #[error(transparent)]
    Vault(#[from] VaultError),
}

/// Whether the client has gone without a word.
fn hung_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | BrokenPipe | ConnectionReset)
}

impl Server {
    /// A server in compartments: keys (PKCS #8, Ed25519) in one, each request in another.
    ///
    /// # Errors
    /// [`ServerError`]
    pub fn split(
        certificate: &[u8],
        key: Vec<u8>,
        planted: Planted,
        folder: &Path,
    ) -> Result<Self, ServerError> {
        let vault = Vault::lock(key)?;
        let signing = Arc::new(LockedKey(Arc::clone(&vault)));
        let config = configuration(certificate, signing, provider::locked(&vault))?;
        Ok(Self {
            keys: Keys::Locked(vault),
            config,
            parsing: Parsing::in_compartments(),
            planted,
            folder: folder.to_owned(),
        })
    }

    /// A server as servers are: keys in the process, and requests read where `parsing` says.
    ///
    /// # Errors
    /// [`ServerError`]
    pub fn whole(
        certificate: &[u8],
        key: Vec<u8>,
        parsing: Parsing,
        planted: Planted,
        folder: &Path,
    ) -> Result<Self, ServerError> {
        if key.len() > LONGEST_KEY {
            return Err(rustls::Error::General("the key is too long".to_owned()).into());
        }
        let bytes = PrivatePkcs8KeyDer::from(key.as_slice());
        let signing = rustls::crypto::ring::sign::any_eddsa_type(&bytes)?;
        let config = configuration(certificate, signing, provider::in_process())?;
        Ok(Self {
            keys: Keys::InProcess(key),
            config,
            parsing,
            planted,
            folder: folder.to_owned(),
        })
    }

    /// Where the keys of a server in compartments are, as addresses: no secret.
    #[must_use]
    pub fn places_of_keys(&self) -> Option<core::ops::Range<u64>> {
        match &self.keys {
            Keys::InProcess(_) => None,
            Keys::Locked(vault) => Some(vault.places()),
        }
    }

    /// Serves a connection until the client has had enough; returns the number of requests.
    ///
    /// # Errors
    /// Those of the stream and of TLS.
    pub fn serve(&mut self, stream: impl Read + Write) -> io::Result<u32> {
        let mut memory = self.memory();
        if let Keys::Locked(vault) = &self.keys {
            vault.begin();
        }
        let connection =
            ServerConnection::new(Arc::clone(&self.config)).map_err(io::Error::other)?;
        let mut tls = StreamOwned::new(connection, stream);
        let exchanged = self.exchange(&mut tls, &mut memory.buffer);
        if let Ok((_, End::Ours)) = exchanged {
            tls.conn.send_close_notify();
            // The client may be gone by now.
            let _ = tls.flush();
        }
        if let Keys::Locked(vault) = &self.keys {
            // Forgets this one.
            vault.begin();
        }
        exchanged.map(|(served, _)| served)
    }

    /// As [`serve`](Self::serve), without TLS.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn serve_plain(&mut self, mut stream: impl Read + Write) -> io::Result<u32> {
        let mut memory = self.memory();
        self.exchange(&mut stream, &mut memory.buffer)
            .map(|(served, _)| served)
    }

    fn memory(&self) -> Box<Memory> {
        let mut memory = Box::new(Memory {
            buffer: [0; BUFFER],
            key: [0; LONGEST_KEY],
        });
        if let Keys::InProcess(key) = &self.keys
            && let Some(place) = memory.key.get_mut(..key.len())
        {
            place.copy_from_slice(key);
        }
        memory
    }

    fn exchange(
        &self,
        stream: &mut (impl Read + Write),
        buffer: &mut [u8; BUFFER],
    ) -> io::Result<(u32, End)> {
        let mut served = 0;
        loop {
            let length = match read_request(stream, buffer) {
                Ok(0) => return Ok((served, End::Theirs)),
                Ok(length) => length,
                Err(error) if hung_up(&error) => return Ok((served, End::Theirs)),
                Err(error) => return Err(error),
            };
            let input = buffer.get(..length).unwrap_or_default();
            let request = self.parse(input);
            served += 1;
            let goes_on = request.as_ref().is_some_and(|request| request.keep_alive);
            let (status, body) = self.answer(request);
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            let mut answer = head.into_bytes();
            answer.extend_from_slice(&body);
            stream.write_all(&answer)?;
            stream.flush()?;
            if let Keys::Locked(vault) = &self.keys
                && vault.has_failed()
            {
                return Err(io::Error::other("the compartment with the keys failed"));
            }
            if !goes_on {
                return Ok((served, End::Ours));
            }
        }
    }

    fn parse(&self, input: &[u8]) -> Option<Request> {
        let parser = self.planted.parser();
        let encoded = match &self.parsing {
            Parsing::InProcess => parser(input),
            Parsing::Processes => process::parse(parser, input)
                .inspect_err(|error| eprintln!("a request was not read: {error}"))
                .ok()?,
            Parsing::Compartments(pool) => {
                let mut compartment = pool.take().ok()?;
                // A function that runs in a compartment captures nothing.
                let result = match self.planted {
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
        if !is_plain {
            return ("404 Not Found", Vec::new());
        }
        match std::fs::read(self.folder.join(path)) {
            Ok(contents) => ("200 OK", contents),
            Err(_) => ("404 Not Found", Vec::new()),
        }
    }
}

/// Who ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Ours,
    Theirs,
}

/// Reads until the head of a request is there whole, or the buffer is full, or nothing more
/// comes; of a body what came with it.
fn read_request(stream: &mut impl Read, buffer: &mut [u8; BUFFER]) -> io::Result<usize> {
    let mut length = 0;
    while length < BUFFER {
        let more = stream.read(buffer.get_mut(length..).unwrap_or_default())?;
        length += more;
        let so_far = buffer.get(..length).unwrap_or_default();
        if more == 0 || so_far.windows(4).any(|four| four == b"\r\n\r\n") {
            break;
        }
    }
    Ok(length)
}

fn configuration(
    certificate: &[u8],
    signing: Arc<dyn SigningKey>,
    provider: rustls::crypto::CryptoProvider,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let chain = vec![CertificateDer::from(certificate.to_vec())];
    let certified = CertifiedKey::new(chain, signing);
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    // What a session could be resumed with is a secret that outlives its connection.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(Arc::new(config))
}
