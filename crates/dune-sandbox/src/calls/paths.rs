//! Paths under file rules: resolved once, decided, and held.
//!
//! What a path names can change between a check and its use: another thread
//! of the program, or another process, puts a symbolic link in its way. So
//! under file rules the host kernel never gets the program's path:
//!
//! ```text
//!   path, folder --openat(O_PATH)--> the file itself, held by a descriptor of the guard
//!                                       |  the kernel's own name for it: /proc/self/fd/N
//!                                       v
//!                                    the rules decide by that name
//!                                       |
//!   the call, with /proc/self/fd/N <----+   (the very file that was decided on)
//! ```
//!
//! Where the last name is not followed, or is an entry to be made or removed,
//! it is the folder that is held, and the call gets `/proc/self/fd/N/NAME`.
//! The descriptor is one of the guard's while the call lasts: the program
//! cannot put another file in its place.
//!
//! A file without a name (a pipe, a socket, a memory file) is allowed if the
//! path says that it is one of the program's own descriptors.

use std::ffi::CString;
use std::os::fd::RawFd;
use std::sync::Arc;

use linux_raw_sys::general::{
    __NR_fcntl, __NR_mknod, __NR_mknodat, __NR_openat, __NR_readlinkat, AT_EMPTY_PATH, AT_FDCWD,
    F_DUPFD_CLOEXEC, O_ACCMODE, O_APPEND, O_CLOEXEC, O_CREAT, O_DIRECTORY, O_EXCL, O_NOFOLLOW,
    O_PATH, O_RDONLY, O_TRUNC, O_WRONLY, S_IFBLK, S_IFCHR, S_IFMT,
};

use crate::calls::{fd, forward_always, own, own_mut, procfs};
use crate::guard::Guard;
use crate::host::Errno;
use crate::policy::uses::{self, Last};
use crate::policy::{FileRules, Need, NormalPath, Remedy};
use crate::program::Program;
use crate::table::{Arg, Args, Call};
use crate::user::PATH_MAX;

/// `AT_FDCWD` in a register.
const CWD: u64 = AT_FDCWD as i64 as u64;
/// `O_TMPFILE` without the `O_DIRECTORY` in it.
const TMPFILE: u64 = 0o20_000_000;
/// Longest name in a folder.
const NAME_MAX: usize = 255;

/// A descriptor of the guard that lasts as long as one call.
pub(crate) struct Pin {
    program: Arc<Program>,
    fd: RawFd,
}

impl core::fmt::Debug for Pin {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Pin({})", self.fd)
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.program.give_back(self.fd, |fd| fd::close(fd as u64));
    }
}

impl Pin {
    /// The file that `path` names from `folder`.
    fn of_path(
        program: &Arc<Program>,
        folder: u64,
        path: &[u8],
        flags: u32,
    ) -> Result<Self, Errno> {
        let path = CString::new(path).map_err(|_| Errno::ENOENT)?;
        let flags = u64::from(O_PATH | O_CLOEXEC | flags);
        Self::made_by(program, || {
            forward_always(
                __NR_openat,
                [folder, own(path.as_bytes_with_nul()), flags, 0, 0, 0],
            )
        })
    }

    /// The file of a descriptor of the program.
    fn of_descriptor(program: &Arc<Program>, fd: u64) -> Result<Self, Errno> {
        Self::made_by(program, || {
            forward_always(__NR_fcntl, [fd, u64::from(F_DUPFD_CLOEXEC), 3, 0, 0, 0])
        })
    }

    fn made_by(
        program: &Arc<Program>,
        make: impl FnOnce() -> Result<u64, Errno>,
    ) -> Result<Self, Errno> {
        let fd = program.take(|| make().map(|fd| fd as RawFd))?;
        Ok(Self {
            program: Arc::clone(program),
            fd,
        })
    }

    /// The path by which the kernel finds the file again, and below it `rest`.
    fn path(&self, rest: &[u8]) -> Vec<u8> {
        let mut path = format!("/proc/self/fd/{}", self.fd).into_bytes();
        if !rest.is_empty() {
            path.push(b'/');
            path.extend_from_slice(rest);
        }
        path
    }

    fn real(&self) -> Result<Real, Errno> {
        let name = procfs::path_of(self.fd as u64).map_err(|_| Errno::EACCES)?;
        Ok(Real::of(&name, self.program.pid()))
    }
}

/// What the kernel calls an open file.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Real {
    Path(NormalPath),
    /// It has no path: a pipe, a socket, a memory file.
    Nameless,
    /// It has one that cannot be reached from this process's root.
    Elsewhere,
}

