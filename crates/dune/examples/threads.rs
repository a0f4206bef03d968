//! Threads that are spawned in Dune mode are in Dune mode, and so are forked processes and
//! nothing that is executed; the standard library does not notice.

use std::process::Command;
use std::sync::mpsc::channel;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    dune::enter()?;
    let (send, receive) = channel();
    let threads: Vec<_> = (0..8_u64)
        .map(|n| {
            let send = send.clone();
            std::thread::spawn(move || {
                let sum: u64 = (0..=n * 1000).sum();
                send.send((n, sum, dune::is_inside()))
            })
        })
        .collect();
    drop(send);
    let mut answers: Vec<_> = receive.into_iter().collect();
    answers.sort_unstable();
    for (n, sum, inside) in answers {
        println!("thread {n}: sum {sum}, in Dune mode: {inside}");
    }
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked")??;
    }
    let output = Command::new("uname").arg("-sr").output()?;
    print!(
        "and a program started from Dune mode: {}",
        String::from_utf8_lossy(&output.stdout)
    );
    Ok(())
}
