//! `/proc`: the files through which the program would meet the guard.
//!
//! The guard and the program are one process, so `/proc/self` speaks of the
//! guard. What was opened is looked at *after* the host kernel has opened it
//! (through whatever links), by the name that the kernel gives it:
//!
//! | file | what the program gets |
//! |---|---|
//! | `mem` of any process, `kcore` | `EACCES` |
//! | `maps` and others with addresses, and `environ`, of other processes | `EACCES` |
//! | own `maps` | its own mappings, with its own rights |
//! | `stat` of any process | the addresses in it are zero |
//! | own `stat`, `status` | as many threads as the program has |
//! | own `cmdline`, `environ` | its own strings |
//! | own `smaps`, `pagemap`, `map_files`, `auxv` and others with addresses | `EACCES` |
//! | `/proc/self/exe` by that name | the program's own file |
//! | own `fd`, `fdinfo` | without the guard's descriptors |
//! | own `task` | without threads that are none of the program's |
//!
//! Device files are refused likewise, except those of plain bytes: terminals,
//! `/dev/null` and the like ([`crate::calls::opened`]).

use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use linux_raw_sys::general::{
    __NR_dup3, __NR_fcntl, __NR_lseek, __NR_memfd_create, __NR_openat, __NR_prlimit64, __NR_read,
    __NR_readlinkat, __NR_unshare, __NR_write, __O_TMPFILE, AT_FDCWD, CLONE_FILES, F_ADD_SEALS,
    F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_GETFL, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK,
    F_SEAL_WRITE, MFD_ALLOW_SEALING, MFD_CLOEXEC, O_CLOEXEC, O_CREAT, O_DIRECTORY, O_EXCL,
    O_NOCTTY, O_NOFOLLOW, O_NONBLOCK, O_PATH, O_RDONLY, RLIMIT_FSIZE,
};

use crate::calls::file::give_up;
use crate::calls::opened::{Stat, is_on_proc};
use crate::calls::{forward_always, forward_interruptible, own, own_mut};
use crate::engine::Access;
use crate::guard::Guard;
use crate::host::{Errno, SysResult, move_fd_high};
use crate::program::{Program, replace_fds};
use crate::range::USER_HI;
use crate::signal::host;
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

/// Opens a file by `open`, which takes the flags, and returns its descriptor,
/// that of a replacement, or an error.
///
/// One thread alone opens the file and looks at it afterwards. Beside other
/// threads that is too late: they could use the descriptor in between. Then a
/// descriptor that only names the file (`O_PATH`) is looked at, out of their
/// reach, and the file is opened through it.
pub(crate) fn open(guard: &Guard, flags: u64, open: impl Fn(u64) -> SysResult) -> SysResult {
    let has = |flag: u32| flags & u64::from(flag) != 0;
    if guard.program.is_single() {
        let opened = open(flags)?;
        return vet(guard, opened, flags);
    }
    if has(O_PATH) {
        let name = HiddenName::of(&guard.program, || open(flags))?;
        return match look(guard, name.fd()) {
            View::Refused => Err(Errno::EACCES),
            // A name only: see `vet`.
            View::AsItIs | View::Rendered(_) => name.give(flags),
        };
    }
    if has(__O_TMPFILE) || has(O_CREAT) && has(O_EXCL) {
        // A new file: never one of those.
        return open(flags);
    }
    if has(O_CREAT) {
        match open(flags | u64::from(O_EXCL)) {
            Err(Errno::EEXIST) => {}
            opened => return opened,
        }
    }
    let name = u64::from(O_PATH | O_CLOEXEC) | flags & u64::from(O_NOFOLLOW | O_DIRECTORY);
    let name = HiddenName::of(&guard.program, || open(name))?;
    match look(guard, name.fd()) {
        View::AsItIs => name.open(flags),
        View::Refused => Err(Errno::EACCES),
        View::Rendered(what) => {
            let host = name.read_apart(guard)?;
            let text = render(guard, what, &host)?;
            // With the way of access that the program asked for.
            memory_file(&guard.program, &text, MFD_CLOEXEC)?.open(flags)
        }
    }
}

