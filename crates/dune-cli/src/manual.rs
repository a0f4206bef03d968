//! `dune man` and `dune completions`: what a package installs beside the
//! command, made from the command line's own description.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;

use crate::{Cli, output};

/// Write manual pages, one for each command, into a folder.
#[derive(Debug, Args)]
#[command(after_help = MAN_EXAMPLES)]
pub(crate) struct ManArgs {
    /// The folder; it is made if it is not there.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

const MAN_EXAMPLES: &str = "\
Examples:
  dune man ~/.local/share/man/man1
  dune man . && man ./dune-run.1";

/// Print the completions for a shell.
#[derive(Debug, Args)]
#[command(after_help = COMPLETIONS_EXAMPLES)]
pub(crate) struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  dune completions bash > ~/.local/share/bash-completion/completions/dune
  dune completions zsh > ~/.zfunc/_dune
  dune completions fish > ~/.config/fish/completions/dune.fish";

/// Writes the pages.
///
/// # Errors
///
/// If the folder cannot be written to.
pub(crate) fn man(args: &ManArgs) -> anyhow::Result<ExitCode> {
    let folder = &args.folder;
    let failed = || format!("cannot write manual pages to {}", folder.display());
    std::fs::create_dir_all(folder).with_context(failed)?;
    let mut command = Cli::command();
    command.build();
    pages(&command, folder.as_path()).with_context(failed)?;
    Ok(ExitCode::SUCCESS)
}

fn pages(command: &Command, folder: &std::path::Path) -> io::Result<()> {
    let name = command
        .get_display_name()
        .unwrap_or_else(|| command.get_name());
    let page = clap_mangen::Man::new(command.clone().display_name(name.to_owned()).version(""));
    let mut text = Vec::new();
    page.render(&mut text)?;
    std::fs::write(folder.join(format!("{name}.1")), text)?;
    command
        .get_subcommands()
        .filter(|command| command.get_name() != "help")
        .try_for_each(|command| pages(command, folder))
}

/// Prints the completions.
///
/// # Errors
///
/// If standard output cannot be written.
pub(crate) fn completions(args: &CompletionsArgs) -> anyhow::Result<ExitCode> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "dune", &mut text);
    output::print(&String::from_utf8_lossy(&text))?;
    Ok(ExitCode::SUCCESS)
}
