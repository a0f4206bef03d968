//! What goes wrong has the exit code of a shell, the errno of Linux, and one
//! line of explanation.

use std::ffi::{CString, OsStr};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use dune_loader::{ImageError, Program, SCRIPT_DEPTH_LIMIT, find_command};
use rustix::io::Errno;
use tempfile::TempDir;

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>, mode: u32) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    fn program(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        self.file(name, content, 0o755)
    }
}

fn open(path: &Path) -> Result<Program, ImageError> {
    Program::open(path, vec![c"zero".into(), c"one".into()])
}

/// Asserts that opening fails as stated, and that the message has the words.
fn assert_fails(path: &Path, errno: Errno, exit_code: u8, words: &[&str]) {
    let error = open(path).unwrap_err();
    let message = error.to_string();
    assert_eq!(error.errno(), errno, "{message}");
    assert_eq!(error.exit_code(), exit_code, "{message}");
    assert!(!message.contains('\n'), "{message}");
    for word in words {
        assert!(
            message.contains(word),
            "{message:?} does not contain {word:?}"
        );
    }
}

#[test]
fn what_does_not_exist_is_127() {
    let folder = Folder::new();
    assert_fails(
        &folder.path("absent"),
        Errno::NOENT,
        127,
        &["absent", "no such file"],
    );
    assert_fails(Path::new(""), Errno::NOENT, 127, &["\"\""]);
    symlink("nowhere", folder.path("dangling")).unwrap();
    assert_fails(
        &folder.path("dangling"),
        Errno::NOENT,
        127,
        &["no such file"],
    );
}

#[test]
fn what_is_no_program_is_126() {
    let folder = Folder::new();
    let script = folder.program("script", "#!/bin/sh\n");
    assert_fails(folder.0.path(), Errno::ACCESS, 126, &["is a folder"]);
    assert_fails(Path::new("/dev/null"), Errno::ACCESS, 126, &["device"]);
    assert_fails(&script.join("x"), Errno::NOTDIR, 126, &["not a folder"]);
    symlink("loop", folder.path("loop")).unwrap();
    assert_fails(&folder.path("loop"), Errno::LOOP, 126, &["symbolic links"]);
    assert_fails(
        &folder.path(&"x".repeat(300)),
        Errno::NAMETOOLONG,
        126,
        &["too long"],
    );
    let plain = folder.file("plain", "#!/bin/sh\n", 0o644);
    assert_fails(&plain, Errno::ACCESS, 126, &["not executable", "chmod +x"]);
    assert_fails(
        &folder.program("line\nbreak\x1b", ""),
        Errno::NOEXEC,
        126,
        &["line\\nbreak"],
    );
}

#[test]
fn other_formats_are_named() {
    let folder = Folder::new();
    let fails = |content: &[u8], words: &[&str]| {
        assert_fails(&folder.program("file", content), Errno::NOEXEC, 126, words);
    };
    fails(b"", &["is empty"]);
    fails(b"echo hello\n", &["without a `#!` line", "`sh /"]);
    fails(b"MZ\x90\0", &["Windows"]);
    fails(b"\x1f\x8b\x08\0", &["gzip"]);
    fails(b"\0\0\0\0", &["unknown format"]);
    fails(b"\x7fELF", &["truncated"]);
    let mut arm = fs::read("/proc/self/exe").unwrap();
    arm.truncate(4096);
    fails(&arm, &["truncated", "a segment"]);
    arm[18..20].copy_from_slice(&183u16.to_le_bytes());
    fails(&arm, &["AArch64"]);
}

#[test]
fn a_bad_first_line_is_explained() {
    let folder = Folder::new();
    let script = |line: &str| folder.program("script", line);
    assert_fails(
        &script("#!\n"),
        Errno::NOEXEC,
        126,
        &["names no interpreter"],
    );
    let long = format!("#!/{}\n", "x".repeat(300));
    assert_fails(&script(&long), Errno::NOEXEC, 126, &["256"]);
    assert_fails(
        &script("#!/no/such -x\n"),
        Errno::NOENT,
        127,
        &["script", "/no/such:", "no such"],
    );
    assert_fails(&script("#!/bin/sh\r\n"), Errno::NOENT, 127, &["/bin/sh\\r"]);
    assert_fails(
        &script("#!/tmp\n"),
        Errno::ACCESS,
        126,
        &["/tmp: is a folder"],
    );
}