impl Real {
    fn of(name: &[u8], pid: u32) -> Self {
        if name.starts_with(b"/memfd:") {
            return Self::Nameless;
        }
        let alive = name.strip_suffix(b" (deleted)").unwrap_or(name);
        match NormalPath::new(alive) {
            Some(path) => Self::Path(as_self(path, pid)),
            None if name.starts_with(b"(") => Self::Elsewhere,
            None => Self::Nameless,
        }
    }
}

/// The process's own folder in `/proc` by the name that rules have for it.
fn as_self(path: NormalPath, pid: u32) -> NormalPath {
    let own = NormalPath::root().join(format!("proc/{pid}").as_bytes());
    if !path.is_within(&own) {
        return path;
    }
    let rest = &path.as_bytes()[own.as_bytes().len()..];
    NormalPath::root().join(b"proc/self").join(rest)
}

/// Whether a path says that it is a descriptor of the process itself.
fn is_own_descriptor(path: &[u8], pid: u32) -> bool {
    let Some(path) = NormalPath::new(path) else {
        return false;
    };
    let root = NormalPath::root();
    let below = |folder: &str| path.parent() == root.join(folder.as_bytes());
    let standard = ["dev/stdin", "dev/stdout", "dev/stderr"];
    below("proc/self/fd")
        || below("proc/thread-self/fd")
        || below("dev/fd")
        || below(&format!("proc/{pid}/fd"))
        || standard
            .iter()
            .any(|name| path == root.join(name.as_bytes()))
}

/// The folder part and the last name of a path, and whether a slash follows.
fn split(path: &[u8]) -> (&[u8], &[u8], bool) {
    let end = path.iter().rposition(|&byte| byte != b'/');
    let Some(end) = end.map(|end| end + 1) else {
        // Nothing but slashes, or nothing.
        return (if path.is_empty() { b"." } else { b"/" }, b".", false);
    };
    let slash = end < path.len();
    let start = path[..end].iter().rposition(|&byte| byte == b'/');
    match start {
        None => (b".", &path[..end], slash),
        Some(0) => (b"/", &path[1..end], slash),
        Some(at) => (&path[..at], &path[at + 1..end], slash),
    }
}

impl Guard {
    fn file_rules(&self) -> Option<Arc<Program>> {
        self.program
            .policy()
            .files()
            .is_some()
            .then(|| Arc::clone(&self.program))
    }

    /// Holds what the paths and descriptors of a call name, and puts what
    /// names them safely in their places. `checked` are the call's arguments
    /// with the guard's copies of the strings.
    ///
    /// # Errors
    ///
    /// `EACCES` for what the rules refuse, otherwise what the kernel says of
    /// the path.
    #[inline]
    pub(crate) fn hold_paths(&mut self, call: &Call, checked: &mut Args) -> Result<(), Errno> {
        match self.program.policy().files() {
            Some(_) => self.hold_paths_by_rules(call, checked),
            None => Ok(()),
        }
    }

    #[inline(never)]
    fn hold_paths_by_rules(&mut self, call: &Call, checked: &mut Args) -> Result<(), Errno> {
        let uses = uses::paths(call.nr);
        let changed = uses::changed_descriptor(call.nr);
        if uses.is_empty() && changed.is_none() {
            return Ok(());
        }
        let Some(program) = self.file_rules() else {
            return Ok(());
        };
        refuse_device_node(&program, call, checked)?;
        if let Some(arg) = changed {
            checked[usize::from(arg)] =
                self.hold_descriptor(&program, call.name, checked[usize::from(arg)])?;
        }
        let before = *checked;
        for path_use in uses {
            let arg = usize::from(path_use.path);
            let folder_arg = path_use.folder.map(usize::from);
            let folder = folder_arg.map_or(CWD, |arg| before[arg]);
            let need = path_use.resolved_need(&before);
            let string = call.args[..arg]
                .iter()
                .filter(|kind| matches!(kind, Arg::Path | Arg::Text))
                .count();
            let path = match before[arg] {
                0 => None,
                _ => self.strings.text(string).map(<[u8]>::to_vec),
            };
            let by_descriptor = match &path {
                // `utimensat` and `futimesat` take no path for the descriptor
                // itself.
                None => matches!(need, Need::Attributes) && folder_arg.is_some(),
                Some(path) => {
                    let flags = uses::empty_path_flag(call.nr)
                        .map_or(0, |arg| before[usize::from(arg)] as u32);
                    path.is_empty() && flags & AT_EMPTY_PATH != 0
                }
            };
            if by_descriptor && folder as i32 != AT_FDCWD {
                if let Some(arg) = folder_arg {
                    checked[arg] = self.hold_descriptor(&program, call.name, folder)?;
                }
                continue;
            }
            let path = match path {
                // Null, or empty: the kernel says what that is, unless it is
                // the working directory.
                None => continue,
                Some(path) if path.is_empty() && by_descriptor => b".".to_vec(),
                Some(path) if path.is_empty() => continue,
                Some(path) => path,
            };
            let last = path_use.resolved_last(&before);
            let held = self.hold(&program, folder, &path, last, need, &|path| {
                format!("{}({path})", call.name)
            })?;
            self.strings.set_text(string, &held)?;
        }
        Ok(())
    }

