//! Waiting calls whose arguments are more than the table can say.

use linux_raw_sys::general::{
    __NR_futex, __NR_pselect6, FUTEX_CMD_MASK, FUTEX_CMP_REQUEUE, FUTEX_CMP_REQUEUE_PI,
    FUTEX_LOCK_PI, FUTEX_LOCK_PI2, FUTEX_REQUEUE, FUTEX_TRYLOCK_PI, FUTEX_UNLOCK_PI, FUTEX_WAIT,
    FUTEX_WAIT_BITSET, FUTEX_WAIT_REQUEUE_PI, FUTEX_WAKE, FUTEX_WAKE_BITSET, FUTEX_WAKE_OP,
};

use crate::calls::{forward, user_pointer};
use crate::guard::Guard;
use crate::host::{Errno, SysResult};
use crate::signal::{SigSet, host};
use crate::table::Args;

/// All operations on one or two words. Lists of words (`futex_waitv`) are
/// another call.
pub(crate) fn futex(guard: &mut Guard, args: Args) -> SysResult {
    const WORD: u64 = 4;
    const TIMESPEC: u64 = 16;
    let [word, op, value, timeout, second, value3] = args;
    let word = guard.user_output(word, WORD)?;
    let command = (op as u32) & (FUTEX_CMD_MASK as u32);
    let args = match command {
        FUTEX_WAIT | FUTEX_WAIT_BITSET | FUTEX_LOCK_PI | FUTEX_LOCK_PI2 => {
            // What is left of a relative timeout is not known here: as the
            // kernel, which starts such a wait again only where no handler ran.
            guard.never_restart = command == FUTEX_WAIT && timeout != 0;
            [word, op, value, user_pointer(timeout, TIMESPEC)?, 0, value3]
        }
        FUTEX_WAKE | FUTEX_WAKE_BITSET | FUTEX_UNLOCK_PI | FUTEX_TRYLOCK_PI => {
            [word, op, value, 0, 0, value3]
        }
        FUTEX_WAIT_REQUEUE_PI => [
            word,
            op,
            value,
            user_pointer(timeout, TIMESPEC)?,
            guard.user_output(second, WORD)?,
            value3,
        ],
        // Here the fourth argument is a number.
        FUTEX_REQUEUE | FUTEX_CMP_REQUEUE | FUTEX_WAKE_OP | FUTEX_CMP_REQUEUE_PI => [
            word,
            op,
            value,
            timeout,
            guard.user_output(second, WORD)?,
            value3,
        ],
        _ => return Err(Errno::ENOSYS),
    };
    forward(__NR_futex, args)
}

/// Its last argument points at a pointer to a signal set and its size.
pub(crate) fn pselect6(guard: &mut Guard, args: Args) -> SysResult {
    const SIGSET_LEN: u64 = 8;
    let [nfds, read, write, except, timeout, mask] = args;
    if mask == 0 {
        return forward(__NR_pselect6, args);
    }
    let [set, size]: [u64; 2] = guard.memory().read_value(mask)?;
    if set != 0 && size != SIGSET_LEN {
        return Err(Errno::EINVAL);
    }
    if set == 0 {
        let copy = guard.lend(&[0, size])?;
        let args = [nfds, read, write, except, timeout, copy.pointer()];
        return forward(__NR_pselect6, args);
    }
    let set: SigSet = guard.memory().read_value(set)?;
    let set = guard.lend(&host::mask_for_host(set))?;
    let copy = guard.lend(&[set.pointer(), size])?;
    forward(
        __NR_pselect6,
        [nfds, read, write, except, timeout, copy.pointer()],
    )
}
