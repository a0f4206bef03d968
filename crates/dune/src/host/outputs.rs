//! What the kernel wrote into the process's memory on behalf of a forwarded system call, for
//! the trackers of [`crate::dirty`]: the kernel's writes do not pass through the guest's page
//! tables, so their dirty bits are set here, after the call and before its result is seen.
//!
//! What is noted may be more than was written, never less, as far as it can be known from the
//! call: structures behind a pointer inside an argument of `ioctl` and its like are not seen.
//! A call that is not in the table counts as having written 16 KiB (the most that the number
//! of an `ioctl` can ask for) behind each argument that is an address.

#![expect(unsafe_code, reason = "asks where the heap ends")]

use core::sync::atomic::{AtomicU64, Ordering};

use dune_kvm::sys::{self, Errno};

use crate::dirty::mark_written;
use crate::maps;

const PAGE: u64 = 4096;
const USER_END: u64 = 1 << 47;
const UNKNOWN_BYTES: u64 = 16 << 10;
/// The most vectors that one call takes (`UIO_MAXIOV`).
const MOST_VECTORS: u64 = 1024;
const SOCKET_ADDRESS: u64 = 128;
const MESSAGE_HEADER: u64 = 56;
const MULTI_MESSAGE: u64 = 64;

/// The end of the heap as it was after the last `brk`; 0 where nobody asked.
static BREAK: AtomicU64 = AtomicU64::new(0);

/// Learns where the heap ends.
pub(crate) fn remember_break() {
    // SAFETY: asks, and changes nothing.
    let end = unsafe { sys::raw(libc::SYS_brk as usize, [0; 6]) };
    BREAK.store(end as u64, Ordering::Relaxed);
}

