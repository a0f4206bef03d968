//! `/proc`: the files through which the program would meet the guard.
//!
//! The guard and the program are one process, so `/proc/self` speaks of the
//! guard. What was opened is looked at *after* the host kernel has opened it
//! (through whatever links), by the name that the kernel gives it:
//!
//! | file | what the program gets |
//! |---|---|
//! | `mem` of any process, `kcore` | `EACCES` |
//! | own `maps` | its own mappings, with its own rights |
//! | own `stat` | the addresses in it are zero |
//! | own `cmdline`, `environ` | its own strings |
//! | own `smaps`, `pagemap`, `map_files`, `auxv` and others with addresses | `EACCES` |
//! | `/proc/self/exe` by that name | the program's own file |
//! | own `fd`, `fdinfo` | without the guard's descriptors |
//!
//! Device files of physical memory (`/dev/mem`) are refused likewise.

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use linux_raw_sys::general::{
    __NR_dup3, __NR_fcntl, __NR_fstat, __NR_fstatfs, __NR_lseek, __NR_memfd_create, __NR_prlimit64,
    __NR_read, __NR_readlinkat, __NR_write, AT_FDCWD, F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL,
    F_SEAL_SHRINK, F_SEAL_WRITE, MFD_ALLOW_SEALING, MFD_CLOEXEC, O_CLOEXEC, O_PATH,
    PROC_SUPER_MAGIC, RLIMIT_FSIZE, S_IFCHR, S_IFMT,
};

use crate::calls::file::give_up;
use crate::calls::{forward_always, own, own_mut};
use crate::engine::Access;
use crate::guard::Guard;
use crate::host::{Errno, SysResult};
use crate::program::Program;
use crate::range::USER_HI;
use crate::user::PATH_MAX;
use crate::vma::Backing;

/// Whether `path`, with its final zero, is the link to the program's own file.
pub(crate) fn is_exe_link(pid: u32, path: &[u8]) -> bool {
    let Some(rest) = path.strip_prefix(b"/proc/") else {
        return false;
    };
    let rest = rest.strip_suffix(b"\0").unwrap_or(rest);
    let Some(owner) = rest.strip_suffix(b"/exe") else {
        return false;
    };
    owner == b"self" || owner == b"thread-self" || owner == pid.to_string().as_bytes()
}

/// Replaces `/proc/self/exe`, whose link names the guard's binary, by the
/// program's path. The buffer's first `len` bytes are the path and its zero.
///
/// # Errors
///
/// `ENAMETOOLONG` if the program's path does not fit.
pub(crate) fn replace_exe_link(
    program: &Program,
    buffer: &mut [u8; PATH_MAX],
    len: usize,
) -> Result<(), Errno> {
    if !is_exe_link(program.pid(), &buffer[..len]) {
        return Ok(());
    }
    let exe = &program.process().exe;
    if exe.len() >= PATH_MAX {
        return Err(Errno::ENAMETOOLONG);
    }
    buffer[..exe.len()].copy_from_slice(exe);
    buffer[exe.len()] = 0;
    Ok(())
}

/// Looks at what was opened, and returns it, its replacement, or an error.
pub(crate) fn vet(guard: &mut Guard, opened: u64, flags: u64) -> SysResult {
    let Ok(stat) = Stat::of(opened) else {
        return Ok(opened);
    };
    if stat.is_memory_device() {
        return give_up(opened, Errno::EACCES);
    }
    if !stat.is_on_virtual_device() || !is_on_proc(opened) {
        return Ok(opened);
    }
    let path = match path_of(opened) {
        Ok(path) => path,
        // Without a name nothing can be said of it.
        Err(_) => return give_up(opened, Errno::EACCES),
    };
    let result = match view(&path, guard.pid()) {
        View::AsItIs => return Ok(opened),
        View::Refused => Err(Errno::EACCES),
        // A name only: it can be opened through /proc/self/fd, and is looked
        // at again then.
        View::Rendered(_) if flags & u64::from(O_PATH) != 0 => return Ok(opened),
        View::Rendered(what) => {
            render(guard, opened, what).and_then(|text| replace_by_text(opened, &text, flags))
        }
    };
    match result {
        Ok(()) => Ok(opened),
        Err(errno) => give_up(opened, errno),
    }
}

