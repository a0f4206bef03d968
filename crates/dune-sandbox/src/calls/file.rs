//! Files: what needs more than the checks of the table.

use linux_raw_sys::general::{
    __NR_fcntl, __NR_getdents, __NR_getdents64, __NR_ioctl, __NR_openat, __NR_openat2, __NR_preadv,
    __NR_preadv2, __NR_pwritev, __NR_pwritev2, __NR_readlinkat, __NR_readv, __NR_writev,
    __O_TMPFILE, AT_FDCWD, F_DUPFD, F_DUPFD_CLOEXEC, O_CREAT, O_TRUNC, O_WRONLY,
};
use linux_raw_sys::ioctl::{FS_IOC_SETFLAGS, SIOCGIFCONF};

use crate::calls::ioctl::{Argument, fcntl_argument, ioctl_argument};
use crate::calls::procfs::Folder;
use crate::calls::{fd, forward, net, procfs};
use crate::guard::Guard;
use crate::host::{Errno, SysResult};
use crate::policy::Need;
use crate::policy::uses::Last;
use crate::table::Args;

pub(crate) use crate::calls::fd::close_range;

/// `AT_FDCWD` in a register.
const CWD: u64 = AT_FDCWD as i64 as u64;

pub(crate) fn open(guard: &mut Guard, args: Args) -> SysResult {
    let [path, flags, mode, ..] = args;
    openat(guard, [CWD, path, flags, mode, 0, 0])
}

pub(crate) fn creat(guard: &mut Guard, args: Args) -> SysResult {
    let [path, mode, ..] = args;
    openat(
        guard,
        [
            CWD,
            path,
            u64::from(O_CREAT | O_WRONLY | O_TRUNC),
            mode,
            0,
            0,
        ],
    )
}

pub(crate) fn openat(guard: &mut Guard, args: Args) -> SysResult {
    let [dirfd, path, flags, mode, ..] = args;
    let mut held = flags;
    let path = guard.hold_opened(dirfd, path, &mut held)?;
    let more = held & !flags;
    procfs::open(guard, flags, |flags| {
        forward(__NR_openat, [dirfd, path, flags | more, mode, 0, 0])
    })
}

pub(crate) fn openat2(guard: &mut Guard, args: Args) -> SysResult {
    /// `struct open_how`: flags, mode, resolve.
    const HOW_LEN: u64 = 24;
    const MAX_LEN: u64 = 4096;
    let [dirfd, path, how, len, ..] = args;
    if len < HOW_LEN {
        return Err(Errno::EINVAL);
    }
    if len > MAX_LEN {
        return Err(Errno::E2BIG);
    }
    // Fields that a newer kernel may have must be zero: we do not know them.
    let mut bytes = vec![0; len as usize];
    guard.memory().read(how, &mut bytes)?;
    let (known, unknown) = bytes.split_at(HOW_LEN as usize);
    if unknown.iter().any(|&byte| byte != 0) {
        return Err(Errno::E2BIG);
    }
    let mut how = [0_u64; 3];
    for (field, bytes) in how.iter_mut().zip(known.as_chunks::<8>().0) {
        *field = u64::from_le_bytes(*bytes);
    }
    let [flags, mode, resolve] = how;
    if resolve != 0 && guard.program.policy().files().is_some() {
        // Ways of resolving a path that is not the program's any more.
        return Err(Errno::ENOSYS);
    }
    let mut held = flags;
    let path = guard.hold_opened(dirfd, path, &mut held)?;
    let more = held & !flags;
    let bounce = guard.bounce.clone();
    procfs::open(guard, flags, |flags| {
        // The kernel wants no mode where nothing is made.
        let makes = flags & u64::from(O_CREAT | __O_TMPFILE) != 0;
        let how = bounce.lend(&[flags | more, if makes { mode } else { 0 }, resolve])?;
        forward(__NR_openat2, [dirfd, path, how.pointer(), HOW_LEN, 0, 0])
    })
}

pub(crate) fn readlink(guard: &mut Guard, args: Args) -> SysResult {
    let [path, buffer, len, ..] = args;
    readlinkat(guard, [CWD, path, buffer, len, 0, 0])
}

pub(crate) fn readlinkat(guard: &mut Guard, args: Args) -> SysResult {
    let [dirfd, path, buffer, len, ..] = args;
    let path = guard.memory().read_cstr(path, crate::user::PATH_MAX)?;
    if (len as i32) <= 0 {
        return Err(Errno::EINVAL);
    }
    if procfs::is_exe_link(guard.pid(), &path) {
        let target = guard.program.process().exe.clone();
        let count = target.len().min(len as usize);
        guard.memory().write(buffer, &target[..count])?;
        return Ok(count as u64);
    }
    let text = path.strip_suffix(b"\0").unwrap_or(&path);
    let request = |path: &str| format!("readlink({path})");
    let mut path = guard.hold_path(dirfd, text, Last::NoFollow, Need::Look, &request)?;
    path.push(0);
    let path = guard.lend(&path[..])?;
    forward(__NR_readlinkat, [dirfd, path.pointer(), buffer, len, 0, 0])
}

pub(crate) fn readv(guard: &mut Guard, args: Args) -> SysResult {
    vectored(guard, __NR_readv, args)
}

pub(crate) fn writev(guard: &mut Guard, args: Args) -> SysResult {
    vectored(guard, __NR_writev, args)
}

pub(crate) fn preadv(guard: &mut Guard, args: Args) -> SysResult {
    vectored(guard, __NR_preadv, args)
}

