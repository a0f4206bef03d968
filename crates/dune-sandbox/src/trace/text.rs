//! Bytes as strings of C.

/// Appends `bytes` in quotes, what cannot be printed by its escape.
pub(crate) fn quote(out: &mut String, bytes: &[u8]) {
    out.push('"');
    for (index, &byte) in bytes.iter().enumerate() {
        match byte {
            b'"' => out.push_str("\\\""),
            b'\\' => out.push_str("\\\\"),
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            0x0b => out.push_str("\\v"),
            0x0c => out.push_str("\\f"),
            b' '..=b'~' => out.push(char::from(byte)),
            _ => {
                // Short, unless a digit that follows would be taken for a part.
                let digit_follows = bytes.get(index + 1).is_some_and(u8::is_ascii_digit);
                octal(out, byte, if digit_follows { 3 } else { 1 });
            }
        }
    }
    out.push('"');
}

/// Appends a backslash and the octal digits of `byte`, at least `least`. By
/// hand: most bytes of binary data go this way.
fn octal(out: &mut String, byte: u8, least: u32) {
    out.push('\\');
    for place in (0..3_u32).rev() {
        let rest = byte >> (3 * place);
        if rest != 0 || place < least {
            out.push(char::from(b'0' + (rest & 7)));
        }
    }
}

/// As [`quote`], at most `limit` bytes, with `...` if there are more.
pub(crate) fn quote_some(out: &mut String, bytes: &[u8], limit: usize, whole: u64) {
    quote(out, &bytes[..bytes.len().min(limit)]);
    if whole > limit as u64 {
        out.push_str("...");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_quoted_as_c_would() {
        let quoted = |bytes: &[u8]| {
            let mut out = String::new();
            quote(&mut out, bytes);
            out
        };
        assert_eq!(quoted(b"a\"b\\c\n\t"), r#""a\"b\\c\n\t""#);
        assert_eq!(quoted(b"\x7fELF\x02\x01\x00"), r#""\177ELF\2\1\0""#);
        assert_eq!(quoted(b"\x011"), r#""\0011""#);
        assert_eq!(quoted("é".as_bytes()), r#""\303\251""#);
        let mut out = String::new();
        quote_some(&mut out, b"abcd", 2, 4);
        assert_eq!(out, r#""ab"..."#);
    }
}
