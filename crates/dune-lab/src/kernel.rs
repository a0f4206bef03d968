//! The guest's kernel: fetched from Debian or given by the user, decompressed,
//! with the modules the lab needs.
//!
//! A kernel is prepared once and kept in the cache: decompressing it saves
//! half of each boot (it then starts by the PVH entry), and only a dozen of
//! its thousands of modules are needed.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cache::{self, Fingerprint};
use crate::error::{LabError, io_error};
use crate::progress::Step;
use crate::tools::{self, GZIP, LZ4, Tool, XZ, ZSTD};

/// Debian's package that always depends on the newest kernel of the release.
/// The generic flavour: the one for clouds has no 9p.
const DEBIAN_PACKAGE: &str = "linux-image-amd64";

/// The modules to load, by name; those they depend on come before them.
const WANTED_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "kvm-amd",
];

/// Modules kept with the kernel, but loaded only on an emulated Intel CPU.
const INTEL_MODULES: &[&str] = &["kvm-intel"];

/// Raised when what is kept of a kernel changes.
const LAYOUT: u32 = 2;

/// A kernel made ready for the lab.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The image to boot: decompressed where the kernel can start that way.
    pub image: PathBuf,
    /// Its release, as `uname -r` would say.
    pub release: String,
    /// The modules in the order of loading, as files that are not compressed.
    pub modules: Vec<PathBuf>,
    /// `kvm-intel` with what it depends on, for an emulated Intel CPU.
    pub intel_modules: Vec<PathBuf>,
}

impl Kernel {
    /// The user's kernel, or the newest of this Debian release.
    ///
    /// # Errors
    ///
    /// [`LabError::Kernel`] when the image cannot be used, [`LabError::Missing`]
    /// with the remedy when none can be had.
    pub fn get(chosen: Option<&Path>) -> Result<Kernel, LabError> {
        match chosen {
            Some(image) => Kernel::from_image(image),
            None => Kernel::from_debian(),
        }
    }

    fn from_debian() -> Result<Kernel, LabError> {
        let folder = cache::folder("kernels")?.join(format!("debian-{LAYOUT}"));
        cache::make_once(&folder, |draft| {
            let unpacked = tempfile::tempdir_in(draft).map_err(io_error("temporary folder"))?;
            fetch_debian_kernel(unpacked.path())?;
            let boot = unpacked.path().join("boot");
            let image = find_file(&boot, |name| name.starts_with("vmlinuz-")).ok_or_else(|| {
                LabError::Kernel {
                    path: boot,
                    reason: "the package has no vmlinuz".to_owned(),
                }
            })?;
            let release = release_of(&image)?;
            // Merged /usr: newer packages put modules below /usr/lib.
            let modules = ["lib/modules", "usr/lib/modules"]
                .map(|root| unpacked.path().join(root).join(&release))
                .into_iter()
                .find(|path| path.is_dir());
            prepare(&image, &release, modules.as_deref(), draft)
        })?;
        Kernel::load(&folder)
    }

    fn from_image(image: &Path) -> Result<Kernel, LabError> {
        let image = fs::canonicalize(image).map_err(|error| LabError::Kernel {
            path: image.to_owned(),
            reason: format!("{error}; name a file such as /boot/vmlinuz-6.1.0-amd64"),
        })?;
        let key = Fingerprint::new().file(&image)?.hex();
        let folder = cache::folder("kernels")?.join(format!("own-{LAYOUT}-{key}"));
        cache::make_once(&folder, |draft| {
            let release = release_of(&image)?;
            let modules = Path::new("/lib/modules").join(&release);
            prepare(
                &image,
                &release,
                modules.is_dir().then_some(modules.as_path()),
                draft,
            )
        })?;
        Kernel::load(&folder)
    }

    fn load(folder: &Path) -> Result<Kernel, LabError> {
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(&path).map_err(io_error(format!("read {}", path.display())))
        };
        let list = |name: &str| -> Result<Vec<PathBuf>, LabError> {
            let modules = folder.join("modules");
            Ok(read(name)?.lines().map(|line| modules.join(line)).collect())
        };
        Ok(Kernel {
            image: folder.join("image"),
            release: read("release")?,
            modules: list("modules.list")?,
            intel_modules: list("modules.intel.list")?,
        })
    }
}

