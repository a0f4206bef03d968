//! The kernel's messages, for a host that wants to know what went wrong.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::Duration;

use crate::Link;
use crate::boot::during;
use crate::wire::Kind;

const LOG: &str = "/dev/kmsg";

/// How often a guest that cannot be asked says that it is alive.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// The messages so far, one to a line.
pub(crate) fn so_far() -> String {
    const O_NONBLOCK: i32 = 0o4000;
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(LOG);
    let Ok(mut log) = opened else {
        return String::new();
    };
    let mut text = String::new();
    while let Ok(line) = next(&mut log) {
        text.push_str(&line);
    }
    text
}

/// Sends each message as it comes, and an empty one now and then.
pub(crate) fn follow(link: &Link) -> io::Result<()> {
    let mut log = File::open(LOG).map_err(during(LOG))?;
    let sender = link.clone();
    thread::spawn(move || {
        loop {
            match next(&mut log) {
                Ok(line) => sender.send(Kind::KernelLogText, line.as_bytes()),
                // Messages were overwritten before they were read.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                Err(_) => return,
            }
        }
    });
    let sender = link.clone();
    thread::spawn(move || {
        loop {
            thread::sleep(SIGN_OF_LIFE);
            sender.send(Kind::KernelLogText, b"");
        }
    });
    Ok(())
}

/// Reads one record, "priority,sequence,time,flags;message", as a line.
fn next(log: &mut File) -> io::Result<String> {
    let mut record = vec![0; 8192];
    let count = log.read(&mut record)?;
    let line = String::from_utf8_lossy(&record[..count]);
    let (head, message) = line.split_once(';').unwrap_or(("", &line));
    let microseconds: u64 = head
        .split(',')
        .nth(2)
        .and_then(|field| field.parse().ok())
        .unwrap_or(0);
    let message = message.lines().next().unwrap_or("");
    let (seconds, rest) = (microseconds / 1_000_000, microseconds % 1_000_000);
    Ok(format!("[{seconds:5}.{rest:06}] {message}\n"))
}
