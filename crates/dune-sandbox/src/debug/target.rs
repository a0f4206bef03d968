//! The program as `gdbstub` drives it. All threads have stopped whenever
//! anything here is called.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

use gdbstub::arch::{Arch, RegId, Registers};
use gdbstub::common::{Pid, Signal, Tid};
use gdbstub::target::ext::auxv::{Auxv, AuxvOps};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadRangeStepping, MultiThreadRangeSteppingOps, MultiThreadResume,
    MultiThreadResumeOps, MultiThreadSchedulerLocking, MultiThreadSchedulerLockingOps,
    MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{
    SingleRegisterAccess, SingleRegisterAccessOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::ext::exec_file::{ExecFile, ExecFileOps};
use gdbstub::target::ext::extended_mode::{
    Args, AttachKind, CurrentActivePid, CurrentActivePidOps, ExtendedMode, ExtendedModeOps,
    ShouldTerminate,
};
use gdbstub::target::ext::target_description_xml_override::{
    TargetDescriptionXmlOverride, TargetDescriptionXmlOverrideOps,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use linux_raw_sys::general::SIGKILL;

use super::control::{Control, Go, Order, Pass, Saved, State};
use super::memory;
use super::registers::Layout;
use super::signals;
use crate::guard::End;
use crate::host::Errno;
use crate::program::Program;

/// x86-64, with the registers that this CPU has.
pub(crate) enum X86 {}

/// All registers, in the order of the description that gdb was given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct AllRegisters(Vec<u8>);

/// The number of a register in that order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Number(usize);

impl Arch for X86 {
    type Usize = u64;
    type Registers = AllRegisters;
    type BreakpointKind = usize;
    type RegId = Number;
}

impl Registers for AllRegisters {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        /// Behind sixteen registers of eight bytes.
        const RIP: usize = 16 * 8;
        let bytes = self.0.get(RIP..RIP + 8).unwrap_or_default();
        bytes.try_into().map_or(0, u64::from_le_bytes)
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.0.iter().for_each(|&byte| write_byte(Some(byte)));
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.0 = bytes.to_vec();
        Ok(())
    }
}

impl RegId for Number {
    fn from_raw_id(id: usize) -> Option<(Self, Option<core::num::NonZeroUsize>)> {
        Some((Self(id), None))
    }
}

/// See the module documentation.
pub(crate) struct Debugged {
    control: Arc<Control>,
    program: Arc<Program>,
    layout: Layout,
    /// What threads are to do that gdb has spoken of, until it lets them.
    orders: BTreeMap<u32, Order>,
    /// And the others.
    others: Order,
}

type Answer<T> = TargetResult<T, Debugged>;

fn refuse<T>(_: impl Sized) -> Answer<T> {
    Err(TargetError::NonFatal)
}

fn failed(errno: Errno) -> TargetError<Infallible> {
    TargetError::Errno(errno.number() as u8)
}

impl Debugged {
    pub(crate) fn new(control: Arc<Control>, program: Arc<Program>, xcr0: u64) -> Self {
        Self {
            control,
            program,
            layout: Layout::new(xcr0),
            orders: BTreeMap::new(),
            others: Order::Go(Go::default()),
        }
    }

    /// Stops the program, which runs.
    pub(crate) fn interrupt(&self) {
        self.control.interrupt();
    }

    /// Ends the program.
    fn end_program(&self) {
        let killed = Ok(End::Killed(SIGKILL));
        self.program.threads.end(self.program.pid(), killed);
    }

    fn order(&mut self, tid: Tid, step: Option<core::ops::Range<u64>>, signal: Option<Signal>) {
        let pass = signal
            .and_then(|signal| signals::from_gdb(signal.0))
            .map_or(Pass::Nothing, Pass::Signal);
        self.orders.insert(id(tid), Order::Go(Go { step, pass }));
    }

    fn with_saved<T>(
        &self,
        tid: Tid,
        body: impl FnOnce(&Layout, &Saved) -> Option<T>,
    ) -> Answer<T> {
        let state = self.control.lock();
        let saved = state.saved(id(tid));
        saved
            .and_then(|saved| body(&self.layout, saved))
            .ok_or(TargetError::NonFatal)
    }

    fn change_saved<E>(
        &self,
        tid: Tid,
        body: impl FnOnce(&Layout, &mut Saved) -> Result<(), E>,
    ) -> Answer<()> {
        let mut state: std::sync::MutexGuard<'_, State> = self.control.lock();
        match state.saved_mut(id(tid)) {
            Some(saved) => body(&self.layout, saved).or_else(refuse),
            None => refuse(()),
        }
    }
}

/// Ids of threads fit, for they are the kernel's.
fn id(tid: Tid) -> u32 {
    u32::try_from(tid.get()).unwrap_or(0)
}

/// The bytes from `offset`, at most `length` of them, into `buffer`.
fn part_of(bytes: &[u8], offset: u64, length: usize, buffer: &mut [u8]) -> usize {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let rest = bytes.get(start..).unwrap_or_default();
    let count = rest.len().min(length).min(buffer.len());
    buffer[..count].copy_from_slice(&rest[..count]);
    count
}

impl Target for Debugged {
    type Arch = X86;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, X86, Infallible> {
        BaseOps::MultiThread(self)
    }

    // Children of the program are not followed, and gdb is not told of them.
    fn use_fork_stop_reason(&self) -> bool {
        false
    }

    fn use_vfork_stop_reason(&self) -> bool {
        false
    }

    fn use_vforkdone_stop_reason(&self) -> bool {
        false
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_extended_mode(&mut self) -> Option<ExtendedModeOps<'_, Self>> {
        Some(self)
    }

    fn support_target_description_xml_override(
        &mut self,
    ) -> Option<TargetDescriptionXmlOverrideOps<'_, Self>> {
        Some(self)
    }

    fn support_exec_file(&mut self) -> Option<ExecFileOps<'_, Self>> {
        Some(self)
    }

    fn support_auxv(&mut self) -> Option<AuxvOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Debugged {
    fn read_registers(&mut self, regs: &mut AllRegisters, tid: Tid) -> Answer<()> {
        regs.0 = self.with_saved(tid, |layout, saved| Some(layout.read_all(saved)))?;
        Ok(())
    }

    fn write_registers(&mut self, regs: &AllRegisters, tid: Tid) -> Answer<()> {
        self.change_saved(tid, |layout, saved| layout.write_all(saved, &regs.0))
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], _tid: Tid) -> Answer<usize> {
        memory::peek(&self.program, &self.control.lock(), start, data).map_err(failed)
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], _tid: Tid) -> Answer<()> {
        memory::poke(&self.program, &mut self.control.lock(), start, data).map_err(failed)
    }

    fn list_active_threads(&mut self, is_active: &mut dyn FnMut(Tid)) -> Result<(), Infallible> {
        let state = self.control.lock();
        // The first thread first, if it is there.
        let pid = self.program.pid();
        let (first, others): (Vec<u32>, Vec<u32>) = state.threads().partition(|&tid| tid == pid);
        let all = first.into_iter().chain(others);
        all.filter_map(|tid| Tid::new(tid as usize))
            .for_each(is_active);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for Debugged {
    fn read_register(&mut self, tid: Tid, number: Number, buffer: &mut [u8]) -> Answer<usize> {
        let value = self.with_saved(tid, |layout, saved| layout.read(number.0, saved).ok())?;
        Ok(part_of(&value, 0, value.len(), buffer))
    }

    fn write_register(&mut self, tid: Tid, number: Number, value: &[u8]) -> Answer<()> {
        self.change_saved(tid, |layout, saved| layout.write(number.0, saved, value))
    }
}

impl MultiThreadResume for Debugged {
    fn resume(&mut self) -> Result<(), Infallible> {
        let others = &self.others;
        let orders = &self.orders;
        self.control
            .resume(|tid| orders.get(&tid).unwrap_or(others).clone());
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Infallible> {
        self.orders.clear();
        self.others = Order::Go(Go {
            step: None,
            pass: Pass::Nothing,
        });
        Ok(())
    }

    fn set_resume_action_continue(
        &mut self,
        tid: Tid,
        signal: Option<Signal>,
    ) -> Result<(), Infallible> {
        self.order(tid, None, signal);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_range_step(&mut self) -> Option<MultiThreadRangeSteppingOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Debugged {
    fn set_resume_action_step(
        &mut self,
        tid: Tid,
        signal: Option<Signal>,
    ) -> Result<(), Infallible> {
        // No address is in it: one step.
        self.order(tid, Some(0..0), signal);
        Ok(())
    }
}

impl MultiThreadRangeStepping for Debugged {
    fn set_resume_action_range_step(
        &mut self,
        tid: Tid,
        start: u64,
        end: u64,
    ) -> Result<(), Infallible> {
        self.order(tid, Some(start..end), None);
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Debugged {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Infallible> {
        self.others = Order::Stay;
        Ok(())
    }
}

impl Breakpoints for Debugged {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Debugged {
    fn add_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> Answer<bool> {
        let set = memory::set_breakpoint(&self.program, &mut self.control.lock(), addr);
        Ok(set.is_ok())
    }

    fn remove_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> Answer<bool> {
        let mut state = self.control.lock();
        // One that went with its memory is removed, too.
        memory::remove_breakpoint(&self.program, &mut state, addr);
        Ok(true)
    }
}

impl ThreadExtraInfo for Debugged {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, Infallible> {
        let state = self.control.lock();
        let name = state.saved(id(tid)).map_or("", |saved| &saved.name);
        Ok(part_of(name.as_bytes(), 0, name.len(), buffer))
    }
}

impl TargetDescriptionXmlOverride for Debugged {
    fn target_description_xml(
        &self,
        annex: &[u8],
        offset: u64,
        length: usize,
        buffer: &mut [u8],
    ) -> Answer<usize> {
        if annex != b"target.xml" {
            return refuse(annex);
        }
        let xml = self.layout.xml().as_bytes();
        Ok(part_of(xml, offset, length, buffer))
    }
}

impl ExecFile for Debugged {
    fn get_exec_file(
        &self,
        _pid: Option<Pid>,
        offset: u64,
        length: usize,
        buffer: &mut [u8],
    ) -> Answer<usize> {
        let process = self.program.process();
        Ok(part_of(&process.exe, offset, length, buffer))
    }
}

impl Auxv for Debugged {
    fn get_auxv(&self, offset: u64, length: usize, buffer: &mut [u8]) -> Answer<usize> {
        let process = self.program.process();
        Ok(part_of(&process.auxv, offset, length, buffer))
    }
}

/// For the id of the process, and to end it; there is one program, and no
/// other can be run.
impl ExtendedMode for Debugged {
    fn run(&mut self, _file: Option<&[u8]>, args: Args<'_, '_>) -> Answer<Pid> {
        refuse(args)
    }

    fn attach(&mut self, pid: Pid) -> Answer<()> {
        refuse(pid)
    }

    fn query_if_attached(&mut self, _pid: Pid) -> Answer<AttachKind> {
        // So that gdb, when it quits, leaves the program as it is.
        Ok(AttachKind::Attach)
    }

    fn kill(&mut self, _pid: Option<Pid>) -> Answer<ShouldTerminate> {
        self.end_program();
        Ok(ShouldTerminate::Yes)
    }

    fn restart(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    fn support_current_active_pid(&mut self) -> Option<CurrentActivePidOps<'_, Self>> {
        Some(self)
    }
}

impl CurrentActivePid for Debugged {
    fn current_active_pid(&mut self) -> Result<Pid, Infallible> {
        Ok(Pid::new(self.program.pid() as usize).unwrap_or(Pid::MIN))
    }
}
