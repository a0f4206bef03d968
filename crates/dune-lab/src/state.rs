//! Saved states: a guest that has booted and waits for its command, kept as a
//! file of its memory and a file of its devices.
//!
//! Waking up maps the memory file privately, so nothing is read that is not
//! touched, any number of labs can wake from one state at once, and none of
//! them changes it. The state is saved before the host's files are mounted,
//! because a mounted 9p cannot be saved.

use std::path::{Path, PathBuf};

use crate::cache::{self, Fingerprint};
use crate::config::Config;
use crate::error::LabError;
use crate::initramfs;
use crate::kernel::Kernel;
use crate::machine::{self, Machine, Memory};
use crate::progress::Step;
use crate::session::Session;
use crate::wire;

/// States that nobody woke for so long are removed when another is made.
const KEEP_UNUSED: std::time::Duration = std::time::Duration::from_secs(3 * 24 * 3600);

/// The initial file system it booted with: in the memory already, but QEMU
/// insists on the same machine.
const INITRAMFS: &str = "initramfs";

/// Wakes the state for this configuration; makes it first if there is none.
pub(crate) fn wake(qemu: &Path, config: &Config, kernel: &Kernel) -> Result<Session, LabError> {
    let folder = folder_for(qemu, config, kernel)?;
    let made = cache::make_once(&folder, |draft| {
        let _step = Step::begin("Booting the lab once, to save its state for later runs");
        remove_unused(&folder);
        make(qemu, config, kernel, draft)
    })?;
    match wake_from(qemu, config, kernel, &folder) {
        Err(error) if !made => {
            // A state that worked once and does not now: damaged, or of a
            // QEMU that changed behind its file's back. Make it anew, once.
            eprintln!("dune lab: the saved state cannot be used ({error}); making it again");
            let _ = std::fs::remove_dir_all(&folder);
            cache::make_once(&folder, |draft| make(qemu, config, kernel, draft))?;
            wake_from(qemu, config, kernel, &folder)
        }
        result => result,
    }
}

fn folder_for(qemu: &Path, config: &Config, kernel: &Kernel) -> Result<PathBuf, LabError> {
    let mut key = Fingerprint::new()
        .file(qemu)?
        .file(&kernel.image)?
        .bytes(initramfs::AGENT)
        .bytes(&wire::VERSION.to_le_bytes())
        .bytes(machine::describe(config).as_bytes())
        .bytes(host_cpu().as_bytes());
    for module in &kernel.modules {
        key = key.bytes(module.as_os_str().as_encoded_bytes());
    }
    let mut name = machine::short_name(config).into_os_string();
    name.push(format!("-{}", key.hex()));
    Ok(cache::folder("states")?.join(name))
}

/// The host's CPU: the guest remembers the frequency of its TSC.
fn host_cpu() -> String {
    std::fs::read_to_string("/proc/cpuinfo")
        .unwrap_or_default()
        .lines()
        .find(|line| line.starts_with("model name"))
        .unwrap_or_default()
        .to_owned()
}

fn make(qemu: &Path, config: &Config, kernel: &Kernel, draft: &Path) -> Result<(), LabError> {
    let ram = draft.join("ram");
    let initramfs = draft.join(INITRAMFS);
    initramfs::write(&kernel.modules, &initramfs)?;
    let mut session = Session::boot(qemu, config, kernel, &initramfs, Memory::Saving(&ram))?;
    session.machine().save(&draft.join("devices"))
}

fn wake_from(
    qemu: &Path,
    config: &Config,
    kernel: &Kernel,
    folder: &Path,
) -> Result<Session, LabError> {
    let ram = folder.join("ram");
    let initramfs = folder.join(INITRAMFS);
    let mut machine = Machine::start(
        qemu,
        config,
        &kernel.image,
        &initramfs,
        Memory::Waking(&ram),
    )?;
    machine.wake(&folder.join("devices"))?;
    // Its time says when it was used last.
    let _ = std::fs::File::create(folder.join("used"));
    Session::around(machine, config)
}

/// Removes states that are no longer used: those of older kernels, emulators
/// and versions of the lab. A lab that runs from one keeps its memory.
fn remove_unused(except: &Path) {
    let Some(Ok(entries)) = except.parent().map(std::fs::read_dir) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let old = path
            .join("used")
            .metadata()
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|time| time.elapsed().is_ok_and(|age| age > KEEP_UNUSED));
        if old && path != except {
            let _ = std::fs::remove_dir_all(&path);
            let _ = std::fs::remove_file(path.with_added_extension("lock"));
        }
    }
}