/// Whether the program lists the descriptors of its own process.
pub(crate) fn is_own_fd_folder(guard: &Guard, fd: u64) -> bool {
    if guard.program.hidden_fds().is_empty() || !is_on_proc(fd) {
        return false;
    }
    let Ok(path) = path_of(fd) else { return false };
    let mut names = path.rsplit(|&byte| byte == b'/');
    matches!(names.next(), Some(b"fd" | b"fdinfo"))
        && names.next() == Some(guard.pid().to_string().as_bytes())
}

/// What the program sees of a file on procfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum View {
    AsItIs,
    Refused,
    Rendered(What),
}

/// A file that the guard writes itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Maps,
    Stat,
    CommandLine,
    Environment,
}

/// Decides by the name that the kernel gives an open file.
fn view(path: &[u8], pid: u32) -> View {
    // The kernel says so of a process that has ended since.
    let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
    let mut names = path.rsplit(|&byte| byte == b'/');
    let name = names.next().unwrap_or_default();
    if matches!(name, b"mem" | b"kcore" | b"kmem") {
        return View::Refused;
    }
    // /proc/PID/NAME, /proc/PID/task/TID/NAME, /proc/PID/map_files/RANGE
    let pid = pid.to_string();
    let own = names.clone().take(3).any(|owner| owner == pid.as_bytes());
    if !own {
        return View::AsItIs;
    }
    if names.next() == Some(b"map_files") {
        return View::Refused;
    }
    match name {
        b"maps" => View::Rendered(What::Maps),
        b"stat" => View::Rendered(What::Stat),
        b"cmdline" => View::Rendered(What::CommandLine),
        b"environ" => View::Rendered(What::Environment),
        b"smaps" | b"smaps_rollup" | b"numa_maps" | b"pagemap" | b"map_files" | b"auxv"
        | b"syscall" | b"stack" | b"clear_refs" | b"exe" => View::Refused,
        _ => View::AsItIs,
    }
}

fn render(guard: &Guard, opened: u64, what: What) -> Result<Vec<u8>, Errno> {
    let strings = |(start, end): (u64, u64)| {
        let mut text = vec![0; end.saturating_sub(start) as usize];
        // A program that unmapped them shows nothing, as on Linux.
        match guard.memory().read(start, &mut text) {
            Ok(()) => text,
            Err(_) => Vec::new(),
        }
    };
    Ok(match what {
        What::CommandLine => {
            let block = guard.program.process().arguments;
            strings(block)
        }
        What::Environment => {
            let block = guard.program.process().environment;
            strings(block)
        }
        What::Stat => render_stat(&read_all(opened)?),
        What::Maps => render_maps(guard, &read_all(opened)?),
    })
}

/// Zeroes the fields that are addresses (proc(5): 26 to 30 and 45 to 51,
/// counted from 1).
fn render_stat(text: &[u8]) -> Vec<u8> {
    // The name in parentheses may hold blanks and parentheses.
    let Some(end_of_name) = text.iter().rposition(|&byte| byte == b')') else {
        return Vec::new();
    };
    let (head, tail) = text.split_at(end_of_name + 1);
    let fields = tail
        .split(|&byte| byte == b' ')
        .enumerate()
        .map(|(index, field)| {
            // Field 3 is the first after the name; the split's item 0 is empty.
            match index + 2 {
                26..=30 | 45..=51 => &b"0"[..],
                _ => field,
            }
        });
    let mut rendered = head.to_vec();
    rendered.extend(fields.collect::<Vec<_>>().join(&b' '));
    rendered
}

/// The host's lines for the user's part, with the rights and names that the
/// program expects.
fn render_maps(guard: &Guard, text: &[u8]) -> Vec<u8> {
    let memory = guard.program.memory();
    let mut rendered = Vec::new();
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let Some(start) = line
            .split(|&byte| byte == b'-')
            .next()
            .and_then(|start| u64::from_str_radix(core::str::from_utf8(start).ok()?, 16).ok())
        else {
            continue;
        };
        let Some(area) = (start < USER_HI)
            .then(|| memory.areas.find(start))
            .flatten()
        else {
            continue;
        };
        let mut line = line.to_vec();
        if let Some(rights) = line
            .iter()
            .position(|&byte| byte == b' ')
            .map(|blank| blank + 1)
            && let Some(rights) = line.get_mut(rights..rights + 3)
        {
            let access = area.attributes.access;
            let letters = [
                (Access::READ, b'r'),
                (Access::WRITE, b'w'),
                (Access::EXEC, b'x'),
            ];
            for (place, (right, letter)) in rights.iter_mut().zip(letters) {
                *place = if access.contains(right) { letter } else { b'-' };
            }
        }
        let name: &[u8] = match area.attributes.backing {
            Backing::Heap => b"[heap]",
            Backing::Stack => b"[stack]",
            Backing::Anonymous | Backing::File => b"",
        };
        if !name.is_empty() {
            /// Where the kernel begins the name, in characters.
            const NAME_COLUMN: usize = 73;
            let end = line.trim_ascii_end().len();
            line.truncate(end);
            line.resize(line.len().max(NAME_COLUMN), b' ');
            line.extend_from_slice(name);
            line.push(b'\n');
        }
        rendered.extend_from_slice(&line);
    }
    rendered
}

