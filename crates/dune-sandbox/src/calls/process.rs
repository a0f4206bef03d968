//! The process: identity, limits, `prctl`, `arch_prctl`, `exit`, `execve`.

use std::ffi::CString;

use linux_raw_sys::general::{
    __NR_capget, __NR_capset, __NR_getegid, __NR_geteuid, __NR_getuid, __NR_prctl, __NR_prlimit64,
    __NR_setresgid, __NR_setresuid, AT_EMPTY_PATH, AT_FDCWD, RLIM_NLIMITS, RLIMIT_AS, RLIMIT_CORE,
    RLIMIT_CPU, RLIMIT_DATA, RLIMIT_STACK,
};
use linux_raw_sys::prctl::{
    PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, PR_CAPBSET_DROP, PR_CAPBSET_READ,
    PR_GET_CHILD_SUBREAPER, PR_GET_DUMPABLE, PR_GET_KEEPCAPS, PR_GET_NAME, PR_GET_NO_NEW_PRIVS,
    PR_GET_PDEATHSIG, PR_GET_SECCOMP, PR_GET_THP_DISABLE, PR_GET_TIMERSLACK,
    PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NAME, PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG, PR_SET_THP_DISABLE, PR_SET_TIMERSLACK,
};

use crate::calls::{Answer, forward, forward_always, own, own_mut};
use crate::engine::UserState;
use crate::guard::Guard;
use crate::host::{Errno, SysResult};
use crate::policy::Remedy;
use crate::range::USER_HI;
use crate::table::Args;
use crate::user::PATH_MAX;

/// What the guard knows of the process itself.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    /// Absolute path of the program, as `/proc/self/exe` must tell it.
    pub(crate) exe: Vec<u8>,
    /// Where the argument strings lie in user memory: `(start, end)`.
    pub(crate) arguments: (u64, u64),
    /// Where the environment strings lie.
    pub(crate) environment: (u64, u64),
    /// The auxiliary vector that it was started with.
    pub(crate) auxv: Vec<u8>,
    /// The limits that bind the program and must not bind the guard.
    pub(crate) limits: Limits,
    /// The flags of its `personality`.
    pub(crate) personality: u32,
}

impl Process {
    pub(crate) fn of_this_process() -> Self {
        Self {
            exe: Vec::new(),
            arguments: (0, 0),
            environment: (0, 0),
            auxv: Vec::new(),
            limits: Limits::of_this_process(),
            personality: 0,
        }
    }

    /// Whether programs are to be put at random places.
    pub(crate) fn is_randomized(&self) -> bool {
        self.personality & ADDR_NO_RANDOMIZE == 0
    }
}

/// Of `personality`: programs that are started from here on get no random places.
const ADDR_NO_RANDOMIZE: u32 = 0x0004_0000;

/// A resource limit: soft and hard value.
pub(crate) type Limit = [u64; 2];

const UNLIMITED: u64 = u64::MAX;

/// Limits that the guard keeps itself: they are about the program's memory, and
/// the guard's own would count too if the host kernel enforced them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    address_space: Limit,
    data: Limit,
    stack: Limit,
    core: Limit,
}

impl Limits {
    fn of_this_process() -> Self {
        let get = |resource: u32| {
            let mut limit: Limit = [UNLIMITED; 2];
            let args = [0, u64::from(resource), 0, own_mut(&mut limit), 0, 0];
            // Cannot fail for the process itself; unlimited if it did.
            let _ = forward_always(__NR_prlimit64, args);
            limit
        };
        Self {
            address_space: get(RLIMIT_AS),
            data: get(RLIMIT_DATA),
            stack: get(RLIMIT_STACK),
            core: get(RLIMIT_CORE),
        }
    }

    fn of(&mut self, resource: u32) -> Option<&mut Limit> {
        match resource {
            RLIMIT_AS => Some(&mut self.address_space),
            RLIMIT_DATA => Some(&mut self.data),
            RLIMIT_STACK => Some(&mut self.stack),
            RLIMIT_CORE => Some(&mut self.core),
            _ => None,
        }
    }

    /// The soft limit of the stack, in bytes.
    pub(crate) fn stack(&self) -> u64 {
        self.stack[0]
    }

    /// `ENOMEM` if `more` bytes beside the `used` ones exceed `RLIMIT_AS`.
    pub(crate) fn check_address_space(&self, used: u64, more: u64) -> Result<(), Errno> {
        match used.checked_add(more) {
            Some(sum) if sum <= self.address_space[0] => Ok(()),
            _ => Err(Errno::ENOMEM),
        }
    }
}

