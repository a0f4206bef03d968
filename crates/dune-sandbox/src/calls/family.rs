//! Signals under a strict policy: to the program's own processes only.
//!
//! Whose process it is, is told by who descends from the program's first one.
//! A process that was orphaned is nobody's, and is left alone too. (A number
//! that is given out again between the check and its use is the second wall's
//! to hold: Landlock knows processes, not numbers.)

#![expect(non_upper_case_globals, reason = "the kernel's names, matched against")]

use linux_raw_sys::general::{
    __NR_fcntl, __NR_getpgid, __NR_kill, __NR_pidfd_open, __NR_rt_sigqueueinfo,
    __NR_rt_tgsigqueueinfo, __NR_tgkill, __NR_tkill, F_SETOWN, F_SETOWN_EX,
};

use crate::calls::forward_always;
use crate::guard::Guard;
use crate::host::Errno;
use crate::policy::Remedy;
use crate::table::{Args, Call};

/// Whom a call is about.
enum Target {
    Process(u32),
    /// Everybody in the group with this id.
    Group(u32),
    Unknown,
}

impl Guard {
    /// Whether the policy lets the program send signals to whom a call names.
    ///
    /// # Errors
    ///
    /// `EPERM`.
    pub(crate) fn may_signal(&self, call: &Call, args: &Args) -> Result<(), Errno> {
        let policy = self.program.policy();
        let Some(first) = policy.first_process() else {
            return Ok(());
        };
        let target = match call.nr {
            __NR_kill | __NR_rt_sigqueueinfo => of_pid(args[0] as i32),
            __NR_tkill | __NR_tgkill | __NR_rt_tgsigqueueinfo | __NR_pidfd_open => {
                Target::Process(args[0] as u32)
            }
            __NR_fcntl => match args[1] as u32 {
                // To be the owner of nothing, and so of no signal, is allowed.
                F_SETOWN if args[2] as i32 == 0 => return Ok(()),
                F_SETOWN => of_pid(args[2] as i32),
                F_SETOWN_EX => Target::Unknown,
                _ => return Ok(()),
            },
            _ => return Ok(()),
        };
        let own = match target {
            Target::Process(pid) => pid == self.pid() || descends(pid, first),
            // A group is named after the process that made it.
            Target::Group(group) => descends(group, first),
            Target::Unknown => false,
        };
        if own {
            return Ok(());
        }
        let request = format!("{}(a process that is not the program's)", call.name);
        Err(policy.refuse(request, Remedy::Unrestricted, Errno::EPERM))
    }
}

/// As `kill` takes it.
fn of_pid(pid: i32) -> Target {
    match pid {
        -1 => Target::Unknown,
        0 => match forward_always(__NR_getpgid, [0; 6]) {
            Ok(group) => Target::Group(group as u32),
            Err(_) => Target::Unknown,
        },
        pid if pid < 0 => Target::Group(pid.unsigned_abs()),
        pid => Target::Process(pid.unsigned_abs()),
    }
}

/// Whether the process (or thread) `pid` is `first` or descends from it. What
/// does not exist does: the kernel says so.
fn descends(mut pid: u32, first: u32) -> bool {
    /// Longer chains of parents are none.
    const DEEPEST: u32 = 1 << 16;
    for depth in 0..DEEPEST {
        if pid == first {
            return true;
        }
        match std::fs::read(format!("/proc/{pid}/stat")) {
            Ok(stat) => match parent(&stat) {
                Some(parent) if parent > 1 => pid = parent,
                _ => return false,
            },
            Err(_) => return depth == 0,
        }
    }
    false
}

/// The fourth field of `/proc/PID/stat`; the second, in parentheses, may hold
/// anything.
fn parent(stat: &[u8]) -> Option<u32> {
    let end = stat.iter().rposition(|&byte| byte == b')')?;
    let rest = core::str::from_utf8(stat.get(end + 1..)?).ok()?;
    rest.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_descend_and_parents_do_not() {
        let own = std::process::id();
        let mut child = std::process::Command::new("sleep")
            .arg("5")
            .spawn()
            .unwrap();
        assert!(descends(own, own));
        assert!(descends(child.id(), own));
        assert!(!descends(std::os::unix::process::parent_id(), own));
        assert!(!descends(1, own));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn parents_are_read_from_stat() {
        assert_eq!(parent(b"7 (a) b) S 3 7 7 0"), Some(3));
        assert_eq!(parent(b"7 (a"), None);
    }
}