pub(crate) fn pwritev(guard: &mut Guard, args: Args) -> SysResult {
    vectored(guard, __NR_pwritev, args)
}

pub(crate) fn preadv2(guard: &mut Guard, args: Args) -> SysResult {
    vectored(guard, __NR_preadv2, args)
}

pub(crate) fn pwritev2(guard: &mut Guard, args: Args) -> SysResult {
    vectored(guard, __NR_pwritev2, args)
}

/// The kernel gets the guard's copy of the vectors, each of which has been
/// checked; the rest is numbers.
fn vectored(guard: &mut Guard, nr: u32, args: Args) -> SysResult {
    let [fd, vecs, count, low, high, flags] = args;
    let vecs = guard.memory().read_iovecs(vecs, count)?;
    let vecs = guard.lend(&vecs[..])?;
    forward(nr, [fd, vecs.pointer(), count, low, high, flags])
}

pub(crate) fn ioctl(guard: &mut Guard, args: Args) -> SysResult {
    let [mut fd, request, argument, ..] = args;
    match request as u32 {
        SIOCGIFCONF => return net::list_interfaces(guard, fd, argument),
        FS_IOC_SETFLAGS => fd = guard.hold_changed("FS_IOC_SETFLAGS", fd)?,
        _ => {}
    }
    let Some(kind) = ioctl_argument(request as u32) else {
        guard.count_missing(__NR_ioctl);
        return Err(Errno::ENOTTY);
    };
    let argument = checked(guard, kind, argument)?;
    forward(__NR_ioctl, [fd, request, argument, 0, 0, 0])
}

pub(crate) fn fcntl(guard: &mut Guard, args: Args) -> SysResult {
    let [fd, command, argument, ..] = args;
    let kind = fcntl_argument(command as u32).ok_or(Errno::EINVAL)?;
    let argument = checked(guard, kind, argument)?;
    let args = [fd, command, argument, 0, 0, 0];
    if matches!(command as u32, F_DUPFD | F_DUPFD_CLOEXEC) {
        return fd::steadily::<__NR_fcntl>(guard, args);
    }
    forward(__NR_fcntl, args)
}

fn checked(guard: &Guard, kind: Argument, argument: u64) -> Result<u64, Errno> {
    match kind {
        Argument::Value => Ok(argument),
        Argument::Bytes(len) => guard.user_output(argument, len),
    }
}

pub(crate) fn getdents64(guard: &mut Guard, args: Args) -> SysResult {
    /// Offset of `d_name` in `struct linux_dirent64`.
    const NAME: usize = 19;
    list(guard, __NR_getdents64, args, NAME)
}

pub(crate) fn getdents(guard: &mut Guard, args: Args) -> SysResult {
    /// Offset of `d_name` in `struct linux_dirent`.
    const NAME: usize = 18;
    list(guard, __NR_getdents, args, NAME)
}

/// Lists a folder; the guard's descriptors and threads are left out of
/// `/proc/self/fd` and `/proc/self/task`.
fn list(guard: &mut Guard, nr: u32, args: Args, name_offset: usize) -> SysResult {
    let [fd, buffer, ..] = args;
    loop {
        let len = forward(nr, args)?;
        let folder = match Folder::of(guard, fd) {
            Some(folder) if len != 0 => folder,
            _ => return Ok(len),
        };
        let mut entries = vec![0; len as usize];
        guard.memory().read(buffer, &mut entries)?;
        let kept = without_hidden(&entries, name_offset, |name| {
            core::str::from_utf8(name)
                .ok()
                .and_then(|name| name.parse().ok())
                .is_some_and(|number| folder.hides(guard, number))
        });
        // All hidden: zero would mean the end of the folder.
        if !kept.is_empty() {
            guard.memory().write(buffer, &kept)?;
            return Ok(kept.len() as u64);
        }
    }
}

/// Folder entries without those whose name is `hidden`.
fn without_hidden(
    mut entries: &[u8],
    name_offset: usize,
    hidden: impl Fn(&[u8]) -> bool,
) -> Vec<u8> {
    /// Offset of `d_reclen`.
    const LENGTH: usize = 16;
    let mut kept = Vec::with_capacity(entries.len());
    while let Some(bytes) = entries.get(LENGTH..LENGTH + 2) {
        let len = usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        if len < name_offset || len > entries.len() {
            break;
        }
        let (entry, rest) = entries.split_at(len);
        let name = entry[name_offset..]
            .split(|&byte| byte == 0)
            .next()
            .unwrap_or_default();
        if !hidden(name) {
            kept.extend_from_slice(entry);
        }
        entries = rest;
    }
    kept
}

/// Refuses a descriptor that was opened and must not be had.
pub(crate) fn give_up(opened: u64, errno: Errno) -> SysResult {
    fd::close(opened);
    Err(errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_entries_vanish_from_a_listing() {
        let entry = |name: &[u8]| {
            let len = (19 + name.len() + 1).next_multiple_of(8);
            let mut entry = vec![0; len];
            entry[16..18].copy_from_slice(&(len as u16).to_le_bytes());
            entry[19..19 + name.len()].copy_from_slice(name);
            entry
        };
        let all = [entry(b"1"), entry(b"1024"), entry(b"2")].concat();
        let kept = without_hidden(&all, 19, |name| name == b"1024");
        assert_eq!(kept, [entry(b"1"), entry(b"2")].concat());
        // Lengths that cannot be end the walk.
        let mut bad = entry(b"1");
        bad[16] = 0;
        assert_eq!(without_hidden(&bad, 19, |_| false), b"");
    }
}
