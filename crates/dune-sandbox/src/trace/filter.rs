//! Which calls are traced: `open,read`, `%file`, `!write`.

use crate::table::{self, Arg, Call, Shape};

/// A set of calls, by number.
#[derive(Clone, Debug)]
pub struct Filter {
    wanted: Vec<bool>,
    /// What becomes of numbers that the table does not have.
    unknown: bool,
}

/// Why an expression is no filter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// No call has this name.
    #[error("no system call is called {0:?}; `dune syscalls` lists them all")]
    UnknownCall(String),
    /// No class has this name.
    #[error(
        "no class is called {0:?}; there are %file, %desc, %memory, %network, %process, %signal \
         and %all"
    )]
    UnknownClass(String),
    /// Only calls can be chosen.
    #[error("{0:?} cannot be chosen, only system calls can: give trace=NAME,%CLASS,...")]
    UnknownQualifier(String),
}

impl Filter {
    /// Every call.
    #[must_use]
    pub fn all() -> Self {
        Self {
            wanted: vec![true; table::END],
            unknown: true,
        }
    }

    /// Reads an expression: names of calls and classes, between commas, all of
    /// it preceded by `!` if these are *not* wanted, and perhaps by `trace=`.
    ///
    /// # Errors
    ///
    /// If it names what there is not.
    pub fn parse(expression: &str) -> Result<Self, FilterError> {
        let list = match expression.split_once('=') {
            None => expression,
            Some(("trace" | "t", list)) => list,
            Some((other, _)) => return Err(FilterError::UnknownQualifier(other.to_owned())),
        };
        let (list, inverted) = match list.strip_prefix('!') {
            Some(list) => (list, true),
            None => (list, false),
        };
        let mut wanted = vec![false; table::END];
        let mut unknown = false;
        for word in list.split(',').filter(|word| !word.is_empty()) {
            match word {
                "all" | "%all" => {
                    wanted.fill(true);
                    unknown = true;
                }
                "none" => {}
                _ => add(&mut wanted, word)?,
            }
        }
        if inverted {
            wanted.iter_mut().for_each(|wanted| *wanted = !*wanted);
            unknown = !unknown;
        }
        Ok(Self { wanted, unknown })
    }

    /// Calls that are in this or the other.
    #[must_use]
    pub fn or(mut self, other: &Self) -> Self {
        for (wanted, too) in self.wanted.iter_mut().zip(&other.wanted) {
            *wanted |= too;
        }
        self.unknown |= other.unknown;
        self
    }

    /// Whether the call `nr` is wanted.
    #[must_use]
    pub fn wants(&self, nr: u32) -> bool {
        self.wanted
            .get(nr as usize)
            .copied()
            .unwrap_or(self.unknown)
    }
}

/// Adds the call or class `word`. A class may be written without its sign, as
/// older tracers had it, where no call has that name.
fn add(wanted: &mut [bool], word: &str) -> Result<(), FilterError> {
    let call = table::calls().iter().find(|call| call.name == word);
    if let Some(call) = call {
        wanted[call.nr as usize] = true;
        return Ok(());
    }
    let (name, is_class) = match word.strip_prefix('%') {
        Some(name) => (name, true),
        None => (word, false),
    };
    let Some(class) = class(name) else {
        return Err(if is_class {
            FilterError::UnknownClass(word.to_owned())
        } else {
            FilterError::UnknownCall(word.to_owned())
        });
    };
    for call in table::calls().iter().filter(|call| class(call)) {
        wanted[call.nr as usize] = true;
    }
    Ok(())
}

type Class = fn(&Call) -> bool;

fn class(name: &str) -> Option<Class> {
    Some(match name {
        "file" => is_about_files,
        "desc" => is_about_descriptors,
        "memory" => is_about_memory,
        "network" | "net" => is_about_network,
        "process" => is_about_processes,
        "signal" => is_about_signals,
        _ => return None,
    })
}

/// Calls that take a path. The refused ones have no arguments in the table.
fn is_about_files(call: &Call) -> bool {
    let has_path = call
        .args
        .iter()
        .any(|arg| matches!(arg, Arg::Path | Arg::Copied(Shape::Path)));
    has_path
        || matches!(
            call.name,
            "getcwd"
                | "chroot"
                | "mount"
                | "umount2"
                | "pivot_root"
                | "swapon"
                | "swapoff"
                | "uselib"
                | "acct"
                | "open_tree"
                | "move_mount"
                | "fspick"
                | "quotactl"
                | "name_to_handle_at"
                | "setxattrat"
                | "getxattrat"
                | "listxattrat"
                | "removexattrat"
                | "file_getattr"
                | "file_setattr"
        )
}

