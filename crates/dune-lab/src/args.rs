//! The command line of `dune lab`, shared by the `dune` command and by the
//! small `dune-lab` program of this crate.

use std::ffi::OsString;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;

use crate::config::{Command, Config};
use crate::error::{LabError, io_error};
use crate::intel;
use crate::session::{Link, Output, Session};
use crate::stdio::Input;
use crate::terminal::{self, RawMode, Streams};
use crate::wire::Kind;

/// Run a command in the lab: a virtual machine in which ring 0 works on any
/// host. It sees the host's files; what it writes is discarded, unless a
/// folder is shared.
#[derive(Clone, Debug, clap::Args)]
pub struct LabArgs {
    /// Number of virtual CPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,

    /// Memory in MiB (or with a suffix: 2G).
    #[arg(long, value_name = "MIB", default_value = "1024", value_parser = parse_memory)]
    pub memory: u32,

    /// Count instructions: one instruction is one nanosecond of every clock.
    #[arg(long)]
    pub icount: bool,

    /// Let the guest write this folder (can be repeated).
    #[arg(long, value_name = "DIR")]
    pub share: Vec<PathBuf>,

    /// Kernel image to boot, with its modules in /lib/modules
    /// [default: the newest of this Debian release].
    #[arg(long, value_name = "VMLINUZ")]
    pub kernel: Option<PathBuf>,

    /// End the command after so many seconds (exit code 124).
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub timeout: Option<Duration>,

    /// Boot, instead of waking a saved state.
    #[arg(long)]
    pub cold: bool,

    /// Say what happens and how long it takes.
    #[arg(long, short)]
    pub verbose: bool,

    /// Emulate an Intel CPU (VMX with EPT) by Bochs instead of an AMD one by
    /// QEMU. The guest does not see the host's files: the command's program
    /// and libraries are taken along.
    #[arg(long, conflicts_with_all = ["icount", "share", "cold"])]
    pub intel: bool,

    /// With --intel: take this file or folder along (repeatable).
    #[arg(long, value_name = "PATH", requires = "intel")]
    pub with: Vec<PathBuf>,

    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

fn parse_memory(text: &str) -> Result<u32, String> {
    let (digits, factor) = match text.strip_suffix(['G', 'g']) {
        Some(digits) => (digits, 1024),
        None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1),
    };
    digits
        .parse::<u32>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(|| "give a number of MiB, such as 1024, or 2G".to_owned())
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    text.parse::<f64>()
        .ok()
        .filter(|seconds| *seconds > 0.0)
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "give a number of seconds above 0".to_owned())
}

/// Runs the command with this process's standard streams, terminal and
/// signals, and returns the exit code that this process should end with.
///
/// # Errors
///
/// See [`LabError`]; [`LabError::exit_code`] is the exit code for it.
pub fn run(args: &LabArgs) -> Result<u8, LabError> {
    let config = Config {
        cpus: args.cpus,
        memory_mib: args.memory,
        icount: args.icount,
        shares: args.share.clone(),
        kernel: args.kernel.clone(),
        cold: args.cold,
        verbose: args.verbose,
    };
    let Some((program, arguments)) = args.command.split_first() else {
        return Err(LabError::Options("no command given".to_owned()));
    };
    let command = Command::new(program).args(arguments).timeout(args.timeout);
    if args.intel {
        let mut output = Output {
            stdout: &mut std::io::stdout().lock(),
            stderr: &mut std::io::stderr(),
        };
        return intel::run_on_intel(&config, &command, &args.with, &mut output)
            .map(|outcome| outcome.code);
    }
    let mut session = Session::start(&config)?;
    let input = Input::from_process();
    let streams = Streams::of_process();
    forward_signals(session.link(), streams)?;
    let raw = RawMode::enter(streams);
    let outcome = session.run(
        &command,
        input,
        &mut Output {
            stdout: &mut std::io::stdout().lock(),
            stderr: &mut std::io::stderr(),
        },
    );
    drop(raw);
    outcome.map(|outcome| outcome.code)
}

/// Carries signals for this process, and new sizes of its terminal, to the
/// command. A second request to end ends the lab itself.
fn forward_signals(link: Link, streams: Streams) -> Result<(), LabError> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH])
        .map_err(io_error("install signal handlers"))?;
    thread::spawn(move || {
        let mut asked = false;
        for signal in signals.forever() {
            if signal == SIGWINCH {
                let (rows, columns) = terminal::size(streams);
                let mut payload = rows.to_le_bytes().to_vec();
                payload.extend_from_slice(&columns.to_le_bytes());
                let _ = link.send(Kind::Resize, &payload);
            } else if asked {
                // The emulator ends with this process.
                let _ = signal_hook::low_level::emulate_default_handler(signal);
            } else {
                asked = true;
                let _ = link.send(Kind::Signal, &signal.to_le_bytes());
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_has_units() {
        assert_eq!(parse_memory("512"), Ok(512));
        assert_eq!(parse_memory("512M"), Ok(512));
        assert_eq!(parse_memory("2G"), Ok(2048));
        assert!(parse_memory("much").is_err());
        assert!(parse_memory("9999999G").is_err());
    }

    #[test]
    fn seconds_are_positive() {
        assert_eq!(parse_seconds("1.5"), Ok(Duration::from_millis(1500)));
        for wrong in ["0", "-1", "nan", "inf", "soon"] {
            assert!(parse_seconds(wrong).is_err(), "{wrong}");
        }
    }
}
