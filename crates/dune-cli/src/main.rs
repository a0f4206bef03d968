//! The `dune` command.
//!
//! | command | file |
//! |---|---|
//! | `dune run -- CMD` | [`run`]: the sandbox, with the engine that fits the machine |
//! | `dune trace -- CMD` | [`trace`]: the same, with every system call decoded |
//! | `dune snap -- CMD` | [`snap`]: the same, from a marker on again and again |
//! | `dune wss -- CMD` | [`wss`]: the same, with which memory it uses over time |
//! | `dune check` | [`check`]: what this machine offers |
//! | `dune lab -- CMD` | crate `dune-lab` |
//! | `dune syscalls` | [`syscalls`]: the sandbox's table of calls |
//! | `dune man`, `dune completions` | [`manual`]: what a package installs beside it |
//!
//! Nothing here changes the terminal's modes or leaves anything behind, so that
//! the command may be killed at any moment. (`dune lab` puts the terminal into
//! raw mode while a command runs in it, and takes care of that itself.)

mod check;
mod family;
mod manual;
mod memory;
mod observed;
mod output;
mod policy;
mod report;
mod run;
mod snap;
mod streams;
mod syscalls;
mod trace;
mod watchdog;
mod wss;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// What Dune ends with when it is Dune that failed, not the program: as
/// `env`, `nice` and `timeout` do.
const DUNE_FAILED: u8 = 125;

#[global_allocator]
static MEMORY: memory::OrEnd = memory::OrEnd;

/// Safe, direct use of the privileged CPU for ordinary Linux processes.
#[derive(Debug, Parser)]
#[command(name = "dune", version, after_help = EXIT_CODES, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    Run(run::RunArgs),
    Trace(trace::TraceArgs),
    Snap(snap::SnapArgs),
    Wss(wss::WssArgs),
    Check(check::CheckArgs),
    #[command(after_help = LAB_EXAMPLES)]
    Lab(dune_lab::LabArgs),
    Syscalls(syscalls::SyscallsArgs),
    Man(manual::ManArgs),
    Completions(manual::CompletionsArgs),
}

const EXIT_CODES: &str = "\
Exit codes of `run`, `trace` and `lab`:
  0-124  the program's own (2 also: wrong usage of dune)
  124    it was ended by --timeout (as timeout(1) does)
  125    Dune failed (the message says why)
  126    the program cannot be executed
  127    the program was not found
  128+n  it died of signal n (as a shell reports it): 152 after --cpu-time

Examples:
  dune run -- ls -l /          run ls in the sandbox
  dune run --strict -- CMD     and nothing but what you give it
  dune check                   what this machine offers, and what to do about the rest
  dune lab -- uname -a         run a command in the bundled virtual machine";

const LAB_EXAMPLES: &str = "\
Examples:
  dune lab -- uname -a
  dune lab --icount -- ./bench           # one instruction is one nanosecond
  dune lab --share . -- sh -c 'id > id.txt'
  dune lab --intel -- ./test             # Bochs with VMX and EPT instead of QEMU with SVM";

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return explain(&error),
    };
    let result = match cli.command {
        Task::Run(args) => run::run(&args),
        Task::Trace(args) => trace::trace(&args),
        Task::Snap(args) => snap::snap(&args),
        Task::Wss(args) => wss::wss(&args),
        Task::Check(args) => check::check(&args),
        Task::Lab(args) => return lab(&args),
        Task::Syscalls(args) => syscalls::list(&args),
        Task::Man(args) => manual::man(&args),
        Task::Completions(args) => manual::completions(&args),
    };
    result.unwrap_or_else(|error| {
        output::complain_of(&error);
        ExitCode::from(DUNE_FAILED)
    })
}

/// Prints what was asked for (`--help`), or what is wrong with the command line.
fn explain(error: &clap::Error) -> ExitCode {
    // There is nobody to tell that it cannot be printed.
    let _ = error.print();
    if error.use_stderr() {
        // Not clap's 2, which could be the program's.
        ExitCode::from(DUNE_FAILED)
    } else {
        ExitCode::SUCCESS
    }
}

/// Runs a command in the lab; reports failures by itself.
fn lab(args: &dune_lab::LabArgs) -> ExitCode {
    match dune_lab::run(args) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            output::complain(&output::with_remedy(&error));
            ExitCode::from(error.exit_code())
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_option_is_explained() {
        for command in Cli::command().get_subcommands() {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                assert!(
                    argument.get_help().is_some(),
                    "{} {argument}",
                    command.get_name()
                );
            }
        }
    }
}
