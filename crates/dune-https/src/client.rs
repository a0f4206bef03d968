//! A client that checks the server's certificate, for tests and measurements.

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, KeyLog, RootCertStore, StreamOwned};

/// A connection to a server, encrypted or not.
pub struct Client<S> {
    stream: S,
    secrets: Arc<Secrets>,
}

impl<S> fmt::Debug for Client<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

/// The secrets of a connection, as the client derives them too.
#[derive(Debug, Default)]
struct Secrets(Mutex<Vec<Vec<u8>>>);

impl KeyLog for Secrets {
    fn log(&self, _: &str, _: &[u8], secret: &[u8]) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(secret.to_vec());
    }
}

impl<S: Read + Write> Client<StreamOwned<ClientConnection, S>> {
    /// Prepares a connection to localhost, with a certificate that is to be its own. The
    /// handshake comes with the first request.
    ///
    /// # Errors
    /// What rustls has to say against the certificate.
    pub fn connect(stream: S, certificate: &[u8]) -> io::Result<Self> {
        let mut roots = RootCertStore::empty();
        let certificate = CertificateDer::from(certificate.to_vec());
        roots.add(certificate).map_err(io::Error::other)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let secrets = Arc::new(Secrets::default());
        config.key_log = Arc::clone(&secrets) as Arc<dyn KeyLog>;
        let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
        let connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
        Ok(Self {
            stream: StreamOwned::new(connection, stream),
            secrets,
        })
    }
}

impl<S: Read + Write> Client<StreamOwned<ClientConnection, S>> {
    /// Changes the keys of the traffic in both directions, with the next request.
    ///
    /// # Errors
    /// As rustls has it: before the handshake is over.
    pub fn change_keys(&mut self) -> io::Result<()> {
        let changed = self.stream.conn.refresh_traffic_keys();
        changed.map_err(io::Error::other)
    }
}

impl<S: Read + Write> Client<S> {
    /// A connection without encryption.
    pub fn plain(stream: S) -> Self {
        Self {
            stream,
            secrets: Arc::default(),
        }
    }

    /// The secrets of the handshake and of the traffic in both directions, as far as there
    /// are any by now: what must be nobody else's.
    #[must_use]
    pub fn secrets(&self) -> Vec<Vec<u8>> {
        let all = self.secrets.0.lock();
        all.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The body of the answer to a `GET`.
    ///
    /// # Errors
    /// An answer other than 200, or no answer.
    pub fn get(&mut self, path: &str) -> io::Result<Vec<u8>> {
        self.ask(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes())
    }

    /// Sends a request as it is; the body of the answer.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn ask(&mut self, request: &[u8]) -> io::Result<Vec<u8>> {
        self.stream.write_all(request)?;
        self.stream.flush()?;
        let mut answer = vec![0; 4096];
        let mut length = 0;
        let (head, mut body, wanted) = loop {
            let more = self
                .stream
                .read(answer.get_mut(length..).unwrap_or_default())?;
            if more == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            length += more;
            let so_far = answer.get(..length).unwrap_or_default();
            let end = so_far.windows(4).position(|four| four == b"\r\n\r\n");
            if let Some((head, body)) = end.and_then(|end| so_far.split_at_checked(end + 4)) {
                let head = String::from_utf8_lossy(head).into_owned();
                let (_, wanted) = head
                    .split_once("Content-Length: ")
                    .ok_or(io::ErrorKind::InvalidData)?;
                let wanted: usize = wanted.trim().parse().map_err(io::Error::other)?;
                break (head, body.to_vec(), wanted);
            }
        };
        let had = body.len();
        body.resize(wanted, 0);
        self.stream
            .read_exact(body.get_mut(had..).unwrap_or_default())?;
        if head.starts_with("HTTP/1.1 200") {
            return Ok(body);
        }
        Err(io::Error::other(
            head.lines().next().unwrap_or_default().to_owned(),
        ))
    }
}
