//! Prints how much memory a program uses, ten times a second.
//!
//! ```sh
//! cargo run -p dune-sandbox --example working_set -- sort /usr/share/dict/words
//! ```

use std::time::Duration;

use dune_sandbox::Command;
use dune_sandbox::engine::on_host::OnHost;
use dune_sandbox::working_set::Sampler;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args_os().skip(1);
    let program = words.next().unwrap_or_else(|| "ls".into());
    // Before the engine, so that its thread is none of the program's.
    let sampler = Sampler::start(Duration::from_millis(100), |sample| {
        let kib = |bytes| bytes / 1024;
        eprintln!(
            "{:6.2} s: {} KiB used, of them {} KiB for the first time",
            sample.at.as_secs_f64(),
            kib(sample.used.total()),
            kib(sample.first_used)
        );
    })?;
    let engine = OnHost::new()?;
    let command = Command::new(program).args(words).sample(sampler);
    command.run(Box::new(engine))?.end.leave()
}
