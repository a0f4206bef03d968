//! `dune syscalls`: the sandbox's table of system calls.

use std::fmt::Write;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use dune_sandbox::table::{self, Arg, Call, Flow, Handling, Shape, Size};
use serde::Serialize;

use crate::output;

/// List every system call and what the sandbox does with it.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct SyscallsArgs {
    /// Only calls that are handled like this.
    #[arg(long, value_name = "HOW")]
    handling: Option<How>,

    /// Only calls whose name contains this.
    #[arg(value_name = "NAME")]
    name: Option<String>,

    /// Print JSON for programs.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  dune syscalls
  dune syscalls open
  dune syscalls --handling missing --json";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum How {
    /// Arguments checked, then passed to the host kernel.
    Forwarded,
    /// Done by the guard.
    Emulated,
    /// Always answered with an error, as a kernel without it would.
    Refused,
    /// Not there yet: ENOSYS and a warning.
    Missing,
}

impl How {
    fn of(call: &Call) -> Self {
        match call.handling {
            Handling::Forwarded => Self::Forwarded,
            Handling::Emulated(_) | Handling::Control(_) => Self::Emulated,
            Handling::Refused(_) => Self::Refused,
            Handling::Missing => Self::Missing,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Forwarded => "forwarded",
            Self::Emulated => "emulated",
            Self::Refused => "refused",
            Self::Missing => "missing",
        }
    }
}

#[derive(Serialize)]
struct Row {
    number: u32,
    name: &'static str,
    handling: How,
    #[serde(skip_serializing_if = "Option::is_none")]
    errno: Option<String>,
    arguments: Vec<String>,
}

impl Row {
    fn of(call: &Call) -> Self {
        let errno = match call.handling {
            Handling::Refused(errno) => Some(format!("{errno:?}")),
            Handling::Missing => Some("ENOSYS".to_owned()),
            _ => None,
        };
        Self {
            number: call.nr,
            name: call.name,
            handling: How::of(call),
            errno,
            arguments: call.args.iter().map(describe).collect(),
        }
    }
}

fn describe(arg: &Arg) -> String {
    match arg {
        Arg::Value => "value".to_owned(),
        Arg::Fd => "descriptor".to_owned(),
        Arg::Path => "path".to_owned(),
        Arg::Text => "string".to_owned(),
        Arg::In(size) => format!("in[{}]", describe_size(size)),
        Arg::Out(size) => format!("out[{}]", describe_size(size)),
        Arg::InOut(size) => format!("inout[{}]", describe_size(size)),
        Arg::SigSet => "signal set".to_owned(),
        Arg::Pages(arg) => format!("pages[arg {arg}]"),
        Arg::Copied(shape) => describe_shape(shape),
        Arg::Checked => "checked".to_owned(),
    }
}

fn describe_shape(shape: &Shape) -> String {
    let way = |flow: &Flow| match flow {
        Flow::In => "in",
        Flow::Out => "out",
    };
    match shape {
        Shape::Path => "path".to_owned(),
        Shape::Plain(size) => format!("copied[{}]", describe_size(size)),
        Shape::Strings => "strings".to_owned(),
        Shape::Vectors(arg, flow) => format!("{} iovec[arg {arg}]", way(flow)),
        Shape::Address(arg) => format!("address[arg {arg}]"),
        Shape::Message(flow) => format!("{} msghdr", way(flow)),
        Shape::Messages(arg, flow) => format!("{} mmsghdr[arg {arg}]", way(flow)),
        Shape::LengthOf(arg) => format!("length of arg {arg}"),
        Shape::SignalSet => "signal set and size".to_owned(),
    }
}

fn describe_size(size: &Size) -> String {
    match size {
        Size::Bytes(bytes) => bytes.to_string(),
        Size::Arg(arg) | Size::Arg32(arg) => format!("arg {arg}"),
        Size::Items(arg, bytes) => format!("arg {arg} x {bytes}"),
        Size::Bits(arg) => format!("arg {arg} bits"),
        Size::BytePerPage(arg) => format!("a byte for each page of arg {arg}"),
    }
}

/// Prints the table.
///
/// # Errors
///
/// If standard output cannot be written.
pub(crate) fn list(args: &SyscallsArgs) -> anyhow::Result<ExitCode> {
    let rows: Vec<Row> = table::calls()
        .iter()
        .filter(|call| args.handling.is_none_or(|how| how == How::of(call)))
        .filter(|call| {
            args.name
                .as_ref()
                .is_none_or(|name| call.name.contains(name.as_str()))
        })
        .map(Row::of)
        .collect();
    if args.json {
        output::print(&(serde_json::to_string_pretty(&rows)? + "\n"))?;
    } else {
        output::print(&text(&rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn text(rows: &[Row]) -> String {
    let mut text = String::new();
    for row in rows {
        let mut handling = row.handling.name().to_owned();
        if let Some(errno) = &row.errno {
            let _ = write!(handling, " ({errno})");
        }
        let arguments = row.arguments.join(", ");
        let line = format!(
            "{:>4}  {:<26}{handling:<22}{arguments}",
            row.number, row.name
        );
        let _ = writeln!(text, "{}", line.trim_end());
    }
    let count = |how: How| rows.iter().filter(|row| row.handling == how).count();
    let _ = writeln!(
        text,
        "{} calls: {} forwarded, {} emulated, {} refused, {} missing",
        rows.len(),
        count(How::Forwarded),
        count(How::Emulated),
        count(How::Refused),
        count(How::Missing),
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_listing_has_every_call() {
        let rows: Vec<Row> = table::calls().iter().map(Row::of).collect();
        let text = text(&rows);
        assert_eq!(text.lines().count(), rows.len() + 1);
        assert!(text.contains("openat"), "{text}");
    }
}