    /// Holds what a path for `open` names; `flags` may change with it. Without
    /// file rules, the path as it is.
    ///
    /// # Errors
    ///
    /// As [`Guard::hold_paths`].
    pub(crate) fn hold_opened(
        &mut self,
        folder: u64,
        path: u64,
        flags: &mut u64,
    ) -> Result<u64, Errno> {
        let address = self.copy_path(path)?;
        let Some(program) = self.file_rules() else {
            return Ok(address);
        };
        let path = self.strings.text(0).unwrap_or_default().to_vec();
        if path.is_empty() {
            return Ok(address);
        }
        let held = self.hold_open(&program, folder, &path, flags)?;
        self.strings.set_text(0, &held)?;
        Ok(address)
    }

    fn hold_open(
        &self,
        program: &Arc<Program>,
        folder: u64,
        path: &[u8],
        flags: &mut u64,
    ) -> Result<Vec<u8>, Errno> {
        let asked = *flags;
        let has = |flag: u32| asked & u64::from(flag) != 0;
        let request = |path: &str| format!("open({path}, {})", flag_names(asked));
        if has(O_PATH) {
            let last = if has(O_NOFOLLOW) {
                Last::NoFollow
            } else {
                Last::Follow
            };
            return self.hold(program, folder, path, last, Need::Look, &request);
        }
        if asked & TMPFILE != 0 && has(O_DIRECTORY) {
            return self.hold(program, folder, path, Last::Follow, Need::Entries, &request);
        }
        let writes = asked & u64::from(O_ACCMODE) != u64::from(O_RDONLY) || has(O_TRUNC);
        let need = if writes { Need::Write } else { Need::Read };
        if !has(O_CREAT) {
            let last = if has(O_NOFOLLOW) {
                Last::NoFollow
            } else {
                Last::Follow
            };
            return self.hold(program, folder, path, last, need, &request);
        }
        if has(O_EXCL) {
            return self.hold(program, folder, path, Last::Entry, Need::Entries, &request);
        }
        self.hold_created(program, folder, path, flags, need, &request)
    }

    /// `O_CREAT`: the file if there is one, otherwise its place in the folder,
    /// which a dangling link may tell.
    fn hold_created(
        &self,
        program: &Arc<Program>,
        mut folder: u64,
        path: &[u8],
        flags: &mut u64,
        need: Need,
        request: &dyn Fn(&str) -> String,
    ) -> Result<Vec<u8>, Errno> {
        /// As many links as the kernel follows.
        const MOST_LINKS: u32 = 40;
        let no_follow = *flags & u64::from(O_NOFOLLOW) != 0;
        let mut path = path.to_vec();
        for _ in 0..MOST_LINKS {
            let last = if no_follow {
                Last::NoFollow
            } else {
                Last::Follow
            };
            match Pin::of_path(
                program,
                folder,
                &path,
                if no_follow { O_NOFOLLOW } else { 0 },
            ) {
                Ok(_) => return self.hold(program, folder, &path, last, need, request),
                Err(Errno::ENOENT) => {}
                Err(errno) => return Err(errno),
            }
            let (parent, name, slash) = split(&path);
            let parent = Pin::of_path(program, folder, parent, O_DIRECTORY)?;
            match read_link(parent.fd as u64, name) {
                Some(target) if !no_follow => {
                    folder = parent.fd as u64;
                    self.pins.borrow_mut().push(parent);
                    path = target;
                }
                _ => {
                    // Whatever takes the place from now on is not followed.
                    *flags |= u64::from(O_NOFOLLOW);
                    let mut entry = name.to_vec();
                    if slash {
                        entry.push(b'/');
                    }
                    let folder = parent.fd as u64;
                    self.pins.borrow_mut().push(parent);
                    return self.hold(program, folder, &entry, Last::Entry, Need::Entries, request);
                }
            }
        }
        Err(Errno::ELOOP)
    }

