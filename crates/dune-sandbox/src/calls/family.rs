//! Signals under a strict policy: to the program's own processes only.
//!
//! Whose process it is, is told by who descends from the program's first one.
//! A process that was orphaned is nobody's, and is left alone too. (A number
//! that is given out again between the check and its use is the second wall's
//! to hold: Landlock knows processes, not numbers.)

#![expect(non_upper_case_globals, reason = "the kernel's names, matched against")]

use std::sync::Arc;

use linux_raw_sys::general::{
    __NR_fcntl, __NR_getpgid, __NR_kill, __NR_pidfd_open, __NR_rt_sigqueueinfo,
    __NR_rt_tgsigqueueinfo, __NR_tgkill, __NR_tkill, F_SETOWN, F_SETOWN_EX,
};

use crate::calls::fd::Held;
use crate::calls::forward_always;
use crate::guard::Guard;
use crate::host::Errno;
use crate::policy::Remedy;
use crate::program::Program;
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
    #[inline]
    pub(crate) fn may_signal(&self, call: &Call, args: &Args) -> Result<(), Errno> {
        match self.program.policy().first_process() {
            Some(first) => self.may_signal_below(first, call, args),
            None => Ok(()),
        }
    }

    /// Whether the program, which the process `first` began, may make a call that sends
    /// signals: to `first` and its descendants alone.
    #[inline(never)]
    fn may_signal_below(&self, first: u32, call: &Call, args: &Args) -> Result<(), Errno> {
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
            Target::Process(pid) => pid == self.pid() || descends(&self.program, pid, first),
            // A group is named after the process that made it.
            Target::Group(group) => descends(&self.program, group, first),
            Target::Unknown => false,
        };
        if own {
            Ok(())
        } else {
            Err(self.refuse_signal(call.name))
        }
    }

    /// The process descriptor `fd`, if the policy lets the program send signals to the process
    /// that it stands for: there are other ways to such a descriptor than `pidfd_open`.
    ///
    /// # Errors
    ///
    /// `EPERM`, `EBADF`, `EMFILE`.
    pub(crate) fn hold_signal_target(&self, fd: u64) -> Result<Held, Errno> {
        let Some(first) = self.program.policy().first_process() else {
            return Ok(Held::as_it_is(fd));
        };
        let held = Held::copy(&self.program, fd)?;
        let info = Held::open(&self.program, &format!("/proc/self/fdinfo/{}\0", held.fd()))?;
        match process_of(info.read(&mut [0; LINES])?) {
            Some(pid) if descends(&self.program, pid, first) => Ok(held),
            _ => Err(self.refuse_signal("pidfd_send_signal")),
        }
    }

    fn refuse_signal(&self, call: &str) -> Errno {
        let request = format!("{call}(a process that is not the program's)");
        let policy = self.program.policy();
        policy.refuse(request, Remedy::Unrestricted, Errno::EPERM)
    }
}

/// Bytes of the longest text of procfs that is read here, and more.
const LINES: usize = 1024;

/// The process in the text of `/proc/self/fdinfo` of a process descriptor. A process that is
/// no more has the number -1, one of another namespace 0.
fn process_of(info: &[u8]) -> Option<u32> {
    let text = core::str::from_utf8(info).ok()?;
    let pid = text.lines().find_map(|line| line.strip_prefix("Pid:"))?;
    pid.trim().parse().ok().filter(|&pid| pid != 0)
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
fn descends(program: &Arc<Program>, mut pid: u32, first: u32) -> bool {
    /// Longer chains of parents are none.
    const DEEPEST: u32 = 1 << 16;
    for depth in 0..DEEPEST {
        if pid == first {
            return true;
        }
        let stat = Held::open(program, &format!("/proc/{pid}/stat\0"));
        let parent = stat.and_then(|stat| Ok(parent(stat.read(&mut [0; LINES])?)));
        match parent {
            Ok(Some(parent)) if parent > 1 => pid = parent,
            Ok(_) => return false,
            Err(Errno::ENOENT | Errno::ESRCH) => return depth == 0,
            // It cannot be known.
            Err(_) => return false,
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
        let guard = crate::testing::guard();
        let descends = |pid| descends(&guard.program, pid, own);
        assert!(descends(own));
        assert!(descends(child.id()));
        assert!(!descends(std::os::unix::process::parent_id()));
        assert!(!descends(1));
        // There is none, and the kernel will say so.
        assert!(descends(u32::MAX >> 1));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn processes_are_read_from_the_text_of_their_descriptor() {
        let text = |pid: &str| format!("pos:\t0\nflags:\t02000002\nPid:\t{pid}\nNSpid:\t7\n");
        assert_eq!(process_of(text("12").as_bytes()), Some(12));
        assert_eq!(process_of(text("-1").as_bytes()), None);
        assert_eq!(process_of(text("0").as_bytes()), None);
        assert_eq!(process_of(b"pos:\t0\nflags:\t0\n"), None);
    }

    #[test]
    fn parents_are_read_from_stat() {
        assert_eq!(parent(b"7 (a) b) S 3 7 7 0"), Some(3));
        assert_eq!(parent(b"7 (a"), None);
    }
}
