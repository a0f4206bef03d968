//! What each system call does with the paths and descriptors it is given.
//!
//! The counterpart of [`crate::table`] for file rules: for every row with a
//! path, which folder the path starts from, whether the last name of it is
//! followed if it is a symbolic link, and what the call needs of the file. A
//! test sees to it that no row with a path is forgotten.

#![expect(non_upper_case_globals, reason = "the kernel's names, matched against")]

use linux_raw_sys::general::*;

use super::files::Need;

/// What becomes of the last name in a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// A symbolic link is followed.
    Follow,
    /// It is not.
    NoFollow,
    /// It names an entry of its folder: made, removed or renamed.
    Entry,
    /// Followed if this flag is set in that argument.
    FollowIf(u8, u32),
    /// Not followed if this flag is set in that argument.
    NoFollowIf(u8, u32),
}

/// What a call needs of the file that a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UseNeed {
    /// Always this.
    Always(Need),
    /// What the `R_OK`, `W_OK` and `X_OK` in that argument say.
    Mode(u8),
}

/// One path argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathUse {
    /// Which argument it is.
    pub path: u8,
    /// Which argument is the folder it starts from, if not the working
    /// directory.
    pub folder: Option<u8>,
    /// What becomes of its last name.
    pub last: Last,
    /// What is needed.
    pub need: UseNeed,
}

impl PathUse {
    const fn new(path: u8, last: Last, need: Need) -> Self {
        Self {
            path,
            folder: None,
            last,
            need: UseNeed::Always(need),
        }
    }

    /// The path is the argument after its folder.
    const fn at(folder: u8, last: Last, need: Need) -> Self {
        Self {
            folder: Some(folder),
            ..Self::new(folder + 1, last, need)
        }
    }

    const fn by_mode(self, mode: u8) -> Self {
        Self {
            need: UseNeed::Mode(mode),
            ..self
        }
    }

    /// Whether the last name is followed, given the call's arguments.
    #[must_use]
    pub fn resolved_last(&self, args: &[u64; 6]) -> Last {
        let set = |arg: u8, flag: u32| args[usize::from(arg)] as u32 & flag != 0;
        match self.last {
            Last::FollowIf(arg, flag) if set(arg, flag) => Last::Follow,
            Last::NoFollowIf(arg, flag) if !set(arg, flag) => Last::Follow,
            Last::FollowIf(..) | Last::NoFollowIf(..) => Last::NoFollow,
            last => last,
        }
    }

    /// What is needed, given the call's arguments.
    #[must_use]
    pub fn resolved_need(&self, args: &[u64; 6]) -> Need {
        const W_OK: u64 = 2;
        match self.need {
            UseNeed::Always(need) => need,
            UseNeed::Mode(arg) => match args[usize::from(arg)] {
                0 => Need::Look,
                mode if mode & W_OK != 0 => Need::Write,
                _ => Need::Read,
            },
        }
    }
}

const LOOK: Need = Need::Look;
const READ: Need = Need::Read;
const WRITE: Need = Need::Write;
const ATTRIBUTES: Need = Need::Attributes;
const ENTRIES: Need = Need::Entries;
const FOLLOW: Last = Last::Follow;
const NO_FOLLOW: Last = Last::NoFollow;
const ENTRY: Last = Last::Entry;

const fn unless_told(flags: u8) -> Last {
    Last::NoFollowIf(flags, AT_SYMLINK_NOFOLLOW)
}

