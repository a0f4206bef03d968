//! The rows. See the parent module for what they mean.
//!
//! Numbers come from the kernel's headers by name. `Refused` names the errno
//! that Linux gives where the call is not configured (`ENOSYS`) or the caller
//! may not make it (`EPERM`).

use linux_raw_sys::general::*;

use super::Arg::{Checked, Copied, Fd, In, InOut, Out, Pages, Path, SigSet, Text, Value};
use super::Handling::{Control, Emulated, Forwarded, Refused};
use super::Shape::{Address, LengthOf, Message, Messages, Plain, SignalSet, Strings, Vectors};
use super::Size::{Arg as Len, Arg32 as Len32, Bits, BytePerPage, Bytes, Items};
use super::{Call, Flow, Restart, Shape};
use crate::calls::{
    fd, file, fork, memory, message, net, process, segment, signal, sockopt, thread, time, timer,
};
use crate::host::Errno;

macro_rules! call {
    ($nr:ident, $handling:expr, $args:expr) => {
        Call {
            nr: $nr,
            name: stringify!($nr).split_at("__NR_".len()).1,
            handling: $handling,
            args: &$args,
            restart: Restart::IfHandlerSaysSo,
        }
    };
}

macro_rules! call_no_restart {
    ($nr:ident, $handling:expr, $args:expr) => {
        Call {
            restart: Restart::Never,
            ..call!($nr, $handling, $args)
        }
    };
}

