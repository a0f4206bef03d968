//! The programs the lab needs from the system: found, or installed on Debian.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{LabError, io_error};
use crate::progress::Step;

/// A program and the Debian package it comes in.
#[derive(Clone, Copy, Debug)]
pub struct Tool {
    /// The program's name, as looked up in PATH.
    pub program: &'static str,
    /// The Debian package that has it.
    pub package: &'static str,
}

/// The emulator.
pub const QEMU: Tool = Tool {
    program: "qemu-system-x86_64",
    package: "qemu-system-x86",
};
/// Unpacks kernels and modules.
pub const XZ: Tool = Tool {
    program: "xz",
    package: "xz-utils",
};
/// Unpacks kernels and modules of some distributions.
pub const ZSTD: Tool = Tool {
    program: "zstd",
    package: "zstd",
};
/// Unpacks kernels of some distributions.
pub const LZ4: Tool = Tool {
    program: "lz4",
    package: "lz4",
};
/// Unpacks kernels of some distributions.
pub const GZIP: Tool = Tool {
    program: "gzip",
    package: "gzip",
};

impl Tool {
    /// The program's path, if it is installed.
    ///
    /// The administrator's folders are searched besides PATH.
    #[must_use]
    pub fn find(self) -> Option<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
            .filter(|folder| folder.is_absolute())
            .map(|folder| folder.join(self.program))
            .find(|candidate| is_executable(candidate))
    }

    /// The program's path; installs its package first where that is possible
    /// (root on a system with apt).
    ///
    /// # Errors
    ///
    /// [`LabError::Missing`] with the command to type when it is not possible,
    /// [`LabError::Tool`] when the package manager failed.
    pub fn require(self) -> Result<PathBuf, LabError> {
        if let Some(path) = self.find() {
            return Ok(path);
        }
        install(&[self.package])?;
        self.find().ok_or_else(|| LabError::Missing {
            what: self.program.to_owned(),
            remedy: format!(
                "the package {} was installed but does not contain it; install it by hand",
                self.package
            ),
        })
    }
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// Installs Debian packages with apt.
///
/// # Errors
///
/// [`LabError::Missing`] naming the command to type where this process cannot
/// install (not root, or no apt), [`LabError::Tool`] when apt failed.
pub fn install(packages: &[&str]) -> Result<(), LabError> {
    let list = packages.join(" ");
    let apt = Path::new("/usr/bin/apt-get");
    if !apt.exists() {
        return Err(LabError::Missing {
            what: list.clone(),
            remedy: format!(
                "this system has no apt: install your distribution's counterpart of the Debian \
                 package {list}"
            ),
        });
    }
    if !rustix::process::geteuid().is_root() {
        return Err(LabError::Missing {
            what: list.clone(),
            remedy: format!(
                "type: sudo apt-get install --no-install-recommends {list}  (or run this command \
                 once as root)"
            ),
        });
    }
    let _step = Step::begin(format!("Installing the Debian package {list}"));
    let attempt = || {
        let mut command = Command::new(apt);
        command
            .args(["-q", "-y", "-o", "DPkg::Lock::Timeout=300"])
            .args(["install", "--no-install-recommends"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive");
        output_of(&mut command)
    };
    // Fresh machines and containers come without package lists.
    attempt().or_else(|_| {
        update_package_lists()?;
        attempt()
    })?;
    Ok(())
}

/// Fetches apt's package lists.
pub(crate) fn update_package_lists() -> Result<(), LabError> {
    let mut command = Command::new("apt-get");
    command.args(["-q", "-o", "DPkg::Lock::Timeout=300", "update"]);
    output_of(&mut command).map(drop)
}

/// Runs a command to its end; its standard output, or its complaints.
pub(crate) fn output_of(command: &mut Command) -> Result<Vec<u8>, LabError> {
    command.env("LC_ALL", "C").stdin(Stdio::null());
    let words = || {
        let words: Vec<_> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(OsStr::to_string_lossy)
            .collect();
        words.join(" ")
    };
    let line = words();
    let output = command
        .output()
        .map_err(io_error(format!("start `{line}`")))?;
    if !output.status.success() {
        let mut said = String::from_utf8_lossy(&output.stderr).into_owned();
        if said.trim().is_empty() {
            said = String::from_utf8_lossy(&output.stdout).into_owned();
        }
        return Err(LabError::Tool {
            command: format!("`{line}`"),
            output: last_lines(&said, 20),
        });
    }
    Ok(output.stdout)
}

/// The last `count` lines of a text.
pub(crate) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
