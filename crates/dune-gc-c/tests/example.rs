//! The C example, linked as its head says, with every provider that needs no ring 0.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The archive that this package is, which cargo does not make for its tests.
fn archive() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let profile = own.parent().unwrap().parent().unwrap();
    let mut build = Command::new(env!("CARGO"));
    build
        .args(["build", "--quiet", "--lib", "-p", env!("CARGO_PKG_NAME")])
        .arg("--target-dir")
        .arg(profile.parent().unwrap())
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    if profile.ends_with("release") {
        build.arg("--release");
    }
    assert!(build.status().unwrap().success(), "cargo build");
    profile.join("libdune_gc.a")
}

fn compile(into: &Path) {
    let gc = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dune-gc");
    let output = Command::new("cc")
        .args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(gc.join("include"))
        .arg(gc.join("examples/words.c"))
        .arg(archive())
        .args(["-lpthread", "-ldl", "-lm", "-o"])
        .arg(into)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
}

#[test]
fn the_example_counts_words_with_every_provider() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("words");
    compile(&program);
    // So many that there are collections: each word is an allocation.
    let mut text = String::new();
    for n in 0..400_000 {
        text.push_str(&format!("word{} the\n", n % 20_000));
    }
    for provider in ["none", "mprotect", "userfaultfd", "auto"] {
        let mut child = Command::new(&program)
            .arg(provider)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        let sent = input.write_all(text.as_bytes());
        drop(input);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{provider}: {}", output.status);
        sent.unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let expected = "800000 words, 20001 different, most of them \"the\": 400000; ";
        let rest = said.strip_prefix(expected).expect(&said);
        let collections = rest.strip_suffix(" collections\n").expect(&said);
        assert!(
            collections.parse::<u64>().unwrap() > 0,
            "{provider}: {said}"
        );
    }
}

#[test]
fn a_provider_of_another_name_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("words");
    compile(&program);
    let output = Command::new(&program)
        .arg("magic")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "words: no heap: Invalid argument\n"
    );
}