/// Whether the process has `CAP_SYS_RESOURCE`.
fn may_raise_limits() -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    capabilities().is_ok_and(|(_, sets)| sets[0][0] & (1 << CAP_SYS_RESOURCE) != 0)
}

/// What `execve` makes of the identity: the saved ids become the effective
/// ones, and who is not root keeps no capability that is not ambient. So a
/// program that gave up its rights cannot hand them to the next one.
///
/// # Errors
///
/// Those of `setresuid` and `capset`.
pub(crate) fn settle_identity() -> Result<(), Errno> {
    /// "As it is", for `setresuid`.
    const KEEP: u64 = u32::MAX as u64;
    let id = |nr| forward_always(nr, [0; 6]);
    let (user, group) = (id(__NR_geteuid)?, id(__NR_getegid)?);
    // Capabilities first: changing the ids may take them away as well.
    if user != 0 && id(__NR_getuid)? != 0 {
        keep_ambient_capabilities()?;
    }
    forward_always(__NR_setresgid, [KEEP, KEEP, group, 0, 0, 0])?;
    forward_always(__NR_setresuid, [KEEP, KEEP, user, 0, 0, 0])?;
    let set = |option: u32, value: u64| {
        // Cannot fail with these values.
        let _ = forward_always(__NR_prctl, [u64::from(option), value, 0, 0, 0, 0]);
    };
    set(PR_SET_KEEPCAPS, 0);
    set(PR_SET_DUMPABLE, 1);
    Ok(())
}

/// Makes the permitted and the effective capabilities the ambient ones.
fn keep_ambient_capabilities() -> Result<(), Errno> {
    const CAPABILITIES: u64 = 64;
    let (header, mut sets) = capabilities()?;
    for capability in 0..CAPABILITIES {
        let args = [
            u64::from(PR_CAP_AMBIENT),
            u64::from(PR_CAP_AMBIENT_IS_SET),
            capability,
            0,
            0,
            0,
        ];
        // An error for numbers that are none.
        if forward_always(__NR_prctl, args) != Ok(1) {
            let [effective, permitted, _] = &mut sets[capability as usize / 32];
            *effective &= !(1 << (capability % 32));
            *permitted &= !(1 << (capability % 32));
        }
    }
    forward_always(__NR_capset, [own(&header), own(&sets), 0, 0, 0, 0]).map(drop)
}

/// Effective, permitted and inheritable capabilities; low and high half.
type CapabilitySets = [[u32; 3]; 2];

/// The process's capabilities, and the header to set them with.
fn capabilities() -> Result<([u32; 2], CapabilitySets), Errno> {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let mut sets = CapabilitySets::default();
    forward_always(__NR_capget, [own(&header), own_mut(&mut sets), 0, 0, 0, 0])?;
    Ok((header, sets))
}

/// Changes one of the limits that the guard keeps, if `resource` is one, and
/// returns what it was.
fn change_own_limit(
    limits: &mut Limits,
    resource: u32,
    new: Option<Limit>,
) -> Result<Option<Limit>, Errno> {
    let Some(limit) = limits.of(resource) else {
        return Ok(None);
    };
    let previous = *limit;
    if let Some(new) = new {
        if new[0] > new[1] {
            return Err(Errno::EINVAL);
        }
        if new[1] > limit[1] && !may_raise_limits() {
            return Err(Errno::EPERM);
        }
        *limit = new;
    }
    Ok(Some(previous))
}

/// A hard limit that was lowered could not be raised again for the next run of a
/// program that returns to a snapshot.
fn refuse_lower_hard_limit(guard: &Guard, resource: u32, new: &Limit) -> Result<(), Errno> {
    if !guard.program.is_in_snapshot() {
        return Ok(());
    }
    let mut present: Limit = [0; 2];
    let get = [0, u64::from(resource), 0, own_mut(&mut present), 0, 0];
    forward_always(__NR_prlimit64, get)?;
    if new[1] < present[1] {
        return Err(Errno::EPERM);
    }
    Ok(())
}

/// Root could raise the limit that stands for the policy's.
fn refuse_more_cpu_time(guard: &Guard, resource: u32, new: &Limit) -> Result<(), Errno> {
    let policy = guard.program.policy();
    if resource != RLIMIT_CPU || policy.rules().limits.cpu_time.is_none() {
        return Ok(());
    }
    let mut present: Limit = [0; 2];
    let get = [0, u64::from(resource), 0, own_mut(&mut present), 0, 0];
    forward_always(__NR_prlimit64, get)?;
    if new[1] <= present[1] {
        return Ok(());
    }
    let request = "setrlimit(RLIMIT_CPU)".to_owned();
    Err(policy.refuse(request, Remedy::CpuTime, Errno::EPERM))
}

