//! What kind of file a descriptor stands for: which kinds the program may open
//! and map.

use linux_raw_sys::general::{
    __NR_fstat, __NR_fstatfs, HUGETLBFS_MAGIC, PROC_SUPER_MAGIC, S_IFBLK, S_IFCHR, S_IFIFO, S_IFMT,
    S_IFREG,
};

use crate::calls::{forward_always, own_mut};
use crate::host::Errno;

/// The parts of `struct stat` that are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stat {
    device: u64,
    inode: u64,
    mode: u32,
    /// Number of the device that a device file stands for.
    special: u64,
}

impl Stat {
    pub(crate) fn of(fd: u64) -> Result<Self, Errno> {
        /// `struct stat` of x86-64, in words.
        const WORDS: usize = 18;
        let mut words = [0_u64; WORDS];
        forward_always(__NR_fstat, [fd, own_mut(&mut words), 0, 0, 0, 0])?;
        Ok(Self {
            device: words[0],
            inode: words[1],
            mode: words[3] as u32,
            special: words[5],
        })
    }

    pub(crate) fn is_regular(&self) -> bool {
        self.mode & S_IFMT == S_IFREG
    }

    pub(crate) fn is_pipe(&self) -> bool {
        self.mode & S_IFMT == S_IFIFO
    }

    /// Whether both are the same file.
    pub(crate) fn is_same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// Whether it is a device that the guard does not know. What is written to
    /// such a one may hold addresses, which nobody could check.
    pub(crate) fn is_foreign_device(&self) -> bool {
        match self.mode & S_IFMT {
            S_IFBLK => true,
            S_IFCHR => !is_known_device(major(self.special), minor(self.special)),
            _ => false,
        }
    }

    /// Whether its file system has no block device: procfs, and others.
    pub(crate) fn is_on_virtual_device(&self) -> bool {
        major(self.device) == 0
    }
}

/// Character devices of plain bytes (`Documentation/admin-guide/devices.txt`).
fn is_known_device(major: u64, minor: u64) -> bool {
    match (major, minor) {
        // null, zero, full, random, urandom
        (1, 3 | 5 | 7 | 8 | 9) => true,
        // Virtual consoles and serial lines.
        (4, _) => true,
        // tty, console, ptmx
        (5, 0..=2) => true,
        // /dev/pts
        (136..=143, _) => true,
        // Consoles of virtual machines.
        (229, _) => true,
        _ => false,
    }
}

fn major(device: u64) -> u64 {
    (device >> 8) & 0xfff
}

fn minor(device: u64) -> u64 {
    (device & 0xff) | ((device >> 12) & 0xf_ff00)
}

/// Type and flags of the file system that a file is on.
fn file_system(fd: u64) -> Result<(u64, u64), Errno> {
    /// `struct statfs`, in words.
    const WORDS: usize = 15;
    const F_TYPE: usize = 0;
    const F_FLAGS: usize = 10;
    let mut words = [0_u64; WORDS];
    forward_always(__NR_fstatfs, [fd, own_mut(&mut words), 0, 0, 0, 0])?;
    Ok((words[F_TYPE], words[F_FLAGS]))
}

pub(crate) fn is_on_proc(fd: u64) -> bool {
    file_system(fd).is_ok_and(|(kind, _)| kind == u64::from(PROC_SUPER_MAGIC))
}

/// Whether the program may map the file: a regular one, or a device that is
/// known. The guard's memory has pages of 4 KiB, so files of huge pages are
/// none, and neither are those of the kernel's file systems.
///
/// The caller keeps `fd` what it is until the file is mapped.
///
/// # Errors
///
/// `ENODEV` as for files that cannot be mapped. `EPERM` to execute from a file
/// system mounted `noexec`: the host does not see `PROT_EXEC`, so the guard
/// has to ask.
pub(crate) fn check_mapping(fd: u64, executes: bool) -> Result<(), Errno> {
    const ST_NOEXEC: u64 = 8;
    /// sysfs, where files may be a device's memory.
    const SYSFS_MAGIC: u64 = 0x6265_6572;
    const UNMAPPABLE: [u64; 3] = [HUGETLBFS_MAGIC as u64, PROC_SUPER_MAGIC as u64, SYSFS_MAGIC];
    let stat = Stat::of(fd)?;
    let is_device = stat.mode & S_IFMT == S_IFCHR && !stat.is_foreign_device();
    if !stat.is_regular() && !is_device {
        return Err(Errno::ENODEV);
    }
    let (kind, flags) = file_system(fd)?;
    if UNMAPPABLE.contains(&kind) {
        return Err(Errno::ENODEV);
    }
    if executes && flags & ST_NOEXEC != 0 {
        return Err(Errno::EPERM);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn open(path: &str) -> std::fs::File {
        std::fs::File::open(path).unwrap()
    }

    #[test]
    fn only_devices_of_plain_bytes_are_known() {
        for (major, minor) in [(1, 3), (1, 5), (1, 9), (5, 0), (5, 2), (136, 0), (143, 255)] {
            assert!(is_known_device(major, minor), "{major}:{minor}");
        }
        // mem, kmem, port, kmsg, misc (kvm, rdma_cm, fuse), infiniband, graphics
        for (major, minor) in [
            (1, 1),
            (1, 2),
            (1, 4),
            (1, 11),
            (10, 232),
            (231, 0),
            (226, 0),
        ] {
            assert!(!is_known_device(major, minor), "{major}:{minor}");
        }
    }

    #[test]
    fn only_files_and_known_devices_are_mapped() {
        let check = |fd: i32| check_mapping(fd as u64, false);
        assert_eq!(check(open("/proc/self/exe").as_raw_fd()), Ok(()));
        assert_eq!(check(open("/dev/zero").as_raw_fd()), Ok(()));
        assert_eq!(check(open("/").as_raw_fd()), Err(Errno::ENODEV));
        assert_eq!(
            check(open("/proc/self/stat").as_raw_fd()),
            Err(Errno::ENODEV)
        );
        let (reader, _writer) = std::io::pipe().unwrap();
        assert_eq!(check(reader.as_raw_fd()), Err(Errno::ENODEV));
        // An anonymous file, as a virtual CPU is one.
        let event = forward_always(linux_raw_sys::general::__NR_eventfd2, [0; 6]).unwrap();
        assert_eq!(check(event as i32), Err(Errno::ENODEV));
        crate::calls::fd::close(event);
    }
}
