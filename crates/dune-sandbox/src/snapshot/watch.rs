//! What the program did, beside memory and registers, since the latest
//! snapshot: so that a return has to look at nothing else.

use std::collections::BTreeSet;
use std::os::fd::RawFd;

#[allow(clippy::wildcard_imports, reason = "the numbers of some hundred calls")]
use linux_raw_sys::general::*;

use crate::calls::Answer;
use crate::host::Errno;
use crate::table::{Arg, Args, Call};

/// See the module documentation.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watch {
    /// Descriptors whose file's offset may have moved.
    pub(crate) moved: BTreeSet<RawFd>,
    /// Descriptors that were opened, closed, replaced, or changed.
    pub(crate) replaced: BTreeSet<RawFd>,
    /// Descriptors may have changed in ways that nobody followed.
    pub(crate) any_descriptor: bool,
    pub(crate) directory: bool,
    pub(crate) umask: bool,
    pub(crate) timers: bool,
    /// Signals were sent.
    pub(crate) signals: bool,
    /// What is kept of the process: names, limits.
    pub(crate) process: bool,
    /// Processes that were made.
    pub(crate) children: BTreeSet<u32>,
}

impl Watch {
    /// Whether there is nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.moved.is_empty()
            && self.replaced.is_empty()
            && self.children.is_empty()
            && !(self.any_descriptor
                || self.directory
                || self.umask
                || self.timers
                || self.signals
                || self.process)
    }

    /// Adds what happened earlier.
    pub(crate) fn add(&mut self, earlier: Self) {
        self.moved.extend(earlier.moved);
        self.replaced.extend(earlier.replaced);
        self.children.extend(earlier.children);
        self.any_descriptor |= earlier.any_descriptor;
        self.directory |= earlier.directory;
        self.umask |= earlier.umask;
        self.timers |= earlier.timers;
        self.signals |= earlier.signals;
        self.process |= earlier.process;
    }

    /// Notes a call that was answered.
    pub(crate) fn note(&mut self, call: &Call, args: Args, answer: &Answer) {
        #[expect(non_upper_case_globals, reason = "the kernel's names, matched against")]
        match call.nr {
            // One new descriptor, which is the result.
            __NR_open | __NR_openat | __NR_openat2 | __NR_creat | __NR_dup | __NR_dup2
            | __NR_dup3 | __NR_socket | __NR_accept | __NR_accept4 | __NR_eventfd
            | __NR_eventfd2 | __NR_epoll_create | __NR_epoll_create1 | __NR_memfd_create
            | __NR_timerfd_create | __NR_signalfd | __NR_signalfd4 | __NR_inotify_init
            | __NR_inotify_init1 | __NR_pidfd_open => {
                if let Answer::Return(Ok(fd)) = answer {
                    self.replaced.insert(*fd as RawFd);
                }
            }
            // There was nothing to close.
            __NR_close if *answer == Answer::Return(Err(Errno::EBADF)) => {}
            // Gone also if the call says that closing went wrong.
            __NR_close => {
                self.replaced.insert(args[0] as RawFd);
            }
            __NR_fcntl => {
                self.replaced.insert(args[0] as RawFd);
                if matches!(args[1] as u32, F_DUPFD | F_DUPFD_CLOEXEC)
                    && let Answer::Return(Ok(fd)) = answer
                {
                    self.replaced.insert(*fd as RawFd);
                }
            }
            __NR_chdir | __NR_fchdir => self.directory = true,
            __NR_umask => self.umask = true,
            __NR_alarm | __NR_setitimer => self.timers = true,
            __NR_kill
            | __NR_tkill
            | __NR_tgkill
            | __NR_rt_sigqueueinfo
            | __NR_rt_tgsigqueueinfo
            | __NR_timer_create
            | __NR_timer_settime => {
                self.signals = true;
            }
            __NR_prctl | __NR_setrlimit | __NR_prlimit64 => self.process = true,
            __NR_fork | __NR_vfork | __NR_clone | __NR_clone3 => {
                self.any_descriptor = true;
                if let Answer::Return(Ok(child)) = answer {
                    self.children.insert(*child as u32);
                }
            }
            nr if moves_no_offset(nr) => {}
            nr if makes_no_descriptor(nr) => {
                for (index, _) in fds_of(call) {
                    self.moved.insert(args[index] as RawFd);
                }
            }
            __NR_execve | __NR_execveat => {
                self.any_descriptor = true;
                self.process = true;
            }
            _ => self.any_descriptor = true,
        }
    }
}

fn fds_of(call: &Call) -> impl Iterator<Item = (usize, &Arg)> {
    let args = call.args.iter().enumerate();
    args.filter(|(_, arg)| matches!(arg, Arg::Fd))
}

