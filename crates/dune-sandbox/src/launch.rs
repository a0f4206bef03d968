//! Putting a program into user memory: at the start, and for `execve`.
//!
//! ```text
//!  USER_LO
//!    ...            a fixed program (0x40_0000), its heap
//!  EXE_BASE + r     a movable program, its heap
//!    ...
//!    ^              mappings, downwards
//!  mmap_top         the dynamic linker just below
//!    gap
//!  stack            as long as RLIMIT_STACK says, within reason
//!  USER_TOP - r
//! ```
//!
//! `r` is random, a multiple of the page size.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use dune_loader::{
    AuxvInputs, Ids, ImageError, InitialStack, Layout, LoadPlan, Machine, Program, Prot,
    SegmentMap, StackImage, UserAddr,
};
use linux_raw_sys::general::{__NR_getrandom, __NR_prctl};
use linux_raw_sys::prctl::PR_SET_NAME;

use crate::calls::fork::finish_vfork;
use crate::calls::memory::{Space, map_anonymous, map_file, set_access, unmap};
use crate::calls::process::settle_identity;
use crate::calls::{Answer, fd, forward_always, own, own_mut, procfs};
use crate::clock::{self, HostClock};
use crate::engine::{Access, UserState};
use crate::guard::{End, Guard, leave_process};
use crate::host::Errno;
use crate::policy::Need;
use crate::policy::uses::Last;
use crate::range::{PAGE_SIZE, PageRange, USER_LO, USER_TOP};
use crate::signal::{Action, AltStack, Disposition, SIGKILL, SIGNALS, host};
use crate::threads::Takeover;
use crate::vma::{Attributes, Backing};

/// `AT_FDCWD` in a register.
const CWD: u64 = linux_raw_sys::general::AT_FDCWD as i64 as u64;
/// Lowest place of a movable program.
const EXE_BASE: u64 = 0x1555_5000_0000;
/// The program's place is spread over so many pages (64 GiB).
const EXE_SPREAD: u64 = 1 << 24;
/// The stack's top is spread over so many pages (1 GiB).
const STACK_SPREAD: u64 = 1 << 18;
/// Between the stack and the mappings, in bytes.
const STACK_GAP: u64 = 1 << 20;
/// Where the dynamic linker goes, below the top of the mappings.
const LINKER_ROOM: u64 = 64 << 20;
/// Bounds of the stack, whatever its limit is: it is mapped in one piece, and
/// only what is touched costs memory.
const STACK_MIN: u64 = 1 << 20;
const STACK_MAX: u64 = 1 << 30;
const STACK_DEFAULT: u64 = 8 << 20;

/// Why a program could not be put into memory.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The file is not a program that can be run.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The kernel refused a mapping.
    #[error("cannot map {what}: {errno}; raise the memory limit (ulimit -v) or free some memory")]
    Map {
        /// What was to be mapped.
        what: &'static str,
        /// What the host kernel said.
        errno: Errno,
    },
    /// No random numbers, or nothing known of the machine.
    #[error("cannot read {what}: {source}")]
    Host {
        /// What was to be read.
        what: &'static str,
        /// What the host kernel said.
        source: std::io::Error,
    },
}

/// Everything that is decided before anything is changed.
pub(crate) struct Prepared {
    files: Files,
    /// The program's path.
    path: PathBuf,
    /// The path that was asked for.
    filename: CString,
    plan: LoadPlan,
    stack: StackImage,
    stack_range: PageRange,
    space: Space,
}

/// The files of a program, out of the present one's reach.
struct Files {
    of: Arc<crate::program::Program>,
    /// The program, and its dynamic linker if it has one.
    open: Vec<File>,
}

impl Files {
    fn program(&self) -> RawFd {
        self.open.first().map_or(-1, AsRawFd::as_raw_fd)
    }

    fn linker(&self) -> Option<RawFd> {
        self.open.get(1).map(AsRawFd::as_raw_fd)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for file in self.open.drain(..) {
            self.of.close_passing(file);
        }
    }
}

