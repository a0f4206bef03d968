//! The emulator's process: QEMU with its TCG translator and emulated SVM.
//!
//! KVM is never used for the lab itself, even where it is there: the lab is
//! for machines whose KVM cannot run ring 0, and for figures that repeat.
#![expect(
    unsafe_code,
    reason = "set-up of a child between fork and exec; the TSC"
)]

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use rustix::io::FdFlags;
use serde_json::{Value, json};

use crate::config::Config;
use crate::error::{LabError, io_error};
use crate::tools::last_lines;
use crate::wire::PORT_NAME;

/// What the kernel is told.
///
/// - the console is the log that is shown when the guest dies;
/// - `panic=-1` with `-no-reboot`: a panic ends the emulator at once;
/// - `init_on_alloc=0`: Debian's kernel clears memory that it will clear again
///   before a program sees it, and the emulator counts every byte of that;
/// - the rest saves time at boot and instructions at run time; none of it
///   changes what KVM does.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 oops=panic nokaslr mitigations=off \
                            cryptomgr.notests tsc=reliable no_timer_check nowatchdog audit=0 \
                            random.trust_cpu=on rodata=off init_on_alloc=0 \
                            8250.nr_uarts=1 rcupdate.rcu_expedited=1";

/// The whole command line.
///
/// The guest's TSC is the host's (with `icount`, a count of nanoseconds). The
/// guest would measure its frequency against an emulated timer, and on a busy
/// host it can be wrong by a factor of four, for good when the state is saved:
/// so it is told.
fn command_line(config: &Config, memory: Memory<'_>) -> String {
    let tsc_khz = match memory {
        _ if config.icount => 1_000_000,
        // The kernel has read its command line long ago.
        Memory::Waking(_) => return COMMAND_LINE.to_owned(),
        Memory::Fresh | Memory::Saving(_) => host_tsc_khz(),
    };
    format!("{COMMAND_LINE} tsc_early_khz={tsc_khz}")
}

/// Ticks of the host's time-stamp counter in a millisecond, measured.
fn host_tsc_khz() -> u64 {
    const PERIOD: Duration = Duration::from_millis(30);
    // SAFETY: reads a counter.
    let ticks = || unsafe { core::arch::x86_64::_rdtsc() };
    // Clock and counter are read within nanoseconds of each other unless the
    // thread is preempted in between: take the best of several readings.
    let pair = || {
        (0..10)
            .map(|_| {
                let before = ticks();
                let clock = Instant::now();
                let after = ticks();
                (after - before, before + (after - before) / 2, clock)
            })
            .min_by_key(|(width, ..)| *width)
            .map(|(_, ticks, clock)| (ticks, clock))
    };
    let Some((first_ticks, first_clock)) = pair() else {
        return 0;
    };
    std::thread::sleep(PERIOD);
    let Some((last_ticks, last_clock)) = pair() else {
        return 0;
    };
    let nanoseconds = last_clock.duration_since(first_clock).as_nanos();
    let khz = u128::from(last_ticks - first_ticks) * 1_000_000 / nanoseconds.max(1);
    u64::try_from(khz).unwrap_or(0)
}

/// What the guest's memory is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Memory<'a> {
    /// Fresh and private: a cold boot.
    Fresh,
    /// A file that all changes go to: a boot whose state will be saved.
    Saving(&'a Path),
    /// A private copy of such a file: a machine that will wake from the state.
    Waking(&'a Path),
}

/// A running emulator. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Machine {
    process: Child,
    port: UnixStream,
    monitor: Monitor,
    console: File,
    messages: File,
}

