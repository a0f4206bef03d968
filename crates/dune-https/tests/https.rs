//! The web server in compartments: it serves, and a bug in its parser that gives away the keys
//! of a server in one piece gives away nothing of it.
#![expect(unsafe_code, reason = "a client in a process of its own")]

mod scan;

use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use dune_https::{Client, LOCALHOST, LONGEST_ECHO, Parsing, Planted, Server, localhost_key};
use dune_wedge::{Compartment, CompartmentError};
use rustls::{ClientConnection, StreamOwned};

type Tls = StreamOwned<ClientConnection, UnixStream>;

/// The secret part of the private key: its last 32 bytes (RFC 8410).
fn private() -> Vec<u8> {
    let key = localhost_key().unwrap();
    key[key.len() - 32..].to_vec()
}

fn whole(parsing: Parsing, planted: Planted, folder: &Path) -> Server {
    Server::whole(
        LOCALHOST,
        localhost_key().unwrap(),
        parsing,
        planted,
        folder,
    )
    .unwrap()
}

fn split(planted: Planted, folder: &Path) -> Server {
    Server::split(LOCALHOST, localhost_key().unwrap(), planted, folder).unwrap()
}

/// Lets a client talk to a server, until it hangs up; how many requests were served.
fn between(server: &mut Server, talk: impl FnOnce(&mut Client<Tls>)) -> std::io::Result<u32> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| server.serve(theirs));
        let mut client = Client::connect(ours, LOCALHOST).unwrap();
        talk(&mut client);
        drop(client);
        serving.join().unwrap()
    })
}

fn every_server_serves() {
    dune_https::start().unwrap();
    let folder = std::env::temp_dir().join("dune-https-test");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("index.html"), "<p>hello</p>").unwrap();
    let large: Vec<u8> = (0..100_000_u32).map(|n| (n * 7) as u8).collect();
    std::fs::write(folder.join("large"), &large).unwrap();
    for mut server in [
        whole(Parsing::InProcess, Planted::No, &folder),
        whole(Parsing::Processes, Planted::No, &folder),
        whole(Parsing::in_compartments(), Planted::No, &folder),
        split(Planted::No, &folder),
    ] {
        for _ in 0..2 {
            let served = between(&mut server, |client| {
                for _ in 0..3 {
                    assert_eq!(client.get("/index.html").unwrap(), b"<p>hello</p>");
                }
                assert!(client.get("/none").is_err());
                assert!(client.get("/../../../../etc/passwd").is_err());
                // More records than one.
                assert!(client.get("/large").unwrap() == large);
                let echo = client.ask(b"TRACE / HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody");
                assert_eq!(echo.unwrap(), b"body");
                let lie = client.ask(b"TRACE / HTTP/1.1\r\nContent-Length: 5000\r\n\r\nbody");
                assert!(lie.is_err(), "400, and the connection ends");
            });
            assert_eq!(served.unwrap(), 8);
        }
        // The same without TLS.
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            let serving = scope.spawn(|| server.serve_plain(theirs));
            let mut client = Client::plain(ours);
            assert_eq!(client.get("/index.html").unwrap(), b"<p>hello</p>");
            drop(client);
            assert_eq!(serving.join().unwrap().unwrap(), 1);
        });
    }
    std::fs::remove_dir_all(folder).unwrap();
}

fn keys_change_and_room_for_them_does_not_run_out() {
    dune_https::start().unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut server = split(Planted::No, folder);
    for _ in 0..2 {
        let served = between(&mut server, |client| {
            for _ in 0..70 {
                client.get("/Cargo.toml").unwrap();
                client.change_keys().unwrap();
            }
        });
        assert_eq!(served.unwrap(), 70);
    }
}

/// What the attacker gets who says that a body of four bytes has so many, and the secrets of
/// the connection, which he is not to get.
fn attack(server: &mut Server, length: usize) -> (Vec<u8>, Vec<Vec<u8>>) {
    let (mut loot, mut secrets) = (Vec::new(), Vec::new());
    let _ = between(server, |client| {
        let lie = format!("TRACE / HTTP/1.1\r\nContent-Length: {length}\r\n\r\nbody");
        loot = client.ask(lie.as_bytes()).unwrap_or_default();
        secrets = client.secrets();
    });
    (loot, secrets)
}

fn holds(loot: &[u8], secret: &[u8]) -> bool {
    loot.windows(secret.len()).any(|part| part == secret)
}

/// On this machine as it is, without Dune.
fn the_bug_gives_away_the_keys_of_a_server_in_one_piece() {
    let mut server = whole(Parsing::InProcess, Planted::Yes, Path::new("/"));
    let (loot, secrets) = attack(&mut server, LONGEST_ECHO);
    assert!(loot.len() == LONGEST_ECHO && loot.starts_with(b"body"));
    assert!(holds(&loot, &private()), "no private key in what came back");
    // The last two are the traffic's, by which all that is sent can be read.
    assert_eq!(
        secrets.len(),
        5,
        "two of the handshake, two of the traffic, one to export"
    );
    let held = secrets.iter().filter(|secret| holds(&loot, secret)).count();
    println!("{held} of {} secrets", secrets.len());
    assert!(held >= 2, "no session keys in what came back");
    // Without the bug there is nothing to be had.
    let mut server = whole(Parsing::InProcess, Planted::No, Path::new("/"));
    assert_eq!(attack(&mut server, LONGEST_ECHO).0, b"");
}