/// A descriptor that names a file, out of the program's reach.
struct HiddenName<'a> {
    program: &'a Program,
    /// Always there until it is dropped.
    fd: Option<OwnedFd>,
}

impl<'a> HiddenName<'a> {
    /// A name that `open` makes.
    fn of(program: &'a Program, open: impl FnOnce() -> SysResult) -> Result<Self, Errno> {
        if program.policy().files().is_none() {
            return Self::take(program, open()?);
        }
        // The rules were asked about this very file: no thread puts another in its place. (The
        // path names a descriptor by now, so that there is nothing to wait for.)
        let mut hidden = program.hidden_fds_mut();
        Self::hide(program, &mut hidden, Owned::new(open()?))
    }

    /// Takes the descriptor `fd`, which other threads of the program may have
    /// replaced by one of theirs meanwhile: whatever it is now is looked at.
    fn take(program: &'a Program, fd: u64) -> Result<Self, Errno> {
        let mut hidden = program.hidden_fds_mut();
        if hidden.binary_search(&(fd as RawFd)).is_ok() {
            return Err(Errno::EBADF);
        }
        // Or closed it; from here on none can.
        forward_always(__NR_fcntl, [fd, u64::from(F_GETFD), 0, 0, 0, 0])?;
        Self::hide(program, &mut hidden, Owned::new(fd))
    }

    /// A new file in memory.
    fn of_memory(program: &'a Program, flags: u32) -> Result<Self, Errno> {
        // No thread of the program replaces or closes a descriptor meanwhile.
        let mut hidden = program.hidden_fds_mut();
        let args = [own(c"proc"), u64::from(flags), 0, 0, 0, 0];
        let file = Owned::new(forward_always(__NR_memfd_create, args)?);
        Self::hide(program, &mut hidden, file)
    }

    fn hide(program: &'a Program, hidden: &mut Vec<RawFd>, fd: Owned) -> Result<Self, Errno> {
        let fd = move_fd_high(fd.0).map_err(|error| Errno::of(&error))?;
        program.pass(hidden, fd.as_raw_fd());
        Ok(Self {
            program,
            fd: Some(fd),
        })
    }

    fn fd(&self) -> u64 {
        self.fd
            .as_ref()
            .map_or(u64::MAX, |fd| fd.as_raw_fd() as u64)
    }

    fn link(&self) -> String {
        format!("/proc/self/fd/{}\0", self.fd())
    }

    /// Opens the file that it names.
    fn open(&self, flags: u64) -> SysResult {
        let flags = flags & !u64::from(O_CREAT | O_EXCL | O_NOFOLLOW);
        let link = self.link();
        let cwd = AT_FDCWD as i64 as u64;
        // The guard's own path, and numbers.
        forward_interruptible(__NR_openat, [cwd, own(link.as_bytes()), flags, 0, 0, 0])
    }

    /// Gives the program a descriptor of the same name.
    fn give(&self, flags: u64) -> SysResult {
        let command = if flags & u64::from(O_CLOEXEC) != 0 {
            F_DUPFD_CLOEXEC
        } else {
            F_DUPFD
        };
        forward_always(__NR_fcntl, [self.fd(), u64::from(command), 0, 0, 0, 0])
    }

    /// Reads the file where nobody else has the open file.
    fn read_apart(&self, guard: &Guard) -> Result<Vec<u8>, Errno> {
        let link = self.link();
        apart(guard, || {
            let flags = u64::from(O_CLOEXEC);
            let cwd = AT_FDCWD as i64 as u64;
            let args = [cwd, own(link.as_bytes()), flags, 0, 0, 0];
            read_all(Owned::new(forward_always(__NR_openat, args)?).fd())
        })?
    }
}