impl Machine {
    /// Starts the emulator. It ends with the calling *thread* at the latest.
    pub(crate) fn start(
        qemu: &Path,
        config: &Config,
        image: &Path,
        initramfs: &Path,
        memory: Memory<'_>,
    ) -> Result<Machine, LabError> {
        let (port, port_end) = UnixStream::pair().map_err(io_error("make a socket pair"))?;
        let (monitor, monitor_end) = UnixStream::pair().map_err(io_error("make a socket pair"))?;
        let console = memory_file("console")?;
        let messages = memory_file("messages")?;
        let inherited: Vec<OwnedFd> = vec![
            port_end.into(),
            monitor_end.into(),
            console.try_clone().map_err(io_error("duplicate"))?.into(),
        ];
        let [port_fd, monitor_fd, console_fd] = [0, 1, 2].map(|index| inherited[index].as_raw_fd());

        let mut command = Command::new(qemu);
        let mut option = |name: &str, value: OsString| {
            command.arg(name).arg(value);
        };
        let text = |text: String| OsString::from(text);
        option(
            "-machine",
            "pc,vmport=off,usb=off,memory-backend=ram".into(),
        );
        option("-cpu", "max,+svm".into());
        // One host thread for all virtual CPUs. With one each, QEMU's emulation of SVM
        // loses interrupts: it changes the word of pending interrupts on every #VMEXIT
        // without excluding the other threads that set bits in it, and sooner or later
        // a CPU waits for an interrupt for ever.
        option("-accel", "tcg,thread=single".into());
        if config.icount {
            option("-icount", "shift=0,sleep=off".into());
        }
        option("-smp", text(config.cpus.to_string()));
        option("-m", text(format!("{}M", config.memory_mib)));
        let mut backend = OsString::from(match memory {
            Memory::Fresh => "memory-backend-ram",
            Memory::Saving(_) | Memory::Waking(_) => "memory-backend-file",
        });
        backend.push(format!(",id=ram,size={}M", config.memory_mib));
        match memory {
            Memory::Fresh => {}
            Memory::Saving(path) => {
                backend.push(",share=on,mem-path=");
                backend.push(escaped(path));
            }
            Memory::Waking(path) => {
                backend.push(",share=off,mem-path=");
                backend.push(escaped(path));
                option("-incoming", "defer".into());
            }
        }
        option("-object", backend);
        option("-kernel", image.into());
        option("-initrd", initramfs.into());
        option("-append", text(command_line(config, memory)));
        option(
            "-chardev",
            text(format!("file,id=console,path=/proc/self/fd/{console_fd}")),
        );
        option("-serial", "chardev:console".into());
        option(
            "-chardev",
            text(format!("socket,id=monitor,fd={monitor_fd}")),
        );
        option("-mon", "chardev=monitor,mode=control".into());
        option("-device", "virtio-serial-pci,max_ports=2".into());
        option("-chardev", text(format!("socket,id=port,fd={port_fd}")));
        option(
            "-device",
            text(format!("virtserialport,chardev=port,nr=1,name={PORT_NAME}")),
        );
        let mut folder = |id: &str, path: &Path, more: &str| {
            let mut fsdev = text(format!(
                "local,id={id},security_model=none,multidevs=remap{more},path="
            ));
            fsdev.push(escaped(path));
            option("-fsdev", fsdev);
            option(
                "-device",
                text(format!("virtio-9p-pci,fsdev={id},mount_tag={id}")),
            );
        };
        folder("root", Path::new("/"), ",readonly=on");
        for (index, path) in config.shares.iter().enumerate() {
            folder(&share_tag(index), path, "");
        }
        command
            .args([
                "-no-user-config",
                "-nodefaults",
                "-no-reboot",
                "-display",
                "none",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::from(
                messages.try_clone().map_err(io_error("duplicate"))?,
            ))
            // Signals of the terminal are forwarded to the command, not taken
            // by the emulator.
            .process_group(0);
        let parent = rustix::process::getpid();
        let descriptors = [port_fd, monitor_fd, console_fd];
        let setup = move || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            if rustix::process::getppid() != Some(parent) {
                // The parent died before the request to die with it.
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
            for fd in descriptors {
                // SAFETY: `inherited` keeps the descriptors open until after the spawn.
                let fd = unsafe { BorrowedFd::borrow_raw(fd) };
                rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
            }
            Ok(())
        };
        // SAFETY: between fork and exec the closure makes system calls only: it
        // allocates nothing and takes no lock.
        unsafe { command.pre_exec(setup) };
        let process = command
            .spawn()
            .map_err(io_error(format!("start {}", qemu.display())))?;
        drop(inherited);
        Ok(Machine {
            process,
            port,
            monitor: Monitor::new(monitor)?,
            console,
            messages,
        })
    }

    /// The stream to the agent.
    pub(crate) fn port(&self) -> Result<UnixStream, LabError> {
        self.port
            .try_clone()
            .map_err(io_error("duplicate the port"))
    }

    /// Writes the state of the devices into `path`; the memory is in the file
    /// it was started with. The machine stops for good.
    pub(crate) fn save(&mut self, path: &Path) -> Result<(), LabError> {
        let uri = format!("exec:cat > {}", shell_quoted(path)?);
        let save = |monitor: &mut Monitor| {
            monitor.ignore_shared_memory()?;
            // Not stopped by hand: it would wake up stopped.
            monitor.call("migrate", json!({ "uri": uri }))?;
            monitor.wait_for_migration()
        };
        save(&mut self.monitor).map_err(|error| self.explain(error, "while it was saved"))
    }

    /// Loads the state of the devices and lets the machine run.
    pub(crate) fn wake(&mut self, path: &Path) -> Result<(), LabError> {
        let uri = format!("exec:cat {}", shell_quoted(path)?);
        let wake = |monitor: &mut Monitor| {
            monitor.ignore_shared_memory()?;
            monitor
                .call("migrate-incoming", json!({ "uri": uri }))
                .map(drop)
        };
        wake(&mut self.monitor).map_err(|error| self.explain(error, "while it woke up"))
    }

    /// Says what the emulator said when it fell silent.
    fn explain(&mut self, error: LabError, during: &'static str) -> LabError {
        match error {
            LabError::Io { .. } => {
                // It closed the monitor because it is ending: let it finish its words.
                let _ = self.process.wait();
                LabError::Died {
                    during,
                    emulator: self.messages(),
                    console: self.console(),
                }
            }
            other => other,
        }
    }

    /// What the guest's kernel wrote to its console last.
    pub(crate) fn console(&self) -> String {
        tail(&self.console)
    }

    /// What the emulator itself said.
    pub(crate) fn messages(&self) -> String {
        tail(&self.messages)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The guest has synchronised its shared folders before it reported the
        // end of its command, so nothing is lost by a hard end.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A path as one word of the shell that the emulator starts.
fn shell_quoted(path: &Path) -> Result<String, LabError> {
    let text = path.to_str().ok_or_else(|| {
        LabError::Options(format!(
            "the cache folder {} is not UTF-8; set XDG_CACHE_HOME to another",
            path.display()
        ))
    })?;
    Ok(format!("'{}'", text.replace('\'', r"'\''")))
}

/// The 9p tag of the shared folder with this number.
pub(crate) fn share_tag(index: usize) -> String {
    format!("share{index}")
}

/// A path inside a QEMU option, where a comma must be doubled.
fn escaped(path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut out = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        out.push(*byte);
        if *byte == b',' {
            out.push(b',');
        }
    }
    OsString::from_vec(out)
}

/// A file without a name: nothing to clean up, whatever ends this process.
pub(crate) fn memory_file(name: &str) -> Result<File, LabError> {
    rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)
        .map(File::from)
        .map_err(|errno| io_error("create a memory file")(errno.into()))
}

/// The last lines of a file that another process writes.
pub(crate) fn tail(file: &File) -> String {
    const LINES: usize = 40;
    const BYTES: u64 = 16 << 10;
    // The emulator writes through a description of its own or at the end.
    let Ok(mut reader) = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())) else {
        return String::new();
    };
    let length = reader.seek(SeekFrom::End(0)).unwrap_or(0);
    let _ = reader.seek(SeekFrom::Start(length.saturating_sub(BYTES)));
    let mut bytes = Vec::new();
    let _ = reader.read_to_end(&mut bytes);
    last_lines(&String::from_utf8_lossy(&bytes).replace('\r', ""), LINES)
}