/// Notes what the call wrote. Host side: no allocation, no lock, no panic.
#[cold]
pub(crate) fn note(number: usize, arguments: &[usize; 6], result: isize) {
    let [a0, a1, a2, a3, a4, a5] = arguments.map(|argument| argument as u64);
    let call = Call { result };
    match number as i64 {
        // As many bytes as the result says.
        libc::SYS_read
        | libc::SYS_pread64
        | libc::SYS_getdents
        | libc::SYS_getdents64
        | libc::SYS_readlink
        | libc::SYS_listxattr
        | libc::SYS_llistxattr
        | libc::SYS_flistxattr => call.returned(a1, a2),
        libc::SYS_readlinkat | libc::SYS_getxattr | libc::SYS_lgetxattr | libc::SYS_fgetxattr => {
            call.returned(a2, a3)
        }
        libc::SYS_sched_getaffinity => call.returned(a2, a1),
        libc::SYS_getrandom | libc::SYS_getcwd => call.returned(a0, a1),
        libc::SYS_mq_timedreceive => {
            call.returned(a1, a2);
            call.bytes(a3, 4);
        }
        libc::SYS_recvfrom => {
            call.returned(a1, a2);
            call.bytes(a4, SOCKET_ADDRESS);
            call.bytes(a5, 4);
        }
        libc::SYS_readv
        | libc::SYS_preadv
        | libc::SYS_preadv2
        | libc::SYS_vmsplice
        | libc::SYS_process_vm_readv => call.vectors(a1, a2, call.written()),
        // Into this process or another: that one's addresses may be ours.
        libc::SYS_process_vm_writev => call.vectors(a3, a4, u64::MAX),
        libc::SYS_recvmsg => call.message(a1, call.written()),
        libc::SYS_recvmmsg => {
            for index in 0..(result.max(0) as u64).min(MOST_VECTORS) {
                let header = a1.saturating_add(index * MULTI_MESSAGE);
                call.message(header, u64::MAX);
                call.bytes(header, MULTI_MESSAGE);
            }
            call.bytes(a4, 16);
        }
        // Structures of a known size.
        libc::SYS_stat | libc::SYS_fstat | libc::SYS_lstat => call.bytes(a1, 144),
        libc::SYS_newfstatat => call.bytes(a2, 144),
        libc::SYS_statx => call.bytes(a4, 256),
        libc::SYS_statfs | libc::SYS_fstatfs => call.bytes(a1, 120),
        libc::SYS_pipe | libc::SYS_pipe2 => call.bytes(a0, 8),
        libc::SYS_socketpair => call.bytes(a3, 8),
        libc::SYS_accept | libc::SYS_accept4 | libc::SYS_getsockname | libc::SYS_getpeername => {
            call.bytes(a1, SOCKET_ADDRESS);
            call.bytes(a2, 4);
        }
        libc::SYS_getsockopt => {
            call.bytes(a3, word(a4).map_or(UNKNOWN_BYTES, u64::from));
            call.bytes(a4, 4);
        }
        libc::SYS_gettimeofday => {
            call.bytes(a0, 16);
            call.bytes(a1, 8);
        }
        libc::SYS_clock_gettime
        | libc::SYS_clock_getres
        | libc::SYS_getitimer
        | libc::SYS_timer_gettime
        | libc::SYS_timerfd_gettime
        | libc::SYS_nanosleep
        | libc::SYS_sched_rr_get_interval
        | libc::SYS_getrlimit => call.bytes(a1, 32),
        libc::SYS_setitimer => call.bytes(a2, 32),
        libc::SYS_timer_settime
        | libc::SYS_timerfd_settime
        | libc::SYS_clock_nanosleep
        | libc::SYS_prlimit64 => call.bytes(a3, 32),
        libc::SYS_timer_create => call.bytes(a2, 8),
        libc::SYS_clock_adjtime => call.bytes(a1, 208),
        libc::SYS_adjtimex => call.bytes(a0, 208),
        libc::SYS_time => call.bytes(a0, 8),
        libc::SYS_times => call.bytes(a0, 32),
        libc::SYS_getrusage => call.bytes(a1, 144),
        libc::SYS_sysinfo => call.bytes(a0, 112),
        libc::SYS_uname => call.bytes(a0, 390),
        libc::SYS_wait4 => {
            call.bytes(a1, 4);
            call.bytes(a3, 144);
        }
        libc::SYS_waitid => {
            call.bytes(a2, 128);
            call.bytes(a4, 144);
        }
        libc::SYS_getresuid | libc::SYS_getresgid => call.each(&[a0, a1, a2], 4),
        libc::SYS_getgroups => call.bytes(a1, (result.max(0) as u64) * 4),
        libc::SYS_getcpu => call.each(&[a0, a1], 4),
        libc::SYS_capget => call.each(&[a0, a1], 24),
        libc::SYS_sched_getparam => call.bytes(a1, 4),
        libc::SYS_sched_getattr => call.bytes(a1, a2),
        libc::SYS_rt_sigaction => call.bytes(a2, 32),
        libc::SYS_rt_sigprocmask => call.bytes(a2, a3.min(128)),
        libc::SYS_rt_sigpending => call.bytes(a0, a1.min(128)),
        libc::SYS_rt_sigtimedwait => call.bytes(a1, 128),
        libc::SYS_sigaltstack => call.bytes(a1, 24),
        libc::SYS_sendfile => call.bytes(a2, 8),
        libc::SYS_splice | libc::SYS_copy_file_range => call.each(&[a1, a3], 8),
        libc::SYS_poll => call.bytes(a0, a1.saturating_mul(8)),
        libc::SYS_ppoll => {
            call.bytes(a0, a1.saturating_mul(8));
            call.bytes(a2, 16);
        }
        libc::SYS_select | libc::SYS_pselect6 => {
            for set in [a1, a2, a3] {
                call.bytes(set, (a0 as u32 as u64).div_ceil(64) * 8);
            }
            call.bytes(a4, 16);
        }
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait | libc::SYS_epoll_pwait2 => {
            call.bytes(a1, (result.max(0) as u64) * 12);
        }
        libc::SYS_mincore => call.bytes(a2, a1.div_ceil(PAGE)),
        libc::SYS_clone => call.each(&[a2, a3], 4),
        libc::SYS_clone3 => {
            // pidfd, child_tid and parent_tid of `struct clone_args`.
            for field in [8, 16, 24] {
                if let Some(id) = long(a0.saturating_add(field)) {
                    call.bytes(id, 4);
                }
            }
        }
        libc::SYS_get_mempolicy => {
            call.bytes(a0, 4);
            call.bytes(a1, a2.div_ceil(64).saturating_mul(8));
        }
        libc::SYS_move_pages => call.bytes(a4, a1.saturating_mul(4)),
        libc::SYS_get_robust_list => call.each(&[a1, a2], 8),
        libc::SYS_name_to_handle_at => {
            call.bytes(a2, 8 + 128);
            call.bytes(a3, 4);
        }
        libc::SYS_sched_setattr => call.bytes(a1, 4),
        libc::SYS_futex | libc::SYS_futex_waitv => {
            // FUTEX_WAKE_OP, requeues and PI futexes change the words themselves.
            call.each(&[a0, a4], 4)
        }
        libc::SYS_arch_prctl => call.bytes(a1, 8),
        libc::SYS_msgrcv => call.bytes(a1, call.written().saturating_add(8)),
        libc::SYS_io_getevents => {
            call.bytes(a3, (result.max(0) as u64) * 32);
        }
        // What an address holds changes as a whole.
        libc::SYS_mmap if result > 0 => call.bytes(result as u64, a1),
        libc::SYS_munmap => call.bytes(a0, a1),
        libc::SYS_mremap => {
            call.bytes(a0, a1);
            if result > 0 {
                call.bytes(result as u64, a2);
            }
        }
        libc::SYS_madvise if !keeps_content(a2 as i32) => call.bytes(a0, a1),
        libc::SYS_process_madvise => call.vectors(a1, a2, u64::MAX),
        libc::SYS_brk => {
            let before = BREAK.swap(result as u64, Ordering::Relaxed);
            let (low, high) = (before.min(result as u64), before.max(result as u64));
            if before != 0 {
                call.bytes(low, high - low);
            }
        }
        libc::SYS_shmat if result > 0 => call.bytes(result as u64, segment_length(result as u64)),
        libc::SYS_shmdt | libc::SYS_remap_file_pages => call.bytes(a0, a1.max(1)),
        number if writes_nothing(number) => {}
        _ => {
            for argument in arguments.map(|argument| argument as u64) {
                if (PAGE..USER_END).contains(&argument) {
                    mark_written(argument, UNKNOWN_BYTES);
                }
            }
        }
    }
}