/// Has `work` done by a thread with descriptors of its own: what it opens, no other thread of the
/// program reaches.
///
/// # Errors
///
/// If there can be no such thread.
pub(crate) fn apart<T: Send>(guard: &Guard, work: impl FnOnce() -> T + Send) -> Result<T, Errno> {
    let work = move || {
        forward_always(__NR_unshare, [u64::from(CLONE_FILES), 0, 0, 0, 0, 0])?;
        Ok(work())
    };
    std::thread::scope(|scope| {
        let mask = host::mask();
        // The new thread takes no signal of the program's.
        host::block_all();
        let worker = {
            // In Dune mode the thread's start may make a vCPU, whose descriptor
            // must be hidden before anybody else can have it.
            let mut hidden = guard.program.hidden_fds_mut();
            let before = guard.engine.fds();
            let worker = std::thread::Builder::new().spawn_scoped(scope, work);
            replace_fds(&mut hidden, &before, &guard.engine.fds());
            worker
        };
        host::set_mask(mask);
        let result = worker.map_err(|_| Errno::EAGAIN)?.join();
        result.unwrap_or(Err(Errno::EIO))
    })
}

impl Drop for HiddenName<'_> {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take() {
            self.program.close_passing(fd);
        }
    }
}

/// Looks at what was opened, and returns it, its replacement, or an error.
fn vet(guard: &Guard, opened: u64, flags: u64) -> SysResult {
    let result = match look(guard, opened) {
        View::AsItIs => return Ok(opened),
        View::Refused => Err(Errno::EACCES),
        // A name only: it can be opened through /proc/self/fd, and is looked
        // at again then.
        View::Rendered(_) if flags & u64::from(O_PATH) != 0 => return Ok(opened),
        View::Rendered(what) => read_all(opened)
            .and_then(|host| render(guard, what, &host))
            .and_then(|text| replace_by_text(&guard.program, opened, &text, flags)),
    };
    match result {
        Ok(()) => Ok(opened),
        Err(errno) => give_up(opened, errno),
    }
}

/// What the program may see of an open file.
fn look(guard: &Guard, opened: u64) -> View {
    let Ok(stat) = Stat::of(opened) else {
        return View::AsItIs;
    };
    if stat.is_foreign_device() || stat.is_pipe() && is_pipe_of_the_guard(guard, &stat) {
        return View::Refused;
    }
    if !stat.is_on_virtual_device() || !is_on_proc(opened) {
        return View::AsItIs;
    }
    match path_of(opened) {
        Ok(path) => view(&path, |id| guard.is_own_id(id)),
        // Without a name nothing can be said of it.
        Err(_) => View::Refused,
    }
}

/// Whether the guard has this pipe open: through `/proc/self/fd` it could be
/// opened again.
fn is_pipe_of_the_guard(guard: &Guard, pipe: &Stat) -> bool {
    let is_open = |fd: u64| {
        // A descriptor that only names a file is on behalf of the program.
        forward_always(__NR_fcntl, [fd, u64::from(F_GETFL), 0, 0, 0, 0])
            .is_ok_and(|flags| flags & u64::from(O_PATH) == 0)
    };
    let hidden = guard.program.hidden_fds();
    hidden.iter().any(|&fd| {
        let fd = fd as u64;
        is_open(fd) && Stat::of(fd).is_ok_and(|stat| stat.is_same_file(pipe))
    })
}

