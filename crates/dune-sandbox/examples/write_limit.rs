//! Counts the bytes that a program writes, and stops it at a limit, as a full disk would:
//! `write_limit BYTES PROGRAM [ARGUMENT...]`.
//!
//! ```sh
//! cargo run -p dune-sandbox --example write_limit -- 1000 seq 1 1000
//! ```

use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dune_sandbox::Command;
use dune_sandbox::engine::on_host::OnHost;
use dune_sandbox::host::{Errno, move_fd_high};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args_os().skip(1);
    let usage = "usage: write_limit BYTES PROGRAM [ARGUMENT...]";
    let limit: u64 = words
        .next()
        .and_then(|word| word.to_str()?.parse().ok())
        .ok_or(usage)?;
    let program = words.next().ok_or(usage)?;

    // Most programs close their standard streams at their end, and they are this process's too.
    let screen = std::io::stderr().as_fd().try_clone_to_owned()?;
    let mut screen = std::fs::File::from(move_fd_high(screen)?);

    let written = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&written);
    let command = Command::new(program)
        .args(words)
        .handle("write", move |request| {
            // Taken before the call and given back after it, so that threads that write at the
            // same time do not share what is left.
            let wanted = request.args()[2];
            let left = counter
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |used| {
                    Some(used + wanted.min(limit - used))
                })
                .map_or(0, |used| wanted.min(limit - used));
            if left == 0 && wanted > 0 {
                return Err(Errno::ENOSPC);
            }
            request.args_mut()[2] = left;
            let result = request.proceed();
            let unused = left - result.unwrap_or(0).min(left);
            counter.fetch_sub(unused, Ordering::SeqCst);
            result
        })?
        // The other ways to write: a program tries the plain one when they are not there.
        .handle("writev", |_| Err(Errno::ENOSYS))?
        .handle("sendfile", |_| Err(Errno::ENOSYS))?
        .handle("copy_file_range", |_| Err(Errno::ENOSYS))?;
    let outcome = command.run(Box::new(OnHost::new()?))?;
    writeln!(screen, "{} bytes written", written.load(Ordering::SeqCst))?;
    outcome.end.leave()
}
