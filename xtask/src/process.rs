//! Running other programs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// The root of the workspace.
pub(crate) fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask is a folder of the workspace")
        .to_owned()
}

/// The cargo that runs this program, in the root of the workspace.
pub(crate) fn cargo() -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(workspace());
    // Set by the outer cargo for this program; the inner one chooses for itself.
    for name in ["CARGO_MANIFEST_DIR", "CARGO_PKG_NAME", "CARGO_PKG_VERSION"] {
        command.env_remove(name);
    }
    command
}

/// The folder that cargo builds into.
pub(crate) fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// Runs a command with this program's streams.
pub(crate) fn succeed(command: &mut Command) -> Result<()> {
    if !try_run(command)? {
        bail!("`{}` failed", line(command));
    }
    Ok(())
}

/// Runs a command with this program's streams; whether it succeeded.
pub(crate) fn try_run(command: &mut Command) -> Result<bool> {
    let status = command
        .status()
        .with_context(|| format!("start `{}`", line(command)))?;
    Ok(status.success())
}

/// The command as a person would type it, without its path.
pub(crate) fn line(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    std::iter::once(name)
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Kills every process that this one, a child of ours, has started, but not itself.
pub(crate) fn kill_descendants(of: u32) {
    let mut doomed = Vec::new();
    loop {
        let found = descendants(of);
        if found == doomed {
            break;
        }
        // One that is stopped starts no other, which nobody would find when its parent is gone.
        found.iter().for_each(|&id| send(id, Signal::STOP));
        doomed = found;
    }
    // The deepest first: none of them sees a child die and starts another.
    doomed.into_iter().rev().for_each(kill);
}

/// Parents before their children.
fn descendants(of: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = processes()
        .into_iter()
        .filter_map(|id| Some((id, parent_of(id)?)))
        .collect();
    let mut found = vec![of];
    let mut next = 0;
    while let Some(&parent) = found.get(next) {
        next += 1;
        let children = parents.iter().filter(|pair| pair.1 == parent);
        found.extend(children.map(|pair| pair.0));
    }
    found.split_off(1)
}

/// All that there are now, by their ids.
pub(crate) fn processes() -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// Kills a process, unless it has ended by itself.
pub(crate) fn kill(id: u32) {
    send(id, Signal::KILL);
}

fn send(id: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(id).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// The fourth field of `/proc/PID/stat`, behind a name that may hold anything.
fn parent_of(id: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descendants_die_and_the_child_goes_on() {
        let mut child = Command::new("sh")
            .args(["-c", "sh -c 'sleep 300; :'; exit 7"])
            .spawn()
            .unwrap();
        let id = child.id();
        let started = std::time::Instant::now();
        while child.try_wait().unwrap().is_none() && started.elapsed().as_secs() < 60 {
            kill_descendants(id);
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        // Otherwise it ends by itself, minutes later, with the same code.
        assert!(started.elapsed().as_secs() < 60, "the grandchild lives");
        assert_eq!(child.wait().unwrap().code(), Some(7));
    }
}