/// Downloads the package without installing it and unpacks it into `target`.
fn fetch_debian_kernel(target: &Path) -> Result<(), LabError> {
    let remedy = || LabError::Missing {
        what: format!("a kernel image (Debian's {DEBIAN_PACKAGE})"),
        remedy: "this system has no apt and dpkg to fetch it with: give a kernel with --kernel, \
                 for example --kernel /boot/vmlinuz-$(uname -r)"
            .to_owned(),
    };
    let apt = Tool {
        program: "apt-get",
        package: "apt",
    };
    let dpkg = Tool {
        program: "dpkg",
        package: "dpkg",
    };
    if apt.find().is_none() || dpkg.find().is_none() {
        return Err(remedy());
    }
    let package = match newest_debian_kernel() {
        Ok(package) => package,
        Err(error) if !rustix::process::geteuid().is_root() => return Err(error),
        Err(_) => {
            let _step = Step::begin("Fetching the package lists");
            tools::update_package_lists()?;
            newest_debian_kernel()?
        }
    };
    let _step = Step::begin(format!(
        "Fetching the Debian package {package} (for the lab only)"
    ));
    let mut download = Command::new("apt-get");
    // As root apt would switch to a user that cannot write here.
    download
        .args(["-q", "-o", "APT::Sandbox::User=root", "download", &package])
        .current_dir(target);
    tools::output_of(&mut download)?;
    let archive = find_file(target, |name| name.ends_with(".deb")).ok_or_else(remedy)?;
    let mut unpack = Command::new("dpkg");
    unpack.arg("-x").arg(&archive).arg(target);
    tools::output_of(&mut unpack).map(drop)
}

fn newest_debian_kernel() -> Result<String, LabError> {
    let mut query = Command::new("apt-cache");
    query.args(["depends", DEBIAN_PACKAGE]);
    let said = tools::output_of(&mut query)?;
    String::from_utf8_lossy(&said)
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .map(str::to_owned)
        .ok_or_else(|| LabError::Missing {
            what: format!("Debian's package {DEBIAN_PACKAGE}"),
            remedy: "type: sudo apt-get update; or give a kernel with --kernel".to_owned(),
        })
}

fn find_file(folder: &Path, wanted: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .ok()?
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(&wanted))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found.pop()
}

/// Writes what the lab needs of a kernel into `target`.
fn prepare(
    image: &Path,
    release: &str,
    modules: Option<&Path>,
    target: &Path,
) -> Result<(), LabError> {
    let _step = Step::begin(format!("Preparing the kernel {release} for the lab"));
    let write = |name: &str, bytes: &[u8]| {
        let path = target.join(name);
        fs::write(&path, bytes).map_err(io_error(format!("write {}", path.display())))
    };
    let compressed = fs::read(image).map_err(io_error(format!("read {}", image.display())))?;
    match decompress_image(&compressed).filter(|vmlinux| starts_by_pvh(vmlinux)) {
        Some(vmlinux) => write("image", &vmlinux)?,
        // Slower, but every kernel starts this way.
        None => write("image", &compressed)?,
    }
    write("release", release.as_bytes())?;
    let folder = target.join("modules");
    fs::create_dir(&folder).map_err(io_error("create the folder of modules"))?;
    let missing = |module: &str| LabError::Kernel {
        path: image.to_owned(),
        reason: format!(
            "its module {module} was not found below {}; install the kernel's modules",
            modules.map_or_else(
                || format!("/lib/modules/{release}"),
                |path| path.display().to_string()
            ),
        ),
    };
    let tree = match modules {
        Some(root) => ModuleTree::read(root)?,
        None => ModuleTree::default(),
    };
    let list = |wanted: &[&str]| -> Result<String, LabError> {
        let mut order = Vec::new();
        for module in wanted {
            tree.collect(&normalised(module), &folder, &mut order, &missing)?;
        }
        Ok(order.iter().map(|name| format!("{name}.ko\n")).collect())
    };
    let amd = list(WANTED_MODULES)?;
    write("modules.list", amd.as_bytes())?;
    let intel = list(INTEL_MODULES)?;
    write("modules.intel.list", intel.as_bytes())
}

/// The kernel's release, from the header of a bzImage.
///
/// The boot protocol keeps, at 0x20e, the offset of the version string less
/// 0x200.
fn release_of(image: &Path) -> Result<String, LabError> {
    let unusable = |reason: &str| LabError::Kernel {
        path: image.to_owned(),
        reason: reason.to_owned(),
    };
    let mut header = vec![0; 0x8000];
    let mut file =
        File::open(image).map_err(|error| unusable(&format!("{error}; is it readable to you?")))?;
    let mut filled = 0;
    while filled < header.len() {
        match file.read(&mut header[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) => return Err(unusable(&error.to_string())),
        }
    }
    header.truncate(filled);
    release_in_header(&header)
        .ok_or_else(|| unusable("it is not a bzImage; give a vmlinuz file of Linux for x86-64"))
}