/// Opens and plans a program; nothing of the process changes.
///
/// # Errors
///
/// If it cannot be run.
pub(crate) fn prepare(
    guard: &Guard,
    path: &Path,
    argv: Vec<CString>,
    envp: &[CString],
    stack_limit: u64,
) -> Result<Prepared, LaunchError> {
    // Until the files are known to be the guard's, or closed, nobody may close or
    // replace what has their numbers.
    let mut hidden = guard.program.hidden_fds_mut();
    let program = Program::open_with(path, argv, &|path| procfs::open_program(guard, path))?;
    let random = |what| {
        random_words().map_err(|errno| LaunchError::Host {
            what,
            source: errno.into(),
        })
    };
    let [exe_random, stack_random, ..] = if guard.program.process().is_randomized() {
        random("random numbers")?
    } else {
        Default::default()
    };

    let stack_len = match stack_limit {
        u64::MAX => STACK_DEFAULT,
        limit => limit.clamp(STACK_MIN, STACK_MAX) & !(PAGE_SIZE - 1),
    };
    let stack_top = USER_TOP - (stack_random % STACK_SPREAD) * PAGE_SIZE;
    let stack_range = PageRange::new(stack_top - stack_len, stack_len).ok_or(LaunchError::Map {
        what: "the stack",
        errno: Errno::ENOMEM,
    })?;
    let clock = clock::host().filter(|_| guard.program.shows_clock());
    let mmap_top = stack_range.start() - STACK_GAP - clock.map_or(0, HostClock::len);

    let layout = Layout {
        exe_base: addr(EXE_BASE + (exe_random % EXE_SPREAD) * PAGE_SIZE)?,
        interp_base: addr(mmap_top - LINKER_ROOM)?,
        user_range: dune_loader::UserRange::new(addr(USER_LO)?, addr(mmap_top)?)
            .unwrap_or(dune_loader::UserRange::EMPTY),
    };
    let plan = program.plan(&layout)?;
    let machine = machine()?;
    let [low, high, ..] = random("random numbers")?;
    let mut secret = [0; 16];
    secret[..8].copy_from_slice(&low.to_le_bytes());
    secret[8..].copy_from_slice(&high.to_le_bytes());
    let stack = InitialStack {
        top: addr(stack_range.end())?,
        len: stack_len,
        filename: &program.filename,
        argv: &program.argv,
        envp,
        auxv: AuxvInputs {
            plan: &plan,
            ids: Ids::of_this_process(),
            machine,
            random: secret,
            vdso: clock
                .map(|clock| addr(mmap_top + clock.data_len))
                .transpose()?,
        },
    }
    .build()
    .map_err(ImageError::from)?;
    // Linux puts a random gap between program and heap; the program's own
    // place is random already.
    let heap_start = plan.brk_start.get();
    let space = Space {
        heap_start,
        heap_end: heap_start,
        mmap_top,
        clock: clock.map_or(0, |_| mmap_top),
    };
    let Program {
        filename,
        image,
        linker,
        ..
    } = program;
    let open: Vec<File> = core::iter::once(image.file)
        .chain(linker.map(|linker| linker.file))
        .collect();
    for file in &open {
        guard.program.pass(&mut hidden, file.as_raw_fd());
    }
    Ok(Prepared {
        files: Files {
            of: Arc::clone(&guard.program),
            open,
        },
        path: image.path,
        filename,
        plan,
        stack,
        stack_range,
        space,
    })
}

impl Prepared {
    /// The program's own entry point.
    pub(crate) fn entry(&self) -> u64 {
        self.plan.entry.get()
    }

    /// Maps the program into a user space that is empty, and returns the state
    /// it starts in.
    ///
    /// # Errors
    ///
    /// If the host kernel refuses; then a part may be mapped.
    pub(crate) fn load(self, guard: &mut Guard) -> Result<UserState, LaunchError> {
        let failed = |what| move |errno| LaunchError::Map { what, errno };
        let image = self.files.program();
        for segment in &self.plan.segments {
            map_segment(guard, segment, image).map_err(failed("the program"))?;
        }
        if let (Some(plan), Some(linker)) = (&self.plan.interpreter, self.files.linker()) {
            for segment in &plan.segments {
                map_segment(guard, segment, linker).map_err(failed("the dynamic linker"))?;
            }
        }
        let attributes = Attributes {
            backing: Backing::Stack,
            ..Attributes::anonymous(access_of(self.plan.stack_prot))
        };
        map_anonymous(
            &mut guard.program.memory_mut(),
            self.stack_range,
            attributes,
        )
        .map_err(failed("the stack"))?;
        guard
            .memory()
            .write(self.stack.sp.get(), &self.stack.bytes)
            .map_err(failed("the stack"))?;
        if self.space.clock != 0
            && let Some(clock) = clock::host()
        {
            clock::map(guard, clock, self.space.clock).map_err(failed("the vDSO"))?;
        }

        guard.program.memory_mut().space = self.space;
        let block = |range: dune_loader::UserRange| (range.start().get(), range.end().get());
        let exe = real_path(&self.path);
        let mut process = guard.program.process_mut();
        process.arguments = block(self.stack.arguments);
        process.environment = block(self.stack.environment);
        process.exe = exe;
        process.auxv = auxiliary_vector(&self.stack.bytes);
        drop(process);
        set_name(&self.filename);

        let mut user = UserState::default();
        user.regs.rip = self.plan.start().get();
        user.regs.rsp = self.stack.sp.get();
        Ok(user)
    }
}

