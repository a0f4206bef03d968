//! From the first instruction of the guest's first process to its being ready
//! for a command.

use std::ffi::CString;
use std::fs::{self, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::sys;
use crate::wire::{Request, Root};

/// Where the kernel modules lie in the initial RAM file system; the file
/// `list` names them in the order of loading.
const MODULES: &str = "/modules";

/// `msize` is the largest that virtio carries; `loose` because the host's
/// files are taken as unchanging while the guest runs.
const ROOT_OPTIONS: &str = "trans=virtio,version=9p2000.L,msize=512000,cache=loose";
/// Shared folders are written back at once, but can be mapped.
const SHARE_OPTIONS: &str = "trans=virtio,version=9p2000.L,msize=512000,cache=mmap";

/// An error with the step that failed in front.
pub(crate) fn during(step: impl AsRef<str>) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", step.as_ref()))
}

/// Mounts the kernel's own file systems and loads the modules.
pub(crate) fn devices() -> io::Result<()> {
    for (kind, target, options) in [
        ("devtmpfs", "/dev", "mode=755"),
        ("proc", "/proc", ""),
        ("sysfs", "/sys", ""),
        ("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", "mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", ""),
    ] {
        if target.starts_with("/dev/") {
            fs::create_dir_all(target).map_err(during(target))?;
        }
        let mounted = sys::mount(kind, target, kind, sys::MS_NOSUID, options);
        // Control groups are a convenience that a kernel may lack.
        if kind != "cgroup2" {
            mounted.map_err(during(format!("mount {target}")))?;
        }
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        if !Path::new(link).exists() {
            std::os::unix::fs::symlink(target, link).map_err(during(link))?;
        }
    }
    load_modules()?;
    // Kernels without KVM can still run everything that does not need ring 0.
    if Path::new("/dev/kvm").exists() {
        fs::set_permissions("/dev/kvm", Permissions::from_mode(0o666))
            .map_err(during("/dev/kvm"))?;
    }
    sys::loopback_up().map_err(during("loopback interface"))
}

fn load_modules() -> io::Result<()> {
    let folder = Path::new(MODULES);
    let list = fs::read_to_string(folder.join("list")).map_err(during("module list"))?;
    for line in list.lines() {
        let (name, parameters) = line.split_once(' ').unwrap_or((line, ""));
        let image = fs::read(folder.join(name)).map_err(during(format!("read {name}")))?;
        let parameters = CString::new(parameters)?;
        match sys::init_module(&image, &parameters) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            // kvm-amd on a machine without SVM: the lab is still a lab.
            Err(error) if name.starts_with("kvm") => eprintln!("agent: {name}: {error}"),
            result => result.map_err(during(format!("load {name}")))?,
        }
    }
    Ok(())
}

/// Brings the guest up to date with the host and moves it into its root file
/// system. Done once, when the first command arrives: what came before may
/// have been saved long ago, and a mounted 9p cannot be saved.
pub(crate) fn adopt(request: &Request) -> io::Result<()> {
    sys::set_clock(request.clock_seconds, request.clock_nanoseconds).map_err(during("clock"))?;
    if !request.entropy.is_empty() {
        let urandom = OpenOptions::new()
            .write(true)
            .open("/dev/urandom")
            .map_err(during("/dev/urandom"))?;
        sys::seed_random(&urandom, &request.entropy).map_err(during("random seed"))?;
    }
    fs::write("/proc/sys/kernel/hostname", &request.hostname).map_err(during("host name"))?;
    match request.root {
        Root::Initramfs => Ok(()),
        Root::Host => host_root(request),
    }
}

fn host_root(request: &Request) -> io::Result<()> {
    for folder in ["/host", "/writes", "/newroot"] {
        fs::create_dir_all(folder).map_err(during(folder))?;
    }
    sys::mount("root", "/host", "9p", sys::MS_RDONLY, ROOT_OPTIONS)
        .map_err(during("mount the host's files"))?;
    sys::mount("tmpfs", "/writes", "tmpfs", 0, "mode=755,size=75%")
        .map_err(during("mount the folder of writes"))?;
    fs::create_dir("/writes/upper").map_err(during("/writes/upper"))?;
    fs::create_dir("/writes/work").map_err(during("/writes/work"))?;
    let layers = "lowerdir=/host,upperdir=/writes/upper,workdir=/writes/work";
    sys::mount("overlay", "/newroot", "overlay", 0, layers).map_err(during("overlay"))?;
    for folder in ["dev", "proc", "sys"] {
        let target = format!("/newroot/{folder}");
        fs::create_dir_all(&target).map_err(during(&target))?;
        sys::mount(&format!("/{folder}"), target.as_str(), "", sys::MS_MOVE, "")
            .map_err(during(target))?;
    }
    // What switch_root does: a mere chroot would forbid user namespaces.
    std::env::set_current_dir("/newroot").map_err(during("/newroot"))?;
    sys::mount(".", "/", "", sys::MS_MOVE, "").map_err(during("move the root"))?;
    sys::chroot_here().map_err(during("chroot"))?;
    std::env::set_current_dir("/")?;
    for share in &request.shares {
        let tag = String::from_utf8_lossy(&share.tag);
        let path = String::from_utf8_lossy(&share.path);
        sys::mount(&tag, share.path.as_slice(), "9p", 0, SHARE_OPTIONS)
            .map_err(during(format!("mount the shared folder {path}")))?;
    }
    Ok(())
}