/// Puts a file with `text` in the place of the descriptor `opened`.
fn replace_by_text(opened: u64, text: &[u8], flags: u64) -> Result<(), Errno> {
    let file = memory_file(text, MFD_CLOEXEC)?;
    let cloexec = flags & u64::from(O_CLOEXEC);
    forward_always(__NR_dup3, [file.fd(), opened, cloexec, 0, 0, 0])?;
    Ok(())
}

/// A descriptor for the program, of a file with these contents that nobody can
/// change.
pub(crate) fn sealed_file(contents: &[u8]) -> SysResult {
    let file = memory_file(contents, MFD_ALLOW_SEALING)?;
    let seals = F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL;
    let args = [file.fd(), u64::from(F_ADD_SEALS), u64::from(seals), 0, 0, 0];
    forward_always(__NR_fcntl, args)?;
    Ok(file.0.into_raw_fd() as u64)
}

/// A file in memory that holds `text`, positioned at its start.
fn memory_file(text: &[u8], flags: u32) -> Result<Owned, Errno> {
    // Writing past the program's file size limit would kill it.
    let mut limit = [0_u64; 2];
    let get = [0, u64::from(RLIMIT_FSIZE), 0, own_mut(&mut limit), 0, 0];
    forward_always(__NR_prlimit64, get)?;
    if limit[0] < text.len() as u64 {
        return Err(Errno::EFBIG);
    }
    let args = [own(c"proc"), u64::from(flags), 0, 0, 0, 0];
    let file = Owned::new(forward_always(__NR_memfd_create, args)?);
    let mut rest = text;
    while !rest.is_empty() {
        let args = [file.fd(), own(rest), rest.len() as u64, 0, 0, 0];
        let written = forward_always(__NR_write, args)?;
        rest = rest.get(written as usize..).unwrap_or_default();
    }
    forward_always(__NR_lseek, [file.fd(), 0, 0, 0, 0, 0])?;
    Ok(file)
}

/// A descriptor of the guard for a moment.
struct Owned(OwnedFd);

impl Owned {
    #[expect(unsafe_code, reason = "takes a descriptor that the kernel just made")]
    fn new(fd: u64) -> Self {
        // SAFETY: the caller got it from the kernel and has told nobody.
        Self(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
    }

    fn fd(&self) -> u64 {
        self.0.as_raw_fd() as u64
    }
}

/// Reads a file to its end.
fn read_all(fd: u64) -> Result<Vec<u8>, Errno> {
    const STEP: usize = 16 << 10;
    let mut text = Vec::new();
    loop {
        let len = text.len();
        text.resize(len + STEP, 0);
        let count = forward_always(
            __NR_read,
            [fd, own_mut(&mut text[len..]), STEP as u64, 0, 0, 0],
        )?;
        text.truncate(len + count as usize);
        if count == 0 {
            return Ok(text);
        }
    }
}

/// The parts of `struct stat` that are looked at.
struct Stat {
    device: u64,
    mode: u32,
    special: u64,
}

impl Stat {
    fn of(fd: u64) -> Result<Self, Errno> {
        /// `struct stat` of x86-64, in words.
        const WORDS: usize = 18;
        let mut words = [0_u64; WORDS];
        forward_always(__NR_fstat, [fd, own_mut(&mut words), 0, 0, 0, 0])?;
        Ok(Self {
            device: words[0],
            mode: words[3] as u32,
            special: words[5],
        })
    }