/// `execve`: the program that `path` names takes the place of the present one.
pub(crate) fn replace(
    guard: &mut Guard,
    user: &mut UserState,
    path: &CStr,
    argv: Vec<CString>,
    envp: Vec<CString>,
) -> Answer {
    let request = |path: &str| format!("execve({path})");
    let text = path.to_bytes();
    if let Err(errno) = guard.hold_path(CWD, text, Last::Follow, Need::Read, &request) {
        return Answer::Return(Err(errno));
    }
    let path = Path::new(OsStr::from_bytes(text));
    let stack_limit = guard.program.process().limits.stack();
    let prepared = match prepare(guard, path, argv, &envp, stack_limit) {
        Ok(prepared) => prepared,
        Err(error) => return Answer::Return(Err(errno_of(&error))),
    };
    // What was opened in the end, whatever the path led to meanwhile.
    let mut files = prepared.files.open.iter().map(AsRawFd::as_raw_fd);
    if let Err(errno) = files.try_for_each(|fd| guard.may_execute(fd)) {
        return Answer::Return(Err(errno));
    }
    let program = Arc::clone(&guard.program);
    if program
        .threads
        .begin_replacing(program.pid(), guard.tid)
        .is_err()
    {
        return Answer::Leave;
    }
    // From here on there is no way back to the old program.
    finish_vfork(&program);
    let start = clear(guard).and_then(|()| prepared.load(guard).map_err(|error| errno_of(&error)));
    match start {
        Ok(start) if guard.tid == program.pid() => {
            *user = start;
            program.threads.replaced();
            guard.note_exec()
        }
        // The program runs on in the thread that has the process's id.
        Ok(user) => {
            let mask = guard.signals.mask;
            let takeover = Takeover { user, mask };
            program.threads.hand_over(guard.tid, takeover);
            Answer::Leave
        }
        Err(_) if program.served().is_some() => {
            // The end of the run, and not of what serves it.
            program.threads.replaced();
            Answer::Killed(SIGKILL)
        }
        Err(_) => {
            let killed = Ok(End::Killed(SIGKILL));
            if program.is_forked() {
                leave_process(killed);
            }
            program.threads.end_replacing(killed);
            Answer::Leave
        }
    }
}

/// Takes away what does not survive `execve`.
fn clear(guard: &mut Guard) -> Result<(), Errno> {
    let program = Arc::clone(&guard.program);
    let mut memory = program.memory_mut();
    let areas: Vec<PageRange> = memory.areas.iter().map(|area| area.range).collect();
    for range in areas {
        unmap(guard, &mut memory, range)?;
    }
    drop(memory);
    guard.forget_breakpoints();
    fd::close_on_exec(guard);
    settle_identity()?;
    let mut dispositions = program.dispositions();
    for signal in 1..=SIGNALS {
        if dispositions.action(signal).disposition() == Disposition::Handler {
            dispositions.set_action(signal, Action::default());
            host::set_default(signal);
        }
    }
    drop(dispositions);
    guard.signals.altstack = AltStack::default();
    guard.clear_child_tid = 0;
    guard
        .engine
        .reset_xstate()
        .map_err(|error| guard.engine_failed(error))
}

