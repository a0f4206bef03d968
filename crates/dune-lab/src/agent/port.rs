//! The stream to the host: a virtio port under QEMU, the parallel port under
//! Bochs.
//!
//! Bochs has no channel that carries bytes both ways and loses none. Its
//! parallel port carries a byte in three writes to I/O ports, without waiting;
//! a serial line would carry no more than 11 KiB in a second of the guest's
//! time. In the other direction there is nothing: the host's frames lie in the
//! initial RAM file system.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use crate::boot::during;
use crate::sys;
use crate::wire::{GIVEN_FRAMES, PARALLEL_PORT_OPTION, PORT_NAME};

/// How long a device may take to appear after its module was loaded.
const DEVICE_PATIENCE: Duration = Duration::from_secs(20);

/// The two directions of the stream.
pub(crate) struct Port {
    pub(crate) input: Box<dyn Read>,
    pub(crate) output: Box<dyn Write + Send>,
    /// The host cannot ask for the kernel's messages: send them as they come.
    pub(crate) reports_unasked: bool,
}

/// Opens the stream that the kernel's command line names: the parallel port,
/// or else the virtio port of the lab.
pub(crate) fn open() -> io::Result<Port> {
    let command_line = fs::read_to_string("/proc/cmdline")?;
    if command_line
        .split_whitespace()
        .any(|word| word == PARALLEL_PORT_OPTION)
    {
        let frames = File::open(Path::new("/").join(GIVEN_FRAMES)).map_err(during(GIVEN_FRAMES))?;
        return Ok(Port {
            input: Box::new(frames.chain(Silence)),
            output: Box::new(ParallelPort::open()?),
            reports_unasked: true,
        });
    }
    let device = open_virtio_port()?;
    Ok(Port {
        input: Box::new(device.try_clone()?),
        output: Box::new(device),
        reports_unasked: false,
    })
}

fn open_virtio_port() -> io::Result<File> {
    let deadline = Instant::now() + DEVICE_PATIENCE;
    loop {
        if let Some(path) = find_virtio_port() {
            return OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .map_err(during(path.display().to_string()));
        }
        if Instant::now() > deadline {
            return Err(io::Error::other(
                "the virtio port of the lab did not appear",
            ));
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn find_virtio_port() -> Option<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        let device = Path::new("/dev").join(entry.file_name());
        if name.trim_end() == PORT_NAME && device.exists() {
            return Some(device);
        }
    }
    None
}

/// A host that says no more, but has not gone.
struct Silence;

impl Read for Silence {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        loop {
            thread::park();
        }
    }
}

/// The first parallel port. A thread of its own writes to it: the permission
/// to use I/O ports belongs to a thread and is inherited by the programs it
/// starts, and the command must not have it.
struct ParallelPort {
    bytes: Sender<Vec<u8>>,
    done: Receiver<()>,
}

impl ParallelPort {
    fn open() -> io::Result<ParallelPort> {
        let (bytes, to_write) = mpsc::channel::<Vec<u8>>();
        let (wrote, done) = mpsc::channel();
        let (opened, result) = mpsc::channel();
        thread::spawn(move || {
            let registers = sys::ParallelRegisters::acquire();
            let _ = opened.send(registers.as_ref().map(drop).map_err(io::Error::kind));
            let Ok(registers) = registers else { return };
            while let Ok(bytes) = to_write.recv() {
                for byte in bytes {
                    registers.strobe(byte);
                }
                if wrote.send(()).is_err() {
                    return;
                }
            }
        });
        match result.recv() {
            Ok(Ok(())) => Ok(ParallelPort { bytes, done }),
            Ok(Err(kind)) => Err(during("parallel port")(kind.into())),
            Err(_) => Err(io::Error::other("the thread of the parallel port died")),
        }
    }
}

impl Write for ParallelPort {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        self.bytes.send(bytes.to_vec()).map_err(|_| gone())?;
        self.done.recv().map_err(|_| gone())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
