//! A file system that does not exist: `virtual_files PROGRAM [ARGUMENT...]`.
//!
//! Whatever the program opens below `/virtual` is made up here; `/virtual/greeting` says hello,
//! any other name is a file with its own name in it.
//!
//! ```sh
//! cargo run -p dune-sandbox --example virtual_files -- cat /virtual/greeting /virtual/other
//! ```

use std::path::Path;

use dune_sandbox::Command;
use dune_sandbox::engine::on_host::OnHost;

const ROOT: &str = "/virtual";

/// The contents of a file, by its name below the root.
fn contents(name: &Path) -> Vec<u8> {
    match name.to_str() {
        Some("greeting") => b"hello from a file that is not there\n".to_vec(),
        _ => format!("{}\n", name.display()).into_bytes(),
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args_os().skip(1);
    let program = words
        .next()
        .ok_or("usage: virtual_files PROGRAM [ARGUMENT...]")?;
    let command = Command::new(program)
        .args(words)
        .handle("openat", |request| {
            let [_, path, ..] = request.args();
            let path = request.read_path(path)?;
            match path.strip_prefix(ROOT) {
                Ok(name) => request.give_file(&contents(name)),
                Err(_) => request.proceed(),
            }
        })?;
    let outcome = command.run(Box::new(OnHost::new()?))?;
    outcome.end.leave()
}
