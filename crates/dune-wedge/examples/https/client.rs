//! A client that checks the server's certificate.

use std::io::{self, Read, Write};
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

pub(crate) struct Client<S: Read + Write> {
    tls: StreamOwned<ClientConnection, S>,
}

impl<S: Read + Write> Client<S> {
    pub(crate) fn connect(stream: S, certificate: &[u8]) -> io::Result<Self> {
        let mut roots = RootCertStore::empty();
        let certificate = CertificateDer::from(certificate.to_vec());
        roots.add(certificate).map_err(io::Error::other)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
        let connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
        Ok(Self {
            tls: StreamOwned::new(connection, stream),
        })
    }

    /// The body of the answer to a `GET`.
    pub(crate) fn get(&mut self, path: &str) -> io::Result<Vec<u8>> {
        self.ask(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes())
    }

    /// Sends a request as it is; the body of the answer.
    pub(crate) fn ask(&mut self, request: &[u8]) -> io::Result<Vec<u8>> {
        self.tls.write_all(request)?;
        self.tls.flush()?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.tls.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let (_, length) = head
            .split_once("Content-Length: ")
            .ok_or(io::ErrorKind::InvalidData)?;
        let length = length.trim().parse().map_err(io::Error::other)?;
        let mut body = vec![0; length];
        self.tls.read_exact(&mut body)?;
        if head.starts_with("HTTP/1.1 200") {
            return Ok(body);
        }
        Err(io::Error::other(
            head.lines().next().unwrap_or_default().to_owned(),
        ))
    }
}
