//! The emulator's process: Bochs with a Skylake server CPU (VMX, EPT, VPID).
//!
//! It has no graphics and no files of its own: its configuration, its disk and
//! its log are files without a name, its screen is a pseudo-terminal, the
//! guest's console goes to a memory file and the agent's frames come out of
//! the guest's parallel port into a pipe. So nothing is left behind, whatever
//! ends this process.
//!
//! ```text
//!   Bochs                        this process
//!   com1      kernel's console   memory file, shown when the guest dies
//!   parport1  agent's frames     pipe
//!   log       its own messages   memory file
//!   screen    "term", curses     pseudo-terminal, read and thrown away
//! ```
#![expect(unsafe_code, reason = "set-up of a child between fork and exec")]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use rustix::io::FdFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use super::disk::{Disk, HEADS, SECTORS_PER_TRACK};
use crate::error::{LabError, io_error};
use crate::machine::{memory_file, tail};
use crate::tools::{self, Tool};

/// The emulator, and the Debian packages with its screen and its BIOS.
const BOCHS: Tool = Tool {
    program: "bochs-bin",
    package: "bochs",
};
const PACKAGES: &[&str] = &["bochs", "bochs-term", "bochsbios", "vgabios"];

/// The BIOS. It brings ACPI tables and starts the boot sector.
const BIOS: &str = "/usr/share/bochs/BIOS-bochs-latest";
/// Where Debian's Bochs has its plug-ins.
const SCREEN_PLUGINS: [&str; 2] = [
    "/usr/lib/x86_64-linux-gnu/bochs/plugins",
    "/usr/lib/bochs/plugins",
];

/// How many instructions make a second of the guest's time. About what Bochs
/// reaches, so that the guest's time passes about as fast as the host's.
pub(crate) const INSTRUCTIONS_PER_SECOND: u32 = 50_000_000;

/// An installed Bochs.
#[derive(Debug)]
pub(crate) struct Bochs {
    program: PathBuf,
    /// Built with its debugger, which waits for commands before it starts.
    debugger: bool,
}

impl Bochs {
    /// Finds Bochs; installs it first where that is possible.
    ///
    /// # Errors
    ///
    /// [`LabError::Missing`] with the command to type when it is not possible.
    pub(crate) fn require() -> Result<Bochs, LabError> {
        if !is_complete() {
            tools::install(PACKAGES)?;
        }
        let program = BOCHS.find().ok_or_else(|| LabError::Missing {
            what: BOCHS.program.to_owned(),
            remedy: format!("install Debian's packages {}", PACKAGES.join(" ")),
        })?;
        // It prints its options on standard error, and is not at odds about it.
        let help = Command::new(&program)
            .arg("--help")
            .stdin(Stdio::null())
            .output()
            .map_err(io_error(format!("start {}", program.display())))?;
        let debugger = [help.stdout, help.stderr]
            .iter()
            .any(|text| String::from_utf8_lossy(text).contains("-rc "));
        Ok(Bochs { program, debugger })
    }
}

fn is_complete() -> bool {
    let has_screen = SCREEN_PLUGINS.iter().any(|folder| {
        std::fs::read_dir(folder).is_ok_and(|entries| {
            entries
                .flatten()
                .any(|entry| entry.file_name().as_bytes().starts_with(b"libbx_term_gui"))
        })
    });
    BOCHS.find().is_some() && Path::new(BIOS).exists() && has_screen
}

/// A running Bochs. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Machine {
    process: Child,
    console: File,
    log: File,
}