fn map_segment(guard: &mut Guard, segment: &SegmentMap, file: RawFd) -> Result<(), Errno> {
    let access = access_of(segment.prot);
    let pages = |range: dune_loader::UserRange| {
        PageRange::new(range.start().get(), range.len()).ok_or(Errno::ENOMEM)
    };
    let program = Arc::clone(&guard.program);
    let memory = || program.memory_mut();
    if let Some(range) = segment.file_pages() {
        let range = pages(range)?;
        match segment.zero_tail() {
            None => map_file(&mut memory(), range, access, file, segment.file_offset)?,
            Some(tail) => {
                let writable = access | Access::READ | Access::WRITE;
                map_file(&mut memory(), range, writable, file, segment.file_offset)?;
                guard
                    .memory()
                    .write(tail.start().get(), &vec![0; tail.len() as usize])?;
                set_access(guard, range, access)?;
            }
        }
    }
    if let Some(range) = segment.anonymous_pages() {
        map_anonymous(&mut memory(), pages(range)?, Attributes::anonymous(access))?;
    }
    Ok(())
}

fn access_of(prot: Prot) -> Access {
    // The bits are those of `mmap` in both.
    Access::from_bits_truncate(prot.bits() as u8)
}

/// Reads what later starts need of the machine, while it may be read.
///
/// # Errors
///
/// If the host does not say.
pub(crate) fn learn_machine() -> Result<(), LaunchError> {
    machine().map(drop)
}

/// What the host told this process of the machine, asked once: a program that
/// has given up its identity may not read it any more.
fn machine() -> Result<Machine, LaunchError> {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    if let Some(machine) = MACHINE.get() {
        return Ok(*machine);
    }
    let machine = Machine::of_host().map_err(|source| LaunchError::Host {
        what: "/proc/self/auxv",
        source,
    })?;
    Ok(*MACHINE.get_or_init(|| machine))
}

fn addr(value: u64) -> Result<UserAddr, LaunchError> {
    UserAddr::new(value).map_err(|_| LaunchError::Map {
        what: "the program",
        errno: Errno::ENOMEM,
    })
}

fn errno_of(error: &LaunchError) -> Errno {
    match error {
        LaunchError::Image(error) => {
            Errno::new(error.errno().raw_os_error()).unwrap_or(Errno::ENOEXEC)
        }
        LaunchError::Map { errno, .. } => *errno,
        LaunchError::Host { source, .. } => Errno::of(source),
    }
}

/// What `/proc/self/exe` shall say.
fn real_path(path: &Path) -> Vec<u8> {
    std::fs::canonicalize(path)
        .unwrap_or_else(|_| path.into())
        .into_os_string()
        .into_vec()
}

/// The auxiliary vector in a program's first stack, with its end.
fn auxiliary_vector(stack: &[u8]) -> Vec<u8> {
    let (words, _) = stack.as_chunks::<8>();
    let word = |index: usize| words.get(index).map_or(0, |word| u64::from_le_bytes(*word));
    // The count of arguments, those, a zero; the environment, a zero.
    let environment = 2 + word(0) as usize;
    let end = (environment..words.len()).find(|&index| word(index) == 0);
    let start = end.map_or(words.len(), |end| end + 1);
    let entries = words[start..].chunks(2);
    let count = entries
        .take_while(|entry| u64::from_le_bytes(entry[0]) != 0)
        .count();
    let with_end = (start + 2 * (count + 1)).min(words.len());
    words[start..with_end].concat()
}

/// Names the process after the program, as `execve` does.
fn set_name(filename: &CStr) {
    /// Bytes of a process's name with its zero.
    const NAME_LEN: usize = 16;
    let base = filename
        .to_bytes()
        .rsplit(|&byte| byte == b'/')
        .next()
        .unwrap_or_default();
    let mut name = [0; NAME_LEN];
    for (place, byte) in name[..NAME_LEN - 1].iter_mut().zip(base) {
        *place = *byte;
    }
    // Only a convenience for people who list processes.
    let _ = forward_always(__NR_prctl, [u64::from(PR_SET_NAME), own(&name), 0, 0, 0, 0]);
}

pub(crate) fn random_words() -> Result<[u64; 4], Errno> {
    let mut words = [0_u64; 4];
    let len = size_of_val(&words) as u64;
    let count = forward_always(__NR_getrandom, [own_mut(&mut words), len, 0, 0, 0, 0])?;
    if count == len {
        Ok(words)
    } else {
        Err(Errno::EIO)
    }
}