fn limit_call(guard: &mut Guard, resource: u64, new: u64, old: u64) -> SysResult {
    let resource = resource as u32;
    if resource >= RLIM_NLIMITS {
        return Err(Errno::EINVAL);
    }
    let new: Option<Limit> = if new == 0 {
        None
    } else {
        Some(guard.memory().read_value(new)?)
    };
    let kept = change_own_limit(&mut guard.program.process_mut().limits, resource, new)?;
    let previous = match kept {
        Some(previous) => previous,
        None => {
            // The guard changes the limit on descriptors for a moment where it makes
            // one.
            let _steady = guard.program.hidden_fds();
            let mut previous: Limit = [0; 2];
            if let Some(new) = &new {
                refuse_more_cpu_time(guard, resource, new)?;
                refuse_lower_hard_limit(guard, resource, new)?;
            }
            let new = new.as_ref().map_or(0, own);
            // Both are the guard's.
            let args = [0, u64::from(resource), new, own_mut(&mut previous), 0, 0];
            forward_always(__NR_prlimit64, args)?;
            previous
        }
    };
    if old != 0 {
        guard.memory().write_value(old, &previous)?;
    }
    Ok(0)
}

pub(crate) fn getrlimit(guard: &mut Guard, args: Args) -> SysResult {
    if args[1] == 0 {
        return Err(Errno::EFAULT);
    }
    limit_call(guard, args[0], 0, args[1])
}

pub(crate) fn setrlimit(guard: &mut Guard, args: Args) -> SysResult {
    if args[1] == 0 {
        return Err(Errno::EFAULT);
    }
    limit_call(guard, args[0], args[1], 0)
}

/// Of the program's own process only.
pub(crate) fn prlimit64(guard: &mut Guard, args: Args) -> SysResult {
    let [pid, resource, new, old, ..] = args;
    let pid = pid as u32;
    if pid != 0 && pid != guard.pid() {
        return Err(Errno::EPERM);
    }
    limit_call(guard, resource, new, old)
}

/// Linux's own personality, with random places for programs or without. The guard places
/// programs, so that the host's own is not touched; other flags change how the kernel maps
/// memory or what it says of itself, which the guard does not have.
pub(crate) fn personality(guard: &mut Guard, args: Args) -> SysResult {
    const QUERY: u32 = u32::MAX;
    let asked = args[0] as u32;
    let mut process = guard.program.process_mut();
    let previous = u64::from(process.personality);
    match asked {
        QUERY => Ok(previous),
        _ if asked & !ADDR_NO_RANDOMIZE == 0 => {
            process.personality = asked;
            Ok(previous)
        }
        _ => Err(Errno::EINVAL),
    }
}

/// Those options that are about the process as a whole and cannot reach the
/// guard's memory, registers or confinement.
pub(crate) fn prctl(guard: &mut Guard, args: Args) -> SysResult {
    const NAME_LEN: usize = 16;
    let [option, second, ..] = args;
    let option = option as u32;
    let plain = [u64::from(option), second, 0, 0, 0, 0];
    let to_user = |len: u64| -> Result<Args, Errno> {
        Ok([
            u64::from(option),
            guard.user_output(second, len)?,
            0,
            0,
            0,
            0,
        ])
    };
    match option {
        PR_SET_NAME => {
            let mut name = [0; NAME_LEN];
            match guard.memory().read_cstr_into(second, &mut name) {
                Ok(_) => {}
                Err(Errno::ENAMETOOLONG) => name[NAME_LEN - 1] = 0,
                Err(errno) => return Err(errno),
            }
            forward_always(__NR_prctl, [u64::from(option), own(&name), 0, 0, 0, 0])
        }
        PR_GET_NAME => forward(__NR_prctl, to_user(NAME_LEN as u64)?),
        PR_GET_PDEATHSIG | PR_GET_CHILD_SUBREAPER => forward(__NR_prctl, to_user(4)?),
        PR_GET_SECCOMP => Ok(0),
        PR_SET_PDEATHSIG
        | PR_SET_CHILD_SUBREAPER
        | PR_GET_DUMPABLE
        | PR_SET_DUMPABLE
        | PR_GET_KEEPCAPS
        | PR_SET_KEEPCAPS
        | PR_CAPBSET_READ
        | PR_CAPBSET_DROP
        | PR_GET_TIMERSLACK
        | PR_SET_TIMERSLACK
        | PR_GET_NO_NEW_PRIVS
        | PR_SET_NO_NEW_PRIVS
        | PR_GET_THP_DISABLE
        | PR_SET_THP_DISABLE => forward(__NR_prctl, plain),
        _ => Err(Errno::EINVAL),
    }
}

