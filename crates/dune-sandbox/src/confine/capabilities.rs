//! Root's rights beyond files, which a strict policy takes away.

use linux_raw_sys::general::{__NR_capget, __NR_capset, __NR_prctl};
use linux_raw_sys::prctl::{PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, PR_CAPBSET_DROP};

use crate::calls::{forward_always, own, own_mut};
use crate::host::Errno;

/// Those that are about the owners and modes of files and about becoming
/// somebody else with fewer rights: what programs of root expect to have, and
/// what the file rules hold. (linux/capability.h)
const KEPT: u64 = bit(0)   // CAP_CHOWN
    | bit(1)               // CAP_DAC_OVERRIDE
    | bit(2)               // CAP_DAC_READ_SEARCH
    | bit(3)               // CAP_FOWNER
    | bit(4)               // CAP_FSETID
    | bit(5)               // CAP_KILL, among the program's own processes
    | bit(6)               // CAP_SETGID
    | bit(7)               // CAP_SETUID
    | bit(8); // CAP_SETPCAP

const fn bit(capability: u32) -> u64 {
    1 << capability
}

/// Gives up every capability but [`KEPT`], for good.
///
/// # Errors
///
/// What the kernel says; not for want of a capability to give up.
pub(super) fn give_up() -> std::io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    const CAPABILITIES: u32 = 64;
    for capability in (0..CAPABILITIES).filter(|&capability| KEPT & bit(capability) == 0) {
        let args = [u64::from(PR_CAPBSET_DROP), capability.into(), 0, 0, 0, 0];
        // EINVAL for numbers that are none; EPERM without CAP_SETPCAP, and then
        // nothing that this process starts can gain one: no set-user-id
        // program runs behind `no_new_privs`.
        let _ = forward_always(__NR_prctl, args);
    }
    let clear = [PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL].map(u64::from);
    // EINVAL before Linux 4.3, which has no ambient ones.
    let _ = forward_always(__NR_prctl, [clear[0], clear[1], 0, 0, 0, 0]);
    let header = [VERSION_3, 0];
    // Effective, permitted, inheritable; low and high half.
    let mut sets = [[0_u32; 3]; 2];
    forward_always(__NR_capget, [own(&header), own_mut(&mut sets), 0, 0, 0, 0]).map_err(error)?;
    for (half, shift) in sets.iter_mut().zip([0, 32]) {
        let kept = (KEPT >> shift) as u32;
        half[0] &= kept;
        half[1] &= kept;
        half[2] = 0;
    }
    forward_always(__NR_capset, [own(&header), own(&sets), 0, 0, 0, 0])
        .map(drop)
        .map_err(error)
}

fn error(errno: Errno) -> std::io::Error {
    errno.into()
}