/// Whether a `madvise` leaves what the pages hold.
fn keeps_content(advice: i32) -> bool {
    const MADV_DONTNEED_LOCKED: i32 = 24;
    !matches!(
        advice,
        libc::MADV_DONTNEED | libc::MADV_FREE | libc::MADV_REMOVE | MADV_DONTNEED_LOCKED
    )
}

/// Calls that take from memory at most, or that nothing is known of but that.
#[rustfmt::skip]
fn writes_nothing(number: i64) -> bool {
    matches!(
        number,
        libc::SYS_write | libc::SYS_pwrite64 | libc::SYS_writev | libc::SYS_pwritev
            | libc::SYS_pwritev2 | libc::SYS_open | libc::SYS_openat | libc::SYS_openat2
            | libc::SYS_creat | libc::SYS_close | libc::SYS_close_range | libc::SYS_lseek
            | libc::SYS_mmap | libc::SYS_mprotect | libc::SYS_madvise | libc::SYS_msync
            | libc::SYS_mlock | libc::SYS_mlock2 | libc::SYS_munlock | libc::SYS_pkey_mprotect
            | libc::SYS_mbind | libc::SYS_access | libc::SYS_faccessat | libc::SYS_faccessat2
            | libc::SYS_sched_yield | libc::SYS_sched_setaffinity | libc::SYS_pause
            | libc::SYS_getpid | libc::SYS_gettid | libc::SYS_getppid | libc::SYS_getuid
            | libc::SYS_geteuid | libc::SYS_getgid | libc::SYS_getegid | libc::SYS_getpgrp
            | libc::SYS_sendto | libc::SYS_sendmsg | libc::SYS_connect | libc::SYS_bind
            | libc::SYS_listen | libc::SYS_shutdown | libc::SYS_setsockopt | libc::SYS_socket
            | libc::SYS_fork | libc::SYS_vfork | libc::SYS_execve | libc::SYS_execveat
            | libc::SYS_exit | libc::SYS_exit_group | libc::SYS_kill | libc::SYS_tkill
            | libc::SYS_tgkill | libc::SYS_rt_sigqueueinfo | libc::SYS_rt_tgsigqueueinfo
            | libc::SYS_rt_sigsuspend | libc::SYS_rt_sigreturn | libc::SYS_fsync
            | libc::SYS_fdatasync | libc::SYS_sync | libc::SYS_syncfs | libc::SYS_truncate
            | libc::SYS_ftruncate | libc::SYS_fallocate | libc::SYS_fadvise64
            | libc::SYS_readahead | libc::SYS_chdir | libc::SYS_fchdir | libc::SYS_rename
            | libc::SYS_renameat | libc::SYS_renameat2 | libc::SYS_mkdir | libc::SYS_mkdirat
            | libc::SYS_rmdir | libc::SYS_link | libc::SYS_linkat | libc::SYS_unlink
            | libc::SYS_unlinkat | libc::SYS_symlink | libc::SYS_symlinkat | libc::SYS_chmod
            | libc::SYS_fchmod | libc::SYS_fchmodat | libc::SYS_chown | libc::SYS_fchown
            | libc::SYS_lchown | libc::SYS_fchownat | libc::SYS_umask | libc::SYS_utime
            | libc::SYS_utimes | libc::SYS_utimensat | libc::SYS_futimesat | libc::SYS_dup
            | libc::SYS_dup2 | libc::SYS_dup3 | libc::SYS_alarm | libc::SYS_flock
            | libc::SYS_epoll_create | libc::SYS_epoll_create1 | libc::SYS_epoll_ctl
            | libc::SYS_eventfd | libc::SYS_eventfd2 | libc::SYS_signalfd | libc::SYS_signalfd4
            | libc::SYS_timerfd_create | libc::SYS_timer_delete | libc::SYS_timer_getoverrun
            | libc::SYS_inotify_init | libc::SYS_inotify_init1 | libc::SYS_inotify_add_watch
            | libc::SYS_inotify_rm_watch | libc::SYS_memfd_create | libc::SYS_setrlimit
            | libc::SYS_set_tid_address | libc::SYS_set_robust_list
            | libc::SYS_membarrier | libc::SYS_setpriority | libc::SYS_getpriority
            | libc::SYS_sched_setparam | libc::SYS_sched_setscheduler
            | libc::SYS_sched_getscheduler | libc::SYS_clock_settime | libc::SYS_tee
            | libc::SYS_rseq | libc::SYS_setxattr
            | libc::SYS_lsetxattr | libc::SYS_fsetxattr | libc::SYS_removexattr
            | libc::SYS_setsid | libc::SYS_setpgid | libc::SYS_getpgid | libc::SYS_getsid
            | libc::SYS_mq_timedsend | libc::SYS_pidfd_open | libc::SYS_pidfd_send_signal
    )
}