/// Opens a file that `execve` is about to read, with every check that a program's
/// own `open` gets; it must be a regular one, and none that procfs makes.
///
/// The caller holds the list of hidden descriptors exclusively. Other threads
/// could still read what they guess the number of: so that is first a name
/// only, and then a file that they could have opened themselves.
///
/// # Errors
///
/// `EACCES` for what is refused, or what the host kernel says.
pub(crate) fn open_program(guard: &Guard, path: &Path) -> std::io::Result<File> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let open = |path: &CStr, flags: u32| {
        let cwd = AT_FDCWD as i64 as u64;
        let flags = u64::from(flags | O_CLOEXEC);
        let path = own(path.to_bytes_with_nul());
        forward_always(__NR_openat, [cwd, path, flags, 0, 0, 0]).map(Owned::new)
    };
    let check = |file: &Owned| {
        // In this order: pipes are looked for in the list that the caller holds.
        let is_regular = Stat::of(file.fd())?.is_regular();
        if is_regular && look(guard, file.fd()) == View::AsItIs && !is_on_proc(file.fd()) {
            Ok(())
        } else {
            Err(Errno::EACCES)
        }
    };
    /// Should something else have taken the file's place meanwhile.
    const READ: u32 = O_RDONLY | O_NONBLOCK | O_NOCTTY;
    let opened = || {
        if guard.program.is_single() {
            let file = open(&path, READ)?;
            check(&file)?;
            return Ok(file);
        }
        let name = open(&path, O_PATH)?;
        check(&name)?;
        let link = CString::new(format!("/proc/self/fd/{}", name.fd())).unwrap_or_default();
        let file = open(&link, READ)?;
        check(&file)?;
        Ok(file)
    };
    opened()
        .map(|file| file.0.into())
        .map_err(|errno: Errno| errno.into())
}

/// A folder that shows the program its own process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Folder {
    /// Its descriptors.
    Descriptors,
    /// Its threads.
    Threads,
}

impl Folder {
    /// Which of them the descriptor `fd` is, if any.
    pub(crate) fn of(guard: &Guard, fd: u64) -> Option<Self> {
        if !is_on_proc(fd) {
            return None;
        }
        let path = path_of(fd).ok()?;
        let mut names = path.rsplit(|&byte| byte == b'/');
        let folder = match names.next()? {
            b"fd" | b"fdinfo" => Self::Descriptors,
            b"task" => Self::Threads,
            _ => return None,
        };
        let is_own = names
            .take(3)
            .any(|owner| is_id(owner, |id| guard.is_own_id(id)));
        is_own.then_some(folder)
    }

    /// Whether the entry `number` is the guard's own affair.
    pub(crate) fn hides(self, guard: &Guard, number: u32) -> bool {
        match self {
            Self::Descriptors => guard.is_hidden_fd(number as RawFd),
            Self::Threads => !guard.program.threads.has(number) && number != guard.pid(),
        }
    }
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
    /// Of any process.
    Stat,
    /// Of the program's own.
    OwnStat,
    Status,
    CommandLine,
    Environment,
}

/// Whether `name` is the number of a process or thread, and one that `holds`.
fn is_id(name: &[u8], holds: impl Fn(u32) -> bool) -> bool {
    let number = core::str::from_utf8(name).ok();
    number.and_then(|name| name.parse().ok()).is_some_and(holds)
}

/// Decides by the name that the kernel gives an open file; `is_own` tells of a
/// number whether it is the process's or one of its threads'.
fn view(path: &[u8], is_own: impl Fn(u32) -> bool) -> View {
    // The kernel says so of a process that has ended since.
    let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
    let mut names = path.rsplit(|&byte| byte == b'/');
    let name = names.next().unwrap_or_default();
    if matches!(name, b"mem" | b"kcore" | b"kmem") {
        return View::Refused;
    }
    // /proc/PID/NAME, /proc/PID/task/TID/NAME, /proc/PID/map_files/RANGE
    let own = names.clone().take(3).any(|owner| is_id(owner, &is_own));
    let folder = names.next();
    let is_process = names
        .chain(folder)
        .take(3)
        .any(|owner| !owner.is_empty() && owner.iter().all(u8::is_ascii_digit));
    if folder == Some(b"map_files") {
        return View::Refused;
    }
    if !own {
        // Its children and its parent may have the guard at the same addresses.
        return match name {
            b"stat" if is_process => View::Rendered(What::Stat),
            b"maps" | b"smaps" | b"smaps_rollup" | b"numa_maps" | b"pagemap" | b"map_files"
            | b"auxv" | b"syscall" | b"stack" | b"clear_refs" | b"environ"
                if is_process =>
            {
                View::Refused
            }
            _ => View::AsItIs,
        };
    }
    match name {
        b"maps" => View::Rendered(What::Maps),
        b"stat" => View::Rendered(What::OwnStat),
        b"status" => View::Rendered(What::Status),
        b"cmdline" => View::Rendered(What::CommandLine),
        b"environ" => View::Rendered(What::Environment),
        b"smaps" | b"smaps_rollup" | b"numa_maps" | b"pagemap" | b"map_files" | b"auxv"
        | b"syscall" | b"stack" | b"clear_refs" | b"exe" => View::Refused,
        _ => View::AsItIs,
    }
}