    /// Holds one path for a call of another module. Without file rules, the
    /// path as it is.
    ///
    /// # Errors
    ///
    /// As [`Guard::hold_paths`].
    pub(crate) fn hold_path(
        &self,
        folder: u64,
        path: &[u8],
        last: Last,
        need: Need,
        request: &dyn Fn(&str) -> String,
    ) -> Result<Vec<u8>, Errno> {
        match self.file_rules() {
            Some(program) if !path.is_empty() => {
                self.hold(&program, folder, path, last, need, request)
            }
            _ => Ok(path.to_vec()),
        }
    }

    /// Whether the rules let the program execute an open file of the guard's.
    ///
    /// # Errors
    ///
    /// `EACCES`.
    pub(crate) fn may_execute(&self, fd: RawFd) -> Result<(), Errno> {
        let Some(program) = self.file_rules() else {
            return Ok(());
        };
        let name = procfs::path_of(fd as u64).map_err(|_| Errno::EACCES)?;
        let request = |path: &str| format!("execve({path})");
        match Real::of(&name, program.pid()) {
            Real::Path(path) => decide(&program, &path, Need::Read, b"", &request),
            // A memory file of the program's own.
            Real::Nameless => Ok(()),
            Real::Elsewhere => Err(Errno::EACCES),
        }
    }

    fn hold(
        &self,
        program: &Arc<Program>,
        folder: u64,
        path: &[u8],
        last: Last,
        need: Need,
        request: &dyn Fn(&str) -> String,
    ) -> Result<Vec<u8>, Errno> {
        let (parent, name, slash) = split(path);
        let walks = matches!(name, b"." | b"..");
        let whole = match last {
            Last::Follow => true,
            Last::Entry => false,
            // A slash at the end follows, too.
            _ => slash || walks,
        };
        if whole {
            let pin = Pin::of_path(program, folder, path, 0)?;
            match pin.real()? {
                Real::Path(real) => decide(program, &real, need, path, request)?,
                Real::Nameless if is_own_descriptor(path, program.pid()) => {}
                Real::Nameless | Real::Elsewhere => {
                    return Err(unnameable(program, path, request));
                }
            }
            // That a slash demands a folder, the kernel has seen to by now.
            let held = pin.path(b"");
            self.pins.borrow_mut().push(pin);
            return Ok(held);
        }
        if name.len() > NAME_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        let pin = Pin::of_path(program, folder, parent, O_DIRECTORY)?;
        let Real::Path(real) = pin.real()? else {
            return Err(unnameable(program, path, request));
        };
        let decided = match last {
            Last::Entry => real,
            _ => real.join(name),
        };
        decide(program, &decided, need, path, request)?;
        let mut rest = name.to_vec();
        if slash {
            rest.push(b'/');
        }
        let held = pin.path(&rest);
        self.pins.borrow_mut().push(pin);
        Ok(held)
    }

    /// Holds the file of a descriptor that a call will change.
    fn hold_descriptor(&self, program: &Arc<Program>, call: &str, fd: u64) -> Result<u64, Errno> {
        let pin = Pin::of_descriptor(program, fd)?;
        if let Real::Path(path) = pin.real()? {
            let request = |path: &str| format!("{call}({path})");
            decide(program, &path, Need::Attributes, b"", &request)?;
        }
        let held = pin.fd as u64;
        self.pins.borrow_mut().push(pin);
        Ok(held)
    }

    /// As [`Guard::hold_descriptor`], for calls of other modules.
    ///
    /// # Errors
    ///
    /// `EACCES`, or what the kernel says of the descriptor.
    pub(crate) fn hold_changed(&self, call: &str, fd: u64) -> Result<u64, Errno> {
        match self.file_rules() {
            Some(program) => self.hold_descriptor(&program, call, fd),
            None => Ok(fd),
        }
    }
}

/// Asks the rules, and records a refusal; `asked` is the path as the program
/// gave it, empty if it gave none.
fn decide(
    program: &Program,
    real: &NormalPath,
    need: Need,
    asked: &[u8],
    request: &dyn Fn(&str) -> String,
) -> Result<(), Errno> {
    let Some(rules) = program.policy().files() else {
        return Ok(());
    };
    if is_own_and_only_looked_at(real, need) {
        return Ok(());
    }
    ask(rules, real, need).map_err(|remedy| {
        let shown = match asked {
            b"" => real.to_string(),
            asked => asked.escape_ascii().to_string(),
        };
        program
            .policy()
            .refuse(request(&shown), remedy, Errno::EACCES)
    })
}

