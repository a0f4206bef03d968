//! Where the guard meets the tracer.

use linux_raw_sys::general::{__NR_clone, __NR_clone3, __NR_fork, __NR_vfork};

use crate::calls::Answer;
use crate::guard::Guard;
use crate::host::SysResult;
use crate::signal::SigInfo;
use crate::table::Args;
use crate::trace::Begun;

/// Calls that return twice.
const MAKE_CHILDREN: [u32; 4] = [__NR_clone, __NR_clone3, __NR_fork, __NR_vfork];

impl Guard {
    /// A call begins: its arguments are told as they are now. `None` if nobody
    /// wants to know.
    #[inline]
    pub(crate) fn trace_call(&self, nr: u32, args: &Args) -> Option<Begun> {
        let tracer = self.program.tracer()?;
        tracer.before(nr, *args, self.memory(), self.tid)
    }

    /// The call that began so is over.
    #[inline(never)]
    pub(crate) fn trace_answer(&self, begun: Begun, answer: &Answer) {
        let result: Option<SysResult> = match *answer {
            Answer::Return(result) => Some(result),
            Answer::Registers => Some(Ok(0)),
            // It ended.
            _ => None,
        };
        // The call of the parent, which tells it.
        if MAKE_CHILDREN.contains(&begun.nr) && result == Some(Ok(0)) {
            return;
        }
        if let Some(tracer) = self.program.tracer() {
            tracer.after(begun, result, self.memory(), self.tid);
        }
    }

    /// A signal reaches the program.
    pub(crate) fn trace_signal(&self, info: &SigInfo) {
        if let Some(tracer) = self.program.tracer() {
            tracer.signal(info, self.tid);
        }
    }
}