/// The text of a file whose text is `host` in the host.
fn render(guard: &Guard, what: What, host: &[u8]) -> Result<Vec<u8>, Errno> {
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
        What::Stat => render_stat(host, None),
        What::OwnStat => render_stat(host, Some(guard.program.threads.count(guard.pid()))),
        What::Status => render_status(host, guard.program.threads.count(guard.pid())),
        What::Maps => render_maps(guard, host),
    })
}

/// Zeroes the fields that are addresses (proc(5): 26 to 30 and 45 to 51,
/// counted from 1), and says how many `threads` there are (20), if that is known
/// better than by the host kernel: it counts threads of its own for the VM.
fn render_stat(text: &[u8], threads: Option<usize>) -> Vec<u8> {
    let threads = threads.map(|count| count.to_string());

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
                20 => threads.as_ref().map_or(field, String::as_bytes),
                26..=30 | 45..=51 => &b"0"[..],
                _ => field,
            }
        });
    let mut rendered = head.to_vec();
    rendered.extend(fields.collect::<Vec<_>>().join(&b' '));
    rendered
}

/// The host's lines, but for the number of threads.
fn render_status(text: &[u8], threads: usize) -> Vec<u8> {
    let mut rendered = Vec::new();
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        if line.starts_with(b"Threads:") {
            rendered.extend_from_slice(format!("Threads:\t{threads}\n").as_bytes());
        } else {
            rendered.extend_from_slice(line);
        }
    }
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
            Backing::Clock => b"[vvar]",
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

/// Puts a file with `text` in the place of the descriptor `opened`, of a program with one thread.
fn replace_by_text(program: &Program, opened: u64, text: &[u8], flags: u64) -> Result<(), Errno> {
    let file = memory_file(program, text, MFD_CLOEXEC)?;
    let cloexec = flags & u64::from(O_CLOEXEC);
    forward_always(__NR_dup3, [file.fd(), opened, cloexec, 0, 0, 0])?;
    Ok(())
}

/// A descriptor for the program, of a file with these contents that nobody can
/// change.
pub(crate) fn sealed_file(program: &Program, contents: &[u8]) -> SysResult {
    let file = memory_file(program, contents, MFD_ALLOW_SEALING)?;
    let seals = F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL;
    let args = [file.fd(), u64::from(F_ADD_SEALS), u64::from(seals), 0, 0, 0];
    forward_always(__NR_fcntl, args)?;
    // Before that, another thread could have guessed the number and opened the file through
    // /proc/self/fd.
    if read_all(file.fd())? != contents {
        return Err(Errno::EIO);
    }
    rewind(file.fd())?;
    file.give(0)
}

/// A file in memory that holds `text`, positioned at its start.
fn memory_file<'a>(program: &'a Program, text: &[u8], flags: u32) -> Result<HiddenName<'a>, Errno> {
    // Writing past the program's file size limit would kill it.
    let mut limit = [0_u64; 2];
    let get = [0, u64::from(RLIMIT_FSIZE), 0, own_mut(&mut limit), 0, 0];
    forward_always(__NR_prlimit64, get)?;
    if limit[0] < text.len() as u64 {
        return Err(Errno::EFBIG);
    }
    let file = HiddenName::of_memory(program, flags)?;
    let mut rest = text;
    while !rest.is_empty() {
        let args = [file.fd(), own(rest), rest.len() as u64, 0, 0, 0];
        let written = forward_always(__NR_write, args)?;
        if written == 0 {
            return Err(Errno::EIO);
        }
        rest = rest.get(written as usize..).unwrap_or_default();
    }
    rewind(file.fd())?;
    Ok(file)
}

