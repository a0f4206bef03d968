//! A web server in parts, for a folder.
//!
//! ```text
//!   dune-https FOLDER [ADDRESS] [CONNECTIONS]
//! ```
//!
//! `cargo build -p dune-https`, then `cargo dune lab -- target/debug/dune-https FOLDER`, where
//! this machine's KVM cannot run ring 0. `cargo xtask bench wedge` measures it. With the
//! feature `planted-bug` the parser believes the length of a body.

use std::net::TcpListener;
use std::path::Path;

use dune_https::{LOCALHOST, Planted, Server, localhost_key};

const PLANTED: Planted = if cfg!(feature = "planted-bug") {
    Planted::Yes
} else {
    Planted::No
};

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    dune_https::start()?;
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().unwrap_or_else(|| ".".to_owned());
    let address = arguments.next();
    let address = address.unwrap_or_else(|| "127.0.0.1:8443".to_owned());
    let connections = arguments.next().map_or(Ok(100), |n| n.parse())?;
    let mut server = Server::split(LOCALHOST, localhost_key()?, PLANTED, Path::new(&folder))?;
    if let Some(places) = server.places_of_keys() {
        println!("the keys are at {:#x}", places.start);
    }
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