/// A finished call.
#[derive(Clone, Copy)]
struct Call {
    result: isize,
}

impl Call {
    /// How many bytes the call says that it wrote. One that found an address bad half-way may
    /// have written anything until there.
    fn written(self) -> u64 {
        if self.result == -(Errno::EFAULT.0 as isize) {
            u64::MAX
        } else {
            self.result.max(0) as u64
        }
    }

    fn bytes(self, address: u64, bytes: u64) {
        if address != 0 {
            mark_written(address, bytes);
        }
    }

    fn each(self, addresses: &[u64], bytes: u64) {
        for address in addresses {
            self.bytes(*address, bytes);
        }
    }

    fn returned(self, buffer: u64, size: u64) {
        self.bytes(buffer, size.min(self.written()));
    }

    /// The first `left` bytes of the memory that an array of `iovec` describes.
    fn vectors(self, array: u64, count: u64, mut left: u64) {
        for index in 0..count.min(MOST_VECTORS) {
            let at = array.saturating_add(index * 16);
            let (Some(base), Some(length)) = (long(at), long(at.saturating_add(8))) else {
                return;
            };
            let length = length.min(left);
            self.bytes(base, length);
            left -= length;
            if left == 0 {
                return;
            }
        }
    }

    /// A `struct msghdr` that a message of `left` bytes was received by.
    fn message(self, header: u64, left: u64) {
        self.bytes(header, MESSAGE_HEADER);
        let field = |offset| long(header.saturating_add(offset));
        if let Some(name) = field(0) {
            self.bytes(name, SOCKET_ADDRESS);
        }
        if let (Some(vectors), Some(count)) = (field(16), field(24)) {
            self.vectors(vectors, count, left);
        }
        if let (Some(control), Some(length)) = (field(32), field(40)) {
            self.bytes(control, length);
        }
    }
}

/// Memory of the process that may be gone by now, or be changed by another thread: then what
/// is noted is what a copy made a moment earlier or later would have said.
fn long(address: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    sys::read_memory(address, &mut bytes).ok()?;
    Some(u64::from_le_bytes(bytes))
}

fn word(address: u64) -> Option<u32> {
    let mut bytes = [0; 4];
    sys::read_memory(address, &mut bytes).ok()?;
    Some(u32::from_le_bytes(bytes))
}

/// How long the mapping is that starts at an address.
fn segment_length(start: u64) -> u64 {
    let mut length = UNKNOWN_BYTES;
    maps::read(|mapping| {
        if mapping.start == start {
            length = mapping.end - start;
        }
        mapping.start < start
    });
    length
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_call_wrote_is_bounded_by_its_result() {
        assert_eq!(Call { result: 10 }.written(), 10);
        assert_eq!(Call { result: -4 }.written(), 0);
        let fault = -(Errno::EFAULT.0 as isize);
        assert_eq!(Call { result: fault }.written(), u64::MAX);
    }

    #[test]
    fn advice_that_drops_pages_is_told_from_advice_that_keeps_them() {
        for advice in [libc::MADV_DONTNEED, libc::MADV_FREE, libc::MADV_REMOVE] {
            assert!(!keeps_content(advice));
        }
        for advice in [libc::MADV_WILLNEED, libc::MADV_HUGEPAGE, libc::MADV_RANDOM] {
            assert!(keeps_content(advice));
        }
    }
}