fn release_in_header(header: &[u8]) -> Option<String> {
    if header.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let offset = usize::from(u16_at(header, 0x20e)?) + 0x200;
    let text = header.get(offset..)?;
    let end = text.iter().position(|byte| matches!(byte, 0 | b' '))?;
    let release = std::str::from_utf8(&text[..end]).ok()?;
    // It becomes part of a path.
    let plain = |c: char| c.is_ascii_alphanumeric() || "._+-~".contains(c);
    (!release.is_empty() && release.chars().all(plain)).then(|| release.to_owned())
}

/// The ELF image inside a bzImage.
fn decompress_image(image: &[u8]) -> Option<Vec<u8>> {
    let setup_sectors = match *image.get(0x1f1)? {
        0 => 4,
        count => usize::from(count),
    };
    let offset = usize::try_from(u32_at(image, 0x248)?).ok()?;
    let length = usize::try_from(u32_at(image, 0x24c)?).ok()?;
    let start = ((setup_sectors + 1) * 512).checked_add(offset)?;
    let payload = image.get(start..start.checked_add(length)?)?;
    if payload.starts_with(b"\x7fELF") {
        return Some(payload.to_vec());
    }
    // The last four bytes are the size after decompression, not part of the
    // compressed stream; gzip ends with the same four bytes of its own.
    let stream = if payload.starts_with(b"\x1f\x8b") {
        payload
    } else {
        &payload[..payload.len().checked_sub(4)?]
    };
    decompress(stream).ok().flatten()
}

/// Decompresses what begins with a magic number known here; `None` if it does
/// not.
fn decompress(bytes: &[u8]) -> Result<Option<Vec<u8>>, LabError> {
    let tool = match bytes {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => XZ,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ZSTD,
        [0x02, 0x21, 0x4c, 0x18, ..] => LZ4,
        [0x1f, 0x8b, ..] => GZIP,
        _ => return Ok(None),
    };
    let program = tool.require()?;
    let mut child = Command::new(&program)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(io_error(format!("start {}", program.display())))?;
    let mut out = Vec::new();
    if let (Some(mut stdin), Some(mut stdout)) = (child.stdin.take(), child.stdout.take()) {
        std::thread::scope(|scope| {
            // It may stop reading early; whether it liked its input, its
            // output and exit status say.
            scope.spawn(move || stdin.write_all(bytes));
            stdout.read_to_end(&mut out)
        })
        .map_err(io_error(format!("read from {}", program.display())))?;
    }
    let status = child
        .wait()
        .map_err(io_error(format!("wait for {}", program.display())))?;
    Ok((status.success() && !out.is_empty()).then_some(out))
}

/// Whether an ELF kernel has the note that names its PVH entry point
/// (`XEN_ELFNOTE_PHYS32_ENTRY`, 18, of the vendor "Xen").
fn starts_by_pvh(elf: &[u8]) -> bool {
    const PT_NOTE: u32 = 4;
    const PHYS32_ENTRY: u32 = 18;
    let find = || -> Option<bool> {
        let table = usize::try_from(u64_at(elf, 32)?).ok()?;
        let size = usize::from(u16_at(elf, 54)?);
        let count = usize::from(u16_at(elf, 56)?);
        for index in 0..count {
            let header = table.checked_add(index.checked_mul(size)?)?;
            if u32_at(elf, header)? != PT_NOTE {
                continue;
            }
            let offset = usize::try_from(u64_at(elf, header + 8)?).ok()?;
            let length = usize::try_from(u64_at(elf, header + 32)?).ok()?;
            let mut notes = elf.get(offset..offset.checked_add(length)?)?;
            while let (Some(name), Some(description), Some(kind)) =
                (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8))
            {
                let padded = |length: u32| usize::try_from(length.next_multiple_of(4)).ok();
                if kind == PHYS32_ENTRY && notes.get(12..16) == Some(b"Xen\0") {
                    return Some(true);
                }
                let next = 12 + padded(name)? + padded(description)?;
                notes = notes.get(next..)?;
            }
        }
        Some(false)
    };
    find().unwrap_or(false)
}

pub(crate) fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    let field = bytes.get(offset..)?.first_chunk()?;
    Some(u16::from_le_bytes(*field))
}

pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let field = bytes.get(offset..)?.first_chunk()?;
    Some(u32::from_le_bytes(*field))
}

pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    let field = bytes.get(offset..)?.first_chunk()?;
    Some(u64::from_le_bytes(*field))
}

/// Module names use `-` and `_` as one.
fn normalised(name: &str) -> String {
    name.replace('-', "_")
}

/// All modules of a kernel by name. Read from the folder itself: a package
/// that was unpacked but not installed has no `modules.dep`.
#[derive(Debug, Default)]
struct ModuleTree {
    files: std::collections::HashMap<String, PathBuf>,
    builtin: std::collections::HashSet<String>,
}