impl Machine {
    /// Starts the emulator; also gives the stream of the agent's frames. It
    /// ends with the calling *thread* at the latest.
    pub(crate) fn start(
        bochs: &Bochs,
        disk: &Disk,
        memory_mib: u32,
        cpus: u32,
    ) -> Result<(Machine, File), LabError> {
        let pipe = |errno: rustix::io::Errno| io_error("make a pipe")(errno.into());
        let (frames, frames_end) = pipe_with(PipeFlags::CLOEXEC).map_err(pipe)?;
        let console = memory_file("console")?;
        let log = memory_file("log")?;
        let video_bios = memory_file("video-bios")?;
        (&video_bios)
            .write_all(&empty_video_bios())
            .map_err(io_error("write the video BIOS"))?;
        let commands = memory_file("commands")?;
        (&commands)
            .write_all(b"c\n")
            .map_err(io_error("write the debugger's commands"))?;
        let cylinders = disk.cylinders;
        // Bochs reports what it makes of MSRs it does not know; that is noise.
        let text = format!(
            "config_interface: textconfig\n\
             display_library: term\n\
             memory: guest={memory_mib}, host={memory_mib}\n\
             romimage: file={BIOS}, options=fastboot\n\
             vgaromimage: file={}\n\
             cpu: model=corei7_skylake_x, count={cpus}, ips={INSTRUCTIONS_PER_SECOND}, \
                  reset_on_triple_fault=0, ignore_bad_msrs=1\n\
             clock: sync=none, time0=utc\n\
             com1: enabled=1, mode=file, dev={}\n\
             parport1: enabled=1, file={}\n\
             ata0: enabled=1\n\
             ata0-master: type=disk, path={}, mode=flat, \
                  cylinders={cylinders}, heads={HEADS}, spt={SECTORS_PER_TRACK}\n\
             ata1: enabled=0\n\
             boot: disk\n\
             speaker: enabled=0\n\
             log: {}\n\
             panic: action=fatal\n\
             error: action=ignore\n\
             info: action=ignore\n\
             debug: action=ignore\n",
            path_of(&video_bios),
            path_of(&console),
            path_of(&frames_end),
            path_of(&disk.file),
            path_of(&log),
        );
        let settings = memory_file("settings")?;
        (&settings)
            .write_all(text.as_bytes())
            .map_err(io_error("write Bochs's settings"))?;

        let screen = Screen::open()?;
        let mut command = Command::new(&bochs.program);
        command.arg("-q").arg("-f").arg(path_of(&settings));
        if bochs.debugger {
            command.arg("-rc").arg(path_of(&commands));
        }
        let stream = || {
            screen
                .slave
                .try_clone()
                .map(Stdio::from)
                .map_err(io_error("duplicate"))
        };
        command
            .env("TERM", "vt100")
            .env_remove("BOCHSRC")
            .stdin(stream()?)
            .stdout(stream()?)
            .stderr(stream()?)
            // A key pressed to end this process is not for the emulator.
            .process_group(0);
        let descriptors = [
            settings.as_raw_fd(),
            commands.as_raw_fd(),
            video_bios.as_raw_fd(),
            console.as_raw_fd(),
            frames_end.as_raw_fd(),
            disk.file.as_raw_fd(),
            log.as_raw_fd(),
        ];
        let parent = rustix::process::getpid();
        let setup = move || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            if rustix::process::getppid() != Some(parent) {
                // The parent died before the request to die with it.
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
            for fd in descriptors {
                // SAFETY: the caller keeps all of them open until after the spawn.
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
            .map_err(io_error(format!("start {}", bochs.program.display())))?;
        drop(command);
        screen.drain();
        let machine = Machine {
            process,
            console,
            log,
        };
        Ok((machine, File::from(frames)))
    }

    /// What the guest's kernel wrote to its console: warnings and worse.
    pub(crate) fn console(&self) -> String {
        let bytes = std::fs::read(path_of(&self.console)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// What the emulator itself said.
    pub(crate) fn log(&self) -> String {
        // A panic is followed by pages of registers.
        let text = tail(&self.log);
        match text.lines().find(|line| line.contains(">>PANIC<<")) {
            Some(line) => line.to_owned(),
            None => text,
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A name for an open file: in this process, and in a child that inherits it.
fn path_of(file: &dyn AsRawFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Bochs insists on a video BIOS. This one does nothing: a header, the size in
/// sectors, a far return, and a last byte that makes the sum 0.
fn empty_video_bios() -> [u8; 512] {
    let mut image = [0; 512];
    image[..4].copy_from_slice(&[0x55, 0xaa, 1, 0xcb]);
    let sum = image.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    image[511] = sum.wrapping_neg();
    image
}

/// The pseudo-terminal that Bochs draws its screen on.
struct Screen {
    master: File,
    slave: OwnedFd,
}

impl Screen {
    fn open() -> Result<Screen, LabError> {
        let step = |errno: rustix::io::Errno| io_error("make a pseudo-terminal")(errno.into());
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).map_err(step)?;
        grantpt(&master).map_err(step)?;
        unlockpt(&master).map_err(step)?;
        let name = ptsname(&master, Vec::new()).map_err(step)?;
        let path = Path::new(std::ffi::OsStr::from_bytes(name.as_bytes()));
        const O_NOCTTY: i32 = 0o400;
        let slave = std::os::unix::fs::OpenOptionsExt::custom_flags(
            OpenOptions::new().read(true).write(true),
            O_NOCTTY,
        )
        .open(path)
        .map_err(io_error(format!("open {}", path.display())))?;
        Ok(Screen {
            master: master.into(),
            slave: slave.into(),
        })
    }

    /// Reads what is drawn until the emulator ends, or it would block.
    fn drain(self) {
        drop(self.slave);
        let mut master = self.master;
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // The end of the last process on it is an error, not an end of file.
            while master.read(&mut buffer).is_ok_and(|count| count > 0) {}
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn video_bios_adds_up_to_zero() {
        let image = empty_video_bios();
        assert_eq!(
            image.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
        assert_eq!(image[3], 0xcb, "far return");
    }
}
