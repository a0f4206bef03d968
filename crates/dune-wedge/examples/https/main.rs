//! A web server in parts: TLS with rustls, requests and files. The private key is in memory
//! that one compartment can read, which signs; every request is read in a compartment of its
//! own.
//!
//! ```text
//!   https FOLDER [ADDRESS] [CONNECTIONS]   serve a folder
//!   https --measure REQUESTS               requests with and without compartments, no network
//! ```
//!
//! `cargo build -p dune-wedge --examples`, then
//! `cargo dune lab -- target/debug/examples/https --measure 100`.
//!
//! With the feature `planted-bug` the parser believes the length of a body, as one that the
//! world remembers did.

mod client;
mod http;
mod server;
mod signer;

use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use client::Client;
use server::{Key, Parsing, Planted, Server};
use signer::Vault;

/// For localhost, and no secret: whoever runs a server has a key of their own.
const CERTIFICATE: &[u8] = include_bytes!("localhost.der");
const KEY: &[u8] = include_bytes!("localhost-key.der");

const PLANTED: Planted = if cfg!(feature = "planted-bug") {
    Planted::Yes
} else {
    Planted::No
};

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    dune_wedge::start()?;
    dune::enter()?;
    let mut arguments = std::env::args().skip(1);
    let first = arguments.next().unwrap_or_else(|| ".".to_owned());
    if first == "--measure" {
        let requests = arguments.next().map_or(Ok(100), |n| n.parse())?;
        return measure(requests);
    }
    let address = arguments
        .next()
        .unwrap_or_else(|| "127.0.0.1:8443".to_owned());
    let connections = arguments.next().map_or(Ok(100), |n| n.parse())?;
    let mut server = split(Path::new(&first))?;
    let listener = TcpListener::bind(&address)?;
    println!(
        "https://{}, {connections} connections",
        listener.local_addr()?
    );
    for stream in listener.incoming().take(connections) {
        match server.serve(stream?) {
            Ok(requests) => println!("{requests} requests"),
            Err(error) => println!("a connection failed: {error}"),
        }
    }
    Ok(())
}

/// A server in compartments.
fn split(folder: &Path) -> Result<Server, Failure> {
    let vault = Vault::lock(KEY.to_vec())?;
    println!("the key is at {:#x}", vault.place().address());
    let parsing = Parsing::in_compartments(PLANTED);
    Ok(Server::new(
        parsing,
        Key::Locked(vault),
        CERTIFICATE,
        folder,
    )?)
}

/// A server as servers are.
fn whole(folder: &Path) -> Result<Server, Failure> {
    let parsing = Parsing::in_process(PLANTED);
    let key = Key::InProcess(KEY.to_vec());
    Ok(Server::new(parsing, key, CERTIFICATE, folder)?)
}

fn measure(requests: u32) -> Result<(), Failure> {
    let folder = std::env::temp_dir();
    let file = folder.join("wedge-https.html");
    std::fs::write(&file, "<p>hello</p>".repeat(100))?;
    for (name, server) in [("whole", whole(&folder)?), ("split", split(&folder)?)] {
        let mut server = server;
        let (ours, theirs) = UnixStream::pair()?;
        let serving = std::thread::spawn(move || server.serve(theirs));
        let mut client = Client::connect(ours, CERTIFICATE)?;
        let _ = client.get("/wedge-https.html")?;
        let begin = Instant::now();
        for _ in 0..requests {
            let body = client.get("/wedge-https.html")?;
            assert_eq!(body.len(), 1200);
        }
        println!("{name}: {:?} a request", begin.elapsed() / requests);
        drop(client);
        let _ = serving.join();
    }
    std::fs::remove_file(file)?;
    Ok(())
}