/// Calls that take a descriptor or make one.
fn is_about_descriptors(call: &Call) -> bool {
    call.args.contains(&Arg::Fd)
        || matches!(
            call.name,
            "open"
                | "creat"
                | "pipe"
                | "pipe2"
                | "socket"
                | "socketpair"
                | "epoll_create"
                | "epoll_create1"
                | "eventfd"
                | "eventfd2"
                | "timerfd_create"
                | "inotify_init"
                | "inotify_init1"
                | "memfd_create"
                | "pidfd_open"
                | "poll"
                | "ppoll"
                | "select"
                | "pselect6"
                | "close_range"
                | "fanotify_init"
                | "userfaultfd"
                | "perf_event_open"
                | "bpf"
                | "io_uring_setup"
                | "io_uring_enter"
                | "io_uring_register"
                | "mq_open"
                | "pidfd_getfd"
                | "vmsplice"
        )
}

fn is_about_memory(call: &Call) -> bool {
    matches!(
        call.name,
        "mmap"
            | "munmap"
            | "mprotect"
            | "mremap"
            | "brk"
            | "madvise"
            | "msync"
            | "mincore"
            | "mlock"
            | "mlock2"
            | "munlock"
            | "mlockall"
            | "munlockall"
            | "remap_file_pages"
            | "mbind"
            | "set_mempolicy"
            | "get_mempolicy"
            | "migrate_pages"
            | "move_pages"
            | "pkey_mprotect"
            | "process_madvise"
            | "shmat"
            | "shmdt"
            | "mseal"
            | "map_shadow_stack"
            | "set_mempolicy_home_node"
            | "io_setup"
            | "io_destroy"
    )
}

fn is_about_network(call: &Call) -> bool {
    matches!(
        call.name,
        "socket"
            | "socketpair"
            | "bind"
            | "connect"
            | "listen"
            | "accept"
            | "accept4"
            | "getsockname"
            | "getpeername"
            | "sendto"
            | "recvfrom"
            | "sendmsg"
            | "recvmsg"
            | "sendmmsg"
            | "recvmmsg"
            | "shutdown"
            | "setsockopt"
            | "getsockopt"
            | "getpmsg"
            | "putpmsg"
    )
}

fn is_about_processes(call: &Call) -> bool {
    matches!(
        call.name,
        "clone"
            | "clone3"
            | "fork"
            | "vfork"
            | "execve"
            | "execveat"
            | "exit"
            | "exit_group"
            | "wait4"
            | "waitid"
            | "unshare"
            | "setns"
            | "arch_prctl"
            | "kill"
            | "tkill"
            | "tgkill"
            | "rt_sigqueueinfo"
            | "rt_tgsigqueueinfo"
            | "pidfd_open"
            | "pidfd_send_signal"
            | "process_mrelease"
    )
}

fn is_about_signals(call: &Call) -> bool {
    call.name.starts_with("rt_sig")
        || matches!(
            call.name,
            "sigaltstack"
                | "kill"
                | "tkill"
                | "tgkill"
                | "rt_tgsigqueueinfo"
                | "signalfd"
                | "signalfd4"
                | "pause"
                | "pidfd_send_signal"
        )
}

#[cfg(test)]
mod tests {
    use linux_raw_sys::general::*;

    use super::*;

    fn wants(expression: &str, nr: u32) -> bool {
        Filter::parse(expression).unwrap().wants(nr)
    }

    #[test]
    fn calls_are_chosen_by_name_and_class() {
        assert!(wants("trace=read,openat", __NR_openat));
        assert!(!wants("read,openat", __NR_write));
        assert!(wants("!read", __NR_write) && !wants("!read", __NR_read));
        assert!(wants("%file", __NR_openat) && wants("file", __NR_mkdir));
        assert!(!wants("%file", __NR_read));
        assert!(wants("%desc", __NR_read) && wants("%desc", __NR_pipe2));
        assert!(wants("%network,%memory", __NR_brk) && wants("%net", __NR_accept4));
        assert!(wants("%process", __NR_execve) && wants("%signal", __NR_rt_sigaction));
        assert!(wants("all", 400) && !wants("read", 400) && wants("!read", 400));
        assert!(!wants("none", __NR_read));
        let both = Filter::parse("read")
            .unwrap()
            .or(&Filter::parse("write").unwrap());
        assert!(both.wants(__NR_read) && both.wants(__NR_write) && !both.wants(__NR_open));
    }

    #[test]
    fn what_is_not_there_is_said() {
        let error = |text| Filter::parse(text).unwrap_err();
        assert_eq!(error("raed"), FilterError::UnknownCall("raed".into()));
        assert_eq!(error("%raed"), FilterError::UnknownClass("%raed".into()));
        assert_eq!(
            error("inject=x"),
            FilterError::UnknownQualifier("inject".into())
        );
    }

    #[test]
    fn names_of_classes_are_names_of_calls() {
        // A name that no call has would choose nothing, silently.
        for (class, least) in [
            (is_about_memory as Class, 25),
            (is_about_network, 20),
            (is_about_processes, 19),
            (is_about_signals, 14),
        ] {
            let count = table::calls().iter().filter(|call| class(call)).count();
            assert!(count >= least, "{count} of {least}");
        }
    }
}