#[test]
fn scripts_may_be_interpreters_to_a_depth() {
    let folder = Folder::new();
    let mut interpreter = PathBuf::from("/bin/sh");
    let mut names = Vec::new();
    for level in 1..=SCRIPT_DEPTH_LIMIT + 1 {
        let line = format!("#!{} {level}\n", interpreter.display());
        interpreter = folder.program(&format!("level{level}"), line);
        names.push(interpreter.clone());
        if level <= SCRIPT_DEPTH_LIMIT {
            let program = open(&interpreter).unwrap();
            assert_eq!(program.image.path, Path::new("/bin/sh"));
            assert_eq!(
                program.filename.as_bytes(),
                interpreter.to_str().unwrap().as_bytes()
            );
            assert_eq!(program.argv.len(), 2 * level + 2, "{:?}", program.argv);
        }
    }
    assert_fails(&interpreter, Errno::LOOP, 126, &["scripts in a row"]);

    let own = folder.path("own");
    folder.program("own", format!("#!{}\n", own.display()));
    assert_fails(&own, Errno::LOOP, 126, &["scripts in a row"]);
}

#[test]
fn arguments_are_put_before_the_script() {
    let folder = Folder::new();
    let script = folder.program("script", "#! /bin/sh -e -u\n");
    let name = CString::new(script.to_str().unwrap()).unwrap();
    let program = open(&script).unwrap();
    assert_eq!(
        program.argv,
        [
            c"/bin/sh".into(),
            c"-e -u".into(),
            name.clone(),
            c"one".into()
        ]
    );
    let bare = Program::open(&script, vec![]).unwrap();
    assert_eq!(bare.argv, [c"/bin/sh".into(), c"-e -u".into(), name]);
    assert_eq!(
        Program::open(Path::new("/bin/sh"), vec![]).unwrap().argv,
        [CString::default()]
    );
}

#[test]
fn a_missing_dynamic_linker_is_named() {
    let folder = Folder::new();
    let mut bytes = fs::read("/bin/ls").expect("/bin/ls is installed");
    let name = b"/lib64/ld-linux";
    let at = bytes
        .windows(name.len())
        .position(|window| window == name)
        .unwrap();
    bytes[at..][..7].copy_from_slice(b"/absent");
    let words = [
        "its dynamic linker",
        "/absentld-linux",
        "no such file",
        "install",
    ];
    assert_fails(
        &folder.program("program", &bytes),
        Errno::NOENT,
        127,
        &words,
    );

    let corrupt = folder.program("linker", "no ELF file");
    let name = corrupt.to_str().unwrap().as_bytes();
    if name.len() < 28 {
        bytes[at..][..28].fill(0);
        bytes[at..][..name.len()].copy_from_slice(name);
        let program = folder.program("program", &bytes);
        assert_fails(
            &program,
            Errno::LIBBAD,
            126,
            &["its dynamic linker", "not an ELF file"],
        );
    } else {
        eprintln!("ignored: the folder for temporary files has too long a name to patch in");
    }
}

#[test]
fn commands_are_searched_as_a_shell_does() {
    let folder = Folder::new();
    for name in ["first", "second", "third"] {
        fs::create_dir(folder.path(name)).unwrap();
    }
    let path = ["first", "second", "third"].map(|name| folder.path(name).display().to_string());
    let path = path.join(":");
    let find = |name: &str| find_command(OsStr::new(name), Some(OsStr::new(&path)));

    assert!(matches!(find("tool"), Err(error) if error.exit_code() == 127));
    assert!(matches!(find(""), Err(error) if error.exit_code() == 127));
    fs::create_dir(folder.path("first/tool")).unwrap();
    assert!(
        matches!(find("tool"), Err(error) if error.exit_code() == 127),
        "a folder is passed by"
    );
    folder.file("second/tool", "", 0o644);
    let denied = find("tool").unwrap_err();
    assert_eq!((denied.exit_code(), denied.errno()), (126, Errno::ACCESS));
    folder.program("third/tool", "");
    assert_eq!(find("tool").unwrap(), folder.path("third/tool"));
    assert_eq!(
        find("./tool").unwrap(),
        Path::new("./tool"),
        "a path is not searched for"
    );
    assert!(
        find_command(OsStr::new("sh"), None).is_ok(),
        "the default folders"
    );
}