fn rewind(fd: u64) -> Result<(), Errno> {
    forward_always(__NR_lseek, [fd, 0, 0, 0, 0, 0]).map(drop)
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

/// The name that the kernel gives an open file.
pub(crate) fn path_of(fd: u64) -> Result<Vec<u8>, Errno> {
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
        // A process and a thread of it.
        let pid = |id: u32| id == 4711 || id == 4720;
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
        for (path, what) in [
            ("/proc/4720/environ", What::Environment),
            ("/proc/4720/cmdline", What::CommandLine),
            ("/proc/4720/task/4720/maps", What::Maps),
        ] {
            assert_eq!(view(path.as_bytes(), pid), View::Rendered(what), "{path}");
        }
        assert_eq!(view(b"/proc/4712/environ", pid), View::Refused);
        assert_eq!(view(b"/proc/4712/cmdline", pid), View::AsItIs);
        assert_eq!(view(b"/proc/4711/map_files/1-2", pid), View::Refused);
        assert_eq!(view(b"/proc/4711/map_files", pid), View::Refused);
        assert_eq!(view(b"/proc/4712/maps", pid), View::Refused);
        assert_eq!(
            view(b"/proc/4712/task/4713/stat", pid),
            View::Rendered(What::Stat)
        );
        assert_eq!(view(b"/proc/4712/map_files/1-2", pid), View::Refused);
        assert_eq!(view(b"/proc/4712/status", pid), View::AsItIs);
        assert_eq!(view(b"/proc/stat", pid), View::AsItIs);
        assert_eq!(view(b"/proc/meminfo", pid), View::AsItIs);
        for (name, what) in [("stat", What::OwnStat), ("status", What::Status)] {
            let path = format!("/proc/4711/{name}");
            assert_eq!(view(path.as_bytes(), pid), View::Rendered(what));
        }
    }

    #[test]
    fn execve_opens_regular_files_that_procfs_did_not_make() {
        let guard = Guard::new(
            Box::new(crate::engine::mock::MockEngine::new()),
            crate::signal::Dispositions::new(),
            crate::signal::ThreadSignals::default(),
        );
        let open = |path: &str| open_program(&guard, Path::new(path)).map_err(|error| error.kind());
        let denied = std::io::ErrorKind::PermissionDenied;
        for _ in ["one thread", "several"] {
            assert!(open("/proc/self/exe").is_ok());
            for path in [
                "/proc/self/mem",
                "/proc/self/maps",
                "/proc/version",
                "/dev/null",
                "/",
            ] {
                assert_eq!(open(path).map(drop), Err(denied), "{path}");
            }
            guard.program.becomes_shared();
        }
    }

    #[test]
    fn addresses_in_stat_are_zero() {
        let real = std::fs::read("/proc/self/stat").unwrap();
        let rendered = String::from_utf8(render_stat(&real, Some(77))).unwrap();
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
                20 => assert_eq!(rendered, "77"),
                26..=30 | 45..=51 => assert_eq!(rendered, "0"),
                _ => assert_eq!(rendered, real),
            }
        }
    }

    #[test]
    fn the_threads_in_status_are_the_programs() {
        let real = std::fs::read("/proc/self/status").unwrap();
        let rendered = String::from_utf8(render_status(&real, 77)).unwrap();
        let real = String::from_utf8(real).unwrap();
        assert!(rendered.contains("\nThreads:\t77\n"));
        for (real, rendered) in real.lines().zip(rendered.lines()) {
            assert!(
                real == rendered || real.starts_with("Threads:"),
                "{rendered}"
            );
        }
        assert_eq!(real.lines().count(), rendered.lines().count());
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
