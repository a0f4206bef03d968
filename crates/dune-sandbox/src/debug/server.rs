//! The debugger's thread: waits for one client and serves it until it or the
//! program is gone.

use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, GdbStubError, MultiThreadStopReason};
use linux_raw_sys::general::{__NR_poll, SIGINT, SIGTRAP};
use zerocopy::IntoBytes;

use super::control::{Control, News, Report};
use super::target::Debugged;
use super::wire::{Incoming, MOST_PACKET, Stream, Wire};
use super::{memory, signals};
use crate::calls::{forward_always, own_mut};
use crate::guard::End;
use crate::host::Errno;
use crate::program::Program;

/// Where clients come from.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    /// The path is removed with it.
    Unix(UnixListener, PathBuf),
}

/// What the thread needs to know of the program.
pub(crate) struct Begun {
    pub(crate) program: Arc<Program>,
    pub(crate) xcr0: u64,
}

impl Listener {
    fn fd(&self) -> RawFd {
        match self {
            Self::Tcp(listener) => listener.as_raw_fd(),
            Self::Unix(listener, _) => listener.as_raw_fd(),
        }
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.fd()
    }

    fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Stream::Tcp(stream)),
            Self::Unix(listener, _) => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // Somebody may have removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Serves one client. Whatever happens here, the program goes on, or ends as
/// the client wanted it to.
pub(crate) fn serve(control: &Arc<Control>, begun: Begun, listener: Listener) {
    let program = Arc::clone(&begun.program);
    // A defect here must not leave the program stopped for ever.
    let served = catch_unwind(AssertUnwindSafe(|| {
        let Some(stream) = wait_for_client(control, &program, listener) else {
            return;
        };
        let stream = Arc::new(stream);
        session(control, begun, Arc::clone(&stream));
        program.give_back(stream.fd(), |_| drop(stream));
    }));
    let stopped = catch_unwind(AssertUnwindSafe(|| let_go(control, &program)));
    if served.is_err() || stopped.is_err() {
        control.detach();
    }
}

/// Takes all breakpoints out of the program, and lets it run.
fn let_go(control: &Control, program: &Program) {
    // Its threads have to stop for that.
    control.interrupt();
    while !control.has_stopped() {
        wait(&[control.wake_fd()]);
        if let Some(News::Ended(_)) = control.take_news() {
            break;
        }
    }
    memory::remove_breakpoints(program, &mut control.lock());
    control.detach();
}

/// Waits until one of the descriptors can be read, and returns which can.
fn wait<const COUNT: usize>(fds: &[RawFd; COUNT]) -> [bool; COUNT] {
    /// `struct pollfd`: the descriptor, what is asked, what holds.
    #[repr(C)]
    #[derive(Clone, Copy, IntoBytes)]
    struct Asked {
        fd: RawFd,
        events: u16,
        holds: u16,
    }
    const POLLIN: u16 = 1;
    const FOR_EVER: u64 = -1_i64 as u64;
    let mut asked = fds.map(|fd| Asked {
        fd,
        events: POLLIN,
        holds: 0,
    });
    let args = [own_mut(&mut asked), COUNT as u64, FOR_EVER, 0, 0, 0];
    match forward_always(__NR_poll, args) {
        Ok(_) => asked.map(|asked| asked.holds != 0),
        Err(Errno::EINTR) => [false; COUNT],
        // Then reading says what is wrong.
        Err(_) => [true; COUNT],
    }
}

/// The first client, or `None` if the program ended before there was one. The
/// listener is closed then: who comes later is refused.
fn wait_for_client(control: &Control, program: &Program, listener: Listener) -> Option<Stream> {
    loop {
        let [client, news] = wait(&[listener.fd(), control.wake_fd()]);
        if news && let Some(News::Ended(_)) = control.take_news() {
            return None;
        }
        if !client {
            continue;
        }
        let mut stream = None;
        // The program must not see the descriptor, and its children neither.
        let taken = program.take(|| {
            let accepted = listener.accept().and_then(Stream::move_high);
            let accepted = accepted.map_err(|error| Errno::of(&error))?;
            let fd = accepted.fd();
            stream = Some(accepted);
            Ok(fd)
        });
        match taken {
            Ok(_) => {
                let fd = listener.fd();
                program.give_back(fd, |_| drop(listener));
                return stream;
            }
            // It was gone before it was there.
            Err(Errno::ECONNABORTED | Errno::EINTR | Errno::EAGAIN) => {}
            Err(_) => return None,
        }
    }
}

type Machine<'a> = GdbStubStateMachine<'a, Debugged, Wire>;
type Failure = GdbStubError<Infallible, io::Error>;