fn the_bug_gives_away_nothing_of_a_server_in_compartments() {
    dune_https::start().unwrap();
    let private = private();
    let mut server = split(Planted::Yes, Path::new("/"));
    for length in [5, 100, 4000, 5000, LONGEST_ECHO] {
        let (loot, secrets) = attack(&mut server, length);
        assert_eq!(secrets.len(), 5);
        for secret in secrets.iter().chain([&private]) {
            assert!(!holds(&loot, secret), "{length}");
        }
        // What lies behind the request in the page is the compartment's own: zeros.
        let behind = loot.strip_prefix(b"body").unwrap_or_default();
        assert!(behind.iter().all(|byte| *byte == 0), "{length}");
        if length > 4096 {
            assert_eq!(loot, b"", "{length}: the read past the page ends it");
        }
    }
}

fn the_keys_are_out_of_reach_of_whoever_takes_the_parser_over() {
    dune_https::start().unwrap();
    let server = split(Planted::No, Path::new("/"));
    let places = server.places_of_keys().unwrap();
    let mut parser = Compartment::builder().build().unwrap();
    for place in places.step_by(4096) {
        let result = parser.run(
            // SAFETY: whether it is there is what is tested.
            |place: u64| unsafe { (place as *const u64).read_volatile() },
            place,
        );
        assert!(
            matches!(result, Err(CompartmentError::Fault { address, .. }) if address == place),
            "{result:?}"
        );
    }
}

/// A client in a process of its own: so that what it knows is not in the server's memory. It
/// tells the server's process what to look for, every byte turned round.
fn client_elsewhere(stream: UnixStream, mut tell: PipeWriter, mut wait: PipeReader) -> ! {
    let mut client = Client::connect(stream, LOCALHOST).unwrap();
    client.get("/Cargo.toml").unwrap();
    let mut needles = vec![private()];
    for secret in client.secrets() {
        needles.push(expand(&secret, "key", 16));
        needles.push(secret);
    }
    for needle in needles {
        let mut message = vec![needle.len() as u8];
        message.extend(needle.iter().map(|byte| !byte));
        tell.write_all(&message).unwrap();
    }
    drop(tell);
    // Until the parent has looked.
    let _ = wait.read(&mut [0]);
    let goes_on = client.get("/Cargo.toml").is_ok();
    // SAFETY: ends the process.
    unsafe { libc::_exit(i32::from(!goes_on)) }
}

/// HKDF-Expand-Label (RFC 8446, 7.1) for the lengths that fit into one block.
fn expand(secret: &[u8], label: &str, length: u8) -> Vec<u8> {
    let label = format!("tls13 {label}");
    let mut info = vec![0, length, label.len() as u8];
    info.extend_from_slice(label.as_bytes());
    info.extend_from_slice(&[0, 1]);
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret);
    ring::hmac::sign(&key, &info).as_ref()[..length.into()].to_vec()
}

/// How many of the secrets of a living connection are in the memory of the server's process,
/// and how many there are.
fn secrets_in_the_process(make: impl FnOnce(&Path) -> Server) -> (usize, usize) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut told, tell) = std::io::pipe().unwrap();
    let (wait, looked) = std::io::pipe().unwrap();
    // SAFETY: this process has one thread yet.
    let child = unsafe { libc::fork() };
    if child == 0 {
        drop((theirs, told, looked));
        client_elsewhere(ours, tell, wait);
    }
    drop((ours, tell, wait));
    let mut server = make(Path::new(env!("CARGO_MANIFEST_DIR")));
    let except = server.places_of_keys().unwrap_or(0..0);
    let counts = std::thread::scope(|scope| {
        let serving = scope.spawn(|| server.serve(theirs));
        let mut turned = Vec::new();
        told.read_to_end(&mut turned).unwrap();
        let mut needles = Vec::new();
        let mut rest = turned.as_slice();
        while let Some((length, more)) = rest.split_first() {
            let (needle, more) = more.split_at(usize::from(*length));
            needles.push(needle);
            rest = more;
        }
        let found = scan::find(&needles, &except);
        drop(looked);
        assert_eq!(serving.join().unwrap().unwrap(), 2);
        (found, needles.len())
    });
    let mut status = 0;
    // SAFETY: the kernel writes the status.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(status, 0, "the client");
    counts
}

fn no_key_is_in_the_process_but_in_the_tag() {
    let (found, all) = secrets_in_the_process(|folder| {
        dune_https::start().unwrap();
        split(Planted::No, folder)
    });
    assert_eq!((found, all), (0, 11));
}

/// That the search finds what is there.
fn the_keys_of_a_server_in_one_piece_are_in_the_process() {
    let (found, all) =
        secrets_in_the_process(|folder| whole(Parsing::InProcess, Planted::No, folder));
    println!("{found} of {all}");
    assert!(all == 11 && found >= 5, "{found} of {all}");
}

dune_testing::tests! {
    ring0 every_server_serves,
    ring0 keys_change_and_room_for_them_does_not_run_out,
    plain the_bug_gives_away_the_keys_of_a_server_in_one_piece,
    ring0 the_bug_gives_away_nothing_of_a_server_in_compartments,
    ring0 the_keys_are_out_of_reach_of_whoever_takes_the_parser_over,
    ring0 no_key_is_in_the_process_but_in_the_tag,
    plain the_keys_of_a_server_in_one_piece_are_in_the_process,
}
