//! A process for a request: how parts of a program are kept apart without compartments.
#![expect(unsafe_code, reason = "fork")]

use std::io::{self, PipeReader, PipeWriter, Read, Write};

/// Runs a parser in a child that is made for it; the result comes through a pipe.
pub(crate) fn parse(parser: fn(&[u8]) -> Vec<u8>, input: &[u8]) -> io::Result<Vec<u8>> {
    let (reader, writer) = io::pipe()?;
    // SAFETY: the child does what the parent could do in its place, and ends. The program's
    // other threads hold no lock of the allocator for long, which is all that the child needs
    // (glibc's allocator is usable after fork).
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(reader);
            let written = answer(writer, &parser(input));
            // SAFETY: ends the child without the parent's exit handlers.
            unsafe { libc::_exit(i32::from(written.is_err())) }
        }
        child => {
            drop(writer);
            let output = collect(reader);
            let mut status = 0;
            // SAFETY: the kernel writes the status.
            unsafe { libc::waitpid(child, &raw mut status, 0) };
            if status != 0 {
                return Err(io::Error::other("the child failed"));
            }
            output
        }
    }
}

fn answer(mut writer: PipeWriter, output: &[u8]) -> io::Result<()> {
    writer.write_all(output)
}

fn collect(mut reader: PipeReader) -> io::Result<Vec<u8>> {
    let mut output = Vec::new();
    reader.read_to_end(&mut output)?;
    Ok(output)
}
