//! The lab's folder in the user's cache: kernels and saved states.
//!
//! ```text
//!   $XDG_CACHE_HOME/dune/lab/          (or ~/.cache/dune/lab)
//!     kernels/NAME/                    image, modules/, release
//!     states/NAME-KEY/                 ram, devices
//! ```
//!
//! Everything in it can be deleted at any time; it is made again when needed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::error::{LabError, io_error};

/// The lab's cache folder; created when missing.
pub(crate) fn folder(name: &str) -> Result<PathBuf, LabError> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))
        .unwrap_or_else(|| std::env::temp_dir().join("dune-cache"));
    let path = base.join("dune/lab").join(name);
    fs::create_dir_all(&path).map_err(io_error(format!(
        "create the cache folder {} (set XDG_CACHE_HOME to a folder you can write)",
        path.display()
    )))?;
    Ok(path)
}

/// Makes `target` (a folder) once, however many processes want it at once.
///
/// `make` fills an empty folder beside it, which is then renamed; so a folder
/// of that name is always complete. Returns whether it was made now.
pub(crate) fn make_once(
    target: &Path,
    make: impl FnOnce(&Path) -> Result<(), LabError>,
) -> Result<bool, LabError> {
    if target.is_dir() {
        return Ok(false);
    }
    let lock_path = target.with_added_extension("lock");
    let step = || format!("lock {}", lock_path.display());
    let lock = File::create(&lock_path).map_err(io_error(step()))?;
    flock(&lock, FlockOperation::LockExclusive).map_err(|errno| io_error(step())(errno.into()))?;
    if target.is_dir() {
        return Ok(false);
    }
    let draft = target.with_added_extension("new");
    if draft.exists() {
        // Left behind by a process that was killed: nobody else holds the lock.
        fs::remove_dir_all(&draft).map_err(io_error(format!("remove {}", draft.display())))?;
    }
    fs::create_dir(&draft).map_err(io_error(format!("create {}", draft.display())))?;
    let result = make(&draft).and_then(|()| {
        fs::rename(&draft, target).map_err(io_error(format!("rename {}", draft.display())))
    });
    if result.is_err() {
        let _ = fs::remove_dir_all(&draft);
    }
    result.map(|()| true)
}

/// A 64-bit FNV-1a hash: names things in the cache. Not for security.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fingerprint(u64);

impl Fingerprint {
    pub(crate) fn new() -> Self {
        Fingerprint(0xcbf2_9ce4_8422_2325)
    }

    #[must_use]
    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
        // A separator, so that ("ab", "c") and ("a", "bc") differ.
        self.0 = (self.0 ^ 0x100).wrapping_mul(0x0100_0000_01b3);
        self
    }

    /// A file as its path, size and time of change: cheaper than its contents,
    /// and different whenever a package manager replaced it.
    pub(crate) fn file(self, path: &Path) -> Result<Self, LabError> {
        use std::os::unix::fs::MetadataExt;
        let metadata =
            fs::metadata(path).map_err(io_error(format!("look at {}", path.display())))?;
        Ok(self
            .bytes(path.as_os_str().as_encoded_bytes())
            .bytes(&metadata.size().to_le_bytes())
            .bytes(&metadata.mtime().to_le_bytes())
            .bytes(&metadata.mtime_nsec().to_le_bytes()))
    }

    pub(crate) fn hex(self) -> String {
        format!("{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_keep_parts_apart() {
        let one = Fingerprint::new().bytes(b"ab").bytes(b"c").hex();
        let other = Fingerprint::new().bytes(b"a").bytes(b"bc").hex();
        assert_ne!(one, other);
    }

    #[test]
    fn a_folder_is_made_once_and_completely() {
        let base = tempfile::tempdir().unwrap();
        let target = base.path().join("thing");
        let failed = make_once(&target, |_| Err(LabError::Options("no".into())));
        assert!(failed.is_err());
        assert!(!target.exists(), "a failed attempt leaves nothing");
        let fill = |draft: &Path| fs::write(draft.join("file"), "x").map_err(io_error("write"));
        assert!(make_once(&target, fill).unwrap());
        assert!(!make_once(&target, |_| panic!("made twice")).unwrap());
        assert_eq!(fs::read(target.join("file")).unwrap(), b"x");
    }
}