impl ModuleTree {
    fn read(root: &Path) -> Result<ModuleTree, LabError> {
        let mut tree = ModuleTree::default();
        let mut folders = vec![root.join("kernel")];
        while let Some(folder) = folders.pop() {
            let entries = fs::read_dir(&folder)
                .map_err(io_error(format!("read the folder {}", folder.display())))?;
            for entry in entries.flatten() {
                let path = entry.path();
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(path);
                } else if let Some((name, _)) = entry
                    .file_name()
                    .to_str()
                    .and_then(|name| name.split_once(".ko"))
                {
                    tree.files.insert(normalised(name), path);
                }
            }
        }
        let builtin = fs::read_to_string(root.join("modules.builtin")).unwrap_or_default();
        tree.builtin = builtin
            .lines()
            .filter_map(|line| line.rsplit('/').next()?.strip_suffix(".ko"))
            .map(normalised)
            .collect();
        Ok(tree)
    }

    /// Writes `module` and, before it, all it depends on, into `folder`, and
    /// appends their names to `order`.
    fn collect(
        &self,
        module: &str,
        folder: &Path,
        order: &mut Vec<String>,
        missing: &impl Fn(&str) -> LabError,
    ) -> Result<(), LabError> {
        if order.iter().any(|name| name == module) || self.builtin.contains(module) {
            return Ok(());
        }
        let file = self.files.get(module).ok_or_else(|| missing(module))?;
        let packed = fs::read(file).map_err(io_error(format!("read {}", file.display())))?;
        let mut image = match decompress(&packed)? {
            Some(unpacked) => unpacked,
            None => packed,
        };
        strip_signature(&mut image);
        for dependency in dependencies(&image) {
            self.collect(&dependency, folder, order, missing)?;
        }
        let target = folder.join(format!("{module}.ko"));
        fs::write(&target, &image).map_err(io_error(format!("write {}", target.display())))?;
        order.push(module.to_owned());
        Ok(())
    }
}

/// Takes the signature off a module. The guest's kernel loads it all the same,
/// and does not hash a megabyte of code under emulation first.
///
/// ```text
///   module | signature | struct module_signature (12 bytes) | marker
///                        last 4: length of the signature, big-endian
/// ```
fn strip_signature(image: &mut Vec<u8>) {
    const MARKER: &[u8] = b"~Module signature appended~\n";
    const HEADER: usize = 12;
    let Some(signed) = image.strip_suffix(MARKER) else {
        return;
    };
    let Some((_, length)) = signed.split_last_chunk() else {
        return;
    };
    let length = u32::from_be_bytes(*length) as usize;
    if let Some(end) = signed.len().checked_sub(HEADER + length) {
        image.truncate(end);
    }
}

/// The modules that a module needs, from the string `depends=a,b` of its
/// `.modinfo` section.
fn dependencies(image: &[u8]) -> Vec<String> {
    image
        .split(|byte| *byte == 0)
        .filter_map(|string| string.strip_prefix(b"depends="))
        .filter_map(|list| std::str::from_utf8(list).ok())
        .flat_map(|list| list.split(','))
        .filter(|name| !name.is_empty())
        .map(normalised)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_comes_from_the_header() {
        let mut header = vec![0; 0x400];
        header[0x202..0x206].copy_from_slice(b"HdrS");
        header[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        header[0x300..0x30f].copy_from_slice(b"6.1.0-9-amd64 (");
        assert_eq!(release_in_header(&header).unwrap(), "6.1.0-9-amd64");
        header[0x300..0x303].copy_from_slice(b"../");
        assert_eq!(release_in_header(&header), None);
        assert_eq!(release_in_header(b"short"), None);
    }

    #[test]
    fn dependencies_come_from_modinfo() {
        let image = b"\x7fELF\0license=GPL\0depends=9pnet,netfs\0name=9p\0depends=\0";
        assert_eq!(dependencies(image), ["9pnet", "netfs"]);
    }

    #[test]
    fn signatures_come_off() {
        let mut image = b"\x7fELFcode".to_vec();
        let plain = image.clone();
        strip_signature(&mut image);
        assert_eq!(image, plain);
        image.extend_from_slice(b"signature");
        image.extend_from_slice(&[0; 8]);
        image.extend_from_slice(&9_u32.to_be_bytes());
        image.extend_from_slice(b"~Module signature appended~\n");
        strip_signature(&mut image);
        assert_eq!(image, plain);
    }

    #[test]
    fn broken_images_are_refused_without_panic() {
        for length in [0, 1, 0x1f1, 0x1f2, 0x248, 0x250, 4096] {
            let image = vec![0xff; length];
            assert!(decompress_image(&image).is_none());
            assert!(!starts_by_pvh(&image));
        }
    }
}
