//! A program in another time: `other_clock SECONDS PROGRAM [ARGUMENT...]`; the wall clock starts
//! at so many seconds after 1970 and runs a hundred times as fast.
//!
//! ```sh
//! cargo run -p dune-sandbox --example other_clock -- 0 date
//! ```

use std::time::{Duration, Instant};

use dune_sandbox::engine::on_host::OnHost;
use dune_sandbox::{Command, Request};

const SPEED: u32 = 100;
const CLOCK_REALTIME: u64 = 0;
const CLOCK_REALTIME_COARSE: u64 = 5;

fn pair(seconds: u64, rest: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&seconds.to_le_bytes());
    bytes[8..].copy_from_slice(&u64::from(rest).to_le_bytes());
    bytes
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args_os().skip(1);
    let usage = "usage: other_clock SECONDS PROGRAM [ARGUMENT...]";
    let begin: u64 = words
        .next()
        .and_then(|word| word.to_str()?.parse().ok())
        .ok_or(usage)?;
    let program = words.next().ok_or(usage)?;

    let started = Instant::now();
    let now = move || Duration::from_secs(begin) + started.elapsed() * SPEED;
    // Programs in the sandbox have no vDSO, so that every look at the clock is a call.
    let command = Command::new(program)
        .args(words)
        .handle("clock_gettime", move |request: &mut Request<'_>| {
            let [clock, into, ..] = request.args();
            if !matches!(clock, CLOCK_REALTIME | CLOCK_REALTIME_COARSE) {
                return request.proceed();
            }
            let now = now();
            request.write(into, &pair(now.as_secs(), now.subsec_nanos()))?;
            Ok(0)
        })?
        .handle("gettimeofday", move |request| {
            let now = now();
            request.write(request.args()[0], &pair(now.as_secs(), now.subsec_micros()))?;
            Ok(0)
        })?
        .handle("time", move |request| {
            let seconds = now().as_secs();
            let into = request.args()[0];
            if into != 0 {
                request.write(into, &seconds.to_le_bytes())?;
            }
            Ok(seconds)
        })?;
    let outcome = command.run(Box::new(OnHost::new()?))?;
    outcome.end.leave()
}
