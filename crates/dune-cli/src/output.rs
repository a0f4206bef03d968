//! What the command prints.

use std::fmt::Display;
use std::io::{self, Write};

/// One line on standard error: the cause and the remedy.
pub(crate) fn complain(message: &(impl Display + ?Sized)) {
    // There is nobody to tell that standard error is closed.
    let _ = writeln!(io::stderr(), "dune: {}", one_line(message));
}

/// One line for an error with its causes. Many errors name their cause
/// themselves; what has been said is not said again.
pub(crate) fn complain_of(error: &anyhow::Error) {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    complain(&text);
}

/// The message as one line, whatever is in it.
pub(crate) fn one_line(message: &(impl Display + ?Sized)) -> String {
    let text = message.to_string();
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines.join("; ")
}

/// Prints to standard output; a reader who went away is no failure.
///
/// # Errors
///
/// Any other failure to write.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("cannot write to standard output"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line() {
        assert_eq!(one_line("cause:\n\n  remedy\n"), "cause:; remedy");
    }
}