fn ask(rules: &FileRules, real: &NormalPath, need: Need) -> Result<(), Remedy> {
    rules.decide(real, need)
}

/// A process may always know of its own descriptors and the like.
fn is_own_and_only_looked_at(real: &NormalPath, need: Need) -> bool {
    need == Need::Look && real.is_within(&NormalPath::root().join(b"proc/self"))
}

fn unnameable(program: &Program, path: &[u8], request: &dyn Fn(&str) -> String) -> Errno {
    let shown = path.escape_ascii().to_string();
    program
        .policy()
        .refuse(request(&shown), Remedy::Unrestricted, Errno::EACCES)
}

/// Device nodes are ways around file rules.
#[expect(non_upper_case_globals, reason = "the kernel's names, matched against")]
fn refuse_device_node(program: &Program, call: &Call, args: &Args) -> Result<(), Errno> {
    let mode = match call.nr {
        __NR_mknod => args[1],
        __NR_mknodat => args[2],
        _ => return Ok(()),
    };
    if matches!(mode as u32 & S_IFMT, S_IFCHR | S_IFBLK) {
        let request = format!("{}(a device)", call.name);
        return Err(program
            .policy()
            .refuse(request, Remedy::Unrestricted, Errno::EPERM));
    }
    Ok(())
}

/// The target of a symbolic link, if it is one.
fn read_link(folder: u64, name: &[u8]) -> Option<Vec<u8>> {
    let name = CString::new(name).ok()?;
    let mut target = vec![0; PATH_MAX];
    let len = target.len() as u64;
    let args = [
        folder,
        own(name.as_bytes_with_nul()),
        own_mut(&mut target[..]),
        len,
        0,
        0,
    ];
    let len = forward_always(__NR_readlinkat, args).ok()?;
    target.truncate(len as usize);
    Some(target)
}

/// The flags of `open` that a reader wants to see.
fn flag_names(flags: u64) -> String {
    let flags = flags as u32;
    let mut names = vec![match flags & O_ACCMODE {
        O_RDONLY => "O_RDONLY",
        O_WRONLY => "O_WRONLY",
        _ => "O_RDWR",
    }];
    for (flag, name) in [
        (O_CREAT, "O_CREAT"),
        (O_EXCL, "O_EXCL"),
        (O_TRUNC, "O_TRUNC"),
        (O_APPEND, "O_APPEND"),
        (O_DIRECTORY, "O_DIRECTORY"),
        (O_PATH, "O_PATH"),
    ] {
        if flags & flag != 0 {
            names.push(name);
        }
    }
    names.join("|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_split_at_their_last_name() {
        let cases: [(&str, (&str, &str, bool)); 9] = [
            ("a", (".", "a", false)),
            ("/a", ("/", "a", false)),
            ("/a/b", ("/a", "b", false)),
            ("a/b//", ("a", "b", true)),
            ("a//b", ("a/", "b", false)),
            ("/", ("/", ".", false)),
            ("//", ("/", ".", false)),
            ("..", (".", "..", false)),
            ("", (".", ".", false)),
        ];
        for (path, (parent, name, slash)) in cases {
            let expected = (parent.as_bytes(), name.as_bytes(), slash);
            assert_eq!(split(path.as_bytes()), expected, "{path:?}");
        }
    }

    #[test]
    fn the_kernels_names_are_understood() {
        let path = |text: &str| Real::Path(NormalPath::new(text.as_bytes()).unwrap());
        assert_eq!(Real::of(b"/etc/passwd", 7), path("/etc/passwd"));
        assert_eq!(Real::of(b"/tmp/x (deleted)", 7), path("/tmp/x"));
        assert_eq!(Real::of(b"/proc/7/status", 7), path("/proc/self/status"));
        assert_eq!(Real::of(b"/proc/77/status", 7), path("/proc/77/status"));
        assert_eq!(Real::of(b"pipe:[1]", 7), Real::Nameless);
        assert_eq!(Real::of(b"/memfd:x (deleted)", 7), Real::Nameless);
        assert_eq!(Real::of(b"(unreachable)/x", 7), Real::Elsewhere);
    }

    #[test]
    fn own_descriptors_are_known_by_their_paths() {
        for path in ["/dev/fd/3", "/proc/self/fd/3", "/proc/7/fd/3", "/dev/stdin"] {
            assert!(is_own_descriptor(path.as_bytes(), 7), "{path}");
        }
        for path in ["/proc/8/fd/3", "/tmp/link", "fd/3", "/proc/self/fd"] {
            assert!(!is_own_descriptor(path.as_bytes(), 7), "{path}");
        }
    }
}
