//! POSIX timers: whom they signal.

use linux_raw_sys::general::__NR_timer_create;

use crate::calls::forward;
use crate::guard::Guard;
use crate::host::{Errno, SysResult};
use crate::table::Args;

/// Of the 64 bytes of `struct sigevent` the kernel looks at value, signal,
/// kind and, for `SIGEV_THREAD_ID`, the thread, which must be one of the
/// program's: a timer must not interrupt a thread of the guard.
pub(crate) fn timer_create(guard: &mut Guard, args: Args) -> SysResult {
    const SIGEV_THREAD_ID: u32 = 4;
    /// `sigev_notify` and `sigev_notify_thread_id`, in 32-bit words.
    const NOTIFY: usize = 3;
    const THREAD: usize = 4;
    let [clock, event, id, ..] = args;
    if event == 0 {
        return forward(__NR_timer_create, [clock, 0, id, 0, 0, 0]);
    }
    let event: [u32; 16] = guard.memory().read_value(event)?;
    if event[NOTIFY] & SIGEV_THREAD_ID != 0 && !guard.program.threads.has(event[THREAD]) {
        return Err(Errno::EINVAL);
    }
    let event = guard.lend(&event)?;
    forward(__NR_timer_create, [clock, event.pointer(), id, 0, 0, 0])
}
