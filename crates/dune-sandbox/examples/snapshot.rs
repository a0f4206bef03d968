//! Runs a program's second half once for each argument: the first half, up to
//! where it first reads standard input, runs once.
//!
//! ```sh
//! cargo run -p dune-sandbox --example snapshot -- 'one line' 'another line'
//! ```

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};

use dune_sandbox::engine::on_host::OnHost;
use dune_sandbox::snapshot::{Event, Marker, Next, Service, SnapshotError, Stopped};
use dune_sandbox::{Command, End};

/// The lines that are left.
struct Lines(std::vec::IntoIter<String>);

impl Lines {
    /// Gives the program its next line; `false` if there is none.
    fn next(&mut self, program: &mut Stopped<'_>) -> Result<bool, Box<dyn std::error::Error>> {
        let Some(line) = self.0.next() else {
            return Ok(false);
        };
        let (reader, writer) = std::io::pipe()?;
        let mut writer = File::from(OwnedFd::from(writer));
        writeln!(writer, "{line}")?;
        program.give_descriptor(reader.as_raw_fd(), 0)?;
        // Both ends here are closed; the program has its own.
        Ok(true)
    }

    fn step(
        &mut self,
        event: Event,
        program: &mut Stopped<'_>,
    ) -> Result<bool, Box<dyn std::error::Error>> {
        match event {
            Event::Marker => drop(program.push()?),
            Event::Ended(ending) => {
                eprintln!("({ending:?})");
                if program.depth() == 0 {
                    return Err(SnapshotError::None.into());
                }
                let restored = program.restore()?;
                eprintln!("({} pages were put back)", restored.pages);
            }
        }
        self.next(program)
    }
}

impl Service for Lines {
    fn event(&mut self, event: Event, program: &mut Stopped<'_>) -> Next {
        match self.step(event, program) {
            Ok(true) => Next::Continue,
            Ok(false) => Next::Finish(End::Exit(0)),
            Err(error) => {
                eprintln!("{error}");
                Next::Finish(End::Exit(1))
            }
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let lines: Vec<String> = std::env::args().skip(1).collect();
    let engine = OnHost::new()?;
    let script = "echo this is printed once; read line; echo \"got: $line\"";
    let command = Command::new("sh")
        .args(["-c", script])
        .serve(Marker::ReadStdin, Box::new(Lines(lines.into_iter())));
    command.run(Box::new(engine))?.end.leave()
}