/// Calls that neither change descriptors nor what is behind them.
#[expect(non_upper_case_globals, reason = "the kernel's names, matched against")]
const fn moves_no_offset(nr: u32) -> bool {
    matches!(
        nr,
        __NR_fstat
            | __NR_newfstatat
            | __NR_stat
            | __NR_lstat
            | __NR_statx
            | __NR_access
            | __NR_faccessat
            | __NR_faccessat2
            | __NR_readlink
            | __NR_readlinkat
            | __NR_pread64
            | __NR_pwrite64
            | __NR_preadv
            | __NR_pwritev
            | __NR_mmap
            | __NR_munmap
            | __NR_mprotect
            | __NR_mremap
            | __NR_madvise
            | __NR_brk
            | __NR_poll
            | __NR_ppoll
            | __NR_select
            | __NR_pselect6
            | __NR_epoll_wait
            | __NR_epoll_pwait
            | __NR_fsync
            | __NR_fdatasync
            | __NR_ftruncate
            | __NR_flock
            | __NR_getcwd
            | __NR_rt_sigaction
            | __NR_rt_sigprocmask
            | __NR_rt_sigreturn
            | __NR_sigaltstack
            | __NR_getpid
            | __NR_gettid
            | __NR_getppid
            | __NR_getuid
            | __NR_geteuid
            | __NR_getgid
            | __NR_getegid
            | __NR_uname
            | __NR_getrandom
            | __NR_clock_gettime
            | __NR_clock_nanosleep
            | __NR_nanosleep
            | __NR_gettimeofday
            | __NR_time
            | __NR_times
            | __NR_getrusage
            | __NR_sysinfo
            | __NR_sched_yield
            | __NR_sched_getaffinity
            | __NR_futex
            | __NR_set_robust_list
            | __NR_set_tid_address
            | __NR_arch_prctl
            | __NR_rseq
            | __NR_exit
            | __NR_exit_group
            | __NR_wait4
            | __NR_waitid
    )
}

/// Calls that make and close none, and may move the offset of those they name.
#[expect(non_upper_case_globals, reason = "the kernel's names, matched against")]
const fn makes_no_descriptor(nr: u32) -> bool {
    matches!(
        nr,
        __NR_read
            | __NR_write
            | __NR_readv
            | __NR_writev
            | __NR_lseek
            | __NR_getdents
            | __NR_getdents64
            | __NR_sendfile
            | __NR_copy_file_range
            | __NR_splice
            | __NR_tee
            | __NR_sendto
            | __NR_recvfrom
            | __NR_sendmsg
            | __NR_unlink
            | __NR_unlinkat
            | __NR_mkdir
            | __NR_rename
            | __NR_renameat
            | __NR_preadv2
            | __NR_pwritev2
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table;

    fn noted(name: &str, args: &[u64], result: u64) -> Watch {
        let call = table::calls().iter().find(|call| call.name == name);
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        let mut watch = Watch::default();
        watch.note(call.unwrap(), all, &Answer::Return(Ok(result)));
        watch
    }

    #[test]
    fn reading_moves_an_offset_and_looking_does_not() {
        assert_eq!(noted("read", &[7, 0, 1], 1).moved, BTreeSet::from([7]));
        assert!(noted("fstat", &[7, 0], 0).is_empty());
        assert_eq!(noted("sendfile", &[4, 5], 1).moved, BTreeSet::from([4, 5]));
    }

    #[test]
    fn what_opens_and_closes_is_followed() {
        assert_eq!(noted("openat", &[], 9).replaced, BTreeSet::from([9]));
        assert_eq!(noted("close", &[9], 0).replaced, BTreeSet::from([9]));
        assert_eq!(noted("dup2", &[3, 8], 8).replaced, BTreeSet::from([8]));
        assert_eq!(
            noted("fcntl", &[3, u64::from(F_DUPFD), 10], 10).replaced,
            BTreeSet::from([3, 10])
        );
    }

    /// A call that nobody has thought of must not be taken for harmless.
    #[test]
    fn calls_that_are_not_known_to_be_harmless_are_not() {
        for name in ["pipe2", "recvmsg", "socketpair", "close_range", "execve"] {
            assert!(noted(name, &[], 0).any_descriptor, "{name}");
        }
        for call in table::calls() {
            let named = fds_of(call).count() > 0;
            if named && !moves_no_offset(call.nr) {
                let watch = noted(call.name, &[3, 3, 3, 3, 3, 3], 0);
                assert!(!watch.is_empty(), "{}", call.name);
            }
        }
    }
}
