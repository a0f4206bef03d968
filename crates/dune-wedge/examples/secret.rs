//! A key that one compartment can use and no other part can read: it lies in a tag that the
//! signing compartment alone has, and what comes out of it is a signature.
//!
//! `cargo build -p dune-wedge --examples`, then
//! `cargo dune lab -- target/debug/examples/secret`

use dune_wedge::{Compartment, Grant, In, Tag};
use zerocopy::{Immutable, IntoBytes};

type Key = [u64; 4];

/// What goes into the signing compartment.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Order {
    key: In<Key>,
    message: u64,
}

/// FNV-1a over key and message stands for a signature: what matters here is where it runs.
fn sign(order: Order) -> u64 {
    let key = order.key.read();
    let words = key.into_iter().chain([order.message]);
    let bytes = words.flat_map(u64::to_le_bytes);
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    dune_wedge::start()?;
    dune::enter()?;
    let vault = Tag::new(4096)?;
    let key = vault.put::<Key>([0x5ec, 0x2e7, 0x0f, 0xca5])?;

    let mut signer = Compartment::builder().tag(&vault, Grant::Read).build()?;
    let signature = signer.run(sign, Order { key, message: 42 })?;
    println!("signed: {signature:#018x}");

    // Code that was taken over, in a compartment without the tag.
    let mut parser = Compartment::builder().build()?;
    match parser.run(|key: In<Key>| key.read(), key) {
        Ok(key) => println!("the key leaked: {key:?}"),
        Err(error) => println!("{error}"),
    }
    Ok(())
}
