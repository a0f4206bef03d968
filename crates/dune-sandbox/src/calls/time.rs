//! Waiting calls whose arguments are more than the table can say.

use linux_raw_sys::general::{
    __NR_futex, __NR_pselect6, FUTEX_CMD_MASK, FUTEX_CMP_REQUEUE, FUTEX_REQUEUE, FUTEX_WAIT,
    FUTEX_WAIT_BITSET, FUTEX_WAKE, FUTEX_WAKE_BITSET, FUTEX_WAKE_OP,
};

use crate::calls::{forward, own, user_pointer};
use crate::guard::Guard;
use crate::host::{Errno, SysResult};
use crate::table::Args;

/// `futex` without priority inheritance.
pub(crate) fn futex(_guard: &mut Guard, args: Args) -> SysResult {
    const WORD: u64 = 4;
    const TIMESPEC: u64 = 16;
    let [word, op, value, timeout, second, value3] = args;
    let word = user_pointer(word, WORD)?;
    let command = (op as u32) & (FUTEX_CMD_MASK as u32);
    let args = match command {
        FUTEX_WAIT | FUTEX_WAIT_BITSET => {
            [word, op, value, user_pointer(timeout, TIMESPEC)?, 0, value3]
        }
        FUTEX_WAKE | FUTEX_WAKE_BITSET => [word, op, value, 0, 0, value3],
        // Here the fourth argument is a number.
        FUTEX_REQUEUE | FUTEX_CMP_REQUEUE | FUTEX_WAKE_OP => [
            word,
            op,
            value,
            timeout,
            user_pointer(second, WORD)?,
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
    let copy = [user_pointer(set, SIGSET_LEN)?, size];
    forward(
        __NR_pselect6,
        [nfds, read, write, except, timeout, own(&copy)],
    )
}