/// The paths of the call `nr`, in the order of its arguments. `open` and its
/// kin, `execve` and sockets are not here: their own functions ask.
#[must_use]
pub fn paths(nr: u32) -> &'static [PathUse] {
    macro_rules! uses {
        ($($use:expr),*) => {{
            const USES: &[PathUse] = &[$($use),*];
            USES
        }};
    }
    match nr {
        __NR_stat | __NR_statfs | __NR_chdir => uses![PathUse::new(0, FOLLOW, LOOK)],
        __NR_lstat => uses![PathUse::new(0, NO_FOLLOW, LOOK)],
        __NR_newfstatat => uses![PathUse::at(0, unless_told(3), LOOK)],
        __NR_statx => uses![PathUse::at(0, unless_told(2), LOOK)],
        __NR_access => uses![PathUse::new(0, FOLLOW, LOOK).by_mode(1)],
        __NR_faccessat => uses![PathUse::at(0, FOLLOW, LOOK).by_mode(2)],
        __NR_faccessat2 => uses![PathUse::at(0, unless_told(3), LOOK).by_mode(2)],
        __NR_listxattr | __NR_getxattr => uses![PathUse::new(0, FOLLOW, READ)],
        __NR_llistxattr | __NR_lgetxattr => uses![PathUse::new(0, NO_FOLLOW, READ)],
        __NR_inotify_add_watch => {
            const IN_DONT_FOLLOW: u32 = 0x0200_0000;
            uses![PathUse::new(1, Last::NoFollowIf(2, IN_DONT_FOLLOW), READ)]
        }
        __NR_truncate => uses![PathUse::new(0, FOLLOW, WRITE)],
        __NR_chmod | __NR_chown | __NR_utime | __NR_utimes | __NR_setxattr | __NR_removexattr => {
            uses![PathUse::new(0, FOLLOW, ATTRIBUTES)]
        }
        __NR_lchown | __NR_lsetxattr | __NR_lremovexattr => {
            uses![PathUse::new(0, NO_FOLLOW, ATTRIBUTES)]
        }
        __NR_fchmodat | __NR_futimesat => uses![PathUse::at(0, FOLLOW, ATTRIBUTES)],
        __NR_fchmodat2 | __NR_utimensat => uses![PathUse::at(0, unless_told(3), ATTRIBUTES)],
        __NR_fchownat => uses![PathUse::at(0, unless_told(4), ATTRIBUTES)],
        __NR_mkdir | __NR_rmdir | __NR_unlink | __NR_mknod => {
            uses![PathUse::new(0, ENTRY, ENTRIES)]
        }
        __NR_mkdirat | __NR_unlinkat | __NR_mknodat => uses![PathUse::at(0, ENTRY, ENTRIES)],
        __NR_symlink => uses![PathUse::new(1, ENTRY, ENTRIES)],
        __NR_symlinkat => uses![PathUse::at(1, ENTRY, ENTRIES)],
        __NR_rename => uses![
            PathUse::new(0, ENTRY, ENTRIES),
            PathUse::new(1, ENTRY, ENTRIES)
        ],
        __NR_renameat | __NR_renameat2 => uses![
            PathUse::at(0, ENTRY, ENTRIES),
            PathUse::at(2, ENTRY, ENTRIES)
        ],
        // A second name in a folder that may be written makes the file one that
        // may be written: so it must be that before.
        __NR_link => uses![
            PathUse::new(0, NO_FOLLOW, ATTRIBUTES),
            PathUse::new(1, ENTRY, ENTRIES)
        ],
        __NR_linkat => uses![
            PathUse::at(0, Last::FollowIf(4, AT_SYMLINK_FOLLOW), ATTRIBUTES),
            PathUse::at(2, ENTRY, ENTRIES)
        ],
        _ => &[],
    }
}

/// The argument of `nr` that is a descriptor whose file the call changes
/// although the descriptor may be one for reading only.
#[must_use]
pub fn changed_descriptor(nr: u32) -> Option<u8> {
    matches!(
        nr,
        __NR_fchmod | __NR_fchown | __NR_fsetxattr | __NR_fremovexattr
    )
    .then_some(0)
}

/// The argument with the `AT_EMPTY_PATH` flag, of calls that have it and
/// change something.
#[must_use]
pub fn empty_path_flag(nr: u32) -> Option<u8> {
    match nr {
        __NR_fchownat | __NR_linkat => Some(4),
        __NR_fchmodat2 | __NR_utimensat => Some(3),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{self, Arg, Handling};

    /// Calls whose own functions ask for their paths.
    const BY_THEMSELVES: [u32; 8] = [
        __NR_open,
        __NR_creat,
        __NR_openat,
        __NR_openat2,
        __NR_readlink,
        __NR_readlinkat,
        __NR_execve,
        __NR_execveat,
    ];

    #[test]
    fn no_path_is_forgotten() {
        for call in table::calls() {
            let uses = paths(call.nr);
            for (index, arg) in call.args.iter().enumerate() {
                let is_path = *arg == Arg::Path;
                let used = uses.iter().any(|used| usize::from(used.path) == index);
                assert_eq!(is_path, used, "{} argument {index}", call.name);
            }
            for used in uses {
                if let Some(folder) = used.folder {
                    assert_eq!(call.args[usize::from(folder)], Arg::Fd, "{}", call.name);
                }
            }
            if let Some(fd) = changed_descriptor(call.nr) {
                assert_eq!(call.args[usize::from(fd)], Arg::Fd, "{}", call.name);
            }
        }
    }

    #[test]
    fn calls_that_ask_by_themselves_are_done_by_functions() {
        for nr in BY_THEMSELVES {
            let call = table::find(nr).unwrap();
            let by_function = matches!(call.handling, Handling::Emulated(_) | Handling::Control(_));
            assert!(by_function, "{}", call.name);
        }
    }
}
