//! What the command prints.

use std::error::Error;
use std::fmt::Display;
use std::io::{self, Write};

/// One line on standard error: the cause and the remedy.
pub(crate) fn complain(message: &(impl Display + ?Sized)) {
    // There is nobody to tell that standard error is closed.
    let _ = writeln!(io::stderr(), "dune: {}", one_line(message));
}

/// One line of JSON on standard error.
pub(crate) fn complain_in_json(line: &str) {
    // There is nobody to tell that standard error is closed.
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
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
    add_remedy(&mut text, error.as_ref());
    complain(&text);
}

/// The error's message, and what to do about a limit of the machine that is
/// the cause of it.
pub(crate) fn with_remedy(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    add_remedy(&mut text, error);
    text
}

/// Limits are met in the middle of anything, so the remedy is found here and
/// not said by each of the many errors.
fn add_remedy(text: &mut String, error: &(dyn Error + 'static)) {
    let errno = std::iter::successors(Some(error), |&error| error.source())
        .find_map(|error| error.downcast_ref::<io::Error>()?.raw_os_error());
    let remedy = match errno {
        Some(libc::EMFILE) => "raise `ulimit -n`",
        Some(libc::ENFILE) => "raise `fs.file-max` (sysctl)",
        Some(libc::ENOMEM) => "free some memory or raise its limit (`ulimit -v`)",
        Some(libc::EAGAIN) => "end some processes or raise `ulimit -u`",
        Some(libc::ENOSPC) => "free some space on that disk",
        _ => return,
    };
    if !text.contains(remedy) {
        text.push_str("; ");
        text.push_str(remedy);
    }
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

    #[test]
    fn a_limit_has_its_remedy_once() {
        let error = io::Error::from_raw_os_error(libc::EMFILE);
        let text = with_remedy(&error);
        assert!(text.ends_with("; raise `ulimit -n`"), "{text}");
        let error = anyhow::Error::new(error).context("raise `ulimit -n`");
        let mut text = "no descriptor; raise `ulimit -n`".to_owned();
        add_remedy(&mut text, error.as_ref());
        assert_eq!(text.matches("ulimit").count(), 1, "{text}");
    }
}
