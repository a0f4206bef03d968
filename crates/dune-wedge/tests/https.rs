//! The web server of the examples: it serves, and a bug in its parser that gives away the
//! private key of a server in one piece gives away nothing of one in compartments.

#[path = "../examples/https/client.rs"]
mod client;
#[path = "../examples/https/http.rs"]
mod http;
#[path = "../examples/https/server.rs"]
mod server;
#[path = "../examples/https/signer.rs"]
mod signer;

use std::os::unix::net::UnixStream;
use std::path::Path;

use client::Client;
use dune_wedge::{Compartment, CompartmentError};
use server::{Key, Parsing, Planted, Server};
use signer::Vault;

const CERTIFICATE: &[u8] = include_bytes!("../examples/https/localhost.der");
/// Not in constants of the program, which compartments share: as if read from a file.
fn key() -> Vec<u8> {
    let manifest = env!("CARGO_MANIFEST_DIR");
    let path = Path::new(manifest).join("examples/https/localhost-key.der");
    std::fs::read(path).unwrap()
}

/// The secret part of the key: its last 32 bytes (RFC 8410).
fn secret(key: &[u8]) -> Vec<u8> {
    key[key.len() - 32..].to_vec()
}

fn start() {
    dune_wedge::start().unwrap();
    dune::enter().unwrap();
}

fn whole(planted: Planted, folder: &Path) -> Server {
    let parsing = Parsing::in_process(planted);
    Server::new(parsing, Key::InProcess(key()), CERTIFICATE, folder).unwrap()
}

fn split(planted: Planted, folder: &Path) -> Server {
    let vault = Vault::lock(key()).unwrap();
    let parsing = Parsing::in_compartments(planted);
    Server::new(parsing, Key::Locked(vault), CERTIFICATE, folder).unwrap()
}

/// Lets a client talk to a server, until it hangs up; how many requests were served.
fn between(mut server: Server, talk: impl FnOnce(&mut Client<UnixStream>)) -> u32 {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let serving = std::thread::spawn(move || server.serve(theirs));
    let mut client = Client::connect(ours, CERTIFICATE).unwrap();
    talk(&mut client);
    drop(client);
    serving.join().unwrap().unwrap()
}

fn both_servers_serve() {
    start();
    let folder = std::env::temp_dir().join("wedge-https");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("index.html"), "<p>hello</p>").unwrap();
    for server in [whole(Planted::No, &folder), split(Planted::No, &folder)] {
        let served = between(server, |client| {
            for _ in 0..3 {
                assert_eq!(client.get("/index.html").unwrap(), b"<p>hello</p>");
            }
            assert!(client.get("/none").is_err());
            assert!(client.get("/../../../../etc/passwd").is_err());
            let echo = client.ask(b"TRACE / HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody");
            assert_eq!(echo.unwrap(), b"body");
            let lie = client.ask(b"TRACE / HTTP/1.1\r\nContent-Length: 5000\r\n\r\nbody");
            assert!(lie.is_err(), "400, and the connection ends");
        });
        assert_eq!(served, 7);
    }
    std::fs::remove_dir_all(folder).unwrap();
}

/// What the attacker gets who says that a body of four bytes has so many.
fn attack(server: Server, length: usize) -> Vec<u8> {
    let mut loot = Vec::new();
    between(server, |client| {
        let lie = format!("TRACE / HTTP/1.1\r\nContent-Length: {length}\r\n\r\nbody");
        loot = client.ask(lie.as_bytes()).unwrap_or_default();
    });
    loot
}

fn holds(loot: &[u8], secret: &[u8]) -> bool {
    loot.windows(secret.len()).any(|part| part == secret)
}

fn the_bug_gives_away_the_key_of_a_server_in_one_piece() {
    start();
    let secret = secret(&key());
    // All of the buffer and a little more.
    let length = (16 << 10) + 100;
    let loot = attack(whole(Planted::Yes, Path::new("/")), length);
    assert!(loot.len() == length && loot.starts_with(b"body"));
    assert!(holds(&loot, &secret), "no key in what came back");
    // Without the bug there is nothing to be had.
    let loot = attack(whole(Planted::No, Path::new("/")), http::LONGEST_ECHO);
    assert_eq!(loot, b"");
}

fn the_bug_gives_away_nothing_of_a_server_in_compartments() {
    start();
    let secret = secret(&key());
    for length in [5, 100, 4000, 5000, http::LONGEST_ECHO] {
        let loot = attack(split(Planted::Yes, Path::new("/")), length);
        assert!(!holds(&loot, &secret), "{length}");
        // What lies behind the request in the page is the compartment's own: zeros.
        let behind = loot.strip_prefix(b"body").unwrap_or_default();
        assert!(behind.iter().all(|byte| *byte == 0), "{length}");
        if length > 4096 {
            assert_eq!(loot, b"", "{length}: the read past the page ends it");
        }
    }
}

fn the_key_is_out_of_reach_of_whoever_takes_the_parser_over() {
    start();
    let vault = Vault::lock(key()).unwrap();
    let mut parser = Compartment::builder().build().unwrap();
    let place = vault.place();
    let result = parser.run(
        |place: dune_wedge::BytesIn| place.read().len() as u64,
        place,
    );
    assert!(
        matches!(result, Err(CompartmentError::Fault { address, .. }) if address == place.address()),
        "{result:?}"
    );
}

dune_testing::tests! {
    ring0 both_servers_serve,
    ring0 the_bug_gives_away_the_key_of_a_server_in_one_piece,
    ring0 the_bug_gives_away_nothing_of_a_server_in_compartments,
    ring0 the_key_is_out_of_reach_of_whoever_takes_the_parser_over,
}