pub(super) const CALLS: &[Call] = &[
    call!(__NR_read, Forwarded, [Fd, Out(Len(2)), Value]),
    call!(__NR_write, Forwarded, [Fd, In(Len(2)), Value]),
    call!(
        __NR_open,
        Emulated(file::open),
        [Copied(Shape::Path), Value, Value]
    ),
    call!(__NR_close, Emulated(fd::steadily::<__NR_close>), [Fd]),
    call!(__NR_stat, Forwarded, [Path, Out(Bytes(144))]),
    call!(__NR_fstat, Forwarded, [Fd, Out(Bytes(144))]),
    call!(__NR_lstat, Forwarded, [Path, Out(Bytes(144))]),
    call_no_restart!(__NR_poll, Forwarded, [InOut(Items(1, 8)), Value, Value]),
    call!(__NR_lseek, Forwarded, [Fd, Value, Value]),
    call!(
        __NR_mmap,
        Emulated(memory::mmap),
        [Value, Value, Value, Value, Fd, Value]
    ),
    call!(
        __NR_mprotect,
        Emulated(memory::mprotect),
        [Value, Value, Value]
    ),
    call!(__NR_munmap, Emulated(memory::munmap), [Value, Value]),
    call!(__NR_brk, Emulated(memory::brk), [Value]),
    call!(
        __NR_rt_sigaction,
        Emulated(signal::rt_sigaction),
        [Value, In(Bytes(32)), Out(Bytes(32)), Value]
    ),
    call!(
        __NR_rt_sigprocmask,
        Emulated(signal::rt_sigprocmask),
        [Value, In(Bytes(8)), Out(Bytes(8)), Value]
    ),
    call!(__NR_rt_sigreturn, Control(signal::rt_sigreturn), []),
    call!(__NR_ioctl, Emulated(file::ioctl), [Fd, Value, Checked]),
    call!(__NR_pread64, Forwarded, [Fd, Out(Len(2)), Value, Value]),
    call!(__NR_pwrite64, Forwarded, [Fd, In(Len(2)), Value, Value]),
    call!(
        __NR_readv,
        Emulated(file::readv),
        [Fd, Copied(Vectors(2, Flow::Out)), Value]
    ),
    call!(
        __NR_writev,
        Emulated(file::writev),
        [Fd, Copied(Vectors(2, Flow::In)), Value]
    ),
    call!(__NR_access, Forwarded, [Path, Value]),
    call!(__NR_pipe, Forwarded, [Out(Bytes(8))]),
    call_no_restart!(
        __NR_select,
        Forwarded,
        [
            Value,
            InOut(Bits(0)),
            InOut(Bits(0)),
            InOut(Bits(0)),
            InOut(Bytes(16))
        ]
    ),
    call!(__NR_sched_yield, Forwarded, []),
    call!(
        __NR_mremap,
        Emulated(memory::mremap),
        [Value, Value, Value, Value, Value]
    ),
    call!(__NR_msync, Forwarded, [Pages(1), Value, Value]),
    call!(
        __NR_mincore,
        Forwarded,
        [Pages(1), Value, Out(BytePerPage(1))]
    ),
    call!(
        __NR_madvise,
        Emulated(memory::madvise),
        [Value, Value, Value]
    ),
    call!(__NR_shmget, Refused(Errno::ENOSYS), []),
    call!(__NR_shmat, Emulated(segment::attach), [Value, Value, Value]),
    call!(__NR_shmctl, Refused(Errno::ENOSYS), []),
    call!(__NR_dup, Emulated(fd::steadily::<__NR_dup>), [Fd]),
    call!(__NR_dup2, Emulated(fd::steadily::<__NR_dup2>), [Fd, Fd]),
    call_no_restart!(__NR_pause, Forwarded, []),
    call_no_restart!(__NR_nanosleep, Forwarded, [In(Bytes(16)), Out(Bytes(16))]),
    call!(__NR_getitimer, Forwarded, [Value, Out(Bytes(32))]),
    call!(__NR_alarm, Forwarded, [Value]),
    call!(
        __NR_setitimer,
        Forwarded,
        [Value, In(Bytes(32)), Out(Bytes(32))]
    ),
    call!(__NR_getpid, Forwarded, []),
    call!(__NR_sendfile, Forwarded, [Fd, Fd, InOut(Bytes(8)), Value]),
    call!(__NR_socket, Emulated(net::socket), [Value, Value, Value]),
    call!(
        __NR_connect,
        Emulated(net::connect),
        [Fd, Copied(Address(2)), Value]
    ),
    call!(
        __NR_accept,
        Emulated(net::accept),
        [Fd, Out(Bytes(128)), InOut(Bytes(4))]
    ),
    call!(
        __NR_sendto,
        Emulated(net::sendto),
        [Fd, In(Len(2)), Value, Value, Copied(Address(5)), Value]
    ),
    call!(
        __NR_recvfrom,
        Emulated(net::recvfrom),
        [
            Fd,
            Out(Len(2)),
            Value,
            Value,
            Out(Bytes(128)),
            InOut(Bytes(4))
        ]
    ),
    call!(
        __NR_sendmsg,
        Emulated(message::sendmsg),
        [Fd, Copied(Message(Flow::In)), Value]
    ),
    call!(
        __NR_recvmsg,
        Emulated(message::recvmsg),
        [Fd, Copied(Message(Flow::Out)), Value]
    ),
    call!(__NR_shutdown, Forwarded, [Fd, Value]),
    call!(
        __NR_bind,
        Emulated(net::bind),
        [Fd, Copied(Address(2)), Value]
    ),
    call!(__NR_listen, Emulated(net::listen), [Fd, Value]),
    call!(
        __NR_getsockname,
        Forwarded,
        [Fd, Out(Bytes(128)), InOut(Bytes(4))]
    ),
    call!(
        __NR_getpeername,
        Forwarded,
        [Fd, Out(Bytes(128)), InOut(Bytes(4))]
    ),
    call!(
        __NR_socketpair,
        Emulated(net::socketpair),
        [Value, Value, Value, Out(Bytes(8))]
    ),
    call!(
        __NR_setsockopt,
        Emulated(sockopt::setsockopt),
        [Fd, Value, Value, In(Len32(4)), Value]
    ),
    call!(
        __NR_getsockopt,
        Emulated(sockopt::getsockopt),
        [Fd, Value, Value, Checked, Copied(LengthOf(3))]
    ),
    call!(
        __NR_clone,
        Control(thread::clone),
        [Value, Value, Checked, Checked, Value]
    ),
    call!(__NR_fork, Control(fork::fork_call), []),
    call!(__NR_vfork, Control(fork::vfork_call), []),
    call!(
        __NR_execve,
        Control(process::execve),
        [Copied(Shape::Path), Copied(Strings), Copied(Strings)]
    ),
    call!(__NR_exit, Control(thread::exit), [Value]),
    call!(
        __NR_wait4,
        Forwarded,
        [Value, Out(Bytes(4)), Value, Out(Bytes(144))]
    ),
    call!(__NR_kill, Forwarded, [Value, Value]),
    call!(__NR_uname, Forwarded, [Out(Bytes(390))]),
    call!(__NR_semget, Refused(Errno::ENOSYS), []),
    call!(__NR_semop, Refused(Errno::ENOSYS), []),
    call!(__NR_semctl, Refused(Errno::ENOSYS), []),
    call!(__NR_shmdt, Refused(Errno::ENOSYS), []),
    call!(__NR_msgget, Refused(Errno::ENOSYS), []),
    call!(__NR_msgsnd, Refused(Errno::ENOSYS), []),
    call!(__NR_msgrcv, Refused(Errno::ENOSYS), []),
    call!(__NR_msgctl, Refused(Errno::ENOSYS), []),
    call!(__NR_fcntl, Emulated(file::fcntl), [Fd, Value, Checked]),
    call!(__NR_flock, Forwarded, [Fd, Value]),
    call!(__NR_fsync, Forwarded, [Fd]),
    call!(__NR_fdatasync, Forwarded, [Fd]),
    call!(__NR_truncate, Forwarded, [Path, Value]),
    call!(__NR_ftruncate, Forwarded, [Fd, Value]),
    call!(
        __NR_getdents,
        Emulated(file::getdents),
        [Fd, Out(Len32(2)), Value]
    ),
    call!(__NR_getcwd, Forwarded, [Out(Len(1)), Value]),
    call!(__NR_chdir, Forwarded, [Path]),
    call!(__NR_fchdir, Forwarded, [Fd]),
    call!(__NR_rename, Forwarded, [Path, Path]),
    call!(__NR_mkdir, Forwarded, [Path, Value]),
    call!(__NR_rmdir, Forwarded, [Path]),
    call!(
        __NR_creat,
        Emulated(file::creat),
        [Copied(Shape::Path), Value]
    ),
    call!(__NR_link, Forwarded, [Path, Path]),
    call!(__NR_unlink, Forwarded, [Path]),
    call!(__NR_symlink, Forwarded, [Text, Path]),
    call!(
        __NR_readlink,
        Emulated(file::readlink),
        [Copied(Shape::Path), Out(Len32(2)), Value]
    ),
    call!(__NR_chmod, Forwarded, [Path, Value]),
    call!(__NR_fchmod, Forwarded, [Fd, Value]),
    call!(__NR_chown, Forwarded, [Path, Value, Value]),
    call!(__NR_fchown, Forwarded, [Fd, Value, Value]),
    call!(__NR_lchown, Forwarded, [Path, Value, Value]),
    call!(__NR_umask, Forwarded, [Value]),
    call!(
        __NR_gettimeofday,
        Forwarded,
        [Out(Bytes(16)), Out(Bytes(8))]
    ),
    call!(
        __NR_getrlimit,
        Emulated(process::getrlimit),
        [Value, Out(Bytes(16))]
    ),
    call!(__NR_getrusage, Forwarded, [Value, Out(Bytes(144))]),
    call!(__NR_sysinfo, Forwarded, [Out(Bytes(112))]),
    call!(__NR_times, Forwarded, [Out(Bytes(32))]),
    call!(__NR_ptrace, Refused(Errno::EPERM), []),
    call!(__NR_getuid, Forwarded, []),
    call!(__NR_syslog, Refused(Errno::EPERM), []),
    call!(__NR_getgid, Forwarded, []),
    call!(__NR_setuid, Forwarded, [Value]),
    call!(__NR_setgid, Forwarded, [Value]),
    call!(__NR_geteuid, Forwarded, []),
    call!(__NR_getegid, Forwarded, []),
    call!(__NR_setpgid, Forwarded, [Value, Value]),
    call!(__NR_getppid, Forwarded, []),
    call!(__NR_getpgrp, Forwarded, []),
    call!(__NR_setsid, Forwarded, []),
    call!(__NR_setreuid, Forwarded, [Value, Value]),
    call!(__NR_setregid, Forwarded, [Value, Value]),
    call!(__NR_getgroups, Forwarded, [Value, Out(Items(0, 4))]),
    call!(__NR_setgroups, Forwarded, [Value, In(Items(0, 4))]),
    call!(__NR_setresuid, Forwarded, [Value, Value, Value]),
    call!(
        __NR_getresuid,
        Forwarded,
        [Out(Bytes(4)), Out(Bytes(4)), Out(Bytes(4))]
    ),
    call!(__NR_setresgid, Forwarded, [Value, Value, Value]),
    call!(
        __NR_getresgid,
        Forwarded,
        [Out(Bytes(4)), Out(Bytes(4)), Out(Bytes(4))]
    ),
    call!(__NR_getpgid, Forwarded, [Value]),
    call!(__NR_setfsuid, Forwarded, [Value]),
    call!(__NR_setfsgid, Forwarded, [Value]),
    call!(__NR_getsid, Forwarded, [Value]),
    call!(__NR_capget, Forwarded, [InOut(Bytes(8)), Out(Bytes(24))]),
    call!(__NR_capset, Forwarded, [InOut(Bytes(8)), In(Bytes(24))]),
    call!(__NR_rt_sigpending, Forwarded, [Out(Bytes(8)), Value]),
    call_no_restart!(
        __NR_rt_sigtimedwait,
        Forwarded,
        [SigSet, Out(Bytes(128)), In(Bytes(16)), Value]
    ),
    call!(
        __NR_rt_sigqueueinfo,
        Control(signal::rt_sigqueueinfo),
        [Value, Value, In(Bytes(128))]
    ),
    call_no_restart!(__NR_rt_sigsuspend, Forwarded, [SigSet, Value]),
    call!(
        __NR_sigaltstack,
        Control(signal::sigaltstack),
        [In(Bytes(24)), Out(Bytes(24))]
    ),
    call!(__NR_utime, Forwarded, [Path, In(Bytes(16))]),
    call!(__NR_mknod, Forwarded, [Path, Value, Value]),
    call!(__NR_uselib, Refused(Errno::ENOSYS), []),
    call!(__NR_personality, Emulated(process::personality), [Value]),
    call!(__NR_ustat, Refused(Errno::ENOSYS), []),
    call!(__NR_statfs, Forwarded, [Path, Out(Bytes(120))]),
    call!(__NR_fstatfs, Forwarded, [Fd, Out(Bytes(120))]),
    call!(__NR_sysfs, Refused(Errno::ENOSYS), []),
    call!(__NR_getpriority, Forwarded, [Value, Value]),
    call!(__NR_setpriority, Forwarded, [Value, Value, Value]),
    call!(__NR_sched_setparam, Forwarded, [Value, In(Bytes(4))]),
    call!(__NR_sched_getparam, Forwarded, [Value, Out(Bytes(4))]),
    call!(
        __NR_sched_setscheduler,
        Forwarded,
        [Value, Value, In(Bytes(4))]
    ),
    call!(__NR_sched_getscheduler, Forwarded, [Value]),
    call!(__NR_sched_get_priority_max, Forwarded, [Value]),
    call!(__NR_sched_get_priority_min, Forwarded, [Value]),
    call!(
        __NR_sched_rr_get_interval,
        Forwarded,
        [Value, Out(Bytes(16))]
    ),
    call!(__NR_mlock, Forwarded, [Pages(1), Value]),
    call!(__NR_munlock, Forwarded, [Pages(1), Value]),
    call!(__NR_mlockall, Refused(Errno::EPERM), []),
    call!(__NR_munlockall, Forwarded, []),
    call!(__NR_vhangup, Refused(Errno::EPERM), []),
    call!(__NR_modify_ldt, Refused(Errno::ENOSYS), []),
    call!(__NR_pivot_root, Refused(Errno::EPERM), []),
    call!(__NR__sysctl, Refused(Errno::ENOSYS), []),
    call!(
        __NR_prctl,
        Emulated(process::prctl),
        [Value, Checked, Checked, Checked, Checked]
    ),
    call!(
        __NR_arch_prctl,
        Control(process::arch_prctl),
        [Value, Checked]
    ),
    call!(__NR_adjtimex, Refused(Errno::EPERM), []),
    call!(
        __NR_setrlimit,
        Emulated(process::setrlimit),
        [Value, In(Bytes(16))]
    ),
    call!(__NR_chroot, Refused(Errno::EPERM), []),
    call!(__NR_sync, Forwarded, []),
    call!(__NR_acct, Refused(Errno::EPERM), []),
    call!(__NR_settimeofday, Refused(Errno::EPERM), []),
    call!(__NR_mount, Refused(Errno::EPERM), []),
    call!(__NR_umount2, Refused(Errno::EPERM), []),
    call!(__NR_swapon, Refused(Errno::EPERM), []),
    call!(__NR_swapoff, Refused(Errno::EPERM), []),
    call!(__NR_reboot, Refused(Errno::EPERM), []),
    call!(__NR_sethostname, Refused(Errno::EPERM), []),
    call!(__NR_setdomainname, Refused(Errno::EPERM), []),
    call!(__NR_iopl, Refused(Errno::EPERM), []),
    call!(__NR_ioperm, Refused(Errno::EPERM), []),
    call!(__NR_create_module, Refused(Errno::ENOSYS), []),
    call!(__NR_init_module, Refused(Errno::ENOSYS), []),
    call!(__NR_delete_module, Refused(Errno::ENOSYS), []),
    call!(__NR_get_kernel_syms, Refused(Errno::ENOSYS), []),
    call!(__NR_query_module, Refused(Errno::ENOSYS), []),
    call!(__NR_quotactl, Refused(Errno::ENOSYS), []),
    call!(__NR_nfsservctl, Refused(Errno::ENOSYS), []),
    call!(__NR_getpmsg, Refused(Errno::ENOSYS), []),
    call!(__NR_putpmsg, Refused(Errno::ENOSYS), []),
    call!(__NR_afs_syscall, Refused(Errno::ENOSYS), []),
    call!(__NR_tuxcall, Refused(Errno::ENOSYS), []),
    call!(__NR_security, Refused(Errno::ENOSYS), []),
    call!(__NR_gettid, Forwarded, []),
    call!(__NR_readahead, Forwarded, [Fd, Value, Value]),
    call!(
        __NR_setxattr,
        Forwarded,
        [Path, Text, In(Len(3)), Value, Value]
    ),
    call!(
        __NR_lsetxattr,
        Forwarded,
        [Path, Text, In(Len(3)), Value, Value]
    ),
    call!(
        __NR_fsetxattr,
        Forwarded,
        [Fd, Text, In(Len(3)), Value, Value]
    ),
    call!(__NR_getxattr, Forwarded, [Path, Text, Out(Len(3)), Value]),
    call!(__NR_lgetxattr, Forwarded, [Path, Text, Out(Len(3)), Value]),
    call!(__NR_fgetxattr, Forwarded, [Fd, Text, Out(Len(3)), Value]),
    call!(__NR_listxattr, Forwarded, [Path, Out(Len(2)), Value]),
    call!(__NR_llistxattr, Forwarded, [Path, Out(Len(2)), Value]),
    call!(__NR_flistxattr, Forwarded, [Fd, Out(Len(2)), Value]),
    call!(__NR_removexattr, Forwarded, [Path, Text]),
    call!(__NR_lremovexattr, Forwarded, [Path, Text]),
    call!(__NR_fremovexattr, Forwarded, [Fd, Text]),
    call!(__NR_tkill, Emulated(thread::tkill), [Value, Value]),
    call!(__NR_time, Forwarded, [Out(Bytes(8))]),
    call!(
        __NR_futex,
        Emulated(time::futex),
        [Checked, Value, Value, Checked, Checked, Value]
    ),
    call!(
        __NR_sched_setaffinity,
        Forwarded,
        [Value, Value, In(Len32(1))]
    ),
    call!(
        __NR_sched_getaffinity,
        Forwarded,
        [Value, Value, Out(Len32(1))]
    ),
    call!(__NR_set_thread_area, Refused(Errno::ENOSYS), []),
    call!(__NR_io_setup, Refused(Errno::ENOSYS), []),
    call!(__NR_io_destroy, Refused(Errno::ENOSYS), []),
    call!(__NR_io_getevents, Refused(Errno::ENOSYS), []),
    call!(__NR_io_submit, Refused(Errno::ENOSYS), []),
    call!(__NR_io_cancel, Refused(Errno::ENOSYS), []),
    call!(__NR_get_thread_area, Refused(Errno::ENOSYS), []),
    call!(__NR_lookup_dcookie, Refused(Errno::ENOSYS), []),
    call!(__NR_epoll_create, Forwarded, [Value]),
    call!(__NR_epoll_ctl_old, Refused(Errno::ENOSYS), []),
    call!(__NR_epoll_wait_old, Refused(Errno::ENOSYS), []),
    call!(__NR_remap_file_pages, Refused(Errno::ENOSYS), []),
    call!(
        __NR_getdents64,
        Emulated(file::getdents64),
        [Fd, Out(Len32(2)), Value]
    ),
    call!(
        __NR_set_tid_address,
        Emulated(thread::set_tid_address),
        [Value]
    ),
    call!(__NR_restart_syscall, Refused(Errno::EINTR), []),
    call!(__NR_semtimedop, Refused(Errno::ENOSYS), []),
    call!(__NR_fadvise64, Forwarded, [Fd, Value, Value, Value]),
    call!(
        __NR_timer_create,
        Emulated(timer::timer_create),
        [Value, Copied(Plain(Bytes(64))), Out(Bytes(4))]
    ),
    call!(
        __NR_timer_settime,
        Forwarded,
        [Value, Value, In(Bytes(32)), Out(Bytes(32))]
    ),
    call!(__NR_timer_gettime, Forwarded, [Value, Out(Bytes(32))]),
    call!(__NR_timer_getoverrun, Forwarded, [Value]),
    call!(__NR_timer_delete, Forwarded, [Value]),
    call!(__NR_clock_settime, Refused(Errno::EPERM), []),
    call!(__NR_clock_gettime, Forwarded, [Value, Out(Bytes(16))]),
    call!(__NR_clock_getres, Forwarded, [Value, Out(Bytes(16))]),
    call_no_restart!(
        __NR_clock_nanosleep,
        Forwarded,
        [Value, Value, In(Bytes(16)), Out(Bytes(16))]
    ),
    call!(__NR_exit_group, Control(thread::exit_group), [Value]),
    call_no_restart!(
        __NR_epoll_wait,
        Forwarded,
        [Fd, Out(Items(2, 12)), Value, Value]
    ),
    call!(__NR_epoll_ctl, Forwarded, [Fd, Value, Fd, In(Bytes(12))]),
    call!(__NR_tgkill, Emulated(thread::tgkill), [Value, Value, Value]),
    call!(__NR_utimes, Forwarded, [Path, In(Bytes(32))]),
    call!(__NR_vserver, Refused(Errno::ENOSYS), []),
    call!(__NR_mbind, Refused(Errno::ENOSYS), []),
    call!(__NR_set_mempolicy, Refused(Errno::ENOSYS), []),
    call!(__NR_get_mempolicy, Refused(Errno::ENOSYS), []),
    call!(__NR_mq_open, Refused(Errno::ENOSYS), []),
    call!(__NR_mq_unlink, Refused(Errno::ENOSYS), []),
    call!(__NR_mq_timedsend, Refused(Errno::ENOSYS), []),
    call!(__NR_mq_timedreceive, Refused(Errno::ENOSYS), []),
    call!(__NR_mq_notify, Refused(Errno::ENOSYS), []),
    call!(__NR_mq_getsetattr, Refused(Errno::ENOSYS), []),
    call!(__NR_kexec_load, Refused(Errno::ENOSYS), []),
    call!(
        __NR_waitid,
        Forwarded,
        [Value, Value, Out(Bytes(128)), Value, Out(Bytes(144))]
    ),
    call!(__NR_add_key, Refused(Errno::ENOSYS), []),
    call!(__NR_request_key, Refused(Errno::ENOSYS), []),
    call!(__NR_keyctl, Refused(Errno::ENOSYS), []),
    call!(__NR_ioprio_set, Forwarded, [Value, Value, Value]),
    call!(__NR_ioprio_get, Forwarded, [Value, Value]),
    call!(__NR_inotify_init, Forwarded, []),
    call!(__NR_inotify_add_watch, Forwarded, [Fd, Path, Value]),
    call!(__NR_inotify_rm_watch, Forwarded, [Fd, Value]),
    call!(__NR_migrate_pages, Refused(Errno::ENOSYS), []),
    call!(
        __NR_openat,
        Emulated(file::openat),
        [Fd, Copied(Shape::Path), Value, Value]
    ),
    call!(__NR_mkdirat, Forwarded, [Fd, Path, Value]),
    call!(__NR_mknodat, Forwarded, [Fd, Path, Value, Value]),
    call!(__NR_fchownat, Forwarded, [Fd, Path, Value, Value, Value]),
    call!(__NR_futimesat, Forwarded, [Fd, Path, In(Bytes(32))]),
    call!(
        __NR_newfstatat,
        Forwarded,
        [Fd, Path, Out(Bytes(144)), Value]
    ),
    call!(__NR_unlinkat, Forwarded, [Fd, Path, Value]),
    call!(__NR_renameat, Forwarded, [Fd, Path, Fd, Path]),
    call!(__NR_linkat, Forwarded, [Fd, Path, Fd, Path, Value]),
    call!(__NR_symlinkat, Forwarded, [Text, Fd, Path]),
    call!(
        __NR_readlinkat,
        Emulated(file::readlinkat),
        [Fd, Copied(Shape::Path), Out(Len32(3)), Value]
    ),
    call!(__NR_fchmodat, Forwarded, [Fd, Path, Value]),
    call!(__NR_faccessat, Forwarded, [Fd, Path, Value]),
    call_no_restart!(
        __NR_pselect6,
        Emulated(time::pselect6),
        [
            Value,
            InOut(Bits(0)),
            InOut(Bits(0)),
            InOut(Bits(0)),
            InOut(Bytes(16)),
            Copied(SignalSet)
        ]
    ),
    call_no_restart!(
        __NR_ppoll,
        Forwarded,
        [InOut(Items(1, 8)), Value, InOut(Bytes(16)), SigSet, Value]
    ),
    call!(__NR_unshare, Refused(Errno::EPERM), []),
    call!(
        __NR_set_robust_list,
        Emulated(thread::set_robust_list),
        [Value, Value]
    ),
    call!(
        __NR_get_robust_list,
        Emulated(thread::get_robust_list),
        [Value, Out(Bytes(8)), Out(Bytes(8))]
    ),
    call!(
        __NR_splice,
        Forwarded,
        [Fd, InOut(Bytes(8)), Fd, InOut(Bytes(8)), Value, Value]
    ),
    call!(__NR_tee, Forwarded, [Fd, Fd, Value, Value]),
    call!(__NR_sync_file_range, Forwarded, [Fd, Value, Value, Value]),
    call!(__NR_vmsplice, Refused(Errno::ENOSYS), []),
    call!(__NR_move_pages, Refused(Errno::ENOSYS), []),
    call!(__NR_utimensat, Forwarded, [Fd, Path, In(Bytes(32)), Value]),
    call_no_restart!(
        __NR_epoll_pwait,
        Forwarded,
        [Fd, Out(Items(2, 12)), Value, Value, SigSet, Value]
    ),
    call!(__NR_signalfd, Forwarded, [Fd, SigSet, Value]),
    call!(__NR_timerfd_create, Forwarded, [Value, Value]),
    call!(__NR_eventfd, Forwarded, [Value]),
    call!(__NR_fallocate, Forwarded, [Fd, Value, Value, Value]),
    call!(
        __NR_timerfd_settime,
        Forwarded,
        [Fd, Value, In(Bytes(32)), Out(Bytes(32))]
    ),
    call!(__NR_timerfd_gettime, Forwarded, [Fd, Out(Bytes(32))]),
    call!(
        __NR_accept4,
        Emulated(net::accept4),
        [Fd, Out(Bytes(128)), InOut(Bytes(4)), Value]
    ),
    call!(__NR_signalfd4, Forwarded, [Fd, SigSet, Value, Value]),
    call!(__NR_eventfd2, Forwarded, [Value, Value]),
    call!(__NR_epoll_create1, Forwarded, [Value]),
    call!(
        __NR_dup3,
        Emulated(fd::steadily::<__NR_dup3>),
        [Fd, Fd, Value]
    ),
    call!(__NR_pipe2, Forwarded, [Out(Bytes(8)), Value]),
    call!(__NR_inotify_init1, Forwarded, [Value]),
    call!(
        __NR_preadv,
        Emulated(file::preadv),
        [Fd, Copied(Vectors(2, Flow::Out)), Value, Value, Value]
    ),
    call!(
        __NR_pwritev,
        Emulated(file::pwritev),
        [Fd, Copied(Vectors(2, Flow::In)), Value, Value, Value]
    ),
    call!(
        __NR_rt_tgsigqueueinfo,
        Control(signal::rt_tgsigqueueinfo),
        [Value, Value, Value, In(Bytes(128))]
    ),
    call!(__NR_perf_event_open, Refused(Errno::ENOSYS), []),
    call!(
        __NR_recvmmsg,
        Emulated(message::recvmmsg),
        [
            Fd,
            Copied(Messages(2, Flow::Out)),
            Value,
            Value,
            InOut(Bytes(16))
        ]
    ),
    call!(__NR_fanotify_init, Refused(Errno::ENOSYS), []),
    call!(__NR_fanotify_mark, Refused(Errno::ENOSYS), []),
    call!(
        __NR_prlimit64,
        Emulated(process::prlimit64),
        [Value, Value, In(Bytes(16)), Out(Bytes(16))]
    ),
    call!(__NR_name_to_handle_at, Refused(Errno::EOPNOTSUPP), []),
    call!(__NR_open_by_handle_at, Refused(Errno::EPERM), []),
    call!(__NR_clock_adjtime, Refused(Errno::EPERM), []),
    call!(__NR_syncfs, Forwarded, [Fd]),
    call!(
        __NR_sendmmsg,
        Emulated(message::sendmmsg),
        [Fd, Copied(Messages(2, Flow::In)), Value, Value]
    ),
    call!(__NR_setns, Refused(Errno::EPERM), []),
    call!(__NR_getcpu, Forwarded, [Out(Bytes(4)), Out(Bytes(4))]),
    call!(__NR_process_vm_readv, Refused(Errno::ENOSYS), []),
    call!(__NR_process_vm_writev, Refused(Errno::ENOSYS), []),
    call!(__NR_kcmp, Refused(Errno::ENOSYS), []),
    call!(__NR_finit_module, Refused(Errno::ENOSYS), []),
    call!(__NR_sched_setattr, Forwarded, [Value, In(Bytes(48)), Value]),
    call!(
        __NR_sched_getattr,
        Forwarded,
        [Value, Out(Len32(2)), Value, Value]
    ),
    call!(__NR_renameat2, Forwarded, [Fd, Path, Fd, Path, Value]),
    call!(__NR_seccomp, Refused(Errno::ENOSYS), []),
    call!(__NR_getrandom, Forwarded, [Out(Len(1)), Value, Value]),
    call!(
        __NR_memfd_create,
        Emulated(memory::memfd_create),
        [Text, Value]
    ),
    call!(__NR_kexec_file_load, Refused(Errno::ENOSYS), []),
    call!(__NR_bpf, Refused(Errno::ENOSYS), []),
    call!(
        __NR_execveat,
        Control(process::execveat),
        [
            Fd,
            Copied(Shape::Path),
            Copied(Strings),
            Copied(Strings),
            Value
        ]
    ),
    call!(__NR_userfaultfd, Refused(Errno::ENOSYS), []),
    call!(
        __NR_membarrier,
        Emulated(thread::membarrier),
        [Value, Value, Value]
    ),
    call!(__NR_mlock2, Forwarded, [Pages(1), Value, Value]),
    call!(
        __NR_copy_file_range,
        Forwarded,
        [Fd, InOut(Bytes(8)), Fd, InOut(Bytes(8)), Value, Value]
    ),
    call!(
        __NR_preadv2,
        Emulated(file::preadv2),
        [
            Fd,
            Copied(Vectors(2, Flow::Out)),
            Value,
            Value,
            Value,
            Value
        ]
    ),
    call!(
        __NR_pwritev2,
        Emulated(file::pwritev2),
        [Fd, Copied(Vectors(2, Flow::In)), Value, Value, Value, Value]
    ),
    call!(__NR_pkey_mprotect, Refused(Errno::ENOSYS), []),
    call!(__NR_pkey_alloc, Refused(Errno::ENOSYS), []),
    call!(__NR_pkey_free, Refused(Errno::ENOSYS), []),
    call!(
        __NR_statx,
        Forwarded,
        [Fd, Path, Value, Value, Out(Bytes(256))]
    ),
    call!(__NR_io_pgetevents, Refused(Errno::ENOSYS), []),
    call!(__NR_rseq, Refused(Errno::ENOSYS), []),
    call!(__NR_uretprobe, Refused(Errno::ENOSYS), []),
    call!(
        __NR_pidfd_send_signal,
        Emulated(signal::pidfd_send_signal),
        [Fd, Value, In(Bytes(128)), Value]
    ),
    call!(__NR_io_uring_setup, Refused(Errno::ENOSYS), []),
    call!(__NR_io_uring_enter, Refused(Errno::ENOSYS), []),
    call!(__NR_io_uring_register, Refused(Errno::ENOSYS), []),
    call!(__NR_open_tree, Refused(Errno::EPERM), []),
    call!(__NR_move_mount, Refused(Errno::EPERM), []),
    call!(__NR_fsopen, Refused(Errno::EPERM), []),
    call!(__NR_fsconfig, Refused(Errno::EPERM), []),
    call!(__NR_fsmount, Refused(Errno::EPERM), []),
    call!(__NR_fspick, Refused(Errno::EPERM), []),
    call!(__NR_pidfd_open, Forwarded, [Value, Value]),
    call!(__NR_clone3, Control(thread::clone3), [Checked, Value]),
    call!(
        __NR_close_range,
        Emulated(file::close_range),
        [Value, Value, Value]
    ),
    call!(
        __NR_openat2,
        Emulated(file::openat2),
        [Fd, Copied(Shape::Path), Copied(Plain(Len(3))), Value]
    ),
    call!(__NR_pidfd_getfd, Refused(Errno::EPERM), []),
    call!(__NR_faccessat2, Forwarded, [Fd, Path, Value, Value]),
    call!(__NR_process_madvise, Refused(Errno::ENOSYS), []),
    call_no_restart!(
        __NR_epoll_pwait2,
        Forwarded,
        [Fd, Out(Items(2, 12)), Value, In(Bytes(16)), SigSet, Value]
    ),
    call!(__NR_mount_setattr, Refused(Errno::EPERM), []),
    call!(__NR_quotactl_fd, Refused(Errno::ENOSYS), []),
    call!(__NR_landlock_create_ruleset, Refused(Errno::ENOSYS), []),
    call!(__NR_landlock_add_rule, Refused(Errno::ENOSYS), []),
    call!(__NR_landlock_restrict_self, Refused(Errno::ENOSYS), []),
    call!(__NR_memfd_secret, Refused(Errno::ENOSYS), []),
    call!(__NR_process_mrelease, Refused(Errno::ENOSYS), []),
    call!(__NR_futex_waitv, Refused(Errno::ENOSYS), []),
    call!(__NR_set_mempolicy_home_node, Refused(Errno::ENOSYS), []),
    call!(
        __NR_cachestat,
        Forwarded,
        [Fd, In(Bytes(16)), Out(Bytes(40)), Value]
    ),
    call!(__NR_fchmodat2, Forwarded, [Fd, Path, Value, Value]),
    call!(__NR_map_shadow_stack, Refused(Errno::ENOSYS), []),
    call!(__NR_futex_wake, Refused(Errno::ENOSYS), []),
    call!(__NR_futex_wait, Refused(Errno::ENOSYS), []),
    call!(__NR_futex_requeue, Refused(Errno::ENOSYS), []),
    call!(__NR_statmount, Refused(Errno::ENOSYS), []),
    call!(__NR_listmount, Refused(Errno::ENOSYS), []),
    call!(__NR_lsm_get_self_attr, Refused(Errno::ENOSYS), []),
    call!(__NR_lsm_set_self_attr, Refused(Errno::ENOSYS), []),
    call!(__NR_lsm_list_modules, Refused(Errno::ENOSYS), []),
    call!(__NR_mseal, Refused(Errno::ENOSYS), []),
    call!(__NR_setxattrat, Refused(Errno::ENOSYS), []),
    call!(__NR_getxattrat, Refused(Errno::ENOSYS), []),
    call!(__NR_listxattrat, Refused(Errno::ENOSYS), []),
    call!(__NR_removexattrat, Refused(Errno::ENOSYS), []),
    call!(__NR_open_tree_attr, Refused(Errno::ENOSYS), []),
    call!(__NR_file_getattr, Refused(Errno::ENOSYS), []),
    call!(__NR_file_setattr, Refused(Errno::ENOSYS), []),
];