    fn is_memory_device(&self) -> bool {
        const MEMORY_MAJOR: u64 = 1;
        // mem, kmem, port
        self.mode & S_IFMT == S_IFCHR
            && major(self.special) == MEMORY_MAJOR
            && matches!(minor(self.special), 1 | 2 | 4)
    }

    /// Whether its file system has no block device: procfs, and others.
    fn is_on_virtual_device(&self) -> bool {
        major(self.device) == 0
    }
}

fn major(device: u64) -> u64 {
    (device >> 8) & 0xfff
}

fn minor(device: u64) -> u64 {
    (device & 0xff) | ((device >> 12) & 0xf_ff00)
}

fn is_on_proc(fd: u64) -> bool {
    /// `struct statfs`, in words; the first is its type.
    const WORDS: usize = 15;
    let mut words = [0_u64; WORDS];
    forward_always(__NR_fstatfs, [fd, own_mut(&mut words), 0, 0, 0, 0]).is_ok()
        && words[0] == u64::from(PROC_SUPER_MAGIC)
}

/// The name that the kernel gives an open file.
fn path_of(fd: u64) -> Result<Vec<u8>, Errno> {
    let link = format!("/proc/self/fd/{fd}\0");
    let mut path = vec![0; PATH_MAX];
    let args = [
        AT_FDCWD as i64 as u64,
        own(link.as_bytes()),
        own_mut(&mut path[..]),
        path.len() as u64,
        0,
        0,
    ];
    let len = forward_always(__NR_readlinkat, args)?;
    path.truncate(len as usize);
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_show_the_guard_are_known_by_any_path() {
        let pid = 4711;
        for path in [
            "/proc/4711/mem",
            "/proc/4711/task/4711/mem",
            "/mnt/p/1/mem",
            "/proc/kcore",
        ] {
            assert_eq!(view(path.as_bytes(), pid), View::Refused, "{path}");
        }
        assert_eq!(view(b"/proc/1/mem (deleted)", pid), View::Refused);
        assert_eq!(view(b"(unreachable)/1/mem", pid), View::Refused);
        assert_eq!(view(b"/proc/4711/maps", pid), View::Rendered(What::Maps));
        assert_eq!(
            view(b"/proc/4711/task/4711/maps", pid),
            View::Rendered(What::Maps)
        );
        assert_eq!(view(b"/proc/4711/map_files/1-2", pid), View::Refused);
        assert_eq!(view(b"/proc/4711/map_files", pid), View::Refused);
        assert_eq!(view(b"/proc/4712/maps", pid), View::AsItIs);
        assert_eq!(view(b"/proc/meminfo", pid), View::AsItIs);
        assert_eq!(view(b"/proc/4711/status", pid), View::AsItIs);
    }

    #[test]
    fn addresses_in_stat_are_zero() {
        let real = std::fs::read("/proc/self/stat").unwrap();
        let rendered = String::from_utf8(render_stat(&real)).unwrap();
        let real = String::from_utf8(real).unwrap();
        let fields = |text: &str| -> Vec<String> {
            text.rsplit_once(')')
                .unwrap()
                .1
                .split(' ')
                .skip(1)
                .map(str::to_owned)
                .collect()
        };
        let (real, rendered) = (fields(&real), fields(&rendered));
        assert_eq!(real.len(), rendered.len());
        for (index, (real, rendered)) in real.iter().zip(&rendered).enumerate() {
            match index + 3 {
                26..=30 | 45..=51 => assert_eq!(rendered, "0"),
                _ => assert_eq!(rendered, real),
            }
        }
    }

    #[test]
    fn the_exe_link_is_known_in_its_spellings() {
        let program = Program::new(crate::signal::Dispositions::new(), Vec::new());
        program.process_mut().exe = b"/bin/true".to_vec();
        let pid = program.pid();
        assert!(is_exe_link(pid, b"/proc/self/exe\0"));
        assert!(is_exe_link(pid, format!("/proc/{pid}/exe\0").as_bytes()));
        assert!(!is_exe_link(pid, b"/proc/1/exe\0"));
        assert!(!is_exe_link(pid, b"/proc/self/exefoo\0"));
        let mut buffer = [b'x'; PATH_MAX];
        buffer[..15].copy_from_slice(b"/proc/self/exe\0");
        replace_exe_link(&program, &mut buffer, 15).unwrap();
        assert!(buffer.starts_with(b"/bin/true\0"));
    }
}