/// QEMU's monitor: one JSON object a line.
#[derive(Debug)]
struct Monitor {
    writer: UnixStream,
    reader: BufReader<UnixStream>,
    greeted: bool,
}

impl Monitor {
    fn new(stream: UnixStream) -> Result<Monitor, LabError> {
        let reader = stream
            .try_clone()
            .map_err(io_error("duplicate the monitor"))?;
        Ok(Monitor {
            writer: stream,
            reader: BufReader::new(reader),
            greeted: false,
        })
    }

    fn call(&mut self, command: &str, arguments: Value) -> Result<Value, LabError> {
        if !self.greeted {
            self.read(|message| message.get("QMP").cloned())?;
            self.greeted = true;
            self.call("qmp_capabilities", json!({}))?;
        }
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        self.writer
            .write_all(line.as_bytes())
            .map_err(io_error("talk to the emulator"))?;
        let answer = self.read(|message| {
            message
                .get("error")
                .map(|error| Err(error.to_string()))
                .or_else(|| message.get("return").cloned().map(Ok))
        })?;
        answer.map_err(|reason| LabError::Protocol(format!("QEMU refused `{command}`: {reason}")))
    }

    /// Reads messages until one is what `wanted` looks for.
    fn read<T>(&mut self, wanted: impl Fn(&Value) -> Option<T>) -> Result<T, LabError> {
        loop {
            let mut line = String::new();
            let count = self
                .reader
                .read_line(&mut line)
                .map_err(io_error("listen to the emulator"))?;
            if count == 0 {
                return Err(io_error("listen to the emulator")(
                    std::io::ErrorKind::UnexpectedEof.into(),
                ));
            }
            let message: Value = serde_json::from_str(&line)
                .map_err(|error| LabError::Protocol(format!("QEMU's monitor: {error}: {line}")))?;
            if let Some(found) = wanted(&message) {
                return Ok(found);
            }
        }
    }

    /// Leaves memory that lies in a shared file out of a saved state.
    fn ignore_shared_memory(&mut self) -> Result<(), LabError> {
        let capability = json!({ "capability": "x-ignore-shared", "state": true });
        self.call(
            "migrate-set-capabilities",
            json!({ "capabilities": [capability] }),
        )
        .map(drop)
    }

    fn wait_for_migration(&mut self) -> Result<(), LabError> {
        loop {
            let answer = self.call("query-migrate", json!({}))?;
            match answer.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    return Err(LabError::Protocol(format!("saving failed: {answer}")));
                }
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

/// Everything of the machine that a saved state depends on, besides the files.
pub(crate) fn describe(config: &Config) -> String {
    format!(
        "{COMMAND_LINE} cpus={} memory={} icount={} shares={}",
        config.cpus,
        config.memory_mib,
        config.icount,
        config.shares.len()
    )
}

/// The name of a state for a person who looks into the cache.
pub(crate) fn short_name(config: &Config) -> PathBuf {
    let icount = if config.icount { "-icount" } else { "" };
    PathBuf::from(format!(
        "cpus{}-{}MiB-shares{}{icount}",
        config.cpus,
        config.memory_mib,
        config.shares.len()
    ))
}