const ARCH_SET_GS: u32 = 0x1001;
const ARCH_SET_FS: u32 = 0x1002;
const ARCH_GET_FS: u32 = 0x1003;
const ARCH_GET_GS: u32 = 0x1004;

/// Segment bases are the program's registers, kept in its [`UserState`].
pub(crate) fn arch_prctl(guard: &mut Guard, user: &mut UserState, args: Args) -> Answer {
    let [code, value, ..] = args;
    let result = match code as u32 {
        ARCH_SET_FS | ARCH_SET_GS if value >= USER_HI => Err(Errno::EPERM),
        ARCH_SET_FS => {
            user.fs_base = value;
            Ok(0)
        }
        ARCH_SET_GS => {
            user.gs_base = value;
            Ok(0)
        }
        ARCH_GET_FS => guard.memory().write_value(value, &user.fs_base).map(|()| 0),
        ARCH_GET_GS => guard.memory().write_value(value, &user.gs_base).map(|()| 0),
        _ => Err(Errno::EINVAL),
    };
    Answer::Return(result)
}

pub(crate) fn execve(guard: &mut Guard, user: &mut UserState, args: Args) -> Answer {
    let [path, argv, envp, ..] = args;
    let path = match guard.read_path(path) {
        Ok(path) => path,
        Err(errno) => return Answer::Return(Err(errno)),
    };
    exec(guard, user, path, argv, envp)
}

/// With `AT_FDCWD`, an absolute path, or `AT_EMPTY_PATH`.
pub(crate) fn execveat(guard: &mut Guard, user: &mut UserState, args: Args) -> Answer {
    let [dirfd, path, argv, envp, flags, _] = args;
    if flags & !u64::from(AT_EMPTY_PATH) != 0 {
        return Answer::Return(Err(Errno::EINVAL));
    }
    let mut path = match guard.read_path(path) {
        Ok(path) => path,
        Err(errno) => return Answer::Return(Err(errno)),
    };
    let text = &path[..path.len() - 1];
    if text.is_empty() && flags & u64::from(AT_EMPTY_PATH) == 0 {
        return Answer::Return(Err(Errno::ENOENT));
    }
    if dirfd as i32 != AT_FDCWD && !text.starts_with(b"/") {
        // As the kernel names it: /dev/fd/N or /dev/fd/N/PATH.
        let mut full = format!("/dev/fd/{}", dirfd as i32).into_bytes();
        if !text.is_empty() {
            full.push(b'/');
        }
        full.extend_from_slice(&path);
        path = full;
    }
    exec(guard, user, path, argv, envp)
}

fn exec(guard: &mut Guard, user: &mut UserState, path: Vec<u8>, argv: u64, envp: u64) -> Answer {
    let strings = read_strings(guard, argv).and_then(|argv| Ok((argv, read_strings(guard, envp)?)));
    let (argv, envp) = match strings {
        Ok(strings) => strings,
        Err(errno) => return Answer::Return(Err(errno)),
    };
    let Ok(path) = CString::from_vec_with_nul(path) else {
        return Answer::Return(Err(Errno::ENOENT));
    };
    crate::launch::replace(guard, user, &path, argv, envp)
}

/// Copies a null-terminated vector of strings. A null vector is empty.
fn read_strings(guard: &Guard, mut at: u64) -> Result<Vec<CString>, Errno> {
    /// The kernel's `MAX_ARG_STRLEN`.
    const MAX_STRING: usize = 32 * PATH_MAX;
    /// All strings and pointers of one vector; the loader applies the exact
    /// limit later.
    const MAX_BYTES: usize = 6 << 20;
    let mut strings = Vec::new();
    let mut bytes = 0;
    if at == 0 {
        return Ok(strings);
    }
    loop {
        let pointer: u64 = guard.memory().read_value(at)?;
        if pointer == 0 {
            return Ok(strings);
        }
        let string = match guard.memory().read_cstr(pointer, MAX_STRING) {
            Err(Errno::ENAMETOOLONG) => return Err(Errno::E2BIG),
            string => string?,
        };
        bytes += string.len() + size_of::<u64>();
        if bytes > MAX_BYTES {
            return Err(Errno::E2BIG);
        }
        strings.push(CString::from_vec_with_nul(string).map_err(|_| Errno::EINVAL)?);
        at = at.checked_add(8).ok_or(Errno::EFAULT)?;
    }
}
