//! What the calls of the table copy: every structure at every bad address, and
//! every pointer in a structure, by its row alone.

use dune_sandbox::host::Errno;
use dune_sandbox::range::USER_HI;
use dune_sandbox::table::{Arg, Call, Flow, Handling, Shape, calls};

use super::{SUCCEEDED, Target, at, call, refused, stage};

/// Words of a structure that the attacker fills.
type Words = [u64; 16];

pub(crate) fn structures(target: &Target) {
    for entry in calls() {
        if !matches!(
            entry.handling,
            Handling::Forwarded | Handling::Emulated(_) | Handling::Control(_)
        ) {
            continue;
        }
        for (index, arg) in entry.args.iter().enumerate() {
            let Arg::Copied(shape) = arg else { continue };
            let mut bad: Vec<u64> = target.addresses().to_vec();
            // The end lies outside.
            bad.push(USER_HI - 8);
            for address in bad {
                attempt(entry, index, address, "itself");
                for (name, words) in nested(shape, address) {
                    attempt(entry, index, at(&words), name);
                }
            }
        }
    }
}

/// One call with a bad argument in the place `index`; the others are as good
/// as the row says, but for descriptors. So a refusal that speaks of the
/// descriptor comes from the kernel, which must not have been asked.
fn attempt(entry: &Call, index: usize, value: u64, what: &str) {
    let mut args = [0; 6];
    for (other, arg) in entry.args.iter().enumerate() {
        args[other] = match arg {
            Arg::Fd => u64::MAX,
            Arg::Copied(Shape::Path) => at(c"/dev/null"),
            _ => 0,
        };
    }
    match entry.args[index] {
        Arg::Copied(
            Shape::Vectors(count, _) | Shape::Address(count) | Shape::Messages(count, _),
        ) => args[usize::from(count)] = count_of(entry.args[index]),
        Arg::Copied(Shape::Plain(dune_sandbox::table::Size::Arg(count))) => {
            args[usize::from(count)] = 24;
        }
        _ => {}
    }
    if entry.name == "getsockopt" {
        // An option that there is.
        (args[1], args[2]) = (1, 3);
    }
    args[index] = value;
    let result = call(entry.nr, &args);
    refused(&format!("{} argument {index}, {what}", entry.name), result);
    if result == Err(Errno::EBADF) && stage::checks_pointers() {
        println!("{} argument {index}, {what}: the kernel saw it", entry.name);
        std::process::exit(SUCCEEDED);
    }
}

fn count_of(arg: Arg) -> u64 {
    match arg {
        Arg::Copied(Shape::Address(_)) => 16,
        _ => 1,
    }
}

/// Structures of this shape with one bad pointer each.
fn nested(shape: &Shape, bad: u64) -> Vec<(&'static str, Words)> {
    let mut vector = Words::default();
    (vector[0], vector[1]) = (bad, 16);
    // Whoever looks at the structure needs the vector to live on.
    let kept: &'static Words = Box::leak(Box::new(vector));
    let message = |name, len, vectors, control, control_len| {
        let mut words = Words::default();
        words[..6].copy_from_slice(&[
            name,
            len,
            vectors,
            u64::from(vectors != 0),
            control,
            control_len,
        ]);
        words
    };
    match shape {
        Shape::Path | Shape::Plain(_) | Shape::Address(_) | Shape::LengthOf(_) => Vec::new(),
        Shape::Strings => vec![("a string", {
            let mut words = Words::default();
            words[0] = bad;
            words
        })],
        Shape::Vectors(..) => vec![("a vector", vector)],
        Shape::SignalSet => vec![("the set", {
            let mut words = Words::default();
            (words[0], words[1]) = (bad, 8);
            words
        })],
        Shape::Message(flow) | Shape::Messages(_, flow) => {
            let mut all = vec![
                ("the address", message(bad, 16, 0, 0, 0)),
                ("the vectors", message(0, 0, bad, 0, 0)),
                ("memory of a vector", message(0, 0, at(kept), 0, 0)),
                ("control messages", message(0, 0, 0, bad, 24)),
            ];
            let wrap = message(0, 0, 0, at(kept), u64::MAX - at(kept) + 64);
            all.push(("wrapping control messages", wrap));
            if *flow == Flow::In {
                // A length that goes beyond the buffer.
                let mut lying = Words::default();
                lying[8..10].copy_from_slice(&[1 << 40, 1 << 32 | 1]);
                let lying: &'static Words = Box::leak(Box::new(lying));
                all.push(("a control message", message(0, 0, 0, at(&lying[8..]), 24)));
            }
            all
        }
    }
}