/// Serves a client until it is gone, or the program is.
fn session(control: &Arc<Control>, begun: Begun, stream: Arc<Stream>) {
    // The first thread is on its way to its first instruction.
    while !control.has_stopped() {
        wait(&[control.wake_fd()]);
        if let Some(News::Ended(_)) = control.take_news() {
            return;
        }
    }
    let program = Arc::clone(&begun.program);
    let mut target = Debugged::new(Arc::clone(control), Arc::clone(&program), begun.xcr0);
    let fd = stream.fd();
    let built = GdbStub::builder(Wire::new(stream))
        .packet_buffer_size(MOST_PACKET)
        .build();
    let Ok(stub) = built else { return };
    let Ok(mut machine) = stub.run_state_machine(&mut target) else {
        return;
    };
    let mut stopped_by = None;
    loop {
        let [bytes, news] = wait(&[fd, control.wake_fd()]);
        if bytes {
            machine = match take_bytes(machine, &mut target, &mut stopped_by) {
                Some(machine) => machine,
                None => return,
            };
        }
        if news && let Some(news) = control.take_news() {
            if let News::Stopped { tid, report } = news {
                stopped_by = Some((tid, report));
            }
            machine = match take_news(machine, &mut target, &program, news) {
                Some(machine) => machine,
                None => return,
            };
        }
    }
}

/// What came from gdb. `None` if it is gone, or nobody that can be talked to.
fn take_bytes<'a>(
    mut machine: Machine<'a>,
    target: &mut Debugged,
    stopped_by: &mut Option<(u32, Report)>,
) -> Option<Machine<'a>> {
    for incoming in wire(&mut machine)?.read().ok()? {
        match incoming {
            Incoming::ForStub(bytes) => {
                for byte in bytes {
                    machine = pump(machine, target, byte).ok()??;
                }
                gdbstub::conn::Connection::flush(wire(&mut machine)?).ok()?;
            }
            Incoming::Question(question) => {
                let wire = wire(&mut machine)?;
                let info = match *stopped_by {
                    Some((tid, Report::Signal(info)))
                        if wire.looks_at() == tid || wire.looks_at() == 0 =>
                    {
                        Some(info)
                    }
                    _ => None,
                };
                wire.answer(&question, info.as_ref().map(IntoBytes::as_bytes))
                    .ok()?;
            }
        }
    }
    Some(machine)
}

/// Gives the stub a byte. `None` if the session is over.
fn pump<'a>(
    machine: Machine<'a>,
    target: &mut Debugged,
    byte: u8,
) -> Result<Option<Machine<'a>>, Failure> {
    let next = match machine {
        GdbStubStateMachine::Idle(stub) => stub.incoming_data(target, byte)?,
        GdbStubStateMachine::Running(stub) => stub.incoming_data(target, byte)?,
        other => other,
    };
    Ok(match next {
        GdbStubStateMachine::CtrlCInterrupt(stub) => {
            target.interrupt();
            let none = None::<MultiThreadStopReason<u64>>;
            Some(stub.interrupt_handled(target, none)?)
        }
        GdbStubStateMachine::Disconnected(mut stub) => {
            if stub.get_reason() == DisconnectReason::Kill {
                stub.borrow_conn().stream().finish();
            }
            None
        }
        machine => Some(machine),
    })
}

/// Tells gdb. `None` if the session is over.
fn take_news<'a>(
    machine: Machine<'a>,
    target: &mut Debugged,
    program: &Program,
    news: News,
) -> Option<Machine<'a>> {
    let mut stub = match machine {
        GdbStubStateMachine::Running(stub) => stub,
        // Nobody waits for it.
        other => {
            let goes_on = !matches!(news, News::Ended(_));
            return goes_on.then_some(other);
        }
    };
    let reason = match news {
        News::Stopped { tid, report } => {
            let wire = stub.borrow_conn();
            wire.will_look_at(tid);
            if report == Report::Exec {
                wire.add_exec(&program.process().exe);
            }
            reason(Tid::new(tid as usize)?, report)
        }
        News::Ended(Some(End::Exit(status))) => MultiThreadStopReason::Exited(status),
        News::Ended(Some(End::Killed(signal))) => {
            MultiThreadStopReason::Terminated(Signal(signals::to_gdb(signal)))
        }
        News::Ended(None) => return None,
    };
    let mut machine = stub.report_stop(target, reason).ok()?;
    match &mut machine {
        GdbStubStateMachine::Disconnected(stub) => {
            stub.borrow_conn().stream().finish();
            None
        }
        _ => Some(machine),
    }
}

/// A report in the stub's words.
fn reason(tid: Tid, report: Report) -> MultiThreadStopReason<u64> {
    let signal = |linux| MultiThreadStopReason::SignalWithThread {
        tid,
        signal: Signal(signals::to_gdb(linux)),
    };
    match report {
        Report::Breakpoint => MultiThreadStopReason::SwBreak(tid),
        Report::Signal(info) => signal(info.signal()),
        Report::Interrupt => signal(SIGINT),
        Report::Started | Report::Step | Report::Exec => signal(SIGTRAP),
        // gdb's way to say "stopped, and no signal".
        Report::NoneLeft => MultiThreadStopReason::SignalWithThread {
            tid,
            signal: Signal::SIGZERO,
        },
    }
}

fn wire<'m>(machine: &'m mut Machine<'_>) -> Option<&'m mut Wire> {
    match machine {
        GdbStubStateMachine::Idle(stub) => Some(stub.borrow_conn()),
        GdbStubStateMachine::Running(stub) => Some(stub.borrow_conn()),
        GdbStubStateMachine::CtrlCInterrupt(stub) => Some(stub.borrow_conn()),
        GdbStubStateMachine::Disconnected(_) => None,
    }
}
