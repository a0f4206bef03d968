//! Absolute paths in one spelling.

use core::fmt;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// An absolute path without `.`, `..`, empty names or a slash at its end (but
/// for `/` itself), and without a zero byte.
///
/// Nothing is looked up: `..` takes away the name before it, as a person reads
/// it. Whether that is where the kernel would go is for the caller to make
/// sure, who has the kernel resolve the path and asks for the result's rights.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NormalPath(Vec<u8>);

impl NormalPath {
    /// The root folder.
    #[must_use]
    pub fn root() -> Self {
        Self(b"/".to_vec())
    }

    /// From a path's bytes, or `None` if it is not absolute or holds a zero.
    #[must_use]
    pub fn new(path: &[u8]) -> Option<Self> {
        if path.first() != Some(&b'/') || path.contains(&0) {
            return None;
        }
        let mut normal = Self::root();
        for name in path.split(|&byte| byte == b'/') {
            normal.push(name);
        }
        Some(normal)
    }

    /// This path with `name` below it; `.`, `..` and an empty name as in
    /// [`NormalPath::new`]. A name with a slash is taken as several.
    #[must_use]
    pub fn join(&self, name: &[u8]) -> Self {
        let mut joined = self.clone();
        for name in name.split(|&byte| byte == b'/') {
            joined.push(name);
        }
        joined
    }

    fn push(&mut self, name: &[u8]) {
        match name {
            b"" | b"." => {}
            b".." => {
                let end = self.0.iter().rposition(|&byte| byte == b'/');
                // The root's own parent is the root.
                self.0.truncate(end.unwrap_or(0).max(1));
            }
            name => {
                if self.0.len() > 1 {
                    self.0.push(b'/');
                }
                self.0.extend_from_slice(name);
            }
        }
    }

    /// The folder it is in; the root's is the root.
    #[must_use]
    pub fn parent(&self) -> Self {
        self.join(b"..")
    }

    /// Whether it is `other` or below it.
    #[must_use]
    pub fn is_within(&self, other: &Self) -> bool {
        match self.0.strip_prefix(other.0.as_slice()) {
            Some(rest) => rest.is_empty() || rest[0] == b'/' || other.0.len() == 1,
            None => false,
        }
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// As the standard library has it.
    #[must_use]
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }
}

impl fmt::Display for NormalPath {
    /// As a shell takes it: quoted where it must be.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = String::from_utf8_lossy(&self.0);
        let plain = |c: char| c.is_alphanumeric() || "/._-+@%:,=~".contains(c);
        if text.chars().all(plain) {
            f.write_str(&text)
        } else if text.chars().any(char::is_control) {
            // $'...' is the one quoting of shells that keeps a message one line.
            write!(f, "$'{}'", text.escape_default())
        } else {
            write!(f, "'{}'", text.replace('\'', r"'\''"))
        }
    }
}

impl fmt::Debug for NormalPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn normal(path: &str) -> String {
        NormalPath::new(path.as_bytes()).map_or_else(|| "-".to_owned(), |path| path.to_string())
    }

    #[test]
    fn spellings_become_one() {
        for (path, expected) in [
            ("/", "/"),
            ("//", "/"),
            ("/a//b/", "/a/b"),
            ("/a/./b", "/a/b"),
            ("/a/../b", "/b"),
            ("/../..", "/"),
            ("/a/b/../../c", "/c"),
            ("/...", "/..."),
            ("a/b", "-"),
            ("", "-"),
            ("/a\0b", "-"),
        ] {
            assert_eq!(normal(path), expected, "{path:?}");
        }
    }

    #[test]
    fn within_is_by_whole_names() {
        let path = |text: &str| NormalPath::new(text.as_bytes()).unwrap();
        assert!(path("/a/b").is_within(&path("/a")));
        assert!(path("/a").is_within(&path("/a")));
        assert!(path("/a").is_within(&path("/")));
        assert!(!path("/ab").is_within(&path("/a")));
        assert!(!path("/a").is_within(&path("/a/b")));
    }

    #[test]
    fn a_message_stays_one_line_and_is_quoted() {
        assert_eq!(normal("/a b"), "'/a b'");
        assert_eq!(normal("/it's"), r"'/it'\''s'");
        assert_eq!(normal("/a\nb"), r"$'/a\nb'");
    }

    proptest! {
        #[test]
        fn what_comes_out_is_normal(path in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(normal) = NormalPath::new(&path) {
                let bytes = normal.as_bytes();
                prop_assert_eq!(bytes[0], b'/');
                if bytes.len() > 1 {
                    for name in bytes[1..].split(|&byte| byte == b'/') {
                        prop_assert!(!matches!(name, b"" | b"." | b".."));
                    }
                }
                prop_assert_eq!(NormalPath::new(bytes), Some(normal.clone()));
                prop_assert!(normal.is_within(&normal.parent()));
                prop_assert!(normal.is_within(&NormalPath::root()));
            }
        }

        #[test]
        fn joining_is_the_same_as_writing_out(a in "(/[a.]{0,3}){1,5}", b in "[a./]{0,8}") {
            let joined = NormalPath::new(a.as_bytes()).unwrap().join(b.as_bytes());
            let written = NormalPath::new(format!("{a}/{b}").as_bytes()).unwrap();
            prop_assert_eq!(joined, written);
        }
    }
}
