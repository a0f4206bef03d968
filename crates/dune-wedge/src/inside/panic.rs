//! Panics inside a compartment: told to the guard, with their message.

use core::fmt::{self, Write};
use std::panic::PanicHookInfo;

use super::{ask, is_inside, request};

/// The most of a message that is reported.
pub(crate) const LONGEST_MESSAGE: usize = 512;

/// Sees to it that a panic inside a compartment is reported to the guard, which ends the
/// compartment. Elsewhere the hook from before is called.
pub(crate) fn install_hook() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if is_inside() {
            report(info);
        }
        before(info);
    }));
}

fn report(info: &PanicHookInfo<'_>) -> ! {
    let mut text = Text {
        bytes: [0; LONGEST_MESSAGE],
        length: 0,
    };
    let message = info.payload_as_str().unwrap_or("a value that is no text");
    // A message that does not fit is cut.
    let _ = match info.location() {
        Some(location) => write!(text, "{message}, at {location}"),
        None => write!(text, "{message}"),
    };
    loop {
        ask(
            request::PANIC,
            [text.bytes.as_ptr() as u64, text.length as u64, 0, 0, 0],
        );
    }
}

struct Text {
    bytes: [u8; LONGEST_MESSAGE],
    length: usize,
}

impl Write for Text {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let free = self.bytes.get_mut(self.length..).unwrap_or_default();
        let length = part.len().min(free.len());
        if let (Some(to), Some(from)) = (free.get_mut(..length), part.as_bytes().get(..length)) {
            to.copy_from_slice(from);
        }
        self.length += length;
        Ok(())
    }
}
